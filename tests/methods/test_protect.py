"""Protected columns: whole and unscaled in the output, out of every mask, density and q."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import load_tensors, tiny_bert_pair
from running import activations_of, make_plan, run
from safetensors.numpy import load_file

from deltamerge.errors import InputError, RecipeError
from deltamerge.methods.prune import protect
from deltamerge.tensors.tiles import Kept, Tile

LINEAR = ("query.weight", "key.weight", "value.weight", "dense.weight")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("protect")
    tiny_bert_pair(folder, dtype=torch.float32, sigma=0.05, tokenizer=True)
    words = np.random.default_rng(4).integers(4, 96, (24, 8))
    lines = (json.dumps({"text": " ".join(f"w{n}" for n in row)}) for row in words)
    (folder / "calib.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def merged(folder: Path, out: Path, prune: str) -> dict[str, np.ndarray]:
    path = folder / "r.yaml"
    path.write_text(
        f"base_model: ./base\nmodels: [{{model: ./tuned, name: t, prune: {prune}}}]\n"
        "calibration: {data: calib.jsonl, sequences: 8, length: 12, seeds: 1}\n"
    )
    return {name: tensor.double().numpy() for name, tensor in load_tensors(run(path, out).folder).items()}


def originals(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(base, Δ) by the fine-tune's names."""
    base = load_tensors(folder / "base")
    return {
        name: (b.double().numpy(), (tensor - b).double().numpy())
        for name, tensor in load_tensors(folder / "tuned").items()
        if (b := base.get(name.removeprefix("bert."))) is not None
    }


COLUMNS = "protect: {columns: {query: [3, 0], 'layer.1.*dense': [5]}}"


def chosen(name: str) -> list[int]:
    if not name.endswith(LINEAR):
        return []
    return [0, 3] if "query" in name else [5] if "layer.1" in name and "dense" in name else []


def rows_kept(delta: np.ndarray, k: int) -> np.ndarray:
    return np.stack([reference.keep_top(row, k) for row in delta])


METHODS = {
    "magnitude": "{method: magnitude, density: 0.1, q: 0.5, %s}",
    "rows": "{method: magnitude, density: 0.25, group: row, q: 0.5, %s}",
    "none of it": "{method: magnitude, density: 0.0001, q: 0.5, %s}",
    "l2": "{method: magnitude, density: 0.1, rescale: l2, %s}",
}


