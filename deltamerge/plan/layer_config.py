"""The keys of config.json about layers (their count, lists by layer, layer numbers), adapted to stacked layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from deltamerge.errors import InputError
from deltamerge.plan.output_config import COUNTS

BEHIND = 8  # most blocks beyond a config's count of layers
SIDES = ("encoder", "decoder")
# Keys of lists whose length may equal the number of layers only by chance.
UNRELATED = re.compile(
    r"^(architectures|keys_to_ignore_at_inference|(begin_)?suppress_tokens)$|_(token|id|ids|mean|std)$"
    r"|(?<!intermediate)(?<!ffn)_(size|sizes)$"
)
NUMBERS = re.compile(r"layers?_(ind(ex|ices|exes)|idx|ids|numbers)$|_layers$")  # keys of lists of layer numbers
STAGES = ("stage_names", "out_features", "out_indices")  # keys of a backbone's layers by name, and of its outputs
KINDS = re.compile(r"^layers?(_block)?_types?$")  # keys of lists of the kind of each layer
PATTERN = re.compile(r"^(?!mtp).*(pattern|layer)")  # keys of strings with a letter for each layer

# Names of parts of a model in tensors' names, and in the config's sections about them.
SPELLINGS = (("language", "text"), ("visual", "vision"))
STAGE = re.compile(r"^stage(\d+)$")

Section = tuple[str, ...]
"""The keys that lead to a part of a config; (): the config itself."""

Place = tuple[Section, str]


def count_keys(config: Mapping[str, Any], prefix: str, count: int, *, alone: bool = True) -> list[Place]:
    """Return the (section, key) of `config` that state the number of layers of the numbered container `prefix`.

    A section is a nested config. If the prefix names a section, only this section and the sections inside it count. An
    encoder or decoder has keys that name it (`encoder_layers`, `num_decoder_layers`), and the usual keys. A decoder
    that is not `alone` has no usual keys: they are the encoder's. Without keys a list of every layer's kind counts.
    """
    words = _words(prefix)
    sections = dict(_sections(config))
    named = [at for at in sections if at and at[-1].removesuffix("_config") in words]
    best = max(named, key=lambda at: (len(at), -words.index(at[-1].removesuffix("_config"))), default=())
    asked = {at: values for at, values in sections.items() if at[: len(best)] == best}
    side = next((word for word in words if word in SIDES), "")
    own = (f"{side}_layers", f"num_{side}_layers", f"n_{side}_layers", f"{side}_num_layers") if side else ()
    found = [(s, k) for s, values in asked.items() for k in own if _is(values.get(k), count)]
    if side == "decoder" and (found or not (alone or named)):
        return found
    found += [(s, k) for s, values in asked.items() for k in COUNTS if _is(values.get(k), count)]
    return found or [
        (s, k)
        for s, values in asked.items()
        for k, v in values.items()
        if KINDS.search(k) and isinstance(v, list) and len(v) == count and not any(k in values for k in COUNTS)
    ]


def _words(prefix: str) -> list[str]:
    for there, here in SPELLINGS:
        prefix = prefix.replace(there, here)
    return re.split(r"[._]", prefix)


def _sections(config: Mapping[str, Any], at: Section = ()) -> Iterator[tuple[Section, Mapping[str, Any]]]:
    """Yield a config and the configs nested in it."""
    yield at, config
    for key, value in config.items():
        if isinstance(value, Mapping) and (key.endswith("_config") or "model_type" in value):
            yield from _sections(value, (*at, key))


def layer_count(config: Mapping[str, Any], prefix: str, numbers: Collection[int], *, alone: bool = True) -> int | None:
    """Return the number of layers, by the config, of a container of blocks with these numbers. None: gaps in them, or
    no count.

    All blocks count, or fewer if further blocks follow the layers (for multi-token prediction).
    """
    count = len(numbers)
    if max(numbers, default=-1) != count - 1:
        return None
    fewer = range(count, max(count - BEHIND, 1) - 1, -1)
    return next((n for n in fewer if count_keys(config, prefix, n, alone=alone)), None)


Followed = dict[str, tuple[Sequence[Any], Sequence[Any]]]


def repair(
    config: Mapping[str, Any],
    prefix: str,
    old: int,
    sources: Sequence[tuple[str, Mapping[str, Any], int]],
    alone: bool,
    settle: Callable[[dict[str, Any], Followed], list[str]] = lambda *_: [],
) -> tuple[dict[str, Any], list[str]]:
    """Return `config` for a stack of new layers, and a message for each change.

        config    the template's config
        prefix    the prefix of the numbered container
        old       its number of layers in the template
        sources   per new layer its model's name, that model's config, and the layer's number there
        alone     as for `count_keys`
        settle    called with each section that counts layers, and the old and new values by layer of each key; it
                  changes all other keys that must follow, and returns messages

    Lists and strings as long as `old` get the values of the new layers, each from its own model's config. Lists of
    layer numbers (`mlp_only_layers`) get the layers' new numbers. InputError: a model has no such list for its layer.
    """
    result, notes = deepcopy(dict(config)), []
    places = count_keys(config, prefix, old, alone=alone)
    for section in dict.fromkeys(section for section, _ in places):
        values: dict[str, Any] = result
        for key in section:
            values = values[key]
        for key in (key for s, key in places if s == section and type(values[key]) is int):
            if values[key] != len(sources):
                notes.append(f"{key} {values[key]} → {len(sources)}")
            values[key] = len(sources)
        followed: Followed = {}
        for key, value in list(values.items()):
            if _numbers_layers(key, value, old):
                inside = [layer in (_section(c, section).get(key) or ()) for _, c, layer in sources]
                followed[key] = [i in value for i in range(old)], inside
                new: Any = [i for i, is_in in enumerate(inside) if is_in]
            elif _is_by_layer(key, value, old):
                entries = [_entry(name, c, section, key, layer) for name, c, layer in sources]
                followed[key] = list(value), entries
                new = "".join(entries) if isinstance(value, str) else entries
            elif _is_keyed_by_layer(key, value, old):
                inner = [(_section(c, section).get(key) or {}).get(str(layer)) for _, c, layer in sources]
                followed[key] = [value.get(str(i)) for i in range(old)], inner
                new = {str(i): entry for i, entry in enumerate(inner) if entry is not None}
            elif (stages := _stages(key, value, old, len(sources))) is not None:
                new = stages
            else:
                continue
            if new != value:
                notes.append(f"{key} follows the layers")
            values[key] = new
        before = dict(values)
        notes += settle(values, followed)
        settled = {key for key, value in values.items() if value != before[key]}
        notes += _kept(values, {key for _, key in places} | settled)
    return result, list(dict.fromkeys(notes))


def _numbers_layers(key: str, value: Any, old: int) -> bool:
    """Tell whether a list holds numbers of layers, rather than a value for each layer."""
    if not isinstance(value, list) or not value or not NUMBERS.search(key):
        return False
    if not all(type(v) is int and 0 <= v < old for v in value):
        return False
    return len(value) != old or value == list(range(old))


def _is_keyed_by_layer(key: str, value: Any, old: int) -> bool:
    """Tell whether a table's keys are numbers of layers."""
    if "layer" not in key and key != "pruned_heads":
        return False
    return isinstance(value, dict) and bool(value) and value.keys() <= {str(i) for i in range(old)}


