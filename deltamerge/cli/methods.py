"""The commands methods and schema: list the methods, and print the JSON schema of a recipe."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli.layout import align, cut_at_word, paragraph
from deltamerge.cli.options import AS_JSON
from deltamerge.cli.output import say, say_json
from deltamerge.cli.streams import columns
from deltamerge.errors import UsageError
from deltamerge.errors.shown import lines as one_a_line

if TYPE_CHECKING:
    from deltamerge.methods.registry import MergeMethod, Param, PruneMethod

METHODS = (("merge_method", "merge"), ("prune.method", "prune"))


def _names(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:
    from deltamerge.methods.registry import MERGE, PRUNE

    return sorted(name for name in {*MERGE, *PRUNE} if name.startswith(incomplete))


@click.command("methods")
@click.argument("name", required=False, shell_complete=_names)
@AS_JSON
def methods(name: str | None, as_json: bool) -> None:
    """List merge and pruning methods, one per line.

    With NAME: its parameters, their defaults and ranges, and the paper.
    """
    found = catalogue(name)
    render = render_method if name else render_methods
    say_json(found) if as_json else say(render(found, columns()))


def catalogue(name: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return every merge and pruning method, or the methods called `name`, in the order of the tables.

    A parameter's `default` is a value, or "density" for the q of random masks. A `required` parameter has none.
    UsageError: no method has that name.
    """
    from deltamerge.methods.registry import MERGE, PRUNE

    if name is not None and name not in MERGE and name not in PRUNE:
        from deltamerge.recipe.problems import suggest

        raise UsageError(f"unknown method {name!r}", hint=suggest(name, {*MERGE, *PRUNE}))
    return {
        "merge": [_merge(method) for method in MERGE.values() if name in (None, method.name)],
        "prune": [_prune(method) for method in PRUNE.values() if name in (None, method.name)],
    }


def _merge(method: MergeMethod) -> dict[str, Any]:
    """Describe a merge method.

    `base` is "needed", "optional" or "a model" (an input like the others). `models` is the least and the largest
    number.
    """
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.paper,
        "parameters": {key: _parameter(param, param.shown_default) for key, param in method.parameters.items()},
        "base": "needed" if method.needs_base else "optional" if method.takes_base else "a model",
        "needs": ["base"] * method.needs_base + ["rows"] * (method.rows is not None),
        "models": [method.minimum, method.maximum],
        "prunes": method.implies_prune,
    }


def _prune(method: PruneMethod) -> dict[str, Any]:
    defaults: dict[str, Any] = {"q": "density" if method.random else 1.0}
    if method.factors:
        defaults["density"] = " · ".join(method.factors)
    parameters = {key: _parameter(p, defaults.get(key, p.default)) for key, p in method.parameters.items()}
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.paper,
        "parameters": parameters,
        "needs": ["rows"] * method.needs_activations,
        "options": sorted(method.options),
        "groups": list(method.groups),
        "random": method.random,
    }


def _parameter(param: Param, default: Any) -> dict[str, Any]:
    described = asdict(param)
    for key in ("prunes", "rule"):
        described.pop(key)
    return described | {"default": default, "required": default is None, "range": param.wanted()}


def render_methods(found: dict[str, list[dict[str, Any]]], width: int) -> str:
    """Return a line for each method: its name, its needs, and as much of its summary as fits."""
    lines = []
    starts = align([(m["name"], ", ".join(m["needs"]) or "–") for methods in found.values() for m in methods])
    wide = max(map(len, starts), default=0)
    room, rest = width - wide - 4, iter(starts)
    for title, key in METHODS:
        lines += [f"{title}:", *(f"  {next(rest):<{wide}}  {gist(m['summary'], room)}" for m in found[key]), ""]
    notes = "Needs: base is base_model; rows are calibration data. deltamerge methods NAME shows parameters and source."
    return one_a_line([*lines, *paragraph(notes, width)])


def gist(summary: str, room: int) -> str:
    """Return a summary in `room` columns: whole, or cut after a clause that fills a third of them, or after a word."""
    if len(summary) <= room:
        return summary
    ends = [found.start() for found in re.finditer(r"[,;:] ", summary) if room // 3 <= found.start() <= room]
    ends = [end for end in ends if summary.count("(", 0, end) == summary.count(")", 0, end)]
    return summary[: ends[-1]] if ends else cut_at_word(summary, room)


def render_method(found: dict[str, list[dict[str, Any]]], width: int) -> str:
    """Return the methods of one name: their summaries, and each parameter's name, default, range and meaning."""
    lines: list[str] = []
    for title, key in METHODS:
        for method in found[key]:
            lines += [""] * bool(lines) + [f"{title}: {method['name']}"]
            lines += paragraph(method["summary"], width, first="  ", then="  ")
            lines += [f"  {method['source']}"] * bool(method["source"]) + [""]
            parameters = method["parameters"]
            starts = align([(name, _default(p["default"]), p["range"]) for name, p in parameters.items()])
            wide = max(map(len, starts), default=0)
            for start, parameter in zip(starts, parameters.values(), strict=True):
                words = f"{parameter['summary']}{'; per model' * parameter['per_model']}"
                lines += paragraph(words, width, first=f"  {start:<{wide}}  ", then=" " * (wide + 4))
            lines += [f"  also {', '.join(method['options'])}"] if method.get("options") else []
    return one_a_line(lines)


def _default(value: Any) -> str:
    return "must be given" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


@click.command("schema")
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from deltamerge.recipe.schema import schema as recipe_schema

    say(json.dumps(recipe_schema(), indent=2))
