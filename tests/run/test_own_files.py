"""Files beside a recipe: what is not ours, or was changed, stays; what we wrote is written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call
from conftest import make_checkpoint

from deltamerge.files.ownership import read_lock, refuse_others, replace_own
from deltamerge.run.lock import verify

RECIPE = "base_model: ./base\nmerge_method: task_arithmetic\nmodels: [{model: ./a, parameters: {weight: %s}}]\n"
QUICK = ("-q", "--workers", "1")
THEIRS = {
    "words": "mine, precious\n",
    "another tool's lock": "version: 1\npackages:\n  - name: numpy\n    hash: 'sha256:00'\n",
    "nothing": "",
    "a lock of ours that says no outputs": "deltamerge: 0.1.0\nformat: 1\ninputs: {}\n",
    "a format of tomorrow": "format: 99\noutputs: {}\n",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = torch.arange(600.0).reshape(20, 30)
    make_checkpoint(tmp_path / "base", {"w": base})
    make_checkpoint(tmp_path / "a", {"w": base + 1})
    (tmp_path / "m.yaml").write_text(RECIPE % 0.5)
    return tmp_path


def told(capsys: Any, *words: str) -> str:
    code, out, err = call(capsys, *words)
    assert (code, out, "Traceback" in err) == (1, "", False), err
    return err


@pytest.mark.parametrize("theirs", THEIRS)
def test_a_lock_that_is_none_of_ours_stays(here: Path, capsys: Any, theirs: str) -> None:
    lock = here / "m.lock"
    lock.write_text(THEIRS[theirs])
    said = told(capsys, "lock", "m.yaml")
    assert "m.lock: is there, and was not written for m.yaml by deltamerge" in said
    assert "--force" in said
    assert lock.read_text() == THEIRS[theirs]
    assert sorted(path.name for path in here.iterdir()) == ["a", "base", "m.lock", "m.yaml"]
    assert call(capsys, "lock", "m.yaml", "--force")[0] == 0
    assert call(capsys, "lock", "m.yaml", "--check")[0] == 0


def test_our_lock_is_written_anew_until_it_is_changed(here: Path, capsys: Any) -> None:
    lock = here / "m.lock"
    assert call(capsys, "lock", "m.yaml")[0] == 0
    first = lock.read_bytes()
    (here / "m.yaml").write_text(RECIPE % 0.25)
    assert call(capsys, "lock", "m.yaml")[0] == 0
    assert lock.read_bytes() != first
    assert call(capsys, "run", "m.yaml", "--locked", *QUICK)[0] == 0
    for changed in (b"# mine\n" + lock.read_bytes(), lock.read_bytes() + b"# mine\n", lock.read_bytes()[:-9] + b"00\n"):
        whole = lock.read_bytes()
        lock.write_bytes(changed)
        assert "m.lock: was changed since it was written" in told(capsys, "lock", "m.yaml")
        assert lock.read_bytes() == changed
        lock.write_bytes(whole)
    (here / "m.yml").write_text(RECIPE % 0.75)
    assert "or is of another recipe than m.yml" in told(capsys, "lock", "m.yml")


def test_a_lock_copied_from_an_output_is_ours_and_that_of_an_output_never(here: Path, capsys: Any) -> None:
    assert call(capsys, "run", "m.yaml", *QUICK)[0] == 0
    made = here / "m-merged" / "recipe.lock"
    for name, code in (("m", 0), ("other", 1)):
        (here / f"{name}.yaml").write_text(RECIPE % 0.5)
        (here / f"{name}.lock").write_bytes(made.read_bytes())
        assert call(capsys, "lock", f"{name}.yaml")[0] == code
    (here / "recipe.yaml").write_text((RECIPE % 0.5).replace("./", f"{here}/"))
    assert call(capsys, "run", "recipe.yaml", "--out", "out", *QUICK)[0] == 0
    for words in (("lock", "out/recipe.yaml"), ("lock", "out/recipe.yaml", "--force")):
        assert "is the lock of the output in out" in told(capsys, *words)
    assert verify(here / "out", 1)
    assert call(capsys, "lock", "recipe.yaml")[0] == 0  # beside a recipe of that name


def test_links_folders_and_rows_stay(here: Path, capsys: Any) -> None:
    (here / "mine").write_text("precious")
    (here / "m.lock").symlink_to("mine")
    assert "is a link" in told(capsys, "lock", "m.yaml", "--force")
    (here / "m.lock").unlink()
    (here / "m.lock").mkdir()
    assert "it is a folder" in told(capsys, "lock", "m.yaml", "--force")
    (here / "m.lock").rmdir()
    (here / "m.rows").write_text("precious")
    assert call(capsys, "lock", "m.yaml")[0] == 0  # which has no rows
    assert (here / "m.rows").read_text() == (here / "mine").read_text() == "precious"


def test_a_recipe_is_not_its_own_lock(here: Path, capsys: Any) -> None:
    (here / "m.lock").write_text(RECIPE % 0.5)
    assert "was not written for m.lock" in told(capsys, "lock", "m.lock")
    assert (here / "m.lock").read_text() == RECIPE % 0.5


@pytest.mark.parametrize("suffix", [".svg", ".yaml", ".lock", ".html"])
@pytest.mark.parametrize("text", ["", "a: 1\n", "a: 1", "<svg>\u00fc</svg>\n"])
def test_a_mark_is_of_content_and_recipe(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"file{suffix}"
    replace_own(path, text, "r.yaml")
    assert path.read_text().startswith(text)
    refuse_others(path, "r.yaml")
    whole = path.read_bytes()
    others = [whole[:-1], b" " + whole, whole.replace(b"deltamerge", b"deltamerg", 1), whole + b"\n", whole * 2]
    for raw in [*others, whole[:9], b"\xff" + whole]:
        if raw != whole:
            path.write_bytes(raw)
            with pytest.raises(Exception, match=r"is there, and|was changed"):
                refuse_others(path, "r.yaml")
            refuse_others(path, "r.yaml", force=True)
            assert path.read_bytes() == raw
    path.write_bytes(whole)
    with pytest.raises(Exception, match=r"another recipe than other\.yaml"):
        refuse_others(path, "other.yaml")


def test_the_lock_beside_a_recipe_reads_as_a_lock(here: Path, capsys: Any) -> None:
    assert call(capsys, "lock", "m.yaml")[0] == 0
    assert sorted(read_lock(here / "m.lock")["inputs"]) == ["./a", "./base"]
