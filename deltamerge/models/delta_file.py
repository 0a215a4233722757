"""A delta artifact: the changes of a base checkpoint in few bytes; opened, checked and applied.

docs/reference/delta-format.md describes the format. A tensor in memory is patched in one compiled pass
(kernels/src/vector/positions.h) where kernels are there, else by numpy. torch is imported only where tensors are
returned.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from deltamerge import errors
from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.delta.entry import OTHER_BASE, TILE, Decoder, Entry, Read, as_bits, damage_told, hash_of
from deltamerge.formats.delta.folder import PADDING, Scratch, StoredArray, open_folder
from deltamerge.formats.delta.manifest import STORED_VALUES, Base, Manifest, Record, groups
from deltamerge.formats.delta.positions import Array, Coding, index_itemsize, rice_offsets
from deltamerge.formats.delta.values import SCALED, VALUE_BITS, Values, ranked_scales, scale_values
from deltamerge.models.checkpoint import open_checkpoint
from deltamerge.tensors.dtypes import NUMPY, code_of, torch_dtype
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader, elements

LARGEST_K = 15  # the largest k of rice that the compiled pass decodes
LINE = 64

_DENSE, _INDICES, _GAPS, _ONES = range(4)
_NOTHING = np.empty(0, np.float32)


def apply_in_place(entry: Entry, bits: Array, scratch: Scratch) -> None:
    """Turn the base tensor's flat `bits` into the result's bits (same dtype and size), for an entry with values.

    Hashes are not checked. InputError: stored arrays are damaged, or the file was shortened. `bits` may have changed
    then.
    """
    if is_compiled(entry):
        with damage_told():
            _apply_compiled(entry, bits, scratch)
        return
    decoder = Decoder(entry)
    for start in range(0, entry.size, TILE):
        own = bits[start : start + TILE]
        for where, values in decoder.changes(start, start + own.size, own):
            decoder.put(own, own, where, values)
    decoder.finish()


def is_compiled(entry: Entry) -> bool:
    """Whether a compiled pass handles the entry."""
    record = entry.record
    is_simple = (
        not (entry.has_steps or record.parts or (entry.index is None and record.values is None))
        and record.k <= LARGEST_K
        and (record.values is None or record.dtype in ("F32", "BF16"))
    )
    return is_simple and kernels.available()


def _apply_compiled(entry: Entry, bits: Array, scratch: Scratch) -> None:
    record, kind = entry.record, cast("Values | None", entry.record.values)
    coding = cast(Coding, record.encoding)
    stored = cast("list[StoredArray | None]", [entry.values, entry.index, entry.scales])
    values, index, scales = scratch.read(stored)
    if kind is None:
        ok = put(coding, index, record.k, record.count, values.view(bits.dtype), bits)
    else:
        factors = _scales(record, scales)
        out = bits.view(np.float32) if record.dtype == "F32" else bits
        values, group = values.view(NUMPY[STORED_VALUES[kind]]), record.group
        ok = add(coding, index, record.k, record.count, values, kind, factors, group, out)
    if not ok:
        deque(entry.positions(), maxlen=0)  # raises the error that names the fault
        raise InputError("positions are damaged")


def _scales(record: Record, stored: Array) -> Array:
    if record.values not in SCALED:
        return np.empty(0, np.float32)
    if record.ranks is not None:
        out: Array = np.empty(groups(record), np.float32)
        if ranked(stored, ranked_scales(record.unit, record.ranks), out):
            return out
    return scale_values(stored[:-PADDING], groups(record), record.unit, record.ranks)


def put(coding: Coding, stored: Array, k: int, count: int, values: Array, out: Array) -> bool:
    """Put `values` at the `count` stored positions of `out`, both unsigned. False: positions are damaged.

    stored   bytes of the positions and PADDING zeros; k of rice is at most 15
    Positions that are damaged, or outside of `out`, may be found only when others were changed. InputError: rice codes
    are too short, or too long.
    """
    numbers = _positions(coding, stored, k, count, out)
    return bool(_native().put(stored, values, _NOTHING, out, *numbers, out.itemsize))


def add(
    coding: Coding,
    stored: Array,
    k: int,
    count: int,
    values: Array,
    kind: Values,
    scales: Array,
    group: int,
    out: Array,
) -> bool:
    """Add values to `out`, float32 or (uint16) bfloat16, at the stored positions, rounded once; else as `put`.

    values   float32; bfloat16 (uint16); int8 codes or packed sign bits (uint8), times the scale of their group of
             `group` elements
    """
    numbers, number = _positions(coding, stored, k, count, out), list(VALUE_BITS).index(kind)
    return bool(_native().add(stored, values, scales, out, *numbers, number, group, out.itemsize == 2))


def ranked(stored: Array, scales: Array, out: Array) -> bool:
    """Fill `out` with the scales whose ranks are stored (bytes and PADDING zeros). False: they are damaged."""
    return bool(stored[-PADDING - 1]) and bool(_native().ranked(stored, scales, _NOTHING, out))


def _native() -> Any:
    module = kernels.native()
    assert module is not None
    return module


def _positions(coding: Coding, stored: Array, k: int, count: int, out: Array) -> tuple[int, ...]:
    """(way, k, count, first, second, dense) of kernels/src/delta.cpp; dense: about every line of `out` is touched."""
    way, first, second = _DENSE, 0, 0
    if coding == "rice":
        way, (first, second) = _ONES, rice_offsets(stored.size - PADDING, count, k)
        if not stored[-PADDING - 1]:
            raise InputError("rice codes end in padding")
    elif coding != "dense":
        way = {"bitmask": _ONES, "gaps": _GAPS, "indices": _INDICES}[coding]
        first = index_itemsize(out.size)
    return way, k, count, first, second, count * LINE >= out.nbytes


THREADED = 1 << 15
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
        """Final values, tensor by tensor, without unchanged ones.

        `base` is the base's state dict (torch tensors, found as by `apply_to`) or folder. Steps and values to add need
        it. InputError: it is needed and missing (raised before the first tensor), or it is another base.
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
        """The tensors of the result in order; `base` maps the base's tensor names to (dtype, shape).

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

    def apply_to(self, state: MutableMapping[str, Any], *, check: bool = False) -> None:
        """Turn a state dict of the base (torch tensors on any device) into the result's, in place where possible.

        A tensor is found by its name in the base, otherwise by its name in the result. New tensors, and tensors whose
        dtype or shape changes, are created; removed tensors are deleted. On the CPU large tensors use as many threads
        as torch has. Steps need exactly the base's values, so the hashes of such tensors are checked before anything is
        changed. With `check`, all tensors and their results are checked. A tensor that already equals its result stays
        as it is. InputError: a tensor is missing or differs from the base's in dtype or shape, or a hash differs (then
        nothing has been changed); stored arrays are damaged; or the file was shortened.
        """
        entries = list(self.entries.values())
        keys = [entry.key_in(state) for entry in entries]
        uses = Counter(keys)
        targets: dict[str, Any] = {}
        for entry, key in zip(entries, keys, strict=True):
            target = _target(entry, state.get(key), self.manifest.base)
            targets[entry.name] = target.clone() if uses[key] > 1 and key != entry.name else target
        entries = [entry for entry in entries if not self._is_done(entry, targets[entry.name], check)]

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

    def _is_done(self, entry: Entry, target: Any, check: bool) -> bool:
        """Whether a tensor with steps, or with `check` any tensor, already equals the result.

        InputError: it is not the base's either, or with `check` the stored change does not give the result.
        """
        record = entry.record
        if not (check or entry.has_steps):
            return False
        with errors.context(f"{self.path}: {entry.name}"):
            read = None if record.base is None else _window(target)
            if read is not None and (found := entry.digest_of(read)) != record.base:
                if found == record.result and _described(target) == entry.kind:
                    return True
                raise InputError(OTHER_BASE, hint=f"this delta was made from {self.manifest.base}")
            if check:
                deque(entry.tiles(read), maxlen=0)
        return False


def to_torch(bits: Array, dtype: str) -> torch.Tensor:
    """Flat bits as a torch tensor that shares their memory."""
    return torch.from_numpy(bits.view(f"<i{bits.dtype.itemsize}")).view(torch_dtype(dtype))


def bits_of(tensor: Any) -> Array:
    """A tensor's bits, flat, on the CPU; its own memory if it is contiguous there."""
    width = tensor.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    bits: Array = tensor.detach().cpu().contiguous().view(integers).numpy().reshape(-1).view(f"<u{width}")
    return bits


