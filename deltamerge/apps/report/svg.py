"""Markup of pages and charts: elements with escaped text, the style, and SVG that stretches without stretching text.

Charts have no viewBox: horizontal places are percent, vertical ones pixels. Colours are the page's CSS. Every shape has
its figure in `data-value` and its description in `<title>`. A figure that is None or not finite is a dash.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NewType

Markup = NewType("Markup", str)
Attributes = dict[str, str | float]
SHOWN = 34
FAINT = 0.08
LAYER = "layer"  # the name of the axis that counts blocks
EXTREME = 1e100  # larger than any figure of a model
# Told apart on light and dark pages, by people who see few colours too (Okabe and Ito).
COLOURS = ("#2268c0", "#d9541e", "#009e73", "#b8860b", "#8a3fb0", "#56b4e9", "#c2185b", "#6b6a64")
DASHES = ("none", "6 3", "2 3")
Points = Sequence[tuple[float, float]]
ROW = 18
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --card: #fff; --ink: #1c1c1a; --quiet: #63625d; --line: #e2e1dc;
  --one: #2268c0; --two: #d9541e; --on: #fff; --mid: #1c1c1a; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --ink: #f1f0ec; --quiet: #a9a8a1;
  --line: #383733; --one: #62a5f2; --two: #f08a5c; --on: #10151c; --mid: #10151c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem clamp(.7rem, 3vw, 2.5rem) 3rem; max-width: 90rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: .95rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
p { margin: 0 0 .8rem; max-width: 46rem; color: var(--quiet); overflow-wrap: anywhere; }
.conclusion { color: var(--ink); font-size: 1.05rem; margin: .8rem 0; max-width: 52rem; }
.warning { color: var(--two); font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .9rem;
  align-items: start; }
.grid + .grid { margin-top: .9rem; }
.stack { display: grid; gap: .9rem; min-width: 0; }
.wide { grid-template-columns: repeat(auto-fit, minmax(max(40%, min(100%, 27rem)), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tiles .card { padding: .6rem .8rem; color: var(--quiet); font-size: .85rem; }
.tiles b { display: block; font-size: 1.25rem; font-weight: 600; color: var(--ink); }
.scale { display: flex; align-items: center; gap: .5rem; font-size: 12px; color: var(--quiet); margin-top: .4rem; }
.scale i { flex: 0 1 9rem; height: 9px; border-radius: 3px;
  background: linear-gradient(90deg, color-mix(in srgb, var(--one) 8%, transparent), var(--one)); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: 13px; color: var(--quiet); margin-bottom: .6rem; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: .4rem;
  background: var(--one); }
.key i.second { background: var(--two); }
.key i.best { background: var(--card); border: 2px solid var(--two); }
.key i.dashed { border-radius: 0; width: 16px; height: 0; margin-bottom: .25rem; background: none;
  border-top: 2px dashed var(--quiet); }
svg { display: block; overflow: visible; font-size: 12px; } svg .page { fill: var(--page); }
svg .title { font-size: 16px; font-weight: 600; }
svg text { fill: var(--ink); } svg .quiet { fill: var(--quiet); font-size: 11px; } svg .on { fill: var(--on); }
svg .mid { fill: var(--mid); } svg .name, svg .value { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg .value, svg .in, svg .mid, svg .on { font-variant-numeric: tabular-nums; }
.bar, .cell { fill: var(--one); } .cell, .none { stroke: var(--card); }
.none, .track { fill: var(--line); fill-opacity: .5; } .axis, svg .rule { stroke: var(--line); }
svg .one { stroke: var(--quiet); stroke-dasharray: 3 3; } .mark { stroke: var(--two); stroke-width: 2.5px; }
.join { stroke: var(--quiet); stroke-opacity: .5; stroke-width: 2px; }
.first { fill: var(--one); } .second { fill: var(--two); } .path { stroke: var(--one); stroke-width: 1.5px; }
.path.second { stroke: var(--two); } .best { fill: none; stroke: var(--two); stroke-width: 2.5px; }
svg .reference { stroke: var(--quiet); stroke-width: 1.5px; stroke-dasharray: 5 4; }
details { margin-top: 1.6rem; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 420px) { svg .name, svg .value { font-size: 11px; } .card { padding: .8rem .7rem; } }
.scroll { overflow-x: auto; background: linear-gradient(90deg, var(--page) 30%, transparent) left / 3rem 100% local,
  linear-gradient(270deg, var(--page) 30%, transparent) right / 3rem 100% local,
  linear-gradient(90deg, var(--quiet), transparent) left / .6rem 100% scroll,
  linear-gradient(270deg, var(--quiet), transparent) right / .6rem 100% scroll; background-repeat: no-repeat; }
 table { border-collapse: collapse; font-size: 13px; margin-top: .6rem; }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
"""


