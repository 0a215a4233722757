"""torch and numpy, imported when they are first touched: neither checking nor planning a recipe waits for torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
else:

    class _Module:
        """A module, by its attributes."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._name), name)

    numpy, torch = _Module("numpy"), _Module("torch")
