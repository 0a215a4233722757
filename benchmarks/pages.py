"""The tables of docs/measurements/ that are made of files in benchmarks/results/.

    python -m benchmarks.pages      writes them anew, between `<!-- results: NAME -->` and `<!-- end -->`

`merging.experts --docs`, `pruning.quality --docs` and `paper --report` write the tables of their own pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.merging import rounding
from benchmarks.pruning import defaults
from benchmarks.serving import steps
from benchmarks.speed import closed_form, merge_speed

PAGES = ROOT / "docs" / "measurements"
MARKED = re.compile(r"(<!-- results: (\w+) -->)\n.*?(<!-- end -->)", re.DOTALL)


def speed(found: dict[str, Any]) -> str:
    """Memory first, then seconds: mergekit 0.1.5, deltamerge until its bytes are on the disk, a plain copy."""
    rows = [["method", "memory, MB", "CPU s", "mergekit, s", "deltamerge, s", "copy, s", "faster"]]
    for method, results in found["methods"].items():
        seconds = [
            merge_speed.middle(results, tool, key)
            for tool, key in (("mergekit", "wall"), ("deltamerge", "durable"), ("roofline", "wall"))
        ]
        memory, cpu = (
            " / ".join(f"{merge_speed.middle(results, tool, key):{form}}" for tool in ("mergekit", "deltamerge"))
            for key, form in (("anonymous", ".0f"), ("cpu", ".1f"))
        )
        rows.append([method, memory, cpu, *(f"{s:.2f}" for s in seconds), f"{seconds[0] / seconds[1]:.1f} ×"])
    return f"{merge_speed.table(rows)}\n\n{dated(found)}"


def dated(found: dict[str, Any]) -> str:
    """When, at which commit and on what a file of results was measured."""
    machine = found["machine"]
    return f"Measured on {found['date'][:10]} at {found['commit'][:9]}, {machine['cpu']}, {machine['cores']} cores."


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "speed": ("merge_speed_M", speed),
    "speed_methods": ("merge_speed_M_methods", speed),
    "speed_large": ("merge_speed_L", speed),
    "closed_form": ("closed_form", lambda found: f"{closed_form.markdown(found['methods'])}\n{dated(found)}"),
    "steps": ("steps", lambda found: "\n".join(steps.lines(found))),
    "defaults": ("defaults", defaults.markdown),
    "rounding": ("rounding", lambda found: f"{rounding.table(found)}\n{dated(found)}"),
}


def documented(page: str) -> str:
    """A page with its marked tables made anew."""

    def table(match: re.Match[str]) -> str:
        file, write = TABLES[match[2]]
        found = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        return f"{match[1]}\n{write(found).strip()}\n{match[3]}"

    return MARKED.sub(table, page)


def marked() -> dict[Path, str]:
    """The text of each page that has such a table."""
    texts = {page: page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md"))}
    return {page: text for page, text in texts.items() if MARKED.search(text)}


if __name__ == "__main__":
    for page, text in marked().items():
        page.write_text(documented(text), encoding="utf-8")
