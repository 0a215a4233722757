"""What a GPU is worth here, in one command under 8 minutes: ceilings, merges, calibration, tests against the CPU.

    make gpu                                      # or: python -m benchmarks.speed.gpu [--out FILE]
    python -m benchmarks.speed.gpu --device cpu --tiny  # a dry run of the script itself

It needs torch and what deltamerge needs, no network, and 2 GB in the folder. Everything goes to one JSON file
(benchmarks/results/gpu/<GPU>.json) as soon as it is known; what fails or has no time left is said there in a line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT

RECORDS = RESULTS / "gpu"
SECONDS = 450  # of the whole; a section begins only if its share is left
PACKAGES = ("torch", "transformers", "numpy", "safetensors")
RECIPES = {
    "task_arithmetic": "merge_method: task_arithmetic\nparameters: {normalize: false}\n",
    "dare_linear": "merge_method: dare_linear\nparameters: {density: 0.3}\n",
    "ties": "merge_method: ties\nparameters: {density: 0.2}\n",
    "della": "merge_method: della\nparameters: {density: 0.4, epsilon: 0.2}\n",
    "slerp": "merge_method: slerp\nparameters: {t: 0.3}\n",
}
CALIBRATIONS = {
    "one q": "{method: dare, density: 0.1, q: output_change}",
    "layer_mse": "{method: magnitude, density: 0.05, q: layer_mse}",
}


class Report:
    """The JSON file, written after each section."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.found, self.end = path, dict[str, Any](), time.monotonic() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def section(self, name: str, needed: float, measure: Callable[[], Any]) -> None:
        """Measure, if so many seconds are left; an error is a line of the report."""
        begun = time.monotonic()
        if self.left < needed:
            self.found[name] = {"skipped": f"{self.left:.0f} s were left, {needed:.0f} are needed"}
        else:
            try:
                self.found[name] = measure()
            except Exception as error:  # the rest is worth having
                self.found[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.found.setdefault("seconds", {})[name] = round(time.monotonic() - begun, 2)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"{name}: {json.dumps(self.found[name])[:300]}", flush=True)