def _is_by_layer(key: str, value: Any, old: int) -> bool:
    """Tell whether a list or a string has a value for each layer."""
    if isinstance(value, str):
        return len(value) == old > 1 and PATTERN.search(key) is not None
    return isinstance(value, list) and len(value) == old and not UNRELATED.search(key) and (old > 1 or "layer" in key)


def _stages(key: str, value: Any, old: int, new: int) -> list[Any] | None:
    """Return the names of every layer of a backbone (stem, stage1, …), and its outputs: the last layer, or numbers of
    layers.

    None: the key is about something else. InputError: an output names a layer that the stack lacks.
    """
    if key not in STAGES or not isinstance(value, list):
        return None
    numbers = [int(m[1]) if (m := STAGE.match(str(v))) else v if type(v) is int else 0 for v in value]
    if key == "stage_names":
        return [*value[:1], *(f"stage{i + 1}" for i in range(new))] if numbers == list(range(old + 1)) else None
    last = [f"stage{new}" if isinstance(v, str) else new for v in value]
    if numbers == [old]:
        return last
    if not new < max(numbers, default=0) <= old:
        return None
    raise InputError(f"config.json: {key} names layer {max(numbers)}, and the stack has {new}", hint=f"correct {key}")


def _kept(values: Mapping[str, Any], counts: set[str]) -> Iterator[str]:
    """Yield a message for each number about layers that cannot be renumbered, because it is a period or a boundary."""
    for key, value in values.items():
        if "layer" in key and key not in counts and type(value) is int:
            yield f"{key}: {value} is kept: check it"


def _entry(name: str, config: Mapping[str, Any], section: Section, key: str, layer: int) -> Any:
    values = _section(config, section).get(key)
    if not isinstance(values, list | str) or layer >= len(values):
        raise InputError(f"{name}: its config.json has no {key} for layer {layer}", hint="add the list to it")
    return values[layer]


