"""The folder of a chain: its versions in order of their names, and references to them.

    chain/000100/    made from the base
    chain/000101/    made from what 000100 makes, and so on: version.json names it

docs/reference/delta-format.md describes a version. Without version.json, or without `after`, it is made from the base.
A *state* is the content of all tensors of a model: one hash over their names, dtypes, shapes and hashes.
A name that begins with a dot belongs to something unfinished, or to a lock. A file `pinned` beside the versions names
the version that servers go to, whatever is newer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from blake3 import blake3
from pydantic import Field, StringConstraints, ValidationError

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.errors.shown import some
from deltamerge.files.descriptors import reading, writing
from deltamerge.files.hashes import hash_output
from deltamerge.files.strict_json import read_json
from deltamerge.formats.delta.entry import digest
from deltamerge.formats.delta.folder import MANIFEST
from deltamerge.formats.delta.manifest import Digest, Manifest, Natural, Record, Strict
from deltamerge.models.checkpoint import is_delta
from deltamerge.models.delta_file import DeltaFile
from deltamerge.tensors.names import natural

VERSION = "version.json"
PINNED = "pinned"
FORMAT = "deltamerge-version"
NAME = re.compile("[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
FOREIGN = "the version was changed, renamed or put in from elsewhere: copy the chain again"

VersionName = Annotated[str, StringConstraints(pattern=rf"^{NAME.pattern}$")]


class Named(Strict):
    """A version: its name and its resulting state."""

    name: VersionName
    state: Digest


class Stored(Strict):
    """A file of a version: "blake3:<hex>" and bytes."""

    hash: Annotated[str, StringConstraints(pattern=r"^blake3:[0-9a-f]{64}$")]
    size: Natural


class Note(Strict):
    """version.json.

    name     the version's, and its folder's
    base     the state of the chain's base
    state    the state that results
    after    the version that it changes; None: the base
    step     of the training run that wrote it
    folded   earlier versions that `squash` has folded into it, and removed
    quantised_from   the version of a plain model's chain that it stores in codes
    files    of the artifact
    """

    format: Literal["deltamerge-version"] = "deltamerge-version"
    version: Literal[1] = 1
    name: VersionName
    base: Digest
    state: Digest
    after: Named | None = None
    step: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    folded: Annotated[list[Named], Field(max_length=1_000_000)] = Field(default_factory=list)
    quantised_from: Named | None = None
    files: Annotated[dict[str, Stored], Field(max_length=100_000)]


class Content(NamedTuple):
    """A tensor in a state; `hash` as in delta.json."""

    dtype: str
    shape: tuple[int, ...]
    hash: str


def state_of(tensors: Mapping[str, Content]) -> str:
    """Return the hash of a state: BLAKE3 (128 bits) of a line for each tensor, sorted by name: name, dtype, shape and
    hash with tabs between, sizes with commas."""
    lines = (f"{n}\t{c.dtype}\t{','.join(map(str, c.shape))}\t{c.hash}\n" for n, c in sorted(tensors.items()))
    return digest(blake3("".join(lines).encode("utf-8", "surrogatepass")))


def contents(manifest: Manifest) -> dict[str, Content]:
    """Return the tensors that an artifact makes."""
    return {n: Content(r.dtype, tuple(r.shape), r.result) for n, r in manifest.tensors.items()}


def base_contents(manifest: Manifest) -> dict[str, Content]:
    """Return the tensors of the base that an artifact changes or keeps.

    Tensors that the result lacks are not included.
    """
    found = {}
    for name, record in manifest.tensors.items():
        if record.base is not None:
            found[record.base_name or name] = Content(*record.base_kind, record.base)
    return found


@dataclass(frozen=True)
class Version:
    """An open version: its folder, its artifact, and its version.json (None: there is none)."""

    path: Path
    delta: DeltaFile
    note: Note | None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def after(self) -> Named | None:
        return None if self.note is None else self.note.after

    @cached_property
    def contents(self) -> dict[str, Content]:
        """The tensors of the result."""
        return contents(self.delta.manifest)

    @cached_property
    def state(self) -> str:
        """The state of the result."""
        return state_of(self.contents)

    @cached_property
    def base(self) -> str:
        """The state of the chain's base."""
        return state_of(base_contents(self.delta.manifest)) if self.note is None else self.note.base