def text(words: str) -> Markup:
    """Escape `words` for text and attributes. Controls, lone surrogates and marks of direction become �."""
    return Markup(html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)))


def element(tag: str, *children: Markup, **attributes: str | float) -> Markup:
    """Return `<tag …>children</tag>`. The attribute `class_` becomes class, `data_value` data-value."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{text(str(v))}"' for name, v in attributes.items())
    return Markup(f"<{tag}{given}>{''.join(children)}</{tag}>")


def short(name: str) -> str:
    """Shorten a name to fit a narrow page: the middle of a long one is left out."""
    return name if len(name) <= SHOWN else f"{name[:6]}…{name[7 - SHOWN :]}"


def figure(value: float | None, form: str = ".3g") -> str:
    """Return the value in a format, or a dash."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


@dataclass(frozen=True, slots=True)
class Point:
    """A figure with its name. `mark`, of the same unit, is compared with it; `note` replaces the number."""

    name: str
    value: float | None
    mark: float | None = None
    note: str | None = None


def _percent(part: float) -> str:
    return f"{100 * part:.6g}%"


def _finite(*values: float | None) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


@dataclass(frozen=True, slots=True)
class Axis:
    """Places of values on an axis, from 0 to 1; logarithmic or linear, with ticks at round numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool

    @classmethod
    def log(cls, values: Sequence[float], *, whole: bool = True) -> Axis:
        """Return a logarithmic axis for positive values; others are at its start. `whole`: between powers of ten."""
        found = [v for v in _finite(*values) if 1 / EXTREME < v < EXTREME] or [1.0]
        low, high = math.log10(min(found)), math.log10(max(found))
        first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
        if whole or high - low < 1e-9:
            low, high, whole = first, max(last, first + 1), True
        else:
            low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
        every = math.ceil((high - low) / 6)
        powers = [10.0**p for p in range(first, math.ceil(high) + 1) if (p - first) % every == 0]
        steps = (1,) if whole or high - low > 2 else (1, 2, 5)
        ticks = [step * power for power in powers for step in steps]
        return cls(low, high, tuple(t for t in ticks if low - 1e-9 <= math.log10(t) <= high + 1e-9), True)

    @classmethod
    def linear(cls, values: Sequence[float]) -> Axis:
        """Return a linear axis, with a little room at both ends."""
        found = [v for v in _finite(*values) if abs(v) < EXTREME] or [0.0]
        low, high = min(found), max(found)
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
        step = 10.0 ** math.floor(math.log10((high - low) / 2))
        step *= next(s for s in (1, 2, 5, 10) if (high - low) / (s * step) <= 5)
        ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return cls(low, high, tuple(ticks), False)

    def place(self, value: float) -> float:
        """Return the place of a value, from 0 to 1."""
        if self.logarithmic:
            value = math.log10(value) if value > 0 else self.low
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def _svg(height: float, label: str, shapes: Sequence[Markup]) -> Markup:
    return element("svg", *shapes, width="100%", height=f"{height:g}", role="img", aria_label=label)


def _words(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "quiet") -> Markup:
    return element("text", text(words), x=_percent(x), y=y, text_anchor=anchor, class_=kind)


def _title(words: str) -> Markup:
    return element("title", text(words))


def columns(label: str, points: Sequence[Point], *, form: str = ".3g") -> Markup:
    """Draw vertical bars from 0 to the largest, one for each layer, with as many labels as fit."""
    top = max(_finite(*(p.value for p in points)), default=0.0) or 1.0
    count, space, floor = len(points), 110.0, 130.0
    width = min(0.7 / count, 0.12)
    every = math.ceil(count / 12)
    shapes = [element("line", x1="0", x2="100%", y1=floor, y2=floor, class_="axis")]
    shapes.append(_words(0.5, floor + 33, LAYER, anchor="middle"))
    for i, point in enumerate(points):
        middle, value = (i + 0.5) / count, point.value
        if i % every == 0:
            shapes.append(_words(middle, floor + 16, point.name, anchor="middle"))
        if not _finite(value) or value is None:
            continue
        height = space * value / top
        where: Attributes = {"x": _percent(middle - width / 2), "width": _percent(width)}
        where |= {"y": floor - height, "height": height}
        title = _title(f"{point.name}: {figure(value, form)}")
        shapes.append(element("rect", title, **where, class_="bar", data_name=point.name, data_value=value))
        if count <= 8 or value == top:
            anchor = "middle" if 0.08 < middle < 0.92 else "start" if middle < 0.5 else "end"
            shapes.append(_words(middle, floor - height - 5, figure(value, form), anchor=anchor, kind="value"))
    return _svg(floor + 39, label, shapes)


def bars(label: str, points: Sequence[Point], *, form: str = ".3g", whole: float | None = None) -> Markup:
    """Draw horizontal bars from 0 to the largest, or to `whole`, each below its name and number.

    `mark` is a tick across it.
    """
    top = whole or max(_finite(*(p.value for p in points), *(p.mark for p in points)), default=0.0) or 1.0
    shapes = []
    for i, point in enumerate(points):
        y, number = 36 * i, point.note or figure(point.value, form)
        shapes += [
            _words(0, y + 13, short(point.name), kind="name"),
            _words(1, y + 13, number, anchor="end", kind="value"),
        ]
        title = _title(f"{point.name}: {number}")
        if whole:
            shapes.append(element("rect", x="0", y=y + 19, width="100%", height=9, class_="track"))
        if point.value is not None and _finite(point.value):
            size: Attributes = {"width": _percent(point.value / top), "height": 9}
            extra: Attributes = {"data_name": point.name, "data_value": point.value}
            shapes.append(element("rect", title, x="0", y=y + 19, **size, class_="bar", **extra))
        if point.mark is not None and _finite(point.mark):
            x = _percent(point.mark / top)
            shapes.append(element("line", x1=x, x2=x, y1=y + 16, y2=y + 31, class_="mark", data_value=point.mark))
    return _svg(36 * len(points), label, shapes)


def heat(
    label: str,
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    low: float,
    top: float,
    *,
    form: str = ".3g",
) -> Markup:
    """Draw rows of cells below their names, a cell for each layer.

    label   describes the chart
    heads   of the columns
    rows    (name, values)
    low     value of the faintest colour
    top     value of the full colour
    form    format of the values
    """
    count, high = len(heads), 46
    edge = 1.5 if count <= 24 else 0.4
    every = math.ceil(count / 12)
    shapes = []
    for j, (name, values) in enumerate(rows):
        y = high * j
        shapes.append(_words(0, y + 13, short(name), kind="name"))
        for i, (head, value) in enumerate(zip(heads, values, strict=True)):
            box: Attributes = {"x": _percent(i / count), "width": _percent(1 / count), "y": y + 18, "height": 22}
            box |= {"data_layer": head, "data_module": name, "class_": "none", "stroke_width": edge}
            words, part = figure(value, form), 0.0
            if value is not None and _finite(value):
                part = min(1.0, max(0.0, (value - low) / (top - low))) if top > low else 0.0
                box |= {"class_": "cell", "fill_opacity": f"{FAINT + (1 - FAINT) * part:.4f}", "data_value": value}
            shapes.append(element("rect", _title(f"{name}, layer {head}: {words}"), **box))
            if count <= 6:
                kind = "on" if part > 0.85 else "mid" if part > 0.65 else "in"
                shapes.append(_words((i + 0.5) / count, y + 33, words, anchor="middle", kind=kind))
    foot = high * len(rows) + 15
    shapes += [_words((i + 0.5) / count, foot, heads[i], anchor="middle") for i in range(0, count, every)]
    shapes.append(_words(0.5, foot + 17, LAYER, anchor="middle"))
    return _svg(foot + 23, label, shapes)


def pairs(label: str, name: str, points: Sequence[Point]) -> Markup:
    """Draw a row for each point, below its name.

    `value` and `mark` are on one logarithmic axis called `name`, joined by a line.
    """
    axis = Axis.log([v for p in points for v in _finite(p.value, p.mark)], whole=False)
    bottom = 42 * len(points)

    def place(value: float) -> float:
        return 0.02 + 0.96 * axis.place(value)

    shapes = []
    for tick in axis.ticks:
        x = _percent(place(tick))
        shapes.append(element("line", x1=x, x2=x, y1=0, y2=bottom, class_="one" if tick == 1 else "rule"))
        anchor = "start" if tick == axis.ticks[0] else "end" if tick == axis.ticks[-1] else "middle"
        shapes.append(_words(place(tick), bottom + 15, f"{tick:g}", anchor=anchor))
    for i, point in enumerate(points):
        y = 42 * i + 26
        numbers = f"{figure(point.value)} → {figure(point.mark)}"
        shapes += [
            _words(0, y - 13, short(point.name), kind="name"),
            _words(1, y - 13, numbers, anchor="end", kind="value"),
        ]
        ends = [(v, kind) for v, kind in ((point.value, "first"), (point.mark, "second")) if _finite(v)]
        places = [_percent(place(v)) for v, _ in ends if v is not None]
        if len(places) == 2:
            shapes.append(element("line", x1=places[0], x2=places[1], y1=y, y2=y, class_="join"))
        for (v, kind), x in zip(ends, places, strict=True):
            title = _title(f"{point.name}: {figure(v)}")
            shape: Attributes = {"class_": kind, "data_name": point.name, "data_value": v or 0.0}
            shapes.append(element("circle", title, cx=x, cy=y, r=5, **shape))
    shapes.append(_words(0.5, bottom + 33, name, anchor="middle"))
    return _svg(bottom + 39, label, shapes)


LEFT, RIGHT, ABOVE, TALL = 0.12, 0.97, 26.0, 200.0


@dataclass(frozen=True, slots=True)
class Frame:
    """The plane of a chart with two axes: horizontal places in percent, vertical ones in pixels."""

    x: Axis
    y: Axis

    def across(self, value: float) -> float:
        """Return the horizontal place of a value."""
        return LEFT + (RIGHT - LEFT) * self.x.place(value)

    def down(self, value: float) -> float:
        """Return the vertical place of a value."""
        return ABOVE + TALL * (1 - self.y.place(value))

    def rules(self, across: str, upward: str) -> list[Markup]:
        """Both axes' ticks, with the names of the horizontal axis below and of the vertical one above."""
        shapes = [_words(0, 11, upward)]
        for tick in self.y.ticks:
            y = self.down(tick)
            shapes.append(element("line", x1=_percent(LEFT), x2=_percent(RIGHT), y1=y, y2=y, class_="rule"))
            shapes.append(_words(LEFT - 0.015, y + 4, f"{tick:.4g}", anchor="end"))
        floor = ABOVE + TALL
        shapes.append(element("line", x1=_percent(LEFT), x2=_percent(RIGHT), y1=floor, y2=floor, class_="axis"))
        shapes += [_words(self.across(tick), floor + 16, f"{tick:g}", anchor="middle") for tick in self.x.ticks]
        return [*shapes, _words((LEFT + RIGHT) / 2, floor + 34, across, anchor="middle")]

    def dot(self, x: float, y: float, words: str, kind: str, radius: float = 4) -> Markup:
        """Return a point with a description."""
        where: Attributes = {"cx": _percent(self.across(x)), "cy": f"{self.down(y):.6g}", "r": radius}
        return element("circle", _title(words), **where, class_=kind, data_x=x, data_value=y)


