"""What the table of methods is made of: a parameter, a merge method, a pruning method; and those of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, TypeAlias

from deltamerge.errors import DeltamergeError

GROUP = "deltamerge.methods"

# A function at the top of its module, or its name "module:name", which is imported when it runs.
Function: TypeAlias = str | Callable[..., Any]


class Names:
    """A module whose functions a table names: `Names("m").f` is "m:f", and `m` is not imported."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __getattr__(self, name: str) -> str:
        return f"{self.module}:{name}"


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a method: what it may be and what it is when not given.

    `default` None: it must be given (`alone`: what a single fine-tune has instead). `per_model` parameters may be set
    beside a model or for all of them, the others only for the whole merge or slice. `scalar`: no gradient or filters.
    `prunes`: it is for the pruning that comes first, and not handed to the function that combines.
    """

    summary: str
    default: float | bool | None = None
    kind: Literal["number", "integer", "bool"] = "number"
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    per_model: bool = False
    alone: float | None = None
    scalar: bool = False
    prunes: bool = False

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
            whole = "a whole number, " if self.kind == "integer" else ""
            return f"{whole}{'more than' if self.low_open else 'at least'} {self.low:g}"
        return "a whole number" if self.kind == "integer" else "a number"

    def typed(self, value: float | bool) -> float | bool:
        """The value as the number that a function is given."""
        return bool(value) if self.kind == "bool" else int(value) if self.kind == "integer" else float(value)

    def accepts(self, value: float | bool) -> bool:
        if self.kind == "bool":
            return value in (0, 1)
        if isinstance(value, bool) or (self.kind == "integer" and value != int(value)):
            return False
        if self.low is not None and (value < self.low or (self.low_open and value == self.low)):
            return False
        return self.high is None or value <= self.high


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """How fine-tunes meet: `function` of tiles, or of what `nodes` makes of them.

    `needs_base`: the base is given and stands apart from the models; `takes_base`: so it is where it is given.
    `deltas`: with a base it works on fine-tune − base, so pruning can come before it. `implies_prune` is the pruning
    that its name promises. `adds`: the result is exactly base + something that the base has no part in but by the
    deltas. `minimum` and `maximum` count the models that are combined; a base apart is none.

    The function is called `f(*tensors, tile=…, **parameters)`: the base's tile in its stored dtype if it stands apart,
    then a tile per model (with deltas: float32, or `Kept`). A parameter is passed by its name, `lambda` as `lambda_`;
    one that is `per_model` in the plural, as a tuple. `nodes`, for a method that needs more than one pass, is a
    function `(make, function, inputs, shape, *, based, **parameters) -> node`: see `methods.merge.span.nodes`.
    `matrices`: it works on whole matrices, and its `nodes` gets `form` and `transposed` besides (see
    `methods.merge.whole.nodes`): of vectors, embeddings, heads and matrices with fewer rows or columns than models,
    which have no form, it takes the mean. `totals` is a function of the same tiles that gives numbers, (blocks, k)
    float64, whose sums over all tensors of the merge the function gets as its last input.
    `rows` says what rows of each model's own are measured for before the first tile, which the function, or `nodes`,
    gets as its last input: "inputs" of linear layers, those that the "merged" layers before them make, or "gradients".
    `keeps_single(**parameters)` tells whether a single model that was not pruned comes out as it is, and need not be
    computed; without it none does.
    """

    name: str
    function: Function
    summary: str
    paper: str | None = None
    parameters: Mapping[str, Param] = field(default_factory=dict)
    needs_base: bool = False
    takes_base: bool = False
    deltas: bool = False
    adds: bool = False
    implies_prune: str | None = None
    minimum: int = 1
    maximum: int | None = None
    nodes: Function | None = None
    matrices: bool = False
    totals: Function | None = None
    rows: Literal["inputs", "merged", "gradients"] | None = None
    keeps_single: Function | None = None

    def base_apart(self, base_model: str | None) -> bool:
        """Whether a recipe with that `base_model` hands the base to the method apart from the models."""
        return self.needs_base or (self.takes_base and base_model is not None)


@dataclass(frozen=True, slots=True)
class Masking:
    """A tensor's delta that a pruning method is to mask: what its `nodes` is given.

    method      the method
    make        makes a node: (function, inputs, *, kind, shape, **parameters), as `engine.graph.Graph.node`
    delta       the node of Δ = fine-tune − base: flat float32 tiles, 0 in protected columns
    pair        the nodes of the fine-tune and the base in their stored dtypes, to compute only what is kept
    density     fraction kept of the entries that are not protected, in (0, 1)
    share       the same entries as a fraction of all
    key         what random bits are made from, with an entry's position: see `methods.prune.bits`
    parameters  those that the method declares besides density and q, as numbers, of this tensor
    group       where entries compete: one of the method's `groups`, None where it has none
    sampling    "uniform", or "magnitude": with a probability in proportion to abs(Δ)
    rescaled    whether what is kept is given a norm of Δ afterwards: entries are then not weighted here
    norms       the node of ‖x_j‖₂ of the inputs of a linear layer, (n) float32, or (E, n) of stacked experts; None for
                other tensors, and for methods without `needs_activations`
    transposed  whether such a weight is stored (in, out) and not (out, in)
    cut         the node of the threshold (`methods.prune.select.Cut`) where the group is "model", else None
    """

    method: PruneMethod
    make: Callable[..., Any]
    delta: Any
    pair: tuple[Any, Any]
    density: float
    share: float
    key: tuple[int, int]
    parameters: Mapping[str, float | bool]
    group: str | None = None
    sampling: str = "uniform"
    rescaled: bool = False
    norms: Any = None
    transposed: bool = False
    cut: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        shape: tuple[int, ...] = self.delta.shape
        return shape

    def masked(self, *inputs: Any, **parameters: Any) -> Any:
        """The node of the method's function of a tile of `inputs`."""
        return self.make(self.method.function, inputs, shape=self.shape, **parameters)


