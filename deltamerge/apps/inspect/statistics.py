"""Measure a delta tensor by tensor, and the activations of its layers.

Moments come from one pass: sums of powers and a histogram of magnitudes. Tiles yield float64 partials per block, added
by `math.fsum`, and integer counts. No figure depends on tiles, threads or the device. Figures from the histogram
(quantiles, the energy that a density keeps) take every magnitude as the middle of its bin, which is at most 0.4 % away.

Activations give influence, coherence, and the bound of Theorem 3.1 (DAREx, arXiv 2410.09344).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from deltamerge.calibrate.q import statistics as S
from deltamerge.calibrate.q.statistics import LayerStatistics
from deltamerge.engine import backends
from deltamerge.engine.execute import Task, execute
from deltamerge.errors import InputError
from deltamerge.errors.shown import as_html, shown
from deltamerge.files import progress
from deltamerge.methods.low_rank import NOT_FINITE, REPAIR
from deltamerge.methods.ops import block_rows, densify, halved, subtract
from deltamerge.methods.prune.select import high_histogram
from deltamerge.plan.finite import finite
from deltamerge.plan.inputs import Inputs
from deltamerge.recipe.load import loads
from deltamerge.recipe.schema import Recipe
from deltamerge.recipe.yaml_source import dumped
from deltamerge.run.calibration_record import Run
from deltamerge.tensors.dtypes import FLOATING
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.names import EMBEDDING, TASK_HEAD, block_name
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph, Node, TensorInfo
from deltamerge.tensors.tiles import Tile

BINS = 1 << 15


def moments(delta: Any, base: torch.Tensor, *, tile: Tile) -> NDArray[np.float64]:
    """Return (blocks, 8) of Δ: Σ Δ, Σ |Δ|, Σ Δ², Σ Δ³, Σ Δ⁴, the number of zeros, max |Δ|, and Σ W² of the base."""
    x = densify(delta, tile.size).to(torch.float64)
    square, w = x * x, base.to(torch.float64)
    summed = (x, x.abs(), square, square * x, square * square, (x == 0).to(torch.float64))
    columns = [halved(block_rows(values, tile)) for values in summed]
    columns += [block_rows(x.abs(), tile).amax(1), halved(block_rows(w * w, tile))]
    return torch.stack(columns, 1).cpu().numpy()


@dataclass(frozen=True, slots=True, eq=False)
class DeltaMoments:
    """Sums over the entries of one or more deltas; `bins` are high 16 bits of |Δ|, `counts` their frequencies."""

    count: int
    total: float
    absolute: float
    square: float
    cube: float
    fourth: float
    zeros: float
    largest: float
    base_square: float
    bins: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def mean_abs(self) -> float:
        """E|Δ|."""
        return self.absolute / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """E[Δ²] − E[Δ]²."""
        return max(0.0, self.square / self.count - (self.total / self.count) ** 2) if self.count else 0.0

    @property
    def kurtosis(self) -> float | None:
        """E[(Δ − E Δ)⁴] / variance², 3 for a normal distribution; None without variance."""
        variance = self.variance
        if not variance:
            return None
        mean = self.total / self.count
        second, third, fourth = (value / self.count for value in (self.square, self.cube, self.fourth))
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        ratio = central / variance**2 if variance**2 else math.inf
        return ratio if math.isfinite(ratio) else None

    @property
    def relative_norm(self) -> float | None:
        """Return ‖Δ‖ / ‖W‖. None where the base is zero."""
        return math.sqrt(self.square / self.base_square) if self.base_square else None

    @property
    def magnitudes(self) -> NDArray[np.float64]:
        """Return the middle of each bin. 0 for the bin of zero, and none above the largest magnitude."""
        middle = ((self.bins << 16) | 0x8000).astype(np.uint32).view(np.float32).astype(np.float64)
        return np.minimum(np.where(self.bins == 0, 0.0, middle), self.largest)

    def quantile(self, share: float) -> float:
        """Return the smallest magnitude that at least `share` of the entries do not exceed."""
        if not self.count:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self.counts), math.ceil(share * self.count)))
        return float(self.magnitudes[min(index, len(self.bins) - 1)])

    def kept_energy(self, density: float) -> float:
        """Return the share of Σ Δ² in the round(density · n) largest magnitudes."""
        energy = self.magnitudes**2
        left = round(density * self.count) - (np.cumsum(self.counts[::-1]) - self.counts[::-1])
        kept = np.clip(left, 0, self.counts[::-1])
        whole = float(energy @ self.counts)
        return float(energy[::-1] @ kept) / whole if whole else 0.0

    def sampling_error(self, density: float) -> float:
        """Σ Δ² (1/π − 1) / Σ Δ² of importance sampling, π = min(1, c |Δ|) with mean `density`."""
        size, counts = self.magnitudes, self.counts.astype(np.float64)
        whole = float(size**2 @ counts)
        wanted = density * self.count
        if not whole or wanted >= counts[size > 0].sum():
            return 0.0
        suffix = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]])  # number of entries in bin i and above
        below = np.cumsum(size * counts)
        # bins from i on have π = 1; i is the first for which the bin below stays under 1
        for i in range(len(size), 0, -1):
            if below[i - 1] <= 0.0:
                return 0.0
            c = (wanted - suffix[i]) / below[i - 1]
            if c * size[i - 1] <= 1.0:
                return float(np.sum(counts[:i] * (size[:i] / c - size[:i] ** 2))) / whole
        return 0.0


SUMS = tuple(f.name for f in fields(DeltaMoments) if f.name not in ("count", "largest", "bins", "counts"))


def join_moments(partials: NDArray[np.float64], counts: NDArray[np.int64], *, size: int) -> DeltaMoments:
    """Return the moments of one tensor of `size` entries from `moments` of its blocks and its `high_histogram`."""
    total, absolute, square, cube, fourth, zeros, _, base = (math.fsum(column) for column in partials.T)
    largest = float(partials[:, 6].max(initial=0.0))
    bins = np.flatnonzero(counts)
    return DeltaMoments(size, total, absolute, square, cube, fourth, zeros, largest, base, bins, counts[bins])


def together(some: Iterable[DeltaMoments]) -> DeltaMoments:
    """Return the moments of all entries of several deltas."""
    parts = list(some)
    counts = np.zeros(BINS, np.int64)
    for part in parts:
        counts[part.bins] += part.counts
    bins = np.flatnonzero(counts)
    sums = {name: math.fsum(getattr(part, name) for part in parts) for name in SUMS}
    largest = max((part.largest for part in parts), default=0.0)
    return DeltaMoments(sum(part.count for part in parts), largest=largest, bins=bins, counts=counts[bins], **sums)


GAMMA = 0.05
SHOWN = 3


class Figures(BaseModel):
    """Figures that are printed as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Massive(Figures):
    """An input feature of large activations."""

    feature: int
    mean_abs: float = Field(description="Mean of |x_j| over the tokens.")
    ratio: float | None = Field(description="mean_abs over the median of all features; null where that is 0.")


