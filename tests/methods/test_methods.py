"""Merge and pruning methods that need more than one pass or a formula of their own, against the float64 reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import load_tensors, make_checkpoint
from running import run

from deltamerge.engine import backends
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.errors.plugins import PluginWarning
from deltamerge.methods.ops import cast
from deltamerge.methods.prune import bits
from deltamerge.methods.registry import third_party
from deltamerge.tensors.tiles import Patched, Tile

SHAPES = {
    "embed.weight": (301, 24),
    "layers.0.q.weight": (24, 40),
    "layers.0.norm.weight": (24,),
    "layers.1.experts.weight": (3, 8, 12),
    "layers.1.conv.weight": (6, 4, 3, 3),
    "wide.weight": (3, 70_001),
    "scalar": (),
    "empty": (0, 4),
}


def weights(seed: int, dtype: torch.dtype, around: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator) * (0.05 if around is None else 0.02)
        tensors[name] = (noise if around is None else around[name].float() + noise).to(dtype)
    return tensors


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def models(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = weights(0, request.param)
    make_checkpoint(folder / "base", base)
    for seed, name in enumerate("abc", 1):
        make_checkpoint(folder / name, weights(seed, request.param, base), shards=seed)
    return folder


def merge(models: Path, tmp_path: Path, text: str, **options) -> dict[str, torch.Tensor]:
    recipe = models / f"{tmp_path.name}.yaml"
    recipe.write_text(text)
    return load_tensors(run(recipe, tmp_path / "out", force=True, **options).folder)


def load64(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in load_tensors(folder).items()}


def text(method: str, names: str = "abc", parameters: str = "", base: str | None = "base", more: str = "") -> str:
    lines = [f"merge_method: {method}", *([f"base_model: ./{base}"] if base else []), "models:"]
    return "\n".join([*lines, *(f"  - model: ./{name}" for name in names), f"parameters: {{{parameters}}}", more, ""])


TWO = (0.3, 0.9)
THREE = (0.2, 0.5, 1.1)
SHARES = "weight: [{filter: q, value: 1}, 2]"


def weighted(method: str, weights: tuple[float, ...], parameters: str = "", base: str | None = "base") -> str:
    lines = [f"merge_method: {method}", *([f"base_model: ./{base}"] if base else []), "models:"]
    lines += [f"  - {{model: ./{n}, parameters: {{weight: {w}}}}}" for n, w in zip("abc", weights, strict=False)]
    return "\n".join([*lines, f"parameters: {{{parameters}}}", ""])


def trimmed_to_norm(delta: np.ndarray, density: float) -> np.ndarray:
    return reference.match_norm(reference.keep_top(delta, max(1, int(density * delta.size))), delta, "l1")


METHODS = {
    "slerp": (text("slerp", "a", "t: 0.3"), lambda b, xs, ds: reference.slerp(b, xs[0], 0.3)),
    "slerp-near": (
        text("slerp", ("a", "base"), "t: 0.5", base="a"),
        lambda b, xs, ds: reference.slerp(xs[0], b, 0.5),
    ),
    "nuslerp": (weighted("nuslerp", TWO, base=None), lambda b, xs, ds: reference.nuslerp(xs[0], xs[1], TWO)),
    "nuslerp-deltas": (weighted("nuslerp", TWO), lambda b, xs, ds: b + reference.nuslerp(ds[0], ds[1], TWO)),
    "nuslerp-rows": (
        weighted("nuslerp", TWO, "nuslerp_flatten: false"),
        lambda b, xs, ds: b + reference.nuslerp(ds[0], ds[1], TWO, axis=-1),
    ),
    "nuslerp-columns": (
        weighted("nuslerp", TWO, "nuslerp_flatten: false, nuslerp_row_wise: true", base=None),
        lambda b, xs, ds: reference.nuslerp(xs[0], xs[1], TWO, axis=0),
    ),
    "multislerp": (weighted("multislerp", THREE, base=None), lambda b, xs, ds: reference.multislerp(xs, THREE)),
    "multislerp-deltas": (
        weighted("multislerp", THREE, "normalize_weights: false, eps: 0.0001"),
        lambda b, xs, ds: b + reference.multislerp(ds, THREE, normalize=False, eps=1e-4),
    ),
    "karcher": (
        text("karcher", "abc", "max_iter: 60, tol: 1e-9", base=None),
        lambda b, xs, ds: reference.karcher(xs),
    ),
    "model_stock": (text("model_stock"), lambda b, xs, ds: reference.model_stock(b, ds)),
    "model_stock-rows": (
        text("model_stock", "ab", "filter_wise: true"),
        lambda b, xs, ds: reference.model_stock(b, ds[:2], axis=-1),
    ),
    "nearswap": (text("nearswap", "a", "t: 0.01"), lambda b, xs, ds: reference.nearswap(b, xs[0], 0.01)),
    "sce": (text("sce"), lambda b, xs, ds: reference.sce(b, ds)),
    "sce-topk": (text("sce", "abc", "select_topk: 0.2"), lambda b, xs, ds: reference.sce(b, ds, 0.2)),
    "sce-nothing": (text("sce", "ab", "select_topk: 0"), lambda b, xs, ds: b),
    "ram": (text("ram", "abc", "epsilon: 0.02"), lambda b, xs, ds: reference.ram(b, ds, 0.02)),
    "ramplus_tl": (
        text("ramplus_tl", "abc", "epsilon: 0.02, r: 0.5, alpha: 3"),
        lambda b, xs, ds: reference.ram(b, ds, 0.02, 0.5, 3),
    ),
    "arcee_fusion": (text("arcee_fusion", "a"), lambda b, xs, ds: reference.arcee_fusion(b, ds[0])),
    "breadcrumbs": (
        text("breadcrumbs", "abc", "weight: 0.5, density: 0.3, gamma: 0.1"),
        lambda b, xs, ds: reference.task_arithmetic(b, [reference.breadcrumbs(d, 0.3, 0.1) for d in ds], [0.5] * 3),
    ),
    "breadcrumbs_ties": (
        text("breadcrumbs_ties", "abc", "weight: 0.5, density: 0.9, gamma: 0.3, lambda: 1.5"),
        lambda b, xs, ds: reference.ties(
            b, [reference.breadcrumbs(d, 0.9, 0.3) for d in ds], [0.5] * 3, normalize=False, lam=1.5
        ),
    ),
    "breadcrumbs-rescaled": (
        text("breadcrumbs", "abc", "weight: 0.5, density: 0.3, gamma: 0.1, rescale: true"),
        lambda b, xs, ds: reference.task_arithmetic(
            b, [reference.match_norm(reference.breadcrumbs(d, 0.3, 0.1), d, "l1") for d in ds], [0.5] * 3
        ),
    ),
    "ties-rescaled": (
        text("ties", "abc", "weight: 0.5, density: 0.3, rescale: true"),
        lambda b, xs, ds: reference.ties(b, [trimmed_to_norm(d, 0.3) for d in ds], [0.5] * 3),
    ),
    "ties-nothing-of-one": (
        text("ties", "a", "weight: 0.5, density: 0").replace(
            "a\n", "a\n  - {model: ./b, parameters: {density: 1}}\n", 1
        ),
        lambda b, xs, ds: reference.ties(b, [0 * b, ds[1]], [0.5] * 2),
    ),
    "della-nothing": (text("della", "ab", "weight: 0.5, density: 0"), lambda b, xs, ds: b),
    "dare_linear-nothing": (text("dare_linear", "ab", "weight: 0.5, density: 0"), lambda b, xs, ds: b),
    "model_stock-of-pruned": (
        text("model_stock", more="prune: {method: magnitude_outliers, density: 0.5, gamma: 0.02, q: 0.7}"),
        lambda b, xs, ds: reference.model_stock(b, [reference.breadcrumbs(d, 0.5, 0.02) / 0.7 for d in ds]),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_method_equals_the_float64_reference(models, tmp_path, method):
    recipe, formula = METHODS[method]
    merged = merge(models, tmp_path, recipe)
    base, inputs = load64(models / "base"), [load64(models / name) for name in "abc"]
    assert merged.keys() == base.keys()
    for name, b in base.items():
        if method == "model_stock-rows" and b.ndim == 4:
            continue  # rows of three: the cosine of some is so near to -1 that t amplifies float32's rounding
        xs = [x[name] for x in inputs]
        wanted = formula(b, xs, [x - b for x in xs])
        got = merged[name]
        rounding = 0.5 * torch.finfo(got.dtype).eps * np.abs(wanted)
        size = np.abs(b) + sum(map(np.abs, xs)) + np.abs(wanted)
        error = np.abs(got.double().numpy() - wanted)
        allowed = rounding + 2.0**-20 * size + 1e-30
        if method == "arcee_fusion" or method.startswith("sce-topk"):
            # float32 orders entries that float64 tells apart: those at the threshold may change sides
            assert (error > allowed).sum() <= 1e-4 * error.size
        else:
            np.testing.assert_array_less(error, allowed, err_msg=name)


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        ((0.5, 0.25), 0.375),  # agree: the mean
        ((0.5, -0.25), 0.0),  # cancel: the base
        ((0.5, 0.25, 1.0), 7 / 12),
        ((0.5, 0.25, -0.125), -0.625),  # one against two: -3 times the mean
        ((0.5, 0.25, -1.0, -2.0), 0.0),
        ((0.0, 0.0), 0.0),
    ],
)
@pytest.mark.parametrize(("shape", "rows"), [((), False), ((1,), False), ((1, 1), True)])
def test_model_stock_of_one_element_goes_by_signs(tmp_path, deltas, wanted, shape, rows):
    base = np.full(shape, 2.0)
    for name, delta in zip(("base", *"abcd"), (0.0, *deltas), strict=False):
        make_checkpoint(tmp_path / name, {"w": torch.full(shape, 2.0 + delta)})
    recipe = text("model_stock", "abcd"[: len(deltas)], f"filter_wise: {str(rows).lower()}")
    got = merge(tmp_path, tmp_path, recipe)["w"].double().numpy()
    assert got == pytest.approx(2.0 + wanted, abs=1e-6)
    if any(deltas):
        assert got == pytest.approx(reference.model_stock_of_one(base, [np.full(shape, d) for d in deltas]), abs=1e-6)


def test_model_stock_of_one_element_that_hardly_moves_stays_the_base(tmp_path):
    for name, delta in (("base", 0.0), ("a", 2.0**-14), ("b", 2.0**-14)):
        make_checkpoint(tmp_path / name, {"w": torch.tensor([delta])})
    cosine = 2.0**-28 / 1e-6
    got = float(merge(tmp_path, tmp_path, text("model_stock", "ab"))["w"])
    assert got == pytest.approx(2 * cosine / (1 + cosine) * 2.0**-14, rel=1e-5)


@pytest.mark.parametrize("method", ["karcher", "model_stock"])
def test_infinities_of_either_sign_in_one_tensor_are_no_bug(tmp_path, method):
    value = torch.ones(200_000)
    for name in ("base", "a", "b"):
        make_checkpoint(tmp_path / name, {"w": value.clone()})
        value[[0, -1]] = torch.tensor([torch.inf, -torch.inf]) if name == "base" else torch.tensor([torch.inf] * 2)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text(method, "ab"))
    assert run(recipe, tmp_path / "out", allow_nonfinite=True).nonfinite["w"].nan == 200_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_nan_of_the_base_between_sparse_entries_is_the_one_of_bfloat16(dtype):
    base, nothing = torch.full((40,), -torch.nan, dtype=dtype), torch.zeros(0)
    result = cast(Patched(base, nothing.long(), nothing), tile=Tile(0, 40, (40,)), to="BF16")
    assert set(result.view(torch.int16).tolist()) == {0x7FC0}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_of_a_single_model_that_weighs_nothing_comes_the_base(models, tmp_path, method):
    """A sum of weights that is 0 divides as 1, so nothing is added."""
    merged = merge(models, tmp_path, text(method, "a", "weight: 0, normalize: true"))
    base, tune = load_tensors(models / "base"), load_tensors(models / "a")
    assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())
    merged = merge(models, tmp_path, text(method, "a", "weight: -0.25, normalize: true"))
    assert all(torch.equal(merged[name], tensor) for name, tensor in tune.items())


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.05, 0.03)])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_divides_each_entry_by_its_own_probability(models, tmp_path, method, density, epsilon):
    recipe = text(method, "abc", f"weight: 0.5, density: {density}, epsilon: {epsilon}", more="seed: 7")
    merged = merge(models, tmp_path, recipe)
    matched = merge(models, tmp_path, recipe + "prune: {rescale: l1}\n")
    base, inputs = load64(models / "base"), [load64(models / name) for name in "abc"]
    combine = reference.task_arithmetic if method == "della_linear" else reference.ties
    for name, b in base.items():
        unbiased, normed = [], []
        for model, x in zip("abc", inputs, strict=True):
            delta = (x[name].astype(np.float32) - b.astype(np.float32)).astype(np.float64)  # as ranked
            probability = reference.della_probability(delta, density, epsilon)
            if name == "wide.weight":
                assert probability.min() == pytest.approx(density - epsilon)
            words = bits.words(bits.mask_key(7, f"./{model}", name), 0, b.size).reshape(b.shape)
            mask = words < np.round(probability * 2.0**32)
            unbiased.append(np.where(mask, delta / probability, 0))
            normed.append(reference.match_norm(np.where(mask, delta, 0), delta, "l1"))
        for got, kept in ((merged, unbiased), (matched, normed)):
            wanted = combine(b, kept, [0.5] * 3, normalize=method == "della")
            size = np.abs(b) + sum(map(np.abs, kept))
            allowed = 0.5 * torch.finfo(got[name].dtype).eps * np.abs(wanted) + 2.0**-19 * size + 1e-30
            np.testing.assert_array_less(np.abs(got[name].double().numpy() - wanted), allowed, err_msg=name)


def test_della_is_unbiased(models, tmp_path):
    total = 0.0
    base, tune = load64(models / "base")["wide.weight"], load64(models / "a")["wide.weight"]
    for seed in range(3):
        recipe = text(
            "della_linear", "a", "weight: 1, density: 0.3, epsilon: 0.25", more=f"seed: {seed}\ndtype: float32"
        )
        total += (np.abs(merge(models, tmp_path, recipe)["wide.weight"].double().numpy() - base)).sum() / 3
    assert total == pytest.approx(np.abs(tune - base).sum(), rel=0.01)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", [*METHODS, "della"])
def test_same_bytes_whatever_the_workers_and_tiles(models, tmp_path, monkeypatch, method):
    recipe = METHODS[method][0] if method in METHODS else text("della", "abc", "weight: 1, density: 0.5")

    def made(name: str, **options) -> bytes:
        path = models / f"{tmp_path.name}.yaml"
        path.write_text(recipe)
        return (run(path, tmp_path / name, **options).folder / "model.safetensors").read_bytes()

    first = made("first")
    assert made("workers", workers=3) == first
    monkeypatch.setattr("deltamerge.engine.execute.TILE_ELEMENTS", 1 << 10)
    assert made("tiles") == first
    monkeypatch.setattr(backends, "fused_available", lambda: False)
    assert made("torch", workers=2) == first


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (text("della", "ab", "weight: 1, density: 0.1"), "della: density 0.1 ± epsilon 0.15 must lie in"),
        (weighted("linear", (0.5, -0.5), base=None), "linear: the weights add up to 0\nchange them, or set normalize"),
        (weighted("multislerp", (0.5, -0.5), base=None), "multislerp: the weights add up to 0\nchange them"),
        (text("slerp", "ab", "t: 0.5"), "slerp takes 1 model besides the base, got 2"),
        (text("slerp", "a", "t: 0.5", base=None), "slerp needs base_model"),
        (text("slerp", "a"), "needs a t: slerp has no default"),
        (text("nuslerp", "abc", "weight: 1"), "nuslerp takes 2 models besides the base, got 3"),
        (text("nuslerp", "ab"), "needs a weight: nuslerp has no default"),
        (text("model_stock", "a"), "model_stock needs at least 2 models besides the base"),
        (text("karcher", "ab", "max_iter: 1.5"), "must be a whole number, at least 0, got 1.5"),
        (text("ram", "ab", "epsilon: -1"), "must be at least 0, got -1"),
        (text("nuslerp", "ab", "weight: 1", base=None, more="prune: {method: dare, density: 0.5}"), "give base_model"),
        (text("slerp", "a", "t: 0.5", more="prune: {method: dare, density: 0.5}"), "slerp has no deltas to prune"),
    ],
)
def test_refused(models, tmp_path, recipe, message):
    with pytest.raises(DeltamergeError) as caught:
        merge(models, tmp_path, recipe)
    assert message in f"{caught.value}\n{caught.value.hint}"


def test_opposite_directions_have_no_mean(models, tmp_path):
    make_checkpoint(models / "x", {"w": torch.ones(4)})
    make_checkpoint(models / "y", {"w": torch.tensor([-1.0, -1, 1, -1])})
    make_checkpoint(models / "z", {"w": torch.tensor([0.0, 0, -2, 0])})
    with pytest.raises(InputError, match="tensor w: multislerp: the directions of the models add up to 0"):
        merge(models, tmp_path, text("multislerp", "xyz", "weight: 1", base=None))
    make_checkpoint(models / "y", {"w": -3 * torch.ones(4)})
    merged = merge(models, tmp_path, text("multislerp", ("x", "y"), "weight: 1", base=None))
    assert merged["w"].tolist() == [-1.0] * 4


def test_another_package_registers_a_method_by_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(
        "from deltamerge.methods.registry import MergeMethod\n"
        "def halved(x, *, tile): ...\nhalf = MergeMethod('half', 'halves:halved', 'x / 2')\n"
        "itself = MergeMethod('itself', 'halves:itself', 'x')\n"
    )
    info = tmp_path / "halves-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deltamerge.methods]\nhalf = halves:half\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [method.name for _, method in third_party()] == ["half"]
    (info / "entry_points.txt").write_text("[deltamerge.methods]\nitself = halves:itself\n")
    with pytest.warns(PluginWarning, match="entry point halves:itself of halves is left out: its function is none"):
        assert not list(third_party())
    (info / "entry_points.txt").write_text("[deltamerge.methods]\nhalf = halves:missing\n")
    with pytest.warns(PluginWarning, match="entry point halves:missing of halves is left out: AttributeError"):
        assert not list(third_party())
