"""Numbers and tables as text for people."""

from __future__ import annotations

from typing import Any


def human(size: float) -> str:
    """A number of bytes in decimal units, as shard_size and the hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def render_delta(delta: dict[str, Any]) -> str:
    """What a delta artifact will be, in a line."""
    values = f"{delta['values']} values to add" if delta["values"] else "final values"
    size = human(delta["estimated_bytes"])
    return f"{values}, about {size}: an estimate, without tables, of positions at random; less if less has changed"


def render_diff(found: dict[str, Any]) -> str:
    """What differs, as an aligned table, or key by key."""
    if found["kind"] == "locks":
        lines = [f"{key}: {old} -> {new}" for key, (old, new) in found["changes"].items()]
        return "\n".join(lines or ["nothing differs"])
    rows: list[tuple[str, ...]] = [("tensor", "changed", "of", "max abs", "mean abs", "rel. norm")]
    for t in found["tensors"]:
        kinds = "" if t["a"] is None else f" ({t['a']} -> {t['b']})"
        numbers = (shown(t[key]) for key in ("max_abs", "mean_abs", "norm"))
        rows.append((t["name"] + kinds, f"{t['changed']:,}", f"{t['elements']:,}", *numbers))
    return "\n".join(
        [
            *(aligned(rows) if len(rows) > 1 else []),
            *(f"only in {found['b']}: {name}" for name in found["added"]),
            *(f"only in {found['a']}: {name}" for name in found["removed"]),
            f"{len(found['tensors'])} tensors differ, {found['same']} are the same; {found['changed']:,} of "
            f"{found['elements']:,} entries changed, relative norm {shown(found['norm'])}",
        ]
    )


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of a table as lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"
