"""A plan for people: the answer in a few lines, then tensors of one kind on one line."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltamerge.cli.tables import aligned, human, render_delta
from deltamerge.errors.shown import lines as one_a_line
from deltamerge.errors.shown import shown
from deltamerge.tensors.names import numbers_as_stars

LABEL = 11  # characters before the text of a line
# Seconds of a run beside what bytes take, and the share of a copy's speed in memory at which results are written and
# inputs read: from whole processes of benchmarks/speed/merge_speed.py on two machines. torch computes more slowly.
STARTING, WRITING, READING, TORCH = 0.35, 0.35, 1.2, 0.15
PASSES_RATE = 0.6  # of the rate of products that a forward pass reaches
BFLOAT16 = 2.5  # how much faster a pass is whose blocks multiply in bfloat16
LIBRARIES = 200_000_000  # bytes of torch's and other libraries' files that a process which calibrates maps
OPERATIONS = 4e10  # on whole matrices in float64, a second of one thread


def render_plan(
    described: Mapping[str, Any], *, width: int = 80, target: Path | None = None, tensors: bool = False
) -> str:
    """The plan of a run to `target` in lines of `width` characters; with `tensors` each of them, whatever its width."""
    rows = _every(described) if tensors else _grouped(described, width)
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
    backends = sorted({t["backend"] for t in found["tensors"] if t["method"] != "copy"})
    yield from _line("memory", f"{human(found['peak_bytes'])} at the peak; --memory SIZE is a cap", width)
    reads = f"reads {human(found['read_bytes'])}"
    passes = max((tensor["passes"] for tensor in found["tensors"]), default=1)
    selects = f"select in up to {passes - 1} passes → " if passes > 1 else ""
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


def seconds(described: Mapping[str, Any]) -> float:
    """About the seconds of a run without its calibration, its inputs in the page cache, from how fast this machine
    copies memory now."""
    rate = copy_rate()
    slow = any(tensor["backend"] == "torch" for tensor in described["tensors"] if tensor["method"] != "copy")
    read = described["read_bytes"] / (rate * READING * (TORCH if slow else 1) * min(described["workers"], 8) / 2)
    cubic = described["operations"] / (OPERATIONS * described["workers"]) if described["device"] == "cpu" else 0.0
    taken: float = STARTING + described["output_bytes"] / (rate * WRITING) + read + cubic
    return taken


def copy_rate() -> float:
    """Bytes a second of a copy in memory, the best of a few of 16 MB."""
    import numpy as np

    source = np.ones(1 << 24, np.uint8)
    target, best = np.empty_like(source), float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - begun)
    return len(source) / max(best, 1e-6)


def calibration_seconds(stage: Mapping[str, Any]) -> float:
    """About the seconds of all forward passes of a stage, from how fast this machine multiplies matrices now. The
    products of a head are float32."""
    rate = product_rate() * PASSES_RATE
    inside = stage["forward_passes"] * stage["operations"] / (BFLOAT16 if stage["precision"] == "bfloat16" else 1.0)
    return float(inside + stage["head_passes"] * stage["head_operations"]) / rate


def product_rate() -> float:
    """Multiplications and additions a second of float32 matrix products, the best of a few of 512 × 512."""
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
    """What is done to a model's tensors, where that is the same for all; the range where it is a gradient."""
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
    """What becomes of the vocabulary, and the source of the rows of tokens that a model lacks."""
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
    """Layout, experts, routers and parameters of a mixture."""
    count, shared = len(mixture["experts"]), len(mixture["shared_experts"])
    experts = f"{count} experts of width {mixture['expert_size']}, {mixture['experts_per_token']} a token"
    prompts = f" from {mixture['prompts']} prompts" if mixture["prompts"] else ""
    sizes = [f"{mixture[key] / 1e6:,.1f} M" for key in ("parameters", "active_parameters")]
    return (
        f"{mixture['architecture']}: {experts}{f', {shared} shared' * bool(shared)}; {mixture['routers']} routers, "
        f"{mixture['gate_mode']}{prompts}; {sizes[0]} parameters, {sizes[1]} active a token"
    )


def _transplant(moved: Mapping[str, Any]) -> str:
    """Which rows a transplanted tokenizer's tokens get."""
    ways = {
        "omp": f"sums of {moved['k']} rows by matching pursuit over {moved['common']} common tokens",
        "common": f"sums of the {moved['k']} nearest of {moved['common']} common tokens",
        "mean": "the mean row",
    }
    mean = f"; {moved['mean']} the mean row" * bool(moved["mean"])
    return f"{moved['kept']} tokens keep their rows; {moved['made']} get {ways[moved['method']]}{mean}"


def _stage(stage: Mapping[str, Any]) -> str:
    from deltamerge.calibrate.spec import BASELINE_BYTES  # numpy and pydantic, which --help needs not

    blocks = f"{stage['blocks']} blocks one at a time" if stage["blocks"] else "the whole model at once"
    how = f"{stage['objective']}, scope {stage['scope']}, search {stage['search']}"
    rows = f"{stage['sequences']} sequences of {stage['length']} tokens"
    passes = f"at most {stage['forward_passes']} forward passes in {stage['precision']}"
    takes = f"about {_duration(calibration_seconds(stage))} for all of them"
    memory = f"{human(BASELINE_BYTES + stage['memory'])} beside about {LIBRARIES // 10**6} MB of libraries"
    return f"{stage['model']}: {how}; {rows}, {passes}, {takes}, {memory}, {blocks}"


def _grouped(found: Mapping[str, Any], width: int) -> Iterator[str]:
    """A line for the tensors of all layers that are alike: their name with * for numbers, and how many they are."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for tensor in found["tensors"]:
        key = (numbers_as_stars(tensor["name"]), tensor["dtype"], tuple(tensor["shape"]), tensor["method"])
        groups.setdefault(key, []).append(tensor["bytes"])
    rows = [("tensors", "n", "dtype", "shape", "bytes", "method")]
    for (name, dtype, shape, method), sizes in groups.items():
        rows.append((name, str(len(sizes)), dtype, _shape(shape), human(sum(sizes)), method))
    others = sum(max(len(row[i]) for row in rows) + 2 for i in range(1, len(rows[0])))
    longest = max(16, width - others)
    yield from aligned([(_shortened(row[0], longest), *row[1:]) for row in rows])


def _every(found: Mapping[str, Any]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("tensor", "dtype", "shape", "bytes", "method", "sources", "file")]
    for tensor in found["tensors"]:
        size, sources = human(tensor["bytes"]), "; ".join(tensor["sources"])
        what = (tensor["dtype"], _shape(tensor["shape"]), size, tensor["method"], sources, tensor["file"])
        rows.append((tensor["name"], *what))
    yield from aligned(rows)


def _shape(shape: Any) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"


def _line(label: str, text: str, width: int) -> Iterator[str]:
    """Lines of `width` with the label before the first."""
    room = max(20, width - LABEL)
    for i, part in enumerate(_wrapped(shown(text), room)):
        yield f"{label if i == 0 else '':<{LABEL}}{part}"


def _wrapped(text: str, room: int) -> Iterator[str]:
    """The text in lines at spaces; a word that is longer has a line of its own."""
    line = ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > room:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line
