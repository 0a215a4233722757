"""A fine-tune of any kind pruned by recipes, and what each way of pruning keeps of its score over densities."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paper.frame import NotKept, Record, Setting, spread, table
from benchmarks.pruning import quality
from benchmarks.pruning.quality import Method

METHODS = {method.name: method for method in quality.METHODS}
# As a calibrated q does: only linear weights are divided. `spared` are filters of tensors that keep their values.
SPARED = {"spared": ("embed_tokens", "norm")}
METHODS["DARE, linear weights"] = Method("DARE, linear weights", quality.DARE | SPARED, random=True)
NAME = "fine-tune"  # masks are keyed by it


@dataclass(frozen=True)
class Subject:
    """A fine-tune, a folder or base+adapter, with its `calibration` as in a recipe and what scores a result, in %.

    `made_of` says what the score depends on besides; `output` is the recipe's. `labelled` is the calibration of what
    needs labels, where that is another.
    """

    base: Path
    tuned: str
    calibration: Mapping[str, Any]
    score: Callable[[Path], float]
    made_of: Mapping[str, Any]
    output: Mapping[str, Any] = field(default_factory=dict)
    labelled: Mapping[str, Any] | None = None

    def rows(self, q: Any) -> dict[str, Any]:
        """The `calibration` of a recipe whose `prune` has this q."""
        needs = "validation" in (q, q.get("objective") if isinstance(q, Mapping) else None)
        return dict(self.labelled if needs and self.labelled is not None else self.calibration)


def prune(setting: Setting, subject: Subject, method: Method, density: float, seed: int) -> dict[str, Any]:
    """The score of one recipe's result, and the q that it chose."""
    keys = {**method.prune, "density": density}
    if spared := keys.pop("spared", ()):
        keys["q"] = [*({"filter": part, "value": 1.0} for part in spared), {"value": density}]
    recipe = {
        "base_model": str(subject.base),
        "models": [{"model": subject.tuned, "name": NAME, "prune": keys}],
        "calibration": subject.rows(keys.get("q")),
        "seed": setting.seed + seed,
        **({"output": dict(subject.output)} if subject.output else {}),
    }

    def measure() -> dict[str, Any]:
        from deltamerge.recipe.file import read_recipe
        from deltamerge.run.options import Options
        from deltamerge.run.runner import run

        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            result = run(read_recipe(path), Path(work) / "merged", Options(workers=1, device="cpu"))
            lock = result.lock.get("calibration", {}).get(NAME, {})
            found = {"score": round(subject.score(result.folder), 2)}
            return found | {key: lock[key] for key in ("chosen", "searched") if key in lock}

    found: dict[str, Any] = setting.once(
        f"{Path(subject.tuned).name} {method.name} {density:g}", {"recipe": recipe, **subject.made_of}, measure
    )
    return found


def fine_tunes(
    setting: Setting,
    subject: Callable[[Setting, str], Subject],
    names: Mapping[str, Sequence[str]],
    densities: Sequence[float],
    seeds: int,
) -> dict[str, Record]:
    """Of every trainer of `names` its fine-tune (`whole`) and the `rows` of what prunes it (`scores`)."""
    found = {}
    for trainer, methods in names.items():
        with suppress(NotKept):
            one = subject(setting, trainer)
            found[trainer] = whole(setting, one) | {"rows": scores(setting, one, methods, densities, seeds)}
    return found


def scores(
    setting: Setting, subject: Subject, names: Sequence[str], densities: Sequence[float], seeds: int
) -> list[Record]:
    """A row for each method and density; random masks are drawn `seeds` times, calibrated ones once."""
    rows = []
    for name in names:
        method = METHODS[name]
        draws = seeds if method.random and "q" not in method.prune else 1
        for density in densities:
            cells = []
            for seed in range(draws):
                with suppress(NotKept):
                    cells.append(prune(setting, subject, method, density, seed))
            if cells:
                rows.append({"method": name, "density": density, "cells": cells})
    return rows


def whole(setting: Setting, subject: Subject) -> Record:
    """The unpruned fine-tune: its score, and how large its delta is."""

    def measure() -> Record:
        from deltamerge.apps.inspect.study import inspect

        found = inspect(subject.tuned, str(subject.base), device="cpu", workers=1).total
        size = {"mean_abs": found.mean_abs, "relative_norm": found.relative_norm}
        return {"score": round(subject.score(Path(subject.tuned)), 2)} | size

    found: Record = setting.once(
        f"{Path(subject.tuned).name} unpruned", {"tuned": subject.tuned, **subject.made_of}, measure
    )
    return found


def by_trainer(found: Mapping[str, Record], paper: Mapping[str, Sequence[Any]] = {}) -> str:
    """A Markdown table of fine-tunes and their `rows` of `scores`: a column for each drop rate, then the paper's.

    `paper` has the heads of its columns under "", and its figures under "TRAINER, METHOD", or METHOD for AdamW.
    """
    extra = list(paper.get("", ()))
    densities = sorted({row["density"] for one in found.values() for row in one["rows"]}, reverse=True)
    lines: list[list[Any]] = []
    for trainer, one in found.items():
        cells: dict[str, dict[float, str]] = {}
        for row in one["rows"]:
            shown = spread([cell["score"] for cell in row["cells"]])
            plain = any(cell.get("chosen") == "plain" for cell in row["cells"])
            cells.setdefault(row["method"], {})[row["density"]] = shown + " †" * plain
        sizes = f"mean abs(Δ) {one['mean_abs']:.1e}, ‖Δ‖/‖W‖ {one['relative_norm']:.2f}"
        key = "unpruned" if trainer == "AdamW" else f"{trainer}, unpruned"
        blank = [None] * len(extra)
        lines.append([trainer, f"unpruned ({sizes})", *[one["score"]] * len(densities), *paper.get(key, blank)])
        for name, by in cells.items():
            key = name if trainer == "AdamW" else f"{trainer}, {name}"
            lines.append([trainer, name, *(by.get(d) for d in densities), *paper.get(key, blank)])
    head = ["trained with", "pruned by", *(f"p = {round(1 - d, 6):g}" for d in densities), *extra]
    return table(head, lines) + "\n† calibration found nothing better than the method without it, on held-out rows.\n"
