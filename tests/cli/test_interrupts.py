"""Ctrl-C says what it leaves, for every command that writes; and a full disk where its work lies."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call
from conftest import tiny_llama

from deltamerge.formats.safetensors import Writer

NOTHING = "interrupted: nothing new is kept: run the command again\n"
RECIPE = """\
base_model: ./base
merge_method: task_arithmetic
models: [{model: ./a, parameters: {weight: 0.5}}, {model: ./b, parameters: {weight: 0.5}}]
"""
CALIBRATED = """\
base_model: ./base
models: [{model: ./a, prune: {method: magnitude, density: 0.1, q: output_change}}]
calibration: {data: rows.txt, sequences: 6, length: 8}
"""
SWEPT = "base_model: ./base\nmodels: [{model: ./a, prune: {method: dare, density: {sweep: [0.5, 0.1]}}}]\n"
SEARCHED = "base_model: ./base\nmodels: [{model: ./a, parameters: {weight: {search: [0, 1]}}}]\n"
JUDGED = "calibration: {data: rows.txt, sequences: 6, length: 8}\nstudy: {objective: agreement}\n"
STEPS = """\
name: first
merge_method: linear
models: [{model: ./a, parameters: {weight: 1}}, {model: ./b, parameters: {weight: 1}}]
---
base_model: ./base
merge_method: task_arithmetic
models: [{model: first, parameters: {weight: 1}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate("ab", 1):
        tiny_llama(tmp_path / name, seed=seed, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    (tmp_path / "rows.txt").write_text("\n".join(f"w{5 + i} w{6 + i} w{7 + i}" for i in range(30)))
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def breaks(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, *, at: int = 1) -> None:
    """Let the call number `at` of a function raise an error; the ones before it are made."""
    module, _, name = where.rpartition(".")
    parts = module.split(":")
    target: Any = __import__(parts[0], fromlist=["_"])
    for part in parts[1:]:
        target = getattr(target, part)
    made, calls = getattr(target, name), iter(range(1, at))

    def broken(*arguments: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return made(*arguments, **named)

    monkeypatch.setattr(target, name, broken)


WEIGHTS = "deltamerge.run.runner.make_weights"


@pytest.mark.parametrize(
    ("arguments", "recipe", "where"),
    [
        (["run", "r.yaml"], RECIPE, WEIGHTS),
        (["run", "r.yaml"], RECIPE, "deltamerge.run.plans:Planner.plans"),
        (["run", "r.yaml", "--set", "output.kind=delta"], RECIPE, WEIGHTS),
        (["run", "r.yaml", "--set", "output.kind=peft", "--set", "output.rank=2"], RECIPE, WEIGHTS),
        (["extract", "a", "base", "--out", "d"], RECIPE, WEIGHTS),
        (["extract", "a", "base", "--lora", "2", "--out", "d"], RECIPE, WEIGHTS),
        (["convert", "a", "d", "--dtype", "bfloat16"], RECIPE, WEIGHTS),
        (["calibrate", "r.yaml"], CALIBRATED, "deltamerge.run.runner.shared_values"),
        (["lock", "r.yaml"], RECIPE, "deltamerge.run.runner.shared_values"),
        (
            ["init", "a", "--base", "base", "--out", "new.yaml"],
            RECIPE,
            "deltamerge.apps.recommend.first_recipe.write_new",
        ),
    ],
)
def test_where_nothing_is_kept_it_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], recipe: str, where: str
) -> None:
    (folder / "r.yaml").write_text(recipe)
    before = sorted(folder.iterdir())
    breaks(monkeypatch, where, KeyboardInterrupt())
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (130, "")
    assert err.endswith(NOTHING)
    assert sorted(folder.iterdir()) == before


def test_apply_says_that_nothing_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(capsys, "extract", "a", "base", "--out", "d")[0] == 0
    breaks(monkeypatch, "deltamerge.run.apply._write", KeyboardInterrupt())
    code, _, err = call(capsys, "apply", "d", "--base", "base", "--out", "whole")
    assert (code, err.endswith(NOTHING)) == (130, True)
    assert not list(folder.glob("*whole*"))


@pytest.mark.parametrize("command", ["sweep", "search"])
def test_a_study_says_where_what_it_found_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str
) -> None:
    if command == "search":
        pytest.importorskip("optuna")
    (folder / "r.yaml").write_text((SWEPT if command == "sweep" else SEARCHED) + JUDGED)
    breaks(monkeypatch, "deltamerge.apps.search.outcome:Bench.measure", KeyboardInterrupt())
    code, _, err = call(capsys, command, "r.yaml")
    assert code == 130
    where = folder / f"r-{command}"
    assert err.endswith(f"interrupted: finished work is kept in {where}: run the same command again\n")
    assert where.is_dir()


def test_models_that_were_extracted_before_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    breaks(monkeypatch, WEIGHTS, KeyboardInterrupt(), at=2)
    code, _, err = call(capsys, "extract", "a", "b", "--base", "base", "--out", "store")
    assert code == 130
    said = "store/a is complete; nothing is kept of the next: run the same command again\n"
    assert err.endswith(f"interrupted: {said}")
    assert (folder / "store" / "a" / "delta.json").is_file()
    assert not (folder / "store" / "b").exists()


def test_results_of_earlier_documents_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (folder / "r.yaml").write_text(STEPS)
    breaks(monkeypatch, WEIGHTS, KeyboardInterrupt(), at=2)
    code, _, err = call(capsys, "run", "r.yaml", "--out", "last")
    assert code == 130
    (made,) = (path for path in folder.rglob("recipe.lock"))
    said = f"{made.parent.name} is complete; nothing is kept of the next: run the same command again\n"
    assert err.endswith(said)


def test_a_squash_says_that_the_chain_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(capsys, "extract", "a", "base", "--out", "chain/1")[0] == 0
    assert call(capsys, "extract", "b", "base", "--out", "chain/2", "--after", "chain/1")[0] == 0
    breaks(monkeypatch, "deltamerge.apps.chain.squash._write", KeyboardInterrupt())
    code, _, err = call(capsys, "squash", "chain", "--keep", "0")
    if code == 2:
        code, _, err = call(capsys, "squash", "chain")
    assert code == 130, err
    assert err.endswith("interrupted: chain is whole, as it was or folded: run the same command again\n")
    assert call(capsys, "verify", "chain")[0] == 0


ERRORS: dict[str, Callable[[], BaseException]] = {
    "Ctrl-C": KeyboardInterrupt,
    "a full disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("what", ERRORS)
@pytest.mark.parametrize(
    ("arguments", "state"),
    [
        (["run", "r.yaml", "--out", "m"], ".m.partial"),
        (["extract", "a", "base", "--out", "deep/c"], "deep/.c.partial"),
        (["convert", "a", "m", "--dtype", "bfloat16"], ".m.partial"),
    ],
)
def test_the_folder_that_keeps_work_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], state: str, what: str
) -> None:
    """All weights are there, and the card cannot be written."""
    # The saver's thread may come too late for so short a run.
    finish = Writer.finish
    monkeypatch.setattr(Writer, "finish", lambda writer, *, keep: finish(writer, keep=True))
    monkeypatch.setattr("deltamerge.formats.delta.tensor_writer.SECONDS", -1)
    (folder / "deep").mkdir()
    with monkeypatch.context() as broken:
        breaks(broken, "deltamerge.run.runner.write_files", ERRORS[what]())
        code, _, err = call(capsys, *arguments)
    assert code == (130 if what == "Ctrl-C" else 1), err
    assert (folder / state).is_dir()
    assert f"finished work is kept in {folder / state}: run the same command again\n" in err
    code, _, err = call(capsys, *arguments)
    assert code == 0, err
    assert not (folder / state).exists()


def test_a_work_folder_that_cannot_be_removed_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    breaks(monkeypatch, WEIGHTS, OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("deltamerge.files.work_folder.remove", lambda state: None)
    code, _, err = call(capsys, "run", "r.yaml", "--out", "m")
    assert code == 1
    assert f"{folder / '.m.partial'} could not be removed: remove it\n" in err
