"""Advice with rows of the base: what merges forget is measured beside what the fine-tunes forget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import yaml
from calls import call
from conftest import load_tensors, tiny_bert_pair, tiny_llama
from running import run
from vocabularies import three_models, vocab_of

import deltamerge
from deltamerge.apps.recommend import merge as merge_advice
from deltamerge.apps.recommend.advised import AdvisedMerge, in_five_lines
from deltamerge.apps.recommend.merge import ARITHMETIC, ISO_C, best_first, mean_lost, recommend_merge, standing
from deltamerge.apps.search.judge import THE_BASE
from deltamerge.calibrate.rows.splits import split
from deltamerge.calibrate.spec import KEPT_WEIGHT
from deltamerge.errors import InputError, RecipeError, UsageError
from deltamerge.recipe.schema import Calibration
from deltamerge.run.options import Options

OPTIONS = Options(device="cpu", workers=1)
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
ROWS = {"sequences": 8, "length": 10}


def texts(path: Path, first: int, count: int = 16) -> Path:
    lines = [" ".join(f"w{first + (7 * i + 3 * j) % 9}" for j in range(4 + i % 5)) for i in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keep")
    base = tiny_llama(folder / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate("ab", 1):
        tiny_llama(folder / name, seed=seed, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    (folder / "rows").mkdir()
    for i, name in enumerate("ab"):
        texts(folder / "rows" / f"{name}.jsonl", 5 + 10 * i)
    texts(folder / "kept.jsonl", 11)
    return folder


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with tokens of their own, some in another order."""
    folder = three_models(tmp_path_factory.mktemp("joined"))
    (folder / "rows").mkdir()
    for i, name in enumerate("ab"):
        texts(folder / "rows" / f"{name}.jsonl", 5 + 10 * i)
    texts(folder / "kept.jsonl", 11)
    return folder


