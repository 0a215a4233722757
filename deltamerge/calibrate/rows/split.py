"""Which calibration rows are searched on and which are held out; task and metric. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltamerge.calibrate.model.families import check_family
from deltamerge.calibrate.rows import rows as data
from deltamerge.calibrate.rows.rows import HEADS, Row, check_head, class_labels, has_head
from deltamerge.calibrate.spec import HELD_OUT
from deltamerge.errors import InputError
from deltamerge.recipe.schema import Calibration

POSITIONS = ("max_position_embeddings", "n_positions")  # keys of config.json
LANGUAGE = frozenset({"causal-lm", "text-generation"})


def task_of(calibration: Calibration, config: Mapping[str, Any]) -> str:
    """calibration.task, else the head's task; without a head, pictures if the config has an image size, else text."""
    if calibration.task is not None:
        return calibration.task
    if calibration.metric == "exact_match":
        return "text-generation"
    for task in ("text-classification", "image-classification", "causal-lm"):
        if has_head(config, task):
            return task
    return "image-classification" if "image_size" in config else "text-classification"


def metric_of(calibration: Calibration, config: Mapping[str, Any]) -> str:
    """calibration.metric, else loss for language models, pearson_spearman for a regression head, accuracy for classes.

    InputError: a metric of classes for a regression head, a metric of texts for a model that generates none, or the
    reverse.
    """
    task, outputs = (
        task_of(calibration, config),
        int(config.get("num_labels") or len(config.get("id2label") or {}) or 2),
    )
    regression = outputs == 1 or config.get("problem_type") == "regression"
    natural = "loss" if task in LANGUAGE else "pearson_spearman" if regression else "accuracy"
    metric = calibration.metric or natural
    if task in LANGUAGE:
        fits = metric == "loss" or (metric == "exact_match" and task == "text-generation")
    else:
        fits = metric == "loss" or (metric != "exact_match" and regression == (metric == "pearson_spearman"))
    if not fits:
        raise InputError(
            f"calibration.metric {metric} does not fit the head of {(config.get('architectures') or ['?'])[0]}",
            hint=f"set it to {natural} or loss",
        )
    return metric


def split(
    calibration: Calibration, folder: Path, seed: int, config: Mapping[str, Any], *, labelled: bool
) -> tuple[list[Row], list[Row]]:
    """(search rows, held-out rows): `calibration.sequences` rows, and as many others or 200, whichever is more.

        calibration   the recipe's section
        folder        the recipe's
        seed          with it, the split depends on the number of rows alone
        config        the fine-tune's config.json
        labelled      whether labels are needed

    Where the data has hardly any other rows, a third is held out. InputError: too few rows, missing fields, a head that
    does not fit the task, labels that do not fit the head.
    """
    wanted = calibration.sequences
    found = rows_of(calibration, folder, config, labelled=labelled, limit=wanted + max(HELD_OUT, wanted))
    if len(found) < max(wanted, 3):
        raise InputError(
            f"calibration data {calibration.data}: {len(found)} rows, but {max(wanted, 3)} needed",
            hint="give more data, or lower calibration.sequences",
        )
    search = data.select(found, wanted, seed)
    chosen = {row.number for row in search}
    others = [row for row in found if row.number not in chosen]
    if len(others) >= max(1, wanted // 3):
        return search, data.select(others, min(len(others), max(HELD_OUT, wanted)), seed)
    held = data.select(found, len(found) // 3, seed)
    chosen = {row.number for row in held}
    return [row for row in found if row.number not in chosen], held


def rows_of(
    calibration: Calibration, folder: Path, config: Mapping[str, Any], *, labelled: bool, limit: int
) -> list[Row]:
    """All rows of the data, of a hub data set the first `limit`. InputError: missing fields, a head that does not fit
    the task, labels that do not fit the head."""
    _check_model(calibration, config)
    label = None
    if labelled:
        check_head(config, task_of(calibration, config))
        metric_of(calibration, config)
        label = None if task_of(calibration, config) == "causal-lm" else calibration.label
    found = data.read(
        calibration.data,
        folder=folder,
        text=calibration.text,
        label=label,
        config=calibration.config,
        split=calibration.split,
        limit=limit,
    )
    if task_of(calibration, config) not in LANGUAGE:
        if answered := next((row for row in found if row.completion is not None), None):
            message = f"calibration data {calibration.data}: row {answered.number}: a prompt and its completion"
            raise InputError(f"{message}, which are for language models", hint="set calibration.text")
        if label is not None:
            class_labels(found, config)
    return found


def _check_model(calibration: Calibration, config: Mapping[str, Any]) -> None:
    """InputError: a task other than the head's, or texts longer than the model's positions."""
    architecture = (config.get("architectures") or ["none"])[0]
    heads = [head for some in HEADS.values() for head in some]
    if calibration.task is not None and any(map(architecture.endswith, heads)):
        check_head(config, calibration.task)
    check_family(config, "picture" if task_of(calibration, config) == "image-classification" else "text")
    if task_of(calibration, config) != "image-classification":
        positions = [config.get(key) for key in POSITIONS]
        check_length(calibration.length, min((n for n in positions if n and n > 0), default=calibration.length))


def check_length(length: int, positions: int) -> None:
    """InputError: calibration.length exceeds the model's positions."""
    if length > positions:
        raise InputError(
            f"calibration.length is {length}, but the model has {positions} positions",
            hint=f"set it to {positions} or less",
        )
