"""The command list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltamerge.cli.options import AS_JSON, FOLDER
from deltamerge.cli.output import say_json
from deltamerge.errors.shown import human, shown


@click.command("list")
@click.argument("folder", type=FOLDER)
@AS_JSON
def command(folder: Path, as_json: bool) -> None:
    """List the versions of a chain, or the deltas of a store.

    Shows how much each changes, and its size. Files that several deltas share count once.
    """
    from deltamerge.errors import InputError
    from deltamerge.models.chain.folder import described, head, is_chain, line, pinned
    from deltamerge.models.chain.publish import is_store

    if not is_chain(folder):
        raise InputError(
            f"{folder}: is no chain and no store",
            hint="a folder of versions, made by extract --after or a trainer, or of deltas, by extract A B C --out",
        )
    if is_store(folder):
        _list_store(folder, as_json=as_json)
        return
    versions = line(folder / head(folder))
    found: list[dict[str, Any]] = list(described(versions))
    base, pin = versions[0].delta.manifest.base, pinned(folder)
    if as_json:
        whole = {"folder": str(folder), "base": base.model_dump(), "state": versions[0].base, "versions": found}
        say_json(whole | {"pinned": pin})
        return
    size = human(sum(one["bytes"] for one in found))
    click.echo(f"{shown(str(folder))}: {len(found)} versions, {size}, of {shown(str(base))}")
    for one in found:
        step = "" if one["step"] is None else f"  step {one['step']}"
        folded = f"  {len(one['folded'])} folded" if one["folded"] else ""
        share = one["changed"] / max(1, one["elements"])
        here = "  pinned" if one["name"] == pin else ""
        line_of = f"{one['name']}  {human(one['bytes']):>8}  {share:7.3%} changed  {one['state'][:12]}"
        click.echo(f"{line_of}{step}{folded}{here}")


def _list_store(folder: Path, *, as_json: bool) -> None:
    from deltamerge.models.chain.publish import described

    found = described(folder)
    deltas = found["deltas"]
    if as_json:
        say_json({"folder": str(folder), **found})
        return
    width = max(len(one["name"]) for one in deltas)
    base = f"of {shown(_base(deltas[0]))}" if found["one_base"] else "of several bases"
    click.echo(
        f"{shown(str(folder))}: {len(deltas)} deltas {base}, {human(found['bytes'])} with all their files, "
        f"which are {human(found['unshared'])} unshared; {human(found['checkpoints'])} as checkpoints"
    )
    for one in deltas:
        share = one["changed"] / max(1, one["elements"])
        of = "" if found["one_base"] else f"  of {shown(_base(one))}"
        click.echo(
            f"{one['name']:{width}}  {human(one['bytes']):>8}  {share:8.3%} changed  "
            f"and {human(one['other_bytes'])} of other files{of}"
        )


def _base(one: dict[str, Any]) -> str:
    base = one["base"]
    return str(base["id"] if base["commit"] is None else f"{base['id']}@{base['commit']}")
