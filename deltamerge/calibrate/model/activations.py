"""One pass over the calibration rows with the fine-tune's weights: statistics of every linear layer's
inputs and delta, experts included, whether they are stacked in one tensor or stored one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deltamerge.calibrate.model.blocks import BlockModel, Inputs, Weights
from deltamerge.calibrate.model.candidates import Masked, dense
from deltamerge.calibrate.model.layers import Linear, MatrixCut
from deltamerge.calibrate.model.loading import Index
from deltamerge.calibrate.q.closed_forms import LayerStatistics, MatrixStatistics, Place, Vector, joined, pooled

Draw = Callable[[str, LayerStatistics], Masked | None]
"""(checkpoint name, the layer's statistics so far) -> its masked delta, unscaled; None: no mask for this tensor."""
MASKS = "attention_mask", "decoder_attention_mask"


def collect(
    model: BlockModel,
    weights: Weights,
    batches: Sequence[Inputs],
    delta: Callable[[str], Tensor | None],
    *,
    draw: Draw | None = None,
) -> dict[str, LayerStatistics]:
    """Return the statistics of every linear layer that has a delta and an input, by the checkpoint name of its weight.

    An expert that no token reached has those of all experts of its layer.

        model     the fine-tune's architecture
        weights   the fine-tune's
        batches   model inputs, with `attention_mask` (B, T) where there is padding, which is not counted
        delta     returns a tensor's delta in its stored layout; None: it has none (a head that the base lacks)
        draw      returns the mask of a layer, once its activations are known (WANDA needs their norms); the block then
                  runs once more for E[y ŷ] and E[ŷ²]

    Activations are float32, sums over tokens float64. Memory beside the pass: one block's deltas.
    """
    watch = _Collector(delta, draw, batches, model.device)
    model.run(batches, [weights], lambda batch, output: None, watch=watch)
    return watch.found


@dataclass
class _TokenSums:
    """Running sums over tokens of one layer or cut, float64 on the CPU; delta_OI is (m, n) whatever the stored
    layout."""

    delta_OI: Tensor
    bias_O: Vector
    masked_OI: Tensor | None = None
    tokens: int = 0
    x: list[Tensor] = field(default_factory=list)
    energy: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)

    def add(self, x_NI: Tensor) -> None:
        self.tokens += len(x_NI)
        self.x.append(torch.stack([_total(x_NI), _total(x_NI.abs()), _total(x_NI * x_NI)]))
        y_NO = x_NI @ self.delta_OI.T
        self.energy.append(_total(y_NO * y_NO))

    def add_masked(self, x_NI: Tensor) -> None:
        if self.masked_OI is not None:
            y_NO, kept_NO = x_NI @ self.delta_OI.T, x_NI @ self.masked_OI.T
            self.cross.append(torch.stack([_total(y_NO * kept_NO), _total(kept_NO * kept_NO)]))


