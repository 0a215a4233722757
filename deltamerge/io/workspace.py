"""The folder that a run works in: locked, kept for --resume if the run dies, renamed to the target when complete.

Beside the target NAME there is `.NAME.partial`:

    lock             held (flock) while a run uses the folder; the system lets go of it when a process dies
    journal          what a run has finished; journal-2-of-8: what part 2 of 8 has
    part-2-of-8.lock held while that part runs
    delta-spool/     finished tensors of an artifact
    out/             what becomes the target
    old/             the replaced target, for the moment between two renames
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge.errors import DeltamergeError, InputError, OutputError
from deltamerge.io.files import output_error, sync_path
from deltamerge.io.journal import Journal, read_journal

OUT, OLD, LOCK, JOURNAL = "out", "old", "lock", "journal"
KEPT = "what is done is kept: continue with --resume"
SYNCS = 8
PART_JOURNAL = re.compile(r"journal-(\d+)-of-(\d+)")


@dataclass
class Workspace:
    """A locked work folder: files go to `folder`, what must outlast a crash to `state`; `journal` remembers."""

    target: Path
    state: Path
    journal: Journal
    force: bool

    @property
    def folder(self) -> Path:
        return self.state / OUT

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write into the journal what the run is made of, name by name; OutputError naming what differs if it goes on
        with a run that was made of something else."""
        if not self.journal.records:
            self.journal.append({"run": facts, "force": self.force})
            return
        first = self.journal.records[0]
        check_facts(self.target, first["run"], facts)
        self.force = self.force or first["force"]

    def empty(self) -> None:
        """Remove what an earlier run left in `folder`."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def forget(self) -> None:
        """Nothing that was written is worth to be kept."""
        self.journal.records.clear()

    def publish(self) -> None:
        """Put everything on the disk, then rename it to the target; an old target stays whole until the new is there.

        OutputError: the target has got files since the run began.
        """
        if _filled(self.target) and not self.force:
            raise OutputError(f"{self.target}: not empty any more", hint="replace it with --resume --force")
        with ThreadPoolExecutor(SYNCS) as pool:  # side by side: one commit of the file system's journal serves several
            list(pool.map(sync_path, self.folder.iterdir()))
        sync_path(self.folder)
        old = self.state / OLD
        if replaced := self.target.exists():
            os.rename(self.target, old)
        try:
            os.rename(self.folder, self.target)
            sync_path(self.target.parent)
        except (OSError, OutputError):
            if not self.folder.exists():  # the name may not outlast a crash: it is taken back, --resume gives it again
                os.rename(self.target, self.folder)
            if replaced:
                os.rename(old, self.target)
            raise
        self.journal.close()
        shutil.rmtree(self.state, ignore_errors=True)


def _state(target: Path) -> Path:
    resolved = Path(os.path.realpath(target))
    return resolved.parent / f".{resolved.name}.partial"


def is_begun(target: Path) -> bool:
    """Whether a run that has not ended has its work folder beside `target`, or none may look."""
    try:
        return _state(target).is_dir()
    except OSError:
        return True


@contextmanager
def workspace(
    target: Path, *, force: bool = False, resume: bool = False, part: str | None = None, finish: bool = False
) -> Iterator[Workspace]:
    """Lock the work folder of `target` and hold it; `publish` makes it the target.

    `part` ("2-of-8") shares the folder with other parts; `finish` takes over what the parts left. When the work ends
    otherwise, the folder stays if there is work to resume and goes if not. OutputError: the target is a file or not
    empty (and not `force`), another run uses the folder, or an earlier run left work (and not `resume` or `force`).
    """
    resolved, state = Path(os.path.realpath(target)), _state(target)
    try:
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target}: is a file", hint="choose another folder with --out")
        if target.is_mount():
            raise OutputError(f"{target}: is a mount point", hint="choose a folder inside it with --out")
        begun, filled = state.is_dir(), _filled(target)
    except OSError as error:
        raise OutputError(f"{target}: {output_error(error)}", hint="choose another folder with --out") from error
    if finish and not begun:
        raise OutputError(f"{target}: no parts of a run are there", hint="run the parts first, with --part I/N")
    if filled and not force and not ((resume or finish) and begun):
        raise OutputError(f"{target}: not empty", hint="choose another folder with --out, or replace it with --force")
    with ExitStack() as held:
        held.enter_context(_locked(state, LOCK, target, shared=part is not None))
        if part is not None:
            held.enter_context(_locked(state, f"part-{part}.lock", target))
        try:
            if not finish:
                _prepare(target, resolved, state, force=force, resume=resume, part=part)
            (state / OUT).mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{state}: {output_error(error)}", hint="remove it, or give its rights back") from error
        work = Workspace(resolved, state, Journal(state / (f"{JOURNAL}-{part}" if part else JOURNAL)), force)
        try:
            yield work
        except BaseException as error:
            work.journal.close()
            kept = has_work(work.journal.records) or finish
            if not kept:
                _discard(state, part)
            explained = _explained(error, target, kept=kept)
            if explained is error:
                raise
            raise explained from error
        finally:
            work.journal.close()


@contextmanager
def parts_workspace(target: Path, *, force: bool, resume: bool) -> Iterator[int | None]:
    """Around all parts of a run, which lock the work folder themselves: how many parts the run that is resumed has.

    None: there is none. When they end otherwise than well, the folder stays if there is work to resume and goes if not.
    OutputError: as of `workspace`, or what was left has parts of two counts.
    """
    state = _state(target)

    def left() -> dict[str, list[dict[str, Any]]]:
        return {name: records for name, records in part_journals(state).items() if records}

    if not resume:
        if not force and any(map(has_work, left().values())):
            raise _unfinished(target, state)
        with workspace(target, force=force):
            pass
    counts = {name.rpartition("-")[2] for name in left()}
    if len(counts) > 1:
        raise OutputError(f"{target}: {state} has parts of two runs", hint="start over with --force")
    try:
        yield int(counts.pop()) if counts else None
    except BaseException as error:
        kept = any(map(has_work, left().values()))
        if not kept and state.is_dir():
            with suppress(OutputError), _locked(state, LOCK, target):
                shutil.rmtree(state, ignore_errors=True)
        explained = _explained(error, target, kept=kept)
        if explained is error:
            raise
        raise explained from error


@contextmanager
def finished_folder(target: Path, *, force: bool, inputs: Iterable[tuple[str, Path]]) -> Iterator[Path]:
    """A folder that becomes `target` if all goes well and goes if not; no input, (name, path), is in the target."""
    refuse_inputs(target, inputs)
    with workspace(target, force=force) as work:
        yield work.folder
        work.publish()


def refuse_inputs(target: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """OutputError: the target is, or holds, one of the inputs (name, path)."""
    resolved = Path(os.path.realpath(target))
    for name, path in inputs:
        source = path.resolve()
        if resolved == source or source.is_relative_to(resolved):
            raise OutputError(f"{target}: holds the input {name}", hint="choose another folder with --out")


def has_work(records: list[dict[str, Any]]) -> bool:
    """Whether there is work that --resume would not do again."""
    return any({"done", "tensors", "calibrated", "part"} & record.keys() for record in records)


def check_facts(target: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """OutputError naming every fact that is not what it was when the unfinished work was begun."""
    if wrong := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
        raise OutputError(
            f"{target}: the unfinished work was begun with other inputs; different now: {', '.join(wrong)}",
            hint="put them back and --resume, or start over with --force",
        )


def part_journals(state: Path) -> dict[str, list[dict[str, Any]]]:
    """ "2-of-8" -> the records of every part's journal."""
    names = sorted(path.name for path in state.glob(f"{JOURNAL}-*") if PART_JOURNAL.fullmatch(path.name))
    return {name.removeprefix(f"{JOURNAL}-"): read_journal(state / name)[0] for name in names}


