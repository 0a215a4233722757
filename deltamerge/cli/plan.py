"""The command plan: a summary of a run, then a line for each kind of tensor."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge import errors
from deltamerge.cli import streams
from deltamerge.cli.layout import align, cut, paragraph
from deltamerge.cli.options import AS_JSON, MERGEKIT_EXACT, PICKLES, RECIPE, RESOURCES, SET
from deltamerge.cli.output import say, say_json
from deltamerge.errors.shown import human, shown
from deltamerge.errors.shown import lines as one_a_line
from deltamerge.tensors.names import numbers_as_stars

if TYPE_CHECKING:
    from deltamerge.recipe.file import RecipeFile
    from deltamerge.recipe.open_values import Template
    from deltamerge.recipe.yaml_source import Loc

LABEL = 11  # characters before the text of a line
# Seconds of a run apart from its bytes, and the speeds of writing and reading as shares of a copy's speed in memory.
# Measured on whole processes of benchmarks/speed/merge_speed.py on two machines. torch computes more slowly.
STARTING, WRITING, READING, TORCH = 0.35, 0.35, 1.2, 0.15
PASSES_RATE = 0.6  # of the rate of products that a forward pass reaches
BFLOAT16 = 2.5  # how much faster a pass is whose blocks multiply in bfloat16
LIBRARIES = 200_000_000  # bytes of library files (torch and others) that a calibrating process maps
OPERATIONS = 4e10  # on whole matrices in float64, a second of one thread


@click.command("plan")
@click.argument("recipe", type=RECIPE)
@RESOURCES
@click.option("--diff", "old", type=RECIPE, help="Print only the changes from this recipe to RECIPE, in Markdown.")
@click.option("--graph", is_flag=True, help="Print the stages as a Mermaid flowchart.")
@click.option("--tensors", is_flag=True, help="List every tensor, with its sources and file.")
@MERGEKIT_EXACT
@SET
@PICKLES
@AS_JSON
def command(
    recipe: Path,
    old: Path | None,
    graph: bool,
    tensors: bool,
    mergekit_exact: bool,
    settings: dict[Loc, str],
    as_json: bool,
    **options: Any,
) -> None:
    """Show what a run of RECIPE would do, and the disk, memory and time it needs.

    A dry run that reads no weights.

    \b
    deltamerge plan recipe.yaml --tensors       # each with its sources and file; --json for machines
    deltamerge plan --diff old.yaml new.yaml    # for a pull request
    """
    from deltamerge.plan import review
    from deltamerge.recipe.file import TemplateFile, read_either, read_recipe
    from deltamerge.run.check import in_words
    from deltamerge.run.options import Options
    from deltamerge.run.plans import make_plans, target_of

    def describe(file: RecipeFile, template: Template | None = None) -> dict[str, Any]:
        *before, planned = make_plans(file, options=Options(**options))
        intermediate = {plan.recipe.name: plan.describe() for plan in before}
        more: dict[str, Any] = {"intermediate": intermediate} if before else {}
        if template is not None:
            with errors.app("search"):
                from deltamerge.apps.search.candidates import describe_study

            more["study"] = template.describe() | describe_study(planned)
        return planned.describe() | more

    if graph and (old or as_json):
        raise click.UsageError("--graph stands alone")
    read = read_either(recipe, mergekit_exact=mergekit_exact, settings=settings)
    template = read.template if isinstance(read, TemplateFile) else None
    file = read.file(next(read.template.examples())) if isinstance(read, TemplateFile) else read
    described = describe(file, template)
    if old is not None:
        with errors.context(str(old)):
            before = describe(read_recipe(old, mergekit_exact=mergekit_exact))
            found = review.difference(before, described)
        say_json(found) if as_json else say(review.markdown(found, str(old), str(recipe)))
    elif graph:
        say(review.mermaid(described))
    elif as_json:
        say_json(described)
    else:
        width = streams.columns()
        for name, one in described.get("intermediate", {}).items():
            say(f"document {shown(name)}\n{render_plan(one, width=width, tensors=tensors)}\n")
        say(render_plan(described, width=width, target=target_of(file, None), tensors=tensors))
        if template is not None:
            study = described["study"]
            took = f"{study['together']} candidates a walk in about {human(study['memory'])} of memory"
            say("\n".join(paragraph(f"study: {in_words(template)}; {took}", width)))


def render_plan(
    described: Mapping[str, Any], *, width: int = 80, target: Path | None = None, tensors: bool = False
) -> str:
    """Return the plan of a run to `target` in lines of `width` characters.

    With `tensors`, list every tensor, in lines that may be wider.
    """
    rows = _lines_of_all(described) if tensors else _lines_of_kinds(described, width)
    return one_a_line([*_verdict(described, width, target), "", *rows])


def _verdict(found: Mapping[str, Any], width: int, target: Path | None) -> Iterator[str]:
    count, files = len(found["tensors"]), len(found["shards"])
    copied = sum(tensor["method"] == "copy" for tensor in found["tensors"])
    size = human(found["output_bytes"])
    merges = f"{found['merge_method']} of {', '.join(found['models'])}"
    yield from _line("merge", merges + (f" on {found['base_model']}" if found["base_model"] else ""), width)
    for model in found["models"]:
        if said := _of_model(found["tensors"], model):
            yield from _line("", f"{model}: {said}", width)
    more = f", {copied} of them copied" if copied else ""
    place = f"{files} files" if files != 1 else "1 file"
    yield from _line("output", f"{count} tensors{more}, {size} in {place}; files of {found['template']}", width)
    if "delta" in found:
        yield from _line("as a delta", render_delta(found["delta"]), width)
    if "mixture" in found:
        yield from _line("mixture", _mixture(found["mixture"]), width)
    if target is not None:
        needed = found["delta"]["estimated_bytes"] if "delta" in found else found["output_bytes"]
        free = shutil.disk_usage(next(p for p in [target.absolute(), *target.absolute().parents] if p.exists())).free
        yield from _line(
            "disk", f"{human(needed)} needed{' about' if 'delta' in found else ''}, {human(free)} free", width
        )
        if needed > free:
            yield from _line("warning", f"the disk is too small for the output by {human(needed - free)}", width)
    backends = sorted({t["backend"] for t in found["tensors"] if t["method"] != "copy"})
    yield from _line("memory", f"{human(found['peak_bytes'])} at the peak; --memory SIZE is a cap", width)
    reads = f"reads {human(found['read_bytes'])}"
    passes = max((tensor["passes"] for tensor in found["tensors"]), default=1)
    selects = f"select in up to {passes - 1} passes → " if passes > 2 else "select → " if passes == 2 else ""
    ahead = "calibrate → " if found["stages"] else "routers → " if "mixture" in found else ""
    stages = f"{ahead}read → {selects}merge → write"
    workers = f"{found['device']}, {found['workers']} workers, {', '.join(backends) or 'copies only'}"
    yield from _line("work", f"{stages}; {reads}; {workers}", width)
    besides = ", and calibration" if found["stages"] else ""
    yield from _line("time", f"about {_duration(seconds(found))} with the inputs in memory{besides}", width)
    yield from _tokenizer(found, width)
    for stage in found["stages"]:
        yield from _line("calibrates", _stage(stage), width)
    for note in found["notes"]:
        yield from _line("note", note, width)


def render_delta(delta: dict[str, Any]) -> str:
    """Return a planned delta artifact, on one line."""
    values = f"{delta['values']} values to add" if delta["values"] else "final values"
    size = human(delta["estimated_bytes"])
    return f"{values}, about {size}: an estimate, without tables, of positions at random; less if less has changed"


def seconds(described: Mapping[str, Any]) -> float:
    """Estimate the seconds of a run without calibration, with its inputs in the page cache.

    The rate is measured: how fast this machine copies memory now.
    """
    rate = copy_rate()
    slow = any(tensor["backend"] == "torch" for tensor in described["tensors"] if tensor["method"] != "copy")
    read = described["read_bytes"] / (rate * READING * (TORCH if slow else 1) * min(described["workers"], 8) / 2)
    cubic = described["operations"] / (OPERATIONS * described["workers"]) if described["device"] == "cpu" else 0.0
    taken: float = STARTING + described["output_bytes"] / (rate * WRITING) + read + cubic
    return taken


def copy_rate() -> float:
    """Measure the bytes a second of a copy in memory: the best of a few copies of 16 MB."""
    source = b"\1" * (1 << 24)
    target, best = memoryview(bytearray(source)), float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - begun)
    return len(source) / max(best, 1e-6)


def calibration_seconds(stage: Mapping[str, Any]) -> float:
    """Estimate the seconds of all forward passes of a stage. The head always multiplies in float32.

    The rate is measured: how fast this machine multiplies matrices now.
    """
    rate = product_rate() * PASSES_RATE
    inside = stage["forward_passes"] * stage["operations"] / (BFLOAT16 if stage["precision"] == "bfloat16" else 1.0)
    return float(inside + stage["head_passes"] * stage["head_operations"]) / rate


def product_rate() -> float:
    """Measure the multiply-adds a second of float32 matrix products: the best of a few products of 512 × 512."""
    import numpy as np

    size, best = 512, float("inf")
    a = np.ones((size, size), np.float32)
    for _ in range(4):
        begun = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / max(best, 1e-6)


def _duration(taken: float) -> str:
    if taken < 90:
        return f"{max(1, round(taken))} s"
    return f"{round(taken / 60)} min" if taken < 5400 else f"{taken / 3600:.1f} h"


def _of_model(tensors: list[dict[str, Any]], model: str) -> str:
    """Return the settings that all tensors of a model share. A gradient is shown as its range."""
    texts = dict.fromkeys(
        detail.removeprefix(model).strip() for t in tensors for detail in t["sources"] if _is_of(detail, model)
    )
    found = [text for text in texts if text]
    if len(found) <= 1:
        return "".join(found)
    return f"{found[0]} … {found[-1]} ({len(found)} kinds: --tensors)"


def _is_of(detail: str, model: str) -> bool:
    return detail == model or detail.startswith(f"{model} ")


def _tokenizer(found: Mapping[str, Any], width: int) -> Iterator[str]:
    """Yield lines on the output's vocabulary, and on the sources of rows for tokens that a model lacks."""
    vocabulary = found["tokenizer"]
    if vocabulary is not None:
        sources = {"base": "the base's row", "one_model": "their only model's", "mean": "the mean of theirs",
                   "zeros": "zeros", "recipe": "what the recipe says"}  # fmt: skip
        parts = [
            f"{vocabulary['source']}, starting from {vocabulary['starts_from']}",
            f"{vocabulary['tokens']} tokens, {vocabulary['appended']} appended"
            + f", {vocabulary['dropped']} dropped" * bool(vocabulary["dropped"]),
            f"{vocabulary['rows']} rows" + f", {vocabulary['padding']} of them padding" * bool(vocabulary["padding"]),
        ]
        yield from _line("tokenizer", "; ".join(parts), width)
        lacking = [f"{count} from {sources[source]}" for source, count in vocabulary["lacking"].items() if count]
        if lacking:
            yield from _line("", f"tokens that a model lacks: {', '.join(lacking)}", width)
        moved = vocabulary.get("transplant")
        if moved:
            yield from _line("", _transplant(moved), width)
        for note in vocabulary["notes"]:
            yield from _line("", note, width)
    if found["chat_template"]:
        yield from _line("chat", f"template of {found['chat_template']}", width)