class _Collector:
    """Sums of a part's layers, by name and by what is seen of them: the whole (None), or cuts."""

    def __init__(
        self,
        delta: Callable[[str], Tensor | None],
        draw: Draw | None,
        batches: Sequence[Inputs],
        device: torch.device,
    ) -> None:
        self.delta, self.draw, self.device = delta, draw, device
        self.masks = masks_of(batches)
        self.found: dict[str, LayerStatistics] = {}
        self.sums: dict[str, dict[MatrixCut | None, _TokenSums]] = {}
        self.deltas: dict[str, Tensor | None] = {}
        self.second = False

    def enter(self, layers: Sequence[Linear]) -> None:
        self.sums, self.deltas, self.second = {}, {}, False

    def see(self, seen: Linear | MatrixCut, x: Tensor, batch: int) -> None:
        layer, cut = (seen.layer, seen) if isinstance(seen, MatrixCut) else (seen, None)
        delta = self._delta(layer.name)
        if delta is None:
            return
        some = self.sums.setdefault(layer.name, {})
        if cut not in some:
            some[cut] = _TokenSums(_rows(delta, layer, cut), self._bias(layer, cut, delta))
        # a cut's inputs are those of the tokens that a router chose
        x_NI = tokens_of(x, self.masks[batch]) if cut is None else x[:, cut.features]
        if self.second:
            some[cut].add_masked(x_NI.to(torch.float32))
        else:
            some[cut].add(x_NI.to(torch.float32))

    def leave(self, layers: Sequence[Linear]) -> bool:
        self._finish(layers)
        if self.second or self.draw is None:
            return False
        for layer in layers:
            if some := self.sums.get(layer.name):
                masked, delta = self.draw(layer.name, self.found[layer.name]), self._delta(layer.name)
                if masked is not None and delta is not None:
                    whole = dense(masked, delta.shape).to(self.device)
                    for cut, sums in some.items():
                        sums.masked_OI = _rows(whole, layer, cut)
                        self.second = True
        return self.second

    def _finish(self, layers: Sequence[Linear]) -> None:
        """Return the statistics of the layers that have had tokens, and of the experts of their stacks that have had
        none."""
        stacks: dict[str, list[LayerStatistics]] = {}
        for layer in layers:
            if some := self.sums.get(layer.name):
                delta = self._delta(layer.name)
                assert delta is not None
                if None in some:
                    self.found[layer.name] = _finish(some[None], layer.transposed)
                else:
                    parts = [_part(sums, cut) for cut, sums in some.items() if cut is not None]
                    self.found[layer.name] = joined(parts, tuple(delta.shape))
                stacks.setdefault(layer.stack, []).append(self.found[layer.name])
        for layer in layers:
            unseen = layer.stack and layer.stack in stacks and layer.name not in self.sums
            if unseen and self._delta(layer.name) is not None:
                self.found[layer.name] = pooled(stacks[layer.stack])

    def _delta(self, name: str) -> Tensor | None:
        """Return a tensor's delta, as stored; read when it is first needed."""
        if name not in self.deltas:
            found = self.delta(name)
            self.deltas[name] = None if found is None else found.to(self.device, torch.float32)
        return self.deltas[name]

    def _bias(self, layer: Linear, cut: MatrixCut | None, delta: Tensor) -> Vector:
        bias = self.delta(layer.bias) if layer.bias else None
        if bias is None:
            return np.zeros(len(_rows(delta, layer, cut)))
        whole = bias.detach().to("cpu", torch.float64)
        return (whole if cut is None else whole.reshape(-1, whole.shape[-1])[cut.lead][cut.outputs]).numpy()


def _rows(stored: Tensor, layer: Linear, cut: MatrixCut | None) -> Tensor:
    """Return (m, n) a tensor of the file's whole, or a cut of it."""
    return cut.of(stored) if cut is not None else stored.T if layer.transposed else stored


def masks_of(batches: Sequence[Inputs]) -> list[list[Tensor]]:
    """Return the masks of real tokens that each batch has, for `tokens_of`."""
    return [[mask for key in MASKS if (mask := batch.get(key)) is not None] for batch in batches]


def tokens_of(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Return (N, n) the inputs of real tokens: x is (B, T, n) or, in a pooler, (sequences, n)."""
    flat = x.reshape(-1, x.shape[-1])
    mask = next((mask for mask in masks if mask.numel() == len(flat)), None)
    return flat if mask is None else flat[mask.reshape(-1).to(x.device, torch.bool)]


def _total(values: Tensor) -> Tensor:
    return values.sum(0, dtype=torch.float64).cpu()


def _finish(sums: _TokenSums, transposed: bool) -> LayerStatistics:
    total = torch.stack(sums.x).sum(0) / sums.tokens
    mean, mean_abs, square = (row.to(sums.delta_OI.device, torch.float32) for row in total)
    drawn = (torch.stack(sums.cross).sum(0) / sums.tokens).numpy() if sums.cross else None
    delta, n = sums.delta_OI, sums.delta_OI.shape[1]
    c = delta * mean
    c1 = c.sum(1, dtype=torch.float64).cpu().numpy()
    c2 = (c * c).sum(1, dtype=torch.float64).cpu().numpy()
    return LayerStatistics(
        tokens=sums.tokens,
        mean=total[0].numpy(),
        mean_abs=total[1].numpy(),
        square=total[2].numpy(),
        energy=(torch.stack(sums.energy).sum(0) / sums.tokens).numpy(),
        diagonal=(delta * delta * square).sum(1, dtype=torch.float64).cpu().numpy(),
        c1=c1 + sums.bias_O,
        c2=c2 + sums.bias_O**2,
        influence=c1 / n,
        mean_influence=float((delta.abs() * mean_abs).mean(dtype=torch.float64)),
        mean_delta=float(delta.abs().mean(dtype=torch.float64)),
        cross=None if drawn is None else drawn[0],
        power=None if drawn is None else drawn[1],
        transposed=transposed,
    )


def _part(sums: _TokenSums, cut: MatrixCut) -> MatrixStatistics:
    return MatrixStatistics(_finish(sums, cut.transposed), cut.lead, _numpy(cut.outputs), _numpy(cut.inputs))


def _numpy(index: Index) -> Place:
    return index if isinstance(index, slice) else index.numpy()
