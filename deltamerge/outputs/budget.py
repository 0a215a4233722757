"""A size instead of a density: a density for each tensor, so that the artifact fits and its predicted error is least.

The error is predicted from the delta's own entries, each with a weight w:

    magnitude   Σ w Δ² over the entries that are dropped
    dare        Σ w Δ² (1/p - 1), the expectation for density p and q = p

Without calibration w = 1: the error is the energy. With calibration w is the mean square of the entry's input over the
tokens: E[x_j²] for a weight of a linear layer, 1 for a bias or norm, 1/rows for a row of an embedding. The error is
then the expected square of the change of the layers' outputs, D of `calibrate.q.statistics`, as if inputs were
uncorrelated.

The price of a tensor of n elements at density p is n (p v + H(p)) bits: v bits a value, and the entropy H of the
positions. If all elements are stored it is n v. Bytes go where they gain most, along the convex hull of each tensor's
error by price. At the end no byte would gain more elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deltamerge import errors
from deltamerge.engine.execute import shared_values
from deltamerge.errors import InputError
from deltamerge.formats.delta.entry import TILE
from deltamerge.formats.delta.positions import expected_bits
from deltamerge.formats.delta.values import VALUE_BITS
from deltamerge.methods.registry import PRUNE
from deltamerge.models.delta_over_base import added
from deltamerge.plan.planner import Budgeted, Plan
from deltamerge.recipe.prune import Pruning, effective_prune
from deltamerge.tensors.dtypes import ITEMSIZE, widen
from deltamerge.tensors.reader import Reader, elements
from deltamerge.tensors.tiles import row_length

if TYPE_CHECKING:
    from deltamerge.calibrate.q.statistics import LayerStatistics

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]
Attempt = Callable[[Mapping[str, float], bool], int]
"""Writes the artifact of densities and says its bytes; q's are calibrated for them only if asked, else near enough."""

BINS = 1 << 13  # the exponent and five bits of the mantissa
POINTS = 1000  # densities of a random mask that are looked at, in equal ratios
TENSOR_BYTES = 420  # of a tensor's entries in manifest and header, about
NEAR = 0.97  # of the budget: near enough to stop
TRIES = 6


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Of a tensor of `size` elements: how many entries have magnitudes of each bin, largest first, and their Σ w Δ²."""

    name: str
    size: int
    counts: Floats
    energies: Floats


@dataclass(frozen=True, slots=True)
class Densities:
    """A density for every tensor, and the predicted ‖lost‖ / ‖Δ‖ over all of them; None: not predicted."""

    densities: dict[str, float]
    error: float | None


def budget_of(planned: Plan) -> int | None:
    """Return the bytes that the delta artifact of a plan may take, where its densities depend on them."""
    prune = _prune_of(planned)
    return None if prune is None else prune.budget


def _prune_of(planned: Plan) -> Pruning | None:
    """Return the pruning of the one fine-tune whose delta is written."""
    recipe = planned.recipe
    if not recipe.output.rules.patches or not recipe.fine_tunes:
        return None
    return effective_prune(recipe, recipe.fine_tunes[0])


def _value_bits(planned: Plan) -> int:
    """Return the bits of an entry, less its position: of a value to add, or of the first pruned tensor's dtype."""
    if planned.delta_values is not None:
        return VALUE_BITS[planned.delta_values]
    return 8 * ITEMSIZE[next(o.dtype for o in planned.outputs if o.name == planned.budgeted[0].name)]


def measure_spectra(planned: Plan) -> list[Spectrum]:
    """Measure the magnitudes of every delta that the budget is for.

    Tensors are read once, after the calibration's pass.
    """
    node = planned.weighing
    statistics = None if node is None else shared_values([node], {})[node]
    with Reader() as reader, ThreadPoolExecutor(planned.workers) as pool:
        return list(pool.map(lambda tensor: _spectrum(reader, tensor, _weights(tensor, statistics)), planned.budgeted))


