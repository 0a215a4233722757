"""Scores of models on labelled rows: tasks, their heads, and models side by side."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from xxhash import xxh3_128

from deltamerge import errors
from deltamerge.calibrate.model.blocks import BlockModel, BlockOutput, Inputs, Weights, from_reader, together
from deltamerge.calibrate.model.passes import COMPARED, Callbacks, stored
from deltamerge.calibrate.q import objectives as O
from deltamerge.calibrate.rows.batches import RowReader, check_new_tokens, config_of
from deltamerge.calibrate.rows.files import DataRow, is_of_hub, local_files
from deltamerge.calibrate.rows.heads import HEADS, LANGUAGE, has_head, metric_of, task_of
from deltamerge.calibrate.rows.hub import commit
from deltamerge.calibrate.rows.splits import rows_of, select
from deltamerge.calibrate.spec import precision_of
from deltamerge.calibrate.stage import calibrating
from deltamerge.engine.devices import torch_device
from deltamerge.errors import InputError, OutputError, UsageError
from deltamerge.errors.shown import as_html
from deltamerge.errors.shown import shown as printable
from deltamerge.files import progress
from deltamerge.files.descriptors import check_folder, writing
from deltamerge.files.hashes import seal
from deltamerge.models.checkpoint import Checkpoint, decoded
from deltamerge.models.matching import shared_names
from deltamerge.models.references import Models
from deltamerge.plan.inputs import refuse_unrunnable
from deltamerge.recipe.file import RecipeFile
from deltamerge.recipe.schema import Calibration
from deltamerge.run.options import choose_device
from deltamerge.tensors.names import LM_HEAD, TASK_HEAD
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.version import __version__

BATCH = 32
AGREEMENT, DISTANCE = "agreement", "distance"
SAME = "same_answers"
SCORE_KEPT = "kept_score"
"""The expected share of the fine-tune's score, from its answers alone. Recipes cannot name it."""
SCORED = '{"key": '  # how a line of scores begins
LOSS = "loss"
EXACT = "exact_match"
CLASSES = ("accuracy", "f1", "matthews_correlation", LOSS)
LOWER = frozenset({AGREEMENT, DISTANCE, LOSS})
"""Measures for which less is better."""
UNLABELLED = frozenset({AGREEMENT, SAME})
"""Measures that compare with the fine-tune itself."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """Rows as a model reads them, and the metrics on them: of one forward pass, and of generated texts."""

    rows: int
    batches: Sequence[Inputs]
    measures: Mapping[str, O.Objective] = field(default_factory=dict)
    generated: Mapping[str, O.Generation] = field(default_factory=dict)

    def reduce(self, batch: int, output: BlockOutput) -> tuple[Any, ...]:
        """Return the part of a batch that the measures keep."""
        return tuple(measure.reduce(batch, output) for measure in self.measures.values())

    def values(self, parts: Sequence[tuple[Any, ...]]) -> dict[str, float]:
        """Return the measures, by name, of the batches' parts."""
        found = (m.value([part[i] for part in parts]) for i, m in enumerate(self.measures.values()))
        return {name: shown(name, value) for name, value in zip(self.measures, found, strict=True)}


