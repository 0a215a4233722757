"""The fine-tunes of a base on a disk, for a server that holds one: the changes to write for another.

Values are final values of checkpoint tensors, so that a server's own loader can split, join or cast them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.apps.chain.live import Change, Delta
from deltamerge.apps.chain.switch import DeltaCache, changes_of, check_config
from deltamerge.errors import InputError
from deltamerge.formats.delta.positions import Array, index_itemsize
from deltamerge.models.chain.folder import Version
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.delta_file import Patch, bits_of, to_torch
from deltamerge.models.delta_over_base import folded
from deltamerge.models.references import open_model
from deltamerge.tensors.dtypes import TORCH_NAMES, code_of
from deltamerge.tensors.reader import Reader, elements

Changes = Mapping[str, Change]


class ServedModel:
    """A base's folder (or hub id), and the changes of it that a server's model holds.

    at      the changes by tensor; {}: it is the base; None: not known, because a write has failed
    keep    number of deltas that stay decoded in memory, the last used; None: all
    """

    def __init__(self, base: str | Path, *, keep: int | None = None) -> None:
        found = open_model(str(base), Path.cwd(), weights=True)
        if found.is_delta and found.base is None:
            raise InputError(f"{base}: is a delta", hint="name the base that it was made from")
        self.base, self._config = OnDisk(found), found.config
        self.at: Changes | None = {}
        self._known: DeltaCache[Changes] = DeltaCache(keep, self._changes)
        self._hashes: dict[str, str] = {}

    def changes(self, delta: str | Path | Delta | None) -> Changes:
        """Return the changes that a delta, or a version of a chain, makes of the base. None: nothing.

        InputError: it is damaged, of another base, or makes tensors of other names, dtypes or shapes.
        """
        return {} if delta is None else self._known.get(delta)

    def touched(self, changes: Changes) -> list[str]:
        """Return the tensors that a model has to get for `changes`, in the base's order.

        They are the tensors that `changes` or the present changes touch.
        """
        return [name for name in self.base if self.at is None or name in changes or name in self.at]

    def weights(self, changes: Changes, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Yield tensors, whole, with `changes`."""
        for name in names:
            yield name, self._make(changes, name)

    def patches(self, changes: Changes) -> Iterator[Patch]:
        """Yield the patches from a model at `at` to one with `changes`.

        They are final values at every position that either changes.
        """
        for name in self.touched(changes):
            old = None if self.at is None else self.at.get(name)
            tensor, wheres = self._make(changes, name), []
            for change in (old, changes.get(name)):
                if change is not None and change.where is not None:
                    wheres.append(change.where)
                elif change is not None or self.at is None:
                    break
            else:
                where = _union(*wheres)
                values = to_torch(bits_of(tensor)[where], code_of(tensor.dtype) or "")
                width = index_itemsize(tensor.numel())
                indices = to_torch(where.astype(f"<i{width}"), f"I{8 * width}")
                yield Patch(name, tuple(tensor.shape), tensor.dtype, values, indices)
                continue
            yield Patch(name, tuple(tensor.shape), tensor.dtype, tensor.reshape(-1), None)

    def _make(self, changes: Changes, name: str) -> Any:
        tensor = self.base[name]
        if (change := changes.get(name)) is not None:
            bits_of(tensor)[slice(None) if change.where is None else change.where] = change.values
        return tensor

    def _changes(self, versions: Sequence[Version]) -> Changes:
        check_config(self._config, versions)
        return {change.key: change for change in changes_of(folded(versions), self.base, self._hashes)}


class OnDisk(Mapping[str, Any]):
    """A checkpoint's tensors as torch's, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        for name, info in checkpoint.tensors.items():
            if info.dtype not in TORCH_NAMES:
                raise InputError(f"{checkpoint.path}: {name} is {info.dtype}, which torch does not have")
        self._path, self._infos = checkpoint.path, checkpoint.tensors

    def __len__(self) -> int:
        return len(self._infos)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __getitem__(self, name: str) -> Any:
        info = self._infos[name]
        with errors.context(str(self._path)), Reader() as reader:
            bits = elements(reader, info)(0, math.prod(info.shape))
        return to_torch(bits, info.dtype).reshape(info.shape)


def _union(*wheres: Array) -> Array:
    """Return the ascending positions that are in either list."""
    return wheres[0] if len(wheres) == 1 else np.unique(np.concatenate(wheres))
