"""JSON from strangers: bounded in size and depth, no duplicate keys, an object at the top level."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import refuse_link

MAX_BYTES = 100_000_000
T = TypeVar("T")
MAX_VALUES = 4_000_000
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes, parse_int: Callable[[str], int] | None = None) -> dict[str, Any]:
    """Return the JSON object in `raw`; `parse_int`, if given, converts its integers.

    InputError: not UTF-8, not an object, a duplicate key, half a surrogate pair, too deep, too many values.
    """
    if sum(map(raw.count, (b"{", b"[", b","))) > MAX_VALUES:
        raise InputError(f"holds more than {MAX_VALUES:,} values")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=parse_int)
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise InputError("JSON is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError("is not a JSON object")
    if SURROGATE.search(raw):
        _refuse_halves(value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of at most 100 MB that is no link out of its folder; errors name the file."""
    return _read(path, parse_json)


def read_list(path: Path) -> list[Any]:
    """Return the JSON list in the file at `path`, under the bounds of `read_json`."""

    def parse(raw: bytes) -> list[Any]:
        if not raw.lstrip().startswith(b"["):
            raise InputError("is not a JSON list")
        found: list[Any] = parse_json(b'{"":' + raw + b"}")[""]
        return found

    return _read(path, parse)


def read_bytes(path: Path) -> bytes:
    """Return the content of a small file, at most 100 MB and no link out of its folder; errors name the file."""
    return _read(path, bytes)


class SharedParts:
    """Reads JSON objects that share large parts. A part with a known text is not parsed again.

    Texts are kept up to the size of one file.
    """

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[str, Any]]] = {}
        self._left = MAX_BYTES

    def read(self, path: Path, inside: str) -> dict[str, Any]:
        """Read like `read_json`.

        The shared parts are the values of the object, and the values under its key `inside`.
        """
        return _read(path, lambda raw: self._parsed(raw, inside))

    def _parsed(self, raw: bytes, inside: str) -> dict[str, Any]:
        if sum(map(raw.count, (b"{", b"[", b","))) > MAX_VALUES or SURROGATE.search(raw):
            return parse_json(raw)
        try:
            text = raw.decode("utf-8")
            value, at = self._object(text, _gap(text, 0), "", inside)
            if _gap(text, at) == len(text):
                return value
        except (ValueError, IndexError, RecursionError):
            pass
        return parse_json(raw)  # which finds the fault

    def _object(self, text: str, at: int, place: str, inside: str) -> tuple[dict[str, Any], int]:
        """Return the object at a place of a text, and its end. ValueError, IndexError: there is none."""
        table: dict[str, Any] = {}
        at = _gap(text, _after(text, at, "{"))
        while text[at] != "}":
            if table:
                at = _gap(text, _after(text, at, ","))
            _after(text, at, '"')
            key, at = DECODER.raw_decode(text, at)
            at = _gap(text, _after(text, _gap(text, at), ":"))
            if key in table:
                raise ValueError("a key twice")
            if key == inside and not place and text[at] == "{":
                table[key], at = self._object(text, at, f"{key}.", inside)
            else:
                table[key], at = self._value(text, at, place + key)
            at = _gap(text, at)
        return table, at + 1

    def _value(self, text: str, at: int, place: str) -> tuple[Any, int]:
        for known, value in self._known.get(place, ()):
            if text.startswith(known, at):
                return value, at + len(known)
        value, end = DECODER.raw_decode(text, at)
        if isinstance(value, dict | list) and end - at <= self._left:  # whose texts no longer one begins with
            self._left -= end - at
            self._known.setdefault(place, []).append((text[at:end], value))
        return value, end


def _gap(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None
    return found.end()


def _after(text: str, at: int, sign: str) -> int:
    if text[at] != sign:
        raise ValueError(f"no {sign}")
    return at + 1


def _read(path: Path, parse: Callable[[bytes], T]) -> T:
    refuse_link(path)
    with errors.context(path.name):
        try:
            if not path.is_file():
                raise InputError("no such file")
            if (size := path.stat().st_size) > MAX_BYTES:
                raise InputError(f"has {size:,} bytes, more than {MAX_BYTES:,}")
            raw = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}") from error
        if raw.startswith(b"version https://git-lfs"):
            raise InputError("is a git-lfs pointer, not the file", hint="fetch the files with `git lfs pull`")
        return parse(raw)


def _refuse_halves(table: dict[str, Any]) -> None:
    """Raise InputError if a text or key holds half a surrogate pair, which UTF-8 cannot encode."""
    left: list[tuple[str, Any]] = list(table.items())
    while left:
        key, value = left.pop()
        if not _is_text(key):
            raise InputError(f"key {key[:80]!a}: half a surrogate pair, which is no text")
        if isinstance(value, str) and not _is_text(value):
            raise InputError(f"{key[:80]}: half a surrogate pair, which is no text")
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((key, item) for item in value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys: set[str] = set()
        for key, _ in pairs:
            if key in keys:
                raise InputError(f"key {key[:80]!r} twice")
            keys.add(key)
    return table


SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder(object_pairs_hook=_unique)
