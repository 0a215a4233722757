"""Reads tensors on a thread before they are asked for, while what comes before them is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from deltamerge.tensors.tensor import TensorInfo

T = TypeVar("T")


class Ahead(Generic[T]):
    """`read`, which may have begun: what is begun and not asked for is held until others have been begun twice."""

    def __init__(self, read: Callable[[TensorInfo], T]) -> None:
        self._read = read
        self._thread: ThreadPoolExecutor | None = None
        self._before: dict[TensorInfo, Future[T]] = {}
        self._begun: dict[TensorInfo, Future[T]] = {}

    def begin(self, infos: Iterable[TensorInfo]) -> None:
        """Read these in this order; those of the last time are asked for now, those before that are forgotten."""
        _cancel(self._before)
        self._before, self._begun = self._begun, {}
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun = {info: self._thread.submit(self._read, info) for info in infos if info not in self._before}

    def __call__(self, info: TensorInfo) -> T:
        """The tensor; the caller reads what the thread has not come to."""
        begun = self._before.pop(info, None) or self._begun.pop(info, None)
        return self._read(info) if begun is None or begun.cancel() else begun.result()

    def forget(self) -> None:
        """Free what nobody has asked for."""
        _cancel(self._before)
        _cancel(self._begun)

    def close(self) -> None:
        """Forget, and end the thread."""
        self.forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def _cancel(futures: dict[TensorInfo, Future[T]]) -> None:
    for future in futures.values():
        future.cancel()
    futures.clear()
