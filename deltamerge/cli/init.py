"""The command init."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltamerge.cli.options import AS_JSON, DEVICE, MODEL, PICKLES, WORKERS, RecipePath, rows_of_text
from deltamerge.cli.output import say, say_json, tell
from deltamerge.errors import app


@click.command("init")
@click.argument("models", nargs=-1, required=True, type=MODEL)
@click.option("--base", required=True, type=MODEL, help="What the models were fine-tuned from.")
@rows_of_text
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Fraction of each delta to keep.  [default: 0.05 of one model, 0.2 of several]",
)
@click.option("--out", type=RecipePath(), default="recipe.yaml", show_default=True, help="File to write; - for stdout.")
@DEVICE
@WORKERS
@PICKLES
@AS_JSON
def command(
    models: tuple[str, ...],
    base: str,
    calibration: dict[str, Any] | None,
    density: float | None,
    out: str,
    device: str,
    workers: int | None,
    pickles: bool,
    as_json: bool,
) -> None:
    """Write a commented first recipe for MODELS and their base.

    MODELS are folders or hub ids. One model is pruned, several are merged. With --calibration, `recommend` measures
    prunings of each model on the rows, chooses one, and writes its figures into the recipe as comments.

    \b
    deltamerge init ./math ./code --base ./base
    deltamerge init ./math --base ./base --calibration sentences.jsonl --density 0.01
    """
    with app("recommend"):
        from deltamerge.apps.recommend.first_recipe import check_new, first_recipe, write_new

    path = Path("recipe.yaml" if out == "-" else out)
    if out != "-":
        check_new(path)
    density = density or (0.05 if len(models) == 1 else 0.2)
    advice = []
    if calibration is not None:
        with app("recommend"):
            from deltamerge.apps.recommend.prune import recommend_prune

        given: dict[str, Any] = {"calibration": calibration, "device": device, "workers": workers, "pickles": pickles}
        advice = [recommend_prune(model, base, density, **given) for model in models]
    written = first_recipe(base, models, path, density=density, calibration=calibration, advice=advice, pickles=pickles)
    if as_json:
        if out != "-":
            write_new(path, written)
        say_json({"out": None if out == "-" else str(path), "recipe": written})
        return
    if out == "-":
        say(written.removesuffix("\n"))
        return
    write_new(path, written)
    tell(f"{path}: written; next: deltamerge plan {path}")
