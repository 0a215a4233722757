"""Which code computes in a test: the one place that knows how the compiled loops are turned off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from deltamerge import backends

COMPILED, TORCH = "compiled", "torch"


def available() -> tuple[str, ...]:
    """The backends of this installation."""
    return (COMPILED, TORCH) if backends.fused_available() else (TORCH,)


@contextmanager
def computed_by(backend: str) -> Iterator[None]:
    """Plans that are made inside compute with one backend: the compiled loops wherever they reach, or torch alone."""
    with patch.object(backends, "fused_available", lambda: backend == COMPILED):
        yield
