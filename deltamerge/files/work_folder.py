"""`.NAME.partial`, the folder that a run works in: marked as ours, opened through no link, cleared only of run files.

A cloned repository may contain a link of that name, or a folder with links in it; users may have such a folder, or keep
files in ours.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from deltamerge.errors import OutputError
from deltamerge.errors.shown import some
from deltamerge.files.atomic import PASSING, sweep
from deltamerge.files.descriptors import opened
from deltamerge.files.tree import DEEPEST, is_plain_folder

OUT, OLD, SPOOL, LOCK, JOURNAL, MARK = "out", "old", "delta-spool", "lock", "journal", "deltamerge"
CALIBRATION = "calibration.lock"
MARK_TEXT = b"A deltamerge run works in this folder. It is removed when the run ends.\n"
HOLDER = re.compile(
    rb"(process \d+ on [^\n]*\n?|process \d*( on?)?|process|p?|pr|pro|proc|proce|proces)"
)  # or its start
PART_JOURNAL = re.compile(r"journal-(\d+)-of-(\d+)")

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK  # O_NONBLOCK: a pipe is refused instead of blocking
_GONE = r"\.nfs[0-9a-f]+"  # NFS gives this name to a file that is removed while open
_FILES = re.compile(
    rf"{MARK}|{LOCK}|{JOURNAL}(-\d+-of-\d+)?|part-\d+-of-\d+\.lock|calibration\.(lock|rows)|{PASSING.pattern}|{_GONE}",
    re.DOTALL,
)
INNER = ".txt"  # of files that only folders of components have
# Names of the files that runs write into each folder; generous, since names of tokenizer files vary.
_WRITTEN = {
    OUT: re.compile(
        r".+\.(safetensors|json|jinja|model|tiktoken|spm|py|svg|rows)|recipe\.(yaml|lock)|README\.md|merges\.txt"
        rf"|(tokenizer|vocab|chat_template|spiece|sentencepiece).*|{PASSING.pattern}|{_GONE}",
        re.DOTALL,
    ),
    OLD: re.compile(".+", re.DOTALL),
    SPOOL: re.compile(rf"\d+|{_GONE}"),
}


def look(state: Path) -> frozenset[str] | None:
    """The names in the work folder `state`; None if it does not exist. Nothing is changed.

    OutputError: it is not a run's folder, or holds files that no run wrote. OSError: no access.
    """
    try:
        if not stat.S_ISDIR(os.lstat(state).st_mode):
            kind = "a link" if state.is_symlink() else "no folder"
            raise OutputError(
                f"{state}: is {kind}, and runs work in a folder of that name",
                hint="remove it, or choose another folder with --out",
            )
        with opened(state, _FOLDER) as folder:
            modes = _modes(folder)
            wrong = [_named(name, mode) for name, mode in modes.items() if not _is_written(name, mode)]
            for name in sorted(modes.keys() & _WRITTEN.keys()):
                if stat.S_ISDIR(modes[name]):
                    wrong += _foreign(folder, name)
            if not _is_marked(folder, modes):  # checked after the names: their writer wrote the mark first
                wrong = [_named(name, mode) for name, mode in modes.items()]
    except FileNotFoundError:
        return None
    if wrong:
        raise OutputError(
            f"{state}: holds what no run wrote there: {some(sorted(wrong))}",
            hint="move that away, or choose another folder with --out",
        )
    return frozenset(modes)


def mark(state: Path) -> None:
    """Mark the folder `state`, which `look` found empty or ours, as ours. OSError: it cannot be written."""
    with opened(state / MARK, os.O_RDWR | os.O_CREAT | _FILE) as fd:
        if os.pread(fd, len(MARK_TEXT) + 1, 0) != MARK_TEXT:
            os.pwrite(fd, MARK_TEXT, 0)
            os.fsync(fd)


def open_file(path: Path, flags: int) -> int:
    """Open a file of the work folder, creating it if `flags` say so. OutputError: it is a link or no plain file."""
    try:
        fd = os.open(path, flags | _FILE | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise OutputError(f"{path}: is a link, which no run wrote", hint="remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OutputError(f"{path}: is no plain file, which no run wrote", hint="remove it")
    return fd


def clear(state: Path, *, but: Collection[str] = (MARK, LOCK)) -> None:
    """Remove run files from the work folder `state`. OSError: some could not be removed.

    Journals go first, since they describe the other files; of these the one that says that all is done goes last.
    """
    with opened(state, _FOLDER) as folder:
        modes = {name: mode for name, mode in _modes(folder).items() if _is_written(name, mode) and name not in but}
        for name in sorted(modes, key=lambda name: (not name.startswith(JOURNAL), name == JOURNAL)):
            if name in _WRITTEN:
                _empty(folder, name)
                os.rmdir(name, dir_fd=folder)
            else:
                _unlink(name, folder)


def remove(state: Path) -> None:
    """Remove the work folder as far as it is ours; the caller holds its lock.

    The mark and the lock go last, so that what a killed process leaves is still recognised as ours.
    """
    with suppress(OSError):
        clear(state)
        for name in (MARK, LOCK):
            (state / name).unlink(missing_ok=True)
        state.rmdir()


def empty(state: Path, name: str) -> None:
    """Remove run files from the folder `name` of the work folder. OSError: some could not be removed."""
    with opened(state, _FOLDER) as folder:
        _empty(folder, name)


def sweep_files(state: Path) -> None:
    """Remove incomplete files of killed writers."""
    for path in (state, state / OUT):
        with suppress(FileNotFoundError), opened(path, _FOLDER) as folder:
            sweep(folder)


def _modes(folder: int) -> dict[str, int]:
    modes = {}
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # another run has just removed it
            modes[name] = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    return modes


def _is_written(name: str, mode: int) -> bool:
    return stat.S_ISDIR(mode) if name in _WRITTEN else stat.S_ISREG(mode) and _FILES.fullmatch(name) is not None


def _is_file_of(name: str, mode: int, inside: str, depth: int = DEEPEST) -> bool:
    is_inner = inside == OUT and depth < DEEPEST and name.endswith(INNER)
    return stat.S_ISREG(mode) and (is_inner or _WRITTEN[inside].fullmatch(name) is not None)


def _foreign(folder: int, name: str, inside: str = "", depth: int = DEEPEST) -> list[str]:
    """The names in a folder of the work folder that no run wrote; the artifact of a budget keeps its spool in OUT, and
    a model of several components has folders for them (`inside` OUT or OLD)."""
    inside = inside or name
    wrong: list[str] = []
    with suppress(FileNotFoundError), opened(name, _FOLDER, folder) as inner:
        modes = _modes(inner)
        if name == OUT and stat.S_ISDIR(modes.get(SPOOL, 0)):
            del modes[SPOOL]
            wrong = _foreign(inner, SPOOL)
        for part in [n for n, mode in modes.items() if depth and _is_part(n, mode, inside)]:
            del modes[part]
            wrong += _foreign(inner, part, inside, depth - 1)
        wrong += [_named(n, mode) for n, mode in modes.items() if not _is_file_of(n, mode, inside, depth)]
    return [f"{name}/{one}" for one in wrong]


def _is_part(name: str, mode: int, inside: str) -> bool:
    """Whether an entry is the folder of a component of what was made."""
    return inside in (OUT, OLD) and stat.S_ISDIR(mode) and is_plain_folder(name)


def _empty(folder: int, name: str, inside: str = "", depth: int = DEEPEST) -> None:
    inside = inside or name
    with opened(name, _FOLDER, folder) as inner:
        for one, mode in _modes(inner).items():
            if one == SPOOL and name == OUT and stat.S_ISDIR(mode):
                _empty(inner, SPOOL)
                os.rmdir(SPOOL, dir_fd=inner)
            elif depth and _is_part(one, mode, inside):
                _empty(inner, one, inside, depth - 1)
                os.rmdir(one, dir_fd=inner)
            elif _is_file_of(one, mode, inside, depth):
                _unlink(one, inner)


def _unlink(name: str, folder: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _named(name: str, mode: int) -> str:
    kinds = ((stat.S_ISLNK, " (a link)"), (stat.S_ISDIR, "/"))
    return name + next((kind for is_kind, kind in kinds if is_kind(mode)), "")


def _is_marked(folder: int, names: Collection[str]) -> bool:
    """Whether the folder has our mark, or only the lock of a process that was killed before it had written the mark."""
    if (made := _text(folder, MARK)) == MARK_TEXT:
        return True
    begun = MARK_TEXT.startswith(made) and HOLDER.fullmatch(_text(folder, LOCK)) is not None
    return {*names} <= {LOCK, MARK} and begun


def _text(folder: int, name: str) -> bytes:
    with suppress(OSError), opened(name, os.O_RDONLY | _FILE, folder) as fd:
        return os.pread(fd, 300, 0)
    return b""
