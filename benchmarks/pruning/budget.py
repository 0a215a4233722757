"""Whether a size budget is better spent by predicted error than evenly: test scores of two real fine-tunes.

    python -m benchmarks.pruning.budget --data ../shared/data --budgets 1MB 250kB 80kB

Three delta artifacts of final values for each budget, magnitude pruning of all tensors but the head, one q calibrated
by output change on 50 sentences of the validation part:

    even       one density for every tensor, the largest whose artifact fits
    energy     `budget`, densities by the energy of what is dropped (chosen without calibration)
    weighted   `budget` with `calibration`: each entry's energy times the mean square of its input
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import tasks
from benchmarks.encoder import score
from benchmarks.tasks import TASKS, WORK

STEPS = 6  # halvings of the range of densities, in logs
LEAST = 0.9  # of the budget that an even density must come to


def run(recipe: dict[str, Any], folder: Path) -> Path:
    """The artifact of a recipe, in `folder`."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "deltamerge", "run", str(path), "--out", str(folder), "--force", "-q"]
    subprocess.run(command, check=True)
    return folder


def size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("delta.json", "delta.safetensors"))


def in_bytes(text: str) -> int:
    return round(float(text[:-2]) * {"kB": 1e3, "MB": 1e6}[text[-2:]])


class Model:
    """A fine-tune, and the recipes of its delta."""

    def __init__(self, data: Path, name: str, folder: Path) -> None:
        self.name, self.folder, self.base = name, folder, data / "base"
        self.tune = data / name
        self.calibration = {"data": str(tasks.ROWS / f"{name}.validation.jsonl"), "text": "text"}

    def recipe(self, calibrated: bool, **prune: Any) -> dict[str, Any]:
        prune = {"method": "magnitude", **({"q": "output_change"} if calibrated else {}), **prune}
        return {
            "base_model": str(self.base.resolve()),
            "models": [{"model": str(self.tune.resolve()), "prune": prune}],
            "output": {"kind": "delta"},
            **({"calibration": self.calibration} if calibrated else {}),
        }

    def even(self, budget: int) -> Path:
        """With the largest density that fits, q included."""
        low, high = 1e-5, 1.0
        for _ in range(STEPS * 2):
            middle = (low * high) ** 0.5
            nbytes = size(run(self.recipe(False, density=middle), self.folder / "even"))
            low, high = (middle, high) if nbytes <= budget else (low, middle)
            if LEAST * budget <= nbytes <= budget and high / low < 1.1:
                break
        return run(self.recipe(True, density=low), self.folder / "even")

    def energy(self, budget: int) -> Path:
        folder = run(self.recipe(False, budget=budget), self.folder / "energy")
        densities = yaml.safe_load((folder / "recipe.lock").read_text())["densities"]
        values = [{"filter": name, "value": density} for name, density in densities.items()]
        return run(self.recipe(True, density=[*values, {"value": 1.0}]), folder)

    def weighted(self, budget: int) -> Path:
        return run(self.recipe(True, budget=budget), self.folder / "weighted")

    def score(self, delta: Path) -> float:
        out = self.folder / "applied"
        command = [sys.executable, "-m", "deltamerge", "apply", str(delta), "--base", str(self.base)]
        subprocess.run([*command, "--out", str(out), "--force", "-q"], check=True)
        return score(out, TASKS[self.name], tasks.rows(self.name, "test"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=WORK.parent.parent / "shared" / "data")
    parser.add_argument("--budgets", nargs="+", default=["1MB", "250kB", "80kB"])
    parser.add_argument("--tasks", nargs="+", default=["sentiment", "intensity"])
    arguments = parser.parse_args()
    print("| budget | fine-tune | even | energy | weighted |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for text in arguments.budgets:
            for name in arguments.tasks:
                model = Model(arguments.data, name, Path(folder))
                cells = []
                for way in (model.even, model.energy, model.weighted):
                    delta = way(in_bytes(text))
                    cells.append(f"{model.score(delta):.2f} ({size(delta) / 1e6:.3f} MB)")
                print(f"| {text} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
