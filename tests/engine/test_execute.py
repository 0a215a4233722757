"""The engine on graphs of its own: order, errors, interruption, a full disk, a GPU."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import load_tensors, make_checkpoint
from running import make_plan, run

RECIPE = "base_model: ./base\nmodels: [{model: ./a, prune: {method: dare, density: 0.3}}]\n"


def pair(folder: Path, rows: int, count: int = 3) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(rows, 256, generator=generator).bfloat16() for i in range(count)}
    make_checkpoint(folder / "base", base)
    make_checkpoint(folder / "a", {n: t + 0.25 for n, t in base.items()})
    recipe = folder / "r.yaml"
    recipe.write_text(RECIPE)
    return recipe


def test_many_small_tensors_and_more_workers_than_tensors(tmp_path):
    recipe = pair(tmp_path, rows=1, count=400)
    one = load_tensors(run(recipe, tmp_path / "one", workers=1).folder)
    many = load_tensors(run(recipe, tmp_path / "many", workers=16).folder)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("method", ["karcher", "multislerp", "arcee_fusion"])
def test_what_is_not_finite_makes_no_warning_of_numpy(tmp_path, method):
    for name, value in (("base", 1.0), ("a", torch.nan), ("b", torch.inf)):
        make_checkpoint(tmp_path / name, {"w": torch.full((3, 4), value)})
    names = "a" if method == "arcee_fusion" else "ab"
    given = ", parameters: {weight: 1}" if method == "multislerp" else ""
    models = ", ".join(f"{{model: ./{name}{given}}}" for name in names)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: {method}\nbase_model: ./base\nmodels: [{models}]\n")
    run(recipe, tmp_path / "out", allow_nonfinite=True)


def test_a_delta_that_is_no_number_is_not_taken_for_one_that_hardly_matters(tmp_path):
    from deltamerge.errors import OutputError

    for name, value in (("base", 1.0), ("a", torch.nan)):
        make_checkpoint(tmp_path / name, {"w": torch.full((3, 4), value)})
    recipe = tmp_path / "r.yaml"
    recipe.write_text("merge_method: arcee_fusion\nbase_model: ./base\nmodels: [{model: ./a}]\n")
    with pytest.raises(OutputError, match="not finite in w"):
        run(recipe, tmp_path / "out")


def test_a_vanished_or_shortened_input_stops_the_run_and_leaves_nothing(tmp_path, monkeypatch):
    from deltamerge.errors import InputError
    from deltamerge.outputs import checkpoint as module

    recipe = pair(tmp_path, rows=512)
    weights = tmp_path / "a" / "model.safetensors"

    def shorten(*args: object, **kwargs: object) -> None:
        os.truncate(weights, weights.stat().st_size // 2)
        original(*args, **kwargs)

    original = module.execute
    monkeypatch.setattr(module, "execute", shorten)
    with pytest.raises(InputError, match=r"tensor layers\.\d\.w"):
        run(recipe, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "r.yaml"]


def command(recipe: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "deltamerge", "run", str(recipe), "-q", *more]


def test_a_full_disk_is_one_line_exit_1_and_leaves_nothing(tmp_path):
    recipe = pair(tmp_path, rows=2048)
    done = subprocess.run(
        command(recipe),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "r.yaml"]


def test_an_interrupted_run_exits_130_and_leaves_nothing(tmp_path):
    recipe = pair(tmp_path, rows=60_000, count=8)
    process = subprocess.Popen(
        command(recipe, "--workers", "1"),
        stderr=subprocess.PIPE,
        text=True,
        # a suite started in the background inherits an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".r-merged*/out/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "r.yaml"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("method", ["{method: dare, density: 0.3}", "{method: magnitude, density: 0.1, group: row}"])
def test_memory_stays_under_the_plan_whatever_the_size_of_a_tensor(tmp_path, method):
    """200 million elements in one tensor; the torch path holds rows of the same tiles."""
    recipe = pair(tmp_path, rows=400_000, count=2)
    recipe.write_text(RECIPE.replace("{method: dare, density: 0.3}", method))
    planned = make_plan(recipe, device="cpu", memory=400_000_000)
    process = subprocess.Popen(command(recipe, "--memory", "400MB"))
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.005)
    assert process.returncode == 0
    assert 20_000 < peak < planned.peak_bytes / 1000 <= 400_000


@pytest.mark.gpu
def test_a_gpu_makes_the_same_bytes(tmp_path):
    recipe = pair(tmp_path, rows=4096)
    cpu = run(recipe, tmp_path / "cpu", device="cpu").folder / "model.safetensors"
    gpu = run(recipe, tmp_path / "gpu", device="cuda", workers=3).folder / "model.safetensors"
    assert cpu.read_bytes() == gpu.read_bytes()


INTERRUPTED = """
import os, signal, sys, threading, time
from deltamerge.api import load_recipe
from deltamerge.engine.worker import Worker
signal.signal(signal.SIGINT, signal.default_int_handler)
running, ended, freed, compute = threading.Event(), [], [], Worker.do

class Held:
    def __del__(self):
        time.sleep(0.2)
        freed.append(time.monotonic())

def slowly(*arguments):
    running.set()
    arguments[0].held = Held()
    time.sleep(0.4)
    compute(*arguments)
    ended.append(time.monotonic())

Worker.do = slowly
planned = load_recipe("r.yaml", workers=1)
threading.Thread(target=lambda: (running.wait(30), time.sleep(0.1), os.kill(os.getpid(), signal.SIGINT))).start()
try:
    planned.run("out")
except KeyboardInterrupt:
    left = time.monotonic()
time.sleep(0.8)
print(len(ended), max(ended) < left, max(freed) < left)
"""


def test_workers_have_ended_when_an_interrupted_run_is_left(tmp_path):
    """Whoever is interrupted closes what they write to, and may exit: a thread that then frees a tensor aborts."""
    pair(tmp_path, rows=512, count=8)
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "1 True True\n", done.stderr
