"""Two and three fine-tunes of one base in one model, their deltas pruned before: a score per task and the mean.

A merge has one encoder and no head: heads are taken off before and each task's own is put back to score it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertModel

from benchmarks import encoder
from benchmarks.paper import encoders
from benchmarks.paper.encoders import METHODS
from benchmarks.paper.frame import Experiment, Record, Setting, table
from benchmarks.tasks import TASKS, Part

LAMBDAS = (0.3, 0.6, 1.0)
PRUNED = ("DARE", "DAREx-q, q_e", "magnitude, q_e")
MERGES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"normalize": True},
}
TRIMMED = 0.2  # density of ties' own trimming where nothing was pruned before


def merging(setting: Setting) -> Record:
    sets = setting.pick((("sentiment", "intensity"), tuple(TASKS)), (("sentiment", "intensity"),))
    deltas = [("unpruned", 1.0)]
    deltas += [(name, d) for name in setting.pick(PRUNED, PRUNED[:1]) for d in setting.pick((0.1, 0.01), (0.1,))]
    rows = []
    for tasks in sets:
        for method in MERGES:
            best = max(
                setting.pick(LAMBDAS, LAMBDAS[:1]),
                key=lambda factor: fmean(
                    merged(setting, tasks, method, "unpruned", 1.0, factor, "validation").values()
                ),
            )
            for name, density in deltas:
                scores = merged(setting, tasks, method, name, density, best, "test")
                rows.append({"method": method, "lambda": best, "pruned": name, "density": density, "scores": scores})
    return {"alone": {task: encoders.unpruned(setting, task) for task in sets[-1]}, "rows": rows}


def merged(
    setting: Setting, tasks: Sequence[str], method: str, name: str, density: float, factor: float, part: Part
) -> dict[str, float]:
    """Task -> score of the merge of what is left of each fine-tune, with that task's head."""
    folders = [bare(setting, task, name, density) for task in tasks]
    made_of = {"of": [f.name for f in folders], "method": method, "lambda": factor, "part": part}
    parameters = {"lambda": factor, **MERGES[method]}
    if method == "ties":
        parameters["density"] = TRIMMED if name == "unpruned" else 1.0

    def measure() -> dict[str, float]:
        from deltamerge.recipe.file import read_recipe
        from deltamerge.run.options import Options
        from deltamerge.run.runner import run

        with tempfile.TemporaryDirectory(dir=setting.work) as work:
            recipe = {
                "base_model": str(encoders.base(setting)),
                "merge_method": method,
                "models": [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders],
                "parameters": parameters,
                "dtype": "float32",
            }
            path = Path(work) / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            run(read_recipe(path), Path(work) / "merged", Options(workers=1, device="cpu"))
            return {task: with_head(setting, task, Path(work) / "merged", part) for task in tasks}

    return setting.once(f"merge-{len(tasks)}-{method}", made_of, measure)


def bare(setting: Setting, task: str, name: str, density: float) -> Path:
    """A fine-tune without its head, in float32, what `name` leaves of its delta."""
    tuned = encoders.fine_tune(setting, task)

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=setting.work) as work:
            folder = tuned
            if name != "unpruned":
                folder = encoders.prune(setting, task, tuned, METHODS[name], density, Path(work))
            model = BertModel.from_pretrained(folder, dtype="float32")
            model.save_pretrained(out)
            AutoTokenizer.from_pretrained(tuned).save_pretrained(out)

    return setting.folder(f"bare-{task}", {"tuned": tuned.name, "pruned": name, "density": density}, make)


def with_head(setting: Setting, task: str, folder: Path, part: Part) -> float:
    """The score of an encoder with the head of a task's own fine-tune."""
    tuned = encoders.fine_tune(setting, task)
    model = encoder.load(tuned)
    model.base_model.load_state_dict(load_file(folder / "model.safetensors"))
    rows = encoders.rows(setting, task, part)
    return round(encoder.score(model, TASKS[task], rows, tokenizer=AutoTokenizer.from_pretrained(tuned)), 2)


def show(record: Record) -> str:
    tasks = list(record["alone"])
    rows: list[list[Any]] = [["each alone", None, "unpruned", 1, *record["alone"].values(), None]]
    for row in record["rows"]:
        scores = [row["scores"].get(task) for task in tasks]
        mean = fmean(row["scores"].values())
        rows.append([row["method"], f"{row['lambda']:g}", row["pruned"], row["density"], *scores, mean])
    head = ["merged by", "λ", "deltas", "density", *tasks, "mean"]
    return table(head, [[f"{c:g}" if i == 3 else c for i, c in enumerate(row)] for row in rows]) + (
        "\nThe deltas of the encoders are merged; each task is scored with its own fine-tune's head. λ is the "
        f"best of {', '.join(map(str, LAMBDAS))} on validation rows for unpruned deltas, and kept for pruned ones. "
        f"Unpruned, ties trims each delta to {TRIMMED:g} itself; pruned ones it takes whole.\n"
    )


EXPERIMENTS = (Experiment("merging", "Merging two and three fine-tunes", merging, show, 8),)
