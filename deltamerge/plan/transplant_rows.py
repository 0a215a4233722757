"""Embeddings put on another tokenizer: rows of tokens that both have, and sums of such rows for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.formats.quantised.weight import fill_rows
from deltamerge.plan.pursuit import Atoms, SharedBlocks, block_of, nearest, pursuit
from deltamerge.tensors.dtypes import bits_type, torch_dtype, widen
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.rows import mean_row, stored_rows
from deltamerge.tensors.tensor import Read, TensorInfo

METHODS: dict[str, Callable[..., Any]] = {"omp": pursuit, "common": nearest}


@dataclass(frozen=True, slots=True)
class Sums:
    """Which rows of common tokens make the rows of others, and how much of each, by the donor's embedding.

    donor     the embedding (rows, width) of the model whose tokenizer it is
    method    omp or common
    k         rows of a sum
    common    the donor's rows of tokens that both have
    others    the donor's rows that are written as sums of those
    digest    of both
    """

    donor: TensorInfo
    method: str
    k: int
    digest: str
    common: NDArray[np.int32] = field(compare=False, repr=False)
    others: NDArray[np.int32] = field(compare=False, repr=False)

    @property
    def width(self) -> int:
        return math.prod(self.donor.shape[1:])

    @property
    def block(self) -> int:
        """Rows that are computed at once."""
        return block_of(self.width, self.k)

    def of(self, read: Read, first: int, last: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """(last − first, k) places in `common`, and coefficients, of the sums [first, last)."""
        blocks: SharedBlocks = read.once(("sums", self), lambda: self._blocks(read))
        size = self.block
        found = [blocks.get(i) for i in range(first // size, -(-last // size))]
        low = first // size * size
        places, weights = (np.concatenate(part)[first - low : last - low] for part in zip(*found, strict=True))
        return places, weights

    def _blocks(self, read: Read) -> SharedBlocks:
        # distances are differences, which bfloat16 would not tell apart
        atoms = Atoms.of(self._values(read, self.common), screen=False if self.method == "common" else None)

        def compute(block: int) -> Any:
            rows = self.others[block * self.block : (block + 1) * self.block]
            return METHODS[self.method](self._values(read, rows), atoms, self.k)

        return SharedBlocks(-(-len(self.others) // self.block), compute)

    def _values(self, read: Read, rows: NDArray[np.int32]) -> Any:
        """The donor's rows as a torch tensor, in bfloat16 if they are stored so, else in float32."""
        bits = stored_rows(read, self.donor, rows, self.width)
        if self.donor.dtype == "BF16":
            return torch.from_numpy(bits.view(np.int16)).view(torch_dtype("BF16"))
        return torch.from_numpy(widen(bits.view(bits_type(self.donor.dtype)), self.donor.dtype))


@dataclass(frozen=True, slots=True)
class Transplanted:
    """A tensor (rows, width) in float32 under another tokenizer.

    source   under the old vocabulary
    width    elements of a row
    sums     of the rows that are sums; None: those are the mean row
    digest   of the arrays below
    origin   (rows) the row of `source` that a row is; −1: a sum; −2: the mean of all rows of `source`
    order    (rows) which of the sums a row is
    common   the rows of `source` that sums are of, as `sums.common` has the donor's
    """

    source: TensorInfo
    width: int
    sums: Sums | None
    digest: str
    origin: NDArray[np.int32] = field(compare=False, repr=False)
    order: NDArray[np.int32] = field(compare=False, repr=False)
    common: NDArray[np.int32] = field(compare=False, repr=False)

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        fill_rows(self.width, start, out, lambda top, bottom: self._rows(read, top, bottom))

    def _rows(self, read: Read, first: int, last: int) -> NDArray[np.float32]:
        origin = self.origin[first:last]
        result = np.empty((len(origin), self.width), np.float32)
        copied, summed, mean = (np.flatnonzero(chosen) for chosen in (origin >= 0, origin == -1, origin == -2))
        if copied.size:
            result[copied] = self._source(read, origin[copied])
        if mean.size or (summed.size and self.sums is None):
            row = read.once(("mean row", self.source), lambda: self._mean(read))
            result[mean] = row
            if self.sums is None:
                result[summed] = row
        if summed.size and self.sums is not None:
            wanted = self.order[first:last][summed]
            places, weights = self.sums.of(read, int(wanted[0]), int(wanted[-1]) + 1)
            result[summed] = self._summed(read, places, weights)
        return result

    def _summed(self, read: Read, places: NDArray[np.int32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Σ_j w_j · row_j in float32 in the order of j, each product and sum rounded."""
        rows, where = np.unique(self.common[places], return_inverse=True)
        values, where = self._source(read, rows), where.reshape(places.shape)
        total = np.zeros((len(places), self.width), np.float32)
        for j in range(places.shape[1]):
            total += weights[:, j, None] * values[where[:, j]]
        return total

    def _source(self, read: Read, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        dtype = self.source.dtype
        return widen(stored_rows(read, self.source, rows, self.width).view(bits_type(dtype)), dtype)

    def _mean(self, read: Read) -> NDArray[np.float32]:
        def rows(first: int, last: int) -> NDArray[np.float32]:
            return self._source(read, np.arange(first, last, dtype=np.int32))

        return mean_row(rows, self.source.shape[0], self.width)
