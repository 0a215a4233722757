"""The steps of the loops, on the entries that one program of a GPU holds: those of `io/kernels/src/vector`.

Numbers are rounded as IEEE says, each product, sum and quotient by itself: quotients are `div_rn`, loops are compiled
without fused multiply-adds (`OPTIONS`), and casts to bfloat16 are integer arithmetic. Sums of many are made by halving.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of every loop: no fused multiply-add.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def philox(index, block, lane, key0, key1):
    """Four uint64 words of the counters (index, block, lane, 0): Philox4x64-10."""
    c0, c1 = index, block
    c2, c3 = lane, tl.zeros_like(index)
    m0 = tl.full(index.shape, 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full(index.shape, 0xCA5A826395121157, tl.uint64)
    w0 = tl.full(index.shape, 0x9E3779B97F4A7C15, tl.uint64)
    w1 = tl.full(index.shape, 0xBB67AE8584CAA73B, tl.uint64)
    k0, k1 = tl.zeros_like(index) + key0, tl.zeros_like(index) + key1
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(m0, c0), m0 * c0
        high1, low1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def half_of(position, lane: tl.constexpr, key0, key1):
    """int32: the half-word of each position in a lane's stream, each by a generator of its own."""
    index = (position // 16).to(tl.uint64)
    zero = tl.zeros_like(index)
    c0, c1, c2, c3 = philox(index, zero, zero + lane, key0, key1)
    word = position // 4 % 4
    found = tl.where(word == 0, c0, tl.where(word == 1, c1, tl.where(word == 2, c2, c3)))
    return (found >> (16 * (position % 4)).to(tl.uint64) & 0xFFFF).to(tl.int32)


@triton.jit
def halves(first, lane: tl.constexpr, key0, key1, SIZE: tl.constexpr):
    """int32 (SIZE): the half-words of SIZE positions from `first` on, a multiple of 16: a generator for 16 of them."""
    index = (first // 16 + tl.arange(0, SIZE // 16)).to(tl.uint64)
    zero = tl.zeros_like(index)
    c0, c1, c2, c3 = philox(index, zero, zero + lane, key0, key1)
    words = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [SIZE // 4, 1])
    shift = (16 * tl.arange(0, 4)).to(tl.uint64)
    return tl.reshape((words >> shift[None, :] & 0xFFFF).to(tl.int32), [SIZE])


@triton.jit
def kept(position, half, high, low, key0, key1):
    """Whether each position's 32-bit word is below high · 2**16 + low; low halves are drawn where high ones tie."""
    tied = half == high
    keep = half < high
    if low > 0:  # noqa: SIM102  # Triton branches on one condition at a time
        if tl.max(tied.to(tl.int32), 0) > 0:
            keep = keep | (tied & (half_of(position, 1, key0, key1) < low))
    return keep


@triton.jit
def widened(bits):
    """float32 of the bits of bfloat16, as int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def is_nan(bits):
    """Whether bits of float32, as int32, are a NaN's."""
    return (bits & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def narrowed(x):
    """The bits of bfloat16, as int16: nearest, ties to even; NaN is 0x7FC0."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits.to(tl.uint32, bitcast=True) + 0x7FFF + ((bits >> 16) & 1).to(tl.uint32)) >> 16
    return tl.where(is_nan(bits), 0x7FC0, rounded.to(tl.int32)).to(tl.int16)


@triton.jit
def halved_bits(x):
    """The bits of float16, as int16: nearest, ties to even; NaN is 0x7E00."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(is_nan(bits), 0x7E00, x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)).to(tl.int16)


@triton.jit
def known_nan(x):
    """float32 with NaN 0x7FC00000."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(is_nan(bits), 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """int32: the bits of float32 without the sign, which sort like the magnitudes; of any NaN 0x7F800001."""
    return tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)


@triton.jit
def divided(x, divisor):
    """x / divisor, rounded once."""
    return tl.div_rn(x, tl.zeros_like(x) + divisor)


@triton.jit
def agreeing(entry, total, value):
    """A value where its entry has the total's sign (0 counts as +), else 0."""
    up = total >= 0.0
    return tl.where(((entry > 0.0) & up) | ((entry < 0.0) & (up == 0)), value, 0.0)


@triton.jit
def halved(terms, SIZE: tl.constexpr):
    """The sum of SIZE (a power of two) float64 terms: halves are added to halves."""
    # written out: SIZE is at most 2**11, and a loop cannot change a shape
    x = terms
    x = _half(x, SIZE, 2048)
    x = _half(x, SIZE, 1024)
    x = _half(x, SIZE, 512)
    x = _half(x, SIZE, 256)
    x = _half(x, SIZE, 128)
    x = _half(x, SIZE, 64)
    x = _half(x, SIZE, 32)
    x = _half(x, SIZE, 16)
    x = _half(x, SIZE, 8)
    x = _half(x, SIZE, 4)
    x = _half(x, SIZE, 2)
    return tl.sum(x, 0)  # of one


@triton.jit
def _half(x, SIZE: tl.constexpr, NOW: tl.constexpr):
    """The sums of a half and the other of NOW entries, where there are so many."""
    return tl.sum(tl.reshape(x, [2, NOW // 2]), 0) if SIZE >= NOW else x


@triton.jit
def words_of(out_at, index_at, block_at, key_at, count, lane, SIZE: tl.constexpr):
    """A loop by itself: (count, 4) words of counters (index, block, lane, 0), int64 in two's complement."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = i < count
    index = tl.load(index_at + i, there, other=0).to(tl.uint64, bitcast=True)
    block = tl.load(block_at + i, there, other=0).to(tl.uint64, bitcast=True)
    key0 = tl.load(key_at).to(tl.uint64, bitcast=True)
    key1 = tl.load(key_at + 1).to(tl.uint64, bitcast=True)
    c0, c1, c2, c3 = philox(index, block, tl.zeros_like(index) + lane.to(tl.uint64), key0, key1)
    tl.store(out_at + 4 * i, c0.to(tl.int64, bitcast=True), there)
    tl.store(out_at + 4 * i + 1, c1.to(tl.int64, bitcast=True), there)
    tl.store(out_at + 4 * i + 2, c2.to(tl.int64, bitcast=True), there)
    tl.store(out_at + 4 * i + 3, c3.to(tl.int64, bitcast=True), there)
