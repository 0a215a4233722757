"""What other repositories use of this one, the hook and the GitHub Action's script; and which tests are costly."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import costly_tests, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
base_model: ../base
merge_method: ties
models:
  - {model: ../a, parameters: {weight: 0.5}}
  - {model: ../b, parameters: {weight: 0.5}}
parameters: {density: 0.5}
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    base = tiny_llama(tmp_path / "base", seed=0)
    tiny_llama(tmp_path / "a", seed=1, base=base)
    tiny_llama(tmp_path / "b", seed=2, base=base)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "merge.yaml").write_text(RECIPE)
    return tmp_path


def environment(repository: Path, **more: str) -> dict[str, str]:
    """The action's, with `deltamerge` of this interpreter first on the path."""
    program = repository / "bin" / "deltamerge"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m deltamerge "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    python = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    git = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CEILING_DIRECTORIES": str(repository.parent)}
    ours = {name: value for name, value in os.environ.items() if name != "GITHUB_ACTIONS"}
    return {**ours, "PATH": path, "PYTHONPATH": python, **git, **more}


def action(repository: Path, **inputs: str) -> tuple[int, str, str]:
    steps = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    command = steps[-1]["run"].replace("$GITHUB_ACTION_PATH", str(ROOT))
    summary = repository / "summary.md"
    folder = repository / inputs.pop("cd", ".")
    summary.unlink(missing_ok=True)
    env = environment(repository, GITHUB_STEP_SUMMARY=str(summary), **{"RECIPES": "recipes/*.yaml", **inputs})
    done = subprocess.run(command, shell=True, cwd=folder, env=env, stdout=-1, stderr=-2, text=True, check=False)
    return done.returncode, summary.read_text() if summary.exists() else "", done.stdout


def test_the_action_posts_the_plan(repository):
    code, summary, said = action(repository)
    assert code == 0, said
    assert "### recipes/merge.yaml" in summary
    assert "```mermaid\nflowchart LR" in summary
    assert "model.norm.weight" in summary


def test_the_action_posts_what_a_branch_changes(repository):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(repository)]
    env = environment(repository)
    for words in (["init", "-q"], ["add", "recipes"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True, env=env)
    assert action(repository, AGAINST="HEAD") == (0, "", "recipes/merge.yaml: ok, 21 tensors, 43.3 kB\n")
    (repository / "recipes" / "merge.yaml").write_text(RECIPE.replace("ties", "dare_ties"))
    code, summary, said = action(repository, AGAINST="HEAD")
    assert code == 0, said
    assert summary.startswith("### recipes/merge.yaml\n")
    assert "| merge_method | ties | dare_ties |" in summary
    assert sorted(p.name for p in (repository / "recipes").iterdir()) == ["merge.yaml"]


@pytest.mark.parametrize("offline", ["true", "false"])
def test_the_action_fails_with_line_and_column(repository, offline):
    (repository / "recipes" / "merge.yaml").write_text(RECIPE.replace("density", "densty"))
    code, summary, said = action(repository, OFFLINE=offline)
    assert code == 1
    assert "recipes/merge.yaml:6:14: parameters.densty" in said
    assert summary == ""


def test_the_action_annotates_the_line_and_goes_on_to_the_good_recipes(repository):
    (repository / "recipes" / "bad.yaml").write_text(RECIPE.replace("density", "densty"))
    code, summary, said = action(repository, GITHUB_ACTIONS="true")
    assert code == 1
    stop, begin, annotation, again, end = said.strip().split("\n")
    assert annotation.startswith(
        "::error file=recipes/bad.yaml,line=6,col=14,title=deltamerge::parameters.densty: unknown"
    )
    assert (again, end) == (stop, begin)
    assert stop == f"::stop-commands::{begin.strip(':')}"
    assert "### recipes/merge.yaml" in summary
    assert "model.norm.weight" in summary
    assert "### recipes/bad.yaml" not in summary


HOSTILE = {
    "a command": "$(touch pwned).yaml", "ticks": "`touch pwned`.yaml", "sed": "x|e touch pwned\n#.yaml",
    "an option": "--help.yaml", "lines": "a\n::set-env name=A::b\n.yaml", "spaces": " a  b ;touch pwned; .yaml",
    "markup": "![x](y)<img src=x>|@all.yaml", "escapes": "\x1b[2J\u202egnp.yaml",
}  # fmt: skip


@pytest.mark.parametrize("against", [pytest.param(ref, marks=pytest.mark.slow) for ref in ("HEAD", "")])
def test_names_of_files_are_data(repository, against):
    folder = repository / "recipes"
    (folder / "merge.yaml").rename(folder / "safe.yaml")
    for name in HOSTILE.values():
        (folder / name).write_text(RECIPE)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(repository)]
    for words in (["init", "-q"], ["add", "recipes"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True, env=environment(repository))
    for name in HOSTILE.values():
        (folder / name).write_text(RECIPE.replace("ties", "dare_ties"))
    bare = {"cd": "recipes", "RECIPES": "*.yaml", "AGAINST": against, "GITHUB_ACTIONS": "true"}
    code, summary, said = action(repository, **bare)
    assert code == 0, said
    first, *log, last = said.strip().split("\n")
    token = first.removeprefix("::stop-commands::")
    assert (len(token), last) == (32, f"::{token}::")
    headings = [line for line in summary.splitlines() if line.startswith("### ")]
    assert len(headings) == len(HOSTILE) + (not against)
    assert "### --help.yaml" in headings
    assert r"### \!\[x\](y)\<img src=x\>\|\@all.yaml" in headings
    for line in [*log, *summary.splitlines()]:
        assert not line.lstrip().startswith("::"), line
        assert "\x1b" not in line
        assert "\u202e" not in line
    assert not list(repository.rglob("pwned*"))
    assert not [path for path in folder.iterdir() if path.name.startswith(".before")]


def test_the_action_needs_a_recipe(repository):
    code, _, said = action(repository, RECIPES="nothing/*.yaml")
    assert code == 1
    assert "no recipe matches nothing/*.yaml" in said


def test_offline_the_action_opens_no_model(repository):
    (repository / "a" / "model.safetensors").unlink()
    assert action(repository)[0] == 1
    assert action(repository, OFFLINE="true")[:2] == (0, "")


def test_the_hook_takes_recipes_and_refuses_a_typo(repository):
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["id"] == "deltamerge-check"
    assert [bool(re.search(hook["files"], p)) for p in ("recipes/a.yaml", "x/recipe/a.yml", "docs/a.yaml")] == [
        True,
        True,
        False,
    ]
    recipe = repository / "recipes" / "merge.yaml"
    run = {"cwd": repository, "env": environment(repository), "capture_output": True, "check": False}
    assert subprocess.run([*shlex.split(hook["entry"]), str(recipe)], **run).returncode == 0
    recipe.write_text(RECIPE.replace("ties", "tise"))
    assert subprocess.run([*shlex.split(hook["entry"]), str(recipe)], **run).returncode == 1


def test_costly_tests_are_those_that_there_are() -> None:
    """A line of a test that has another name now would leave that one in the everyday suite."""
    there = [
        f"{file.name}::{name}"
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    ]
    listed = costly_tests()
    assert len(listed) > 100
    assert sorted(set(listed) - set(there)) == []
    assert [name for name, count in Counter(there).items() if count > 1 and name in listed] == []
