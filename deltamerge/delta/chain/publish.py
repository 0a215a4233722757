"""Writes to a chain: each version whole under its name, or not there at all.

One process at a time adds versions, and one folds old ones; both may be at work at once, since what is folded keeps its
name and its state. Each removes what one of its kind left when it was killed.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from deltamerge.delta.chain.folder import names
from deltamerge.delta.chain.version import VERSION, read_note
from deltamerge.errors import OutputError
from deltamerge.errors.shown import some
from deltamerge.io.atomic import exchange
from deltamerge.io.files import sync_path, writing
from deltamerge.io.lock_file import HIDDEN, LOCK_NAME, read_lock
from deltamerge.io.tree import files_of

Work = Literal["adding", "folding"]
LEFT: dict[Work, tuple[str, ...]] = {"adding": ("adding",), "folding": ("folding", "gone", "old")}
UNFINISHED = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.(?P<kind>adding|folding|gone|old)", re.DOTALL)


@contextmanager
def one_writer(chain: Path, work: Work) -> Iterator[None]:
    """Hold the chain's lock for one kind of work, which the system releases when a process dies; and remove what a
    killed one left.

    OutputError: another process does that, or it is no folder that can be written.
    """
    with writing(chain):
        chain.mkdir(parents=True, exist_ok=True)
        fd = os.open(chain / f".{work}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{chain}: another process is {work} versions", hint="wait until it ends: one does so at a time"
            ) from None
        with writing(chain):
            _sweep(chain, work)
        yield
    finally:
        os.close(fd)


@contextmanager
def publishing(chain: Path, name: str, work: Work) -> Iterator[Path]:
    """A new folder in which a version is written; when the block ends it is synced and gets its name in one step.

    The caller holds the lock. What is folded replaces the version of its name. OutputError: the disk; or the name of a
    version that is added is taken.
    """
    target, made = chain / name, chain / f".{name}.{secrets.token_hex(8)}.{work}"
    if target.exists() and work == "adding":
        raise OutputError(f"{target}: is there already", hint="a version is never written twice: take the next name")
    try:
        with writing(target):
            made.mkdir()
        yield made
        with writing(target):
            for path in files_of(made).values():
                sync_path(path)
            sync_path(made)
            _put(made, target)
            sync_path(chain)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def remove(chain: Path, name: str) -> None:
    """Remove a version: it loses its name in one step. OutputError: the disk."""
    gone = chain / f".{name}.{secrets.token_hex(8)}.gone"
    with writing(chain / name):
        os.rename(chain / name, gone)
        sync_path(chain)
    shutil.rmtree(gone, ignore_errors=True)


def refuse_foreign(path: Path) -> None:
    """OutputError: a version's folder holds files that no run wrote there, which removing it would lose."""
    note, known = read_note(path), {VERSION, LOCK_NAME} | HIDDEN
    known |= set() if note is None else note.files.keys()
    if (path / LOCK_NAME).is_file():
        known |= read_lock(path / LOCK_NAME)["outputs"].keys()
    if strange := [name for name in files_of(path) if name not in known and name.split("/")[0] not in HIDDEN]:
        raise OutputError(f"{path}: holds what no run wrote: {some(sorted(strange))}", hint="move that away")


def _put(made: Path, target: Path) -> None:
    if not target.exists():
        os.rename(made, target)
    elif not exchange(made, target):  # no such call here: for a moment there is none
        old = target.parent / f".{target.name}.{secrets.token_hex(8)}.old"
        os.rename(target, old)
        os.rename(made, target)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(chain: Path, work: Work) -> None:
    """Remove what was left of a kind of work by who was killed."""
    for entry in sorted(os.listdir(chain)):
        found = UNFINISHED.fullmatch(entry)
        if found is None or found["kind"] not in LEFT[work] or (chain / entry).is_symlink():
            continue
        if found["kind"] == "old" and not (chain / found["name"]).exists():
            os.rename(chain / entry, chain / found["name"])
        else:
            shutil.rmtree(chain / entry, ignore_errors=True)
    if work == "folding":
        there = names(chain)
        found_in = (read_note(chain / name) for name in there)
        folded = {one.name for note in found_in if note is not None for one in note.folded}
        for name in sorted(folded & {*there}):
            refuse_foreign(chain / name)
            remove(chain, name)