class ScoredTask:
    """Rows and the head of a model, by which other weights of the same shapes are judged.

    name         the name in tables
    checkpoint   the model with the config, tokenizer, head and shapes
    own          the model's own weights
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        calibration: Calibration,
        folder: Path,
        reader: Reader,
        device: str,
    ) -> None:
        self.name, self.checkpoint, self.calibration, self.folder = name, checkpoint, calibration, folder
        self.reader, self.device = reader, torch_device(device)
        refuse_unrunnable(name, checkpoint)
        with errors.context(name):
            self.config = config_of(checkpoint.path)
            self.settings = self.config.to_dict() | {"num_labels": self.config.num_labels}
            self.kind = task_of(calibration, self.settings)
            self.reads = RowReader(checkpoint.path, self.config, task=self.kind, length=calibration.length)
            self.model = BlockModel(
                self.config,
                checkpoint.tensors,
                device=self.device,
                pad_token_id=self.reads.pad_token_id,
                precision=precision_of(calibration.precision, device, checkpoint.tensors.values()),
                callbacks=Callbacks(walked=lambda batches, passes: progress.here(progress.PASSES).begin(passes)),
            )
        self.own = from_reader(lambda name: self.stored(checkpoint.tensors[name]))

    def stored(self, info: TensorInfo) -> Tensor:
        """Return a tensor as it is stored, or computed."""
        return stored(self.reader, info).to(self.device)

    @property
    def metric(self) -> str:
        """Return the metric that `calibration` names, or that suits the head."""
        return metric_of(self.calibration, self.settings)

    @property
    def has_head(self) -> bool:
        """Return whether the model has the head that its task needs."""
        return has_head(self.settings, self.kind)

    @property
    def fitting(self) -> tuple[str, ...]:
        """Return the metrics that fit the head. Metrics of generated texts need `calibration` to ask for them."""
        if self.kind in LANGUAGE:
            return (LOSS, EXACT) if self.metric == EXACT else (LOSS,)
        return ("pearson_spearman", LOSS) if self.metric == "pearson_spearman" else self._of_classes

    @property
    def _of_classes(self) -> tuple[str, ...]:
        regression = O.is_regression(self.config)
        own = [] if self.metric in CLASSES else [self.metric]
        return ("pearson_spearman", LOSS) if regression else (*own, *CLASSES)

    def sheet(self, rows: Sequence[DataRow], metrics: Sequence[str], compared: Collection[str] = ()) -> Sheet:
        """Return rows on which `metrics` are measured. `compared` are measures against the model's own outputs."""
        with errors.context(self.name):
            of_forward = [name for name in metrics if name != EXACT]
            made = self.reads.batches(rows, size=BATCH, labelled=bool(of_forward))
            measures: dict[str, O.Objective] = {}
            for name in of_forward:
                assert made.labels is not None
                measures[name] = O.Validation(made.inputs, made.labels, name)
            against: dict[str, O.Comparison[O.Objective]] = {}
            if AGREEMENT in compared:
                against[DISTANCE] = self._agreement(made.inputs)
            if SAME in compared:
                against[SAME] = self._same_answers(made.inputs)
            if SCORE_KEPT in compared and (kept := self._kept_score(made.inputs)) is not None:
                against[SCORE_KEPT] = kept
            objectives = O.collected(self.model, self.own, made.inputs, list(against.values()))
            measures |= dict(zip(against, objectives, strict=True))
            generated = {EXACT: self._generation(rows)} if EXACT in metrics else {}
            return Sheet(len(rows), made.inputs, measures, generated)

    def _generation(self, rows: Sequence[DataRow]) -> O.Generation:
        made, settings = self.reads.prompts(rows, size=BATCH), self.calibration
        check_new_tokens(settings.length, settings.new_tokens, self.config)
        assert made.texts is not None
        return O.Generation(made.inputs, made.texts, self.reads.decode, settings.answer, settings.new_tokens)

    def _agreement(self, inputs: Sequence[Inputs]) -> O.Comparison[O.Objective]:
        """Return the distance of predictions from the model's own, whatever the scale of a classifier's logits.

        For a language model it is the distance of next-token distributions, without a head the distance of last hidden
        states.
        """
        if not self.has_head:
            return O.OutputChange.compared(inputs)
        if self.kind in LANGUAGE:
            return O.Distribution.compared(self.model, inputs)
        return O.Agreement.compared(inputs, regression=self._answers_numbers)

    def _same_answers(self, inputs: Sequence[Inputs]) -> O.Comparison[O.Objective]:
        """Return the share of the model's own answers. See `objectives.SameAnswers`. InputError: it has no head."""
        if not self.has_head:
            raise InputError("has no head to answer with", hint=f"objective: {AGREEMENT}")
        return O.SameAnswers.compared(inputs, regression=self._answers_numbers)

    def _kept_score(self, inputs: Sequence[Inputs]) -> O.Comparison[O.Objective] | None:
        """Return what is expected to be lost of the model's score. None: its answers do not tell.

        A language model keeps a row if every token of its completion is the same.
        """
        if not self.has_head:
            return None
        if self.kind not in LANGUAGE:
            return O.LostScore.compared(inputs, regression=self._answers_numbers)
        if not all(COMPARED in batch for batch in inputs):
            return None
        return O.SameTexts.compared(inputs, regression=False)

    @property
    def _answers_numbers(self) -> bool:
        return self.kind == "text-classification" and O.is_regression(self.config)


def measured(
    sheets: Sequence[tuple[ScoredTask, Sheet]], variants: Sequence[Sequence[Weights]]
) -> list[list[dict[str, float]]]:
    """Return [task][variant]: the measures by name. `variants` has the weights of each task.

    All tasks take one walk: they are at the same block, so that they can share reads.
    """
    walks = [
        task.model.walk(sheet.batches, weights, sheet.reduce)
        for (task, sheet), weights in zip(sheets, variants, strict=True)
    ]
    found = together(walks)
    results = []
    for (task, sheet), of_task, weights in zip(sheets, found, variants, strict=True):
        with errors.context(task.name):
            values = [sheet.values(parts) for parts in of_task]
        for name, generation in sheet.generated.items():
            for own, one in zip(values, weights, strict=True):
                own[name] = shown(name, generation.measure(task.model, one))
        results.append(values)
    return results


