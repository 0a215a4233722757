"""What each way of pruning keeps of two fine-tunes: every method × objective × density, on all test rows.

    python -m benchmarks.pruning.quality                  the whole table; hours, goes on where it was stopped
    python -m benchmarks.pruning.quality --density 0.01   one column
    python -m benchmarks.pruning.quality --quick          a few cells on a few rows, to see that it works
    python -m benchmarks.pruning.quality --authors        only the authors' search of q beside ours
    python -m benchmarks.pruning.quality --authors --large     the same on random weights of BERT-base's shapes: memory
    python -m benchmarks.pruning.quality --docs [JSON...]      join results of other runs, and write the tables of docs/

Models: DELTAMERGE_SHARED or ../shared/data, else those of `benchmarks.encoder`. Calibration rows are of the validation
part, which no fine-tune has seen. Random masks are drawn with 4 seeds. Results go to benchmarks/results/quality.json,
quality.md and quality.svg after every cell.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks import RESULTS, ROOT, process, tasks
from benchmarks.drawing import draw_bars, draw_lines
from benchmarks.tasks import TASKS, WORK, models_folder
from deltamerge.apps.report.svg import Point

PAGES = tuple(ROOT / "docs" / "measurements" / name for name in ("pruning.md", "calibration.md"))
SEEDS = 4
DENSITIES = (0.1, 0.05, 0.01, 0.001)
LAYER, ROW = {"scope": "layer"}, {"scope": "row"}


class Method(NamedTuple):
    """A row of the table; `random` masks differ from seed to seed, `sequences` are those that q is searched on."""

    name: str
    prune: dict[str, Any]
    random: bool = False
    sequences: int = 50


def _q(objective: str, **more: str) -> dict[str, Any]:
    return {"objective": objective, **more}


DARE = {"method": "dare"}
SAMPLED = DARE | {"sampling": "magnitude"}
MAGNITUDE = {"method": "magnitude"}
WANDA = {"method": "wanda"}
CHANGE, LABELS, CLOSED = "output_change", "validation", "layer_mse"
LEARNED_SEQUENCES, LABELLED_SEQUENCES = 320, 200

METHODS = (
    Method("DARE", DARE, True),
    Method("DAREx-q, q_v", DARE | {"q": LABELS}, True, LABELLED_SEQUENCES),
    Method("DAREx-q, q_e", DARE | {"q": CHANGE}, True),
    Method("DAREx-q per layer, q_v", DARE | {"q": _q(LABELS, **LAYER)}, True, LABELLED_SEQUENCES),
    Method("DAREx-q per layer, q_e", DARE | {"q": _q(CHANGE, **LAYER)}, True),
    Method("DARE, least squares per layer", DARE | {"q": CLOSED}, True),
    Method("DARE, learned per row", DARE | {"q": _q(CHANGE, search="gradient", **ROW)}, True, LEARNED_SEQUENCES),
    Method("structured", {"method": "structured"}, True),
    Method("structured, q_e", {"method": "structured", "q": CHANGE}, True),
    Method("importance sampling", SAMPLED, True),
    Method("importance sampling, q_e", SAMPLED | {"q": CHANGE}, True),
    Method("magnitude", MAGNITUDE),
    Method("magnitude, q_v", MAGNITUDE | {"q": LABELS}, False, LABELLED_SEQUENCES),
    Method("magnitude, q_e", MAGNITUDE | {"q": CHANGE}),
    Method("magnitude of the model, q_e", MAGNITUDE | {"group": "model", "q": CHANGE}),
    Method("magnitude, least squares per layer", MAGNITUDE | {"q": CLOSED}),
    Method("magnitude, learned per tensor", MAGNITUDE | {"q": _q(CHANGE, search="gradient", **LAYER)}, False, 320),
    Method("magnitude, learned per row", MAGNITUDE | {"q": _q(CHANGE, search="gradient", **ROW)}, False, 320),
    Method("WANDA", WANDA),
    Method("WANDA, q_v", WANDA | {"q": LABELS}, False, LABELLED_SEQUENCES),
    Method("WANDA, q_e", WANDA | {"q": CHANGE}),
    Method("WANDA, least squares per layer", WANDA | {"q": CLOSED}),
    Method("WANDA, learned per row", WANDA | {"q": _q(CHANGE, search="gradient", **ROW)}, False, LEARNED_SEQUENCES),
)
LARGE, LARGE_SEQUENCES = "BERT-base shapes", 12
# What is drawn over densities: all of them would be a thicket.
DRAWN = (
    "DARE",
    "DAREx-q, q_v",
    "DAREx-q, q_e",
    "importance sampling, q_e",
    "magnitude",
    "magnitude, q_e",
    "magnitude of the model, q_e",
    "magnitude, learned per row",
    "WANDA, q_e",
)
QUICK = ("DARE", "DAREx-q, q_e", "magnitude", "magnitude, q_e")


class Setting(NamedTuple):
    """Where models and rows are, and how much of them is used."""

    models: Mapping[str, Path]  # "base", and each task's fine-tune
    rows: Path
    work: Path
    test_rows: int | None
    sequences: int | None  # at most
    length: int
    mask_seeds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--task", nargs="+", default=["sentiment", "intensity"])
    parser.add_argument("--method", nargs="+", help="names of the table's rows")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rows", type=Path, default=WORK / "tasks", help="folder of TASK.PART.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--authors", action="store_true", help="only the authors' search beside ours")
    parser.add_argument("--large", action="store_true", help="on BERT-base's shapes, with --authors")
    parser.add_argument("--docs", type=Path, nargs="*", metavar="JSON", help="only join results and write docs/")
    asked = parser.parse_args()
    if asked.large and not asked.authors:
        parser.error("--large is for --authors")
    if asked.docs is not None:
        join(asked.out, asked.docs)
        return

    quiet()
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as work:
        folder = models_folder()
        models = {name: folder / name for name in ("base", *asked.task)}
        measure(asked, Setting(models, asked.rows, Path(work), None, None, 40, 4))


def quiet() -> None:
    """One thread, so that a number can be had again; no progress bars of transformers."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers is only partly typed
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # likewise


