"""Statistics of deltas against float64 numpy, whatever the tiles and workers; their JSON; the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama

from deltamerge.apps.inspect.statistics import Report, measure_deltas, pair_recipe, pairs_of, parse
from deltamerge.apps.inspect.study import inspect
from deltamerge.cli import main
from deltamerge.errors import InputError
from deltamerge.models import hub
from deltamerge.plan.inputs import open_inputs


def vit_pair(folder: Path) -> tuple[Path, Path]:
    _, tensors = tiny_models.make("ViTForImageClassification", folder / "base")
    generator = torch.Generator().manual_seed(3)
    tuned = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    config = json.loads((folder / "base" / "config.json").read_text())
    return folder / "base", make_checkpoint(folder / "tuned", tuned, config=config)


def llama_pair(folder: Path) -> tuple[Path, Path]:
    base = tiny_llama(folder / "base", seed=0, shards=3)
    return base, tiny_llama(folder / "tuned", seed=1, base=base, sigma=2e-3)


PAIRS = {"bert": tiny_bert_pair, "llama": llama_pair, "vit": vit_pair}


def deltas(base: Path, tune: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(Δ, W) in float64, by the fine-tune's names."""
    ours, theirs = load_tensors(tune), load_tensors(base)
    found = {}
    for name, tensor in ours.items():
        twin = theirs.get(name, theirs.get(name.removeprefix("bert.")))
        if twin is not None:
            w = twin.double().numpy()
            found[name] = (tensor.float() - twin.float()).double().numpy().reshape(-1), w.reshape(-1)
    return found


def reference(parts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    d, w = (np.concatenate(column) for column in zip(*parts, strict=True))
    return {
        "count": d.size,
        "mean_abs": np.abs(d).mean(),
        "variance": d.var(),
        "kurtosis": ((d - d.mean()) ** 4).mean() / d.var() ** 2 if d.var() else None,
        "max_abs": np.abs(d).max(),
        "unchanged": (d == 0).mean(),
        "norm": np.linalg.norm(d),
        "base_norm": np.linalg.norm(w),
        "relative_norm": np.linalg.norm(d) / np.linalg.norm(w),
    }


def check(one: object, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for key, value in reference(parts).items():
        if value is None:
            assert getattr(one, key) is None
            continue
        assert getattr(one, key) == pytest.approx(value, rel=1e-9, abs=1e-15), key
    sizes = np.sort(np.abs(np.concatenate([d for d, _ in parts])))
    for share, value in one.quantiles.items():
        exact = sizes[int(np.ceil(float(share) * sizes.size)) - 1]
        assert value == pytest.approx(exact, rel=5e-3, abs=1e-30)  # half a bin of 7 bits of mantissa: 2**-8
    energy = sum(float(d @ d) for d, _ in parts)
    for density, value in one.kept_energy.items():
        kept = 0.0
        if not energy:
            continue
        for d, _ in parts:
            k = round(float(density) * d.size)
            kept += float(np.sum(np.sort(d * d)[d.size - k :]))
        assert value == pytest.approx(kept / energy, rel=1e-2, abs=1e-12)  # the same of a square: 2**-7


@pytest.mark.parametrize("family", PAIRS)
def test_figures_are_those_of_float64(tmp_path, family):
    base, tune = PAIRS[family](tmp_path)
    found, truth = inspect(str(tune), str(base)), deltas(base, tune)
    assert [tensor.name for tensor in found.tensors] == [n for n in load_tensors(tune) if n in truth]
    check(found.total, list(truth.values()))
    for tensor in found.tensors:
        check(tensor, [truth[tensor.name]])
    for groups, key in ((found.layers, "layer"), (found.kinds, "kind")):
        for name, one in groups.items():
            check(one, [truth[tensor.name] for tensor in found.tensors if getattr(tensor, key) == name])
    energy = sum(float(d @ d) for d, _ in truth.values())
    for tensor in found.tensors:
        assert tensor.energy_share == pytest.approx(float(truth[tensor.name][0] @ truth[tensor.name][0]) / energy)
    assert sum(1 for layer in found.layers if layer != "outside") == {"bert": 2, "llama": 2, "vit": 3}[family]
    assert set(found.kinds) >= {"linear", "embedding" if family != "vit" else "other", "vector"}


def test_nothing_depends_on_tiles_or_workers(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(700, 300, generator=generator), "b": torch.randn(200_001, generator=generator)}
    tune = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    make_checkpoint(tmp_path / "base", base)
    make_checkpoint(tmp_path / "tune", tune)
    recipe = parse(pair_recipe("./tune", "./base"))
    pairs, _ = pairs_of(open_inputs(recipe, tmp_path, lambda r, f: hub.open_model(r, f, weights=True)))
    ways = [
        measure_deltas(pairs, workers=workers, tile_elements=tile)
        for workers in (1, 3)
        for tile in (1, 70_000, 1 << 20)
    ]
    for way in ways[1:]:
        for name, one in ways[0].items():
            other = way[name]
            assert (one.square, one.fourth, one.total, one.base_square) == (
                other.square,
                other.fourth,
                other.total,
                other.base_square,
            )
            assert np.array_equal(one.counts, other.counts)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.2, 0.9])
