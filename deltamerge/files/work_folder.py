"""The work folder of a run: locked, kept if the run dies, renamed to the target when complete.

Beside the target NAME there is `.NAME.partial`:

    deltamerge       the mark of our folders
    lock             held while a run uses the folder; the system releases it when a process dies
    journal          the finished work of a run; journal-2-of-8: of part 2 of 8
    part-2-of-8.lock held while that part runs
    calibration.lock and .rows: calibrated q's
    delta-spool/     finished tensors of an artifact
    out/             the future target; after an exchange with an old target, the old target
    old/             the replaced target, between two renames, on systems that cannot exchange two folders

A killed run leaves one of these states, and the next command repairs it:

    no journal records finished work: there is nothing to keep
    out/ exists: the next run, or --finish, continues the work
    out/ is missing, or is the old target that the journal's last record names: the target is complete, and only the
    work folder must be removed
    old/ exists and the target does not: old/ is put back

The folder carries our mark, is never opened through a link, and is cleared only of files that runs write. A cloned
repository may contain a link of that name, or a folder with links in it; users may have such a folder, or keep files in
ours.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge.errors import GO_ON, DeltamergeError, InputError, OutputError
from deltamerge.errors.shown import some
from deltamerge.files.atomic import PASSING, exchange, sweep
from deltamerge.files.descriptors import (
    DEEPEST,
    NO_LINK,
    check_folder,
    files_of,
    folders_in,
    is_plain_folder,
    lock,
    open_plain,
    opened,
    output_error,
    sync_path,
    writing,
)
from deltamerge.files.hashes import Seal, damages
from deltamerge.files.journal import (
    JOURNAL,
    Journal,
    check_facts,
    has_work,
    part_journals,
    published_inode,
    read_journal,
)
from deltamerge.files.ownership import LOCK_NAME, Guard, stamp

OUT, OLD, SPOOL, LOCK, MARK = "out", "old", "delta-spool", "lock", "deltamerge"
CALIBRATION = "calibration.lock"
MARK_TEXT = b"A deltamerge run works in this folder. It is removed when the run ends.\n"
HOLDER = re.compile(
    rb"(process \d+ on [^\n]*\n?|process \d*( on?)?|process|p?|pr|pro|proc|proce|proces)"
)  # or its start

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
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
KEPT = "finished work is kept"
SYNCS = 8


@dataclass
class Workspace:
    """A locked work folder.

    Outputs go to `folder`, files that must survive a crash to `state`. `journal` records progress. `guard` tells
    whether the target may be replaced.
    """

    target: Path
    state: Path
    journal: Journal
    force: bool
    guard: Guard

    @property
    def folder(self) -> Path:
        """Where the outputs are written."""
        return self.state / OUT

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write the facts that the run depends on into the journal, by name. OutputError: a resumed run had other
        facts."""
        if not self.journal.records:
            self.journal.append({"run": facts, "force": self.force})
            return
        first = self.journal.records[0]
        check_facts(self.target, first["run"], facts)
        self.force = self.force or first["force"]

    def empty(self) -> None:
        """Remove files of an earlier run from `folder`. OSError: some could not be removed."""
        with opened(self.state, _FOLDER) as folder:
            _empty(folder, OUT)

    def forget(self) -> None:
        """Declare that nothing written so far is worth keeping."""
        self.journal.records.clear()

    def publish(self, outputs: Mapping[str, Mapping[str, Any]], seals: Mapping[str, Seal], workers: int = 1) -> None:
        """Rename `folder` to the target.

        It must hold its lock and exactly the `outputs` (name -> {hash, size}), unchanged; all of it is synced first. An
        old target stays whole until the new one is there. A file whose seal is unbroken is not read again.

        OutputError: a file differs; the target may not be replaced, or has changed since the command began. A file that
        differs is removed, so that the next run makes it again.
        """
        from concurrent.futures import ThreadPoolExecutor

        self.guard.check(force=self.force, changed=True)
        self._check(outputs, seals, workers)
        with ThreadPoolExecutor(SYNCS) as pool:  # one commit of the file system's journal serves several files
            list(pool.map(sync_path, files_of(self.folder).values()))
        for folder in folders_in(self.folder):
            sync_path(folder)
        if self.guard.maker is not None:
            self.guard.maker.note(self.folder)
        with self.guard.keeping():
            self.guard.check(force=self.force, changed=True)
            back = self._put()
            try:
                sync_path(self.target.parent)
                sync_path(self.state)
            except OutputError:  # the rename may be lost in a crash: undo it, the next run repeats it
                back()
                raise
        self.journal.close()
        remove(self.state)

    def _check(self, outputs: Mapping[str, Mapping[str, Any]], seals: Mapping[str, Seal], workers: int) -> None:
        names = files_of(self.folder).keys()
        if strange := (names - {*outputs}) ^ {LOCK_NAME}:
            raise OutputError(f"{self.folder}: holds files that no run wrote, or has no lock: {some(sorted(strange))}")
        if wrong := damages(self.folder, outputs, seals, workers):
            for name in wrong:
                with suppress(OSError):
                    (self.folder / name).unlink()
            named = some(sorted(f"{name} {what}" for name, what in wrong.items()))
            raise OutputError(f"{self.target}: not made, as of its files {named}", hint="run it again")

    def _put(self) -> Callable[[], object]:
        """Rename the folder to the target; returns the function that undoes it. OutputError: another folder got that
        name in the moment before."""
        taken = OutputError(f"{self.target}: not empty any more", hint="choose another folder with --out")
        there = stamp(self.target)
        if there is None:
            try:
                os.rename(self.folder, self.target)  # also over an empty folder
            except OSError as error:
                raise taken if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else error from None
            return lambda: os.rename(self.target, self.folder)
        if not self.journal.records:
            self.journal.append({"run": {}, "force": self.force})
        self.journal.append({"publish": {"inode": self.folder.stat().st_ino}})
        if exchange(self.folder, self.target):
            if self.folder.stat().st_ino != there[0]:
                exchange(self.folder, self.target)
                raise taken
            return lambda: exchange(self.folder, self.target)
        old = self.state / OLD
        os.rename(self.target, old)
        try:
            os.rename(self.folder, self.target)
        except OSError:
            os.rename(old, self.target)
            raise

        def back() -> None:
            os.rename(self.target, self.folder)
            os.rename(old, self.target)

        return back


