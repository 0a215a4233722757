"""Merge fine-tuned models and prune their deltas, driven by a YAML recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltamerge.api import load_recipe, prune
    from deltamerge.delta.chain.follow import follow
    from deltamerge.delta.chain.live import load_delta
    from deltamerge.delta.chain.switch import Switch
    from deltamerge.errors import DeltamergeError
    from deltamerge.run.trainer import DeltaWriter
    from deltamerge.run.trainer_callback import DeltaCallback

__version__ = "0.1.0"
__all__ = [
    "DeltaCallback",
    "DeltaWriter",
    "DeltamergeError",
    "Switch",
    "__version__",
    "follow",
    "load_delta",
    "load_recipe",
    "prune",
]

_HOME = {
    "DeltaCallback": "deltamerge.run.trainer_callback",
    "DeltaWriter": "deltamerge.run.trainer",
    "DeltamergeError": "deltamerge.errors",
    "Switch": "deltamerge.delta.chain.switch",
    "follow": "deltamerge.delta.chain.follow",
    "load_delta": "deltamerge.delta.chain.live",
    "load_recipe": "deltamerge.api",
    "prune": "deltamerge.api",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """What Python users call, imported when it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
