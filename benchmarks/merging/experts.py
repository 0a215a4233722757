"""What a merge keeps of nine experts on one encoder: every method × every kind of delta, its cost beside.

    python -m benchmarks.merging.experts                     everything that is not measured yet; hours on two cores
    python -m benchmarks.merging.experts wudi iso_c          methods whose names begin so
    python -m benchmarks.merging.experts --delta unpruned    one kind of delta; several such commands may run at once
    python -m benchmarks.merging.experts --final             and the test rows of the tasks that were kept back
    python -m benchmarks.merging.experts --table             what is measured; with --final too
    python -m benchmarks.merging.experts --docs              only the tables of docs/measurements/merging.md

Tasks and experts are those of nine_tasks.py. An expert keeps its head: a merge is scored with it on its task's rows.
λ is chosen on validation rows, by the mean of the scores as shares of the experts' own; since it is a factor of the
merged delta, a merge is run once and λ is tried in memory. Calibrations see other validation rows, without labels.
Matrix products of the scoring are in bfloat16, for experts and merges alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import load_file, save_file

from benchmarks import RESULTS, encoder
from benchmarks.merging import nine_tasks
from benchmarks.merging.deltas import DELTAS, Delta
from benchmarks.merging.nine_tasks import HOME, KEPT_BACK, TASKS
from benchmarks.merging.scores import CHOICE_ROWS, TEST_ROWS, Judge, Outputs, Setting, Weights, encoder_of, write
from benchmarks.tasks import WORK, Part
from deltamerge.files.ownership import LOCK_NAME, read_lock

FILE = RESULTS / "merging.json"
RATIO, TRIES = 1.5, 6  # λ is tried at RATIO times the last


@dataclass(frozen=True)
class Merge:
    """A method: its recipe but for the models.

    `factor` is the first λ that is tried, None if the method has none. `rows` asks for calibration rows: `own` beside
    every model, `all` for the merge; `model`, `layer`, `row` beside every model, to fit coefficients of that scope;
    `all_rows`: for three quarters of a task's, a quarter is held out.
    `task` is of a method that makes a model for each task, `prunes` of one that prunes by itself.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    factor: float | None = None
    weighted: bool = False
    rows: str | None = None
    all_rows: bool = False
    task: bool = False
    prunes: bool = False

    def recipe(self, base: Path, models: Mapping[str, Path], rows: Path, task: str | None = None) -> dict[str, Any]:
        beside: list[dict[str, Any]] = [{"model": str(path), "name": name} for name, path in models.items()]
        for one in beside:
            if self.weighted:
                one["parameters"] = {"weight": 1.0}
            if self.rows and self.rows != "all":
                path = rows / f"{one['name']}.jsonl"
                one["calibration"] = {"data": str(path)} | CALIBRATION
                if self.all_rows:
                    count = len(path.read_text(encoding="utf-8").splitlines())
                    one["calibration"] |= {"sequences": 3 * count // 4, "precision": "bfloat16"}
        parameters = dict(self.parameters) | ({"task": list(models).index(task) + 1} if task else {})
        made: dict[str, Any] = {
            "base_model": str(base),
            "merge_method": self.method,
            "models": beside,
            "parameters": parameters,
            "dtype": "float32",
        }
        if self.rows == "all":
            made["calibration"] = {"data": str(rows / "all.jsonl"), "per": "merge"} | CALIBRATION
        elif self.rows in ("model", "layer", "row"):
            made["calibration"] = {"per": "merge", "coefficients": self.rows}
        return made

    def of(self, delta: Delta) -> Merge:
        """The merge of such deltas: what is fitted from iso_c starts at the λ that iso_c alone was given for them."""
        if self.method == "iso_c" and self.rows and delta.name in STARTS:
            return replace(self, parameters={"lambda": STARTS[delta.name]})
        return self


# λ of `iso_c` by kind of delta, as validation rows chose it (results/merging.json); of unpruned ones 2.25
STARTS = {"magnitude 0.1": 1.5, "DARE 0.1": 0.6667, "magnitude 0.01": 1.5, "DARE 0.01": 0.2963}
CALIBRATION = {"sequences": 50, "length": encoder.TOKENS}

MERGES = (
    Merge("mean", "task_arithmetic", {"normalize": True}, weighted=True),  # linear has no base to leave the heads to
    Merge("task_arithmetic", "task_arithmetic", factor=0.3, weighted=True),
    Merge("ties", "ties", factor=0.45, weighted=True),
    Merge("ties, 0.2", "ties", {"density": 0.2}, 1.0, weighted=True, prunes=True),
    Merge("iso_c", "iso_c", factor=1.5),
    Merge("iso_cts", "iso_cts", factor=1.5),
    Merge("tsv_m", "tsv_m", factor=0.7),
    *(Merge(f"wudi, rho {rho:g}", "wudi", {"rho": rho}, 1.0) for rho in (0.01, 0.1, 1.0)),
    Merge("regmean", "regmean", factor=1.0, rows="own"),
    Merge("regmean_plus", "regmean_plus", factor=1.0, rows="own"),
    Merge("fisher", "fisher", factor=1.0, weighted=True, rows="own"),
    Merge("task_arithmetic, λ per merge", "task_arithmetic", weighted=True, rows="all"),
    Merge("coefficients per model", "task_arithmetic", {"lambda": 0.3}, weighted=True, rows="model"),
    Merge("coefficients per layer", "task_arithmetic", {"lambda": 0.3}, weighted=True, rows="layer"),
    Merge("coefficients per row", "task_arithmetic", {"lambda": 0.3}, weighted=True, rows="row"),
    Merge("iso_c + coefficients per row", "iso_c", {"lambda": 2.25}, rows="row", all_rows=True),
    Merge("iso_c + coefficients per layer", "iso_c", {"lambda": 2.25}, rows="layer", all_rows=True),
    Merge("wudi + coefficients per row", "wudi", {"lambda": 0.667}, rows="row", all_rows=True),
    Merge("tsv_m + coefficients per row", "tsv_m", {"lambda": 0.7}, rows="row", all_rows=True),
    Merge(
        "task_arithmetic + coefficients per row",
        "task_arithmetic",
        {"lambda": 0.3},
        weighted=True,
        rows="row",
        all_rows=True,
    ),
    Merge("consensus, 2", "consensus", factor=0.3),
    Merge("breadcrumbs, 0.9", "breadcrumbs", {"density": 0.9}, 0.3, weighted=True, prunes=True),
    Merge("model_stock", "model_stock"),
    Merge("karcher", "karcher"),
    Merge("multislerp", "multislerp", weighted=True),
    Merge("sce, 0.1", "sce", {"select_topk": 0.1}),
    Merge("ram", "ram"),
    Merge("dare_linear, 0.1", "dare_linear", {"density": 0.1}, 0.2, weighted=True, prunes=True),
    Merge("dare_ties, 0.1", "dare_ties", {"density": 0.1}, 0.2, weighted=True, prunes=True),
    Merge("della, 0.3", "della", {"density": 0.3}, 0.3, weighted=True, prunes=True),
    Merge("emr", "emr", task=True),
    Merge("tall_masks, 0.4", "tall_masks", factor=1.0, task=True),
)


def scaled(base: Weights, weights: Weights, factor: float) -> Weights:
    """base + factor · (weights − base), rounded to bfloat16."""
    return {name: (t + factor * (weights[name] - t)).bfloat16().float() for name, t in base.items()}


def climb(score: Callable[[float], float], start: float) -> tuple[float, dict[float, float]]:
    """The factor of the best score, and the score of each that was tried: up from `start` by RATIO, or else down."""
    found = {start: score(start)}
    for step in (RATIO, 1 / RATIO):
        at = start
        while len(found) < TRIES:
            following = round(at * step, 4)
            found[following] = score(following)
            if found[following] <= found[at]:
                break
            at = following
        if at != start:
            break
    return max(found, key=lambda one: found[one]), found


def measure(setting: Setting, judge: Judge, merge: Merge, delta: Delta) -> dict[str, Any]:
    """The cell of a merge of one kind of delta, kept when it is known; the weights too, for `--final`."""
    key = setting.key(asdict(merge), delta)
    path = setting.home / "cells" / f"{key}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    models = {task: pruned(setting, task, delta) for task in setting.experts}
    base = encoder_of(setting.base)
    made, runs, passes = {}, [], 0
    for task in setting.experts if merge.task else [None]:
        with tempfile.TemporaryDirectory(dir=setting.home) as work:
            recipe = merge.recipe(setting.base, models, setting.calibration(), task)
            runs.append(setting.run(written(recipe, Path(work)), Path(work) / "out"))
            made[task] = encoder_of(Path(work) / "out")
            found = read_lock(Path(work) / "out" / LOCK_NAME).get("calibration", {}).values()
            passes += sum(record.get("forward_passes", 0) for record in found)

    def at(factor: float, part: Part, tasks: Sequence[str]) -> Outputs:
        if not merge.task:
            return judge.outputs(scaled(base, made[None], factor), part, tasks)
        return {
            t: o for task in tasks for t, o in judge.outputs(scaled(base, made[task], factor), part, [task]).items()
        }

    def score(factor: float) -> float:
        return float(np.mean(list(judge.shares(at(factor, "validation", list(models)), "validation").values())))

    factor, tried = climb(score, merge.factor) if merge.factor is not None else (1.0, {1.0: score(1.0)})
    for task, weights in made.items():
        setting_of = setting.home / "merged" / f"{key}{f'-{task}' if task else ''}.safetensors"
        setting_of.parent.mkdir(exist_ok=True)
        save_file({name: t.bfloat16() for name, t in scaled(base, weights, factor).items()}, setting_of)
    cell = {
        "merge": merge.name,
        "delta": delta.name,
        "factor": None if merge.factor is None else factor,
        "tried": tried,
        "outputs": at(factor, "test", [task for task in models if task not in KEPT_BACK]),
        "cpu_s": round(sum(run.cpu for run in runs), 1),
        "peak_mb": round(max(run.anonymous for run in runs)),
        "passes": round(passes / len(models), 1),  # of calibration of the merge, a task
        "key": key,
        "task": merge.task,
    }
    write(path, cell)
    return cell


def final(setting: Setting, judge: Judge, cell: dict[str, Any]) -> dict[str, Any]:
    """The cell with what its kept weights predict on the test rows of the tasks kept back."""
    back = [task for task in setting.experts if task not in cell["outputs"]]
    for some in [[task] for task in back] if cell["task"] else [back] if back else []:
        name = f"{cell['key']}{f'-{some[0]}' if cell['task'] else ''}.safetensors"
        weights = {n: t.float() for n, t in load_file(setting.home / "merged" / name).items()}
        cell["outputs"] |= judge.outputs(weights, "test", some)
    if back:
        write(setting.home / "cells" / f"{cell['key']}.json", cell)
    return cell


def pruned(setting: Setting, task: str, delta: Delta) -> Path:
    """An expert of which only what `delta` keeps of its delta is left, as a model; made if it is not kept."""
    if delta.prune is None:
        return setting.experts[task]
    out = setting.home / "pruned" / f"{task}-{delta.name}-{setting.key(delta)}".replace(" ", "-")
    if not out.exists():
        model = {"model": str(setting.experts[task]), "name": task, "prune": delta.prune}
        rows = {"data": str(setting.calibration() / f"{task}.jsonl"), "seeds": 2} | CALIBRATION
        out.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=setting.home) as work:
            recipe = {"base_model": str(setting.base), "models": [model], "calibration": rows}
            made = Path(work) / "out"
            setting.run(written(recipe, Path(work)), made)
            if not out.exists():  # another command may have made it meanwhile
                made.rename(out)
    return out


