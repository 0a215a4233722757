"""Every pruning and merge method: one entry each, its parameters beside its function. No torch here.

A new method is a pure tensor function in `merge/` or `prune/` and one entry in MERGE (those that keep what every task's
fine-tune can do: `table_tasks`) or PRUNE; checks, the schema and
the planner read these tables. Other packages add theirs by an entry point of
the group `deltamerge.methods`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from deltamerge.errors import DeltamergeError
from deltamerge.methods.registry import MergeMethod, Names, Param, PruneMethod, third_party
from deltamerge.methods.table_tasks import TASKS

if TYPE_CHECKING:
    from deltamerge.methods.merge import arithmetic, elementwise, fusion, ram, sce, span, ties
    from deltamerge.methods.prune import della, masks, nodes, select
else:  # neither torch nor numpy is imported before a function runs
    arithmetic, elementwise, fusion, ram, sce, span, ties = (
        Names(f"deltamerge.methods.merge.{module}")
        for module in ("arithmetic", "elementwise", "fusion", "ram", "sce", "span", "ties")
    )
    della, masks, nodes, select = (
        Names(f"deltamerge.methods.prune.{module}") for module in ("della", "masks", "nodes", "select")
    )

Method = TypeVar("Method", MergeMethod, PruneMethod)

# Keys of `prune` that mean something, or nothing, with every method.
COMMON_KEYS = frozenset({"method", "include", "exclude"})

# mergekit's parameters that only tune its execution: accepted at every level, no effect.
NO_EFFECT = MappingProxyType({"int8_mask": Param("mergekit's mask storage; no effect", False, "bool", per_model=True)})

# mergekit's command line flags that some write into the YAML, where mergekit ignores them: so do we.
NO_EFFECT_KEYS = frozenset(
    {
        "allow_crimes", "async_write", "clone_tensors", "copy_tokenizer", "cuda", "device", "gpu_rich",
        "lazy_unpickle", "low_cpu_memory", "multi_gpu", "num_threads", "out_shard_size", "quiet", "read_to_gpu",
        "safe_serialization", "transformers_cache", "verbosity", "write_model_card", "write_threads",
    }
)  # fmt: skip

_WEIGHT = Param("factor of the model", per_model=True, alone=1.0)
_SHARE = Param("share of the model", per_model=True, alone=1.0)
_DELTA_WEIGHT = Param("factor of the model's delta", per_model=True, alone=1.0)
_LAMBDA = Param("factor of the merged delta", 1.0)
_DENSITY = Param("fraction of the delta's entries kept", 1.0, low=0, high=1, per_model=True, prunes=True)
_NORMALIZE = Param("divide by the sum of the weights", False, "bool")
_NORMALIZED = Param("divide by the sum of the weights", True, "bool")
_RESCALE = Param("divide what is kept by the density; false is random drop", True, "bool", scalar=True, prunes=True)
_MATCH = Param("give what is kept the sum of magnitudes of the whole", False, "bool", scalar=True, prunes=True)
_EPSILON = Param("half the spread of the keep probabilities", 0.15, low=0, high=1, per_model=True, prunes=True)
_GAMMA = Param("fraction of the entries dropped as the largest", 0.01, low=0, high=1, per_model=True, prunes=True)

_SUM = {"weight": _DELTA_WEIGHT, "normalize": _NORMALIZE, "lambda": _LAMBDA}
_DARE = {**_SUM, "density": _DENSITY, "rescale": _RESCALE}
_DELLA = {**_DARE, "epsilon": _EPSILON}
_BREADCRUMBS = {**_SUM, "density": _DENSITY, "gamma": _GAMMA, "rescale": _MATCH}


def _table(built_in: Iterable[Method], others: Iterable[Any], kind: type[Method]) -> Mapping[str, Method]:
    """By name; what another package registers may not take a name that is there."""
    table = {method.name: method for method in built_in}
    for method in others:
        if isinstance(method, kind):
            if method.name in table:
                raise DeltamergeError(f"method {method.name} of another package: the name is taken")
            table[method.name] = method
    return MappingProxyType(table)


# Methods that work on deltas, which need a base; and those that add up such deltas.
_on_deltas = partial(MergeMethod, needs_base=True, deltas=True)
_added = partial(_on_deltas, adds=True, keeps_single=arithmetic.keeps_single)

_MERGE = (
    MergeMethod(
        "linear",
        arithmetic.linear,
        "Σ w_i x_i, ÷ Σ w_i if normalize; the base is an input like any other",
        "arXiv 2203.05482",
        {"weight": _WEIGHT, "normalize": _NORMALIZED},
    ),
    MergeMethod(
        "slerp",
        span.slerp,
        "from the base to one other along the arc between the flattened tensors",
        None,
        {"t": Param("0 is the base, 1 the other")},
        needs_base=True,
        maximum=1,
        nodes=span.nodes,
    ),
    MergeMethod(
        "nuslerp",
        span.nuslerp,
        "slerp of two models, or with a base of their deltas, at t = w_2 / Σ w",
        None,
        {
            "weight": _SHARE,
            "nuslerp_flatten": Param("whole tensors; false: row by row", True, "bool", scalar=True),
            "nuslerp_row_wise": Param("where not flattened, along the first dimension", False, "bool", scalar=True),
        },
        takes_base=True,
        deltas=True,
        minimum=2,
        maximum=2,
        nodes=span.nodes,
    ),
    MergeMethod(
        "multislerp",
        span.multislerp,
        "barycentre of directions in the tangent space of their mean, × Σ w_i ‖x_i‖; with a base of deltas",
        "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        {
            "weight": _SHARE,
            "normalize_weights": Param("divide the weights by their sum", True, "bool"),
            "eps": Param("added to norms before dividing by them", 1e-8, low=0),
        },
        takes_base=True,
        deltas=True,
        nodes=span.nodes,
        keeps_single=span.keeps_single,
    ),
    MergeMethod(
        "karcher",
        span.karcher,
        "Riemannian mean of the directions × mean norm; a base, listed or not, is one of the models",
        "arXiv 2603.04972",
        {
            "max_iter": Param("iterations at most", 10, "integer", low=0, scalar=True),
            "tol": Param("angles below this are none", 1e-5, low=0),
        },
        takes_base=True,
        nodes=span.nodes,
        keeps_single=span.keeps_single,
    ),
    _added(
        "task_arithmetic",
        arithmetic.task_arithmetic,
        "base + λ Σ w_i Δ_i, ÷ Σ w_i if normalize",
        "arXiv 2212.04089",
        _SUM,
    ),
    _added(
        "ties",
        ties.ties,
        "keep the top int(density · n) of abs(Δ_i), elect a sign per entry, add the w_i Δ_i of that sign",
        "arXiv 2306.01708",
        {**_SUM, "normalize": _NORMALIZED, "density": _DENSITY, "rescale": _MATCH},
    ),
    _added(
        "dare_linear",
        arithmetic.task_arithmetic,
        "task arithmetic of deltas pruned by DARE",
        "arXiv 2311.03099",
        _DARE,
        implies_prune="dare",
    ),
    _added(
        "dare_ties",
        ties.ties,
        "ties consensus of deltas pruned by DARE",
        "arXiv 2311.03099",
        _DARE,
        implies_prune="dare",
    ),
    _added(
        "della",
        ties.ties,
        "ties consensus of deltas pruned by DELLA",
        "arXiv 2406.11617",
        {**_DELLA, "normalize": _NORMALIZED},
        implies_prune="della",
    ),
    _added(
        "della_linear",
        arithmetic.task_arithmetic,
        "task arithmetic of deltas pruned by DELLA",
        "arXiv 2406.11617",
        _DELLA,
        implies_prune="della",
    ),
    _added(
        "breadcrumbs",
        arithmetic.task_arithmetic,
        "task arithmetic of deltas without their largest and smallest entries",
        "arXiv 2312.06795",
        _BREADCRUMBS,
        implies_prune="breadcrumbs",
    ),
    _added(
        "breadcrumbs_ties",
        ties.ties,
        "ties consensus of deltas without their largest and smallest entries",
        "arXiv 2312.06795",
        _BREADCRUMBS,
        implies_prune="breadcrumbs",
    ),
    _on_deltas(
        "model_stock",
        span.model_stock,
        "base + t · mean(Δ_i), t = N c / (1 + (N − 1) c), c the mean cosine between deltas",
        "arXiv 2403.19522",
        {"filter_wise": Param("t for each row", False, "bool", scalar=True)},
        minimum=2,
        nodes=span.nodes,
    ),
    _on_deltas(
        "nearswap",
        elementwise.nearswap,
        "base + w Δ, w = min(1, t / abs(Δ)): entries near the base's are taken from the model",
        "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        {"t": Param("abs(Δ) up to which the model's entry is taken whole", low=0)},
        maximum=1,
    ),
    _on_deltas(
        "sce",
        sce.sce,
        "entries of the largest variance over models, weighted by mean(Δ_i²), those of the minority's sign erased",
        "arXiv 2408.07990",
        {"select_topk": Param("fraction of the entries that vary, kept", 1.0, low=0, high=1)},
        nodes=sce.nodes,
    ),
    _on_deltas(
        "ram",
        ram.ram,
        "entries that one model changed are kept, those that several changed averaged",
        "arXiv 2601.13572",
        {"epsilon": Param("abs(Δ) above this is a change", 1e-5, low=0)},
    ),
    _on_deltas(
        "ramplus_tl",
        ram.ramplus_tl,
        "ram, a model's own entries × (1 + r · min(shared / own, alpha))",
        "arXiv 2601.13572",
        {
            "epsilon": Param("abs(Δ) above this is a change", 1e-5, low=0),
            "r": Param("how much a model's own entries are amplified", 0.1),
            "alpha": Param("cap on shared / own", 0.2, low=0),
        },
        nodes=ram.nodes,
    ),
    _on_deltas(
        "arcee_fusion",
        fusion.arcee_fusion,
        "keep Δ where abs(Δ) · KL of the rows' softmaxes is at least median + 1.5 · IQR",
        "https://arcee.ai",
        maximum=1,
        nodes=fusion.nodes,
    ),
    MergeMethod(
        "passthrough",
        arithmetic.passthrough,
        "one model, × scale",
        None,
        {"scale": Param("factor of the model", 1.0, per_model=True)},
        maximum=1,
        keeps_single=arithmetic.keeps_unscaled,
    ),
    *TASKS,
)

_FRACTION = Param("fraction kept", low=0, high=1, low_open=True)
_Q = Param("kept entries are divided by q", low=0, high=1, low_open=True)
_COLUMNS = Param("fraction of the input columns that are picked", low=0, high=1, low_open=True)
_INSIDE = Param("fraction kept inside the picked columns", low=0, high=1, low_open=True)

_BREADCRUMBS_MASK = PruneMethod(
    "breadcrumbs",
    select.keep_between,
    "drop the int(gamma · n) entries of largest abs(Δ), keep the int(density · n) that follow",
    "arXiv 2312.06795",
    {"density": _FRACTION, "q": _Q, "gamma": _GAMMA},
    frozenset({"rescale", "protect"}),
    nodes=nodes.breadcrumbs,
    q_decides_below=0.2,
)

_PRUNE = (
    PruneMethod("none", None, "keep the whole delta"),
    PruneMethod(
        "dare",
        masks.dare,
        "keep each entry with probability density, divide by q (default: density)",
        "arXiv 2311.03099, 2410.09344",
        {"density": _FRACTION, "q": _Q},
        frozenset({"rescale", "sampling", "protect", "budget"}),
        random=True,
        nodes=nodes.dare,
        q_decides_below=0.05,
    ),
    PruneMethod(
        "magnitude",
        select.keep_largest,
        "keep the round(density · n) entries of largest abs(Δ) in each group",
        "arXiv 2410.09344",
        {"density": _FRACTION, "q": _Q},
        frozenset({"rescale", "group", "protect", "budget"}),
        groups=("tensor", "row", "model"),
        nodes=nodes.magnitude,
        q_decides_below=0.2,
    ),
    PruneMethod(
        "wanda",
        select.keep_largest_rows_scored,
        "keep the round(density · n) entries of largest abs(Δ_ij) · ‖x_j‖ in each row, on calibration data",
        "arXiv 2306.11695, 2410.09344",
        {"density": _FRACTION, "q": _Q},
        frozenset({"rescale", "group", "protect"}),
        groups=("row",),
        needs_activations=True,
        nodes=nodes.wanda,
        q_decides_below=0.2,
    ),
    PruneMethod(
        "structured",
        masks.structured,
        "pick round(a · n) input columns, keep each entry inside with probability b; density = a · b",
        "arXiv 2410.09344, App. C.10",
        {"density": _FRACTION, "q": _Q, "a": _COLUMNS, "b": _INSIDE},
        frozenset({"rescale", "protect"}),
        random=True,
        factors=("a", "b"),
        nodes=nodes.structured,
        q_decides_below=0.1,
    ),
    PruneMethod(
        "della",
        della.della,
        "keep with a probability that grows with the rank of abs(Δ) in its row, divide by it, then by q / density",
        "arXiv 2406.11617",
        {"density": _FRACTION, "q": _Q, "epsilon": _EPSILON},
        frozenset({"rescale", "protect"}),
        random=True,
        nodes=nodes.della,
        q_decides_below=0.05,
    ),
    _BREADCRUMBS_MASK,
    replace(_BREADCRUMBS_MASK, name="magnitude_outliers"),
)

# Not in the table, because it combines no tensors: `experts` of a recipe stand for it.
MOE = MergeMethod(
    "moe",
    "deltamerge.methods.merge.mixture:router",
    "the MLPs of dense models as the experts of one mixture, with routers made of prompts",
    needs_base=True,
)

_OTHERS = tuple(third_party())
MERGE = _table(_MERGE, _OTHERS, MergeMethod)
PRUNE = _table(_PRUNE, _OTHERS, PruneMethod)
