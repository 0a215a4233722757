"""Merge fine-tuned models and prune their deltas, driven by a YAML recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamerge.version import __version__

if TYPE_CHECKING:
    from deltamerge.api import apply, extract, inspect, load_recipe, merge, prune, recommend
    from deltamerge.apps.chain.follow import follow
    from deltamerge.apps.chain.live import load_delta
    from deltamerge.apps.chain.switch import Switch
    from deltamerge.apps.serve.sglang import EngineSwitch
    from deltamerge.apps.train.adamr import AdamR
    from deltamerge.apps.train.callback import DeltaCallback
    from deltamerge.apps.train.trainer import DeltaWriter
    from deltamerge.errors import DeltamergeError

__all__ = [
    "AdamR",
    "DeltaCallback",
    "DeltaWriter",
    "DeltamergeError",
    "EngineSwitch",
    "Switch",
    "__version__",
    "apply",
    "extract",
    "follow",
    "inspect",
    "load_delta",
    "load_recipe",
    "merge",
    "prune",
    "recommend",
]

# A public name, and the module that has it.
_HOME = {
    "AdamR": "deltamerge.apps.train.adamr",
    "DeltaCallback": "deltamerge.apps.train.callback",
    "DeltaWriter": "deltamerge.apps.train.trainer",
    "DeltamergeError": "deltamerge.errors",
    "EngineSwitch": "deltamerge.apps.serve.sglang",
    "Switch": "deltamerge.apps.chain.switch",
    "apply": "deltamerge.api",
    "extract": "deltamerge.api",
    "follow": "deltamerge.apps.chain.follow",
    "inspect": "deltamerge.api",
    "load_delta": "deltamerge.apps.chain.live",
    "load_recipe": "deltamerge.api",
    "merge": "deltamerge.api",
    "prune": "deltamerge.api",
    "recommend": "deltamerge.api",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
