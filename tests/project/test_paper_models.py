"""What the paper's experiments make themselves: pictures, simulated bounds."""

from __future__ import annotations

import gzip
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))
digits, fashion, frame, pictures, pruned, theory = (
    importlib.import_module(f"benchmarks.paper.{name}")
    for name in ("digits", "fashion", "frame", "pictures", "pruned", "theory")
)


def test_training_sees_the_pixels_that_calibration_sees(tmp_path: Path) -> None:
    data = digits.parts(toy=True)["test"]
    pictures.write(data, tmp_path)
    files = sorted(tmp_path.rglob("*.png"), key=lambda file: file.name)
    assert [int(file.parent.name) for file in files] == data.labels_N.tolist()
    shown = [Image.open(file).convert("RGB") for file in files]
    seen = pictures.processor(digits.SIZE)(images=shown, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, pictures.pixels(data.images_NHW), rtol=0, atol=1e-6)


def test_what_is_pretrained_on_is_not_fine_tuned_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(1000) % 10
    images = np.repeat(labels.astype(np.uint8), 28 * 28).tobytes()  # each picture as grey as its class says
    for kind in ("train", "t10k"):
        (tmp_path / f"{kind}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images))
        (tmp_path / f"{kind}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes(labels.tolist())))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    found = fashion.parts(tmp_path)
    sizes = {"pretrain": 500, "train": 200, "validation": 300, "test": 500}
    assert {part: len(data.labels_N) for part, data in found.items()} == sizes
    for part, (shown, classes) in found.items():
        greys = fashion.FIRST if part == "pretrain" else fashion.THEN
        np.testing.assert_array_equal(shown[:, 3, 4], np.array(greys)[classes])


def test_the_digits_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    parts = digits.parts()
    assert {part: len(data.labels_N) for part, data in parts.items()} == {"validation": 300, "test": 500, "train": 997}
    assert max(data.images_NHW.max() for data in parts.values()) == 255


def test_the_tightened_bound_fails_where_the_theorem_holds() -> None:
    c_n = theory.coefficients()["three large"]
    h_D = np.abs(theory._changes(c_n, 0.9, 4000, seed=0))
    layer = theory._layer(c_n)
    bound, tight = (form(layer, 0.1, 0.01)[0] for form in (theory.S.guaranteed, theory.S.typical))
    assert (h_D > bound).mean() < 0.01 < 0.02 < (h_D > tight).mean()
    # Two or three of the large ones kept, or none: 27 in 1,000 masks.
    assert (h_D > tight).mean() == pytest.approx(3 * 0.1**2 * 0.9 + 0.1**3, abs=0.006)


def test_calibrated_masks_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, int]] = []

    def prune(setting: object, subject: object, method: Any, density: float, seed: int) -> dict[str, float]:
        drawn.append((method.name, seed))
        return {"score": float(seed)}

    monkeypatch.setattr(pruned, "prune", prune)
    pruned.scores(frame.Setting(work=tmp_path), None, ("DARE", "DAREx-q, q_e", "magnitude"), (0.1,), 3)
    assert drawn == [("DARE", 0), ("DARE", 1), ("DARE", 2), ("DAREx-q, q_e", 0), ("magnitude", 0)]
