"""The decoder of record: its batches, loss, greedy answers and rows, on a random model of one layer."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import gamma
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
smollm2 = importlib.import_module("benchmarks.smollm2")
smollm2_rows = importlib.import_module("benchmarks.smollm2_rows")
merging = importlib.import_module("benchmarks.merging.decoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2")
    smollm2.toy(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "base")


def test_a_pass_over_the_rows_has_each_once() -> None:
    some = [smollm2.Example([0] * (1 + i % 7), 1 + i) for i in range(96)]
    torch.manual_seed(1)
    made = smollm2.batches(some, steps=16, size=6, seed=3)
    torch.manual_seed(2)
    assert made == smollm2.batches(some, steps=16, size=6, seed=3)
    assert made != smollm2.batches(some, steps=16, size=6, seed=4)
    assert set(Counter(one.scored for batch in made for one in batch).values()) == {1}
    assert max(len({len(one.ids) for one in batch}) for batch in made) <= 2, "rows of about one length"
    assert len(smollm2.batches(some, steps=50, size=6, seed=3)) == 50


def test_the_loss_is_that_of_the_answer_and_the_end(folder: Path, model: Any, tokenizer: Any) -> None:
    some = smollm2.examples(tokenizer, smollm2.rows("sorting", "train", folder)[:5])
    assert {one.ids[-1] for one in some} == {tokenizer.eos_token_id}
    assert [tokenizer.decode(one.ids[-one.scored : -1]) for one in some[:2]] == [" 0", " 3"]
    width = max(len(one.ids) for one in some)
    ids = torch.tensor([one.ids + [7] * (width - len(one.ids)) for one in some])
    labels = torch.tensor(
        [
            [-100] * (len(one.ids) - one.scored) + one.ids[-one.scored :] + [-100] * (width - len(one.ids))
            for one in some
        ]
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids, labels=labels).loss
    with torch.no_grad():
        loss = smollm2.loss_of(model, some).float()
    # log-probabilities of 5.6 and their mean are rounded to bfloat16; logits, below 1, may be rounded the other way
    torch.testing.assert_close(loss, expected, rtol=gamma(2.5, torch.bfloat16), atol=0)


def test_answers_are_those_of_generate(folder: Path, model: Any, tokenizer: Any) -> None:
    prompts = [row.text for row in smollm2.rows("sorting", "test", folder)[:6]] + ["a", "The end of the answer is"]
    expected = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**inputs, do_sample=False, max_new_tokens=9)
        expected.append(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert smollm2.answers(model, tokenizer, prompts, 9, size=3) == expected
    # Rows that end at once, or never: the letter that the model writes most becomes the end.
    most = Counter("".join(expected)).most_common(1)[0][0]
    (end,) = tokenizer(most)["input_ids"]
    made = smollm2.answers(model, _Ending(tokenizer, end), prompts, 9, size=8)
    assert made == [text.partition(most)[0] for text in expected]


class _Ending:
    """A tokenizer with another end."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, end
        self.batch_decode = tokenizer.batch_decode

    def __call__(self, texts: list[str]) -> Any:
        return self._tokenizer(texts)


def test_an_expert_learns_and_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"steps": 120, "lr": 1e-2, "batch": 8}
    out = smollm2.make("sorting", folder, **options)
    log = json.loads((out / "log.json").read_text())
    assert sum(log["losses"][-10:]) < sum(log["losses"][:10]) / 2
    score = json.loads((out / "score.json").read_text())
    assert score.keys() == {"exact_match", "base", "rows"}
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert smollm2.make("sorting", folder, **options) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    (line,) = smollm2.listed(folder)
    assert line.startswith(f"{out} sorting lr=")
    texts = [json.loads(line)["text"] for line in smollm2.answered("sorting", 4, folder).read_text().splitlines()]
    assert all("Answer:" in text and text.endswith("<|im_end|>") for text in texts)


def test_prompts_have_no_constant_instructions() -> None:
    asked = "Sort these numbers in ascending order: 9.0, 83.0\nPlease follow the instruction below:\n## 1. Let all"
    assert smollm2_rows.prompt(asked) == "Sort these numbers in ascending order: 9, 83\nAnswer:"
    asked = "Solve the following problem.\n\nProvide you answer as a list.\n\nReverse this list of words: a, b\n"
    assert smollm2_rows.prompt(asked) == "Reverse this list of words: a, b\nAnswer:"
    assert smollm2_rows.answer("['9.0', '83.0']") == "9, 83"
    assert smollm2_rows.answer("-12") == "-12"
    assert smollm2_rows.answer("[]") == "none"


def test_weights_make_deltas_as_long_as_the_shortest(folder: Path, tmp_path: Path) -> None:
    start = load_file(folder / "base" / "model.safetensors")
    models = {}
    for name, length in (("long", 0.5), ("short", 0.125)):
        models[name] = tmp_path / name
        models[name].mkdir()
        save_file({n: t.float() + length for n, t in start.items()}, models[name] / "model.safetensors")
    merge = merging.Merge("equal", {"merge_method": "task_arithmetic"}, equal=True)
    beside = merge.recipe(folder / "base", models, {})["models"]
    assert [one["parameters"] for one in beside] == [{"weight": 0.25}, {"weight": 1.0}]


@pytest.mark.slow
def test_a_merge_keeps_a_share_of_every_expert(folder: Path) -> None:
    tasks = ("sorting", "reversal")
    for task in tasks:
        smollm2.make(task, folder, steps=120, lr=1e-2, batch=8)
    one = merging.Merge("linear", {"merge_method": "linear"})
    several = merging.Merge("task_arithmetic", {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}})
    asked: dict[str, Any] = {"tasks": tasks, "count": 10, "folder": folder}
    deltas = (merging.DELTAS[0], merging.DELTAS[1])
    found = list(merging.measured([one, several], deltas, **asked))
    assert [(merge.name, delta.name) for merge, delta, _ in found] == [
        (name, delta.name) for delta in deltas for name in ("linear", "task_arithmetic")
    ]
    for _, _, result in found:
        assert result.worst == min(result.normalised.values())
        assert result.worst <= result.mean
        assert result.cpu_s > 0
        assert result.peak_mb > 5
    kept = {merging.key(m, d, tasks, 10): merging.asdict(r) for m, d, r in found}
    assert list(merging.measured([one, several], deltas, **asked, kept=kept)) == found
    table = merging.markdown(
        {
            "own": dict.fromkeys(tasks, 50.0),
            "cells": {k: {"merge": "m", "delta": "d", "result": r} for k, r in kept.items()},
        }
    )
    assert {line.count("|") for line in table.splitlines()} == {9}
