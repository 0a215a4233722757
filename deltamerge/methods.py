"""Every pruning and merge method: one entry each, its parameters beside its function's name. No torch here.

A new method is a pure tensor function in `merge/` or `prune/` and one entry in MERGE or PRUNE; checks, the schema,
`deltamerge methods` and the planner read these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a method: what it may be and what it is when not given.

    `default` None: it must be given (`alone`: what a single fine-tune has instead). `per_model` parameters may be set
    beside a model or for all of them, the others only for the whole merge or slice. `scalar`: no gradient or filters.
    """

    summary: str
    default: float | bool | None = None
    kind: Literal["number", "bool"] = "number"
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    per_model: bool = False
    alone: float | None = None
    scalar: bool = False

    def default_for(self, models: int) -> float | bool | None:
        """What it is when not given, with that many models to combine; None: it must be given."""
        return self.alone if self.default is None and models == 1 else self.default

    def wanted(self) -> str:
        """What a value must be: "in (0, 1]"."""
        if self.kind == "bool":
            return "true or false"
        if self.low is not None and self.high is not None:
            return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"
        if self.low is not None:
            return f"{'more than' if self.low_open else 'at least'} {self.low:g}"
        return "a number"

    def accepts(self, value: float | bool) -> bool:
        if self.kind == "bool":
            return value in (0, 1)
        if isinstance(value, bool):
            return False
        if self.low is not None and (value < self.low or (self.low_open and value == self.low)):
            return False
        return self.high is None or value <= self.high


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """How fine-tunes meet. `deltas`: it works on fine-tune − base, so pruning can come before it.

    `adds`: the result is exactly base + something that the base has no part in but by the deltas.
    `implies_prune` is the pruning that its name promises. `minimum` and `maximum` count the models that are combined:
    without the base where `deltas`.
    """

    name: str
    function: str
    summary: str
    paper: str | None = None
    parameters: Mapping[str, Param] = field(default_factory=dict)
    needs_base: bool = False
    deltas: bool = False
    adds: bool = False
    implies_prune: str | None = None
    minimum: int = 1
    maximum: int | None = None


@dataclass(frozen=True, slots=True)
class PruneMethod:
    """Which entries of a delta stay.

    `parameters` and `options` name the keys of `prune` that it knows, besides those of every method. `random` masks
    divide what is kept by the density (vanilla DARE), others by 1, unless q or rescale is given. `groups` are the
    choices of `group`, the default first.
    """

    name: str
    function: str | None
    summary: str
    paper: str | None = None
    parameters: Mapping[str, Param] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    random: bool = False
    groups: tuple[str, ...] = ()


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

_WEIGHT = Param("factor of the model", per_model=True)
_DELTA_WEIGHT = Param("factor of the model's delta", per_model=True, alone=1.0)
_LAMBDA = Param("factor of the merged delta", 1.0)
_DENSITY = Param("fraction of the delta's entries kept", 1.0, low=0, high=1, low_open=True, per_model=True)
_NORMALIZE = Param("divide by the sum of the weights", False, "bool")
_RESCALE = Param("divide what is kept by the density; false is random drop", True, "bool", scalar=True)
_DARE = {
    "weight": _DELTA_WEIGHT,
    "density": _DENSITY,
    "normalize": _NORMALIZE,
    "lambda": _LAMBDA,
    "rescale": _RESCALE,
}
_NORMALIZED = Param("divide by the sum of the weights", True, "bool")

