"""A delta artifact: the changes of a base checkpoint in few bytes; opened, checked and applied.

docs/delta-format.md describes the format. torch is imported only where tensors are returned.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deltamerge import errors
from deltamerge.delta.entry import Entry
from deltamerge.delta.folder import open_folder
from deltamerge.delta.in_place import apply_in_place
from deltamerge.delta.manifest import Base, Manifest
from deltamerge.delta.positions import Array, index_itemsize
from deltamerge.delta.stored import Scratch
from deltamerge.errors import InputError
from deltamerge.io.dtypes import code_of, torch_dtype
from deltamerge.io.lazy import torch

THREADED = 1 << 15


class Patch(NamedTuple):
    """Final values of a checkpoint tensor: 1-D `values` of `dtype` at flat ascending `indices`; None: at all of them.

    indices are int32, or int64 from 2**31 elements. Tensors are torch's. The fields are those of vLLM's
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

    base_name   the base's tensor that it comes from; None: the base has none
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

    def patches(self) -> Iterator[Patch]:
        """Final values, tensor by tensor, without unchanged ones; for an artifact that replaces."""
        for name, entry in self.entries.items():
            record = entry.record
            if not record.count:
                continue
            indices = None
            if entry.index is not None:
                dtype = f"i{index_itemsize(entry.size)}"
                indices = torch.from_numpy(np.concatenate([p.astype(dtype) for p in entry.positions()]))
            values = to_torch(entry.values[:], record.dtype)
            yield Patch(name, tuple(record.shape), values.dtype, values, indices)

    def result(self, base: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[ResultTensor]:
        """The tensors of the result in order; `base` maps the base's tensor names to (dtype, shape).

        InputError: the base lacks a tensor that the delta needs, or has it in another dtype or shape.
        """
        sources, used = [], set(self.manifest.removed)
        for name, entry in self.entries.items():
            record = entry.record
            base_name = None
            if record.base is not None:
                base_name = record.base_name or name
                expected = (entry.base_dtype, tuple(record.base_shape or record.shape))
                if base.get(base_name) != expected:
                    found = base.get(base_name)
                    what = "is not there" if found is None else f"is {found[0]} {list(found[1])}"
                    raise InputError(
                        f"the base's {base_name} {what}, the delta was made from {expected[0]} {list(expected[1])}",
                        hint=f"this delta belongs to {self.manifest.base}",
                    )
                used.add(base_name)
            sources.append(ResultTensor(name, tuple(record.shape), record.dtype, base_name, entry))
        for name, (dtype, shape) in base.items():
            if name not in used and name not in self.entries:
                sources.append(ResultTensor(name, shape, dtype, name, None))
        return sources

    def apply_to(self, state: MutableMapping[str, Any]) -> None:
        """Turn a state dict of the base (torch tensors on any device) into the result's, in place where possible.

        A tensor is found by its name in the base, else by its name in the result. New tensors, and those whose dtype or
        shape changes, are created; removed ones are deleted. Hashes are not checked. On the CPU large tensors use as
        many threads as torch has. InputError: a tensor is missing or differs from the base's in dtype or shape (then
        nothing has been changed); positions are damaged; or the file has become shorter.
        """
        entries = list(self.entries.values())
        keys = [name if (name := e.record.base_name) is not None and name in state else e.name for e in entries]
        uses = Counter(keys)
        targets: dict[str, Any] = {}
        for entry, key in zip(entries, keys, strict=True):
            target = _target(entry, state.get(key), self.manifest.base)
            targets[entry.name] = target.clone() if uses[key] > 1 and key != entry.name else target

        own = threading.local()  # scratch memory of each thread

        def apply(entry: Entry) -> None:
            if not hasattr(own, "scratch"):
                own.scratch = Scratch()
            with errors.context(f"{self.path}: {entry.name}"):
                targets[entry.name] = _apply_to(entry, targets[entry.name], own.scratch)

        entries.sort(key=lambda entry: -entry.record.count)
        large = sum(entry.record.count > THREADED for entry in entries)
        workers = min(torch.get_num_threads(), large)
        if workers < 2:
            large = 0
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(apply, entries[:large]))
        for entry in entries[large:]:
            apply(entry)
        for name in {*self.manifest.removed, *keys} - targets.keys():
            state.pop(name, None)
        state.update(targets)


def load_delta(path: str | Path) -> Iterator[Patch]:
    """Patches of the artifact at `path`: (name, shape, dtype, values, flat indices or None), read one at a time.

    The folder is checked now, not at the first patch. InputError: it is damaged, or holds values to add.
    """
    delta = DeltaFile.open(path)
    for name, entry in delta.entries.items():
        if entry.record.values is not None:
            raise InputError(
                f"{path}: {name}: holds values to add, not final values",
                hint="apply it to its base, or name it as a model of a recipe",
            )
    return delta.patches()


def to_torch(bits: Array, dtype: str) -> torch.Tensor:
    """Flat bits as a torch tensor that shares their memory."""
    return torch.from_numpy(bits.view(f"<i{bits.dtype.itemsize}")).view(torch_dtype(dtype))


def _described(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return code_of(tensor.dtype) or str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _target(entry: Entry, target: Any, base: Base) -> Any:
    """The tensor that an entry changes; None if the base has none, or has one of another kind."""
    record = entry.record
    if record.base is None:
        fits = target is not None and _described(target) == (record.dtype, tuple(record.shape))
        return target if fits else None
    expected = (entry.base_dtype, tuple(record.base_shape or record.shape))
    if target is None or _described(target) != expected:
        found = "is not there" if target is None else "is {} {}".format(*_described(target))
        raise InputError(
            f"{entry.name} {found}, the delta was made from {expected[0]} {expected[1]}", hint=f"it belongs to {base}"
        )
    return target


def _apply_to(entry: Entry, target: Any, scratch: Scratch) -> Any:
    """`target` changed in place, or the tensor that replaces it."""
    record = entry.record
    if target is None or _described(target) != (record.dtype, tuple(record.shape)):
        host = None if target is None else _host_bits(target.detach().cpu().contiguous())
        made = to_torch(entry.apply(host), record.dtype).reshape(record.shape)
        return made if target is None else made.to(target.device)
    if not record.count:
        return target
    data = target.detach()
    if data.device.type == "cpu" and data.is_contiguous():
        apply_in_place(entry, _host_bits(data), scratch)
        return target
    flat = data.contiguous().reshape(-1)
    for positions, values in entry.pieces():
        where = to_torch(positions, "I64").to(flat.device)
        if record.values is None:
            flat[where] = to_torch(np.array(values), record.dtype).to(flat.device)
        else:
            flat[where] = (flat[where].float() + to_torch(values, "F32").to(flat.device)).to(flat.dtype)
    if not data.is_contiguous():
        data.copy_(flat.reshape(data.shape))
    return target


def _host_bits(tensor: Any) -> Array:
    width = tensor.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    bits: Array = tensor.view(integers).numpy().reshape(-1).view(f"<u{width}")
    return bits
