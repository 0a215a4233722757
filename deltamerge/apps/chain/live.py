"""Apply deltas and versions of chains to tensors in memory, and follow a chain that is being written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.errors.shown import some
from deltamerge.files.atomic import replace_file
from deltamerge.formats.delta.entry import Entry
from deltamerge.formats.delta.positions import Array
from deltamerge.models.chain.folder import (
    Content,
    Note,
    Opened,
    Version,
    end_of,
    folders,
    is_version,
    line,
    read_note,
    resolve,
    state_of,
    without_folded,
)
from deltamerge.models.chain.layers import folded
from deltamerge.models.delta_file import Patch, bits_of, digest_of, to_torch
from deltamerge.tensors.dtypes import code_of
from deltamerge.tensors.lazy import torch

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
    """Return the change that an entry of the same dtype and shape makes of a `tensor`, which stands under `key`.

    It is computed and checked tile by tile. None: there is no change. InputError: the delta is damaged, or of another
    base.
    """
    old = bits_of(tensor)
    made: Array | None = None
    where: list[Array] = []
    values: list[Array] = []
    done = count = 0
    for bits in entry.tiles(lambda start, stop: old[start:stop]):
        end = done + bits.size
        if made is not None:
            made[done:end] = bits
        else:
            positions = np.flatnonzero(bits != old[done:end])
            count += positions.size
            where.append(positions + done)
            values.append(bits[positions])
            if count * DENSE > entry.size:
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
    """A version, whose patches are iterated over (once, as they are read), or that is applied to a state dict.

    name    the folder's; the version's of a chain
    path    the folder
    after   the version that it changes; None: the base
    step    of the training run that wrote it, if it was one
    state   the hash of what it makes
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
        """From the one that the base makes to this."""
        return self._versions

    def __iter__(self) -> Iterator[Patch]:
        return self

    def __next__(self) -> Patch:
        """Return the next patch: final values over the result of the version before.

        InputError: it is made of steps, and there is no `base` to take them from, or another.
        """
        if self._patches is None:
            self._patches = self._versions[-1].delta.patches(self._base)
        return next(self._patches)

    def __repr__(self) -> str:
        return f"<Delta {self.path}>"

    def apply_(self, state: State) -> int:
        """Turn a state dict of the base, or of any version before this, into this version's, in place where possible.

        Return how many versions were applied, 0 where it was this one's already.

        Tensors are torch's, on any device; ones that the delta does not know are left alone. Everything is read and
        computed, and its hashes are checked, before the first tensor is written, so memory for the changes is needed.
        If a write fails, those before it are undone. InputError, with nothing changed: the state is none that leads
        here, or the delta is damaged.
        """
        with torch.no_grad(), errors.context(str(self.path)):
            sources = self._sources(state)
            done = self._count_applied(state, sources)
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

    def _count_applied(self, state: State, sources: Mapping[str, str]) -> int:
        """Return how many of the versions the state has had applied.

        InputError: none, and it is not the base either.
        """
        known: dict[str, Content | None] = {}

        def content(key: str) -> Content | None:
            if key not in known:
                known[key] = _content(state.get(key))
            return known[key]

        for done in range(len(self._versions), 0, -1):
            if all(content(name) == wanted for name, wanted in self._versions[done - 1].contents.items()):
                return done
        first = self._versions[0].delta
        for name, key in sources.items():
            entry = first.entries[name]
            wanted = Content(*entry.base_kind, entry.record.base or "")
            if (found := content(key)) == wanted:
                continue
            belongs = f"it belongs to {first.manifest.base}"
            if found is None:
                raise InputError(f"{key} is not there, or of no known dtype", hint=belongs)
            if found[:2] != wanted[:2]:
                is_now, was = (f"{c.dtype} {list(c.shape)}" for c in (found, wanted))
                raise InputError(f"{key} is {is_now}, the delta was made from {was}", hint=belongs)
            self._refuse_folded({n: c for n in self._versions[-1].contents if (c := content(n)) is not None})
            what = "the base's" if len(self._versions) == 1 else "the base's, nor any version's before this"
            raise InputError(f"{key} is not {what}", hint=belongs)
        return 0

    def _refuse_folded(self, found: Mapping[str, Content]) -> None:
        state = state_of(found)
        for version in self._versions:
            for old in () if version.note is None else version.note.folded:
                if old.state == state:
                    raise InputError(
                        f"the tensors are those of version {old.name}, which squash has folded into {version.name}",
                        hint="load the base again, and apply it to that",
                    )


