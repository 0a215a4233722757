"""The experiments of the DAREx paper, scaled down to two cores: one command for each table and figure.

    python -m benchmarks.paper --list               what there is, and about how long it takes
    python -m benchmarks.paper table-1 fig-2        measure these; what is finished is kept unless --force
    python -m benchmarks.paper all                  everything, an hour of one processor
    python -m benchmarks.paper all --toy            everything in seconds, to see that it works; to .paper/toy
    python -m benchmarks.paper --report             only write docs/measurements/paper.md and its plots again

Results go to results/paper/NAME.json, fine-tunes and single measurements to .paper. The page is written
after every experiment.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys

from benchmarks import process
from benchmarks.paper import MODULES, frame
from benchmarks.pruning import quality


def experiments() -> list[frame.Experiment]:
    """Tables by number, then figures, then the rest."""

    def order(experiment: frame.Experiment) -> tuple[int, int, str]:
        number = re.search(r"\d+", experiment.name)
        kinds = ("table", "fig")
        kind = experiment.name.partition("-")[0]
        return kinds.index(kind) if kind in kinds else 2, int(number[0]) if number else 0, experiment.name

    found = [each for module in MODULES for each in importlib.import_module(f"benchmarks.paper.{module}").EXPERIMENTS]
    return sorted(found, key=order)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="from --list, or all")
    parser.add_argument("--toy", action="store_true", help="tiny models, few rows, seconds; to .paper/toy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="measure again what is finished; fine-tunes stay")
    parser.add_argument("--kept", action="store_true", help="measure nothing: make results of what is kept in .paper")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true")
    asked = parser.parse_args()

    known = {experiment.name: experiment for experiment in experiments()}
    if unknown := sorted(set(asked.names) - known.keys() - {"all"}):
        parser.error(f"no experiment {', '.join(unknown)}: there are {', '.join(known)}")
    chosen = list(known.values()) if "all" in asked.names else [known[name] for name in asked.names]
    if asked.list or not (chosen or asked.report):
        for experiment in known.values():
            print(f"{experiment.name:12} {experiment.minutes:5.1f} min  {experiment.title}")
        return
    setting, results, page = (
        frame.Setting(asked.toy, asked.seed, again=asked.force, kept_only=asked.kept),
        frame.RECORDS,
        frame.PAGE,
    )
    if asked.toy:
        setting.work = frame.WORK / "toy"
        results, page = setting.work / "results", setting.work / "results.md"
    quality.quiet()
    for experiment in chosen:
        if asked.force or not frame.finished(experiment, results):
            print(f"{experiment.name}: {experiment.title}", file=sys.stderr, flush=True)
            try:
                result = frame.measure(experiment, setting)
            except frame.NotKept as error:
                print(f"{experiment.name}: {error} was not measured yet", file=sys.stderr)
                continue
            frame.save(experiment, result, results)
            print(experiment.show(result["record"]), flush=True)
        frame.report(known.values(), results, page)
    if asked.report:
        frame.report(known.values(), results, page)


if __name__ == "__main__":
    process.keep_pages()
    main()
