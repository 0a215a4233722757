"""A store of a hundred fine-tunes of one encoder: bytes beside their checkpoints, and `dm.Switch` beside loading them.

    python -m benchmarks.serving.store BASE TUNED TUNED [--count 100] [--density 0.05] [--method magnitude]

The fine-tunes are made up from two real ones: base + a·Δ₁ + b·Δ₂ in float32, rounded to bfloat16, a and b on a grid
from 0.3 to 1, with the head and the tokenizer of the one that weighs more. They are removed at the end. One command
makes the store: `deltamerge extract A B C … --base BASE --out STORE`. Times are processor time.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import deltamerge as dm
from benchmarks import ROOT


def make(base: Path, tuned: list[Path], folder: Path, count: int) -> list[Path]:
    origin = load_file(base / "model.safetensors")
    states = [load_file(one / "model.safetensors") for one in tuned]
    side, found = max(2, round(count**0.5)), []
    for number in range(count):
        weights = [0.3 + 0.7 * i / (side - 1) for i in divmod(number, side)]
        main = int(weights[0] < weights[1])
        state = dict(states[main])  # its head stays
        for name in state:
            old = origin.get(name, origin.get(name.partition(".")[2]))
            if old is not None:
                changes = (w * (one[name].float() - old.float()) for w, one in zip(weights, states, strict=True))
                state[name] = sum(changes, old.float()).to(old.dtype)
        out = folder / f"tuned-{number:03}"
        found.append(out)
        if (out / "model.safetensors").exists():  # of a run that was broken off
            continue
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tuned[main], out, ignore=shutil.ignore_patterns("model.safetensors"))
        save_file(state, out / "part", {"format": "pt"})
        (out / "part").rename(out / "model.safetensors")
    return found


def same_head(one: Path, other: Path) -> bool:
    return (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def processor(*words: object) -> float:
    """Seconds of processor time of a deltamerge command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "deltamerge", *map(str, words)], check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def swaps(base: Path, deltas: list[Path], models: list[Path]) -> dict[str, float]:
    """Milliseconds of processor time, medians: of switching to a delta for the first time and again, and of loading."""
    state = {n: t.clone() for n, t in load_file(models[0] / "model.safetensors").items()}  # with a head
    origin = load_file(base / "model.safetensors")
    for name, tensor in state.items():
        old = origin.get(name, origin.get(name.partition(".")[2]))
        tensor.copy_(torch.zeros_like(tensor) if old is None else old)
    switch, found = dm.Switch(state), {"first": [], "again": [], "back": [], "load": []}

    def timed(what: str, call: Any) -> None:
        begun = time.process_time()
        call()
        found[what].append(1000 * (time.process_time() - begun))

    for what in ("first", "again"):
        for delta in deltas:
            timed(what, lambda delta=delta: switch.to(delta))
            timed("back", lambda: switch.to(None))
    for model in models:

        def load(model: Path = model) -> None:
            for name, tensor in load_file(model / "model.safetensors").items():
                state[name].copy_(tensor)

        timed("load", load)
    return {what: statistics.median(times) for what, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path, nargs=2)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path(".bench/store"))
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--method", default="magnitude", help="how `extract` chooses entries at that density")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    base, tuned, folder = given.base.resolve(), [one.resolve() for one in given.tuned], given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    models = make(base, tuned, folder / "models", given.count)
    checkpoints = sum(path.stat().st_size for model in models for path in model.iterdir())
    found: dict[str, Any] = {"count": given.count, "checkpoints": checkpoints}
    for name, how in (("exact", ()), ("pruned", ("--density", given.density, "--method", given.method))):
        store = folder / name
        shutil.rmtree(store, ignore_errors=True)
        seconds = processor("extract", *models, "--base", base, "--out", store, *how, "--workers", 1, "-q")
        run = [sys.executable, "-m", "deltamerge", "list", store, "--json"]
        listed = json.loads(subprocess.run(run, check=True, capture_output=True, cwd=ROOT).stdout)
        changed = sum(one["changed"] for one in listed["deltas"]) / sum(one["elements"] for one in listed["deltas"])
        few = [store / model.name for model in models if same_head(model, models[0])][:5]
        times = swaps(base, few, [folder / "models" / delta.name for delta in few])
        found[name] = {"bytes": listed["bytes"], "unshared": listed["unshared"], "changed": changed,
                       "extract_seconds": seconds, "switch_ms": times}  # fmt: skip
        print(name, json.dumps(found[name]), flush=True)
    print(f"{given.count} checkpoints with their tokenizers: {checkpoints / 1e6:.1f} MB")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(folder / "models")


if __name__ == "__main__":
    main()
