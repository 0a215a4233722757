"""The folder of a chain: its versions by name, in order, and what a reference to one of them means.

    chain/000100/    made from the base
    chain/000101/    made from what 000100 makes, and so on: version.json names it

A name that begins with a dot is of something unfinished, or a lock, and of no version.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.errors.shown import some
from deltamerge.files.descriptors import reading
from deltamerge.formats.delta.folder import MANIFEST
from deltamerge.models.chain.version import NAME, VERSION, Note, Version, check_link, open_version, read_note
from deltamerge.models.checkpoint import is_delta
from deltamerge.tensors.names import natural

RANGE = ".."
MOST = 100_000  # versions in one line
Stamp = tuple[int, int, int]


@dataclass(slots=True)
class Opened:
    """Versions that are open already, by path: a soup of a hundred opens none of them twice."""

    versions: dict[tuple[str, Stamp], Version] = field(default_factory=dict)
    linked: set[tuple[Path, str, Path, str]] = field(default_factory=set)

    def get(self, path: Path) -> Version:
        """The version in the folder `path`. InputError: as `open_version`."""
        if (held := stamp(path)) is None:
            return open_version(path)  # says what is missing
        key = (str(path), held)
        if key not in self.versions:
            self.versions[key] = open_version(path)
        return self.versions[key]


def stamp(path: Path) -> Stamp | None:
    """Which artifact a folder holds now; None: none that can be looked at."""
    try:
        status = os.stat(path / MANIFEST)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def folders(chain: Path) -> list[tuple[str, int]]:
    """The folders in a chain's that are named as versions are, by the numbers in their names, and their inodes.
    InputError: it cannot be read."""
    with errors.context(str(chain)), reading(), os.scandir(chain) as entries:
        found = [(e.name, e.inode()) for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return sorted(found, key=lambda one: natural(one[0]))


def names(chain: Path) -> list[str]:
    """The names of the versions in a chain's folder, by the numbers in them. InputError: it cannot be read."""
    return [name for name, _ in folders(chain) if is_version(chain / name)]


def is_version(path: Path) -> bool:
    """Whether a folder holds a delta artifact."""
    try:
        return is_delta(os.listdir(path))
    except OSError:
        return False


def is_chain(path: Path) -> bool:
    """Whether a folder holds versions, and is none itself."""
    if not path.is_dir() or is_version(path) or os.path.exists(path / "config.json"):
        return False
    try:
        return any(is_version(path / name) for name, _ in folders(path))
    except InputError:
        return False


def notes(chain: Path) -> dict[str, Note | None]:
    """What version.json says of every version of a chain, by name, but of those that a squash that was killed has
    folded into another and not yet removed."""
    return without_folded({name: read_note(chain / name) for name in names(chain)})


def without_folded(found: Mapping[str, Note | None]) -> dict[str, Note | None]:
    """The versions that are not folded into another of them."""
    gone = {one.name for note in found.values() if note is not None for one in note.folded}
    return {name: note for name, note in found.items() if name not in gone}


def end_of(chain: Path, found: Mapping[str, Note | None]) -> str | None:
    """The one version after which none comes; None: there is none. InputError: there are several."""
    followed = {note.after.name for note in found.values() if note is not None and note.after is not None}
    ends = [name for name in found if name not in followed]
    if len(ends) > 1:
        raise InputError(f"{chain}: has {len(ends)} ends: {some(ends)}", hint="name one of them, or remove all but one")
    return ends[0] if ends else None


def head(chain: Path) -> str:
    """The newest version of a chain. InputError: there is none, one is missing, or the versions are not in one line."""
    found = notes(chain)
    before = {name: None if note is None or note.after is None else note.after.name for name, note in found.items()}
    if lost := [name for name in before.values() if name is not None and name not in found]:
        raise _missing(chain, lost[0])
    at = end = end_of(chain, found)
    passed = dict[str, None]()
    while at is not None:
        passed[at], at = None, before[at]
    if len(passed) < len(found):
        raise InputError(f"{chain}: {min(found.keys() - passed.keys())} comes after itself, by {VERSION}")
    if end is None:
        raise InputError(f"{chain}: holds no version of a chain")
    return end


def resolve(path: Path) -> Path | None:
    """The folder of the version that `path` means, of the newest where it is a chain; None where it is no matter of
    chains. InputError: `path` would be in a chain, which does not have it."""
    if path.is_dir():
        if is_version(path):
            return path
        return path / head(path) if is_chain(path) else None
    chain = path.parent
    if path.exists() or not NAME.fullmatch(path.name) or not is_chain(chain):
        return None
    if not any(os.path.isfile(chain / name / VERSION) for name, _ in folders(chain)):
        return None  # a folder of deltas that are no chain may be missing something else
    raise _missing(chain, path.name)


def _missing(chain: Path, name: str) -> InputError:
    found = notes(chain)
    for other, note in found.items():
        if note is not None and name in {one.name for one in note.folded}:
            return InputError(
                f"{chain}: version {name} was folded into {other} by squash", hint=f"name {other}, or a later one"
            )
    listed = list(found)
    return InputError(f"{chain}: has no version {name}", hint=f"it has {listed[0]} to {listed[-1]}" if listed else None)


def line(path: Path, opened: Opened | None = None) -> tuple[Version, ...]:
    """The versions from the one that the base makes to the one in the folder `path`, each checked against the one
    before. InputError: one is missing, damaged, foreign, or not made from the one before."""
    opened, path = opened or Opened(), path.resolve()
    found, seen = [opened.get(path)], {path.name}
    while (after := found[-1].after) is not None:
        before = path.parent / after.name
        if not is_version(before):
            raise _missing(path.parent, after.name)
        if after.name in seen or len(found) >= MOST:
            raise InputError(f"{found[-1].path}: comes after itself, by {VERSION}")
        seen.add(after.name)
        found.append(opened.get(before))
        link = (before, found[-1].state, found[-2].path, found[-2].state)
        if link not in opened.linked:
            check_link(found[-1], found[-2])
            opened.linked.add(link)
    return tuple(reversed(found))


def between(path: Path) -> list[str]:
    """The names of the versions that a range "…/000100..000200" means, in order; by version.json alone. InputError: one
    is not there, or the second does not come after the first."""
    chain, (first, _, last) = path.parent, path.name.partition(RANGE)
    with errors.context(str(path)):
        for name in (first, last):
            if not is_version(chain / name):
                raise _missing(chain, name)
        found = [last]
        while found[-1] != first:
            note = read_note(chain / found[-1])
            if note is None or note.after is None or len(found) >= MOST:
                raise InputError(f"{last} does not come after {first}")
            found.append(note.after.name)
        return found[::-1]


def expand(reference: str, folder: Path) -> list[str] | None:
    """The references that one with a range stands for ("chain/000100..000200", "base+chain/000100..000200"), in order;
    None where it names no range of a local chain. InputError: as `between`."""
    before, plus, place = reference.rpartition("+")
    chain, slash, name = place.rpartition("/")
    first, dots, last = name.partition(RANGE)
    if not (slash and dots and NAME.fullmatch(first) and NAME.fullmatch(last)):
        return None
    path = folder / os.path.expanduser(chain)
    if not path.is_dir():
        return None
    return [f"{before}{plus}{chain}/{one}" for one in between(path / name)]
