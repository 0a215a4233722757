"""What lies beside a target under the name of a work folder, or in one, and is not a run's: it is named, and stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from calls import call
from conftest import make_checkpoint
from running import run

from deltamerge.files import work_folder
from deltamerge.files.work_folder import MARK, MARK_TEXT
from deltamerge.outputs import assets
from deltamerge.run.lock import verify


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository with a recipe, and the home of who runs it."""
    for name in ("home", "repo"):
        (tmp_path / name).mkdir()
    for name in ("thesis.txt", "model.safetensors", "journal"):
        (tmp_path / "home" / name).write_text("precious")
    make_checkpoint(tmp_path / "repo" / "base", {"w": torch.ones(4, 4)})
    make_checkpoint(tmp_path / "repo" / "a", {"w": torch.zeros(4, 4)})
    (tmp_path / "repo" / "merge.yaml").write_text("base_model: ./base\nmodels: [{model: ./a}]\n")
    return tmp_path


def state_of(place: Path) -> Path:
    return place / "repo" / ".merge-merged.partial"


def marked(place: Path) -> Path:
    state = state_of(place)
    state.mkdir()
    (state / MARK).write_bytes(MARK_TEXT)
    return state


def link(place: Path) -> None:
    state_of(place).symlink_to(place / "home")


def link_to_nothing(place: Path) -> None:
    state_of(place).symlink_to(place / "home" / "new")


def users_folder(place: Path) -> None:
    (place / "home").rename(state_of(place))


def file(place: Path) -> None:
    state_of(place).write_text("precious")


def unmarked_work(place: Path) -> None:
    (state_of(place) / "out").mkdir(parents=True)
    (state_of(place) / "out" / "model.safetensors").write_text("precious")


def forged_mark(place: Path) -> None:
    (marked(place) / MARK).write_text("precious")
    (state_of(place) / "journal").write_text("precious")


def users_lock(place: Path) -> None:
    state_of(place).mkdir()
    (state_of(place) / "lock").write_text("precious")


def kept_model(place: Path) -> None:
    (marked(place) / "mymodel").mkdir()
    (state_of(place) / "mymodel" / "model.safetensors").write_text("precious")


def kept_in_out(place: Path) -> None:
    (marked(place) / "out").mkdir()
    (state_of(place) / "out" / "thesis.txt").write_text("precious")


def linked(name: str, target: str = "thesis.txt") -> Callable[[Path], None]:
    def make(place: Path) -> None:
        path = marked(place) / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(place / "home" / target if target else place / "home")

    return make


def pipe(place: Path) -> None:
    os.mkfifo(marked(place) / "journal")


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link": (link, "is a link, and runs work in a folder of that name"),
    "a link to nothing": (link_to_nothing, "is a link"),
    "a file": (file, "is no folder"),
    "a user's folder": (users_folder, "holds files that no run wrote there: journal, model.safetensors, thesis.txt"),
    "a run's names without the mark": (unmarked_work, "holds files that no run wrote there: out"),
    "another mark": (forged_mark, "holds files that no run wrote there: deltamerge, journal"),
    "a user's file named lock": (users_lock, "holds files that no run wrote there: lock"),
    "a model kept in it": (kept_model, "holds files that no run wrote there: mymodel/"),
    "a file kept in out": (kept_in_out, "holds files that no run wrote there: out/thesis.txt"),
    "lock, a link": (linked("lock"), "holds files that no run wrote there: lock (a link)"),
    "journal, a link": (linked("journal", "journal"), "holds files that no run wrote there: journal (a link)"),
    "a part's journal, a link": (linked("journal-1-of-1"), "journal-1-of-1 (a link)"),
    "out, a link": (linked("out", ""), "holds files that no run wrote there: out (a link)"),
    "old, a link": (linked("old", ""), "holds files that no run wrote there: old (a link)"),
    "spool, a link": (linked("delta-spool", ""), "delta-spool (a link)"),
    "weights, a link": (linked("out/model.safetensors", "model.safetensors"), "out/model.safetensors (a link)"),
    "config, a link": (linked("out/config.json"), "out/config.json (a link)"),
    "a pipe": (pipe, "holds files that no run wrote there: journal"),
}


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """Every file below a folder with its bytes, every link with what it names; nothing is followed."""
    found: dict[str, bytes | str | None] = {}
    for base, folders, names in os.walk(folder):
        for path in (Path(base) / name for name in (*folders, *names)):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = os.readlink(path)
            else:
                found[name] = path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.parametrize("case", FOREIGN)
