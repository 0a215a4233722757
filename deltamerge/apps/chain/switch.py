"""Many fine-tunes of one base in one process: their deltas are written into its tensors, one at a time, and undone."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from deltamerge import errors
from deltamerge.apps.chain.live import Change, Delta, Write, change_of, whole_of, write_of
from deltamerge.errors import InputError
from deltamerge.formats.components import CONFIG, read_config
from deltamerge.formats.delta.entry import OTHER_BASE, Entry
from deltamerge.models.chain.folder import Stamp, Version, line, served, stamp
from deltamerge.models.config_differences import differences
from deltamerge.models.delta_file import DeltaFile, digest_of
from deltamerge.models.delta_over_base import folded
from deltamerge.tensors.dtypes import code_of
from deltamerge.tensors.lazy import torch

T = TypeVar("T")


class Switch:
    """A model that holds its base, switched between the fine-tunes whose deltas are named.

    base    a torch module, or a state dict of torch tensors on any device, which are written in place. While a delta is
            applied, nothing else may write to them, because going back restores only entries that the delta changed.
            Tensors are found by their names in the base, or in the fine-tune, whose head may be present too
    keep    number of deltas that stay decoded in memory, the last used; None: all
    at      the applied delta, as passed to `to`; None: the base

    The first `to` of a delta reads and decodes it, and checks the base's tensors and its own by hash. Later calls only
    write the changed values, as long as the folder holds the same delta. Memory: values and int32 positions of each
    decoded delta (whole tensors if more than an eighth changes), and the base's values under the applied delta.
    """

    def __init__(self, base: Any, *, keep: int | None = None) -> None:
        state = base.state_dict() if hasattr(base, "state_dict") else base
        if not isinstance(state, Mapping):
            raise InputError(f"Switch takes a module or a state dict, not {type(base).__name__}")
        self._state: dict[str, Any] = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
        to_dict = getattr(getattr(base, "config", None), "to_dict", None)
        self._config: Mapping[str, Any] = {} if to_dict is None else to_dict()
        self._known = DeltaCache(keep, self._prepare)
        self._hashes: dict[str, str] = {}
        self._undo: list[Write] = []
        self._writes: tuple[Write, ...] = ()
        self.at: str | Path | Delta | None = None

    def __repr__(self) -> str:
        return f"<Switch at {'the base' if self.at is None else self.at}, {len(self._known)} deltas known>"

    def to(self, delta: str | Path | Delta | None) -> None:
        """Switch the model to `delta`: an artifact, a version of a chain, or a chain. None: the base.

        A chain stands for its pinned version, or its newest.

        InputError: the delta is missing, damaged or for another base; its result has other names, dtypes or shapes; its
        config.json gives places in the weights another meaning. A module computes with its own config, so a
        `UserWarning` names keys in which the delta's config differs. If anything fails, the model stays as it was.
        """
        before, writes = self.at, self._writes
        with torch.no_grad():
            try:
                self._back()
                self._put(() if delta is None else self._known.get(delta), delta)
            except BaseException:
                self._back()
                self._put(writes, before)
                raise

    def _put(self, writes: tuple[Write, ...], delta: str | Path | Delta | None) -> None:
        """Write a delta's changes into the base."""
        for write in writes:
            self._undo.append(write.kept())
            write.put()
        self.at, self._writes = delta, writes

    def _back(self) -> None:
        """Restore the base, the last write first. It can be called again if it is interrupted."""
        self.at, self._writes = None, ()
        while self._undo:
            self._undo[-1].put()
            self._undo.pop()

    def _prepare(self, versions: Sequence[Version]) -> tuple[Write, ...]:
        """Return the writes of a line of versions into the base. InputError: see `to`."""
        check_config(self._config, versions)
        changes = changes_of(folded(versions), self._state, self._hashes)
        return tuple(write_of(change, self._state[change.key]) for change in changes)


