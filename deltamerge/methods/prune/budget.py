"""Budget: a delta of so many bytes, from factors and entries in few bits, chosen for the least loss."""

from __future__ import annotations

from deltamerge.methods.registry import PruneMethod

# `methods.rate` chooses and makes the parts, `outputs.shares` writes them.
budget = PruneMethod(
    "budget",
    None,
    "the delta artifact of so many bytes that loses least: low rank and entries, in 1 to 8 bits a number",
    options=frozenset({"bytes", "ratio", "length"}),
    shares=True,
)
