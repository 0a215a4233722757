"""Hashes of written files and of read files, and checks for later changes.

An output has a BLAKE3. Its seal, which every change breaks, or its hash tells whether it has changed.
An input has the XXH3-128 of the XXH3-128 digests (in canonical form) of its pieces of 64 KiB, the last perhaps shorter.
A merge computes the digests while it reads the file. A file in the hub's cache has the hub's own hash for a name.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.files import progress
from deltamerge.files.descriptors import reading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PIECE_BYTES = 1 << 16
DIGEST_BYTES = 16
# Pieces per read, among pieces that must still be read.
AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Digests:
    """The digests (pieces, 16) of a file of `size` bytes. `there` marks the known digests."""

    size: int
    digests: NDArray[np.uint8]
    there: NDArray[np.bool_]


class Pieces:
    """The digests known of files so far. Thread-safe; a thread adds the digests of the pieces that it reads."""

    def __init__(self) -> None:
        self._known: dict[Path, Digests] = {}
        self._changed = threading.Lock()

    def of(self, path: Path) -> Digests:
        """Return the digests that are known of the file `path`. OSError: it cannot be examined."""
        import numpy as np

        with self._changed:
            if path not in self._known:
                size = path.stat().st_size
                count = -(-size // PIECE_BYTES)
                self._known[path] = Digests(size, np.empty((count, DIGEST_BYTES), np.uint8), np.zeros(count, np.bool_))
            return self._known[path]

    def hash(self, path: Path, begin: int, data: NDArray[np.uint8]) -> None:
        """Hash the whole pieces among bytes `data` of a file from byte `begin` on, unless all are known."""
        first, skipped = -(-begin // PIECE_BYTES), -begin % PIECE_BYTES
        count = (len(data) - skipped) // PIECE_BYTES
        if count > 0 and not self.of(path).there[first : first + count].all():
            self.give(path, first, digests(data[skipped : skipped + count * PIECE_BYTES]))

    def give(self, path: Path, first: int, halves: NDArray[np.uint64]) -> None:
        """Add the digests of whole pieces of a file, from number `first` on: `halves` (pieces, 2) has their high and
        low words."""
        known, stop = self.of(path), first + len(halves)
        known.digests[first:stop] = _as_bytes(halves)
        known.there[first:stop] = True


def digests(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return (pieces, 2) the high and low words of the digests of whole pieces. The compiled loop drops the GIL."""
    import numpy as np

    made = np.empty((len(data) // PIECE_BYTES, 2), np.uint64)
    if (native := kernels.native()) is not None:
        native.digests(data, made)
    else:
        for row, at in zip(made, range(0, len(data), PIECE_BYTES), strict=True):
            row[:] = np.frombuffer(xxh3_128_digest(data[at : at + PIECE_BYTES].data), ">u8")
    return made


def _as_bytes(halves: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return halves.astype(">u8").view("u1").reshape(-1, DIGEST_BYTES)


def learn(known: Digests, wanted: NDArray[np.bool_], read: Callable[[int, Any], None]) -> None:
    """Hash the `wanted` pieces of a file; read(offset, buffer) fills a buffer from an offset of it."""
    import numpy as np

    buffer = np.empty(min(AT_ONCE * PIECE_BYTES, known.size), np.uint8)
    for first, stop in _runs(wanted):
        begin = first * PIECE_BYTES
        part = buffer[: min(stop * PIECE_BYTES, known.size) - begin]
        read(begin, part)
        whole = len(part) // PIECE_BYTES
        known.digests[first : first + whole] = _as_bytes(digests(part[: whole * PIECE_BYTES]))
        if rest := part[whole * PIECE_BYTES :].data:
            known.digests[stop - 1] = np.frombuffer(xxh3_128_digest(rest), np.uint8)
        known.there[first:stop] = True
        progress.here().step(len(part))


def size_of(known: Digests, wanted: NDArray[np.bool_]) -> int:
    """Return the number of bytes in the `wanted` pieces of a file. The last piece may be shorter."""
    short = -known.size % PIECE_BYTES if len(wanted) and wanted[-1] else 0
    return int(wanted.sum()) * PIECE_BYTES - short


def inside(known: Digests, ranges: Iterable[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which pieces of a file lie within one of the byte ranges [begin, end)."""
    found = known.there & False
    for begin, end in ranges:
        found[-(-begin // PIECE_BYTES) : end // PIECE_BYTES] = True
    return found


def _runs(wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of runs of at most `AT_ONCE` wanted pieces."""
    import numpy as np

    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).tolist()
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        for first in range(begin, end, AT_ONCE):
            yield first, min(end, first + AT_ONCE)


def hash_whole(known: Digests) -> str:
    """Return the hash, in hex, of a file whose pieces are all known."""
    assert known.there.all()
    return str(xxh3_128_hexdigest(known.digests.data))


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

    from concurrent.futures import ThreadPoolExecutor

    size = sum(entry["size"] for entry in files.values())
    with progress.phase("checking files", size) as checking, ThreadPoolExecutor(workers) as pool:
        found = dict(zip(files, pool.map(look, files), strict=True))
    return {name: wrong for name, wrong in sorted(found.items()) if wrong}


# Files in the hub's cache: links to blobs whose names are the hub's hashes of their content.


# The hash is the SHA-256 of a large file (64 digits), git's SHA-1 of a small one (40).
NAMES = {64: re.compile(r"[0-9a-f]{64}"), 40: re.compile(r"[0-9a-f]{40}")}


def blob_of(path: Path) -> Path | None:
    """Return the blob that `path` in a snapshot links to; None if it is no such link.

    The blob may be a link itself, to where the cache keeps files that several repositories share.
    """
    try:
        blob = Path(os.path.normpath(os.path.join(os.path.realpath(path.parent), os.readlink(path))))
    except OSError:
        return None
    named = any(name.fullmatch(blob.name) for name in NAMES.values())
    return blob if named and blob.parent.name == "blobs" else None


def sha256_of(path: Path) -> str | None:
    """Return the SHA-256 that the hub states for `path`, or None. The file is not read."""
    blob = blob_of(path)
    return blob.name if blob is not None and len(blob.name) == 64 else None


def check_blobs(paths: Iterable[Path], workers: int) -> None:
    """Hash the files of the hub's cache among `paths`. InputError: a file differs from the hub's."""
    from concurrent.futures import ThreadPoolExecutor

    blobs = {blob: path for path in paths if (blob := blob_of(path)) is not None}
    sizes = {blob: blob.stat().st_size for blob in blobs if blob.exists()}

    def digest_of(blob: Path) -> str:
        found = _digest(blob)
        checking.step(sizes.get(blob, 0))
        return found

    of_all = progress.phase("checking files of the hub", sum(sizes.values()))
    with of_all as checking, ThreadPoolExecutor(workers) as pool:
        for (blob, path), digest in zip(blobs.items(), pool.map(digest_of, blobs), strict=True):
            if digest != blob.name:
                raise InputError(
                    f"{path}: differs from the hub's file: its hash is {digest}, the hub's {blob.name}",
                    hint=f"the cache is damaged: remove {blob} and run again, to have it downloaded again",
                )


def _digest(blob: Path) -> str:
    with reading(), blob.open("rb", buffering=0) as file:
        if len(blob.name) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        start = f"blob {blob.stat().st_size}\0".encode()
        return hashlib.file_digest(file, lambda: hashlib.sha1(start, usedforsecurity=False)).hexdigest()
