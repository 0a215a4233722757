"""Positions and values against a slow reader written from the format's description, and float64 numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamerge.errors import InputError
from deltamerge.formats.delta import positions as codings
from deltamerge.formats.delta.positions import (
    CODINGS,
    ChosenCoding,
    Gaps,
    Listing,
    Positions,
    choose,
    decode,
    encode,
)
from deltamerge.formats.delta.values import (
    Values,
    cheapest,
    encode_values,
    relative_error,
    scale_group,
    scale_values,
)
from deltamerge.tensors.dtypes import cast, narrow, widen

SPARSE = CODINGS[1:]
EMPTY = np.empty(0, np.int64)


def draw(seed: int, size: int, density: float, clustered: bool = False) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    kept = generator.random(size) < density
    if clustered:
        kept &= np.arange(size) % 1000 < 50
    return np.flatnonzero(kept)


def gather(positions: np.ndarray[Any, Any], pieces: int = 3) -> Positions:
    listed = Positions()
    for piece in np.array_split(positions, pieces):
        listed.add(piece)
    return listed


def read(coding: str, stored: np.ndarray[Any, Any], count: int, size: int, k: int = 0) -> np.ndarray[Any, Any]:
    return np.concatenate([EMPTY, *decode(coding, stored, count, size, k)])  # type: ignore[arg-type]  # tests try wrong ones


def slow_positions(coding: str, stored: np.ndarray[Any, Any], count: int, k: int) -> list[int]:
    """One entry at a time, from docs/reference/delta-format.md."""
    if coding == "indices":
        return [int(i) for i in stored]
    data = stored.tobytes()
    if coding == "bitmask":
        return [i for i in range(8 * len(data)) if data[i // 8] >> i % 8 & 1]
    positions, last = [], -1
    if coding == "gaps":
        for code in data:
            last += 255 if code == 255 else code + 1
            if code != 255:
                positions.append(last)
        return positions
    b, packed = k % 8, k // 8 * count
    unary = packed + b * -(-count // 8)
    bit = 8 * unary
    for i in range(count):
        r = sum(data[plane * count + i] << 8 * plane for plane in range(k // 8))
        group = int.from_bytes(data[packed + i // 8 * b : packed + (i // 8 + 1) * b], "little")
        r |= (group >> i % 8 * b & (1 << b) - 1) << 8 * (k // 8)
        q = 0
        while not data[bit // 8] >> bit % 8 & 1:
            q, bit = q + 1, bit + 1
        bit += 1
        last += (q << k) + r + 1
        positions.append(last)
    return positions


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 7, 8, 63, 1000, 4099, 70_001]),
    density=st.sampled_from([0.0, 0.0005, 0.003, 0.01, 0.1, 0.5, 0.97, 1.0]),
    clustered=st.booleans(),
    coding=st.sampled_from(SPARSE),
)
def test_round_trip(seed: int, size: int, density: float, clustered: bool, coding: Any) -> None:
    positions = draw(seed, size, density, clustered)
    listed = gather(positions)
    assert np.array_equal(np.concatenate([EMPTY, *listed.pieces()]), positions)
    choice = choose(listed.gaps, size, 16, fill=False, allowed={coding})
    stored = encode(choice, listed.pieces(), listed.count, size)
    assert stored.nbytes == choice.nbytes or not positions.size
    assert slow_positions(coding, stored, len(positions), choice.k) == positions.tolist()
    assert np.array_equal(read(coding, stored, len(positions), size, choice.k), positions)


def test_pieces_do_not_change_what_is_stored() -> None:
    positions = draw(0, 300_000, 0.01)
    choice = choose(gather(positions).gaps, 300_000, 16, fill=False)
    stored = [encode(choice, gather(positions, n).pieces(), len(positions), 300_000) for n in (1, 2, 97)]
    assert all(np.array_equal(stored[0], other) for other in stored)


@pytest.mark.parametrize("density", [0, 0.001, 0.01, 0.1, 0.4, 0.9, 0.99, 1])
@pytest.mark.parametrize("value_bits", [1, 8, 16, 32])
def test_choice_is_the_smallest(density: float, value_bits: int) -> None:
    size = 50_000
    listed = gather(draw(1, size, density))
    totals = {}
    for coding in SPARSE:
        choice = choose(listed.gaps, size, value_bits, fill=True, allowed={coding})
        stored = encode(choice, listed.pieces(), listed.count, size)
        totals[coding] = stored.nbytes + -(-listed.count * value_bits // 8)
    totals["dense"] = -(-size * value_bits // 8)
    best = choose(listed.gaps, size, value_bits, fill=True)
    assert totals[best.coding] == min(totals.values())
    holes = choose(listed.gaps, size, value_bits, fill=False)
    assert holes.coding != "dense" or listed.count == size


@pytest.mark.parametrize("density", [0.1, 0.01, 0.001])
def test_rice_has_the_best_k_and_is_near_the_entropy(density: float) -> None:
    size = 4_000_000
    positions = draw(2, size, density)
    choice = choose(gather(positions).gaps, size, 16, fill=False)
    gaps = np.diff(positions, prepend=-1) - 1
    bits = [len(positions) * (k + 1) + int((gaps >> k).sum()) for k in range(20)]
    assert choice.coding == "rice"
    assert choice.k == int(np.argmin(bits))
    d = len(positions) / size
    entropy = -math.log2(d) - (1 - d) / d * math.log2(1 - d)
    assert entropy < 8 * choice.nbytes / len(positions) < 1.03 * entropy


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**40, 2**60])
def test_more_elements_than_memory(size: int) -> None:
    """Only sizes are large: positions and choices are 64-bit throughout."""
    positions = np.array([0, 1, size // 2, size - 2, size - 1])
    listed = gather(positions)
    indices = ChosenCoding("indices", (4 if size < 2**31 else 8) * 5)
    assert choose(listed.gaps, size, 16, fill=True, allowed={"indices"}) == indices
    stored = encode(indices, listed.pieces(), 5, size)
    assert stored.dtype == (np.int32 if size < 2**31 else np.int64)
    assert np.array_equal(read("indices", stored, 5, size), positions)
    best = choose(listed.gaps, size, 16, fill=True)
    assert best.nbytes <= 40
    if size < 2**50:
        stored = encode(best, listed.pieces(), 5, size)
        assert np.array_equal(read(best.coding, stored, 5, size, best.k), positions)
    dense = Gaps(count=size, last=size - 1)
    dense.small[0] = size
    assert choose(dense, size, 16, fill=True) == ChosenCoding("dense", 0)


def u8(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.uint8)


@pytest.mark.parametrize(
    ("coding", "stored", "count", "k", "message"),
    [
        ("indices", np.array([3, 2], np.int32), 2, 0, "not ascending"),
        ("indices", np.array([2, 2], np.int32), 2, 0, "not ascending"),
        ("indices", np.array([2, 20], np.int32), 2, 0, "outside"),
        ("indices", np.array([-1, 2], np.int32), 2, 0, "not ascending"),
        ("indices", np.array([2], np.int32), 2, 0, "1 entries, not 2"),
        ("bitmask", u8(0b11, 0, 0), 3, 0, "2 entries, not 3"),
        ("bitmask", u8(0b11, 0, 0), 1, 0, "more than 1"),
        ("bitmask", u8(0, 0, 0x80), 1, 0, "outside"),
        ("gaps", u8(1, 255), 1, 0, "escape"),
        ("gaps", u8(1, 200), 2, 0, "outside"),
        ("gaps", u8(1, 2, 3), 2, 0, "more than 2"),
        ("rice", u8(), 1, 0, "too few"),
        ("rice", u8(1), 1, 3, "too few"),
        ("rice", u8(0b01010101), 3, 0, "more than 3"),
        ("rice", u8(1, 0), 1, 0, "padding"),
        ("rice", u8(0, 0b10000001), 2, 1, "outside"),
        ("rice", u8(0, 0), 2, 1, "padding"),
    ],
)
def test_damaged_positions_are_refused(coding: str, stored: Any, count: int, k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(coding, stored, count, 12, k)


@pytest.mark.parametrize("coding", SPARSE)
def test_any_range_is_read_from_any_place(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that were passed are decoded again, and those ahead for the first time."""
    monkeypatch.setattr(codings, "SPAN", 64)
    size = 3000
    wanted = np.setdiff1d(draw(3, size, 0.2), np.arange(1200, 2100))  # pieces of a bitmask without any
    listed = gather(wanted)
    choice = choose(listed.gaps, size, 16, fill=False, allowed={coding})
    stored = encode(choice, listed.pieces(), wanted.size, size)
    listing = Listing(choice.coding, stored, wanted.size, size, choice.k)
    generator = np.random.default_rng(4)
    for start, stop in [*np.sort(generator.integers(0, size + 1, (40, 2))).tolist(), (0, size)]:
        found = list(listing.between(start, stop))
        for positions, first in found:
            assert np.array_equal(positions, wanted[first : first + positions.size])
        inside = wanted[(wanted >= start) & (wanted < stop)]
        assert np.array_equal(np.concatenate([EMPTY, *(positions for positions, _ in found)]), inside)
    assert np.array_equal(np.concatenate(list(listing.pieces())), wanted)
    short = Listing(choice.coding, stored[:-1], wanted.size, size, choice.k)
    list(short.between(0, 100))  # nothing is wrong there
    with pytest.raises(InputError):
        short.finish()


