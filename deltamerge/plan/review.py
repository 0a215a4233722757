"""The difference of two plans, and a plan as a diagram, for reviewers of a recipe."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from deltamerge.errors.shown import code, label, plain, some

Described = Mapping[str, Any]

# the keys of a tensor that are compared; its file and backend do not affect the result
TENSOR_KEYS = ("method", "sources", "dtype", "shape", "bytes")
PLAN_KEYS = (
    "merge_method", "base_model", "models", "template", "output_bytes", "read_bytes", "peak_bytes", "shards", "notes",
)  # fmt: skip
NUMBER = re.compile(r"\d+")


def difference(old: Described, new: Described) -> dict[str, Any]:
    """Return the differences of the plan `new` from `old`, both as described.

    plan      the plan's own values that differ: key -> [old, new]
    stages    calibration stages that differ: model -> [old, new]
    added, removed   names of tensors
    changed   groups of tensors that change alike: `tensors`, and key -> [old, new]
    """
    before, after = ({tensor["name"]: tensor for tensor in plan["tensors"]} for plan in (old, new))
    groups: dict[str, dict[str, Any]] = {}
    for name in (name for name in after if name in before):
        values = _values(before[name], after[name], TENSOR_KEYS)
        if values:
            groups.setdefault(repr(values), {"tensors": [], **values})["tensors"].append(name)
    stages = [{stage["model"]: stage for stage in plan["stages"]} for plan in (old, new)]
    return {
        "plan": _values(old, new, PLAN_KEYS),
        "stages": _values(stages[0], stages[1], dict.fromkeys([*stages[0], *stages[1]])),
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": list(groups.values()),
    }


def _values(old: Mapping[str, Any], new: Mapping[str, Any], keys: Iterable[str]) -> dict[str, list[Any]]:
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}


def markdown(found: Mapping[str, Any], old: str, new: str) -> str:
    """Return a `difference` as Markdown for a pull request."""
    lines = [f"### {plain(old)} → {plain(new)}", ""]
    if not any(found.values()):
        return "\n".join([*lines, "Nothing changes."])
    if found["plan"]:
        lines += ["| | before | after |", "|---|---|---|"]
        lines += [f"| {key} | {_cell(a)} | {_cell(b)} |" for key, (a, b) in found["plan"].items()]
        lines.append("")
    for group in found["changed"]:
        count = len(group["tensors"])
        lines.append(f"**{count} tensor{'s' * (count > 1)}**: {_names(group['tensors'])}")
        lines += [f"- {key}: {_cell(a)} → {_cell(b)}" for key, (a, b) in _items(group)]
        lines.append("")
    for model, (a, b) in found["stages"].items():
        lines.append(f"**calibration of {plain(model)}**")
        if a is None or b is None:
            lines.append("- added" if a is None else "- removed")
        else:
            lines += [f"- {key}: {_cell(x)} → {_cell(y)}" for key, (x, y) in _values(a, b, b).items()]
        lines.append("")
    for key in ("added", "removed"):
        if found[key]:
            lines += [f"**{key}**: {_names(found[key])}", ""]
    return "\n".join(lines).rstrip()


def _items(group: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    return [(key, value) for key, value in group.items() if key != "tensors"]


def _cell(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)}"
    if isinstance(value, list):
        return plain("; ".join(map(str, value))) or "–"
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else plain(str(value))


def _names(names: Iterable[str]) -> str:
    """Return names in a message.

    Names that differ only in numbers become one pattern: `layers.{0–23}.mlp.up_proj.weight`.
    """
    families: dict[str, list[str]] = defaultdict(list)
    for name in names:
        families[NUMBER.sub("*", name)].append(name)
    shown = [code(_family(members)) for members in families.values()]
    return some(shown, 12)


def _family(members: list[str]) -> str:
    numbers = [NUMBER.findall(name) for name in members]
    ranges = [
        str(low) if low == high else f"{{{low}–{high}}}"
        for low, high in (
            (min(column), max(column)) for column in ([int(n) for n in c] for c in zip(*numbers, strict=True))
        )
    ]
    parts = NUMBER.split(members[0])
    return "".join(part + number for part, number in zip(parts, [*ranges, ""], strict=True))


def mermaid(described: Described) -> str:
    """Return the stages of a plan as a Mermaid flowchart, which GitHub and GitLab draw."""
    lines = ["flowchart LR"]
    base = described["base_model"]
    names = dict.fromkeys([*([base] if base else []), *described["models"]])
    ids = {name: f"m{i}" for i, name in enumerate(names)}
    lines += [f'  {ids[name]}[("{label(name)}{" (base)" if name == base else ""}")]' for name in names]
    calibrated = {}
    for i, stage in enumerate(described["stages"]):
        model = stage["model"]
        scope = f"scope {label(str(stage['scope']))}, at most {stage['forward_passes']} passes"
        lines.append(f'  c{i}["calibrate {label(str(stage["objective"]))}<br/>{scope}"]')
        lines += [f"  {ids[source]} --> c{i}" for source in dict.fromkeys([base, model]) if source in ids]
        calibrated[model] = f"c{i}"
    counts: dict[str, int] = defaultdict(int)
    for tensor in described["tensors"]:
        counts[tensor["method"]] += 1
    files = described["shards"]
    lines.append(f'  out[("{len(files)} file{"s" * (len(files) > 1)}<br/>{described["output_bytes"]:,} bytes")]')
    for i, (method, count) in enumerate(counts.items()):
        lines.append(f'  s{i}["{label(method)}<br/>{count} tensor{"s" * (count > 1)}"]')
        used = [described["template"]] if method == "copy" else list(ids)
        lines += [f"  {ids[name]} --> s{i}" for name in used if name in ids]
        if method != "copy":
            lines += [f"  {stage} -- q --> s{i}" for stage in calibrated.values()]
        lines.append(f"  s{i} --> out")
    return "\n".join(lines)
