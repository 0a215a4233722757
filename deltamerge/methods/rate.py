"""A delta Δ (m, n) in few bytes: its possible forms, their prices, and the parts of the chosen form.

Let σ_k u_k v_kᵀ be the singular triples of Δ. A component whose vectors have levels of relative distortion D loses
σ_k² (1 - (1 - D)²). It takes m + n codes and a byte. Entries of one row have a scale; entries of distortion D lose D
times their squares. A multiplier λ chooses for each tensor the form of least distortion + λ bytes. One λ for all
tensors is a point of their common lower convex hull: at the end no byte would gain more in another tensor.

The right vectors of factors are quantised first. Then the best left vectors for them, U = Δ V̂ (V̂ᵀ V̂)⁻¹, are quantised
too. The scales of all products are solved for together. One and two bits a number are trellis codes.

Least squares makes parts shorter than Δ. A component of distortion D has 1 - D of its length, because the error of the
codes is noise beside it. Division by 1 - D gives that length back. The length of omitted components is not given back.
It would help if small components are skill, as a q below 1 does with importance masks, and harm if they are noise. With
rows codes and scales are then learned (`calibrate.q.codes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from deltamerge.formats.delta import trellis
from deltamerge.formats.delta.parts import LEVELS, Part, levels_of, packed_bytes, store_entries, store_factors
from deltamerge.methods.low_rank import scratch_bytes
from deltamerge.tensors.dtypes import Array
from deltamerge.tensors.lazy import torch

Floats = NDArray[np.float64]

FACTOR_LEVELS = (257, 258, 8, 16, 255)  # trellis codes lose less than plain ones of as many bits
ENTRY_LEVELS = (2, 3, 4, 8, 16, 255)
LISTED_LEVELS = (2, 16)  # of entries whose positions are listed
ROUNDS = 3  # of fitting a scale and choosing codes in turns
BINS = 1 << 11  # of squares of entries: the exponent and three bits of the mantissa
BLOCK = 1 << 20  # elements that are quantised at once
HELD = 1 << 28  # bytes of a float32 delta that is collected in memory; larger ones in a file
TORCH = 170_000_000  # of torch, beside the compiled loops
LONGEST = 2.0
MOST_LEARNED = 1 << 24  # bytes of an artifact whose codes are learned; at more they lose little
LEARNING_ROWS = 8  # of a step that learns codes
LEARNED = {257: 0.15}  # distortion that learned codes count for: learning wins back most of what one bit loses
STEPS_A_ROW, LEAST_STEPS, MOST_STEPS = 6, 300, 1200
LOOKS = 2  # passes of the fine-tune, and over the rows that decide, together
UNLISTED = 2.0  # weight, times the density, of the loss by unlisted entries: they have the listed ones' directions
HELD_STATES = 2  # turns through the rows whose last hidden states are held at once
LATENT = 120  # bytes of memory for a byte of learned codes: values, gradients, and Adam's two means of each
FILLS = 80  # lower prices, in sixteenths of a power of two, at which the remaining bytes are given away
LEAST, WIDER = 8, 5  # components that a tensor is factored into: at least, and as a multiple of the affordable rank
OVERHEAD = 48.0  # bytes of a tensor's record, compressed: two hashes and its form


def learning_steps(sequences: int) -> int:
    """Return the steps that codes are learned in on so many rows."""
    return min(max(LEAST_STEPS, STEPS_A_ROW * sequences), MOST_STEPS)


def learning_passes(sequences: int) -> int:
    """Return about the forward passes over so many rows that learning takes.

    A backward pass counts as two, and the fine-tune has a pass for each turn of varied rows.
    """
    return math.ceil(4 * learning_steps(sequences) * LEARNING_ROWS / sequences) + LOOKS


@dataclass(frozen=True, slots=True)
class LevelTable:
    """The levels of a quantiser, in units of a Gaussian's standard deviation, and its distortion of the Gaussian."""

    levels: Floats
    distortion: float

    @property
    def edges(self) -> Floats:
        """Return the values between neighbouring levels."""
        return (self.levels[1:] + self.levels[:-1]) / 2


@cache
def table(count: int) -> LevelTable:
    """Return the table of so many levels, scaled so that a unit Gaussian loses least."""
    x = np.linspace(-8, 8, 64001)
    weights = np.exp(-x * x / 2)
    weights /= weights.sum()
    levels = LEVELS[count].astype(np.float64)
    scale = 1.224 if count == 3 else 3.0 / levels[-1]
    for _ in range(200):
        nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x / scale)]
        scale = float((weights * nearest * x).sum() / (weights * nearest * nearest).sum())
    lost = float((weights * (x - scale * nearest) ** 2).sum())
    return LevelTable(levels * scale, lost)


