"""numba, with a cache on disk that several processes may fill at once. Importing this imports numba."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit
from numba.core.runtime.nrt import rtsys

from deltamerge.io.ownership import trusted

Function = TypeVar("Function", bound=Callable[..., Any])

LOCK = "deltamerge.run.lock"


def compiled(function: Function) -> Function:
    """`function` compiled on its first call: no GIL, float operations as numpy's, kept on disk where it can be."""
    try:
        dispatcher: Any = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # nowhere to keep a cache
        return cast(Function, njit(nogil=True, error_model="numpy")(function))
    kept = dispatcher._cache
    folder = Path(kept.cache_path)
    if not (_is_trusted(folder) and all(map(_is_trusted, folder.glob("*.nb?")))):
        return cast(Function, njit(nogil=True, error_model="numpy")(function))
    # a loop holds the code of those it calls, which may stand in other files of its folder
    kept._cache_file._source_stamp = _stamp(Path(function.__code__.co_filename).parent)
    # two processes that each save a first signature give both the same file name: the one reads the other's code
    kept.load_overload = _alone(_whole(_without_compiler(kept), kept), folder)
    kept.save_overload = _alone(kept.save_overload, folder)
    return cast(Function, dispatcher)


def uncalled(function: Function) -> Any:
    """`function` compiled when told to, without the code that lets Python call it."""
    decorate: Any = njit(nogil=True, error_model="numpy", **{"no_cpython_wrapper": True, "no_cfunc_wrapper": True})  # type: ignore[call-overload]  # no stub
    return decorate(function)


def _without_compiler(kept: Any) -> Callable[..., Any]:
    """A cache's `load_overload`, without the compiler's knowledge of Python and numpy, of which code that is compiled
    already needs nothing but the runtime: numba would gather it first, for a tenth of a second."""

    def load(signature: Any, target: Any) -> Any:
        rtsys.initialize(target)
        with kept._guard_against_spurious_io_errors():
            return kept._load_overload(signature, target)

    return load


def _whole(load: Callable[..., Any], kept: Any) -> Callable[..., Any]:
    """`load`, which finds nothing where the files are damaged: they are made anew."""

    def found(*arguments: Any) -> Any:
        try:
            return load(*arguments)
        except Exception:  # whatever a pickle that is not whole, or LLVM, says of it
            with suppress(OSError):
                kept.flush()
            return None

    return found


def _is_trusted(path: Path) -> bool:
    try:
        return trusted(path)
    except OSError:  # another process has replaced it since
        return True


@cache
def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """The files of a folder, with time and size."""
    stats = {path.name: path.stat() for path in sorted(folder.glob("*.py"))}
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items())


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
