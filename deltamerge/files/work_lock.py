"""The lock of a work folder: for one run, or for the parts of one. The system releases it when a process dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltamerge.errors import OutputError
from deltamerge.files import work_folder
from deltamerge.files.descriptors import output_error, writing


def looked(state: Path) -> frozenset[str] | None:
    """The names in the work folder `state`; None if it does not exist. OutputError: not ours, or unreadable."""
    with writing(state):
        return work_folder.look(state)


@contextmanager
def locked(state: Path, name: str, target: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `name` of the work folder `state`, which is created and marked if it does not exist.

    `target` is named in errors; `shared`: for the parts of a run. OutputError: another run holds it, the folder is not
    ours, or it cannot be created.
    """
    path = state / name
    while True:
        try:
            state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cause = output_error(error)
            raise OutputError(f"{state.parent}: {cause}", hint=cause.hint or "choose another with --out") from error
        looked(state)
        try:
            fd = work_folder.open_file(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            time.sleep(0.001)
            continue  # a run that has just ended removed the folder
        except OSError as error:
            cause = output_error(error)
            raise OutputError(f"{state if state.is_dir() else state.parent}: {cause}", hint=cause.hint) from error
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            held = os.stat(path).st_ino == os.fstat(fd).st_ino
        except BlockingIOError as error:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
            os.close(fd)
            raise OutputError(
                f"{target}: another run is writing it ({holder or 'starting'})",
                hint="wait until it ends, or choose another folder with --out",
            ) from error
        except FileNotFoundError:
            held = False
        if held:
            break
        os.close(fd)
    try:
        if not shared:
            with suppress(OSError):  # the holder is only shown in messages; a full disk is reported by what needs it
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        with writing(state):
            work_folder.mark(state)
        yield
    finally:
        os.close(fd)
