"""The meaning of a config.json beyond its text: transformers' config classes, whose source is read, never run.

A class states its keys with their defaults, and computes more from them in `__post_init__` (`head_dim` from the width
and the heads, `layer_types` from a period). Both are read from the source's syntax tree. Whatever the reader does not
understand is `UNKNOWN`, which equals nothing.
"""

from __future__ import annotations

import ast
import importlib.util
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

LONGEST = 100_000  # most entries of a computed list
LONGEST_TYPE = 100  # letters
ROOT = "PreTrainedConfig"  # the class of all configs
METHOD = "__post_init__"
_MUTATING = frozenset({"append", "extend", "insert", "pop", "remove", "update", "setdefault", "clear"})


class _Unknown:
    """A value that cannot be told from the source."""

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = _Unknown()


@dataclass(frozen=True, slots=True)
class ConfigClass:
    """A config class of transformers.

    keys      the keys that it states, and their defaults
    aliases   other names of its keys -> its keys (`hidden_size` -> `n_embd`)
    theta     the default base of its rotary positions: a number, or numbers by kind of layer
    sections  the classes of its nested configs, by key
    kind      its model type; "" if it has no own type
    steps     the statements that compute values from keys, the first ancestor's first
    """

    keys: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    theta: Any = 10000.0
    sections: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""
    steps: tuple[ast.stmt, ...] = ()

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of every key, for a config.json that may leave keys out; `UNKNOWN` if it cannot be told."""
        stated = {self.aliases.get(key, key): value for key, value in config.items()}
        values = {**self.keys, **{key: value for key, value in stated.items() if key in self.keys}}
        more = {key: value for key, value in stated.items() if key not in self.keys}
        _Steps(values, more).run(self.steps)
        return {key: values[key] for key in self.keys}


@cache
def models_folder() -> Path | None:
    """Return the folder of transformers' models; None where it is not installed."""
    spec = importlib.util.find_spec("transformers")
    found = Path(spec.origin).parent / "models" if spec is not None and spec.origin else None
    return found if found is not None and found.is_dir() else None


def folders_near(model_type: str) -> list[str]:
    """Return the names of folders that may hold the models of a type: the type's name, and prefixes of it."""
    parts = re.sub(r"[^a-z0-9]+", "_", model_type.lower()).split("_")
    return ["_".join(parts[:n]) for n in range(len(parts), 0, -1)]


@cache
def class_of_type(model_type: str) -> ConfigClass | None:
    """Return the config class of a model type; None where transformers is not installed or has none."""
    if len(model_type) > LONGEST_TYPE:
        return None
    return _found(re.compile(rf"^    model_type(?:: [^=\n]+)? = [\"']{re.escape(model_type)}[\"']", re.M), model_type)


@cache
def class_named(name: str, near: str = "") -> ConfigClass | None:
    """Return the config class of a name; `near` is the model type of the config that it is nested in."""
    return _found(re.compile(rf"^class {re.escape(name)}\(", re.M), near or name)


def _found(wanted: re.Pattern[str], near: str) -> ConfigClass | None:
    root = models_folder()
    for path in () if root is None else _modules(root, near):
        text = path.read_text(encoding="utf-8")
        if (match := wanted.search(text)) is not None:
            line = text.count("\n", 0, match.end()) + 1
            module = _module(path)
            owner = next((n for n, node in module.classes.items() if node.lineno <= line <= (node.end_lineno or 0)), "")
            return _read(module, owner) if owner else None
    return None


def _modules(root: Path, near: str) -> Iterator[Path]:
    names = [name for name in folders_near(near) if name]
    for name in names:
        yield from sorted((root / name).glob("configuration_*.py"))
    yield from (path for path in sorted(root.glob("*/configuration_*.py")) if path.parent.name not in names)


@dataclass(frozen=True, slots=True)
class _Module:
    """The classes of a source file, and where the names come from that it imports."""

    classes: Mapping[str, ast.ClassDef]
    imports: Mapping[str, tuple[Path, str]]


@cache
def _module(path: Path) -> _Module:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    imports: dict[str, tuple[Path, str]] = {}
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            place = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            imports |= {name.asname or name.name: (place, name.name) for name in node.names}
    return _Module({node.name: node for node in body if isinstance(node, ast.ClassDef)}, imports)


