"""Commands that advise: recommend, init, merge."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli import streams
from deltamerge.cli.layout import Column, Row, cell, paragraph, table
from deltamerge.cli.options import (
    AS_CSV,
    AS_JSON,
    BASE,
    DEVICE,
    FOLDER,
    KEEP,
    MODEL,
    PICKLES,
    QUIET,
    RECIPE,
    RESOURCES,
    WORKERS,
    HomePath,
    RecipePath,
    about_rows,
    rows_in_folder,
    rows_of_each,
    rows_of_text,
    rows_to_keep,
)
from deltamerge.cli.output import say, say_json, say_model, say_table, tell
from deltamerge.cli.result import Warnings, report_run, summary_of
from deltamerge.errors import app
from deltamerge.errors.shown import lines as one_a_line

if TYPE_CHECKING:
    from deltamerge.apps.recommend.meeting import Conflict
    from deltamerge.apps.recommend.merge import MergeAdvice, MergeCandidate
    from deltamerge.apps.recommend.prune import PruneCandidate, Recommendation

CANDIDATES = ("delta error", "layer error", "lost", "metric", "q")
ABOUT_CANDIDATES = "Smaller is better: delta error, expected ‖Δ − Δ'‖²/‖Δ‖²"
ABOUT_NOTHING = (
    ". Without rows it does not decide: a delta that is not rescaled has a small error, and still loses the skill"
)
ABOUT_ERRORS = (
    "; layer error, mean ‖Δx − Δ'x‖²/‖Δx‖² of the linear layers; lost, share of the fine-tune's effect on held-out rows"
)
ABOUT_MERGES = (
    "→: recommended. lost: of the fine-tunes' effect on held-out outputs, mean and worst; alike: rows that the merge "
    "answers as the model does; λ: factor of the merged delta"
)
MOST_PAIRS = 15
ABOUT_PAIRS = (
    "equal signs: of entries that both change (unrelated: a half); overlap: of the layers' leading subspaces; "
    "disturbs, disturbed: what the first does to the second's inputs, and the second to the first's, beside their own"
)
ABOUT_SHARES = {
    "weights": "Shares are of each fine-tune's score, as this method kept skills in our benchmarks. "
    "Rows would show what this merge keeps.",
    "answers": "Shares are of each fine-tune's score, told from its answers on these rows.",
    "numbers": "Shares are of each fine-tune's score, told from its answers on these rows.",
    "texts": "Shares are of each fine-tune's score: rows whose completion comes out token by token as its own.",
}


@click.command("recommend")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@BASE
@click.option(
    "--density", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="For one MODEL: the fraction to keep."
)
@rows_of_each
@click.option("--label", metavar="KEY", help="Field of the label: show the metric on held-out rows too.")
@KEEP
@click.option("--no-fit", is_flag=True, help="For several MODELS: do not fit coefficients, the slowest step.")
@click.option("--out", type=RECIPE, metavar="FILE", help="Write the recipe there; default: only print it.")
@DEVICE
@WORKERS
@PICKLES
@AS_JSON
@AS_CSV
def recommend(
    models: tuple[str, ...],
    base: str,
    density: float | None,
    calibration: list[dict[str, Any] | None],
    keep: dict[str, Any] | None,
    no_fit: bool,
    out: Path | None,
    as_json: bool,
    as_csv: bool,
    **options: Any,
) -> None:
    """Recommend a pruning for the delta of one MODEL, or a merge method for several MODELS.

    Prints the evidence and the recipe. Without --calibration, statistics of the deltas decide. With rows of text, each
    candidate is measured on each model's rows. Candidates are prunings of one model, or merges at several λ and with
    fitted coefficients.

    \b
    deltamerge recommend ./math --base ./base --density 0.01 --calibration calib.jsonl
    deltamerge recommend ./math ./code --base ./base --calibration math.jsonl --calibration code.jsonl
    """
    if len(models) > 1:
        with app("recommend"):
            from deltamerge.apps.recommend.merge import recommend_merge
        from deltamerge.run.options import Options

        rows = [one for one in calibration if one]
        if density is not None or any("label" in one for one in rows):
            raise click.UsageError("--density and --label are for one MODEL, and these are several")
        if as_csv and not rows:
            raise click.UsageError("--csv has the merges that are tried on rows: give --calibration, or take --json")
        if keep is not None and not rows:
            raise click.UsageError("--keep is measured beside rows of the MODELS: give --calibration, too")
        merge = recommend_merge(
            models, base, calibration=rows, keep=keep, fit=not no_fit, out=out, options=Options(**options)
        )
        if as_csv:
            say_table(merge.candidates)
        else:
            say_model(merge) if as_json else say(render_merge_advice(merge, width=streams.columns()))
    else:
        with app("recommend"):
            from deltamerge.apps.recommend.prune import recommend_prune

        if density is None:
            raise click.UsageError("Missing option '--density', which one MODEL needs")
        if no_fit or len(calibration) > 1 or keep is not None:
            raise click.UsageError("--no-fit, --keep and several --calibration are for several MODELS, and this is one")
        answer = recommend_prune(models[0], base, density, calibration=calibration[0], out=out, **options)
        if as_csv:
            say_table(answer.candidates)
        else:
            say_model(answer) if as_json else say(render_recommend(answer, width=streams.columns()))
    if out is not None:
        tell(f"{out}: written")


def render_recommend(answer: Recommendation, *, width: int) -> str:
    """Return the evidence, the candidates, the recommendation and its recipe."""
    seen = answer.evidence
    columns = [Column(seen.metric or head if head == "metric" else head) for head in CANDIDATES]
    judged = [one for one in answer.candidates if any(_candidate(one))]
    on_rows = any(one.layer_error is not None for one in judged)
    by = [one.lost if on_rows else one.delta_error for one in judged]
    least = min((value for value in by if value is not None), default=None)
    marks = {one.name: one.name == answer.method and value == least for one, value in zip(judged, by, strict=True)}
    rows: list[Row] = [(("→ " if marks[one.name] else "  ") + one.name, _candidate(one)) for one in judged]
    figures = [
        f"mean |Δ| {seen.mean_abs_delta:.3g}",
        *([f"mean |c| {seen.mean_abs_influence:.3g}"] if seen.mean_abs_influence is not None else []),
        *([f"‖Δ‖/‖W‖ {seen.relative_norm:.3g}, noise of DARE {seen.noise:.3g}"] if seen.noise is not None else []),
        *([f"coherence {seen.coherence:.3g}"] if seen.coherence is not None else []),
        f"{seen.kept_energy:.1%} of the energy in the largest {answer.density:g}",
    ]
    lines = [f"{answer.model} on {answer.base}, density {answer.density:g}", *paragraph("; ".join(figures), width), ""]
    about = f"{'→: recommended. ' * any(marks.values())}{ABOUT_CANDIDATES}{ABOUT_ERRORS if on_rows else ABOUT_NOTHING}."
    lines += [*table(columns, [rows], width), "", *paragraph(about, width)]
    if others := [one.name for one in answer.candidates if one not in judged]:
        lines += paragraph(f"Judged with --calibration alone: {', '.join(others)}", width)
    lines.append("")
    if seen.metric is not None and seen.metric_fine_tune is not None and seen.metric_base is not None:
        lines += [f"{seen.metric}: fine-tune {seen.metric_fine_tune:.3g}, base {seen.metric_base:.3g}", ""]
    said = [("the paper", answer.paper.why), ("recommended", f"{answer.method}: {answer.why[0]}")]
    said += [("", line) for line in answer.why[1:]] + [("warning", warning) for warning in answer.warnings]
    for title, words in said:
        lines += paragraph(words, width, first=f"{title:<15}", then=" " * 15)
    return one_a_line([*lines, "", *answer.recipe.rstrip().split("\n")])


def _candidate(one: PruneCandidate) -> list[str]:
    numbers: list[Any] = [one.delta_error, one.layer_error, one.lost, one.metric, one.q]
    return ["" if v is None else f"{v:.1%}" if i == 2 else f"{v:.3g}" for i, v in enumerate(numbers)]


def render_merge_advice(answer: MergeAdvice, *, width: int) -> str:
    """Return how the deltas meet, the candidates, the recommendation, what it keeps, and its recipe."""
    lines = [f"{len(answer.models)} models on {answer.base}", *_meeting(answer.models, answer.evidence, width), ""]
    if answer.candidates:
        judged = [one for one in answer.candidates if one.error is None]
        columns = [Column("λ"), Column("lost"), Column("worst")]
        columns += [Column(f"alike\n{name}", 1) for name in answer.models if any(name in o.agreement for o in judged)]
        rows: list[Row] = [(("→ " if one.name == answer.method else "  ") + one.name, _merge(one)) for one in judged]
        lines += [*table(columns, [rows], width), "", *paragraph(ABOUT_MERGES, width)]
        lines += [f"{one.name}: not judged: {one.error}" for one in answer.candidates if one.error is not None]
        lines += [
            "",
            *paragraph(f"rows: {_range_of(answer.search)} searched on, {_range_of(answer.held_out)} held out", width),
        ]
    lines += _skills(answer, width)
    said = [("recommended", f"{answer.method}, λ = {answer.factor:.3g}: {answer.why[0]}")]
    said += [("", line) for line in answer.why[1:]] + [("lost skills", line) for line in answer.rescue[:1]]
    said += [("", line) for line in answer.rescue[1:]] + [("warning", warning) for warning in answer.warnings]
    for title, words in said:
        lines += paragraph(words, width, first=f"{title:<15}", then=" " * 15)
    return one_a_line([*lines, "", *answer.recipe.rstrip().split("\n")])


def _meeting(models: Sequence[str], found: Conflict, width: int) -> list[str]:
    """Return a table of how deltas meet: a row for each pair, the most alike first."""
    pairs = sorted(
        ((i, j) for j in range(len(models)) for i in range(j)), key=lambda pair: -found.cosine[pair[0]][pair[1]]
    )
    columns = [
        Column("cosine"),
        Column("equal\nsigns"),
        Column("overlap"),
        Column("disturbs", 1),
        Column("disturbed", 1),
    ]
    rows: list[Row] = []
    for i, j in pairs[:MOST_PAIRS]:
        figures = [f"{found.cosine[i][j]:.3f}", f"{1 - found.opposed[i][j]:.1%}", cell(found.overlap[i][j])]
        rows.append(
            (f"{models[i]} – {models[j]}", [*figures, cell(found.disturbance[j][i]), cell(found.disturbance[i][j])])
        )
    lines = ["", *table(columns, [rows], width), ""]
    if len(pairs) > MOST_PAIRS:
        lines += paragraph(f"and {len(pairs) - MOST_PAIRS} less alike pairs: --json has them", width)
    if len(pairs) > 1:
        (a, b), (c, d) = found.most_alike, found.most_opposed
        least = found.cosine[c][d]
        ends = f"most alike: {models[a]} and {models[b]}; {'most opposed' if least < 0 else 'least alike'}: "
        lines += paragraph(f"{ends}{models[c]} and {models[d]}", width)
    chance = "" if found.chance is None else f"; random subspaces overlap by {found.chance:.3f}"
    norms = ", ".join(f"{name} {cell(norm)}" for name, norm in zip(models, found.relative_norm, strict=True))
    return [*lines, *paragraph(f"‖Δ‖/‖W‖ {norms}{chance}", width), *paragraph(ABOUT_PAIRS, width)]


def _skills(answer: MergeAdvice, width: int) -> list[str]:
    """Return a table of the share of each model's score that the merge will keep."""
    if not answer.forecast:
        return []
    columns = [Column("expected\nshare"), Column("8 in 10\nbetween"), Column("most disturbed by", 1)]
    rows: list[Row] = []
    for one in answer.forecast:
        known = one.share is not None and one.low is not None and one.high is not None
        share, between = (f"{one.share:.0%}", f"{one.low:.0%} – {one.high:.0%}") if known else ("–", "–")
        rival = "" if one.rival is None else f"{one.rival}, {cell(one.disturbance)}"
        rows.append((one.model, [share, between, rival]))
    about = ABOUT_SHARES[answer.forecast[0].by]
    if answer.head is not None:
        about += f" They are reached {answer.about_heads}."
    return ["", *table(columns, [rows], width), "", *paragraph(about, width), ""]


