"""GGUF files: ggml's types, headers, and files as llama.cpp's converter writes them.

A file is "GGUF", version, counts, key-value pairs, a table of tensors, and their aligned bytes:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A header is checked before anything in it is believed, and no
byte of a weight is read for it. Headers are written by the `gguf` package, tensors a few rows at a time.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.errors import InputError, OutputError
from deltamerge.files import progress
from deltamerge.files.descriptors import flat, output_error
from deltamerge.formats.safetensors import opened_weights
from deltamerge.tensors.dtypes import bits_type, widen
from deltamerge.tensors.tensor import Read, TensorInfo

if TYPE_CHECKING:
    import gguf


MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_PAIRS, MAX_TENSORS, MAX_ITEMS, MAX_TEXT, MAX_DIMENSIONS = 100_000, 200_000, 1 << 24, 1 << 26, 4
NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
TEXT, ARRAY = 8, 9
# Factors of a rotary embedding.
FACTORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
MAX_FACTORS = 1 << 16
ALIGNMENT = 32
AGAIN = "download it again"
PLAIN = {0: "F32", 1: "F16", 30: "BF16"}  # ggml's types that are no blocks


# ggml's types.


@cache
def package(what: str = "GGUF files need gguf") -> Any:
    """Return the gguf package. InputError: it is not installed; `what` names the need for it."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise InputError(what, hint="pip install 'deltamerge[gguf]'") from None
    return gguf


@cache
def block_of(kind: int) -> tuple[int, int]:
    """Return the elements and bytes of a block of a ggml type. InputError: gguf cannot decode the type."""
    gguf = package()
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise InputError(f"its type is {kind}, which gguf {version('gguf')} does not know") from None
    if kind not in PLAIN and known not in gguf.quants._type_traits:
        raise InputError(f"its type is {known.name}, which gguf {version('gguf')} cannot turn into numbers")
    elements, nbytes = gguf.GGML_QUANT_SIZES[known]
    return elements, nbytes


def type_name(kind: int) -> str:
    """Return ggml's name of a type ("Q4_K")."""
    return str(package().GGMLQuantizationType(kind).name)


# Headers.