def measure(asked: argparse.Namespace, setting: Setting) -> None:
    methods = [m for m in METHODS if asked.method is None or m.name in asked.method]
    densities, seeds = list(asked.density), asked.seeds
    if asked.quick:
        setting = setting._replace(test_rows=100, sequences=12, length=24, mask_seeds=2)
        methods, densities, seeds = [m for m in METHODS if m.name in QUICK], [0.01], 1
    tasks.rows(asked.task[0], "test", setting.rows)  # makes them if they are not there
    file = asked.out.with_suffix(".json")
    found = json.loads(file.read_text()) if file.exists() and not asked.quick else {"cells": {}, "authors": {}}
    if asked.large:
        large = setting._replace(models=large_models(setting.models), sequences=LARGE_SEQUENCES)
        found["authors"][LARGE] = beside_authors(large, "sentiment")
        write(found, asked.out)
        print(markdown(found))
        return
    for task in asked.task:
        if asked.authors or not (asked.quick or task in found["authors"]):
            found["authors"][task] = beside_authors(setting, task)
            write(found, asked.out)
        if asked.authors:
            continue
        found.setdefault("fine-tune", {}).setdefault(task, score(setting, task, setting.models[task]))
        for method, density, seed in cells(methods, densities, seeds):
            key = f"{task} | {method.name} | {density:g} | {seed}"
            if key not in found["cells"]:
                found["cells"][key] = cell(setting, task, method, density, seed)
                print(key, found["cells"][key], file=sys.stderr, flush=True)
                write(found, asked.out)
    print(markdown(found))


def large_models(models: Path) -> Path:
    """Base and fine-tune of BERT-base's shapes, with random weights and the tokenizer of the small base."""
    from benchmarks import encoder

    folder = WORK / "bert-base"
    if not folder.exists():
        with tasks.building(folder) as out:
            encoder.random_pair(out / "base", out / "sentiment", models / "base")
    return folder


def cells(methods: list[Method], densities: list[float], seeds: int) -> Iterator[tuple[Method, float, int]]:
    """Seed 0 of everything first: a table that was stopped has a number in every row."""
    for seed in range(seeds):
        for density in densities:
            yield from ((method, density, seed) for method in methods if seed == 0 or method.random)


def recipe(setting: Setting, task: str, method: Method, density: float, seed: int) -> dict[str, Any]:
    prune = dict(method.prune)
    if prune["method"] == "structured":
        prune |= {"a": density**0.5, "b": density**0.5}
    else:
        prune["density"] = density
    return {
        "base_model": str(setting.models["base"]),
        "models": [{"model": str(setting.models[task]), "name": task, "prune": prune}],
        "calibration": {
            "data": str(setting.rows / f"{task}.validation.jsonl"),
            "sequences": min(method.sequences, setting.sequences or method.sequences),
            "length": setting.length,
            "seeds": setting.mask_seeds,
        },
        "seed": seed,
    }


