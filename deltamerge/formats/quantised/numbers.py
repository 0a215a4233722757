"""Float32 rounded to the numbers that quantised weights are stored as: small floats and integers, to nearest, ties to
even, beyond the largest number that number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from deltamerge.formats.quantised.weight import Array, Floats
from deltamerge.tensors.dtypes import narrow, widen

LEAST_EXPONENT = -127  # of E8M0


class Numbers(Protocol):
    """The numbers that codes of one byte stand for."""

    @property
    def largest(self) -> float:
        """The largest number."""

    @property
    def form(self) -> tuple[int, ...] | None:
        """How the kernels know them (kernels/src/loops.h, CodeForm); None: they do not."""

    def codes(self, values: Floats) -> Array:
        """The code (uint8) of the number nearest to each finite value; `values` may be changed."""

    def values(self, codes: Array) -> Floats:
        """The numbers of codes, in float32."""


@dataclass(frozen=True, slots=True)
class SmallFloats:
    """Floats of a sign, `exponent` bits with a `bias`, and `mantissa` bits, up to the code `last`: E4M3, E5M2, E2M1."""

    exponent: int
    mantissa: int
    bias: int
    last: int

    @property
    def largest(self) -> float:
        return float(self.table[self.last])

    @property
    def form(self) -> tuple[int, ...]:
        return self.exponent, self.mantissa, self.bias, self.last, 0, 0

    def codes(self, values: Floats) -> Array:
        """Round the bits of a normal number by adding half of what is cut off; below the normal numbers, by adding a
        power of two whose last bit is the smallest number."""
        cut = 23 - self.mantissa
        bits = values.view(np.uint32)
        signs = (bits >> np.uint32(31 - self.exponent - self.mantissa)).astype(np.uint8)
        signs &= np.uint8(1 << (self.exponent + self.mantissa))
        bits &= np.uint32(0x7FFFFFFF)
        whole = 2.0 ** (24 - self.bias - self.mantissa)
        small = (values + np.float32(whole)).view(np.uint32)
        small -= np.float32(whole).view(np.uint32)
        normal = bits >> np.uint32(cut)
        normal &= np.uint32(1)
        normal += bits
        normal += np.uint32((1 << cut - 1) - 1)
        normal >>= np.uint32(cut)
        normal -= np.uint32(127 - self.bias << self.mantissa)
        np.copyto(normal, small, where=values < np.float32(2.0 ** (1 - self.bias)))
        np.minimum(normal, np.uint32(self.last), out=normal)
        codes = normal.astype(np.uint8)
        codes |= signs
        return codes

    def values(self, codes: Array) -> Floats:
        found: Floats = np.take(self.table, codes)
        return found

    @property
    def table(self) -> Floats:
        """The value of each code."""
        return _table(self.exponent, self.mantissa, self.bias)


@cache
def _table(exponent: int, mantissa: int, bias: int) -> Floats:
    size = 1 << exponent + mantissa
    codes = np.arange(size)
    power, fraction = codes >> mantissa, (codes & (1 << mantissa) - 1) / (1 << mantissa)
    values = np.where(power == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, power - bias))
    both = np.concatenate([values, -values]).astype(np.float32)
    both.flags.writeable = False
    return both


@dataclass(frozen=True, slots=True)
class Integers:
    """Integers of `bits` bits in a byte, as two's complement where they are `signed`."""

    bits: int
    signed: bool = True

    @property
    def least(self) -> int:
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def largest(self) -> float:
        return float(self.least + (1 << self.bits) - 1)

    @property
    def form(self) -> tuple[int, ...]:
        return 0, 0, 0, 0, self.least, int(self.largest)

    @property
    def dtype(self) -> str:
        """numpy's, of a byte."""
        return "i1" if self.signed else "u1"

    def codes(self, values: Floats) -> Array:
        np.rint(values, out=values)
        np.clip(values, np.float32(self.least), np.float32(self.largest), out=values)
        return values.astype(self.dtype).view(np.uint8)

    def values(self, codes: Array) -> Floats:
        return codes.view(self.dtype).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers of a table; a code is a place in it. Halfway between two the larger one is taken."""

    numbers: tuple[float, ...]

    @property
    def largest(self) -> float:
        return max(self.numbers)

    @property
    def form(self) -> None:
        return None

    def codes(self, values: Floats) -> Array:
        order = np.argsort(np.asarray(self.numbers, np.float32), kind="stable")
        ordered = np.asarray(self.numbers, np.float32)[order]
        between = (ordered[1:].astype(np.float64) + ordered[:-1]) / 2
        return order.astype(np.uint8)[np.searchsorted(between, values, side="right")]

    def values(self, codes: Array) -> Floats:
        return np.asarray(self.numbers, np.float32)[codes]


E4M3 = SmallFloats(4, 3, 7, 0x7E)
E5M2 = SmallFloats(5, 2, 15, 0x7B)
E2M1 = SmallFloats(2, 1, 1, 0x7)
FLOATS = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}


def scales_in(wanted: Floats, dtype: str, *, down: bool = False) -> tuple[Array, Floats]:
    """Scales as they are stored, and what that makes of them in float32; a scale of 0 becomes 1.

    dtype   a plain float's, to the nearest; or F8_E8M0 (U8: the same in bytes), the next power of two, or with `down`
            the one before
    """
    safe = np.where(wanted > 0, wanted, np.float32(1)).astype(np.float32)
    if dtype not in ("F8_E8M0", "U8"):
        stored = narrow(np.ascontiguousarray(safe), dtype)
        back = np.asarray(widen(stored, dtype), np.float32)
        if (back > 0).all() and np.isfinite(back).all():
            return stored, back
        least = np.float32(np.finfo(np.float32).tiny if dtype in ("F32", "BF16") else 2.0**-24)
        top = np.float32(65504 if dtype == "F16" else 3.3e38)
        stored = narrow(np.clip(safe, least, top), dtype)
        return stored, np.asarray(widen(stored, dtype), np.float32)
    fraction, power = np.frexp(safe)  # safe = fraction · 2^power, fraction in [½, 1)
    exponents = power - (fraction == 0.5) - bool(down)
    exponents = np.clip(exponents, LEAST_EXPONENT, -LEAST_EXPONENT)
    return (exponents + 127).astype(np.uint8), np.ldexp(np.float32(1), exponents).astype(np.float32)