def _merge(one: MergeCandidate) -> list[str]:
    factor = "" if one.factor is None or one.coefficients is not None else f"{one.factor:.3g}"
    lost = ["" if value is None else f"{value:.1%}" for value in (one.lost_mean, one.lost_worst)]
    return [factor, *lost, *(f"{share:.1%}" for share in one.agreement.values())]


def _range_of(counts: Mapping[str, int]) -> str:
    some_counts = sorted(set(counts.values()))
    return f"{some_counts[0]}" if len(some_counts) == 1 else f"{some_counts[0]} to {some_counts[-1]}"


@click.command("init")
@click.argument("models", nargs=-1, required=True, type=MODEL)
@click.option("--base", required=True, type=MODEL, help="The model that the others were fine-tuned from.")
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
def init(
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
    tell(f"{path}: written; next: deltamerge plan {quote(str(path))}")


@click.command("merge")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option("--base", type=MODEL, help="The model that MODELS were fine-tuned from.")
@click.option("--out", type=FOLDER, help="Folder to make; the recipe is written beside it, as OUT.yaml.")
@click.option(
    "--rows", type=HomePath(path_type=Path), metavar="DIR",
    help="Rows of each model: DIR/NAME.jsonl (.csv, .txt, .parquet), NAME the last part of its path; or one file for "
    "all. A row has a text, or of a language model a prompt and its completion, or messages.",
)  # fmt: skip
@KEEP
@about_rows(100, "Number of rows to use. Of a file without many others, a third of them decides.")
@click.option("--no-fit", is_flag=True, help="Do not fit coefficients, the slowest step.")
@click.option("--dry-run", is_flag=True, help="Write the recipe, with a lock of its fit, and stop before the run.")
@click.option("--force", is_flag=True, help="Choose anew, and replace OUT.yaml and OUT.")
@RESOURCES
@PICKLES
@AS_JSON
@QUIET
def merge(
    models: tuple[str, ...],
    base: str | None,
    out: Path | None,
    rows: Path | None,
    keep: str | None,
    text: tuple[str, ...],
    sequences: int,
    length: int,
    no_fit: bool,
    dry_run: bool,
    force: bool,
    pickles: bool,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Merge MODELS into one, by the method that suits them: recommend, its recipe, and run.

    Prints the choice, its reason, the share that each skill should keep, and a remedy for a skill in danger. A LoRA's
    folder is a model too: the base with that adapter.

    \b
    deltamerge merge ./math ./code --base ./base --out merged
    deltamerge merge ./math ./code --base ./base --out merged --rows rows    # rows/math.jsonl, rows/code.jsonl
    """
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        raise click.UsageError(f"{models[0]} is a recipe: deltamerge run {quote(models[0])}")
    for name, value in (("--base BASE", base), ("--out OUT", out)):
        if value is None:
            raise click.UsageError(f"Missing option '{name}'")
    assert base is not None
    assert out is not None
    with app("recommend"):
        from deltamerge.apps.recommend.advised import advised_merge, in_five_lines
    from deltamerge.run.options import Options

    if keep is not None and rows is None:
        raise click.UsageError("--keep is measured beside rows of the MODELS: give --rows, too")
    about: dict[str, Any] = {"text": text, "sequences": sequences, "length": length}
    found = rows_in_folder(rows, models, **about)
    begun, warnings = time.monotonic(), Warnings()
    options = Options(force=force, pickles=pickles, watch=warnings.watch, **where)
    made = advised_merge(
        models, base, out, rows=found, keep=rows_to_keep(keep, **about), fit=not no_fit, options=options
    )
    if not (as_json or quiet):
        say("\n".join(in_five_lines(made)))
        for warning in made.advice.warnings:
            warnings.said.add(warning)
            tell(f"warning: {warning}")
    said = {"advice": made.advice.model_dump(mode="json"), "recipe": str(made.recipe)}
    if dry_run:
        locked = " --locked" if made.keep_fit() else ""
        if as_json:
            say_json({**said, "run": None})
        elif not quiet:
            run = f"deltamerge run {quote(str(made.recipe))} --out {quote(str(out))}{locked}"
            tell(f"{made.recipe}: written; {run} makes the merge")
        return
    result = made.run()
    warnings.end(result)
    if as_json:
        say_json({**said, "run": summary_of(result, begun)})
    else:
        report_run(result, begun, as_json=False, quiet=quiet)