def cell(setting: Setting, task: str, method: Method, density: float, seed: int) -> dict[str, Any]:
    """Run one recipe and score what it wrote; seconds are the processor's, of one thread, without start-up."""
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options
    from deltamerge.run.runner import run

    path = setting.work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(setting, task, method, density, seed)), encoding="utf-8")
    start = time.process_time()
    result = run(read_recipe(path), setting.work / "merged", Options(force=True, workers=1, device="cpu"))
    seconds = time.process_time() - start
    record = result.lock.get("calibration", {}).get(task, {})
    return {
        "score": round(score(setting, task, result.folder), 2),
        "seconds": round(seconds, 1),
        "forward_passes": record.get("forward_passes", 0),
        **({"chosen": record["chosen"], "searched": record["searched"]} if record else {}),
    }


def score(setting: Setting, task: str, folder: Path) -> float:
    from benchmarks import encoder

    return encoder.score(folder, TASKS[task], tasks.rows(task, "test", setting.rows)[: setting.test_rows])


def beside_authors(setting: Setting, task: str) -> dict[str, Any]:
    """The authors' grid over q with three models in memory, and ours, each a process; one mask seed, density 0.01."""
    few = setting._replace(mask_seeds=1)
    path = setting.work / f"{task}.yaml"
    spec = recipe(few, task, Method("", DARE | {"q": CHANGE}), 0.01, 0)
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    extra = {"OMP_NUM_THREADS": "1"}
    ours_log, theirs_log = setting.work / "ours.json", setting.work / "theirs.json"
    command = [sys.executable, "-m", "deltamerge", "calibrate", str(path), "--json"]
    ours = process.measure(command, extra, ours_log)
    (record,) = _json(ours_log).values()
    here = extra | {"PYTHONPATH": str(ROOT)}
    theirs = process.measure([sys.executable, "-m", "benchmarks.pruning.authors", str(path)], here, theirs_log)
    grid = _json(theirs_log)
    return {
        "ours": {
            "q": record["searched"]["q"],
            "forward_passes": record["forward_passes"],
            "of_search": len(record["path"]) + 1,
            "anonymous_mb": round(ours.anonymous),
            "cpu_s": round(ours.cpu, 1),
        },
        "authors": {**grid, "anonymous_mb": round(theirs.anonymous), "cpu_s": round(theirs.cpu, 1)},
    }


def _json(log: Path) -> Any:
    """The one JSON line of a process's output."""
    return next(json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{"))


def write(found: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    draw(found, out.with_suffix(".svg"))


Table = dict[tuple[str, float], dict[str, list[dict[str, Any]]]]


def gathered(found: dict[str, Any]) -> Table:
    """(method, density) -> task -> the cells of its seeds, in the table's order."""
    table: Table = {}
    for key, value in found["cells"].items():
        task, name, density, _ = key.split(" | ")
        table.setdefault((name, float(density)), {}).setdefault(task, []).append(value)
    order = {method.name: i for i, method in enumerate(METHODS)}
    return dict(sorted(table.items(), key=lambda item: (-item[0][1], order[item[0][0]])))


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (number); the one value if there is one."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.pstdev(values):.1f} ({len(values)})"


def markdown(found: dict[str, Any]) -> str:
    """The table: mean ± standard deviation (seeds), share of the fine-tune's own score, forward passes, seconds."""
    own = found.get("fine-tune", {})
    names = list(own)
    lines = []
    if names:
        lines += [
            "| density | method | " + " | ".join(f"{t}, {own[t]:.1f} | %" for t in names) + " | passes | CPU s |",
            "|---|---|" + "---|---|" * len(names) + "---|---|",
        ]
    for (name, density), by_task in gathered(found).items():
        cells_of = [by_task.get(task, []) for task in names]
        scores = [[c["score"] for c in some] for some in cells_of]
        shown = [
            f"{spread(some)} | {100 * statistics.fmean(some) / own[task]:.0f}" if some else " | "
            for task, some in zip(names, scores, strict=True)
        ]
        every = [c for some in cells_of for c in some]
        passes = [c["forward_passes"] for c in every]
        seconds = statistics.fmean(c["seconds"] for c in every)
        lines.append(f"| {density:g} | {name} | {' | '.join(shown)} | {_range(passes)} | {seconds:.0f} |")
    text = "\n".join(lines) + "\n"
    return f"{text}\n{authors(found)}" if found["authors"] else text


def _range(values: Collection[int]) -> str:
    """ "3", or "3–5"."""
    least, most = min(values), max(values)
    return f"{least}" if least == most else f"{least}–{most}"


def authors(found: dict[str, Any]) -> str:
    """The search of one q, ours beside the authors'."""
    lines = [
        "| q of DAREx-q, density 0.01, one mask | q | forward passes | anonymous MB | CPU s |",
        "|---|---|---|---|---|",
    ]
    for task, both in found["authors"].items():
        for who, one in both.items():
            lines.append(
                f"| {task}, {who} | {one['q']:.4g} | {one['of_search']} | {one['anonymous_mb']} | {one['cpu_s']} |"
            )
    return "\n".join(lines) + "\n"


def join(out: Path, files: list[Path]) -> None:
    """Add the results of `files` to those of `out`, and write the tables of docs/ anew."""
    found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    for more in (json.loads(file.read_text(encoding="utf-8")) for file in files):
        for part, values in more.items():
            found.setdefault(part, {}).update(values)
    if files:
        write(found, out)
    for page in PAGES:
        page.write_text(documented(found, page.read_text(encoding="utf-8")), encoding="utf-8")


def documented(found: dict[str, Any], page: str) -> str:
    """A page of docs/ with what stands between its markers `<!-- quality: NAME -->` and `<!-- end -->` made anew."""
    tables = {"shares": shares, "authors": authors}

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]](found)}{match[3]}"

    return re.sub(r"(<!-- quality: (\w+) -->)\n.*?(<!-- end -->)", table, page, flags=re.DOTALL)


