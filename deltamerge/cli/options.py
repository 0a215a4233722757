"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from deltamerge.errors import InputError, app
from deltamerge.errors.shown import shown

if TYPE_CHECKING:
    from deltamerge.recipe.yaml_source import Loc

MOST_WORKERS = 1024


class HomePath(click.Path):
    """A path, in which ~ is the home folder, as in the name of a model: no shell expands --out=~/merged."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value) if isinstance(value, str) else value, param, ctx)


class RecipePath(HomePath):
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


class FolderPath(HomePath):
    """A path; the shell completes folders."""

    def shell_complete(self, context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class Reference(click.types.StringParamType):
    """A folder or a hub id, as text; the shell completes folders, or files too."""

    name = "model"

    def __init__(self, *, files: bool = False) -> None:
        self.completed = "file" if files else "dir"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            str(value).encode()
        except UnicodeEncodeError:  # recipes, locks and cards, which are UTF-8, must be able to name it
            self.fail(f"{shown(str(value))} is not UTF-8: rename it, or make a link to it", param, ctx)
        return super().convert(value, param, ctx)

    def shell_complete(self, context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type=self.completed)]


def some(*values: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return a completion for an option that takes these values, among others."""
    return lambda context, option, incomplete: [value for value in values if value.startswith(incomplete)]