def open_version(path: Path) -> Version:
    """Return the version in the folder `path`.

    Of its files only delta.json is hashed. InputError: it does not follow the format, has another name than its folder,
    or contradicts version.json.
    """
    path = path.resolve()
    note = read_note(path)
    if note is not None:
        with errors.context(str(path)):
            _check_files(path, note)
    opened = DeltaFile.open(path)
    version = Version(path, opened, note)
    if note is None:
        return version
    with errors.context(str(path)):
        if wanted := {file.name for file in opened.files} - note.files.keys():
            raise InputError(f"{VERSION} does not list {min(wanted)}", hint=FOREIGN)
        if note.state != version.state:
            raise InputError(f"{VERSION} names another state than delta.json makes", hint=FOREIGN)
        if note.after is None and note.base != state_of(base_contents(opened.manifest)):
            raise InputError(f"{VERSION} names another base than delta.json", hint=FOREIGN)
    return version


def check_hashes(path: Path, files: Mapping[str, Stored]) -> list[str]:
    """Return the names of a version's files. InputError: a hash differs from version.json."""
    for name, stored in files.items():
        if hash_output(path / name) != stored.hash:
            raise InputError(f"{name} is not the file that {VERSION} names", hint="copy the version again")
    return list(files)


def _check_files(path: Path, note: Note) -> None:
    """Raise InputError if files of a version are missing or have another size."""
    for name, stored in note.files.items():
        if not NAME.fullmatch(name):
            raise InputError(f"{VERSION}: {name[:80]!r} is no name of a file")
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != stored.size:
            what = "is missing" if size is None else f"has {size} bytes, not {stored.size}"
            raise InputError(f"{name} {what}", hint="copy the version again")
    check_hashes(path, {name: stored for name, stored in note.files.items() if name == MANIFEST})


def read_note(path: Path) -> Note | None:
    """Return the content of version.json in a folder.

    None: there is none. InputError: it is damaged, or another version's.
    """
    if not (path / VERSION).is_file():
        return None
    with errors.context(str(path)):
        raw = read_json(path / VERSION)
        with errors.context(VERSION):
            if raw.get("format") != FORMAT:
                raise InputError("is not the version.json of a deltamerge chain")
            if raw.get("version") != 1:
                raise InputError(
                    f"has version {raw.get('version')!r}, this deltamerge reads version 1", hint="upgrade deltamerge"
                )
            try:
                note = Note.model_validate(raw)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if note.name != path.name:
            raise InputError(f"is version {note.name}, not {path.name}", hint=FOREIGN)
        return note


