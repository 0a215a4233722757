"""Files that commands write: whole or as they were before, never through a link, whenever the process is killed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from calls import call
from interrupted import calibrated, killed
from running import calibrate, run

from deltamerge.errors import OutputError, VerifyError
from deltamerge.files import atomic
from deltamerge.files.atomic import replace_file
from deltamerge.files.hashes import hash_output
from deltamerge.files.ownership import read_lock

CALLS = ("open", "pwrite", "fsync", "rename", "unlink", "link", "fchmod")


@pytest.mark.parametrize("new", [False, True])
def test_killed_at_any_call_a_file_is_whole_or_as_it_was(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "r.lock"
    for after in itertools.count():
        path.unlink(missing_ok=True)
        if not new:
            path.write_text("old")
        if not killed(lambda: replace_file(path, "new", new=new), after, CALLS, (atomic, "_renameat2")):
            break
        assert (path.read_text() if path.exists() else "") in ("" if new else "old", "new")
        path.unlink(missing_ok=True)
        replace_file(path, "newer")
        assert path.read_text() == "newer"
        assert [p.name for p in tmp_path.iterdir()] == ["r.lock"]  # what was left is swept
    assert after >= 6


@pytest.mark.parametrize("can", [True, False], ids=["renameat2", "link"])
def test_a_new_file_replaces_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    if not can:
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    path = tmp_path / "recipe.yaml"
    replace_file(path, "one", new=True)
    monkeypatch.setattr(atomic, "refuse_taken", lambda *_, **__: None)  # as if it came meanwhile
    with pytest.raises(OutputError, match=r"recipe\.yaml: is there already"):
        replace_file(path, "two", new=True)
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_living_writers_file_is_not_swept_and_modes_stay(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    path.write_text("old")
    path.chmod(0o640)
    links = tmp_path / f".{path.name[:48]}.{'0' * 16}.deltamerge"
    links.symlink_to(path)
    other = tmp_path / f".{path.name[:48]}.{'1' * 16}.deltamerge"
    with other.open("w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        replace_file(path, b"new")
        assert other.exists()
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)
    assert links.is_symlink()
    replace_file(path, b"newer")
    assert not other.exists()


TAKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link": (lambda path: path.symlink_to(path.parent / "bashrc"), "is a link, to .*bashrc', and nothing is written"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link, to 'nowhere'"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a pipe": (os.mkfifo, "is no plain file"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_no_plain_file_is_not_written(tmp_path: Path, case: str) -> None:
    take, said = TAKEN[case]
    (tmp_path / "bashrc").write_text("precious")
    take(tmp_path / "q.lock")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OutputError, match=rf"q\.lock: .*{said}"):
        replace_file(tmp_path / "q.lock", "x")
    assert (tmp_path / "bashrc").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


WRITES: dict[str, tuple[str, list[str]]] = {
    "calibrate": ("r.lock", ["calibrate", "r.yaml"]),
    "calibrate, rows": ("r.rows", ["calibrate", "r.yaml"]),
    "init": ("first.yaml", ["init", "a", "--base", "base", "--out", "first.yaml"]),
    "recommend": ("one.yaml", ["recommend", "a", "--base", "base", "--density", "0.1", "--out", "one.yaml"]),
    "report": ("page.html", ["inspect", "a", "--base", "base", "--report", "page.html"]),
    "report, forced": ("page.html", ["inspect", "a", "--base", "base", "--report", "page.html", "--force"]),
}


@pytest.mark.parametrize("target", ["bashrc", "nowhere"])
@pytest.mark.parametrize("case", WRITES)
def test_no_command_writes_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str, target: str
) -> None:
    """And before its work is done, not after."""
    monkeypatch.chdir(tmp_path)
    calibrated(tmp_path)
    for work in ("deltamerge.run.runner.shared_values", "deltamerge.apps.inspect.study.measure_deltas"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("worked for nothing"))
    name, arguments = WRITES[case]
    Path("bashrc").write_text("precious")
    Path(name).symlink_to(target)
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert name in err
    assert len(err.splitlines()) == 2
    assert Path("bashrc").read_text() == "precious"
    assert not Path("nowhere").exists()


def test_rows_of_another_calibration_are_refused(tmp_path: Path) -> None:
    """Killed between its two files, calibrate leaves new rows beside the old lock."""
    path = calibrated(tmp_path)
    path.write_text(path.read_text().replace("q: output_change", "q: {objective: layer_mse, scope: row}"))
    calibrate(path)
    rows = path.with_suffix(".rows")
    (entry,) = read_lock(path.with_suffix(".lock"))["calibration"].values()
    assert entry["rows_hash"] == hash_output(rows)
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-4] + b"\0\0\0\x40")
    with pytest.raises(VerifyError, match=r"r\.rows: holds other q's of rows than the lock"):
        run(path, tmp_path / "out", locked=True)
    rows.write_bytes(whole)
    run(path, tmp_path / "out", locked=True)
