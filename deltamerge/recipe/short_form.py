"""Short forms: one model may stand without its list, and by its reference alone; a tokenizer by its source alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import yaml

from deltamerge.recipe.yaml_source import Loader, Loc, Position, YamlSource

MODELS, TOKENIZER, SOURCE = "models", "tokenizer", "source"


def in_full(read: YamlSource) -> YamlSource:
    """A document with every `models` as a list of mappings and its `tokenizer` as one; the values added stand where
    their short form does."""
    data: dict[str, Any] = dict(read.data)
    positions = dict(read.positions)
    for loc, holder in _holders(data):
        given, at = holder.get(MODELS), (*loc, MODELS)
        if isinstance(given, str | dict):
            given = [given]
            positions |= _moved(read, at, 0)
        if isinstance(given, list):
            holder[MODELS] = [{"model": one} if isinstance(one, str) else one for one in given]
            items = [i for i, one in enumerate(given) if isinstance(one, str) and (*at, i) in positions]
            positions |= {(*at, i, "model"): positions[*at, i] for i in items}
    if isinstance(data.get(TOKENIZER), str):
        data[TOKENIZER] = {SOURCE: data[TOKENIZER]}
        if (TOKENIZER,) in positions:
            positions[TOKENIZER, SOURCE] = positions[TOKENIZER,]
    return replace(read, data=data, positions=positions)


def _holders(data: dict[str, Any]) -> Iterator[tuple[Loc, dict[str, Any]]]:
    """What has models: the recipe, and its modules, which are copied so that they can be changed."""
    yield (), data
    if isinstance(data.get("modules"), dict):
        data["modules"] = {name: dict(one) if isinstance(one, dict) else one for name, one in data["modules"].items()}
        yield from ((("modules", name), one) for name, one in data["modules"].items() if isinstance(one, dict))


def _moved(read: YamlSource, at: Loc, index: int) -> dict[Loc, tuple[Position, Position]]:
    """The positions at and below a place, as those of an item of a list there."""
    n = len(at)
    return {(*at, index, *loc[n:]): position for loc, position in read.positions.items() if loc[:n] == at}


def text_in_full(text: str) -> str:
    """The text of documents with every `models` as `in_full` has it. Lines and comments stay where they are; so does
    what has an anchor or is an alias, or is a reference of several lines."""
    spans = [span for root in yaml.compose_all(text, Loader) for span in _spans(root, text)]
    for start, end, new in sorted(spans, reverse=True):
        text = f"{text[:start]}{new}{text[end:]}"
    return text


def _spans(root: yaml.Node, text: str) -> Iterator[tuple[int, int, str]]:
    """What is to be replaced in a document: from, to, by what."""
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
    """A reference as the mapping of a model; None where it is none, or not on one line."""
    own = text[node.start_mark.index : node.end_mark.index]
    if not isinstance(node, yaml.ScalarNode) or not node.tag.endswith(":str") or own.startswith(("&", "!")):
        return None
    return None if "\n" in own else f"{{model: {json.dumps(node.value, ensure_ascii=False)}}}"