def versions(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found |= {"cuda": torch.version.cuda, "cores": os.cpu_count(), "device": device}
    if device != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        found |= {"gpu": torch.cuda.get_device_name(device), "memory": total, "free": free}
    return found


def best(measure: Callable[[], None], synchronise: Callable[[], None], times: int = 5) -> float:
    """The shortest of a few times, in seconds."""
    shortest = float("inf")
    for _ in range(times):
        synchronise()
        begun = time.perf_counter()
        measure()
        synchronise()
        shortest = min(shortest, time.perf_counter() - begun)
    return shortest


def ceilings(device: str, nbytes: int, folder: Path) -> dict[str, float]:
    """What copies, launches, products and reads can do at best."""
    import torch

    on_gpu = device != "cpu"
    wait = (lambda: torch.cuda.synchronize(device)) if on_gpu else lambda: None
    host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
    there = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    pageable = torch.zeros(nbytes, dtype=torch.uint8)
    one = torch.zeros(1, device=device)
    side = 2048 if on_gpu else 256  # a processor without bfloat16 products takes 20 s for one of 2048
    a = torch.randn(side, side, device=device)
    half = a.bfloat16()
    path = folder / "ceiling"
    path.write_bytes(pageable.numpy().tobytes())
    found = {
        "up GB/s": nbytes / best(lambda: there.copy_(host, non_blocking=True), wait) / 1e9,
        "down GB/s": nbytes / best(lambda: host.copy_(there, non_blocking=True), wait) / 1e9,
        "up from pageable memory GB/s": nbytes / best(lambda: there.copy_(pageable), wait) / 1e9,
        "inside GB/s": 2 * nbytes / best(lambda: there.add_(1), wait) / 1e9,
        "launch µs": 1e3 * best(lambda: [one.add_(1) for _ in range(1000)], wait),
        "float32 TFLOP/s": 2 * side**3 / best(lambda: a @ a, wait) / 1e12,
        "bfloat16 TFLOP/s": 2 * side**3 / best(lambda: half @ half, wait) / 1e12,
        "page cache GB/s": nbytes / best(lambda: path.read_bytes(), lambda: None) / 1e9,
    }
    path.unlink()
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def tests(device: str, left: float) -> dict[str, Any]:
    """`pytest -m gpu`: its last line, and the names of those that fail."""
    if device == "cpu":
        return {"skipped": "no GPU is asked for"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "4"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(30, left - 150)
        )
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")
        return {"timeout": said.splitlines()[-5:]}
    lines = done.stdout.strip().splitlines()
    return {
        "result": lines[-1:] or done.stderr.strip().splitlines()[-1:],
        "failed": [line for line in lines if line.startswith("FAILED")],
        "rc": done.returncode,
    }


@contextmanager
def phases() -> Iterator[dict[str, float]]:
    """Seconds of each phase that deltamerge names, those inside others too."""
    from deltamerge.files import progress

    found: dict[str, float] = {}

    class Listener:
        def begun(self, phase: Any) -> None:
            pass

        def ended(self, phase: Any) -> None:
            found[phase.name] = round(found.get(phase.name, 0.0) + time.monotonic() - phase.begun, 3)

    with progress.heard(Listener()):
        yield found


def merge(models: list[Path], folder: Path, name: str, device: str) -> dict[str, Any]:
    """A merge: seconds, by phase, the device's peak memory, and the hash of the weights."""
    import torch

    from deltamerge.api import load_recipe

    base, *tunes = models
    some = tunes[:1] if name == "slerp" else tunes
    listed = ", ".join(f"{{model: {tune}, parameters: {{weight: 0.5}}}}" for tune in some)
    listed = f"{{model: {some[0]}}}" if name == "slerp" else listed
    recipe = folder / f"{name}.yaml"
    recipe.write_text(f"{RECIPES[name]}base_model: {base}\nmodels: [{listed}]\n")
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    planned = load_recipe(str(recipe), device=device)
    begun = time.monotonic()
    with phases() as parts:
        done = planned.run(str(folder / f"{name} {device}"))
    taken = time.monotonic() - begun
    hashes = sorted(entry["hash"] for name, entry in done.lock["outputs"].items() if name.endswith(".safetensors"))
    found = {"seconds": round(taken, 3), "GB/s": round(planned.plan.read_bytes / taken / 1e9, 3), "phases": parts}
    if device != "cpu":
        found["peak"] = torch.cuda.max_memory_allocated(device)
    return found | {"hashes": hashes}


def merges(models: list[Path], folder: Path, device: str) -> dict[str, Any]:
    """Every recipe on the CPU and on the device, and whether the bytes are the same."""
    found: dict[str, Any] = {}
    for name in RECIPES:
        sides = {side: merge(models, folder, name, side) for side in dict.fromkeys(("cpu", device))}
        same = len({tuple(side.pop("hashes")) for side in sides.values()}) == 1
        found[name] = {**sides, "same bytes": same}
    return found


def calibration(models: list[Path], folder: Path, device: str, *, tiny: bool) -> dict[str, Any]:
    """q's of a Llama on the CPU and on the device: seconds, passes, and what was found."""
    sys.path[:0] = [str(ROOT / "tests")]
    from calibration_rows import rows
    from running import calibrate
    from word_tokenizer import write_tokenizer

    base, tuned, *_ = models
    for model in (base, tuned):
        write_tokenizer(model, 96)
    rows(folder / "calib.jsonl")
    sequences, length = (4, 8) if tiny else (32, 128)
    found: dict[str, Any] = {}
    for name, prune in CALIBRATIONS.items():
        path = folder / f"{name.replace(' ', '-')}.yaml"
        path.write_text(
            f"base_model: {base}\nmodels: [{{model: {tuned}, name: t, prune: {prune}}}]\n"
            f"calibration: {{data: calib.jsonl, sequences: {sequences}, length: {length}, seeds: 2}}\n"
        )
        for side in dict.fromkeys(("cpu", device) if tiny or name == "layer_mse" else (device,)):
            begun = time.monotonic()
            with phases() as parts:
                record = calibrate(path, device=side)["t"]
            some = {k: record.get(k) for k in ("value", "forward_passes", "chosen")}
            found.setdefault(name, {})[side] = {"seconds": round(time.monotonic() - begun, 2), "phases": parts, **some}
    return found


def profile(models: list[Path], folder: Path, device: str) -> Any:
    """The kernels and calls that take longest in one merge."""
    import torch
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with torch.profiler.profile(activities=kinds) as seen:
        merge(models, folder / "profile", "ties", device)
    key = "self_device_time_total" if device != "cpu" else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))[:15]
    return [{"name": row.key[:80], "calls": row.count, "ms": round(getattr(row, key) / 1e3, 3)} for row in rows]


def measure(device: str, out: Path, folder: Path, *, tiny: bool) -> Report:
    report = Report(out, SECONDS)
    report.section("versions", 0, lambda: versions(device))
    report.section("ceilings", 20, lambda: ceilings(device, 1 << (16 if tiny else 28), folder))
    from benchmarks.synthetic import SIZES, make_checkpoints

    models = make_checkpoints(folder / "models", SIZES["tiny" if tiny else "M"])
    (folder / "profile").mkdir()
    report.section("merges", 90, lambda: merges(models, folder, device))
    report.section("profile", 40, lambda: profile(models, folder, device))
    report.section("calibration", 60, lambda: calibration(models, folder, device, tiny=tiny))
    report.section("tests", 60, lambda: tests(device, report.left))
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="for models and results; a temporary one by default")
    parser.add_argument("--tiny", action="store_true", help="sizes that show only that the script runs")
    given = parser.parse_args(arguments)
    try:
        import torch

        import deltamerge.api  # noqa: F401  # only whether it can be
    except ImportError as lacking:
        sys.exit(f"make gpu: {lacking}: install deltamerge where torch sees the GPU, then run it again")
    if given.device != "cpu" and not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no CUDA device; --device cpu is a dry run")
    name = "cpu" if given.device == "cpu" else re.sub(r"\W+", "-", torch.cuda.get_device_name(given.device))
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        measure(given.device, given.out or RECORDS / f"{name}.json", Path(place), tiny=given.tiny)


if __name__ == "__main__":
    main()
