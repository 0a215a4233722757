"""Candidates and advice where the models' vocabularies differ: every fine-tune runs with its own tokens' rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from calls import call
from conftest import load_tensors
from running import run
from safetensors.torch import save_file
from vocabularies import three_models, vocab_of

from deltamerge.apps.recommend import merge as merge_advice
from deltamerge.apps.recommend.merge import ARITHMETIC, JOINED, SVC
from deltamerge.apps.search.candidates import candidates_in
from deltamerge.apps.search.judge import StudyJudge
from deltamerge.errors import InputError
from deltamerge.recipe.load import loads
from deltamerge.recipe.schema import Recipe, Study
from deltamerge.run.options import Options

OPTIONS = Options(device="cpu", workers=1)
TOKEN_ROWS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two models with tokens of their own, of which b has some in another order; b has padding, too."""
    folder = three_models(tmp_path_factory.mktemp("vocabularies"))
    for name, special in (("a", "<|im_start|>"), ("b", "<tool>")):
        texts = [{"text": f"{special} w{i} w{i + 1} w{(7 * i) % 40} w20 w21"} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, texts)) + "\n")
    return folder


def recipe(source: str, weight: float = 0.5) -> Recipe:
    models = [
        {"model": name, "parameters": {"weight": weight},
         "calibration": {"data": f"{name}.jsonl", "sequences": 6, "length": 8}}
        for name in ("a", "b")
    ]  # fmt: skip
    made = {"base_model": "base", "merge_method": "task_arithmetic", "models": models, "tokenizer_source": source}
    return loads(yaml.safe_dump(made | {"dtype": "float32"}))


def test_a_fine_tune_runs_with_the_rows_of_its_own_tokens(folder: Path, tmp_path: Path) -> None:
    source = recipe("union")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(absolute(source, folder)))
    out = run(tmp_path / "recipe.yaml", tmp_path / "out").folder
    merged, ids = load_tensors(out), vocab_of(out)
    candidates = candidates_in(folder, OPTIONS, pickles=False)
    judge = StudyJudge(candidates, source, Study.model_validate({}), [])
    walk = judge.walk([candidates.of(source)])
    base = load_tensors(folder / "base")
    for index, name in enumerate(("a", "b")):
        given = walk.weights(0, index, judge.tasks[index])(TOKEN_ROWS)
        of_base = judge._base(index)(TOKEN_ROWS)
        own = vocab_of(folder / name)
        for tensor in TOKEN_ROWS:
            assert given[tensor].shape == load_tensors(folder / name)[tensor].shape
            for token, i in own.items():
                assert torch.equal(given[tensor][i], merged[tensor][ids[token]]), (name, token)
                if token in vocab_of(folder / "base"):
                    assert torch.equal(of_base[tensor][i], base[tensor][vocab_of(folder / "base")[token]])
    judge.close()


def absolute(source: Recipe, folder: Path) -> dict[str, object]:
    data = json.loads(json.dumps(source.source.data))
    data["base_model"] = str(folder / data["base_model"])
    for one in data["models"]:
        one["model"] = str(folder / one["model"])
        del one["calibration"]
    return dict(data)


def test_regmean_measures_inputs_as_where_all_have_the_vocabulary_of_the_base(folder: Path, tmp_path: Path) -> None:
    """Rows of tokens that all models have give the layers the same inputs, whatever the tokens' numbers."""
    texts = [{"text": f"w{i % 9} w{(3 * i) % 9} w20 w21 w{11 + i % 9}"} for i in range(24)]
    made = {"merge_method": "regmean", "dtype": "float32", "base_model": str(folder / "base")}
    of_base, shared = vocab_of(folder / "base"), load_tensors(folder / "base")
    models, alike = [], []
    for name in ("a", "b"):
        rows, own = tmp_path / f"{name}.jsonl", vocab_of(folder / name)
        rows.write_text("\n".join(map(json.dumps, texts)) + "\n")
        tensors = load_tensors(folder / name)
        for tensor in TOKEN_ROWS:
            moved = shared[tensor].clone()
            for token, i in of_base.items():
                moved[i] = tensors[tensor][own[token]] if token in own else moved[i]
            tensors[tensor] = moved
        shutil.copytree(folder / "base", tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        one = {"calibration": {"data": str(rows), "sequences": 8, "length": 8}, "parameters": {"weight": 1.0}}
        models.append({"model": str(folder / name), **one})
        alike.append({"model": str(tmp_path / name), **one})
    found = []
    for kind, some in (("joined", {"models": models, "tokenizer_source": "union"}), ("alike", {"models": alike})):
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(made | some))
        found.append(load_tensors(run(tmp_path / f"{kind}.yaml", tmp_path / kind).folder))
    for name in found[0].keys() - set(TOKEN_ROWS):
        assert torch.equal(found[0][name], found[1][name]), name


def test_an_output_that_lacks_a_token_is_not_judged(folder: Path) -> None:
    """b has as many rows as a, so that their numbers alone do not tell."""
    assert len({load_tensors(folder / name)[TOKEN_ROWS[0]].shape for name in "ab"}) == 1
    with pytest.raises(InputError, match="b: the output lacks some of its rows") as refused:
        candidates_in(folder, OPTIONS, pickles=False).of(recipe("a"))
    assert "tokenizer_source: union" in str(refused.value.hint)


@pytest.mark.parametrize("rows", [False, True])
def test_a_merge_of_models_with_other_tokens_has_the_tokens_of_all(
    folder: Path, tmp_path: Path, capsys, monkeypatch, rows: bool
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(merge_advice, "WAYS", (ARITHMETIC, SVC))
    asked = ["--rows", ".", "--sequences", "6", "--length", "8"] if rows else []
    code, said, err = call(
        capsys, "merge", "a", "b", "--base", "base", "--out", tmp_path / "out", *asked, "--workers", "1"
    )
    assert code == 0, err
    assert JOINED in err
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["tokenizer_source"] == "union"
    tokens = set().union(*(vocab_of(folder / name) for name in ("base", "a", "b")))
    assert vocab_of(tmp_path / "out").keys() == tokens
    assert len(load_tensors(tmp_path / "out")[TOKEN_ROWS[0]]) == len(tokens)
    assert ("it answers as the fine-tunes do" in said) == rows


def test_keys_that_choose_the_tokens_are_kept(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    advice, _ = merge_advice.merge_advice(["a", "b"], "base", keys={"tokenizer_source": "base"}, options=OPTIONS)
    assert yaml.safe_load(advice.recipe)["tokenizer_source"] == "base"
    assert JOINED not in advice.warnings
    assert np.isfinite(advice.evidence.cosine_mean)
