"""Merges that keep every task's skill, of whole matrices and by masks of tasks, against the float64 reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import load_tensors, make_checkpoint, write_json
from running import make_plan, run
from safetensors.torch import save_file

from deltamerge.errors import DeltamergeError, InputError
from deltamerge.run.apply import apply

SHAPES = {
    "embed_tokens.weight": (31, 24),
    "lm_head.weight": (31, 24),
    "layers.0.q.weight": (24, 40),
    "layers.0.up.weight": (300, 24),
    "layers.0.down.weight": (24, 300),
    "layers.0.square.weight": (17, 17),
    "layers.0.norm.weight": (24,),
    "layers.0.gate.weight": (1, 24),
    "layers.1.experts.weight": (3, 70, 330),
    "layers.1.conv.weight": (6, 4, 3, 3),
    "layers.1.A_log": (24, 16),
    "scalar": (),
    "empty.weight": (0, 4),
}
Q = "layers.0.q.weight"
MATRICES = {"q", "up", "down", "square", "experts", "conv"}


def tensors(seed: int, dtype: torch.dtype, around: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator) * (0.05 if around is None else 0.02)
        made[name] = (noise if around is None else around[name].float() + noise).to(dtype)
    return made


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def models(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = tensors(0, request.param)
    make_checkpoint(folder / "base", base)
    for seed, name in enumerate("abc", 1):
        make_checkpoint(folder / name, tensors(seed, request.param, base), shards=seed)
    return folder


def load64(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in load_tensors(folder).items()}


def text(method: str, parameters: str = "", names: str = "abc", own: str = "", more: str = "") -> str:
    models = [f"  - {{model: ./{name}{own}}}" for name in names]
    lines = [f"merge_method: {method}", "base_model: ./base", "models:", *models, f"parameters: {{{parameters}}}"]
    return "\n".join([*lines, more, ""])


def merge(models: Path, tmp_path: Path, recipe: str, **options) -> Path:
    path = models / f"{tmp_path.name}.yaml"
    path.write_text(recipe)
    return run(path, tmp_path / options.pop("name", "out"), force=True, **options).folder


def whole(formula, scale=1.0):
    """What a merge of whole matrices adds to each tensor."""

    def added(by_name):
        result = {}
        for name, deltas in by_name.items():
            if MATRICES & set(name.split(".")):
                result[name] = scale * reference.by_matrix(deltas, formula, stacked="experts" in name)
            else:
                result[name] = min(scale, 1) * sum(deltas) / len(deltas)
        return result

    return added


def entries(formula):
    return lambda by_name: {name: formula(deltas) for name, deltas in by_name.items()}


def of_one_length(formula):
    return lambda by_name: formula({name: reference.balanced(deltas) for name, deltas in by_name.items()})


BALANCE = "balance: norm"
METHODS = {
    "iso_c": (text("iso_c"), whole(reference.iso_c, 2.25)),
    "iso_c-scaled": (
        text("iso_c", "lambda: 1.3", "ab", ", parameters: {weight: 0.5}"),
        whole(lambda ds: reference.iso_c([0.5 * d for d in ds[:2]]), 1.3),
    ),
    "iso_cts": (text("iso_cts"), whole(reference.iso_cts)),
    "iso_cts-apart": (text("iso_cts", "common: 0"), whole(lambda ds: reference.iso_cts(ds, 0))),
    "tsv_m": (text("tsv_m"), whole(reference.tsv_m)),
    "svc": (text("svc"), whole(reference.svc, 1.2 / 3**0.5)),
    "wudi": (text("wudi", "rho: 0.05"), whole(lambda ds: reference.wudi(ds, 0.05))),
    "wudi-steps": (text("wudi", "steps: 4"), whole(lambda ds: reference.wudi_steps(ds, 4))),
    "consensus": (text("consensus"), entries(reference.consensus)),
    "consensus-all": (
        text("consensus", "threshold: 1.2, agreement: 3, lambda: 0.5"),
        entries(lambda ds: 0.5 * reference.consensus(ds, 1.2, 3)),
    ),
    "tall_masks": (
        text("tall_masks", "task: 2, threshold: 0.8"),
        entries(lambda ds: np.where(reference.tall_mask(ds, 1, 0.8), sum(ds), 0)),
    ),
    "emr": (text("emr", "task: 3"), lambda by_name: reference.emr(by_name, 2)),
    "emr-balanced": (text("emr", "task: 3", more=BALANCE), of_one_length(lambda by_name: reference.emr(by_name, 2))),
    "wudi-balanced": (
        text("wudi", "rho: 0.05", more=BALANCE),
        of_one_length(whole(lambda ds: reference.wudi(ds, 0.05))),
    ),
    "task_arithmetic-balanced": (
        text("task_arithmetic", "weight: 0.5", more=BALANCE),
        of_one_length(entries(lambda ds: 0.5 * sum(ds))),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_method_equals_the_float64_reference(models, tmp_path, method):
    recipe, formula = METHODS[method]
    got = load_tensors(merge(models, tmp_path, recipe, workers=2))
    base, inputs = load64(models / "base"), [load64(models / name) for name in "abc"]
    deltas = {name: [(x[name] - b).astype(np.float32).astype(float) for x in inputs] for name, b in base.items()}
    if "scaled" in method:
        added = formula(
            {n: ds if MATRICES & set(n.split(".")) else [0.5 * d for d in ds[:2]] for n, ds in deltas.items()}
        )
    else:
        added = formula(deltas)
    assert got.keys() == base.keys()
    for name, b in base.items():
        wanted = b + added[name]
        size = np.abs(wanted).max(initial=0) + sum(np.abs(d).max(initial=0) for d in deltas[name])
        allowed = 0.5 * torch.finfo(got[name].dtype).eps * np.abs(wanted) + 2.0**-21 * size
        error = np.abs(got[name].double().numpy() - wanted)
        if method.startswith(("consensus", "tall", "emr")):  # float32 orders what float64 tells apart
            assert (error > allowed + 1e-30).sum() <= 1e-3 * error.size, name
        else:
            np.testing.assert_array_less(error, allowed + 1e-30, err_msg=name)


@pytest.mark.parametrize("models", [torch.float32], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_whatever_the_workers_and_tiles(models, tmp_path, monkeypatch, method):
    recipe = METHODS[method][0] + "prune: {method: magnitude, density: 0.5}\n"
    first = (merge(models, tmp_path, recipe) / "model.safetensors").read_bytes()
    assert (merge(models, tmp_path, recipe, name="w", workers=3) / "model.safetensors").read_bytes() == first
    monkeypatch.setattr("deltamerge.engine.execute.TILE_ELEMENTS", 1 << 9)
    assert (merge(models, tmp_path, recipe, name="t", workers=2) / "model.safetensors").read_bytes() == first


def added(merged: Path, base: Path, name: str) -> np.ndarray:
    return load64(merged)[name] - load64(base)[name]


@pytest.fixture
def pair(tmp_path):
    """Writes base, a and b of one weight: what is added to zeros."""

    def write(*deltas: torch.Tensor, name: str = "layers.0.q.weight", config=None) -> Path:
        for model, delta in zip(("base", "a", "b"), (0 * deltas[0], *deltas), strict=True):
            make_checkpoint(tmp_path / model, {name: delta}, config=config)
        return tmp_path

    return write


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_directions_that_are_only_rounding_are_left_out(pair, tmp_path, method):
    """Of adapters of rank 2 comes a delta of rank 4, not one with the noise of float32 raised to the mean."""
    generator = torch.Generator().manual_seed(0)
    low = [torch.randn(n, 2, generator=generator) @ torch.randn(2, 40, generator=generator) for n in (90, 90)]
    folder = pair(*low)
    got = added(merge(folder, tmp_path, text(method, names="ab")), folder / "base", "layers.0.q.weight")
    values = np.linalg.svd(got, compute_uv=False)
    assert values[3] > 0.01 * values[0]
    assert values[4] < 1e-5 * values[0]


@pytest.mark.parametrize(
    ("shape", "ranks"), [((24, 40), (2, 3)), ((40, 24), (1, 1)), ((24, 24), (0, 4)), ((30, 20), (20, 20))], ids=str
)
def test_iso_c_of_low_rank_counts_what_is_left_out_as_zeros(pair, tmp_path, shape, ranks):
    """The mean is of all r singular values, the directions are those that are there."""
    draw = np.random.default_rng(3)
    low = [draw.integers(-3, 4, (shape[0], k)) @ draw.integers(-3, 4, (k, shape[1])) / 64.0 for k in ranks]
    folder = pair(*(torch.from_numpy(delta).float() for delta in low))
    got = added(merge(folder, tmp_path, text("iso_c", "lambda: 1", "ab")), folder / "base", "layers.0.q.weight")
    values = np.linalg.svd(sum(low), compute_uv=False)
    there = int((values > 2.0**-20 * values[0]).sum())
    np.testing.assert_allclose(got, reference.iso_c(low), atol=5e-7 * np.abs(got).max())
    expected = np.repeat([values.mean(), 0.0], [there, len(values) - there])
    np.testing.assert_allclose(np.linalg.svd(got, compute_uv=False), expected, atol=1e-5 * values.mean())


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m", "svc", "wudi"])
def test_nothing_changed_and_what_is_not_finite(pair, tmp_path, method):
    folder = pair(torch.zeros(24, 40), torch.zeros(24, 40))
    assert not added(merge(folder, tmp_path, text(method, names="ab")), folder / "base", "layers.0.q.weight").any()
    broken = torch.ones(24, 40)
    broken[3, 5] = torch.nan
    with pytest.raises(DeltamergeError, match="not finite"):
        merge(pair(broken, torch.ones(24, 40)), tmp_path, text(method, names="ab"))


TURNED = pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        ("h.0.attn.c_attn.weight", (24, 72), {"model_type": "gpt2"}),
        ("h.0.mlp.c_proj.weight", (72, 24), {"model_type": "gpt2"}),
        ("layers.0.experts.gate_up_proj", (2, 24, 36), {"model_type": "test", "hidden_size": 24}),
    ],
)


@TURNED
@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m", "svc"])
def test_singular_vectors_of_a_weight_that_is_stored_turned(pair, tmp_path, name, shape, config, method):
    deltas = [0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    folder = pair(*deltas, name=name, config=config)
    got = added(merge(folder, tmp_path, text(method, names="ab")), folder / "base", name)
    turned = [d.double().numpy().swapaxes(-1, -2) for d in deltas]
    wanted = reference.by_matrix(turned, getattr(reference, method), stacked=len(shape) == 3).swapaxes(-1, -2)
    np.testing.assert_allclose(got, reference.usual_lambda(method, 2) * wanted, atol=1e-6)


@TURNED
@pytest.mark.parametrize("steps", [0, 5])
def test_inputs_of_a_weight_that_is_stored_turned_are_its_rows(pair, tmp_path, name, shape, config, steps):
    deltas = [0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    folder = pair(*deltas, name=name, config=config)
    recipe = text("wudi", f"rho: 0.05, steps: {steps}", "ab")
    got = added(merge(folder, tmp_path, recipe), folder / "base", name)
    formula = (lambda ds: reference.wudi_steps(ds, steps)) if steps else (lambda ds: reference.wudi(ds, 0.05))
    turned = [d.double().numpy().swapaxes(-1, -2) for d in deltas]
    wanted = reference.by_matrix(turned, formula, stacked=len(shape) == 3).swapaxes(-1, -2)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m", "svc", "wudi"])
def test_whole_matrices_count_in_memory(tmp_path, method, monkeypatch):
    for model in ("base", "a", "b"):
        make_checkpoint(
            tmp_path / model, {f"layers.{i}.up.weight": torch.full((1000, 3000), ord(model[0]) + 0.0) for i in (0, 1)}
        )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text(method, names="ab"))
    plain = tmp_path / "plain.yaml"
    plain.write_text(text("task_arithmetic", "weight: 1", "ab"))
    one, two = (make_plan(recipe, workers=n).peak_bytes for n in (1, 2))
    assert one - make_plan(plain, workers=1).peak_bytes > 8 * 1000 * 3000
    assert two - one > 8 * 1000 * 3000
    assert json.loads(json.dumps(make_plan(recipe).describe()))["operations"] > 1e10
    with pytest.raises(InputError, match="is too little for 2 workers"):
        make_plan(recipe, workers=2, memory=one)
    make_plan(recipe, workers=1, memory=one)
    monkeypatch.setattr("deltamerge.run.options.default_workers", lambda: 3)
    assert [make_plan(recipe, memory=cap).workers for cap in (one, None)] == [1, 3]
    with pytest.raises(InputError, match=r"is too little for 1 worker$"):
        make_plan(recipe, memory=one // 2)


@pytest.mark.parametrize("models", [torch.float32], indirect=True)
@pytest.mark.parametrize("method", ["emr", "tall_masks"])
def test_a_task_s_artifact_makes_its_model(models, tmp_path, method):
    recipe = text(method, "task: 2")
    wanted = load_tensors(merge(models, tmp_path, recipe, name="model"))
    artifact = merge(models, tmp_path, recipe + "output: {kind: delta, values: float32}\n", name="delta")
    apply(str(artifact), str(models / "base"), tmp_path / "applied", workers=1)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_tensors(tmp_path / "applied").items())
    with pytest.raises(DeltamergeError, match="task 4: the recipe merges 3 models"):
        merge(models, tmp_path, text(method, "task: 4"))


def test_a_delta_that_is_zero_has_no_part_in_the_balance(pair, tmp_path):
    large, nothing = torch.eye(4) * 3.0, torch.zeros(4, 4)
    folder = pair(large, nothing)
    recipe = text("task_arithmetic", "weight: 1", "ab", more=BALANCE)
    merged = merge(folder, tmp_path, recipe)
    np.testing.assert_array_equal(added(merged, folder / "base", "layers.0.q.weight"), large.numpy())


def test_balanced_deltas_are_as_long_after_pruning(pair, tmp_path):
    """The lengths are of what pruning keeps, and the weights come after them."""
    deltas = [torch.diag(torch.tensor([8.0, 0.1, 0.1, 0.1])), torch.diag(torch.tensor([0.0, 0.0, 0.1, 2.0])).flip(1)]
    folder = pair(*deltas)
    models = "models:\n  - {model: ./a, parameters: {weight: 1}}\n  - {model: ./b, parameters: {weight: 3}}\n"
    recipe = f"merge_method: task_arithmetic\nbase_model: ./base\n{models}{BALANCE}\n"
    merged = merge(folder, tmp_path, recipe + "prune: {method: magnitude, density: 0.0625}\n")
    wanted = 5.0 * (deltas[0] > 1) + 15.0 * (deltas[1] > 1)
    np.testing.assert_allclose(added(merged, folder / "base", "layers.0.q.weight"), wanted.numpy(), rtol=1e-6)


def test_balance_needs_deltas(models, tmp_path):
    recipe = text("linear", "weight: 1", "ab", more=BALANCE)
    with pytest.raises(DeltamergeError, match=r"balance: is of the deltas of a base, linear has none"):
        merge(models, tmp_path, recipe)


def test_svc_of_equal_deltas_is_one(pair, tmp_path):
    """Whose sum is too long by their number: their directions are taken once."""
    delta = 0.1 * torch.randn(20, 1, generator=torch.Generator().manual_seed(4)) @ torch.ones(1, 30)
    folder = pair(delta, delta)
    got = added(merge(folder, tmp_path, text("svc", "lambda: 1", "ab")), folder / "base", Q)
    np.testing.assert_allclose(got, delta.double().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "factor"), [("iso_c", 2.25), ("svc", 1.2 / 5**0.5), ("tsv_m", 2 / 5**0.5), ("wudi", 2 / 5**0.5)]
)
def test_the_usual_lambda_follows_the_number_of_models(pair, tmp_path, method, factor):
    """Of one model it is 1; of five, what was measured to be near the best."""
    generator = torch.Generator().manual_seed(3)
    folder = pair(*torch.randn(2, 12, 12, generator=generator))
    for name in "cde":
        make_checkpoint(folder / name, {"layers.0.q.weight": torch.randn(12, 12, generator=generator)})
    for names, expected in (("a", 1.0), ("abcde", factor)):
        usual, plain = (
            added(merge(folder, tmp_path, text(method, given, names), name=f"{names}{k}"), folder / "base", Q)
            for k, given in enumerate(("", "lambda: 1"))
        )
        np.testing.assert_allclose(usual, expected * plain, rtol=1e-6)


CORES = [("iso_c", ""), ("tsv_m", BALANCE), ("svc", ""), ("wudi", BALANCE)]


def write_lora(folder: Path, weight: str, a: torch.Tensor, b: torch.Tensor) -> None:
    stem = f"base_model.model.{weight.removesuffix('.weight')}"
    folder.mkdir()
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": len(a), "lora_alpha": 6})


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("method", "more"), CORES)
def test_loras_are_merged_in_their_core(tmp_path, method, more, turned):
    """As whole deltas would be that no dtype had rounded; one of three models leaves the weight alone."""
    generator = torch.Generator().manual_seed(5)
    weight, other, config = "h.0.attn.c_attn.weight", "h.1.mlp.weight", {"model_type": "gpt2"} if turned else None
    base = {weight: torch.randn(24, 40, generator=generator).bfloat16(), other: torch.zeros(4, 4)}
    make_checkpoint(tmp_path / "base", base, config=config)
    inputs, outputs = (24, 40) if turned else (40, 24)
    deltas = [np.zeros((outputs, inputs))]
    for name, rank in (("a", 2), ("b", 3)):
        a, b = (0.02 * torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        write_lora(tmp_path / name, weight, a, b)
        deltas.insert(0, 6.0 / rank * b.double().numpy() @ a.double().numpy())
    write_lora(tmp_path / "c", other, torch.ones(1, 4), torch.ones(4, 1))
    recipe = text(method, names=["base+./b", "base+./a", "base+./c"], more=f"{more}\ndtype: float32")
    merged = merge(tmp_path, tmp_path, recipe)
    assert any("core of at most 5 directions" in note for note in make_plan(next(tmp_path.glob("*.yaml"))).remarks)
    formula = (lambda ds: reference.wudi(ds, 1.0)) if method == "wudi" else getattr(reference, method)
    wanted = reference.usual_lambda(method, 3) * formula(reference.balanced(deltas) if more else deltas)
    allowed = 2.0**-24 * float(base[weight].float().abs().max()) + 2.0**-20 * np.abs(wanted).max()
    np.testing.assert_allclose(added(merged, tmp_path / "base", weight), wanted.T if turned else wanted, atol=allowed)


@pytest.mark.parametrize("more", ["prune: {method: magnitude, density: 0.5}", "parameters: {steps: 3}"])
def test_what_changes_whole_deltas_is_in_no_core(tmp_path, more):
    make_checkpoint(tmp_path / "base", {Q: torch.zeros(24, 40)})
    for name in "ab":
        write_lora(tmp_path / name, Q, torch.ones(2, 40), torch.ones(24, 2))
    recipe = text("wudi", names=["base+./a", "base+./b"]).replace("parameters: {}\n", "") + more
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert not any("core" in note for note in make_plan(tmp_path / "recipe.yaml").remarks)
