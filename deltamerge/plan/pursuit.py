"""Vectors written as sums of few others: orthogonal matching pursuit, and interpolation of the nearest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.tensors.lazy import torch

CANDIDATES = 8  # of a step, whose scores are computed again in float32
SCREENED = 1 << 22  # elements of the atoms from which on scores are first computed in bfloat16
HELD = 1 << 25  # float32 elements of the bases of one block of targets
SPARE = 8  # nearest atoms, beyond k, whose distances are computed again in float64
DEPENDENT = 1e-4  # of an atom: less of it outside the chosen ones' span adds nothing but rounding
DONE = 1e-6  # of a target: a residual as small is rounding

Indices = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Atoms:
    """(atoms, width) vectors, in float32 or bfloat16, and in the form that is screened."""

    exact: Any
    screened: Any

    @classmethod
    def of(cls, exact: Any, *, screen: bool | None = None) -> Atoms:
        """Atoms of a torch tensor. `screen`: scores are first computed in bfloat16, where that is faster."""
        if screen is None:
            screen = exact.numel() >= SCREENED and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return cls(exact, exact.bfloat16() if screen else exact.float())

    def rows(self, indices: Any) -> Any:
        """Atoms in float32."""
        return self.exact[indices].float()

    @cached_property
    def squares(self) -> Any:
        """|a|² of every atom, in float32."""
        return self.screened.float().norm(dim=1).square()


def block_of(width: int, k: int) -> int:
    """Targets of a block: whose bases fit into 128 MiB."""
    return max(8, min(512, HELD // (k * width)))


def held(width: int, k: int, atoms: int) -> int:
    """Return the bytes that one thread holds while it computes a block: bases, their candidates, scores."""
    targets = block_of(width, k)
    return 4 * targets * (k * width + 2 * (CANDIDATES + 4) * width + 2 * atoms) + 16 * 8 * k * width


def pursuit(targets: Any, atoms: Atoms, k: int) -> tuple[Indices, Floats]:
    """Orthogonal matching pursuit (Pati et al. 1993): (targets, k) indices of atoms, and float32 coefficients.

    A step takes the atom a with the greatest |a · r|, r what of the target is outside the chosen ones' span (of equals
    the first). Scores are of float32: where they are screened in bfloat16, those of the best 8. The coefficients are
    the least squares of the chosen, in float64, rounded once. A target that is spanned sooner has zeros for the rest.
    """
    targets = targets.float()
    count, width = targets.shape
    chosen = np.zeros((count, k), np.int64)
    used = np.zeros((count, k), bool)
    bases = torch.zeros((count, k, width))
    residual = targets.clone()
    norms = targets.norm(dim=1)
    active = (norms > 0).numpy()
    for step in range(k):
        if not active.any():
            break
        best = _best(residual, atoms, chosen[:, :step], used[:, :step])
        atom = atoms.rows(torch.from_numpy(best))
        direction = atom.clone()
        if step:
            past = bases[:, :step]
            direction -= torch.bmm(torch.bmm(direction[:, None], past.transpose(1, 2)), past)[:, 0]
        length = direction.norm(dim=1)
        active &= (length > DEPENDENT * atom.norm(dim=1)).numpy()
        active &= (residual.norm(dim=1) > DONE * norms).numpy()
        direction *= torch.where(torch.from_numpy(active), 1 / length, 0.0)[:, None]
        bases[:, step] = direction
        residual -= (residual * direction).sum(1, keepdim=True) * direction
        chosen[active, step], used[:, step] = best[active], active
    return chosen.astype(np.int32), _least_squares(targets, atoms, chosen, used)


def _best(residual: Any, atoms: Atoms, chosen: NDArray[np.int64], used: NDArray[Any]) -> NDArray[np.int64]:
    """Return each target's atom with the greatest |a · r| that is not chosen yet."""
    scores = (residual.to(atoms.screened.dtype) @ atoms.screened.T).abs_()
    if chosen.shape[1]:
        at, places = np.nonzero(used)
        scores[torch.from_numpy(at), torch.from_numpy(chosen[at, places])] = -1
    found = scores.topk(min(CANDIDATES, scores.shape[1]), dim=1).indices.sort(dim=1).values
    # residuals as rows: as columns they take 4 times as long
    exact = torch.bmm(residual[:, None], atoms.rows(found).transpose(1, 2))[:, 0].abs()
    exact[scores.gather(1, found) < 0] = -1
    places = exact.numpy().argmax(1)
    picked: NDArray[np.int64] = found.numpy()[np.arange(len(places)), places]
    return picked