def distances(folder: Path, tensors: dict[str, torch.Tensor], parts: list[list[str]]) -> np.ndarray:
    """The base's mean distance from these tensors, by transformers in float64, over the texts of each part."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    logits = []
    for state in (load_tensors(folder / "base"), tensors):
        model.load_state_dict({name: tensor.double() for name, tensor in state.items()}, strict=False)
        for text in (text for part in parts for text in part):
            given = tokenizer(text, truncation=True, max_length=10, return_tensors="pt")
            with torch.no_grad():
                logits.append(model(input_ids=given["input_ids"]).logits[0].numpy())
    own, others = iter(logits[: len(logits) // 2]), iter(logits[len(logits) // 2 :])
    found = [[reference.token_divergence(next(others), next(own)) for _ in part] for part in parts]
    return np.array([np.concatenate(of_part).mean() for of_part in found])


def in_base(folder: Path, made: Path) -> dict[str, torch.Tensor]:
    """A model's tensors with rows in the order of the base's tokens."""
    tensors, ids, base = load_tensors(made), vocab_of(made), load_tensors(folder / "base")
    for name in TABLES:
        rows = base[name].clone()
        for token, i in vocab_of(folder / "base").items():
            rows[i] = tensors[name][ids[token]] if token in ids else rows[i]
        tensors[name] = rows
    return tensors


@pytest.mark.parametrize("of", ["folder", "joined"])
def test_what_a_merge_forgets_is_a_share_of_what_the_fine_tunes_forget(
    request: pytest.FixtureRequest, of: str, tmp_path: Path, monkeypatch
) -> None:
    folder: Path = request.getfixturevalue(of)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(merge_advice, "WAYS", (ARITHMETIC,))
    rows = [{"data": f"rows/{name}.jsonl", **ROWS} for name in "ab"]
    advice = recommend_merge(
        ["a", "b"], "base", calibration=rows, keep={"data": "kept.jsonl", **ROWS}, fit=False, options=OPTIONS
    )
    (one,) = advice.candidates
    assert list(one.lost) == ["a", "b", THE_BASE]
    assert one.lost_mean == pytest.approx(
        (one.lost["a"] + one.lost["b"] + KEPT_WEIGHT * one.lost[THE_BASE]) / (2 + KEPT_WEIGHT)
    )
    recipe = yaml.safe_load(advice.recipe)
    assert [model["name"] for model in recipe["models"]] == ["a", "b"]  # nothing is fitted to its rows
    recipe["base_model"] = str(folder / "base")
    for model in recipe["models"]:
        model["model"] = str(folder / model["model"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"dtype": "float32"}))
    out = run(tmp_path / "recipe.yaml", tmp_path / "out").folder
    shown = in_base if of == "joined" else lambda _, made: load_tensors(made)
    models = (out, folder / "a", folder / "b")
    calibration = Calibration.model_validate({"data": "kept.jsonl", **ROWS})
    split_rows = split(calibration, folder, 0, json.loads((folder / "base/config.json").read_text()), labelled=False)
    parts = [[row.content for row in part] for part in split_rows]
    merged, *tunes = (distances(folder, shown(folder, made), parts) for made in models)
    assert one.lost[THE_BASE] == pytest.approx(np.mean(merged / np.mean(tunes, 0)), rel=1e-3)


def test_a_merge_keeps_rows_of_the_base(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Coefficients are fitted to them once, and the line about what is kept says what is forgotten."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(merge_advice, "WAYS", (ISO_C,))
    monkeypatch.setattr(merge_advice, "SCOPES", ("layer",))
    asked = ["merge", "a", "b", "--base", "base", "--rows", "rows", "--length", "10", "--workers", "1"]
    code, said, err = call(capsys, *asked, "--keep", "kept.jsonl", "--out", tmp_path / "out")
    assert code == 0, err
    assert "+ coefficients by layer" in said
    assert "; forgets " in said.splitlines()[2]
    assert "--keep" not in said.splitlines()[4]
    recipe = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert recipe["models"][2]["calibration"]["sequences"] == 16
    assert (tmp_path / recipe["models"][2]["calibration"]["data"]).resolve() == folder / "kept.jsonl"
    lock = yaml.safe_load((tmp_path / "out" / "recipe.lock").read_text())
    assert "of the base as a share of theirs" in lock["calibration"]["merge"]["held_out"]["measure"]
    code, said, _ = call(
        capsys, "recommend", "a", "b", "--base", "base", "--calibration", "rows/a.jsonl", "--calibration",
        "rows/b.jsonl", "--keep", "kept.jsonl", "--sequences", "8", "--length", "10", "--workers", "1", "--no-fit",
    )  # fmt: skip
    assert code == 0
    assert "on rows of the base it leaves the base" in said


def candidate(lost: dict[str, float]) -> Any:
    forecast = merge_advice.SkillForecast.model_construct(model="a", share=0.8, by="texts")
    return merge_advice.MergeCandidate.model_construct(
        name="x", lost=lost, lost_mean=mean_lost(lost), forecast=[forecast], agreement={}
    )


def test_of_merges_that_keep_skills_alike_the_one_that_forgets_less_is_chosen() -> None:
    less, more = candidate({"a": 0.3, THE_BASE: 0.2}), candidate({"a": 0.3, THE_BASE: 1.4})
    assert standing(less) == pytest.approx((0.8 + KEPT_WEIGHT * 0.8) / (1 + KEPT_WEIGHT))
    assert standing(more) == pytest.approx(0.8 / (1 + KEPT_WEIGHT))
    assert best_first({ISO_C: more, ARITHMETIC: less}) == [ARITHMETIC, ISO_C]


def test_rows_to_keep_are_refused_where_they_have_no_effect(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(merge_advice, "measure", lambda *_, **__: pytest.fail("measured"))
    code, _, err = call(capsys, "merge", "a", "b", "--base", "base", "--keep", "kept.jsonl", "--out", tmp_path / "out")
    assert (code, "--keep is measured beside rows" in err) == (2, True)
    code, _, err = call(capsys, "recommend", "a", "--base", "base", "--density", "0.1", "--keep", "kept.jsonl")
    assert (code, "several MODELS" in err) == (2, True)
    with pytest.raises(UsageError, match=r"keep: kept\.jsonl: is a path"):
        deltamerge.merge(["a", "b"], tmp_path / "out", base="base", keep="kept.jsonl")
    with pytest.raises(UsageError, match="nothing to keep"):
        deltamerge.recommend("a", "base", density=0.1, keep={"data": "kept.jsonl"})
    with pytest.raises(UsageError, match="--keep is measured beside rows of the models"):
        deltamerge.recommend(["a", "b"], "base", keep={"data": "kept.jsonl"})
    with pytest.raises(UsageError, match="keep is of a merge whose method is chosen"):
        deltamerge.merge(["a", "b"], tmp_path / "out", base="base", method="ties", keep={"data": "kept.jsonl"})
    rows = [{"data": "rows/a.jsonl", **ROWS}]
    with pytest.raises(InputError, match=r"none\.jsonl"):
        recommend_merge(["a", "b"], "base", calibration=rows, keep={**ROWS, "data": "none.jsonl"}, options=OPTIONS)
    with pytest.raises(RecipeError, match=r"models\[2\].calibration.lenght: unknown key"):
        recommend_merge(["a", "b"], "base", calibration=rows, keep={"data": "x.jsonl", "lenght": 3}, options=OPTIONS)
    tiny_bert_pair(tmp_path, dtype=torch.float32, tokenizer=True)
    shutil.copytree(tmp_path / "tuned", tmp_path / "other")
    models = [str(tmp_path / name) for name in ("tuned", "other")]
    with pytest.raises(InputError, match="BertModel answers with no tokens"):
        recommend_merge(models, str(tmp_path / "base"), calibration=rows, keep=rows[0], options=OPTIONS)


def test_a_language_model_s_merge_names_the_way_to_forget_less() -> None:
    found = candidate({"a": 0.3})
    for lost, by, said in (
        ({"a": 0.3}, "texts", True),
        ({"a": 0.3}, "answers", False),
        ({"a": 0.3, THE_BASE: 0.1}, "texts", False),
    ):
        forecast = [found.forecast[0].model_copy(update={"by": by, "low": 0.7, "high": 0.9, "loss": "none"})]
        advice = merge_advice.MergeAdvice.model_construct(
            method="x",
            factor=1.0,
            why=[],
            forecast=forecast,
            candidates=[found.model_copy(update={"lost": lost, "coefficients": None})],
            rescue=[],
            head=None,
        )
        lines = in_five_lines(AdvisedMerge(advice, Path("out.yaml"), Path("out"), OPTIONS))
        assert ("--keep FILE" in lines[4]) == said
        assert ("forgets 10%" in lines[2]) == (THE_BASE in lost)
