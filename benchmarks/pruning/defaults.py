"""What is pruned and rescaled by default: embeddings and 1-D tensors, at density 0.01, on all test rows.

    python -m benchmarks.pruning.defaults                              half an hour; goes on where it stopped
    python -m benchmarks.pruning.defaults --task sentiment --seeds 2   a part

Models as in quality.py. Where all tensors are divided by one q, it is the one that was searched for linear weights.
Results go to benchmarks/results/defaults.json after every cell, the table to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.pruning import quality
from benchmarks.pruning.quality import Method, spread
from benchmarks.tasks import WORK, models_folder

DENSITY = 0.01
FILE = RESULTS / "defaults.json"
VECTORS = ("LayerNorm", "bias")
# Row -> its mask, and the q of linear weights.
METHODS = {
    "DARE": ("dare", DENSITY),
    "DAREx-q, q_e": ("dare", "output_change"),
    "magnitude, q_e": ("magnitude", "output_change"),
}
LINEAR, ALL, WHOLE = KINDS = ("linear weights", "all", "linear weights, 1-D tensors whole")


def prune(mask: str, kind: str, q: float | str) -> dict[str, Any]:
    """The recipe's keys; a calibrated q is of linear weights alone, a number of all that no filter names."""
    keys: dict[str, Any] = {"method": mask, "q": q}
    if kind != ALL and isinstance(q, float):
        keys["q"] = [{"filter": part, "value": 1.0} for part in ("embeddings", *VECTORS)] + [{"value": q}]
    return keys | ({"exclude": [*VECTORS, "classifier"]} if kind == WHOLE else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["sentiment", "intensity"])
    parser.add_argument("--seeds", type=int, default=4)
    asked = parser.parse_args()
    quality.quiet()
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    with tempfile.TemporaryDirectory(dir=WORK) as work:
        folder = models_folder()
        models = {name: folder / name for name in ("base", *asked.task)}
        setting = quality.Setting(models, WORK / "tasks", Path(work), None, None, 40, 4)
        for seed in range(asked.seeds):
            for task in asked.task:
                fill(found, setting, task, seed)
    print(markdown(found))


def fill(found: dict[str, dict[str, Any]], setting: quality.Setting, task: str, seed: int) -> None:
    for name, (mask, q) in METHODS.items():
        for kind in KINDS:
            key = f"{task} | {name} | {kind} | {seed}"
            if key in found or (seed and mask == "magnitude"):
                continue
            searched = kind == ALL and isinstance(q, str)
            value = found[f"{task} | {name} | {LINEAR} | {seed}"]["searched"]["q"] if searched else q
            found[key] = quality.cell(setting, task, Method(name, prune(mask, kind, value)), DENSITY, seed)
            print(key, found[key]["score"], file=sys.stderr, flush=True)
            FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def markdown(found: dict[str, dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys(key.split(" | ")[0] for key in found))
    lines = ["| method | q divides | " + " | ".join(tasks) + " |", "|---|---" + "|---" * len(tasks) + "|"]
    for name in METHODS:
        for kind in KINDS:
            scores = [
                [cell["score"] for key, cell in found.items() if key.startswith(f"{task} | {name} | {kind} | ")]
                for task in tasks
            ]
            if any(scores):
                lines.append(f"| {name} | {kind} | " + " | ".join(spread(s) if s else "" for s in scores) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