def load_delta(path: str | Path, base: Mapping[str, Any] | str | Path | None = None) -> Delta:
    """Open the delta artifact, or the version of a chain, at `path`. Of a chain's own folder it is the newest.

    Iterated over it gives patches: (name, shape, dtype, values, flat indices or None), read one at a time, over what
    comes before; `base` is that, a state dict or a folder, which tensors of encoding `steps` are decoded from and
    checked against (a state dict may be patched meanwhile). The folder, and the versions before it, are checked now,
    not at the first patch. InputError: one is damaged, missing, or not made from the one before; or it holds values to
    add.
    """
    versions = line(resolve(Path(path)) or Path(path))
    for version in versions:
        for name, entry in version.delta.entries.items():
            if entry.record.values is not None:
                raise InputError(
                    f"{path}: {name}: holds values to add, not final values",
                    hint="apply it to its base, or name it as a model of a recipe",
                )
    return Delta(versions, base)


def _content(tensor: Any) -> Content | None:
    """Return the content of a tensor in memory. None: there is none, or it is of no dtype of safetensors."""
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


OPEN = 4096  # versions that stay open

_Known = dict[tuple[str, int], Note | None]


def follow(
    chain: str | Path,
    *,
    after: str | None = None,
    latest: bool = False,
    poll: float = 1.0,
    timeout: float | None = None,
    marker: str | Path | None = None,
) -> Iterator[Delta]:
    """Yield the versions of a chain, each when it is published, the first ones at once.

    after     begin behind the version of this name; None: at the first
    latest    skip to the newest each time; `Delta.apply_` folds what was skipped
    poll      seconds between looks at the folder, which need not be there yet
    timeout   end when nothing new has come for so many seconds; None: never
    marker    a file that has the name of the version last done, written when the next is asked for; it says where to go
              on where it is there

    A version that was yielded when the process died comes again, which `apply_` makes nothing of. Where squash has
    folded the version last yielded, the one that it is folded into comes next, over the base (`after` is None).
    InputError: a version is damaged or foreign, two come after the same one, or the marker file is no text.
    """
    path, opened, known = Path(chain), Opened(), dict[tuple[str, int], Note | None]()
    if marker is not None:
        after = _marked(Path(marker)) or after
    waited = time.monotonic()
    while True:
        name = _next(path, known, after, latest=latest)
        found = None if name is None else _open(path, name, opened)
        if found is not None:
            yield found
            after, waited = found.name, time.monotonic()
            if marker is not None:
                replace_file(Path(marker), f"{after}\n")
            continue
        left = None if timeout is None else waited + timeout - time.monotonic()
        if left is not None and left <= 0:
            return
        time.sleep(poll if left is None else min(poll, left))


def _marked(marker: Path) -> str:
    """Return the name in a marker file, "" where there is no file. InputError: it cannot be read, or is no text."""
    try:
        return marker.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        why = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        hint = "name a file that `follow` wrote, or remove it to begin at the first version"
        raise InputError(f"{why}, so it names no version", hint=hint, where=str(marker)) from None


def _next(chain: Path, known: _Known, after: str | None, *, latest: bool) -> str | None:
    """Return the version that comes after one. None: none yet. InputError: two do."""
    if not chain.is_dir():
        return None
    found = _notes(chain, known)
    if after is None or after not in found:
        folded = {one.name: name for name, note in found.items() if note is not None for one in note.folded}
        firsts = [name for name, note in found.items() if note is None or note.after is None]
        if after is not None and after not in folded and found:
            raise InputError(f"{chain}: has no version {after}", hint="begin again: after=None, on the base")
    else:
        firsts = [
            name for name, note in found.items() if note is not None and note.after is not None
            and note.after.name == after
        ]  # fmt: skip
    if len(firsts) > 1:
        raise InputError(f"{chain}: {some(firsts)} all come after {after or 'the base'}")
    if not firsts or not latest:
        return firsts[0] if firsts else None
    return end_of(chain, found)


def _notes(chain: Path, known: _Known) -> Mapping[str, Note | None]:
    """Return the notes of all versions. Those of folders that are `known` are not read again."""
    there = folders(chain)
    for name, number in there:
        if (name, number) not in known and is_version(chain / name):
            try:
                known[name, number] = read_note(chain / name)
            except DeltamergeError:
                if folders(chain) == there:
                    raise
                return _notes(chain, known)  # one was folded while it was read
    for gone in known.keys() - {*there}:
        del known[gone]
    return without_folded({name: known[name, number] for name, number in there if (name, number) in known})


def _open(chain: Path, name: str, opened: Opened) -> Delta | None:
    """Open a version with all before it. None: one was folded meanwhile."""
    if len(opened.versions) > OPEN:
        opened.versions.clear()
    before = folders(chain)
    try:
        return Delta(line(chain / name, opened))
    except DeltamergeError:
        if folders(chain) == before:
            raise
        return None
