"""Statistics of a delta, by tensor, by layer, by kind of tensor, and in all; and their JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml
from pydantic import Field

from deltamerge.apps.inspect.activations import Activations, Figures
from deltamerge.apps.inspect.moments import DeltaMoments, join_moments, moments, together
from deltamerge.engine import backends
from deltamerge.engine.execute import Task, execute
from deltamerge.errors import InputError
from deltamerge.files import progress
from deltamerge.methods.ops import subtract
from deltamerge.methods.prune.select import high_histogram
from deltamerge.plan.finite import finite
from deltamerge.plan.inputs import Inputs
from deltamerge.recipe.load import loads
from deltamerge.recipe.schema import Recipe
from deltamerge.run.calibration_record import Run
from deltamerge.tensors.dtypes import FLOATING
from deltamerge.tensors.names import EMBEDDING, TASK_HEAD, block_name
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph, Node, TensorInfo

QUANTILES = (0.5, 0.9, 0.99, 0.999)
DENSITIES = (0.1, 0.01, 0.001)
OUTSIDE = "outside"
Kind = Literal["linear", "embedding", "vector", "head", "other"]


class Statistics(Figures):
    """Of the entries of a delta Δ = fine-tune − base, computed in float32 and summed in float64."""

    count: int = Field(description="Entries.")
    mean_abs: float = Field(description="Mean of |Δ|.")
    variance: float = Field(description="E[Δ²] − E[Δ]².")
    kurtosis: float | None = Field(description="Fourth central moment / variance², 3 for a normal distribution.")
    max_abs: float = Field(description="Largest |Δ|.")
    unchanged: float = Field(description="Fraction of entries with Δ = 0.")
    norm: float = Field(description="‖Δ‖₂.")
    base_norm: float = Field(description="‖W‖₂ of the base.")
    relative_norm: float | None = Field(description="‖Δ‖/‖W‖, null where the base is zero.")
    energy_share: float = Field(description="‖Δ‖² over that of the whole delta.")
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
    """What `deltamerge inspect --json` prints."""

    model: str
    base: str
    total: Statistics
    kinds: dict[str, Statistics] = Field(description="By kind of tensor.")
    layers: dict[str, Statistics] = Field(description="By numbered block, in the file's order; outside: the rest.")
    tensors: list[TensorStatistics]
    without_delta: list[str] = Field(description="Floating-point tensors that the base lacks.")
    activations: Activations | None = Field(None, description="With --calibration: what the linear layers do to it.")
    run: Run | None = Field(None, description="How q was chosen, where MODEL is a folder that a run made.")
    warnings: list[str] = Field([], description="Signs that the base is not MODEL's, or that the two are swapped.")


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of both models, cut to the rows that both have."""

    name: str
    tune: TensorInfo
    base: TensorInfo
    cut: bool = False

    @property
    def kind(self) -> Kind:
        """Return the kind of the tensor, told by its name and shape."""
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
    return loads(yaml.safe_dump(dict(recipe), sort_keys=False), "(command line)")


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
            raise InputError(f"{name}: has entries that are not finite")
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
    """Return the report on what `measure` found."""
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
