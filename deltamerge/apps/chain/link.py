"""A new version that is made by a run: what it is compared with, and the version.json that says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import InputError, UsageError
from deltamerge.formats.delta.entry import hash_of
from deltamerge.models.chain.folder import Opened, is_version, line, notes, resolve
from deltamerge.models.chain.version import (
    NAME,
    Named,
    Note,
    Version,
    base_contents,
    check_successor,
    contents,
    open_version,
    state_of,
    stored_files,
    write_note,
)
from deltamerge.models.decode import decoded
from deltamerge.models.delta_file import DeltaFile
from deltamerge.models.references import Models
from deltamerge.tensors.reader import Reader, elements


@dataclass(frozen=True, slots=True)
class Link:
    """The version `name` that is to come after the last of `versions`, which the reference `after` names."""

    after: str
    versions: tuple[Version, ...]
    name: str

    @classmethod
    def begin(cls, after: str, out: Path) -> Link:
        """Return the link of a version that will be the folder `out`.

        InputError: `after` is no version, or another comes after it, or after `out`. UsageError: `out` lies elsewhere.
        """
        path = resolve(Path(after))
        if path is None or not is_version(path):
            raise InputError(f"{after}: is no version of a chain", hint="--after chain/000119")
        path = path.resolve()
        if out.resolve().parent != path.parent or not NAME.fullmatch(out.name):
            raise UsageError(f"--out {out}: is no name in {path.parent}", hint=f"--out {path.parent / '000120'}")
        versions = line(path, Opened())
        for name, note in notes(path.parent).items():
            before = None if note is None or note.after is None else note.after.name
            if before == out.name or (before == path.name and name != out.name):
                raise InputError(f"{path.parent}: {name} comes after {before} already", hint=f"--after {name}")
        if out.name in {version.name for version in versions}:
            raise InputError(f"{out}: cannot come after itself")
        return cls(str(Path(after).parent / path.name) if path.name != Path(after).name else after, versions, out.name)

    def base(self, reference: str, *, pickles: bool = False) -> str:
        """Return the reference that the version is compared with. InputError: `reference` is neither of these two.

        It is `reference` itself if the version before makes it. It is the version before if `reference` is the chain's
        base.
        """
        first = self.versions[0].delta.manifest
        end, origin = self.versions[-1].contents, base_contents(first)
        in_base = {name: first.tensors[name].base_name or name if name in first.tensors else name for name in end}
        differing = [n for n in end if in_base[n] in origin and end[n] != origin[in_base[n]]] or list(end)[:1]
        found = Models().open(reference, Path.cwd(), weights=True, pickles=pickles)
        with errors.context(reference):
            tensors = decoded(found).tensors
        name = min(differing, key=lambda name: math.prod(end[name].shape), default="")
        if not name:
            return reference
        with Reader() as reader:
            have = {
                each: hash_of(elements(reader, tensors[each]), math.prod(tensors[each].shape))
                for each in {name, in_base[name]} & tensors.keys()
            }
        if have.get(name) == end[name].hash:
            return reference
        if in_base[name] in origin and have.get(in_base[name]) == origin[in_base[name]].hash:
            return f"{reference}+{self.after}"
        raise InputError(
            f"{reference}: is neither what {self.versions[-1].name} makes nor the base of its chain: {name} differs",
            hint=f"the chain is of {self.versions[0].delta.manifest.base}",
        )

    def finish(self, folder: Path) -> None:
        """Write the version.json of the artifact in `folder`.

        InputError: the artifact was not made from the result of the version before.
        """
        opened, before = DeltaFile.open(folder), self.versions[-1]
        if open_version(before.path).state != before.state:
            raise InputError(f"{before.path}: was replaced by another process meanwhile", hint="run it again")
        check_successor(before.contents, opened.manifest, before.name)
        note = Note(
            name=self.name,
            base=before.base,
            state=state_of(contents(opened.manifest)),
            after=Named(name=before.name, state=before.state),
            files=stored_files(folder, opened.files),
        )
        write_note(folder, note)
