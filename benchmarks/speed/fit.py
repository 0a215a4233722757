"""What the fit of a language model's coefficients costs: `iso_c`, by row, of three fine-tunes of SmolLM2-135M.

    SMOLLM2=FOLDER python -m benchmarks.speed.fit     ten minutes of one thread

The fine-tunes are of `python -m benchmarks.smollm2`; two learnt the same task. Each has 60 rows of at most 96 tokens,
of which `sequences: 48` searches on 40.
One process of `deltamerge run` on one thread: processor seconds, peak anonymous memory, and the distance on held-out
rows without and with the coefficients. The numbers go to benchmarks/results/fit.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks import RESULTS, process, smollm2
from benchmarks.process import surroundings

FILE = RESULTS / "fit.json"
MODELS = {"sorting": "sorting", "sorting-slow": "sorting", "needle": "needle"}
GIVEN, SEQUENCES, LENGTH = 60, 48, 96


def recipe(work: Path) -> Path:
    """Write the rows of each fine-tune, and the recipe."""
    models = []
    for name, task in MODELS.items():
        rows = work / f"{name}.jsonl"
        some = [{"prompt": row.text, "completion": f" {row.label}"} for row in smollm2.rows(task, "validation")[:GIVEN]]
        rows.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        calibration = {"data": str(rows), "sequences": SEQUENCES, "length": LENGTH}
        models.append({"model": str((smollm2.FOLDER / name).resolve()), "name": name, "calibration": calibration})
    said = {
        "merge_method": "iso_c",
        "base_model": str((smollm2.FOLDER / "base").resolve()),
        "models": models,
        "dtype": "bfloat16",
        "calibration": {"per": "merge", "coefficients": "row"},
    }
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
    return path


def measured() -> dict[str, Any]:
    """Return the cost of the whole run, and the record of the fit."""
    with TemporaryDirectory() as folder:
        path, out = recipe(Path(folder)), Path(folder) / "out"
        command = [sys.executable, "-m", "deltamerge", "run", str(path), "--out", str(out), "--workers", "1", "--quiet"]
        run = process.measure(command, {"OMP_NUM_THREADS": "1"}, Path(folder) / "log", 0.05)
        record = yaml.safe_load((out / "recipe.lock").read_text(encoding="utf-8"))["calibration"]["merge"]
    kept = {key: record[key] for key in ("chosen", "held_out", "forward_passes", "path")}
    return asdict(run) | {"fit": kept}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = surroundings({"python": sys.executable}) | measured()
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    held = found["fit"]["held_out"]
    print(f"{found['cpu']:.0f} s of processor time, {found['anonymous'] / 1e3:.2f} GB anonymous; "
          f"held out: {held['plain']:.4f} without, {held['calibrated']:.4f} with coefficients")  # fmt: skip


if __name__ == "__main__":
    main()
