"""The lazy tensor: a value, the function that computes it, and the tensors that the function reads.

One graph holds the tensors that formats read, methods compute and outputs store. A stored tensor is a range of a file.
A view computes any range of its values from ranges of its inputs. The engine computes all other tensors tile by tile.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias
from weakref import ref

from deltamerge.tensors.dtypes import DTYPES, nbytes_of
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.traits import Function as Function
from deltamerge.tensors.traits import function_of as function_of
from deltamerge.tensors.traits import name_of as name_of

Kind = Literal["stored", "view", "map", "sum", "concat", "whole", "small", "stage"]
SOURCES = frozenset({"stored", "view"})  # a `Reader` computes any range of them
STORED = "stored"
PART = "part"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Tensor:
    """One value of the graph: `function` of `inputs` and of plain `parameters`.

        stored   a range of a file: `path`, `begin` and `name` are parameters
        view     f(read, tensor, start, out, **parameters) fills `out` with its bytes from element `start` on
        map      f(*inputs, tile, **parameters) -> the tile's value
        sum      f(*inputs, tile, **parameters) -> a partial per tile; the partials are added (integers only)
        concat   the same, but the partials are concatenated in tile order
        whole    f(*inputs, **parameters) -> a value of the size of the tensor; inputs that have tiles are given as a
                 `source.Source` each, which computes any range of the tensor when it is read
        small    f(*inputs, **parameters) -> a value that fits in memory (a threshold, norms, q)
        stage    f(*inputs, known, **parameters) -> a small value, computed from whole models before the first tile. Its
                 inputs are given as tensors. `known` has the values of the inputs that need no tile.

    Views have the names under which `view` registers them, other functions the name "module:name". Functions declare
    further traits (`tensors.traits`), such as the needs of `whole` functions, or when a reduction is needless.

    Stored tensors and views are interned for the process, others by their `Graph`: identity is equality. Inputs exist
    before their tensor, so graphs have no cycles. `shape` and `dtype` (a safetensors code) describe the value.

    A tensor never changes. It is not a frozen class, because a plan makes hundreds of thousands of tensors, and a plain
    class takes a third of the time.
    """

    function: str
    inputs: tuple[Tensor, ...]
    parameters: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]
    dtype: str
    kind: Kind

    def parameter(self, name: str) -> Any:
        """Return the parameter of that name."""
        for key, value in self.parameters:
            if key == name:
                return value
        raise KeyError(name)

    @property
    def tensor(self) -> Tensor:
        """Return this tensor. A reader accepts tensors with and without a name."""
        return self

    @property
    def is_source(self) -> bool:
        """Tell whether a reader computes it, without the engine."""
        return self.kind in SOURCES

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Return the inputs that the engine computes first.

        A source or a stage has none: it computes its inputs itself.
        """
        return () if self.kind in ("view", "stage") else self.inputs

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all elements."""
        return nbytes_of(self.dtype, self.shape)

    @property
    def begin(self) -> int:
        """Return the offset of a stored tensor's first byte in its file; 0 for others."""
        found: int = self.parameters[0][1] if self.kind == "stored" else 0
        return found

    @property
    def path(self) -> Path:
        """Return the file that errors name: its own, or the file of its first input."""
        found: Path = self._own("path", Path())
        return found

    @property
    def name(self) -> str:
        """Return its name in its file, or the name of its first input."""
        return str(self._own("name", ""))

    def _own(self, key: str, default: Any) -> Any:
        """Return its own parameter, or the parameter of the first input that has it."""
        tensor = self
        while True:
            for name, value in tensor.parameters:
                if name == key:
                    return value
            if not tensor.inputs:
                return default
            tensor = tensor.inputs[0]

    @property
    def whole(self) -> Tensor:
        """Return the tensor that it is a part of, or itself."""
        return self.inputs[0] if self.function == PART else self

    @property
    def read_nbytes(self) -> int:
        """Return the bytes of files that are read for its elements, such as a quantised weight's codes."""
        if (coded := self.coded) is not None:
            found: int = coded.codes.nbytes
            return found
        if self.kind == "view" and VIEWS[self.function].whole_inputs:
            return sum([one.read_nbytes for one in self.inputs])
        return self.nbytes

    @property
    def coded(self) -> Any:
        """Return the `CodedWeight` with the codes of its values. None: it has none."""
        coded = VIEWS[self.function].coded if self.kind == "view" else None
        return None if coded is None else coded(self)

    @property
    def keeps(self) -> bool:
        """Tell whether a reader keeps slabs of its inputs."""
        coded = self.coded
        return (self.kind == "view" and VIEWS[self.function].keeps) or (coded is not None and bool(coded.keeps))

    def leaves(self) -> Iterator[Tensor]:
        """Yield the stored tensors that it is computed from, each once."""
        yield from (tensor for tensor in self.graph() if tensor.kind == "stored")

    def graph(self) -> Iterator[Tensor]:
        """Yield itself and every tensor that it is computed from, each once."""
        seen, pending = {id(self)}, [self]
        while pending:
            tensor = pending.pop()
            yield tensor
            for source in tensor.inputs:
                if id(source) not in seen:
                    seen.add(id(source))
                    pending.append(source)

    def is_same(self, other: Tensor | TensorInfo) -> bool:
        """Tell whether both have the same bytes of the same files, whatever their names."""
        own, its = self, other.tensor
        if own is its or own.kind != "stored" or its.kind != "stored":
            return own is its
        return (own.shape, own.dtype, own.begin, own.path) == (its.shape, its.dtype, its.begin, its.path)


