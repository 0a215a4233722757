"""deltamerge and mergekit 0.1.5 side by side: one recipe, whole processes, warm cache, interleaved rounds.

    python -m benchmarks.speed.merge_speed                        # 0.5 B, the six methods, three rounds
    python -m benchmarks.speed.merge_speed --methods more         # slerp, model_stock, della, sce
    python -m benchmarks.speed.merge_speed --size L --methods task_arithmetic dare_linear --mergekit PATH_OF_A_VENV
    python -m benchmarks.speed.merge_speed --tensors 2000 20000   # does the time grow with the number of tensors?

The checkpoints (synthetic.py) are made once under --dir. The table goes to stdout, progress to stderr, every
number to a JSON file. How each number is measured: README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks import RESULTS
from benchmarks.process import measure, roofline, surroundings, warm
from benchmarks.synthetic import SIZES, agreement, make_checkpoints, many_tensors

MERGEKIT = "mergekit==0.1.5"
# tool -> its program; "tuned" is mergekit with other flags
TOOLS = {"deltamerge": "deltamerge", "mergekit": "mergekit", "tuned": "mergekit"}
# method -> density; None: the method has none
METHODS: dict[str, float | None] = {
    "passthrough": None, "linear": None, "task_arithmetic": None,
    "dare_linear": 0.1, "dare_ties": 0.01, "ties": 0.1,
    "slerp": None, "model_stock": None, "della": 0.5, "sce": None,
}  # fmt: skip
# a name for several methods, and what the result file of all of them is called by
GROUPS = {"first": [*METHODS][:6], "more": [*METHODS][6:]}
SUFFIXES = {"first": "", "more": "_methods"}
WHOLE: dict[str, dict[str, float]] = {"slerp": {"t": 0.4}, "sce": {"select_topk": 0.1}}
BASELESS = ("passthrough", "linear")
SINGLE = ("passthrough", "slerp")
WEIGHTLESS = ("passthrough", "slerp", "model_stock", "sce")
COMPARED = ("passthrough", "linear", "task_arithmetic", "ties", "slerp", "model_stock", "sce")


def inputs(method: str, models: Sequence[Path]) -> list[Path]:
    """The models that `method` reads."""
    base, *tunes = models
    return ([] if method in BASELESS else [base]) + (tunes[:1] if method in SINGLE else tunes)


def recipe(method: str, models: Sequence[Path]) -> str:
    """One YAML for both tools; absolute paths, because they read relative ones from different folders."""
    names = [str(model.resolve()) for model in inputs(method, models)]
    document: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method not in BASELESS:
        document["base_model"] = names.pop(0)
    document["models"] = [{"model": name} for name in names]
    if method in WHOLE:
        document["parameters"] = WHOLE[method]
    if method not in WEIGHTLESS:
        density = METHODS[method]
        for entry, weight in zip(document["models"], (0.6, 0.4), strict=True):
            entry["parameters"] = {"weight": weight} | ({} if density is None else {"density": density})
    return yaml.safe_dump(document, sort_keys=False)


def deltamerge_command() -> str:
    beside = Path(sys.executable).with_name("deltamerge")
    found = str(beside) if beside.exists() else shutil.which("deltamerge")
    return found or sys.exit("deltamerge is not installed beside this python")


def mergekit_command(given: Path | None, folder: Path) -> str:
    """`mergekit-yaml` of the venv (or the file) at `given`, or of a venv made here with the same torch."""
    if given is not None:
        program = given if given.is_file() else given / "bin" / "mergekit-yaml"
        return str(program.absolute()) if program.exists() else sys.exit(f"no mergekit-yaml at {given}")
    venv = folder / "venv"
    program = venv / "bin" / "mergekit-yaml"
    if not program.exists():
        say(f"installing {MERGEKIT} into {venv}")
        torch = importlib.metadata.version("torch").partition("+")[0]
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run(
            [venv / "bin" / "pip", "install", "-q", MERGEKIT, f"torch=={torch}"],
            check=True,
            stdout=sys.stderr,
        )
    return str(program.absolute())


def command(tool: str, program: str, config: Path, out: Path) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment that `tool` adds."""
    if tool == "deltamerge":
        return [program, "run", str(config), "--out", str(out), "-q"], {}
    line = [program, str(config), str(out)]
    if tool == "mergekit":
        return line, {}
    # its "parameters per shard" are bytes, and it refuses "200MB"; older glibc refuses more than 32 MiB here
    raised = {f"MALLOC_{name}_THRESHOLD_": str(1 << 30) for name in ("MMAP", "TRIM")}
    return [*line, "-j", "1", "--out-shard-size", "200M"], {"OMP_NUM_THREADS": "1", **raised}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def until_on_disk(folder: Path) -> float:
    """Seconds until all that was written to a folder's file system is on the disk."""
    start = time.perf_counter()
    subprocess.run(["sync", "-f", folder], check=True)
    return time.perf_counter() - start


