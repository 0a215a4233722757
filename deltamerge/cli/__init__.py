"""The command line: its table of commands, exit codes and errors. No other package prints or exits.

Each command has a file with its options and its printing. The file has the command's name, unless `FILES` says
otherwise. It is imported when the command is called. Other packages add commands by entry points of the group
`deltamerge.commands`. They are looked up for names outside the table, and for `--help`.
"""

from __future__ import annotations

import errno
import gc
import importlib
import io
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli import progress, streams
from deltamerge.cli.output import complain, error_as_json, say_json, tell
from deltamerge.errors import NOTHING_KEPT, DeltamergeError, InputError, UsageError, plugins
from deltamerge.errors.shown import shown
from deltamerge.version import __version__

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

AS_JSON_FLAG = "--json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # errors of writing to stdout


# The commands by purpose, each with the first sentence of its help.
SECTIONS = {
    "Write a recipe": {
        "init": "Write a commented first recipe for MODELS and their base.",
        "recommend": "Recommend a pruning for the delta of one MODEL, or a merge method for several MODELS.",
        "methods": "List merge and pruning methods, one per line.",
        "schema": "Print the JSON schema of a recipe, for editors.",
    },
    "Before a run": {
        "check": "Validate RECIPES, and the headers of the models they name.",
        "plan": "Show what a run of RECIPE would do, and the disk, memory and time it needs.",
        "inspect": "Measure the delta of MODEL: how large it is, and where.",
        "calibrate": "Choose the q values of RECIPE on its calibration data.",
        "lock": "Lock RECIPE: write the hashes of its inputs, and its q values, beside it.",
    },
    "Run": {
        "merge": "Merge MODELS into one, by the method that suits them: recommend, its recipe, and run.",
        "run": "Merge the models of RECIPE into one checkpoint.",
        "convert": "Write MODEL to OUT in another dtype or format, without merging.",
        "serve": "Update a running vLLM server to the edited RECIPE.",
        "verify": "Check the output folder FOLDER against the hashes in its lock.",
        "diff": "Compare two checkpoints, or two locks.",
        "push": "Publish the output folder FOLDER on the hub as REPOSITORY.",
    },
    "Judge and search": {
        "eval": "Score MODELS on labelled rows, side by side.",
        "sweep": "Try every combination of the values listed in RECIPE.",
        "search": "Search for the best values within the bounds given in RECIPE.",
        "bisect": "Name the model, the layers and the tensors that cost a skill of RECIPE's merge most.",
    },
    "Deltas": {
        "extract": "Extract the delta of MODEL from its base: exact, pruned, or as a LoRA.",
        "apply": "Apply DELTA to its base.",
        "list": "List the versions of a chain, or the deltas of a store.",
        "pin": "Send the servers of a chain to VERSION and keep them there: a rollback.",
        "squash": "Fold the older versions of CHAIN into one.",
        "remove": "Remove DELTA: the newest version of a chain, or a delta of a store.",
    },
    "This installation": {
        "doctor": "Show what deltamerge finds on this machine.",
        "completion": "Print the completion script for SHELL.",
    },
}
HELP = {name: line for section in SECTIONS.values() for name, line in section.items()}
# Files that hold several commands.
FILES = {
    "chain": ("list", "pin", "squash", "remove"),
    "doctor": ("completion",),
    "extract": ("apply",),
    "folders": ("verify", "diff", "push"),
    "lock": ("calibrate",),
    "methods": ("schema",),
    "recommend": ("init", "merge"),
    "search": ("sweep", "bisect"),
}
FILE_OF = {name: file for file, names in FILES.items() for name in names}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 unusable input, 2 usage, 3 a bug, 130 interrupted."""
    machine = AS_JSON_FLAG in (sys.argv[1:] if arguments is None else arguments)
    gc.disable()  # a plan is many objects without cycles; collections would take a third of planning
    streams.prepare()
    warnings.formatwarning = _warning
    try:
        code = commands.main(arguments, prog_name="deltamerge", standalone_mode=False)
    except click.exceptions.Exit as leaving:
        code = leaving.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt) as interruption:
        kept = str(interruption.__cause__ or interruption)  # click wraps a KeyboardInterrupt in its Abort
        tell(f"interrupted: {kept or NOTHING_KEPT}")
        code = 130
    except click.ClickException as error:
        code = _refuse(error, machine=machine)
    except _CommandFailure as failed:
        code = _explain(failed.error, machine=machine)
    except Exception as error:
        code = _explain(error, machine=machine)
    unwritten = streams.finish()
    if unwritten is not None and not code:
        code = _explain(unwritten)
    if "triton" not in sys.modules:  # triton would report uncollected objects as leaks
        gc.freeze()  # spares the interpreter's last collections, a tenth of a second
    sys.exit(code if isinstance(code, int) else 0)


def _warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """Return the text of a warning: one line for a package of methods or commands, else Python's own."""
    if issubclass(category, plugins.PluginWarning):
        return f"warning: {shown(str(message))}\n"
    return _python_warning(message, category, *place, **more)


_python_warning = warnings.formatwarning


def _refuse(error: click.ClickException, *, machine: bool) -> int:
    """Print the error of the arguments. For a `machine`, also print it as JSON on stdout."""
    vars(error)["message"] = shown(error.message)
    said = io.StringIO()
    error.show(said)
    for line in said.getvalue().splitlines():
        tell(line)
    if machine:
        _say_as_json(UsageError(error.format_message()))
    return 2


