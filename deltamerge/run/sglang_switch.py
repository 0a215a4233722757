"""The old place of `deltamerge.EngineSwitch`."""

import importlib
import warnings

warnings.warn("run.sglang_switch has moved: from deltamerge import EngineSwitch", DeprecationWarning, stacklevel=2)
EngineSwitch = importlib.import_module("deltamerge").EngineSwitch  # apps stand above this package
