"""The commands about chains: list, squash."""

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
    """List the versions of the chain FOLDER.

    Each with what it comes after, how much it changes, and its size.
    """
    from deltamerge.chain.folder import head, is_chain, line
    from deltamerge.chain.version import described
    from deltamerge.errors import InputError

    if not is_chain(folder):
        raise InputError(f"{folder}: is no chain", hint="a folder of versions, made by extract --after or a trainer")
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
    from deltamerge.engine.execute import default_workers
    from deltamerge.run.squash import squash as squash_chain

    done = squash_chain(chain, keep, base, workers=workers or default_workers(), pickles=pickles)
    if as_json:
        say_json(
            {"folder": str(chain), "into": done.into, "folded": list(done.folded), "before": done.before,
             "after": done.after}
        )  # fmt: skip
    elif not quiet:
        what = f"{len(done.folded)} versions folded into {done.into}" if done.into else "nothing to fold"
        tell(f"{chain}: {what}, {human(done.before)} before, {human(done.after)} now")