def _explain(error: Exception, *, machine: bool = False) -> int:
    """Print why a command failed and return its exit code. For a `machine`, also print the error as JSON on stdout."""
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has closed it
        return 1
    known = error if isinstance(error, DeltamergeError) else _of_system(error)
    if known is None:
        return _report_bug(error, machine=machine)
    complain(known, "error")
    if machine:
        _say_as_json(known)
    return known.exit_code


def _say_as_json(error: DeltamergeError) -> None:
    with suppress(OSError):  # stdout itself may be what failed
        say_json({"error": error_as_json(error, "")})


def _of_system(error: Exception) -> DeltamergeError | None:
    """Return an error for a fault that the user can mend: a folder, a disk, memory, a name. None: it is a bug."""
    if isinstance(error, MemoryError):
        return InputError("there is not enough memory", hint="give a smaller --memory, or fewer --workers")
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return InputError(f"{error.object[-200:]}: a name that is not UTF-8 cannot be written down", hint="rename it")
    if not isinstance(error, OSError):
        return None
    if error.filename is not None or error.errno in FULL:
        return InputError(f"{error.filename or 'output'}: {error.strerror}")
    try:
        Path.cwd()
    except OSError:
        return InputError("the current folder no longer exists", hint="cd to a folder that exists")
    return None


def _report_bug(bug: Exception, *, machine: bool) -> int:
    last = traceback.extract_tb(bug.__traceback__)[-1]
    whose, file, at, function = f"deltamerge {__version__}", last.filename, last.lineno, last.name
    hint = "please report these lines together with the recipe and the output of `deltamerge doctor`"
    if (other := plugins.culprit(bug)) is not None:
        whose, file, at, function = other.package, other.file, other.line, other.function
        hint = f"report these lines to the authors of {whose}, or remove it"
    what = f"bug in {whose}: {type(bug).__name__}: {shown(str(bug))}"
    where = f"at {Path(file).name}:{at} in {function}"
    for line in (what, where, f"hint: {hint}"):
        tell(line)
    if machine:
        with suppress(OSError):
            say_json({"error": {"message": f"{what} {where}", "hint": hint, "exit_code": 3, "problems": []}})
    return 3


class _CommandFailure(Exception):
    """Wraps an error of a command, so that click does not take it for end of input or a closed pipe."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _with_progress(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command's function: stderr shows its progress, as the command's options allow."""

    @wraps(callback)
    def run_with_progress(*args: Any, **options: Any) -> Any:
        machine = options.get("as_json") or options.get("as_csv")
        if options.get("as_json") and options.get("as_csv"):
            raise click.UsageError("--json and --csv are two forms of one output: give one of them")
        with progress.display(quiet=bool(options.get("quiet")), machine=bool(machine)):
            return callback(*args, **options)

    return run_with_progress


class Commands(click.Group):
    """The group of all commands. It holds their names and help lines, and imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*HELP, *self.others]  # `list` is a command here

    @cached_property
    def others(self) -> dict[str, EntryPoint]:
        """The commands of other packages by name, not imported. Warns about a name that is taken."""
        found: dict[str, EntryPoint] = {}
        for point in plugins.points(plugins.COMMANDS):
            if point.name in HELP or point.name in found:
                plugins.refuse(point, f"there is another command {point.name}")
            else:
                found[point.name] = point
        return found

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands:
            command = self._imported(cmd_name)
            if command is None:
                return None
            if command.callback is not None:
                command.callback = _with_progress(command.callback)
            self.add_command(command, cmd_name)
        return self.commands.get(cmd_name)

    def _imported(self, name: str) -> click.Command | None:
        """Return a command. Warns and returns None if it belongs to another package and cannot be used."""
        if name in HELP:
            file = importlib.import_module(f"{__name__}.{FILE_OF.get(name, name)}")
            return next(one for one in vars(file).values() if isinstance(one, click.Command) and one.name == name)
        point = self.others.get(name)
        if point is None:
            return None
        found = plugins.loaded(point)
        if isinstance(found, click.Command):
            names = [param.name or "" for param in found.params if param.expose_value]
            misfit = None if found.callback is None else plugins.misfit(found.callback, (), names)
            if misfit is None:
                return found
            plugins.refuse(point, misfit)
        elif found is not None:
            plugins.refuse(point, "it is no command of click")
        return None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (EOFError, OSError) as error:
            raise _CommandFailure(error) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name. mergekit's are refused, with the line to type instead."""
        if args[0] not in HELP and not args[0].startswith("-") and args[0] not in self.others:
            from difflib import get_close_matches

            from deltamerge.cli.mergekit_flags import SYNONYMS, ours

            if line := ours(args[0], args[1:]):
                ctx.fail(f"{args[0]} is a command of mergekit's. Here: {line}")
            close = [SYNONYMS[args[0]]] if args[0] in SYNONYMS else get_close_matches(args[0], HELP, n=1)
            if close:
                ctx.fail(f"No such command {args[0]!r}. Did you mean deltamerge {close[0]}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, lines in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([*lines.items()])
        if self.others:
            with formatter.section("Of other packages"):
                formatter.write_dl(
                    [(name, f"A command of {plugins.package_of(p)}.") for name, p in self.others.items()]
                )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="deltamerge %(version)s", help="Print the version; `doctor` says more.")
def commands() -> None:
    """Merge fine-tuned models and prune their deltas, driven by a YAML recipe."""
