"""`make demo`: fine-tune a real model, prune and merge it with `deltamerge run`, print the scores.

Everything is kept in .demo/ and reused by the next run. A recipe added to RECIPES becomes a row of the table.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors import safe_open
from transformers.utils import logging

from benchmarks import ROOT, encoder, tasks
from benchmarks.tasks import TASKS, WORK

FOLDER = ROOT / "recipes" / "demo"
RECIPES = {
    "dare-0.1.yaml": "DARE",
    "magnitude-0.1.yaml": "magnitude",
    "dare-0.01.yaml": "DARE",
    "random-drop-0.01.yaml": "random drop",
    "magnitude-0.01.yaml": "magnitude",
    "darex-q-0.01.yaml": "DAREx-q, calibrated",
    "magnitude-calibrated-0.01.yaml": "magnitude, calibrated",
    "two-task-arithmetic.yaml": "+ intensity, task arithmetic",
    "two-ties.yaml": "+ intensity, ties",
}


class Result(NamedTuple):
    method: str
    density: float
    megabytes: float  # of the weights that differ from the base, as bfloat16
    accuracy: float  # % of the test sentences
    seconds: float | None  # of the whole `deltamerge run` process


def main() -> None:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers is only partly typed
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # else: "the head is new", which it is

    base = WORK / "base"
    if not base.exists():
        encoder.build_base(base)
    for task in ("sentiment", "intensity"):
        if not (WORK / task).exists():
            encoder.fine_tune(base, TASKS[task], WORK / task)

    tuned = WORK / "sentiment"
    results = [Result("fine-tune", 1.0, delta_megabytes(tuned), accuracy(tuned), None)]
    for file, method in RECIPES.items():
        results.append(merge(FOLDER / file, method))
    print(table(results))
    print(commonest())
    print("seconds: the whole process. Recipes: recipes/demo/. Results, ordinary checkpoints: .demo/merged/.")


def merge(recipe_file: Path, method: str) -> Result:
    """Run a recipe with the command line tool, as a user would, and score what it wrote."""
    recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    command = [str(Path(sys.executable).with_name("deltamerge")), "run", str(recipe_file), "--force"]
    print(f"deltamerge run recipes/demo/{recipe_file.name}", file=sys.stderr)
    start = time.perf_counter()
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(code)
    seconds = time.perf_counter() - start
    out = recipe_file.parent / recipe["output"]["path"]
    settings = {**recipe.get("parameters", {}), **recipe.get("prune", {})}
    return Result(method, settings.get("density", 1.0), delta_megabytes(out), accuracy(out), seconds)


def accuracy(folder: Path) -> float:
    return encoder.score(folder, TASKS["sentiment"], tasks.rows("sentiment", "test"))


def delta_megabytes(folder: Path) -> float:
    """MB of the weights that differ from the base's, two bytes each; not of the head, which it lacks."""
    changed = 0
    with (
        safe_open(folder / "model.safetensors", "pt") as result,
        safe_open(WORK / "base" / "model.safetensors", "pt") as base,
    ):
        for name in base.keys():  # noqa: SIM118  not a mapping
            changed += int(torch.count_nonzero(result.get_tensor(f"bert.{name}") != base.get_tensor(name)))
    return 2 * changed / 1e6


def commonest() -> str:
    labels = [row.label for row in tasks.rows("sentiment", "test")]
    share = 100 * max(map(labels.count, set(labels))) / len(labels)
    return f"\naccuracy: of {len(labels):,} test sentences; the commoner answer alone would score {share:.1f}."


def table(results: list[Result]) -> str:
    head = ("method", "density", "delta MB", "accuracy %", "seconds")
    body = [
        (
            r.method,
            f"{r.density:g}",
            f"{r.megabytes:.2f}",
            f"{r.accuracy:.1f}",
            "" if r.seconds is None else f"{r.seconds:.1f}",
        )
        for r in results
    ]
    width = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        "  ".join([row[0].ljust(width[0]), *(cell.rjust(w) for cell, w in zip(row[1:], width[1:], strict=True))])
        for row in (head, *body)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    main()
