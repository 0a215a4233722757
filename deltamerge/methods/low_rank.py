"""A matrix delta Δ (out, in) as B A of low rank: the product nearest to Δ, or nearest in its effect on inputs.

Without second moments B A is the truncated SVD of Δ (Eckart and Young 1936). With C = E[x xᵀ] (in, in) of the layer's
inputs it minimises E‖(Δ − B A) x‖²: with Δ C^½ = U S Vᵀ, B A = U_r U_rᵀ Δ, so that C is never inverted. In both cases
the columns of U are eigenvectors of M = Δ C Δᵀ, and A = U_rᵀ Δ.

Up to a smaller side of EXACT, LAPACK computes the eigenvectors of a Gram matrix in float64. Above it, M's leading
subspace is found by iteration from random signs (Halko, Martinsson and Tropp, arXiv 0909.4061), in float32,
orthonormalised in float64. The error of its Ritz values is bounded: each is within ‖M Q − Q H‖₂ of an eigenvalue
(Parlett, Theorem 11.5.1).

Every result is computed by one thread on blocks of fixed size, so it does not depend on how Δ was streamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Array = NDArray[Any]
Key = tuple[int, int]

EXACT = 1024  # the largest smaller side whose whole spectrum is computed
BLOCK = 1 << 22  # elements that are widened to float64 at once
SPARE = 8  # directions beside the wanted ones, and a quarter of these, that make the iteration converge
ROUNDS = 10  # most rounds of the iteration
MISSED = 0.002  # share of the kept gain that may be missed when the iteration ends early
STILL = 0.003  # share by which a round must raise the kept gain for another round to follow
NOT_FINITE, REPAIR = "a model's delta is not finite", "repair the fine-tune, or leave it out"
SMALL, TURNS = 128, 6  # of `leading`: the largest smaller side that LAPACK factors, and rounds above it
FIRST = 64  # directions that are tried first if an energy is wanted
NOISE = 1e-13  # share of the largest squared singular value; smaller values come from rounding float32


@dataclass(frozen=True, slots=True)
class Wanted:
    """The number of ranks to keep: at most `rank` (None: all), and no more than needed for the share `energy`."""

    rank: int | None = None
    energy: float | None = None

    def count(self, gains: Floats, total: float) -> int:
        """Return the number of descending `gains` to keep, `total` being the sum of all."""
        most = int(np.count_nonzero(gains > NOISE * gains[0])) if gains.size and gains[0] > 0 else 0
        most = most if self.rank is None else min(most, self.rank)
        if self.energy is None or not most:
            return most
        enough = np.flatnonzero(np.cumsum(gains[:most]) >= self.energy * total * (1 - 1e-12))
        return int(enough[0]) + 1 if enough.size else most


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Δ ≈ B A by descending importance: the first r columns of B and rows of A are the best of rank r.

    b, a       (out, k), (k, in) float32; column i of B is as long as row i of A
    energies   (k) the part of ‖Δ‖²_F that rank i keeps
    gains      (k) the part of E‖Δx‖² that rank i keeps; without second moments the same
    energy     ‖Δ‖²_F
    gain       E‖Δx‖², or ‖Δ‖²_F
    missed     bound on the gain of the best B A of rank k over this one, as a share of `gain`; 0: it is the best
    """

    b: Array
    a: Array
    energies: Floats
    gains: Floats
    energy: float
    gain: float
    missed: float = 0.0

    @property
    def rank(self) -> int:
        """Return k."""
        return int(self.energies.size)


def factor(delta: Array, wanted: Wanted, key: Key, moments: Array | None = None) -> Factors:
    """Return the factors of a delta (m, n) float32; `moments` C (n, n), `key` of the random signs.

    ValueError: entries that are not finite.
    """
    energy = sum(float(torch.sum(block * block)) for _, block in _rows(delta))
    if not np.isfinite(energy):
        raise ValueError("not finite")
    m, n = delta.shape
    if not energy:
        return _nothing(m, n)
    c = None if moments is None else torch.from_numpy(np.asarray(moments, np.float64))
    side = min(m, n)
    aim = wanted.rank or side
    if side > EXACT:
        k = min(aim, FIRST) if wanted.energy is not None else aim
        while k <= side // 4:
            found = _iterated(delta, k, key, c, energy)
            enough = wanted.energy is None or found.gains[:k].sum() >= wanted.energy * found.gain or k >= aim
            if enough:
                count = wanted.count(found.gains, found.gain)
                return _finished(delta, found.u[:, :count], found.gains[:count], energy, found.gain, found.missed)
            k = min(2 * k, max(aim, k + 1))
    u, gains, gain = _exact(delta, wanted, c)
    return _finished(delta, u, gains, energy, gain, 0.0)