def _section(config: Mapping[str, Any], section: Section) -> Mapping[str, Any]:
    for key in section:
        inner = config.get(key)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def _is(value: Any, count: int) -> bool:
    return type(value) is int and value == count


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
    """A stack: the kinds of the template's layers and of the new layers, and the source of each.

    `followed` has the template's and the new values of every key with a value by layer.
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
    """Update keys that hold the number of the last layer, or the next number."""
    old, new = len(stacked.old), len(stacked.new)
    for key, value in section.items():
        if type(value) is int and END.search(key) and value in (old - 1, old) and "layer" in key and new != old:
            section[key] = value + new - old
            yield f"{key} {value} → {section[key]}"


def _periods(stacked: Stacked, section: Mapping[str, Any]) -> dict[str, int]:
    """Return the periods of a config that no list by layer replaces."""
    found = {}
    for key, value in section.items():
        if type(value) is int and value > 1 and PERIOD.search(key):
            idle = "window" in key and section.get("use_sliding_window") is False
            if not idle and not any(_stands_for(name, old, key, value) for name, (old, _) in stacked.followed.items()):
                found[key] = value
    return found


def _stands_for(name: str, values: Sequence[Any], key: str, period: int) -> bool:
    """Tell whether values by layer replace a period: they repeat with it, or concern the same property."""
    if TYPES.search(name) and ATTENTION.search(key):
        return True
    varied = any(value != values[0] for value in values)
    return varied and all(value == values[i % period] for i, value in enumerate(values))


def _told(stacked: Stacked) -> tuple[list[str], list[str]]:
    """Return the values by layer, for the template's layers and for the new layers."""
    columns = list(stacked.followed.values())
    old = [repr([values[i] for values, _ in columns]) for i in range(len(stacked.old))]
    return old, [repr([values[i] for _, values in columns]) for i in range(len(stacked.new))]


def _is_explained(stacked: Stacked) -> bool:
    """Tell whether all layers are of one kind, or the values by layer tell the kinds apart."""
    kinds: dict[str, Kind] = {}
    old, new = _told(stacked)
    pairs = zip([*old, *new], [*stacked.old, *stacked.new], strict=True)
    return all(kinds.setdefault(told, kind) == kind for told, kind in pairs)


def _is_periodic(stacked: Stacked, periods: Mapping[str, int]) -> bool:
    """Tell whether every new layer has the kind of its place in the template, extended by its periods."""
    old, new = stacked.old, stacked.new
    if list(new) == list(old[: len(new)]):
        return True
    period = math.lcm(*periods.values())
    if not 1 < period <= len(old) or any(kind != old[i % period] for i, kind in enumerate(old)):
        return False
    return all(kind == old[i % period] for i, kind in enumerate(new))


def _moved(stacked: Stacked, section: dict[str, Any]) -> list[str]:
    """Set the boundary (the number of the first layer that differs from all earlier layers), if config.json has it.

    InputError: a boundary must move and config.json has none, or no number fits the new layers.
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
    """Return the kind of a template's layer by its values, and by whether it comes before `at`.

    None: these do not determine it.
    """
    kinds: dict[tuple[str, bool], Kind] = {}
    for i, kind in enumerate(stacked.old):
        if kinds.setdefault((told[i], i < at), kind) != kind:
            return None
    return kinds


def _fits(stacked: Stacked, told: Sequence[str], kinds: Mapping[tuple[str, bool], Kind], at: int) -> bool:
    return all(kinds.get((told[i], i < at)) == kind for i, kind in enumerate(stacked.new))


def _first_wrong(stacked: Stacked) -> int | None:
    """Return the first new layer whose kind differs from its place's kind.

    None: a layer has other shapes than all template layers, which is reported as an error of its tensors.
    """
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
    """Return the hint of a refusal: the keys of a config that distinguish layers."""
    keys = [
        f"{key}: {value}"
        for key, value in section.items()
        if SPEAKS.search(key) and type(value) in (int, str) and not re.search(r"_types?$|size|id$|eps", key)
    ]
    told = f" ({', '.join(keys[:8])})" if keys else ""
    return f"choose ranges that keep the order of kinds: the keys for kinds of layers{told} cannot follow them"


def _check_phases(stacked: Stacked, periods: Mapping[str, int]) -> None:
    """Raise InputError if a layer had another phase of a period in its model, and no kind of layer shows it."""
    for key, period in periods.items():
        wrong = next((i for i, (_, layer) in enumerate(stacked.sources) if (layer - i) % period), None)
        if wrong is not None and not _shows(stacked.old, period):
            name, layer = stacked.sources[wrong]
            raise InputError(
                f"{name}: layer {layer} would be layer {wrong} of the stack, in another phase of {key}: {period}",
                hint=f"move layers by multiples of {period}, or add a list by layer (layer_types) to config.json",
            )


def _shows(kinds: Sequence[Kind], period: int) -> bool:
    """Tell whether some phase of a period has layers of kinds that no other phase has."""
    for phase in range(min(period, len(kinds))):
        inside = {kind for i, kind in enumerate(kinds) if i % period == phase}
        outside = {kind for i, kind in enumerate(kinds) if i % period != phase}
        if outside and not inside & outside:
            return True
    return False
