"""The kinds of delta that experts.py and decoder.py merge: unpruned, and pruned by two methods."""

from __future__ import annotations

from typing import Any, NamedTuple


class Delta(NamedTuple):
    """How each expert is pruned before it is merged; `prune` None: not at all."""

    name: str
    prune: dict[str, Any] | None = None


DELTAS = (
    Delta("unpruned"),
    *(
        Delta(f"{name} {density:g}", {"method": method, "density": density, "q": "output_change"})
        for density in (0.1, 0.01)
        for name, method in (("magnitude", "magnitude"), ("DARE", "dare"))
    ),
)
