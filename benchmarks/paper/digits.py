"""scikit-learn's bundled digits: 1,797 images of 8 × 8 in 17 greys, in three parts. Nothing here uses deltamerge."""

from __future__ import annotations

import numpy as np

from benchmarks.paper.pictures import Pictures

SIZE, VALIDATION, TEST = 8, 300, 500


def parts(toy: bool = False) -> dict[str, Pictures]:
    """Train, validation and test parts, always the same; at toy scale few, and noise. SystemExit: no scikit-learn."""
    rng = np.random.default_rng(0)
    if toy:
        return {part: _noise(rng) for part in ("validation", "test", "train")}
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, import-not-found, unused-ignore]  # optional
    except ImportError:
        raise SystemExit("the digits come with scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    order = rng.permutation(len(found.images))
    images = np.round(found.images[order] * 255 / 16).astype(np.uint8)
    labels = found.target[order].astype(np.int64)
    ends = {"validation": (0, VALIDATION), "test": (VALIDATION, VALIDATION + TEST), "train": (VALIDATION + TEST, None)}
    return {part: Pictures(images[start:end], labels[start:end]) for part, (start, end) in ends.items()}


def _noise(rng: np.random.Generator) -> Pictures:
    return Pictures(rng.integers(0, 256, (40, SIZE, SIZE), dtype=np.uint8), np.arange(40) % 10)
