"""The command lock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli.options import DEVICE, FORCE_FILES, MEMORY, MERGEKIT_EXACT, PICKLES, RECIPE, SET, WORKERS
from deltamerge.cli.output import tell

if TYPE_CHECKING:
    from deltamerge.recipe.yaml_source import Loc


@click.command("lock")
@click.argument("recipe", type=RECIPE)
@click.option("--check", is_flag=True, help="Write nothing. Exit 1 if RECIPE or its inputs differ from the lock.")
@DEVICE
@WORKERS
@MEMORY
@MERGEKIT_EXACT
@SET
@PICKLES
@FORCE_FILES
def command(
    recipe: Path,
    check: bool,
    force: bool,
    mergekit_exact: bool,
    settings: dict[Loc, str],
    **options: Any,
) -> None:
    """Lock RECIPE: write the hashes of its inputs, and its q values, beside it.

    `run --locked` then refuses a recipe or inputs that differ from the lock, on this machine or another.

    \b
    deltamerge lock recipe.yaml            # writes recipe.lock, to be kept in git
    deltamerge lock recipe.yaml --check    # in CI
    """
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options
    from deltamerge.run.runner import check_lock
    from deltamerge.run.runner import lock as lock_recipe

    file = read_recipe(recipe, mergekit_exact=mergekit_exact, settings=settings)
    chosen = Options(force=force, **options)
    if check:
        check_lock(file, chosen)
        tell(f"{file.lock_path}: up to date")
        return
    written = lock_recipe(file, chosen)
    found = f", q values of {len(written.calibration)} models" if written.calibration else ""
    tell(f"{file.lock_path}: written; {len(written.content['inputs'])} inputs{found}")
