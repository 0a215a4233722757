"""The folder that a run works in: locked, kept if the run dies, renamed to the target when complete.

Beside the target NAME there is `.NAME.partial`:

    deltamerge       the mark by which it is ours
    lock             held (flock) while a run uses the folder; the system lets go of it when a process dies
    journal          what a run has finished; journal-2-of-8: what part 2 of 8 has
    part-2-of-8.lock held while that part runs
    calibration.lock and .rows: calibrated q's
    delta-spool/     finished tensors of an artifact
    out/             what becomes the target; once it has changed places with a target, the old one
    old/             the replaced target, for the moment between two renames, where places cannot be changed

A run that is killed leaves one of these, and whatever command comes next puts it right:

    no journal says that work is done: there is nothing to keep
    out/ is there: the next run goes on with the work, or --finish
    out/ is not there, or is the folder that was the target when the journal's last record named the new one: the target
    is complete, and only the work folder has to go
    old/ is there and the target is not: it is put back
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge.errors import GO_ON, DeltamergeError, InputError, OutputError
from deltamerge.errors.shown import some
from deltamerge.files import work_folder
from deltamerge.files.atomic import exchange
from deltamerge.files.descriptors import output_error, sync_path
from deltamerge.files.journal import Journal, check_facts, has_work, named_inode, part_journals, read_journal
from deltamerge.files.lock_file import LOCK_NAME
from deltamerge.files.maker import Guard, stamp
from deltamerge.files.seals import Seal, damages
from deltamerge.files.tree import files_of, folders_in
from deltamerge.files.work_folder import JOURNAL, LOCK, OLD, OUT
from deltamerge.files.work_lock import locked, looked

KEPT = "what is done is kept"
SYNCS = 8


@dataclass
class Workspace:
    """A locked work folder: outputs go to `folder`, what must survive a crash to `state`; `journal` records
    progress; `guard` says what of the target may be replaced."""

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
        """Remove what an earlier run left in `folder`."""
        work_folder.empty(self.state, OUT)

    def forget(self) -> None:
        """Declare that nothing written so far is worth keeping."""
        self.journal.records.clear()

    def publish(self, outputs: Mapping[str, Mapping[str, Any]], seals: Mapping[str, Seal], workers: int = 1) -> None:
        """Rename `folder` to the target.

        It must hold its lock and exactly the `outputs` (name -> {hash, size}), unchanged; all of it is synced first. An
        old target stays whole until the new one is there. A file whose seal is unbroken is not read again.

        OutputError: a file differs, and is removed so that the next run makes it again; the target may not be replaced,
        or has changed since the command began.
        """
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
        work_folder.remove(self.state)

    def _check(self, outputs: Mapping[str, Mapping[str, Any]], seals: Mapping[str, Seal], workers: int) -> None:
        names = files_of(self.folder).keys()
        if strange := (names - {*outputs}) ^ {LOCK_NAME}:
            raise OutputError(f"{self.folder}: holds what no run wrote, or has no lock: {some(sorted(strange))}")
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
    """The work folder of a target."""
    resolved = Path(os.path.realpath(target))
    return resolved.parent / f".{resolved.name}.partial"


def is_begun(target: Path) -> bool:
    """Whether work on `target` can be resumed, or may not be examined; a work folder without work is removed."""
    state = state_of(target)
    try:
        if looked(state) is None:
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
        finish   take over what the parts left
        guard    what may be replaced unasked; None: nothing

    When the work ends without `publish`, the folder stays if there is work to resume, else it is removed. OutputError:
    the target is a file, or not empty and may not be replaced; the work folder is not ours; another run uses it; or an
    earlier run left work (without `resume` or `force`).
    """
    resolved, state = Path(os.path.realpath(target)), state_of(target)
    _check_name(resolved)
    try:
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target}: is a file", hint="choose another folder with --out")
        if target.is_mount():
            raise OutputError(f"{target}: is a mount point", hint="choose a folder inside it with --out")
        _filled(target)
    except OSError as error:
        raise OutputError(f"{target}: {output_error(error)}", hint="choose another folder with --out") from error
    begun = looked(state) is not None
    if begun:
        _settle(state, target, idle=part is None or (_filled(target) and not force))
        begun = looked(state) is not None
    if finish and not begun:
        raise OutputError(f"{target}: no parts of a run are there", hint="run the parts first, with --part I/N")
    guard = guard or Guard.of(target)
    if not ((resume or finish) and begun and not force):
        with guard.keeping():
            guard.check(force=force)
    with ExitStack() as held:
        held.enter_context(locked(state, LOCK, target, shared=part is not None))
        if part is not None:
            held.enter_context(locked(state, f"part-{part}.lock", target))
        try:
            if not finish:
                _prepare(target, state, guard, force=force, resume=resume, part=part)
            (state / OUT).mkdir(exist_ok=True)
            if part is None:
                work_folder.sweep_files(state)
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

    if looked(state) is not None:
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
        if not kept and looked(state) is not None:
            with suppress(OutputError), locked(state, LOCK, target):
                work_folder.remove(state)
        explained = _explained(error, target, state, kept=kept, stays=state.exists())
        if explained is error:
            raise
        raise explained from error


