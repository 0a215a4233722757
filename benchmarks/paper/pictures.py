"""A small ViT that first learns some classes of grey pictures, then others. Nothing here uses deltamerge."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from benchmarks.training import Batch, OptimizerFactory, adamw, trained

SHAPE = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


class Pictures(NamedTuple):
    """Square grey images (N, H, H) and their classes (N), from 0."""

    images_NHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]


def pretrain(data: Pictures, out: Path, *, steps: int, seed: int, patch: int, lr: float = 2e-3, size: int = 64) -> None:
    """Train a ViT from scratch on the classes of `data`; kept without its head."""
    side, classes = data.images_NHW.shape[1], int(data.labels_N.max()) + 1
    config = ViTConfig(**SHAPE, image_size=side, patch_size=patch, num_labels=classes)
    made = trained(
        lambda: ViTForImageClassification(config), _batches(data, steps, size, seed), steps=steps, lr=lr, seed=seed
    )
    made.vit.save_pretrained(out)
    processor(side).save_pretrained(out)


def fine_tune(
    base: Path, data: Pictures, out: Path, *, steps: int, seed: int, lr: float = 1e-3, size: int = 32,
    factory: OptimizerFactory = adamw,
) -> None:  # fmt: skip
    """Teach `base` the classes of `data` with a fresh head."""
    classes = int(data.labels_N.max()) + 1
    load = partial(ViTForImageClassification.from_pretrained, base, num_labels=classes)
    batches = _batches(data, steps, size, seed)
    trained(load, batches, steps=steps, lr=lr, seed=seed, factory=factory).save_pretrained(out)
    processor(data.images_NHW.shape[1]).save_pretrained(out)


def _batches(data: Pictures, steps: int, size: int, seed: int) -> list[Batch]:
    rng = np.random.default_rng(seed)
    made: list[Batch] = []
    for _ in range(steps):
        rows = rng.choice(len(data.labels_N), min(size, len(data.labels_N)), replace=False)
        made.append({"pixel_values": pixels(data.images_NHW[rows]), "labels": torch.from_numpy(data.labels_N[rows])})
    return made


def accuracy(folder: Path, data: Pictures) -> float:
    """In %."""
    model = ViTForImageClassification.from_pretrained(folder)
    right = 0
    for start in range(0, len(data.labels_N), 200):
        with torch.inference_mode():
            found = model(pixel_values=pixels(data.images_NHW[start : start + 200])).logits.argmax(-1).numpy()
        right += int((found == data.labels_N[start : start + 200]).sum())
    return 100 * right / len(data.labels_N)


def write(data: Pictures, folder: Path) -> None:
    """Pictures in folders named after their labels, as calibration data."""
    for i, (image, label) in enumerate(zip(data.images_NHW, data.labels_N, strict=True)):
        path = folder / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def processor(side: int) -> ViTImageProcessor:
    """What makes of such a picture what `pixels` makes of its values."""
    return ViTImageProcessor(do_resize=False, size={"height": side, "width": side})


def pixels(images_NHW: NDArray[np.uint8]) -> Tensor:
    """(N, 3, H, H) in [−1, 1]."""
    values = torch.from_numpy(images_NHW).float() / 127.5 - 1
    return values[:, None].expand(-1, 3, -1, -1)
