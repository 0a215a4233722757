"""Seconds from an edit of a recipe to the patched model, beside a run of the recipe and a load of its result.

    python -m benchmarks.serving.hot_merge BASE TUNED TUNED [--rounds 5] [--workers 2] [--json PATH]

The models are folders that transformers loads. The recipe is task arithmetic in bfloat16. Two edits are made: another
weight for one tensor, the largest in a middle layer, and another weight for a whole model. After each the weights in
memory must be those of a full load, bit by bit, and after an undo those before it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deltamerge.apps.serve.hot import HotMerge
from deltamerge.recipe.file import read_recipe
from deltamerge.run.options import Options
from deltamerge.run.runner import run


def recipe(base: Path, tuned: list[Path], weight: str) -> str:
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in tuned]
    lines = ["merge_method: task_arithmetic", f"base_model: {base}", "dtype: bfloat16", "models:"]
    lines += [f"  - {json.dumps(model)}" for model in models]
    return "\n".join(lines).replace("0.5", weight, 1) + "\n"


def loaded(folder: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.bfloat16)


def bits(model: Any) -> dict[str, bytes]:
    state = model.state_dict().items()
    return {n: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in state}


def measure(base: Path, tuned: list[Path], rounds: int, workers: int, folder: Path) -> dict[str, Any]:
    path, merged = folder / "merge.yaml", folder / "merged"
    path.write_text(recipe(base, tuned, "0.5"))
    run(read_recipe(path), merged, Options(workers=workers))
    model = loaded(merged)
    state = model.state_dict()
    names = sorted(
        (n for n in state if ".0." not in n and any(c.isdigit() for c in n)), key=lambda n: -state[n].numel()
    )
    hot = HotMerge(model, merged, path, workers=workers)
    found: dict[str, Any] = {"tensors": len(state), "bytes": sum(t.nbytes for t in state.values()), "edits": {}}
    for edit in ("one tensor", "one model"):
        rows = []
        for number in range(rounds):
            value = 0.6 + 0.01 * number
            one = f'[{{"filter": "{names[0]}", "value": {value}}}, {{"value": 0.5}}]'
            before = bits(model)
            path.write_text(recipe(base, tuned, one if edit == "one tensor" else str(value)))
            done = hot.update()
            begun = time.perf_counter()
            run(read_recipe(path), folder / "full", Options(workers=workers, force=True))
            written = time.perf_counter() - begun
            fresh = loaded(folder / "full")
            full = time.perf_counter() - begun
            assert bits(model) == bits(fresh), "the patched model is not the loaded one"
            back = hot.undo()
            assert bits(model) == before, "the undo is not exact"
            rows.append((len(done.tensors), done.seconds, back.seconds, written, full - written))
        keys = ("tensors", "update", "undo", "run", "load")
        found["edits"][edit] = {key: statistics.median(row[at] for row in rows) for at, key in enumerate(keys)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="hot-merge-"))
    try:
        tuned = [path.resolve() for path in given.tuned]
        found = measure(given.base.resolve(), tuned, given.rounds, given.workers, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{found['tensors']} tensors, {found['bytes'] / 1e6:.1f} MB; medians of {given.rounds}, in seconds")
    for edit, row in found["edits"].items():
        share = row["update"] / (row["run"] + row["load"])
        print(
            f"{edit}: {row['tensors']:.0f} changed, update {row['update']:.3f}, undo {row['undo']:.3f}; "
            f"run {row['run']:.3f} and load {row['load']:.3f}: {share:.2f} of them"
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