def curve(
    label: str,
    across: str,
    upward: str,
    series: Sequence[Sequence[tuple[float, float]]],
    *,
    logarithmic: bool,
    reference: float | None = None,
    best: tuple[float, float] | None = None,
) -> Markup:
    """Draw points joined by a line, in order of their first number.

    label         describes the chart
    across        name of the horizontal axis
    upward        name of the vertical axis
    series        lists of points; a second list gets the second colour
    logarithmic   whether the horizontal axis is
    reference     value of a dashed line
    best          the point to mark
    """
    points = [(x, y) for one in series for x, y in one if _finite(x, y)]
    xs = [x for x, _ in points] + _finite(reference)
    frame = Frame(Axis.log(xs, whole=False) if logarithmic else Axis.linear(xs), Axis.linear([y for _, y in points]))
    shapes = frame.rules(across, upward)
    if reference is not None and _finite(reference):
        x = _percent(frame.across(reference))
        shapes.append(element("line", x1=x, x2=x, y1=ABOVE, y2=ABOVE + TALL, class_="reference", data_value=reference))
    for kind, one in zip(("first", "second"), series, strict=False):
        path = sorted((x, y) for x, y in one if _finite(x, y) and (x > 0 or not logarithmic))
        for (x1, y1), (x2, y2) in pairwise(path):
            ends: Attributes = {"x1": _percent(frame.across(x1)), "x2": _percent(frame.across(x2))}
            ends |= {"y1": f"{frame.down(y1):.6g}", "y2": f"{frame.down(y2):.6g}"}
            shapes.append(element("line", **ends, class_=f"path {kind}"))
        shapes += [frame.dot(x, y, f"{x:.4g}: {y:.6g}", kind, 3) for x, y in path]
    if best is not None and _finite(*best) == list(best):
        shapes.append(frame.dot(*best, f"{best[0]:.4g}: {best[1]:.6g}", "best", 7))
    return _svg(ABOVE + TALL + 40, label, shapes)


