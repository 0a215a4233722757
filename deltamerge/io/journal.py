"""An append-only file of records, each with a checksum: what a crash tears at its end is dropped when it is read."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from deltamerge import errors
from deltamerge.io.files import input_error, output_error, sync, write_at

MAX_BYTES = 1 << 28
# run, force: what a run is, in the first record; done: spans of files; tensors: finished, of a delta; calibrated: q's
# are kept; part: one is complete
KINDS: dict[str, type] = {"run": dict, "force": bool, "done": dict, "tensors": dict, "calibrated": bool, "part": dict}


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of the journal at `path` up to the first that is not whole, and the bytes they take."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES)
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        with errors.context(str(path)):
            raise input_error(error) from error
    records: list[dict[str, Any]] = []
    whole = 0
    for line in raw.splitlines(keepends=True):
        checksum, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or checksum != xxh3_64_hexdigest(text).encode():
            break
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):  # no run wrote that
            break
        if not _is_record(record):
            break
        records.append(record)
        whole += len(line)
    return (records, whole) if records and records[0].keys() == {"run", "force"} else ([], 0)


def _is_record(record: Any) -> bool:
    """Whether a record has the form that runs write; the first one, without "run", makes the journal empty."""
    if not isinstance(record, dict) or any(not isinstance(v, KINDS.get(k, ())) for k, v in record.items()):
        return False
    spans = [span for spans in record.get("done", {}).values() for span in (spans if type(spans) is list else [None])]
    return all(type(span) is list and len(span) == 2 and all(type(x) is int and x >= 0 for x in span) for span in spans)


class Journal:
    """The journal at `path`, open to append after its last whole record. OutputError: it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.records, self._end = read_journal(path)
        with errors.context(str(path)):
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._fd, self._end)
            except OSError as error:
                raise output_error(error) from error

    def append(self, record: dict[str, Any]) -> None:
        """Add a record and have it on the disk before this returns."""
        text = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        line = xxh3_64_hexdigest(text).encode() + b" " + text
        with self._lock, errors.context(str(self.path)):
            write_at(self._fd, self._end, memoryview(line))
            sync(self._fd)
            self._end += len(line)
            self.records.append(record)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