def digest_of(tensor: Any) -> str:
    """A tensor's hash, as the manifest has it."""
    return hash_of(_window(tensor), tensor.numel())


def _described(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return code_of(tensor.dtype) or str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _target(entry: Entry, target: Any, base: Base) -> Any:
    """The tensor that an entry changes; None if the base has none, or has one of another kind."""
    if entry.record.base is None:
        return target if target is not None and _described(target) == entry.kind else None
    try:
        return _fitting(entry, target)
    except InputError as error:
        error.hint = f"it belongs to {base}"
        raise


def _fitting(entry: Entry, target: Any) -> Any:
    """`target`, if it has the dtype and shape of the base's tensor. InputError: it has not."""
    dtype, shape = entry.base_kind
    if target is None or _described(target) != (dtype, shape):
        found = "is not there" if target is None else "is {} {}".format(*_described(target))
        raise InputError(f"{entry.name} {found}, the delta was made from {dtype} {shape}")
    return target


def _apply_to(entry: Entry, target: Any, scratch: Scratch) -> Any:
    """`target` changed in place, or the tensor that replaces it."""
    record = entry.record
    if target is None or _described(target) != entry.kind:
        read = None if target is None else _window(target)
        made = to_torch(entry.whole(read, check=False), record.dtype).reshape(record.shape)
        return made if target is None else made.to(target.device)
    if not record.count:
        return target
    data = target.detach()
    if data.device.type == "cpu" and data.is_contiguous():
        apply_in_place(entry, bits_of(data), scratch)
        return target
    flat = data.contiguous().reshape(-1)
    decoder, bits = Decoder(entry), bits_of(data) if entry.has_steps else np.empty(0, np.uint8)
    for start in range(0, entry.size, TILE):
        own = flat[start : start + TILE]
        for where, values in decoder.changes(start, start + own.numel(), bits[start : start + TILE]):
            at = where if isinstance(where, slice) else to_torch(where, "I64").to(flat.device)
            if record.values is None:
                own[at] = to_torch(np.array(values), record.dtype).to(flat.device)
            else:
                own[at] = (own[at].float() + to_torch(np.array(values), "F32").to(flat.device)).to(flat.dtype)
    if not data.is_contiguous():
        data.copy_(flat.reshape(data.shape))
    return target


def _reads(base: Mapping[str, Any] | str | Path, reader: Reader) -> Callable[[Entry], Read]:
    """A function that reads the tensor of `base` that an entry changes."""
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
    """The patch of an entry. `read` reads the base's tensor if it is needed."""
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
