"""The old place of `deltamerge.AdamR`."""

import importlib
import warnings

warnings.warn("deltamerge.run.adamr has moved: from deltamerge import AdamR", DeprecationWarning, stacklevel=2)
AdamR = importlib.import_module("deltamerge").AdamR  # apps stand above this package
