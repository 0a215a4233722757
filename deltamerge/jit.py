"""numba, with a cache on disk that several processes may fill at once. Importing this imports numba."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])

LOCK = "deltamerge.lock"


def compiled(function: Function) -> Function:
    """`function` compiled on its first call: no GIL, float operations as numpy's, kept on disk where it can be."""
    try:
        dispatcher: Any = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # nowhere to keep a cache
        return cast(Function, njit(nogil=True, error_model="numpy")(function))
    cache = dispatcher._cache
    # two processes that each save a first signature give both the same file name: the one reads the other's code
    cache.load_overload = _alone(cache.load_overload, Path(cache.cache_path))
    cache.save_overload = _alone(cache.save_overload, Path(cache.cache_path))
    return cast(Function, dispatcher)


def _alone(call: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def locked(*arguments: Any) -> Any:
        with _held(folder):
            return call(*arguments)

    return locked


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache folder; where there are no locks, or no right to make one, go on without."""
    with ExitStack() as held:
        with suppress(ImportError, OSError):
            import fcntl

            file = held.enter_context((folder / LOCK).open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
