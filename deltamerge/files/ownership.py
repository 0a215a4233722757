"""The makers of outputs and of files beside a user's file, and whether a command may replace them.

The lock of an output names its maker: the command, the name of the recipe's file, the models. The recipe's place is not
in the output, whose bytes are the same on every machine. It is stored on the folder, as a hash in an attribute, if the
file system has attributes.

A file beside a user's file, with a name derived from it, ends in a mark: a last line with the hash of its text. It is
replaced only while it is unchanged.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

import yaml
from blake3 import blake3
from typing_extensions import TypedDict

from deltamerge import errors
from deltamerge.errors import InputError, OutputError
from deltamerge.errors.shown import shown, some
from deltamerge.files.atomic import refuse_taken, replace_file
from deltamerge.files.descriptors import entries, input_error, output_error
from deltamerge.files.hashes import Seal, damages, seal

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
LOCK_NAME = "recipe.lock"
ROWS = ".rows"
MAX_BYTES = 1 << 26
MAX_DEPTH = 64
MAX_EVENTS = 1_000_000
# Hidden files belong to tools (git, the hub's clients, macOS); no loader takes them for a part of a model.
HIDDEN = frozenset({".git", ".gitattributes", ".gitignore", ".cache", ".huggingface", ".DS_Store"})


# The required keys of a lock. Others stay as they are.


class _File(TypedDict):
    hash: str
    size: int


class _Input(TypedDict):
    files: dict[str, _File]


class _Calibration(TypedDict):
    objective: str
    scope: str
    search: str
    q: dict[str, float]
    rows: NotRequired[str | None]


class _Lock(TypedDict):
    made_by: NotRequired[dict[str, str]]
    inputs: NotRequired[dict[str, _Input]]
    outputs: dict[str, _File]
    calibration: NotRequired[dict[str, _Calibration]]


@cache
def _form() -> TypeAdapter[_Lock]:
    from pydantic import TypeAdapter

    return TypeAdapter(_Lock)


def read_lock(path: Path) -> dict[str, Any]:
    """Return the content of a lock. InputError: not a lock, larger than 64 MB, or nested too deep."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes")
        text = raw.decode("utf-8")
        depth = 0
        for count, event in enumerate(yaml.parse(text, loader)):  # before composing, which recurses and takes memory
            if count > MAX_EVENTS:
                raise InputError(f"{path}: holds more than {MAX_EVENTS:,} values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise InputError(f"{path}: nested more than {MAX_DEPTH} deep")
        content = yaml.load(text, Loader=loader)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such lock", hint="a finished `deltamerge run` leaves one") from error
    except OSError as error:
        raise InputError(f"{path}: {input_error(error)}") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or an impossible date
        raise InputError(f"{path}: not a readable lock") from error
    if not isinstance(content, dict) or "outputs" not in content:
        raise InputError(f"{path}: not a deltamerge lock")
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: lock format {str(content.get('format'))[:80]!r} is unknown",
            hint="use the deltamerge that wrote it",
        )
    from pydantic import ValidationError

    try:
        _form().validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return content


def unlisted(folder: Path, lock: Mapping[str, Any]) -> list[str]:
    """Return the entries of `folder` that its lock does not list, without the lock itself and hidden files of tools."""
    return sorted(entries(folder, lock["outputs"]).keys() - {*lock["outputs"], LOCK_NAME} - HIDDEN)


def foreign_entries(folder: Path) -> list[str]:
    """Return the entries of `folder` that no run made, and that replacing it would lose. OSError: it cannot be read.

    They are all but the plain files that its lock lists; without a lock they are all.
    """
    lock, listed = folder / LOCK_NAME, set[str]()
    if lock.is_file() and not lock.is_symlink():
        try:
            listed = {LOCK_NAME, *read_lock(lock)["outputs"]}
        except InputError:
            listed = set()
    modes = entries(folder, listed)
    return sorted(name for name, mode in modes.items() if name not in listed or not stat.S_ISREG(mode))


DATA = "calibration data"
MADE_BY = "made_by"  # of a lock
NOTE = b"user.deltamerge.place"
WORKERS = 4
COMMENTS = {".svg": ("<!-- ", " -->")}  # of all others: #
WORDS = "written by deltamerge, which replaces it while it is unchanged: "
MOST = 1 << 26  # most bytes of a marked file