class Influence(Figures):
    """Influence in a linear layer y = W x + b over calibration tokens: c_ij = Δ_ij x_j, d the density, p = 1 − d."""

    mean_abs_delta: float = Field(description="Mean of |Δ_ij|.")
    mean_abs_influence: float = Field(description="Mean of |c_ij| over outputs, inputs and tokens.")
    influence: float = Field(description="c̄: mean over outputs of |c̄_i|, c̄_i the mean of c_ij over inputs and tokens.")
    influence_variance: float = Field(description="σ²: mean over outputs of the variance of c_ij.")
    change: float = Field(description="Root mean square of Δx over outputs and tokens.")
    coherence: float = Field(description="D/A = Σ Δ_ij² E[x_j²] / E‖Δx‖²: near 0 DARE is right, near 1 q should be 1.")
    bound: float = Field(
        description="Theorem 3.1 for DARE: sqrt(φ(p) log(2/γ) D_i)/d, γ = 0.05, root mean square over outputs."
    )
    typical: float = Field(description="The paper's tightened form of it, no guarantee.")
    dare_error: float = Field(description="Expected E‖Δx − DARE‖²/E‖Δx‖² = (p/d) D/A.")
    least_squares_q: float = Field(description="q* = d + p D/A, of least expected error.")
    least_squares_error: float = Field(description="The expected relative error at q*: 1 − d/q*.")
    dare_measured: float | None = Field(description="dare_error of the drawn mask on the same rows; null without one.")
    least_squares_measured: float | None = Field(description="least_squares_error of the drawn mask, likewise.")


class LayerInfluence(Influence):
    """One layer, by the fine-tune's name of its weight."""

    name: str
    tokens: int
    massive: list[Massive] = Field(description="The input features of largest mean |x_j|, ascending by number.")


