"""Reads YAML into values with line and column: the YAML 1.2 core schema, without parts that recipes do not need."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import yaml

from deltamerge.errors import Problem, RecipeError, UsageError

Loc: TypeAlias = tuple[str | int, ...]
Position: TypeAlias = tuple[int, int]

STDIN = Path("-")
MAX_BYTES = 1 << 20
MAX_NODES = 100_000  # after aliases are expanded
MAX_DEPTH = 64
MAX_DOCUMENTS = 64
MAX_PROBLEMS = 200  # reported for one document

_PREFIX = "tag:yaml.org,2002:"
_MERGE = _PREFIX + "merge"
# Only these plain scalars are not strings. `no`, `on`, 1:30, 2024-01-01, 0o17 and 010 stay text. So names keep their
# letters, and a key that needs a number refuses them, because YAML versions read them differently.
_PLAIN = {
    _PREFIX + "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    _PREFIX + "null": re.compile(r"~|null|Null|NULL|"),
    _PREFIX + "int": re.compile(r"[-+]?(0|[1-9][0-9]{0,18})"),
    _PREFIX + "float": re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"),
    _MERGE: re.compile(r"<<"),
}
_KNOWN_TAGS = {*_PLAIN, _PREFIX + "str", _PREFIX + "seq", _PREFIX + "map"}


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # chosen at run time
    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own way to replace the table
        None: [(tag, re.compile(f"(?:{pattern.pattern})$")) for tag, pattern in _PLAIN.items()]
    }


class Dumper(yaml.SafeDumper):
    """Quotes text that `Loader` or YAML 1.1 would not read as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own way to replace the table
        **yaml.SafeDumper.yaml_implicit_resolvers,
        **Loader.yaml_implicit_resolvers,
    }


def dumped(data: Any, *, width: float = 80, unicode: bool = False, flow: bool = False) -> str:
    """Return YAML that `loads` and YAML 1.1 read as the same value, in the order of keys: 1e-5 as text is quoted.

    UsageError: a value that YAML has no word for, such as numpy's numbers.
    """
    try:
        text: str = yaml.dump(
            data, Dumper=Dumper, sort_keys=False, width=width, allow_unicode=unicode, default_flow_style=flow
        )
    except yaml.representer.RepresenterError as error:
        hint = "numbers, text, lists and mappings of Python: x.item(), dtype='bfloat16'"
        raise UsageError(f"{error.args[-1]!r}: is no value of a recipe", hint=hint) from None
    return text


def place(loc: Loc) -> str:
    """Return a key path as text: ("models", 0, "prune") -> "models[0].prune"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


@dataclass(frozen=True)
class YamlSource:
    """A YAML document: its text, its value, and the position of each part of the value in the file's `whole` text."""

    path: str
    text: str
    data: Any
    positions: Mapping[Loc, tuple[Position, Position]] = field(repr=False)  # of the value, of its key
    whole: str = field(repr=False)

    def locate(self, loc: Loc, *, key: bool = False) -> Position:
        """Return line and column (from 1) of the value at `loc`, or of its `key`; or of the nearest ancestor."""
        if loc in self.positions:
            return self.positions[loc][key]
        while loc not in self.positions:
            loc = loc[:-1]
        return self.positions[loc][0]

    def problem(self, loc: Loc, message: str, hint: str | None = None, *, key: bool = False) -> Problem:
        """Return a problem at the value at `loc`, or at its `key`."""
        line, column = self.locate(loc, key=key)
        return Problem(message, place(loc), line, column, hint, self.whole)


def load(path: Path) -> YamlSource:
    """Read a YAML file. Raises RecipeError with every problem found if it is not one plain UTF-8 document."""
    return loads(read(path), str(path))


