"""torch and numpy, imported when they are first touched: neither checking nor planning a recipe waits for them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
    from numpy.typing import NDArray as NDArray
else:

    class _LazyModule:
        """A module, by its attributes."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            found = getattr(importlib.import_module(self._name), name)
            if not name.startswith("_"):
                setattr(self, name, found)  # the next look finds it without a call
            return found

    numpy, torch = _LazyModule("numpy"), _LazyModule("torch")
    NDArray = Any  # annotations are never evaluated