Node: TypeAlias = Tensor  # a tensor among the steps of a pass


class Read(Protocol):
    """The interface by which views read their inputs; `tensors.reader.Reader` implements it."""

    def read_into(self, info: Tensor | TensorInfo, start_elem: int, out: Any) -> None:
        """Fill the contiguous buffer `out` with the tensor's bytes from element `start_elem`."""

    def read_runs(
        self, info: Tensor | TensorInfo, offsets: NDArray[np.int64], ends: NDArray[np.int64], out: Any
    ) -> None:
        """Fill `out` with runs of the tensor's bytes. Run i begins at byte `offsets[i]` and ends at `ends[i]` of
        `out`."""

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return the value of `compute` for `key`, computed by the first thread that asks."""


@dataclass(frozen=True, slots=True)
class View:
    """A registered view: the function that fills a range, and its properties for the graph.

    entrywise   every entry is computed from one model's own entries; a merge may set single entries aside
    moves       its rows differ from the file's, or have another order
    whole_inputs   all bytes of its inputs are read for its values, once
    coded       coded(tensor): its `CodedWeight`, whose codes the compiled loop reads directly
    keeps       a reader keeps slabs of its inputs
    """

    fill: Callable[..., None]
    entrywise: bool = False
    moves: bool = False
    whole_inputs: bool = False
    coded: Callable[[Tensor], Any] | None = None
    keeps: bool = False


VIEWS: dict[str, View] = {}
_INTERNED: dict[tuple[Any, ...], ref[Tensor]] = {}
_INTERNING = threading.Lock()
_LEAST = 1 << 12  # interned tensors, before dead ones are first swept
_sweep_at = _LEAST


def view(**traits: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a view under its name. `traits` are fields of `View`.

    `function(read, tensor, start, out, **parameters)` fills `out` with bytes of `tensor` from element `start` on.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        if name in VIEWS and VIEWS[name].fill.__module__ != function.__module__:
            raise ValueError(f"{function.__module__} and {VIEWS[name].fill.__module__} both have a view {name}")
        VIEWS[name] = View(function, **traits)
        return function

    return register


def fill(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Fill `out` with the bytes of a view from element `start` on."""
    VIEWS[tensor.function].fill(read, tensor, start, out, **dict(tensor.parameters))


def stored(path: Path, begin: int, shape: tuple[int, ...], dtype: str, name: str = "") -> Tensor:
    """Return the tensor in a file from byte `begin` on. `name` is the file's own for it."""
    parameters = (("begin", begin), ("name", name), ("path", path))
    return _interned((parameters, shape, dtype), STORED, (), parameters, shape, dtype, "stored")


def viewed(
    function: Callable[..., None],
    inputs: Iterable[Tensor | TensorInfo],
    shape: tuple[int, ...],
    dtype: str,
    **parameters: Any,
) -> Tensor:
    """Return the tensor that a registered view computes from `inputs`."""
    plain, sources = tuple(sorted(parameters.items())), tuple(one.tensor for one in inputs)
    # a tensor keeps its inputs alive, so that their ids stay unique
    key = (function.__name__, tuple(map(id, sources)), plain, shape, dtype)
    return _interned(key, function.__name__, sources, plain, shape, dtype, "view")


def unique(
    function: Callable[..., None],
    inputs: Iterable[Tensor | TensorInfo],
    shape: tuple[int, ...],
    dtype: str,
    **parameters: Any,
) -> Tensor:
    """Return a view that is not interned, for parameters that no other tensor has, such as memory."""
    plain = tuple(sorted(parameters.items()))
    return Tensor(function.__name__, tuple(one.tensor for one in inputs), plain, shape, dtype, "view")


