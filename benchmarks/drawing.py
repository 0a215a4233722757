"""Draw the results of benchmarks in the style of deltamerge's reports: SVG, light and dark, the answer as title."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deltamerge.apps.report.svg import STYLE, Panel, Point, bars, lines, picture

MOST = 12  # rows of bars
Points = Sequence[tuple[float, float]]


def draw_lines(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, Points]],
    x: str,
    y: Sequence[str],
    *,
    levels: Mapping[str, Mapping[str, float]] | None = None,
    spread: Mapping[str, Mapping[str, Mapping[float, float]]] | None = None,
) -> None:
    """Write panels (title -> label -> points) side by side, two a row, below the title that has the answer.

    x, y     names of the axes, of y one a panel
    levels   by panel and label, values that dashed lines show
    spread   by panel, label and place, the standard deviation there
    """
    made = []
    for (head, curves), upward in zip(panels.items(), y, strict=True):
        chart = lines(
            head, x, upward, curves, (spread or {}).get(head, {}), levels=(levels or {}).get(head),
        )  # fmt: skip
        made.append(Panel(head, "", chart))
    _write(path, title, made)


def draw_bars(path: Path, title: str, panels: Mapping[str, Sequence[Point]], words: str) -> None:
    """Write panels (title -> bars) below the title that has the answer. Values are in %.

    `words` say what bar and tick are. The first `MOST` of each panel are drawn.
    """
    made = [Panel(head, words, bars(head, points[:MOST], form=".1f", whole=100.0)) for head, points in panels.items()]
    _write(path, title, made)


def _write(path: Path, title: str, panels: Sequence[Panel]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    path.write_text(picture(rows, STYLE, title) + "\n", encoding="utf-8")
