"""A delta artifact: the changes of a base checkpoint in few bytes; opened, checked and applied.

docs/reference/delta-format.md describes the format. torch is imported only where tensors are returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.delta.entry import Entry, Read, as_bits, hash_of
from deltamerge.formats.delta.folder import open_folder
from deltamerge.formats.delta.manifest import Manifest
from deltamerge.formats.delta.positions import Array, index_itemsize
from deltamerge.models.checkpoint import open_checkpoint
from deltamerge.tensors.dtypes import code_of, torch_dtype
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader, elements

DENSE = 3  # if more than one entry in so many changes, a computed patch has the whole tensor


class Patch(NamedTuple):
    """Final values of a checkpoint tensor: 1-D `values` of `dtype` at flat ascending `indices`; None: at all of them.

    indices are int32, or int64 from 2**31 elements. Tensors are torch's. The fields are the fields of vLLM's
    CheckpointWeightPatch: vllm/model_executor/model_loader/checkpoint_weight_patch.py.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ResultTensor:
    """A tensor of the result.

    base_name   its tensor in the base; None: the base has none
    entry       its changes; None: it is unchanged
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base_name: str | None
    entry: Entry | None


@dataclass(frozen=True, slots=True)
class DeltaFile:
    """An open artifact: its manifest, and its tensors in the order of the manifest."""

    path: Path
    manifest: Manifest
    entries: dict[str, Entry]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, path: str | Path) -> DeltaFile:
        """Open and check the folder at `path`; arrays are read when used. InputError: it does not follow the format."""
        folder = Path(path)
        with errors.context(str(path)):
            return cls(folder, *open_folder(folder))

    def patches(self, base: Mapping[str, Any] | str | Path | None = None) -> Iterator[Patch]:
        """Yield final values, tensor by tensor, without unchanged tensors.

        `base` is the base's folder, or its state dict of torch tensors, found by their names in the base, otherwise in
        the result. Steps and values to add need it. InputError: it is needed and missing (raised before the first
        tensor), or it is another base.
        """
        if base is None and (name := next((name for name, e in self.entries.items() if e.needs_base), None)):
            holds = "steps from the base's values" if self.entries[name].has_steps else "values to add to the base's"
            raise InputError(
                f"{self.path}: {name}: holds {holds}, which cannot be told without them",
                hint="give the base: load_delta(path, base), a state dict or a folder",
            )
        with Reader() as reader:
            read_of = _reads({} if base is None else base, reader)
            for name, entry in self.entries.items():
                if entry.record.count:
                    with errors.context(f"{self.path}: {name}"):
                        yield _patch(entry, read_of(entry) if entry.needs_base else None)

    def result(self, base: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[ResultTensor]:
        """Return the tensors of the result in order; `base` maps the base's tensor names to (dtype, shape).

        InputError: the base lacks a tensor that the delta needs, or has it in another dtype or shape.
        """
        sources, used = [], set(self.manifest.removed)
        for name, entry in self.entries.items():
            record = entry.record
            base_name = None
            if record.base is not None:
                base_name = record.base_name or name
                expected = entry.base_kind
                if base.get(base_name) != expected:
                    found = base.get(base_name)
                    what = "is not there" if found is None else f"is {found[0]} {list(found[1])}"
                    raise InputError(
                        f"wrong base: {base_name} {what}, the delta was made from {expected[0]} {list(expected[1])}",
                        hint=f"this delta was made from {self.manifest.base}",
                    )
                used.add(base_name)
            sources.append(ResultTensor(name, tuple(record.shape), record.dtype, base_name, entry))
        for name, (dtype, shape) in base.items():
            if name not in used and name not in self.entries:
                sources.append(ResultTensor(name, shape, dtype, name, None))
        return sources


def to_torch(bits: Array, dtype: str) -> torch.Tensor:
    """Flat bits as a torch tensor that shares their memory."""
    return torch.from_numpy(bits.view(f"<i{bits.dtype.itemsize}")).view(torch_dtype(dtype))


def bits_of(tensor: Any) -> Array:
    """Return a tensor's bits, flat, on the CPU; its own memory if it is contiguous there."""
    width = tensor.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    bits: Array = tensor.detach().cpu().contiguous().view(integers).numpy().reshape(-1).view(f"<u{width}")
    return bits


def digest_of(tensor: Any) -> str:
    """Return a tensor's hash, as the manifest has it."""
    return hash_of(_window(tensor), tensor.numel())


def _described(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return code_of(tensor.dtype) or str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _fitting(entry: Entry, target: Any) -> Any:
    """`target`, if it has the dtype and shape of the base's tensor. InputError: it has not."""
    dtype, shape = entry.base_kind
    if target is None or _described(target) != (dtype, shape):
        found = "is not there" if target is None else "is {} {}".format(*_described(target))
        raise InputError(f"{entry.name} {found}, the delta was made from {dtype} {shape}")
    return target


def _reads(base: Mapping[str, Any] | str | Path, reader: Reader) -> Callable[[Entry], Read]:
    """Return a function that reads the tensor of `base` that an entry changes."""
    if isinstance(base, Mapping):
        state = base

        def of_state(entry: Entry) -> Read:
            return _window(_fitting(entry, state.get(entry.key_in(state))))

        return of_state
    tensors = open_checkpoint(Path(base)).tensors

    def of_file(entry: Entry) -> Read:
        name = entry.record.base_name or entry.name
        info = tensors.get(name)
        dtype, shape = entry.base_kind
        if info is None or (info.dtype, tuple(info.shape)) != (dtype, shape):
            raise InputError(f"{base} has no {name} of {dtype} {list(shape)}")
        return elements(reader, info)

    return of_file


def _patch(entry: Entry, read: Read | None) -> Patch:
    """Return the patch of an entry. `read` reads the base's tensor if it is needed."""
    record, where = entry.record, None
    if read is None:
        stored = entry.values[:]
        if entry.index is not None:
            where = np.concatenate(list(entry.positions()))
    else:
        base = as_bits(read(0, entry.base_size), entry.base_dtype)
        stored = entry.whole(lambda start, stop: base[start:stop])
        if entry.kind == entry.base_kind:
            where = np.flatnonzero(stored != base)
            where = where if entry.index is not None or where.size * DENSE < entry.size else None
        stored = stored if where is None else stored[where]
    indices = None if where is None else torch.from_numpy(where.astype(f"i{index_itemsize(entry.size)}"))
    values = to_torch(stored, record.dtype)
    return Patch(entry.name, tuple(record.shape), values.dtype, values, indices)


def _window(tensor: Any) -> Read:
    bits = bits_of(tensor)
    return lambda start, stop: bits[start:stop]