def test_damage_between_pieces_is_found() -> None:
    indices = np.arange(300_000, dtype=np.int32)
    indices[1 << 17] = 5
    with pytest.raises(InputError, match="not ascending"):
        read("indices", indices, 300_000, 400_000)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        ("BF16", torch.bfloat16),
        ("F16", torch.float16),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
    ],
)
def test_casts_are_torch(code: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(10_000, generator=generator) * 10.0**e for e in (-9, -2, 0, 2, 6)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0 + 2**-8, 1.0 + 3 * 2**-8])])
    narrowed = values.to(dtype)
    bits = narrowed.view(torch.int16 if narrowed.element_size() == 2 else torch.int8).numpy()
    assert np.array_equal(narrow(values.numpy(), code), bits.view(f"u{bits.itemsize}"))
    wide = widen(bits.view(f"u{bits.itemsize}"), code)
    assert np.array_equal(wide.view(np.uint32), narrowed.float().numpy().view(np.uint32))


def test_cast_of_nan_and_float64() -> None:
    assert narrow(np.array([np.nan, -np.nan], np.float32), "BF16").tolist() == [0x7FC0, 0x7FC0]
    double = np.array([0.1, -3.0]).view(np.uint64)
    assert np.array_equal(cast(double, "F64", "F32").view(np.float32), np.array([0.1, -3.0], np.float32))
    assert cast(double, "F64", "F64") is double


