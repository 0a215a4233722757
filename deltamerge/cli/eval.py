"""The command eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli import streams
from deltamerge.cli.layout import Column, Row, cell, paragraph, stacked, table
from deltamerge.cli.options import (
    AS_CSV,
    AS_JSON,
    DEVICE,
    FILE,
    MODEL,
    PICKLES,
    RECIPE,
    TRACK,
    HomePath,
    calibration_of,
    tracked,
)
from deltamerge.cli.output import say, say_csv, say_json
from deltamerge.errors import app
from deltamerge.errors.shown import lines as one_a_line

if TYPE_CHECKING:
    from deltamerge.apps.probe import Probe
    from deltamerge.apps.search.evaluate import Evaluation


METRICS = ("accuracy", "matthews_correlation", "f1", "accuracy_f1", "pearson_spearman", "exact_match", "loss")


@click.command("eval")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option(
    "--calibration",
    type=FILE,
    metavar="FILE",
    help="Labelled rows: .jsonl, .csv, .parquet, pictures, or a hub data set.",
)
@click.option(
    "--recipe", type=RECIPE, help="Take the rows of each fine-tune from this recipe, and score them with its head."
)
@click.option("--text", multiple=True, metavar="KEY", help="Its field of text; twice for sentence pairs.")
@click.option("--label", metavar="KEY", help="Field of the rows that has the label. Default: label.")
@click.option(
    "--task", type=click.Choice(["text-classification", "text-generation", "image-classification", "causal-lm"])
)
@click.option("--metric", "metrics", multiple=True, type=click.Choice(METRICS), help="Default: all that suit the head.")
@click.option("--answer", metavar="PATTERN", help="exact_match: pattern of the answer in a text.")
@click.option("--new-tokens", type=click.IntRange(1), help="exact_match: most tokens generated for an answer.")
@click.option("--sequences", type=click.IntRange(1), help="Number of rows to use. Default: all.")
@click.option("--length", type=click.IntRange(1), help="Tokens per row. Default: 128.")
@click.option("--head", type=MODEL, help="Model whose head to use, if the merged model has the head of another task.")
@click.option("--base", type=MODEL, help="Base of the adapters and delta artifacts among MODELS.")
@click.option(
    "--out",
    type=HomePath(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File that keeps the scores, one JSON line each. A second run computes only missing scores.",
)
@click.option("--probe", is_flag=True, help="In short: answers, perplexity, and faults of the first of MODELS.")
@TRACK
@DEVICE
@PICKLES
@AS_JSON
@AS_CSV
def command(
    models: tuple[str, ...],
    calibration: str | None,
    recipe: Path | None,
    text: tuple[str, ...],
    label: str | None,
    task: str | None,
    metrics: tuple[str, ...],
    answer: str | None,
    new_tokens: int | None,
    sequences: int | None,
    length: int | None,
    head: str | None,
    base: str | None,
    out: Path | None,
    probe: bool,
    track: str | None,
    device: str,
    pickles: bool,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Score MODELS on labelled rows, side by side.

    MODELS are folders, hub ids, base+adapter, or delta artifacts.

    \b
    deltamerge eval ./merged ./models/math --calibration test.jsonl
    deltamerge eval ./merged ./models/* --recipe recipe.yaml    # every task, by its own head
    deltamerge eval ./merged ./models/* --probe    # a few prompts: is the merge of language models whole?
    """
    if probe:
        asked = (recipe, text, label, task, metrics, answer, new_tokens, sequences, length, head, out, track)
        if any(one is not None and one != () for one in asked) or as_csv:
            raise click.UsageError("--probe takes MODELS, --calibration, --base and --json")
        with app("probe"):
            from deltamerge.apps.probe import probe as ask

        seen = ask(models[0], models[1:], rows=calibration, base=base, device=device, pickles=pickles)
        say_json(seen.describe()) if as_json else say(render_probe(seen, streams.columns()))
        return
    with app("search"):
        from deltamerge.apps.search.evaluate import LabelledRows, evaluate, questions_of
    from deltamerge.recipe.file import read_recipe
    from deltamerge.recipe.schema import Calibration

    more = {"label": label, "task": task, "answer": answer, "new_tokens": new_tokens, "length": length}
    rows = calibration_of(calibration, text, **more)
    if (rows is None) == (recipe is None):
        raise click.UsageError("give the rows by --calibration, or by --recipe")
    if recipe is not None and (head is not None or any(value is not None for value in more.values())):
        raise click.UsageError("--recipe has rows and heads of its own: it stands alone")
    if recipe is not None:
        questions = questions_of(read_recipe(recipe))
    else:
        if "exact_match" in metrics:
            rows = {**(rows or {}), "metric": "exact_match", "task": "text-generation"}
        questions = [LabelledRows("", Calibration.model_validate(rows), Path.cwd(), head)]
    found = evaluate(
        models, questions, metrics=metrics, sequences=sequences, base=base, device=device, pickles=pickles, out=out
    )
    for one in found.models if track else ():
        with tracked(track, one.model, {"rows": dict(found.rows)}) as log:
            log(one.scores, 0)
    if as_csv:
        say_csv([{"model": one.model, **_flat(one.scores)} for one in found.models])
    else:
        say_json(found.describe()) if as_json else say(render(found, streams.columns()))


def render_probe(found: Probe, width: int) -> str:
    """Return the perplexities, each prompt with its answers, and the faults of the merge."""
    models = (found.merge, *found.parents)
    columns = [Column("perplexity"), Column("empty\nanswers"), Column("repeat\nthemselves")]
    rows: list[Row] = [(one.model, [cell(one.perplexity), str(one.empty), str(one.loops)]) for one in models]
    lines = [*table(columns, [rows], width), "", f"{found.texts} texts, {len(found.prompts)} prompts"]
    for i, prompt in enumerate(found.prompts):
        lines += ["", *paragraph(" ".join(prompt.split()), width)]
        for one in models:
            said = " ".join(one.answers[i].split()) or "(nothing)"
            lines += paragraph(f"{one.model}: {said}", width, first="  ", then="    ")
    return one_a_line([*lines, "", *wrong_with(found)])


def wrong_with(found: Probe) -> list[str]:
    """Return a line for each fault of a merge, or a line that says there is none."""
    name = found.merge.model
    return [f"wrong with {name}: {one}" for one in found.remarks] or [f"nothing wrong with {name} was seen"]


def _flat(scores: Any) -> dict[str, float]:
    return {f"{task}.{name}" if task else name: value for task, own in scores.items() for name, value in own.items()}


def render(found: Evaluation, width: int) -> str:
    """Return a line for each model, a column for each metric of each task."""
    flat = {one.model: _flat(one.scores) for one in found.models}
    names = list(dict.fromkeys(name for own in flat.values() for name in own))
    columns = [Column(stacked(name)) for name in names]
    rows: list[Row] = [(model.removeprefix("./"), [cell(own.get(n)) for n in names]) for model, own in flat.items()]
    counts = dict.fromkeys(found.rows.values())
    several = ", ".join(f"{count:,} of {task.removeprefix('./')}" for task, count in found.rows.items())
    foot = f"{next(iter(counts)):,} rows" if len(counts) == 1 else f"rows: {several}"
    return one_a_line([*table(columns, [rows], width), "", foot])
