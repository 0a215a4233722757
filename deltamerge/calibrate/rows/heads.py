"""Tasks and metrics of a model's head, from its config.json, and labels in the form of the head. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from deltamerge.calibrate.model.transformers_code import check_family
from deltamerge.calibrate.rows.files import DataRow
from deltamerge.errors import InputError
from deltamerge.recipe.schema import Calibration

Task = Literal["text-classification", "text-generation", "image-classification", "causal-lm"]
LANGUAGE_HEADS = "ForCausalLM", "LMHeadModel", "ForConditionalGeneration"
HEADS: dict[str, tuple[str, ...]] = {
    "text-classification": ("ForSequenceClassification",),
    "image-classification": ("ForImageClassification",),
    "text-generation": LANGUAGE_HEADS,
    "causal-lm": LANGUAGE_HEADS,
}
POSITIONS = ("max_position_embeddings", "n_positions")  # keys of config.json
LANGUAGE = frozenset({"causal-lm", "text-generation"})


def has_head(config: Mapping[str, Any], task: str) -> bool:
    """Tell whether the model of a config.json has the head that the task needs."""
    return _architecture(config).endswith(HEADS[task])


def _architecture(config: Mapping[str, Any], none: str = "none") -> str:
    return str((config.get("architectures") or [none])[0])


def check_head(config: Mapping[str, Any], task: str) -> None:
    """Raise InputError unless the model of a config.json has the head that the task needs."""
    if not has_head(config, task):
        raise InputError(
            f"task {task} needs a model …{' or …'.join(HEADS[task])}, but this is {_architecture(config)}",
            hint="set calibration.task to the model's task, or use an objective without labels",
        )


def check_base(calibration: Calibration, config: Mapping[str, Any]) -> None:
    """Raise InputError unless a base that has rows answers with tokens."""
    task = task_of(calibration, config)
    if task not in LANGUAGE or not has_head(config, task):
        hint = "leave them out: only language models answer alike before and after fine-tuning"
        raise InputError(f"rows of the base: {_architecture(config)} answers with no tokens", hint=hint)


def _outputs(config: Mapping[str, Any]) -> tuple[int, bool]:
    """Return how many outputs a head has, and whether it is a regression."""
    outputs = int(config.get("num_labels") or len(config.get("id2label") or {}) or 2)
    return outputs, outputs == 1 or config.get("problem_type") == "regression"


def class_labels(rows: Iterable[DataRow], config: Mapping[str, Any]) -> list[float] | list[int]:
    """Return the labels in the form of the head: floats of a regression, else class indices. Names are looked up in
    `label2id`."""
    names = {str(k): int(v) for k, v in (config.get("label2id") or {}).items()}
    outputs, regression = _outputs(config)
    return [_number(row) for row in rows] if regression else [_index(row, names, outputs) for row in rows]


def _number(row: DataRow) -> float:
    try:
        return float(row.label)
    except (TypeError, ValueError, OverflowError):
        said = repr(row.label)[:80]
        raise InputError(f"row {row.number}: label {said} is no number, but the head is a regression") from None


def _index(row: DataRow, names: Mapping[str, int], outputs: int) -> int:
    if str(row.label) in names:
        return names[str(row.label)]
    try:
        index = int(row.label)
        if index != float(row.label):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        known = ", ".join(sorted(names, key=names.__getitem__)[:8]) or f"0 to {outputs - 1}"
        raise InputError(
            f"row {row.number}: label {repr(row.label)[:80]} does not fit the head, whose labels are {known}"
        ) from None
    if not 0 <= index < outputs:
        raise InputError(
            f"row {row.number}: label {index} does not fit a head of {outputs} labels (0 to {outputs - 1})"
        )
    return index


def task_of(calibration: Calibration, config: Mapping[str, Any]) -> str:
    """Return calibration.task, else the head's task; without a head, pictures if the config has an image size, else
    text."""
    if calibration.task is not None:
        return calibration.task
    if calibration.metric == "exact_match":
        return "text-generation"
    for task in ("text-classification", "image-classification", "causal-lm"):
        if has_head(config, task):
            return task
    return "image-classification" if "image_size" in config else "text-classification"


def metric_of(calibration: Calibration, config: Mapping[str, Any]) -> str:
    """Return calibration.metric, else loss for language models, pearson_spearman for a regression head, accuracy for
    classes.

    InputError: a metric of classes for a regression head, a metric of texts for a model that generates none, or the
    reverse.
    """
    task, (_, regression) = task_of(calibration, config), _outputs(config)
    natural = "loss" if task in LANGUAGE else "pearson_spearman" if regression else "accuracy"
    metric = calibration.metric or natural
    if task in LANGUAGE:
        fits = metric == "loss" or (metric == "exact_match" and task == "text-generation")
    else:
        fits = metric == "loss" or (metric != "exact_match" and regression == (metric == "pearson_spearman"))
    if not fits:
        raise InputError(
            f"calibration.metric {metric} does not fit the head of {_architecture(config, '?')}",
            hint=f"set it to {natural} or loss",
        )
    return metric


def check_model(calibration: Calibration, config: Mapping[str, Any]) -> None:
    """Raise InputError for a task other than the head's, or texts longer than the model's positions."""
    pictures = task_of(calibration, config) == "image-classification"
    if calibration.task is not None and any(_architecture(config).endswith(heads) for heads in HEADS.values()):
        check_head(config, calibration.task)
    check_family(config, "picture" if pictures else "text")
    if not pictures:
        positions = [config.get(key) for key in POSITIONS]
        check_length(calibration.length, min((n for n in positions if n and n > 0), default=calibration.length))


def check_length(length: int, positions: int) -> None:
    """Raise InputError where calibration.length exceeds the model's positions."""
    if length > positions:
        raise InputError(
            f"calibration.length is {length}, but the model has {positions} positions",
            hint=f"set it, or --length, to {positions} or less",
        )