def read(path: Path) -> str:
    """Return the text of a recipe file; `-` is stdin. RecipeError: no file, not UTF-8, or too large for a recipe."""

    def refuse(message: str, hint: str, line: int | None = None, column: int | None = None) -> NoReturn:
        raise RecipeError(str(path), [Problem(message, line=line, column=column, hint=hint)])

    try:
        with sys.stdin.buffer if path == STDIN else path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        refuse("no such file", f"looked in {path.parent.absolute()}")
    except (OSError, ValueError) as error:
        refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}", "give the path of a YAML file")
    if len(raw) > MAX_BYTES:
        refuse("larger than 1 MiB", "a recipe is a short text file; is this one?", 1, 1)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _position(raw[: error.start].decode("utf-8-sig", "replace"))
        refuse(f"not UTF-8: byte 0x{raw[error.start]:02x}", "save the file as UTF-8", line, column)


def loads(text: str, path: str) -> YamlSource:
    """Read YAML text; `path` is its name in messages. Raises RecipeError as `load` does."""
    return _compose(text, path, 1)[0]


def loads_all(text: str, path: str) -> tuple[YamlSource, ...]:
    """Return the documents of YAML text, each with its own text. Skip empty documents. RecipeError as for `load`."""
    return _compose(text, path, MAX_DOCUMENTS)


def _compose(text: str, path: str, most: int) -> tuple[YamlSource, ...]:
    problem = _malformed(text, most)
    if problem is not None:
        raise RecipeError(path, [replace(problem, text=text)])
    problems: list[Problem] = []
    sources: list[YamlSource] = []
    try:
        roots = list(yaml.compose_all(text, Loader))
    except yaml.YAMLError as error:
        raise RecipeError(path, [replace(_syntax(error, text), text=text)]) from None
    present: list[yaml.Node | None] = [root for root in roots if not _is_empty(root)]
    for root in present or [None]:
        builder = _Builder()
        try:
            if root is None or _is_empty(root):
                builder.stop(None, "empty", "a recipe is a mapping: base_model: …, models: …")
            if not isinstance(root, yaml.MappingNode):
                builder.stop(root, "must be a mapping of keys to values", "start with base_model: …")
            start, end = root.start_mark, root.end_mark
            own = text if len(present) == 1 else " " * start.column + text[start.index : end.index]
            sources.append(YamlSource(path, own, builder.value(root, (), root, 0), builder.positions, text))
        except _Stop:
            pass
        problems += builder.problems
    if problems:
        raise RecipeError(path, [replace(problem, text=text) for problem in problems])
    return tuple(sources)


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _PREFIX + "null" and node.value == ""


