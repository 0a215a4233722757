"""RAM+: `ram`, with the entries that one model alone changed amplified (arXiv 2601.13572)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from deltamerge.methods.merge.ram import averaged, changes
from deltamerge.methods.parameters import Change
from deltamerge.methods.registry import Param, delta_method
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import densify

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deltamerge.tensors.tiles import Kept, Make, Tile

Rate = Annotated[float, Param("how much a model's own entries are amplified")]
Cap = Annotated[float, Param("cap on shared / own", low=0)]


def counts(*deltas: torch.Tensor | Kept, tile: Tile, epsilon: float) -> NDArray[np.int64]:
    """Count the entries that each model changed alone, and together with others: int64 (n, 2)."""
    dense = [densify(delta, tile.size) for delta in deltas]
    count = changes(dense, epsilon)
    rows = []
    for delta in dense:
        changed = delta.abs() > epsilon
        rows.append(torch.stack([(changed & (count == 1)).sum(), (changed & (count > 1)).sum()]))
    return torch.stack(rows).cpu().numpy()


def factors(counts: NDArray[np.int64], *, r: float, alpha: float) -> tuple[float, ...]:
    """Return 1 + r · min(shared / own, α) for each model; 1 if it changed nothing alone."""
    return tuple(1.0 + r * min(shared / own, alpha) if own else 1.0 for own, shared in counts.tolist())


def nodes(
    make: Make,
    function: str,
    inputs: list[Any],
    shape: tuple[int, ...],
    *,
    based: bool,
    epsilon: float,
    r: float,
    alpha: float,
) -> Any:
    """Make the node of `ramplus_tl`: one pass counts each model's changes, a second adds.

    epsilon    entries up to it count as unchanged
    r, alpha   used by `factors`
    """
    found = make(counts, inputs[1:], kind="sum", shape=shape, epsilon=epsilon)
    factor = make(factors, [found], kind="small", r=r, alpha=alpha)
    return make(function, [*inputs, factor], shape=shape, epsilon=epsilon)


@delta_method(
    "ram, a model's own entries × (1 + r · min(shared / own, alpha))",
    "arXiv 2601.13572",
    nodes=nodes,
)
def ramplus_tl(
    base: torch.Tensor, *inputs: Any, tile: Tile, epsilon: Change = 1e-5, r: Rate = 0.1, alpha: Cap = 0.2
) -> torch.Tensor:
    """Return `ram`, with the entries that only model i changed multiplied by its factor; float32.

    inputs     the deltas and the factors
    r, alpha   used by `nodes`, which has computed `factors`
    """
    *deltas, factor = inputs
    return averaged(base, deltas, factor, tile, epsilon)
