"""The hub's cache: its files are links to blobs whose names are the hub's hashes of their content."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deltamerge.errors import InputError
from deltamerge.files import progress
from deltamerge.files.descriptors import reading

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
    """Hash the files of the hub's cache among `paths`. InputError: one differs from what the hub has."""
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
                    f"{path}: is not what the hub has: its hash is {digest}, the hub's {blob.name}",
                    hint=f"the cache is damaged: remove {blob} and run again, to have it downloaded again",
                )


def _digest(blob: Path) -> str:
    with reading(), blob.open("rb", buffering=0) as file:
        if len(blob.name) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        start = f"blob {blob.stat().st_size}\0".encode()
        return hashlib.file_digest(file, lambda: hashlib.sha1(start, usedforsecurity=False)).hexdigest()
