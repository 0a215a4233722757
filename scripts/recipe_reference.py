"""Writes docs/reference/recipe.md from the schema, and methods.md from the registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltamerge.methods.registry import MERGE, PRUNE, Param
from deltamerge.recipe.schema import schema

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
HEAD = """\
# The recipe

`python scripts/recipe_reference.py` writes this page from the schema, which `deltamerge schema` prints for editors.

- Unknown keys are errors.
- A number under `parameters` or `prune` may be a scalar, a gradient (a list, interpolated over the layers) or a list of
  `{filter, value}`.
- The most specific level wins: source of a slice, slice, model, module, recipe.
- Any value may be left open for `deltamerge sweep` and `search` ([sweep and search](../howto/sweep-and-search.md)).
- Methods and their parameters have [a page of their own](methods.md).
"""
METHODS = """\
# Methods

`python scripts/recipe_reference.py` writes this page from the registry; `deltamerge methods NAME` prints one method.
[Choose a method](../howto/choose.md) says when to use which. Δ_i is fine-tune i minus the base, w_i its weight, and
λ the `lambda` of the sum.
"""
SECTIONS = {
    "Prune": "prune", "CalibratedQ": "prune.q", "Protect": "prune.protect", "Calibration": "calibration",
    "Study": "study", "Goal": "study.objective", "Command": "study.objective.command",
    "Model": "models[]", "Slice": "slices[]", "SliceSource": "slices[].sources[]", "Module": "modules",
    "Expert": "experts[]",
    "Output": "output", "Quantization": "output.quantization", "Tokenizer": "tokenizer", "Token": "tokenizer.tokens",
}  # fmt: skip


def pages() -> dict[str, str]:
    """The text of each page by its name."""
    return {"recipe.md": recipe(), "methods.md": methods()}


def recipe() -> str:
    """The keys of a recipe."""
    described = schema()
    lines = [HEAD, *_table(described)]
    for name, title in SECTIONS.items():
        part = described["$defs"][name]
        lines += ["", f"## `{title}`", "", part["description"], "", *_table(part)]
    return "\n".join(lines).rstrip() + "\n"


def methods() -> str:
    """Merge and pruning methods with their parameters."""
    lines = [METHODS, "## Merge methods", ""]
    for merge in MERGE.values():
        source = f" ({merge.paper})" if merge.paper else ""
        lines += [f"### {merge.name}", "", f"{merge.summary}{source}.", "", *_parameters(merge.parameters), ""]
    lines += ["## Pruning methods", ""]
    for prune in PRUNE.values():
        source = f" ({prune.paper})" if prune.paper else ""
        also = f" Also: {', '.join(f'`{key}`' for key in sorted(prune.options))}." if prune.options else ""
        groups = f" `group`: {', '.join(prune.groups)}." if prune.groups else ""
        summary = f"{prune.summary}{source}.{groups}{also}"
        lines += [f"### {prune.name}", "", summary, "", *_parameters(prune.parameters), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(described: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{key}` | {_kind(field)} | {_default(field, key in described.get('required', ()))} | {_meaning(field)} |"
        for key, field in described["properties"].items()
    ]
    return ["| key | is | default | meaning |", "|---|---|---|---|", *rows]


def _meaning(field: dict[str, Any]) -> str:
    return str(field.get("description", "")).replace("|", "\\|")


def _default(field: dict[str, Any], required: bool) -> str:
    if required:
        return "must be given"
    value = field.get("default")
    return "–" if value in (None, [], {}) else f"`{json.dumps(value)}`" if not isinstance(value, dict) else "see below"


def _kind(field: dict[str, Any]) -> str:
    return " or ".join(dict.fromkeys(_kinds(field))) or "any"


def _kinds(field: dict[str, Any]) -> Iterator[str]:
    choices = [choice for choice in field.get("enum", ()) if choice is not None]
    if choices:
        yield ", ".join(f"`{choice}`" for choice in choices)
    elif field.get("$ref") == "#/$defs/Open":
        return  # the page says once that values may be left open
    elif "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        yield f"[{SECTIONS[name]}](#{_anchor(SECTIONS[name])})" if name in SECTIONS else name.lower()
    elif "anyOf" in field or "oneOf" in field:
        for choice in field.get("anyOf", field.get("oneOf")):
            yield from _kinds(choice)
    elif field.get("type") == "array":
        inner = " or ".join(_kinds(field["items"])) if isinstance(field.get("items"), dict) else "values"
        yield f"list of {inner}"
    elif field.get("type") == "object" and isinstance(field.get("additionalProperties"), dict):
        yield f"map to {' or '.join(_kinds(field['additionalProperties']))}"
    elif "const" in field:
        yield f"`{field['const']}`"
    elif field.get("type") not in (None, "null"):
        kinds = [field["type"]] if isinstance(field["type"], str) else field["type"]
        yield from (kind for kind in kinds if kind != "null")


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower() if c.isalnum() or c in "-_")


def _parameters(parameters: dict[str, Param] | Any) -> list[str]:
    if not parameters:
        return ["No parameters."]
    rows = [
        f"| `{name}` | {param.wanted()} | {'must be given' if param.default is None else f'`{param.shown_default}`'} "
        f"| {'a model or all' if param.per_model else 'all'} | {param.summary} |"
        for name, param in parameters.items()
    ]
    return ["| parameter | is | default | for | meaning |", "|---|---|---|---|---|", *rows]


if __name__ == "__main__":
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