@dataclass(frozen=True, slots=True)
class Maker:
    """A command as the maker of an output.

    command   run, extract, …
    recipe    the name of the recipe's file; "" without a file
    document  the name of a document that others need; "" for the output
    models    the models, as the recipe names them
    place     a hash of the recipe's place relative to the output; for a command without a recipe, of its models' places
    own       the output lies at the recipe's default place
    """

    command: str
    recipe: str = ""
    document: str = ""
    models: frozenset[str] = frozenset()
    place: str = ""
    own: bool = False

    def describe(self) -> dict[str, str]:
        """Return the maker's entry in a lock. It does not depend on the recipe's place."""
        said = {"command": self.command, "recipe": self.recipe, "document": self.document}
        return {key: value for key, value in said.items() if value}

    def note(self, folder: Path) -> None:
        """Note the place on a folder, if the file system can."""
        with suppress(OSError, AttributeError):  # AttributeError: a system without attributes
            os.setxattr(folder, NOTE, self.place.encode())

    def owns(self, folder: Path) -> bool:
        """Return whether this maker made an output, perhaps with an earlier text of the recipe.

        If the lock does not name its maker, or no place is stored, models must agree: all models of a command, two of a
        recipe. At the recipe's default place none must. InputError: the folder has no lock.
        """
        lock = read_lock(folder / LOCK_NAME)
        said = lock.get(MADE_BY)
        if said is not None:
            if said != self.describe():
                return False
            if self.place and (noted := _noted(folder)):
                return noted == self.place
        models = frozenset(models_of(lock))
        return models == self.models or bool(self.recipe and (self.own or len(models & self.models) > 1))


def place_of(path: Path, folder: Path) -> str:
    """Return a hash of the place of `path` relative to the parent of `folder`."""
    seen = os.path.relpath(Path(os.path.realpath(path.parent)) / path.name, os.path.realpath(folder.parent))
    return place_named(os.fsencode(seen))


def place_named(text: bytes) -> str:
    """Return a hash of a place, given as bytes."""
    return blake3(text).hexdigest()[:32]


def models_of(lock: Mapping[str, Any]) -> list[str]:
    """Return the models that a lock names, without calibration data."""
    return sorted(name for name in lock.get("inputs", {}) if not name.startswith(DATA))


def maker_text(lock: Mapping[str, Any]) -> str:
    """Return the maker of a lock's output, and its models, as text."""
    said, models = lock.get(MADE_BY) or {"command": "an earlier version"}, models_of(lock)
    words = " ".join(shown(said[key]) for key in ("command", "recipe") if said.get(key))
    of = f" of {shown(some(models))}" if models else ""
    return f"made by {words}{of}"


Stamp = tuple[int, Seal | None]
Seals = dict[str, Seal]


@dataclass(frozen=True, slots=True)
class Guard:
    """The part of `target` that a command may replace: the content when the command began.

    maker    the maker whose earlier output may be replaced; None: nobody's
    began    the content when the command began; None: nothing
    keeping  a context in which the target may be replaced. OutputError: it never is, or not now.
    """

    target: Path
    maker: Maker | None
    began: Stamp | None
    keeping: Callable[[], AbstractContextManager[None]] = nullcontext
    _known: dict[Stamp, Seals] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        target: Path,
        maker: Maker | None = None,
        keeping: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Guard:
        """Return the guard of a command that begins now. OutputError: the target cannot be read."""
        return cls(target, maker, stamp(target), keeping)

    def check(self, *, force: bool, changed: bool = False) -> None:
        """Raise OutputError if the target is not empty and may not be replaced.

        It may not if another command made it, somebody changed it, or it was made since this command began. With
        `force` it may not only if it holds files that no run made. `changed`: the run is done, but for the name.
        """
        target = self.target
        now = stamp(target)
        if (outer := _output_around(target)) is not None:
            raise OutputError(
                f"{target}: lies in {outer}, an output, which it would be no part of",
                hint="choose a folder outside with --out",
            )
        if now is None:
            return
        lost = foreign_entries(target)
        if lost and force:
            raise OutputError(
                f"{target}: --force replaces only files of runs, and would delete {some(sorted(lost))}",
                hint="move that away or remove the folder yourself, or choose another with --out",
            )
        empty = f"{target}: not empty{' any more' if changed else ''}"
        flags = "--resume --force" if changed else "--force"
        hint = f"choose another folder with --out{'' if lost else f', or replace it with {flags}'}"
        if lost:
            raise OutputError(f"{empty}: holds {some(sorted(lost))}, which no run made", hint=hint)
        lock = read_lock(target / LOCK_NAME)
        if now != self.began:
            raise OutputError(f"{empty}: the result there was {maker_text(lock)}, since this command began", hint=hint)
        if force:
            return
        if self.maker is None or not self.maker.owns(target):
            raise OutputError(f"{empty}: the result there was {maker_text(lock)}", hint=hint)
        if wrong := self._changes(now, lock):
            raise OutputError(f"{target}: {some(wrong)} changed since a run made it", hint=hint)

    def _changes(self, now: Stamp, lock: Mapping[str, Any]) -> list[str]:
        """Return the files of the target that differ from its lock. Files with a known seal are not read again."""
        outputs = lock["outputs"]
        seals = {}
        for name in outputs:
            with suppress(OSError):
                seals[name] = seal(self.target / name)
        wrong = damages(self.target, outputs, self._known.get(now, {}), WORKERS)
        self._known[now] = {name: one for name, one in seals.items() if name not in wrong}
        return sorted(wrong)