def _least_squares(targets: Any, atoms: Atoms, chosen: NDArray[np.int64], used: NDArray[Any]) -> Floats:
    """Return the coefficients of the chosen atoms, of normal equations in float64; those that are not used are zero."""
    result = np.zeros(chosen.shape, np.float32)
    for first in range(0, len(chosen), 16):
        part = slice(first, first + 16)
        live = torch.from_numpy(used[part].astype(np.float64))
        rows = atoms.rows(torch.from_numpy(chosen[part])).double() * live[:, :, None]
        gram = rows @ rows.transpose(1, 2) + torch.diag_embed(1 - live)
        wanted = rows @ targets[part].double()[:, :, None]
        scale = gram.diagonal(dim1=1, dim2=2).rsqrt()[:, :, None]
        factor = torch.linalg.cholesky_ex(gram * scale * scale.transpose(1, 2)).L
        result[part] = (torch.cholesky_solve(wanted * scale, factor) * scale)[:, :, 0].float().numpy()
    return result


def nearest(targets: Any, atoms: Atoms, k: int) -> tuple[Indices, Floats]:
    """(targets, k) indices of the nearest atoms, and weights in inverse proportion to their distances.

    Distances are Euclidean, at least 1e-6, in float64 for those that count; of equals the first is nearer.
    """
    targets = targets.float()
    # |x − a|² without |x|², which is the same for all atoms
    plain = atoms.screened.float()
    sums = atoms.squares - 2 * (targets @ plain.T)
    chosen = np.zeros((len(targets), k), np.int32)
    weights = np.zeros((len(targets), k), np.float32)
    near = sums.topk(min(k + SPARE, sums.shape[1]), dim=1, largest=False).indices.sort(dim=1).values
    for i, (target, found) in enumerate(zip(targets, near, strict=True)):
        distances = (atoms.exact[found].double() - target.double()).norm(dim=1).numpy()
        order = np.argsort(distances, kind="stable")[:k]
        chosen[i] = found.numpy()[order]
        inverse = 1 / np.maximum(distances[order], 1e-6)
        weights[i] = inverse / inverse.sum()
    return chosen, weights


class SharedBlocks:
    """Blocks of a table that threads compute as they come: one that finds its block in another's hands takes the next
    that is free, and waits only where none is."""

    def __init__(self, count: int, compute: Any) -> None:
        self.compute = compute
        self.results: list[Any] = [None] * count
        self.free = dict.fromkeys(range(count))
        self.changed = threading.Condition()
        self.failed: BaseException | None = None

    def get(self, block: int) -> Any:
        """Return the block's value. Raises what computing any of them raised."""
        while True:
            with self.changed:
                if self.failed is not None:
                    raise self.failed
                if self.results[block] is not None:
                    return self.results[block]
                mine = block if block in self.free else next(iter(self.free), None)
                if mine is None:
                    self.changed.wait()
                    continue
                del self.free[mine]
            try:
                with one_thread():
                    made = self.compute(mine)
            except BaseException as error:
                with self.changed:
                    self.failed = error
                    self.changed.notify_all()
                raise
            with self.changed:
                self.results[mine] = made
                self.changed.notify_all()


_counting = threading.Lock()
_inside: list[int] = []


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's operations on one thread, while any worker is inside."""
    with _counting:
        _inside.append(torch.get_num_threads() if not _inside else _inside[0])
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _counting:
            before = _inside.pop()
            if not _inside:
                torch.set_num_threads(before)
