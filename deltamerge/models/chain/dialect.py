"""A dialect: another project's layout of a model's versions in a folder.

The newest complete version is the folder's model.

A tensor that a version lacks is unchanged. No version changes a tensor's name, dtype or shape.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deltamerge.errors import InputError
from deltamerge.models.chain.diffs import Diff, DiffFile, patched
from deltamerge.models.checkpoint import Checkpoint, open_checkpoint

MOST = 100_000


@dataclass(frozen=True, slots=True)
class ForeignVersion:
    """An open version.

    path     its folder
    diffs    its tensors' diffs by name; None: its weights are plain and complete
    before   the number of the version that it changes; 0: the base
    state    deltamerge's note on the version of ours that it mirrors
    """

    path: Path
    diffs: Mapping[str, Diff] | None
    before: int = 0
    state: str | None = None


class Dialect(ABC):
    """A project's names of versions, and how to find, open and write them."""

    name: str
    pattern: re.Pattern[str]  # name of a version's folder; its first group is the number
    index: str  # the file that lists a version's content
    encodings: tuple[str, ...]  # encodings that can be written, the default first

    @abstractmethod
    def title(self, number: int) -> str:
        """Return the name of a version's folder."""

    @abstractmethod
    def is_complete(self, path: Path) -> bool:
        """Return whether all files of a version are there."""

    @abstractmethod
    def open(self, path: Path) -> ForeignVersion:
        """Open a version, whose diffs are read when used. InputError: it is not whole, or coded in an unknown way."""

    @abstractmethod
    def payload(self) -> str:
        """Return the name of the file that has a version's diffs."""

    @abstractmethod
    def finish(self, file: DiffFile, number: int, encoding: str, algorithm: str, notes: Mapping[str, str]) -> int:
        """Write the file of the diffs and the index, with `notes` of ours. Return their bytes."""

    def number(self, path: Path) -> int:
        """Return the number in the name of a version's folder. -1: the name is another."""
        found = self.pattern.fullmatch(path.name)
        return int(found[1]) if found else -1

    def numbers(self, folder: Path) -> dict[int, str]:
        """Return the versions in a folder, by number."""
        try:
            return {self.number(one): one.name for one in folder.iterdir() if self.number(one) >= 0}
        except OSError:
            return {}

    def resolve(self, path: Path) -> Path | None:
        """Return the folder of the version that `path` names, or of the newest complete version in the folder `path`.

        None: it does not have this layout. InputError: the folder has no such version.
        """
        if self.number(path) >= 0:
            if path.is_dir():
                return path
            there = self.numbers(path.parent)
            if there:
                listed = [there[number] for number in sorted(there)]
                raise InputError(
                    f"{path.parent}: has no version {path.name}", hint=f"it has {listed[0]} to {listed[-1]}"
                )
            return None
        there = self.numbers(path)
        newest = [path / there[number] for number in sorted(there, reverse=True)]
        return next((version for version in newest if self.is_complete(version)), None)

    def line(self, path: Path) -> list[ForeignVersion]:
        """Return the versions from the first over the base, or the last plain version, to the version in `path`.

        InputError: a version is missing, incomplete, named by an earlier version, or coded in an unknown way.
        """
        found = [self.open(path)]
        while found[-1].diffs is not None and found[-1].before:
            before = path.parent / self.title(found[-1].before)
            if not before.is_dir():
                raise InputError(
                    f"{path.parent}: has no version {before.name}, which {found[-1].path.name} comes after"
                )
            if found[-1].before >= self.number(found[-1].path) or len(found) >= MOST:
                raise InputError(f"{found[-1].path}: comes after {before.name}")
            found.append(self.open(before))
        return found[::-1]

    def over(self, path: Path, base: Checkpoint, reference: str) -> Checkpoint:
        """Return the checkpoint that a version makes of `base`.

        Each tensor is computed when it is first read, and checked by the checksum of every version. InputError: as for
        `line`, or the base lacks a tensor.
        """
        versions: Sequence[ForeignVersion] = self.line(path)
        if versions[0].diffs is None:
            base = open_checkpoint(versions[0].path, reference=reference)
            versions = versions[1:]
        diffs: dict[str, list[Diff]] = {}
        for version in versions:
            for name, diff in (version.diffs or {}).items():
                if name not in base.tensors:
                    raise InputError(f"{version.path}: has {name}, which the base lacks", hint="is it the base?")
                diffs.setdefault(name, []).append(diff)
        tensors = {
            name: replace(info, tensor=patched(info, diffs[name], path / self.index)) if name in diffs else info
            for name, info in base.tensors.items()
        }
        files = {diff.stored.path for several in diffs.values() for diff in several}
        indexes = {version.path / self.index for version in versions}
        return replace(base, reference=reference, tensors=tensors, files=(*base.files, *sorted(files | indexes)))