def _filled(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


@contextmanager
def _locked(state: Path, name: str, target: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `name` of the folder `state`, which is made if it is not there."""
    path = state / name
    while True:
        try:
            state.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # a run that ended has just removed the folder
        except OSError as error:
            cause = output_error(error)
            raise OutputError(f"{state if state.is_dir() else state.parent}: {cause}", hint=cause.hint) from error
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            held = os.stat(path).st_ino == os.fstat(fd).st_ino
        except BlockingIOError as error:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
            os.close(fd)
            raise OutputError(
                f"{target}: another run is writing it ({holder or 'starting'})",
                hint="wait until it ends, or choose another folder with --out",
            ) from error
        except FileNotFoundError:
            held = False
        if held:
            break
        os.close(fd)
    try:
        if not shared:
            with suppress(OSError):  # who holds it is for people; a full disk is met, and told, by what needs it
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _prepare(target: Path, resolved: Path, state: Path, *, force: bool, resume: bool, part: str | None) -> None:
    """Deal with what an earlier run left: keep it for --resume, refuse, or clear it away."""
    if (state / OLD).is_dir() and not resolved.exists():
        os.rename(state / OLD, resolved)
    parts = part_journals(state)
    in_parts, whole = any(map(has_work, parts.values())), has_work(read_journal(state / JOURNAL)[0])
    if whole and not (state / OUT).is_dir():  # it died after the last rename
        whole = False
    if part is not None and whole:
        raise OutputError(
            f"{target}: a run without --part left unfinished work in {state}", hint="continue it, or remove that folder"
        )
    if part is None and in_parts and not force:
        raise OutputError(
            f"{target}: parts of a run are in {state}", hint="end it with --finish, or start over with --force"
        )
    if whole if part is None else has_work(parts.get(part, [])):
        if resume:
            return
        if not force:
            raise _unfinished(target, state)
    if _filled(resolved) and not force:
        _discard(state, part)
        raise OutputError(f"{target}: not empty", hint="choose another folder with --out, or replace it with --force")
    if part is None:
        _clear(state)
    else:
        (state / f"{JOURNAL}-{part}").unlink(missing_ok=True)


def _unfinished(target: Path, state: Path) -> OutputError:
    return OutputError(
        f"{target}: an earlier run left unfinished work in {state}",
        hint="continue it with --resume, or start over with --force",
    )


def _clear(state: Path) -> None:
    for path in state.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _discard(state: Path, part: str | None) -> None:
    """Remove the folder, or what a part has in it."""
    if part is None:
        shutil.rmtree(state, ignore_errors=True)
        return
    with suppress(OSError):
        (state / f"{JOURNAL}-{part}").unlink()


def _explained(error: BaseException, target: Path, *, kept: bool) -> BaseException:
    """The error as the user should see it: what the system refused in our words, and what was kept."""
    if isinstance(error, FileNotFoundError):
        error = InputError(f"{error.filename}: vanished during the run")
    elif isinstance(error, OSError):
        cause = output_error(error)
        error = OutputError(f"{target}: {cause}", hint=cause.hint)
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(KEPT if kept else "")
    if kept and isinstance(error, DeltamergeError) and "--resume" not in (error.hint or ""):
        error.hint = "; ".join(filter(None, (error.hint, KEPT)))
    return error
