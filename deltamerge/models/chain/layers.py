"""A version of a chain over its base, read like a checkpoint: any range of any tensor, from any thread.

What is read of one version is kept for a moment, since the next one is made of it: the versions of a soup, read one
after the other, cost one patch each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.files.descriptors import flat
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.recent import Kept
from deltamerge.formats.delta.steps import STEP_TILE
from deltamerge.models.chain.version import Version
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.delta_over_base import over
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.tensor import Made, Read, TensorInfo

KEPT = 16  # parts of tensors, of STEP_TILE elements or of what is read at once


@dataclass(slots=True)
class Layers:
    """Puts versions over bases; those of one chain and one base share their layers."""

    _made: dict[Any, Mapping[str, TensorInfo]] = field(default_factory=dict)
    _recent: Kept = field(default_factory=partial(Kept, KEPT))

    def over(self, delta: Checkpoint, versions: Sequence[Version], base: Checkpoint) -> Checkpoint:
        """The checkpoint that the last of `versions`, whose folder is `delta`, makes of `base`.

        InputError: as `over_base.over`; or the base has tensors of which the first version says nothing.
        """
        last = versions[-1]
        top = over(delta, last.delta, base) if len(versions) == 1 else None
        if top is not None and last.note is None:
            return top
        check_complete(versions[0], base)
        if top is not None:
            return top
        below: Mapping[str, TensorInfo] = {}
        for number, version in enumerate(versions):
            key = (str(version.path), version.state, base.reference, str(base.path), base.revision)
            if key not in self._made:
                self._made[key] = self._level(delta, version, base, below if number else None, key)
            below = self._made[key]
        found = over(delta, versions[0].delta, base)
        return replace(found, tensors=dict(below), files=last.delta.files)

    def _level(
        self, delta: Checkpoint, version: Version, base: Checkpoint, below: Mapping[str, TensorInfo] | None, key: Any
    ) -> Mapping[str, TensorInfo]:
        under = base if below is None else replace(base, tensors=dict(below))
        made = dict(over(replace(delta, path=version.path), version.delta, under).tensors)
        for name, info in made.items():
            old = None if below is None else below[name]
            if info.made is not None and (old is None or info.made is not old.made):
                beneath = old.made if old is not None and isinstance(old.made, Patched) else None
                made[name] = replace(
                    info, made=Patched(info.made, info.dtype, math.prod(info.shape), beneath, (key, name), self._recent)
                )
        return made


def check_complete(first: Version, base: Checkpoint) -> None:
    """InputError: the base has tensors that the first version of a chain neither lists nor removes."""
    manifest = first.delta.manifest
    known = {record.base_name or name for name, record in manifest.tensors.items()} | {*manifest.removed}
    if unknown := base.tensors.keys() - known:
        raise InputError(
            f"{first.path}: says nothing of the base's {min(unknown)}",
            hint="extract it again: the first version of a chain lists every tensor",
        )


@dataclass(frozen=True, slots=True, eq=False)
class Patched:
    """What a version makes of a tensor of the one before, which is `below` if that is patched too (None: it is stored
    as it is); dtype and number of elements are the result's."""

    layer: Made
    dtype: str
    size: int
    below: Patched | None
    key: Any
    recent: Kept

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        """Fill `out` with bytes from element `start` on: from the highest version below that is still there, upwards,
        without recursion, as a chain may have thousands of versions. What is made are whole tiles of steps, which
        cannot be made in part."""
        size, width = len(out), ITEMSIZE[self.dtype]
        begin = start // STEP_TILE * STEP_TILE
        end = min(-(-(start + size // width) // STEP_TILE) * STEP_TILE, self.size)
        made = self._whole(read, begin, (end - begin) * width)
        out[:] = flat(made)[(start - begin) * width :][:size]

    def _whole(self, read: Read, start: int, nbytes: int) -> Array:
        stack, held = [self], None
        while True:
            lowest = stack[-1]
            held = self.recent.known((lowest.key, start, nbytes))
            if held is not None or lowest.below is None:
                break
            stack.append(lowest.below)
        if held is not None:
            stack.pop()
        while stack:
            patched = stack.pop()
            source = read if held is None else _Held(read, held, start)
            held = self.recent.get((patched.key, start, nbytes), partial(_filled, patched.layer, source, start, nbytes))
        assert held is not None
        return held


def _filled(layer: Made, read: Read, start: int, nbytes: int) -> Array:
    made: Array = np.empty(nbytes, np.uint8)
    layer.fill(read, start, flat(made))
    return made


@dataclass(frozen=True, slots=True)
class _Held:
    """Reads the tensor below from the part of it that was made."""

    read: Read
    part: Array
    start: int

    def read_into(self, info: TensorInfo, start_elem: int, out: Any) -> None:
        view, begin = flat(out), (start_elem - self.start) * ITEMSIZE[info.dtype]
        view[:] = flat(self.part)[begin : begin + len(view)]

    def read_runs(self, info: TensorInfo, offsets: Any, ends: Any, out: Any) -> None:
        self.read.read_runs(info, offsets, ends, out)

    def once(self, key: Any, compute: Any) -> Any:
        return self.read.once(key, compute)
