"""A delta artifact, or a version of a chain, applied to tensors in memory: all of it or nothing, and twice is once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.apps.chain.change import Change, Write, change_of, whole_of, write_of
from deltamerge.errors import InputError
from deltamerge.models.chain.folder import Content, Version, line, resolve, state_of
from deltamerge.models.chain.layers import folded
from deltamerge.models.delta_file import Patch, digest_of
from deltamerge.tensors.dtypes import code_of
from deltamerge.tensors.lazy import torch

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
