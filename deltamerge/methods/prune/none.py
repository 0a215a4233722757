"""None: keep the whole delta."""

from __future__ import annotations

from deltamerge.methods.registry import PruneMethod, declare

declare(PruneMethod("none", None, "keep the whole delta"))
