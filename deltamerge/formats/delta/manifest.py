"""The manifest of a delta artifact: its form, and checks that records do not contradict themselves.

docs/reference/delta-format.md describes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from deltamerge.errors import InputError
from deltamerge.files.descriptors import is_plain_folder
from deltamerge.formats.components import MAX_COMPONENTS, Component
from deltamerge.formats.delta.parts import MOST_RANK, EntriesPart, FactorsPart, Part, matrix_shape
from deltamerge.formats.delta.positions import CODINGS, LARGEST_K, Coding, index_itemsize
from deltamerge.formats.delta.steps import MANTISSA
from deltamerge.formats.delta.values import SCALE_BITS, SCALED, UNITS, VALUE_BITS, Values
from deltamerge.formats.safetensors import MAX_DIMENSIONS
from deltamerge.tensors.dtypes import FLOATING, ITEMSIZE, LOW_BITS, PACKED

FORMAT = "deltamerge-delta"
# The first that will do is written: the second has steps, the third parts, the fourth trellis codes, the fifth
# stochastic rounding.
VERSIONS = (1, 2, 3, 4, 5)
LARGEST_SIZE = 1 << 61
SHARD_SIZE = 5 * 10**9
STORED_VALUES: dict[Values, str] = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "sign": "U8"}

Encoding = Coding | Literal["steps"]
ENCODINGS: tuple[Encoding, ...] = (*CODINGS, "steps")

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Natural = Annotated[int, Field(ge=0, lt=LARGEST_SIZE)]
Shape = Annotated[list[Natural], Field(max_length=MAX_DIMENSIONS)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Strict(BaseModel):
    """The content of a file of a delta: values of these types, and no other key."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


class Base(Strict):
    """The checkpoint that an artifact changes: `id` is a path or hub id, `commit` its resolved revision."""

    id: str
    commit: str | None = None

    def __str__(self) -> str:
        return self.id if self.commit is None else f"{self.id}@{self.commit}"


