"""Rows of calibration data: .jsonl, .csv, .txt, .parquet, a folder of pictures, a hub data set; which of them search,
and which are held out.

No torch: `check` reads them.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from deltamerge.calibrate.model.transformers_code import check_family
from deltamerge.calibrate.rows.chats import Chat, chat_of
from deltamerge.calibrate.spec import HELD_OUT
from deltamerge.errors import InputError, context
from deltamerge.files.descriptors import input_error
from deltamerge.models.hub_client import commit_of
from deltamerge.recipe.schema import Calibration

Task = Literal["text-classification", "text-generation", "image-classification", "causal-lm"]
LANGUAGE_HEADS = "ForCausalLM", "LMHeadModel", "ForConditionalGeneration"
HEADS: dict[str, tuple[str, ...]] = {
    "text-classification": ("ForSequenceClassification",),
    "image-classification": ("ForImageClassification",),
    "text-generation": LANGUAGE_HEADS,
    "causal-lm": LANGUAGE_HEADS,
}
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
MAX_BYTES = 1 << 30
MAX_ENTRIES = 100_000  # files in a folder of pictures
FILES = frozenset({".jsonl", ".csv", ".txt", ".parquet"})
READ_AT_ONCE = 1000  # rows of a .parquet file
ANSWERED = ("prompt", "completion")  # fields, as TRL names them: texts, or messages
MESSAGES = "messages"  # field of a chat
WITHOUT_DATA = "pip install 'deltamerge[data]', or give a .jsonl, .csv or .txt file"


@dataclass(frozen=True, slots=True)
class DataRow:
    """One example: `content` is a text, a pair of texts, a chat, or a picture (path or PIL image); `number` counts from
    1.

    `completion` is the text after `content` in a language model's row, and only it is compared. None: the whole text.
    """

    content: Any
    label: Any
    number: int
    completion: str | None = None


def read(
    source: str,
    *,
    folder: Path,
    text: str | Sequence[str] = "text",
    label: str | None = None,
    config: str | None = None,
    split: str | None = None,
    limit: int = 1000,
) -> list[DataRow]:
    """Return the rows of `source`, in order.

        source   a file .jsonl, .csv (with a header), .txt (a text a line) or .parquet, or a folder of pictures, below
                 `folder`; or a hub data set id, org/name or org/name@revision
        folder   the recipe's
        text     the field of the text, chat or picture; two fields make sentence pairs. A row without `text` may have
                 a `prompt` and its `completion`, or `messages`
        label    the field of the label; for pictures in folders, the folder's name
        config   of a hub data set
        split    of a hub data set
        limit    rows that are read of a hub data set

    InputError: no such file, no rows, a row that lacks a field.
    """
    path = folder / source
    fields = [text] if isinstance(text, str) else list(text)
    with context(f"calibration data {source}"):
        of_hub = is_of_hub(source, folder)
        if not of_hub and (config or split):
            raise InputError(f"calibration.{'config' if config else 'split'} is for hub data sets, and this is none")
        if path.is_dir():
            rows = list(_pictures(path, labelled=label is not None))
        elif path.is_file() and path.suffix in FILES:
            rows = [_row(n, fields, label, record, path.parent) for n, record in _records(path)]
        elif not of_hub:
            wrong = "is no .jsonl, .csv, .txt or .parquet file" if path.exists() else "no such file"
            raise InputError(wrong, hint=f"give a {', '.join(sorted(FILES))} file, a folder of pictures, or a hub id")
        else:
            found = read_hub(source, config=config, split=split or "train", limit=limit)
            rows = [_row(n, fields, label, record, None) for n, record in enumerate(found, 1)]
        if not rows:
            raise InputError("holds no rows")
    return rows


def count(path: Path, most: int) -> int:
    """Return the number of rows of a file, counted up to `most`. InputError: it cannot be read."""
    with context(f"calibration data {path.name}"):
        return sum(1 for _ in itertools.islice(_records(path), most))


def is_of_hub(source: str, folder: Path) -> bool:
    """Tell whether `source` is the id of a hub data set; a file or folder beside the recipe takes precedence."""
    return not (folder / source).exists() and Path(source).suffix not in FILES and is_hub_id(source)


def local_files(source: str, folder: Path) -> list[Path]:
    """Return the local files of `source`: one file, or a folder's pictures; none for a hub data set."""
    path = folder / source
    if path.is_dir():
        return sorted(Path(name) for name in _below(path) if Path(name).suffix.lower() in PICTURES)
    return [path] if path.is_file() else []


