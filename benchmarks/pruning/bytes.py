"""Bytes against skill: what a delta of so many bytes keeps of a fine-tune, by ours and by the field's methods.

    python -m benchmarks.pruning.bytes sentiment intensity            encoders (DELTAMERGE_SHARED, tasks)
    python -m benchmarks.pruning.bytes sentiment-slow sentiment-adamr    the same, made on first use, a minute each
    python -m benchmarks.pruning.bytes smollm2:sorting --ratios 128   a fine-tune of SMOLLM2 (benchmarks.smollm2)
    python -m benchmarks.pruning.bytes --page                         table and picture of what is kept

Each cell makes a delta of at most checkpoint / ratio bytes, puts it on the base, and measures the KL divergence of its
outputs from the fine-tune's on test rows (mean squared difference where the task is regression), and the score.
Decoders: KL of the answers' tokens, and the share of answers whose every token is the most likely one.

    ours         `extract --budget`, real files, headers and all; with the first 50 to 300 validation rows, labels
                 unread: those of a decoder have the fine-tune's own greedy answers
    all others   benchmarks.pruning.field, which says what each counts; where one needs rows, the first 50

Singular vectors of a model are computed once for all its cells, ours too; all else of ours is what the command does.
Results are added to benchmarks/results/bytes.json, and a cell that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load_file

from benchmarks import RESULTS, ROOT, process
from benchmarks.drawing import draw_lines
from benchmarks.pruning import field, quality
from benchmarks.pruning.field import Deltas, Made
from deltamerge.apps.chain.extract import extract
from deltamerge.errors import InputError
from deltamerge.methods.low_rank import Factors, Wanted, factor
from deltamerge.outputs import shares
from deltamerge.run.apply import apply
from deltamerge.run.options import Options

if TYPE_CHECKING:
    from benchmarks.pruning.subjects import Subject

FILE = RESULTS / "bytes.json"
PAGE = ROOT / "docs" / "measurements" / "bytes.md"
RATIOS = (8, 16, 32, 64, 128, 256, 512, 1024)


class Cell(NamedTuple):
    """A method at a ratio on a model."""

    model: str
    ratio: int
    method: str
    bytes: int
    kl: float
    score: float


# ---- ours: real files


def ours(one: Subject, budget: int, work: Path, find: Callable[..., Factors], rows: int) -> Made:
    """What `extract --budget` and `apply` make of so many rows, in this process."""
    calibration = None
    if rows:
        path = work / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in one.rows[:rows]), encoding="utf-8")
        calibration = {"data": str(path), "sequences": rows}
    before = shares.factor  # type: ignore[attr-defined]
    shares.factor = find  # type: ignore[attr-defined]
    try:
        extract(str(one.tuned.resolve()), str(one.base.resolve()), work / "d", size={"bytes": budget},
                calibration=calibration, options=Options(workers=1))  # fmt: skip
    finally:
        shares.factor = before  # type: ignore[attr-defined]
    apply(str(work / "d"), str(one.base.resolve()), work / "m", workers=1)
    nbytes = sum(path.stat().st_size for path in (work / "d").glob("delta*"))
    return Made(nbytes, load_file(work / "m" / "model.safetensors"))


def remembering() -> Callable[..., Factors]:
    """The factors of a budget's tensors, computed again only where more are wanted; left vectors are not looked at."""
    known: dict[tuple[int, int], tuple[int, Factors]] = {}

    def find(delta: Any, wanted: Wanted, key: tuple[int, int]) -> Factors:
        rank = wanted.rank or min(delta.shape)
        if key not in known or known[key][0] < rank:
            most = max(rank, AT_LEAST)
            found = factor(delta, Wanted(most), key)
            known[key] = most, replace(found, b=found.b[:, :0])
        whole = known[key][1]
        return replace(whole, a=whole.a[:rank], energies=whole.energies[:rank], gains=whole.gains[:rank])

    return find


AT_LEAST = 64  # factors that are computed of a tensor
OURS = {"ours": 0} | {f"ours with {count} rows": count for count in (50, 100, 150, 300)}
METHODS = (*OURS, *field.METHODS)


def known(file: Path) -> list[Cell]:
    if not file.exists():
        return []
    return [Cell(**one) for one in json.loads(file.read_text(encoding="utf-8"))["cells"]]


