"""The command squash."""

from __future__ import annotations

from pathlib import Path

import click

from deltamerge.cli.options import AS_JSON, FOLDER, MODEL, PICKLES, QUIET, WORKERS
from deltamerge.cli.output import say_json, tell
from deltamerge.errors import app
from deltamerge.errors.shown import human


@click.command("squash")
@click.argument("chain", type=FOLDER)
@click.option("--keep", type=click.IntRange(0), required=True, help="Number of newest versions to leave as they are.")
@click.option("--base", type=MODEL, help="Base of the chain's first version. Default: the one it names.")
@WORKERS
@PICKLES
@AS_JSON
@QUIET
def command(
    chain: Path, keep: int, base: str | None, workers: int | None, pickles: bool, as_json: bool, quiet: bool
) -> None:
    """Fold the older versions of CHAIN into one.

    The result replaces the last of them in one step. The others are removed, and their names are refused from then on.
    Newer versions stay as they are.
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