def _below(folder: Path) -> Iterator[str]:
    """Yield all files below a folder; links to folders are not followed. InputError: too many."""
    listed = 0
    pending = [str(folder)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    listed += 1
                    if listed > MAX_ENTRIES:
                        message = f"holds more than {MAX_ENTRIES:,} files and folders"
                        raise InputError(message, hint="name a folder that holds pictures only")
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        yield entry.path
        except OSError as error:
            raise input_error(error) from error


def select(rows: Sequence[DataRow], count: int, seed: int) -> list[DataRow]:
    """Return `count` of the rows, in order; the choice depends on the seed and the number of rows alone."""

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()

    return [rows[i] for i in sorted(sorted(range(len(rows)), key=rank)[:count])]


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


def _row(
    number: int, fields: Sequence[str], label: str | None, record: Mapping[str, Any], folder: Path | None
) -> DataRow:
    if fields == ["text"] and record.get("text") is None:
        if all(record.get(name) is not None for name in ANSWERED):
            return _answered(number, label, record)
        if isinstance(record.get(MESSAGES), list):
            fields = [MESSAGES]
    if len(fields) == 1 and isinstance(record.get(fields[0]), list):
        return _chat(number, label, record, record[fields[0]])
    for name in [*fields, *([label] if label else [])]:
        if record.get(name) is None:
            raise InputError(
                f"row {number}: {'nothing in' if name in record else 'no'} field {name!r}",
                hint=f"its fields are {', '.join(map(repr, record))[:400]}: set calibration.text and calibration.label",
            )
    values = [record[name] for name in fields]
    _check_text(number, *values, record[label] if label else None)
    if len(values) == 1 and isinstance(values[0], str) and folder and Path(values[0]).suffix.lower() in PICTURES:
        values = [folder / values[0]]
    if len(values) > 1 and not all(isinstance(v, str) for v in values):
        raise InputError(f"row {number}: sentence pairs need two texts")
    return DataRow(values[0] if len(values) == 1 else tuple(values), record[label] if label else None, number)


def _answered(number: int, label: str | None, record: Mapping[str, Any]) -> DataRow:
    """Return a row of a prompt and a completion. The completion is the label if the row has no other."""
    prompt, completion = (record[name] for name in ANSWERED)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(number, label, record, [*prompt, *completion])
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise InputError(f"row {number}: prompt and completion need to be two texts, or two lists of messages")
    told = _told(label, record, completion)
    _check_text(number, prompt, completion, told)
    return DataRow(prompt, told, number, completion)


def _chat(number: int, label: str | None, record: Mapping[str, Any], messages: Sequence[Any]) -> DataRow:
    """Return a row of a chat. Its answer is the completion, and the label if the row has no other."""
    if record.get("tools"):
        raise InputError(f"row {number}: a chat with tools, which are not read", hint="take the row out")
    chat, answer = chat_of(number, messages)
    told = _told(label, record, answer)
    _check_text(number, *(text for message in chat.messages for text in message), answer, told)
    return DataRow(chat, told, number, answer)


def _told(label: str | None, record: Mapping[str, Any], answer: str | None) -> Any:
    """Return the label of an answered row: its field's, or else the answer; None without a `label`."""
    if label is None:
        return None
    return answer if record.get(label) is None else record[label]


def _check_text(number: int, *values: Any) -> None:
    """Raise InputError for a text among the values that has no UTF-8."""
    try:
        "".join(value for value in values if isinstance(value, str)).encode()
    except UnicodeEncodeError:
        raise InputError(f"row {number}: half a surrogate pair, which is no text") from None


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(f"has {size:,} bytes, more than {MAX_BYTES:,}", hint="take some of its rows")
        if path.suffix == ".parquet":
            yield from enumerate(_parquet(path), 1)
            return
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin a CSV with a mark
            if path.suffix == ".csv":
                yield from enumerate(csv.DictReader(file, strict=True), 1)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, {"text": line.strip()} if path.suffix == ".txt" else _object(number, line)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error}") from None
    except csv.Error as error:
        raise InputError(f"not CSV: {error}") from None
    except OSError as error:
        raise input_error(error) from error


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError("reading Parquet needs the pyarrow package", hint=WITHOUT_DATA) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(READ_AT_ONCE):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise InputError(f"not Parquet: {_line(error)}") from None