def first_runs(options: argparse.Namespace, programs: Mapping[str, str]) -> None:
    """Run every tool once on a tiny model: the first time a tool compiles what it keeps."""
    models = make_checkpoints(options.dir / "checkpoints-tiny", SIZES["tiny"])
    config, out = options.dir / "tiny.yaml", options.dir / "tiny"
    for tool in options.tools:
        for method in options.methods if tool == "deltamerge" else options.methods[:1]:
            config.write_text(recipe(method, models), encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
            measure(*command(tool, programs[TOOLS[tool]], config, out), options.dir / f"{tool}.log")
    shutil.rmtree(out)


def compare(options: argparse.Namespace, models: Sequence[Path], programs: Mapping[str, str]) -> dict[str, Any]:
    """`rounds` times every method with every tool; the first round's outputs are compared."""
    first_runs(options, programs)
    results: dict[str, Any] = {m: {t: [] for t in ("roofline", *options.tools)} for m in options.methods}
    folder = options.dir / "out"
    config = folder / "recipe.yaml"
    for turn, method in itertools.product(range(options.rounds), options.methods):
        matched = turn == 0 and method in COMPARED and {"deltamerge", "mergekit"} <= set(options.tools)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        config.write_text(recipe(method, models), encoding="utf-8")
        needed = inputs(method, models)
        warm(needed)
        results[method]["roofline"].append({"wall": roofline(needed, folder / "roofline")})
        shutil.rmtree(folder / "roofline")
        for tool in options.tools:
            warm(needed)
            line, extra = command(tool, programs[TOOLS[tool]], config, folder / tool)
            run = measure(line, extra, options.dir / f"{tool}.log")
            settled = until_on_disk(folder / tool)
            results[method][tool].append(asdict(run) | {"durable": run.wall + settled})
            say(
                f"round {turn + 1} {method} {tool}: {run.wall:.2f} s, on the disk {settled:.2f} s later, "
                f"CPU {run.cpu:.2f} s, anonymous {run.anonymous:.0f} MB, resident {run.resident:.0f} MB"
            )
            if not matched:
                shutil.rmtree(folder / tool)
        if matched:
            results[method]["agreement"] = agreement(folder / "deltamerge", folder / "mergekit")
        # what there is, should a later run fail
        (options.dir / "rounds.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder)
    return results


def middle(results: Mapping[str, Any], tool: str, key: str) -> float:
    runs = results.get(tool)
    return median(run[key] for run in runs) if runs else math.nan


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def number(value: float, form: str = ".2f") -> str:
    return "–" if math.isnan(value) else format(value, form)


def report(results: Mapping[str, Any]) -> str:
    """Medians as a Markdown table: seconds, ratios, CPU seconds, megabytes; then how the results agree."""
    rows = [[
        "method", "mergekit, s", "tuned, s", "deltamerge, s", "roofline, s", "faster", "than tuned",
        "on the disk, s: mergekit / tuned / deltamerge", "CPU s: mergekit / tuned / deltamerge",
        "anonymous MB", "resident MB",
    ]]  # fmt: skip
    order = ("mergekit", "tuned", "deltamerge")
    for method, found in results.items():
        wall = {tool: middle(found, tool, "wall") for tool in (*order, "roofline")}
        triples = [
            " / ".join(number(middle(found, tool, key), form) for tool in order)
            for key, form in (("durable", ".2f"), ("cpu", ".1f"), ("anonymous", ".0f"), ("resident", ".0f"))
        ]
        ratios = [number(wall[tool] / wall["deltamerge"], ".1f") + " ×" for tool in ("mergekit", "tuned")]
        rows.append([method, *(number(second) for second in wall.values()), *ratios, *triples])
    lines = [table(rows)]
    for method, found in results.items():
        if match := found.get("agreement"):
            lines.append(
                f"{method}: {match['differ']:.3%} of elements differ from mergekit's, "
                f"{match['differ_more_than_1_ulp']:.4%} by more than 1 ulp, "
                f"by {match['greatest_difference']:.2g} at most"
                + "".join(f"; {name} is in one only" for name in match["tensors_in_one_only"])
            )
    return "\n".join([lines[0], "", *lines[1:]])


def scaling(options: argparse.Namespace, program: str) -> dict[str, Any]:
    """`plan` and `run` over models of one layer (start-up) and of each number of tensors."""
    out = options.dir / "out"
    cases: dict[str, tuple[list[Path], Path]] = {}
    for count in (12, *sorted(options.tensors)):
        size = many_tensors(count)
        config = options.dir / f"tensors-{count}.yaml"
        models = make_checkpoints(options.dir / f"tensors-{count}", size)
        config.write_text(recipe("task_arithmetic", models), encoding="utf-8")
        cases[str(len(size.shapes()))] = models, config
    found: dict[str, Any] = {count: {"plan": [], "run": []} for count in cases}
    for turn, (count, (models, config)) in itertools.product(range(options.rounds), cases.items()):
        lines = {
            "plan": [program, "plan", str(config), "--json"],
            "run": command("deltamerge", program, config, out)[0],
        }
        for name, line in lines.items():
            shutil.rmtree(out, ignore_errors=True)
            warm(models)
            run = measure(line, {}, options.dir / "deltamerge.log")
            found[count][name].append(asdict(run))
            say(f"round {turn + 1} {count} tensors {name}: {run.wall:.2f} s, CPU {run.cpu:.2f} s")
    shutil.rmtree(out)
    return found


def scaling_report(found: Mapping[str, Any]) -> str:
    """Seconds, and per tensor after start-up (the smallest model's): proportional if that stays the same."""
    kinds = [(name, key) for name in ("plan", "run") for key in ("wall", "cpu")]
    seconds = {count: [middle(runs, *kind) for kind in kinds] for count, runs in found.items()}
    (first, start), *others = seconds.items()
    after = {count: [a - b for a, b in zip(row, start, strict=True)] for count, row in others}
    names = [f"{name} {key}" for name, key in kinds]
    rows = [["tensors", *(f"{n}, s" for n in names), *(f"{n}, µs a tensor" for n in names), "anonymous MB"]]
    for count, row in seconds.items():
        each = [1e6 * a / max(1, int(count) - int(first)) for a in after.get(count, [math.nan] * len(kinds))]
        anonymous = number(middle(found[count], "run", "anonymous"), ".0f")
        rows.append([count, *map(number, row), *(number(e, ".0f") for e in each), anonymous])
    few, most = others[0][0], others[-1][0]
    ratios = [f"{name} {b / a:.1f} ×" for name, a, b in zip(names, after[few], after[most], strict=True)]
    line = f"{int(most) / int(few):.1f} × the tensors take, past start-up: {', '.join(ratios)}"
    return "\n".join([table(rows), "", line])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="M", help="0.5 B (M), 1.1 B (L) or a smoke test (tiny)")
    add("--methods", nargs="+", choices=[*METHODS, *GROUPS], default=["first"], help="methods or groups (see METHODS)")
    add("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    add("--rounds", type=int, default=3)
    add("--mergekit", type=Path, help=f"a venv with {MERGEKIT}; without it, one is made in --dir")
    add("--dir", type=Path, default=Path(".bench"), help="checkpoints and outputs: 5 GB at M, 11 GB at L")
    add("--tensors", nargs="+", type=int, metavar="N", help="only: time against the number of tensors")
    add("--json", type=Path, help="default: results/ here for a full run, --dir for a part")
    options = parser.parse_args()
    options.methods = [method for name in options.methods for method in GROUPS.get(name, [name])]
    return options


def main() -> None:
    options = parse()
    options.dir.mkdir(parents=True, exist_ok=True)
    programs: dict[str, str] = {}
    what: dict[str, Any]
    if options.tensors or "deltamerge" in options.tools:
        programs["deltamerge"] = deltamerge_command()
    if options.tensors:
        found = scaling(options, programs["deltamerge"])
        what, text, name, full = {"tensors": found}, scaling_report(found), "merge_speed_tensors.json", True
    else:
        if set(options.tools) != {"deltamerge"}:
            programs["mergekit"] = mergekit_command(options.mergekit, options.dir)
        size = SIZES[options.size]
        found = compare(options, make_checkpoints(options.dir / f"checkpoints-{options.size}", size), programs)
        what = {"size": options.size, "parameters": size.parameters, "methods": found}
        group = next((name for name, methods in GROUPS.items() if options.methods == methods), None)
        text, name = report(found), f"merge_speed_{options.size}{SUFFIXES.get(group or '', '')}.json"
        full = options.size != "tiny" and group is not None and options.tools == [*TOOLS]
    path = options.json or (RESULTS if full else options.dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**surroundings(programs), **what}, indent=2) + "\n", encoding="utf-8")
    print(text)
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
