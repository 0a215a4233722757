"""Rows of a recipe's calibration: which of them search, and which are held out. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltamerge.calibrate.rows.chats import Chat
from deltamerge.calibrate.rows.files import DataRow, read
from deltamerge.calibrate.rows.heads import LANGUAGE, check_head, check_model, class_labels, metric_of, task_of
from deltamerge.calibrate.spec import HELD_OUT
from deltamerge.errors import InputError
from deltamerge.recipe.schema import Calibration


def select(rows: Sequence[DataRow], count: int, seed: int) -> list[DataRow]:
    """Return `count` of the rows, in order; the choice depends on the seed and the number of rows alone."""

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()

    return [rows[i] for i in sorted(sorted(range(len(rows)), key=rank)[:count])]


def split(
    calibration: Calibration, folder: Path, seed: int, config: Mapping[str, Any], *, labelled: bool
) -> tuple[list[DataRow], list[DataRow]]:
    """Return (search rows, held-out rows): `calibration.sequences` rows, and as many others or 200, whichever is more.

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
            hint="give more data" if len(found) < 3 else "give more data, or lower sequences",
        )
    search = select(found, wanted, seed)
    others = without(found, search)
    if len(others) >= max(1, wanted // 3):
        return search, select(others, min(len(others), max(HELD_OUT, wanted)), seed)
    held = select(found, len(found) // 3, seed)
    return without(found, held), held


def without(rows: Iterable[DataRow], some: Iterable[DataRow]) -> list[DataRow]:
    """Return the rows but `some`."""
    numbers = {row.number for row in some}
    return [row for row in rows if row.number not in numbers]


def rows_of(
    calibration: Calibration, folder: Path, config: Mapping[str, Any], *, labelled: bool, limit: int
) -> list[DataRow]:
    """Return all rows of the data, or the first `limit` of a hub data set.

    InputError: a field is missing, or head, task and labels do not fit.
    """
    check_model(calibration, config)
    task, label = task_of(calibration, config), None
    if labelled:
        check_head(config, task)
        metric_of(calibration, config)
        label = None if task == "causal-lm" else calibration.label
    found = read(
        calibration.data,
        folder=folder,
        text=calibration.text,
        label=label,
        config=calibration.config,
        split=calibration.split,
        limit=limit,
    )
    if task not in LANGUAGE:
        for row in found:
            if row.completion is not None or isinstance(row.content, Chat):
                kind = "a chat" if isinstance(row.content, Chat) else "a prompt and its completion"
                message = f"calibration data {calibration.data}: row {row.number}: {kind}, for language models alone"
                raise InputError(message, hint="set calibration.text")
        if label is not None:
            class_labels(found, config)
    return found
