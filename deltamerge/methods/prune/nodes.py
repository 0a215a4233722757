"""How the pruning methods make their nodes, one function each, and masks and norms that need several passes.

`make` makes a graph's node (`engine.graph.Graph.node`); a node is whatever it returns, with its `shape`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deltamerge.methods.prune import columns, rescale, sampling, select
from deltamerge.methods.prune.bits import Key
from deltamerge.methods.prune.della import check as check_della
from deltamerge.methods.registry import Masking
from deltamerge.methods.tiles import Make


def dare(masking: Masking) -> Any:
    """Each entry by itself, with one probability for all or in proportion to abs(Δ)."""
    if masking.sampling == "magnitude":
        return sampled(masking.make, masking.delta, masking.pair, masking.key, masking.share)
    return masking.masked(*masking.pair, key=masking.key, density=masking.density)


def structured(masking: Masking) -> Any:
    """Columns that are drawn, and entries inside them."""
    return masking.masked(*masking.pair, key=masking.key, **masking.parameters)


def della(masking: Masking) -> Any:
    """By rank in the row; weighted by 1/π, unless what is kept gets the norm of the whole."""
    check_della(masking.share, masking.parameters["epsilon"])
    weighted = {"weighted": False} if masking.rescaled else {}
    return masking.masked(masking.delta, key=masking.key, density=masking.share, **masking.parameters, **weighted)


def magnitude(masking: Masking) -> Any:
    """The largest of each row, of the model, or of the tensor."""
    if masking.group == "row" and len(masking.shape) > 1:
        return masking.make(select.keep_largest_rows, [masking.delta], shape=masking.shape, density=masking.share)
    if masking.group == "model":
        return above(masking.make, masking.delta, masking.cut)
    return largest(masking.make, masking.delta, round(masking.share * math.prod(masking.shape)))


def wanda(masking: Masking) -> Any:
    """The best scores of each output's inputs; the largest of a tensor that is no weight of a linear layer.

    Of stacked experts that are stored (in, out) all scores compete, since tiles cut through an output's.
    """
    make, k = masking.make, round(masking.share * math.prod(masking.shape))
    if masking.norms is None:
        return largest(make, masking.delta, k)
    if len(masking.shape) == 3:
        inputs = [masking.delta, masking.norms]
        if not masking.transposed:
            return make(select.keep_largest_rows_stacked, inputs, shape=masking.shape, density=masking.share)
        score = make(select.scored_stacked, inputs, shape=masking.shape)
        return make(select.keep_where, [masking.delta, score, *_end(make, score, k)], shape=masking.shape)
    if masking.transposed:
        return best_of_columns(masking.make, masking.delta, masking.norms, masking.share)
    return masking.masked(masking.delta, masking.norms, density=masking.share)


def breadcrumbs(masking: Masking) -> Any:
    """What follows the largest."""
    return between(masking.make, masking.delta, masking.density, masking.parameters["gamma"])


# Steps that read little of a tensor, or nearly never any: what `largest` is for is known after one pass.
RARE = frozenset(
    f"{step.__module__}:{step.__name__}"
    for step in (select.sample, select.high_histogram, select.low_histogram, select.equal_counts)
)


def largest(make: Make, delta: Any, k: int) -> Any:
    """Δ with only its k largest magnitudes: a sample, a pass over the tensor, rarely three more, then the mask."""
    if k >= math.prod(delta.shape):
        return delta
    return make(select.keep_largest, [delta, *_end(make, delta, k)], shape=delta.shape)


def above(make: Make, delta: Any, cut: Any) -> Any:
    """Δ above a cut, and of the entries equal to it the first ones in flat order."""
    return make(select.keep_largest, [delta, cut, _ranks(make, delta, cut)], shape=delta.shape)


def between(make: Make, delta: Any, density: float, gamma: float) -> Any:
    """The int(density · n) magnitudes of Δ that follow its int(γ · n) largest; γ yields where both exceed n."""
    size = math.prod(delta.shape)
    kept = int(density * size)
    top = min(int(gamma * size), size - kept)
    if not top:
        return largest(make, delta, kept)
    cuts = [*_end(make, delta, top + kept), *_end(make, delta, top)]
    return make(select.keep_between, [delta, *cuts], shape=delta.shape)


def _end(make: Make, delta: Any, k: int) -> tuple[Any, Any]:
    """Where the k largest magnitudes end: the cut, and the ranks of those equal to it."""
    if k == 0:
        return make(select.nothing, kind="small"), make(select.no_ranks, kind="small")
    shape = delta.shape
    sample = make(select.sample, [delta], kind="concat", shape=shape)
    bracket = make(select.pick_bracket, [sample], kind="small", k=k, size=math.prod(shape))
    inside = make(select.bracketed, [delta, bracket], kind="concat", shape=shape)
    listed = make(select.gathered, [inside, bracket], kind="small")
    near = make(select.pick_listed, [listed], kind="small", k=k)
    high = make(select.high_histogram, [delta, near], kind="sum", shape=shape)
    found = make(select.find_bin, [high], kind="small", k=k)
    low = make(select.low_histogram, [delta, found], kind="sum", shape=shape)
    cut = make(select.pick_either, [near, low, found], kind="small")
    equal = make(select.equal_counts, [delta, cut], kind="concat", shape=shape)
    return cut, make(select.ranks_listed, [equal, listed, cut], kind="small")


def _ranks(make: Make, delta: Any, cut: Any) -> Any:
    equal = make(select.equal_counts, [delta, cut], kind="concat", shape=delta.shape)
    return make(select.pick_ranks, [equal], kind="small")


def matched(make: Make, whole: Any, kept: Any, norm: str) -> Any:
    """mergekit's rescaling: kept · ‖Δ‖ / ‖kept‖, as a division by ‖kept‖ / ‖Δ‖."""
    norms = [make(rescale.norm, [node], kind="concat", shape=node.shape, norm=norm) for node in (kept, whole)]
    ratio = make(rescale.ratio, norms, kind="small", norm=norm)
    return make(rescale.divide, [kept, ratio], shape=whole.shape)


def best_of_columns(make: Make, delta: Any, norms: Any, density: float) -> Any:
    """WANDA of a weight stored (in, out): each output's inputs lie in a column, which tiles cut through."""
    shape = delta.shape
    best = make(columns.best_of_columns, [delta, norms], kind="concat", shape=shape, density=density)
    cut = make(columns.pick_columns, [best], kind="small", density=density, rows=shape[0])
    equal = make(columns.equal_columns, [delta, norms, cut], kind="concat", shape=shape)
    ranks = make(columns.column_ranks, [equal], kind="small")
    return make(columns.keep_best_of_columns, [delta, norms, cut, ranks], shape=shape)


def sampled(make: Make, delta: Any, pair: Sequence[Any], key: Key, density: float) -> Any:
    """Importance sampling: two passes find c, a third draws."""
    shape = delta.shape
    expected = density * math.prod(shape)
    sums = make(sampling.sums, [delta], kind="sum", shape=shape)
    clip = make(sampling.pick_clip, [sums], kind="small", expected=expected)
    inside = make(sampling.clip_bin, [clip], kind="small")
    low = make(select.low_histogram, [delta, inside], kind="sum", shape=shape)
    c = make(sampling.factor, [low, clip], kind="small", expected=expected)
    return make(sampling.sampled, [*pair, c], shape=shape, key=key, density=density)