def _interned(
    key: tuple[Any, ...],
    function: str,
    inputs: tuple[Tensor, ...],
    parameters: tuple[tuple[str, Any], ...],
    shape: tuple[int, ...],
    dtype: str,
    kind: Kind,
) -> Tensor:
    global _sweep_at
    with _INTERNING:
        alive = _INTERNED.get(key)
        found = None if alive is None else alive()
        if found is None:
            found = Tensor(function, inputs, parameters, shape, dtype, kind)
            _INTERNED[key] = ref(found)
            if len(_INTERNED) >= _sweep_at:
                _sweep()
                _sweep_at = max(_LEAST, 2 * len(_INTERNED))
    return found


def _sweep() -> None:
    """Forget interned tensors that nobody has any more."""
    for key in [key for key, alive in _INTERNED.items() if alive() is None]:
        del _INTERNED[key]


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor whose elements share bytes."""
    return Tensor(tensor.function, tensor.inputs, tensor.parameters, (tensor.nbytes,), "U8", tensor.kind)


@view(entrywise=True)
def part(read: Read, tensor: Tensor, start: int, out: memoryview, *, first: int) -> None:
    """Take elements of a view from `first` on."""
    read.read_into(tensor.inputs[0], first + start, out)


def part_of(tensor: Tensor, first: int, shape: tuple[int, ...]) -> Tensor:
    """Return the elements of `tensor` from `first` on, as a tensor of `shape`."""
    if tensor.kind == "stored":
        begin = tensor.begin + first * DTYPES[tensor.dtype].bits // 8
        return stored(tensor.path, begin, shape, tensor.dtype, tensor.name)
    if tensor.function == PART:
        first += tensor.parameter("first")
    whole = tensor.whole
    return whole if not first and shape == whole.shape else viewed(part, [whole], shape, tensor.dtype, first=first)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor under the name that a model has for it.

    saved_as   the dtype of outputs like it, if it differs from `dtype`: a quantised weight is computed in float32
    """

    name: str
    tensor: Tensor
    saved_as: str | None = None

    @property
    def dtype(self) -> str:
        """Return safetensors' code of its values ("BF16")."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return self.tensor.shape

    @property
    def kind(self) -> Kind:
        """Return "stored", or "view" if its values are computed."""
        return self.tensor.kind

    @property
    def path(self) -> Path:
        """Return the file that errors name."""
        return self.tensor.path

    @property
    def begin(self) -> int:
        """Return the offset of a stored tensor's first byte in its file."""
        return self.tensor.begin

    @property
    def nbytes(self) -> int:
        """Return the bytes of all elements."""
        return self.tensor.nbytes

    @property
    def output_dtype(self) -> str:
        """Return the dtype of an output that is like this tensor."""
        return self.saved_as or self.dtype

    def is_same(self, other: Tensor | TensorInfo) -> bool:
        """Tell whether both have the same bytes of the same files, whatever their names."""
        return self.tensor.is_same(other)

    def part(self, first: int, shape: tuple[int, ...]) -> TensorInfo:
        """Return its elements from `first` on, as a tensor of `shape`."""
        return replace(self, tensor=part_of(self.tensor, first, shape))


@dataclass
class Graph:
    """Make the tensors of a plan; equal tensors are one object."""

    nodes: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def node(
        self,
        function: Function,
        inputs: Iterable[Tensor] = (),
        *,
        kind: Kind = "map",
        shape: tuple[int, ...] = (),
        dtype: str = "F32",
        **parameters: Any,
    ) -> Tensor:
        """Return the tensor with these fields.

        function   the function that computes the value, or its "module:name"
        inputs     tensors
        kind       the tensor's kind, see `Tensor`
        shape      the tensor's shape; () for small values
        dtype      safetensors code
        others     keyword arguments of the function
        """
        inputs, function = tuple(inputs), name_of(function)
        plain = tuple(sorted(parameters.items())) if len(parameters) > 1 else tuple(parameters.items())
        key = (function, inputs, plain, shape, dtype, kind)  # inputs count by identity
        found = self.nodes.get(key)
        if found is None:
            found = self.nodes[key] = Tensor(function, inputs, plain, shape, dtype, kind)
        return found

    def read(self, info: Tensor | TensorInfo) -> Tensor:
        """Return the tensor as an operand of others."""
        return info.tensor
