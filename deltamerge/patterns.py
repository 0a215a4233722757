"""Regular expressions of recipes and adapters, which may come from strangers: none searches a name for ever."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from deltamerge.errors import InputError

if TYPE_CHECKING:
    import regex

# What a search may take; an honest one takes a microsecond.
SECONDS = 1.0


@lru_cache(1024)
def _compiled(pattern: str) -> regex.Pattern[str]:
    import regex  # a fortieth of a second, for those who have patterns

    try:
        return regex.compile(pattern)
    except regex.error as error:  # what `re` takes and regex does not
        raise InputError(f"{pattern[:80]!r} is no regular expression: {error}") from error


def finds(pattern: str, name: str) -> bool:
    """Whether `pattern` matches somewhere in `name`, as `re.search`. InputError: it takes too long to tell."""
    try:
        return _compiled(pattern).search(name, timeout=SECONDS) is not None
    except TimeoutError:
        message = f"{pattern[:80]!r} takes more than {SECONDS:g} s to search {name[:200]}"
        raise InputError(message, hint="write it without nested repeats") from None