def shares(found: dict[str, Any]) -> str:
    """What each method keeps of the fine-tunes' own scores, in %: means over seeds, by density, the best in bold."""
    own, table = found["fine-tune"], gathered(found)
    densities = sorted({density for _, density in table}, reverse=True)
    share = {
        (name, density, task): 100 * statistics.fmean(c["score"] for c in cells_of) / own[task]
        for (name, density), by_task in table.items()
        for task, cells_of in by_task.items()
    }
    best = {
        (d, task): round(max((s for (_, e, t), s in share.items() if (e, t) == (d, task)), default=0.0))
        for d in densities
        for task in own
    }

    def shown(name: str, density: float, task: str) -> str:
        value = share.get((name, density, task))
        if value is None:
            return "–"
        return f"**{value:.0f}**" if round(value) == best[density, task] else f"{value:.0f}"

    seeds = {len(c) for (n, _), by_task in table.items() for c in by_task.values() if _random(n)}
    lines = [
        f"In % of the fine-tune's own score ({', '.join(f'{task} {score:.1f}' for task, score in own.items())}), "
        f"{' / '.join(own)}; random masks: mean of {_range(seeds)} seed{'s' * (max(seeds) > 1)}.",
        "",
        "| density | " + " | ".join(f"{d:g}" for d in densities) + " | forward passes |",
        "|---" * (len(densities) + 2) + "|",
    ]
    for method in METHODS:
        cells_of = [
            c for (n, _), by_task in table.items() if n == method.name for some in by_task.values() for c in some
        ]
        if not cells_of:
            continue
        passes = [c["forward_passes"] for c in cells_of]
        columns = (" / ".join(shown(method.name, d, task) for task in own) for d in densities)
        lines.append(f"| {method.name} | {' | '.join(columns)} | {_range(passes)} |")
    return "\n".join(lines) + "\n"


def _random(name: str) -> bool:
    return next(method.random for method in METHODS if method.name == name)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the share of each fine-tune's score over densities, or bars of one density."""
    table, own = gathered(found), found.get("fine-tune", {})
    densities = sorted({density for _, density in table})
    if not densities:
        return
    names = list(dict.fromkeys(name for name, _ in table if len(densities) == 1 or name in DRAWN))
    shares: dict[str, dict[str, dict[float, float]]] = {}
    spread: dict[str, dict[str, dict[float, float]]] = {}
    for task, score in own.items():
        for name in names:
            cells = {d: [100 * c["score"] / score for c in table.get((name, d), {}).get(task, [])] for d in densities}
            shares.setdefault(task, {})[name] = {d: statistics.fmean(some) for d, some in cells.items() if some}
            spread.setdefault(task, {})[name] = {d: statistics.pstdev(some) for d, some in cells.items() if some}
    least = densities[0] if len(densities) < 2 else densities[1]
    means = {n: statistics.fmean(own[n][least] for own in shares.values()) for n in names
             if all(least in own[n] for own in shares.values())}  # fmt: skip
    title = "Share of the fine-tune's score"  # no method has been scored on every task
    if best := max(means, key=lambda name: means[name], default=None):
        title = f"At density {least:g}, {best} keeps {means[best]:.0f} % of the score"
    if "DARE" in means:
        title += f"; plain DARE keeps {means['DARE']:.0f} %"
    if len(densities) == 1:
        bars = {
            task: [Point(name, some[least]) for name, some in one.items() if least in some]
            for task, one in shares.items()
        }
        draw_bars(path, title, bars, "% of the fine-tune's score")
        return
    panels = {
        task: {n: [(d, some[d]) for d in sorted(some)] for n, some in own.items() if len(some) > 1}
        for task, own in shares.items()
    }
    draw_lines(path, title, panels, "density", ["% of the fine-tune's score"] * len(panels), spread=spread)


if __name__ == "__main__":
    main()
