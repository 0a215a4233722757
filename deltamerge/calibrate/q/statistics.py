"""Statistics of linear layers over the calibration rows, and their closed forms: bounds, errors, q.

`collect` makes one pass over the rows with the fine-tune's weights. Experts are layers too, whether the file stacks
them in one tensor or stores them one by one.

Δ (m, n) is a layer's delta, x (n) its input, d the density, p = 1 − d, and q divides the kept entries. Source of the
bounds: Deng et al., DAREx, arXiv 2410.09344, Theorem 3.1 and App. C.9. The least-squares forms are deltamerge's own.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltamerge.calibrate.model.blocks import BlockModel, Inputs, Weights
from deltamerge.calibrate.model.candidates import Masked, dense
from deltamerge.calibrate.model.layers import Linear, MatrixCut
from deltamerge.calibrate.model.loading import Index

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Averages of one pass over the calibration tokens, of a layer y = x Wᵀ + b; E is the mean over tokens.

    tokens           N, padding excluded
    mean, mean_abs   (n) E[x_j], E|x_j|
    square           (n) E[x_j²]
    energy           (m) A_i = E[(Δ_i x)²]
    diagonal         (m) D_i = Σ_j Δ_ij² E[x_j²]
    c1, c2           (m) Σ_j Δ_ij E[x_j] + Δb_i and Σ_j (Δ_ij E[x_j])² + Δb_i²
    influence        (m) c̄_i, the mean of c_ij = Δ_ij x_j over inputs and tokens
    mean_influence   mean of |c_ij| over outputs, inputs and tokens
    mean_delta       mean of |Δ_ij|
    cross, power     (m) E[y_i ŷ_i] and E[ŷ_i²], y = Δ x, ŷ = (mask ∘ Δ) x; None without a drawn mask
    transposed       whether the weight is stored (in, out)
    parts            for a tensor that stacks several matrices (experts), the statistics of each. The tensor's own are
                     over all tokens of all matrices, and also stand for a matrix that no token reached
    """

    tokens: int
    mean: Vector
    mean_abs: Vector
    square: Vector
    energy: Vector
    diagonal: Vector
    c1: Vector
    c2: Vector
    influence: Vector
    mean_influence: float
    mean_delta: float
    cross: Vector | None = None
    power: Vector | None = None
    transposed: bool = False
    parts: tuple[LayerStatistics, ...] = ()

    @property
    def norm(self) -> Vector:
        """Return (n) ‖x_j‖₂ over the calibration tokens: WANDA's weight of input feature j; (E, n) of stacked
        matrices."""
        if self.parts:
            return np.stack([part.norm for part in self.parts])
        return np.sqrt(self.tokens * self.square)

    @property
    def variance(self) -> Vector:
        """Return (m) σ_i², the variance of c_ij over inputs and tokens: n (c̄_i² + σ_i²) = D_i."""
        return np.maximum(self.diagonal / len(self.mean) - self.influence**2, 0.0)

    @property
    def coherence(self) -> float:
        """Return D/A: near 0 plain DARE is right, near 1 rescaling only adds noise. 0 if the delta has no effect."""
        return float(_ratio(self.diagonal.sum(), self.energy.sum()))

    def massive(self, k: int) -> list[int]:
        """Return the k input features with the largest E|x_j|, ascending; of equal ones the lower index."""
        return sorted(np.argsort(-self.mean_abs, kind="stable")[:k].tolist())


Draw = Callable[[str], Masked | None]
"""Checkpoint name of a weight -> its masked delta, unscaled; None: it has no mask."""
MASKS = "attention_mask", "decoder_attention_mask"


def collect(
    model: BlockModel,
    weights: Weights,
    batches: Sequence[Inputs],
    delta: Callable[[str], Tensor | None],
    *,
    draw: Draw | None = None,
) -> dict[str, LayerStatistics]:
    """Return the statistics of every linear layer with a delta and an input, by the checkpoint name of its weight.

        model     the fine-tune's architecture
        weights   the fine-tune's
        batches   model inputs; padding, by `attention_mask` (B, T), is not counted
        delta     returns a tensor's delta in its stored layout; None: it has none (a head that the base lacks)
        draw      returns a layer's masked delta, for E[y ŷ] and E[ŷ²]

    An expert that no token reached has the statistics of all experts of its layer. Activations are float32, sums over
    tokens float64. Memory beside the pass: one block's deltas and masks.
    """
    watch = _Collector(delta, draw, batches, model.device)
    model.run(batches, [weights], lambda batch, output: None, watch=watch)
    return watch.found


