"""Commands on a chain of deltas, or a store: list, pin, squash, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltamerge.cli.options import AS_JSON, FOLDER, MODEL, PICKLES, QUIET, WORKERS
from deltamerge.cli.output import say_json, tell
from deltamerge.errors import app
from deltamerge.errors.shown import human, shown


@click.command("list")
@click.argument("folder", type=FOLDER)
@AS_JSON
def list_versions(folder: Path, as_json: bool) -> None:
    """List the versions of a chain, or the deltas of a store.

    Shows the size of each delta and how much it changes. Files that several deltas share count once.
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


@click.command("pin")
@click.argument("version", type=FOLDER)
@click.option("--release", is_flag=True, help="VERSION is a chain: its servers go on to its newest version.")
@QUIET
def pin(version: Path, release: bool, quiet: bool) -> None:
    """Send the servers of a chain to VERSION and keep them there: a rollback.

    Servers that follow the chain, or are given its name, go to VERSION from any other version, exactly. A server that
    was killed on its way goes there when it restarts. Trainers go on writing.

    \b
    deltamerge pin run/000040
    deltamerge pin run --release
    """
    from deltamerge.models.chain import publish

    if release:
        publish.release(version)
    else:
        publish.pin(version)
    if not quiet:
        tell(f"{version}: servers go to {'its newest version' if release else 'it, and stay there'}")


@click.command("squash")
@click.argument("chain", type=FOLDER)
@click.option("--keep", type=click.IntRange(0), required=True, help="Number of newest versions to leave as they are.")
@click.option("--base", type=MODEL, help="Base of the chain's first version. Default: the base that the version names.")
@WORKERS
@PICKLES
@AS_JSON
@QUIET
def squash(
    chain: Path, keep: int, base: str | None, workers: int | None, pickles: bool, as_json: bool, quiet: bool
) -> None:
    """Fold the older versions of CHAIN into one.

    The result replaces the last folded version in one step. The other folded versions are removed, and their names are
    refused from then on. Newer versions stay as they are.
    """
    with app("chain"):
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


@click.command("remove")
@click.argument("delta", type=FOLDER)
@QUIET
def remove(delta: Path, quiet: bool) -> None:
    """Remove DELTA: the newest version of a chain, or a delta of a store.

    A version with a successor is refused: remove the successor first, or fold both with `squash`. A folder with files
    that no run wrote is refused too.
    """
    from deltamerge.models.chain.publish import remove_newest

    remove_newest(delta)
    if not quiet:
        tell(f"{delta}: removed")
