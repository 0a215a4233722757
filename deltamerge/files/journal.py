"""An append-only file of records with checksums; a record torn by a crash is dropped when the file is read."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from deltamerge import errors
from deltamerge.errors import OutputError
from deltamerge.files.descriptors import input_error, open_plain, sync, write_at, writing

JOURNAL = "journal"  # the name of a file
PART_JOURNAL = re.compile(r"journal-(\d+)-of-(\d+)")
MAX_BYTES = 1 << 28
# run, force: the run, in the first record; done: spans of files; tensors: finished, of a delta; coded: the loss of
# quantisation; calibrated: q's are kept; part: one is complete; publish: the folder that is about to get the
# target's name
KINDS: dict[str, type] = {
    "run": dict, "force": bool, "done": dict, "tensors": dict, "coded": dict, "calibrated": bool, "part": dict,
    "publish": dict,
}  # fmt: skip


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of the journal at `path` up to the first torn one, and the bytes they take.

    InputError: it cannot be read. OutputError: it is a link or no plain file.
    """
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
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
        except (ValueError, RecursionError):  # not written by a run
            break
        if not _is_record(record):
            break
        records.append(record)
        whole += len(line)
    return (records, whole) if records and records[0].keys() == {"run", "force"} else ([], 0)


def _is_record(record: Any) -> bool:
    """Return whether a record has the form that runs write. A first record without "run" makes the journal empty."""
    if not isinstance(record, dict) or any(not isinstance(v, KINDS.get(k, ())) for k, v in record.items()):
        return False
    part, inode = record.get("part"), record.get("publish", {"inode": 0}).get("inode")
    if type(inode) is not int or (part is not None and not _is_part(part)):
        return False
    coded = record.get("coded", {}).values()
    if not all(type(units) is dict and all(_is_sums(*unit) for unit in units.items()) for units in coded):
        return False
    spans = [span for spans in record.get("done", {}).values() for span in (spans if type(spans) is list else [None])]
    return all(type(span) is list and len(span) == 2 and all(type(x) is int and x >= 0 for x in span) for span in spans)


SUMS = (2, 9)  # numbers of a coded unit: plain, and with a rounding's measurements (formats/quantised/feedback.py)


def _is_sums(start: Any, sums: Any) -> bool:
    """Return whether a unit of a coded weight has its start, and two sums or a rounding's sums."""
    whole = type(start) is str and start.isdecimal() and len(start) < 20
    some = type(sums) is list and len(sums) in SUMS
    return whole and some and all(type(x) is float and 0 <= x < math.inf for x in sums)


def _is_part(part: dict[str, Any]) -> bool:
    keys, losses = part.keys(), part.get("losses", {})
    if keys - {"losses"} != {"inputs", "outputs"} or not all(isinstance(entries, dict) for entries in part.values()):
        return False
    if not all(_is_sums("0", sums) for sums in losses.values()):
        return False
    inputs = [entry.get("files") if isinstance(entry, dict) else None for entry in part["inputs"].values()]
    files = [part["outputs"], *inputs]
    return all(isinstance(f, dict) and all(map(_is_file, f.values())) for f in files)


def _is_file(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("hash")) is str and type(entry.get("size")) is int


def has_work(records: list[dict[str, Any]]) -> bool:
    """Return whether there is work that the next run would keep."""
    return any({"done", "tensors", "calibrated", "part"} & record.keys() for record in records)


def published_inode(records: list[dict[str, Any]]) -> int | None:
    """Return the inode of the folder that the run was about to rename to the target."""
    return next((record["publish"]["inode"] for record in reversed(records) if "publish" in record), None)


def check_facts(target: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OutputError with every fact that has changed since the unfinished work began."""
    if wrong := sorted(name for name in then.keys() | now.keys() if not _same(then.get(name), now.get(name))):
        raise OutputError(
            f"{target}: the unfinished work was begun with other inputs; different now: {', '.join(wrong)}",
            hint="put them back, files as they were and not copies of them; or start over with --force",
        )


def _same(then: Any, now: Any) -> bool:
    """Return whether two facts agree. Files on two machines are compared by size and modification time."""
    if isinstance(then, list) and isinstance(now, list) and then[-1:] != now[-1:]:
        return then[:2] == now[:2]
    return bool(then == now)


def part_journals(state: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of every part's journal in a work folder, by part ("2-of-8")."""
    names = sorted(path.name for path in state.glob(f"{JOURNAL}-*") if PART_JOURNAL.fullmatch(path.name))
    return {name.removeprefix(f"{JOURNAL}-"): read_journal(state / name)[0] for name in names}


class Journal:
    """The journal at `path`, opened to append after its last valid record. OutputError: it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.records, self._end = read_journal(path)
        with errors.context(str(path)), writing():
            self._fd = open_plain(path, os.O_WRONLY | os.O_CREAT)
            os.ftruncate(self._fd, self._end)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is on the disk when this returns."""
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


class Spans:
    """Bytes of a file that are done, as disjoint, ascending ranges [start, stop); adjacent ranges are joined."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in spans:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    @property
    def end(self) -> int:
        """Return the end of the last range, 0 if there is none."""
        return self._stops[-1] if self._stops else 0

    def add(self, start: int, stop: int) -> None:
        """Add the bytes [start, stop)."""
        if start >= stop:
            return
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def reach(self, position: int) -> int:
        """Return the end of the gapless run of bytes from `position` on; `position` if its byte is missing."""
        index = bisect_right(self._starts, position) - 1
        return max(position, self._stops[index]) if index >= 0 else position

    def count(self, start: int, stop: int) -> int:
        """Count the bytes of [start, stop) that are in the set."""
        return sum(max(0, min(stop, b) - max(start, a)) for a, b in self)