@dataclass(frozen=True, slots=True)
class GgufBlock:
    """A tensor of a GGUF file.

    kind    ggml's number of its type
    shape   with the slowest dimension first
    begin   of its bytes in the file, and `nbytes` of them
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    path: Path
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A file's key-value pairs and tensors. For arrays of texts only the number of items is kept.

    `factors` are the bytes of the small tensors that belong to the config (`FACTORS`).
    """

    path: Path
    pairs: Mapping[str, Any]
    blocks: tuple[GgufBlock, ...]
    size: int
    factors: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Return llama.cpp's name of the architecture."""
        return str(self.pairs["general.architecture"])


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the header of the GGUF file at `path`; errors name the file.

    InputError: unreadable, a link that leaves its folder, or no valid header (see `parse_gguf_header`).
    """
    with opened_weights(path) as (file, size), progress.phase(f"reading {path.name}", 0, "tokens"):
        header = parse_gguf_header(file.read, path, size)
        return with_factors(header, lambda begin, count: os.pread(file.fileno(), count, begin))


def parse_gguf_header(read: Callable[[int], bytes], path: Path, size: int) -> GgufHeader:
    """Return the header of a file of `size` bytes whose next bytes `read` returns.

    InputError: no GGUF, another version, big-endian, truncated, counts or texts beyond bounds, a name twice, no
    architecture, a type that gguf does not know, or a tensor outside its allowed place.
    """
    cursor = _Cursor(read, size)
    if cursor.take(4) != MAGIC:
        raise InputError("is no GGUF file")
    version = cursor.number("<I")
    if version not in VERSIONS:
        what = "big-endian" if struct.unpack(">I", struct.pack("<I", version))[0] in VERSIONS else f"version {version}"
        raise InputError(f"is GGUF of {what}, known are versions 2 and 3")
    tensors, count = cursor.count(MAX_TENSORS, "tensors"), cursor.count(MAX_PAIRS, "keys")
    pairs: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text(1 << 16)
        if key in pairs:
            raise InputError(f"key {key[:80]!r} twice")
        pairs[key] = cursor.value(cursor.number("<I"))
    if not isinstance(pairs.get("general.architecture"), str):
        raise InputError("has no general.architecture")
    alignment = pairs.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment % 8:
        raise InputError(f"its alignment is {str(alignment)[:40]}")
    table = [_entry(cursor) for _ in range(tensors)]
    begin = -(-cursor.at // alignment) * alignment
    blocks = tuple(_block(*entry, path, begin, size, alignment) for entry in table)
    if len({block.name for block in blocks}) < len(blocks):
        raise InputError("has two tensors of one name", hint=AGAIN)
    return GgufHeader(path, pairs, blocks, size)


def with_factors(header: GgufHeader, read: Callable[[int, int], bytes]) -> GgufHeader:
    """Return the header with its factors; `read` returns bytes of the file (first, count)."""
    found = [block for block in header.blocks if block.name in FACTORS]
    for block in found:
        if block.kind or block.nbytes > MAX_FACTORS:
            raise InputError(f"{block.name}: is no short vector of float32")
    return replace(header, factors={block.name: read(block.begin, block.nbytes) for block in found})


@dataclass(slots=True)
class _Cursor:
    """The bytes of a header, one after the other."""

    read: Callable[[int], bytes]
    size: int
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise InputError("is truncated: its header ends early", hint=AGAIN)
        raw = self.read(count)
        if len(raw) != count:
            raise InputError("is truncated: its header ends early", hint=AGAIN)
        self.at += count
        return raw

    def number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def count(self, most: int, what: str) -> int:
        value: int = self.number("<Q")
        if value > most:
            raise InputError(f"has {value:,} {what}, more than {most:,}")
        return value

    def text(self, most: int = MAX_TEXT) -> str:
        raw = self.take(self.count(most, "bytes in a text"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise InputError(f"a text is not UTF-8: {raw[:40]!r}") from None

    def value(self, kind: int) -> Any:
        """Return the next value, or the number of items of an array of texts."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise InputError(f"a value is of type {kind}, which GGUF does not have")
        inner, count = self.number("<I"), self.count(MAX_ITEMS, "items in an array")
        if inner in NUMBERS:
            form = f"<{count}{NUMBERS[inner][1]}"
            return list(struct.unpack(form, self.take(struct.calcsize(form))))
        if inner != TEXT:
            raise InputError(f"an array is of type {inner}, which is not read")
        for _ in range(count):
            self.take(self.count(MAX_TEXT, "bytes in a text"))
        return count


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return the name, shape, type and offset of the next tensor in the table."""
    name = cursor.text(1 << 12)
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise InputError(f"{name[:80]}: has {dimensions} dimensions")
    sizes = [cursor.count(1 << 48, "elements along a side") for _ in range(dimensions)]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    return name, tuple(reversed(sizes)), kind, offset


def _block(
    name: str, shape: tuple[int, ...], kind: int, offset: int, path: Path, begin: int, size: int, alignment: int
) -> GgufBlock:
    with errors.context(name[:80]):
        elements, nbytes = block_of(kind)
        if 0 in shape or shape[-1] % elements:
            raise InputError(f"its rows of {shape[-1]} are no whole blocks of {elements}", hint=AGAIN)
        total = math.prod(shape) // elements * nbytes
        if offset % alignment or begin + offset + total > size:
            raise InputError(f"its {total:,} bytes at {offset:,} do not lie in the file", hint=AGAIN)
        return GgufBlock(name, kind, shape, path, begin + offset, total)


# Files, written.


ALIGN = 32
CHUNK = 1 << 20  # elements converted at once, in whole rows
TYPES = {"q8_0": "Q8_0", "f16": "F16", "bf16": "BF16"}
FILE_TYPES = {"q8_0": 7, "f16": 1, "bf16": 32}  # llama.cpp's LLAMA_FTYPE
NEEDED = "output.gguf needs the gguf package"
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor to write to a GGUF file.

    source   the tensor to read
    type     ggml's name of its type
    order    order of its rows; None: unchanged
    plus     number to add to its values
    """

    name: str
    source: TensorInfo
    type: str
    order: Rows | None = None
    plus: float = 0.0

    @property
    def row(self) -> int:
        """Return the elements of a row. A vector whose entries are reordered has rows of one element."""
        if len(self.source.shape) < 2 and self.order is not None:
            return 1
        return self.source.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.source.shape) // max(1, self.row)