def scatter(
    label: str, across: str, upward: str, series: Sequence[Sequence[tuple[str, float | None, float | None]]]
) -> Markup:
    """Draw two figures of one unit for each name, on logarithmic axes, with the line of equality.

    The first is horizontal, on the axis `across`. The second is vertical, on the axis `upward`.
    """
    values = [v for one in series for _, x, y in one for v in _finite(x, y)]
    axis = Axis.log(values, whole=False)
    frame = Frame(axis, axis)
    low, high = (10.0**v for v in (axis.low, axis.high))
    ends: Attributes = {"x1": _percent(frame.across(low)), "x2": _percent(frame.across(high))}
    ends |= {"y1": frame.down(low), "y2": frame.down(high)}
    shapes = [*frame.rules(across, upward), element("line", **ends, class_="one")]
    for kind, one in zip(("first", "second"), series, strict=False):
        for words, x, y in one:
            if x is not None and y is not None and min(_finite(x, y), default=0.0) > 0 and len(_finite(x, y)) == 2:
                shapes.append(frame.dot(x, y, f"{words}: {figure(x)}, {figure(y)}", kind))
    return _svg(ABOVE + TALL + 40, label, shapes)


WIDTH, HEAD, MARGIN = 440, 44, 0.03
TITLE = 40  # characters of a title's line on the width of a panel


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart of a picture, below a title and a line of words."""

    title: str
    words: str
    chart: Markup

    @property
    def height(self) -> float:
        """Pixels, as the chart states them, with the head."""
        return HEAD + float(self.chart.partition(' height="')[2].partition('"')[0])


def picture(rows: Sequence[Sequence[Panel]], style: str, title: str = "") -> Markup:
    """Draw rows of panels as one SVG file below a title, coloured by the page's `style`."""
    across, y, shapes = max(map(len, rows)), 10.0, [element("rect", width="100%", height="100%", class_="page")]
    for line in textwrap.wrap(title, TITLE * across):
        y += 24
        shapes.append(element("text", text(line), x=_percent(MARGIN / across), y=y, class_="title"))
    y += 16 if title else 0
    for row in rows:
        for i, panel in enumerate(row):
            head = [_words(0, 14, panel.title, kind="name"), _words(0, 30, panel.words)]
            chart = element("g", panel.chart, transform=f"translate(0 {HEAD})")
            where: Attributes = {"x": _percent((i + MARGIN) / across), "width": _percent((1 - 2 * MARGIN) / across)}
            shapes.append(element("svg", *head, chart, **where, y=y, height=panel.height))
        y += max(panel.height for panel in row) + 10
    root: Attributes = {"xmlns": "http://www.w3.org/2000/svg", "font_family": "system-ui, sans-serif"}
    root |= {"width": WIDTH * across, "height": f"{y:g}", "role": "img"}
    return element("svg", element("style", Markup(style)), *shapes, **root)


