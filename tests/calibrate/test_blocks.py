"""Block by block equals transformers' own forward, on tiny configs of every architecture that is promised."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, SMALL, batches, make

from deltamerge.calibrate.model.blocks import BlockModel, BlockOutput, Linear, from_reader
from deltamerge.calibrate.model.passes import Callbacks
from deltamerge.errors import InputError
from deltamerge.tensors.names import numbered_blocks


def plain(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
    with torch.no_grad():
        result = model(**inputs)
        return getattr(result, "logits", None), model.base_model(**inputs)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_plain_forward(architecture: str, tmp_path: Path) -> None:
    reference, tensors = make(architecture, tmp_path)
    other = {name: tensor * 0.9 for name, tensor in tensors.items()}
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = BlockModel(config, tensors)
    assert len(model.blocks) == 3
    assert not model.whole
    assert sorted(n for part in model.parts for n in part) == sorted(tensors)
    spelled = numbered_blocks({name: tuple(t.shape) for name, t in tensors.items()})
    assert spelled is not None
    assert [sorted(part) for part in model.parts[1:]] == [sorted(names) for names in spelled.values()]

    data = batches(architecture)
    got = model.run(data, [from_reader(tensors.__getitem__), from_reader(other.__getitem__)], lambda b, out: out)
    for row, scale in zip(got, (1.0, 0.9), strict=True):
        if scale != 1.0:
            with torch.no_grad():
                for parameter in reference.parameters():
                    parameter.mul_(scale)
        for out, inputs in zip(row, data, strict=True):
            logits, hidden = plain(reference, inputs)
            torch.testing.assert_close(out.hidden, hidden, rtol=1e-5, atol=1e-6)
            if logits is not None:
                assert out.logits is not None
                torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-6)


def test_prefix_on_either_side(tmp_path: Path) -> None:
    reference, tensors = make("BertForSequenceClassification", tmp_path)
    bare = {name.removeprefix("bert."): t for name, t in tensors.items()}
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), bare)
    data = batches("Bert")
    out = model.run(data, [from_reader(bare.__getitem__)], lambda b, out: out)[0][0]
    assert out.logits is not None
    torch.testing.assert_close(out.logits, plain(reference, data[0])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_one_part_is_asked_for_at_a_time_and_let_go(tmp_path: Path) -> None:
    _, tensors = make("LlamaForCausalLM", tmp_path)
    told: list[int] = []
    callbacks = Callbacks(ahead=lambda part, weights: told.append(part))
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors, callbacks=callbacks)
    asked: list[list[str]] = []
    resident: list[int] = []
    alive: list[weakref.ref[torch.Tensor]] = []

    def weights(names: Sequence[str]) -> dict[str, torch.Tensor]:
        gc.collect()
        resident.append(sum(ref() is not None for ref in alive))
        asked.append(sorted(names))
        made = {name: tensors[name].clone() for name in names}
        alive.extend(map(weakref.ref, made.values()))
        return made

    model.run(batches("Llama"), [weights], lambda b, out: None)
    assert told == [2, 3, 4]  # read ahead of their turn; there is no part 4
    rest, *blocks = [sorted(part) for part in model.parts]
    assert asked == [rest, blocks[0], blocks[1], blocks[2], rest]
    assert resident == [0, len(rest), 0, 0, 0]


@pytest.mark.parametrize("fails", [None, 0, 1])
def test_blocks_multiply_in_bfloat16_or_else_in_float32(fails: int | None, tmp_path: Path) -> None:
    reference, tensors = make("LlamaForCausalLM", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model, data = BlockModel(config, tensors, precision="bfloat16"), batches("Llama")
    quick: list[bool] = []

    def see(module: Any, args: Any) -> None:
        quick.append(torch.is_autocast_enabled("cpu"))
        if fails is not None and quick[-1]:
            raise RuntimeError("expected m1 and m2 to have the same dtype")

    mlp: Any = model.blocks[fails or 0].mlp
    mlp.register_forward_pre_hook(see)
    rows = model.run(data, [from_reader(tensors.__getitem__)], lambda b, out: out)[0]
    assert model.precision == ("bfloat16" if fails is None else "float32")
    assert not model.whole
    for row, inputs in zip(rows, data, strict=True):
        assert row.logits is not None
        assert row.logits.dtype == row.hidden.dtype == torch.float32
        wanted = plain(reference, inputs)[1]
        error = float((row.hidden - wanted).norm() / wanted.norm())
        assert 1e-5 < error < 0.02 if fails is None else error < 1e-6
    watched = Seen()
    quick.clear()
    model.run(data, [from_reader(tensors.__getitem__)], lambda b, out: None, watch=watched)
    assert quick.count(False) >= len(data)  # what is watched is float32


def test_what_cannot_be_told_apart_runs_whole(tmp_path: Path) -> None:
    """ALBERT calls one block many times: the model runs whole, and equals the plain forward."""
    settings: Any = transformers.AlbertConfig
    config = settings(**(SMALL | {"embedding_size": 8, "num_hidden_groups": 1}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference: Any = transformers.AlbertModel(config).train(False)
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
    data = batches("Albert")
    seen = Seen()
    rows = model.run(data, [from_reader(tensors.__getitem__)], lambda b, out: out.hidden, watch=seen)
    assert model.whole
    assert len(model.parts) == 1
    assert seen.entered == 1
    for hidden, inputs in zip(rows[0], data, strict=True):
        torch.testing.assert_close(hidden, plain(reference, inputs)[1], rtol=1e-5, atol=1e-6)


class Seen:
    """Keeps what a watch is shown."""

    def __init__(self) -> None:
        self.entered = 0
        self.inputs: dict[tuple[str, int], list[torch.Tensor]] = {}

    def enter(self, layers: Sequence[Linear]) -> None:
        self.entered += 1

    def see(self, layer: Linear, x: torch.Tensor, batch: int) -> None:
        self.inputs.setdefault((layer.name, batch), []).append(x)

    def leave(self, layers: Sequence[Linear]) -> None:
        pass


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_watch_sees_each_input_once(architecture: str, tmp_path: Path) -> None:
    reference, tensors = make(architecture, tmp_path)
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
    data = batches(architecture)
    truth: dict[tuple[str, int], torch.Tensor] = {}
    modules = dict(reference.named_modules())
    layers = [layer for part in model.layers for layer in part]
    for batch, inputs in enumerate(data):
        hooks = []
        for layer in layers:

            def note(module: torch.nn.Module, args: Any, key: tuple[str, int] = (layer.name, batch)) -> None:
                truth[key] = args[0]

            hooks.append(modules[layer.name.removesuffix(".weight")].register_forward_pre_hook(note))
        with torch.no_grad():
            reference(**inputs)
        for hook in hooks:
            hook.remove()
    seen = Seen()
    model.run(data, [from_reader(tensors.__getitem__)] * 2, lambda b, out: None, watch=seen)
    assert seen.inputs.keys() == truth.keys()
    for key, (x,) in seen.inputs.items():
        torch.testing.assert_close(x, truth[key], rtol=1e-5, atol=1e-6)


# every block is given embeddings of relative positions
DISENTANGLED = SMALL | {"num_labels": 3, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}


@pytest.mark.parametrize(
    ("architecture", "way"),
    [
        ("BertForSequenceClassification", "alone"),
        ("Gemma2ForCausalLM", "alone"),
        ("ViTForImageClassification", "alone"),
        ("BertForSequenceClassification", "back"),
        ("Gemma2ForCausalLM", "back"),
        ("DebertaV2ForSequenceClassification", "one by one"),
    ],
)
def test_gradients_are_those_of_the_plain_forward(
    architecture: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch alone; several, block after block and back; several one by one, where blocks share more."""
    monkeypatch.setitem(ARCHITECTURES, "DebertaV2ForSequenceClassification", ("DebertaV2Config", DISENTANGLED))
    reference, tensors = make(architecture, tmp_path)
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
    inputs = batches(architecture)[0]
    scales = {name: torch.ones((), requires_grad=True) for name in tensors}

    def weights(names: Sequence[str]) -> dict[str, torch.Tensor]:
        made.extend(names)
        return {n: tensors[n] * scales[n] for n in names}

    def loss(batch: int, out: BlockOutput) -> Any:
        return (out.hidden if out.logits is None else out.logits).square().sum()

    made: list[str] = []
    if way == "alone":
        loss(0, model.differentiable(inputs, weights)).backward()
        reference(**inputs)[0].square().sum().backward()
    else:
        data = [inputs, *batches(architecture)[1:]]
        model.run(data, [from_reader(tensors.__getitem__)], lambda b, out: None)
        model.descend(data, weights, loss)
        sum(reference(**one)[0].square().sum() for one in data).backward()
        name = model.parts[2][0]
        assert made.count(name) == (2 if way == "back" else 2 * len(data))
    gradients = dict(reference.named_parameters())
    assert sorted(model.checkpoint_name.values()) == sorted(tensors)
    for state, name in model.checkpoint_name.items():
        parameter = gradients[state]
        got = scales[name].grad
        want = (parameter.grad * parameter).sum() if parameter.grad is not None else None
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want.detach(), rtol=2e-4, atol=1e-3)


