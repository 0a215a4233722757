"""What was made last, kept for the threads that are about to ask for it again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class RecentParts:
    """The values of the `most` keys last asked for; each is made by one thread, for which the others wait."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._made: OrderedDict[Hashable, tuple[threading.Lock, list[Any]]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, by `make` if it is not there."""
        with self._lock:
            lock, made = self._made.setdefault(key, (threading.Lock(), []))
            self._made.move_to_end(key)
            if len(self._made) > self._most:
                self._made.popitem(last=False)
        with lock:
            if not made:
                made.append(make())
        found: T = made[0]
        return found

    def known(self, key: Hashable) -> Any:
        """The value of a key, None where it is not there, or not yet."""
        with self._lock:
            if key not in self._made:
                return None
            self._made.move_to_end(key)
            return next(iter(self._made[key][1]), None)