def type_of(name: str, shape: Sequence[int], wanted: str) -> str:
    """Return the type that llama.cpp's converter gives a tensor.

    Vectors and norms are F32, rows that 32 does not divide F16.
    """
    if len(shape) <= 1 or name.endswith("_norm.weight"):
        return "F32"
    return "F16" if wanted == "q8_0" and shape[-1] % ALIGN else TYPES[wanted]


def write(
    path: Path, arch: str, describe: Callable[[gguf.GGUFWriter], None], tensors: Iterable[GgufTensor], read: Read
) -> None:
    """Write a GGUF file. `describe` adds the metadata.

    OutputError: a type cannot hold a value, or the disk fails.
    """
    gguf = package(NEEDED)
    listed = list(tensors)
    header = gguf.GGUFWriter(path, arch)
    describe(header)
    for tensor in listed:
        kind = gguf.GGMLQuantizationType[tensor.type]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (*tensor.source.shape[:-1], tensor.source.shape[-1] // block * size)
        header.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), kind)
    header.write_header_to_file()
    header.write_kv_data_to_file()
    header.write_ti_data_to_file()
    header.close()
    size = sum(math.prod(tensor.source.shape) for tensor in listed)
    try:
        with path.open("ab") as file, progress.phase(f"writing {path.name}", size, "weights") as writing:
            _pad(file)
            for tensor in listed:
                with errors.context(tensor.name):
                    for piece, count in _pieces(tensor, read):
                        file.write(flat(piece))
                        writing.step(count)
                    _pad(file)
    except OSError as error:
        raise output_error(error) from error


def _pieces(tensor: GgufTensor, read: Read) -> Iterator[tuple[NDArray[Any], int]]:
    """Yield a tensor's bytes to write, piece by piece, with the number of weights in each."""
    gguf = package(NEEDED)
    kind = gguf.GGMLQuantizationType[tensor.type]
    step = max(1, CHUNK // max(1, tensor.row))
    for top in range(0, tensor.rows, step):
        values = _rows(tensor, read, top, min(tensor.rows, top + step))
        if tensor.plus:
            values = values + np.float32(tensor.plus)
        with np.errstate(over="ignore"):
            made = gguf.quants.quantize(values, kind)
        if tensor.type == "F16" and not np.isfinite(made).all():
            raise OutputError("holds values beyond 65504, where float16 ends", hint="output: {gguf: bf16}")
        yield np.ascontiguousarray(made), values.size


def _rows(tensor: GgufTensor, read: Read, top: int, bottom: int) -> NDArray[np.float32]:
    """Return rows [top, bottom) of the file's tensor, in float32."""
    source, row = tensor.source, tensor.row
    found = np.empty((bottom - top, row), bits_type(source.dtype))
    if tensor.order is None:
        read.read_into(source, top * row, found)
    else:
        order = tensor.order[top:bottom]
        ends = [*(np.flatnonzero(np.diff(order) != 1) + 1).tolist(), len(order)]
        begin = 0
        for end in ends:
            read.read_into(source, int(order[begin]) * row, found[begin:end])
            begin = end
    return np.asarray(widen(found, source.dtype), np.float32)


def _pad(file: Any) -> None:
    file.write(bytes(-file.tell() % ALIGN))
