"""What a run leaves if it is stopped at any call into the system, and what is on the disk when it says so."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from interrupted import files
from running import run

from deltamerge.errors import InputError, OutputError
from deltamerge.files.journal import read_journal
from deltamerge.formats import safetensors as writer
from deltamerge.formats.safetensors import done_spans

CHANGES = ("open", "pwrite", "ftruncate", "fdatasync", "fsync", "rename", "unlink", "mkdir", "rmdir", "copy_file_range")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(40, 50, generator=generator) for i in range(3)} | {"ids": torch.arange(9)}
    make_checkpoint(tmp_path / "base", base)
    make_checkpoint(tmp_path / "a", {name: tensor + 1 for name, tensor in base.items()})
    path = tmp_path / "r.yaml"
    path.write_text(
        "base_model: ./base\nmodels: [{model: ./a, prune: {method: dare, density: 0.5}}]\noutput: {shard_size: 10KB}\n"
    )
    monkeypatch.setattr(writer, "SAVE_SECONDS", 1e-4)
    return path


class Calls:
    """Every call of `os` that changes a file or opens one, seen before it is made."""

    def __init__(self, patch: pytest.MonkeyPatch, see: Callable[[str, tuple[Any, ...]], None]) -> None:
        for name in CHANGES:
            patch.setattr(os, name, self.watched(name, getattr(os, name), see))

    @staticmethod
    def watched(name: str, call: Callable[..., Any], see: Callable[[str, tuple[Any, ...]], None]) -> Callable[..., Any]:
        def seen(*arguments: Any, **named: Any) -> Any:
            see(name, arguments)
            return call(*arguments, **named)

        return seen


ERRORS = (KeyboardInterrupt(), OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "No space left"))


@pytest.mark.parametrize("name", CHANGES)
def test_stopped_at_any_call_there_is_no_target_or_a_whole_one(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    truth = files(run(recipe, tmp_path / "truth" / "out", workers=1).folder)
    out, stopped = tmp_path / "out", 0
    for wanted, error in product((1, 2, 5, 13, 30), ERRORS):
        seen = 0

        def see(called: str, _: tuple[Any, ...], wanted: int = wanted, error: BaseException = error) -> None:
            nonlocal seen
            if called != name or (error is ERRORS[0] and threading.current_thread() is not threading.main_thread()):
                return  # only the main thread is interrupted
            seen += 1
            if seen == wanted:
                raise error

        with monkeypatch.context() as patch:
            Calls(patch, see)
            with suppress(KeyboardInterrupt, InputError, OutputError):
                run(recipe, out, workers=1)
                stopped -= 1
            stopped += 1
        if out.exists():
            assert files(out) == truth
        else:
            run(recipe, out, workers=1, resume=True)
            assert files(out) == truth
            assert not list(tmp_path.glob(".out*"))
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    assert stopped or name == "copy_file_range"


def test_nothing_is_claimed_before_it_is_on_the_disk(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power only what was synced is there: journal and renames come after what they speak of."""
    state = tmp_path / ".out.partial"
    unsynced: dict[str, list[tuple[int, int]]] = {}  # of files, what was written; of folders, that they got names
    claimed: dict[str, Any] = {}
    done: list[str] = []

    def path_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def see(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, flags = Path(arguments[0]), arguments[1]
            if flags & os.O_CREAT and not path.exists() and path.is_relative_to(state):
                unsynced[str(path.parent)] = [(0, 1)]
            return
        if name in ("pwrite", "ftruncate", "copy_file_range"):
            fd, offset, nbytes = (
                (arguments[1], arguments[4], arguments[2])
                if name == "copy_file_range"
                else (arguments[0], *((arguments[2], len(arguments[1])) if name == "pwrite" else (0, 0)))
            )
            path = Path(path_of(fd))
            if path.name == "journal" and name == "pwrite" and b'{"done"' in bytes(arguments[1]):
                assert not {str(state), str(state / "out"), str(tmp_path)} & unsynced.keys()
                for file, spans in json.loads(bytes(arguments[1]).partition(b" ")[2])["done"].items():
                    for start, stop in unsynced.get(str(state / "out" / file), []):
                        assert not any(start < end and begin < stop for begin, end in spans), "not on the disk yet"
                done.append("claimed")
            if path.suffix == ".safetensors":
                time.sleep(0.01)  # so that something is saved meanwhile
            if path.suffix in (".safetensors", ".lock", ".yaml", ".md"):
                unsynced.setdefault(str(path), []).append((offset, offset + nbytes))
        if name in ("fdatasync", "fsync"):
            unsynced.pop(path_of(arguments[0]), None)
            done.append(f"synced {path_of(arguments[0])}")
        if name == "rename" and Path(arguments[1]) == tmp_path / "out":
            assert not {p for p in unsynced if p.startswith(str(state / "out"))}
            synced = {entry.removeprefix("synced ") for entry in done}
            assert {str(path) for path in (state / "out").iterdir()} <= synced
            assert str(state / "out") == done[-1].removeprefix("synced ")
            claimed.update(done_spans(read_journal(state / "journal")[0]))
            done.append("renamed")

        if "renamed" in done and name in ("unlink", "rmdir"):
            done.append(f"removed {Path(arguments[0]).name}")

    Calls(monkeypatch, see)
    run(recipe, tmp_path / "out", workers=1)
    assert "claimed" in done
    after = done[done.index("renamed") + 1 :]
    assert after[:2] == [f"synced {tmp_path}", f"synced {state}"]  # the new name too
    assert after[2:] == [f"removed {name}" for name in ("journal", "deltamerge", "lock", ".out.partial")]