class Record(Strict):
    """One tensor of the result.

    shape, dtype   of the result; dtype is safetensors' code ("BF16")
    encoding, k    how positions are stored, and rice's k; "steps": positions and values, given the base's
    count          number of entries; 0: nothing is stored, the tensor is the base's
    values         None: final values, in `dtype`; else the coding of float32 values to add
    parts          of values "parts": the parts of the sum
    rounding       of parts: how the result is rounded; None: to the nearest
    group, unit    elements that share a scale, and the scales' unit (int8, sign)
    ranks          scale codes, the most common first, where scales are stored as ranks; None: as four bits each
    error          ‖v − stored v‖ / ‖v‖ of a lossy coding
    base, result   blake3 (128 bits) of the tensors' bytes; base is None for a tensor that the base lacks
    base_*         of the base's tensor, where it differs from the result's
    """

    shape: Shape
    dtype: str
    encoding: Encoding
    k: Annotated[int, Field(ge=0, le=LARGEST_K)] = 0
    count: Natural
    values: Values | Literal["parts"] | None = None
    parts: Annotated[list[Part], Field(max_length=8)] = []
    rounding: Literal["stochastic"] | None = None
    group: Annotated[int, Field(ge=1, lt=LARGEST_SIZE)] = 1
    unit: int = 0
    ranks: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,16}$")] | None = None
    error: float | None = None
    base: Digest | None = None
    base_name: Name | None = None
    base_shape: Shape | None = None
    base_dtype: str | None = None
    result: Digest

    def __hash__(self) -> int:
        return hash((self.result, self.base, self.encoding, self.count))

    @property
    def base_kind(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of the base's tensor."""
        return self.base_dtype or self.dtype, tuple(self.shape if self.base_shape is None else self.base_shape)


class ComponentRecord(Strict):
    """A folder of the result's weights, and how its weight files are called: `formats.components.Component`."""

    folder: Annotated[str, StringConstraints(max_length=400)]
    stem: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")] = "model"
    variant: Annotated[str, StringConstraints(pattern=r"^[\w-]*$", max_length=40)] = ""


class Manifest(Strict):
    """delta.json. Tensors of the base that are neither in `tensors` nor in `removed` are unchanged in the result.

    `components` are the folders of a result that has several; none: it is one model of transformers.
    """

    format: Literal["deltamerge-delta"] = "deltamerge-delta"
    version: Literal[1, 2, 3, 4, 5] = 1
    semantics: Literal["replace", "add"]
    base: Base
    shard_size: Annotated[int, Field(ge=1, lt=LARGEST_SIZE)] = SHARD_SIZE
    removed: list[Name] = []
    components: Annotated[list[ComponentRecord], Field(max_length=MAX_COMPONENTS)] = []
    tensors: dict[Name, Record]

    def as_components(self) -> tuple[Component, ...]:
        """Return the folders of the result's weights. InputError: it does not lie below the result's."""
        for part in self.components:
            if part.folder and not is_plain_folder(part.folder):
                raise InputError(f"{part.folder[:80]!r} is no folder of a component")
        return tuple(Component(p.folder, p.stem, p.variant) for p in self.components) or (Component(),)


def parts_of(components: Sequence[Component]) -> list[ComponentRecord]:
    """Return how a manifest names components; a plain model's are none."""
    if tuple(components) == (Component(),):
        return []
    return [ComponentRecord(folder=c.folder, stem=c.stem, variant=c.variant) for c in components]


def groups(record: Record) -> int:
    """Return the number of scales of a tensor."""
    return -(-math.prod(record.shape) // record.group)


def parts_bytes(record: Record) -> int:
    """Return the stored bytes of a tensor's parts."""
    m, n = matrix_shape(record.shape)
    return sum(part.nbytes(m, n) for part in record.parts)


def version_of(records: Iterable[Record]) -> int:
    """Return the first version of the format that has all that records say."""
    return max((_needed(record) for record in records), default=1)


def _needed(record: Record) -> int:
    if record.rounding:
        return 5
    if record.parts:
        return 4 if any(isinstance(part, FactorsPart) and part.has_trellis for part in record.parts) else 3
    return 2 if record.encoding == "steps" else 1


def stored_arrays(record: Record) -> dict[str, tuple[str, int | None]]:
    """Return the stored arrays of a tensor: suffix of the name -> (dtype, length; None if only decoding determines
    it)."""
    count, size = record.count, math.prod(record.shape)
    if not count or record.values == "parts":
        return {}
    if record.encoding == "steps":
        return {".steps": ("U8", None)}
    if record.values is None:
        arrays: dict[str, tuple[str, int | None]] = {".values": (record.dtype, count)}
    else:
        bits = VALUE_BITS[record.values]
        arrays = {".values": (STORED_VALUES[record.values], count if bits > 1 else -(-count // 8))}
        if record.values in SCALED:
            packed = -(-groups(record) * SCALE_BITS // 8)
            arrays[".scales"] = ("U8", packed if record.ranks is None else None)
    if record.encoding == "indices":
        arrays[".indices"] = (f"I{8 * index_itemsize(size)}", count)
    elif record.encoding != "dense":
        arrays[f".{record.encoding}"] = ("U8", -(-size // 8) if record.encoding == "bitmask" else None)
    return arrays


def check_record(record: Record) -> None:
    """InputError: the fields of a record contradict each other."""
    size = math.prod(record.shape)
    base_dtype = record.base_dtype or record.dtype
    if record.dtype not in ITEMSIZE or base_dtype not in ITEMSIZE:
        raise InputError(f"unknown dtype {record.dtype if base_dtype in ITEMSIZE else base_dtype!r}")
    if {record.dtype, base_dtype} & PACKED:
        raise InputError(f"{record.dtype} shares bytes between elements, which a delta cannot hold")
    if size >= LARGEST_SIZE or record.count > size:
        raise InputError(f"count is {record.count}, the tensor has {size} elements")
    if record.encoding == "dense" and record.count not in (0, size):
        raise InputError(f"dense, but count is {record.count} of {size} elements")
    if record.encoding == "steps" and (record.dtype not in MANTISSA or record.values or not record.count):
        raise InputError("steps are final values of BF16 or F16, of one element at least")
    if record.base is None:
        extra = record.base_name or record.base_shape or record.base_dtype or record.values
        if extra or record.count != size or record.encoding != "dense":
            raise InputError("has no base, so it must be dense, with final values")
    elif record.base_shape is not None:
        _check_growth(record.base_shape, record.shape)
    adds_or_casts = record.values is not None or base_dtype != record.dtype
    if adds_or_casts and not {base_dtype, record.dtype} <= FLOATING:
        raise InputError(f"cannot make {record.dtype} of {base_dtype}: not both are floating")
    if (record.values == "parts") != bool(record.parts):
        raise InputError("values are parts where there are parts, and only there")
    if record.rounding and (not record.parts or record.dtype not in LOW_BITS):
        raise InputError("rounding is of parts, and of results in BF16 or F16")
    if record.parts:
        _check_parts(record)
    if record.values in SCALED:
        lowest, highest = UNITS
        if not lowest <= record.unit <= highest:
            raise InputError(f"unit must be in [{lowest}, {highest}], got {record.unit}")


def _check_parts(record: Record) -> None:
    size = math.prod(record.shape)
    if record.encoding != "dense" or not record.count:
        raise InputError("parts are dense, of one element at least")
    for part in record.parts:
        if isinstance(part, EntriesPart):
            if part.count is None:
                if part.k or part.positions:
                    raise InputError("a part of all entries lists no positions")
            elif part.count > size:
                raise InputError(f"a part has {part.count} entries, the tensor has {size} elements")
        elif part.rank > MOST_RANK:
            raise InputError(f"a part has rank {part.rank}, at most {MOST_RANK} can be added exactly")


def _check_growth(old: list[int], new: list[int]) -> None:
    if len(old) != len(new) or not new or old[1:] != new[1:] or old[0] > new[0]:
        raise InputError(f"base_shape {old} is not {new} with fewer rows")
