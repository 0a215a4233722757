"""Follow a chain that is being written, also to pinned versions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from deltamerge.apps.chain.live import Delta
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.errors.shown import some
from deltamerge.files.atomic import replace_file
from deltamerge.models.chain.folder import (
    Note,
    Opened,
    end_of,
    folders,
    is_version,
    line,
    pinned,
    read_note,
    without_folded,
)

OPEN = 4096  # versions that stay open

_Known = dict[tuple[str, int], Note | None]


def follow(
    chain: str | Path,
    *,
    after: str | None = None,
    latest: bool = False,
    poll: float = 1.0,
    timeout: float | None = None,
    marker: str | Path | None = None,
) -> Iterator[Delta]:
    """Yield the versions of a chain when they are published; existing versions come at once.

    after     begin after the version of this name; None: with the first
    latest    skip to the newest each time; `Delta.apply_` applies skipped versions too
    poll      seconds between looks at the folder, which may not exist yet
    timeout   end when nothing new has come for so many seconds; None: never
    marker    a file with the name of the last finished version, written when the next is requested; if it exists, it
              says where to continue

    While a version is pinned (`deltamerge pin`), only this version comes, whatever came before. A version that was
    yielded when the process died comes again; `apply_` then changes nothing. If squash has folded the version last
    yielded, the version that contains it comes next, over the base (`after` is None). InputError: a version is damaged
    or foreign, two versions have the same predecessor, or the marker file is no text.
    """
    path, opened, known = Path(chain), Opened(), dict[tuple[str, int], Note | None]()
    again: str | None = None  # a version that a process was going back to when it died
    if marker is not None:
        after, again = _marked(Path(marker), after)
    begins, waited = True, time.monotonic()
    while True:
        pin = pinned(path)
        goal = again if pin is None else pin
        name = _next(path, known, after, latest=latest) if goal is None else goal
        name = None if name == after and not begins else name  # at first the state may be a later one's
        found = None if name is None else _open(path, name, opened)
        if found is not None:
            if marker is not None and goal is not None:
                replace_file(Path(marker), f"{after or goal} {goal}\n")
            yield found
            after, again, begins, waited = found.name, None, False, time.monotonic()
            if marker is not None:
                replace_file(Path(marker), f"{after}\n")
            continue
        left = None if timeout is None else waited + timeout - time.monotonic()
        if left is not None and left <= 0:
            return
        time.sleep(poll if left is None else min(poll, left))


def _marked(marker: Path, after: str | None) -> tuple[str | None, str | None]:
    """Return the name in a marker file, or `after` without a file; and the second name, if there are two.

    With two names, a process was on its way from the first to the second. InputError: it cannot be read, or is no text.
    """
    try:
        done, *goals = marker.read_text(encoding="utf-8").split() or [after or ""]
        return done or None, goals[0] if goals else None
    except FileNotFoundError:
        return after, None
    except (OSError, UnicodeDecodeError) as error:
        why = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        hint = "name a file that `follow` wrote, or remove it to begin at the first version"
        raise InputError(f"{why}, so it names no version", hint=hint, where=str(marker)) from None


def _next(chain: Path, known: _Known, after: str | None, *, latest: bool) -> str | None:
    """Return the version that comes after one. None: none yet. InputError: two do."""
    if not chain.is_dir():
        return None
    found = _notes(chain, known)
    if after is None or after not in found:
        folded = {one.name: name for name, note in found.items() if note is not None for one in note.folded}
        firsts = [name for name, note in found.items() if note is None or note.after is None]
        if after is not None and after not in folded and found:
            raise InputError(f"{chain}: has no version {after}", hint="begin again: after=None, on the base")
    else:
        firsts = [
            name for name, note in found.items() if note is not None and note.after is not None
            and note.after.name == after
        ]  # fmt: skip
    if len(firsts) > 1:
        raise InputError(f"{chain}: {some(firsts)} all come after {after or 'the base'}")
    if not firsts or not latest:
        return firsts[0] if firsts else None
    return end_of(chain, found)


def _notes(chain: Path, known: _Known) -> Mapping[str, Note | None]:
    """Return the notes of all versions. Those of folders that are `known` are not read again."""
    there = folders(chain)
    for name, number in there:
        if (name, number) not in known and is_version(chain / name):
            try:
                known[name, number] = read_note(chain / name)
            except DeltamergeError:
                if folders(chain) == there:
                    raise
                return _notes(chain, known)  # one was folded while it was read
    for gone in known.keys() - {*there}:
        del known[gone]
    return without_folded({name: known[name, number] for name, number in there if (name, number) in known})


def _open(chain: Path, name: str, opened: Opened) -> Delta | None:
    """Open a version with all before it. None: one was folded meanwhile."""
    if len(opened.versions) > OPEN:
        opened.versions.clear()
    before = folders(chain)
    try:
        return Delta(line(chain / name, opened))
    except DeltamergeError:
        if folders(chain) == before:
            raise
        return None
