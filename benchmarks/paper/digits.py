"""A small ViT on scikit-learn's bundled digits: pretrained to tell how an image was turned, fine-tuned to the digits.

1,797 images of 8 × 8 in 17 greys; 300 are for calibration, 500 for scoring, the rest for training. Nothing here uses
deltamerge.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from training import Batch, OptimizerFactory, adamw, trained
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

SIZE, VALIDATION, TEST = 8, 300, 500
CONFIG = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": SIZE, "patch_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "num_labels": 10,
}  # fmt: skip


class Digits(NamedTuple):
    """Grey images (N, 8, 8) and the digits they show (N)."""

    images_NHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]


def parts(toy: bool = False) -> dict[str, Digits]:
    """Train, validation and test parts, always the same; at toy scale few, and noise. SystemExit: no scikit-learn."""
    rng = np.random.default_rng(0)
    if toy:
        return {part: Digits(*_noise(rng)) for part in ("validation", "test", "train")}
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise SystemExit("the digits come with scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    order = rng.permutation(len(found.images))
    images = np.round(found.images[order] * 255 / 16).astype(np.uint8)
    labels = found.target[order].astype(np.int64)
    ends = {"validation": (0, VALIDATION), "test": (VALIDATION, VALIDATION + TEST), "train": (VALIDATION + TEST, None)}
    return {part: Digits(images[start:end], labels[start:end]) for part, (start, end) in ends.items()}


def build_base(
    images_NHW: NDArray[np.uint8], out: Path, *, steps: int, seed: int, lr: float = 2e-3, batch_size: int = 64
) -> None:
    """Train a ViT from scratch to say by which of the square's eight symmetries an image was turned; kept headless."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(steps):
        turns = rng.integers(0, 8, batch_size)
        chosen = images_NHW[rng.integers(0, len(images_NHW), batch_size)]
        turned = np.stack([turn(image, t) for image, t in zip(chosen, turns, strict=True)])
        batches.append({"pixel_values": pixels(turned), "labels": torch.from_numpy(turns)})
    config = ViTConfig(**CONFIG)  # two of the ten classes stay unused
    trained(lambda: ViTForImageClassification(config), batches, steps=steps, lr=lr, seed=seed).vit.save_pretrained(out)
    processor().save_pretrained(out)


def fine_tune(
    base: Path,
    data: Digits,
    out: Path,
    *,
    steps: int,
    seed: int,
    lr: float = 1e-3,
    batch_size: int = 32,
    factory: OptimizerFactory = adamw,
) -> None:
    """Teach `base` the ten digits with a fresh head."""
    rng = np.random.default_rng(seed)
    batches: list[Batch] = []
    for _ in range(steps):
        rows = rng.choice(len(data.labels_N), batch_size, replace=False)
        batches.append({"pixel_values": pixels(data.images_NHW[rows]), "labels": torch.from_numpy(data.labels_N[rows])})
    load = partial(ViTForImageClassification.from_pretrained, base)
    trained(load, batches, steps=steps, lr=lr, seed=seed, factory=factory).save_pretrained(out)
    processor().save_pretrained(out)


def accuracy(folder: Path, data: Digits) -> float:
    """In %."""
    model = ViTForImageClassification.from_pretrained(folder)
    with torch.inference_mode():
        predicted_N = model(pixel_values=pixels(data.images_NHW)).logits.argmax(-1).numpy()
    return 100 * float((predicted_N == data.labels_N).mean())


def write(data: Digits, folder: Path) -> None:
    """Pictures in folders named after their labels, as calibration data."""
    for i, (image, label) in enumerate(zip(data.images_NHW, data.labels_N, strict=True)):
        path = folder / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def processor() -> ViTImageProcessor:
    """What makes of such a picture what `pixels` makes of its values."""
    return ViTImageProcessor(do_resize=False, size={"height": SIZE, "width": SIZE})


def _noise(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return rng.integers(0, 256, (40, SIZE, SIZE), dtype=np.uint8), np.arange(40) % 10


def pixels(images_NHW: NDArray[np.uint8]) -> Tensor:
    """(N, 3, 8, 8) in [−1, 1]."""
    values = torch.from_numpy(images_NHW).float() / 127.5 - 1
    return values[:, None].expand(-1, 3, -1, -1)


def turn(image: NDArray[np.uint8], symmetry: int) -> NDArray[np.uint8]:
    turned = np.rot90(image, symmetry % 4)
    return turned[:, ::-1] if symmetry >= 4 else turned
