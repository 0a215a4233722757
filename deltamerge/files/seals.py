"""Whether a file has changed since it was hashed: told by its seal, which every change breaks, else by its hash."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from deltamerge.errors import InputError
from deltamerge.files import progress

HASH_BYTES = 1 << 23


class Seal(NamedTuple):
    """The numbers that the system updates with every change of a file; nobody can set back `changed`. Times in ns."""

    size: int
    modified: int
    inode: int
    changed: int


def seal(path: Path) -> Seal:
    """Return the seal of a file; take it before hashing, or when its writer has ended. OSError: no access."""
    status = path.stat()
    return Seal(status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


def hash_output(path: Path) -> str:
    """Return "blake3:<hex>" of a file, as `b3sum` prints it: published files have a cryptographic hash."""
    hasher = blake3(max_threads=blake3.AUTO)
    try:
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(min(HASH_BYTES, os.fstat(file.fileno()).st_size) or 1))
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                progress.here().step(count)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return f"blake3:{hasher.hexdigest()}"


def hash_bytes(data: bytes) -> str:
    """Return the `hash_output` of a file of these bytes."""
    return f"blake3:{blake3(data).hexdigest()}"


def damages(
    folder: Path, files: Mapping[str, Mapping[str, Any]], seals: Mapping[str, Seal], workers: int
) -> dict[str, str]:
    """Return the faults of the `files` (name -> {hash, size}) of `folder`: missing, of another size or content.

    Files whose seal is unbroken are not read.
    """

    def look(name: str) -> str:
        with progress.joined(checking):
            return wrong_with(name)

    def wrong_with(name: str) -> str:
        path, entry = folder / name, files[name]
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                return "is no plain file"
            if status.st_size != entry["size"]:
                return f"has {status.st_size} bytes, not {entry['size']}"
            if name in seals and seal(path) == seals[name]:
                progress.here().skip(entry["size"])
                return ""
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return "" if hash_output(path) == entry["hash"] else "has other content than was written"

    size = sum(entry["size"] for entry in files.values())
    with progress.phase("checking files", size) as checking, ThreadPoolExecutor(workers) as pool:
        found = dict(zip(files, pool.map(look, files), strict=True))
    return {name: wrong for name, wrong in sorted(found.items()) if wrong}
