from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama
from tolerance import gamma
from torch import Tensor, nn

from deltamerge.apps.train.adamr import AdamR, Pretrained, _match, pull
from deltamerge.errors import DeltamergeError, InputError

Array = npt.NDArray[np.float64]


class Net(nn.Module):
    """Two layers under the prefix `body.` and a head; smooth, so that runs can be compared closely."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        self.to(dtype)

    def forward(self, x_N6: Tensor) -> Tensor:
        y_N3: Tensor = self.head(self.body(x_N6))
        return y_N3


def batches(steps: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x_N6 = torch.randn(32, 6, generator=generator)
        yield x_N6.to(dtype), (x_N6[:, :3] * x_N6[:, 3:]).to(dtype)


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 10,
    before_step: Callable[[int], object] = lambda step: None,
    seed: int = 9,
) -> float:
    loss = torch.tensor(0.0)
    for step, (x, y) in enumerate(batches(steps, next(net.parameters()).dtype, seed)):
        loss = ((net(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        before_step(step)
        optimizer.step()
    return loss.item()


def every_seventh(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    if step % 7 == 3:
        schedule.step()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def distance(net: nn.Module, base: nn.Module) -> float:
    return sum((p - q).abs().sum().item() for p, q in zip(net.parameters(), base.parameters(), strict=True))


# λ = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("foreach", "torch_foreach"), [(True, True), (False, False), (True, False), (False, True)])
def test_without_decay_it_is_adamw_bit_for_bit(dtype: torch.dtype, foreach: bool, torch_foreach: bool) -> None:
    if dtype == torch.bfloat16 and foreach != torch_foreach:
        pytest.skip("AdamW's own two implementations differ in bfloat16")
    nets = [Net(dtype=dtype), Net(dtype=dtype)]
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.97), "eps": 1e-7}
    groups: list[list[dict[str, Any]]] = [
        [{"params": net.body.parameters()}, {"params": net.head.parameters(), "lr": 1e-2, "betas": (0.0, 0.5)}]
        for net in nets
    ]  # fmt: skip
    ours = AdamR(groups[0], {}, decay=0, foreach=foreach, **options)
    theirs = torch.optim.AdamW(groups[1], weight_decay=0, foreach=torch_foreach, **options)
    for net, optimizer in zip(nets, (ours, theirs), strict=True):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        train(net, optimizer, 60, partial(every_seventh, schedule))
    assert_same(weights(nets[0]), weights(nets[1]))
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert all(torch.equal(ours.state[p][key], theirs.state[q][key]) for key in ours.state[p])


# The update, against one page of numpy


def reference_step(
    theta: dict[str, Array], grad: dict[str, Array], state: dict[str, Any], anchor: dict[str, Array],
    options: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    """Section 7 in float64, with the safeguards; `options` per parameter; parameters without `grad` stand still."""
    for name, g in grad.items():
        o, s = options[name], state.setdefault(name, {"t": 0, "m": np.zeros_like(g), "v": np.zeros_like(g)})
        beta1, beta2 = o["betas"]
        s["t"] += 1
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g * g
        s["v_hat"] = s["v"] / (1 - beta2 ** s["t"])
    v_bar = np.concatenate([state[name]["v_hat"].ravel() for name in grad]).mean()
    for name in grad:
        o, s = options[name], state[name]
        c = o["lr"] * o["decay"] / np.sqrt(v_bar if v_bar > 0 else 1.0)
        step = o["lr"] * (s["m"] / (1 - o["betas"][0] ** s["t"])) / (np.sqrt(s["v_hat"]) + o["eps"])
        if name in anchor:
            delta = theta[name] - anchor[name]
            l1 = np.minimum(c, np.abs(delta)) * np.sign(delta)
            step = step + (min(c, 1.0) * delta if o["regularizer"] == "l2" else l1)
        theta[name] = theta[name] - step


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ({"regularizer": "l2", "decay": 0.05}, {}),
        ({"regularizer": "l2", "decay": 5.0}, {"decay": 0.0}),
        ({"regularizer": "l1", "decay": 2e-3}, {"decay": 1e-2, "betas": (0.5, 0.9)}),
        ({"regularizer": "l1", "decay": 0.5}, {"regularizer": "l2", "decay": 0.3, "eps": 1e-4, "lr": 3e-4}),
    ],
)
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_ten_steps_of_the_reference(
    body: dict[str, Any], head: dict[str, Any], foreach: bool, dtype: torch.dtype, tolerance: float
) -> None:
    net, base = Net(1, dtype), Net(2, dtype)
    default: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8, "regularizer": "l2"}
    groups = [
        {"params": [(f"body.{name}", p) for name, p in net.body.named_parameters()], **body},
        {"params": [(f"head.{name}", p) for name, p in net.head.named_parameters()], **head},
    ]
    pretrained = {f"body.{name}": p for name, p in base.body.named_parameters()}  # the head is fresh
    optimizer = AdamR(groups, pretrained, decay=0.01, foreach=foreach, **default)
    assert optimizer.fresh == ([] if head.get("decay") == 0 else ["head.weight", "head.bias"])

    theta = {name: p.double().numpy() for name, p in weights(net).items()}
    anchor = {name: p.detach().double().numpy() for name, p in pretrained.items()}
    options = {n: default | {"decay": 0.01} | (body if n.startswith("body") else head) for n in theta}
    state: dict[str, Any] = {}
    frozen = net.body[2].bias

    def follow(step: int) -> None:
        if step in (3, 4):  # a parameter that sits out keeps its own count of steps
            frozen.grad = None
        named = net.named_parameters()
        grad = {name: p.grad.double().numpy().copy() for name, p in named if p.grad is not None}
        reference_step(theta, grad, state, anchor, options)

    train(net, optimizer, 10, follow)
    for name, value in weights(net).items():
        np.testing.assert_allclose(value.double().numpy(), theta[name], rtol=tolerance, atol=tolerance)


def test_no_gradient_anywhere_counts_as_a_second_moment_of_one() -> None:
    p, base = nn.Parameter(torch.full((4,), 3.0)), torch.ones(4)
    p.grad = torch.zeros(4)
    optimizer = AdamR([("p", p)], {"p": base}, lr=0.1, decay=0.5)
    optimizer.step()
    assert optimizer.root_v == 1
    torch.testing.assert_close(p.detach(), torch.full((4,), 3 - 0.05 * 2))


def test_the_mean_of_a_large_tensor_keeps_its_digits() -> None:
    p = nn.Parameter(torch.zeros(3_000_000))
    p.grad = torch.full_like(p, 0.1)
    optimizer = AdamR([("p", p)], {"p": torch.zeros(3_000_000)})
    optimizer.step()
    assert optimizer.root_v is not None
    assert optimizer.root_v.item() == pytest.approx(0.1, rel=1e-6)


# The decay alone


@pytest.mark.sampled(4)
@pytest.mark.parametrize("regularizer", ["l2", "l1"])
@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("c", [0.0, 1e-3, 0.4, 0.7, 1.0, 30.0])
def test_pull(
    regularizer: Any, as_tensor: bool, foreach: bool, dtype: torch.dtype, stored: torch.dtype, c: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 5), (2**17 + 3,), (), (2, 4, 3, 3)]  # one longer than a piece, one of channels last
    params = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    params[3] = params[3].contiguous(memory_format=torch.channels_last)
    anchors = [torch.randn(shape, generator=generator).to(stored) for shape in shapes]
    before = [p.double().numpy().copy() for p in params]
    kept = [a.clone() for a in anchors]
    rate = torch.tensor(c, dtype=dtype) if as_tensor else c
    pull(params, anchors, rate, regularizer=regularizer, foreach=foreach)
    for p, old, a, same in zip(params, before, anchors, kept, strict=True):
        assert torch.equal(a, same)
        target = a.double().numpy()
        delta = old - target
        change = min(c, 1) * delta if regularizer == "l2" else np.minimum(c, abs(delta)) * np.sign(delta)
        # the rate, the difference, their product and the sum are rounded, of which none is larger than both ends
        allowed = gamma(4, dtype) * (abs(old) + abs(target))
        assert np.all(abs(p.double().numpy() - (old - change)) <= allowed)
        if c >= 1 and regularizer == "l2":
            assert torch.equal(p, a.to(dtype))
        left = p.double().numpy() - target  # never past the pretrained value
        assert np.all((left * delta >= 0) | (abs(left) <= allowed))


@pytest.mark.parametrize("regularizer", ["l2", "l1"])
@pytest.mark.parametrize("decay", [1e2, 1e4, 1e8])
def test_stable_where_weight_decay_diverges(regularizer: Any, decay: float) -> None:
    base = Net(1)
    train(base, torch.optim.AdamW(base.parameters(), lr=1e-2), 200)
    x, y = next(batches(1, seed=4))
    nets = [copy.deepcopy(base), copy.deepcopy(base)]
    adamr = AdamR.for_model(nets[0], base, lr=2.5e-2, decay=decay, regularizer=regularizer)
    adamw = torch.optim.AdamW(nets[1].parameters(), lr=2.5e-2, weight_decay=decay)
    train(nets[0], adamr, 40)
    train(nets[1], adamw, 40)
    losses = [((net(x) - y) ** 2).mean().item() for net in (base, *nets)]
    assert losses[1] < 1.2 * losses[0]
    assert not losses[2] < 100 * losses[0]  # inf or nan, too
    worst = max((p - q).abs().max().item() for p, q in zip(nets[0].parameters(), base.parameters(), strict=True))
    assert worst < 2 * 2.5e-2  # the last Adam step alone


def test_more_decay_leaves_a_smaller_delta_and_l1_a_sparser_one() -> None:
    def delta(decay: float, regularizer: Any) -> Tensor:
        base = Net(1)
        net = copy.deepcopy(base)
        train(net, AdamR.for_model(net, base, lr=3e-3, decay=decay, regularizer=regularizer), 200)
        pairs = zip(net.parameters(), base.parameters(), strict=True)
        return torch.cat([(p - q).detach().flatten() for p, q in pairs])

    sizes = [delta(decay, "l2").square().mean().item() for decay in (0.0, 0.1, 1.0, 10.0)]
    assert sizes == sorted(sizes, reverse=True)
    l2, l1 = delta(0.3, "l2"), delta(0.02, "l1")

    def top_tenth(d: Tensor) -> float:
        return (d.abs().topk(len(d) // 10).values.square().sum() / d.square().sum()).item()

    assert top_tenth(l1) > 1.2 * top_tenth(l2)


# Where the pretrained weights come from, and where they are kept


def test_every_source_gives_the_same_run(tmp_path: Path) -> None:
    base = Net(1)
    state = {name: p.detach() for name, p in base.named_parameters()}
    bare = {name.removeprefix("body."): t for name, t in state.items() if name.startswith("body.")}
    make_checkpoint(tmp_path / "one", state)
    make_checkpoint(tmp_path / "three", state | {"unused": torch.ones(2)}, shards=3)
    make_checkpoint(tmp_path / "bare", bare)
    sources: list[Pretrained] = [base, state, tmp_path / "one", str(tmp_path / "three"), nn.DataParallel(base)]
    results = []
    for source in sources:
        net = Net(2)
        optimizer = AdamR(net.named_parameters(), source, decay=0.1)
        assert optimizer.fresh == []
        train(net, optimizer, 5)
        results.append(weights(net))
    for result in results[1:]:
        assert_same(result, results[0])

    net, wrapped = Net(2), Net(2)
    optimizer = AdamR(net.named_parameters(), tmp_path / "bare", decay=0.1)
    assert optimizer.fresh == ["head.weight", "head.bias"]
    train(net, optimizer, 5)
    named = [(f"module.{name}", p) for name, p in wrapped.named_parameters()]
    train(wrapped, AdamR(named, base.body, decay=0.1), 5)
    assert_same(weights(net), weights(wrapped))


def test_hub_id_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = Net(1)
    repo = tmp_path / "models--someone--net"
    make_checkpoint(repo / "snapshots" / commit, {name: p.detach() for name, p in base.named_parameters()})
    (repo / "blobs").mkdir()
    for path in (repo / "snapshots" / commit).iterdir():  # as huggingface_hub keeps them
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(Path("..", "..", "blobs", blob.name))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for reference in ("someone/net", f"someone/net@{commit}"):
        nets = [Net(2), Net(2)]
        sources: list[Pretrained] = [reference, base]
        for net, source in zip(nets, sources, strict=True):
            train(net, AdamR.for_model(net, source), 3)
        assert_same(weights(nets[0]), weights(nets[1]))
    with pytest.raises(InputError):
        AdamR.for_model(Net(), "someone/other")


@pytest.mark.parametrize("tuned_is_model", [True, False])
def test_prefixes_are_taken_off_either_side(tmp_path: Path, tuned_is_model: bool) -> None:
    base, tuned = (load_tensors(folder) for folder in tiny_bert_pair(tmp_path))
    ours, theirs = (tuned, base) if tuned_is_model else (base, tuned)
    pairs = _match(ours, theirs)
    assert len(pairs) == len(base)
    assert all(ours[name].shape == theirs[stored].shape for name, stored in pairs.items())
    assert "classifier.weight" not in pairs


def test_kept_in_bfloat16_it_pulls_to_the_rounded_weights() -> None:
    base = Net(1)
    rounded = {name: p.detach().bfloat16() for name, p in base.named_parameters()}
    nets = [Net(2), Net(2), Net(2)]
    asked: dict[str, Any] = {"pretrained_dtype": torch.bfloat16, "pretrained_device": "cpu"}
    train(nets[0], AdamR.for_model(nets[0], base, decay=0.1, **asked))
    train(nets[1], AdamR.for_model(nets[1], rounded, decay=0.1))
    train(nets[2], AdamR.for_model(nets[2], rounded, decay=0.1, regularizer="l1", **asked))
    for name, value in weights(nets[0]).items():
        torch.testing.assert_close(value, weights(nets[1])[name], rtol=1e-6, atol=1e-7)


def test_at_most_one_copy_and_none_where_none_is_needed() -> None:
    base, net = Net(1), Net(2)

    def kept(*args: Any, **options: Any) -> dict[str, Tensor]:
        return AdamR.for_model(*args, **options)._pretrained

    for name, tensor in kept(net, base).items():
        assert tensor.data_ptr() == base.get_parameter(name).data_ptr()
    for name, tensor in kept(net, net).items():
        assert tensor.data_ptr() != net.get_parameter(name).data_ptr()
        assert torch.equal(tensor, net.get_parameter(name))
    assert {t.dtype for t in kept(net, base, pretrained_dtype=torch.bfloat16).values()} == {torch.bfloat16}
    assert kept(net, base, fresh=["^head"]).keys() == {n for n, _ in net.named_parameters() if "body" in n}
    assert kept(net, base, decay=0) == {}


def test_the_model_itself_means_its_present_weights() -> None:
    nets, start = [Net(2), Net(2)], Net(2)
    for net, source in zip(nets, (nets[0], start), strict=True):
        train(net, AdamR.for_model(net, source, decay=0.5))
    assert_same(weights(nets[0]), weights(nets[1]))


def test_parameters_added_later() -> None:
    net, base = Net(2), Net(1)
    optimizer = AdamR([(f"body.{n}", p) for n, p in net.body.named_parameters()], base, decay=0.1)
    optimizer.add_param_group({"params": [("head.bias", net.head.bias)], "decay": 0.2, "regularizer": "l1"})
    assert optimizer.fresh == ["head.bias"]
    before = optimizer.state_dict()["param_groups"][0]["pretrained"]
    optimizer.attach(base)
    assert optimizer.fresh == []
    assert optimizer.state_dict()["param_groups"][0]["pretrained"] == before
    train(net, optimizer, 2)


def test_a_model_that_changes_dtype_after_the_optimizer_was_made() -> None:
    net, base = Net(2), Net(1)
    optimizer = AdamR.for_model(net, base, decay=0.1)
    net.double()
    train(net, optimizer, 3)
    assert {t.dtype for t in optimizer._pretrained.values()} == {torch.float64}


# As in any training loop


def test_state_dict_resumes_bit_for_bit() -> None:
    base = Net(1)

    def fresh_run(source: Any = base) -> tuple[Net, AdamR]:
        net = Net(2)
        return net, AdamR.for_model(net, source, decay=0.1, fresh=["^head"])

    net, optimizer = fresh_run()
    train(net, optimizer, 5, seed=1)
    buffer = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(net, optimizer, 5, seed=2)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, second = fresh_run()
    resumed.load_state_dict(saved["net"])
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, 5, seed=2)
    assert_same(weights(resumed), weights(net))
    tensors = [t for s in saved["optimizer"]["state"].values() for t in s.values() if t.dim()]
    assert sum(t.numel() for t in tensors) == 2 * sum(p.numel() for p in net.parameters())  # no θ_P in it

    rounded = {name: p.detach().bfloat16() for name, p in base.named_parameters()}
    fresh_run(rounded)[1].load_state_dict(saved["optimizer"])  # the same weights, kept otherwise
    with pytest.raises(InputError, match="other pretrained weights"):
        fresh_run(net)[1].load_state_dict(saved["optimizer"])


def test_continues_a_run_of_adamw() -> None:
    net, base = Net(2), Net(1)
    adamw = torch.optim.AdamW(net.named_parameters(), lr=1e-2)
    train(net, adamw, 4)
    optimizer = AdamR.for_model(net, base, lr=5e-3, decay=0.3, regularizer="l1")
    optimizer.load_state_dict(adamw.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["decay"], group["regularizer"]) == (1e-2, 0.3, "l1")
    before = distance(net, base)
    train(net, optimizer, 20)
    assert distance(net, base) < before
    optimizer.load_state_dict(optimizer.state_dict())


def test_deepcopy_keeps_the_pretrained_weights() -> None:
    net, base = Net(2), Net(1)
    optimizer = AdamR.for_model(net, base, decay=0.1)
    train(net, optimizer, 3)
    twin, second = copy.deepcopy((net, optimizer))
    train(net, optimizer, 3)
    train(twin, second, 3)
    assert_same(weights(net), weights(twin))


def test_gradient_clipping_and_closure() -> None:
    nets, base = [Net(2), Net(2)], Net(1)
    optimizers = [AdamR.for_model(net, base, decay=0.1) for net in nets]
    train(nets[0], optimizers[0], 3, lambda step: nn.utils.clip_grad_norm_(nets[0].parameters(), 0.1))
    for x, y in batches(3):

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            optimizers[1].zero_grad()
            loss = ((nets[1](x) - y) ** 2).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(nets[1].parameters(), 0.1)
            return float(loss.detach())

        assert optimizers[1].step(closure) > 0
    assert_same(weights(nets[0]), weights(nets[1]))


def test_grad_scaler_and_autocast() -> None:
    """A power of two scales exactly, and a step with infinite gradients is skipped."""
    nets, base = [Net(2), Net(2)], Net(1)
    optimizers = [AdamR.for_model(net, base, decay=0.1) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, (x, y) in enumerate(batches(6)):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = ((net(x) - y) ** 2).mean()
            if net is nets[0]:
                scaler.scale(loss).backward()
                if step == 4:
                    net.head.bias.grad = torch.full((3,), torch.inf)
                scaler.step(optimizer)
                scaler.update()
            elif step != 4:
                loss.backward()
                optimizer.step()
    assert_same(weights(nets[0]), weights(nets[1]))


def test_half_precision_parameters() -> None:
    base = Net(1, torch.bfloat16)
    net = Net(2, torch.bfloat16)
    before = distance(net, base)
    train(net, AdamR.for_model(net, base, lr=1e-2, decay=1.0), 30)
    assert distance(net, base) < before / 2


def test_mixed_dtypes_in_one_group() -> None:
    net, base = Net(2), Net(1)
    net.head.double()
    optimizer = AdamR.for_model(net, base, decay=0.1)
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    assert optimizer.root_v is not None
    assert optimizer.root_v.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda net: AdamR.for_model(net, net, lr=-1.0), "lr must be"),
        (lambda net: AdamR.for_model(net, net, decay=float("nan")), "decay must be"),
        (lambda net: AdamR.for_model(net, net, lr=torch.tensor(0.1)), "lr must be"),
        (lambda net: AdamR.for_model(net, net, betas=(0.9, 1.0)), "betas must be"),
        (lambda net: AdamR.for_model(net, net, regularizer="l3"), "regularizer must be"),
        (lambda net: AdamR([torch.zeros(2, dtype=torch.complex64)], {}, decay=0), "floating-point"),
        (lambda net: AdamR(net.parameters(), net), "the parameters have none"),
        (lambda net: AdamR.for_model(net, {"other": torch.ones(2)}), "lack a pretrained value"),
        (lambda net: AdamR.for_model(net, {"head.bias": torch.ones(5)}), r"head.bias has shape \(3,\)"),
        (lambda net: AdamR.for_model(net, "./nowhere"), "nowhere"),
        (lambda net: AdamR([("a", net.head.bias), ("a", net.head.weight)], net), "two parameters are named"),
    ],
)
def test_faults(make: Callable[[Net], AdamR], match: str) -> None:
    with pytest.raises((ValueError, DeltamergeError), match=match):
        make(Net())


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdamR.for_model(table, table).step()


def test_missing_shard(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", seed=0, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors"):
        AdamR.for_model(Net(), folder)


# With transformers and accelerate


def bert(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).float()


def bert_rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 96, (count, 8), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 8, "labels": row[0] % 2} for row in ids]


@pytest.mark.slow
def test_trainer_runs_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    base, _ = tiny_bert_pair(tmp_path)

    def trainer(folder: str) -> tuple[Any, AdamR]:
        model = bert(base)
        model.config.hidden_dropout_prob = 0.0
        optimizer = AdamR.for_model(model, base, lr=1e-3, decay=0.01)
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[],
            use_cpu=True, disable_tqdm=True, logging_strategy="no", max_grad_norm=1.0, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=bert_rows(16), optimizers=(optimizer, None)), optimizer

    whole, optimizer = trainer("run")
    assert optimizer.fresh == ["classifier.weight", "classifier.bias"]
    whole.train()
    resumed, _ = trainer("run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_accelerate_prepares_it(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    nets, base = [Net(2), Net(2)], Net(1)
    train(nets[0], AdamR.for_model(nets[0], base, decay=0.1), 4)
    accelerator = accelerate.Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(nets[1], AdamR.for_model(nets[1], base, decay=0.1))
    for x, y in batches(4):
        optimizer.zero_grad()
        accelerator.backward(((net(x) - y) ** 2).mean())
        optimizer.step()
    assert_same(weights(nets[0]), weights(nets[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.0},
        {"decay": 0.1},
        {"decay": 1e-3, "regularizer": "l1"},
        {"decay": 0.1, "pretrained_device": "cpu", "pretrained_dtype": torch.bfloat16},
    ],
)
def test_on_cuda_nothing_waits_for_the_device(foreach: bool, options: dict[str, Any]) -> None:
    base, net, on_cpu = Net(1), Net(2).cuda(), Net(2)
    optimizers = [AdamR.for_model(n, base, foreach=foreach, **options) for n in (net, on_cpu)]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for p, q in zip(net.parameters(), on_cpu.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            p.grad = q.grad.cuda()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may move θ_P
        try:
            optimizers[0].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizers[1].step()
    for p, q in zip(net.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)
