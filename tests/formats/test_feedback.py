"""Codes chosen by inputs: against GPTQ's loop in float64, every possible code, and the nearest codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import BlockCoder, CodedMatrix, ColumnCoder, Lattice, by_rows
from deltamerge.formats.quantised.codes import E2M1, E4M3, Integers
from deltamerge.formats.quantised.feedback import DAMPING, Feedback, total
from deltamerge.formats.quantised.nvfp4 import Nvfp4Coder
from deltamerge.tensors.tensor import TensorInfo, stored

Doubles = np.ndarray


def moments(columns: int, seed: int = 0, rank: int | None = None) -> Doubles:
    """C of inputs that go together, some far larger than others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * columns, rank or columns)) @ rng.standard_normal((rank or columns, columns))
    x *= np.exp(rng.standard_normal(columns))
    return x.T @ x / len(x)


def weight(rows: int, columns: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def distortion(lost: Doubles, c: Doubles) -> float:
    lost = lost.astype(np.float64)
    return float(np.trace(lost @ c @ lost.T))


def gptq(w: Doubles, c: Doubles, scales: Doubles, low: int, high: int) -> Doubles:
    """The paper's loop with its factor of H⁻¹, one column after the other, columns by falling C_kk: the codes."""
    order = np.argsort(-np.diagonal(c), kind="stable")
    h = c[order][:, order] + DAMPING * np.diagonal(c).mean() * np.eye(len(c))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    left, codes = w.astype(np.float64)[:, order].copy(), np.zeros(w.shape)
    for k in range(len(c)):
        codes[:, k] = np.clip(np.rint(left[:, k] / scales), low, high)
        error = (left[:, k] - codes[:, k] * scales) / upper[k, k]
        left[:, k:] -= np.outer(error, upper[k, k:])
    found = np.empty_like(codes)
    found[:, order] = codes
    return found


@pytest.mark.parametrize("columns", [5, 64, 150])  # within a panel, of one, of several
@pytest.mark.parametrize("bits", [3, 8])
def test_codes_are_those_of_gptq_or_the_nearest(columns: int, bits: int) -> None:
    w, c, numbers = weight(20, columns), moments(columns), Integers(bits)
    coder = BlockCoder(numbers, (1, columns), "F32")  # one choice of scales
    lattice = seen_lattice(coder, w)
    made = Feedback(lambda _: c, 20, None, True).code(w, lattice)
    scales = lattice.scales(made.scales)[:, 0].astype(np.float64)
    np.testing.assert_array_equal(scales, np.float32(np.abs(w).max(1)) / np.float32(numbers.largest))
    nearest = np.clip(np.rint(w / scales[:, None]), numbers.least, numbers.largest)
    fed = gptq(w, c, scales, numbers.least, int(numbers.largest))
    lost = [[distortion((row - q * s)[None], c) for row, q, s in zip(w, codes, scales, strict=True)]
            for codes in (nearest, fed)]  # fmt: skip
    better = np.array(lost[1]) < np.array(lost[0])
    assert better.any()
    expected = np.where(better[:, None], fed, nearest)
    np.testing.assert_array_equal(numbers.values(made.codes), expected)


def seen_lattice(coder: BlockCoder, w: np.ndarray) -> Lattice:
    found: list[Lattice] = []

    class Spy:
        def code(self, values: np.ndarray, lattice: Lattice) -> CodedMatrix:
            found.append(lattice)
            return lattice.nearest(values)

    coder.matrix(w, Spy())  # type: ignore[arg-type]
    return found[0]


def test_no_other_codes_are_much_better() -> None:
    """Of every code of a row of 5 columns, on the same scales."""
    numbers, columns, missed = Integers(2), 5, np.zeros(2)
    for seed in range(12):
        w, c = weight(1, columns, seed), moments(columns, seed)
        lattice = seen_lattice(BlockCoder(numbers, (1, columns), "F32"), w)
        made = Feedback(lambda _, c=c: c, 1, None, True).code(w, lattice)
        scale = float(lattice.scales(made.scales)[0, 0])
        every = np.array(list(itertools.product(range(-2, 2), repeat=columns))) * scale
        lost = w.astype(np.float64) - every
        least = np.einsum("ij,jk,ik->i", lost, c, lost).min()
        exact = w.astype(np.float64)
        here = distortion(exact - numbers.values(made.codes) * scale, c)
        nearest = distortion(exact - np.clip(np.rint(exact / scale), -2, 1) * scale, c)
        assert least * (1 - 1e-6) <= here <= nearest * (1 + 1e-6)
        missed += np.array([here - least, nearest - least])
    assert missed[0] < 0.5 * missed[1]


CODERS: dict[str, Callable[[], BlockCoder | Nvfp4Coder]] = {
    "int8": lambda: BlockCoder(Integers(), (1, 64), "BF16"),
    "int4": lambda: BlockCoder(Integers(4), (1, 16), "BF16", search=True, packing="words"),
    "int4 with zeros": lambda: BlockCoder(Integers(4, signed=False), (1, 16), "F16", "bytes", search=True),
    "fp8 of blocks": lambda: BlockCoder(E4M3, (16, 32), "F32"),
    "fp8 of rows": lambda: BlockCoder(E4M3, (1, 64), "BF16"),
    "mxfp4": lambda: BlockCoder(E2M1, (1, 32), "U8", search=True, packing="nibbles"),
    "nvfp4": lambda: Nvfp4Coder(16, "over"),
    "nvfp4 of modelopt": lambda: Nvfp4Coder(16, "times"),
}


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("rank", [None, 6])
def test_outputs_lose_no_more_than_with_the_nearest_codes(name: str, rank: int | None) -> None:
    w, c = weight(40, 64), moments(64, rank=rank)
    near, fed = Feedback(lambda _: c, 40, None, False), Feedback(lambda _: c, 40, None, True)
    arrays = CODERS[name]().encode(w, None, near)[0]  # type: ignore[arg-type]
    plain = CODERS[name]().encode(w, None)[0]  # type: ignore[arg-type]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, plain, strict=True))  # what is measured is as before
    CODERS[name]().encode(w, None, fed)  # type: ignore[arg-type]
    nearest, chosen = total(near.sums), total(fed.sums)
    assert chosen.nearest_outputs == pytest.approx(nearest.lost_outputs, rel=1e-9)
    assert 0 < chosen.lost_outputs < 0.6 * nearest.lost_outputs


def test_sums_are_those_of_the_stored_values() -> None:
    w, c = weight(30, 32), moments(32)
    delta, numbers = weight(30, 32, 5) * np.float32(0.02), Integers(4)
    coder = BlockCoder(numbers, (1, 16), "F32", search=True)
    fed = Feedback(lambda _: c, 30, delta, True)
    codes, scales = coder.encode(w, None, fed)[0]  # type: ignore[arg-type]
    kept = numbers.values(codes) * np.repeat(scales.view(np.float32), 16, 1)
    sums, base = total(fed.sums), w - delta
    parts = {"lost": w - kept, "norm": w, "delta": delta, "written": kept - base}
    for name, part in parts.items():
        assert getattr(sums, name) == pytest.approx(float(np.square(part, dtype=np.float64).sum()), rel=1e-5), name
        assert getattr(sums, f"{name}_outputs") == pytest.approx(distortion(part, c), rel=1e-4), name


def test_every_expert_has_its_own_inputs() -> None:
    w = weight(24, 32)
    each = [moments(32, seed) for seed in range(3)]
    together = Feedback(lambda number: each[number], 8, None, True)
    coder = BlockCoder(Integers(4), (1, 16), "F32", search=True)
    codes = coder.encode(w, None, together)[0][0]  # type: ignore[arg-type]
    alone = [coder.encode(w[8 * i : 8 * i + 8], None, Feedback(lambda _, c=c: c, 8, None, True))[0][0]  # type: ignore[arg-type]
             for i, c in enumerate(each)]  # fmt: skip
    np.testing.assert_array_equal(codes, np.concatenate(alone))
    unseen = Feedback(lambda number: None if number == 1 else each[number], 8, None, True)
    some = coder.encode(w, None, unseen)[0][0]  # type: ignore[arg-type]
    np.testing.assert_array_equal(some[8:16], coder.encode(w, None)[0][0][8:16])  # type: ignore[arg-type]
    assert not np.array_equal(codes[8:16], some[8:16])


@pytest.mark.parametrize("shape", [(3, 1000, 512), (3, 4, 64), (1000, 512)])
def test_units_begin_with_an_expert(shape: tuple[int, ...]) -> None:
    """Rows that are coded together have whole experts, however many rows fit into the cache."""
    info = TensorInfo("codes", stored(Path("f.safetensors"), 0, shape, "U8"))
    coding = by_rows(shape, CODERS["mxfp4"](), info).rounded("inputs", None)
    assert all(unit.start % (shape[-2] * shape[-1]) == 0 for unit in coding.units(0, math.prod(shape)))


def test_columns_of_a_transposed_weight_are_rows() -> None:
    w, c = weight(32, 24), moments(32)
    inner = BlockCoder(E2M1, (1, 32), "U8", search=True, packing="nibbles")
    turned = ColumnCoder(inner).encode(w, None, Feedback(lambda _: c, 32, None, True))  # type: ignore[arg-type]
    rows = inner.encode(np.ascontiguousarray(w.T), None, Feedback(lambda _: c, 24, None, True))  # type: ignore[arg-type]
    assert all(np.array_equal(a, b) for a, b in zip(turned[0], rows[0], strict=True))


def test_inputs_in_another_order_are_the_same_inputs() -> None:
    w, c, order = weight(12, 32), moments(32), np.random.default_rng(0).permutation(32)
    coder = BlockCoder(Integers(8), (1, 32), "F32")
    straight = coder.matrix(w, Feedback(lambda _: c, 12, None, True))
    moved = Feedback(lambda _: c, 12, None, True).of_columns(order)
    np.testing.assert_array_equal(
        coder.matrix(np.ascontiguousarray(w[:, order]), moved).codes, straight.codes[:, order]
    )


def test_inputs_that_are_not_finite_are_refused() -> None:
    broken = np.full((4, 4), np.nan)
    with pytest.raises(InputError, match="not finite"):
        BlockCoder(Integers(), (1, 4), "F32").matrix(weight(2, 4), Feedback(lambda _: broken, 2, None, True))
