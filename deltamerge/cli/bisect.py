"""The command bisect: what costs a skill of a merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli import streams
from deltamerge.cli.layout import Column, Row, paragraph, table
from deltamerge.cli.options import ABOUT_ROWS, AS_JSON, DEVICE, PICKLES, RECIPE, WORKERS, calibration_of
from deltamerge.cli.output import say, say_json, tell
from deltamerge.errors import app
from deltamerge.errors.shown import lines as one_a_line

if TYPE_CHECKING:
    from deltamerge.apps.search.bisect import Bisection, Suspect

SHOWN = 8


def _about_rows(command: Any) -> Any:
    for option in reversed(ABOUT_ROWS):
        command = option(command)
    return command


@click.command("bisect")
@click.argument("recipe", type=RECIPE)
@click.option(
    "--rows", type=click.Path(path_type=Path), metavar="DIR",
    help="Rows of each model: DIR/NAME.jsonl (.csv, .txt), or one file for all. Default: the recipe's calibration.",
)  # fmt: skip
@_about_rows
@click.option("--of", "skill", metavar="NAME", help="The model whose skill it is. Default: the one that loses most.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.svg", help="Draw it there.")
@click.option("--force", is_flag=True, help="Replace the file of --plot.")
@DEVICE
@WORKERS
@PICKLES
@AS_JSON
def command(
    recipe: Path,
    rows: Path | None,
    text: tuple[str, ...],
    sequences: int,
    length: int,
    skill: str | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Name the model, the layers and the tensors that cost a skill of RECIPE's merge most.

    Tensors are exchanged in memory for the fine-tune's own, and models left out, in at most 40 passes over its rows.
    Nothing is labelled, and nothing is merged to a folder.

    \b
    deltamerge bisect recipe.yaml --rows rows --plot cost.svg
    deltamerge bisect recipe.yaml --rows rows --of math
    """
    with app("search"):
        from deltamerge.apps.search.bisect import bisect, draw
    with app("recommend"):
        from deltamerge.apps.recommend.advised import rows_in
    from deltamerge.errors import OutputError
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options

    if plot is not None and (plot.suffix != ".svg" or (plot.exists() and not force)):
        wrong = "is there already" if plot.exists() else "cannot be drawn"
        raise OutputError(f"{plot}: {wrong}", hint="name a new .svg file, or --force")
    file = read_recipe(recipe)
    found = []
    if rows is None:
        calibration_of(None, text)
    else:
        about = {key: value for key, value in (calibration_of(".", text) or {}).items() if key != "data"}
        models = [file.output.recipe.models[i].model for i in file.output.recipe.fine_tunes]
        found = rows_in(rows.resolve(), models, sequences=sequences, length=length, **about)
    answer = bisect(file, rows=found, skill=skill, options=Options(**where))
    say_json(answer.describe()) if as_json else say(render(answer, streams.columns()))
    if plot is not None:
        draw(answer, plot)
        tell(f"{plot}: written")


def render(found: Bisection, width: int) -> str:
    """Return what each skill loses, and what costs the worst most."""
    columns = [Column("lost")]
    rows: list[Row] = [(name, [f"{value:.1%}"]) for name, value in found.lost.items()]
    lines = [*table(columns, [rows], width), ""]
    for title, some in (
        ("layers, exchanged for its own", found.layers),
        ("tensors of the worst", found.tensors),
        ("models, left out", found.models),
    ):
        if some:
            lines += [
                f"{title}:",
                *table([Column("lost"), Column("won")], [[_row(one) for one in some[:SHOWN]]], width),
                "",
            ]
    about = "lost: distance of outputs from the fine-tune's, of the base's; won: what is lost less so"
    lines += paragraph(f"{about}. {found.passes} passes over the rows of {found.skill}", width)
    lines += [f"note: {note}" for note in found.notes]
    return one_a_line([*lines, "", *paragraph(verdict(found), width)])


def _row(one: Suspect) -> Row:
    return one.name, [f"{one.lost:.1%}", f"{one.won:.1%}"]


def verdict(found: Bisection) -> str:
    """Return the answer in a sentence."""
    said = [f"{found.skill} loses {found.lost[found.skill]:.1%}"]
    if found.layers:
        tensor = f", there {found.tensors[0].name} ({found.tensors[0].won:.1%})" if found.tensors else ""
        said.append(f"most by {found.layers[0].name} ({found.layers[0].won:.1%}){tensor}")
    if found.models:
        said.append(f"of the models most by {found.models[0].name} ({found.models[0].won:.1%})")
    return "; ".join(said)
