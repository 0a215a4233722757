"""Embeddings put on another tokenizer: rows of tokens that both have, and sums of such rows for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.plan.pursuit import Atoms, SharedBlocks, block_of, nearest, pursuit
from deltamerge.tensors.dtypes import bits_type, torch_dtype, widen
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tensor import Read, Tensor, view
from deltamerge.tensors.views import fill_lines, mean_row, stored_rows

METHODS: dict[str, Callable[..., Any]] = {"omp": pursuit, "common": nearest}


@dataclass(frozen=True, slots=True)
class Sums:
    """Which rows of common tokens make the rows of others, and how much of each.

    method    omp or common
    k         rows of a sum
    common    the donor's rows of tokens that both have
    others    the donor's rows that are written as sums of those
    digest    of both
    """

    method: str
    k: int
    digest: str
    common: NDArray[np.int32] = field(compare=False, repr=False)
    others: NDArray[np.int32] = field(compare=False, repr=False)

    def of(self, read: Read, donor: Tensor, first: int, last: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return (last − first, k) places in `common`, and coefficients, of the sums [first, last).

        `donor` is the embedding (rows, width) of the model whose tokenizer it is.
        """
        blocks: SharedBlocks = read.once(("sums", donor, self), lambda: self._blocks(read, donor))
        size = self._block(donor)
        found = [blocks.get(i) for i in range(first // size, -(-last // size))]
        low = first // size * size
        places, weights = (np.concatenate(part)[first - low : last - low] for part in zip(*found, strict=True))
        return places, weights

    def _block(self, donor: Tensor) -> int:
        """Return the rows that are computed at once."""
        return block_of(math.prod(donor.shape[1:]), self.k)

    def _blocks(self, read: Read, donor: Tensor) -> SharedBlocks:
        # distances are differences, which bfloat16 would not tell apart
        atoms = Atoms.of(_values(read, donor, self.common), screen=False if self.method == "common" else None)

        def compute(block: int) -> Any:
            rows = self.others[block * size : (block + 1) * size]
            return METHODS[self.method](_values(read, donor, rows), atoms, self.k)

        size = self._block(donor)
        return SharedBlocks(-(-len(self.others) // size), compute)


def _values(read: Read, donor: Tensor, rows: NDArray[np.int32]) -> Any:
    """Return the donor's rows as a torch tensor, in bfloat16 if they are stored so, else in float32."""
    bits = stored_rows(read, donor, rows, math.prod(donor.shape[1:]))
    if donor.dtype == "BF16":
        return torch.from_numpy(bits.view(np.int16)).view(torch_dtype("BF16"))
    return torch.from_numpy(widen(bits.view(bits_type(donor.dtype)), donor.dtype))


@dataclass(frozen=True, slots=True)
class Moves:
    """The rows of a tensor under another tokenizer.

    sums     of the rows that are sums; None: those are the mean row
    digest   of the arrays below
    origin   (rows) the row of the source that a row is; −1: a sum; −2: the mean of all rows of the source
    order    (rows) which of the sums a row is
    common   the rows of the source that sums are of, as `sums.common` has the donor's
    """

    sums: Sums | None
    digest: str
    origin: NDArray[np.int32] = field(compare=False, repr=False)
    order: NDArray[np.int32] = field(compare=False, repr=False)
    common: NDArray[np.int32] = field(compare=False, repr=False)


@view(moves=True)
def transplant_rows(read: Read, tensor: Tensor, start: int, out: memoryview, *, moves: Moves) -> None:
    """Compute a tensor (rows, width) in float32 under another tokenizer.

    The first input is the tensor under the old vocabulary. The second, if any, is the donor's embedding.
    """
    width = math.prod(tensor.shape[1:])
    fill_lines(width, "F32", start, out, lambda top, bottom: _rows(read, tensor, moves, top, bottom))


def _rows(read: Read, tensor: Tensor, moves: Moves, first: int, last: int) -> NDArray[np.float32]:
    source, origin = tensor.inputs[0], moves.origin[first:last]
    result = np.empty((len(origin), math.prod(tensor.shape[1:])), np.float32)
    copied, summed, mean = (np.flatnonzero(chosen) for chosen in (origin >= 0, origin == -1, origin == -2))
    if copied.size:
        result[copied] = _source(read, source, origin[copied])
    if mean.size or (summed.size and moves.sums is None):
        row = read.once(("mean row", source), lambda: _mean(read, source))
        result[mean] = row
        if moves.sums is None:
            result[summed] = row
    if summed.size and moves.sums is not None:
        wanted = moves.order[first:last][summed]
        places, weights = moves.sums.of(read, tensor.inputs[1], int(wanted[0]), int(wanted[-1]) + 1)
        result[summed] = _summed(read, source, moves.common, places, weights)
    return result


def _summed(
    read: Read, source: Tensor, common: NDArray[np.int32], places: NDArray[np.int32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return Σ_j w_j · row_j in float32 in the order of j, each product and sum rounded."""
    rows, where = np.unique(common[places], return_inverse=True)
    values, where = _source(read, source, rows), where.reshape(places.shape)
    total = np.zeros((len(places), values.shape[1]), np.float32)
    for j in range(places.shape[1]):
        total += weights[:, j, None] * values[where[:, j]]
    return total


def _source(read: Read, source: Tensor, rows: NDArray[np.int32]) -> NDArray[np.float32]:
    width = math.prod(source.shape[1:])
    return widen(stored_rows(read, source, rows, width).view(bits_type(source.dtype)), source.dtype)


def _mean(read: Read, source: Tensor) -> NDArray[np.float32]:
    def rows(first: int, last: int) -> NDArray[np.float32]:
        return _source(read, source, np.arange(first, last, dtype=np.int32))

    return mean_row(rows, source.shape[0], math.prod(source.shape[1:]))