def refuse_inputs(target: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """OutputError: the target is, or holds, one of the inputs (name, path)."""
    resolved = Path(os.path.realpath(target))
    for name, path in inputs:
        source = path.resolve()
        if resolved == source or source.is_relative_to(resolved):
            raise OutputError(f"{target}: holds the input {name}", hint="choose another folder with --out")


def _filled(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def _check_name(target: Path) -> None:
    try:
        target.name.encode()
    except UnicodeEncodeError:
        raise OutputError(
            f"{os.fsencode(target.name)!r}: is no name in UTF-8, which the model card must tell",
            hint="choose another folder with --out",
        ) from None


def _journals(state: Path) -> list[list[dict[str, Any]]]:
    return [read_journal(state / JOURNAL)[0], *part_journals(state).values()]


def _settle(state: Path, target: Path, *, idle: bool = True) -> None:
    """Repair what a killed run left, if no run is active.

    A replaced target gets its name back if the new one has not got it yet; the work folder is removed if the new one
    has, or if the folder is `idle` and without work. A part of a run leaves a folder without work alone: other parts
    may be starting in it.
    """
    if not idle and not _has_ended(state, target):
        return
    with suppress(OutputError), locked(state, LOCK, target):  # OutputError: another run uses it
        resolved = Path(os.path.realpath(target))
        if (state / OLD).is_dir() and not resolved.exists():
            os.rename(state / OLD, resolved)
        if _has_ended(state, target) or not any(map(has_work, _journals(state))):
            if resolved.exists():
                sync_path(resolved.parent)
                sync_path(state)
            work_folder.remove(state)


def _has_ended(state: Path, target: Path) -> bool:
    """Whether the run in `state` was killed after its target had got its name."""
    journals = _journals(state)
    if (state / OUT).is_dir():
        return target.exists() and target.stat().st_ino in map(named_inode, journals)
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
        work_folder.clear(state)
    else:
        (state / f"{JOURNAL}-{part}").unlink(missing_ok=True)


def _unfinished(target: Path, state: Path) -> OutputError:
    return OutputError(
        f"{target}: an earlier run left unfinished work in {state}",
        hint="run again to go on with it, or start over with --force",
    )


def _discard(state: Path, part: str | None) -> None:
    """Remove the folder, or a part's files in it."""
    if part is None:
        work_folder.remove(state)
        return
    with suppress(OSError):
        (state / f"{JOURNAL}-{part}").unlink()


def _explained(error: BaseException, target: Path, state: Path, *, kept: bool, stays: bool) -> BaseException:
    """The error for the user: the system's refusal in our words, what was kept and where.

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