def test_gradients_of_bfloat16_products(tmp_path: Path) -> None:
    """Those of the blocks' products in float32, to the precision of bfloat16."""
    _, tensors = make("LlamaForCausalLM", tmp_path)
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
    found: dict[str, dict[str, float]] = {}
    for precision in ("float32", "bfloat16"):
        scales = {name: torch.ones((), requires_grad=True) for name in tensors}

        def weights(names: Sequence[str], scales: dict[str, torch.Tensor] = scales) -> dict[str, torch.Tensor]:
            return {name: tensors[name] * scales[name] for name in names}

        loss: Any = model.differentiable(batches("Llama")[0], weights, precision).hidden.square().sum()
        loss.backward()
        found[precision] = {name: float(scale.grad) for name, scale in scales.items() if scale.grad is not None}
    exact, half = found["float32"], found["bfloat16"]
    assert exact.keys() == half.keys()
    assert exact != half
    size = max(map(abs, exact.values()))
    for name, value in exact.items():
        assert half[name] == pytest.approx(value, rel=0.05, abs=0.01 * size), name


@pytest.mark.slow
def test_a_step_of_learned_scales_holds_one_block(tmp_path: Path) -> None:
    """Forward and backward, no block's weights outlive the block."""
    _, tensors = make("LlamaForCausalLM", tmp_path)
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
    scale = torch.ones((), requires_grad=True)
    asked: list[int] = []
    alive: list[list[weakref.ref[torch.Tensor]]] = []

    def weights(names: Sequence[str]) -> dict[str, torch.Tensor]:
        gc.collect()
        asked.append(next(i for i, part in enumerate(model.parts) if part == list(names)))
        made = {name: tensors[name] * scale for name in names}
        alive.append([weakref.ref(tensor) for tensor in made.values()])
        living = [i for i, refs in zip(asked, alive, strict=True) if any(ref() is not None for ref in refs)]
        assert sum(i > 0 for i in living) <= 1
        return made

    loss: Any = model.differentiable(batches("Llama")[0], weights).hidden.square().sum()
    assert asked == [0, 1, 2, 3]
    loss.backward()
    assert asked == [0, 1, 2, 3, 3, 2, 1]
    assert scale.grad is not None


