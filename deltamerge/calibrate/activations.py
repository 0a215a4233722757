"""One pass over the calibration rows with the fine-tune's weights: statistics of every linear layer's
inputs and delta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from deltamerge.calibrate.blocks import BlockModel, Inputs, Linear, Weights
from deltamerge.calibrate.candidates import Masked, dense
from deltamerge.calibrate.statistics import LayerStatistics, Vector

Draw = Callable[[str, LayerStatistics], Masked | None]
"""(checkpoint name, the layer's statistics so far) -> its masked delta, unscaled; None: no mask for this tensor."""


def collect(
    model: BlockModel,
    weights: Weights,
    batches: Sequence[Inputs],
    delta: Callable[[str], Tensor | None],
    *,
    draw: Draw | None = None,
) -> dict[str, LayerStatistics]:
    """Statistics of every linear layer that has a delta, by the checkpoint name of its weight.

        model     the fine-tune's architecture
        weights   the fine-tune's
        batches   model inputs, with `attention_mask` (B, T) where there is padding, which is not counted
        delta     returns a tensor's delta in its stored layout; None: it has none (a head that the base lacks)
        draw      returns the mask of a layer, once its activations are known (WANDA needs their norms); the block then
                  runs once more for E[y ŷ] and E[ŷ²]

    Activations are float32, sums over tokens float64. Memory beside the pass: one block's deltas.
    """
    watch = _Collector(delta, draw, [batch.get("attention_mask") for batch in batches], model.device)
    model.run(batches, [weights], lambda batch, output: None, watch=watch)
    return watch.found


@dataclass
class _Sums:
    """Running sums over tokens of one layer, float64 on the CPU; delta_OI is (m, n) whatever the stored layout."""

    delta_OI: Tensor
    bias_O: Vector
    masked_OI: Tensor | None = None
    tokens: int = 0
    x: list[Tensor] = field(default_factory=list)
    energy: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)


class _Collector:
    def __init__(
        self,
        delta: Callable[[str], Tensor | None],
        draw: Draw | None,
        masks: Sequence[Tensor | None],
        device: torch.device,
    ) -> None:
        self.delta, self.draw, self.masks, self.device = delta, draw, masks, device
        self.found: dict[str, LayerStatistics] = {}
        self.sums: dict[str, _Sums] = {}
        self.second = False

    def enter(self, layers: Sequence[Linear]) -> None:
        self.sums, self.second = {}, False
        for layer in layers:
            delta = self.delta(layer.name)
            if delta is not None:
                self.sums[layer.name] = _Sums(self._rows(delta, layer), self._bias(layer, delta))

    def see(self, layer: Linear, x: Tensor, batch: int) -> None:
        sums = self.sums.get(layer.name)
        if sums is None:
            return
        x_NI = self._tokens(x, self.masks[batch]).to(torch.float32)
        if not self.second:
            sums.tokens += len(x_NI)
            sums.x.append(torch.stack([_total(x_NI), _total(x_NI.abs()), _total(x_NI * x_NI)]))
            y_NO = x_NI @ sums.delta_OI.T
            sums.energy.append(_total(y_NO * y_NO))
        elif sums.masked_OI is not None:
            y_NO, kept_NO = x_NI @ sums.delta_OI.T, x_NI @ sums.masked_OI.T
            sums.cross.append(torch.stack([_total(y_NO * kept_NO), _total(kept_NO * kept_NO)]))

    def leave(self, layers: Sequence[Linear]) -> bool:
        if self.second:
            for layer in layers:
                sums = self.sums.get(layer.name)
                if sums is not None and sums.cross:
                    self.found[layer.name] = _with_mask(self.found[layer.name], sums)
            return False
        for layer in layers:
            sums = self.sums.get(layer.name)
            if sums is not None and sums.tokens:
                self.found[layer.name] = statistics = _finish(sums, layer.transposed)
                masked = self.draw(layer.name, statistics) if self.draw else None
                if masked is not None:
                    shape = sums.delta_OI.T.shape if layer.transposed else sums.delta_OI.shape
                    sums.masked_OI = self._rows(dense(masked, shape), layer)
        self.second = any(sums.masked_OI is not None for sums in self.sums.values())
        return self.second

    def _rows(self, stored: Tensor, layer: Linear) -> Tensor:
        placed = stored.to(self.device, torch.float32)
        return placed.T if layer.transposed else placed

    def _bias(self, layer: Linear, delta: Tensor) -> Vector:
        bias = self.delta(layer.bias) if layer.bias else None
        rows = delta.shape[1] if layer.transposed else delta.shape[0]
        return np.zeros(rows) if bias is None else bias.detach().to("cpu", torch.float64).numpy()

    def _tokens(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(N, n) the inputs of real tokens: x is (B, T, n) or, in an expert or a pooler, (tokens, n)."""
        flat = x.reshape(-1, x.shape[-1])
        if mask is None or mask.numel() != len(flat):
            return flat
        return flat[mask.reshape(-1).to(x.device, torch.bool)]


def _total(values: Tensor) -> Tensor:
    return values.sum(0, dtype=torch.float64).cpu()


def _finish(sums: _Sums, transposed: bool) -> LayerStatistics:
    total = torch.stack(sums.x).sum(0) / sums.tokens
    mean, mean_abs, square = (row.to(sums.delta_OI.device, torch.float32) for row in total)
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
        transposed=transposed,
    )


def _with_mask(layer: LayerStatistics, sums: _Sums) -> LayerStatistics:
    cross, power = (torch.stack(sums.cross).sum(0) / sums.tokens).numpy()
    return replace(layer, cross=cross, power=power)
