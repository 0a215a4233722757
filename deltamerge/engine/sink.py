"""Who takes the tiles that the engine finishes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Sink(Protocol):
    """Receives finished tiles; called from any worker, once for each byte of a tensor."""

    def write(self, name: str, offset: int, data: Any) -> None:
        """Take `data`, the bytes of tensor `name` from byte `offset`."""


@runtime_checkable
class Lender(Sink, Protocol):
    """A sink that lends the memory into which it wants the bytes written."""

    def lend(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Memory for bytes of tensor `name` from byte `offset`; may wait for earlier ones to be written."""

    def give(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Take back lent memory, now filled."""
