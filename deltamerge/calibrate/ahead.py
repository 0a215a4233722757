"""Reads tensors on a thread before they are asked for, while what comes before them is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from deltamerge.io.tensor import TensorInfo


class Ahead:
    """`read`, which may have begun: what is read and not yet asked for is held until others are begun."""

    def __init__(self, read: Callable[[TensorInfo], Tensor]) -> None:
        self._read = read
        self._thread: ThreadPoolExecutor | None = None
        self._begun: dict[TensorInfo, Future[Tensor]] = {}

    def begin(self, infos: Iterable[TensorInfo]) -> None:
        """Read these in this order; forget what has been begun."""
        self.forget()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun = {info: self._thread.submit(self._read, info) for info in infos}

    def __call__(self, info: TensorInfo) -> Tensor:
        """The tensor; the caller reads what the thread has not come to."""
        begun = self._begun.pop(info, None)
        return self._read(info) if begun is None or begun.cancel() else begun.result()

    def forget(self) -> None:
        """Free what nobody has asked for."""
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()

    def close(self) -> None:
        """Forget, and end the thread."""
        self.forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
