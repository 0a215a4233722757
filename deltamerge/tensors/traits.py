"""Traits of the functions that compute nodes: their operations in the compiled loop, and their needs.

A function declares its traits where it stands:

    @traits(loop=variance_loop)
    def variance(*deltas, tile): ...

The engine imports no method. It asks the function that a node names.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, TypeVar

# A function at the top of its module, or its name "module:name".
Function: TypeAlias = str | Callable[..., Any]
Node: TypeAlias = Any  # a `Tensor`, which knows functions by these names
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@cache
def name_of(function: Function) -> str:
    """Return "module:name" of a function, its name in tensors. Names are returned unchanged.

    Raises ValueError for a function without a name in its module: a lambda, or a nested function.
    """
    if isinstance(function, str):
        return function
    if not function.__qualname__.isidentifier():
        raise ValueError(f"{function.__module__}: {function.__qualname__} is no function at the top of its module")
    return f"{function.__module__}:{function.__qualname__}"


def function_of(function: Function) -> Callable[..., Any]:
    """Return the function that a name "module:name" stands for; functions are themselves."""
    return _imported(function) if isinstance(function, str) else function


@cache
def _imported(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]  # any callable by name


@dataclass(frozen=True, slots=True)
class Traits:
    """The declarations of a function.

    loop        loop(assembly, node, **parameters) adds the node's operations to the compiled loop; None: torch only
    fits        fits(node, root): whether the loop can do this node of the tensor `root`; None: always
    sparse      sparse(node): whether the node's value is `Kept`; None: never
    patches     with sparse inputs, the value is the first input changed at their places
    stores      the value is the output itself, in its dtype
    sorts       sorts the entries of rows: a register holds whole rows
    vectors     a tensor without rows is one row
    sums        gives sums of blocks: with `sorts` in one pass a register holds a block
    samples     samples(shape): the run of entries that it reads of each block; None: it reads all
    rare        a reduction whose pass reads little of a tensor, or is almost never needed
    needless    needless(*small inputs): whether a reduction needs no pass; its value is then None
    reads       how often a stage reads each of its inputs, if that is more than calibration counts
    needs       needs(**parameters): (bytes, operations) of a `whole` function, including its value
    """

    loop: Callable[..., None] | None = None
    fits: Callable[[Node, Node], bool] | None = None
    sparse: Callable[[Node], bool] | None = None
    patches: bool = False
    stores: bool = False
    sorts: bool = False
    vectors: bool = False
    sums: bool = False
    samples: Callable[[tuple[int, ...]], int] | None = None
    rare: bool = False
    needless: Callable[..., bool] | None = None
    reads: int = 0
    needs: Callable[..., tuple[int, float]] | None = None


PLAIN = Traits()


def traits(**declared: Any) -> Callable[[AnyFunction], AnyFunction]:
    """Declare the traits of a function."""

    def declare(function: AnyFunction) -> AnyFunction:
        vars(function)["traits"] = Traits(**declared)
        return function

    return declare


@cache
def traits_of(function: str) -> Traits:
    """Return the traits of the function "module:name"."""
    if ":" not in function:
        return PLAIN
    found = getattr(function_of(function), "traits", None)
    return found if isinstance(found, Traits) else _by_suffix(function)


def _by_suffix(function: str) -> Traits:
    """Read the old form of packages of methods: functions `f_needs` and `f_needless` beside `f`."""
    module, _, name = function.partition(":")
    beside = vars(importlib.import_module(module))
    found = {key: beside[f"{name}_{key}"] for key in ("needs", "needless") if f"{name}_{key}" in beside}
    if found:
        keys = ", ".join(f"{key}={name}_{key}" for key in found)
        warnings.warn(f"{function}: declare it by @traits({keys})", FutureWarning, stacklevel=2)
    return Traits(**found)


def is_sparse(node: Node) -> bool:
    """Tell whether a node's value is `Kept`."""
    if node.is_source:
        return False
    sparse = traits_of(node.function).sparse
    return sparse is not None and sparse(node)


def first_is_sparse(node: Node) -> bool:
    """Tell whether a node's first input is `Kept`: `sparse` of functions that keep its form."""
    return is_sparse(node.inputs[0])


def first_is_dense(node: Node, root: Node) -> bool:
    """Tell whether a node's first input is dense: `fits` of functions that are compiled only for dense tiles."""
    return not is_sparse(node.inputs[0])
