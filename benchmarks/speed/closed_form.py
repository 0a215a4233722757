"""What the merges that look at whole matrices cost: four fine-tunes of 0.5 B on two workers, in `--memory 2GB`.

    python -m benchmarks.speed.closed_form                   iso_c, iso_cts, tsv_m, wudi: minutes each; 5 GB under --dir
    python -m benchmarks.speed.closed_form wudi --size tiny  some of them; seconds

Whole processes of `deltamerge run`, warm cache, one round: wall and CPU seconds, peak resident memory. The table goes
to stdout; the numbers of 0.5 B go to benchmarks/results/closed_form.json. Keep the machine quiet: the aim is five
minutes of wall time each on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import yaml

from benchmarks import RESULTS, ROOT, process
from benchmarks.process import surroundings
from benchmarks.speed.merge_speed import deltamerge_command, say
from benchmarks.synthetic import SIZES, make_checkpoints

FILE = RESULTS / "closed_form.json"
METHODS = ("iso_c", "iso_cts", "tsv_m", "wudi")
TUNES, WORKERS, MEMORY = 4, 2, "2GB"


def cost(method: str, models: list[Path], work: Path) -> process.Run:
    """One merge as a process; its output is deleted."""
    base, *tunes = (str(path.resolve()) for path in models)
    recipe = {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": tune} for tune in tunes],
        "dtype": "bfloat16",
    }
    path, out = work / f"{method}.yaml", work / "merged"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    options = ["--out", str(out), "--workers", str(WORKERS), "--memory", MEMORY, "--quiet"]
    process.warm(models)
    try:
        return process.measure([deltamerge_command(), "run", str(path), *options], {}, work / f"{method}.log")
    finally:
        shutil.rmtree(out, ignore_errors=True)


def markdown(found: dict[str, dict[str, float]]) -> str:
    """A column for each method."""
    lines = [["", *found], ["---"] * (1 + len(found))]
    lines.append(["wall, s", *(f"{run['wall']:.0f}" for run in found.values())])
    lines.append(["CPU, s", *(f"{run['cpu']:.0f}" for run in found.values())])
    lines.append(["peak resident, GB", *(f"{run['resident'] / 1e3:.2f}" for run in found.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; default: all")
    parser.add_argument("--size", choices=sorted(SIZES), default="M")
    parser.add_argument("--dir", type=Path, default=ROOT / ".bench", help="where models are made and merged")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.methods) - set(METHODS)):
        parser.error(f"no method {', '.join(unknown)}: there are {', '.join(METHODS)}")
    asked.dir.mkdir(parents=True, exist_ok=True)
    models = make_checkpoints(asked.dir / f"checkpoints-{asked.size}-{TUNES}", SIZES[asked.size], TUNES)
    found = {}
    for method in asked.methods or METHODS:
        found[method] = asdict(cost(method, models, asked.dir))
        say(f"{method}: {found[method]}")
    if asked.size == "M":
        known = json.loads(FILE.read_text(encoding="utf-8"))["methods"] if FILE.exists() else {}
        found = {method: (known | found)[method] for method in METHODS if method in known | found}
        about = surroundings({"deltamerge": deltamerge_command()}) | {"size": asked.size, "fine-tunes": TUNES}
        about |= {"workers": WORKERS, "memory": MEMORY, "methods": found}
        FILE.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