def written(recipe: Mapping[str, Any], work: Path) -> Path:
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(recipe), allow_unicode=True), encoding="utf-8")
    return path


def summary(judge: Judge, cell: dict[str, Any]) -> dict[str, Any]:
    """A cell for the results: shares on the test rows in place of what was predicted on each."""
    shares = judge.shares(cell["outputs"], "test")
    spread = judge.spread(cell["outputs"])
    about = {name: cell[name] for name in ("merge", "delta", "factor", "cpu_s", "peak_mb", "passes", "task")}
    rounded = {task: round(share, 1) for task, share in shares.items()}
    ends = {"mean": round(float(np.mean(list(shares.values()))), 1), "worst": min(rounded.values())}
    chosen = round(max(cell["tried"].values()), 1)
    return about | {"validation": chosen, **ends, "spread": [round(float(s), 1) for s in spread], "shares": rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of MERGES, or how they begin; default: all")
    parser.add_argument("--delta", nargs="+", default=[delta.name for delta in DELTAS])
    parser.add_argument("--final", action="store_true", help="look at the tasks kept back, of what is measured")
    parser.add_argument("--table", action="store_true", help="measure no more merges")
    parser.add_argument("--docs", action="store_true", help="only write docs/ from the results")
    asked = parser.parse_args()
    from benchmarks.merging import pages

    if not asked.docs:
        measured(asked)
    pages.write(json.loads(FILE.read_text(encoding="utf-8")))


def measured(asked: argparse.Namespace) -> None:
    from benchmarks.process import surroundings
    from benchmarks.pruning.quality import quiet

    quiet()
    if not (WORK / "base").exists():
        encoder.build_base(WORK / "base")
    base = nine_tasks.headless(WORK / "base", HOME / "base")
    setting = Setting(base, {task: nine_tasks.expert(task) for task in TASKS}, HOME)
    judge = Judge(setting)
    for delta in () if asked.table else DELTAS:
        for merge in MERGES:
            wanted = delta.name in asked.delta and (not asked.names or merge.name.startswith(tuple(asked.names)))
            if wanted and not (merge.prunes and delta.prune):
                cell = measure(setting, judge, merge.of(delta), delta)
                shown = np.mean(list(judge.shares(cell["outputs"], "test").values()))
                print(f"{merge.name}, {delta.name}: λ {cell['factor']}, {shown:.1f} %", file=sys.stderr, flush=True)
    cells = []
    for delta in DELTAS:
        for merge in MERGES:
            path = HOME / "cells" / f"{setting.key(asdict(merge.of(delta)), delta)}.json"
            if path.exists():
                cell = json.loads(path.read_text(encoding="utf-8"))
                cells.append(summary(judge, final(setting, judge, cell) if asked.final else cell))
    own = {}
    for task, outputs in judge.own["test"].items():
        label_N = np.array([row.label for row in setting.rows(task, "test")])
        own[task] = round(100 * encoder.METRICS[TASKS[task].metric](np.array(outputs), label_N), 1)
    if not asked.final:
        own = {task: score for task, score in own.items() if task not in KEPT_BACK}
    rows = {"choice": CHOICE_ROWS, "test": TEST_ROWS}
    cells = in_order(cells, earlier(own, rows))
    found = surroundings({"python": sys.executable}) | {"rows of a source": rows, "own": own, "cells": cells}
    write(FILE, found)


def earlier(own: Mapping[str, float], rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """The cells of the results that there are, if experts that score the same made them, on as many rows."""
    if not FILE.exists():
        return []
    known = json.loads(FILE.read_text(encoding="utf-8"))
    alike = all(known["own"].get(task, score) == score for task, score in own.items())  # not all before `--final`
    same = known["rows of a source"] == rows and alike
    return list(known["cells"]) if same else []


def in_order(cells: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells in the order of DELTAS and MERGES; those of `before` where there are no newer ones."""
    by_name = {(cell["delta"], cell["merge"]): cell for cell in (*before, *cells)}
    order = [(delta.name, merge.name) for delta in DELTAS for merge in MERGES]
    return [by_name[name] for name in order if name in by_name]


if __name__ == "__main__":
    main()
