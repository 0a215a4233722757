"""Regular expressions of recipes and adapters, which may be hostile: searches are limited in time."""

from __future__ import annotations

import re
import threading
import time
from functools import lru_cache
from typing import TYPE_CHECKING

from deltamerge.errors import InputError

if TYPE_CHECKING:
    import regex

# Seconds for one search, and for all searches of a recipe; an ordinary search takes a microsecond.
SECONDS = 1.0
SECONDS_IN_ALL = 10.0
LENGTH = 1000


class _Spent(threading.local):
    seconds = 0.0


_spent = _Spent()


def start_anew() -> None:
    """Reset the time that a recipe has spent."""
    _spent.seconds = 0.0


def check(pattern: str) -> None:
    """Raise ValueError unless `pattern` is a regular expression that `finds` can search with."""
    if len(pattern) > LENGTH:
        raise ValueError(f"more than {LENGTH} characters")
    if _spent.seconds >= SECONDS_IN_ALL:
        raise ValueError("these and earlier patterns take too long to read")
    began = time.perf_counter()
    try:
        re.compile(pattern)  # takes a second at most: patterns have a thousand characters
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    finally:
        _spent.seconds += time.perf_counter() - began


@lru_cache(1 << 14)  # an adapter may have a pattern for each of its modules
def _compiled(pattern: str) -> regex.Pattern[str]:
    import regex  # takes 25 ms; only recipes with patterns pay

    try:
        return regex.compile(pattern)
    except regex.error as error:  # a pattern that only `re` accepts
        raise InputError(f"{pattern[:80]!r} is no regular expression: {error}") from error


def finds(pattern: str, name: str) -> bool:
    """Tell whether `pattern` matches somewhere in `name`, like `re.search`. InputError: the search takes too long."""
    began = time.perf_counter()
    left = SECONDS_IN_ALL - _spent.seconds
    try:
        if left > 0:
            return _compiled(pattern).search(name, timeout=min(SECONDS, left)) is not None
    except TimeoutError:
        left -= SECONDS
    finally:
        _spent.seconds += time.perf_counter() - began
    what = f"takes more than {SECONDS:g} s to search {name[:200]}"
    if left <= 0:
        what = f"and the patterns before it take more than {SECONDS_IN_ALL:g} s to search all names"
    raise InputError(f"{pattern[:80]!r} {what}", hint="write it without nested repeats")
