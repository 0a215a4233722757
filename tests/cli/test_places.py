"""Places that commands are given: ~, a hub, a folder that takes no files; and names like numbers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from calibration_rows import rows
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama

import deltamerge
from deltamerge.apps.recommend import merge as advice
from deltamerge.apps.recommend.merge import ARITHMETIC
from deltamerge.errors import OutputError
from deltamerge.files.descriptors import check_folder
from deltamerge.recipe.load import loads
from deltamerge.recipe.yaml_source import dumped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    base = tiny_llama(folder / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate(("1e-5", "5e-5"), 1):
        tiny_llama(folder / name, seed=seed, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(folder / "calib.jsonl")
    return folder


@pytest.mark.parametrize(
    "name", ["1e-5", "1E5", ".5e3", "true", "~", "0x1F", "12:30", "1_000", "2024-01-01", "<<", "no"]
)
def test_text_that_looks_like_a_number_is_text_in_a_written_recipe(name: str) -> None:
    text = dumped({"base_model": "base", "merge_method": "linear", "models": [{"model": "m", "name": name}]})
    assert loads(text).models[0].name == name
    assert yaml.safe_load(text)["models"][0]["name"] == name
    assert yaml.safe_load(dumped({"x": 1e-5, "y": 3, "z": None})) == {"x": 1e-5, "y": 3, "z": None}


def test_models_may_be_named_like_numbers(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(advice, "WAYS", (ARITHMETIC,))
    few = ["--length", "12", "--sequences", "8", "--workers", "1"]
    for asked in (
        ["merge", "1e-5", "5e-5", "--base", "base", "--rows", "calib.jsonl", *few, "--no-fit", "--out", tmp_path / "m"],
        ["bisect", tmp_path / "m.yaml", "--rows", "calib.jsonl", *few],
        ["recommend", "1e-5", "--base", "base", "--density", "0.5"],
        ["extract", "1e-5", "--base", "5e-5", "--out", tmp_path / "d", "-q"],
        ["convert", "1e-5", tmp_path / "c", "-q"],
    ):
        code, _, err = call(capsys, *asked)
        assert code == 0, (asked[0], err)
    assert [one["name"] for one in yaml.safe_load((tmp_path / "m.yaml").read_text())["models"]] == ["1e-5", "5e-5"]
    made = deltamerge.merge(["1e-5", "5e-5"], tmp_path / "p", method="linear", parameters={"weight": 1.0}, workers=1)
    assert made.lock["outputs"]


def test_the_home_folder_is_meant_wherever_a_path_is_given(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(folder, home)
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.setattr(advice, "WAYS", (ARITHMETIC,))
    few = ["--length", "12", "--sequences", "8", "--workers", "1", "--no-fit"]
    code, _, err = call(
        capsys, "merge", "~/1e-5", "~/5e-5", "--base=~/base", "--rows=~/calib.jsonl", "--out=~/made", *few
    )
    assert code == 0, err
    recipe = {"base_model": "~/base", "merge_method": "regmean", "output": {"path": "~/regmean"}}
    one = {"calibration": {"data": "~/calib.jsonl", "sequences": 8, "length": 12}}
    (here / "r.yaml").write_text(
        dumped(recipe | {"models": [{"model": f"~/{name}", **one} for name in ("1e-5", "5e-5")]})
    )
    code, _, err = call(capsys, "run", "r.yaml", "--workers", "1")
    assert code == 0, err
    assert {"made", "made.yaml", "regmean"} <= {path.name for path in home.iterdir()}
    assert [path.name for path in here.iterdir()] == ["r.yaml"]


def test_nothing_is_measured_for_a_place_that_takes_no_files(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(advice, "measure", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr("deltamerge.apps.search.evaluate.measured", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    models, data = ["1e-5", "5e-5", "--base", "base"], ["--calibration", "calib.jsonl", "--length", "12"]
    for asked, said in (
        (
            ["merge", *models, "--out", tmp_path / "file/x"],
            "file: cannot be written: a file is where a folder should be",
        ),
        (["merge", *models, "--out", "hf://org/name"], "hf:/org/name: is no folder here"),
        (["run", "r.yaml", "--out", "hf://org/name"], "deltamerge push FOLDER org/name"),
        (["recommend", *models, *data, "--out", "nowhere/r.yaml"], "nowhere: cannot be written: no such folder"),
        (["recommend", "1e-5", "--base", "base", "--density", "0.5", "--out", "nowhere/r.yaml"], "nowhere: cannot"),
        (["eval", "1e-5", *data, "--out", "nowhere/s.jsonl"], "nowhere: cannot be written: no such folder"),
    ):
        (folder / "r.yaml").write_text(dumped({"base_model": "base", "models": [{"model": "1e-5"}]}))
        code, _, err = call(capsys, *asked)
        assert (code, said in err) == (1, True), err
    assert not list(folder.glob("hf*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_leave_to_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="permission denied"):
        check_folder(tmp_path / "new" / "folder", makes=True)


def test_a_folder_is_checked_as_it_is_made(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b", makes=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="a: cannot be written: no such folder") as caught:
        check_folder(tmp_path / "a", "make it")
    assert caught.value.hint == "make it"


def test_scores_are_not_written_into_a_file_of_one_line(folder: Path, tmp_path: Path, capsys) -> None:
    pair = tmp_path / "pair"
    tiny_bert_pair(pair, dtype=torch.float32, tokenizer=True)
    data = ["--calibration", folder / "calib.jsonl", "--length", "12", "--sequences", "5"]
    scores = tmp_path / "scores.jsonl"
    assert call(capsys, "eval", pair / "tuned", *data, "--out", scores)[0] == 0
    whole = scores.read_text()
    for cut in (5, len(whole) // 2, len(whole) - 1):  # a line that was cut short is written again
        scores.write_text(whole + whole[:cut])
        assert call(capsys, "eval", pair / "tuned", *data, "--out", scores)[0] == 0
        scores.write_text(whole[:cut])
        assert call(capsys, "eval", pair / "tuned", *data, "--out", scores)[0] == 0
        assert scores.read_text() == whole
    for text in ('{"text": "one row"}', "one line of prose", '{"k', "x\n"):
        scores.write_text(text)
        code, _, err = call(capsys, "eval", pair / "tuned", *data, "--out", scores)
        if text == '{"k':  # as a line of scores begins
            assert (code, scores.read_text()) == (0, whole)
            continue
        assert (code, "is no line of scores" in err) == (1, True)
        assert scores.read_text() == text


def test_heads_of_other_labels_are_no_rows_of_a_vocabulary(tmp_path: Path, capsys) -> None:
    tiny_bert_pair(tmp_path, dtype=torch.float32, tokenizer=True)
    tensors = load_tensors(tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    shutil.copytree(tmp_path / "tuned", tmp_path / "three")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    make_checkpoint(tmp_path / "three", tensors)
    labels = {"id2label": {str(i): str(i) for i in range(3)}, "label2id": {str(i): i for i in range(3)}}
    (tmp_path / "three" / "config.json").write_text(json.dumps(config | labels))
    shutil.copytree(tmp_path / "tuned", tmp_path / "headed")
    models = [{"model": f"./{name}", "parameters": {"weight": 0.5}} for name in ("tuned", "three")]
    recipe = {"base_model": "./headed", "merge_method": "task_arithmetic", "models": models}
    for more in ({}, {"tokenizer_source": "base"}):
        (tmp_path / "r.yaml").write_text(dumped(recipe | more))
        code, _, err = call(capsys, "check", tmp_path / "r.yaml")
        assert (code, "the models' heads have different labels" in err) == (1, True), err
        assert "hint: name a base without a head" in err
    (tmp_path / "r.yaml").write_text(dumped(recipe | {"base_model": "./base"}))
    assert call(capsys, "run", tmp_path / "r.yaml", "--out", tmp_path / "out")[0] == 0
    assert torch.equal(
        load_tensors(tmp_path / "out")["classifier.weight"], load_tensors(tmp_path / "tuned")["classifier.weight"]
    )


def test_options_about_rows_need_rows(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for option in (["--text", "x"], ["--sequences", "5"], ["--length", "7"]):
        code, _, err = call(capsys, "merge", "1e-5", "5e-5", "--base", "base", "--out", tmp_path / "x", *option)
        assert (code, f"{option[0]} needs --rows" in err) == (2, True)
    code, _, err = call(capsys, "eval", "1e-5", "--calibration", "calib.jsonl", "--csv", "--json")
    assert (code, "--json and --csv" in err) == (2, True)
    code, _, err = call(
        capsys, "merge", "1e-5", "5e-5", "--base", "base", "--out", tmp_path / "x", "--rows", "base/config.json"
    )
    assert (code, "is no .jsonl, .csv, .txt or .parquet file" in err) == (1, True)