MERGE: Mapping[str, MergeMethod] = {
    method.name: method
    for method in (
        MergeMethod(
            "linear",
            "deltamerge.merge.arithmetic:linear",
            "Σ w_i x_i, ÷ Σ w_i if normalize; the base is an input like any other",
            "arXiv 2203.05482",
            {"weight": _WEIGHT, "normalize": _NORMALIZED},
        ),
        MergeMethod(
            "task_arithmetic",
            "deltamerge.merge.arithmetic:task_arithmetic",
            "base + λ Σ w_i Δ_i, ÷ Σ w_i if normalize",
            "arXiv 2212.04089",
            {"weight": _DELTA_WEIGHT, "normalize": _NORMALIZE, "lambda": _LAMBDA},
            needs_base=True,
            deltas=True,
            adds=True,
        ),
        MergeMethod(
            "ties",
            "deltamerge.merge.ties:ties",
            "keep the top int(density · n) of abs(Δ_i), elect a sign per entry, add the w_i Δ_i of that sign",
            "arXiv 2306.01708",
            {"weight": _DELTA_WEIGHT, "density": _DENSITY, "normalize": _NORMALIZED, "lambda": _LAMBDA},
            needs_base=True,
            deltas=True,
            adds=True,
        ),
        MergeMethod(
            "dare_linear",
            "deltamerge.merge.arithmetic:task_arithmetic",
            "task arithmetic of deltas pruned by DARE",
            "arXiv 2311.03099",
            _DARE,
            needs_base=True,
            deltas=True,
            adds=True,
            implies_prune="dare",
        ),
        MergeMethod(
            "dare_ties",
            "deltamerge.merge.ties:ties",
            "ties consensus of deltas pruned by DARE",
            "arXiv 2311.03099",
            _DARE,
            needs_base=True,
            deltas=True,
            adds=True,
            implies_prune="dare",
        ),
        MergeMethod(
            "passthrough",
            "deltamerge.merge.arithmetic:passthrough",
            "one model, × scale",
            None,
            {"scale": Param("factor of the model", 1.0, per_model=True)},
            maximum=1,
        ),
    )
}

_FRACTION = Param("fraction kept", low=0, high=1, low_open=True)
_Q = Param("kept entries are divided by q", low=0, high=1, low_open=True)
_COLUMNS = Param("fraction of the input columns that are picked", low=0, high=1, low_open=True)
_INSIDE = Param("fraction kept inside the picked columns", low=0, high=1, low_open=True)

PRUNE: Mapping[str, PruneMethod] = {
    method.name: method
    for method in (
        PruneMethod("none", None, "keep the whole delta"),
        PruneMethod(
            "dare",
            "deltamerge.prune.masks:dare",
            "keep each entry with probability density, divide by q (default: density)",
            "arXiv 2311.03099, 2410.09344",
            {"density": _FRACTION, "q": _Q},
            frozenset({"rescale", "sampling", "protect", "budget"}),
            random=True,
        ),
        PruneMethod(
            "magnitude",
            "deltamerge.prune.select:keep_largest",
            "keep the round(density · n) entries of largest abs(Δ) in each group",
            "arXiv 2410.09344",
            {"density": _FRACTION, "q": _Q},
            frozenset({"rescale", "group", "protect", "budget"}),
            groups=("tensor", "row", "model"),
        ),
        PruneMethod(
            "wanda",
            "deltamerge.prune.select:keep_largest_rows_scored",
            "keep the round(density · n) entries of largest abs(Δ_ij) · ‖x_j‖ in each row, on calibration data",
            "arXiv 2306.11695, 2410.09344",
            {"density": _FRACTION, "q": _Q},
            frozenset({"rescale", "group", "protect"}),
            groups=("row",),
        ),
        PruneMethod(
            "structured",
            "deltamerge.prune.masks:structured",
            "pick round(a · n) input columns, keep each entry inside with probability b; density = a · b",
            "arXiv 2410.09344, App. C.10",
            {"density": _FRACTION, "q": _Q, "a": _COLUMNS, "b": _INSIDE},
            frozenset({"rescale", "protect"}),
            random=True,
        ),
    )
}

# Named by the contract, not yet built.
LATER_MERGE = frozenset(
    {
        "slerp", "nuslerp", "multislerp", "karcher", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties",
        "model_stock", "nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion",
    }
)  # fmt: skip
LATER_PRUNE = frozenset({"della", "breadcrumbs", "magnitude_outliers"})