def slow_scale(code: int, unit: int) -> float:
    return 0.0 if code == 0 else float((2 + code % 2) * 2 ** (code // 2)) * 2.0**unit


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    exponent=st.integers(-30, 36),
    coding=st.sampled_from(["int8", "sign"]),
    groups=st.integers(1, 9),
    density=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
)
def test_scaled_values(seed: int, exponent: int, coding: Any, groups: int, density: float) -> None:
    generator = np.random.default_rng(seed)
    group = 64
    positions = draw(seed, groups * group, density)
    rows = 10.0 ** generator.uniform(-1, 1, groups)
    values = (generator.standard_normal(len(positions)) * rows[positions // group] * 10.0**exponent).astype(np.float32)
    coded = encode_values(values, positions, groups, group, coding)
    scales = scale_values(coded.scales, groups, coded.unit, coded.ranks)
    assert coded.ranks is None  # not worth it for so few
    codes = [coded.scales[i // 2] >> 4 * (i % 2) & 15 for i in range(groups)]
    assert scales.tolist() == [slow_scale(int(code), coded.unit) for code in codes]
    own = scales[positions // group].astype(np.float64)
    if coding == "int8":
        decoded = own * coded.values
        assert (np.abs(values - decoded) <= own / 2 * (1 + 1e-6)).all()
    else:
        negative = np.unpackbits(coded.values, bitorder="little")[: len(values)].astype(bool)
        assert np.array_equal(negative, values < 0)
        decoded = np.where(negative, -own, own)
        for i in range(groups):
            mean = (
                np.abs(values[positions // group == i].astype(np.float64)).mean()
                if (positions // group == i).any()
                else 0
            )
            table = np.array([slow_scale(code, coded.unit) for code in range(16)])
            assert abs(scales[i] - mean) <= np.abs(table - mean).min() * (1 + 1e-6)
    error, squared = np.square(values - decoded).sum(), np.square(values.astype(np.float64)).sum()
    assert math.isclose(coded.squared_error, error, rel_tol=1e-3, abs_tol=1e-80)
    assert math.isclose(coded.squared, squared, rel_tol=1e-9)


def slow_ranks(stored: Any, ranks: str) -> Iterator[int]:
    zeros = 0
    for byte in stored.tolist():
        for bit in range(8):
            if byte >> bit & 1:
                yield int(ranks[zeros], 16)
            zeros = 0 if byte >> bit & 1 else zeros + 1


@pytest.mark.parametrize("coding", ["int8", "sign"])
def test_scales_of_many_rows_take_two_bits(coding: Any) -> None:
    positions = draw(3, 5000 * 64, 0.1)
    values = np.random.default_rng(3).standard_normal(len(positions)).astype(np.float32)
    coded = encode_values(values, positions, 5000, 64, coding)
    assert coded.ranks is not None
    assert coded.scales.size * 8 < 2.8 * 5000
    scales = scale_values(coded.scales, 5000, coded.unit, coded.ranks)
    codes = slow_ranks(coded.scales, coded.ranks)
    assert scales.tolist() == [slow_scale(code, coded.unit) for code in codes]
    negative = np.unpackbits(coded.values, bitorder="little")[: len(values)] if coding == "sign" else None
    decoded = scales[positions // 64] * (coded.values if negative is None else 1.0 - 2.0 * negative)
    assert math.isclose(coded.squared_error, np.square(values - decoded, dtype=float).sum(), rel_tol=1e-3)
    extra = np.append(coded.scales, np.uint8(0))
    for stored, groups, ranks in [
        (coded.scales, 4999, coded.ranks), (coded.scales, 5001, coded.ranks), (coded.scales[:-1], 5000, coded.ranks),
        (coded.scales, 5000, coded.ranks[:1]), (extra, 5000, coded.ranks), (coded.scales[:0], 5000, coded.ranks),
    ]:  # fmt: skip
        with pytest.raises(InputError, match="scales are damaged"):
            scale_values(stored, groups, coded.unit, ranks)


def test_errors_of_the_codings_on_normal_values() -> None:
    """The table of delta-format.md: sign is sqrt(1 - 2/π) for one scale, less where rows keep few entries."""
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    positions = np.arange(200_000)
    bounds: dict[Values, tuple[float, float]] = {
        "float32": (0, 0),
        "bfloat16": (1e-3, 2e-3),
        "int8": (5e-3, 1.2e-2),
        "sign": (0.58, 0.61),
    }
    for coding, (low, high) in bounds.items():
        coded = encode_values(values, positions, 200, 1000, coding)
        assert low <= relative_error(coded.squared_error, coded.squared) <= high


def test_scales_are_kept_only_where_they_save_bytes() -> None:
    assert cheapest("int8", 5898, 768) == "int8"
    assert cheapest("int8", 390, 768) == "bfloat16"
    assert cheapest("sign", 590, 768) == "sign"
    assert cheapest("sign", 8, 1) == "bfloat16"
    assert cheapest("float32", 8, 1) == "float32"


@pytest.mark.parametrize("coding", ["bfloat16", "int8", "sign"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 3.4028e38])
def test_values_that_are_not_finite_are_refused(value: float, coding: Any) -> None:
    values = np.array([1.0, value], np.float32)
    with pytest.raises(InputError, match="not all finite"):
        encode_values(values, np.arange(2), 1, 2, coding)


def test_extreme_scales_stay_finite() -> None:
    for value in (3.38e38, 1e-45):
        for coding in ("int8", "sign"):
            values = np.array([value, -value], np.float32)
            coded = encode_values(values, np.arange(2), 1, 2, coding)
            assert np.isfinite(scale_values(coded.scales, 1, coded.unit, coded.ranks)).all()


def test_groups_are_rows() -> None:
    assert scale_group((30522, 768)) == 768
    assert scale_group((8, 64, 100)) == 100
    assert scale_group((64, 3, 14, 14)) == 588
    assert scale_group((5000,)) == 1 << 16
    assert scale_group((1000, 3)) == 65535
    assert scale_group((2, 1 << 21)) == 1 << 16