def state_of(target: Path) -> Path:
    """Return the work folder of a target."""
    resolved = Path(os.path.realpath(target))
    return resolved.parent / f".{resolved.name}.partial"


def is_begun(target: Path) -> bool:
    """Return whether work on `target` can be resumed, or may not be examined; a work folder without work is removed."""
    state = state_of(target)
    try:
        if look(state) is None:
            return False
        _settle(state, target)
        return any(map(has_work, _journals(state)))
    except (OSError, DeltamergeError):
        return True


@contextmanager
def workspace(
    target: Path,
    *,
    force: bool = False,
    resume: bool = False,
    part: str | None = None,
    finish: bool = False,
    guard: Guard | None = None,
) -> Iterator[Workspace]:
    """Lock the work folder of `target` and hold it; `publish` turns it into the target.

        target   the output folder
        force    replace a target, and discard the work of an earlier run
        resume   continue the work of an earlier run
        part     "2-of-8": share the folder with other parts
        finish   take over the finished parts
        guard    the content that may be replaced; None: nothing

    When the work ends without `publish`, the folder stays if there is work to resume; otherwise it is removed.
    OutputError: the target is a file, or not empty and may not be replaced. The work folder is not ours, or another run
    uses it. Without `resume` and `force`: an earlier run left work.
    """
    check_target(target)
    resolved, state = Path(os.path.realpath(target)), state_of(target)
    begun = look(state) is not None
    if begun:
        _settle(state, target, idle=part is None or (_filled(target) and not force))
        begun = look(state) is not None
    if finish and not begun:
        raise OutputError(f"{target}: no parts of a run are there", hint="run the parts first, with --part I/N")
    guard = guard or Guard.of(target)
    if not ((resume or finish) and begun and not force):
        with guard.keeping():
            guard.check(force=force)
    with ExitStack() as held:
        held.enter_context(hold(state, LOCK, target, shared=part is not None))
        if part is not None:
            held.enter_context(hold(state, f"part-{part}.lock", target))
        try:
            if not finish:
                _prepare(target, state, guard, force=force, resume=resume, part=part)
            (state / OUT).mkdir(exist_ok=True)
            if part is None:
                _sweep_files(state)
        except OSError as error:
            raise OutputError(f"{state}: {output_error(error)}", hint="remove it, or give its rights back") from error
        work = Workspace(resolved, state, Journal(state / (f"{JOURNAL}-{part}" if part else JOURNAL)), force, guard)
        try:
            yield work
        except BaseException as error:
            work.journal.close()
            kept = has_work(work.journal.records) or finish
            if not kept:
                _discard(state, part)
            explained = _explained(error, target, state, kept=kept, stays=part is None and state.exists())
            if explained is error:
                raise
            raise explained from error
        finally:
            work.journal.close()


