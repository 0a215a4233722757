"""`group: model`: the largest entries of all tensors together, exactly, whatever tiles, workers and backend."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_tensors, tiny_llama
from running import make_plan, run

from deltamerge.calibrate import stage

HEAD = "lm_head.weight"


def recipe(folder: Path, density: float, prune: str = "", extra: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        "base_model: ./base\ndtype: float32\nmodels:\n  - model: ./tuned\n    name: t\n"
        f"    prune: {{method: magnitude, density: {density}, group: model{prune}}}\n{extra}"
    )
    return path


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def models(tmp_path_factory, request) -> Path:
    """bfloat16 deltas have many equal entries, float32 ones hardly any."""
    folder, dtype = tmp_path_factory.mktemp("models"), getattr(torch, request.param)
    base = tiny_llama(folder / "base", seed=0, dtype=dtype)
    tiny_llama(folder / "tuned", seed=1, base=base, dtype=dtype, sigma=0.01, tokenizer=True)
    return folder


def wanted(folder: Path, density: float) -> dict[str, np.ndarray]:
    """base + the k largest of all deltas laid end to end in the file's order; of equal ones the first."""
    base, tuned = load_tensors(folder / "base"), load_tensors(folder / "tuned")
    names = [n for n in tuned if n != HEAD]
    deltas = [(tuned[n].float() - base[n].float()).double().numpy().reshape(-1) for n in names]
    flat = np.concatenate(deltas)
    k = sum(round(density * len(d)) for d in deltas)
    kept = np.zeros(len(flat))
    order = np.argsort(-np.abs(flat), kind="stable")[:k]
    kept[order] = flat[order]
    parts = np.split(kept, np.cumsum([len(d) for d in deltas])[:-1])
    return {n: base[n].double().numpy() + part.reshape(base[n].shape) for n, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("density", [1e-6, 0.001, 0.05, 0.5])
@pytest.mark.parametrize("fused", [False, True])
def test_keeps_the_largest_of_the_model(
    models: Path, tmp_path: Path, density: float, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr("deltamerge.engine.backends.fused_available", lambda: False)
    monkeypatch.setattr(stage, "TOGETHER", 3)
    merged = load_tensors(run(recipe(models, density), tmp_path / "out", workers=2).folder)
    for name, want in wanted(models, density).items():
        np.testing.assert_allclose(merged[name].double().numpy(), want, rtol=2**-23, atol=1e-9)
    assert torch.equal(merged[HEAD], load_tensors(models / "tuned")[HEAD].float())


def test_plan_says_how(models: Path) -> None:
    planned = make_plan(recipe(models, 0.1))
    assert any("one threshold over 20 tensors of t" in note for note in planned.notes)
    without = make_plan(recipe(models, 0.1, ", exclude: [.]"))
    assert planned.read_bytes > without.read_bytes


def test_q_is_calibrated_on_these_masks(models: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"w{4 + (7 * i + j) % 90}" for j in range(6))} for i in range(20)]
    (models / "calib.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = "calibration: {data: calib.jsonl, sequences: 8, length: 12}\n"
    result = run(recipe(models, 0.05, ", q: output_change", more), tmp_path / "out")
    found = result.lock["calibration"]["t"]
    assert math.isfinite(found["value"])
    q = found["q"]
    plain = wanted(models, 0.05)
    base, merged = load_tensors(models / "base"), load_tensors(result.folder)
    for name, want in plain.items():
        start = base[name].double().numpy()
        np.testing.assert_allclose(
            merged[name].double().numpy(), start + (want - start) / q.get(name, 1.0), rtol=1e-5, atol=1e-7
        )
