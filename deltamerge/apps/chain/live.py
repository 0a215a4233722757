"""Apply deltas and versions of chains to tensors in memory, forwards and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.delta.entry import Entry
from deltamerge.formats.delta.positions import Array
from deltamerge.models.chain.folder import (
    Content,
    Version,
    line,
    notes,
    served,
    state_of,
)
from deltamerge.models.delta_file import Patch, bits_of, digest_of, to_torch
from deltamerge.models.delta_over_base import folded
from deltamerge.models.references import open_origin
from deltamerge.tensors.dtypes import code_of
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader, elements

DENSE = 8  # above one entry in so many the whole tensor is held, not positions and values
INT32 = 1 << 31


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the tensor under a `key` of a state.

    It is `values` (bits) at positions, or everywhere (None), or the tensor `whole`.
    """

    key: str
    where: Array | None
    values: Array
    whole: Any = None


def change_of(entry: Entry, key: str, tensor: Any) -> Change | None:
    """Return the change of a `tensor`, stored under `key`, by an entry of the same dtype and shape.

    It is computed and checked tile by tile. None: there is no change. InputError: the delta is damaged, or has another
    base.
    """
    old = bits_of(tensor)
    return _change(key, old, entry.size, entry.tiles(lambda start, stop: old[start:stop]))


def _change(key: str, old: Array, size: int, tiles: Iterator[Array]) -> Change | None:
    """Return the change from a tensor's bits `old` to `tiles`, which have equally many elements."""
    made: Array | None = None
    where: list[Array] = []
    values: list[Array] = []
    done = count = 0
    for bits in tiles:
        end = done + bits.size
        if made is not None:
            made[done:end] = bits
        else:
            positions = np.flatnonzero(bits != old[done:end])
            count += positions.size
            where.append(positions + done)
            values.append(bits[positions])
            if count * DENSE > size:
                made = old.copy()
                made[np.concatenate(where)] = np.concatenate(values)
        done = end
    if made is not None:
        return Change(key, None, made)
    return Change(key, np.concatenate(where), np.concatenate(values)) if count else None


def whole_of(entry: Entry, tensor: Any) -> Change:
    """Return the tensor that an entry makes of a `tensor`, on its device. None for `tensor`: the base has none.

    InputError: as `change_of`.
    """
    old = None if tensor is None else bits_of(tensor)
    made = entry.whole(None if old is None else lambda start, stop: old[start:stop])
    whole = to_torch(made, entry.record.dtype).reshape(tuple(entry.record.shape))
    return Change(entry.name, None, made, whole if tensor is None else whole.to(tensor.device))


@dataclass(frozen=True, slots=True)
class Write:
    """Integers `values`, of a tensor's bits, at positions `where` of its memory `line`; None: at all of the tensor."""

    line: Any
    where: Any
    values: Any

    def put(self) -> None:
        if self.where is None:
            self.line.copy_(self.values)
        else:
            self.line[self.where] = self.values

    def kept(self) -> Write:
        """Return the write that undoes this one."""
        return Write(self.line, self.where, self.line.clone() if self.where is None else self.line[self.where])


def write_of(change: Change, tensor: Any) -> Write:
    """Return the write of a change into its tensor. InputError: it cannot be written at single positions."""
    dtype = f"I{8 * tensor.element_size()}"
    values = to_torch(change.values, dtype).to(tensor.device)
    if change.where is None:
        return Write(tensor.detach().view(values.dtype), None, values.reshape(tensor.shape))
    with errors.context(change.key):
        memory, where = _line_of(tensor, to_torch(change.where, "I64"))
    kind = torch.int32 if memory.numel() < INT32 else torch.int64
    return Write(memory.view(values.dtype), where.to(tensor.device, kind), values)


def _line_of(tensor: Any, where: Any) -> tuple[Any, Any]:
    """Return the memory that a tensor spans, as one dimension, and where its flat positions lie in it."""
    data = tensor.detach()
    if data.is_contiguous():
        return data.view(-1), where
    sizes, strides = data.shape, data.stride()
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)):
        raise InputError("shares memory between its elements", hint="clone() it first")
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    at, rest = torch.zeros_like(where), where
    for axis in reversed(range(len(sizes))):
        at += rest % sizes[axis] * strides[axis]
        rest = rest // sizes[axis]
    return data.as_strided((span,), (1,)), at


State = MutableMapping[str, Any]


