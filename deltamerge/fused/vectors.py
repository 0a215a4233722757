"""Philox of many blocks at once, in vectors: pays where the processor has them 512 bits wide."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types

from deltamerge.fused.instructions import instruction, splat
from deltamerge.pruners.bits import HIGH, MULTIPLIERS, ROUNDS, WEYL

# Blocks made at once (two vectors, so that one is worked on while the other waits), and whether they are.
LANES = 16
VECTORS = bool(llvmlite.binding.get_host_cpu_features().get("avx512f", False))

_WORD, _INDEX = ir.IntType(64), ir.IntType(32)


def _joined(builder: Any, a: Any, b: Any) -> Any:
    count = 2 * a.type.count
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INDEX, count), list(range(count))))


@instruction
def philox_blocks(typing: Any, address: Any, first: Any, key0: Any, key1: Any) -> Any:
    """`loops.philox` of the counters (first, 0, HIGH), (first + 1, 0, HIGH), ...: the words of `LANES` blocks, in their
    order, to an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(_WORD, LANES)
        place, index, *keys = arguments

        def constant(value: int) -> Any:
            return ir.Constant(vector, [value] * LANES)

        half, lower = constant(32), constant(0xFFFFFFFF)

        def product(factor: int, c: Any) -> tuple[Any, Any]:
            """High and low words of factor · c, by halves: there is no wider product of vectors."""
            above, below = constant(factor >> 32), constant(factor & 0xFFFFFFFF)
            c_above, c_below = builder.lshr(c, half), builder.and_(c, lower)
            least = builder.mul(below, c_below)
            middle = builder.add(builder.mul(below, c_above), builder.lshr(least, half))
            other = builder.add(builder.mul(above, c_below), builder.and_(middle, lower))
            most = builder.add(builder.mul(above, c_above), builder.lshr(middle, half))
            low = builder.or_(builder.shl(other, half), builder.and_(least, lower))
            return builder.add(most, builder.lshr(other, half)), low

        c0 = builder.add(splat(builder, LANES, index), ir.Constant(vector, list(range(LANES))))
        c1, c2, c3 = constant(0), constant(HIGH), constant(0)
        for n in range(ROUNDS):
            key0, key1 = (
                splat(builder, LANES, builder.add(key, _WORD(n * step % 2**64)))
                for key, step in zip(keys, WEYL, strict=True)
            )
            high0, low0 = product(MULTIPLIERS[0], c0)
            high1, low1 = product(MULTIPLIERS[1], c2)
            c0, c2 = (builder.xor(builder.xor(h, c), k) for h, c, k in ((high1, c1, key0), (high0, c3, key1)))
            c1, c3 = low1, low0
        words = _joined(builder, _joined(builder, c0, c1), _joined(builder, c2, c3))
        order = [word * LANES + block for block in range(LANES) for word in range(4)]
        words = builder.shuffle_vector(words, words, ir.Constant(ir.VectorType(_INDEX, 4 * LANES), order))
        builder.store(words, builder.inttoptr(place, words.type.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64, types.uint64, types.uint64), generate
