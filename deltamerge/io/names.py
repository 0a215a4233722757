"""Checkpoint names: the repeated blocks that they spell out. No torch: a plan says how calibration will run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod

_NUMBERED = re.compile(r"(?<!\d)\.(\d+)\.")


def numbered_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, list[str]] | None:
    """Names of the tensors in each repeated block, by number: the numbered container that holds most elements.

    None where no container is numbered 0 … L−1: the whole model must then be resident while it is calibrated.
    """
    containers: dict[str, dict[int, list[str]]] = {}
    elements: dict[str, int] = {}
    for name, shape in shapes.items():
        match = _NUMBERED.search(name)  # the outermost number: experts inside a block are part of it
        if match is not None:
            prefix = name[: match.start()]
            containers.setdefault(prefix, {}).setdefault(int(match[1]), []).append(name)
            elements[prefix] = elements.get(prefix, 0) + prod(shape)
    for prefix in sorted(containers, key=lambda p: -elements[p]):
        if set(containers[prefix]) == set(range(len(containers[prefix]))):
            return dict(sorted(containers[prefix].items()))
    return None


def resolve_prefix(wanted: Iterable[str], present: Iterable[str], prefix: str) -> dict[str, str | None]:
    """For each wanted name the present one that is the same after `prefix.` is taken off either side, or None."""
    there = set(present)
    dotted = f"{prefix}."
    found: dict[str, str | None] = {}
    for name in wanted:
        bare = name.removeprefix(dotted) if prefix else name
        spellings = (name, bare, dotted + bare) if prefix else (name,)
        found[name] = next((s for s in spellings if s in there), None)
    return found


def layer_index(name: str) -> int | None:
    """The first dotted component that is a number: 7 for `model.layers.7.mlp.up_proj.weight`."""
    return next((int(part) for part in name.split(".") if re.fullmatch("[0-9]{1,9}", part)), None)


def layer_position(name: str, layers: int) -> float:
    """t = index / (layers − 1) of the tensor's layer; 1 for a single layer, 0 outside layers (embeddings, head)."""
    index = layer_index(name)
    if index is None:
        return 0.0
    return 1.0 if layers <= 1 else min(1.0, index / (layers - 1))
