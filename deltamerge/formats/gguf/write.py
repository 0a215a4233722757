"""GGUF files as llama.cpp's converter writes them: the header by the `gguf` package, tensors a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.errors import OutputError
from deltamerge.files import progress
from deltamerge.files.descriptors import flat, output_error
from deltamerge.formats.gguf.header import package
from deltamerge.tensors.dtypes import bits_type, widen
from deltamerge.tensors.tensor import Read, TensorInfo

if TYPE_CHECKING:
    import gguf

ALIGN = 32
CHUNK = 1 << 20  # elements converted at once, in whole rows
TYPES = {"q8_0": "Q8_0", "f16": "F16", "bf16": "BF16"}
FILE_TYPES = {"q8_0": 7, "f16": 1, "bf16": 32}  # llama.cpp's LLAMA_FTYPE
NEEDED = "output.gguf needs the gguf package"
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor to write to a GGUF file.

    source   what it is read from
    type     ggml's name of its type
    order    of its rows; None: as they are
    plus     added to its values
    """

    name: str
    source: TensorInfo
    type: str
    order: Rows | None = None
    plus: float = 0.0

    @property
    def row(self) -> int:
        """Return the elements of a row; a vector whose entries are moved has rows of one."""
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

    OutputError: a value that its type cannot hold, or what the disk says.
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
    """Yield what is written of a tensor, piece by piece, and how many weights each has."""
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
