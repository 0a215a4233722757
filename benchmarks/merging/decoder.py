"""Merges of SmolLM2's experts, one a task: what each keeps of every expert's exact match, seconds and memory.

    python -m benchmarks.merging.decoder                      every merge of MERGES of every delta of DELTAS
    python -m benchmarks.merging.decoder ties --rows 50       some of them, on fewer rows a task
    python -m benchmarks.merging.decoder --delta unpruned     one kind of delta
    python -m benchmarks.merging.decoder --table              what was measured

Experts are those of `smollm2.py` (`make decoder`); what is pruned is pruned once, and kept beside them. A merge is a
process of `deltamerge run`. Results go to benchmarks/results/merging_decoder.json, one after the other.

`measured(merges)` is for other scripts: it takes any iterable of Merge.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from safetensors.torch import load_file

from benchmarks import RESULTS, process, smollm2
from benchmarks.merging.deltas import DELTAS, Delta
from benchmarks.process import surroundings
from benchmarks.pruning import quality

TASKS = ("arithmetic", "sorting", "reversal", "family")
ROWS = 128  # of validation, a task
CALIBRATION = {"sequences": 3 * ROWS // 4, "length": 96}
FILE = RESULTS / "merging_decoder.json"


@dataclass(frozen=True)
class Merge:
    """A merge method: its recipe but for the models. `each` stands beside every model, `rows` asks for rows there:
    prompts with the model's own answers, ROWS of them.

    `equal` gives each model a weight that makes all deltas as long as the shortest.
    """

    name: str
    keys: Mapping[str, Any]
    each: Mapping[str, Any] = field(default_factory=lambda: {"parameters": {"weight": 1.0}})
    rows: bool = False
    equal: bool = False

    def recipe(self, base: Path, models: Mapping[str, Path], rows: Mapping[str, Path]) -> dict[str, Any]:
        beside: list[dict[str, Any]] = [{"model": str(path), **self.each} for path in models.values()]
        for one, task in zip(beside, models if self.rows else (), strict=False):
            one["calibration"] = {"data": str(rows[task])} | CALIBRATION | one.get("calibration", {})
        for one, weight in zip(beside, weights(base, models.values()) if self.equal else (), strict=False):
            one["parameters"] = {"weight": weight}
        return {"base_model": str(base), "models": beside, "dtype": "bfloat16", **self.keys}


def weights(base: Path, models: Iterable[Path]) -> list[float]:
    """Of each model that by which ‖model − base‖ becomes the least of them."""
    start = load_file(base / "model.safetensors")
    norms = []
    for model in models:
        tensors = load_file(model / "model.safetensors")
        norms.append(sum(float((tensors[name].float() - t.float()).square().sum()) for name, t in start.items()) ** 0.5)
    return [round(min(norms) / norm, 3) for norm in norms]


def _scaled(method: str, factor: float, *, equal: bool = False, **parameters: Any) -> Merge:
    keys = {"merge_method": method, "parameters": {"lambda": factor, **parameters}}
    return Merge(f"{method}, {'equal norms, ' * equal}λ = {factor:g}", keys, equal=equal)


FEWER = {"calibration": {"sequences": 48}}  # a fit of 96 takes half an hour
FITTED = {"calibration": {"per": "merge", "coefficients": "row"}}
MERGES = (
    *(_scaled("task_arithmetic", factor) for factor in (0.2, 0.4, 0.7)),
    *(_scaled("ties", factor, density=0.2) for factor in (0.5, 1.0)),
    Merge("breadcrumbs", {"merge_method": "breadcrumbs", "parameters": {"density": 0.9, "gamma": 0.01, "lambda": 0.4}}),
    Merge("iso_c, λ = 1.6", {"merge_method": "iso_c", "parameters": {"lambda": 1.6}}, {}),  # as recommend without rows
    Merge("wudi, λ = 1", {"merge_method": "wudi"}, {}),
    Merge("wudi, rho 0.1, λ = 1", {"merge_method": "wudi", "parameters": {"rho": 0.1}}, {}),
    _scaled("tsv_m", 1.0),
    _scaled("task_arithmetic", 0.7, equal=True),
    _scaled("iso_c", 1.6, equal=True),
    _scaled("wudi", 1.0, equal=True),
    _scaled("tsv_m", 1.0, equal=True),
    Merge("regmean, λ = 1", {"merge_method": "regmean"}, rows=True),
    Merge(
        "regmean, off_diagonal 0.99, λ = 1",
        {"merge_method": "regmean", "parameters": {"off_diagonal": 0.99}},
        rows=True,
    ),
    Merge("regmean_plus", {"merge_method": "regmean_plus"}, rows=True),
    Merge("wudi + coefficients per row", {"merge_method": "wudi", **FITTED}, FEWER, rows=True),
    Merge("regmean + coefficients per row", {"merge_method": "regmean", **FITTED}, FEWER, rows=True),
    Merge("model_stock", {"merge_method": "model_stock"}, {}),
    Merge("sce", {"merge_method": "sce", "parameters": {"select_topk": 0.1}}, {}),
)


@dataclass(frozen=True)
class Result:
    """Of one merge: exact match in % by task; that as a share of the expert's own, its mean and its least; its cost."""

    scores: dict[str, float]
    normalised: dict[str, float]
    mean: float
    worst: float
    cpu_s: float  # of `deltamerge run`: user + system, one thread
    wall_s: float
    peak_mb: float  # anonymous memory


