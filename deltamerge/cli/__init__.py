"""The command line: its group, exit codes and errors; the only package that prints or exits."""

from __future__ import annotations

import errno
import gc
import platform
import sys
import traceback
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from deltamerge import __version__, kernels
from deltamerge.cli import artifacts, habits, looking, running, sharing, writing
from deltamerge.cli.output import complain
from deltamerge.errors import DeltamergeError, InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
VERSIONS = ("torch", "transformers", "safetensors", "huggingface_hub", "pydantic", "numpy", "peft")


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
        for hint in habits.hints(error, sys.argv[1:] if arguments is None else arguments):
            click.echo(f"hint: {hint}", err=True)
        code = 2
    except DeltamergeError as error:
        complain(error, "error")
        code = error.exit_code
    except BrokenPipeError:
        code = 1
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            code = _report_bug(error)
        else:  # of a place that is the user's: a folder, a disk behind stdout
            complain(InputError(f"{error.filename or 'output'}: {error.strerror}"), "error")
            code = InputError.exit_code
    except Exception as bug:
        code = _report_bug(bug)
    if "triton" not in sys.modules:  # which would report what is not collected as leaks
        gc.freeze()  # the interpreter's last collections would look at every object there is, for a tenth of a second
    sys.exit(code if isinstance(code, int) else 0)


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
    click.echo(f"kernels {kernels.described()}")
    context.exit()


class Commands(click.Group):
    """A group whose help lists commands by what they are for."""

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
    assert found is not None  # click knows these three
    script = found(commands, {}, "deltamerge", "_DELTAMERGE_COMPLETE").source()
    click.echo(script.replace(*NO_SPACE[shell]) if shell in NO_SPACE else script)


# After a folder more is to be typed: no space there. fish knows that by itself.
NO_SPACE = {
    "bash": ("COMPREPLY+=($value)", "COMPREPLY+=($value); [[ $value == */ ]] && compopt -o nospace"),
    "zsh": (
        'completions+=("$key")',
        'if [[ "$key" == */ ]]; then compadd -U -V folders -S \'\' -- "$key"; else completions+=("$key"); fi',
    ),
}
SECTIONS = {
    "Write a recipe": [writing.init, looking.recommend, writing.methods, writing.schema],
    "Before a run": [looking.check, looking.plan, looking.inspect, running.calibrate],
    "Run": [running.run, artifacts.verify, looking.diff, sharing.push],
    "Deltas": [artifacts.extract, artifacts.apply],
    "Shell": [completion],
}
for section in SECTIONS.values():
    for command in section:
        commands.add_command(command)
