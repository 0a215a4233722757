"""A lock beside a recipe: written before a run, checked in CI, and the word of a run that goes by it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from calls import call
from conftest import tiny_llama

RECIPE = """\
base_model: ./base
models:
  - {model: ./a, name: first, prune: {method: dare, density: 0.2}}
  - {model: ./b, name: second}
merge_method: task_arithmetic
parameters: {weight: 1}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a recipe, its lock, and `out`, made of it."""
    folder = tmp_path_factory.mktemp("lock")
    base = tiny_llama(folder / "base", seed=0)
    for seed, name in enumerate(("a", "b"), 1):
        tiny_llama(folder / name, seed=seed, base=base)
    (folder / "r.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "here"))


def test_a_recipe_is_locked_checked_and_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = here / "r.yaml", here / "out"
    code, _, err = call(capsys, "run", recipe, "--out", out, "--locked")
    assert (code, "r.lock: no such lock" in err) == (1, True)
    assert call(capsys, "lock", recipe) == (0, "", f"{here / 'r.lock'}: written; 3 inputs\n")
    written = yaml.safe_load((here / "r.lock").read_text())
    assert (set(written["inputs"]), written["outputs"]) == ({"./base", "./a", "./b"}, {})
    assert call(capsys, "lock", recipe, "--check")[0] == 0
    code, _, err = call(capsys, "run", recipe, "--out", out, "--locked")
    assert (code, "the same bytes" in err) == (0, False)  # nobody knows yet


def test_the_lock_of_a_run_serves_too_and_the_bytes_are_compared(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = here / "r.yaml", here / "out"
    assert call(capsys, "run", recipe, "--out", out)[0] == 0
    shutil.copytree(out, here / "kept")
    for flags in (("--lock", here / "kept"), ("--lock", here / "kept" / "recipe.lock"), ("--locked", "--force")):
        code, _, err = call(capsys, "run", recipe, "--out", out, *flags)
        assert (code, "the same bytes as" in err) == (0, True)
    lock = here / "kept" / "recipe.lock"
    said = yaml.safe_load(lock.read_text())
    said["outputs"]["model.safetensors"]["size"] += 1
    lock.write_text(yaml.safe_dump(said))
    code, _, err = call(capsys, "run", recipe, "--out", here / "other", "--lock", lock, "-q")
    assert (code, f"{here / 'other'}: not the bytes of {lock}: model.safetensors\n" in err) == (1, True)


CHANGES = {
    "a comment, and the order of keys": (lambda t: "# note\nseed: 0\n" + t.replace("seed: 0\n", ""), True),
    "where a named model lies": (lambda t: t.replace("./a,", "./elsewhere,"), True),
    "where the base lies": (lambda t: t.replace("./base", "./elsewhere-base"), True),
    "where the output goes": (lambda t: t + "output: {path: there}\n", True),
    "a density": (lambda t: t.replace("0.2", "0.3"), False),
    "the seed": (lambda t: t.replace("seed: 0", "seed: 1"), False),
    "the name of a model": (lambda t: t.replace("first", "third"), False),
    "which model": (lambda t: t.replace("./a,", "./b,"), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recipe_is_refused_wherever_its_models_lie(
    here: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    recipe = here / "r.yaml"
    recipe.write_text(RECIPE + "seed: 0\n")
    assert call(capsys, "run", recipe, "--out", here / "truth")[0] == 0
    assert call(capsys, "lock", recipe)[0] == 0
    shutil.copytree(here / "a", here / "elsewhere")
    shutil.copytree(here / "base", here / "elsewhere-base")
    edit, same = CHANGES[change]
    recipe.write_text(edit(RECIPE + "seed: 0\n"))
    checked, _, why = call(capsys, "lock", recipe, "--check")
    code, _, err = call(capsys, "run", recipe, "--out", here / "out", "--locked")
    if same:
        assert (checked, code) == (0, 0)
        weights = [(here / name / "model.safetensors").read_bytes() for name in ("truth", "out")]
        assert weights[0] == weights[1]
    else:
        assert (checked, code) == (1, 1)
        assert "r.yaml changed after r.lock was written" in err
        assert "r.yaml changed after r.lock was written" in why


def test_what_is_set_from_outside_is_locked_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, flags = here / "r.yaml", ("--set", "seed=4", "--mergekit-exact")
    assert call(capsys, "lock", recipe, *flags)[0] == 0
    assert call(capsys, "lock", recipe, "--check")[0] == 1
    assert call(capsys, "run", recipe, "--out", here / "out", "--locked", *flags)[0] == 0
    assert call(capsys, "run", recipe, "--out", here / "other", "--locked")[0] == 1


def test_a_changed_input_is_refused_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = here / "r.yaml"
    assert call(capsys, "lock", recipe)[0] == 0
    with (here / "a" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    for command in (("lock", recipe, "--check"), ("run", recipe, "--out", here / "out", "--locked")):
        code, _, err = call(capsys, *command)
        assert (code, "./a: model.safetensors differs" in err) == (1, True)


def test_a_lock_that_others_made_or_changed_is_not_replaced_by_accident(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "r.lock").write_text("mine")
    before = (here / "r.lock").read_text()
    code, _, err = call(capsys, "lock", here / "r.yaml", "--check")
    assert (code, "not a" in err) == (1, True)
    assert (here / "r.lock").read_text() == before
