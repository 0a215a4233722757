"""Byte ranges, journals, work folders: what survives a crash, and who may write where."""

from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interrupted import earlier, killed, lock

from deltamerge.errors import InputError, OutputError
from deltamerge.files import work_folder as module
from deltamerge.files.journal import Journal, Spans, read_journal
from deltamerge.files.work_folder import Workspace, is_begun, workspace

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


def publish(space: Workspace) -> None:
    space.publish(lock(space.folder), {})


def work(target: Path, done: bool = True, **options: bool | str) -> None:
    """A run that dies after saving some work."""
    with workspace(target, **options) as space:  # type: ignore[arg-type]
        space.begin({"the recipe": "1"})
        (space.folder / "model.safetensors").write_text("half")
        if done:
            space.journal.append({"done": {"model.safetensors": [[0, 4]]}})
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def end(target: Path, force: bool = False, meanwhile: str | None = None) -> None:
    """A run that saves work and publishes, while somebody puts a file into its target."""
    with workspace(target, force=force) as space:
        space.begin({})
        (space.folder / "model.safetensors").write_text("new")
        space.journal.append({"done": {}})
        if meanwhile is not None:
            target.mkdir()
            (target / "mine").write_text(meanwhile)
        publish(space)


def test_what_is_saved_is_kept_and_offered(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="no space left") as caught:
        work(target)
    assert "run" in (caught.value.hint or "")
    with pytest.raises(OutputError, match="unfinished work") as caught, workspace(target):
        pass
    assert "run" in (caught.value.hint or "")
    assert "--force" in (caught.value.hint or "")
    with workspace(target, resume=True) as space:
        assert (space.folder / "model.safetensors").read_text() == "half"
        space.begin({"the recipe": "1"})
        publish(space)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "model.safetensors").read_text() == "half"


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
        publish(space)
    assert target.is_dir()