class Activations(Figures):
    """The fields that `inspect --calibration` adds."""

    density: float
    gamma: float
    sequences: int
    total: Influence = Field(description="Means over entries (the first two) and over layers.")
    layers: list[LayerInfluence]


def activations(found: Mapping[str, LayerStatistics], density: float, sequences: int) -> Activations:
    """Return the figures of every layer at a density."""
    layers = [_layer(name, layer, density) for name, layer in found.items()]
    entries = np.array([len(layer.energy) * len(layer.mean) for layer in found.values()], dtype=np.float64)

    def mean(field: str) -> float:
        weights = entries if field.startswith("mean_abs") else None
        return float(np.average([getattr(layer, field) for layer in layers], weights=weights))

    drawn = all(layer.dare_measured is not None for layer in layers)
    means: dict[str, Any] = {
        field: mean(field) if drawn or not field.endswith("_measured") else None for field in Influence.model_fields
    }
    total = Influence(**means)
    return Activations(density=density, gamma=GAMMA, sequences=sequences, total=total, layers=layers)


def _layer(name: str, layer: LayerStatistics, density: float) -> LayerInfluence:
    median, best = float(np.median(layer.mean_abs)), S.least_squares(layer, density)
    drawn = layer.power is not None
    return LayerInfluence(
        name=name,
        tokens=layer.tokens,
        mean_abs_delta=layer.mean_delta,
        mean_abs_influence=layer.mean_influence,
        influence=float(np.abs(layer.influence).mean()),
        influence_variance=float(layer.variance.mean()),
        change=float(np.sqrt(layer.energy.mean())),
        coherence=layer.coherence,
        bound=_rms(S.guaranteed(layer, density, GAMMA)),
        typical=_rms(S.typical(layer, density, GAMMA)),
        dare_error=S.dare_error(layer, density),
        least_squares_q=best,
        least_squares_error=S.least_squares_error(layer, density),
        dare_measured=S.drawn_error(layer, density) if drawn else None,
        least_squares_measured=S.drawn_error(layer, best) if drawn else None,
        massive=[
            Massive(
                feature=j,
                mean_abs=float(layer.mean_abs[j]),
                ratio=float(layer.mean_abs[j]) / median if median else None,
            )
            for j in layer.massive(SHOWN)
        ],
    )


def _rms(values: S.Vector) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


QUANTILES = (0.5, 0.9, 0.99, 0.999)
DENSITIES = (0.1, 0.01, 0.001)
OUTSIDE = "outside"
Kind = Literal["linear", "embedding", "vector", "head", "other"]


class Statistics(Figures):
    """Statistics of a delta's entries Δ = fine-tune − base, computed in float32 and summed in float64."""

    count: int = Field(description="Entries.")
    mean_abs: float = Field(description="Mean of |Δ|.")
    variance: float = Field(description="E[Δ²] − E[Δ]².")
    kurtosis: float | None = Field(description="Fourth central moment / variance², 3 for a normal distribution.")
    max_abs: float = Field(description="Largest |Δ|.")
    unchanged: float = Field(description="Fraction of entries with Δ = 0.")
    norm: float = Field(description="‖Δ‖₂.")
    base_norm: float = Field(description="‖W‖₂ of the base.")
    relative_norm: float | None = Field(description="‖Δ‖/‖W‖, null where the base is zero.")
    energy_share: float = Field(description="‖Δ‖² over the ‖Δ‖² of the whole delta.")
    quantiles: dict[str, float] = Field(description="Of |Δ|, to 0.4 %, by the share of entries that do not exceed it.")
    kept_energy: dict[str, float] = Field(
        description="Share of ‖Δ‖² in the largest entries, by density; for several tensors each keeps its own largest."
    )


class TensorStatistics(Statistics):
    """One tensor, by its name in the fine-tune."""

    name: str
    kind: Kind = Field(description="linear (2-D weight), embedding, vector (1-D), head (not pruned by default), other.")
    layer: str = Field(description="The numbered block that it is part of, or outside.")
    shape: list[int]