def _mixture(mixture: Mapping[str, Any]) -> str:
    """Describe a mixture: layout, experts, routers and parameters."""
    count, shared = len(mixture["experts"]), len(mixture["shared_experts"])
    experts = f"{count} experts of width {mixture['expert_size']}, {mixture['experts_per_token']} a token"
    prompts = f" from {mixture['prompts']} prompts" if mixture["prompts"] else ""
    sizes = [f"{mixture[key] / 1e6:,.1f} M" for key in ("parameters", "active_parameters")]
    return (
        f"{mixture['architecture']}: {experts}{f', {shared} shared' * bool(shared)}; {mixture['routers']} routers, "
        f"{mixture['gate_mode']}{prompts}; {sizes[0]} parameters, {sizes[1]} active a token"
    )


def _transplant(moved: Mapping[str, Any]) -> str:
    """Describe the rows that a transplanted tokenizer's tokens get."""
    ways = {
        "omp": f"sums of {moved['k']} rows by matching pursuit over {moved['common']} common tokens",
        "common": f"sums of the {moved['k']} nearest of {moved['common']} common tokens",
        "mean": "the mean row",
    }
    mean = f"; {moved['mean']} the mean row" * bool(moved["mean"])
    return f"{moved['kept']} tokens keep their rows; {moved['made']} get {ways[moved['method']]}{mean}"


