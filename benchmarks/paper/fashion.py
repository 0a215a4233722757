"""Fashion-MNIST (Zalando, MIT): 70,000 grey pictures of 28 × 28, ten kinds of clothes, from Debian's package.

The package `dataset-fashion-mnist` (31 MB) is taken where it is installed, or where FASHION_MNIST says; otherwise apt
downloads it, without installing it, into the folder that keeps the experiments. Nothing here uses deltamerge.
"""

from __future__ import annotations

import gzip
import os
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.paper.pictures import Pictures

PACKAGE, PLACE = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
SIDE, VALIDATION, TEST = 28, 300, 2000
# What the base learns, and what it is fine-tuned to: shoes, shirts and bags; then tops, trousers, dresses and coats.
FIRST, THEN = (5, 6, 7, 8, 9), (0, 1, 2, 3, 4)


def source(work: Path) -> Path:
    """The folder of the four files. SystemExit: neither there nor to be had."""
    for place in (os.environ.get("FASHION_MNIST"), f"/{PLACE}", work / "fashion-mnist" / PLACE):
        if place and (Path(place) / "train-images-idx3-ubyte.gz").exists():
            return Path(place)
    target = work / "fashion-mnist"
    target.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "-q", "download", PACKAGE], cwd=target, check=True, stdout=subprocess.DEVNULL)
        (package,) = target.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=target, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"Fashion-MNIST comes with Debian's package {PACKAGE} ({error}): name its folder by FASHION_MNIST"
        ) from None
    return target / PLACE


def parts(work: Path, toy: bool = False) -> dict[str, Pictures]:
    """`pretrain` (FIRST), and `train`, `validation` and `test` (THEN), always the same; at toy scale few, and noise."""
    if toy:
        rng = np.random.default_rng(0)
        return {
            part: Pictures(rng.integers(0, 256, (40, SIDE, SIDE), dtype=np.uint8), np.arange(40) % 5)
            for part in ("pretrain", "train", "validation", "test")
        }
    folder = source(work)
    train, test = (_read(folder, kind) for kind in ("train", "t10k"))
    then = _of(train, THEN)
    return {
        "pretrain": _of(train, FIRST),
        "train": Pictures(*(part[VALIDATION:] for part in then)),
        "validation": Pictures(*(part[:VALIDATION] for part in then)),
        "test": Pictures(*(part[:TEST] for part in _of(test, THEN))),
    }


def _of(data: Pictures, classes: tuple[int, ...]) -> Pictures:
    """The pictures of some classes, numbered from 0 in their order."""
    chosen = np.isin(data.labels_N, classes)
    return Pictures(data.images_NHW[chosen], np.searchsorted(classes, data.labels_N[chosen]))


def _read(folder: Path, kind: str) -> Pictures:
    """Files of IDX: big-endian sizes after a magic number, then bytes."""
    images = gzip.decompress((folder / f"{kind}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{kind}-labels-idx1-ubyte.gz").read_bytes())
    return Pictures(
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, SIDE, SIDE),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )
