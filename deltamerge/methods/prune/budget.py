"""Budget: the delta that so many bytes buy, of factors and entries in few bits, chosen by what is lost."""

from __future__ import annotations

from deltamerge.methods.registry import PruneMethod

# What is chosen and made: `methods.rate`; how it is written: `outputs.shares`.
budget = PruneMethod(
    "budget",
    None,
    "the delta artifact of so many bytes that loses least: low rank and entries, in 1 to 8 bits a number",
    options=frozenset({"bytes", "ratio", "length"}),
    shares=True,
)