def unit(levels: int) -> float:
    """The size of a level's integer step, in standard deviations of the vector whose codes lose least."""
    return trellis.UNIT[levels] if levels in trellis.BITS else float(table(levels).levels[-1] / LEVELS[levels][-1])


def distortion(levels: int) -> float:
    """Return the distortion of a unit Gaussian by codes of so many levels, or by trellis codes."""
    return trellis.DISTORTION[levels] if levels in trellis.BITS else table(levels).distortion


@dataclass(frozen=True, eq=False)
class Curve:
    """The bytes and losses of the forms of a tensor (m, n).

    gains    the squares σ² of its components, descending; later components have no factors
    energy   the loss if nothing is stored
    counts   the number of entries with squares of each bin, the largest first
    squares  their weighed sums
    learned  whether the codes of its factors will be learned
    """

    m: int
    n: int
    gains: Floats
    energy: float
    counts: Floats
    squares: Floats
    learned: bool = False

    def choice(self, price: float) -> Choice:
        """Return the choice of least distortion + price · bytes."""
        costs = self._fixed[1] + price * self._fixed[0]
        best = int(costs.argmin())
        if min(self.m, self.n) > 1:
            factors = self._factors(price)
            if factors.cost + price * factors.nbytes < costs[best]:
                return factors
        return self._choices[best]

    @cached_property
    def _choices(self) -> list[Choice]:
        """The choices for any price: nothing, all entries, and so many of the largest."""
        found = [Choice(0.0, self.energy)]
        for levels in ENTRY_LEVELS:
            nbytes = packed_bytes(self.m * self.n, levels) + self.m + OVERHEAD
            found.append(Choice(nbytes, self.energy * table(levels).distortion, entries=(levels, None)))
        return [*found, *self._listed()]

    @cached_property
    def _fixed(self) -> tuple[Floats, Floats]:
        """The bytes and costs of `_choices`."""
        return np.array([one.nbytes for one in self._choices]), np.array([one.cost for one in self._choices])

    def _factors(self, price: float) -> Choice:
        best, which = np.zeros_like(self.gains), np.zeros(self.gains.size, np.int64)
        nbytes, kept = np.zeros_like(self.gains), np.zeros_like(self.gains)
        for levels in FACTOR_LEVELS:
            each = packed_bytes(self.m, levels) + packed_bytes(self.n, levels) + 1
            lost = LEARNED.get(levels, distortion(levels)) if self.learned else distortion(levels)
            gain = self.gains * (1 - lost) ** 2
            better = gain - price * each > best - price * nbytes
            best, nbytes = np.where(better, gain, best), np.where(better, each, nbytes)
            kept = np.where(better, self.gains * (1 - distortion(levels)) ** 2, kept)
            which[better] = levels
        if not which.any():
            return Choice(0.0, self.energy)
        won_back = float((best - kept).sum())
        return Choice(
            float(nbytes.sum()) + OVERHEAD,
            self.energy - float(kept.sum()),
            components=tuple(which.tolist()),
            penalty=-won_back,
        )

    def _listed(self) -> Iterator[Choice]:
        size = self.m * self.n
        kept, inside = np.cumsum(self.counts), np.cumsum(self.squares)
        steps: Array = np.unique(np.searchsorted(kept, np.geomspace(1, size / 3, 24))) if size > 8 else np.empty(0)
        for at in steps:
            if at >= kept.size:
                continue
            count = float(kept[at])
            density = min(count / size, 1.0)
            place = _entropy(density) / density
            for levels in LISTED_LEVELS:
                lost = self.energy - float(inside[at]) + self._coded(int(at), levels)
                nbytes = count * (place * 1.03 + math.log2(levels)) / 8 + self.m + OVERHEAD
                penalty = UNLISTED * density * lost if min(self.m, self.n) > 1 else 0.0
                yield Choice(nbytes, lost, entries=(levels, int(count)), penalty=penalty)

    def _coded(self, at: int, levels: int) -> float:
        """Return the loss by codes of the entries of the bins up to `at`."""
        counts, squares = self.counts[: at + 1], self.squares[: at + 1]
        whole = float(squares.sum())
        if levels > 2:
            return whole * table(levels).distortion
        mean = float((np.sqrt(squares * counts)).sum()) / float(counts.sum())
        return max(0.0, whole - mean * mean * float(counts.sum()))


