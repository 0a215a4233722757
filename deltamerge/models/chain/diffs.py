"""Diffs of whole tensors as other projects store them: coded byte by byte, compressed, with the result's checksum.

    xor         new ^ old
    overwrite   a count (uint32), so many byte positions (uint32), and so many bytes to put there; little-endian

Each is one zstd frame. To read or write it Python needs zstd: its own from 3.14 on, else the package zstandard.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from xxhash import xxh3_128

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import flat, writing
from deltamerge.formats.delta.positions import Array
from deltamerge.tensors.reader import RecentParts
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed

CHECKSUMS: dict[str, Callable[[Any], str]] = {
    "xxh3-128": lambda data: xxh3_128(data).hexdigest(),
    "blake3": lambda data: blake3(data).hexdigest(),
    "adler32": lambda data: f"{zlib.adler32(data):08x}",
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
}
LEVEL = 1  # of zstd
PYTHONS = "compression.zstd"
LARGEST = 1 << 32  # bytes of a tensor that `overwrite` can have


@dataclass(frozen=True, slots=True)
class Diff:
    """A tensor of a version: the place and encoding of its compressed diff, and the new tensor's checksum."""

    version: str
    stored: TensorInfo
    encoding: str
    algorithm: str
    checksum: str


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A tensor that changes: its compressed diff, and the new tensor's checksum."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: bytes
    checksum: str


def code(
    name: str, dtype: str, shape: Sequence[int], old: Array, new: Array, encoding: str, algorithm: str
) -> CodedTensor | None:
    """Code the change from a tensor's bits `old` to `new`. None: there is none.

    InputError: the encoding cannot hold it, or there is nothing to compress it with.
    """
    before, after = old.view(np.uint8), new.view(np.uint8)
    if np.array_equal(before, after):
        return None
    with errors.context(name):
        if encoding == "xor":
            diff = before ^ after
        else:
            if after.size >= LARGEST:
                raise InputError(f"has {after.size} bytes, and overwrite takes less than {LARGEST}", hint="take xor")
            where = np.flatnonzero(before != after).astype("<u4")
            diff = np.concatenate([np.array([where.size], "<u4").view(np.uint8), where.view(np.uint8), after[where]])
        return CodedTensor(
            name, dtype, tuple(shape), after.size, compressed(diff.tobytes()), CHECKSUMS[algorithm](flat(after))
        )


class DiffFile:
    """A safetensors file of compressed diffs that is being written; memory holds one of them.

    tensors   the diffs in order: all but their data
    """

    def __init__(self, path: Path) -> None:
        self.path, self.tensors = path, list[CodedTensor]()
        self._sizes: list[int] = []
        with writing(path.parent):
            self._data = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # closed by `close`

    def add(self, tensor: CodedTensor) -> None:
        with writing(self.path):
            self._data.write(tensor.data)
        self._sizes.append(len(tensor.data))
        self.tensors.append(CodedTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, b"", tensor.checksum))

    @property
    def sizes(self) -> Mapping[str, int]:
        """Return the bytes of each compressed diff."""
        return {tensor.name: size for tensor, size in zip(self.tensors, self._sizes, strict=True)}

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Write the file; none if there are no diffs. Return its bytes."""
        if not self.tensors:
            return 0
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, size in self.sizes.items():
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with writing(self.path), self.path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            self._data.seek(0)
            shutil.copyfileobj(self._data, out, 1 << 20)
        return 8 + len(text) + end

    def close(self) -> None:
        self._data.close()


KEPT = 4  # tensors, whole


def patched(info: TensorInfo, diffs: Sequence[Diff], path: Path) -> Tensor:
    """Return a base's tensor as changed by the diffs of several versions. InputError is raised when it is read."""
    inputs = [info, *(diff.stored for diff in diffs)]
    return viewed(diffed, inputs, info.shape, info.dtype, diffs=tuple(diffs), label=info.name, path=path)


@view(whole_inputs=True)
def diffed(
    read: Read, tensor: Tensor, start: int, out: memoryview, *, diffs: tuple[Diff, ...], label: str, path: Path
) -> None:
    """Apply the diffs of several versions to the base's tensor, the first input; the others are the stored diffs."""
    kept: RecentParts = read.once("tensors of other projects' versions", lambda: RecentParts(KEPT))
    whole = kept.get(tensor, lambda: _made(read, tensor, diffs, label))
    begin = start * (tensor.nbytes // max(1, tensor.size))
    out[:] = flat(whole[begin : begin + len(out)])


def _made(read: Read, tensor: Tensor, diffs: Sequence[Diff], label: str) -> Array:
    made: Array = np.empty(tensor.nbytes, np.uint8)
    read.read_into(tensor.inputs[0], 0, made)
    for diff, source in zip(diffs, tensor.inputs[1:], strict=True):
        with errors.context(str(source.path)), errors.context(label):
            stored = np.empty(source.nbytes, np.uint8)
            read.read_into(source, 0, stored)
            _apply(made, decompressed(stored.tobytes(), _most(diff.encoding, made.size)), diff.encoding)
            if CHECKSUMS[diff.algorithm](flat(made)) != diff.checksum:
                raise InputError(
                    f"the result is not the tensor that {diff.version} has the checksum of",
                    hint="it is another base, or the version is damaged",
                )
    return made


def _most(encoding: str, size: int) -> int:
    return size if encoding == "xor" else 4 + 5 * size


def _apply(made: Array, diff: bytes, encoding: str) -> None:
    """Change a tensor's bytes. InputError: the diff is of another length, or has positions outside of it."""
    if encoding == "xor":
        if len(diff) != made.size:
            raise InputError(f"its diff has {len(diff)} bytes, the tensor {made.size}")
        made ^= np.frombuffer(diff, np.uint8)
        return
    count = int.from_bytes(diff[:4], "little")
    if len(diff) != 4 + 5 * count:
        raise InputError(f"its diff has {len(diff)} bytes, {count} entries take {4 + 5 * count}")
    positions = np.frombuffer(diff, "<u4", count, 4)
    if count and int(positions.max()) >= made.size:
        raise InputError(f"its diff has a position outside of the tensor's {made.size} bytes")
    made[positions] = np.frombuffer(diff, np.uint8, count, 4 + 4 * count)


def decompressed(data: bytes, most: int) -> bytes:
    """Return the content of a zstd frame. InputError: it is damaged or longer than `most`, or no zstd is installed."""
    try:
        found = _reader(data).read(most + 1)
    except InputError:
        raise
    except Exception as error:  # each of the packages has its own
        raise InputError(f"is not a zstd frame: {error}") from error
    if len(found) > most:
        raise InputError(f"its diff has more than {most} bytes")
    return bytes(found)


def _reader(data: bytes) -> Any:
    module = _module()
    if module.__name__ == PYTHONS:
        return module.ZstdFile(io.BytesIO(data))
    return module.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(data))


def compressed(data: bytes) -> bytes:
    """Return a zstd frame that states its content's size. InputError: no zstd is installed."""
    module = _module()
    return bytes(
        module.compress(data, LEVEL)
        if module.__name__ == PYTHONS
        else module.ZstdCompressor(level=LEVEL).compress(data)
    )


def _module() -> Any:
    for name in (PYTHONS, "zstandard"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise InputError("this needs zstd, which this Python lacks", hint="pip install zstandard, or Python 3.14")