def test_one_run_at_a_time_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\nfrom deltamerge.files.work_folder import workspace\n"
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
        publish(space)


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
        publish(space)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def can_exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Where the system can exchange two folders, and where it cannot."""
    if not request.param:
        monkeypatch.setattr("deltamerge.files.work_folder.exchange", lambda *_: False)
    return bool(request.param)


def test_a_target_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    target, weights = tmp_path / "out", tmp_path / "out" / "model.safetensors"
    earlier(target)
    rename = os.rename

    def fail(*_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def second(a: Path, b: Path) -> None:
        if Path(a).parent.name == ".out.partial" and Path(b) == target and Path(a).name == "out":
            fail()
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr("deltamerge.files.work_folder.exchange", fail) if can_exchange else patch.setattr(
            os, "rename", second
        )
        with pytest.raises(OutputError, match="Input/output"), workspace(target, force=True) as space:
            publish(space)
    assert weights.read_text() == "old"
    with workspace(target, force=True) as space:
        publish(space)
    assert not weights.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CALLS = ("rename", "unlink", "rmdir", "mkdir", "open", "fdatasync", "fsync", "pwrite", "ftruncate")


def again(target: Path, **options: bool) -> None:
    """The same run, which makes again what was not saved."""
    with workspace(target, **options) as space:
        space.begin({})
        if not space.journal.records[1:]:
            (space.folder / "model.safetensors").write_text("new")
        publish(space)


@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "new"])
def test_killed_at_any_call_a_run_is_whole_or_goes_on(
    tmp_path: Path, can_exchange: bool, replaced: bool, step: int
) -> None:
    for start, how in enumerate(("again", "resumed"), start=1):
        for after in itertools.count(start, step):
            home = tmp_path / f"{how}-{after}"
            home.mkdir()
            target, weights = home / "out", home / "out" / "model.safetensors"
            if replaced:
                earlier(target)
            if not killed(partial(end, target, force=replaced), after, CALLS, (module, "exchange")):
                break
            if replaced and can_exchange:
                assert weights.read_text() in ("old", "new")
            if how == "again" and replaced:
                again(target, force=True)
            elif is_begun(target):
                again(target, resume=True)
            elif not weights.exists():
                again(target)
            elif weights.read_text() == "old":
                with pytest.raises(OutputError, match="not empty"), workspace(target, resume=True):
                    pass
                again(target, force=True)
            assert weights.read_text() == "new"
            assert [path.name for path in home.iterdir()] == ["out"]
        assert after > 20


@pytest.mark.parametrize("replaced", [True, False])
def test_a_name_that_is_not_on_the_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool, replaced: bool
) -> None:
    target, weights = tmp_path / "out", tmp_path / "out" / "model.safetensors"
    if replaced:
        earlier(target)
    with monkeypatch.context() as patch:

        def fail(path: Path) -> None:
            if path == tmp_path:
                raise OutputError("cannot be written: Input/output error")

        patch.setattr("deltamerge.files.work_folder.sync_path", fail)
        with pytest.raises(OutputError, match="Input/output error") as caught:
            end(target, force=replaced)
    assert "run" in (caught.value.hint or "")
    assert weights.read_text() == "old" if replaced else not target.exists()
    with workspace(target, resume=True, force=replaced) as space:
        space.begin({})
        publish(space)
    assert weights.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_file_is_not_published_and_made_again(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def publish_cut() -> None:
        with workspace(target) as space:
            space.begin({})
            (space.folder / "model.safetensors").write_text("half")
            space.journal.append({"done": {}})
            outputs = lock(space.folder)
            os.truncate(space.folder / "model.safetensors", 3)
            space.publish(outputs, {})

    with pytest.raises(OutputError, match=r"its files model\.safetensors has 3 bytes, not 4") as caught:
        publish_cut()
    assert "run" in (caught.value.hint or "")
    assert not (tmp_path / ".out.partial" / "out" / "model.safetensors").exists()


FORCED = {
    "a user's files": (["thesis.txt", "notes"], "notes, thesis.txt"),
    "more than fit": ([f"{i}.txt" for i in range(9)], "0.txt, 1.txt, 2.txt, 3.txt and 5 more"),
    "a folder": (["model.safetensors", "runs/"], "model.safetensors, runs"),
    "a file beside a run's": (["+", "thesis.txt"], "thesis.txt$"),
    "a hidden one, too": (["+", ".git/"], r"\.git$"),
    "a link of a run's name": (["+", "model.safetensors -> /etc/hosts"], "model.safetensors$"),
    "a lock that is none": (["recipe.lock", "thesis.txt"], "recipe.lock, thesis.txt"),
}


@pytest.mark.parametrize("case", FORCED)
@pytest.mark.parametrize("late", [False, True], ids=["there before", "there meanwhile"])
def test_force_replaces_only_what_a_run_made(tmp_path: Path, case: str, late: bool) -> None:
    target, (names, said) = tmp_path / "out", FORCED[case]

    def fill() -> None:
        if names[0] == "+":
            earlier(target)
        target.mkdir(exist_ok=True)
        for name in names:
            path = target / name.partition(" ")[0]
            if "->" in name:
                path.unlink()
                path.symlink_to(name.partition("-> ")[2])
            elif name.endswith("/"):
                path.mkdir()
            elif name != "+":
                path.write_text("mine")

    def force() -> None:
        with workspace(target, force=True) as space:
            assert late, "nothing is begun"
            fill()
            publish(space)

    if not late:
        fill()
    with pytest.raises(OutputError, match=f"only files of runs, and would delete {said}") as caught:
        force()
    assert "remove the folder yourself" in (caught.value.hint or "")
    found = {path.name for path in target.iterdir()}
    assert found == {name.partition(" ")[0].rstrip("/") for name in names if name != "+"} | (
        {"model.safetensors", "recipe.lock"} if names[0] == "+" else set()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_that_fills_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty any more") as caught:
        end(target, meanwhile="precious")
    left = f"finished work is kept in {tmp_path}/.out.partial: run the same command again"
    assert caught.value.hint == f"choose another folder with --out; {left}"
    assert (target / "mine").read_text() == "precious"
    with pytest.raises(InputError, match="vanished during the run"), workspace(target, resume=True):
        raise FileNotFoundError(errno.ENOENT, "gone", "weights")
    with pytest.raises(KeyboardInterrupt, match=re.escape(left)), workspace(target, resume=True):
        raise KeyboardInterrupt
