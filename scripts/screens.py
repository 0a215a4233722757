"""Writes docs/screens/: plan and search in a terminal, a search of q, and the report.

Of real fine-tunes in ../shared/data; the report is photographed by Debian's chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pictures import BROWSERS, SHARED
from terminal import ROOT, screen

OUT = ROOT / "docs" / "screens"
RECIPE = """\
base_model: ./base
merge_method: task_arithmetic
models:
  - {model: ./sentiment, parameters: {weight: 0.6}}
  - {model: ./intensity, parameters: {weight: 0.9}}
"""
OPEN = """\
base_model: ./base
merge_method: task_arithmetic
models:
  - {model: ./sentiment, name: sentiment, parameters: {weight: {search: [0, 1.5]}}}
  - {model: ./intensity, name: intensity, parameters: {weight: {search: [0, 1.5]}}}
calibration: {data: lines.txt, length: 40, sequences: 32}
"""
PRUNED = """\
base_model: ./base
models:
  - model: ./sentiment
    prune: {method: magnitude, density: 0.01, q: output_change}
calibration: {data: lines.txt, length: 40, sequences: 50}
"""


def main() -> None:
    """Run the commands and write the pictures, or those that are named."""
    asked = sys.argv[1:] or ["plan", "search", "report"]
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    data = next((folder for folder in SHARED if folder.is_dir()), None)
    if browser is None or data is None:
        sys.exit("needs chromium and ../shared/data")
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in ("base", "sentiment", "intensity"):
            (folder / model).symlink_to(data / model)
        for recipe, text in {"recipe": RECIPE, "open": OPEN, "pruned": PRUNED}.items():
            (folder / f"{recipe}.yaml").write_text(text)
        (folder / "lines.txt").write_text("\n".join(sentences()))
        if "plan" in asked:
            (OUT / "plan.svg").write_text(screen([("deltamerge plan recipe.yaml", 24)], folder))
        if "search" in asked:
            (OUT / "search.svg").write_text(screen([("deltamerge search open.yaml --trials 16", 40)], folder))
        if "report" not in asked:
            return
        run(folder, "calibrate", "pruned.yaml", "--plot", OUT / "calibration.svg", "--force")
        run(folder, "run", "pruned.yaml", "--locked", "--out", "pruned")
        rows = ("--calibration", "lines.txt", "--length", "40", "--density", "0.01")
        run(folder, "inspect", "pruned", "--base", "base", *rows, "--report", "report.html")
        shot = ["--window-size=1100,866", f"--screenshot={OUT / 'report.png'}", (folder / "report.html").as_uri()]
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/chromium"]
        light = "--blink-settings=preferredColorScheme=1"
        subprocess.run([browser, *options, light, *shot], check=True, capture_output=True, timeout=120)


def sentences() -> list[str]:
    """Plain English to calibrate on: lines of the documentation."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    lines = [line for page in pages for line in page.read_text().splitlines()]
    return [line for line in lines if line[:1].isalpha() and len(line) > 60]


def run(folder: Path, *arguments: str | Path) -> None:
    """Run a command of deltamerge in `folder`."""
    command = [sys.executable, "-m", "deltamerge", *map(str, arguments)]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
