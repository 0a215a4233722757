"""What a merge keeps of nine experts on one encoder: every method × every kind of delta, its cost beside.

    python benchmarks/merging.py                     everything that is not measured yet; hours on two cores
    python benchmarks/merging.py wudi iso_c          methods whose names begin so
    python benchmarks/merging.py --delta unpruned    one kind of delta; several such commands may run at once
    python benchmarks/merging.py --final             and the test rows of the tasks that were kept back
    python benchmarks/merging.py --docs              only the table and the picture of docs/merging.md
    python benchmarks/merging.py --decoder           SmolLM2's experts instead (merging_decoder.py)

Tasks and experts are those of merging_tasks.py. An expert keeps its head: a merge is scored with it on its task's rows.
λ is chosen on validation rows, by the mean of the scores as shares of the experts' own; since it is a factor of the
merged delta, a merge is run once and λ is tried in memory. Calibrations see other validation rows, without labels.
Matrix products of the scoring are in bfloat16, for experts and merges alike.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import encoder
import merging_tasks
import numpy as np
import process
import torch
import yaml
from merging_tasks import HOME, KEPT_BACK, TASKS
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tasks import WORK, Part, Row
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from deltamerge.api import load_recipe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "merging.json"
CHOICE_ROWS, TEST_ROWS = 150, 300  # of each source
RATIO, TRIES = 1.5, 4  # λ is tried at RATIO times the last
# The base's pooler is not trained (sentences are the mean of their tokens): each expert makes it its own, with its head.
HEAD = ("bert.pooler.dense", "classifier")

Weights = dict[str, Tensor]
Outputs = dict[str, list[float]]  # task -> what is predicted, by row
Runner = Callable[[Path, Path], process.Run]  # a recipe, and the folder of its result


class Delta(NamedTuple):
    """How each expert is pruned before it is merged; `prune` None: not at all."""

    name: str
    prune: dict[str, Any] | None = None


DELTAS = (
    Delta("unpruned"),
    *(
        Delta(f"{name} {density:g}", {"method": method, "density": density, "q": "output_change"})
        for density in (0.1, 0.01)
        for name, method in (("magnitude", "magnitude"), ("DARE", "dare"))
    ),
)


@dataclass(frozen=True)
class Merge:
    """A method: its recipe but for the models.

    `factor` is the first λ that is tried, None if the method has none. `rows` asks for calibration rows: `own` beside
    every model, `all` for the merge; `model`, `layer`, `row` beside every model, to fit coefficients of that scope. `task` is of a method that makes a model for each task. `prunes` is of one that
    prunes by itself, so that nothing is pruned before.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    factor: float | None = None
    weighted: bool = False
    rows: str | None = None
    task: bool = False
    prunes: bool = False

    def recipe(self, base: Path, models: Mapping[str, Path], rows: Path, task: str | None = None) -> dict[str, Any]:
        beside: list[dict[str, Any]] = [{"model": str(path), "name": name} for name, path in models.items()]
        for one in beside:
            if self.weighted:
                one["parameters"] = {"weight": 1.0}
            if self.rows and self.rows != "all":
                one["calibration"] = {"data": str(rows / f"{one['name']}.jsonl")} | CALIBRATION
        parameters = dict(self.parameters) | ({"task": list(models).index(task) + 1} if task else {})
        made = {
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


CALIBRATION = {"sequences": 50, "length": encoder.TOKENS}

MERGES = (
    Merge("mean", "task_arithmetic", {"normalize": True}, weighted=True),  # linear has no base to leave the heads to
    Merge("task_arithmetic", "task_arithmetic", factor=0.3, weighted=True),
    Merge("ties, 0.2", "ties", {"density": 0.2}, 1.0, weighted=True, prunes=True),
    Merge("iso_c", "iso_c", factor=1.5),
    Merge("iso_cts", "iso_cts", factor=1.5),
    Merge("tsv_m", "tsv_m", factor=0.7),
    Merge("wudi, rho 0.1", "wudi", factor=1.0),
    Merge("wudi, rho 1", "wudi", {"rho": 1.0}, 1.0),
    Merge("regmean", "regmean", factor=1.0, rows="own"),
    Merge("regmean_plus", "regmean_plus", factor=1.0, rows="own"),
    Merge("task_arithmetic, λ per merge", "task_arithmetic", weighted=True, rows="all"),
    Merge("coefficients per model", "task_arithmetic", {"lambda": 0.3}, weighted=True, rows="model"),
    Merge("coefficients per layer", "task_arithmetic", {"lambda": 0.3}, weighted=True, rows="layer"),
    Merge("coefficients per row", "task_arithmetic", {"lambda": 0.3}, weighted=True, rows="row"),
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


def here(recipe: Path, out: Path) -> process.Run:
    """A run on one thread of this process, which is cheaper than one that has torch to import: what it adds to both."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else what was let go of before would be used again, and not seen
    before, ended, peaks = process.memory(os.getpid()), threading.Event(), [0, 0]

    def sample() -> None:
        while not ended.wait(0.01):
            peaks[:] = map(max, peaks, process.memory(os.getpid()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        load_recipe(recipe, workers=1).run(out)
    finally:
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        ended.set()
        sampler.join()
    added = [max(0, peak - at) * 1024 / 1e6 for peak, at in zip(peaks, before, strict=True)]
    return process.Run(wall, cpu, *added)


@dataclass(frozen=True)
class Setting:
    """Where base, experts and rows are, how many rows of a source are used, and how a recipe is run."""

    base: Path
    experts: Mapping[str, Path]
    home: Path
    choice_rows: int = CHOICE_ROWS
    test_rows: int = TEST_ROWS
    run: Runner = here

    def rows(self, task: str, part: Part) -> list[Row]:
        """Of validation those that choose; those after them calibrate."""
        most = self.choice_rows if part == "validation" else self.test_rows
        return merging_tasks.rows(task, part, self.home)[: most * (len(merging_tasks.SOURCES) if task == "domain" else 1)]

    def calibration(self) -> Path:
        """A folder of TASK.jsonl, texts alone, and of all.jsonl, a row of each task in turn."""
        folder = self.home / f"calibration-{self.choice_rows}"
        if not folder.exists():
            texts = {}
            for task in self.experts:
                first = len(self.rows(task, "validation"))
                texts[task] = [json.dumps({"text": r.text}) for r in merging_tasks.rows(task, "validation", self.home)[first:]]
            texts["all"] = [text for some in zip_longest(*texts.values()) for text in some if text]
            with merging_tasks.tasks.building(folder) as out:
                for name, lines in texts.items():
                    (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    def key(self, *of: Any) -> str:
        """A name for what is kept: of what is measured, of the experts and of the rows."""
        made = [of, [path.name for path in self.experts.values()], self.choice_rows, self.test_rows]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]


class Judge:
    """What an encoder with the experts' heads predicts, poolers among them; a sentence that several tasks share is read once."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.model = setting, AutoModel.from_pretrained(setting.base).float().train(False)
        self.tokenizer = AutoTokenizer.from_pretrained(setting.base)
        self.heads = {}
        for task, path in setting.experts.items():
            expert = load_file(path / "model.safetensors")
            self.heads[task] = [expert[f"{of}.{name}"].float() for of in HEAD for name in ("weight", "bias")]
        self.own = {part: self._own(part) for part in ("validation", "test")}

    def _own(self, part: Part) -> Outputs:
        """What each expert predicts on its own task's rows; of the tasks kept back too, which nothing is chosen by."""
        path = self.setting.home / "cells" / f"own-{part}-{self.setting.key()}.json"
        if not path.exists():
            found = {}
            for task, folder in self.setting.experts.items():
                found |= self.outputs(encoder_of(folder), part, [task])
            write(path, found)
        kept: Outputs = json.loads(path.read_text(encoding="utf-8"))
        return kept

    def outputs(self, weights: Weights, part: Part, tasks: Iterable[str]) -> Outputs:
        rows = {task: self.setting.rows(task, part) for task in tasks}
        ids = {
            task: [tuple(some) for some in self.tokenizer([r.text for r in of], truncation=True, max_length=encoder.TOKENS)["input_ids"]]
            for task, of in rows.items()
        }  # fmt: skip
        unique = sorted({one for some in ids.values() for one in some}, key=lambda one: (len(one), one))
        number = {one: i for i, one in enumerate(unique)}
        self.model.load_state_dict(weights)
        first_ND = torch.cat([self._first(unique[i : i + 64]) for i in range(0, len(unique), 64)])
        found = {}
        for task, some in ids.items():
            pool_DD, pool_D, weight_LD, bias_L = self.heads[task]
            pooled_ND = torch.tanh(first_ND[[number[one] for one in some]] @ pool_DD.T + pool_D)
            logits_NL = pooled_ND @ weight_LD.T + bias_L
            picked = logits_NL[:, 0] if TASKS[task].labels == 1 else logits_NL.argmax(dim=1)
            found[task] = [round(x, 5) for x in picked.tolist()]
        return found

    def _first(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        padded = self.tokenizer.pad({"input_ids": [list(one) for one in batch]}, return_tensors="pt")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            first: Tensor = self.model(**padded).last_hidden_state[:, 0]
        return first.float()

    def shares(self, outputs: Outputs, part: Part, draw: np.random.Generator | None = None) -> dict[str, float]:
        """Scores in % of the expert's own, on the same rows: all, or as many drawn with replacement."""
        found = {}
        for task, predicted in outputs.items():
            label_N = np.array([row.label for row in self.setting.rows(task, part)])
            n = len(label_N)
            chosen = np.arange(n) if draw is None else draw.integers(0, n, n)
            metric = encoder.METRICS[TASKS[task].metric]
            ours, own = (metric(np.array(x)[chosen], label_N[chosen]) for x in (predicted, self.own[part][task]))
            found[task] = 100 * ours / own
        return found

    def spread(self, outputs: Outputs, times: int = 100) -> NDArray[np.float64]:
        """Standard deviations over draws of the test rows: of the mean share, and of the least."""
        draw = np.random.default_rng(0)
        drawn = [list(self.shares(outputs, "test", draw).values()) for _ in range(times)]
        return np.array([(np.mean(some), min(some)) for some in drawn]).std(axis=0)


def encoder_of(folder: Path) -> Weights:
    """The encoder's tensors under its own names, in float32, without the head."""
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("bert."): t.float() for name, t in tensors.items() if not name.startswith("classifier.")}


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
    made, runs = {}, []
    for task in setting.experts if merge.task else [None]:
        with tempfile.TemporaryDirectory(dir=setting.home) as work:
            path, out = written(merge.recipe(setting.base, models, setting.calibration(), task), Path(work)), Path(work) / "out"
            runs.append(setting.run(path, out))
            made[task] = encoder_of(out)

    def at(factor: float, part: Part, tasks: Sequence[str]) -> Outputs:
        if not merge.task:
            return judge.outputs(scaled(base, made[None], factor), part, tasks)
        return {t: o for task in tasks for t, o in judge.outputs(scaled(base, made[task], factor), part, [task]).items()}

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
            path, made = written(recipe, Path(work)), Path(work) / "out"
            setting.run(path, made)
            if not out.exists():  # another command may have made it meanwhile
                made.rename(out)
    return out


def written(recipe: Mapping[str, Any], work: Path) -> Path:
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(recipe), allow_unicode=True), encoding="utf-8")
    return path


