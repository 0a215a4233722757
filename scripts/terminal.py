"""Writes docs/terminal.svg: what check, plan and run print of a merge of two synthetic 0.5 B models."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "terminal.svg"
WIDTH = 88
PROGRESS = re.compile(r"\w+ing .*: (\d+ %|\d+ of )")  # bars, on a terminal
RECIPE = """\
base_model: ./models/base
merge_method: dare_ties
models:
  - model: ./models/math
    parameters: {weight: 0.6, density: 0.2}
  - model: ./models/code
    parameters: {weight: 0.4, density: 0.2}
"""
NAMES = {"base": "base", "tune-a": "math", "tune-b": "code"}
COMMANDS = (
    ("cat recipe.yaml", None),
    ("deltamerge check recipe.yaml", None),
    ("deltamerge plan recipe.yaml", 9),
    ("deltamerge run recipe.yaml --out merged", None),
    ("deltamerge run recipe.yaml --out merged", None),
)


def main() -> None:
    """Run the commands for real and draw what they print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, help="folder with base, tune-a, tune-b (speed/merge_speed.py)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        models = arguments.models or made(here / "made")
        (here / "models").mkdir()
        for name, shown in NAMES.items():
            (here / "models" / shown).symlink_to((models / name).resolve())
        (here / "recipe.yaml").write_text(RECIPE)
        PICTURE.write_text(screen(COMMANDS, here))
    print(f"{PICTURE.relative_to(ROOT)}: written")


def screen(commands: Sequence[tuple[str, int | None]], folder: Path) -> str:
    """Run commands for real and draw what they print as SVG: of each at most so many lines."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for command, most in commands:
        console.print(Text(f"$ {command}", style="bold green"))
        lines = output(command, folder)
        for line in lines[:most]:
            console.print(Text(line), highlight=False)
        if most is not None and len(lines) > most:
            console.print(Text("…", style="dim"))
    drawn = console.export_svg(title="deltamerge", unique_id="deltamerge")
    return re.sub(r"\s*@font-face \{.*?\n    \}\n", "\n", drawn, flags=re.DOTALL)  # nothing from the web


def made(folder: Path) -> Path:
    """The models of the benchmark's size M, 3 GB."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.synthetic import SIZES, make_checkpoints

    make_checkpoints(folder, SIZES["M"])
    return folder


def output(command: str, folder: Path) -> list[str]:
    """Return what a command prints, without its progress."""
    words = command.split()
    run = [sys.executable, "-m", *words] if words[0] == "deltamerge" else words
    env = {**os.environ, "COLUMNS": str(WIDTH), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, check=True)
    told = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    return [line.replace(f"{folder}/", "") for line in (*done.stdout.splitlines(), *told)]


if __name__ == "__main__":
    main()
