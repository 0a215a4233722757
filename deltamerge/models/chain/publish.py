"""Writes to a chain or a store: a version appears complete under its name, or not at all.

One process at a time adds versions, and one folds old versions. Both may work at once, because a folded version keeps
its name and its state. Each removes the leftovers of a killed process of its kind.

A store is a folder of deltas of one base, each in a folder of its name. Files that several deltas share are hard links:
every delta stays a whole artifact, which can be applied, pushed, copied or removed by itself. A store has at least two
deltas, and none follows another (they would form a chain).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deltamerge import errors
from deltamerge.errors import InputError, OutputError
from deltamerge.errors.shown import some
from deltamerge.files.atomic import exchange, replace_file
from deltamerge.files.descriptors import files_of, is_inside, leads_out, lock, sync_path, writing
from deltamerge.files.hashes import hash_output
from deltamerge.files.ownership import HIDDEN, LOCK_NAME, MADE_BY, read_lock
from deltamerge.models.chain.folder import (
    PINNED,
    VERSION,
    Note,
    base_contents,
    is_chain,
    is_version,
    line,
    missing,
    names,
    notes,
    pinned,
    read_note,
)
from deltamerge.models.delta_file import DeltaFile
from deltamerge.tensors.dtypes import nbytes_of

EXTRACTED = {"command": "extract"}  # maker in the lock of such a delta


def is_store(path: Path) -> bool:
    """Tell whether a folder holds several deltas, and none follows another. InputError: a version is damaged."""
    if not is_chain(path):
        return False
    found = notes(path).values()
    return len(found) > 1 and all(note is None or note.after is None for note in found)


def is_member(path: Path) -> bool:
    """Return whether a delta belongs to a store.

    It does if its folder holds only deltas that `extract` made, or if it shares files with another delta there. A
    folder that also holds recipes, models or deltas of recipes is no store.
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
    """Return whether `extract` made a delta, by its lock. A delta without a lock, or of an earlier version, counts."""
    lock = delta / LOCK_NAME
    return not lock.is_file() or read_lock(lock).get(MADE_BY, EXTRACTED) == EXTRACTED


