"""Keeps an artifact's finished tensors in files until the last is finished; with a journal they survive a crash."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltamerge.errors import OutputError
from deltamerge.files.descriptors import sync_path, writing
from deltamerge.files.journal import Journal

SPOOL = "delta-spool"
SECONDS = 2.0  # between two entries in the journal: syncing each tensor alone would cost more than it saves


class Spool:
    """A folder with a file for each tensor, beside the journal, or in `folder` without one. OutputError: the disk."""

    def __init__(self, folder: Path, journal: Journal | None) -> None:
        self.folder = (folder if journal is None else journal.path.parent) / SPOOL
        self._journal = journal
        records = [] if journal is None else journal.records
        self._kept: dict[str, Any] = {
            name: state for record in records for name, state in record.get("tensors", {}).items()
        }
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[Path, Any]] = {}
        self._saved = time.monotonic()
        with writing():
            self.folder.mkdir(exist_ok=journal is not None)

    def kept(self, name: str) -> Any:
        """The state of a tensor that an earlier run had finished; None if it had not."""
        return self._kept.get(name)

    def finished(self, name: str, path: Path, state: Any) -> None:
        """Record that a tensor is in its file (which is missing if nothing is stored); `state` is everything else about
        it."""
        if self._journal is None:
            return
        with self._lock:
            self._waiting[name] = path, state
            if time.monotonic() - self._saved > SECONDS:
                self._save()

    def close(self, *, done: bool) -> None:
        """Remove the folder. With a journal keep it, even if the artifact is `done`, since the run may still be
        resumed."""
        if self._journal is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not done:
            with self._lock, suppress(OutputError):  # another error is being raised
                self._save()

    def _save(self) -> None:
        assert self._journal is not None
        if not self._waiting:
            return
        for path in (*(path for path, _ in self._waiting.values()), self.folder):
            if path.exists():
                sync_path(path)
        self._journal.append({"tensors": {name: state for name, (_, state) in self._waiting.items()}})
        self._waiting.clear()
        self._saved = time.monotonic()
