"""The first recipe, offline checks, shell completion and the versions of a bug report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_llama
from test_cli import call

from deltamerge.recipe import loads


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    base = tiny_llama(tmp_path / "models" / "base", seed=0)
    tiny_llama(tmp_path / "models" / "math", seed=1, base=base)
    tiny_llama(tmp_path / "models" / "it's: code", seed=2, base=base)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one two"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("out", ["recipe.yaml", "recipes/first.yaml", "models/first.yaml"])
@pytest.mark.parametrize("models", [["models/math"], ["models/math", "models/it's: code"]])
def test_the_first_recipe_runs(folder, capsys, models, out):
    Path(out).parent.mkdir(exist_ok=True)
    code, printed, err = call(capsys, "init", *models, "--base", "models/base", "--out", out)
    assert (code, printed) == (0, "")
    assert out in err
    code, _, err = call(capsys, "run", out, "-q")
    assert (code, err) == (0, "")
    assert (Path(out).parent / "merged" / "model.safetensors").exists()


def test_calibration_data_gives_a_calibrated_q(folder, capsys):
    arguments = ["init", "models/math", "--base", "models/base", "--calibration", "text.jsonl", "--out", "-"]
    code, text, _ = call(capsys, *arguments)
    assert code == 0
    recipe = loads(text)
    assert recipe.prune.q == "output_change"
    assert recipe.calibration.data == "./text.jsonl"
    assert not Path("recipe.yaml").exists()


def test_nothing_of_the_users_is_overwritten(folder, capsys):
    Path("recipe.yaml").write_text("mine")
    code, _, err = call(capsys, "init", "models/math", "--base", "models/base")
    assert code == 1
    assert "recipe.yaml: is there already" in err
    assert Path("recipe.yaml").read_text() == "mine"


def test_a_model_that_is_not_there_is_named(folder, capsys):
    code, _, err = call(capsys, "init", "./nowhere/at/all", "--base", "models/base")
    assert code == 1
    assert "./nowhere/at/all" in err
    assert not Path("recipe.yaml").exists()


def test_offline_checks_the_recipe_and_opens_no_model(folder, capsys):
    call(capsys, "init", "models/math", "--base", "models/base")
    shutil.rmtree("models")
    assert call(capsys, "check", "recipe.yaml")[0] == 1
    code, _, err = call(capsys, "check", "--offline", "recipe.yaml")
    assert (code, err) == (0, "recipe.yaml: ok\n")
    Path("recipe.yaml").write_text("merge_method: tie\n")
    assert call(capsys, "check", "--offline", "recipe.yaml")[0] == 1


def complete(folder: Path, *words: str) -> list[str]:
    env = {**os.environ, "_DELTAMERGE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["deltamerge", *words])}
    env["COMP_CWORD"] = str(len(words))
    done = subprocess.run(
        [sys.executable, "-c", "from deltamerge.cli import main; main([])"],
        env=env, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_the_shell_completes_commands_and_recipes(folder):
    (folder / "a.yaml").touch()
    (folder / "b.yml").touch()
    (folder / "c.txt").touch()
    (folder / "models" / "d.yaml").touch()
    assert complete(folder, "pl") == ["plan"]
    assert complete(folder, "plan", "") == ["a.yaml", "b.yml", "models/"]
    assert complete(folder, "run", "models/d") == ["models/d.yaml"]
    assert complete(folder, "run", "nowhere/d") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_variable(capsys, shell):
    code, out, _ = call(capsys, "completion", shell)
    assert code == 0
    assert "_DELTAMERGE_COMPLETE" in out


def test_the_version_names_what_matters_in_a_bug_report(capsys):
    code, out, _ = call(capsys, "--version")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} >= {"deltamerge", "python", "torch", "safetensors", "numba"}