@contextmanager
def parts_workspace(target: Path, *, force: bool, resume: bool, guard: Guard | None = None) -> Iterator[int | None]:
    """Surround all parts of a run, which lock the work folder themselves; yields the number of parts of a resumed run.

    None: no run to resume. If the parts fail, the folder stays if there is work to resume, else it is removed.
    OutputError: as for `workspace`, or the earlier run had parts of two counts.
    """
    state = state_of(target)

    def left() -> dict[str, list[dict[str, Any]]]:
        return {name: records for name, records in part_journals(state).items() if records}

    if look(state) is not None:
        _settle(state, target)
    if not resume:
        if not force and any(map(has_work, left().values())):
            raise _unfinished(target, state)
        with workspace(target, force=force, guard=guard):
            pass
    counts = {name.rpartition("-")[2] for name in left()}
    if len(counts) > 1:
        raise OutputError(f"{target}: {state} has parts of two runs", hint="start over with --force")
    try:
        yield int(counts.pop()) if counts else None
    except BaseException as error:
        kept = any(map(has_work, left().values()))
        if not kept and look(state) is not None:
            with suppress(OutputError), hold(state, LOCK, target):
                remove(state)
        explained = _explained(error, target, state, kept=kept, stays=state.exists())
        if explained is error:
            raise
        raise explained from error


def check_target(target: Path) -> None:
    """Raise OutputError if the target is a file, a mount point, the current folder or a place on a hub, has no name in
    UTF-8, or cannot be made where it is."""
    if target.parts[:1] == ("hf:",):
        there = "/".join(target.parts[1:])
        raise OutputError(f"{target}: is no folder here", hint=f"run --out FOLDER, then deltamerge push FOLDER {there}")
    resolved = Path(os.path.realpath(target))
    elsewhere = "choose another folder with --out"
    try:
        resolved.name.encode()
    except UnicodeEncodeError:
        what = f"{os.fsencode(resolved.name)!r}: is no name in UTF-8, which the model card must tell"
        raise OutputError(what, hint=elsewhere) from None
    try:
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target}: is a file", hint=elsewhere)
        if resolved.is_mount():
            raise OutputError(f"{target}: is a mount point", hint="choose a folder inside it with --out")
        if not target.name:
            raise OutputError(f"{target}: is the current folder", hint=elsewhere)
        _filled(target)
    except OSError as error:
        raise OutputError(f"{target}: {output_error(error)}", hint=elsewhere) from error
    check_folder(target.parent, makes=True)


