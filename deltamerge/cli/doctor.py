"""Commands on this installation: doctor, completion."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from deltamerge.cli.options import AS_JSON
from deltamerge.cli.output import say, say_json
from deltamerge.errors.shown import human
from deltamerge.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "pydantic", "numpy", "peft")
EXTRAS = ("data", "gguf", "lm-eval", "ray", "search", "trackio", "vllm", "wandb", "zstd")


@click.command("doctor")
@AS_JSON
def doctor(as_json: bool) -> None:
    """Show what deltamerge finds on this machine.

    Versions, compiled kernels, devices, memory, disk, the hub's cache, and which extras are installed. Paste it into a
    bug report.
    """
    found = findings()
    if as_json:
        say_json(found)
        return
    for name, value in found.items():
        lines = [f"{name} {value}"] if not isinstance(value, dict) else [f"{key} {one}" for key, one in value.items()]
        for line in lines:
            say(line)


def findings() -> dict[str, Any]:
    """Return the findings by subject: a text, or a mapping of several texts."""
    from deltamerge.engine import kernels

    return {
        "deltamerge": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {name: installed(name) or "not installed" for name in PACKAGES},
        "kernels": kernels.described(),
        "devices": _devices(),
        "memory": human(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "disk": f"{human(shutil.disk_usage(Path.cwd()).free)} free here",
        "hub": _hub(),
        "extras": {f"extra {name}": _extra(name) for name in EXTRAS},
    }


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> str:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    said = f"{cores} cores"
    try:
        import torch
    except ImportError as error:
        return f"{said}; torch cannot be imported: {error}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "; ".join([said, *(torch.cuda.get_device_name(i) for i in range(count))] + ["no CUDA device"] * (not count))


def _hub() -> str:
    from huggingface_hub import constants

    offline = ", offline" if constants.HF_HUB_OFFLINE else ""
    return f"cache in {constants.HF_HUB_CACHE}{offline}"


def _extra(name: str) -> str:
    """Say whether the packages of an extra are installed, and how to install them."""
    try:
        metadata = requires("deltamerge") or []
    except PackageNotFoundError:
        return "unknown: deltamerge runs from its sources, without an installation"
    wanted = [line for line in metadata if f'extra == "{name}"' in line.replace("'", '"')]
    if not wanted:
        return f"not known to the installed deltamerge: pip install 'deltamerge[{name}]'"
    names = [re.split(r"[;>=<!\[ ]", line)[0] for line in wanted]
    missing = [package for package in names if installed(package) is None]
    return f"lacks {', '.join(missing)}: pip install 'deltamerge[{name}]'" if missing else "installed"


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
def completion(shell: str) -> None:
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
