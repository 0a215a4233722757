"""What the paper's experiments make themselves: arithmetic, pictures, a decoder's score, simulated bounds."""

from __future__ import annotations

import importlib
import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
arithmetic, decoder, digits, frame, pruned, theory = (
    importlib.import_module(f"paper.{name}")
    for name in ("arithmetic", "decoder", "digits", "frame", "pruned", "theory")
)


def test_word_problems_are_worked_out_rightly() -> None:
    found = arithmetic.problems(300, seed=0)
    assert found == arithmetic.problems(300, seed=0)
    assert len(set(found)) > 290
    for text, label in found:
        value, *steps = map(int, re.findall(r"\d+", text))
        for step, (left, sign, right, result) in zip(steps, re.findall(r"(\d+)([+-])(\d+)=(\d+)", label), strict=True):
            assert (int(left), int(right)) == (value, step), (text, label)
            value += step if sign == "+" else -step
            assert int(result) == value
            assert 0 <= value <= arithmetic.LARGEST
        assert re.search(arithmetic.ANSWER, label)[1] == str(value)  # type: ignore[index]


def test_every_word_has_its_token_and_comes_back(tmp_path: Path) -> None:
    tokenizer = arithmetic.tokenizer(tmp_path)
    texts = [f"{row.text} {row.label}" for row in arithmetic.problems(200, seed=1)]
    texts += islice(arithmetic.corpus(seed=1), 200)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.pad_token_id not in ids, text  # which stands for unknown words
        assert tokenizer.decode(ids) == text


def test_the_number_after_the_last_sign_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    decoder.build_base(base, steps=1, seed=0, layers=1, batch_size=2)
    rows = [arithmetic.Problem("Ann has 3 pears .", label) for label in ("3+4=7", "9-2=7", "3+4=7;7+1=8", "7")]

    def generate(self: object, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        tokenizer = decoder.AutoTokenizer.from_pretrained(base)
        made = torch.tensor(tokenizer("5+2=7")["input_ids"]).expand(len(input_ids), -1)
        return torch.cat([input_ids, made], dim=1)

    monkeypatch.setattr(decoder.LlamaForCausalLM, "generate", generate)
    assert decoder.exact_match(base, rows, new_tokens=8) == 50.0


def test_training_sees_the_pixels_that_calibration_sees(tmp_path: Path) -> None:
    data = digits.parts(toy=True)["test"]
    digits.write(data, tmp_path)
    processor = digits.processor()
    files = sorted(tmp_path.rglob("*.png"), key=lambda file: file.name)
    assert [int(file.parent.name) for file in files] == data.labels_N.tolist()
    pictures = [Image.open(file).convert("RGB") for file in files]
    seen = processor(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, digits.pixels(data.images_NHW), rtol=0, atol=1e-6)


def test_symmetries_are_eight() -> None:
    image = np.arange(9, dtype=np.uint8).reshape(3, 3)
    assert len({digits.turn(image, symmetry).tobytes() for symmetry in range(8)}) == 8


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

    def prune(setting: object, subject: object, method: object, density: float, seed: int) -> dict[str, float]:
        drawn.append((method.name, seed))  # type: ignore[attr-defined]
        return {"score": float(seed)}

    monkeypatch.setattr(pruned, "prune", prune)
    pruned.scores(frame.Setting(work=tmp_path), None, ("DARE", "DAREx-q, q_e", "magnitude"), (0.1,), 3)
    assert drawn == [("DARE", 0), ("DARE", 1), ("DARE", 2), ("DAREx-q, q_e", 0), ("magnitude", 0)]