def refuse_inputs(target: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Raise OutputError if the target is, or holds, one of the inputs (name, path)."""
    resolved = Path(os.path.realpath(target))
    for name, path in inputs:
        source = path.resolve()
        if resolved == source or source.is_relative_to(resolved):
            raise OutputError(f"{target}: holds the input {name}", hint="choose another folder with --out")


def _filled(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def _journals(state: Path) -> list[list[dict[str, Any]]]:
    return [read_journal(state / JOURNAL)[0], *part_journals(state).values()]


def _settle(state: Path, target: Path, *, idle: bool = True) -> None:
    """Repair the leftovers of a killed run, if no run is active.

    A replaced target gets its name back if the new target does not have it yet. The work folder is removed if the new
    target has its name, or if the folder is `idle` and without work. A part of a run leaves a folder without work
    alone, because other parts may be starting in it.
    """
    if not idle and not _has_ended(state, target):
        return
    with suppress(OutputError), hold(state, LOCK, target):  # OutputError: another run uses it
        resolved = Path(os.path.realpath(target))
        if (state / OLD).is_dir() and not resolved.exists():
            os.rename(state / OLD, resolved)
        if _has_ended(state, target) or not any(map(has_work, _journals(state))):
            if resolved.exists():
                sync_path(resolved.parent)
                sync_path(state)
            remove(state)


def _has_ended(state: Path, target: Path) -> bool:
    """Return whether the run in `state` was killed after its target had got its name."""
    journals = _journals(state)
    if (state / OUT).is_dir():
        return target.exists() and target.stat().st_ino in map(published_inode, journals)
    return target.exists() if (state / OLD).is_dir() else any(map(has_work, journals))


def _prepare(target: Path, state: Path, guard: Guard, *, force: bool, resume: bool, part: str | None) -> None:
    """Deal with the work of an earlier run: keep it, refuse, or remove it."""
    if (state / OLD).is_dir():
        raise OutputError(
            f"{target}: {state / OLD} holds the folder that was to be replaced, and there is another in its place",
            hint="move one of them away",
        )
    parts = part_journals(state)
    in_parts, whole = any(map(has_work, parts.values())), has_work(read_journal(state / JOURNAL)[0])
    if part is not None and whole:
        raise OutputError(
            f"{target}: a run without --part left unfinished work in {state}", hint="continue it, or remove that folder"
        )
    others = [] if part is None else [name for name in parts if has_work(parts[name]) and _count(name) != _count(part)]
    if others:
        raise OutputError(
            f"{target}: parts of another count are there: {some(sorted(others))}",
            hint=f"take their N, or remove {state} and start over",
        )
    if part is None and in_parts and (resume or not force):
        raise OutputError(
            f"{target}: parts of a run are in {state}", hint="end it with --finish, or start over with --force"
        )
    if whole if part is None else has_work(parts.get(part, [])):
        if resume:
            return
        if not force:
            raise _unfinished(target, state)
    try:
        with guard.keeping():
            guard.check(force=force)
    except OutputError:
        _discard(state, part)
        raise
    if part is None:
        clear(state)
    else:
        (state / f"{JOURNAL}-{part}").unlink(missing_ok=True)


def _count(part: str) -> str:
    """Return the N of a part "2-of-N"."""
    return part.rpartition("-")[2]


def _unfinished(target: Path, state: Path) -> OutputError:
    return OutputError(
        f"{target}: an earlier run left unfinished work in {state}",
        hint="run again to go on with it, or start over with --force",
    )


def _discard(state: Path, part: str | None) -> None:
    """Remove the folder, or a part's files in it."""
    if part is None:
        remove(state)
        return
    with suppress(OSError):
        (state / f"{JOURNAL}-{part}").unlink()


def _explained(error: BaseException, target: Path, state: Path, *, kept: bool, stays: bool) -> BaseException:
    """Return the error for the user: the system's refusal in our words, and the place of the work that is kept.

    `stays`: whether the work folder is there, though nothing in it may be worth keeping.
    """
    if isinstance(error, FileNotFoundError):
        error = InputError(f"{error.filename}: vanished during the run")
    elif isinstance(error, OSError):
        cause = output_error(error)
        error = OutputError(f"{target}: {cause}", hint=cause.hint)
    left = f"{KEPT} in {state}: {GO_ON}" if kept else f"{state} could not be removed: remove it" if stays else ""
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt("; ".join(filter(None, (str(error), left))))
    if left and isinstance(error, DeltamergeError) and left not in (error.hint or ""):
        error.hint = "; ".join(filter(None, (error.hint, left)))
    return error


@contextmanager
def hold(state: Path, name: str, target: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `name` of the work folder `state`, which is created and marked if it does not exist.

    `target` is named in errors; `shared`: for the parts of a run. OutputError: another run holds it, the folder is not
    ours, or it cannot be created.
    """
    path, made = state / name, list[Path]()
    while True:
        made = made or [parent for parent in state.parents if not parent.exists()]
        try:
            state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cause = output_error(error)
            raise OutputError(f"{state.parent}: {cause}", hint=cause.hint or "choose another with --out") from error
        look(state)
        try:
            fd = open_plain(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            time.sleep(0.001)
            continue  # a run that has just ended removed the folder
        except OSError as error:
            cause = output_error(error)
            raise OutputError(f"{state if state.is_dir() else state.parent}: {cause}", hint=cause.hint) from error
        if not lock(fd, shared=shared):
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
            os.close(fd)
            raise OutputError(
                f"{target}: another run is writing it ({holder or 'starting'})",
                hint="wait until it ends, or choose another folder with --out",
            )
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
        os.close(fd)  # a run that has just ended removed the file
    try:
        if not shared:
            with suppress(OSError):  # the holder is only shown in messages; a full disk is reported by the next write
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        with writing(state):
            mark(state)
        yield
    finally:
        os.close(fd)
        with suppress(OSError):  # a folder that is not empty stays
            for parent in made:
                parent.rmdir()


def look(state: Path) -> frozenset[str] | None:
    """Return the names in the work folder `state`; None if it does not exist. Nothing is changed.

    OutputError: it is not a run's folder, holds files that no run wrote, or cannot be read.
    """
    with writing(state):
        return _look(state)


def _look(state: Path) -> frozenset[str] | None:
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
            f"{state}: holds files that no run wrote there: {some(sorted(wrong))}",
            hint="move that away, or choose another folder with --out",
        )
    return frozenset(modes)


def mark(state: Path) -> None:
    """Mark the folder `state`, which `look` found empty or ours, as ours. OSError: it cannot be written."""
    with opened(state / MARK, os.O_RDWR | os.O_CREAT | NO_LINK) as fd:
        if os.pread(fd, len(MARK_TEXT) + 1, 0) != MARK_TEXT:
            done = 0
            while done < len(MARK_TEXT):  # a nearly full disk takes a part
                done += os.pwrite(fd, MARK_TEXT[done:], done)
            os.fsync(fd)


def clear(state: Path, *, but: Collection[str] = (MARK, LOCK)) -> None:
    """Remove run files from the work folder `state`. OSError: some could not be removed.

    Journals are removed first, because they describe the other files. The journal that records the end is the last of
    them.
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
    """Remove our files and the work folder. The caller holds its lock.

    The mark and the lock are removed last, so that leftovers of a killed process are still recognised as ours.
    """
    with suppress(OSError):
        clear(state)
        for name in (MARK, LOCK):
            (state / name).unlink(missing_ok=True)
        state.rmdir()


def _sweep_files(state: Path) -> None:
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


def _walk(folder: int, name: str, inside: str = "", depth: int = DEEPEST) -> Iterator[tuple[int, str, int, bool, str]]:
    """Yield every entry of a folder of the work folder: the open folder, name, mode, whether a run wrote it, path.

    The entries of a folder come before it. The artifact of a budget keeps its spool in OUT. A model of several
    components has folders in OUT and OLD (`inside`).
    """
    inside = inside or name
    with suppress(FileNotFoundError), opened(name, _FOLDER, folder) as inner:
        for one, mode in _modes(inner).items():
            is_spool = one == SPOOL and name == OUT and stat.S_ISDIR(mode)
            if is_spool or (depth and _is_part(one, mode, inside)):
                below = _walk(inner, one) if is_spool else _walk(inner, one, inside, depth - 1)
                yield from ((fd, entry, m, ours, f"{one}/{path}") for fd, entry, m, ours, path in below)
                yield inner, one, mode, True, one
            else:
                yield inner, one, mode, _is_file_of(one, mode, inside, depth), one


def _foreign(folder: int, name: str) -> list[str]:
    """Return the paths in a folder of the work folder that no run wrote."""
    return [_named(f"{name}/{path}", mode) for _, _, mode, ours, path in _walk(folder, name) if not ours]


def _empty(folder: int, name: str) -> None:
    """Remove files of runs from a folder of the work folder. OSError: some could not be removed."""
    for inner, one, mode, ours, _ in _walk(folder, name):
        if ours and stat.S_ISDIR(mode):
            os.rmdir(one, dir_fd=inner)
        elif ours:
            _unlink(one, inner)


def _is_part(name: str, mode: int, inside: str) -> bool:
    """Return whether an entry is the folder of a component of the output."""
    return inside in (OUT, OLD) and stat.S_ISDIR(mode) and is_plain_folder(name)


def _unlink(name: str, folder: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _named(name: str, mode: int) -> str:
    kinds = ((stat.S_ISLNK, " (a link)"), (stat.S_ISDIR, "/"))
    return name + next((kind for is_kind, kind in kinds if is_kind(mode)), "")


def _is_marked(folder: int, names: Collection[str]) -> bool:
    """Return whether the folder has our mark, or only the lock of a process that died before it wrote the mark."""
    if (made := _text(folder, MARK)) == MARK_TEXT:
        return True
    begun = MARK_TEXT.startswith(made) and HOLDER.fullmatch(_text(folder, LOCK)) is not None
    return {*names} <= {LOCK, MARK} and begun


def _text(folder: int, name: str) -> bytes:
    with suppress(OSError), opened(name, os.O_RDONLY | NO_LINK, folder) as fd:
        return os.pread(fd, 300, 0)
    return b""