class Delta(Iterator[Patch]):
    """A delta or version. Iterate over its patches (once, as they are read), or apply it to a state dict.

    name    the folder's name, which is the version's name in a chain
    path    the folder
    after   the version that it changes; None: the base
    step    the step of the training run that wrote it, if any
    state   the hash of its result
    """

    def __init__(self, versions: Sequence[Version], base: Mapping[str, Any] | str | Path | None = None) -> None:
        self._versions, self._base = tuple(versions), base
        last = self._versions[-1]
        self.name, self.path, self.state = last.name, last.path, last.state
        self.after = None if last.after is None else last.after.name
        self.step = None if last.note is None else last.note.step
        self._patches: Iterator[Patch] | None = None

    @property
    def versions(self) -> tuple[Version, ...]:
        """The versions from the first over the base to this one."""
        return self._versions

    def __iter__(self) -> Iterator[Patch]:
        return self

    def __next__(self) -> Patch:
        """Return the next patch: final values over the result of the previous version.

        InputError: it holds steps or values to add, and `base` is missing or another base.
        """
        if self._patches is None:
            self._patches = self._versions[-1].delta.patches(self._base)
        return next(self._patches)

    def __repr__(self) -> str:
        return f"<Delta {self.path}>"

    def apply_(self, state: State, base: str | Path | None = None) -> int:
        """Turn a state dict of the base, or of any version of the chain, into this version's, in place where possible.

        Return the number of applied versions. It is 0 if the state already was this version's, and negative for
        versions taken back. `base` is the chain's base, which going back reads; by default the base that the chain
        names. If it is given, the tensors may hold anything, even a mix of two versions after a killed write.

        Tensors are torch's, on any device. Tensors that the delta does not know are left alone. All changes are read,
        computed and checked by hash before the first tensor is written, which needs memory for the changes. If a write
        fails, earlier writes are undone. InputError, with nothing changed: no path leads from the state to this
        version, or the delta or the base is damaged.
        """
        with torch.no_grad(), errors.context(str(self.path)):
            held = _Contents(state)
            sources = self._sources(state)
            done = self._count_applied(held, sources)
            if done is None:
                return self._take_back(state, held, sources, base)
            if done == len(self._versions):
                return 0
            delta = folded(self._versions[done:])
            if done:
                sources = {name: name for name in delta.entries}
            uses = Counter(sources.values())
            changes = []
            for name, entry in delta.entries.items():
                source = sources.get(name)
                with errors.context(name):
                    if source is not None and (source == name or uses[source] == 1) and entry.kind == entry.base_kind:
                        change = change_of(entry, source, state[source])
                    else:
                        change = whole_of(entry, None if source is None else state[source])
                if change is not None:
                    changes.append(change)
            gone = {*delta.manifest.removed} if not done else set()
            _write(state, changes, sources, (gone | {*sources.values()}) - delta.entries.keys())
        return len(self._versions) - done

    def _sources(self, state: State) -> dict[str, str]:
        """Return the key in `state` of the base's tensor that each tensor of the result is made from."""
        entries = self._versions[0].delta.entries
        return {name: entry.key_in(state) for name, entry in entries.items() if entry.record.base is not None}

    def _count_applied(self, held: _Contents, sources: Mapping[str, str]) -> int | None:
        """Return how many of the versions the state has had applied. None: it is no state that they go through."""
        for done in range(len(self._versions), 0, -1):
            if all(held[name] == wanted for name, wanted in self._versions[done - 1].contents.items()):
                return done
        entries = self._versions[0].delta.entries
        return 0 if all(held[key] == _base_content(entries[name]) for name, key in sources.items()) else None

    def _take_back(self, state: State, held: _Contents, sources: Mapping[str, str], base: str | Path | None) -> int:
        """Make a state that has the tensors of this version, and other values, this version's.

        Return how many versions were applied, as `apply_`. InputError: as there.
        """
        wanted = self._versions[-1].contents
        alike = all((have := held[name]) is not None and have[:2] == want[:2] for name, want in wanted.items())
        place = self._place({name: held[name] for name in wanted}) if alike else None
        if not alike or (place is None and base is None):
            self._refuse(held, sources)
        first = self._versions[0].delta.manifest
        origin = open_origin(str(first.base if base is None else base), self._versions[0].delta)
        changes, delta = [], folded(self._versions)
        kinds = {name: (info.dtype, info.shape) for name, info in origin.tensors.items()}
        with Reader() as reader:
            for one in delta.result(kinds):
                if one.entry is None or held[one.name] == wanted[one.name]:
                    continue
                info = None if one.base_name is None else origin.tensors[one.base_name]
                tiles = one.entry.tiles(None if info is None else elements(reader, info))
                with errors.context(one.name):
                    change = _change(one.name, bits_of(state[one.name]), one.entry.size, tiles)
                if change is not None:
                    changes.append(change)
        _write(state, changes, {}, set())
        return len(self._versions) - (place or 0)

    def _place(self, found: Mapping[str, Content | None]) -> int | None:
        """Return the place in the chain, from 1, of the version that makes a state. None: no version does."""
        state = state_of({name: content for name, content in found.items() if content is not None})
        there = notes(self.path.parent)
        at = next((name for name, note in there.items() if note is not None and note.state == state), None)
        place = 0
        while at is not None and place <= len(there):
            place += 1
            note = there.get(at)  # a first version may be without
            at = None if note is None or note.after is None else note.after.name
        return place or None

    def _refuse(self, held: _Contents, sources: Mapping[str, str]) -> NoReturn:
        """Raise the InputError of a state that does not lead to this version."""
        first = self._versions[0].delta
        belongs = f"it belongs to {first.manifest.base}"
        base = {key: _base_content(first.entries[name]) for name, key in sources.items()}
        for key, wanted in base.items():
            if (found := held[key]) is None:
                raise InputError(f"{key} is not there, or of no known dtype", hint=belongs)
            if found[:2] != wanted[:2]:
                is_now, was = (f"{c.dtype} {list(c.shape)}" for c in (found, wanted))
                raise InputError(f"{key} is {is_now}, the delta was made from {was}", hint=belongs)
        for key in (key for key, wanted in base.items() if held[key] != wanted):
            self._refuse_folded({n: c for n in self._versions[-1].contents if (c := held[n]) is not None})
            what = "the base's" if len(self._versions) == 1 else "the base's, nor any version's before this"
            raise InputError(f"{key} is not {what}", hint=belongs)
        raise InputError("the tensors match no version of the chain", hint=f"{belongs}: apply_(state, base=…)")

    def _refuse_folded(self, found: Mapping[str, Content]) -> None:
        state = state_of(found)
        for version in self._versions:
            for old in () if version.note is None else version.note.folded:
                if old.state == state:
                    raise InputError(
                        f"the tensors match version {old.name}, which squash has folded into {version.name}",
                        hint="load the base again, and apply it to that; or apply_(state, base=…)",
                    )


