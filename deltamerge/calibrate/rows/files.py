"""Rows of calibration data: .jsonl, .csv, .txt, .parquet, a folder of pictures, a hub data set.

No torch: `check` reads them.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge.calibrate.rows.chats import chat_of
from deltamerge.calibrate.rows.hub import WITHOUT_DATA, is_hub_id, one_line, read_hub
from deltamerge.errors import InputError, context
from deltamerge.files.descriptors import input_error

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
MAX_BYTES = 1 << 30
MAX_ENTRIES = 100_000  # files in a folder of pictures
FILES = frozenset({".jsonl", ".csv", ".txt", ".parquet"})
READ_AT_ONCE = 1000  # rows of a .parquet file
ANSWERED = ("prompt", "completion")  # fields, as TRL names them: texts, or messages
MESSAGES = "messages"  # field of a chat


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
    path = place_of(source, folder)
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
            raise _no_rows(path)
        else:
            found = read_hub(source, config=config, split=split or "train", limit=limit)
            rows = [_row(n, fields, label, record, None) for n, record in enumerate(found, 1)]
        if not rows:
            raise InputError("holds no rows")
    return rows


def _no_rows(path: Path) -> InputError:
    wrong = "is no .jsonl, .csv, .txt or .parquet file" if path.exists() else "no such file"
    return InputError(wrong, hint=f"give a {', '.join(sorted(FILES))} file, a folder of pictures, or a hub id")


def count(path: Path, most: int) -> int:
    """Return the number of rows of a file, counted up to `most`. InputError: it cannot be read."""
    with context(f"calibration data {path}"):
        if path.suffix not in FILES:
            raise _no_rows(path)
        return sum(1 for _ in itertools.islice(_records(path), most))


def place_of(source: str, folder: Path) -> Path:
    """Return the path of rows that a recipe in `folder` names; ~ is the home folder."""
    return folder / os.path.expanduser(source)


def is_of_hub(source: str, folder: Path) -> bool:
    """Tell whether `source` is the id of a hub data set; a file or folder beside the recipe takes precedence."""
    return not place_of(source, folder).exists() and Path(source).suffix not in FILES and is_hub_id(source)


def local_files(source: str, folder: Path) -> list[Path]:
    """Return the local files of `source`: one file, or a folder's pictures; none for a hub data set."""
    path = place_of(source, folder)
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
                hint=f"its fields are {', '.join(map(repr, record))[:400]}: name one as calibration.text or "
                "calibration.label, or with --text or --label",
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
        raise InputError(f"not Parquet: {one_line(error)}") from None


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
