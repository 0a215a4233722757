"""Calibration on a simulated GPU: nothing of the host among its tensors, and what the CPU finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibration_rows import rows
from conftest import tiny_bert_pair
from running import calibrate
from simulated_gpu import simulated
from test_stage import RUNS, recipe

from deltamerge.cli import main
from deltamerge.errors import InputError

BY_ROW = ["least-squares-row"]


def check(folder: Path, name: str) -> None:
    if not (folder / "calib.jsonl").exists():
        tiny_bert_pair(folder, dtype=torch.float32, sigma=0.05, tokenizer=True)
        rows(folder / "calib.jsonl")
    path = recipe(folder, name, RUNS[name])
    cpu = dict(calibrate(path, device="cpu")["t"])
    with simulated() as gpu:
        found = dict(calibrate(path, device="cuda")["t"])
    assert gpu.launches
    assert found["value"] == pytest.approx(cpu["value"], rel=1e-3)
    assert found["q"].keys() == cpu["q"].keys()


@pytest.mark.parametrize("name", BY_ROW)
def test_it_finds_what_the_cpu_finds(name: str, tmp_path: Path) -> None:
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name not in BY_ROW])
def test_it_finds_what_the_cpu_finds_by_every_search(name: str, tmp_path: Path) -> None:
    check(tmp_path, name)


def test_a_gpu_that_is_not_there_or_too_small_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bert_pair(tmp_path, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl")
    path = recipe(tmp_path, "one", RUNS["least-squares"])
    with pytest.raises(SystemExit) as left:
        main(["calibrate", str(path), "--device", "cuda"])
    said = capsys.readouterr().err
    assert (left.value.code, "torch sees 0 CUDA devices" in said, "bug" in said) == (1, True, False)
    with simulated() as gpu, pytest.raises(InputError, match="too little memory"):  # noqa: PT012
        gpu.failing = out_of_memory
        calibrate(path, device="cuda")


def out_of_memory(name: str) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")
