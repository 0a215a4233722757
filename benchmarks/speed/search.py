"""A candidate of `deltamerge search` beside what shell loops do: write the merge, load it with transformers, score it.

    python -m benchmarks.speed.search RECIPE [--candidates 16] [--out JSON]
    python -m benchmarks.speed.search RECIPE --grid 17     what a grid finds, beside a search of a tenth of its points

RECIPE leaves numbers open, as `deltamerge search` takes it. The same candidates, drawn uniformly, are judged on the
same rows three ways: in memory, `study.together` a walk; each written by deltamerge in this process and loaded by
transformers; and the same with a process each for the merge and for the score, as a shell loop has. Seconds are user
and system time of the processor, which a busy machine changes little, and wall time beside.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import ROOT

SCORE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from benchmarks.speed import search
print(json.dumps(search.plain_scores(Path(sys.argv[1]), Path(sys.argv[2]))))
"""


class Spent(NamedTuple):
    """Seconds a candidate: of the processor, and on the wall."""

    cpu: float
    wall: float


class Clock:
    """Time since it was made, of this process and of those that it has waited for."""

    def __init__(self) -> None:
        self.begun = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used), time.perf_counter()

    def spent(self, count: int) -> Spent:
        cpu, wall = self.now()
        return Spent((cpu - self.begun[0]) / count, (wall - self.begun[1]) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2, help="candidates of the shell loop")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--grid", type=int, help="points of each number; measures no time")
    asked = parser.parse_args()
    from benchmarks.pruning.quality import quiet

    quiet()
    if asked.grid:
        found = beside_grid(asked.recipe, asked.grid)
    else:
        found = measure(asked.recipe, asked.candidates, asked.processes)
    print(json.dumps(found, indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def beside_grid(path: Path, count: int) -> dict[str, Any]:
    """The best of a grid over all numbers, and of a search of a tenth of its trials, on the search rows."""
    import itertools

    from deltamerge.apps.search.candidates import candidates_of
    from deltamerge.apps.search.outcome import Bench, best_of
    from deltamerge.apps.search.search import search
    from deltamerge.recipe.file import read_template
    from deltamerge.run.options import Options

    file, options = read_template(path), Options(device="cpu", workers=1)
    axes = {key: (axis.low, axis.high) for axis in file.template.ranges for key in axis.keys}
    points = list(itertools.product(*(np.linspace(low, high, count).tolist() for low, high in axes.values())))
    trials = len(points) // 10
    bench = Bench(file, file.template.values(file.template.start(), 1), candidates_of(file, options), options)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        found = search(file, options, Path(work) / "study", trials=trials)
        values = [file.template.values(dict(zip(axes, point, strict=True)), 1) for point in points]
        outcomes = bench.measure(values, "search", Path(work))
    bench.close()
    best = best_of(outcomes, bench.lower)
    assert best is not None
    sign = 1 if bench.lower[0] else -1
    tried = min(sign * t.outcome.values[0] for t in found.trials if t.outcome.values)
    return {
        "grid": {"evaluations": len(points), "best": outcomes[best].values[0], "at": list(points[best])},
        "search": {"evaluations": len(found.trials), "best": sign * tried, "chosen": dict(found.chosen.params)},
    }


def measure(path: Path, count: int, processes: int) -> dict[str, Any]:
    from deltamerge.apps.search.candidates import candidates_of
    from deltamerge.apps.search.outcome import Bench
    from deltamerge.recipe.file import read_template
    from deltamerge.run.options import Options
    from deltamerge.run.runner import run

    file, options = read_template(path), Options(device="cpu", workers=1)
    rng = np.random.Generator(np.random.PCG64(0))
    start = file.template.start()
    layers = 1
    drawn = [
        {key: float(rng.uniform(axis.low, axis.high)) for axis in file.template.ranges for key in axis.keys}
        for _ in range(count)
    ]
    bench = Bench(file, file.template.values(start, layers), candidates_of(file, options), options)
    judge = bench.judge(file.recipe(file.template.values(start, layers)))
    assert judge is not None
    values = [file.template.values(one, layers) for one in drawn]
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        folder = Path(work)
        bench.measure(values[:1], "search", folder)  # rows are read and the fine-tunes have answered them
        clock = Clock()
        bench.measure(values, "search", folder)
        ours = clock.spent(count)
        rows = _rows(bench, judge, folder)
        own = [file.file(one) for one in values[:4]]
        plain_scores_of(rows, own, folder, run, options)  # files are in the page cache
        clock = Clock()
        plain_scores_of(rows, own, folder, run, options)
        loop = clock.spent(len(own))
        clock = Clock()
        _shell_loop(rows, own[:processes], folder)
        shell = clock.spent(len(own[:processes]))
        forward = _forward(rows, folder)
        weights = _weights(bench, judge, values)
    bench.close()
    return {
        "candidates": count,
        "together": bench.study.together,
        "rows": judge.rows("search"),
        "precision": sorted({task.model.precision for task in judge.tasks.values()}),
        "in_memory": ours._asdict(),
        "in_memory_weights_alone": weights._asdict(),
        "write_and_load": loop._asdict(),
        "process_each": shell._asdict(),
        "forward_by_transformers": forward._asdict(),
        "ratio": {
            "write_and_load": [round(loop.cpu / ours.cpu, 2), round(loop.wall / ours.wall, 2)],
            "process_each": [round(shell.cpu / ours.cpu, 2), round(shell.wall / ours.wall, 2)],
        },
    }


def _rows(bench: Any, judge: Any, folder: Path) -> Path:
    """The tokens of each fine-tune's search rows, and where its head is, as a file for `plain_scores`."""
    import torch

    made = {}
    for index, task in judge.tasks.items():
        sheet = judge._sheet("search")[index]
        made[task.name] = {
            "head": str(task.checkpoint.path),
            "batches": list(sheet.batches),
            "in": task.model.precision,
        }
    path = folder / "rows.pt"
    torch.save(made, path)
    return path


def _weights(bench: Any, judge: Any, values: list[Any]) -> Spent:
    """What it takes to have every candidate's tensors, part by part, without running them."""
    from deltamerge.apps.search.judge import Walk
    from deltamerge.engine import backends

    size = bench.study.together
    made = [bench.candidates.of(bench.file.recipe(one)) for one in values]
    task = next(iter(judge.tasks.values()))
    places = next(iter(made[0].places.values()))
    clock = Clock()
    with backends.quiet_allocator(whole=True):
        for at in range(0, len(made), size):
            some = made[at : at + size]
            walk = Walk(some, judge.reader, judge.known, "cpu", judge.budget, judge.dtype)
            for part in task.model.parts:
                for k in range(len(some)):
                    walk.tensors(k, [places[name] for name in part if name in places])
    return clock.spent(len(values))


def plain_scores(merged: Path, rows: Path) -> dict[str, float]:
    """What a script does with a merged folder: load it under each fine-tune's head, and run it on that one's rows."""
    import torch
    import transformers
    from safetensors.torch import load_file

    found = {}
    for name, task in torch.load(rows, weights_only=True).items():
        config = transformers.AutoConfig.from_pretrained(task["head"])
        kind = getattr(transformers, config.architectures[0])
        model = kind.from_pretrained(task["head"], dtype=getattr(torch, task["in"])).eval()
        state = {k: v for k, v in load_file(merged / "model.safetensors").items() if "classifier" not in k}
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            found[name] = float(sum(model(**batch).logits.sum() for batch in task["batches"]))
    return found


def plain_scores_of(rows: Path, own: list[Any], folder: Path, run: Any, options: Any) -> None:
    for file in own:
        shutil.rmtree(folder / "merged", ignore_errors=True)
        run(file, folder / "merged", options)
        plain_scores(folder / "merged", rows)


def _shell_loop(rows: Path, own: list[Any], folder: Path) -> None:
    script = folder / "score.py"
    script.write_text(SCORE.format(here=str(ROOT)), encoding="utf-8")
    for file in own:
        recipe = file.folder / "search-benchmark.yaml"
        recipe.write_text(file.output.text, encoding="utf-8")
        shutil.rmtree(folder / "merged", ignore_errors=True)
        command = [sys.executable, "-m", "deltamerge", "run", str(recipe), "--out", str(folder / "merged"), "-q"]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        command = [sys.executable, str(script), str(folder / "merged"), str(rows)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        recipe.unlink()


def _forward(rows: Path, folder: Path) -> Spent:
    """The forward passes alone, which every way has: of models that are loaded."""
    import torch
    import transformers

    tasks = torch.load(rows, weights_only=True)
    models = {}
    for name, task in tasks.items():
        config = transformers.AutoConfig.from_pretrained(task["head"])
        kind = getattr(transformers, config.architectures[0])
        models[name] = kind.from_pretrained(task["head"], dtype=getattr(torch, task["in"]))
    clock = Clock()
    with torch.no_grad():
        for name, task in tasks.items():
            for batch in task["batches"]:
                models[name].eval()(**batch)
    return clock.spent(1)


if __name__ == "__main__":
    main()