class Report(Figures):
    """The output of `deltamerge inspect --json`."""

    model: str
    base: str
    total: Statistics
    kinds: dict[str, Statistics] = Field(description="By kind of tensor.")
    layers: dict[str, Statistics] = Field(description="By numbered block, in the file's order; outside: the rest.")
    tensors: list[TensorStatistics]
    without_delta: list[str] = Field(description="Floating-point tensors that the base lacks.")
    activations: Activations | None = Field(
        None, description="With --calibration: statistics of the delta in the linear layers."
    )
    run: Run | None = Field(None, description="How q was chosen, where MODEL is a folder that a run made.")
    warnings: list[str] = Field([], description="Signs that the base is not MODEL's, or that the two are swapped.")

    def __repr__(self) -> str:
        size = "" if self.total.relative_norm is None else f", ‖Δ‖/‖W‖ {self.total.relative_norm:.3g}"
        return shown(f"<Report {self.model} on {self.base}: {len(self.tensors)} tensors{size}>")

    __str__ = __repr__

    def _repr_html_(self) -> str:
        total = self.total
        rows = {
            "entries": f"{total.count:,}",
            "unchanged": f"{total.unchanged:.1%}",
            "mean |Δ|": f"{total.mean_abs:.3g}",
            "largest |Δ|": f"{total.max_abs:.3g}",
            "‖Δ‖/‖W‖": "–" if total.relative_norm is None else f"{total.relative_norm:.3g}",
        }
        if self.warnings:
            rows["warnings"] = "; ".join(self.warnings)
        return as_html(f"{self.model} on {self.base}", rows)


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of both models, cut to the rows that both have."""

    name: str
    tune: TensorInfo
    base: TensorInfo
    cut: bool = False

    @property
    def kind(self) -> Kind:
        """Return the kind of the tensor, by its name and shape."""
        if re.search(TASK_HEAD, self.name):
            return "head"
        if len(self.base.shape) < 2:
            return "vector"
        if len(self.base.shape) > 2:
            return "other"
        return "embedding" if EMBEDDING.search(self.name) else "linear"

    @property
    def layer(self) -> str:
        """Return the layer that the tensor is in, or "outside"."""
        return block_name(self.name) or OUTSIDE


def pair_recipe(model: str, base: str, prune: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return the recipe of one fine-tune, named by the last part of its path, and its base. `more` are further keys.

    InputError: they are the same model.
    """
    if model == base:
        raise InputError(f"{model}: is the base itself", hint="name a fine-tune, and its base with --base")
    one = {"model": model, "name": model.rstrip("/").rpartition("/")[2] or model}
    return {"base_model": base, "models": [one | ({"prune": dict(prune)} if prune else {})], **more}


def parse(recipe: Mapping[str, Any]) -> Recipe:
    """Validate a generated recipe like any other. RecipeError: an option of the command line that does not fit."""
    return loads(dumped(dict(recipe)), "(command line)")


def pairs_of(inputs: Inputs) -> tuple[list[Pair], list[str]]:
    """Return the tensors that have a delta, and the floating tensors that the base lacks. InputError: shapes differ."""
    base, (tune,) = inputs.base, inputs.tunes
    assert base is not None
    pairs, lacking = [], []
    for name, tensor in tune.tensors.items():
        if tensor.dtype not in FLOATING:
            continue
        twin = base.get(name)
        if twin is None:
            lacking.append(tune.stored[name])
            continue
        rows = min(tensor.shape[0], twin.shape[0]) if tensor.shape and twin.shape else 0
        if tensor.shape != twin.shape and (tensor.shape[1:] != twin.shape[1:] or block_name(name) or not rows):
            shapes = f"{list(tensor.shape)}, in the base {list(twin.shape)}"
            raise InputError(f"{tune.name}: {tune.stored[name]} has the shape {shapes}")
        cut = tensor.shape != twin.shape
        if cut:
            tensor, twin = _rows(tensor, rows), _rows(twin, rows)
        pairs.append(Pair(tune.stored[name], tensor, twin, cut))
    if not pairs:
        raise InputError(f"{tune.name} and {base.name} have no tensor in common", hint="is this its base?")
    return pairs, lacking


def _rows(tensor: TensorInfo, count: int) -> TensorInfo:
    return tensor.part(0, (count, *tensor.shape[1:]))


