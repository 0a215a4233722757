"""The files of an output folder, by their paths below it; nothing is followed that is a link."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

DEEPEST = 4  # folders inside one another
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


def is_plain_folder(folder: str) -> bool:
    """Return whether a folder of an output lies below the output's own, under plain names."""
    parts = folder.split("/")
    return len(parts) <= DEEPEST and all(_PART.fullmatch(part) and not part.endswith(".") for part in parts)


def files_of(folder: Path) -> dict[str, Path]:
    """Return path below `folder`, with slashes -> path, of every file in it and in its folders."""
    return {name: folder / name for name, _ in _entries(folder, "")}


def folders_in(folder: Path) -> list[Path]:
    """Return `folder` and the folders in it, the innermost first."""
    inner = {path.parent for path in files_of(folder).values()}
    above = {parent for path in inner for parent in (path, *path.parents) if parent.is_relative_to(folder)}
    return sorted(above | {folder}, key=lambda path: (-len(path.parts), path))


def entries(folder: Path, listed: Collection[str]) -> dict[str, int]:
    """Return the mode of every entry of `folder`, by its path below it. OSError: one cannot be read.

    Folders of `listed` files are entered; any other folder is one entry.
    """
    held = {parent.as_posix() for name in listed if is_inside(name) for parent in Path(name).parents}
    found: dict[str, int] = {}
    left = [""]
    while left:
        start = left.pop()
        for entry in os.scandir(folder / start):
            name = f"{start}/{entry.name}" if start else entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and name in held:
                left.append(name)
            else:
                found[name] = mode
    return found


def is_inside(name: str) -> bool:
    """Return whether a name in a lock is a file of the output's folder, or of a component's folder in it."""
    folder, slash, file = name.rpartition("/")
    plain = file not in ("", ".", "..") and "\\" not in file and "\0" not in file
    return plain and (not slash or is_plain_folder(folder))


def leads_out(folder: Path, name: str) -> bool:
    """Return whether a folder on the way from `folder` to its file `name` is a link."""
    return any((folder / parent).is_symlink() for parent in Path(name).parents if parent.parts)


def _entries(folder: Path, start: str) -> Iterator[tuple[str, int]]:
    for entry in sorted(os.scandir(folder / start), key=lambda entry: entry.name):
        name = f"{start}/{entry.name}" if start else entry.name
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _entries(folder, name)
        else:
            yield name, mode