def _object(number: int, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except RecursionError:
        raise InputError(f"row {number}: nested too deeply") from None
    except ValueError as error:  # not JSON, or a number with more digits than Python parses
        raise InputError(f"row {number}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"row {number}: not a JSON object")
    return value


def _pictures(folder: Path, *, labelled: bool) -> Iterator[DataRow]:
    found = local_files("", folder)
    if not found:
        raise InputError("the folder holds no pictures", hint=f"names must end in {', '.join(sorted(PICTURES))}")
    for number, file in enumerate(found, 1):
        if labelled and file.parent == folder:
            raise InputError(f"{file.name} lies in no folder named after its label")
        yield DataRow(file, file.parent.name if labelled else None, number)


POSITIONS = ("max_position_embeddings", "n_positions")  # keys of config.json
LANGUAGE = frozenset({"causal-lm", "text-generation"})


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
            hint="give more data, or lower calibration.sequences",
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
    _check_model(calibration, config)
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


def _check_model(calibration: Calibration, config: Mapping[str, Any]) -> None:
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
            hint=f"set it to {positions} or less",
        )


HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?", re.ASCII)
SHOWN_OF_ERROR = 200  # characters of a foreign error that are shown


def is_hub_id(source: str) -> bool:
    """Tell whether `source` has the form org/name or org/name@revision."""
    return HUB_ID.fullmatch(source) is not None


@cache
def commit(source: str) -> str | None:
    """Return the commit of `org/name[@revision]`; offline the revision that the source states, or None."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    found = HUB_ID.fullmatch(source)
    assert found is not None
    name, revision = found["id"], found["revision"]
    if constants.HF_HUB_OFFLINE or (revision and re.fullmatch("[0-9a-f]{40}", revision)):
        return revision
    page = f"{constants.ENDPOINT}/datasets/{name}"
    try:
        return commit_of(f"datasets/{name}", revision)
    except InputError:
        raise
    except hub.GatedRepoError:
        raise InputError("is gated on the hub", hint=f"accept its terms at {page}, then `hf auth login`") from None
    except hub.RepositoryNotFoundError:
        raise InputError(
            "no such file, and no such data set on the hub",
            hint="give a .jsonl, .csv or .txt file beside the recipe; for a private data set `hf auth login`",
        ) from None
    except hub.RevisionNotFoundError:
        raise InputError(f"has no revision {revision}", hint=f"see {page}/tree/main") from None
    except Exception as error:
        raise InputError(
            f"{constants.ENDPOINT} cannot be asked for it: {_line(error)}", hint="HF_HUB_OFFLINE=1 uses the cache"
        ) from None


@cache
def read_hub(source: str, *, config: str | None, split: str, limit: int) -> tuple[Mapping[str, Any], ...]:
    """Return the first `limit` rows; streamed, or offline from the cache of `datasets`.

    InputError: `datasets` is missing, or cannot read the data set.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("reading a hub data set needs the datasets package", hint=WITHOUT_DATA) from None
    from huggingface_hub import constants

    found = HUB_ID.fullmatch(source)
    assert found is not None
    offline = bool(constants.HF_HUB_OFFLINE)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(found["id"], config, split=split, revision=commit(source), streaming=not offline)
        return tuple(itertools.islice(rows, limit))
    except InputError:
        raise
    except Exception as error:
        hint = "see calibration.config and calibration.split"
        if offline:
            hint = "HF_HUB_OFFLINE is set: unset it, or load the data set once with datasets.load_dataset"
        raise InputError(f"datasets cannot read it: {_line(error)}", hint=hint) from None


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN_OF_ERROR else f"{text[:SHOWN_OF_ERROR]}…"
