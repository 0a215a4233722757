"""XXH3-128 of pieces of 64 KiB, without a seed, as the library `xxhash` has it: for loops that have a piece in cache.

Yann Collet's XXH3, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, for an input of that one length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from deltamerge.engine.fused.instructions import instruction, product
from deltamerge.io.jit import compiled
from deltamerge.io.pieces import PIECE_BYTES

# Bytes that are mixed between two scramblings, by stripes of 64.
BLOCK = 1024
STRIPES = BLOCK // 64
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
START = (PRIME32[2], *PRIME64[:4], PRIME32[1], PRIME64[4], PRIME32[0])
# Where in the secret the last stripe, the scrambling, and the two halves of the digest begin.
LAST, SCRAMBLE, LOW, HIGH = 121, 128, 11, 117

_WORD, _INDEX = ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(_WORD, 8)


def _secret(begin: int) -> list[int]:
    return [int.from_bytes(SECRET[begin + 8 * i : begin + 8 * i + 8], "little") for i in range(8)]


_START = np.array(START, np.uint64)
_LOW, _HIGH = np.array(_secret(LOW), np.uint64), np.array(_secret(HIGH), np.uint64)
_LOW_SEED = np.uint64(PIECE_BYTES * PRIME64[0] % 2**64)
_HIGH_SEED = np.uint64(~(PIECE_BYTES * PRIME64[1]) % 2**64)
_AVALANCHE = np.uint64(0x165667919E3779F9)
_37, _32 = np.uint64(37), np.uint64(32)


@instruction
def mix_block(typing: Any, accumulators: Any, data: Any, last: Any) -> Any:
    """Mix the block at an address into the 8 accumulators at another; `last`: it is a piece's last."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], _VECTOR.as_pointer())
        swapped = ir.Constant(ir.VectorType(_INDEX, 8), [1, 0, 3, 2, 5, 4, 7, 6])

        def constant(words: list[int]) -> Any:
            return ir.Constant(_VECTOR, words)

        def accumulate(total: Any, stripe: int, secret: int) -> Any:
            at = builder.add(arguments[1], _WORD(64 * stripe))
            words = builder.load(builder.inttoptr(at, _VECTOR.as_pointer()), align=1)
            key = builder.xor(words, constant(_secret(secret)))
            halves = builder.and_(key, constant([0xFFFFFFFF] * 8)), builder.lshr(key, constant([32] * 8))
            total = builder.add(total, builder.shuffle_vector(words, words, swapped))
            return builder.add(total, builder.mul(*halves))

        total = builder.load(place, align=8)
        for stripe in range(STRIPES - 1):
            total = accumulate(total, stripe, 8 * stripe)
        with builder.if_else(arguments[2]) as (then, otherwise):
            with then:
                builder.store(accumulate(total, STRIPES - 1, LAST), place, align=8)
            with otherwise:
                mixed = accumulate(total, STRIPES - 1, 8 * (STRIPES - 1))
                mixed = builder.xor(mixed, builder.lshr(mixed, constant([47] * 8)))
                mixed = builder.xor(mixed, constant(_secret(SCRAMBLE)))
                builder.store(builder.mul(mixed, constant([PRIME32[0]] * 8)), place, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.boolean), generate


@compiled
def digest_half(accumulators: Any, secret: Any, seed: Any) -> Any:
    total = seed
    for i in range(0, 8, 2):
        high, low = product(accumulators[i] ^ secret[i], accumulators[i + 1] ^ secret[i + 1])
        total += high ^ low
    total = (total ^ (total >> _37)) * _AVALANCHE
    return total ^ (total >> _32)


@compiled
def mix_pieces(at: Any, begin: Any, end: Any, first: Any, accumulators: Any, digests: Any) -> Any:
    """Hash bytes [begin, end) of a file, of which the first is at an address and begins a block; up to where it came.

    Digests, high half first, go to the rows of `digests`, of which the first is of piece number `first`.
    """
    while end - begin >= BLOCK:
        inside = begin % PIECE_BYTES
        if inside == 0:
            for i in range(8):
                accumulators[i] = _START[i]
        last = inside == PIECE_BYTES - BLOCK
        mix_block(accumulators.ctypes.data, at, last)
        begin += BLOCK
        at += BLOCK
        if last:
            row = digests[begin // PIECE_BYTES - 1 - first]
            row[0] = digest_half(accumulators, _HIGH, _HIGH_SEED)
            row[1] = digest_half(accumulators, _LOW, _LOW_SEED)
    return begin