def load_delta(path: str | Path, base: Mapping[str, Any] | str | Path | None = None) -> Delta:
    """Open the delta artifact, or the version of a chain, at `path`.

    If `path` is a chain, the pinned version is opened, or the newest.

    Iteration gives patches (name, shape, dtype, values, flat indices or None), read one at a time, over the
    predecessor. `base` is the predecessor's state dict or folder. Steps and values to add need it, and are checked
    against it; a state dict may be patched meanwhile. The folder, and earlier versions, are checked now, not at the
    first patch. InputError: one is damaged, missing, or not made from its predecessor.
    """
    return Delta(line(served(Path(path)) or Path(path)), base)


class _Contents(dict[str, "Content | None"]):
    """The contents of a state's tensors by key, each hashed when it is first asked for."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        self._state = state

    def __missing__(self, key: str) -> Content | None:
        self[key] = found = _content(self._state.get(key))
        return found


def _base_content(entry: Entry) -> Content:
    return Content(*entry.base_kind, entry.record.base or "")


def _content(tensor: Any) -> Content | None:
    """Return the content of a tensor in memory. None: there is no tensor, or safetensors lacks its dtype."""
    if tensor is None or (code := code_of(tensor.dtype)) is None:
        return None
    return Content(code, tuple(tensor.shape), digest_of(tensor))


def _write(state: State, changes: Sequence[Change], sources: Mapping[str, str], gone: set[str]) -> None:
    """Write all changes, move tensors from their sources' keys to their own, and remove keys.

    If any of it fails, undo it all.
    """
    before, undo = dict(state), list[Write]()
    writes = [write_of(change, state[change.key]) for change in changes if change.whole is None]
    try:
        for write in writes:
            undo.append(write.kept())
            write.put()
        whole = {change.key: change.whole for change in changes if change.whole is not None}
        moved = {name: state[key] for name, key in sources.items() if key != name and name not in whole}
        for name, tensor in (moved | whole).items():
            state[name] = tensor
        for name in gone & state.keys():
            del state[name]
    except BaseException:
        for write in reversed(undo):
            write.put()
        for name in state.keys() - before.keys():
            del state[name]
        for name, tensor in before.items():
            if state.get(name) is not tensor:
                state[name] = tensor
        raise
