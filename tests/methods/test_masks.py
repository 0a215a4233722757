"""Random masks of deltas: right values at the right places, whatever the tiles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from deltamerge.methods.prune.bits import SPARSE_BELOW, choose_columns, mask_key, positions
from deltamerge.methods.prune.dare import dare
from deltamerge.methods.prune.structured import structured
from deltamerge.tensors.tiles import Kept, Tile

KEY = mask_key(3, "tune", "w")
TORCH_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def pair(size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(size, generator=generator)
    return (base + 0.01 * torch.randn(size, generator=generator)).to(dtype), base.to(dtype)


def dense(value: torch.Tensor | Kept, size: int) -> np.ndarray:
    if not isinstance(value, Kept):
        assert value.dtype == torch.float32
        return value.numpy()
    assert value.positions.dtype == torch.int64
    assert value.values.dtype == torch.float32
    out = np.zeros(size, np.float32)
    out[value.positions.numpy()] = value.values.numpy()
    return out


def delta(tune: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    difference: np.ndarray = tune.to(torch.float32).numpy() - base.to(torch.float32).numpy()
    return difference


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.03, 0.001])
def test_dare_keeps_the_delta_at_kept_positions(dtype: torch.dtype, density: float) -> None:
    tile = Tile(12_800, 12_800 + 40_000, (1000, 100))
    tune, base = pair(tile.size, dtype)
    value = dare(tune, base, tile=tile, key=KEY, density=density)
    assert isinstance(value, Kept) == (density < SPARSE_BELOW)
    expected = np.zeros(tile.size, np.float32)
    kept = positions(KEY, tile.start, tile.stop, density)
    expected[kept] = delta(tune, base)[kept]
    assert (dense(value, tile.size) == expected).all()


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.1, 0.1), (0.5, 0.01), (0.04, 1.0), (1.0, 1.0), (1e-4, 0.5)])
def test_structured_keeps_columns_then_entries(a: float, b: float) -> None:
    rows, n = 300, 200
    tile = Tile(0, rows * n, (rows, n))
    tune, base = pair(tile.size)
    value = structured(tune, base, tile=tile, key=KEY, a=a, b=b)
    assert isinstance(value, Kept) == (a * b < SPARSE_BELOW)
    columns = choose_columns(KEY, n, max(1, round(a * n)))
    expected = np.zeros((rows, n), np.float32)
    mask = np.zeros(rows * len(columns), bool)
    mask[positions(KEY, 0, mask.size, b)] = True
    expected[:, columns] = np.where(mask.reshape(rows, -1), delta(tune, base).reshape(rows, n)[:, columns], 0)
    assert (dense(value, tile.size) == expected.ravel()).all()
    z = (mask.sum() - mask.size * b) / np.sqrt(mask.size * b * (1 - b) + 1e-9)
    assert abs(z) < 4


@pytest.mark.parametrize("shape", [(6000,), (20, 30, 10), (30, 20, 5, 2)])
def test_structured_of_other_ranks_is_dare(shape: tuple[int, ...]) -> None:
    tile = Tile(0, 6000, shape)
    tune, base = pair(6000)
    found = structured(tune, base, tile=tile, key=KEY, a=0.5, b=0.4)
    assert torch.equal(found, dare(tune, base, tile=tile, key=KEY, density=0.5 * 0.4))  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [100, 77])
@pytest.mark.parametrize("numbers", [{"density": 0.3}, {"density": 0.02}, {"a": 0.3, "b": 0.9}, {"a": 0.3, "b": 0.05}])
def test_tiles_do_not_matter(columns: int, numbers: dict[str, float]) -> None:
    # the cuts fall inside rows too, as in rows too long for a tile
    size = 1000 * columns
    tune, base = pair(size)
    mask = dare if "density" in numbers else structured
    whole = dense(mask(tune, base, tile=Tile(0, size, (1000, columns)), key=KEY, **numbers), size)
    cuts = [0, columns, 3 * columns + 13, 40_000, 40_001, 69_999, size]
    for start, stop in itertools.pairwise(cuts):
        tile = Tile(start, stop, (1000, columns))
        part = mask(tune[start:stop], base[start:stop], tile=tile, key=KEY, **numbers)
        assert (dense(part, stop - start) == whole[start:stop]).all()


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    tile, nothing = Tile(0, 0, shape), torch.empty(0)
    for density in (0.5, 0.01):
        assert dense(dare(nothing, nothing, tile=tile, key=KEY, density=density), 0).size == 0
        assert dense(structured(nothing, nothing, tile=tile, key=KEY, a=density, b=density), 0).size == 0


def test_unbiased_after_division_by_density() -> None:
    size = 1 << 20
    tune, base = torch.ones(size), torch.zeros(size)
    for density in (0.3, 0.02):
        total = dense(dare(tune, base, tile=Tile(0, size, (size,)), key=KEY, density=density), size).sum()
        assert abs(total / density / size - 1) < 4 * np.sqrt((1 - density) / density / size)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [1.0, 0.3, 0.02])
def test_gpu_equals_cpu(density: float) -> None:
    tile = Tile(5_000, 105_000, (2000, 100))
    tune, base = pair(tile.size)
    for mask, numbers in ((dare, {"density": density}), (structured, {"a": 0.4, "b": density})):
        here = dense(mask(tune, base, tile=tile, key=KEY, **numbers), tile.size)
        value = mask(tune.cuda(), base.cuda(), tile=tile, key=KEY, **numbers)
        there = Kept(value.positions.cpu(), value.values.cpu()) if isinstance(value, Kept) else value.cpu()
        assert (dense(there, tile.size) == here).all()
