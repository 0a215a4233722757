"""The command line: its group, exit codes and errors; the only package that prints or exits."""

from __future__ import annotations

import errno
import gc
import io
import platform
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from deltamerge.cli import chains, convert, deltas, inspect, progress, push, recipes, run, search, streams
from deltamerge.cli.mergekit_flags import COMMANDS
from deltamerge.cli.output import complain, error_as_json, say_json, tell
from deltamerge.engine import kernels
from deltamerge.errors import NOTHING_KEPT, DeltamergeError, InputError, UsageError
from deltamerge.errors.shown import shown
from deltamerge.version import __version__

# errors of writing to stdout
AS_JSON_FLAG = "--json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
VERSIONS = ("torch", "transformers", "safetensors", "huggingface_hub", "pydantic", "numpy", "peft")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 unusable input, 2 usage, 3 a bug, 130 interrupted."""
    machine = AS_JSON_FLAG in (sys.argv[1:] if arguments is None else arguments)
    gc.disable()  # a plan is many objects without cycles; collections would take a third of planning
    streams.prepare()
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
    except _Failed as failed:
        code = _explain(failed.error, machine=machine)
    except Exception as error:
        code = _explain(error, machine=machine)
    unwritten = streams.finish()
    if unwritten is not None and not code:
        code = _explain(unwritten)
    if "triton" not in sys.modules:  # triton would report uncollected objects as leaks
        gc.freeze()  # spares the interpreter's last collections, a tenth of a second
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(error: click.ClickException, *, machine: bool) -> int:
    """Print what is wrong with the arguments, for a `machine` as JSON on stdout too."""
    vars(error)["message"] = shown(error.message)
    said = io.StringIO()
    error.show(said)
    for line in said.getvalue().splitlines():
        tell(line)
    if machine:
        _say_as_json(UsageError(error.format_message()))
    return 2


def _explain(error: Exception, *, machine: bool = False) -> int:
    """Print why a command failed, for a `machine` as JSON on stdout too; returns its exit code."""
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
    """The error for a fault of the system that the user can mend (a folder, a disk behind stdout, memory, a name), or
    None."""
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
        return InputError("the current folder is not there any more", hint="cd to one that is")
    return None


def _report_bug(bug: Exception, *, machine: bool) -> int:
    last = traceback.extract_tb(bug.__traceback__)[-1]
    what = f"bug in deltamerge {__version__}: {type(bug).__name__}: {shown(str(bug))}"
    where = f"at {Path(last.filename).name}:{last.lineno} in {last.name}"
    hint = "please report these lines together with the recipe and `deltamerge --version`"
    for line in (what, where, f"hint: {hint}"):
        tell(line)
    if machine:
        with suppress(OSError):
            say_json({"error": {"message": f"{what} {where}", "hint": hint, "exit_code": 3, "problems": []}})
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
    click.echo(f"kernels {kernels.described()}")
    context.exit()


class _Failed(Exception):
    """Wraps an error of a command that click would take for its own: for end of input, or a closed pipe."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Commands(click.Group):
    """A group whose help lists commands by purpose."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (EOFError, OSError) as error:
            raise _Failed(error) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named; one of mergekit's is answered with ours."""
        ours = None if self.get_command(ctx, args[0]) else COMMANDS.get(args[0].removeprefix("mergekit-"))
        if ours is not None:
            ctx.fail(f"{args[0]} is a command of mergekit's. Here: {ours}")
        return super().resolve_command(ctx, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, several in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(str(one.name), one.get_short_help_str(100)) for one in several])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_versions,
    help="Version of deltamerge, and of all that matters in a bug report.",
)  # fmt: skip
def commands() -> None:
    """Merge fine-tuned models and prune their deltas, driven by a YAML recipe."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands and their values.

    Options, methods, recipes, models and devices, too.

    \b
    eval "$(deltamerge completion bash)"     # in ~/.bashrc; zsh likewise in ~/.zshrc
    deltamerge completion fish > ~/.config/fish/completions/deltamerge.fish
    """
    found = get_completion_class(shell)
    assert found is not None  # click supports these three
    script = found(commands, {}, "deltamerge", "_DELTAMERGE_COMPLETE").source()
    click.echo(script.replace(*NO_SPACE[shell]) if shell in NO_SPACE else script)


# No space after a folder, since more will be typed; fish does this by itself.
NO_SPACE = {
    "bash": ("COMPREPLY+=($value)", "COMPREPLY+=($value); [[ $value == */ ]] && compopt -o nospace"),
    "zsh": (
        'completions+=("$key")',
        'if [[ "$key" == */ ]]; then compadd -U -V folders -S \'\' -- "$key"; else completions+=("$key"); fi',
    ),
}
SECTIONS = {
    "Write a recipe": [recipes.init, inspect.recommend, recipes.methods, recipes.schema],
    "Before a run": [inspect.check, inspect.plan, inspect.inspect, run.calibrate, run.lock],
    "Run": [run.run, convert.convert, deltas.verify, inspect.diff, push.push],
    "Judge and search": [search.evaluate, search.sweep, search.search],
    "Deltas": [deltas.extract, deltas.apply, chains.list_versions, chains.squash, chains.remove_delta],
    "Shell": [completion],
}


def _with_progress(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A command's function, while which runs stderr says how far it is, as the command's options allow."""

    @wraps(callback)
    def run_shown(*args: Any, **options: Any) -> Any:
        machine = options.get("as_json") or options.get("as_csv")
        with progress.shown(quiet=bool(options.get("quiet")), machine=bool(machine)):
            return callback(*args, **options)

    return run_shown


for section in SECTIONS.values():
    for command in section:
        assert command.callback is not None
        command.callback = _with_progress(command.callback)
        commands.add_command(command)