@dataclass
class _TokenSums:
    """Running sums over tokens of one layer or cut, float64 on the CPU; matrices are (m, n) whatever the stored
    layout."""

    delta_OI: Tensor
    bias_O: Vector
    masked_OI: Tensor | None
    tokens: int = 0
    x: list[Tensor] = field(default_factory=list)
    energy: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)

    def add(self, x_NI: Tensor) -> None:
        self.tokens += len(x_NI)
        self.x.append(torch.stack([_total(x_NI), _total(x_NI.abs()), _total(x_NI * x_NI)]))
        y_NO = x_NI @ self.delta_OI.T
        self.energy.append(_total(y_NO * y_NO))
        if self.masked_OI is not None:
            kept_NO = x_NI @ self.masked_OI.T
            self.cross.append(torch.stack([_total(y_NO * kept_NO), _total(kept_NO * kept_NO)]))

    def statistics(self, transposed: bool) -> LayerStatistics:
        """Return the averages over the tokens."""
        total = torch.stack(self.x).sum(0) / self.tokens
        mean, mean_abs, square = (row.to(self.delta_OI.device, torch.float32) for row in total)
        drawn = (torch.stack(self.cross).sum(0) / self.tokens).numpy() if self.cross else None
        delta, n = self.delta_OI, self.delta_OI.shape[1]
        c = delta * mean
        c1 = c.sum(1, dtype=torch.float64).cpu().numpy()
        c2 = (c * c).sum(1, dtype=torch.float64).cpu().numpy()
        return LayerStatistics(
            tokens=self.tokens,
            mean=total[0].numpy(),
            mean_abs=total[1].numpy(),
            square=total[2].numpy(),
            energy=(torch.stack(self.energy).sum(0) / self.tokens).numpy(),
            diagonal=(delta * delta * square).sum(1, dtype=torch.float64).cpu().numpy(),
            c1=c1 + self.bias_O,
            c2=c2 + self.bias_O**2,
            influence=c1 / n,
            mean_influence=float((delta.abs() * mean_abs).mean(dtype=torch.float64)),
            mean_delta=float(delta.abs().mean(dtype=torch.float64)),
            cross=None if drawn is None else drawn[0],
            power=None if drawn is None else drawn[1],
            transposed=transposed,
        )