def stamp(target: Path) -> Stamp | None:
    """Return the inode of a target and the seal of its lock; None: none is there, or empty. OutputError: no access."""
    try:
        if not target.is_dir() or not any(target.iterdir()):
            return None
        inode = target.stat().st_ino
    except OSError as error:
        raise OutputError(f"{target}: {output_error(error)}", hint="choose another folder with --out") from error
    try:
        return inode, seal(target / LOCK_NAME)
    except OSError:
        return inode, None


def has_weights(lock: Path) -> bool:
    """Return whether a lock belongs to its folder: some of its listed weights are present."""
    try:
        outputs = read_lock(lock)["outputs"]
    except InputError:
        return False
    return any((lock.parent / name).is_file() for name in outputs if name.endswith((".safetensors", ".gguf")))


def _output_around(target: Path) -> Path | None:
    """Return the output, or the delta artifact, that a folder is or would be in."""
    for outer in Path(os.path.realpath(target)).parents:
        if os.path.isfile(outer / "delta.json") or (
            os.path.isfile(outer / LOCK_NAME) and has_weights(outer / LOCK_NAME)
        ):
            return outer
    return None


def _noted(folder: Path) -> str:
    try:
        return os.getxattr(folder, NOTE).decode("ascii", "replace")
    except (OSError, AttributeError):
        return ""


def replace_own(path: Path, text: str, of: str) -> None:
    """Write `text` and its mark to `path`, of the recipe file named `of`. OutputError: as `replace_file`."""
    raw = text.encode() if text.endswith("\n") or not text else f"{text}\n".encode()
    replace_file(path, raw + _mark(path, raw, of))


def refuse_others(
    path: Path, of: str, *, force: bool = False, unmarked: Callable[[Path], bool] = lambda path: False
) -> None:
    """Raise OutputError if `path` is a link, a folder, or a file that was not written for the recipe file named `of`.

    A file that was changed since is refused too. `force` lets any file be replaced. `unmarked` tells whether a file
    without a mark comes from an earlier version.
    """
    with errors.context(str(path)):
        refuse_taken(path)
        if force or not path.exists():
            return
        try:
            with path.open("rb") as file:
                raw = file.read(MOST + 1)
        except OSError as error:
            raise OutputError(f"is there, and cannot be read: {error.strerror}", hint="move it away") from None
        text, mark = _parted(raw)
        if mark == _mark(path, text, of) if mark else unmarked(path):
            return
        hint = "move it away, or replace it with --force"
        if mark:
            raise OutputError(f"was changed since it was written, or is of another recipe than {shown(of)}", hint=hint)
        raise OutputError(f"is there, and was not written for {shown(of)} by deltamerge", hint=hint)


def _mark(path: Path, text: bytes, of: str) -> bytes:
    begin, end = COMMENTS.get(path.suffix, ("# ", ""))
    digest = blake3(text + b"\0" + of.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return f"{begin}{WORDS}{digest}{end}\n".encode()


def _parted(raw: bytes) -> tuple[bytes, bytes]:
    """Return the text of a file before its mark, and the rest from the mark on; "" if there is no mark."""
    at = raw.rfind(WORDS.encode())
    begin = raw.rfind(b"\n", 0, at) + 1 if at >= 0 else len(raw)
    return raw[:begin], raw[begin:]
