"""Merge fine-tuned models and prune their deltas, driven by a YAML recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltamerge.io.delta import load_delta

__version__ = "0.1.0"
__all__ = ["__version__", "load_delta"]


def __getattr__(name: str) -> Any:
    """`deltamerge.load_delta`, imported when it is asked for."""
    if name == "load_delta":
        from deltamerge.io.delta import load_delta

        return load_delta
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
