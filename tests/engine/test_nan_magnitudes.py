"""NaN among magnitudes: above every number and all alike, whatever bits a processor gives it.

A conversion of float16 gives the last few elements of a tensor the bits 0x7FFFFFFF and the others their payload; CUDA
gives 0x7FFFFFFF to whatever it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_choice import COMPILED, TORCH, computed_by
from conftest import LEVELS
from raw_tensors import read_checkpoint, write_checkpoint
from running import run
from simulated_gpu import simulated

from deltamerge.engine import kernels

PAYLOADS = {
    "F32": [0x7FC00000, 0xFFC00001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001],
    "F16": [0x7E00, 0xFE00, 0x7FFF, 0xFFFF, 0x7C01],
    "BF16": [0x7FC0, 0xFFC0, 0x7FFF, 0xFFFF, 0x7F81],
}
SHAPES = {"row.weight": (3, 24), "one.weight": (1, 7), "vector": (19,), "scalar": ()}
GPU = "gpu"


@contextmanager
def by(way: str) -> Iterator[str]:
    """Compute at a level of the kernels, by torch, or on the simulated GPU; its device."""
    if way in (TORCH, GPU):
        with computed_by(TORCH):
            if way == TORCH:
                yield "cpu"
                return
            with simulated():
                yield "cuda"
        return
    native, (best, *_) = kernels.native(), LEVELS
    try:
        native.choose(way)
        with computed_by(COMPILED):
            yield "cpu"
    finally:
        native.choose(best)


def fine_tune(code: str, size: int) -> np.ndarray[Any, Any]:
    """Small numbers, each magnitude twice, and NaN of every kind of bits, one at the end."""
    dtype = np.dtype({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[code])
    numbers = ((np.arange(size) // 2 + 1) / 64 * (-1.0) ** np.arange(size)).astype(np.float32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16) if code == "BF16" else numbers.astype(dtype)
    raw = bits.view(f"u{dtype.itemsize}")
    for number, payload in enumerate(PAYLOADS[code]):
        at = size - 1 - 3 * number
        if at >= 0:
            raw[at] = payload
    return bits


def make_inputs(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A base of zeros and a fine-tune of each dtype; the deltas by name, float64."""
    base, tuned, deltas = {}, {}, {}
    for code in PAYLOADS:
        for name, shape in SHAPES.items():
            raw = fine_tune(code, int(np.prod(shape, dtype=int)))
            full = f"{code}.{name}"
            tuned[full], base[full] = (code, raw.reshape(shape)), (code, np.zeros(shape, raw.dtype))
            wide = (raw.astype(np.uint32) << 16).view(np.float32) if code == "BF16" else raw
            with np.errstate(invalid="ignore"):
                deltas[full] = wide.astype(np.float64).reshape(shape)
    write_checkpoint(folder / "base", base)
    write_checkpoint(folder / "a", tuned)
    return deltas


def kept(delta: np.ndarray[Any, Any], top: int, dropped: int, *, rows: bool) -> np.ndarray[Any, Any]:
    """Δ where its magnitude is among the `top` largest and not among the `dropped` largest, equals from the left."""
    sizes = np.where(np.isnan(delta), np.inf, np.abs(delta))
    lines = sizes.reshape(-1, delta.shape[-1]) if rows else sizes.reshape(1, -1)
    order = np.argsort(-lines, axis=1, kind="stable")
    keep = np.zeros(lines.shape, bool)
    np.put_along_axis(keep, order[:, dropped:top], True, 1)
    return np.where(keep.reshape(delta.shape), delta, 0.0)


def wanted(delta: np.ndarray[Any, Any], prune: str) -> np.ndarray[Any, Any]:
    words = dict(part.split(": ") for part in prune.split(", "))
    density, size = float(words["density"]), delta.size
    if words["method"] == "breadcrumbs":
        count = int(density * size)
        first = min(int(float(words["gamma"]) * size), size - count)
        return kept(delta, first + count, first, rows=False)
    if words.get("group") == "row" and delta.ndim > 1:
        return kept(delta, round(density * delta.shape[-1]), 0, rows=True)
    return kept(delta, round(density * size), 0, rows=False)


PRUNES = [
    "method: magnitude, density: 0.001",  # nothing is kept
    "method: magnitude, density: 0.04",  # fewer than there are NaN
    "method: magnitude, density: 0.5",
    "method: magnitude, density: 0.04, group: row",
    "method: breadcrumbs, density: 0.001, gamma: 0.03",
    "method: breadcrumbs, density: 0.04, gamma: 0.03",
    "method: breadcrumbs, density: 0.2, gamma: 0.3",  # what follows the NaN
]


@pytest.mark.parametrize("way", [*LEVELS, TORCH, GPU])
def test_nan_counts_as_the_largest_magnitude_whatever_its_bits(way: str, tmp_path: Path) -> None:
    deltas = make_inputs(tmp_path)
    path = tmp_path / "recipe.yaml"
    for prune in PRUNES:
        path.write_text(
            "merge_method: task_arithmetic\nbase_model: ./base\n"
            f"models: [{{model: ./a, prune: {{{prune}, rescale: l2}}}}]\ndtype: float32\n"
        )
        with by(way) as device:
            made = run(path, tmp_path / "out", device=device, allow_nonfinite=True, force=True).folder
        for name, (_, array) in read_checkpoint(made).items():
            # the norm of the whole is NaN, so nothing is divided
            np.testing.assert_array_equal(array, wanted(deltas[name], prune), f"{name} {prune}")


def test_della_ranks_them_alike(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "merge_method: task_arithmetic\nbase_model: ./base\n"
        "models: [{model: ./a, prune: {method: della, density: 0.5, epsilon: 0.4}}]\ndtype: float32\n"
    )
    found = []
    for way in (*LEVELS, TORCH, GPU):
        with by(way) as device:
            made = run(path, tmp_path / way, device=device, allow_nonfinite=True).folder
        found.append({name: array.tobytes() for name, (_, array) in read_checkpoint(made).items()})
    assert all(one == found[0] for one in found)