def measure_deltas(
    pairs: Sequence[Pair],
    *,
    device: str = "cpu",
    workers: int = 1,
    tile_elements: int | None = None,
) -> dict[str, DeltaMoments]:
    """Return the moments of every pair's delta, by name, from one pass over both files.

        pairs           the tensors
        device          "cpu" or a GPU
        workers         threads
        tile_elements   of a tile; None: the device's own

    Infinities and NaNs that both hold alike count as zero. InputError: others.
    """
    with progress.phase("measuring", sum(pair.tune.nbytes for pair in pairs)) as measuring:
        found = _moments(pairs, device, workers, tile_elements, measuring.step)
    if odd := [pair for pair in pairs if not _is_finite(found[pair.name])]:
        rest = []
        for pair in odd:
            models = (pair.base.tensor, pair.tune.tensor)
            base, tune = (replace(one, tensor=finite(one.tensor, models)) for one in (pair.base, pair.tune))
            rest.append(replace(pair, base=base, tune=tune))
        found |= _moments(rest, device, workers, tile_elements, lambda _: None)
    for name, one in found.items():
        if not _is_finite(one):
            raise InputError(f"tensor {name}: {NOT_FINITE}", hint=REPAIR)
    return found


def _is_finite(moments: DeltaMoments) -> bool:
    return math.isfinite(moments.square + moments.base_square)


def _moments(
    pairs: Sequence[Pair], device: str, workers: int, tile_elements: int | None, told: Callable[[int], None]
) -> dict[str, DeltaMoments]:
    graph = Graph()
    roots = {pair.name: _root(graph, pair) for pair in pairs}
    tasks = [Task(name, root, backends.choose(root, device)) for name, root in roots.items()]
    with Reader() as reader:
        values = execute(
            tasks, reader, None, device=device, workers=workers, tile_elements=tile_elements, progress=told
        )
    return {name: values[root] for name, root in roots.items()}


def _root(graph: Graph, pair: Pair) -> Node:
    tune, base = (graph.read(info) for info in (pair.tune, pair.base))
    shape, dtypes = pair.base.shape, (pair.tune.dtype, pair.base.dtype)
    delta = graph.node(subtract, [tune, base], shape=shape, dtypes=dtypes)
    partials = graph.node(moments, [delta, base], kind="concat", shape=shape)
    counts = graph.node(high_histogram, [delta], kind="sum", shape=shape)
    return graph.node(
        join_moments, [partials, counts], kind="small", shape=shape, dtype=pair.tune.dtype, size=math.prod(shape)
    )


def statistics(parts: Sequence[DeltaMoments], whole: float) -> dict[str, Any]:
    """Return the fields of `Statistics` of several tensors together. `whole` is Σ Δ² of the whole delta."""
    m = parts[0] if len(parts) == 1 else together(parts)
    return {
        "count": m.count,
        "mean_abs": m.mean_abs,
        "variance": m.variance,
        "kurtosis": m.kurtosis,
        "max_abs": m.largest,
        "unchanged": m.zeros / m.count if m.count else 0.0,
        "norm": math.sqrt(m.square),
        "base_norm": math.sqrt(m.base_square),
        "relative_norm": m.relative_norm,
        "energy_share": m.square / whole if whole else 0.0,
        "quantiles": {f"{share:g}": m.quantile(share) for share in QUANTILES},
        "kept_energy": {f"{density:g}": kept_energy(parts, density) for density in DENSITIES},
    }


def kept_energy(parts: Sequence[DeltaMoments], density: float) -> float:
    """Return the share of Σ Δ² that magnitude pruning keeps, with each tensor's own largest entries."""
    whole = math.fsum(part.square for part in parts)
    return math.fsum(part.square * part.kept_energy(density) for part in parts) / whole if whole else 0.0


def report(
    inputs: Inputs, pairs: Sequence[Pair], lacking: Sequence[str], found: Mapping[str, DeltaMoments], **more: Any
) -> Report:
    """Return the report on the results of `measure`."""
    assert inputs.base is not None
    whole = math.fsum(moments.square for moments in found.values())

    def group_by(key: Callable[[Pair], str]) -> dict[str, Statistics]:
        groups: dict[str, list[DeltaMoments]] = {}
        for pair in pairs:
            groups.setdefault(key(pair), []).append(found[pair.name])
        return {name: Statistics(**statistics(parts, whole)) for name, parts in groups.items()}

    return Report(
        model=inputs.tunes[0].name,
        base=inputs.base.name,
        total=Statistics(**statistics(list(found.values()), whole)),
        kinds=group_by(lambda pair: pair.kind),
        layers=group_by(lambda pair: pair.layer),
        tensors=[
            TensorStatistics(
                name=pair.name,
                kind=pair.kind,
                layer=pair.layer,
                shape=list(pair.base.shape),
                **statistics([found[pair.name]], whole),
            )
            for pair in pairs
        ],
        without_delta=list(lacking),
        **more,
    )
