"""The decoder of record: its batches, loss, greedy answers and rows, on a random model of one layer."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tolerance import gamma
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
smollm2 = importlib.import_module("benchmarks.smollm2")
smollm2_rows = importlib.import_module("benchmarks.smollm2_rows")
merging = importlib.import_module("benchmarks.merging.decoder")
pages = importlib.import_module("benchmarks.merging.pages")


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


def test_instructions_are_in_the_template_with_what_the_base_answers(folder: Path, tokenizer: Any) -> None:
    some = smollm2.instructions(folder)
    assert len(some) == len(smollm2.INSTRUCTIONS)
    text = tokenizer.decode(some[0].ids[: -some[0].scored])
    assert text == f"user: {smollm2.INSTRUCTIONS[0]} assistant:"
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    assert smollm2.answers(base, tokenizer, [text], 32) == [tokenizer.decode(some[0].ids[-some[0].scored :])]
    assert smollm2.instructions(folder) == some


def test_recipes_have_the_rule_and_what_stands_beside_the_models(tmp_path: Path) -> None:
    models, rows = {"a": "A", "b": "B"}, {"a": tmp_path / "a", "b": tmp_path / "b"}
    made = {one.name: one.recipe(tmp_path, models, rows, 2) for one in merging.MERGES if not one.is_advised}
    assert made["task_arithmetic, balanced"]["parameters"] == {"lambda": 0.7 / 2**0.5, "weight": 1.0}
    assert made["task_arithmetic, balanced"]["balance"] == "norm"
    assert made["iso_c"]["parameters"] == {"lambda": 2.25}
    assert made["emr"]["parameters"] == {"task": 2}
    assert [one["calibration"]["data"] for one in made["regmean"]["models"]] == [str(tmp_path / n) for n in "ab"]
    fit = made["regmean, off_diagonal 0.99 + coefficients per row"]
    assert fit["calibration"] == {"per": "merge", "coefficients": "row"}
    assert fit["parameters"] == {"off_diagonal": 0.99}
    assert not [one for one in made["wudi"]["models"] if "calibration" in one]


def test_a_merge_of_one_expert_keeps_all_of_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "FILE", tmp_path / "found.json")
    names = merging.FAMILIES["report"]
    family = merging.Family("report", folder=folder)
    for number, name in enumerate(names):
        shutil.copytree(folder / "base", folder / name)
        rng = torch.Generator().manual_seed(number)
        moved = {n: (t + 0.5 * torch.randn(t.shape, generator=rng)).bfloat16() for n, t in family.weights.items()}
        save_file(moved, folder / name / "model.safetensors", {"format": "pt"})
        family.load(moved)
        rows = [one.ids[: -one.scored] for one in family.examples[name][:8]]
        best = [int(smollm2.logits_of(family.model, torch.tensor([ids]), [len(ids) - 1]).argmax()) for ids in rows]
        family.examples[name] = [smollm2.Example([*ids, token], 1) for ids, token in zip(rows, best, strict=True)]
    known = merging.known_of(family, {})
    assert json.loads(merging.FILE.read_text())["models"] == {"report": known}
    assert known["base"]["kl"] == 0
    assert [known[name]["exact_match"] for name in names] == [100.0] * 4
    whole = merging.Merge("sum", {"merge_method": "task_arithmetic"}, lambda models: 1.0)
    made = merging.cell(family, whole, names[:1], known, (0.01,))
    assert (made["shares"], made["text"], made["lambda"]) == ({names[0]: 100.0}, 0.0, 1.0)
    assert made["instructions"] == pytest.approx(known[names[0]]["kl"], abs=1e-3)
    assert made["tried"][0.01][names[0]] < 100
    each = merging.cell(family, merging.Merge("emr", {"merge_method": "emr"}, each=True), names[:1], known)
    assert each["shares"] == {names[0]: 100.0}
    assert [some for _, some in family.merged(whole, names[:2])] == [list(names[:2])]


def test_tables_have_a_line_for_each_merge_and_a_column_for_each_set() -> None:
    tasks = {"report": ["a", "b", "c", "d"], "choose": ["e", "f", "g", "h"]}
    cells = [
        {
            "family": family, "tasks": names[:size], "merge": merge, "rows": 50 * fitted,
            "lambda": None if fitted else 2.25,
            "shares": dict.fromkeys(names[:size], 60.0 + fitted), "mean": 60.0 + fitted, "worst": 60.0 + fitted,
            "text": -1.5, "instructions": 0.4, "cpu_s": 9.6, "tried": {},
        }
        for family, names in tasks.items()
        for size in (4, 2)
        for fitted, merge in enumerate(("iso_c", "regmean"))
        if (family, merge) != ("choose", "regmean")
    ]  # fmt: skip
    fours = pages.fours_of_decoder({"cells": cells}).splitlines()
    assert fours[2] == "| regmean | – | 50 | 61.0 / 61.0 | 61, 61, 61, 61 | -1.5 | 0.40 | – | – | 10 |"
    assert (
        fours[3]
        == "| iso_c | 2.25 | – | 60.0 / 60.0 | 60, 60, 60, 60 | -1.5 | 0.40 | 60.0 / 60.0 | 60, 60, 60, 60 | 10 |"
    )
    sets = pages.sets_of_decoder({"cells": cells}).splitlines()
    assert sets[0] == "| merge | choose, 2 | choose, 4 | report, 2 | report, 4 |"
    assert sets[2:] == ["| iso_c | 60.0 / 60.0 | 60.0 / 60.0 | 60.0 / 60.0 | 60.0 / 60.0 |"]
