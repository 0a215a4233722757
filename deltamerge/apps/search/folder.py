"""The folder of a sweep or a search beside its recipe, which one process works in at a time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deltamerge.errors import GO_ON, DeltamergeError, OutputError, interruptible
from deltamerge.errors.shown import shown, some
from deltamerge.files.atomic import PASSING
from deltamerge.files.descriptors import lock, writing
from deltamerge.files.lock_file import not_made
from deltamerge.files.work_folder import look

MARK = ".deltamerge-study"
WRITTEN = re.compile(
    r"study\.(db(-journal|-wal|-shm)?|json)|(trials|sweep)\.csv|report\.html|results\.jsonl|sweep\.(json|svg)"
    rf"|{PASSING.pattern}",
    re.DOTALL,
)
MADE = re.compile(r"candidate|best|\d+|\.(candidate|best|\d+)\.partial")


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Where results go as they come; `name` says of which command and recipe."""

    path: Path
    name: str = ""

    @classmethod
    def of(cls, recipe: Path, kind: str, out: Path | None) -> StudyFolder:
        """`out`, or <recipe>-<kind> beside the recipe."""
        path = out if out is not None else recipe.resolve().parent / f"{recipe.stem}-{kind}"
        return cls(path, f"{kind} {shown(recipe.name)}")

    @contextmanager
    def locked(self, *, force: bool) -> Iterator[Path]:
        """The folder, made if it is not there and emptied with `force`. OutputError: it is no folder of a study, or of
        another recipe's and no `force`; with `force`, it holds what no study wrote; another process works in it; or it
        cannot be written. KeyboardInterrupt: says that the folder stays."""
        path, mark = self.path, self.path / MARK
        with ExitStack() as held:
            with writing(path):
                if path.is_dir() and any(path.iterdir()) and not mark.is_file():
                    raise OutputError(f"{path}: holds something else", hint="another name with --out")
                path.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(mark.open("a"))
                if not lock(file.fileno()):
                    raise OutputError(f"{path}: another process works in it", hint="wait, or give --out")
                made_for = mark.read_text("utf-8", "replace").strip()
                if made_for not in ("", self.name) and not force:
                    raise OutputError(f"{path}: is of {shown(made_for)}", hint="another name with --out")
                if force:
                    self._empty()
                if made_for != self.name:
                    file.truncate(0)
                    file.write(f"{self.name}\n")
                    file.flush()
            with interruptible(lambda said: f"{f'{said}; ' if said else ''}what is done is kept in {path}: {GO_ON}"):
                yield path

    def _empty(self) -> None:
        """Remove what studies write. OutputError: there is something else, and nothing was removed."""
        entries = [entry for entry in os.scandir(self.path) if entry.name != MARK]
        if strange := sorted(entry.name for entry in entries if not _is_written(entry)):
            raise OutputError(f"{self.path}: holds what no study wrote: {some(strange)}", hint="move that away")
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def _is_written(entry: os.DirEntry[str]) -> bool:
    """Whether a study, or a run that it kept the result of, wrote an entry of its folder, and all that is in it."""
    path = Path(entry.path)
    if not entry.is_dir(follow_symlinks=False):
        return entry.is_file(follow_symlinks=False) and WRITTEN.fullmatch(entry.name) is not None
    if not MADE.fullmatch(entry.name):
        return False
    try:
        return look(path) is not None if entry.name.startswith(".") else not not_made(path)
    except (OSError, DeltamergeError):
        return False