def _inode(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


@dataclass(slots=True)
class Sharing:
    """The files of a store's deltas by content ("blake3:<hex>", bytes), to which new deltas link."""

    store: Path
    _known: dict[tuple[str, int], Path] = field(default_factory=dict)
    _checked: set[Path] = field(default_factory=set)

    @classmethod
    def of(cls, store: Path) -> Sharing:
        """Return the files of the present deltas, from their locks. A delta without a lock shares no files."""
        found = cls(store)
        for name in names(store) if store.is_dir() else []:
            for key, path in _listed(store / name):
                found._known.setdefault(key, path)
        return found

    def add(self, name: str) -> int:
        """Replace files of the delta `name` by links if another delta has them too.

        Return the saved bytes. Files stay if the file system has no such links, or no more of them.
        """
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
        """Tell whether a file still matches its lock."""
        if path not in self._checked:
            try:
                if path.is_symlink() or hash_output(path) != wanted:
                    return False
            except InputError:
                return False
            self._checked.add(path)
        return True


def _listed(delta: Path) -> Iterator[tuple[tuple[str, int], Path]]:
    """Yield the files that a delta's lock lists, with hash and size."""
    try:
        outputs = read_lock(delta / LOCK_NAME)["outputs"]
    except InputError:
        return
    for name, entry in outputs.items():
        path = delta / name
        if is_inside(name) and not leads_out(delta, name) and path.is_file() and not path.is_symlink():
            yield (entry["hash"], entry["size"]), path


def _link(source: Path, target: Path) -> bool:
    """Replace `target` by a link to `source` in one step. False: the file system cannot."""
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
    """Return a store as `deltamerge list` prints it.

    bytes        bytes of all files; shared files count once
    unshared     bytes if no file were shared
    checkpoints  bytes of the resulting weights
    deltas       for each: name, base, changed and all elements, bytes of the artifact and of its other files

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


Work = Literal["adding", "folding"]
LEFT: dict[Work, tuple[str, ...]] = {"adding": ("adding",), "folding": ("folding", "gone", "old")}
UNFINISHED = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.(?P<kind>adding|folding|gone|old)", re.DOTALL)


@contextmanager
def one_writer(chain: Path, work: Work, *, sweep: bool = True) -> Iterator[None]:
    """Hold the chain's lock for one kind of work.

    The system releases it when a process dies. With `sweep`, remove the leftovers of a killed process.

    OutputError: another process does this work, or the folder cannot be written.
    """
    with writing(chain):
        chain.mkdir(parents=True, exist_ok=True)
        fd = os.open(chain / _lock_of(work), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        with writing(chain):
            free = lock(fd)
        if not free:
            raise OutputError(
                f"{chain}: another process is {work} versions", hint="wait until it ends: one does so at a time"
            )
        if sweep:
            with writing(chain):
                _sweep(chain, work)
        yield
    finally:
        os.close(fd)


@contextmanager
def publishing(chain: Path, name: str, work: Work) -> Iterator[Path]:
    """A new folder in which a version is written. When the block ends it is synced and gets its name in one step.

    The caller holds the lock. A folded version replaces the version of its name. OutputError: the disk; or the name of
    an added version is taken.
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
            _put(made, target, work)
            sync_path(chain)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def replacing(target: Path, *, delta: bool = False, adding: bool = False) -> Iterator[None]:
    """A context in which a run may give its result the name `target`, perhaps in place of an old result.

    Meanwhile nobody adds to the chain around it, or folds it. `delta`: the result is a delta artifact; `adding`: it
    follows a version of the chain, whose lock is held. OutputError: the old result is a version with successors,
    or a delta of a store, which not even force replaces. Or the name belongs to a folded version, or `delta` would be a
    second beginning of a chain.
    """
    resolved = Path(os.path.realpath(target))
    chain, name = resolved.parent, resolved.name
    with ExitStack() as held:
        if is_version(resolved):
            for work in LEFT:
                if (chain / _lock_of(work)).is_file() and not (adding and work == "adding"):
                    held.enter_context(one_writer(chain, work, sweep=False))
            refuse_kept(target)
        found = {}
        if chain.is_dir() and (resolved.exists() or delta):
            with suppress(InputError):  # versions of others; only their readers must understand them
                found = {other: read_note(chain / other) for other in names(chain)}
        for other, note in found.items():
            if other != name and note is not None and name in {one.name for one in note.folded}:
                raise OutputError(f"{target}: was folded into {other}, which has its name too", hint="another --out")
        if delta and not adding and (end := _end(chain, found, name)) is not None:
            raise OutputError(
                f"{target}: {chain} is a chain, in which it would come after no version",
                hint=f"--after {chain / end}, or another --out",
            )
        yield


def _end(chain: Path, found: Mapping[str, Note | None], name: str) -> str | None:
    """Return the newest version of the chain in a folder, to which the version `name` would be added.

    None: the folder holds no chain. It holds one if a version follows another, if another has a version.json, or if
    servers are pinned to one.
    """
    befores = {note.after.name for note in found.values() if note is not None and note.after is not None}
    others = [other for other in found if other != name]
    known = [other for other in others if found[other] is not None]
    if not (befores or known or (found and (chain / PINNED).is_file())):
        return None
    ends = [other for other in known or others if other not in befores]
    return (ends or known or others or [name])[-1]


def refuse_kept(path: Path) -> None:
    """Raise OutputError if versions follow the version in the folder `path`, or if it is a delta of a store."""
    resolved = Path(os.path.realpath(path))
    chain, name = resolved.parent, resolved.name
    found = {other: read_note(chain / other) for other in names(chain) if other != name}
    after = [other for other, note in found.items() if note is not None and note.after and note.after.name == name]
    if after:
        raise OutputError(
            f"{path}: is a version of a chain that {some(after)} comes after, and is never replaced",
            hint=f"another --out; `deltamerge squash {chain} --keep N` folds old versions, `deltamerge remove` takes "
            "away the newest",
        )
    if is_member(resolved):
        raise OutputError(
            f"{path}: is a delta of the store {chain}, and is never replaced",
            hint=f"another --out, or `deltamerge remove {path}` before",
        )


def remove_newest(path: Path) -> None:
    """Remove a delta of a store, or the newest version of a chain.

    InputError: it is no delta artifact. OutputError: a version comes after it, it holds files that no run wrote,
    another process writes to the chain, or the disk.
    """
    if not is_version(path):
        raise InputError(f"{path}: is no delta", hint="a version of a chain, or a delta of a store")
    resolved = Path(os.path.realpath(path))
    chain = resolved.parent
    with one_writer(chain, "adding"), one_writer(chain, "folding"):
        notes = {name: read_note(chain / name) for name in names(chain) if name != resolved.name}
        after = [name for name, note in notes.items() if note and note.after and note.after.name == resolved.name]
        if after:
            raise OutputError(f"{path}: {some(after)} comes after it", hint=f"deltamerge remove {chain / after[0]}")
        refuse_pinned(chain, [resolved.name])
        refuse_foreign(resolved)
        remove(chain, resolved.name)


def pin(version: Path) -> None:
    """Let the servers of a chain go to a version, and stay there, in one step. The chain may be written on meanwhile.

    InputError: it is no version of a chain. OutputError: another process folds versions, or the disk.
    """
    resolved = Path(os.path.realpath(version))
    chain, name = resolved.parent, resolved.name
    if not is_version(resolved) or not is_chain(chain) or is_store(chain):
        if is_chain(chain) and not is_store(chain) and not is_chain(resolved):
            raise missing(chain, name)
        newest = resolved / names(resolved)[-1] if is_chain(resolved) else "chain/000119"
        raise InputError(f"{version}: is no version of a chain", hint=f"deltamerge pin {newest}")
    with one_writer(chain, "folding"):
        line(resolved)
        replace_file(chain / PINNED, f"{name}\n")


def release(chain: Path) -> None:
    """Let the servers of a chain go on to its newest version. InputError: no chain. OutputError: the disk."""
    if not is_chain(chain) or is_store(chain):
        raise InputError(f"{chain}: is no chain", hint="deltamerge pin chain --release")
    with writing(chain):
        (chain / PINNED).unlink(missing_ok=True)
        sync_path(chain)


def refuse_pinned(chain: Path, names: Iterable[str]) -> None:
    """Raise OutputError if a version that would be removed is pinned."""
    if (name := pinned(chain)) in {*names}:
        raise OutputError(
            f"{chain / str(name)}: is pinned: servers go to it",
            hint=f"deltamerge pin {chain} --release, or pin another",
        )


def remove(chain: Path, name: str) -> None:
    """Remove a version: it loses its name in one step. OutputError: the disk."""
    gone = chain / f".{name}.{secrets.token_hex(8)}.gone"
    with writing(chain / name):
        os.rename(chain / name, gone)
        sync_path(chain)
    shutil.rmtree(gone, ignore_errors=True)


def refuse_foreign(path: Path) -> None:
    """Raise OutputError if a version's folder holds files that no run wrote, because they would be lost."""
    note, known = read_note(path), {VERSION, LOCK_NAME} | HIDDEN
    known |= set() if note is None else note.files.keys()
    if (path / LOCK_NAME).is_file():
        known |= read_lock(path / LOCK_NAME)["outputs"].keys()
    if strange := [name for name in files_of(path) if name not in known and name.split("/")[0] not in HIDDEN]:
        raise OutputError(f"{path}: holds files that no run wrote: {some(sorted(strange))}", hint="move that away")


def _lock_of(work: Work) -> str:
    return f".{work}.lock"


def _put(made: Path, target: Path, work: Work) -> None:
    if work == "adding" or not target.exists():
        os.rename(made, target)  # fails where another writer has taken the name since
    elif not exchange(made, target):  # no such call here: for a moment there is none
        old = target.parent / f".{target.name}.{secrets.token_hex(8)}.old"
        os.rename(target, old)
        os.rename(made, target)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(chain: Path, work: Work) -> None:
    """Remove the leftovers of a killed process of one kind of work."""
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