class DeltaCache(Generic[T]):
    """Values made of deltas, by folder: each while the folder holds the same artifact, at most `keep` of them."""

    def __init__(self, keep: int | None, make: Callable[[Sequence[Version]], T]) -> None:
        if keep is not None and keep < 1:
            raise InputError(f"keep is {keep}: at least the delta that is on is kept")
        self._keep, self._make = keep, make
        self._made: OrderedDict[str, tuple[Stamp | None, T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._made)

    def get(self, delta: str | Path | Delta) -> T:
        """Return the value for an artifact, a version of a chain, or a chain (its pinned version, or its newest).

        InputError: one is damaged.
        """
        path = delta.path if isinstance(delta, Delta) else (served(Path(delta)) or Path(delta)).resolve()
        key, held = str(path), stamp(path)
        if (found := self._made.get(key)) is None or found[0] != held:
            self._made.pop(key, None)
            with errors.context(str(path if isinstance(delta, Delta) else delta)):
                versions = delta.versions if isinstance(delta, Delta) else line(path)
                self._made[key] = held, self._make(versions)
        self._made.move_to_end(key)
        while self._keep is not None and len(self._made) > self._keep:
            self._made.popitem(last=False)
        return self._made[key][1]


def check_config(base: Mapping[str, Any], versions: Sequence[Version]) -> None:
    """Warn of keys in which the config of versions differs from the base's, which stays as weights change.

    InputError: the same places of weights mean different things. An unknown base is not compared.
    """
    folders = (version.path for version in reversed(versions))
    path = next((folder for folder in folders if (folder / CONFIG).is_file()), None)
    if not base or path is None:
        return
    for one in differences([("the base", base), (path.name, read_config(path))]):
        if one.kind == "positions":
            message = f"{one.key} is {one.said()}: the same places of their weights mean different things"
            raise InputError(message, hint="deltamerge apply makes a model with a config of its own")
        if one.kind == "function":
            said = f"{path}: config.json: {one.key} is {one.said()}; the model computes on with the base's"
            warnings.warn(said, stacklevel=2)


def changes_of(delta: DeltaFile, state: Mapping[str, Any], hashes: MutableMapping[str, str]) -> Iterator[Change]:
    """Yield the changes that a delta makes of a base's tensors, tensor by tensor.

    Every tensor that it names is checked, and its result too. `hashes` are the known hashes of the base's tensors.
    InputError: it is damaged or of another base, or makes tensors of other names, dtypes or shapes.
    """
    if gone := state.keys() & {*delta.manifest.removed}:
        raise _unfit(min(gone), "is dropped")
    keys = {name: entry.key_in(state) for name, entry in delta.entries.items()}
    uses = Counter(keys.values())
    for name, entry in delta.entries.items():
        key, record = keys[name], entry.record
        tensor, belongs = state.get(key), f"it belongs to {delta.manifest.base}"
        _refuse_unfit(entry, key, tensor, belongs, copied=uses[key] > 1)
        with errors.context(name):
            if record.base is None:
                yield whole_of(entry, None)
                continue
            if not record.count and record.result == record.base:
                if key not in hashes:
                    hashes[key] = digest_of(tensor)
                if hashes[key] != record.base:
                    raise InputError(OTHER_BASE, hint=belongs)
                continue
            try:
                change = change_of(entry, key, tensor)
            except InputError as error:
                error.hint = error.hint or belongs
                raise
        hashes[key] = record.base
        if change is not None:
            yield change


def _refuse_unfit(entry: Entry, key: str, tensor: Any, belongs: str, *, copied: bool) -> None:
    """Refuse a tensor that is not of the base's dtype and shape, or that the delta makes another one, or several."""
    record = entry.record
    becomes = entry.kind
    wanted = becomes if record.base is None else entry.base_kind
    found = None if tensor is None else (code_of(tensor.dtype), tuple(tensor.shape))
    if record.base is None and found != wanted:
        raise _unfit(entry.name, f"is new, {_said(wanted)}")
    if found != wanted:
        said = "is not there" if found is None else f"is {_said(found)}"
        raise InputError(f"{key} {said}, the delta was made from {_said(wanted)}", hint=belongs)
    if becomes != wanted:
        raise _unfit(entry.name, f"becomes {_said(becomes)}")
    if copied:
        raise _unfit(entry.name, f"comes from {key} as others do")


def _said(kind: tuple[str | None, tuple[int, ...]]) -> str:
    return f"{kind[0] or 'of another dtype'} {list(kind[1])}"


def _unfit(name: str, what: str) -> InputError:
    return InputError(
        f"{name} {what}, and a model that is switched keeps its tensors",
        hint="load_delta(path).apply_(state_dict), or deltamerge apply",
    )