def _weights(tensor: Budgeted, statistics: Mapping[str, LayerStatistics] | None) -> Callable[[Positions], Floats]:
    """Return the weights of entries by their flat position."""
    columns = row_length(tensor.base.shape)
    layer = None if statistics is None else statistics.get(tensor.tune.name)
    if layer is not None and layer.parts:  # stacked experts
        rows, transposed, squares = tensor.base.shape[-2], layer.transposed, np.stack([p.square for p in layer.parts])
        return lambda where: squares[
            where // columns // rows, where // columns % rows if transposed else where % columns
        ]
    if layer is not None:
        square, transposed = layer.square, layer.transposed
        return lambda where: square[where // columns if transposed else where % columns]
    rows = 1 if statistics is None or len(tensor.base.shape) < 2 else tensor.size // columns
    return lambda where: np.full(where.size, 1 / rows)


def _spectrum(reader: Reader, tensor: Budgeted, weights: Callable[[Positions], Floats]) -> Spectrum:
    values = added(tensor.tune)
    tune = values or tensor.tune
    read, read_base = elements(reader, tune), elements(reader, tensor.base)
    counts, energies = np.zeros(BINS), np.zeros(BINS)
    for start in range(0, tensor.size, TILE):
        stop = min(start + TILE, tensor.size)
        delta = widen(read(start, stop), tune.dtype)
        if values is None:
            with np.errstate(invalid="ignore", over="ignore"):
                delta = delta - widen(read_base(start, stop), tensor.base.dtype)
        bins = (delta.view(np.uint32) & 0x7FFFFFFF) >> 18
        counts += np.bincount(bins, minlength=BINS)
        energies += np.bincount(bins, np.square(delta, dtype=np.float64) * weights(np.arange(start, stop)), BINS)
    if not math.isfinite(float(energies.sum())):
        raise InputError(f"{tensor.name}: its delta is not finite", hint="exclude it from pruning")
    counts[0] *= energies[0] > 0  # zeros, which no mask keeps before others
    filled = np.flatnonzero(counts)[::-1]
    return Spectrum(tensor.name, tensor.size, counts[filled], energies[filled])


def choose(spectra: Sequence[Spectrum], nbytes: float, value_bits: int, *, random: bool) -> Densities:
    """Return densities whose predicted bytes are at most `nbytes`. InputError: not one entry a tensor fits."""
    curves = [_curve(s, value_bits, random=random) for s in spectra]
    room = nbytes - sum(float(curve.prices[0]) for curve in curves)
    if room < 0:
        raise InputError(f"the budget leaves {max(0, nbytes):.0f} bytes for the pruned tensors, too few for any entry")
    places = [0.0] * len(curves)
    closed: set[int] = set()
    steps = sorted(step for number, curve in enumerate(curves) for step in _steps(number, curve))
    for _, i, start, stop in steps:
        prices = curves[i].prices
        price = float(prices[stop] - prices[start])
        if i in closed:
            continue
        if price <= room:
            places[i] = stop
        else:  # a part of the step, of points that are not the last, which stores all elements
            closed.add(i)
            places[i] = max(start, float(np.interp(prices[start] + room, prices[:-1], np.arange(len(prices) - 1))))
            price = float(np.interp(places[i], np.arange(len(prices)), prices) - prices[start])
        room -= price
    densities, lost = {}, 0.0
    for s, curve, place in zip(spectra, curves, places, strict=True):
        numbers = np.arange(len(curve.kept))
        kept = math.floor(float(np.interp(place, numbers, curve.kept)) + 1e-6)
        densities[s.name] = float(f"{max(1, kept) / s.size:.6g}")
        lost += float(np.interp(place, numbers, curve.lost))
    whole = sum(float(s.energies.sum()) for s in spectra)
    return Densities(densities, math.sqrt(max(0.0, lost) / whole) if whole else 0.0)


@dataclass(frozen=True, slots=True)
class _Curve:
    """Entries kept, ascending, their bytes, and their errors; the last point stores every element."""

    kept: Floats
    prices: Floats
    lost: Floats


def _curve(s: Spectrum, value_bits: int, *, random: bool) -> _Curve:
    """Return the curve from one entry to all; points that cost more than all are left out."""
    whole = float(s.energies.sum())
    if random:
        kept = np.exp(np.linspace(0, math.log(s.size), POINTS))
        lost = whole * (s.size / kept - 1)
    else:
        kept = np.concatenate([[1.0], np.cumsum(s.counts)])
        first = float(s.energies[0] / s.counts[0]) if s.counts.size else 0.0
        lost = whole - np.concatenate([[first], np.cumsum(s.energies)])
    prices = np.array([s.size * expected_bits(min(1.0, k / s.size), value_bits) / 8 for k in kept])
    dense = s.size * value_bits / 8
    sparse = (np.diff(prices, prepend=-1.0) > 0) & (prices < dense)
    ends = ((kept, s.size), (prices, dense), (lost, 0.0))
    return _Curve(*(np.append(values[sparse], end) for values, end in ends))


def _steps(i: int, curve: _Curve) -> Iterator[tuple[float, int, int, int]]:
    """Yield steps of the lower convex hull of (price, lost): minus the gain of a byte, `i`, first and last point."""
    hull: list[int] = []
    x, y = curve.prices.tolist(), curve.lost.tolist()
    for c in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[c] - x[b]) < (y[c] - y[b]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(c)
    for a, b in pairwise(hull):
        yield (y[b] - y[a]) / (x[b] - x[a]), i, a, b


def given(planned: Plan, densities: Mapping[str, float], attempt: Attempt) -> Densities:
    """Return the densities of a lock. InputError: they are not of the tensors that are pruned, or do not fit."""
    budget = budget_of(planned)
    assert budget is not None
    with errors.context(f"prune.budget {budget}"):
        if {tensor.name for tensor in planned.budgeted} != densities.keys():
            raise InputError("the lock has no densities for the tensors that are pruned", hint="run without --locked")
        nbytes = attempt(densities, True)
        if nbytes > budget:
            raise InputError(f"the artifact takes {nbytes} bytes", hint="give a larger budget")
    return Densities(dict(densities), None)


def search(planned: Plan, attempt: Attempt) -> Densities:
    """Return densities whose artifact, made by `attempt`, fits.

    It is called a few times at most, until the artifact takes nearly all of the budget, and last with the result.
    InputError: the tensors that are not pruned do not fit.
    """
    budget = budget_of(planned)
    assert budget is not None
    if not planned.budgeted:
        return given(planned, {}, attempt)
    bits = _value_bits(planned)
    prune = _prune_of(planned)
    assert prune is not None
    names = {tensor.name for tensor in planned.budgeted}
    rest = sum(o.delta_bytes(planned.delta_values) for o in planned.outputs if o.name not in names)
    fixed = rest + TENSOR_BYTES * len(planned.outputs)
    spectra, random = measure_spectra(planned), PRUNE[prune.method].random
    best: tuple[int, float, Densities] | None = None
    last: Densities | None = None
    room: float = budget - fixed
    with errors.context(f"prune.budget {budget}"):
        if room <= 0:
            raise InputError(
                f"{rest} bytes are not pruned, and names and hashes take {fixed - rest}",
                hint="give a larger budget, or prune more tensors (include, exclude)",
            )
        for _ in range(TRIES):
            last = choose(spectra, room, bits, random=random)
            nbytes = attempt(last.densities, False)
            if nbytes <= budget and (best is None or nbytes > best[0]):
                best = nbytes, room, last
            if NEAR * budget <= nbytes <= budget or min(last.densities.values()) == 1:
                break
            room += 0.99 * budget - nbytes
        if best is not None:
            _, room, choice = best
            if choice is last and not planned.stages:
                return choice
            for _ in range(TRIES):
                if (nbytes := attempt(choice.densities, True)) <= budget:
                    return choice
                room -= nbytes - NEAR * budget
                choice = choose(spectra, room, bits, random=random)
        raise InputError("no choice of densities fits", hint="give a larger budget")