def lines(
    label: str,
    across: str,
    upward: str,
    series: Mapping[str, Points],
    spread: Mapping[str, Mapping[float, float]],
    *,
    joined: frozenset[str] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Markup:
    """Draw a line for each name over one axis. It is logarithmic if its values are positive and span a factor of ten.

    label    describes the chart
    across, upward   names of the axes
    series   points by name
    spread   standard deviations by name and place on the axis, drawn as bars
    joined   names whose points are joined; None: all, and the axis is logarithmic if it can be
    levels   values by name, drawn as dashed lines in the colour of the series
    """
    points = [point for one in series.values() for point in one if all(map(math.isfinite, point))]
    levels = levels or {}
    xs, ys = [x for x, _ in points], [*(y for _, y in points), *levels.values()]
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
    names = list(series)
    for name, level in levels.items():
        colour = f"stroke:{COLOURS[names.index(name) % len(COLOURS)]}" if name in series else ""
        across_it: Attributes = {"x1": _percent(LEFT), "x2": _percent(RIGHT)}
        across_it |= dict.fromkeys(("y1", "y2"), f"{frame.down(level):.6g}")
        shapes.append(element("line", **across_it, class_="reference", style=colour))
        if name not in series:
            shapes.append(_words(RIGHT, frame.down(level) - 5, name, anchor="end"))
    foot = ABOVE + TALL + 44
    for i, name in enumerate(series):
        y = foot + ROW * (i + 1)
        colour = COLOURS[i % len(COLOURS)]
        if joined is None or name in joined:
            style = f"stroke:{colour};stroke-width:2.5px;stroke-dasharray:{DASHES[i // len(COLOURS) % 3]}"
            shapes.append(element("line", x1="0", x2="6%", y1=y - 4, y2=y - 4, style=style))
        else:
            shapes.append(element("circle", cx="3%", cy=y - 4, r=3.5, style=f"fill:{colour}"))
        shapes.append(element("text", text(name), x="8%", y=y, class_="quiet"))
    height = foot + ROW * len(series) + 6
    return element("svg", *shapes, width="100%", height=f"{height:g}", role="img", aria_label=label)


def front(label: str, across: str, upward: str, points: Sequence[tuple[float, float, str, bool]]) -> Markup:
    """Draw points (x, y, words, whether it is on the front). Points of the front are joined."""
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


def document(title: str, blocks: Iterable[Markup]) -> str:
    """Return an HTML page under its title, without scripts. Its policy allows only its own style."""
    head = element("title", text(title)), element("style", Markup(STYLE))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{''.join(head)}</head>\n<body>\n" + "\n".join([element("h1", text(title)), *blocks]) + "\n</body></html>\n"
    )