def _stage(stage: Mapping[str, Any]) -> str:
    from deltamerge.calibrate.spec import BASELINE_BYTES  # imports numpy and pydantic, which --help does not need

    blocks = f"{stage['blocks']} blocks one at a time" if stage["blocks"] else "the whole model at once"
    how = f"{stage['objective']}, scope {stage['scope']}, search {stage['search']}"
    rows = f"{stage['sequences']} sequences of {stage['length']} tokens"
    passes = f"at most {stage['forward_passes']} forward passes in {stage['precision']}"
    takes = f"about {_duration(calibration_seconds(stage))} for all of them"
    memory = f"{human(BASELINE_BYTES + stage['memory'])} beside about {LIBRARIES // 10**6} MB of libraries"
    return f"{stage['model']}: {how}; {rows}, {passes}, {takes}, {memory}, {blocks}"


def _lines_of_kinds(found: Mapping[str, Any], width: int) -> Iterator[str]:
    """Yield a line for each kind of tensor: its name with * for layer numbers, and the count."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for tensor in found["tensors"]:
        key = (numbers_as_stars(tensor["name"]), tensor["dtype"], tuple(tensor["shape"]), tensor["method"])
        groups.setdefault(key, []).append(tensor["bytes"])
    rows = [("tensors", "n", "dtype", "shape", "bytes", "method")]
    for (name, dtype, shape, method), sizes in groups.items():
        rows.append((name, str(len(sizes)), dtype, _shape(shape), human(sum(sizes)), method))
    others = sum(max(len(row[i]) for row in rows) + 2 for i in range(1, len(rows[0])))
    longest = max(16, width - others)
    yield from align([(cut(row[0], longest), *row[1:]) for row in rows])


def _lines_of_all(found: Mapping[str, Any]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("tensor", "dtype", "shape", "bytes", "method", "sources", "file")]
    for tensor in found["tensors"]:
        size, sources = human(tensor["bytes"]), "; ".join(tensor["sources"])
        what = (tensor["dtype"], _shape(tensor["shape"]), size, tensor["method"], sources, tensor["file"])
        rows.append((tensor["name"], *what))
    yield from align(rows)


def _shape(shape: Any) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _line(label: str, text: str, width: int) -> list[str]:
    """Return lines of `width` with the label before the first."""
    return paragraph(shown(text), max(20 + LABEL, width), first=f"{label:<{LABEL}}", then=" " * LABEL)
