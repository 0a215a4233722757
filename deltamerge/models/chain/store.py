"""A store: a folder of deltas of one base, each in a folder of its name; files that several have are there once.

They are hard links: every delta stays a whole artifact, which can be applied, pushed, copied or removed by itself. A
store has two deltas at least, none of which comes after another (those would be a chain).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.lock_file import LOCK_NAME, read_lock
from deltamerge.files.ownership import MADE_BY
from deltamerge.files.seals import hash_output
from deltamerge.files.tree import files_of, is_inside, leads_out
from deltamerge.models.chain.folder import is_chain, names, notes
from deltamerge.models.chain.version import base_contents
from deltamerge.models.delta_file import DeltaFile
from deltamerge.tensors.dtypes import nbytes_of

EXTRACTED = {"command": "extract"}  # what the lock of such a delta says of its maker


def is_store(path: Path) -> bool:
    """Whether a folder holds deltas, several, none of which comes after another. InputError: a version is damaged."""
    if not is_chain(path):
        return False
    found = notes(path).values()
    return len(found) > 1 and all(note is None or note.after is None for note in found)


def is_member(path: Path) -> bool:
    """Return whether a delta is one of a store.

    It is where the folder holds nothing but deltas that `extract` made, or where it shares files with another of them.
    A folder of work, with recipes, models or deltas of recipes in it, is no store for a delta made there alone.
    """
    store = path.parent
    others = [name for name in names(store) if name != path.name]
    if not others or any(note is not None and note.after is not None for note in notes(store).values()):
        return False
    deltas = {path.name, *others}
    if all(name in deltas or name.startswith(".") or name.startswith("README") for name in os.listdir(store)) and all(
        _is_extracted(store / name) for name in deltas
    ):
        return True
    own = {_inode(file) for file in files_of(path).values() if os.lstat(file).st_nlink > 1}
    return bool(own) and any(_inode(file) in own for name in others for file in files_of(store / name).values())


def _is_extracted(delta: Path) -> bool:
    """Return whether `extract` made a delta, as its lock says; a delta without a lock, or of before, may be so."""
    lock = delta / LOCK_NAME
    return not lock.is_file() or read_lock(lock).get(MADE_BY, EXTRACTED) == EXTRACTED


def _inode(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


@dataclass(slots=True)
class Sharing:
    """The files of a store's deltas by content ("blake3:<hex>", bytes), for those that are added to link to."""

    store: Path
    _known: dict[tuple[str, int], Path] = field(default_factory=dict)
    _checked: set[Path] = field(default_factory=set)

    @classmethod
    def of(cls, store: Path) -> Sharing:
        """The files of the deltas that are there, as their locks have them; a delta without one shares none."""
        found = cls(store)
        for name in names(store) if store.is_dir() else []:
            for key, path in _listed(store / name):
                found._known.setdefault(key, path)
        return found

    def add(self, name: str) -> int:
        """Put links in the place of files of the delta `name` that another has too; the bytes that this saves. Where
        the file system has no such links, or no more of them, the files stay."""
        saved = 0
        for key, path in _listed(self.store / name):
            other = self._known.setdefault(key, path)
            if other.parent == path.parent or not self._holds(other, key[0]):
                self._known[key] = path
            elif not os.path.samefile(other, path):
                if _link(other, path):
                    saved += key[1]
                else:
                    self._known[key] = path
        return saved

    def _holds(self, path: Path, wanted: str) -> bool:
        """Whether a file still is what its lock says."""
        if path not in self._checked:
            try:
                if path.is_symlink() or hash_output(path) != wanted:
                    return False
            except InputError:
                return False
            self._checked.add(path)
        return True


def _listed(delta: Path) -> Iterator[tuple[tuple[str, int], Path]]:
    """The files that a delta's lock lists, with hash and size."""
    try:
        outputs = read_lock(delta / LOCK_NAME)["outputs"]
    except InputError:
        return
    for name, entry in outputs.items():
        path = delta / name
        if is_inside(name) and not leads_out(delta, name) and path.is_file() and not path.is_symlink():
            yield (entry["hash"], entry["size"]), path


def _link(source: Path, target: Path) -> bool:
    """Let `target` be the file `source`, in one step; False where that cannot be."""
    passing = target.parent / f".{target.name[:48]}.{secrets.token_hex(8)}.deltamerge"
    try:
        os.link(source, passing, follow_symlinks=False)
    except OSError:
        return False
    try:
        os.replace(passing, target)
    except OSError:
        with suppress(OSError):
            os.unlink(passing)
        return False
    return True


def described(store: Path) -> dict[str, Any]:
    """What `deltamerge list` says of a store.

    bytes        of all files, those that deltas share counted once
    unshared     if none were shared
    checkpoints  of the weights that the deltas make
    deltas       of each name, base, changed and all elements, bytes of the artifact and of its other files

    InputError: a delta does not follow the format.
    """
    found, inodes, unshared, checkpoints = [], dict[tuple[int, int], int](), 0, 0
    bases = dict[str, set[str]]()
    for name in names(store):
        opened = DeltaFile.open(store / name)
        with errors.context(str(store / name)):
            sizes = {path: os.lstat(path) for path in files_of(store / name).values()}
        inodes |= {(one.st_dev, one.st_ino): one.st_size for one in sizes.values()}
        all_bytes = sum(one.st_size for one in sizes.values())
        own = sum(sizes[path].st_size for path in opened.files)
        unshared += all_bytes
        entries = opened.entries.values()
        checkpoints += sum(nbytes_of(entry.record.dtype, tuple(entry.record.shape)) for entry in entries)
        for tensor, content in base_contents(opened.manifest).items():
            bases.setdefault(tensor, set()).add(content.hash)
        found.append(
            {
                "name": name,
                "base": opened.manifest.base.model_dump(),
                "changed": sum(entry.record.count for entry in entries),
                "elements": sum(entry.size for entry in entries),
                "bytes": own,
                "other_bytes": all_bytes - own,
            }
        )
    return {
        "one_base": all(len(hashes) == 1 for hashes in bases.values()),
        "bytes": sum(inodes.values()),
        "unshared": unshared,
        "checkpoints": checkpoints,
        "deltas": found,
    }