def shown(name: str, value: float) -> float:
    """Return a measure for people from the objective that is minimised."""
    return value if name in LOWER else 1.0 - value


def refuse_unknown(metrics: Sequence[str], task: ScoredTask) -> None:
    """Refuse a metric that does not fit the head."""
    fitting = dict.fromkeys((*task.fitting, "accuracy_f1") if "accuracy" in task.fitting else task.fitting)
    if EXACT in metrics and task.kind == "text-generation":
        fitting[EXACT] = None
    for metric in metrics:
        if metric not in fitting:
            raise InputError(f"{task.name}: {metric} does not fit its head", hint=f"it has {', '.join(fitting)}")


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

    def __repr__(self) -> str:
        rows = ", ".join(f"{count} rows{f' of {task}' if task else ''}" for task, count in self.rows.items())
        return printable(f"<Evaluation of {len(self.models)} models: {rows}>")

    def _repr_html_(self) -> str:
        scores = {
            one.model: "; ".join(
                f"{task} {measure} {value:.3g}".strip()
                for task, own in one.scores.items()
                for measure, value in own.items()
            )
            for one in self.models
        }
        return as_html("scores", scores)

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
    """Rows for a model, to be answered with its own head if `head` is None, otherwise with another model's head."""

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


@dataclass(frozen=True, slots=True)
class _Answer:
    """A model that is asked: its task and weights, and the key of its scores in a file."""

    model: str
    question: LabelledRows
    task: ScoredTask
    sheet: Sheet
    weights: Weights
    key: str


def evaluate(
    models: Sequence[str],
    questions: Sequence[LabelledRows],
    *,
    metrics: Sequence[str] = (),
    sequences: int | None = None,
    base: str | None = None,
    device: str = "auto",
    pickles: bool = False,
    out: Path | None = None,
) -> Evaluation:
    """Return the metrics of `models`: folders or hub ids, base+adapter, adapters and delta artifacts over `base`.

        questions   the rows, and whose head answers
        metrics     names; by default all that fit the head, without generated texts unless calibration.metric is one
        sequences   rows to use, chosen by seed 0; None: all
        base        base of adapters and delta artifacts; a delta artifact's default is the base that its manifest names
        out         a file of scores, a line each: known ones are taken from it, new ones are added as they come

    Every model is checked before the first is scored. InputError: transformers cannot run a model, its shapes do not
    fit the head, or the rows do not fit the head. OutputError: `out` holds something else, or cannot be written.
    """
    chosen = choose_device(device)
    opened = {model: open_model(model, base, pickles=pickles) for model in dict.fromkeys(models)}
    scores: dict[str, dict[str, dict[str, float]]] = {model: {} for model in opened}
    rows: dict[str, int] = {}
    known = _read_scores(out) if out is not None else {}
    if out is not None:
        check_folder(out.parent)
    with Reader() as reader:
        asked = [
            answer
            for question in questions
            for answer in _answers(question, opened, reader, chosen, metrics, sequences, base, pickles=pickles)
        ]
        for one in asked:
            found = known.get(one.key)
            if found is None:
                with calibrating(one.model, 1, "evaluating", device=chosen):
                    ((found,),) = measured([(one.task, one.sheet)], [[one.weights]])
                if out is not None:
                    _append_scores(out, one, found)
            scores[one.model][one.question.name] = found
            rows[one.question.name] = one.sheet.rows
    return Evaluation(rows, tuple(ModelScores(model, found) for model, found in scores.items()))


def _answers(
    question: LabelledRows,
    opened: Mapping[str, Checkpoint],
    reader: Reader,
    device: str,
    metrics: Sequence[str],
    sequences: int | None,
    base: str | None,
    *,
    pickles: bool,
) -> Iterator[_Answer]:
    """Yield every model with the rows of a question. Headers are read, and no weights."""
    whole = None if question.head is None else open_model(question.head, base, question.folder, pickles=pickles)
    shared: tuple[ScoredTask, Sheet] | None = None
    for model, checkpoint in opened.items():
        with calibrating(model, 1, "checking", device=device):
            if shared is None or whole is None:
                name = question.name or model
                task = ScoredTask(name, whole or checkpoint, question.calibration, question.folder, reader, device)
                _check_head(task, opened)
                shared = task, _sheet(task, metrics, sequences)
            task, sheet = shared
            weights = task.own if whole is None else under_head(task, checkpoint, model)
            key = _key_of(question, checkpoint, whole, metrics or task.fitting, sequences)
        yield _Answer(model, question, task, sheet, weights, key)


