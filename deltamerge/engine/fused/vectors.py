"""Philox of many blocks at once: pays where the processor has vectors 512 bits wide.

While such a processor multiplies vectors it can multiply words too, and some blocks are made so.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types

from deltamerge.engine.fused.instructions import halves_of_product, instruction, splat
from deltamerge.methods.prune.bits import HIGH, MULTIPLIERS, ROUNDS, WEYL

# Blocks made at once: in vectors (two, so that one is worked on while the other waits), and meanwhile by words.
LANES, WORDS = 16, 16
BLOCKS = LANES + WORDS
VECTORS = bool(llvmlite.binding.get_host_cpu_features().get("avx512f", False))

_WORD, _INDEX = ir.IntType(64), ir.IntType(32)
_VECTOR, _HALF = ir.VectorType(_WORD, LANES), ir.VectorType(_WORD, LANES // 2)


def _constant(value: int) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def _joined(builder: Any, a: Any, b: Any) -> Any:
    return builder.shuffle_vector(a, b, _places(range(2 * a.type.count)))


def _places(order: Any) -> Any:
    return ir.Constant(ir.VectorType(_INDEX, len(order)), list(order))


def _product_of_words(builder: Any, factor: int, c: Any) -> tuple[Any, Any]:
    return halves_of_product(builder, _WORD(factor), c)


def _product_of_vectors(builder: Any, factor: int, c: Any) -> tuple[Any, Any]:
    """High and low words of factor · c, by halves: there is no wider product of vectors."""
    half, lower = _constant(32), _constant(0xFFFFFFFF)
    above, below = _constant(factor >> 32), _constant(factor & 0xFFFFFFFF)
    c_above, c_below = builder.lshr(c, half), builder.and_(c, lower)
    least = builder.mul(below, c_below)
    middle = builder.add(builder.mul(below, c_above), builder.lshr(least, half))
    other = builder.add(builder.mul(above, c_below), builder.and_(middle, lower))
    most = builder.add(builder.mul(above, c_above), builder.lshr(middle, half))
    low = builder.or_(builder.shl(other, half), builder.and_(least, lower))
    return builder.add(most, builder.lshr(other, half)), low


def _round(builder: Any, product: Any, c: list[Any], keys: list[Any]) -> list[Any]:
    (high0, low0), (high1, low1) = product(builder, MULTIPLIERS[0], c[0]), product(builder, MULTIPLIERS[1], c[2])
    even = (builder.xor(builder.xor(h, odd), key) for h, odd, key in ((high1, c[1], keys[0]), (high0, c[3], keys[1])))
    return [next(even), low1, next(even), low0]


def _at_one_time(builder: Any, vector: Any, word: Any) -> tuple[Any, Any]:
    """The same values, both computed before anything is that needs either: LLVM would do all of the one first."""
    halves = [builder.shuffle_vector(vector, vector, _places(range(k, k + LANES // 2))) for k in (0, LANES // 2)]
    pair = ir.LiteralStructType([_HALF, _WORD])
    both = builder.asm(ir.FunctionType(pair, [_HALF, _WORD]), "", "=v,=r,0,1", [halves[0], word], True)
    return _joined(builder, builder.extract_value(both, 0), halves[1]), builder.extract_value(both, 1)


@instruction
def philox_blocks(typing: Any, address: Any, first: Any, key0: Any, key1: Any) -> Any:
    """`loops.philox` of the counters (first, 0, HIGH), (first + 1, 0, HIGH), ...: the words of `BLOCKS` blocks to an
    address, in their order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, index, *keys = arguments

        def store(value: Any, block: int, word: int = 0) -> None:
            at = builder.add(place, _WORD(8 * (4 * block + word)))
            builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=8)

        rounds = [
            [builder.add(key, _WORD(n * step % 2**64)) for key, step in zip(keys, WEYL, strict=True)]
            for n in range(ROUNDS)
        ]
        numbers = ir.Constant(_VECTOR, list(range(LANES)))
        c = [builder.add(splat(builder, LANES, index), numbers), _constant(0), _constant(HIGH), _constant(0)]
        meanwhile = ((block, n) for block in range(LANES, BLOCKS) for n in range(ROUNDS))
        w: list[Any] = []
        for of_round in rounds:
            c = _round(builder, _product_of_vectors, c, [splat(builder, LANES, key) for key in of_round])
            for block, n in islice(meanwhile, WORDS):
                w = w if n else [builder.add(index, _WORD(block)), _WORD(0), _WORD(HIGH), _WORD(0)]
                w = _round(builder, _product_of_words, w, rounds[n])
                if n == ROUNDS - 1:
                    for i, word in enumerate(w):
                        store(word, block, i)
            c[0], w[0] = _at_one_time(builder, c[0], w[0])
        words = _joined(builder, _joined(builder, c[0], c[1]), _joined(builder, c[2], c[3]))
        order = [word * LANES + block for block in range(LANES) for word in range(4)]
        store(builder.shuffle_vector(words, words, _places(order)), 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64, types.uint64, types.uint64), generate
