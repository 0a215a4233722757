"""Edits of a recipe's text that keep every other byte: set keys from outside, write short forms in full.

The text is spliced at positions from the parser. A round trip through ruamel.yaml would keep comments, but rewrite
untouched lines: `[{a: 1}, {value: 0.5}]` becomes `[{a: 1}, value: 0.5]`, and mixed indentation of lists becomes
uniform. Recipes are shown and hashed as their authors wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from deltamerge.errors import InputError, RecipeError
from deltamerge.recipe import yaml_source
from deltamerge.recipe.yaml_source import Loader, Loc, place

_PLAIN_KEY = re.compile(r"[A-Za-z_][\w-]*")
MODELS = "models"


def parse_setting(text: str) -> tuple[Loc, str]:
    """Split `models.0.prune.density=0.01` into a place and a YAML value.

    `models[0].prune` is read too, because error messages name places in this form.
    InputError: it is not KEY=VALUE, or VALUE not YAML.
    """
    key, equals, value = text.partition("=")
    parts = re.sub(r"(?<=\w)\[(\d+)\]", r".\1", key.strip()).split(".")
    if not equals or not all(parts):
        raise InputError(f"{text}: is not KEY=VALUE, such as models.0.prune.density=0.01")
    try:
        yaml_source.loads(f"value: {value.strip() or 'null'}", f"--set {key}")
    except RecipeError as error:
        raise InputError(f"{text}: the value is not YAML: {error.problems[0].message}") from error
    return tuple(int(part) if part.isdecimal() else part for part in parts), value.strip() or "null"


def set_keys(text: str, settings: Mapping[Loc, str], path: str) -> str:
    """Return the recipe `text` with the YAML value of each place in `settings` set in each of its documents.

    A missing key is added to its mapping: for the recipe itself at the end, so that no line moves, otherwise at the
    mapping's beginning. Comments and all other keys stay. RecipeError: the text is no recipe. InputError: a place is
    inside a value without keys, or is written as an alias or by `<<`.
    """
    for loc, value in settings.items():
        text = text_in_full(text) if MODELS in loc[:-1] else text
        sources = yaml_source.loads_all(text, path)
        roots = [root for root in yaml.compose_all(text, yaml_source.Loader) if isinstance(root, yaml.MappingNode)]
        for root in reversed(roots):  # from the end, so that earlier positions stay valid
            text = _set(text, root, loc, value)
        wanted = yaml_source.loads(f"value: {value}", path).data["value"]
        read = yaml_source.loads_all(text, path)
        if len(read) != len(sources) or any(_at(one.data, loc) != wanted for one in read):
            raise InputError(
                f"{path}: {place(loc)} cannot be set from outside: it is part of an alias", hint="edit the recipe"
            )
    return text


def _set(text: str, root: yaml.Node, loc: Loc, value: str) -> str:
    node, key_end = root, 0
    for depth, part in enumerate(loc):
        found = _child(node, part, loc[:depth])
        if found is None:
            add = _append if node is root and not _is_flow(node) else _add
            return add(text, node, str(part), _nested(loc[depth + 1 :], value))
        key_end, node = found
        if node.start_mark.index < key_end:
            raise InputError(f"{place(loc[: depth + 1])} is an alias, and cannot be set from outside")
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null") and depth + 1 < len(loc):
            return _replace(text, node, key_end, _nested(loc[depth + 1 :], value))
    return _replace(text, node, key_end, value)


def _child(node: yaml.Node, part: str | int, above: Loc) -> tuple[int, yaml.Node] | None:
    """Return the end of the key `part`, and its value. None: the mapping lacks the key."""
    if isinstance(node, yaml.SequenceNode):
        if not isinstance(part, int) or part >= len(node.value):
            raise InputError(f"{place(above)} is a list of {len(node.value)}, and has no {part}")
        return max(node.start_mark.index, node.value[part].start_mark.index), node.value[part]
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{place(above)} is a value, and has no {part}", hint="set the whole of it: KEY={…}")
    return next(((key.end_mark.index, value) for key, value in node.value if key.value == str(part)), None)


def _nested(loc: Loc, value: str) -> str:
    for part in reversed(loc):
        value = f"{{{_key(str(part))}: {value}}}"
    return value


def _key(name: str) -> str:
    return name if _PLAIN_KEY.fullmatch(name) else json.dumps(name)


def _replace(text: str, node: yaml.Node, key_end: int, value: str) -> str:
    start, end = node.start_mark.index, node.end_mark.index
    old = text[start:end]
    trailing = old[len(old.rstrip()) :]
    if not old and start and not text[start - 1].isspace():
        value = f" {value}"
    if "\n" in old.rstrip() and not old.startswith(("{", "[", '"', "'")):  # a block, after its key's line
        before = text[:start] if key_end == start else text[: text.index(":", key_end) + 1] + " "
        return f"{before}{value}{trailing or chr(10)}{text[end:]}"
    return f"{text[:start]}{value}{trailing}{text[end:]}"


def _add(text: str, node: yaml.Node, name: str, value: str) -> str:
    entry = f"{_key(name)}: {value}"
    if not node.value or _is_flow(node):
        after = node.start_mark.index + 1
        return f"{text[:after]}{entry}{', ' if node.value else ''}{text[after:]}"
    first = node.value[0][0].start_mark
    return f"{text[: first.index]}{entry}\n{' ' * first.column}{text[first.index :]}"


def _is_flow(node: yaml.Node) -> bool:
    return isinstance(node, yaml.CollectionNode) and bool(node.flow_style)


def _append(text: str, root: yaml.Node, name: str, value: str) -> str:
    end, column = root.end_mark.index, root.start_mark.column
    line = f"{' ' * column}{_key(name)}: {value}\n"
    return f"{text[:end]}{'' if text[:end].endswith(chr(10)) else chr(10)}{line}{text[end:]}"


def _at(data: Any, loc: Loc) -> Any:
    for part in loc:
        data = data[part] if isinstance(data, list) and isinstance(part, int) else data[str(part)]
    return data


def text_in_full(text: str) -> str:
    """Return the text of documents with every `models` as in `in_full`. Lines and comments stay in place.

    Anchors, aliases and references of several lines stay as they are.
    """
    spans = [span for root in yaml.compose_all(text, Loader) for span in _spans(root, text)]
    for start, end, new in sorted(spans, reverse=True):
        text = f"{text[:start]}{new}{text[end:]}"
    return text


def _spans(root: yaml.Node, text: str) -> Iterator[tuple[int, int, str]]:
    """Yield the replacements in a document: start, end, text."""
    for key, node in _entries(root):
        if key.value == "modules":
            for _, module in _entries(node):
                yield from (
                    span for at, one in _entries(module) if at.value == MODELS for span in _in_list(at, one, text)
                )
        elif key.value == MODELS:
            yield from _in_list(key, node, text)


def _entries(node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def _in_list(key: yaml.Node, node: yaml.Node, text: str) -> Iterator[tuple[int, int, str]]:
    start, end = node.start_mark.index, node.end_mark.index
    own = text[start:end].rstrip()
    if start < key.end_mark.index or own.startswith(("&", "!")):
        return
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if item.start_mark.index > start and (mapping := _as_mapping(item, text)) is not None:
                yield item.start_mark.index, item.end_mark.index, mapping
    elif isinstance(node, yaml.MappingNode):
        flow = own.startswith("{")
        yield start, start + len(own), f"[{own}]" if flow else "- " + re.sub(r"\n(?=[^\n])", "\n  ", own)
    elif (mapping := _as_mapping(node, text)) is not None:
        yield start, end, f"[{mapping}]"


def _as_mapping(node: yaml.Node, text: str) -> str | None:
    """Return a reference as the mapping of a model. None: it is no reference, or spans several lines."""
    own = text[node.start_mark.index : node.end_mark.index]
    if not isinstance(node, yaml.ScalarNode) or not node.tag.endswith(":str") or own.startswith(("&", "!")):
        return None
    return None if "\n" in own else f"{{model: {json.dumps(node.value, ensure_ascii=False)}}}"
