"""Calibration on a simulated GPU: nothing of the host among its tensors, and what the CPU finds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_rows import rows
from conftest import tiny_bert_pair
from running import calibrate, run
from safetensors.torch import save_file
from simulated_gpu import simulated
from test_stage import RUNS, recipe

from deltamerge.calibrate.candidates import apply
from deltamerge.calibrate.resident import Resident
from deltamerge.cli import main
from deltamerge.engine.graph import Graph
from deltamerge.errors import InputError
from deltamerge.inspect import study
from deltamerge.io import gpu as gpu_loops
from deltamerge.io.reader import Reader
from deltamerge.io.safetensors_file import read_header
from deltamerge.methods.prune import bits
from deltamerge.methods.prune.bits import mask_key
from deltamerge.methods.prune.masks import dare

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


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_ROW)
def test_it_finds_what_the_cpu_finds(name: str, tmp_path: Path) -> None:
    check(tmp_path, name)


@pytest.mark.skipif(not gpu_loops.installed(), reason="no triton")
@pytest.mark.parametrize("q", [0.4, 1.0, "rows"])
def test_masks_are_drawn_by_the_loop_that_adds_them(q: Any, tmp_path: Path) -> None:
    """base + mask ∘ (tune − base) / q from weights that are there, as from a mask that was kept."""
    tensors = [torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1)]
    save_file({"base": tensors[0], "tune": tensors[1]}, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors").tensors
    graph, key = Graph(), mask_key(1, "t", "w")
    reads = [graph.read(infos[name]) for name in ("tune", "base")]
    node = graph.node(dare, reads, shape=(6, 40), key=key, density=0.3)
    sparse = graph.node(dare, reads, shape=(6, 40), key=key, density=0.01)
    base, delta = tensors[0].float(), tensors[1].float() - tensors[0].float()
    kept = torch.from_numpy(bits.keep(key, 0, 240, 0.3)).view(6, 40)
    masked = torch.where(kept, delta, 0.0)
    of_q = torch.linspace(0.2, 0.9, 6)[:, None] if q == "rows" else q
    with simulated() as gpu, Reader() as reader, torch.no_grad():
        resident = Resident.of(reader, torch.device("cuda"), {})
        assert resident is not None
        assert resident.drawn(sparse, infos["base"], (6, 40)) is None
        drawn = resident.drawn(node, infos["base"], (6, 40))
        assert drawn is not None
        assert torch.equal(drawn.delta().cpu(), masked)
        before = gpu.uploaded
        made = apply(base.to("cuda"), drawn, of_q).cpu()
        assert gpu.uploaded - before < 2000  # but for numbers: the weights are there
    divisor = of_q if q == "rows" else torch.tensor(of_q)
    assert torch.equal(made, base + masked / divisor)


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
    asked: dict[str, Callable[[], Any]] = {"one": lambda: calibrate(path, device="cuda")}
    for more in ("", ", coefficients: layer"):
        whole = recipe(tmp_path, f"whole{len(more)}", "{method: dare, density: 0.3}", f", per: merge{more}")
        asked[f"merge{more}"] = partial(calibrate, whole, device="cuda")
    for method in ("regmean", "regmean_plus", "fisher"):
        by_rows = recipe(tmp_path, method, "{method: magnitude, density: 1.0}", "", f"merge_method: {method}\n")
        asked[method] = partial(run, by_rows, tmp_path / f"out-{method}", device="cuda")
    measured = {"data": tmp_path / "calib.jsonl", "sequences": 8, "length": 12}
    for name, studied in {"inspect": study.inspect, "recommend": partial(study.recommend, density=0.3)}.items():
        both = str(tmp_path / "tuned"), str(tmp_path / "base")
        asked[name] = partial(studied, *both, calibration=measured, device="cuda")
    for ask in asked.values():
        with simulated() as gpu, pytest.raises(InputError, match="too little memory"):  # noqa: PT012
            gpu.failing = out_of_memory
            ask()


def out_of_memory(name: str) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")
