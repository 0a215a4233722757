"""None: keep the whole delta."""

from __future__ import annotations

from deltamerge.methods.registry import PruneMethod

none = PruneMethod("none", None, "keep the whole delta")
