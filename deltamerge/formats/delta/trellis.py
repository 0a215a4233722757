"""Trellis codes: one or two bits a number, whose level the codes before it help to choose.

A table has 256 levels. The last eight bits of the codes are an index of it: the bits of this code are the lowest, and
earlier codes stand above them. Before the first code all bits are 0. So each number has 256 levels, though a code has
few bits. The tables are trained on a unit Gaussian (Lloyd's rounds of coding and taking means), as in trellis-coded
quantisation (Marcellin and Fischer 1990; arXiv 2406.11235). Viterbi's algorithm finds the sequence of codes whose
levels are nearest in the sum of squares.
"""

from __future__ import annotations

import numpy as np

from deltamerge.engine import kernels
from deltamerge.tensors.dtypes import Array

STATES = 256
BATCH = 64  # vectors that numpy takes at once
# Number of levels that a record says, by which the two kinds are told from plain tables: bits a code.
BITS = {257: 1, 258: 2}
_HALVES = {
    257: (
        "c82413d7d53713142df806b340ef3f9ec3104913cb2bcd230bc6d910432efe55c00b2a0324ded071c41f04a1dd253f03"
        "bd1c42ec007424d93fe8f59ceb9051eb7f0105c101a30601de2ef556871040e145f427ef10c826d50be7d32bb11149d7"
        "f7152c0023c2d23719e13fdd464e88e9e82aa40ee97069281c4e11cfb41cc216"
    ),
    258: (
        "f133f2c6e712fd235fa917220cf12ad52c075dda4dd625e42b5802ac0b3edb00ed0e40e4e8200850dc2efc13b5d53af9"
        "d932f20fff4311e213efc33bf9c447240ce8112d9dd93503f921e3c0cffc114749eb097f0c27ed040b3264e730e98f2c"
        "b3e3ee16d6c2f616bcfd14d9f01ab5e401103ccc180132cac52a09e81ce8fced"
    ),
}


def _table(half: str) -> Array:
    """The first half of a table in hex, and its second: the same, negative and the other way round."""
    first = np.frombuffer(bytes.fromhex(half), np.int8)
    return np.concatenate([first, -first[::-1]])


TABLES = {kind: _table(half) for kind, half in _HALVES.items()}
# What a unit Gaussian loses, and the levels' unit at which it loses least: measured.
DISTORTION = {257: 0.284, 258: 0.078}
UNIT = {257: 0.016305, 258: 0.023144}


def levels_of(codes: Array, kind: int) -> Array:
    """The levels (int8) of codes (uint8) along the last axis."""
    bits = BITS[kind]
    windows = codes.copy()
    for back in range(1, 8 // bits):
        windows[..., back:] |= codes[..., :-back] << np.uint8(back * bits)
    found: Array = TABLES[kind][windows]
    return found


def nearest(vectors: Array, kind: int) -> Array:
    """The codes (uint8) of vectors (r, n), whose entries are in units of the levels; by the kernels, else by numpy."""
    x = np.ascontiguousarray(vectors, np.float32)
    codes = np.zeros(x.shape, np.uint8)
    if not x.size:
        return codes
    native = kernels.native()
    if native is not None:
        native.trellis(x, TABLES[kind].astype(np.float32), codes, x.shape[1], BITS[kind])
        return codes
    for at in range(0, len(x), BATCH):
        codes[at : at + BATCH] = _nearest(x[at : at + BATCH], kind)
    return codes


def _nearest(x: Array, kind: int) -> Array:
    bits, table = BITS[kind], TABLES[kind].astype(np.float32)
    ways, rest = 1 << bits, STATES >> bits
    count, n = x.shape
    cost = np.full((count, STATES), np.inf, np.float32)
    cost[:, 0] = 0
    came = np.empty((n, count, rest), np.uint8)
    for t in range(n):
        before = cost.reshape(count, ways, rest)
        came[t] = before.argmin(1)
        off = x[:, t, None, None] - table.reshape(rest, ways)
        cost = (before.min(1)[:, :, None] + off * off).reshape(count, STATES)
    codes = np.empty((count, n), np.uint8)
    state, each = cost.argmin(1), np.arange(count)
    for t in range(n - 1, -1, -1):
        codes[:, t] = state & (ways - 1)
        state >>= bits
        state += came[t, each, state].astype(np.int64) * rest
    return codes
