"""Charts of several named lines over one axis, and of points in a plane with a front: for sweeps and searches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from deltamerge.apps.report.svg import ABOVE, TALL, Axis, Frame, Markup, element, figure, text

# Told apart on light and dark pages, by people who see few colours too (Okabe and Ito).
COLOURS = ("#2268c0", "#d9541e", "#009e73", "#b8860b", "#8a3fb0", "#56b4e9", "#c2185b", "#6b6a64")
DASHES = ("none", "6 3", "2 3")
Points = Sequence[tuple[float, float]]
ROW = 18


def lines(
    label: str,
    across: str,
    upward: str,
    series: Mapping[str, Points],
    spread: Mapping[str, Mapping[float, float]],
    *,
    joined: frozenset[str] | None = None,
) -> Markup:
    """A line for each name over one axis, logarithmic where its values are positive and span a factor of ten.

    label    describes the chart
    across, upward   names of the axes
    series   points by name
    spread   by name and place on the axis the standard deviation there, drawn as a bar
    joined   names whose points are joined; None: all, and the axis is logarithmic where it can be
    """
    points = [point for one in series.values() for point in one if all(map(math.isfinite, point))]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    logarithmic = joined is None and bool(xs) and min(xs) > 0 and max(xs) >= 10 * min(xs)
    frame = Frame(Axis.log(xs, whole=False) if logarithmic else Axis.linear(xs), Axis.linear(ys))
    shapes = frame.rules(across, upward)
    for i, (name, some) in enumerate(series.items()):
        style = (
            f"stroke:{COLOURS[i % len(COLOURS)]};stroke-width:1.8px;stroke-dasharray:{DASHES[i // len(COLOURS) % 3]}"
        )
        path = sorted(point for point in some if all(map(math.isfinite, point)))
        if joined is None or name in joined:
            shapes += [_line(frame, a, b, style) for a, b in pairwise(path)]
        for x, y in path:
            deviation = spread.get(name, {}).get(x, 0.0)
            if deviation:
                shapes.append(_line(frame, (x, y - deviation), (x, y + deviation), style))
            words = f"{name}: {figure(y, '.4g')} at {x:g}" + (f" ± {deviation:.2g}" if deviation else "")
            shapes.append(_dot(frame, (x, y), words, COLOURS[i % len(COLOURS)], name))
    foot = ABOVE + TALL + 44
    for i, name in enumerate(series):
        y = foot + ROW * (i + 1)
        colour = COLOURS[i % len(COLOURS)]
        style = f"stroke:{colour};stroke-width:2.5px;stroke-dasharray:{DASHES[i // len(COLOURS) % 3]}"
        shapes.append(element("line", x1="0", x2="6%", y1=y - 4, y2=y - 4, style=style))
        shapes.append(element("text", text(name), x="8%", y=y, class_="quiet"))
    height = foot + ROW * len(series) + 6
    return element("svg", *shapes, width="100%", height=f"{height:g}", role="img", aria_label=label)


def front(label: str, across: str, upward: str, points: Sequence[tuple[float, float, str, bool]]) -> Markup:
    """Points (x, y, words, whether it is on the front), those of the front joined."""
    good = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
    frame = Frame(Axis.linear([x for x, *_ in good]), Axis.linear([y for _, y, *_ in good]))
    shapes = frame.rules(across, upward)
    best = sorted((x, y) for x, y, _, on in good if on)
    style = f"stroke:{COLOURS[1]};stroke-width:1.8px"
    shapes += [_line(frame, a, b, style) for a, b in pairwise(best)]
    shapes += [_dot(frame, (x, y), words, COLOURS[on], words) for x, y, words, on in good]
    height = ABOVE + TALL + 44
    return element("svg", *shapes, width="100%", height=f"{height:g}", role="img", aria_label=label)


def _line(frame: Frame, a: tuple[float, float], b: tuple[float, float], style: str) -> Markup:
    ends = {f"{key}{n}": place for n, (x, y) in enumerate((a, b), 1) for key, place in (
        ("x", f"{100 * frame.across(x):.6g}%"), ("y", f"{frame.down(y):.6g}"))}  # fmt: skip
    return element("line", **ends, style=style)


def _dot(frame: Frame, point: tuple[float, float], words: str, colour: str, name: str) -> Markup:
    where = {"cx": f"{100 * frame.across(point[0]):.6g}%", "cy": f"{frame.down(point[1]):.6g}"}
    return element(
        "circle", element("title", text(words)), **where, r=3.5, style=f"fill:{colour}", data_name=name,
        data_x=point[0], data_value=point[1],
    )  # fmt: skip