@dataclass(frozen=True, slots=True)
class Choice:
    """The form of a tensor, in about so many bytes, and its loss.

    components  the levels of each component, 0: it is left out
    entries     levels, and the number of the largest entries that have them; None: all
    penalty     counts with the loss; below 0: what learning wins back
    """

    nbytes: float
    lost: float
    components: tuple[int, ...] = ()
    entries: tuple[int, int | None] | None = None
    penalty: float = 0.0

    @property
    def cost(self) -> float:
        """The loss and the penalty, by which choices are compared."""
        return self.lost + self.penalty

    def longer(self, energy: float, length: float) -> float:
        """Return the factor on the least-squares parts of a tensor with so much energy: at most LONGEST.

        `length` is 0 for the least-squares length, 1 for the length of the delta.
        """
        kept = 1 - self.lost / energy if energy else 1.0
        return math.pow(min(LONGEST, max(kept, 1e-9) ** -0.5), length)


def _entropy(p: float) -> float:
    return 0.0 if p in (0.0, 1.0) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def share(curves: Sequence[Curve], nbytes: float) -> tuple[float, list[Choice]]:
    """Return the multiplier, and choices for the tensors that together take at most about `nbytes`."""
    low, high = -80.0, 80.0
    choices = [curve.choice(2.0**high) for curve in curves]
    for _ in range(48):
        middle = (low + high) / 2
        found = [curve.choice(2.0**middle) for curve in curves]
        if sum(choice.nbytes for choice in found) > nbytes:
            low = middle
        else:
            high, choices = middle, found
    return 2.0**high, _filled(curves, choices, nbytes, high)


def _filled(curves: Sequence[Curve], choices: list[Choice], nbytes: float, price: float) -> list[Choice]:
    """Return choices that use the remaining bytes: tensors get them at lower prices, the largest gain a byte first."""
    room = nbytes - sum(choice.nbytes for choice in choices)
    better: list[tuple[float, int, Choice]] = []
    for number, (curve, choice) in enumerate(zip(curves, choices, strict=True)):
        for step in range(1, FILLS):
            other = curve.choice(2.0 ** (price - step / 16))
            if choice.nbytes < other.nbytes <= choice.nbytes + room and other.cost < choice.cost:
                better.append(((choice.cost - other.cost) / (other.nbytes - choice.nbytes), number, other))
    for _, number, other in sorted(better, key=lambda one: -one[0]):
        more = other.nbytes - choices[number].nbytes
        if 0 < more <= room and other.cost < choices[number].cost:
            choices[number], room = other, room - more
    return choices


def histogram(delta: Array, weight: float) -> tuple[Floats, Floats]:
    """Return the number of entries with weighed squares of each bin, and the sums of these, to be added up."""
    squares = (np.square(delta, dtype=np.float64) * weight).reshape(-1)
    bins = squares.astype(np.float32).view(np.uint32) >> 20
    counts = np.bincount(bins, minlength=BINS).astype(np.float64)
    return counts, np.bincount(bins, squares, BINS).astype(np.float64)


def curve_of(m: int, n: int, gains: Floats, energy: float, counts: Floats, squares: Floats) -> Curve:
    """Return the curve of a tensor from the gains of its components and its histogram."""
    filled = np.flatnonzero(squares)[::-1]
    return Curve(m, n, gains, energy, counts[filled].astype(np.float64), squares[filled])


def parts_of(
    delta: Array, choice: Choice, vectors: Array | None, longer: float | None = 1.0
) -> tuple[list[Part], Array]:
    """Return the parts of a delta (m, n) float32 by a choice, and their bytes.

    `vectors` are its right vectors (k, n), the most important first. Values are `longer` times the least-squares
    values; None: each component is as long as before its codes.
    """
    if any(choice.components) and vectors is not None:
        part, stored = _factors(delta, vectors, np.array(choice.components), longer)
        return [part], stored
    if choice.entries is not None:
        levels, count = choice.entries
        part, stored = _entries(delta, levels, count, 1.0 if longer is None else longer)
        return [part], stored
    return [], np.empty(0, np.uint8)