def write_note(folder: Path, note: Note) -> None:
    """Write a version's version.json, without defaults. OutputError: the disk."""
    said = {"format": note.format, "version": note.version} | note.model_dump(exclude_defaults=True)
    with writing(folder):
        (folder / VERSION).write_text(json.dumps(said, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def stored_files(folder: Path, files: Iterable[Path]) -> dict[str, Stored]:
    """Return the files of an artifact in `folder`, as version.json lists them."""
    return {
        path.name: Stored(hash=hash_output(folder / path.name), size=(folder / path.name).stat().st_size)
        for path in sorted(files)
    }


def check_link(before: Version, version: Version) -> None:
    """Raise InputError unless `version` was made from the result of `before`, tensor by tensor."""
    after = version.after
    if after is None or (after.name, after.state) != (before.name, before.state):
        said = "the base" if after is None else f"{after.name} of state {after.state}"
        raise InputError(
            f"{version.path}: comes after {said}, not after {before.name} of state {before.state}", hint=FOREIGN
        )
    if version.base != before.base:
        raise InputError(f"{version.path}: is of another base than {before.name}", hint=FOREIGN)
    with errors.context(str(version.path)):
        check_successor(before.contents, version.delta.manifest, before.name)


def check_successor(before: Mapping[str, Content], manifest: Manifest, name: str) -> None:
    """Raise InputError unless an artifact keeps names, dtypes and shapes of the tensors `before` of version `name`."""
    for tensor in sorted({*before, *manifest.removed} ^ manifest.tensors.keys()):
        what = "lacks" if tensor in before else "adds"
        raise InputError(
            f"{what} {tensor}: every version has the tensors of {name}, which it comes after",
            hint="begin a chain of its own with it",
        )
    for tensor, record in manifest.tensors.items():
        if found := _difference(before[tensor], record):
            raise InputError(f"{tensor}: was made from {found} than {name} makes", hint=FOREIGN)
        if not record.count and record.result != record.base:
            raise InputError(f"{tensor}: changes nothing, and yet names another result", hint=FOREIGN)


def _difference(before: Content, record: Record) -> str:
    """Return the difference between the tensor that a record changes and `before`, as text; "" if there is none."""
    if record.base != before.hash:
        return "other content"
    renamed = record.base_name is not None
    grown = record.base_shape is not None or tuple(record.shape) != before.shape
    cast = record.base_dtype is not None or record.dtype != before.dtype
    return "another name" if renamed else "another shape" if grown else "another dtype" if cast else ""


def described(versions: Iterable[Version]) -> Iterator[dict[str, object]]:
    """Yield the versions as `deltamerge list` prints them."""
    for version in versions:
        entries = version.delta.entries.values()
        note = version.note
        yield {
            "name": version.name,
            "after": None if version.after is None else version.after.name,
            "step": None if note is None else note.step,
            "state": version.state,
            "changed": sum(entry.record.count for entry in entries),
            "elements": sum(entry.size for entry in entries),
            "bytes": sum(file.stat().st_size for file in version.delta.files),
            "folded": [] if note is None else [one.name for one in note.folded],
        }


RANGE = ".."
MOST = 100_000  # versions in one line
Stamp = tuple[int, int, int]


@dataclass(slots=True)
class Opened:
    """Open versions by path, so that a soup of a hundred opens none of them twice."""

    versions: dict[tuple[str, Stamp], Version] = field(default_factory=dict)
    linked: set[tuple[Path, str, Path, str]] = field(default_factory=set)

    def get(self, path: Path) -> Version:
        """Return the version in the folder `path`. InputError: as for `open_version`."""
        if (held := stamp(path)) is None:
            return open_version(path)  # says what is missing
        key = (str(path), held)
        if key not in self.versions:
            self.versions[key] = open_version(path)
        return self.versions[key]


def stamp(path: Path) -> Stamp | None:
    """Return a stamp of the artifact that a folder holds now. None: there is none that can be read."""
    try:
        status = os.stat(path / MANIFEST)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def folders(chain: Path) -> list[tuple[str, int]]:
    """Return the folders in a chain with names of versions, in the order of their numbers, and their inodes.

    InputError: the chain cannot be read.
    """
    with errors.context(str(chain)), reading(), os.scandir(chain) as entries:
        found = [(e.name, e.inode()) for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return sorted(found, key=lambda one: natural(one[0]))


def names(chain: Path) -> list[str]:
    """Return the names of the versions in a chain's folder, in the order of their numbers.

    InputError: it cannot be read.
    """
    return [name for name, _ in folders(chain) if is_version(chain / name)]


def is_version(path: Path) -> bool:
    """Tell whether a folder holds a delta artifact."""
    try:
        return is_delta(os.listdir(path))
    except OSError:
        return False


def is_chain(path: Path) -> bool:
    """Tell whether a folder holds versions, and is no version itself."""
    if not path.is_dir() or is_version(path) or os.path.exists(path / "config.json"):
        return False
    try:
        return any(is_version(path / name) for name, _ in folders(path))
    except InputError:
        return False


def notes(chain: Path) -> dict[str, Note | None]:
    """Return the version.json of every version of a chain, by name.

    Versions that a killed squash has folded, but not yet removed, are left out.
    """
    return without_folded({name: read_note(chain / name) for name in names(chain)})


def without_folded(found: Mapping[str, Note | None]) -> dict[str, Note | None]:
    """Return the versions that are not folded into another of them."""
    gone = {one.name for note in found.values() if note is not None for one in note.folded}
    return {name: note for name, note in found.items() if name not in gone}


def end_of(chain: Path, found: Mapping[str, Note | None]) -> str | None:
    """Return the version without a successor. None: there is no version. InputError: there are several."""
    followed = {note.after.name for note in found.values() if note is not None and note.after is not None}
    ends = [name for name in found if name not in followed]
    if len(ends) > 1:
        raise InputError(f"{chain}: has {len(ends)} ends: {some(ends)}", hint="name one of them, or remove all but one")
    return ends[0] if ends else None


def head(chain: Path) -> str:
    """Return the newest version of a chain.

    InputError: there is none, one is missing, or the versions do not form one line.
    """
    found = notes(chain)
    before = {name: None if note is None or note.after is None else note.after.name for name, note in found.items()}
    if lost := [name for name in before.values() if name is not None and name not in found]:
        raise missing(chain, lost[0])
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
    """Return the folder of the version that `path` names, or of the newest version if `path` is a chain.

    None: it is neither. InputError: `path` lies in a chain that does not have this version.
    """
    if path.is_dir():
        if is_version(path):
            return path
        return path / head(path) if is_chain(path) else None
    chain = path.parent
    if path.exists() or not NAME.fullmatch(path.name) or not is_chain(chain):
        return None
    if not any(os.path.isfile(chain / name / VERSION) for name, _ in folders(chain)):
        return None  # a folder of deltas that form no chain may lack something else
    raise missing(chain, path.name)


def pinned(chain: Path) -> str | None:
    """Return the name of the version that servers go to. None: the newest. InputError: the file `pinned` is damaged."""
    try:
        name = (chain / PINNED).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError):
        name = ""
    if not NAME.fullmatch(name):
        raise InputError(f"{chain / PINNED}: names no version", hint=f"deltamerge pin {chain} --release")
    return name


def served(path: Path) -> Path | None:
    """As `resolve`, but return the pinned version if `path` is a chain with a pinned version."""
    name = pinned(path) if is_chain(path) else None
    return resolve(path) if name is None else resolve(path / name)


def missing(chain: Path, name: str) -> InputError:
    """Return the error for a version that a chain lacks: it was folded, or never there."""
    found = notes(chain)
    for other, note in found.items():
        if note is not None and name in {one.name for one in note.folded}:
            return InputError(
                f"{chain}: version {name} was folded into {other} by squash", hint=f"name {other}, or a later one"
            )
    listed = list(found)
    return InputError(f"{chain}: has no version {name}", hint=f"it has {listed[0]} to {listed[-1]}" if listed else None)


def line(path: Path, opened: Opened | None = None) -> tuple[Version, ...]:
    """Return the versions from the first to the version in the folder `path`, each checked against its predecessor.

    InputError: a version is missing, damaged, foreign, or not made from its predecessor.
    """
    opened, path = opened or Opened(), path.resolve()
    found, seen = [opened.get(path)], {path.name}
    while (after := found[-1].after) is not None:
        before = path.parent / after.name
        if not is_version(before):
            raise missing(path.parent, after.name)
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
    """Return the names of the versions in a range "…/000100..000200", in order, from version.json alone.

    InputError: one is missing, or the second does not come after the first.
    """
    chain, (first, _, last) = path.parent, path.name.partition(RANGE)
    with errors.context(str(path)):
        for name in (first, last):
            if not is_version(chain / name):
                raise missing(chain, name)
        found = [last]
        while found[-1] != first:
            note = read_note(chain / found[-1])
            if note is None or note.after is None or len(found) >= MOST:
                raise InputError(f"{last} does not come after {first}")
            found.append(note.after.name)
        return found[::-1]


def expand(reference: str, folder: Path) -> list[str] | None:
    """Return the references in a reference with a range ("chain/000100..000200", "base+chain/000100..000200"), in
    order.

    None: it names no range of a local chain. InputError: as for `between`.
    """
    before, plus, place = reference.rpartition("+")
    chain, slash, name = place.rpartition("/")
    first, dots, last = name.partition(RANGE)
    if not (slash and dots and NAME.fullmatch(first) and NAME.fullmatch(last)):
        return None
    path = folder / os.path.expanduser(chain)
    if not path.is_dir():
        return None
    return [f"{before}{plus}{chain}/{one}" for one in between(path / name)]