def test_generates_greedily(tmp_path: Path) -> None:
    reference, tensors = make("LlamaForCausalLM", tmp_path)
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors, pad_token_id=0)
    inputs = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
    }
    model.module.generation_config.eos_token_id = None
    got = model.generate([inputs], from_reader(tensors.__getitem__), new_tokens=5)[0]
    want = reference.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)[:, 4:]
    assert torch.equal(got, want)


def test_building_touches_no_random_state_and_allocates_no_weights(tmp_path: Path) -> None:
    _, tensors = make("ViTForImageClassification", tmp_path)
    before = torch.random.get_rng_state()
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
    assert torch.equal(before, torch.random.get_rng_state())
    linear = [module.weight for module in model.module.modules() if isinstance(module, torch.nn.Linear)]
    assert linear
    assert all(weight.is_meta for weight in linear)


def test_a_stored_head_is_not_tied(tmp_path: Path) -> None:
    _, tensors = make("LlamaForCausalLM", tmp_path)
    tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2.0}
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
    assert "lm_head.weight" in model.parts[0]
    data = batches("Llama")[:1]
    tied = BlockModel(
        transformers.AutoConfig.from_pretrained(tmp_path), {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    )
    read = from_reader(tensors.__getitem__)
    twice, once = (m.run(data, [read], lambda b, out: out.logits)[0][0] for m in (model, tied))
    assert twice is not None
    assert once is not None
    torch.testing.assert_close(twice, once * 2.0)


def test_errors(tmp_path: Path) -> None:
    _, tensors = make("BertModel", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"needs encoder\.layer\.1\.output\.dense\.weight, which the checkpoint lacks"):
        BlockModel(config, {k: v for k, v in tensors.items() if k != "encoder.layer.1.output.dense.weight"})
    config.architectures = ["RemoteModel"]
    with pytest.raises(InputError, match="no model class 'RemoteModel'"):
        BlockModel(config, tensors)