def pruning_methods(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:
    """Return the pruning methods that begin with the typed text, including methods of other packages."""
    from deltamerge.methods.registry import PRUNE

    return sorted(name for name in PRUNE if name.startswith(incomplete))


RECIPE = RecipePath(path_type=Path)
FOLDER = FolderPath(path_type=Path)
MODEL = Reference()
FILE = Reference(files=True)
DEVICE = click.option(
    "--device", default="auto", metavar="auto|cpu|cuda[:N,M|:all]", help="Device that computes. auto: a GPU where it "
    "is faster.",
    shell_complete=some("auto", "cpu", "cuda", "cuda:0", "cuda:all"),
)  # fmt: skip
WORKERS = click.option(
    "--workers", type=click.IntRange(1, MOST_WORKERS), help="Threads. Default: one per core, fewer if memory is short."
)


def _size(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    from deltamerge.recipe.values import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}, got {text!r}") from error


MEMORY = click.option("--memory", metavar="SIZE", callback=_size, help="Memory limit, such as 2GB.")


def together(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that adds several options, in this order in the help."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


RESOURCES = together(DEVICE, WORKERS, MEMORY)


def _sizes(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...]:
    found = (_size(context, option, one.strip()) for one in (text or "").split(",") if text is not None)
    return tuple(size for size in found if size is not None)


def _ratios(context: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        return () if text is None else tuple(float(one) for one in text.split(","))
    except ValueError:
        raise click.BadParameter(f"no number: {text!r}") from None


BUDGET = click.option(
    "--budget",
    "budgets",
    metavar="SIZE[,SIZE...]",
    callback=_sizes,
    help="Size of the delta, or of the LoRA's file, such as 20MB. Bytes go where they keep most. Several sizes print "
    "the loss of each, and write nothing.",
)
RATIO = click.option(
    "--ratio",
    "ratios",
    metavar="N[,N...]",
    callback=_ratios,
    help="Size of the delta as the checkpoint's divided by N, instead of --budget.",
)
FORCE = click.option(
    "--force", is_flag=True, help="Replace an output that another command made, or that was changed. A version with "
    "successors and a store's delta are never replaced.",
)  # fmt: skip
FORCE_FILES = click.option(
    "--force", is_flag=True, help="Replace existing files even if they were changed, or belong to another recipe."
)
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print no progress and no summary.")
TRACK = click.option(
    "--track", metavar="TRACKER[:PROJECT]",
    help="Log figures as they come to trackio or wandb (extras of the same names). Default project: deltamerge.",
    shell_complete=some("trackio", "wandb"),
)  # fmt: skip
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
AS_CSV = click.option("--csv", "as_csv", is_flag=True, help="Print the table to stdout as CSV, with all digits.")
BASE = click.option("--base", required=True, type=MODEL, help="The model that MODEL was fine-tuned from.")
ROWS = "Rows of text: a .jsonl, .csv, .txt or .parquet file, or a hub data set"
ROWS_OF_ONE = click.option("--calibration", type=FILE, metavar="FILE", help=f"{ROWS}.")
ROWS_OF_EACH = click.option(
    "--calibration", type=FILE, multiple=True, metavar="FILE",
    help=f"{ROWS}. For several models: once, or once per model in the same order.",
)  # fmt: skip

KEEP = click.option(
    "--keep", type=FILE, metavar="FILE",
    help="Beside rows of the models: rows of text for the base, a language model. The merge shall answer them as the "
    "base does, so that it forgets less.",
)  # fmt: skip


def about_rows(sequences: int, of: str = "Number of rows to use.") -> Callable[..., Any]:
    """Return a decorator that adds the options about rows. By default `sequences` rows are used."""
    return together(
        click.option(
            "--text", multiple=True, metavar="KEY", help="Field of the rows with the text. Twice for sentence pairs."
        ),
        click.option("--sequences", type=click.IntRange(1), default=sequences, show_default=True, help=of),
        click.option("--length", type=click.IntRange(1), default=128, show_default=True, help="Tokens per row."),
    )


ABOUT_ROWS = about_rows(50)


def rows_of_text(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options about rows, and pass the command a recipe's `calibration`, with its own option `label` in it."""
    return _rows(command, ROWS_OF_ONE, lambda data, of: of(data))


def rows_of_each(command: Callable[..., None]) -> Callable[..., None]:
    """Add the same options for rows that may differ by model. The command gets a list, [None] without rows."""
    return _rows(command, ROWS_OF_EACH, lambda data, of: [of(one) for one in data or (None,)])


def _rows(command: Callable[..., None], data: Callable[..., Any], made: Callable[..., Any]) -> Callable[..., None]:
    """Add the option `data` and the options about rows. `made` turns their values into `calibration`."""

    @wraps(command)
    def with_rows(*, calibration: Any, text: tuple[str, ...], **options: Any) -> None:
        more = {key: options.pop(key, None) for key in ("sequences", "length", "label")}
        if "keep" in options:
            about = {key: value for key, value in more.items() if key != "label"}
            options["keep"] = calibration_of(options["keep"], text if options["keep"] else (), **about)
        command(calibration=made(calibration, lambda one: calibration_of(one, text, **more)), **options)

    shown: Callable[..., None] = data(ABOUT_ROWS(with_rows))
    return shown


def rows_in_folder(
    folder: Path | None, models: Sequence[str], *, text: tuple[str, ...], sequences: int, length: int
) -> list[dict[str, Any]]:
    """Return each model's `calibration`: its rows lie in `folder` under its name. []: no folder is given."""
    if folder is None:
        context = click.get_current_context()
        for name in ("text", "sequences", "length"):
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name} needs --rows")
        return []
    with app("recommend"):
        from deltamerge.apps.recommend.advised import rows_in

    fields = {key: value for key, value in (calibration_of(".", text) or {}).items() if key != "data"}
    return rows_in(folder, models, sequences=sequences, length=length, **fields)


def rows_to_keep(file: str | None, *, text: tuple[str, ...], sequences: int, length: int) -> dict[str, Any] | None:
    """Return the `calibration` of the base's rows: all of a file that has few. None: no file is given."""
    path = None if file is None else Path(os.path.expanduser(file))
    if path is None or not path.is_file():
        return calibration_of(file, text if file else (), sequences=sequences, length=length)
    return rows_in_folder(path, [], text=text, sequences=sequences, length=length)[0]


def calibration_of(data: str | None, text: tuple[str, ...], **more: Any) -> dict[str, Any] | None:
    """Return a recipe's `calibration` from these options and `more`. Options may be None. None: there is no data."""
    if data is None:
        if text or more.get("label"):
            raise click.UsageError("--text and --label need --calibration")
        return None
    fields = {"text": text[0] if len(text) == 1 else list(text)} if text else {}
    return {"data": data, **fields, **{key: value for key, value in more.items() if value is not None}}


RESUME = click.option("--resume", is_flag=True, help="Continue an interrupted run, even with --force.")
MERGEKIT_EXACT = click.option(
    "--mergekit-exact",
    is_flag=True,
    help="Use mergekit's defaults where they differ from ours (docs/howto/from-mergekit.md).",
)
PICKLES = click.option(
    "--allow-pickles", "pickles", is_flag=True,
    help="Read pytorch_model.bin where there are no safetensors. No code in it is run.",
)  # fmt: skip
NONFINITE = click.option("--allow-nonfinite", is_flag=True, help="Allow NaN and infinity in the result.")


def _parse(texts: tuple[str, ...]) -> list[tuple[Loc, str]]:
    from deltamerge.recipe.edits import parse_setting

    try:
        return list(map(parse_setting, texts))
    except InputError as error:
        raise click.BadParameter(str(error)) from error


def _settings(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[Loc, str]:
    return dict(_parse(texts))


def _sweeps(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[Loc, str]:
    from deltamerge.recipe.open_values import settings_by_place

    return settings_by_place(_parse(texts))


SET_OR_SWEEP = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", callback=_sweeps,
    help="Set a key of the recipe. Given several times, each value is tried.",
)  # fmt: skip
SET = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", callback=_settings,
    help="Set a key of the recipe, such as models.0.prune.density=0.01.",
)  # fmt: skip
ALLOW_COMMAND = click.option(
    "--allow-command", is_flag=True, help="Allow the program in study.objective to run, with your permissions."
)


@contextmanager
def tracked(
    where: str | None, name: str, config: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
    """Yield a function that logs figures at a step to the tracker of `--track`, if given. Warn if logging fails."""
    if where is None:
        yield lambda figures, step: None
        return
    from deltamerge.cli.output import tell

    with app("track"):
        from deltamerge.apps.track import tracker

    with tracker(where, name, config) as made:
        yield made.log
    if made.failure:
        tell(f"warning: --track {where}: {made.failure}")
