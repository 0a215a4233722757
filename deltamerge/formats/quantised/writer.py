"""Weights that are stored coded, on their way to files: float32 rows are collected, coded together, and written."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.errors import OutputError
from deltamerge.files.descriptors import flat, output_error, reserve
from deltamerge.formats.quantised.coder import Adjustable, Coding, Unit
from deltamerge.formats.quantised.codes import Doubles
from deltamerge.formats.quantised.feedback import Feedback, total
from deltamerge.formats.quantised.scheme import bits
from deltamerge.tensors.dtypes import ITEMSIZE, widen
from deltamerge.tensors.tensor import Read

LARGE = 1 << 26  # bytes; larger units are collected in a file, which the system may page out
NOT_FINITE = "write it plain, with output.quantization: none"

Squares = tuple[float, ...]
Losses = dict[str, Squares]
"""(Σ (x − stored)², Σ x²) of coded weights by name, or with a `rounding` all `SquareSums` of feedback.py."""
MomentsOf = Callable[[str, int], Doubles | None]
"""Returns the second moments of the inputs of a weight's matrix, by its name and number. None: there are none."""


class CodedSink(Protocol):
    """The part of `safetensors.Writer` that takes codes."""

    @property
    def records(self) -> Iterable[Mapping[str, Any]]:
        """The records of an interrupted run."""

    def where(self, name: str, offset: int) -> tuple[str, int]:
        """Return the file and offset of byte `offset` of a tensor."""

    def has(self, name: str, offset: int, nbytes: int) -> bool:
        """Return whether bytes of a tensor are written already."""

    def lend(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return memory for bytes of a tensor."""

    def give(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Take back lent memory, now filled."""

    def write(self, name: str, offset: int, data: Any) -> None:
        """Take bytes of a tensor."""

    def note(self, key: str, name: str, values: Mapping[Any, Any]) -> None:
        """Add values of a tensor to the next record."""


@dataclass(eq=False)
class _OpenUnit:
    """A unit that is being collected: its values, and how many are missing."""

    values: NDArray[np.float32]
    missing: int


@dataclass
class CodedWriter:
    """Codes the weights in `codings` and hands everything else to `writer`; used from any thread.

    Rows wait in memory until their unit is complete; at most a few units of a tensor are open at once. The loss by
    coding is noted by unit in `found`, and in the writer's journal, so that a resumed run knows it.
    OutputError: a value to be coded is not finite.
    """

    writer: CodedSink
    codings: Mapping[str, Coding]
    reader: Read
    folder: Path
    moments: MomentsOf = lambda name, matrix: None
    found: dict[str, dict[int, Squares]] = field(default_factory=dict)
    _open: dict[tuple[str, int], _OpenUnit] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for record in self.writer.records:
            for name, units in record.get("coded", {}).items():
                self.found.setdefault(name, {}).update({int(start): tuple(sums) for start, sums in units.items()})

    def where(self, name: str, offset: int) -> tuple[str, int]:
        """Return the file and offset that byte `offset` of tensor `name` is written near."""
        coding = self.codings.get(name)
        if coding is None:
            return self.writer.where(name, offset)
        part, begin, _ = next(coding.places(next(coding.units(offset // 4, offset // 4 + 1))))
        return self.writer.where(part.name, begin)

    def has(self, name: str, offset: int, nbytes: int) -> bool:
        """Return whether bytes [offset, offset + nbytes) of tensor `name` are coded and written already."""
        coding = self.codings.get(name)
        if coding is None:
            return self.writer.has(name, offset, nbytes)
        return all(self._has(name, coding, unit) for unit in coding.units(offset // 4, (offset + nbytes) // 4))

    def lend(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return memory for bytes of a tensor, which `give` hands back."""
        return np.empty(nbytes, np.uint8) if name in self.codings else self.writer.lend(name, offset, nbytes)

    def give(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Take lent memory, filled."""
        if name in self.codings:
            self.write(name, offset, buffer)
        else:
            self.writer.give(name, offset, buffer)

    def write(self, name: str, offset: int, data: Any) -> None:
        """Take bytes of a tensor from byte `offset` on."""
        coding = self.codings.get(name)
        if coding is None:
            self.writer.write(name, offset, data)
            return
        values = np.frombuffer(flat(data), np.float32)
        start, stop = offset // 4, offset // 4 + len(values)
        for unit in coding.units(start, stop):
            low, high = max(start, unit.start), min(stop, unit.stop)
            piece = values[low - start : high - start]
            if len(piece) == unit.stop - unit.start:
                self._code(name, coding, unit, piece)
            else:
                self._collect(name, coding, unit, low - unit.start, piece)

    def losses(self) -> Losses:
        """Return the loss of each weight by coding; it is 0 where the bytes are another model's."""
        return {name: _summed(units) for name, units in sorted(self.found.items())}

    def _collect(self, name: str, coding: Coding, unit: Unit, at: int, piece: NDArray[np.float32]) -> None:
        key = name, unit.start
        with self._lock:
            held = self._open.get(key)
            if held is None:
                if self._has(name, coding, unit):
                    return
                held = self._open[key] = self._opened(unit.stop - unit.start)
        held.values[at : at + len(piece)] = piece
        with self._lock:
            held.missing -= len(piece)
            if held.missing:
                return
            del self._open[key]
        self._code(name, coding, unit, held.values)

    def _opened(self, count: int) -> _OpenUnit:
        if 4 * count <= LARGE:
            return _OpenUnit(np.empty(count, np.float32), count)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:  # its memory outlives it
                reserve(file.fileno(), 4 * count)
                return _OpenUnit(np.memmap(file, np.float32, "r+", shape=(count,)), count)
        except OSError as error:
            raise output_error(error) from error

    def _has(self, name: str, coding: Coding, unit: Unit) -> bool:
        places = coding.places(unit)
        known = unit.start in self.found.get(name, ())
        return known and all(self.writer.has(part.name, begin, end - begin) for part, begin, end in places)

    def _code(self, name: str, coding: Coding, unit: Unit, values: NDArray[np.float32]) -> None:
        with errors.context(name):
            rounding = self._rounding(name, coding, unit, values)
            if coding.like is not None and self._unchanged(coding, unit, values):
                if rounding is not None:
                    rounding.keep(values.reshape(-1, coding.matrix[1]))
                self._note(name, unit, (0.0, _square(values)) if rounding is None else total(rounding.sums))
                self._copy(coding, unit)
                return
            if not np.isfinite(values).all():
                count = len(values) - int(np.isfinite(values).sum())
                raise OutputError(f"{count} values are not finite, and cannot be quantised", hint=NOT_FINITE)
            matrix = values.reshape(-1, coding.matrix[1])
            if rounding is None:
                arrays, lost = coding.coder.encode(matrix, self.reader)
                self._note(name, unit, (lost, _square(values)))
            else:
                assert isinstance(coding.coder, Adjustable)
                arrays, _ = coding.coder.encode(matrix, self.reader, rounding)
                self._note(name, unit, total(rounding.sums))
            for (part, begin, end), array in zip(coding.places(unit), arrays, strict=True):
                if array.nbytes != end - begin:
                    raise RuntimeError(f"{part.name}: {array.nbytes} bytes coded, {end - begin} planned")
                self.writer.write(part.name, begin, np.ascontiguousarray(array))

    def _rounding(self, name: str, coding: Coding, unit: Unit, values: NDArray[np.float32]) -> Feedback | None:
        """Return the object that chooses or measures the codes of a unit.

        None: they are the nearest, and not measured.
        """
        if coding.rounding is None:
            return None
        rows, columns = coding.shape[-2:]
        first = unit.start // (rows * columns)
        delta = None
        if coding.base is not None:
            delta = values - widen(bits(self.reader, coding.base, unit.start, len(values)), coding.base.dtype)
            delta = delta.reshape(-1, columns) if np.isfinite(delta).all() else None
        return Feedback(lambda number: self.moments(name, first + number), rows, delta, coding.rounding == "inputs")

    def _unchanged(self, coding: Coding, unit: Unit, values: NDArray[np.float32]) -> bool:
        """Return whether the values equal the model whose form is used. The first row is checked first."""
        assert coding.like is not None
        total = len(values)
        start = 0
        for stop in dict.fromkeys((min(total, coding.matrix[1]), total)):
            there = np.empty(stop - start, np.float32)
            self.reader.read_into(coding.like, unit.start + start, there)
            if not np.array_equal(there, values[start:stop], equal_nan=True):
                return False
            start = stop
        return True

    def _copy(self, coding: Coding, unit: Unit) -> None:
        for (part, begin, end), source in zip(coding.places(unit), coding.like_parts, strict=True):
            data = np.empty(end - begin, np.uint8)
            self.reader.read_into(source, begin // ITEMSIZE[source.dtype], data)
            self.writer.write(part.name, begin, data)

    def _note(self, name: str, unit: Unit, sums: Squares) -> None:
        with self._lock:
            self.found.setdefault(name, {})[unit.start] = sums
        self.writer.note("coded", name, {unit.start: sums})


def relative_error(sums: Iterable[Squares]) -> float:
    """Return ‖x − stored‖ / ‖x‖ of weights; 0 where nothing is lost."""
    pairs = list(sums)
    lost, norm = fsum(own[0] for own in pairs), fsum(own[1] for own in pairs)
    return float((lost / norm) ** 0.5) if lost and norm else 0.0


def _summed(units: Mapping[int, Squares]) -> Squares:
    return tuple(fsum(own) for own in zip(*units.values(), strict=True))


def _square(values: NDArray[np.float32]) -> float:
    """Return Σ x² in float64."""
    step = 1 << 18
    parts = (values[at : at + step] for at in range(0, len(values), step))
    return fsum(float(np.einsum("i,i->", part, part, dtype=np.float64, casting="safe")) for part in parts)