def quantise(vectors: Array, levels: int) -> tuple[Array, Floats]:
    """Return the codes of each row, and the scale of the integer levels that loses least; in blocks of rows."""
    codes, scales = np.empty(vectors.shape, np.uint8), np.empty(len(vectors))
    step = max(1, BLOCK // max(1, vectors.shape[1]))
    for at in range(0, len(vectors), step):
        block = np.asarray(vectors[at : at + step], np.float64)
        codes[at : at + step], scales[at : at + step] = _quantised(block, levels)
    return codes, scales


def _quantised(vectors: Floats, levels: int) -> tuple[Array, Floats]:
    values = LEVELS[levels].astype(np.float64)
    scale = np.sqrt(np.mean(np.square(vectors), axis=1)) * (table(levels).levels[-1] / values[-1])
    edges = (values[1:] + values[:-1]) / 2
    codes = np.zeros(vectors.shape, np.uint8)
    for _ in range(ROUNDS):
        codes = np.searchsorted(edges, vectors / np.where(scale > 0, scale, 1.0)[:, None]).astype(np.uint8)
        taken = values[codes]
        scale = np.einsum("ij,ij->i", taken, vectors) / np.maximum(np.einsum("ij,ij->i", taken, taken), 1.0)
    return codes, np.maximum(scale, 0.0)


def _codes(vectors: Array, levels: int) -> Array:
    """Return the codes of each row of the vectors of components."""
    if levels not in trellis.BITS:
        return quantise(vectors, levels)[0]
    scale = np.sqrt(np.mean(np.square(vectors), axis=1, keepdims=True)) * trellis.UNIT[levels]
    return trellis.nearest(vectors / np.where(scale > 0, scale, 1.0), levels)


def affordable(shapes: Iterable[tuple[int, int]], nbytes: int) -> int:
    """Return the components that deltas (m, n) are factored into: more than the bytes buy everywhere at one bit."""
    sides = sum(m + n for m, n in shapes if min(m, n) > 1)
    return max(LEAST, WIDER * (8 * nbytes // max(1, sides)) // 2)


def scratch(shapes: Sequence[tuple[int, int]], nbytes: int, workers: int) -> int:
    """Return about the bytes of the deltas (m, n) that are collected, factored and coded at one time."""
    rank = affordable(shapes, nbytes)
    held = sorted((4 * m * n for m, n in shapes if 4 * m * n <= HELD), reverse=True)
    work = sorted((max(scratch_bytes(m, n, rank, moments=False), _coding(m, n, rank)) for m, n in shapes), reverse=True)
    return TORCH + sum(held[: workers + 1]) + sum(work[:workers]) + workers * 64 * BLOCK


def _coding(m: int, n: int, rank: int) -> int:
    """Return about the bytes that the parts of a delta take beside it, while they are made."""
    size, sides = m * n, min(m, n, rank) * (m + n)
    return max(12 * size, 8 * (size + sides), 28 * sides)


def _factors(delta: Array, vectors: Array, components: Array, longer: float | None) -> tuple[Part, Array]:
    kept = np.flatnonzero(components)
    kept = kept[np.argsort(components[kept], kind="stable")]
    counts = components[kept]
    groups = sorted({*counts.tolist()})
    d = torch.from_numpy(np.asarray(delta, np.float64))
    right = np.asarray(vectors[kept], np.float64)
    v_codes = {levels: _codes(right[counts == levels], levels) for levels in groups}
    v = torch.from_numpy(np.concatenate([levels_of(v_codes[levels], levels) for levels in groups]).astype(np.float64))
    inner = v @ v.T
    image = d @ v.T
    del d
    left = _solve(inner, image.T).numpy()
    u_codes = {levels: _codes(left[counts == levels], levels) for levels in groups}
    del left
    u = torch.from_numpy(np.concatenate([levels_of(u_codes[levels], levels) for levels in groups]).astype(np.float64))
    scales = _solve((u @ u.T) * inner, (u * image.T).sum(1)[:, None])[:, 0].numpy().clip(min=0.0)
    scales *= [1 / (1 - distortion(levels)) for levels in np.sort(counts)] if longer is None else longer
    made = [(levels, u_codes[levels], v_codes[levels], scales[counts == levels]) for levels in groups]
    return store_factors(made)


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the least-squares solution for a positive semi-definite matrix, with a small ridge."""
    ridge = 1e-9 * float(torch.mean(torch.diagonal(matrix))) + 1e-300
    found: torch.Tensor = torch.linalg.solve(matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype), right)
    return found


def _entries(delta: Array, levels: int, count: int | None, longer: float) -> tuple[Part, Array]:
    m, n = delta.shape
    if count is None:
        codes, scales = quantise(delta, levels)
        return store_entries(levels, codes.reshape(-1), scales * longer, "row", None, m * n)
    flat = delta.reshape(-1)
    count = min(count, flat.size)
    where = np.sort(np.argpartition(-np.abs(flat), count - 1)[:count]).astype(np.int64)
    rows, values = where // n, flat[where].astype(np.float64)
    table_of = LEVELS[levels].astype(np.float64)
    edges = (table_of[1:] + table_of[:-1]) / 2
    squares = np.bincount(rows, values * values, m)
    scale = np.sqrt(squares / np.maximum(np.bincount(rows, minlength=m), 1)) * (table(levels).levels[-1] / table_of[-1])
    codes = np.zeros(count, np.uint8)
    for _ in range(ROUNDS):
        codes = np.searchsorted(edges, values / np.where(scale > 0, scale, 1.0)[rows]).astype(np.uint8)
        taken = table_of[codes]
        scale = np.bincount(rows, taken * values, m) / np.maximum(np.bincount(rows, taken * taken, m), 1.0)
    return store_entries(levels, codes, np.maximum(scale, 0.0) * longer, "row", where, m * n)