def _check_head(task: ScoredTask, models: Mapping[str, Checkpoint]) -> None:
    """Refuse a model without a head. The hint names the first of `models` that has one."""
    if not task.has_head:
        other = next((name for name, one in models.items() if has_head(one.config, task.kind)), "FINE-TUNE")
        needs = f"needs a model …{' or …'.join(HEADS[task.kind])}, and has no such head"
        raise InputError(f"{task.name}: {needs}", hint=f"--head {other}: its head answers for every model")


def _sheet(task: ScoredTask, metrics: Sequence[str], sequences: int | None) -> Sheet:
    wanted = metrics or task.fitting
    refuse_unknown(wanted, task)
    limit = ALL_ROWS if sequences is None else sequences
    found = rows_of(task.calibration, task.folder, task.settings, labelled=True, limit=limit)
    return task.sheet(select(found, min(limit, len(found)), 0), wanted)


def _key_of(
    question: LabelledRows,
    checkpoint: Checkpoint,
    whole: Checkpoint | None,
    metrics: Sequence[str],
    sequences: int | None,
) -> str:
    """Return a hash of the causes of a score: the files of the model and the head by their seals, the rows, metrics."""
    data = question.calibration.data
    facts = [
        __version__,
        _seals(_files(checkpoint)),
        _seals(_files(whole)) if whole is not None else None,
        _seals(local_files(data, question.folder)),
        commit(data) if is_of_hub(data, question.folder) else None,
        question.calibration.model_dump(mode="json"),
        list(metrics),
        sequences,
    ]
    return xxh3_128(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _files(model: Checkpoint) -> set[Path]:
    """Return the files in the folders of a model, its base and its adapter, and the files that hold its tensors."""
    stored_in = {leaf.path for info in model.tensors.values() for leaf in info.tensor.leaves()}
    below = _files(model.base) if model.base is not None else set()
    folders = [source.path for source in model.sources if source.path.is_dir()]
    return {*stored_in, *below, *(path for folder in folders for path in folder.iterdir() if path.is_file())}


def _seals(paths: Iterable[Path]) -> dict[str, list[int]]:
    return {str(path): list(seal(path)) for path in sorted(paths)}


def _read_scores(path: Path) -> dict[str, dict[str, float]]:
    """Read scores by key. A last line that was cut short is left out. OutputError: the file holds something else."""
    found: dict[str, dict[str, float]] = {}
    text = path.read_text("utf-8", "replace") if os.path.lexists(path) else ""
    *lines, last = text.split("\n")
    if last and not (last.startswith(SCORED) or SCORED.startswith(last)):
        lines.append(last)
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            found[entry["key"]] = {name: float(value) for name, value in entry["scores"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise OutputError(f"{path}:{number}: is no line of scores", hint="another name with --out") from None
    return found


def _append_scores(path: Path, one: _Answer, scores: Mapping[str, float]) -> None:
    entry = {"key": one.key, "model": one.model, "task": one.question.name, "rows": one.sheet.rows, "scores": scores}
    line = json.dumps(entry).encode() + b"\n"
    with writing(path), path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # a last line that was cut short
        file.write(line)


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

    A language model's head does not count, because a merge of language models has its own head.
    """
    return name != LM_HEAD and _HEAD.search(name) is not None and _LANGUAGE.search(name) is None


def open_model(reference: str, base: str | None, folder: Path | None = None, *, pickles: bool = False) -> Checkpoint:
    """Open a model with all its tensors as numbers, codes decoded: a delta, a version or an adapter over its base."""
    here = folder or Path.cwd()
    models = Models()
    opener = partial(models.open, weights=True, pickles=pickles)
    with errors.context(reference):
        if is_adapter(reference, here):
            if base is None:
                raise UsageError("is an adapter, which needs its base", hint=f"--base MODEL, or MODEL+{reference}")
            return decoded(opener(f"{base}+{reference}", here))
        found = opener(reference, here)
        if found.is_delta and found.base is None:
            below = base or str(models.artifact(found.path).manifest.base)
            found, _ = models.over(found, decoded(opener(below, here)))
        return decoded(found)


def is_adapter(reference: str, folder: Path) -> bool:
    """Tell whether a reference in `folder` is an adapter's folder, without its base."""
    return (folder / reference / "adapter_config.json").is_file() and not (folder / reference / "config.json").is_file()
