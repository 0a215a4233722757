"""Markup for one page: elements with escaped text, and charts in SVG that stretch to any width while letters do not.

Charts have no viewBox: across, everything is placed in percent, down in pixels. Colours are the page's CSS. Every shape
has its figure in `data-value` and its words in `<title>`. A figure that is None or not finite is a dash.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

Markup = NewType("Markup", str)
Attributes = dict[str, str | float]
SHOWN = 34
FAINT = 0.08


def text(words: str) -> Markup:
    """`words` escaped for text and attributes; what does not print (controls, lone surrogates, direction) becomes �."""
    return Markup(html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)))


def element(tag: str, *children: Markup, **attributes: str | float) -> Markup:
    """`<tag …>children</tag>`; the attribute `class_` is class, `data_value` data-value."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{text(str(v))}"' for name, v in attributes.items())
    return Markup(f"<{tag}{given}>{''.join(children)}</{tag}>")


def short(name: str) -> str:
    """A name that fits a narrow page: its middle left out if it is long."""
    return name if len(name) <= SHOWN else f"{name[:6]}…{name[7 - SHOWN :]}"


def figure(value: float | None, form: str = ".3g") -> str:
    """The value in a format, or a dash."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


@dataclass(frozen=True, slots=True)
class Point:
    """A figure and what it is of; `mark`, of the same unit, is compared with it; `note` stands for the number."""

    name: str
    value: float | None
    mark: float | None = None
    note: str | None = None


def _percent(part: float) -> str:
    return f"{100 * part:.6g}%"


def _finite(*values: float | None) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _svg(height: float, label: str, shapes: Sequence[Markup]) -> Markup:
    return element("svg", *shapes, width="100%", height=f"{height:g}", role="img", aria_label=label)


def _words(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "quiet") -> Markup:
    return element("text", text(words), x=_percent(x), y=y, text_anchor=anchor, class_=kind)


def _title(words: str) -> Markup:
    return element("title", text(words))


def columns(label: str, points: Sequence[Point], *, form: str = ".3g") -> Markup:
    """Upright bars from 0 to the largest, one a layer, named below as often as there is room."""
    top = max(_finite(*(p.value for p in points)), default=0.0) or 1.0
    count, space, floor = len(points), 110.0, 130.0
    width = min(0.7 / count, 0.12)
    every = math.ceil(count / 12)
    shapes = [element("line", x1="0", x2="100%", y1=floor, y2=floor, class_="axis")]
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
    return _svg(floor + 22, label, shapes)


def bars(label: str, points: Sequence[Point], *, form: str = ".3g", whole: float | None = None) -> Markup:
    """Bars from 0 to the largest, or of a `whole`, each below its name and number; `mark` is a tick across it."""
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


def heat(label: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]], top: float) -> Markup:
    """A strip of cells a row, one a layer, below the row's name: from faint at 0 to full at `top`."""
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
            words, part = figure(value), 0.0
            if value is not None and _finite(value):
                part = value / top if top else 0.0
                box |= {"class_": "cell", "fill_opacity": f"{FAINT + (1 - FAINT) * part:.4f}", "data_value": value}
            shapes.append(element("rect", _title(f"{name}, layer {head}: {words}"), **box))
            if count <= 6:
                kind = "on" if part > 0.85 else "mid" if part > 0.65 else "in"
                shapes.append(_words((i + 0.5) / count, y + 33, words, anchor="middle", kind=kind))
    foot = high * len(rows) + 15
    shapes += [_words((i + 0.5) / count, foot, heads[i], anchor="middle") for i in range(0, count, every)]
    return _svg(foot + 6, label, shapes)


def pairs(label: str, points: Sequence[Point]) -> Markup:
    """A row a point, below its name: `value` and `mark` on one logarithmic axis, joined."""
    found = [v for p in points for v in _finite(p.value, p.mark) if v > 0] or [1.0]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    high += high == low
    bottom = 42 * len(points)

    def place(value: float) -> float:
        return 0.02 + 0.96 * (max(math.log10(value), low) - low if value > 0 else 0.0) / (high - low)

    shapes = []
    for power in range(low, high + 1):
        x = _percent(place(10.0**power))
        shapes.append(element("line", x1=x, x2=x, y1=0, y2=bottom, class_="one" if power == 0 else "rule"))
        anchor = "start" if power == low else "end" if power == high else "middle"
        shapes.append(_words(place(10.0**power), bottom + 15, f"{10.0**power:g}", anchor=anchor))
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
    return _svg(bottom + 22, label, shapes)
