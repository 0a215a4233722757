"""The table and the picture of docs/measurements/merging.md, from benchmarks/results/merging.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks import ROOT

DOCS = ROOT / "docs" / "measurements"
PAGE, PICTURE = DOCS / "merging.md", DOCS / "pictures" / "merging.png"


def write(found: dict[str, Any]) -> None:
    PAGE.write_text(documented(found, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(found, PICTURE)


def documented(found: dict[str, Any], page: str) -> str:
    """The page with what stands between `<!-- merging: NAME -->` and `<!-- end -->` made anew."""
    tables = {"methods": methods, "tasks": tasks}

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]](found)}{match[3]}"

    return re.sub(r"(<!-- merging: (\w+) -->)\n.*?(<!-- end -->)", table, page, flags=re.DOTALL)


def ordered(found: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """Delta -> cell for each method, the best unpruned mean first."""
    by_merge: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in found["cells"]:
        by_merge.setdefault(cell["merge"], {})[cell["delta"]] = cell
    return sorted(by_merge.values(), key=lambda cells: -cells["unpruned"]["mean"] if "unpruned" in cells else 0.0)


def methods(found: dict[str, Any]) -> str:
    """Mean / worst share of each method, by kind of delta, and the cost of a merge of the unpruned."""
    deltas = list(dict.fromkeys(cell["delta"] for cell in found["cells"]))
    lines = [["method", "λ", *deltas, "CPU s", "peak MB"], ["---"] * (len(deltas) + 4)]
    for cells in ordered(found):
        one = cells.get("unpruned") or next(iter(cells.values()))
        shown = [_ends(cells[delta], spread=delta == "unpruned") if delta in cells else "–" for delta in deltas]
        factor = "–" if one["factor"] is None else f"{one['factor']:.3g}"
        name = one["merge"] + ", a model per task" * one["task"]
        lines.append([name, factor, *shown, f"{one['cpu_s']:.0f}", f"{one['peak_mb']}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ends(cell: dict[str, Any], spread: bool) -> str:
    mean, worst = (f" ± {s}" if spread else "" for s in cell["spread"])
    return f"{cell['mean']}{mean} / {cell['worst']}{worst}"


def tasks(found: dict[str, Any]) -> str:
    """Shares by task of the unpruned merges; the experts' own scores above."""
    names = list(found["own"])
    lines = [
        ["", *names],
        ["---"] * (len(names) + 1),
        ["*expert's score*", *(f"{v:.1f}" for v in found["own"].values())],
    ]
    for cells in ordered(found):
        if "unpruned" in cells:
            shares = cells["unpruned"]["shares"]
            lines.append([cells["unpruned"]["merge"], *(f"{shares[n]:.0f}" if n in shares else "–" for n in names)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Mean share of each method as a bar for each kind of delta, the worst task as a dot; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = ordered(found)
    deltas = list(dict.fromkeys(cell["delta"] for cell in found["cells"]))
    figure = Figure(figsize=(8, 1.2 + 0.16 * len(found["cells"]) + 0.15 * len(rows)), layout="constrained")
    axes = figure.subplots()
    at, ticks = 0.0, []
    for cells in rows:
        ticks.append((at + 0.4 * (len(cells) - 1), next(iter(cells.values()))["merge"]))
        for delta, cell in cells.items():
            bar = f"C{deltas.index(delta)}"
            axes.barh(at, cell["mean"], height=0.7, xerr=cell["spread"][0], color=bar, ecolor="0.3", label=delta)
            axes.plot(max(cell["worst"], 0), at, "k.", markersize=5)
            at += 0.8
        at += 0.5
    axes.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.axvline(95, color="0.6", linestyle=":")
    axes.set_xlabel("% of the experts' scores: mean (bar, ± standard deviation), worst task (dot)")
    legend = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(legend.values(), legend.keys(), fontsize=8, loc="lower right")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
