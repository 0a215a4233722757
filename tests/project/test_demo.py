"""The demo's parts that need no download: metrics, batches, the cut tokenizer, the table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))
demo = importlib.import_module("benchmarks.demo")
encoder = importlib.import_module("benchmarks.encoder")
tasks = importlib.import_module("benchmarks.tasks")


def test_pearson_spearman_with_ties() -> None:
    from scipy.stats import pearsonr, spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 200).astype(float), rng.normal(size=200)
    expected = (pearsonr(x, y).statistic + spearmanr(x, y).statistic) / 2
    assert encoder.pearson_spearman(x, y) == pytest.approx(expected, abs=1e-12)


def test_matthews() -> None:
    predicted, label = np.array([1.0] * 6 + [0.0] * 4), np.array([1.0] * 4 + [0.0] * 5 + [1.0])
    tp, fp, tn, fn = 4, 2, 3, 1
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert encoder.matthews(predicted, label) == pytest.approx(expected)
    assert encoder.matthews(np.ones(10), label) == 0


def test_batches_cover_an_epoch_and_depend_on_the_seed() -> None:
    def batches(seed: int) -> list[list[int]]:
        return list(encoder._batches(10, 3, 7, torch.Generator().manual_seed(seed)))

    assert [len(batch) for batch in batches(0)] == [3] * 7
    assert len({row for batch in batches(0)[:3] for row in batch}) == 9
    assert batches(0) == batches(0) != batches(1)


def test_pruned_tokenizer_splits_as_before(tmp_path: Path) -> None:
    pieces = ["[PAD]", "odd", "[UNK]", "[CLS]", "[SEP]", "un", "##like", "##ly", "##likely", "like"]
    spec: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "decoder": None,
        "added_tokens": [
            {"id": pieces.index(token), "content": token, "special": True, "single_word": False,
             "lstrip": False, "rstrip": False, "normalized": False}
            for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        ],
        "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing", "pair": [],
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
            ],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [3], "tokens": ["[CLS]"]}},
        },
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {piece: i for i, piece in enumerate(pieces)}},
    }  # fmt: skip
    full, out = tmp_path / "full", tmp_path / "out"
    full.mkdir()
    out.mkdir()
    (full / "tokenizer.json").write_text(json.dumps(spec))
    (full / "tokenizer_config.json").write_text("{}")
    texts = ["unlikely like", "Unlike what"]

    old_ids = encoder._prune_tokenizer(full, texts, out)

    assert [pieces[i] for i in old_ids] == [piece for piece in pieces if piece not in ("odd", "##ly")]
    before = encoder.Tokenizer.from_file(str(full / "tokenizer.json"))
    after = encoder.Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in texts:
        assert after.encode(text).tokens == before.encode(text).tokens
        assert [old_ids[i] for i in after.encode(text).ids] == before.encode(text).ids


def test_an_unfinished_folder_is_not_there(tmp_path: Path) -> None:
    def interrupted() -> None:
        with tasks.building(tmp_path / "made") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "made").exists()
    with tasks.building(tmp_path / "made") as folder:
        (folder / "whole").touch()
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["whole"]


def test_table_is_aligned() -> None:
    results = [demo.Result("fine-tune", 1.0, 25.0, 80.4, None), demo.Result("DARE", 0.01, 0.25, 53.0, 3.0)]
    lines = demo.table(results).splitlines()
    assert lines[2:] == [
        "fine-tune        1     25.00        80.4         ",
        "DARE          0.01      0.25        53.0      3.0",
    ]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_every_demo_recipe_is_run_and_has_its_own_output() -> None:
    assert set(demo.RECIPES) == {file.name for file in demo.FOLDER.glob("*.yaml")}
    for name in demo.RECIPES:
        output = demo.yaml.safe_load((demo.FOLDER / name).read_text())["output"]["path"]
        assert output == f"../../.demo/merged/{Path(name).stem}"
