"""The command line: the only module that prints or exits."""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from deltamerge import __version__, errors
from deltamerge.errors import DeltamergeError, RecipeError
from deltamerge.show import aligned, human, render_delta, render_diff

if TYPE_CHECKING:
    from deltamerge.plan import Plan
    from deltamerge.run import Result


class RecipeFile(click.Path):
    """A path; the shell completes recipes and folders."""

    def shell_complete(self, context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
        folder, _, begun = incomplete.rpartition("/")
        try:
            entries = sorted(os.scandir(f"{folder}/" if folder or incomplete.startswith("/") else "."), key=str)
        except OSError:
            return []
        prefix = incomplete.removesuffix(begun) if begun else incomplete
        names = [entry for entry in entries if entry.name.startswith(begun) and not entry.name.startswith(".")]
        return [
            CompletionItem(f"{prefix}{entry.name}{'/' if entry.is_dir() else ''}")
            for entry in names
            if entry.is_dir() or entry.name.endswith((".yaml", ".yml"))
        ]


RECIPE = RecipeFile(path_type=Path)
FOLDER = click.Path(path_type=Path)
VERSIONS = ("torch", "transformers", "safetensors", "huggingface_hub", "pydantic", "numpy", "numba", "peft")
DEVICE = click.option("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="Where tiles are computed.")
WORKERS = click.option("--workers", type=click.IntRange(1), help="Threads; default: the cores of this machine.")


def _size(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    from deltamerge.fields import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}, got {text!r}") from error


MEMORY = click.option(
    "--memory", metavar="SIZE", callback=_size, help="Cap on memory, such as 2GB; tiles shrink to keep it."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 unusable input, 2 usage, 3 a bug, 130 interrupted."""
    gc.disable()  # a plan is many objects without cycles: collecting them over and over costs a third of planning
    try:
        code = commands.main(arguments, prog_name="deltamerge", standalone_mode=False)
    except click.exceptions.Exit as leaving:
        code = leaving.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt) as interruption:
        kept = str(interruption.__cause__ or interruption)  # click wraps a KeyboardInterrupt in its Abort
        click.echo(f"interrupted: {kept or 'nothing was left behind; run the command again'}", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = 2
    except DeltamergeError as error:
        complain(error, "error")
        code = error.exit_code
    except BrokenPipeError:
        code = 1
    except Exception as bug:
        code = _report_bug(bug)
    sys.exit(code if isinstance(code, int) else 0)


def complain(error: DeltamergeError, where: str) -> None:
    """One error on stderr, with its hint; a recipe's problems say where they are themselves."""
    click.echo(str(error) if isinstance(error, RecipeError) else f"{where}: {error}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)


def _report_bug(bug: Exception) -> int:
    click.echo(f"bug in deltamerge {__version__}: {type(bug).__name__}: {bug}", err=True)
    last = traceback.extract_tb(bug.__traceback__)[-1]
    click.echo(f"at {Path(last.filename).name}:{last.lineno} in {last.name}", err=True)
    click.echo("hint: please report these lines together with the recipe and `deltamerge --version`", err=True)
    return 3


def _versions(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    click.echo(f"deltamerge {__version__}\npython {platform.python_version()} on {platform.platform()}")
    for package in VERSIONS:
        try:
            click.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            click.echo(f"{package} not installed")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_versions,
    help="Version of deltamerge, and of all that matters in a bug report.",
)  # fmt: skip
def commands() -> None:
    """Merge fine-tuned models and prune their deltas, driven by a YAML recipe."""


@commands.command()
@click.argument("recipe", type=RecipeFile())
@click.option("--out", type=FOLDER, help="Folder to make; default: the recipe's output.path, or NAME-merged beside it.")
@DEVICE
@WORKERS
@MEMORY
@click.option("--part", metavar="I/N", help="Write only the I-th of N parts, whole shards each.")
@click.option("--finish", is_flag=True, help="Make the target of what all parts wrote.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped; the same bytes result.")
@click.option("--force", is_flag=True, help="Replace a target that is not empty; forget an interrupted run.")
@click.option("--locked", is_flag=True, help="Refuse inputs that differ from the lock beside the recipe.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep NaN and infinities in the result.")
@AS_JSON
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
def run(
    recipe: str,
    out: Path | None,
    device: str,
    workers: int | None,
    memory: int | None,
    part: str | None,
    finish: bool,
    resume: bool,
    force: bool,
    locked: bool,
    allow_nonfinite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run RECIPE: merge its models into a checkpoint that transformers loads.

    Of several documents those with a name are made first, beside the output, where they would differ.

    \b
    deltamerge run recipe.yaml --memory 2GB
    deltamerge run hf://org/name    # again, what someone pushed; says whether the bytes agree

    An interrupted run leaves .NAME.partial beside its target, to be resumed, or forgotten by force.
    """
    from deltamerge.distribute import Part
    from deltamerge.run import describe_nonfinite
    from deltamerge.run import finish as finish_parts
    from deltamerge.run import run as run_recipe
    from deltamerge.share import SCHEME

    if finish and part is not None:
        raise click.UsageError("--finish and --part exclude each other")

    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    progress = Progress(shown=not quiet and sys.stderr.isatty())
    published = None
    with TemporaryDirectory(prefix="deltamerge-") as scratch:
        path = Path(recipe)
        if recipe.startswith(SCHEME):
            from deltamerge.share import fetch

            published = fetch(recipe, Path(scratch))
            path, locked = published.recipe, True
            out = out or Path(f"{recipe.partition('@')[0].rpartition('/')[2]}-merged")
        if finish:
            result = finish_parts(
                path, out, workers=workers, force=force, locked=locked, pins=published.pins if published else None
            )
        else:
            result = run_recipe(
                path,
                out,
                device=device,
                workers=workers,
                memory=memory,
                part=Part.parse(part) if part else None,
                resume=resume,
                force=force,
                locked=locked,
                allow_nonfinite=allow_nonfinite,
                pins=published.pins if published else None,
                watch=lambda plan: progress.start(plan.nbytes),
            )
    if result.nonfinite:
        click.echo(f"warning: {describe_nonfinite(result.nonfinite)}", err=True)
    differing = published.differences(result.lock["outputs"]) if published and not part else []
    found: dict[str, Any] = {"intermediate": {str(folder): made for folder, made in result.intermediate.items()}}
    if published:
        found["published"] = {"commit": published.commit, "differs": differing}
    report_run(result, progress, as_json=as_json, quiet=quiet, **found)
    if part and not (quiet or as_json):
        click.echo("hint: when every part is done, run the same command with --finish", err=True)
    if published is not None and not part:
        agreed = f"not the bytes of {recipe}: {', '.join(differing)}" if differing else f"the same bytes as {recipe}"
        click.echo(f"{result.folder}: {agreed} at {published.commit[:12]}", err=True)
    if differing:
        raise click.exceptions.Exit(1)


def report_run(result: Result, progress: Progress, *, as_json: bool, quiet: bool, **more: Any) -> None:
    """What a finished run made; `more` is for the JSON object."""
    progress.stop()
    tensors, delta = len(result.plan.outputs), result.delta
    adapter = result.plan.recipe.output.kind == "peft"
    size = delta.nbytes if delta else result.nbytes if adapter else result.plan.nbytes
    if as_json:
        summary = {
            "out": str(result.folder),
            "bytes": size,
            "tensors": tensors,
            "seconds": round(progress.seconds, 3),
            "lock": result.lock,
            "nonfinite": {name: count._asdict() for name, count in result.nonfinite.items()},
            **({} if delta is None else {"entries": delta.entries, "relative_error": delta.error}),
            **more,
        }
        click.echo(json.dumps(summary, sort_keys=True))
    elif not quiet:
        lost = ""
        for folder, made in result.intermediate.items():
            click.echo(f"{folder}: {'made' if made else 'as it would be made, kept'}", err=True)
        if delta is not None:
            values = result.plan.delta_values
            how = "final values, exact" if values is None else f"{values} values, relative error {delta.error:.3g}"
            lost = f", {delta.entries:,} entries: {how}"
        what = "an adapter" if adapter else f"{tensors} tensors"
        click.echo(f"{result.folder}: {what}, {human(size)} in {progress.seconds:.1f} s{lost}", err=True)
        for note in result.plan.notes if adapter else ():
            click.echo(f"note: {note}", err=True)


def check_size(plan: Plan) -> str:
    """The bytes that a run will leave."""
    delta = plan.describe()["delta"] if plan.recipe.output.kind == "delta" else None
    return human(plan.nbytes) if delta is None else f"a delta of about {human(delta['estimated_bytes'])}"


@commands.command()
@click.argument("delta")
@click.option("--base", required=True, help="The checkpoint that the delta was made from: a folder, or a hub id.")
@click.option("--out", type=FOLDER, required=True, help="Folder to make.")
@WORKERS
@MEMORY
@click.option("--force", is_flag=True, help="Replace a target that is not empty.")
@AS_JSON
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
def apply(
    delta: str,
    base: str,
    out: Path,
    workers: int | None,
    memory: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Put DELTA on its base: writes the whole checkpoint, every tensor checked before and after by hash."""
    from deltamerge.apply import apply as apply_delta
    from deltamerge.execute import default_workers

    progress = Progress(shown=not quiet and sys.stderr.isatty())
    done = apply_delta(
        delta, base, out, workers=workers or default_workers(), memory=memory, force=force, watch=progress.start
    )
    progress.stop()
    if as_json:
        summary = {
            "out": str(done.folder),
            "bytes": done.nbytes,
            "tensors": done.tensors,
            "seconds": round(progress.seconds, 3),
            "lock": done.lock,
        }
        click.echo(json.dumps(summary, sort_keys=True))
    elif not quiet:
        size = human(done.nbytes)
        click.echo(f"{done.folder}: {done.tensors} tensors, {size} in {progress.seconds:.1f} s", err=True)


@commands.command()
@click.argument("model")
@click.option("--base", required=True, help="What MODEL was fine-tuned from: a folder, or a hub id.")
@click.option("--out", type=FOLDER, help="Folder to make; default: NAME-delta here.")
@click.option("--density", type=float, help="Fraction of the delta kept; default: all that changed, exactly.")
@click.option("--method", help="How entries are chosen, as prune.method; default: magnitude.")
@click.option("--q", type=float, help="What kept entries are divided by; default: as in recipes.")
@click.option(
    "--values",
    type=click.Choice(["float32", "bfloat16", "int8", "sign"]),
    help="Store values to add, in this form; default: final values.",
)
@DEVICE
@WORKERS
@MEMORY
@click.option("--force", is_flag=True, help="Replace a target that is not empty.")
@AS_JSON
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
def extract(
    model: str,
    base: str,
    out: Path | None,
    density: float | None,
    method: str | None,
    q: float | None,
    values: str | None,
    device: str,
    workers: int | None,
    memory: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a delta artifact of MODEL, a fine-tune of the base: what changed, or with a density what is kept of it."""
    from deltamerge.extract import extract as extract_delta

    progress = Progress(shown=not quiet and sys.stderr.isatty())
    result = extract_delta(
        model,
        base,
        out,
        density=density,
        method=method,
        q=q,
        values=values,
        device=device,
        workers=workers,
        memory=memory,
        force=force,
        watch=lambda plan: progress.start(plan.nbytes),
    )
    report_run(result, progress, as_json=as_json, quiet=quiet)


@commands.command()
@click.argument("recipes", type=RECIPE, nargs=-1, required=True)
@click.option("--offline", is_flag=True, help="Only the recipes themselves; opens no model and no network.")
def check(recipes: tuple[Path, ...], offline: bool) -> None:
    """Validate RECIPES and the headers of the models they name; reads no weights."""
    from deltamerge.chain import documents
    from deltamerge.run import make_plans

    worst = 0
    for recipe in recipes:
        try:
            chain = documents(recipe)
            plan = None if offline else make_plans(recipe, device="cpu")[-1]
        except DeltamergeError as error:
            complain(error, str(recipe))
            worst = max(worst, error.exit_code)
        else:
            several = f", {len(chain)} documents" if len(chain) > 1 else ""
            size = f", {len(plan.outputs)} tensors, {check_size(plan)}" if plan else ""
            click.echo(f"{recipe}: ok{several}{size}", err=True)
    if worst:
        raise click.exceptions.Exit(worst)


@commands.command()
@click.argument("recipe", type=RECIPE)
@DEVICE
@WORKERS
@MEMORY
@click.option("--diff", "old", type=RECIPE, help="Only what RECIPE does otherwise than this one, in Markdown.")
@click.option("--graph", is_flag=True, help="The stages as a Mermaid flowchart.")
@AS_JSON
def plan(
    recipe: Path,
    device: str,
    workers: int | None,
    memory: int | None,
    old: Path | None,
    graph: bool,
    as_json: bool,
) -> None:
    """The dry run: every output tensor of RECIPE with its sources, method and bytes; reads no weights.

    \b
    deltamerge plan recipe.yaml --json
    deltamerge plan --diff old.yaml new.yaml    # for a pull request
    """
    from deltamerge import review
    from deltamerge.run import make_plans

    def describe(path: Path) -> dict[str, Any]:
        *before, planned = make_plans(path, device=device, workers=workers, memory=memory)
        intermediate = {plan.recipe.name: plan.describe() for plan in before}
        return planned.describe() | ({"intermediate": intermediate} if before else {})

    if graph and (old or as_json):
        raise click.UsageError("--graph stands alone")
    described = describe(recipe)
    if old is not None:
        with errors.context(str(old)):
            found = review.difference(describe(old), described)
        shown = review.markdown(found, str(old), str(recipe))
        click.echo(json.dumps(found, sort_keys=True) if as_json else shown)
    elif graph:
        click.echo(review.mermaid(described))
    elif as_json:
        click.echo(json.dumps(described, sort_keys=True))
    else:
        for name, one in described.get("intermediate", {}).items():
            click.echo(f"document {name}\n{render_plan(one)}\n")
        click.echo(render_plan(described))


@commands.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--base", required=True, help="What the models were fine-tuned from.")
@click.option("--calibration", "data", type=FOLDER, help="Text to calibrate q on: .jsonl, .csv or .txt.")
@click.option("--out", default="recipe.yaml", show_default=True, help="The recipe to write; - is stdout.")
def init(models: tuple[str, ...], base: str, data: Path | None, out: str) -> None:
    """Write a commented recipe that prunes one of MODELS, or merges several; folders or hub ids.

    \b
    deltamerge init ./math ./code --base ./base
    deltamerge init ./math --base ./base --calibration sentences.jsonl --out - | less
    """
    from deltamerge.init import first_recipe, write_new

    path = Path("recipe.yaml" if out == "-" else out)
    text = first_recipe(base, models, path, data)
    if out == "-":
        click.echo(text, nl=False)
        return
    write_new(path, text)
    click.echo(f"{path}: written; next: deltamerge plan {path}", err=True)


@commands.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete deltamerge's commands, options, methods and recipes.

    \b
    eval "$(deltamerge completion bash)"     # in ~/.bashrc; zsh likewise in ~/.zshrc
    deltamerge completion fish > ~/.config/fish/completions/deltamerge.fish
    """
    found = get_completion_class(shell)
    assert found is not None  # click knows these three
    click.echo(found(commands, {}, "deltamerge", "_DELTAMERGE_COMPLETE").source())


@commands.command()
@click.argument("recipe", type=RECIPE)
@DEVICE
@WORKERS
@MEMORY
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the search (extra `plot`).")
@AS_JSON
def calibrate(
    recipe: Path, device: str, workers: int | None, memory: int | None, plot: Path | None, as_json: bool
) -> None:
    """Only choose the q's of RECIPE on its calibration data; writes them to the lock beside it, for run --locked."""
    from deltamerge.run import calibrate as calibrate_recipe

    found = calibrate_recipe(recipe, device=device, workers=workers, memory=memory)
    if plot is not None:
        from deltamerge.plots import draw

        draw(found, plot)
    click.echo(json.dumps(found, sort_keys=True) if as_json else render_calibration(found))
    click.echo(f"{recipe.with_suffix('.lock')}: written", err=True)


BASE = click.option("--base", required=True, metavar="MODEL", help="What MODEL was fine-tuned from.")
ROWS = (
    click.option("--calibration", metavar="FILE", help="Rows of text: .jsonl, .csv, .txt, or a hub data set."),
    click.option("--text", multiple=True, metavar="KEY", help="Its field of text; twice for sentence pairs."),
    click.option("--sequences", type=click.IntRange(1), default=50, show_default=True, help="Rows to use."),
    click.option("--length", type=click.IntRange(1), default=128, show_default=True, help="Tokens a row."),
)


def _rows(command: Callable[..., None]) -> Callable[..., None]:
    """The options that stand for a recipe's `calibration`."""
    for option in reversed(ROWS):
        command = option(command)
    return command


def _calibration(data: str | None, text: tuple[str, ...], **more: Any) -> dict[str, Any] | None:
    if data is None:
        if text or more.get("label"):
            raise click.UsageError("--text and --label need --calibration")
        return None
    fields = {"text": text[0] if len(text) == 1 else list(text)} if text else {}
    return {"data": data, **fields, **{key: value for key, value in more.items() if value is not None}}


@commands.command(epilog="Example: deltamerge inspect ./models/math --base ./models/base --calibration calib.jsonl")
@click.argument("model")
@BASE
@_rows
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Of the bound and the errors, with --calibration.",
)
@click.option("--tensors", is_flag=True, help="List every tensor, not only layers.")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE", help="Draw them on an HTML page.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@DEVICE
@WORKERS
@AS_JSON
def inspect(
    model: str,
    base: str,
    calibration: str | None,
    text: tuple[str, ...],
    sequences: int,
    length: int,
    density: float,
    tensors: bool,
    page: Path | None,
    force: bool,
    device: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Statistics of the delta of MODEL, per layer and in all: how large it is, where, and what pruning would keep.

    With --calibration also what it does to activations: influence, coherence, massive activations, the bound of DARE.
    """
    from deltamerge.inspect import render
    from deltamerge.study import inspect as inspect_delta

    rows = _calibration(calibration, text, sequences=sequences, length=length)
    progress = Progress(shown=sys.stderr.isatty())
    report = inspect_delta(
        model, base, calibration=rows, density=density, out=page, force=force,
        device=device, workers=workers, watch=progress.start,
    )  # fmt: skip
    progress.stop()
    click.echo(report.model_dump_json() if as_json else render(report, tensors=tensors))
    if page is not None:
        click.echo(f"{page}: written", err=True)


@commands.command(
    epilog="Example: deltamerge recommend ./models/math --base ./models/base --density 0.01 --calibration calib.jsonl"
)
@click.argument("model")
@BASE
@click.option(
    "--density", type=click.FloatRange(0, 1, min_open=True, max_open=True), required=True, help="Fraction to keep."
)
@_rows
@click.option("--label", metavar="KEY", help="Field of the label: show the metric on held-out rows too.")
@click.option("--out", type=RECIPE, metavar="FILE", help="Write the recipe there; default: only print it.")
@DEVICE
@WORKERS
@AS_JSON
def recommend(
    model: str,
    base: str,
    density: float,
    calibration: str | None,
    text: tuple[str, ...],
    sequences: int,
    length: int,
    label: str | None,
    out: Path | None,
    device: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Which pruning for the delta of MODEL at a density, with evidence, and the recipe that does it.

    Without --calibration the delta's own statistics decide; with rows of text each method's mask is drawn and measured.
    """
    from deltamerge.recommend import render
    from deltamerge.study import recommend as recommend_pruning

    rows = _calibration(calibration, text, sequences=sequences, length=length, label=label)
    progress = Progress(shown=sys.stderr.isatty())
    answer = recommend_pruning(
        model, base, density, calibration=rows, out=out, device=device, workers=workers, watch=progress.start
    )
    progress.stop()
    click.echo(answer.model_dump_json() if as_json else render(answer))
    if out is not None:
        click.echo(f"{out}: written", err=True)


@commands.command()
@click.argument("folder", type=FOLDER)
@click.option("--base", help="Check the base too: what a delta makes of it, or that the lock has its files.")
@WORKERS
def verify(folder: Path, base: str | None, workers: int | None) -> None:
    """Check every file of FOLDER against the hashes in its recipe.lock."""
    from deltamerge.execute import default_workers
    from deltamerge.lock import verify as verify_folder

    workers = workers or default_workers()
    names = verify_folder(folder, workers)
    click.echo(f"{folder}: {len(names)} files as the lock says", err=True)
    if base is not None:
        from deltamerge.apply import verify_base

        click.echo(f"{folder}: {verify_base(folder, base, workers)}", err=True)


@commands.command()
@click.argument("a")
@click.argument("b")
@WORKERS
@AS_JSON
def diff(a: str, b: str, workers: int | None, as_json: bool) -> None:
    """What differs between two checkpoints A and B (one may be a delta of the other), or between two locks."""
    from deltamerge.diff import diff as compare
    from deltamerge.execute import default_workers

    found = compare(a, b, workers or default_workers())
    click.echo(json.dumps(found, sort_keys=True) if as_json else render_diff(found))


@commands.command()
@click.argument("folder", type=FOLDER)
@click.argument("repository")
@click.option("--public", is_flag=True, help="For everyone to see; without it the repository is private.")
@WORKERS
def push(folder: Path, repository: str, public: bool, workers: int | None) -> None:
    """Publish FOLDER, which a run made, as REPOSITORY on the hub: weights, card, recipe and lock.

    Logged in with `hf auth login`, or with HF_TOKEN set. Run again after an interruption: what has arrived stays.
    """
    from deltamerge.execute import default_workers
    from deltamerge.share import push as push_folder

    click.echo(push_folder(folder, repository, public=public, workers=workers or default_workers()), err=True)


@commands.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors."""
    from deltamerge.recipe import schema as recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))


def render_plan(described: dict[str, Any]) -> str:
    """The plan as an aligned table."""
    rows: list[tuple[str, ...]] = [("tensor", "dtype", "shape", "bytes", "method", "sources", "file")]
    for tensor in described["tensors"]:
        shape = "×".join(map(str, tensor["shape"])) or "scalar"
        sources = "; ".join(tensor["sources"])
        rows.append(
            (
                tensor["name"],
                tensor["dtype"],
                shape,
                human(tensor["bytes"]),
                tensor["method"],
                sources,
                tensor["file"],
            )
        )
    lines = aligned(rows)
    passes = max((tensor["passes"] for tensor in described["tensors"]), default=1)
    select = f"select in up to {passes - 1} passes → " if passes > 1 else ""
    backends = sorted({t["backend"] for t in described["tensors"] if t["method"] != "copy"})
    lines += [
        "",
        f"merge_method   {described['merge_method']} of {', '.join(described['models'])}"
        + (f" on {described['base_model']}" if described["base_model"] else ""),
        f"template       {described['template']}",
        *_render_tokenizer(described),
        *(
            f"calibration    {s['model']}: {s['objective']}, scope {s['scope']}, search {s['search']}; "
            f"{s['sequences']} sequences of {s['length']} tokens, at most {s['forward_passes']} forward passes, "
            f"{human(s['memory'])}, "
            + (f"{s['blocks']} blocks one at a time" if s["blocks"] else "the whole model at once")
            for s in described["stages"]
        ),
        f"stages         {'calibrate → ' if described['stages'] else ''}read → {select}merge → write",
        f"output         {len(described['tensors'])} tensors, {human(described['output_bytes'])} in "
        f"{len(described['shards'])} file{'s' if len(described['shards']) != 1 else ''}",
        *([f"as a delta     {render_delta(described['delta'])}"] if "delta" in described else []),
        f"reads          {human(described['read_bytes'])}",
        f"runs on        {described['device']}, {described['workers']} workers, {', '.join(backends) or 'copies only'}",
        f"peak memory    {human(described['peak_bytes'])}",
        *(f"note           {note}" for note in described["notes"]),
    ]
    return "\n".join(lines)


def _render_tokenizer(described: dict[str, Any]) -> list[str]:
    """What becomes of the vocabulary, and where tokens come from that a model lacks."""
    chat = [f"chat template  {described['chat_template']}"] if described["chat_template"] else []
    found = described["tokenizer"]
    if found is None:
        return chat
    sources = {"base": "the base's row", "one_model": "their only model's", "mean": "the mean of theirs",
               "zeros": "zeros", "recipe": "what the recipe says"}  # fmt: skip
    lacking = [f"{count} from {sources[source]}" for source, count in found["lacking"].items() if count]
    parts = [
        f"{found['source']}, starting from {found['starts_from']}",
        f"{found['tokens']} tokens, {found['appended']} appended"
        + f", {found['dropped']} dropped" * bool(found["dropped"]),
        f"{found['rows']} rows" + f", {found['padding']} of them padding" * bool(found["padding"]),
    ]
    notes = [f"tokenizer      {note}" for note in found["notes"]]
    missing = [f"tokenizer      tokens that a model lacks: {', '.join(lacking)}"] if lacking else []
    return [f"tokenizer      {'; '.join(parts)}", *missing, *notes, *chat]


def render_calibration(found: dict[str, Any]) -> str:
    """What was chosen for every model, its search path, and the q of every tensor that has one."""
    lines = []
    for model, entry in found.items():
        path = [f"  {' '.join(f'{x:.4g}' if isinstance(x, float) else str(x) for x in step)}" for step in entry["path"]]
        lines += [
            f"model           {model}",
            f"objective       {entry['objective']}, scope {entry['scope']}, search {entry['search']}",
            f"chosen          {entry['chosen']}: {entry['why']}",
            *(f"candidate       {_candidate(candidate)}" for candidate in entry["candidates"]),
            f"value           {entry['value']:.6g}, without calibration {entry['plain']['value']:.6g}",
            f"forward passes  {entry['forward_passes']} of {entry['sequences']} sequences",
            *(["search path", *path] if path else []),
            *(f"q               {q:<10.6g} {name}" for name, q in entry["q"].items()),
            *([f"q of rows       {entry['rows']}"] if "rows" in entry else []),
        ]
    return "\n".join(lines)


def _candidate(candidate: dict[str, Any]) -> str:
    named = {name: x for name, x in candidate.items() if name not in ("value", "held_out")}
    text = " ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{x}" for name, x in named.items())
    return f"{text}: objective {candidate['value']:.4g}, held out {candidate['held_out']:.4g}"


class Progress:
    """A line on stderr: bytes done, rate and time left; silent where nobody looks."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self.begun = self.started = time.monotonic()
        self.total = self.done = 0
        self.last = 0.0
        self.lock = threading.Lock()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def start(self, total: int) -> Callable[[int], None]:
        self.total, self.done = total, 0
        self.started = time.monotonic()
        return self.add

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
            if not self.shown or time.monotonic() - self.last < 0.1:
                return
            self.last = time.monotonic()
            rate = self.done / max(time.monotonic() - self.started, 1e-3)
            left = (self.total - self.done) / max(rate, 1)
            share = self.done / max(self.total, 1)
            bar = "█" * int(share * 24)
            text = f"{bar:<24} {share:4.0%} {human(self.done)} of {human(self.total)} {human(rate)}/s {left:.0f} s left"
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    def stop(self) -> None:
        if self.shown:
            click.echo("\r\x1b[K", nl=False, err=True)
