"""Instructions that numba has no word for, written in LLVM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

# Entries that are compared at once.
GROUP = 32


def instruction(generator: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], intrinsic(generator))


def halves_of_product(builder: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """High and low words of the product of two."""
    word, twice = ir.IntType(64), ir.IntType(128)
    full = builder.mul(builder.zext(a, twice), builder.zext(b, twice))
    return builder.trunc(builder.lshr(full, ir.Constant(twice, 64)), word), builder.trunc(full, word)


@instruction
def product(typing: Any, a: Any, b: Any) -> Any:
    """High and low 64 bits of the product of two uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_tuple(builder, signature.return_type, halves_of_product(builder, *arguments))

    make_tuple: Any = types.UniTuple
    return make_tuple(types.uint64, 2)(types.uint64, types.uint64), generate


@instruction
def wide(typing: Any, x: Any) -> Any:
    """float32 of a float32 or of the bits of a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        word = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(word.type, 16)), ir.FloatType())

    return types.float32(types.float32 if x == types.float32 else types.uint16), generate


@instruction
def pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@instruction
def stack(typing: Any, nbytes: Any) -> Any:
    """The address of so many bytes (a constant) in the frame of the function: memory that no runtime has to give."""
    if not isinstance(nbytes, types.IntegerLiteral):
        raise RequireLiteralValue("nbytes")
    room = ir.ArrayType(ir.IntType(8), nbytes.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            place = builder.alloca(room)
        place.align = 64
        return builder.bitcast(place, cgutils.voidptr_t)

    return types.voidptr(nbytes), generate


@instruction
def ones(typing: Any, x: Any) -> Any:
    """How many bits of a uint64 are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@instruction
def trailing_zeros(typing: Any, x: Any) -> Any:
    """How many zero bits are below the lowest set one of a uint64, which is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@instruction
def double(typing: Any, x: Any) -> Any:
    """float64 of a float64, a float32, or the bits of a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        if signature.args[0] == types.float64:
            return value
        if signature.args[0] == types.uint16:
            word = builder.zext(value, ir.IntType(32))
            value = builder.bitcast(builder.shl(word, ir.Constant(word.type, 16)), ir.FloatType())
        return builder.fpext(value, ir.DoubleType())

    return types.float64(x if x in (types.float64, types.float32) else types.uint16), generate


def splat(builder: Any, count: int, value: Any) -> Any:
    """A vector of `count` times a value."""
    index = ir.IntType(32)
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, index(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(index, count), [0] * count))


@instruction
def compared(typing: Any, address: Any, low: Any, high: Any) -> Any:
    """Of the `GROUP` float32 at an address a bit each: whether the magnitude is from `low` to `high`, and above."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        vector = ir.VectorType(word, GROUP)
        place, lowest, highest = arguments

        bits = builder.load(builder.inttoptr(place, vector.as_pointer()), align=4)
        x = builder.and_(bits, splat(builder, GROUP, ir.Constant(word, 0x7FFFFFFF)))
        apart = splat(builder, GROUP, builder.sub(highest, lowest))
        inside = builder.icmp_unsigned("<=", builder.sub(x, splat(builder, GROUP, lowest)), apart)
        over = builder.icmp_unsigned(">", x, splat(builder, GROUP, highest))
        masks = [builder.zext(builder.bitcast(found, word), ir.IntType(64)) for found in (inside, over)]
        return context.make_tuple(builder, signature.return_type, masks)

    make_tuple: Any = types.UniTuple
    return make_tuple(types.uint64, 2)(types.int64, types.uint32, types.uint32), generate