def _malformed(text: str, most: int) -> Problem | None:
    """Return the first reason to refuse a text before nodes are built: no text, no YAML, too deep, too long."""
    if len(text) > MAX_BYTES:
        return Problem("larger than 1 MiB", line=1, column=1, hint="a recipe is a short text file; is this one?")
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if found:
        line, column = _position(text[: found.start()])
        message = f"control character U+{ord(found.group()):04X}"
        return Problem(message, line=line, column=column, hint="a recipe is plain text; remove it")
    depth = documents = 0
    try:
        # PyYAML composes recursively in C and could exhaust the stack; reading events does not recurse
        for event in yaml.parse(text, Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            documents += isinstance(event, yaml.DocumentStartEvent)
            if depth > MAX_DEPTH:
                return _at(event, f"nested more than {MAX_DEPTH} deep", "a recipe is nearly flat")
            if documents > most:
                message = "a second document" if most == 1 else f"more than {most} documents"
                return _at(event, message, "one recipe a file: split it at the ---")
    except yaml.YAMLError as error:
        return _syntax(error, text)
    return None


def _syntax(error: yaml.YAMLError, text: str) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    detail = getattr(error, "problem", None) or getattr(error, "context", None) or str(error)
    if mark is None:
        return Problem(f"not YAML: {detail}", line=1, column=1, hint="check the file with a YAML editor")
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    hint = "check indentation, colons and quotes here and on the line above"
    if "\t" in line[: mark.column + 1]:
        hint = "indent with spaces: YAML does not allow tabs"
    elif "mapping values" in detail:
        hint = 'quote a value that contains ": ", and indent the keys of a mapping alike'
    elif "alias" in detail:
        hint = "an alias *name needs an anchor &name before it"
    elif "cannot start any token" in detail:
        hint = "quote a value that starts with this character"
    return Problem(f"not YAML: {detail}", line=mark.line + 1, column=mark.column + 1, hint=hint)


def _position(before: str) -> Position:
    """Return line and column of the character after `before`."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _at(node: yaml.Node | yaml.Event | None, message: str, hint: str | None = None, loc: Loc = ()) -> Problem:
    mark = None if node is None else node.start_mark
    line, column = (0, 0) if mark is None else (mark.line, mark.column)
    return Problem(message, place(loc), line + 1, column + 1, hint)


class _Stop(Exception):
    """Stop reading the file."""


class _Builder:
    """Converts nodes to plain values within bounds; collects positions and problems."""

    def __init__(self) -> None:
        self.nodes = 0
        self.positions: dict[Loc, tuple[Position, Position]] = {}
        self.problems: list[Problem] = []

    def stop(self, node: yaml.Node | None, message: str, hint: str) -> NoReturn:
        """Report a problem at `node` and stop."""
        self.problems.append(_at(node, message, hint))
        raise _Stop

    def value(self, node: yaml.Node, loc: Loc, key: yaml.Node, depth: int) -> Any:
        """Return the value of `node`; `key` is the node to report if its key is wrong."""
        start, key_start = node.start_mark, key.start_mark
        self.positions[loc] = (start.line + 1, start.column + 1), (key_start.line + 1, key_start.column + 1)
        if len(self.problems) > MAX_PROBLEMS:
            raise _Stop
        if node.tag not in _KNOWN_TAGS:
            name = node.tag.replace(_PREFIX, "!!")[:80]
            self.problems.append(_at(node, f"the tag {name} is not allowed", "write a plain value", loc))
            return None
        if isinstance(node, yaml.MappingNode):
            pairs = self.pairs(node, loc, depth)
            return {name: self.value(v, (*loc, name), k, depth + 1) for name, (k, v) in pairs.items()}
        if isinstance(node, yaml.SequenceNode):
            self.spend(node, 1 + len(node.value), depth)
            return [self.value(item, (*loc, i), item, depth + 1) for i, item in enumerate(node.value)]
        return self.scalar(node, loc)

    def spend(self, node: yaml.Node, nodes: int, depth: int) -> None:
        """Count nodes and depth: aliases make small files large, or endless if one contains itself."""
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            self.stop(node, f"more than {MAX_NODES} values once aliases are expanded", "write them out")
        if depth > MAX_DEPTH:
            self.stop(node, f"nested more than {MAX_DEPTH} deep", "does an alias contain itself?")

    def pairs(self, node: yaml.MappingNode, loc: Loc, depth: int) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return key and value nodes by the key's text. `<<` is expanded: own keys win, then the first mapping."""
        self.spend(node, 1 + len(node.value), depth)
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        inherited: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if len(self.problems) > MAX_PROBLEMS:
                raise _Stop
            if key.tag == _MERGE:
                for mapping in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(mapping, yaml.MappingNode):
                        for name, pair in self.pairs(mapping, loc, depth + 1).items():
                            inherited.setdefault(name, pair)
                    else:
                        self.problems.append(_at(mapping, "<< takes a mapping, or a list of them", None, loc))
            elif not isinstance(key, yaml.ScalarNode) or key.tag not in _KNOWN_TAGS:
                self.problems.append(_at(key, "a key must be plain text", None, loc))
            elif key.value in own:
                line = own[key.value][0].start_mark.line + 1
                message = f"duplicate key, first given on line {line}"
                self.problems.append(_at(key, message, "remove one of the two", (*loc, key.value)))
            else:
                own[key.value] = key, value
        return inherited | own

    def scalar(self, node: yaml.Node, loc: Loc) -> Any:
        """Return the value of a scalar node."""
        tag, text = node.tag, node.value
        if tag not in _PLAIN or tag == _MERGE:
            return text
        if not _PLAIN[tag].fullmatch(text):  # an explicit tag: !!int abc
            self.problems.append(_at(node, f"not {tag.replace(_PREFIX, '!!')}: {text!r}", None, loc))
            return None
        match tag.removeprefix(_PREFIX):
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text)
            case "float":
                return float(text)
        return None
