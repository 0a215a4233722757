"""Corners of pruning: density 1 and 0, one threshold, protected columns, sce after sparse masks, on every backend."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calibration_rows import rows
from conftest import load_tensors, tiny_bert_pair
from running import make_plan, run

from deltamerge.cli import main
from deltamerge.errors import InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corners")
    tiny_bert_pair(folder, dtype=torch.float32, sigma=0.05, tokenizer=True)
    tiny_bert_pair(folder / "more", dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(folder / "calib.jsonl")
    return folder


@pytest.fixture(params=["compiled", "torch"])
def backend(request, monkeypatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr("deltamerge.engine.backends.fused_available", lambda: False)
    return str(request.param)


def merge(folder: Path, out: Path, prune: dict[str, Any], *, two: bool = False, **keys: Any) -> dict[str, torch.Tensor]:
    models = [{"model": "./tuned", "name": "t"}] + [{"model": "./more/tuned", "name": "u"}] * two
    data = {"calibration": {"data": "calib.jsonl", "sequences": 8, "length": 12, "seeds": 1}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base_model": "./base", "models": models, "prune": prune} | data | keys))
    return load_tensors(run(path, out, device="cpu", workers=1, force=True).folder)


def deltas(folder: Path, merged: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(merged − base, Δ) of the linear weights that every default prunes."""
    base, tuned = load_tensors(folder / "base"), load_tensors(folder / "tuned")
    names = [name for name in tuned if name.endswith("dense.weight")]
    return {n: (merged[n] - base[n.removeprefix("bert.")], tuned[n] - base[n.removeprefix("bert.")]) for n in names}


METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "row": {"method": "magnitude", "group": "row"},
    "model": {"method": "magnitude", "group": "model"},
    "wanda": {"method": "wanda"},
    "dare": {"method": "dare"},
    "sampling": {"method": "dare", "sampling": "magnitude"},
    "della": {"method": "della", "epsilon": 0.001},
    "breadcrumbs": {"method": "breadcrumbs", "gamma": 0.01},
    "structured": {"method": "structured", "a": 0.2, "b": 0.1},
}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "structured"])
def test_density_1_keeps_everything_and_q_divides_it(models: Path, tmp_path: Path, backend: str, name: str) -> None:
    merged = merge(models, tmp_path / "out", METHODS[name] | {"density": 1.0, "q": 0.5})
    for found, delta in deltas(models, merged).values():
        torch.testing.assert_close(found, 2 * delta, rtol=1e-5, atol=2e-6)


def test_structured_with_all_columns(models: Path, tmp_path: Path, backend: str) -> None:
    merged = merge(models, tmp_path / "out", {"method": "structured", "a": 1.0, "b": 1.0, "q": 0.5})
    for found, delta in deltas(models, merged).values():
        torch.testing.assert_close(found, 2 * delta, rtol=1e-5, atol=2e-6)


PROTECT = ({"massive_activations": 2}, {"columns": {"dense": [1, 3]}})


@pytest.mark.parametrize("protect", PROTECT, ids=["massive", "columns"])
@pytest.mark.parametrize("name", ["magnitude", "dare", "wanda"])
def test_protected_columns_stay_whole_at_density_1_and_0(
    models: Path, tmp_path: Path, backend: str, name: str, protect: dict[str, Any]
) -> None:
    prune = METHODS[name] | {"protect": protect}
    whole = merge(models, tmp_path / "whole", prune | {"density": 1.0, "q": 0.5})
    zero = {"density": 0.0, "weight": 1.0}  # which mergekit's own methods take
    nothing = merge(models, tmp_path / "nothing", prune, merge_method="dare_linear", parameters=zero)
    for (found, delta), (left, _) in zip(deltas(models, whole).values(), deltas(models, nothing).values(), strict=True):
        kept = left.ne(0).any(0)
        assert kept.sum() == 2
        torch.testing.assert_close(left[:, kept], delta[:, kept], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found[:, kept], delta[:, kept], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found[:, ~kept], 2 * delta[:, ~kept], rtol=1e-5, atol=2e-6)


def test_tensors_of_density_1_are_beside_the_one_threshold(models: Path, tmp_path: Path, backend: str) -> None:
    density = [{"filter": "attention", "value": 1.0}, {"value": 0.1}]
    merged = merge(models, tmp_path / "out", METHODS["model"] | {"density": density, "q": 0.5})
    kept, size = 0, 0
    for name, (found, delta) in deltas(models, merged).items():
        if "attention" in name:
            torch.testing.assert_close(found, 2 * delta, rtol=1e-5, atol=2e-6)
        else:
            kept, size = kept + int(found.ne(0).sum()), size + found.numel()
    assert 0 < kept < 0.2 * size


@pytest.mark.parametrize(("name", "topk"), list(itertools.product(["dare", "structured", "wanda"], [0.3, 1.0])))
def test_sce_after_sparse_masks(models: Path, tmp_path: Path, monkeypatch, name: str, topk: float) -> None:
    """The compiled loops and torch write the same bytes."""
    made = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("deltamerge.engine.backends.fused_available", lambda: False)
        out = tmp_path / str(fused)
        prune = METHODS[name] | ({} if "a" in METHODS[name] else {"density": 0.02})
        merge(models, out, prune, two=True, merge_method="sce", parameters={"select_topk": topk})
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1]


DEVICES = ["cuda", "cuda:9999", "cuda:99999999999999999999"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("command", ["run", "calibrate"])
def test_a_device_that_is_not_there_is_one_line(
    models: Path, tmp_path: Path, monkeypatch, capsys, command: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    path = models / f"{command}.yaml"
    prune = {"method": "dare", "density": 0.1, "q": "output_change"}
    data = {"data": "calib.jsonl", "sequences": 8, "length": 12, "seeds": 1}
    recipe = {"base_model": "./base", "models": [{"model": "./tuned", "prune": prune}], "calibration": data}
    path.write_text(yaml.safe_dump(recipe))
    out = ["--out", str(tmp_path / "out")] if command == "run" else []
    with pytest.raises(SystemExit) as leaving:
        main([command, str(path), "--device", device, *out])
    assert leaving.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "device" in line.lower()]
    assert f"--device {device}" in lines[0]
    assert not path.with_suffix(".lock").exists()


def test_a_plan_for_a_gpu_needs_none(models: Path) -> None:
    path = models / "planned.yaml"
    path.write_text("base_model: ./base\nmodels: [{model: ./tuned}]\n")
    assert make_plan(path, device="cuda:3").device == "cuda:3"


def test_one_threshold_does_not_go_with_protected_columns(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not go with group: model"):
        merge(models, tmp_path / "out", METHODS["model"] | {"density": 0.1, "protect": PROTECT[0]})
