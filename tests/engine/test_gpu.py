"""Every method, dtype and calibration on a real GPU against the CPU's bytes; `make gpu` runs them."""

from __future__ import annotations

from pathlib import Path

import kept_recipes
import pytest
import torch
from calibration_rows import rows
from conftest import tiny_bert_pair
from raw_tensors import read_checkpoint
from running import calibrate, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ONLY_MADE_UP = ("calibration:",)  # what calibration gives is made up in kept_recipes
PRUNES = {
    "global": "{method: dare, density: 0.05, q: output_change}",
    "layer": "{method: dare, density: 0.05, q: {objective: output_change, scope: layer}}",
    "row": "{method: structured, a: 0.5, b: 0.1, q: {objective: output_change, scope: row}}",
    "magnitude-row": "{method: magnitude, density: 0.05, q: {objective: output_change, scope: row}}",
    "least-squares-row": "{method: magnitude, density: 0.05, q: {objective: layer_mse, scope: row}}",
    "wanda": "{method: wanda, density: 0.1, q: {objective: layer_mse, scope: row}}",
    "learned-row": "{method: magnitude, density: 0.05, q: {objective: output_change, scope: row, search: gradient}}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpu")
    for kind in kept_recipes.RECIPES:
        kept_recipes.make_inputs(made, kind)
    return made


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, (_, array) in read_checkpoint(folder).items()}


@pytest.mark.parametrize("kind", kept_recipes.RECIPES)
def test_bytes_are_the_cpus(kind: str, folder: Path, tmp_path: Path) -> None:
    different = []
    for name, text in kept_recipes.RECIPES[kind]().items():
        if any(word in text for word in ONLY_MADE_UP):
            continue
        path = folder / kind / "recipe.yaml"
        path.write_text(text)
        cpu = run(path, tmp_path / "cpu", device="cpu", force=True).folder
        for device in ("cuda", "auto", *["cuda:all"] * (torch.cuda.device_count() > 1)):
            if read_bytes(run(path, tmp_path / "gpu", device=device, workers=3, force=True).folder) != read_bytes(cpu):
                different.append((name, device))
    assert not different


@pytest.mark.parametrize("name", PRUNES)
def test_calibration_finds_what_the_cpu_finds(name: str, tmp_path: Path) -> None:
    tiny_bert_pair(tmp_path, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base_model: ./base\nmodels: [{{model: ./tuned, name: t, prune: {PRUNES[name]}}}]\n"
        "calibration: {data: calib.jsonl, sequences: 8, length: 12, seeds: 2}\n"
    )
    found = {device: dict(calibrate(path, device=device)["t"]) for device in ("cpu", "cuda")}
    assert found["cuda"]["value"] == pytest.approx(found["cpu"]["value"], rel=0.02)
    again = dict(calibrate(path, device="cuda")["t"])
    assert again["q"] == found["cuda"]["q"]
