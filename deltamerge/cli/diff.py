"""The command diff."""

from __future__ import annotations

from typing import Any

import click

from deltamerge.cli.layout import align, figure
from deltamerge.cli.options import AS_JSON, FILE, PICKLES, WORKERS
from deltamerge.cli.output import say, say_json
from deltamerge.errors import app
from deltamerge.errors.shown import lines as one_a_line


@click.command("diff")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@WORKERS
@PICKLES
@AS_JSON
def command(a: str, b: str, workers: int | None, pickles: bool, as_json: bool) -> None:
    """Compare two checkpoints, or two locks.

    A and B are folders or hub ids (one may be a delta of the other), or two recipe.lock files.
    """
    with app("inspect"):
        from deltamerge.apps.inspect.diff import diff as compare
    from deltamerge.engine.execute import default_workers

    found = compare(a, b, workers or default_workers(), pickles=pickles)
    say_json(found) if as_json else say(render_diff(found))


def render_diff(found: dict[str, Any]) -> str:
    """Return differences as an aligned table, or key by key."""
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
            *(align(rows) if len(rows) > 1 else []),
            *(f"config.json: {key}: {old} -> {new}" for key, (old, new) in found["config"].items()),
            *(f"only in {found['b']}: {name}" for name in found["added"]),
            *(f"only in {found['a']}: {name}" for name in found["removed"]),
            *(f"tokenizers: {line}" for line in found["tokenizers"]),
            f"{len(found['tensors'])} tensors differ, {found['same']} are the same; {found['changed']:,} of "
            f"{found['elements']:,} entries changed, relative norm {figure(found['norm'])}",
        ]
    )
