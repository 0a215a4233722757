"""Locks of open files: shared ones hold together, an exclusive one alone, and none outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deltamerge.files.descriptors import lock

HOLD = """
import os, sys
from deltamerge.files.descriptors import lock
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
print(lock(fd, shared=sys.argv[2] == "shared"), flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has locked the file, or was refused it."""
    command = [sys.executable, "-c", HOLD, str(path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("theirs", "ours", "free"),
    [("shared", "shared", True), ("shared", "alone", False), ("alone", "shared", False), ("alone", "alone", False)],
)
def test_locks_of_two_processes(tmp_path: Path, theirs: str, ours: str, free: bool) -> None:
    path = tmp_path / "lock"
    with holder(path, theirs) as process:
        fd = os.open(path, os.O_RDWR)
        assert lock(fd, shared=ours == "shared") is free
        process.kill()
        process.wait()
        assert lock(fd, shared=ours == "shared")  # the system drops the lock of a killed process
        os.close(fd)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EAGAIN])
def test_another_s_lock_on_any_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool, code: int
) -> None:
    """Some network file systems say "permission denied" of another's lock."""

    def refuse(fd: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "lock").open("w") as file:
        assert not lock(file.fileno(), shared=shared)


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_system_without_locks_is_an_error(shared: bool) -> None:
    """Only another's lock is False: no other refusal of the system is taken for it."""
    reader, writer = os.pipe()
    os.close(writer)
    os.close(reader)
    with pytest.raises(OSError, match="descriptor"):
        lock(reader, shared=shared)