def test_the_error_of_importance_sampling(tmp_path, density):
    import reference as formulas

    generator = np.random.default_rng(2)
    delta = (generator.standard_t(4, (96, 80)) * 1e-3).astype(np.float32)
    delta[:5] = 0
    make_checkpoint(tmp_path / "base", {"a.weight": torch.zeros(96, 80)})
    make_checkpoint(tmp_path / "tune", {"a.weight": torch.from_numpy(delta)})
    recipe = parse(pair_recipe("./tune", "./base"))
    pairs, _ = pairs_of(open_inputs(recipe, tmp_path, lambda r, f: hub.open_model(r, f, weights=True)))
    d = delta.astype(np.float64)
    pi = formulas.keep_probability(d, density)
    kept = d != 0
    exact = float(np.sum(d[kept] ** 2 * (1 / pi[kept] - 1)) / np.sum(d**2))
    assert measure_deltas(pairs)["a.weight"].sampling_error(density) == pytest.approx(exact, rel=1e-2, abs=1e-3)


def test_what_cannot_be_inspected_is_said(tmp_path):
    base = {"layers.0.a.weight": torch.zeros(4, 4), "e.weight": torch.zeros(6, 4)}
    make_checkpoint(tmp_path / "base", base)
    with pytest.raises(InputError, match="is the base itself"):
        inspect(str(tmp_path / "base"), str(tmp_path / "base"))
    make_checkpoint(tmp_path / "shape", {**base, "layers.0.a.weight": torch.zeros(5, 4)})
    with pytest.raises(InputError, match=r"layers\.0\.a\.weight has the shape \[5, 4\], in the base \[4, 4\]"):
        inspect(str(tmp_path / "shape"), str(tmp_path / "base"))
    make_checkpoint(tmp_path / "nan", {**base, "e.weight": torch.full((6, 4), torch.nan)})
    with pytest.raises(InputError, match=r"e\.weight: a model's delta is not finite"):
        inspect(str(tmp_path / "nan"), str(tmp_path / "base"))
    make_checkpoint(tmp_path / "other", {"x": torch.zeros(3)})
    with pytest.raises(InputError, match="no tensor in common"):
        inspect(str(tmp_path / "other"), str(tmp_path / "base"))
    make_checkpoint(tmp_path / "same", {**base, "e.weight": torch.zeros(9, 4), "n": torch.zeros(0)})
    found = inspect(str(tmp_path / "same"), str(tmp_path / "base"))
    assert (found.total.count, found.total.unchanged, found.total.relative_norm) == (40, 1.0, None)
    assert found.without_delta == ["n"]


def test_the_command_prints_tables_or_the_documented_json(tmp_path, capsys, monkeypatch):
    base, tune = tiny_bert_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--tensors"], ["--json"]):
        with pytest.raises(SystemExit) as leaving:
            main(["inspect", "tuned", "--base", "./base", *more])
        out, err = capsys.readouterr()
        assert (leaving.value.code, err) == (0, "")
        if more == ["--json"]:
            assert Report.model_validate_json(out) == inspect(str(tune), str(base)).model_copy(
                update={"base": "./base"}
            )
        else:
            assert "delta of tuned on ./base" in out
            assert "bert.encoder.layer.1 " in out
            assert ("query.weight" in out) == (more == ["--tensors"])
            assert "without a delta: classifier.bias, classifier.weight" in out


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom deltamerge.cli import main\n"
        "try: main(['inspect', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Example: deltamerge inspect" in done.stdout


@pytest.mark.slow
def test_a_real_fine_tune(shared_data):
    found = inspect(str(shared_data / "sentiment"), str(shared_data / "base"))
    assert found.total.count == 12_760_320
    assert found.total.mean_abs == pytest.approx(4.15e-3, rel=5e-3)
    assert found.kinds["linear"].relative_norm == pytest.approx(0.113, rel=5e-3)
    assert found.total.quantiles["0.5"] < found.total.quantiles["0.999"] < found.total.max_abs
    truth = deltas(shared_data / "base", shared_data / "sentiment")
    check(found.total, list(truth.values()))
