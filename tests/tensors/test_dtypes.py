"""The table of dtypes agrees with numpy, torch and the tables that keep their own order; rounding is torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltamerge.formats.audit import INFINITY
from deltamerge.formats.safetensors import DTYPE_ORDER
from deltamerge.tensors.dtypes import (
    COPIED,
    DTYPES,
    FLOATING,
    ITEMSIZE,
    NUMPY,
    PLAIN,
    TORCH_NAMES,
    bits_type,
    code_of,
    narrow,
    narrow_randomly,
    torch_dtype,
    widen,
)


def test_other_tables_have_the_same_codes() -> None:
    assert set(DTYPE_ORDER) == set(DTYPES)
    assert set(INFINITY) == FLOATING
    assert set(TORCH_NAMES) == set(DTYPES) - COPIED


@pytest.mark.parametrize("code", DTYPES)
def test_elements_have_the_size_of_numpy_s_and_torch_s(code: str) -> None:
    assert np.dtype(NUMPY[code]).itemsize == ITEMSIZE[code]
    if code in TORCH_NAMES:
        assert torch_dtype(code).itemsize == ITEMSIZE[code]
        assert code_of(torch_dtype(code)) == code
        assert torch_dtype(code).is_floating_point == (code in FLOATING)


def test_a_dtype_that_safetensors_lacks_has_no_code() -> None:
    assert code_of(torch.complex128) is None


@pytest.mark.parametrize("code", sorted(FLOATING))
def test_widening_and_rounding_are_torch_s(code: str) -> None:
    draw = np.random.default_rng(0)
    wide = draw.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    stored = torch.from_numpy(wide.copy()).to(torch_dtype(code))
    bits = stored.view(getattr(torch, f"int{DTYPES[code].bits}")).numpy().view(bits_type(code))
    ours, number = narrow(wide, code), ~np.isnan(wide)
    np.testing.assert_array_equal(ours[number], bits[number])
    np.testing.assert_array_equal(widen(ours, code), stored.float().numpy())
    assert code not in PLAIN or np.isnan(widen(ours, code)[~number]).all()


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_stochastic_rounding_is_right_on_average(code: str) -> None:
    count = 1 << 16
    for x in np.array([1 + 1 / 5000, -1 - 1 / 10_000, 7.77e-3, -0.7331], np.float32):
        bits = narrow_randomly(np.full(count, x), code, 12345)
        below, above = np.sort(widen(np.unique(bits), code))
        assert int(np.diff(np.unique(bits))[0]) == 1
        assert below < x < above
        assert abs(widen(bits, code).mean(dtype=np.float64) - x) < 6 * (above - below) / 2 / count**0.5


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_values_of_the_dtype_are_not_rounded(code: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = widen(bits, code)
    same = narrow_randomly(wide, code, 0)
    number = ~np.isnan(wide)
    assert (same[number] == bits[number]).all()
    assert np.isnan(widen(same[~number], code)).all()