def test_what_no_run_wrote_is_refused_by_name_and_stays(
    place: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make, said = FOREIGN[case]
    make(place)
    before = everything(place)
    for flags in ([], ["--force"], ["--resume"], ["--resume", "--force"], ["--part", "1/1"], ["--finish"]):
        code, out, err = call(capsys, "run", place / "repo" / "merge.yaml", *flags)
        assert (code, out) == (1, ""), flags
        assert said in err
        assert err.startswith(f"error: {state_of(place)}: ")
        assert len(err.splitlines()) == 2
        assert everything(place) == before


STARTS: dict[str, Callable[[Path], None]] = {
    "empty": lambda place: state_of(place).mkdir(),
    "lock": lambda place: (state_of(place).mkdir(), (state_of(place) / "lock").write_text("process 1 on x\n")),  # type: ignore[dict-item,return-value]
    "mark begun": lambda place: (users_lock(place), (marked_empty(place))),  # type: ignore[dict-item,return-value,func-returns-value]
    "marked": lambda place: (marked(place) / "journal").write_text("torn"),  # type: ignore[dict-item,return-value]
}


def marked_empty(place: Path) -> None:
    (state_of(place) / "lock").write_text("")
    (state_of(place) / MARK).write_text("")


@pytest.mark.parametrize("case", STARTS)
def test_what_a_killed_run_leaves_at_its_start_is_ours(
    place: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    STARTS[case](place)
    assert call(capsys, "run", place / "repo" / "merge.yaml")[0] == 0
    assert not state_of(place).exists()
    assert sorted(path.name for path in (place / "repo").iterdir()) == ["a", "base", "merge-merged", "merge.yaml"]


def test_every_file_that_runs_copy_may_be_in_a_work_folder() -> None:
    names = [pattern.replace("*", "x") for pattern in (*assets.TOKENIZER, *assets.MODEL)]
    names += ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "delta.json", "recipe.yaml"]
    names += ["recipe.lock", "recipe.rows", "README.md", "adapter_config.json", "delta.svg", "added_tokens.json"]
    names += ["modeling_x.py"]
    written = work_folder._WRITTEN[work_folder.OUT]
    assert all(any(fnmatchcase(n, p) for p in assets.TOKENIZER) or written.fullmatch(n) for n in names)
    assert [name for name in names if not written.fullmatch(name)] == []
    assert not any(map(written.fullmatch, ("thesis.txt", "notes.md", "a.sh", ".bashrc", "data.csv")))


def test_the_journal_that_says_that_all_is_done_goes_last(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two of them, --finish --force would take the replaced model for what the parts have made."""
    removed: list[str] = []
    unlink = os.unlink
    monkeypatch.setattr(os, "unlink", lambda path, **named: removed.append(Path(path).name) or unlink(path, **named))
    (marked(place) / "out").mkdir()
    for name in ("journal", "journal-1-of-2", "journal-2-of-2", "lock", "out/model.safetensors", "calibration.lock"):
        (state_of(place) / name).write_text("")
    work_folder.remove(state_of(place))
    assert [*sorted(removed[:2]), removed[2]] == ["journal-1-of-2", "journal-2-of-2", "journal"]
    assert removed[-2:] == ["deltamerge", "lock"]
    assert not state_of(place).exists()


def run_apart(place: Path, *arguments: str, **options: object) -> tuple[int, str]:
    """Exit code and stderr of the command in a process of its own, which has 20 seconds."""
    command = [sys.executable, "-m", "deltamerge", "run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20, **options)  # type: ignore[call-overload]
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_that_cannot_be_made_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, said in (
        ("/proc/x/out", "/proc/x: cannot be written: no such folder"),
        (place / "repo" / "merge.yaml" / "out", "cannot be written: a file is where a folder should be"),
    ):
        code, _, err = call(capsys, "run", place / "repo" / "merge.yaml", "--out", out)
        assert (code, len(err.splitlines())) == (1, 2)
        assert said in err


def test_a_target_whose_name_is_not_utf_8(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, home = place / "repo" / "merge.yaml", os.fsencode(place)
    code, _, err = call(capsys, "run", recipe, "--out", os.fsdecode(home + b"/\xff\xfe"))
    assert (code, r"b'\xff\xfe': is no name in UTF-8" in err) == (1, True)
    assert verify(run(recipe, Path(os.fsdecode(home + b"/\xff/out"))).folder, 1)


def test_a_current_folder_that_is_gone(place: Path) -> None:
    gone = place / "gone"
    gone.mkdir()
    recipe = str(place / "repo" / "merge.yaml")
    code, err = run_apart(place, recipe, "--out", "x", cwd=gone, preexec_fn=gone.rmdir)
    assert code == 1
    assert err.startswith("error: the current folder no longer exists\nhint: ")


def test_without_a_folder_for_temporary_files(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only root: a plain run needs none, and what --resume compares goes beside the target."""
    monkeypatch.setattr("tempfile._candidate_tempdir_list", list)
    monkeypatch.setattr("tempfile.tempdir", None)
    recipe = place / "repo" / "merge.yaml"
    assert call(capsys, "run", recipe)[0] == 0
    assert call(capsys, "run", recipe, "--resume")[0] == 0
    assert sorted(path.name for path in (place / "repo").iterdir()) == ["a", "base", "merge-merged", "merge.yaml"]
