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
            self._name, self._module = name, None

        def __getattr__(self, name: str) -> Any:
            if self._module is None:
                self._module = importlib.import_module(self._name)
            return getattr(self._module, name)

    numpy, torch = _Module("numpy"), _Module("torch")