def write(path: Path, made: Any) -> None:
    """JSON, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def summary(judge: Judge, cell: dict[str, Any]) -> dict[str, Any]:
    """A cell for the results: shares on the test rows in place of what was predicted on each."""
    shares = judge.shares(cell["outputs"], "test")
    spread = judge.spread(cell["outputs"])
    about = {name: cell[name] for name in ("merge", "delta", "factor", "cpu_s", "peak_mb")}
    rounded = {task: round(share, 1) for task, share in shares.items()}
    ends = {"mean": round(float(np.mean(list(shares.values()))), 1), "worst": min(rounded.values())}
    chosen = round(max(cell["tried"].values()), 1)
    return about | {"validation": chosen, **ends, "spread": [round(float(s), 1) for s in spread], "shares": rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of MERGES, or how they begin; default: all")
    parser.add_argument("--delta", nargs="+", default=[delta.name for delta in DELTAS])
    parser.add_argument("--final", action="store_true", help="look at the tasks kept back, of what is measured")
    parser.add_argument("--docs", action="store_true", help="only write docs/ from the results")
    parser.add_argument("--decoder", action="store_true", help="run merging_decoder.py with the names given")
    asked = parser.parse_args()
    if asked.decoder:
        sys.exit(subprocess.call([sys.executable, str(HERE / "merging_decoder.py"), *asked.names]))
    import merging_pages

    if not asked.docs:
        measured(asked)
    merging_pages.write(json.loads(RESULTS.read_text(encoding="utf-8")))


def measured(asked: argparse.Namespace) -> None:
    from merge_speed import surroundings
    from quality import quiet

    quiet()
    if not (WORK / "base").exists():
        encoder.build_base(WORK / "base")
    setting = Setting(WORK / "base", {task: merging_tasks.expert(task) for task in TASKS}, HOME)
    judge = Judge(setting)
    for delta in DELTAS:
        for merge in MERGES:
            wanted = delta.name in asked.delta and (not asked.names or merge.name.startswith(tuple(asked.names)))
            if wanted and not (merge.prunes and delta.prune):
                cell = measure(setting, judge, merge, delta)
                shown = np.mean(list(judge.shares(cell["outputs"], "test").values()))
                print(f"{merge.name}, {delta.name}: λ {cell['factor']}, {shown:.1f} %", file=sys.stderr, flush=True)
    cells = []
    for delta in DELTAS:
        for merge in MERGES:
            path = HOME / "cells" / f"{setting.key(asdict(merge), delta)}.json"
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
    found = surroundings({"python": sys.executable}) | {"rows of a source": rows, "own": own, "cells": cells}
    write(RESULTS, found)


if __name__ == "__main__":
    main()
