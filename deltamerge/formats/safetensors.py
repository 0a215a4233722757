"""Headers of safetensors files, checked before anything in them is believed.

A file is 8 bytes (little-endian length n), n bytes of JSON, and the tensors' bytes without overlap or gap:
https://huggingface.co/docs/safetensors#format. No byte of a weight is read here.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import refuse_link
from deltamerge.files.strict_json import parse_json
from deltamerge.tensors.dtypes import ITEMSIZE, bits_of
from deltamerge.tensors.tensor import TensorInfo, stored

MAX_HEADER = 100_000_000
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 64
LARGEST = 1 << 63  # sizes and offsets are smaller
MOST_BITS = 1 << 64
PREFIX = 8

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors in the order of its header. `data_begin` (of the first tensor) and `size` (of the file) are
    bytes; `aliases` are further names of the same tensors."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_begin: int
    size: int
    aliases: frozenset[str] = frozenset()


def read_header(path: Path) -> Header:
    """The header of the safetensors file at `path`; errors name the file.

    InputError: unreadable, a link that leaves its folder, a git-lfs pointer, truncated or with bytes left over, or a
    header that is no valid safetensors header (see `parse_header`).
    """
    refuse_link(path)
    with errors.context(path.name):
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputError("is not a regular file")
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                length = header_length(file.read(PREFIX), size)
                return parse_header(file.read(length), path, size)
        except FileNotFoundError as error:
            raise InputError("no such file") from error
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}") from error


def header_length(first: bytes, size: int) -> int:
    """Bytes of JSON that the `first` 8 bytes of a file of `size` bytes announce. InputError: an impossible length."""
    if first == b"version ":
        raise InputError("is a git-lfs pointer, not the weights", hint="fetch the weights with `git lfs pull`")
    if size < PREFIX or len(first) < PREFIX:
        raise InputError(f"the file is truncated: it has {size} bytes", hint=_AGAIN)
    length = int.from_bytes(first[:PREFIX], "little")
    if length > MAX_HEADER:
        raise InputError(f"is not a safetensors file: its header would have {length:,} bytes, more than {MAX_HEADER:,}")
    if PREFIX + length > size:
        raise InputError(
            f"the file is truncated: its header ends at byte {PREFIX + length}, file has {size}", hint=_AGAIN
        )
    return length


def parse_header(text: bytes, path: Path, size: int) -> Header:
    """The header whose JSON is `text`, of the file at `path` of `size` bytes.

    What it accepts the official reader accepts too. tests/formats/test_safetensors_verdicts.py lists what only the
    official reader accepts.

    InputError: not a JSON object, a key twice, more than 200,000 tensors, names that do not print, unknown
    dtypes, shapes that are no lists of natural numbers or do not fit the offsets, tensors that overlap or
    leave holes, a file that is shorter or longer than its tensors need.
    """
    if not text.startswith(b"{"):
        raise InputError("is not a safetensors file: its header does not begin with {")
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        raise InputError(f"header has more than {MAX_TENSORS:,} tensors")
    with errors.context("header"):
        entries = parse_json(text, _integer if b"-0" in text else None)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("header: __metadata__ is not a table of strings")
    data_begin = PREFIX + len(text)
    tensors = {name: _tensor(name, entry, path, data_begin) for name, entry in entries.items()}
    _check_places(entries, data_begin, size)
    return Header(tensors, metadata, data_begin, size)


def _tensor(name: str, entry: Any, path: Path, data_begin: int) -> TensorInfo:
    if not (0 < len(name) <= 1000 and name.isprintable()):
        raise _wrong(name, "a name must have 1 to 1000 printable characters")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise _wrong(name, "must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _wrong(name, f"unknown dtype {str(dtype)[:80]!r}", hint=f"known are {', '.join(ITEMSIZE)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise _wrong(name, f"shape must be a list of at most {MAX_DIMENSIONS} natural numbers below 2**63")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _wrong(name, "data_offsets must be two natural numbers in ascending order")
    begin, end = offsets
    if _overflows(dtype, shape):
        raise _wrong(name, f"{dtype} of shape {str(shape)[:80]} has a size beyond 64 bits")
    nbytes, rest = divmod(bits_of(dtype, shape), 8)
    if rest:
        raise _wrong(name, f"{dtype} of shape {str(shape)[:80]} ends within a byte")
    if end - begin != nbytes:
        raise _wrong(name, f"{dtype} of shape {str(shape)[:80]} takes {nbytes} bytes, data_offsets give {end - begin}")
    return TensorInfo(name, stored(path, data_begin + begin, tuple(shape), dtype, name))


def _naturals(values: Any) -> bool:
    if type(values) is not list or not {int}.issuperset(map(type, values)):
        return False
    return not values or (min(values) >= 0 and max(values) < LARGEST)


def _overflows(dtype: str, shape: list[int]) -> bool:
    """Whether a size exceeds 64 bits before a 0 makes it nothing: readers that multiply in 64 bits refuse
    such shapes."""
    if math.prod(shape) and bits_of(dtype, tuple(shape)) < MOST_BITS:
        return False
    elements = list(accumulate(shape, mul, initial=1))
    return max(elements) >= MOST_BITS or bits_of(dtype, (elements[-1],)) >= MOST_BITS


def _integer(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no natural number")
    return int(text)


def _wrong(name: str, what: str, hint: str | None = None) -> InputError:
    return InputError(f"header: tensor {name[:80]!r}: {what}", hint=hint)


def _check_places(entries: Mapping[str, Any], data_begin: int, size: int) -> None:
    """InputError unless the tensors' bytes follow each other from the header to the end of the file."""
    end = 0
    for (begin, stop), name in sorted((entry["data_offsets"], name) for name, entry in entries.items()):
        if gap := begin - end:
            raise _wrong(name, f"leaves {gap} bytes before it unused" if gap > 0 else "overlaps the one before it")
        end = stop
    end += data_begin
    if end > size:
        raise InputError(f"the file is truncated: header promises {end} bytes, file has {size}", hint=_AGAIN)
    if end < size:
        raise InputError(f"header promises {end} bytes, file has {size}", hint=_AGAIN)