def in_one_pass(masking: Masking) -> Any:
    """The node of a method that needs nothing but a tile: `f(Δ, *, tile, density, **parameters)`, and key if random."""
    key = {"key": masking.key} if masking.method.random else {}
    return masking.masked(masking.delta, density=masking.share, **key, **masking.parameters)


@dataclass(frozen=True, slots=True)
class PruneMethod:
    """Which entries of a delta stay.

    `parameters` and `options` name the keys of `prune` that it knows, besides those of every method. `random` masks
    divide what is kept by the density (vanilla DARE), others by 1, unless q or rescale is given. `groups` are the
    choices of `group`, the default first; "model" is one threshold for all tensors of a model. `factors` are
    parameters whose product is the density, which is then not given. `needs_activations`: calibration data is run
    through the fine-tune first, for `Masking.norms`. Below the density `q_decides_below` the default q loses much of a
    fine-tune that a calibrated q keeps (`recipe.advice` warns of it).

    The function is called `f(delta, *, tile, density, …)` with the parameters other than q, and `key` where `random`:
    the bits of the mask (`methods.prune.bits`) are to come from it. It returns the kept entries, zeros elsewhere.
    `nodes`, for a method that needs something else, such as a second pass, is a function `(masking) -> node` of what
    is kept: see `Masking`, and `methods.prune.nodes`, where those of the methods here are.
    """

    name: str
    function: Function | None
    summary: str
    paper: str | None = None
    parameters: Mapping[str, Param] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    random: bool = False
    groups: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    needs_activations: bool = False
    nodes: Function = in_one_pass
    q_decides_below: float = 0.0

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """The parameters that it declares besides density and q."""
        return tuple(key for key in self.parameters if key not in ("density", "q"))


def third_party(group: str = GROUP) -> Iterator[MergeMethod | PruneMethod]:
    """Methods that other packages register: an entry point of `group` names one, or an iterable of them.

    Raises DeltamergeError naming the package whose entry point cannot be loaded or is something else.
    """
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        package = point.dist.name if point.dist is not None else "?"
        try:
            found: Any = point.load()
        except Exception as error:  # whatever a package of somebody else raises while it is imported
            raise DeltamergeError(
                f"entry point {point.value} of {package}: {error}", hint="update or remove it"
            ) from error
        for method in (found,) if isinstance(found, MergeMethod | PruneMethod) else found:
            if not isinstance(method, MergeMethod | PruneMethod):
                raise DeltamergeError(f"entry point {point.value} of {package} is no MergeMethod or PruneMethod")
            yield method
