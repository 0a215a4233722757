"""The fine-tune that is calibrated: its weights, deltas and masks read through the merge's own nodes, and its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltamerge import backends
from deltamerge.calibrate import objectives as O  # short for a namespace
from deltamerge.calibrate.activations import Draw, collect
from deltamerge.calibrate.blocks import Inputs, Linear, Model, from_reader
from deltamerge.calibrate.candidates import Cache, Masked, Q, pruned
from deltamerge.calibrate.data import Batches
from deltamerge.calibrate.data import Reader as Rows
from deltamerge.calibrate.split import metric_of, split, task_of
from deltamerge.calibrate.statistics import LayerStatistics
from deltamerge.errors import InputError
from deltamerge.execute import Task, default_workers, execute, shared_values
from deltamerge.graph import Graph, Node
from deltamerge.io.checkpoint import Reader, TensorInfo
from deltamerge.ops import torch_dtype
from deltamerge.stages import CACHE_BYTES, Source
from deltamerge.tensors import Kept

SPARSE_BELOW = 1 / 3  # of a tensor's entries: then positions and values are smaller than the tensor
BATCH = 32


class Subject:
    """A fine-tune and its rows; `masks[s]` gives the masked deltas of mask seed s by the fine-tune's tensor names.

    search, held  batches of the rows that are searched on, and of those held out
    sequences     how many sequences have gone through the model; a backward pass counts as two
    """

    def __init__(
        self,
        source: Source,
        reader: Reader,
        masks: Sequence[Mapping[str, Node]] = (),
        known: Mapping[Node, Any] | None = None,
        protected: Mapping[str, Node] | None = None,
    ) -> None:
        self.source, self.reader, self.known = source, reader, known or {}
        self.device = torch.device(source.device)
        self.infos = {tensor.name: tensor for tensor in source.tensors}
        self.pairs = {tune.name: (tune, base) for tune, base in source.pairs}
        self.config = _config(source)
        settings = self.config.to_dict() | {"num_labels": self.config.num_labels}
        self.task = task_of(source.calibration, settings)
        self.metric = metric_of(source.calibration, settings) if source.labelled else None
        search, held = split(source.calibration, source.folder, source.seed, settings, labelled=source.labelled)
        rows = Rows(source.checkpoint, self.config, task=self.task, length=source.calibration.length)
        self.search, self.held = (rows.batches(r, size=BATCH, labelled=source.labelled) for r in (search, held))
        self.counts = len(search), len(held)
        self.model = Model(self.config, self.infos, device=self.device, pad_token_id=rows.pad_token_id)
        budget = CACHE_BYTES // (2 + len(masks))
        self.tune = from_reader(Cache(lambda name: self._read(self.infos[name]), budget))
        self.start = Cache(self._start, budget)
        self.masks = [Cache(partial(self._masked, nodes), budget) for nodes in masks]
        columns = shared_values(list((protected or {}).values()), self.known)
        self.protected = {name: torch.from_numpy(columns[node]) for name, node in (protected or {}).items()}
        self.sequences = 0

    @property
    def layers(self) -> dict[str, Linear]:
        """The linear layers with a pruned weight: what a calibrated q is applied to."""
        return {layer.name: layer for part in self.model.layers for layer in part if layer.name in self.pairs}

    @property
    def passes(self) -> int:
        """Forward passes over the search rows that all sequences so far amount to."""
        return math.ceil(self.sequences / self.counts[0])

    def count(self, batches: Sequence[Inputs], models: int = 1) -> None:
        self.sequences += models * sum(len(next(iter(inputs.values()))) for inputs in batches)

    def output_change(self, data: Batches) -> O.OutputChange:
        self.count(data.inputs)
        return O.OutputChange.of(self.model, self.tune, data.inputs)

    def validation(self, data: Batches) -> O.Validation:
        assert data.labels is not None
        assert self.metric is not None
        return O.Validation(data.inputs, data.labels, self.metric)

    def distribution(self, inputs: Sequence[Inputs]) -> O.Distribution:
        self.count(inputs)
        regression = not self.model.headless and self.task == "text-classification" and O.is_regression(self.config)
        return O.Distribution.of(self.model, self.tune, inputs, regression=regression)

    def values(self, objective: O.Objective, qs: Sequence[Mapping[str, Q]], seeds: int | None = None) -> list[float]:
        """The objective of every choice of q's, over the first `seeds` masks (all of them)."""
        masks = self.masks[:seeds]
        variants = [pruned(self.start, mask, q) for q in qs for mask in masks]
        found = O.evaluate(self.model, objective, variants)
        self.count(objective.batches, len(variants))
        return [O.over_seeds(found[i : i + len(masks)]) for i in range(0, len(found), len(masks))]

    def statistics(self, *, drawn: bool) -> dict[str, LayerStatistics]:
        """Of the layers that saw an input, over the search rows; with `drawn`, the first mask's too."""
        draw: Draw | None = (lambda name, _: self.masks[0](name)) if drawn else None
        self.count(self.search.inputs, 2 if drawn else 1)
        return collect(self.model, self.tune, self.search.inputs, self.delta, draw=draw)

    def delta(self, name: str) -> Tensor | None:
        """What is pruned of a tensor's delta: 0 in protected columns."""
        if name not in self.pairs:
            return None
        tune, base = self.pairs[name]
        if tune.shape != self.infos[name].shape:
            return None
        delta = self._read(tune) - self._read(base)
        if name in self.protected:
            delta[:, self.protected[name]] = 0.0
        return delta

    def _read(self, info: TensorInfo) -> Tensor:
        """A stored tensor in float32; integers as they are."""
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self.reader.read_into(info, 0, raw.numpy())
        tensor = raw.view(torch_dtype(info.dtype)).view(info.shape)
        return tensor.to(self.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def _start(self, name: str) -> Tensor:
        """What the masked delta is added to: the base, with protected columns' deltas; else the fine-tune's own."""
        if name not in self.pairs:
            return self._read(self.infos[name])
        tune, base = self.pairs[name]
        if name in self.protected:
            start, columns = self._read(base), self.protected[name]
            start[:, columns] += self._read(tune)[:, columns] - start[:, columns]
            return start
        if tune.shape == self.infos[name].shape:
            return self._read(base)
        start = self._read(self.infos[name])
        start[: base.shape[0]] = self._read(base)
        return start

    def _masked(self, nodes: Mapping[str, Node], name: str) -> Masked | None:
        node = nodes.get(name)
        if node is None:
            return None
        root = Graph().node("deltamerge.ops:dense", [node], shape=node.shape)
        sink = Memory(math.prod(node.shape))
        task = Task(name, root, backends.choose(root, self.source.device))
        execute([task], self.reader, sink, device=self.source.device, workers=default_workers(), known=self.known)
        flat = torch.from_numpy(sink.values).to(self.device)
        positions = flat.nonzero().flatten()
        if len(positions) < SPARSE_BELOW * len(flat):
            return Kept(positions, flat[positions])
        whole = self.infos[name].shape
        padded = torch.nn.functional.pad(flat, (0, math.prod(whole) - len(flat)))
        return padded.view(whole)


class Memory:
    """A sink for one float32 tensor."""

    def __init__(self, size: int) -> None:
        self.values = np.empty(size, np.float32)

    def write(self, name: str, offset: int, data: Any) -> None:
        self.values.view(np.uint8)[offset : offset + data.nbytes] = data.view(np.uint8)

    def copy(self, name: str, offset: int, source: TensorInfo, start: int, nbytes: int, reader: Reader) -> None:
        raise AssertionError("a masked delta is computed, never copied")


def _config(source: Source) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"transformers cannot read its config.json: {str(error).splitlines()[0]}") from None
