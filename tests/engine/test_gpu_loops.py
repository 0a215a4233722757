"""The Triton loops against the compiled ones of the CPU, bit for bit, by Triton's interpreter; and their PTX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_kernels
from test_kernels import KEY, SELECT, STEPS, Models, counted, floats, floats_of, same, steps

from deltamerge.engine.backends import TorchBackend
from deltamerge.engine.fused.on_gpu import Loop
from deltamerge.engine.graph import REDUCTIONS, Node
from deltamerge.io import gpu
from deltamerge.methods.prune import bits

pytestmark = [needs_kernels, pytest.mark.skipif(not gpu.installed(), reason="no triton")]

# what torch does on a GPU: rows that are sorted, positions drawn by gaps, lists
BY_TORCH = {
    "zeros", "della", "della, not rescaled", "norm of della", "rows", "rows, nearly all", "rows, scored",
    "norm of rows", "sample", "bracket", "bracket of one", "norm l1 of a sparse delta", "norm l2 of a sparse delta",
    "norm linf of a sparse delta", *(name for name in STEPS if "sparse" in name or "two regimes" in name),
}  # fmt: skip
# quotients of whole numbers, which are exact
WHOLE = {f"div.{sign}{bits}" for sign in "us" for bits in (16, 32, 64)}
# every line that a loop can have
EVERYDAY = ["subtract", "cast to half", "linear of three, normalized", "dare 0.3", "ties, normalized", "sce",
            "variance", "gram", "norm linf", "divided by matrix", "restored", "low counts", "equals"]  # fmt: skip
SHAPES = [(1,), (7,), (70_001,), (300, 97), (2, 70_000), (9, 20, 30), (2, 3, 50, 30)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loop at a time: the interpreter changes the language while it runs."""
    monkeypatch.setenv(gpu.INTERPRETED, "1")
    launch, one = gpu.launch, threading.Lock()

    def alone(*given: Any, **constants: Any) -> None:
        with one:
            launch(*given, **constants)

    monkeypatch.setattr(gpu, "launch", alone)


def check(models: Models, root: Node, monkeypatch: pytest.MonkeyPatch, *, by_loop: bool = True) -> Any:
    """A loop makes what the compiled one of the CPU makes."""
    made: list[Loop | None] = []
    loop = TorchBackend.loop
    monkeypatch.setattr(TorchBackend, "loop", lambda *a: made.append(loop(*a)) or made[-1])
    ours = models.compute(root, "torch")
    monkeypatch.setattr(TorchBackend, "loop", loop)
    assert (None not in made) == by_loop
    same(ours, models.compute(root, "fused"), "" if root.kind in REDUCTIONS else root.dtype)
    return ours


def check_step(name: str, shapes: Any, values: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, shape in enumerate(shapes):
        inside = folder / f"{name} {number}".replace("/", " ")
        inside.mkdir()
        dtypes = [torch.bfloat16, torch.bfloat16, torch.float32 if number % 2 else torch.float16]
        tensors = [values(shape, seed).to(dtype) for seed, dtype in enumerate(dtypes)]
        models = Models(inside, *tensors)
        check(models, STEPS[name](models), monkeypatch, by_loop=name not in BY_TORCH)


def test_loops_are_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EVERYDAY:
        check_step(name, [(70, 97)], floats, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("values", [floats, steps])
@pytest.mark.parametrize("name", STEPS)
def test_loops_are_the_cpus_on_every_shape(
    name: str, values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_step(name, SHAPES, values, tmp_path, monkeypatch)


@pytest.mark.parametrize("wanted", [0, 40, 10**6])
def test_equals_are_kept_by_rank(wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(tmp_path, *(steps((97, 900), seed).bfloat16() for seed in range(3)))
    cut, ranks = counted(models, models.delta(1), 2**-9, wanted)
    smalls = models.small(cut), models.small(ranks)
    check(models, models.node(f"{SELECT}:keep_where", models.delta(2), models.delta(1), *smalls), monkeypatch)


def test_ties_of_the_high_half_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A density whose high half is that of two words, one of which is below it."""
    words = bits.words(KEY, 0, 5000)
    found = np.sort(words[words > 1 << 30])
    near = np.flatnonzero(found[1:] >> 16 == found[:-1] >> 16)
    density = int(found[near[0] + 1]) / 2**32
    models = Models(tmp_path, torch.zeros(5000), torch.ones(5000))
    pair = models.reads[1], models.reads[0]
    node = models.node("deltamerge.methods.prune.masks:dare", *pair, key=KEY, density=density)
    assert (check(models, node, monkeypatch) != 0).sum() == (words < found[near[0] + 1]).sum()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_floats_round_as_on_the_cpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    high = np.arange(0, 1 << 16, 7, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    models = Models(tmp_path, torch.from_numpy((high | low).view(np.float32)))
    node = models.node("deltamerge.methods.ops:cast", models.reads[0], dtype=dtype, to=dtype)
    ours = check(models, node, monkeypatch)
    nan = np.isnan(floats_of(ours, dtype))
    assert set(ours[nan].tolist()) == {0x7FC0 if dtype == "BF16" else 0x7E00}


@pytest.mark.slow
def test_what_they_compile_to_rounds_every_step(tmp_path: Path) -> None:
    """For sm_90: no fused multiply-add, no approximate quotient, no flush to zero."""
    names = [name for name in STEPS if name not in BY_TORCH]
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder.parents[1]), str(folder.parent), str(folder)])
    environment = {k: v for k, v in os.environ.items() if k != gpu.INTERPRETED}
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(folder / "gpu_ptx.py"), *names], capture_output=True, text=True, env=environment
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(names)
    for name, words in found.items():
        odd = {word for word in words if word.startswith(("fma", "div", "rcp", "sqrt"))} - {"div.rn.f32", *WHOLE}
        assert (name, odd, words["ftz"], words["approx"]) == (name, set(), 0, 0)
    assert any("div.rn.f32" in words for words in found.values())
