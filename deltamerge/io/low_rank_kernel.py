"""Left times right in the order of the rank, by numba: the bits of `computed.ordered_product`, sooner."""

from __future__ import annotations

from typing import Any

from deltamerge.io.jit import compiled


@compiled
def ordered_product(left: Any, right: Any, out: Any) -> None:
    """out_ij = Σ_k left_ik right_kj in the order of k, contiguous float32; each product and sum is rounded."""
    rows, columns = out.shape
    for i in range(rows):
        for j in range(columns):
            out[i, j] = left[i, 0] * right[0, j]
        for k in range(1, right.shape[0]):
            factor = left[i, k]
            for j in range(columns):
                out[i, j] += factor * right[k, j]
