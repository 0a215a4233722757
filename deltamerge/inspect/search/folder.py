"""The folder of a sweep or a search beside its recipe, which one process works in at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deltamerge.errors import GO_ON, OutputError, interruptible
from deltamerge.io.files import writing

MARK = ".deltamerge-study"


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Where results go as they come."""

    path: Path

    @classmethod
    def of(cls, recipe: Path, kind: str, out: Path | None) -> StudyFolder:
        """`out`, or <recipe>-<kind> beside the recipe."""
        return cls(out if out is not None else recipe.resolve().parent / f"{recipe.stem}-{kind}")

    @contextmanager
    def locked(self, *, force: bool) -> Iterator[Path]:
        """The folder, made if it is not there and emptied with `force`. OutputError: it is no folder of a study,
        another process works in it, or it cannot be written. KeyboardInterrupt: says that the folder stays."""
        path, mark = self.path, self.path / MARK
        with ExitStack() as held:
            with writing(path):
                if path.is_dir() and any(path.iterdir()) and not mark.is_file():
                    raise OutputError(f"{path}: holds something else", hint="another name with --out")
                path.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(mark.open("a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OutputError(f"{path}: another process works in it", hint="wait, or give --out") from None
                for entry in os.scandir(path) if force else ():
                    if entry.name != MARK:
                        shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
            with interruptible(lambda said: f"{f'{said}; ' if said else ''}what is done is kept in {path}: {GO_ON}"):
                yield path