def factor_product(b: Array, a: Array, wanted: Wanted, moments: Array | None = None) -> Factors:
    """Return the factors of Δ = b a with b (m, R) and a (R, n), in float64, without Δ.

    With b = Q T, M = Q (T a C aᵀ Tᵀ) Qᵀ, so an R × R matrix gives the eigenvectors. ValueError: as for `factor`.
    """
    left, right = (torch.from_numpy(np.asarray(x, np.float64)) for x in (b, a))
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise ValueError("not finite")
    q, t = torch.linalg.qr(left)
    c = None if moments is None else torch.from_numpy(np.asarray(moments, np.float64))
    inner = t @ ((right if c is None else right @ c) @ right.T) @ t.T
    energy = float(torch.trace(t @ (right @ right.T) @ t.T))
    if energy <= 0:
        return _nothing(b.shape[0], a.shape[1])
    gains, vectors = _descending(inner)
    gain = float(torch.trace(inner))
    count = wanted.count(gains, gain)
    u = vectors[:, :count]
    return _balanced(q @ u, (u.T @ t) @ right, gains[:count], energy, gain, 0.0)


def scratch_bytes(m: int, n: int, k: int, *, moments: bool) -> int:
    """Estimate the bytes that `factor` takes beside Δ and C."""
    side, kept = min(m, n), min(k, m, n)
    factors = kept * (m + n)
    if side <= EXACT or kept > side // 4:
        return 8 * (4 * side * side + BLOCK + (2 * n * n if moments and m > n else 0)) + 40 * factors
    return 20 * factors + 40 * (kept + kept // 4 + SPARE) * (m + n) + (8 * n * n if moments else 0)


def leading(delta: Array, count: int, key: Key) -> tuple[Floats, Floats]:
    """Return (m, k) and (n, k) orthonormal, the leading k ≤ `count` left and right singular vectors of a delta (m, n).

    LAPACK finds them up to a smaller side of SMALL. Above it TURNS rounds of iteration in float32 do, which is exact
    enough to describe a delta. InputError: entries that are not finite.
    """
    matrix = torch.from_numpy(delta)
    if not bool(torch.isfinite(matrix).all()):
        raise InputError(NOT_FINITE, hint=REPAIR)
    if min(delta.shape) <= SMALL:
        u, lengths, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        z = _signs(key, delta.shape[1], count + SPARE)
        for _ in range(TURNS):
            q = torch.linalg.qr(matrix @ z)[0]
            z = torch.linalg.qr(matrix.T @ q)[0]
        u, lengths, turn = torch.linalg.svd((matrix @ z).double(), full_matrices=False)
        vt = turn @ z.T.double()
    kept = int(torch.count_nonzero(lengths[:count] > NOISE**0.5 * lengths[0]))
    return u[:, :kept].numpy(), vt[:kept].T.numpy()


@dataclass(frozen=True, slots=True, eq=False)
class _Subspace:
    u: Tensor
    gains: Floats
    gain: float
    missed: float


def _exact(delta: Array, wanted: Wanted, c: Tensor | None) -> tuple[Tensor, Floats, float]:
    """Return U (m, k), the kept squared singular values, and the sum of all of them, in float64."""
    m, n = delta.shape
    if m <= n:
        gram = torch.zeros(m, m, dtype=torch.float64)
        for at, block in _columns(delta):
            seen = block if c is None else sum((b @ c[i, at] for i, b in _columns(delta)), torch.zeros(1))
            gram += seen @ block.T
        gains, vectors = _descending(gram)
        gain = float(torch.trace(gram))
        count = wanted.count(gains, gain)
        return vectors[:, :count], gains[:count], gain
    gram = torch.zeros(n, n, dtype=torch.float64)
    for _, block in _rows(delta):
        gram += block.T @ block
    root = None
    if c is not None:
        values, axes = torch.linalg.eigh((c + c.T) / 2)
        root = axes * values.clamp(min=0).sqrt()
        gram = root.T @ gram @ root
    gains, vectors = _descending(gram)
    gain = float(torch.trace(gram))
    count = wanted.count(gains, gain)
    v = vectors[:, :count] if root is None else root @ vectors[:, :count]
    u = torch.cat([block @ v for _, block in _rows(delta)])
    u /= torch.from_numpy(np.sqrt(gains[:count]))
    return torch.linalg.qr(u)[0], gains[:count], gain


def _iterated(delta: Array, k: int, key: Key, c: Tensor | None, gain: float) -> _Subspace:
    """Return the leading k eigenvectors of M, by iteration. `gain` is the trace of M, which is ‖Δ‖² without C."""
    matrix = torch.from_numpy(delta)
    weights = None if c is None else c.to(torch.float32)
    m = len(matrix)
    width = min(m, k + SPARE + k // 4)
    if weights is not None:
        gain = sum(float(torch.sum((block.float() @ weights).double() * block)) for _, block in _rows(delta))
    z = _signs(key, m, width)
    values, turn, missed, kept = np.zeros(k), torch.eye(width, dtype=torch.float64), 1.0, 0.0
    q = z
    for done in range(ROUNDS):
        q = torch.linalg.qr(z.double())[0].float()
        t = q.T @ matrix
        seen = t if weights is None else t @ weights
        z = matrix @ seen.T
        h = t.double() @ seen.double().T
        values, turn = _descending(h)
        left = (z.double() - q.double() @ h) @ turn[:, :k]
        spread = float(_descending(left.T @ left)[0][0]) ** 0.5
        missed = min(max(0.0, gain - float(values.sum())), k * spread)
        before, kept = kept, float(values[:k].sum())
        if done and (missed <= MISSED * kept or kept - before <= STILL * kept):
            break
    return _Subspace(q.double() @ turn[:, :k], np.maximum(values[:k], 0.0), gain, missed / gain if gain else 0.0)


def _finished(delta: Array, u: Tensor, gains: Floats, energy: float, gain: float, missed: float) -> Factors:
    u = torch.linalg.qr(u)[0] if u.shape[1] else u
    a = torch.zeros(u.shape[1], delta.shape[1], dtype=torch.float64)
    for at, block in _rows(delta):
        a += u[at].T @ block
    return _balanced(u, a, gains, energy, gain, missed)


def _balanced(u: Tensor, a: Tensor, gains: Floats, energy: float, gain: float, missed: float) -> Factors:
    """Fix signs by the largest entry of each column of U, and give the columns of B and the rows of A equal lengths."""
    if u.shape[1]:
        largest = u.abs().argmax(0)
        signs = torch.where(u[largest, torch.arange(u.shape[1])] < 0, -1.0, 1.0).to(torch.float64)
        u, a = u * signs, a * signs[:, None]
    energies = torch.sum(a * a, 1).numpy()
    length = torch.from_numpy(np.where(energies > 0, energies, 1.0) ** 0.25)
    b = (u * length).float().contiguous().numpy()
    return Factors(b, (a / length[:, None]).float().contiguous().numpy(), energies, gains, energy, gain, missed)


def _nothing(m: int, n: int) -> Factors:
    none = np.zeros(0)
    return Factors(np.zeros((m, 0), np.float32), np.zeros((0, n), np.float32), none, none, 0.0, 0.0)


def _descending(gram: Tensor) -> tuple[Floats, Tensor]:
    """Return the eigenvalues of a symmetric matrix, the largest first and none below zero, and their vectors."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return np.maximum(values.flip(0).numpy(), 0.0), vectors.flip(1)


def _signs(key: Key, rows: int, columns: int) -> Tensor:
    """Return (rows, columns) of ±1 float32, from the words of Philox with this key."""
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(-(-rows * columns // 64))
    bits = np.unpackbits(np.asarray(words, "<u8").view(np.uint8))[: rows * columns]
    return torch.from_numpy((bits.astype(np.float32) * 2 - 1).reshape(rows, columns))


def _rows(delta: Array) -> Iterator[tuple[slice, Tensor]]:
    """Return blocks of rows in float64."""
    step = max(1, BLOCK // max(1, delta.shape[1]))
    for start in range(0, len(delta), step):
        yield slice(start, start + step), torch.from_numpy(delta[start : start + step]).double()


def _columns(delta: Array) -> Iterator[tuple[slice, Tensor]]:
    """Return blocks of columns in float64."""
    step = max(1, BLOCK // max(1, len(delta)))
    for start in range(0, delta.shape[1], step):
        yield slice(start, start + step), torch.from_numpy(delta[:, start : start + step]).double()