def keep(file: Path, cell: Cell, whole: float) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"fine-tunes": {}, "cells": []}
    found["fine-tunes"][cell.model] = round(whole, 2)
    found["cells"].append(cell._asdict())
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def measure(file: Path, name: str, wanted: Iterable[tuple[int, str]], count: int) -> None:
    """Add the cells of a model that the file lacks: ratios and methods."""
    from benchmarks.pruning.subjects import moments, subject

    done = {(cell.ratio, cell.method) for cell in known(file) if cell.model == name}
    wanted = [cell for cell in wanted if cell not in done]
    if not wanted:
        return
    one = subject(name, count)
    deltas = Deltas(one.base, one.tuned, partial(moments, one), one.distance)
    whole, find = (one.tuned / "model.safetensors").stat().st_size, remembering()
    for ratio, method in wanted:
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as work:
            try:
                if method in OURS:
                    made = ours(one, whole // ratio, Path(work), find, OURS[method])
                else:
                    made = field.METHODS[method](deltas, whole // ratio, Path(work))
            except InputError as error:
                print(f"{name} 1/{ratio} {method}: {error}", flush=True)
                continue
            kl, score = one.measure(made.state)
        keep(file, Cell(name, ratio, method, made.nbytes, float(f"{kl:.4g}"), round(score, 2)), one.score)
        print(f"{name} 1/{ratio} {method}: {made.nbytes:,} of {whole // ratio:,} bytes, KL {kl:.4g}, {score:.1f} "
              f"of {one.score:.1f}, {time.process_time() - begun:.0f} s", flush=True)  # fmt: skip


# ---- the page


def tables(cells: Sequence[Cell], whole: Mapping[str, float]) -> str:
    lines: list[str] = []
    for model in dict.fromkeys(cell.model for cell in cells):
        own = [cell for cell in cells if cell.model == model]
        ratios = sorted({cell.ratio for cell in own})
        lines += [f"**{model}** (fine-tune {whole[model]:.1f}): KL / score", ""]
        lines += ["| method | " + " | ".join(f"1/{ratio}" for ratio in ratios) + " |", "|---" * (1 + len(ratios)) + "|"]
        for method in METHODS:
            row = {cell.ratio: f"{cell.kl:.3g} / {cell.score:.1f}" for cell in own if cell.method == method}
            if row:
                lines.append(f"| {method} | " + " | ".join(row.get(ratio, "–") for ratio in ratios) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(cells: Sequence[Cell], whole: Mapping[str, float], path: Path) -> None:
    """KL and score by bytes, two panels for each model."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.model, METHODS.index(cell.method), cell.ratio)):
        for what, value in (("KL", math.log10(max(cell.kl, 1e-5))), ("score", cell.score)):
            own = panels.setdefault(f"{cell.model}: {what}", {}).setdefault(cell.method, [])
            own.append((cell.bytes / 1000, value))
    levels = {f"{model}: score": {"fine-tune": score} for model, score in whole.items()}
    title = "What a delta of so many bytes keeps of a fine-tune"
    words = ["log10 of the KL" if "KL" in head else "score" for head in panels]
    draw_lines(path, title, panels, "kilobytes", words, levels=levels)


def scores(file: Path) -> dict[str, float]:
    """The score of each fine-tune."""
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["fine-tunes"]
    return found


def documented(text: str, file: Path = FILE) -> str:
    """The page with the tables of the results between its marks."""
    before, _, rest = text.partition("<!-- tables -->\n")
    after = rest.partition("<!-- end -->")[2]
    return f"{before}<!-- tables -->\n\n{tables(known(file), scores(file))}\n<!-- end -->{after}"


def page() -> None:
    """Write the page's tables, and the picture beside it."""
    PAGE.write_text(documented(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(known(FILE), scores(FILE), PAGE.parent / "pictures" / "bytes.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", help="sentiment, intensity, sentiment-slow, sentiment-adamr, or smollm2:NAME"
    )
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--rows", type=int, default=600, help="test rows of encoders; decoders take 100 at most")
    parser.add_argument("--out", type=Path, default=FILE, help="results that cells are added to")
    parser.add_argument("--page", action="store_true", help="write docs/measurements/bytes.md and its picture")
    asked = parser.parse_args()
    quality.quiet()
    wanted = [(ratio, method) for ratio in asked.ratios for method in asked.methods]
    for name in asked.models:
        measure(asked.out, name, [cell for cell in wanted if cell[1] != "BitDelta" or cell[0] == 16], asked.rows)
    if asked.page:
        page()


if __name__ == "__main__":
    process.keep_pages()
    main()
