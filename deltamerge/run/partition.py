"""A run in parts: each writes whole shards of the output into one folder, on as many machines as see that folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltamerge.errors import InputError, OutputError, UsageError
from deltamerge.errors.shown import some
from deltamerge.files.hashes import Seal, damages, seal
from deltamerge.files.journal import check_facts, part_journals
from deltamerge.files.work_folder import Workspace
from deltamerge.formats.safetensors import Layout
from deltamerge.plan.planner import Plan
from deltamerge.recipe.file import RecipeFile

FORM = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of `count`, from 1; part 0 writes nothing, it calibrates for the others."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that a text names: "2/8" is the second of eight. UsageError: it names no part."""
        found = FORM.fullmatch(text)
        if found is None or int(found[1]) > int(found[2]):
            raise UsageError(f"--part {text}: no such part", hint="--part 2/8 is the second of eight")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        return f"{self.index}-of-{self.count}"

    def takes(self, position: int, total: int) -> bool:
        """Return whether item `position` (from 0) of `total` belongs to this part. A part's items are neighbours."""
        return position * self.count // total == self.index - 1

    def files(self, layout: Layout) -> frozenset[str]:
        """Return the shards that this part writes. UsageError: there are fewer shards than parts."""
        total = len(layout.files)
        if self.count > total:
            raise UsageError(
                f"--part {self.index}/{self.count}: the output has {total} shard{'s' if total > 1 else ''}",
                hint="make fewer parts, or smaller shards (output: {shard_size: 1GB})",
            )
        return frozenset(file.name for position, file in enumerate(layout.files) if self.takes(position, total))

    def of(self, plan: Plan) -> Plan:
        """Return the plan of this part alone."""
        files = self.files(plan.layout)
        return replace(plan, outputs=tuple(output for output in plan.outputs if output.file in files))


def check_recipe(file: RecipeFile, option: str) -> None:
    """Raise InputError if the file has several documents or makes no model; `option` cannot split these."""
    if len(file.documents) > 1:
        raise InputError(
            f"{file.path}: has several documents, {option} takes one", hint="give each document its own file"
        )
    output = file.output.recipe.output
    if not output.rules.standalone:
        hint = f"run without {option}; or with output.kind model, then deltamerge extract of its result"
        raise InputError(f"{file.path}: output.kind is {output.kind}, {option} writes models only", hint=hint)


def shared_calibration(work: Workspace, facts: Mapping[str, Any]) -> bool:
    """Return whether part 0 has calibrated for this run. OutputError: it calibrated for another run."""
    for name, records in part_journals(work.state).items():
        if name.startswith("0-of-") and any("calibrated" in record for record in records):
            check_facts(work.target, records[0]["run"], facts)
            return True
    return False


def gather_parts(work: Workspace, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the record that every part left in its journal at its end.

    OutputError: the parts have different counts, or a part is missing, unfinished, or made from other inputs.
    """
    journals = part_journals(work.state)
    counts = {int(name.rpartition("-")[2]) for name, records in journals.items() if records}
    if len(counts) != 1:
        found = ", ".join(sorted(journals)) or "none"
        hint = "start over with --force, and one N" if counts else "run every --part I/N"
        raise OutputError(f"{work.target}: no single set of parts is there: {found}", hint=hint)
    count = counts.pop()
    ended = {name: records[-1]["part"] for name, records in journals.items() if records and "part" in records[-1]}
    missing = [i for i in range(1, count + 1) if Part(i, count).name not in ended]
    if missing:
        raise OutputError(
            f"{work.target}: unfinished parts: {', '.join(f'{i}/{count}' for i in missing)}",
            hint="run them with --part I/N, then --finish",
        )
    for records in journals.values():
        check_facts(work.target, records[0]["run"], facts)
    return [ended[Part(i, count).name] for i in range(1, count + 1)]


def check_shards(
    work: Workspace, layout: Layout, parts: Sequence[Mapping[str, Any]], workers: int
) -> tuple[dict[str, Any], dict[str, Seal]]:
    """Read the parts' shards. Return hash and size by name, and the seals of the files.

    OutputError: a shard is missing, or was changed after its part ended.
    """
    outputs: dict[str, Any] = {}
    of: dict[str, str] = {}
    for index, part in enumerate(parts, start=1):
        outputs |= part["outputs"]
        of |= dict.fromkeys(part["outputs"], f"{index}/{len(parts)}")
    wrong: dict[str, str] = {}
    seals: dict[str, Seal] = {}
    for file in layout.files:
        path = work.folder / file.name
        if outputs.get(file.name, {}).get("size") != file.size:
            wrong[file.name] = "is no part's"
        elif path.is_file():
            seals[file.name] = seal(path)
    known = {file.name: outputs[file.name] for file in layout.files if file.name not in wrong}
    wrong |= damages(work.folder, known, {}, workers)
    if wrong:
        again = sorted({of.get(name, "I/N") for name in wrong})
        raise OutputError(
            f"{work.target}: {some(f'{name} {what}' for name, what in sorted(wrong.items()))}",
            hint=f"make it again with {', '.join(f'--part {part}' for part in again[:4])}, then --finish",
        )
    return outputs, seals


def drop_damaged(work: Workspace, workers: int) -> None:
    """Delete the shards of a finished part that have changed since, so that they are written again."""
    ended = [record["part"]["outputs"] for record in work.journal.records if "part" in record]
    for outputs in ended[-1:]:
        for name in damages(work.folder, outputs, {}, workers):
            (work.folder / name).unlink(missing_ok=True)