def measured(
    merges: Iterable[Merge],
    deltas: Iterable[Delta] = DELTAS,
    *,
    tasks: Sequence[str] = TASKS,
    count: int = 100,
    folder: Path = smollm2.FOLDER,
    kept: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Merge, Delta, Result]]:
    """Each merge of each delta of the tasks' experts, scored on `count` test rows a task.

    `kept` has results as dictionaries under `key`, which are taken instead of measured.
    """
    own = {task: _own(task, count, folder) for task in tasks}
    merges = list(merges)
    rows = {}
    if any(merge.rows for merge in merges):
        rows = {task: smollm2.answered(task, ROWS, folder, apart=True) for task in tasks}
    for delta in deltas:
        for merge in merges:
            if found := (kept or {}).get(key(merge, delta, tasks, count)):
                yield merge, delta, Result(**found)
                continue
            models = {task: pruned(task, delta, folder) for task in tasks}
            with tempfile.TemporaryDirectory(dir=folder) as work:
                run, out = _run(merge.recipe(folder / "base", models, rows), Path(work))
                scores = {task: _score(out, task, count, folder) for task in tasks}
            shares = {task: 100 * scores[task] / own[task] if own[task] else 0.0 for task in tasks}
            cost = (round(run.cpu, 1), round(run.wall, 1), round(run.anonymous))
            yield merge, delta, Result(scores, shares, fmean(shares.values()), min(shares.values()), *cost)


def key(merge: Merge, delta: Delta, tasks: Sequence[str], count: int) -> str:
    return json.dumps([asdict(merge), delta._asdict(), list(tasks), count], sort_keys=True)


def pruned(task: str, delta: Delta, folder: Path = smollm2.FOLDER) -> Path:
    """What is left of an expert, as a model; made if it is not kept."""
    if delta.prune is None:
        return folder / task
    out = folder / "pruned" / f"{task} {delta.name}".replace(" ", "-")
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        recipe = {
            "base_model": str(folder / "base"),
            "models": [{"model": str(folder / task), "name": task, "prune": delta.prune}],
            "calibration": {
                "data": str(smollm2.answered(task, 64, folder)), "sequences": 24, "length": 96, "seeds": 2,
            },
        }  # fmt: skip
        with tempfile.TemporaryDirectory(dir=folder) as work:
            shutil.move(_run(recipe, Path(work))[1], out)
    return out


def _run(recipe: Mapping[str, Any], work: Path) -> tuple[process.Run, Path]:
    path, out = work / "recipe.yaml", work / "merged"
    path.write_text(yaml.safe_dump(dict(recipe), allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "deltamerge", "run", str(path), "--out", str(out), "--workers", "1"]
    return process.measure(command, {"OMP_NUM_THREADS": "1"}, work / "log"), out


def _own(task: str, count: int, folder: Path) -> float:
    """An expert's own exact match on the rows that its merges are scored on."""
    path = folder / task / f"score-{count}.json"
    if not path.exists():
        path.write_text(json.dumps(_score(folder / task, task, count, folder)), encoding="utf-8")
    score: float = json.loads(path.read_text(encoding="utf-8"))
    return score


def _score(model: Path, task: str, count: int, folder: Path) -> float:
    rows = smollm2.rows(task, "test", folder)[:count]
    return smollm2.exact_match(model, rows, smollm2.NEW_TOKENS[task])


def markdown(found: Mapping[str, Any]) -> str:
    """Merges by their means; scores are shares of the experts' own."""
    head = ["merge", "deltas", "mean, %", "worst, %", *found["own"], "CPU s", "MB"]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    lines.append(
        " | ".join(["*experts, exact match*", "", "", "", *(f"{v:.0f}" for v in found["own"].values()), "", ""])
    )
    for cell in sorted(found["cells"].values(), key=lambda cell: -cell["result"]["mean"]):
        one = Result(**cell["result"])
        shares = [f"{one.normalised[task]:.0f}" for task in found["own"]]
        about = [cell["merge"], cell["delta"], f"{one.mean:.1f}", f"{one.worst:.1f}"]
        lines.append(" | ".join([*about, *shares, f"{one.cpu_s:.0f}", f"{one.peak_mb:.0f}"]))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of MERGES, or how they begin; default: all")
    parser.add_argument("--rows", type=int, default=100, help="test rows a task")
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--delta", nargs="+", default=[delta.name for delta in DELTAS], help="kinds of delta")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    asked = parser.parse_args()
    quality.quiet()
    chosen = [one for one in MERGES if not asked.names or one.name.startswith(tuple(asked.names))]
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"cells": {}}
    if not asked.table:
        found |= surroundings({"python": sys.executable})
        found["own"] = {task: _own(task, asked.rows, smollm2.FOLDER) for task in asked.task}
        kept = {name: cell["result"] for name, cell in found["cells"].items()}
        deltas = [delta for delta in DELTAS if delta.name in asked.delta]
        for merge, delta, result in measured(chosen, deltas, tasks=asked.task, count=asked.rows, kept=kept):
            name = key(merge, delta, asked.task, asked.rows)
            if name not in kept:
                found["cells"][name] = {"merge": merge.name, "delta": delta.name, "result": asdict(result)}
                FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                print(
                    f"{merge.name} of {delta.name}: mean {result.mean:.1f}, worst {result.worst:.1f}", file=sys.stderr
                )
    print(markdown(found))


if __name__ == "__main__":
    process.keep_pages()
    main()
