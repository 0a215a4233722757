"""A budget instead of a density: what is kept fits, is as good as it can be, and comes again from the lock."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_bert_pair
from running import make_plan

from deltamerge.calibrate.q.statistics import LayerStatistics
from deltamerge.engine.execute import shared_values
from deltamerge.errors import InputError
from deltamerge.formats.delta.positions import expected_bits, uniform_density
from deltamerge.outputs.budget import BINS, Spectrum, choose, measure_spectra

SCALES = (1.0, 0.2, 3.0, 0.01)


def deltas(seed: int = 0, size: int = 4000) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return [(s * generator.standard_normal(size * (i + 1))).astype(np.float32) for i, s in enumerate(SCALES)]


def spectrum(name: str, delta: np.ndarray[Any, Any]) -> Spectrum:
    bins = np.abs(delta).view(np.uint32) >> 18
    counts = np.bincount(bins, minlength=BINS).astype(float)
    energies = np.bincount(bins, delta.astype(np.float64) ** 2, BINS)
    filled = np.flatnonzero(energies)[::-1]
    return Spectrum(name, delta.size, counts[filled], energies[filled])


def price(densities: list[float], sizes: list[int], bits: int) -> float:
    return sum(n * expected_bits(p, bits) for p, n in zip(densities, sizes, strict=True)) / 8


def lost(delta: np.ndarray[Any, Any], density: float, *, random: bool) -> float:
    """The formulas of the module, from the entries themselves."""
    squares = np.sort(delta.astype(np.float64) ** 2)
    if random:
        return float(squares.sum() * (1 / density - 1))
    return float(squares[: delta.size - round(density * delta.size)].sum())


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("bits", [1, 8, 16, 32])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.7])
def test_no_other_split_of_the_bytes_loses_less(random: bool, bits: int, share: float) -> None:
    found = deltas()
    sizes = [d.size for d in found]
    nbytes = share * sum(sizes) * bits / 8
    choice = choose([spectrum(str(i), d) for i, d in enumerate(found)], nbytes, bits, random=random)
    densities = list(choice.densities.values())
    assert price(densities, sizes, bits) <= nbytes * (1 + 1e-4)
    assert price(densities, sizes, bits) >= nbytes * 0.97 - 20
    error = sum(lost(d, p, random=random) for d, p in zip(found, densities, strict=True))
    whole = sum(float((d.astype(np.float64) ** 2).sum()) for d in found)
    assert choice.error == pytest.approx(math.sqrt(error / whole), rel=0.02, abs=1e-3)
    uniform = uniform_density(nbytes * 8 / sum(sizes), bits)
    assert error <= sum(lost(d, uniform, random=random) for d in found)
    generator = np.random.default_rng(1)
    for _ in range(60):  # any other densities of about these, cut to the same bytes
        other = np.clip(np.array(densities) * np.exp(generator.normal(0, 0.3, len(sizes))), 1e-6, 1)
        low, high = 0.0, 2.0
        for _ in range(40):
            middle = (low + high) / 2
            fits = price(list(np.clip(other * middle, 1e-9, 1)), sizes, bits) <= price(densities, sizes, bits)
            low, high = (middle, high) if fits else (low, middle)
        cut = np.clip(other * low, 1e-9, 1)
        theirs = sum(lost(d, p, random=random) for d, p in zip(found, cut, strict=True))
        assert error <= theirs * 1.02


def test_everything_is_kept_where_it_fits_and_nothing_fits_in_nothing() -> None:
    spectra = [spectrum(str(i), d) for i, d in enumerate(deltas())]
    for random in (False, True):
        whole = choose(spectra, 1e9, 16, random=random)
        assert set(whole.densities.values()) == {1.0}
        assert whole.error == pytest.approx(0, abs=1e-9)
        with pytest.raises(InputError, match="too few for any entry"):
            choose(spectra, 5, 16, random=random)
    zero = spectrum("z", np.zeros(100, np.float32))
    assert choose([zero, *spectra], 900, 16, random=False).densities["z"] == 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    base = {f"layers.{i}.w": torch.from_numpy(np.random.default_rng(i).standard_normal((100, 200))).float()
            for i in range(6)}  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    tuned = {n: t + 0.01 * 2.0**i * torch.randn(t.shape, generator=generator) for i, (n, t) in enumerate(base.items())}
    for name, head in (("base", {}), ("a", {"classifier.weight": torch.ones(2, 200)})):
        make_checkpoint(folder / name, (base if name == "base" else tuned) | head)
    return folder


@pytest.mark.parametrize("output", ["kind: delta", "kind: delta, values: int8", "kind: delta, values: sign"])
@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_the_artifact_is_never_larger(folder: Path, tmp_path: Path, capsys: Any, method: str, output: str) -> None:
    recipe = folder / f"{method}.yaml"
    for budget in (10_000, 30_000):
        recipe.write_text(
            f"base_model: ./base\nmodels: [{{model: ./a}}]\nprune: {{method: {method}, budget: {budget}}}\n"
            f"output: {{{output}}}\n"
        )
        code, out, err = call(capsys, "plan", recipe, "--json")
        assert code == 0, err
        assert json.loads(out)["delta"]["estimated_bytes"] < 1.3 * budget + 2000
        code, out, err = call(capsys, "run", recipe, "--out", tmp_path / f"{budget}", "--json", "--workers", "2")
        assert code == 0, err
        made = tmp_path / f"{budget}"
        size = sum(p.stat().st_size for p in made.glob("delta*"))
        assert json.loads(out)["bytes"] == size
        densities = json.loads(out)["lock"]["densities"]
        assert 0.8 * budget < size <= budget or (size < budget and set(densities.values()) == {1.0})
        assert list(densities) == [f"layers.{i}.w" for i in range(6)]
        assert densities["layers.5.w"] >= densities["layers.0.w"]
        assert f"for a budget of {budget:,} bytes; predicted" in (made / "README.md").read_text()
        (folder / f"{method}.lock").write_bytes((made / "recipe.lock").read_bytes())
        code, _, err = call(capsys, "run", recipe, "--out", tmp_path / "again", "--locked", "--force", "-q")
        assert code == 0, err
        for file in made.glob("delta*"):
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert call(capsys, "apply", made, "--base", folder / "base", "--out", tmp_path / "applied")[0] == 0
    assert torch.equal(load_tensors(tmp_path / "applied")["classifier.weight"], torch.ones(2, 200))


REFUSED = {
    "budget: 4560": "the budget leaves",
    "budget: 300": "are not pruned, and names and hashes take",
    "budget: 5MB, density: 0.1": "prune.budget: cannot stand beside a density",
    "budget: 5MB, method: wanda": "prune.budget: has no effect with method wanda",
    "budget: 5MB, method: magnitude, group: row": "prune.budget: needs uniform sampling",
}


@pytest.mark.parametrize("keys", REFUSED)
def test_budgets_that_cannot_be(folder: Path, tmp_path: Path, capsys: Any, keys: str) -> None:
    method = "" if "method" in keys else ", method: dare"
    recipe = folder / "refused.yaml"
    recipe.write_text(
        f"base_model: ./base\nmodels: [{{model: ./a}}]\nprune: {{{keys}{method}}}\noutput: {{kind: delta}}\n"
    )
    code, _, err = call(capsys, "run", recipe, "--out", tmp_path / "out")
    assert code == 1
    assert REFUSED[keys] in err
    assert list(tmp_path.iterdir()) == []


def test_a_budget_is_of_one_delta_artifact(folder: Path, capsys: Any) -> None:
    recipe = folder / "two.yaml"
    recipe.write_text(
        "base_model: ./base\nmodels: [{model: ./a}, {model: ./b}]\nmerge_method: task_arithmetic\n"
        "parameters: {weight: 1}\nprune: {method: dare, budget: 5MB}\n"
    )
    _, _, err = call(capsys, "check", recipe)
    assert "prune.budget: is the size of a delta artifact" in err
    assert "prune.budget: needs a single fine-tune" in err


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert_pair(folder, sigma=0.02, dtype=torch.float32, tokenizer=True)
    words = np.random.default_rng(0)
    lines = [" ".join(f"w{w}" for w in words.integers(4, 96, 12)) for _ in range(40)]
    (folder / "rows.txt").write_text("\n".join(lines) + "\n")
    return folder


def budgeted(folder: Path, name: str, prune: str, *, calibration: bool = True) -> Path:
    text = f"base_model: ./base\nmodels: [{{model: ./tuned}}]\nprune: {{{prune}}}\noutput: {{kind: delta}}\n"
    more = "calibration: {data: rows.txt, sequences: 8, length: 12}\n" if calibration else ""
    (folder / name).write_text(text + more)
    return folder / name


def test_calibration_weighs_entries_by_their_inputs(bert: Path) -> None:
    """Σ w Δ² of every tensor in float64, from the statistics themselves."""
    planned = make_plan(budgeted(bert, "weights.yaml", "method: magnitude, budget: 20000"))
    assert planned.weighing is not None
    statistics: dict[str, LayerStatistics] = shared_values([planned.weighing], {})[planned.weighing]
    base, tuned = (load_tensors(bert / name) for name in ("base", "tuned"))
    kinds = set()
    for s in measure_spectra(planned):
        delta = (tuned[s.name].double() - base[s.name.removeprefix("bert.")].double()).numpy()
        if s.name in statistics:
            kinds.add("linear")
            energy = (delta**2 * statistics[s.name].square).sum()
        else:
            kinds.add("embedding" if delta.ndim == 2 else "vector")
            energy = (delta**2).sum() / (len(delta) if delta.ndim == 2 else 1)
        assert s.energies.sum() == pytest.approx(energy, rel=1e-5)
        assert s.counts.sum() == np.count_nonzero(delta)
    assert kinds == {"linear", "embedding", "vector"}
    plain = make_plan(budgeted(bert, "plain.yaml", "method: magnitude, budget: 20000", calibration=False))
    assert plain.weighing is None


@pytest.mark.parametrize(
    "prune",
    [
        "method: magnitude, q: layer_mse",
        pytest.param("method: dare, q: output_change", marks=pytest.mark.slow),
    ],
)
def test_a_budget_with_a_calibrated_q(bert: Path, tmp_path: Path, capsys: Any, prune: str) -> None:
    recipe = budgeted(bert, "both.yaml", f"{prune}, budget: 40000")
    code, out, err = call(capsys, "run", recipe, "--out", tmp_path / "made", "--json", "--workers", "1")
    assert code == 0, err
    lock = json.loads(out)["lock"]
    size = sum(p.stat().st_size for p in (tmp_path / "made").glob("delta*"))
    assert 0.85 * 40_000 < size <= 40_000
    stage = lock["calibration"]["./tuned"]
    low, high = min(lock["densities"].values()), max(lock["densities"].values())
    assert low < high
    assert stage["density"] == [low, high]  # the q's are those of the densities that were kept
    (bert / "both.lock").write_bytes((tmp_path / "made" / "recipe.lock").read_bytes())
    code, _, err = call(capsys, "run", recipe, "--out", tmp_path / "again", "--locked", "-q")
    assert code == 0, err
    for file in (tmp_path / "made").glob("delta*"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert call(capsys, "apply", tmp_path / "made", "--base", bert / "base", "--out", tmp_path / "applied")[0] == 0
    code, _, err = call(capsys, "calibrate", recipe)
    assert code == 1
    assert "a budget's densities are chosen as the artifact is written" in err
