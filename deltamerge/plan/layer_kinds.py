"""Whether the layers of a stack are those that its config.json builds: kinds of layer, periods, boundaries.

In most models all layers are alike. In others a config says which layer is which: by a list or a string by layer, which
is adapted to a stack (`layer_config`); or by a number, a period or a boundary, which may not fit a stack. A stack whose
layers differ in kind from what the config builds loads with random weights; one whose layers attend differently
computes something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltamerge.errors import InputError

# The kind of a layer: the relative names of its tensors, and their shapes.
Kind = frozenset[tuple[str, tuple[int, ...]]]

PERIOD = re.compile(r"(interval|period|pattern|sparse_step|layer_step|_freq)$|every_n")
ATTENTION = re.compile(r"att|sliding|global|window|rope")
BOUNDARY = re.compile(r"(^|_)(first|start|begin|dense)(_|$)")
END = re.compile(r"(^|_)(end|last)(_|$)")
TYPES = re.compile(r"layers?_(block_)?types?$")
SPEAKS = re.compile(r"^(?!num_hidden|max_|num_nextn).*(layer|interval|period|offset|pattern|replace|every|step|freq)")


@dataclass(frozen=True, slots=True)
class Stacked:
    """A stack as this module sees it: the kinds of the template's layers and of the new ones, and where each comes
    from.

    `followed` has, for every key with a value by layer, the template's values and the new ones.
    """

    template: str
    old: Sequence[Kind]
    new: Sequence[Kind]
    sources: Sequence[tuple[str, int]]
    followed: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]


def settle(stacked: Stacked, section: dict[str, Any]) -> list[str]:
    """Move the boundaries in a config's `section` to where the new layers have them; returns a message for each change.

    InputError: layers of another kind than the config builds at their place, or in another phase of a period that no
    list by layer replaces.
    """
    periods, notes = _periods(stacked, section), []
    if not _is_explained(stacked) and not _is_periodic(stacked, periods):
        notes += _moved(stacked, section)
    _check_phases(stacked, periods)
    notes += _ends(stacked, section)
    window = section.get("sliding_window")
    attends = window and not periods and section.get("use_sliding_window") is not False
    shifted = any((layer - i) % 2 for i, (_, layer) in enumerate(stacked.sources))
    if attends and shifted and not any(TYPES.search(key) for key in stacked.followed):
        notes.append(f"sliding_window: {window} and no list by layer: check which layers attend in windows")
    return notes


def _ends(stacked: Stacked, section: dict[str, Any]) -> Iterator[str]:
    """Keep keys that hold the number of the last layer, or the number behind it, at that."""
    old, new = len(stacked.old), len(stacked.new)
    for key, value in section.items():
        if type(value) is int and END.search(key) and value in (old - 1, old) and "layer" in key and new != old:
            section[key] = value + new - old
            yield f"{key} {value} → {section[key]}"


def _periods(stacked: Stacked, section: Mapping[str, Any]) -> dict[str, int]:
    """The periods of a config that no list by layer replaces."""
    found = {}
    for key, value in section.items():
        if type(value) is int and value > 1 and PERIOD.search(key):
            idle = "window" in key and section.get("use_sliding_window") is False
            if not idle and not any(_stands_for(name, old, key, value) for name, (old, _) in stacked.followed.items()):
                found[key] = value
    return found


def _stands_for(name: str, values: Sequence[Any], key: str, period: int) -> bool:
    """Whether values by layer express a period: they repeat with it, or are about the same thing."""
    if TYPES.search(name) and ATTENTION.search(key):
        return True
    varied = any(value != values[0] for value in values)
    return varied and all(value == values[i % period] for i, value in enumerate(values))


def _told(stacked: Stacked) -> tuple[list[str], list[str]]:
    """What the values by layer say of each layer: the template's layers, and the new ones."""
    columns = list(stacked.followed.values())
    old = [repr([values[i] for values, _ in columns]) for i in range(len(stacked.old))]
    return old, [repr([values[i] for _, values in columns]) for i in range(len(stacked.new))]


def _is_explained(stacked: Stacked) -> bool:
    """Whether all layers are of one kind, or the values by layer tell the kinds apart."""
    kinds: dict[str, Kind] = {}
    old, new = _told(stacked)
    pairs = zip([*old, *new], [*stacked.old, *stacked.new], strict=True)
    return all(kinds.setdefault(told, kind) == kind for told, kind in pairs)


def _is_periodic(stacked: Stacked, periods: Mapping[str, int]) -> bool:
    """Whether every new layer has the kind of its place in the template, extended by its periods."""
    old, new = stacked.old, stacked.new
    if list(new) == list(old[: len(new)]):
        return True
    period = math.lcm(*periods.values())
    if not 1 < period <= len(old) or any(kind != old[i % period] for i, kind in enumerate(old)):
        return False
    return all(kind == old[i % period] for i, kind in enumerate(new))


