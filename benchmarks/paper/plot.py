"""Lines in panels, as every figure here has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Points = Sequence[tuple[float, float]]


def lines(
    path: Path,
    panels: Mapping[str, Mapping[str, Points]],
    x: str,
    y: Sequence[str],
    *,
    log: bool = True,
    level: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """A PNG of panels (title -> label -> points) side by side, with a y label each; `level` draws dotted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(panels), 3.6), layout="constrained")
    for axes, (title, curves), label in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), y, strict=True
    ):
        colours = {}
        for name, points in curves.items():
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            colours[name] = line.get_color()
        for name, value in (level or {}).get(title, {}).items():
            axes.axhline(value, linestyle=":", color=colours.get(name, "0.5"), label=None if name in colours else name)
        if log:
            axes.set_xscale("log")
        axes.set(title=title, xlabel=x, ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
