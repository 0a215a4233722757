"""The command completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

# No space after a folder, since more will be typed; fish does this by itself.
NO_SPACE = {
    "bash": ("COMPREPLY+=($value)", "COMPREPLY+=($value); [[ $value == */ ]] && compopt -o nospace"),
    "zsh": (
        'completions+=("$key")',
        'if [[ "$key" == */ ]]; then compadd -U -V folders -S \'\' -- "$key"; else completions+=("$key"); fi',
    ),
}


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL.

    It completes commands, options, methods, recipes, models and devices.

    \b
    eval "$(deltamerge completion bash)"     # in ~/.bashrc; zsh likewise in ~/.zshrc
    deltamerge completion fish > ~/.config/fish/completions/deltamerge.fish
    """
    from deltamerge.cli import commands

    found = get_completion_class(shell)
    assert found is not None  # click supports these three
    script = found(commands, {}, "deltamerge", "_DELTAMERGE_COMPLETE").source()
    click.echo(script.replace(*NO_SPACE[shell]) if shell in NO_SPACE else script)
