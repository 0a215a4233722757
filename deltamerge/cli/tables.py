"""Numbers and tables as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltamerge.cli.layout import ended, paragraph
from deltamerge.errors.shown import CELL, shown
from deltamerge.errors.shown import human as human
from deltamerge.errors.shown import lines as one_a_line

METHODS = (("merge_method", "merge"), ("prune.method", "prune"))


def render_delta(delta: dict[str, Any]) -> str:
    """A planned delta artifact, on one line."""
    values = f"{delta['values']} values to add" if delta["values"] else "final values"
    size = human(delta["estimated_bytes"])
    return f"{values}, about {size}: an estimate, without tables, of positions at random; less if less has changed"


def render_diff(found: dict[str, Any]) -> str:
    """Differences as an aligned table, or key by key."""
    if found["kind"] == "locks":
        lines = [f"{key}: {old} -> {new}" for key, (old, new) in found["changes"].items()]
        return one_a_line(lines or ["nothing differs"])
    rows: list[tuple[str, ...]] = [("tensor", "changed", "of", "max abs", "mean abs", "rel. norm")]
    for t in found["tensors"]:
        kinds = "" if t["a"] is None else f" ({t['a']} -> {t['b']})"
        numbers = (figure(t[key]) for key in ("max_abs", "mean_abs", "norm"))
        rows.append((t["name"] + kinds, f"{t['changed']:,}", f"{t['elements']:,}", *numbers))
    return one_a_line(
        [
            *(aligned(rows) if len(rows) > 1 else []),
            *(f"config.json: {key}: {old} -> {new}" for key, (old, new) in found["config"].items()),
            *(f"only in {found['b']}: {name}" for name in found["added"]),
            *(f"only in {found['a']}: {name}" for name in found["removed"]),
            *(f"tokenizers: {line}" for line in found["tokenizers"]),
            f"{len(found['tensors'])} tensors differ, {found['same']} are the same; {found['changed']:,} of "
            f"{found['elements']:,} entries changed, relative norm {figure(found['norm'])}",
        ]
    )


def render_calibration(found: Mapping[str, Any]) -> str:
    """For every model the chosen q, its search path, and the q of every tensor that has its own."""
    lines = []
    for model, entry in found.items():
        path = [f"  {' '.join(f'{x:.4g}' if isinstance(x, float) else str(x) for x in step)}" for step in entry["path"]]
        lines += [
            f"model           {model}",
            f"objective       {entry['objective']}, scope {entry['scope']}, search {entry['search']}",
            f"chosen          {entry['chosen']}: {entry['why']}",
            *(f"candidate       {_candidate(candidate)}" for candidate in entry["candidates"]),
            f"value           {entry['value']:.6g}, without calibration {entry['plain']['value']:.6g}",
            f"forward passes  {entry['forward_passes']} of {entry['sequences']} sequences",
            *(["search path", *path] if path else []),
            *(f"q               {q:<10.6g} {name}" for name, q in entry["q"].items()),
            *([f"q of rows       {entry['rows']}"] if "rows" in entry else []),
        ]
    return one_a_line(lines)


def _candidate(candidate: dict[str, Any]) -> str:
    named = {name: x for name, x in candidate.items() if name not in ("value", "held_out")}
    text = " ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{x}" for name, x in named.items())
    return f"{text}: objective {candidate['value']:.4g}, held out {candidate['held_out']:.4g}"


def render_methods(found: dict[str, list[dict[str, Any]]], width: int) -> str:
    """A line for each method: its name and what it does, as far as there is room."""
    lines = []
    name = max(len(method["name"]) for methods in found.values() for method in methods)
    for title, key in METHODS:
        lines += [
            f"{title}:",
            *(f"  {m['name']:<{name}}  {ended(m['summary'], width - name - 4)}" for m in found[key]),
            "",
        ]
    return one_a_line([*lines, "deltamerge methods NAME: its parameters and its source"])


def render_method(found: dict[str, list[dict[str, Any]]], width: int) -> str:
    """The methods of one name: what each does, and for each parameter its name, default, range and meaning."""
    lines: list[str] = []
    for title, key in METHODS:
        for method in found[key]:
            lines += [""] * bool(lines) + [f"{title}: {method['name']}"]
            lines += paragraph(method["summary"], width, first="  ", then="  ")
            lines += [f"  {method['source']}"] * bool(method["source"]) + [""]
            parameters = method["parameters"]
            starts = aligned([(name, _default(p["default"]), p["range"]) for name, p in parameters.items()])
            wide = max(map(len, starts), default=0)
            for start, parameter in zip(starts, parameters.values(), strict=True):
                words = f"{parameter['summary']}{'; per model' * parameter['per_model']}"
                lines += paragraph(words, width, first=f"  {start:<{wide}}  ", then=" " * (wide + 4))
            lines += [f"  also {', '.join(method['options'])}"] if method.get("options") else []
    return one_a_line(lines)


def _default(value: Any) -> str:
    return "must be given" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of a table as lines; long cells, which may be a stranger's text, are cut."""
    rows = [tuple(shown(cell, CELL) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def figure(number: float | None) -> str:
    """A number to three digits, or a dash."""
    return "-" if number is None else f"{number:.3g}"
