"""How a model calls its blocks: found by one forward with stubs in their place, which record their arguments."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Stop(Exception):
    """Every block has been recorded."""


class NotAChain(Exception):
    """A block's input is not the output of the one before it."""


@dataclass(frozen=True, slots=True)
class _Previous:
    """A placeholder for element `index` of the previous block's output."""

    index: int


class Trace:
    """The calls of the blocks in one forward: their arguments, with placeholders for the previous block's output."""

    def __init__(self, first: Callable[..., Any], stop_after: int | None) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.outputs: Any = None
        self.first, self.stop_after = first, stop_after

    def stub(self, i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(self.calls) != i:
                raise NotAChain
            if i == 0:
                self.calls.append((args, kwargs))
                self.outputs = self.first(*args, **kwargs)
            else:
                previous = _elements(self.outputs)

                def note(value: Any) -> Any:
                    same = (k for k, element in enumerate(previous) if value is element)
                    return next((_Previous(k) for k in same), value) if isinstance(value, Tensor) else value

                call = tuple(map(note, args)), {key: note(value) for key, value in kwargs.items()}
                if _Previous(0) not in [v for v in (*call[0], *call[1].values()) if isinstance(v, _Previous)]:
                    raise NotAChain
                self.calls.append(call)
            if len(self.calls) == self.stop_after:
                raise Stop
            return self.outputs

        return forward

    def left(self, *, again: bool) -> Any:
        """Block 0's output; it is forgotten here, as is its input unless the block runs `again`."""
        outputs, self.outputs = self.outputs, None
        if not again:
            self.calls[0] = ((), {})
        return outputs

    def call(self, i: int, outputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of block i, given the previous block's `outputs`."""
        args, kwargs = self.calls[i]
        previous = _elements(outputs)

        def fill(value: Any) -> Any:
            return previous[value.index] if isinstance(value, _Previous) else value

        return tuple(map(fill, args)), {key: fill(value) for key, value in kwargs.items()}


@contextmanager
def patched(blocks: Sequence[nn.Module], forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """`forward(i)` in the place of block i's own forward."""
    for i, block in enumerate(blocks):
        block.forward = forward(i)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _elements(outputs: Any) -> Sequence[Any]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


class Shell(nn.Module):
    """Calls a block's own forward, even while `block.forward` is patched."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


class Generating(nn.Module):
    """A model whose forward generates."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model.generate(**inputs)


def together(walks: Sequence[Generator[None, None, T]]) -> list[T]:
    """The results of walks that take their steps in turn: models of as many blocks are at the same one, so that what
    they read of it can be shared."""
    found: dict[int, T] = {}
    while len(found) < len(walks):
        for i, walk in enumerate(walks):
            if i not in found:
                try:
                    next(walk)
                except StopIteration as end:
                    found[i] = end.value
    return [found[i] for i in range(len(walks))]