@pytest.mark.parametrize("method", METHODS)
def test_columns_stay_whole_and_the_density_is_of_the_rest(bert: Path, tmp_path: Path, method: str) -> None:
    found = merged(bert, tmp_path / "out", METHODS[method] % COLUMNS)
    for name, (base, delta) in originals(bert).items():
        columns = chosen(name)
        rest = delta.copy()
        rest[..., columns] = 0.0
        size = delta.size - len(columns) * (delta.size // delta.shape[-1])
        if method == "rows" and delta.ndim == 2 and "embeddings" not in name:
            kept = rows_kept(rest, round(0.25 * (delta.shape[1] - len(columns)))) / 0.5
        elif method == "rows":
            continue
        elif method == "l2":
            kept = reference.match_norm(reference.keep_top(rest, round(0.1 * size)), rest, "l2")
        else:
            kept = reference.keep_top(rest, round((0.0001 if method == "none of it" else 0.1) * size)) / 0.5
        kept[..., columns] = delta[..., columns]
        np.testing.assert_allclose(found[name], base + kept, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "prune",
    [
        "{method: dare, density: 0.01, q: 0.2, %s}",
        "{method: dare, density: 0.3, q: 0.2, %s}",
        "{method: dare, density: 0.1, q: 0.2, sampling: magnitude, %s}",
        "{method: structured, a: 0.5, b: 0.01, q: 0.2, %s}",
    ],
)
def test_random_masks_are_the_same_beside_protected_columns(bert: Path, tmp_path: Path, prune: str) -> None:
    found = merged(bert, tmp_path / "out", prune % COLUMNS)
    plain = merged(bert, tmp_path / "plain", prune % "include: [.]")
    for name, (base, delta) in originals(bert).items():
        columns = chosen(name)
        if "sampling" in prune and columns:
            kept = (found[name] != base)[:, [c for c in range(delta.shape[1]) if c not in columns]].mean()
            assert kept == pytest.approx(0.1, abs=0.06)
        elif not columns:
            np.testing.assert_array_equal(found[name], plain[name])
            continue
        else:
            rest = [c for c in range(delta.shape[1]) if c not in columns]
            np.testing.assert_array_equal(found[name][:, rest], plain[name][:, rest])
        tuned = base[:, columns] + delta[:, columns]
        np.testing.assert_allclose(found[name][:, columns], tuned, rtol=1e-6, atol=1e-7)


def largest_inputs(bert: Path, k: int) -> dict[str, list[int]]:
    """The k features of largest mean |x| of each linear layer, over the rows that the stage measures."""
    path = bert / "measure.yaml"
    path.write_text(
        "base_model: ./base\nmodels: [{model: ./tuned, name: t, prune: {method: wanda, density: 0.1}}]\n"
        "calibration: {data: calib.jsonl, sequences: 8, length: 12, seeds: 1}\n"
    )
    found = activations_of(path).items()
    return {n: sorted(np.argsort(-s.mean_abs, kind="stable")[:k].tolist()) for n, s in found}


@pytest.mark.parametrize("method", ["dare", "magnitude", "wanda"])
def test_massive_activations(bert: Path, tmp_path: Path, method: str) -> None:
    prune = f"{{method: {method}, density: 0.05, q: 0.5, protect: {{massive_activations: 2}}}}"
    found, truth = merged(bert, tmp_path / "out", prune), originals(bert)
    inputs = largest_inputs(bert, 2)
    assert len(inputs) >= 12
    for name, columns in inputs.items():
        base, delta = truth[name]
        tuned = base[:, columns] + delta[:, columns]
        np.testing.assert_allclose(found[name][:, columns], tuned, rtol=1e-6, atol=1e-7)
        rest = [c for c in range(delta.shape[1]) if c not in columns]
        changed = (found[name] != base)[:, rest]
        if method == "wanda":
            assert (changed.sum(1) == round(0.05 * len(rest))).all()
        elif method == "magnitude":
            assert changed.sum() == round(0.05 * changed.size)
        else:
            assert changed.mean() == pytest.approx(0.05, abs=0.03)


CALIBRATED = {
    "{method: dare, density: 0.05, q: output_change, %s}": None,
    "{method: dare, density: 0.05, q: {objective: layer_mse, scope: row}, %s}": "calibrated",
    "{method: wanda, density: 0.05, q: {objective: output_change, scope: row}, %s}": None,
}


@pytest.mark.parametrize("prune", CALIBRATED)
def test_q_is_calibrated_for_what_is_not_protected(bert: Path, tmp_path: Path, prune: str) -> None:
    """The written model is base + Δ in the columns + mask/q in the rest, with the q of the lock."""
    protected = "protect: {massive_activations: 3}"
    found = merged(bert, tmp_path / "out", prune % protected)
    lock: dict[str, Any] = run(bert / "r.yaml", tmp_path / "again").lock["calibration"]["t"]
    assert lock["chosen"] == (CALIBRATED[prune] or lock["chosen"])
    whole = merged(bert, tmp_path / "whole", prune.partition(", q:")[0] + f", q: 1, {protected}}}")
    rows = load_file(tmp_path / "again" / "recipe.rows") if "rows" in lock else {}
    truth = originals(bert)
    for name, columns in largest_inputs(bert, 3).items():
        base, delta = truth[name]
        kept = (whole[name] - base) / rows.get(f"t:{name}", lock["q"].get(name, 1.0))
        kept[:, columns] = delta[:, columns]
        np.testing.assert_allclose(found[name], base + kept, rtol=1e-5, atol=4e-6)


def test_the_plan_says_what_is_protected_and_refuses_what_is_not_there(bert: Path) -> None:
    path = bert / "plan.yaml"
    recipe = (
        "base_model: ./base\nmodels: [{model: ./tuned, prune: {method: dare, density: 0.1, protect: {columns: %s}}}]"
    )
    path.write_text(recipe % "{query: [1, 2, 2]}")
    sources = {t["name"]: t["sources"][0] for t in make_plan(path, device="cpu").describe()["tensors"] if t["sources"]}
    assert sources["bert.encoder.layer.0.attention.self.query.weight"].endswith("protect=2")
    assert "protect" not in sources["bert.encoder.layer.0.attention.self.query.bias"]
    path.write_text(recipe % "{query: [32]}")
    with pytest.raises(InputError, match=r"query\.weight has 32 columns, 32 is none of them"):
        make_plan(path)
    path.write_text(recipe % "{q_proj: [1]}")
    with pytest.raises(RecipeError, match=r"plan.yaml:\d+:\d+: .*'q_proj' finds no pruned weight of a linear layer"):
        make_plan(path)


def test_weights_stored_the_other_way_are_refused(tmp_path: Path) -> None:
    import tiny_models
    from conftest import make_checkpoint, write_tokenizer

    _, tensors = tiny_models.make("GPT2LMHeadModel", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    make_checkpoint(tmp_path / "tuned", {n: t + 0.01 for n, t in tensors.items()}, config=config)
    write_tokenizer(tmp_path / "tuned", 60)
    (tmp_path / "calib.jsonl").write_text("".join(json.dumps({"text": f"w{i} w5 w6"}) + "\n" for i in range(4, 20)))
    (tmp_path / "r.yaml").write_text(
        "base_model: ./base\nmodels: [{model: ./tuned}]\nprune: {method: dare, density: 0.1, protect: "
        "{massive_activations: 1}}\ncalibration: {data: calib.jsonl, sequences: 4, length: 12}\n"
    )
    with pytest.raises(InputError, match="massive_activations needs"):
        run(tmp_path / "r.yaml", tmp_path / "out")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("columns", [[], [0], [2, 7, 29]])
def test_clear_and_restore_inside_tiles(sparse: bool, columns: list[int]) -> None:
    random = np.random.default_rng(1)
    tune, base = (random.standard_normal((40, 30)).astype(np.float32) for _ in range(2))
    delta, numbers = tune - base, np.array(columns, dtype=np.int64)
    kept = np.where(random.random(delta.shape) < 0.3, delta, np.float32(0))
    wanted = kept.copy()
    wanted[:, columns] = 0
    full = wanted.copy()
    full[:, columns] = delta[:, columns]
    for start, stop in ((0, 1200), (301, 1111), (5, 9), (30, 30)):
        tile, flat = Tile(start, stop, (40, 30)), kept.reshape(-1)[start:stop]
        positions = np.flatnonzero(flat)
        sides = [torch.from_numpy(x.reshape(-1)[start:stop].copy()) for x in (tune, base)]
        value: Any = torch.from_numpy(flat.copy())
        if sparse:
            value = Kept(torch.from_numpy(positions), torch.from_numpy(flat[positions]))
        cleared = protect.clear(value, numbers, tile=tile)
        restored = protect.restore(cleared, *sides, numbers, tile=tile)
        for ours, truth in ((cleared, wanted), (restored, full)):
            dense = ours
            if isinstance(ours, Kept):
                assert (ours.positions.diff() > 0).all()
                dense = torch.zeros(stop - start)
                dense[ours.positions] = ours.values
            np.testing.assert_array_equal(dense.numpy(), truth.reshape(-1)[start:stop])


def test_calibration_starts_from_the_protected_columns(bert: Path, tmp_path: Path) -> None:
    """With every column of every pruned weight protected, the pruned model is the fine-tune."""
    keys = r"include: ['(query|key|value|dense)\.weight'], protect: {massive_activations: 1000}"
    merged(bert, tmp_path / "out", f"{{method: magnitude, density: 0.05, q: output_change, {keys}}}")
    lock = run(bert / "r.yaml", tmp_path / "again").lock["calibration"]["t"]
    assert lock["value"] < 1e-6
    for name, (base, delta) in originals(bert).items():
        found = load_tensors(tmp_path / "out")[name].double().numpy()
        np.testing.assert_allclose(found, base + delta, rtol=1e-6, atol=1e-7)
