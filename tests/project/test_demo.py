"""The demo and its model without a download; the metrics, batches and cut tokenizer of the encoders' tasks."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))
demo = importlib.import_module("benchmarks.demo")
smollm2 = importlib.import_module("benchmarks.smollm2")
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


@pytest.mark.parametrize("skill", demo.SKILLS)
def test_rows_of_a_skill_are_the_same_every_time_and_no_test_row_is_trained_on(skill: str) -> None:
    test, train = demo.rows(skill)
    assert (len(test), len(train)) == (demo.TEST_ROWS, demo.TRAIN_ROWS)
    assert not {row.text for row in test} & {row.text for row in train}
    assert demo.rows(skill) == (test, train)


def test_labels_say_what_the_prompts_ask() -> None:
    for row in demo.rows("json")[0]:
        assert all(str(value) in row.text for value in json.loads(row.label).values())
    signs = {"older": ">", "over": ">", "younger": "<", "under": "<", "is": "="}
    for row in demo.rows("sql")[0]:
        found = re.fullmatch(r"SELECT name FROM people WHERE age (.) (\d+) AND city = '(\w+)';", row.label)
        assert found is not None
        words = re.findall(r"\w+", row.text)
        assert {found[2], found[3]} <= set(words)
        assert found[1] == next(sign for word, sign in signs.items() if word in words)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("toy")
    smollm2.toy(folder)
    return folder


def test_a_row_is_right_where_the_greedy_answer_is_the_label(toy: Path) -> None:
    """Labels are what the model itself writes; every other one is changed."""
    model = demo.load(toy / "base")
    tokenizer = AutoTokenizer.from_pretrained(toy / "base")
    prompts = [row.text for row in smollm2.rows("arithmetic", "test", toy)[:6]]
    ids = tokenizer(prompts)["input_ids"]
    some = []
    for i, (prompt, before) in enumerate(zip(prompts, ids, strict=True)):
        (written,) = smollm2.answers(model, tokenizer, [prompt], 5)
        answer = tokenizer(written)["input_ids"]
        if i % 2:
            answer[i % len(answer)] += 1
        some.append(smollm2.Example(before + answer, len(answer)))
    assert smollm2.right(model, some, size=4) == [True, False] * 3


def test_only_the_upper_layers_learn(toy: Path, tmp_path: Path) -> None:
    expert = smollm2.Expert("arithmetic", lr=1e-2, steps=2, batch=2, upper=1)
    smollm2.fine_tune(toy / "base", smollm2.rows("arithmetic", "train", toy), tmp_path / "tuned", expert)
    before, after = (load_file(folder / "model.safetensors") for folder in (toy / "base", tmp_path / "tuned"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers." in name}


@pytest.mark.slow
def test_the_demo_on_a_tiny_model(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, its recipes too: a row of the table for each model, and a pruned one differs from the base in less."""
    recipes, work = tmp_path / "recipes" / "demo", tmp_path / ".demo"
    shutil.copytree(demo.FOLDER, recipes)
    shutil.copytree(toy / "base", work / "base")
    small = {"HOW": demo.HOW._replace(steps=2, batch=2, upper=1), "TEST_ROWS": 4, "TRAIN_ROWS": 20}
    for name, value in {"FOLDER": recipes, "WORK": work, **small}.items():
        monkeypatch.setattr(demo, name, value)
    demo.main()
    printed = capsys.readouterr().out
    assert len(re.findall(r"(?m)^\S.{15,21} +\d+\.\d\d +\d+ +\d+   ", printed)) == 3 + len(demo.RECIPES)
    before = load_file(work / "base" / "model.safetensors")
    changed = {}
    for name in ("json", "merged/dare", "merged/darex-q", "merged/ties", "merged/iso-c"):
        after = load_file(work / name / "model.safetensors")
        changed[name] = sum(int((after[key] != before[key]).sum()) for key in before)
    few = [changed.pop("merged/dare"), changed.pop("merged/darex-q")]
    assert min(few) > 0
    assert 10 * max(few) < min(changed.values())
    assert printed.count("\nJSON:") == printed.count("\nSQL:") == 1


def test_every_demo_recipe_is_run_and_has_its_own_output() -> None:
    assert set(demo.RECIPES) == {file.name for file in demo.FOLDER.glob("*.yaml")}
    for name in demo.RECIPES:
        output = yaml.safe_load((demo.FOLDER / name).read_text())["output"]["path"]
        assert output == f"../../.demo/merged/{Path(name).stem}"
