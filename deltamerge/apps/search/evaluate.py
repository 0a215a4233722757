"""The metrics of checkpoints on labelled rows, side by side: a merged model and its parents."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.apps.search.tasks import ScoredTask, Sheet, measured, refuse_unknown
from deltamerge.calibrate.model.blocks import Weights
from deltamerge.calibrate.rows.rows import rows_of, select
from deltamerge.calibrate.stage import calibrating
from deltamerge.errors import InputError, UsageError
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.decode import decoded
from deltamerge.models.references import Models
from deltamerge.plan.inputs import shared_names
from deltamerge.recipe.file import RecipeFile
from deltamerge.recipe.schema import Calibration
from deltamerge.run.options import choose_device
from deltamerge.tensors.names import LM_HEAD, TASK_HEAD
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo

ALL_ROWS = 1_000_000
_HEAD, _LANGUAGE = re.compile(TASK_HEAD), re.compile(r"(^|[./])(lm_head|embed_out)(\.|$)")


@dataclass(frozen=True, slots=True)
class ModelScores:
    """One model's scores: task -> metric -> value."""

    model: str
    scores: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Models on the same rows; `rows` is their number for each task."""

    rows: Mapping[str, int]
    models: tuple[ModelScores, ...]

    def describe(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "rows": dict(self.rows),
            "models": [
                {"model": one.model, "scores": {t: dict(s) for t, s in one.scores.items()}} for one in self.models
            ],
        }


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """What a model is asked: rows, by a head of its own where it is None, else by that of another model."""

    name: str
    calibration: Calibration
    folder: Path
    head: str | None = None


def questions_of(file: RecipeFile) -> list[LabelledRows]:
    """Return the rows of a recipe, each fine-tune's by its own head. InputError: it has no rows."""
    recipe = file.output.recipe
    found = [
        LabelledRows(recipe.names[i], calibration, file.folder, recipe.models[i].model)
        for i in recipe.fine_tunes
        if (calibration := recipe.calibration_of(i)) is not None
    ]
    if not found:
        raise InputError(f"{file.path}: has no calibration rows", hint="calibration: {data: rows.jsonl}")
    return found


def evaluate(
    models: Sequence[str],
    questions: Sequence[LabelledRows],
    *,
    metrics: Sequence[str] = (),
    sequences: int | None = None,
    base: str | None = None,
    device: str = "auto",
    pickles: bool = False,
) -> Evaluation:
    """Return the metrics of `models`: folders or hub ids, base+adapter, adapters and delta artifacts over `base`.

        questions   the rows, and whose head answers
        metrics     names; by default all that fit the head, without generated texts unless calibration.metric is one
        sequences   rows to use, chosen by seed 0; None: all
        base        of adapters and delta artifacts; of the latter by default the one that their manifest names

    InputError: a model that transformers cannot run, or whose shapes are not the head's; rows that do not fit it.
    """
    chosen = choose_device(device)
    opened = {model: open_model(model, base, pickles=pickles) for model in dict.fromkeys(models)}
    scores: dict[str, dict[str, dict[str, float]]] = {model: {} for model in opened}
    rows: dict[str, int] = {}
    with Reader() as reader:
        for question in questions:
            whole = None if question.head is None else open_model(question.head, base, question.folder, pickles=pickles)
            known: tuple[ScoredTask, Sheet] | None = None
            for model, checkpoint in opened.items():
                with calibrating(model, 1, "evaluating", device=chosen):
                    if known is None or whole is None:
                        task = ScoredTask(
                            question.name or model,
                            whole or checkpoint,
                            question.calibration,
                            question.folder,
                            reader,
                            chosen,
                        )
                        known = task, _sheet(task, metrics, sequences)
                    task, sheet = known
                    weights = task.own if whole is None else under_head(task, checkpoint, model)
                    ((found,),) = measured([(task, sheet)], [[weights]])
                scores[model][question.name] = found
                rows[question.name] = sheet.rows
    return Evaluation(rows, tuple(ModelScores(model, found) for model, found in scores.items()))


def _sheet(task: ScoredTask, metrics: Sequence[str], sequences: int | None) -> Sheet:
    wanted = metrics or task.fitting
    refuse_unknown(wanted, task)
    limit = ALL_ROWS if sequences is None else sequences
    found = rows_of(task.calibration, task.folder, task.settings, labelled=True, limit=limit)
    return task.sheet(select(found, min(limit, len(found)), 0), wanted)


def under_head(task: ScoredTask, checkpoint: Checkpoint, name: str) -> Weights:
    """Return a checkpoint's weights below the head of a task's model.

    InputError: it lacks some, or has other shapes.
    """
    ours, theirs = task.checkpoint, checkpoint
    tensors, names = shared_names([ours.tensors, theirs.tensors], [task.name, name])
    there = {names[1].canonical[n]: info for n, info in tensors[1].items()}
    infos: dict[str, TensorInfo] = {}
    for own, info in tensors[0].items():
        found = there.get(names[0].canonical[own])
        if found is not None and not _is_of_head(own):
            if found.shape != info.shape:
                shapes = f"{list(found.shape)}, in {task.name} {list(info.shape)}"
                raise InputError(f"{name}: {found.name} is {shapes}", hint="give a model of the same shapes")
            infos[own] = found
        elif _is_of_head(own):
            infos[own] = info
        else:
            raise InputError(f"{name}: lacks {own}, which {task.name} has below its head", hint="another --head")
    missing = next((n for n in ours.tensors if n not in infos), None)
    if missing is not None:
        raise InputError(f"{name} stores its experts otherwise than {task.name}: {missing}")
    return lambda wanted: {n: task.stored(infos[n]) for n in wanted}


def _is_of_head(name: str) -> bool:
    """Return whether a tensor belongs to the head of a classifier or a regression.

    A language model's head is none: a merge of language models has a head of its own.
    """
    return name != LM_HEAD and _HEAD.search(name) is not None and _LANGUAGE.search(name) is None


def open_model(reference: str, base: str | None, folder: Path | None = None, *, pickles: bool = False) -> Checkpoint:
    """Open a model with all its tensors as numbers, codes decoded: a delta, a version or an adapter over its base."""
    here = folder or Path.cwd()
    models = Models()
    opener = partial(models.open, weights=True, pickles=pickles)
    with errors.context(reference):
        if _is_adapter(reference, here):
            if base is None:
                raise UsageError("is an adapter, which needs its base", hint=f"--base MODEL, or MODEL+{reference}")
            return decoded(opener(f"{base}+{reference}", here))
        found = opener(reference, here)
        if found.is_delta and found.base is None:
            below = base or str(models.artifact(found.path).manifest.base)
            found, _ = models.over(found, decoded(opener(below, here)))
        return decoded(found)


def _is_adapter(reference: str, folder: Path) -> bool:
    return (folder / reference / "adapter_config.json").is_file() and not (folder / reference / "config.json").is_file()
