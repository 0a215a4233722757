"""A version of a chain over its base, read like a checkpoint: any range of any tensor, from any thread.

What is read of one version is kept for a moment, since the next one is made of it: the versions of a soup, read one
after the other, cost one patch each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.files.descriptors import flat
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.recent import RecentParts
from deltamerge.formats.delta.steps import STEP_TILE
from deltamerge.models.chain.version import Version
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.delta_over_base import over
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, fill, unique, view

KEPT = 16  # parts of tensors, of STEP_TILE elements or of what is read at once


@dataclass(slots=True)
class Layers:
    """Puts versions over bases; those of one chain and one base share their layers."""

    _made: dict[Any, Mapping[str, TensorInfo]] = field(default_factory=dict)
    _recent: RecentParts = field(default_factory=partial(RecentParts, KEPT))

    def over(self, delta: Checkpoint, versions: Sequence[Version], base: Checkpoint) -> Checkpoint:
        """Return the checkpoint that the last of `versions`, whose folder is `delta`, makes of `base`.

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
            below_it = None if old is None else old.tensor
            if info.kind == "view" and info.tensor is not below_it:
                beneath = [below_it] if below_it is not None and below_it.function == chain_link.__name__ else []
                inputs = [info.tensor, *beneath]
                place = LayerPlace((key, name), self._recent)
                made[name] = replace(info, tensor=unique(chain_link, inputs, info.shape, info.dtype, place=place))
        return made


def check_complete(first: Version, base: Checkpoint) -> None:
    """Raise InputError for a base with tensors that the first version of a chain neither lists nor removes."""
    manifest = first.delta.manifest
    known = {record.base_name or name for name, record in manifest.tensors.items()} | {*manifest.removed}
    if unknown := base.tensors.keys() - known:
        raise InputError(
            f"{first.path}: says nothing of the base's {min(unknown)}",
            hint="extract it again: the first version of a chain lists every tensor",
        )


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlace:
    """A tensor of a version, by a key, among what was made last."""

    key: Any
    recent: RecentParts


@view()
def chain_link(read: Read, tensor: Tensor, start: int, out: memoryview, *, place: LayerPlace) -> None:
    """Compute what a version makes of a tensor of the one before.

    The first input is the version's delta over the tensor before. A second one is that tensor, where a version made it.
    It is made from the highest version below that is still there, upwards, without recursion: a chain may have
    thousands of versions. Whole tiles of steps are made, which cannot be made in part.
    """
    size, width = len(out), ITEMSIZE[tensor.dtype]
    begin = start // STEP_TILE * STEP_TILE
    end = min(-(-(start + size // width) // STEP_TILE) * STEP_TILE, tensor.size)
    made = _whole(read, tensor, begin, (end - begin) * width)
    out[:] = flat(made)[(start - begin) * width :][:size]


def _whole(read: Read, tensor: Tensor, start: int, nbytes: int) -> Array:
    stack, held = [tensor], None
    while True:
        place: LayerPlace = stack[-1].parameter("place")
        held = place.recent.known((place.key, start, nbytes))
        if held is not None or len(stack[-1].inputs) == 1:
            break
        stack.append(stack[-1].inputs[1])
    if held is not None:
        stack.pop()
    while stack:
        one = stack.pop()
        place = one.parameter("place")
        source = read if held is None else _Held(read, held, start)
        held = place.recent.get((place.key, start, nbytes), partial(_filled, one.inputs[0], source, start, nbytes))
    assert held is not None
    return held


def _filled(layer: Tensor, read: Read, start: int, nbytes: int) -> Array:
    made: Array = np.empty(nbytes, np.uint8)
    fill(read, layer, start, flat(made))
    return made


@dataclass(frozen=True, slots=True)
class _Held:
    """Reads the tensor below from the part of it that was made."""

    read: Read
    part: Array
    start: int

    def read_into(self, info: Tensor | TensorInfo, start_elem: int, out: Any) -> None:
        view, begin = flat(out), (start_elem - self.start) * ITEMSIZE[info.dtype]
        view[:] = flat(self.part)[begin : begin + len(view)]

    def read_runs(self, info: Tensor | TensorInfo, offsets: Any, ends: Any, out: Any) -> None:
        self.read.read_runs(info, offsets, ends, out)

    def once(self, key: Any, compute: Any) -> Any:
        return self.read.once(key, compute)