def _read(module: _Module, name: str) -> ConfigClass:
    """Return a class with its inherited keys and statements."""
    keys: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    sections: dict[str, str] = {}
    theta: Any = 10000.0
    kind = ""
    steps: list[ast.stmt] = []
    for node in _lineage(module, name):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                if "ClassVar" not in ast.unparse(item.annotation):
                    keys[item.target.id] = UNKNOWN if item.value is None else _default(item.value)
            elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
                what, value = item.targets[0].id, item.value
                if what == "model_type":
                    kind = str(_default(value))
                elif what == "attribute_map":
                    aliases = _default(value) if isinstance(_default(value), dict) else {}
                elif what == "default_theta":
                    theta = _default(value)
                elif what in ("sub_configs_defaults", "sub_configs") and isinstance(value, ast.Dict):
                    sections = dict(_sections(value))
                elif what in keys:
                    keys[what] = _default(value)
            elif isinstance(item, ast.FunctionDef) and item.name == METHOD and node.name != ROOT:
                steps = _inlined(item.body, steps)
            elif isinstance(item, ast.FunctionDef) and item.name == "__init__" and node.name != ROOT:
                keys |= _arguments(item.args)
    return ConfigClass(keys, aliases, theta, sections, kind, tuple(steps))


def _lineage(module: _Module, name: str) -> list[ast.ClassDef]:
    """Return a class and its ancestors within transformers, the first ancestor first."""
    node = module.classes[name]
    above: list[ast.ClassDef] = []
    for base in node.bases:
        if not isinstance(base, ast.Name):
            continue
        if base.id in module.classes:
            above += _lineage(module, base.id)
        elif base.id in module.imports:
            path, named = module.imports[base.id]
            if path.is_file() and named in _module(path).classes:
                above += _lineage(_module(path), named)
    return [*above, node]


def _inlined(body: list[ast.stmt], above: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements of a method, with the parent's statements in place of its call."""
    made: list[ast.stmt] = []
    for statement in body:
        is_super = "super().__post_init__" in ast.unparse(statement)
        made += above if is_super else [statement]
    return made


def _arguments(args: ast.arguments) -> dict[str, Any]:
    """Return the keys of a class that is written as a function of them."""
    names = [arg.arg for arg in args.args][-len(args.defaults) :] if args.defaults else []
    found = dict(zip(names, map(_default, args.defaults), strict=True))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found[arg.arg] = UNKNOWN if default is None else _default(default)
    return found


def _sections(value: ast.Dict) -> Iterator[tuple[str, str]]:
    """Yield the keys of nested configs, and the class of each, or its model type behind a colon."""
    for key, spec in zip(value.keys, value.values, strict=True):
        if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
            continue
        if isinstance(spec, ast.Name):
            yield key.value, spec.id
        elif isinstance(spec, ast.Call):
            said = {word.arg: word.value for word in spec.keywords}
            kind, named = said.get("model_type"), said.get("config_class")
            if isinstance(kind, ast.Constant):
                yield key.value, f":{kind.value!s}"
            elif isinstance(named, ast.Name):
                yield key.value, named.id


def _default(node: ast.expr) -> Any:
    """Return the default that a class states, where it is plain."""
    if isinstance(node, ast.Call):
        said = {word.arg: word.value for word in node.keywords}
        if "default" in said:
            return _default(said["default"])
        made = said.get("default_factory")
        if isinstance(made, ast.Lambda):
            return _default(made.body)
        return {"list": [], "dict": {}}.get(made.id, UNKNOWN) if isinstance(made, ast.Name) else UNKNOWN
    try:
        return _Steps({}, {}).value(node)
    except _Unreadable:
        return UNKNOWN


def _changed_in(statement: ast.stmt) -> list[ast.expr]:
    """Return the names and keys that a statement sets, or calls a method of (`self.layer_types.append`)."""
    found: list[ast.expr] = []
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATING:
            holder = node.func.value
            if isinstance(holder, ast.Attribute) and isinstance(holder.value, ast.Name) and holder.value.id == "self":
                found.append(holder)
    return found


class _Unreadable(Exception):
    """An expression that is not understood, or depends on an unknown value."""


_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod,
}  # fmt: skip
_COMPARE: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_CALLS: Mapping[str, Callable[..., Any]] = {
    "bool": bool, "int": int, "float": float, "len": len, "list": list, "max": max, "min": min, "sum": sum,
}  # fmt: skip


