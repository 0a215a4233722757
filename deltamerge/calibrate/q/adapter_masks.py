"""Masks of an adapter's A and B as masks of the weight that they update, so that q is searched as for any weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from deltamerge.engine.whole import computed
from deltamerge.tensors.graph import Node
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tiles import Tile
from deltamerge.tensors.views import Array, ordered_product

if TYPE_CHECKING:
    import torch


def whole(*, node: Node) -> Array:
    """The whole value of `node`, a small tensor: float32 on the CPU, in the node's shape."""
    with Reader() as reader:
        return computed({"factor": node}, reader, workers=1)["factor"].view(np.float32).reshape(node.shape)


def product(a: Array, b: Array, *, tile: Tile, scale: float, transposed: bool) -> torch.Tensor:
    """s · B A, or its transpose, of masked factors, on a tile of the weight: flat float32.

    a            (r, in) masked
    b            (out, r) masked
    tile         the part of the weight
    scale        s
    transposed   whether the weight is stored (in, out)
    """
    import torch

    left, right = (a.T, b.T) if transposed else (b, a)
    top, bottom = tile.start // tile.columns, math.ceil(tile.stop / tile.columns)
    out = np.empty((bottom - top, tile.columns), np.float32)
    ordered_product(left[top:bottom], right, out)
    out *= np.float32(scale)
    first = tile.start - top * tile.columns
    return torch.from_numpy(out.reshape(-1)[first : first + tile.size])
