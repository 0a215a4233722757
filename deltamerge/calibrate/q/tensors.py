"""A fine-tune's tensors, deltas and masks on one device, read through the merge's own nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltamerge.calibrate.model.ahead import Ahead
from deltamerge.calibrate.model.blocks import BlockModel
from deltamerge.calibrate.model.candidates import Cache, Masked
from deltamerge.calibrate.model.passes import Weights, from_reader, stored
from deltamerge.calibrate.model.resident import Resident
from deltamerge.calibrate.spec import SPARSE_BELOW, CalibrationInput
from deltamerge.engine.devices import KEPT_SHARE, free_bytes
from deltamerge.engine.execute import shared_values
from deltamerge.engine.whole import computed
from deltamerge.methods.ops import dense
from deltamerge.tensors.graph import Graph, Node
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.tiles import Kept


class Tensors:
    """Of one fine-tune, whose stored tensors are `infos`, for a model of it, which says what part comes next. Dense
    masked deltas are kept in bfloat16 where `halved`.

    start      reads what masked deltas are added to
    masks      of each mask seed what reads its masked deltas
    tune       reads the fine-tune's own weights
    resident   on a GPU what has been sent there
    """

    def __init__(
        self,
        source: CalibrationInput,
        reader: Reader,
        infos: Mapping[str, TensorInfo],
        model: BlockModel,
        masks: Sequence[Mapping[str, Node]],
        known: Mapping[Node, Any],
        protected: Mapping[str, Node],
        *,
        halved: bool = False,
    ) -> None:
        self.source, self.reader, self.known, self.model, self.device = source, reader, known, model, model.device
        self.infos, self.halved = infos, halved
        self.pairs = {tune.name: (tune, base) for tune, base in source.pairs}
        columns = shared_values(list(protected.values()), known)
        self.protected = {name: torch.from_numpy(columns[node]) for name, node in protected.items()}
        self.resident = None if self.device.type == "cpu" else Resident(reader, self.device, source.share)
        self.ahead = Ahead(partial(stored, reader))
        self.tune = from_reader(lambda name: self._stored(self.infos[name]))
        # the variants of one walk share a part's weights and masks; earlier reads are in the page cache
        part, room = self._part_bytes(), source.cache
        if self.resident is not None:
            room = min(room, free_bytes(self.device) // (KEPT_SHARE * source.share))
        kept = part if self.resident is None else 0  # there it is by another name
        self.start = Cache(lambda names: {name: self._start(name) for name in names}, kept)
        self.masks = [Cache(partial(self._masked, n), part, max(0, room - part) // len(masks)) for n in masks]
        model.entering = self._read_ahead
        model.relieved = self._relieve

    def forget(self) -> None:
        """Free what is kept."""
        self.ahead.close()
        caches: list[Cache[Any]] = [self.start, *self.masks]
        for cache in caches:
            cache.clear()
        if self.resident is not None:
            self.resident.clear()

    def _relieve(self) -> bool:
        """Free what stays on a GPU, so that all of it streams by; whether there was any."""
        for mask in self.masks:
            mask.clear()
        return self.resident is not None and self.resident.shed()

    def delta(self, name: str) -> Tensor | None:
        """The part of a tensor's delta that is pruned: 0 in protected columns."""
        if name not in self.pairs:
            return None
        tune, base = self.pairs[name]
        if tune.shape != self.infos[name].shape:
            return None
        delta = self._read(tune) - self._read(base)
        if name in self.protected:
            delta[:, self.protected[name]] = 0.0
        return delta

    def _part_bytes(self) -> int:
        """Bytes of the tensors outside the blocks and of the largest block."""
        outside, *blocks = (sum(self.infos[name].nbytes for name in part) for part in self.model.parts)
        return outside + max(blocks, default=0)

    def _read_ahead(self, part: int, weights: Weights) -> None:
        """Read a part's weights while the one before it is computed: after the last block what is outside of them. A
        fine-tune's whose masks are kept are read only as its own weights."""
        names = self.model.parts[part % len(self.model.parts)]
        wanted = [self.infos[name] for name in names]
        if weights is not self.tune:
            wanted = [self.pairs.get(name, (info, info))[1] for name, info in zip(names, wanted, strict=True)]
            if self.resident is None:
                wanted = [start for name, start in zip(names, wanted, strict=True) if name not in self.start]
            self._advise([self.pairs[name][0] for name in names if name in self.pairs and not self._has_masks(name)])
        (self.ahead if self.resident is None else self.resident).begin(wanted)

    def _has_masks(self, name: str) -> bool:
        """Whether all masked deltas of a tensor are kept."""
        return all(name in mask for mask in self.masks)

    def _advise(self, tunes: Sequence[TensorInfo]) -> None:
        """Have the system read fine-tunes' tensors from which masks will be made."""
        for tune in tunes:
            self.reader.advise(tune, 0, tune.nbytes)

    def _stored(self, info: TensorInfo) -> Tensor:
        """A tensor as it is stored, on the device, to be read only."""
        flat = self.ahead(info) if self.resident is None else self.resident.stored(info)
        return flat.view(info.shape)

    def _read(self, info: TensorInfo) -> Tensor:
        """A stored tensor in float32; integers unchanged."""
        tensor = self._stored(info)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    def _start(self, name: str) -> Tensor:
        """The tensor that the masked delta is added to: the base with protected columns' deltas, else the fine-tune's
        own."""
        if name not in self.pairs:
            return self._stored(self.infos[name])
        tune, base = self.pairs[name]
        if name in self.protected:
            start, columns = self._read(base).clone(), self.protected[name]
            start[:, columns] += self._read(tune)[:, columns] - start[:, columns]
            return start
        if tune.shape == self.infos[name].shape:
            return self._stored(base)
        start = self._read(self.infos[name]).clone()
        start[: base.shape[0]] = self._read(base)
        return start

    def _masked(self, nodes: Mapping[str, Node], names: Sequence[str]) -> dict[str, Masked | None]:
        """The masked deltas of tensors, None where a tensor is not pruned."""
        found: dict[str, Masked | None] = dict.fromkeys(names)
        pruned = {name: nodes[name] for name in names if name in nodes}
        roots = {name: Graph().node(dense, [node], shape=node.shape) for name, node in pruned.items()}
        made = computed(roots, self.reader, device=self.source.device, known=self.known) if roots else {}
        return found | {name: self._kept(name, made.pop(name).view(np.float32)) for name in roots}

    def _kept(self, name: str, values: NDArray[np.float32]) -> Masked:
        """A masked delta as positions and values, or dense, whichever is smaller."""
        positions = np.flatnonzero(values)
        if len(positions) < SPARSE_BELOW * len(values):
            small = positions.astype(np.int32) if len(values) <= np.iinfo(np.int32).max else positions
            return Kept(self._placed(small), self._placed(values[positions]))
        whole = self.infos[name].shape
        lacking = math.prod(whole) - len(values)
        made = self._placed(np.pad(values, (0, lacking)) if lacking else values).view(whole)
        return made.to(torch.bfloat16) if self.halved else made

    def _placed(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)
