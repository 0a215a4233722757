"""The files of a checkpoint, whose names, offsets and headers are all known before the first byte."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

from deltamerge.formats.components import Component, folders_of, split
from deltamerge.tensors.dtypes import FLOATING, nbytes_of

# The order of tensors in a file that safetensors.torch.save_file makes: by dtype in this order, then by name.
DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip


class Meta(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes; `offset` counts from the start of the file."""

    file: str
    offset: int
    nbytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A weight file: `header` is everything before the first tensor, `size` the whole file in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All weight files of a checkpoint, each tensor's place, and the texts of indexes by their paths, where there are
    shards."""

    files: tuple[FileLayout, ...]
    tensors: dict[str, Place]
    indexes: dict[str, str]
    total_size: int


def plan_layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    shard_size: int | None,
    components: Sequence[Component] = (Component(),),
    weights: Mapping[str, str] | None = None,
) -> Layout:
    """The place of each (name, dtype, shape), in files with the bytes that transformers would write.

        tensors      in the order in which shards are filled
        shard_size   bytes of a shard at most, a larger tensor has one of its own; None: one file
        components   the folders that the tensors are of, and how their files are called
        weights      of tensors that together store one weight, its name: they follow one another, and share a shard

    Shards are those of huggingface_hub.split_torch_state_dict_into_shards, files those of
    safetensors.torch.save_file(metadata={"format": "pt"}). `total_parameters` counts the floating tensors.
    """
    folders = folders_of(components)
    parts: dict[str, list[Meta]] = {component.folder: [] for component in components}
    places: dict[str, Place] = {}
    for name, dtype, shape in tensors:
        folder, own = split(name, folders)
        parts.setdefault(folder, []).append(Meta(own, dtype, shape, nbytes_of(dtype, shape)))
        places[name] = Place("", 0, 0, "")
    if len(places) != len(tensors):
        raise ValueError("two tensors have one name")
    known = {component.folder: component for component in components}
    files: list[FileLayout] = []
    indexes: dict[str, str] = {}
    for folder, metas in parts.items():
        if metas or len(parts) == 1:
            _lay_out(known.get(folder, Component(folder)), metas, shard_size, weights or {}, files, places, indexes)
    return Layout(tuple(files), places, indexes, sum(place.nbytes for place in places.values()))


def _lay_out(
    component: Component,
    metas: Sequence[Meta],
    shard_size: int | None,
    weights: Mapping[str, str],
    files: list[FileLayout],
    places: dict[str, Place],
    indexes: dict[str, str],
) -> None:
    """Add the files, places and index of one component."""
    kin = groupby(metas, lambda meta: weights.get(component.at(meta.name), meta.name))
    shards = [metas] if shard_size is None else _shards([tuple(group) for _, group in kin], shard_size)
    own = {meta.name: "" for meta in metas}  # in the order of the tensors
    for number, shard in enumerate(shards, start=1):
        file = component.single if len(shards) == 1 else component.shard(number, len(shards))
        ordered = sorted(shard, key=lambda meta: (DTYPE_ORDER.index(meta.dtype), meta.name))
        ends = list(accumulate((meta.nbytes for meta in ordered), initial=0))
        header = _header(ordered, ends)
        files.append(FileLayout(file, header, len(header) + ends[-1]))
        for meta, begin in zip(ordered, ends, strict=False):
            places[component.at(meta.name)] = Place(file, len(header) + begin, meta.nbytes, meta.dtype)
            own[meta.name] = file.rpartition("/")[2]
    if len(shards) > 1:
        total = sum(meta.nbytes for meta in metas)
        parameters = sum(math.prod(meta.shape) for meta in metas if meta.dtype in FLOATING)
        indexes[component.index] = _index(total, parameters, own)


def _shards(groups: Sequence[Sequence[Meta]], shard_size: int) -> list[Sequence[Meta]]:
    shards: list[Sequence[Meta]] = []
    current: list[Meta] = []
    filled = 0
    for group in groups:
        nbytes = sum(meta.nbytes for meta in group)
        if nbytes > shard_size:
            shards.append(group)
            continue
        if filled + nbytes > shard_size:
            shards.append(current)
            current, filled = [], 0
        current += group
        filled += nbytes
    return [*shards, current] if current or not shards else shards


def _header(metas: Sequence[Meta], ends: Sequence[int]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for meta, offsets in zip(metas, pairwise(ends), strict=True):
        entries[meta.name] = {"dtype": meta.dtype, "shape": meta.shape, "data_offsets": offsets}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(total_size: int, total_parameters: int, weight_map: dict[str, str]) -> str:
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
