"""Byte ranges, journals, work folders: what survives a crash, and who may write where."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamerge.errors import InputError, OutputError
from deltamerge.io.journal import Journal, read_journal
from deltamerge.io.spans import Spans
from deltamerge.io.workspace import workspace

ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


@given(ranges)
def test_spans_are_a_set_of_bytes(pairs: list[tuple[int, int]]) -> None:
    spans = Spans(pairs)
    truth = {byte for start, stop in pairs for byte in range(start, stop)}
    found = list(spans)
    assert {byte for start, stop in found for byte in range(start, stop)} == truth
    assert all(a < b for a, b in found)
    assert all(first[1] < second[0] for first, second in pairwise(found))
    for position in range(41):
        reached = next(p for p in range(position, 99) if p not in truth)
        assert spans.reach(position) == reached
        assert spans.count(position, 30) == len(truth & set(range(position, 30)))


RECORDS = [{"run": {"a": 1}, "force": False}, {"done": {"f": [[0, 5]]}}, {"done": {"é": [[5, 9]]}}]


def written(path: Path) -> bytes:
    journal = Journal(path)
    for record in RECORDS:
        journal.append(record)
    journal.close()
    return path.read_bytes()


def test_a_journal_torn_anywhere_keeps_the_records_before(tmp_path: Path) -> None:
    whole = written(tmp_path / "j")
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        (tmp_path / "j").write_bytes(whole[:cut])
        count = sum(end <= cut for end in ends)
        assert read_journal(tmp_path / "j") == (RECORDS[:count], ([0, *ends])[count])
    (tmp_path / "j").write_bytes(whole[: ends[1] + 7])
    journal = Journal(tmp_path / "j")
    journal.append(RECORDS[2])
    journal.close()
    assert (tmp_path / "j").read_bytes() == whole


@given(st.data())
def test_a_changed_byte_ends_the_journal_before_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    raw = bytearray(written(path))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    records, _ = read_journal(path)
    assert records == RECORDS[: len(records)]
    assert len(records) <= bytes(raw[:place]).count(b"\n")


def work(target: Path, done: bool = True, **options: bool | str) -> None:
    """A run that dies after saving some work."""
    with workspace(target, **options) as space:  # type: ignore[arg-type]
        space.begin({"the recipe": "1"})
        (space.folder / "file").write_text("half")
        if done:
            space.journal.append({"done": {"file": [[0, 4]]}})
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def end(target: Path, force: bool = False, meanwhile: str | None = None) -> None:
    """A run that saves work and publishes, while somebody puts a file into its target."""
    with workspace(target, force=force) as space:
        space.begin({})
        space.journal.append({"done": {}})
        if meanwhile is not None:
            target.mkdir()
            (target / "mine").write_text(meanwhile)
        space.publish()


def test_what_is_saved_is_kept_and_offered(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="no space left") as caught:
        work(target)
    assert "--resume" in (caught.value.hint or "")
    with pytest.raises(OutputError, match="unfinished work") as caught, workspace(target):
        pass
    assert "--resume" in (caught.value.hint or "")
    assert "--force" in (caught.value.hint or "")
    with workspace(target, resume=True) as space:
        assert (space.folder / "file").read_text() == "half"
        space.begin({"the recipe": "1"})
        space.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "file").read_text() == "half"


def test_without_saved_work_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left"):
        work(tmp_path / "out", done=False)
    assert not list(tmp_path.iterdir())


def test_other_facts_are_refused_by_name_and_force_starts_over(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError):
        work(target)
    with pytest.raises(OutputError, match="now: deltamerge, the recipe"), workspace(target, resume=True) as space:
        space.begin({"the recipe": "2", "deltamerge": "9"})
    with workspace(target, force=True) as space:
        assert not list(space.folder.iterdir())
        space.begin({"the recipe": "2"})
        space.publish()
    assert target.is_dir()


def test_one_run_at_a_time_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\nfrom deltamerge.io.workspace import workspace\n"
        "with workspace(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for options in ({}, {"force": True}, {"resume": True}, {"part": "1-of-2"}, {"finish": True}):
            refused = pytest.raises(OutputError, match=f"another run is writing it .process {holder.pid} on")
            with refused, workspace(tmp_path / "out", **options):  # type: ignore[arg-type]
                pass
        holder.kill()
    with workspace(tmp_path / "out") as space:
        space.publish()


def test_parts_share_a_folder_but_not_with_a_whole_run(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with workspace(target, part="1-of-2") as one, workspace(target, part="2-of-2") as two:
        assert one.folder == two.folder
        with pytest.raises(OutputError, match="another run"), workspace(target, part="2-of-2"):
            pass
        with pytest.raises(OutputError, match="another run"), workspace(target):
            pass
    with pytest.raises(OutputError):
        work(target, part="1-of-2")
    with pytest.raises(OutputError, match="parts of a run"), workspace(target, resume=True):
        pass
    with pytest.raises(OutputError, match="unfinished work"), workspace(target, part="1-of-2"):
        pass
    with workspace(target, part="1-of-2", resume=True):
        pass
    with workspace(target, force=True) as space:
        space.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("old")
    rename = os.rename

    def fail(a: Path, b: Path) -> None:
        if Path(a).name == "out" and Path(b) == target:
            raise OSError(errno.EIO, "Input/output error")
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OutputError, match="Input/output"), workspace(target, force=True) as space:
            space.publish()
    assert (target / "mine").read_text() == "old"

    def die(a: Path, b: Path) -> None:
        rename(a, b)
        if Path(b).name == "old":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # a crash between the two renames
        patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            end(target, force=True)
    assert not target.exists()
    with workspace(target, resume=True) as space:
        assert (target / "mine").read_text() == "old"
        space.begin({})
        space.publish()  # the forced run's resumption may replace it
    assert not (target / "mine").exists()


@pytest.mark.parametrize("replaced", [True, False])
def test_a_name_that_is_not_on_the_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    target = tmp_path / "out"
    if replaced:
        target.mkdir()
        (target / "mine").write_text("old")
    with monkeypatch.context() as patch:

        def fail(path: Path) -> None:
            if path == tmp_path:
                raise OutputError("cannot be written: Input/output error")

        patch.setattr("deltamerge.io.workspace.sync_path", fail)
        with pytest.raises(OutputError, match="Input/output error") as caught:
            end(target, force=replaced)
    assert "--resume" in (caught.value.hint or "")
    assert [path.name for path in target.glob("*")] == (["mine"] if replaced else [])
    with workspace(target, resume=True, force=replaced) as space:
        space.begin({})
        space.publish()
    assert target.is_dir()
    assert not (target / "mine").exists()


def test_a_target_that_fills_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty any more") as caught:
        end(target, meanwhile="precious")
    assert "--force" in (caught.value.hint or "")
    assert (target / "mine").read_text() == "precious"
    with pytest.raises(InputError, match="vanished during the run"), workspace(target, resume=True):
        raise FileNotFoundError(errno.ENOENT, "gone", "weights")
    with pytest.raises(KeyboardInterrupt, match="--resume"), workspace(target, resume=True):
        raise KeyboardInterrupt
