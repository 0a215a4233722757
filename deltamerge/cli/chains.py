"""The commands about chains and stores: list, squash, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltamerge.cli.options import AS_JSON, FOLDER, MODEL, PICKLES, QUIET, WORKERS
from deltamerge.cli.output import say_json, tell
from deltamerge.cli.tables import human
from deltamerge.errors.shown import shown


@click.command(name="list")
@click.argument("folder", type=FOLDER)
@AS_JSON
def list_versions(folder: Path, as_json: bool) -> None:
    """List the versions of the chain FOLDER, or the deltas of the store.

    Each with how much it changes, and its size; a version with what it makes. Files that deltas share count once.
    """
    from deltamerge.errors import InputError
    from deltamerge.models.chain.folder import head, is_chain, line
    from deltamerge.models.chain.store import is_store
    from deltamerge.models.chain.version import described

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
    base = versions[0].delta.manifest.base
    if as_json:
        say_json({"folder": str(folder), "base": base.model_dump(), "state": versions[0].base, "versions": found})
        return
    size = human(sum(one["bytes"] for one in found))
    click.echo(f"{shown(str(folder))}: {len(found)} versions, {size}, of {shown(str(base))}")
    for one in found:
        step = "" if one["step"] is None else f"  step {one['step']}"
        folded = f"  {len(one['folded'])} folded" if one["folded"] else ""
        share = one["changed"] / max(1, one["elements"])
        click.echo(f"{one['name']}  {human(one['bytes']):>8}  {share:7.3%} changed  {one['state'][:12]}{step}{folded}")


def _list_store(folder: Path, *, as_json: bool) -> None:
    from deltamerge.models.chain.store import described

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


@click.command()
@click.argument("chain", type=FOLDER)
@click.option("--keep", type=click.IntRange(0), required=True, help="How many of the newest versions stay as they are.")
@click.option("--base", type=MODEL, help="What the chain's first version was made from; default: what it names.")
@WORKERS
@PICKLES
@AS_JSON
@QUIET
def squash(
    chain: Path, keep: int, base: str | None, workers: int | None, pickles: bool, as_json: bool, quiet: bool
) -> None:
    """Fold the older versions of CHAIN into one.

    It takes the place of the last of them in one step, and the others are removed; their names are refused from then
    on, with the name of the one that they are in. Versions that come after stay as they are.
    """
    from deltamerge.apps.chain.squash import squash as squash_chain
    from deltamerge.engine.execute import default_workers

    done = squash_chain(chain, keep, base, workers=workers or default_workers(), pickles=pickles)
    if as_json:
        say_json(
            {"folder": str(chain), "into": done.into, "folded": list(done.folded), "before": done.before,
             "after": done.after}
        )  # fmt: skip
    elif not quiet:
        what = f"{len(done.folded)} versions folded into {done.into}" if done.into else "nothing to fold"
        tell(f"{chain}: {what}, {human(done.before)} before, {human(done.after)} now")


@click.command(name="remove")
@click.argument("delta", type=FOLDER)
@QUIET
def remove_delta(delta: Path, quiet: bool) -> None:
    """Remove DELTA, the newest version of a chain or a delta of a store.

    A version that another comes after stays: remove that first, or fold both with squash. A folder that holds what no
    run wrote stays too.
    """
    from deltamerge.models.chain.publish import remove_newest

    remove_newest(delta)
    if not quiet:
        tell(f"{delta}: removed")