class _Steps:
    """Statements of a config class, followed as far as they are assignments, conditions and plain arithmetic.

    `values` are the changing values of its keys, `more` the keys of a config that the class does not state.
    """

    def __init__(self, values: dict[str, Any], more: Mapping[str, Any]) -> None:
        self.values, self.more = values, dict(more)
        self.known: dict[str, Any] = {}

    def run(self, body: tuple[ast.stmt, ...] | list[ast.stmt]) -> None:
        """Follow statements. A value from a statement that is not understood is `UNKNOWN`."""
        for statement in body:
            try:
                self._step(statement)
            except _Unreadable:
                for node in _changed_in(statement):
                    with suppress(_Unreadable):
                        self._put(node, UNKNOWN)

    def _step(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.If):
            self.run(statement.body if self.value(statement.test) else statement.orelse)
        elif isinstance(statement, ast.For) and isinstance(statement.target, ast.Name) and not statement.orelse:
            for item in self.value(statement.iter):
                self.known[statement.target.id] = item
                self._all(statement.body)
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self._put(statement.targets[0], self.value(statement.value))
        elif isinstance(statement, ast.Expr) and not _changed_in(statement):
            return  # a call for its effect, such as a warning
        elif isinstance(statement, ast.Return | ast.Pass | ast.Raise):
            return
        else:
            raise _Unreadable

    def _all(self, body: list[ast.stmt]) -> None:
        """Follow the statements of a loop. _Unreadable: one is not understood."""
        for statement in body:
            match statement:
                case ast.If():
                    self._all(statement.body if self.value(statement.test) else statement.orelse)
                case ast.Expr(value=ast.Call(func=ast.Attribute(value=holder, attr="append"), args=[item])):
                    before = self.value(holder)
                    if not isinstance(before, list):
                        raise _Unreadable
                    self._put(
                        holder, [*before, self.value(item)]
                    )  # a new list, because the old list may be the config's
                case _:
                    self._step(statement)

    def _put(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.known[target.id] = value
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self.values[target.attr] = value
        else:
            raise _Unreadable

    def value(self, node: ast.expr) -> Any:
        """Return the value of an expression. _Unreadable: it cannot be told."""
        try:
            found = self._value(node)
        except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise _Unreadable from error
        if found is UNKNOWN:
            raise _Unreadable
        return found

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self.known[node.id]
            case ast.Attribute(value=ast.Name(id="self")):
                return self.values[node.attr]
            case ast.List() | ast.Tuple():
                return [self.value(item) for item in node.elts]
            case ast.Dict():
                return {self.value(k): self.value(v) for k, v in zip(node.keys, node.values, strict=True) if k}
            case ast.Subscript():
                return self.value(node.value)[self.value(node.slice)]
            case ast.UnaryOp(op=ast.Not()):
                return not self.value(node.operand)
            case ast.UnaryOp(op=ast.USub()):
                return -self.value(node.operand)
            case ast.BinOp():
                return self._binary(type(node.op), self.value(node.left), self.value(node.right))
            case ast.BoolOp():
                return self._either(node)
            case ast.IfExp():
                return self.value(node.body if self.value(node.test) else node.orelse)
            case ast.Compare():
                return self._compared(node)
            case ast.ListComp():
                return self._listed(node)
            case ast.Call():
                return self._called(node)
        raise _Unreadable

    @staticmethod
    def _binary(kind: type, left: Any, right: Any) -> Any:
        if isinstance(left, list | str) or isinstance(right, list | str):
            size = len(left) if isinstance(left, list | str) else left
            times = len(right) if isinstance(right, list | str) else right
            if kind is ast.Mult and size * times > LONGEST:
                raise _Unreadable
        return _BINARY[kind](left, right)

    def _either(self, node: ast.BoolOp) -> Any:
        found = None
        for part in node.values:
            found = self.value(part)
            if bool(found) is isinstance(node.op, ast.Or):
                break
        return found

    def _compared(self, node: ast.Compare) -> bool:
        left = self.value(node.left)
        for kind, right in zip(node.ops, map(self.value, node.comparators), strict=True):
            if not _COMPARE[type(kind)](left, right):
                return False
            left = right
        return True

    def _listed(self, node: ast.ListComp) -> list[Any]:
        (loop,) = node.generators
        if not isinstance(loop.target, ast.Name) or loop.is_async:
            raise _Unreadable
        made, before = [], dict(self.known)
        for item in self.value(loop.iter):
            self.known[loop.target.id] = item
            if all(self.value(test) for test in loop.ifs):
                made.append(self.value(node.elt))
        self.known = before
        return made

    def _called(self, node: ast.Call) -> Any:
        function, given = node.func, node.args
        if isinstance(function, ast.Name):
            if function.id == "range":
                numbers = range(*map(self.value, given))
                if len(numbers) > LONGEST:
                    raise _Unreadable
                return list(numbers)
            if function.id in ("getattr", "hasattr") and isinstance(given[0], ast.Name) and given[0].id == "self":
                name = self.value(given[1])
                if function.id == "hasattr":
                    return name in self.values
                return self.values[name] if name in self.values else self.value(given[2])
            return _CALLS[function.id](*map(self.value, given))
        match function:
            case ast.Attribute(value=ast.Name(id="kwargs"), attr="get" | "pop"):
                name = self.value(given[0])
                default = self.value(given[1]) if len(given) > 1 else None
                return self.more.pop(name, default) if function.attr == "pop" else self.more.get(name, default)
        raise _Unreadable
