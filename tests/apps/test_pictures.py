"""Calibration on pictures: a tiny ViT and PNG files, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_models import image_processor, make

from deltamerge.cli import main

NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and tuned, and pictures/NAME/I.png."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("pictures")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    _, tensors = make("ViTForImageClassification", folder / "base", **labels)
    make("ViTForImageClassification", folder / "tuned", **labels)
    generator = torch.Generator().manual_seed(1)
    tuned = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(tuned, folder / "tuned" / "model.safetensors", {"format": "pt"})
    image_processor(folder / "tuned")
    noise = np.random.Generator(np.random.PCG64(0))
    for i in range(24):
        path = folder / "pictures" / NAMES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(noise.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    return folder


def recipe(folder: Path, q: str, **calibration: object) -> Path:
    path = folder / f"{q}.yaml"
    content = {
        "base_model": "./base",
        "models": [{"model": "./tuned", "name": "t", "prune": {"method": "dare", "density": 0.1, "q": q}}],
        "calibration": {"data": "pictures", "task": "image-classification", "sequences": 8, "seeds": 2, **calibration},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def command(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return leaving.value.code


@pytest.mark.parametrize(("q", "measure"), [("output_change", "divergence of the classes"), ("validation", "accuracy")])
def test_calibrated_run(folder: Path, tmp_path: Path, q: str, measure: str) -> None:
    assert command("run", recipe(folder, q), "--out", tmp_path / "out", "-q") == 0
    lock = yaml.safe_load((tmp_path / "out" / "recipe.lock").read_text())
    assert lock["calibration"]["t"]["held_out"]["measure"] == measure
    assert len(lock["inputs"]["calibration data"]["files"]) == 24
    assert "owl/2.png" in lock["inputs"]["calibration data"]["files"]


@pytest.mark.slow
def test_inspect_and_recommend(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--calibration", folder / "pictures", "--sequences", 8, "--json")
    assert command("inspect", folder / "tuned", "--base", folder / "base", *rows) == 0
    seen = json.loads(capsys.readouterr().out)["activations"]
    assert {layer["name"].split(".")[0] for layer in seen["layers"]} == {"vit"}
    asked = ("--density", 0.1, "--label", "label", "--out", tmp_path / "r.yaml")
    assert command("recommend", folder / "tuned", "--base", folder / "base", *asked, *rows) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["evidence"]["metric"] == "accuracy"
    assert {one["name"] for one in answer["candidates"]} >= {"dare", "magnitude_q", "wanda_q"}
    assert command("check", tmp_path / "r.yaml") == 0


def test_pictures_and_texts_are_not_mistaken_for_each_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "words.txt").write_text("no picture\n" * 12)
    assert command("calibrate", recipe(folder, "output_change", data="words.txt")) == 1
    assert ": a text, but pictures are needed" in capsys.readouterr().err
    assert command("check", recipe(folder, "validation", task="text-classification")) == 1
    assert "task text-classification needs a model" in capsys.readouterr().err