class _Collector:
    """A watch that sums over the inputs of layers. A layer is seen whole (None), or in cuts."""

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
        self.matrices: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def enter(self, layers: Sequence[Linear]) -> None:
        self.sums, self.matrices = {}, {}

    def see(self, seen: Linear | MatrixCut, x: Tensor, batch: int) -> None:
        layer, cut = (seen.layer, seen) if isinstance(seen, MatrixCut) else (seen, None)
        delta, masked = self._matrices(layer.name)
        if delta is None:
            return
        some = self.sums.setdefault(layer.name, {})
        if cut not in some:
            rows = None if masked is None else _rows(masked, layer, cut)
            some[cut] = _TokenSums(_rows(delta, layer, cut), self._bias(layer, cut, delta), rows)
        # a cut's inputs are the tokens that a router chose
        x_NI = tokens_of(x, self.masks[batch]) if cut is None else x[:, cut.features]
        some[cut].add(x_NI.to(torch.float32))

    def leave(self, layers: Sequence[Linear]) -> None:
        """Add the statistics of the layers that had tokens, and of their fellow experts without tokens."""
        stacks: dict[str, list[LayerStatistics]] = {}
        for layer in layers:
            if some := self.sums.get(layer.name):
                delta, _ = self._matrices(layer.name)
                assert delta is not None
                if None in some:
                    self.found[layer.name] = some[None].statistics(layer.transposed)
                else:
                    parts = [_part(sums, cut) for cut, sums in some.items() if cut is not None]
                    self.found[layer.name] = joined(parts, tuple(delta.shape))
                stacks.setdefault(layer.stack, []).append(self.found[layer.name])
        for layer in layers:
            unseen = layer.stack and layer.stack in stacks and layer.name not in self.sums
            if unseen and self._matrices(layer.name)[0] is not None:
                self.found[layer.name] = pooled(stacks[layer.stack])

    def _matrices(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Return a tensor's delta and its masked one, as stored; read when they are first needed."""
        if name not in self.matrices:
            delta = self.delta(name)
            masked = None if delta is None or self.draw is None else self.draw(name)
            self.matrices[name] = (
                None if delta is None else delta.to(self.device, torch.float32),
                None if delta is None or masked is None else dense(masked, delta.shape).to(self.device),
            )
        return self.matrices[name]

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


Place = slice | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MatrixStatistics:
    """Statistics of a part of a tensor: its matrix, and the outputs and inputs that the part has."""

    layer: LayerStatistics
    matrix: int
    outputs: Place
    inputs: Place


def _part(sums: _TokenSums, cut: MatrixCut) -> MatrixStatistics:
    return MatrixStatistics(sums.statistics(cut.transposed), cut.lead, _numpy(cut.outputs), _numpy(cut.inputs))


def _numpy(index: Index) -> Place:
    return index if isinstance(index, slice) else index.numpy()


def joined(parts: Sequence[MatrixStatistics], shape: tuple[int, ...]) -> LayerStatistics:
    """Return the statistics of a whole tensor of `shape`: averages over the tokens of each part."""
    transposed = parts[0].layer.transposed
    sides = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    whole = _averaged(parts, sides)
    if len(shape) == 2:
        return whole
    own: dict[int, list[MatrixStatistics]] = {}
    for part in parts:
        own.setdefault(part.matrix, []).append(part)
    count = math.prod(shape[:-2])
    each = tuple(_averaged(own[e], sides) if e in own else whole for e in range(count))
    return replace(whole, parts=each)


def pooled(layers: Sequence[LayerStatistics]) -> LayerStatistics:
    """Return the statistics over all tokens of several layers of one shape."""
    sides = len(layers[0].energy), len(layers[0].mean)
    return _averaged([MatrixStatistics(layer, 0, slice(None), slice(None)) for layer in layers], sides)


OF_OUTPUTS = "energy", "diagonal", "c1", "c2", "influence"
OF_MASKS = "cross", "power"  # of outputs, too
OF_INPUTS = "mean", "mean_abs", "square"


def _averaged(parts: Sequence[MatrixStatistics], sides: tuple[int, int]) -> LayerStatistics:
    """Average the statistics of parts of a matrix (m, n). Each output and input counts the tokens of the parts that
    have it."""
    weights = [part.layer.tokens for part in parts]
    counts = np.zeros(sides[0]), np.zeros(sides[1])
    for part, weight in zip(parts, weights, strict=True):
        counts[0][part.outputs] += weight
        counts[1][part.inputs] += weight
    masked = OF_MASKS if all(part.layer.power is not None for part in parts) else ()
    averages: dict[str, Any] = {}
    for side, names in enumerate(((*OF_OUTPUTS, *masked), OF_INPUTS)):
        for name in names:
            total = np.zeros(sides[side])
            for part, weight in zip(parts, weights, strict=True):
                total[(part.outputs, part.inputs)[side]] += weight * getattr(part.layer, name)
            averages[name] = _ratio(total, counts[side])
    for name in ("mean_influence", "mean_delta"):
        averages[name] = float(np.average([getattr(part.layer, name) for part in parts], weights=weights))
    tokens = int(max(counts[0].max(), counts[1].max()))
    return LayerStatistics(tokens, **averages, transposed=parts[0].layer.transposed)


def phi(p: float) -> float:
    """Return Kearns–Saul φ(p) = (1 − 2p) / log((1 − p)/p), continuous: φ(1/2) = 1/2, φ(0) = φ(1) = 0."""
    if p <= 0.0 or p >= 1.0:
        return 0.0
    if abs(p - 0.5) < 1e-4:
        return 0.5 - (2.0 * p - 1.0) ** 2 / 6.0
    return (1.0 - 2.0 * p) / math.log((1.0 - p) / p)


def guaranteed(layer: LayerStatistics, density: float, gamma: float = 0.05) -> Vector:
    """Return (m) the bound on vanilla DARE's change of output i, with probability ≥ 1 − γ: sqrt(φ(p) log(2/γ) D_i) / d.

    Theorem 3.1, the root mean square of its bound over tokens.
    """
    return np.sqrt(phi(1.0 - density) * math.log(2.0 / gamma) * layer.diagonal) / density


def typical(layer: LayerStatistics, density: float, gamma: float = 0.05) -> Vector:
    """Return (m) the paper's tightened form, sqrt(2 p/(1 − p) log(2/γ) D_i) for p > 1/2: a typical size, no
    guarantee."""
    p = 1.0 - density
    if p <= 0.5:
        return guaranteed(layer, density, gamma)
    return np.sqrt(2.0 * p / density * math.log(2.0 / gamma) * layer.diagonal)


def dare_error(layer: LayerStatistics, density: float) -> float:
    """Return the expected E‖Δx − (1/d)(δ∘Δ)x‖² / E‖Δx‖² of vanilla DARE: (p/d) D/A."""
    return (1.0 - density) / density * layer.coherence


def least_squares(layer: LayerStatistics, density: float, eta: float = 1.0) -> float:
    """Return q = d + η p D/A, at most 1: η = 1 is least squares over random masks, q*; η = 0 is vanilla DARE."""
    return min(1.0, density + eta * (1.0 - density) * layer.coherence)


def least_squares_rows(layer: LayerStatistics, density: float, eta: float = 1.0) -> Vector:
    """Return (m) q_i = d + η p D_i/A_i, at most 1."""
    ratio = _ratio(layer.diagonal, layer.energy)
    return np.minimum(1.0, density + eta * (1.0 - density) * ratio)


def least_squares_error(layer: LayerStatistics, density: float) -> float:
    """Return the expected relative error at q*: 1 − d/q*, the share of the layer's delta that random dropping loses at
    best."""
    return 1.0 - density / least_squares(layer, density)


def drawn(layer: LayerStatistics) -> float | None:
    """Return q = ‖Ŷ‖²/⟨Y, Ŷ⟩, the exact least-squares q of a drawn mask; None where no q > 0 is better than dropping
    all."""
    cross, power = _of_mask(layer)
    return float(power.sum() / cross.sum()) if cross.sum() > 0.0 and power.sum() > 0.0 else None


def drawn_rows(layer: LayerStatistics, none: float = 1.0) -> Vector:
    """Return (m) the same for each output row. A row without such a q has the layer's, or `none`."""
    cross, power = _of_mask(layer)
    answered = (cross > 0.0) & (power > 0.0)
    return np.where(answered, power / np.where(answered, cross, 1.0), drawn(layer) or none)


def drawn_error(layer: LayerStatistics, q: float | Vector) -> float:
    """Return ‖Y − Ŷ/q‖² / ‖Y‖² of a drawn mask, 0 where the delta has no effect; q is a number, or (m)."""
    cross, power = _of_mask(layer)
    residual = layer.energy - 2.0 * cross / q + power / np.square(q)
    return float(_ratio(residual.sum(), layer.energy.sum()))


def bound_rows(layer: LayerStatistics, density: float, eta: float) -> Vector:
    """Return (m) q_i(η) = clamp(η φ(p) C2_i / (2 d |C1_i|), d, 1), the minimiser of the bound with a general q (App.
    C.9):

        |1 − d/q| |C1_i| + η φ(p) C2_i / (4 q²) + log(2/γ)/η

    A row without a delta has q_i = d.
    """
    wanted = eta * phi(1.0 - density) * layer.c2
    allowed = 2.0 * density * np.abs(layer.c1)
    q = np.divide(wanted, allowed, out=np.where(wanted > 0.0, 1.0, density), where=allowed > 0.0)
    return np.clip(q, density, 1.0)


def bound_layer(layer: LayerStatistics, density: float, eta: float) -> float:
    """Return a layer's q by the paper's rule: the mean of its rows' q_i(η)."""
    return float(bound_rows(layer, density, eta).mean())


Family = Callable[[LayerStatistics, float, float], float]
# q as a function of statistics, density and η, of a layer and of its rows.
FAMILIES: dict[str, tuple[Family, Callable[[LayerStatistics, float, float], Vector]]] = {
    "bound": (bound_layer, bound_rows),
    "least_squares": (least_squares, least_squares_rows),
}


def eta_range(family: Family, layers: Iterable[LayerStatistics], density: float) -> tuple[float, float]:
    """Return the bounds of the search for η: from the largest power of 2^¼ at which the layers' mean q is within 1 % of
    d, to a mean of ½."""
    some = list(layers)

    def mean(eta: float) -> float:
        return float(np.mean([family(layer, density, eta) for layer in some]))

    def last_below(level: float) -> float:
        exponents = range(-240, 241)  # the mean grows with η
        above = bisect.bisect_right(exponents, level, key=lambda k: mean(2.0 ** (k / 4)))
        return float(2.0 ** (exponents[max(above - 1, 0)] / 4))

    low = last_below(1.01 * density)
    return low, max(last_below(max(0.5, 2.0 * density)), 2.0 * low)


def _of_mask(layer: LayerStatistics) -> tuple[Vector, Vector]:
    if layer.cross is None or layer.power is None:
        raise ValueError("the pass over the activations had no drawn mask")
    return layer.cross, layer.power


def _ratio(a: float | Vector, b: float | Vector) -> Vector:
    """Return a / b, 0 where b is 0."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0.0)