def _moved(stacked: Stacked, section: dict[str, Any]) -> list[str]:
    """Set the boundary (the number of the first layer that differs from those before it), if config.json has one.

    InputError: a boundary must move and there is none, or no number makes the new layers what they are.
    """
    wrong, count = _first_wrong(stacked), len(stacked.new)
    if wrong is None:
        return []
    keys = {k: v for k, v in section.items() if type(v) is int and 0 < v < len(stacked.old) and BOUNDARY.search(k)}
    change = next((i for i, kind in enumerate(stacked.old) if kind != stacked.old[0]), 0)
    told = _told(stacked)
    known = {k: kinds for k, at in [*keys.items(), ("", change)] if (kinds := _sides(stacked, told[0], at)) is not None}
    if any(_fits(stacked, told[1], kinds, keys.get(key, change)) for key, kinds in known.items()):
        return []
    known.pop("", None)
    for key, kinds in known.items() if len(known) == 1 else ():
        now = next((at for at in range(count + 1) if _fits(stacked, told[1], kinds, at)), None)
        if now is not None:
            section[key] = now
            return [f"{key} {keys[key]} → {now}"]
    raise _refusal(stacked, section, wrong)


def _sides(stacked: Stacked, told: Sequence[str], at: int) -> dict[tuple[str, bool], Kind] | None:
    """The kind of a template's layer by what is told of it and by whether it comes before `at`; None if these do not
    determine it.
    """
    kinds: dict[tuple[str, bool], Kind] = {}
    for i, kind in enumerate(stacked.old):
        if kinds.setdefault((told[i], i < at), kind) != kind:
            return None
    return kinds


def _fits(stacked: Stacked, told: Sequence[str], kinds: Mapping[tuple[str, bool], Kind], at: int) -> bool:
    return all(kinds.get((told[i], i < at)) == kind for i, kind in enumerate(stacked.new))


def _first_wrong(stacked: Stacked) -> int | None:
    """The first new layer whose kind is not that of its place. None: a layer has other shapes than any of the
    template's, which is reported as an error of its tensors."""
    names = [{name for name, _ in kind} for kind in stacked.old]
    known = set(stacked.old)
    if any(kind not in known and {name for name, _ in kind} in names for kind in stacked.new):
        return None
    count = len(stacked.old)
    return next(i for i, kind in enumerate(stacked.new) if i >= count or kind != stacked.old[i])


def _refusal(stacked: Stacked, section: Mapping[str, Any], at: int) -> InputError:
    name, layer = stacked.sources[at]
    mine, count = stacked.new[at], len(stacked.old)
    place = f"{name}: layer {layer} would be layer {at} of the stack"
    if at < count:
        has = sorted(n for n, _ in mine - stacked.old[at]) or sorted(n for n, _ in stacked.old[at] - mine)
        what = f"where config.json builds another kind of layer ({has[0]} differs)"
    else:
        what = f"of which config.json has {count}, of several kinds, and no list that says the kind of a new one"
    return InputError(f"{place}, {what}", hint=which_layers(section))


def which_layers(section: Mapping[str, Any]) -> str:
    """The hint of a refusal: the keys of a config that say which layer is which."""
    keys = [
        f"{key}: {value}"
        for key, value in section.items()
        if SPEAKS.search(key) and type(value) in (int, str) and not re.search(r"_types?$|size|id$|eps", key)
    ]
    told = f" ({', '.join(keys[:8])})" if keys else ""
    return f"choose ranges that keep the order of kinds: what says which layer is which{told} cannot follow them"


def _check_phases(stacked: Stacked, periods: Mapping[str, int]) -> None:
    """InputError: a period that the kinds do not show, and a layer that had another phase in its model."""
    for key, period in periods.items():
        wrong = next((i for i, (_, layer) in enumerate(stacked.sources) if (layer - i) % period), None)
        if wrong is not None and not _shows(stacked.old, period):
            name, layer = stacked.sources[wrong]
            raise InputError(
                f"{name}: layer {layer} would be layer {wrong} of the stack, in another phase of {key}: {period}",
                hint=f"move layers by multiples of {period}, or add a list by layer (layer_types) to config.json",
            )


def _shows(kinds: Sequence[Kind], period: int) -> bool:
    """Whether some phase of a period has layers of kinds that no other phase has."""
    for phase in range(min(period, len(kinds))):
        inside = {kind for i, kind in enumerate(kinds) if i % period == phase}
        outside = {kind for i, kind in enumerate(kinds) if i % period != phase}
        if outside and not inside & outside:
            return True
    return False
