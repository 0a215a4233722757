"""Every merge and pruning method by its name: the fields of an entry, and the search for entries.

A method is a file of `methods.merge` or `methods.prune` with the method's name, which declares its entry by
`merge_method` or `prune_method`. The file is imported when a recipe names the method. Other packages add methods by
an entry point of the group `deltamerge.methods`.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

from deltamerge.errors import plugins
from deltamerge.methods.parameters import KEPT, Q, parameters_of
from deltamerge.methods.parameters import Param as Param
from deltamerge.tensors.traits import function_of, traits

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# Keys of `prune` that every method accepts, with or without effect.
COMMON_KEYS = frozenset({"method", "include", "exclude"})

# mergekit's parameters that only tune its execution: accepted at every level, no effect.
NO_EFFECT = MappingProxyType({"int8_mask": Param("mergekit's mask storage; no effect", False, "bool", per_model=True)})

# mergekit's command line flags that people write into the YAML. Like mergekit, we ignore them there.
NO_EFFECT_KEYS = frozenset(
    {
        "allow_crimes", "async_write", "clone_tensors", "copy_tokenizer", "cuda", "device", "gpu_rich",
        "lazy_unpickle", "low_cpu_memory", "multi_gpu", "num_threads", "out_shard_size", "quiet", "read_to_gpu",
        "safe_serialization", "transformers_cache", "verbosity", "write_model_card", "write_threads",
    }
)  # fmt: skip

# The order in which methods are listed; methods of further files follow by name.
MERGE_ORDER = (
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties",
    "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "model_stock", "nearswap", "sce", "ram", "ramplus_tl",
    "arcee_fusion", "passthrough", "iso_c", "iso_cts", "tsv_m", "svc", "wudi", "consensus", "tall_masks", "emr",
    "regmean", "regmean_plus", "fisher",
)  # fmt: skip
PRUNE_ORDER = (
    "none", "dare", "magnitude", "wanda", "structured", "della", "breadcrumbs", "magnitude_outliers", "budget",
)  # fmt: skip
DECLARES = re.compile(r"^(@(merge|delta|prune)_method|\w+ = ((Merge|Prune)Method|like))\(", re.MULTILINE)

# A function at the top of its module, or its name "module:name", which is imported when it runs.
Function: TypeAlias = str | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A way to merge fine-tunes: a `function` of tiles, or of the nodes that `nodes` makes.

    needs_base      the base must be given, apart from the models
    takes_base      the base may be given; it then stands apart from the models
    deltas          with a base it works on fine-tune − base, so pruning can come before it
    implies_prune   the pruning that its name promises
    adds            the result is exactly base + a term that depends on the base only through the deltas
    minimum, maximum   bounds on the number of models; a base apart does not count
    nodes           for more than one pass: `(make, function, inputs, shape, *, based, **parameters) -> node`; see
                    `methods.merge.spans.nodes`
    matrices        it works on whole matrices, and its `nodes` also gets `form` and `transposed` (see
                    `methods.merge.matrices.nodes`). Vectors, embeddings, heads and matrices with fewer rows or columns
                    than models have no form; they get the mean.
    in_core         `(**parameters) -> bool`: whether the result is independent of the orthonormal basis. LoRAs are then
                    merged in their core (`methods.merge.core_space`). None: never.
    totals          a function of the same tiles that gives numbers, (blocks, k) float64. The function gets their sums
                    over all tensors of the merge as its last input.
    rows            the measurement on each model's own rows before the first tile: "inputs" of linear layers, inputs
                    after "merged" layers, or "gradients". The function, or `nodes`, gets it as its last input.
    keeps_single    `(**parameters) -> bool`: whether a single unpruned model comes out unchanged, so that it need not
                    be computed. None: never.

    The function is called `f(*tensors, tile=…, **parameters)`: the base's tile in its stored dtype if it stands apart,
    then a tile per model (with deltas: float32, or `Kept`). A parameter is passed by its name, `lambda` as `lambda_`. A
    `per_model` parameter is a tuple, under its name in the plural.
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
    in_core: Function | None = None
    totals: Function | None = None
    rows: Literal["inputs", "merged", "gradients"] | None = None
    keeps_single: Function | None = None

    def base_apart(self, base_model: str | None) -> bool:
        """Tell whether a recipe with this `base_model` passes the base to the method apart from the models."""
        return self.needs_base or (self.takes_base and base_model is not None)


@dataclass(frozen=True, slots=True)
class Masking:
    """A tensor's delta to be masked: the argument of a pruning method's `nodes`.

    method      the method
    make        makes a node: (function, inputs, *, kind, shape, **parameters), as `tensors.tensor.Graph.node`
    delta       the node of Δ = fine-tune − base: flat float32 tiles, 0 in protected columns
    pair        the nodes of the fine-tune and the base in their stored dtypes, to compute only kept entries
    density     fraction kept of the entries that are not protected, in (0, 1)
    share       the same entries as a fraction of all
    key         the key of random bits, used with an entry's position: see `methods.prune.bits`
    parameters  this tensor's numbers for the parameters that the method declares, besides density and q
    group       where entries compete: one of the method's `groups`; None if it has no groups
    sampling    "uniform", or "magnitude": with a probability in proportion to abs(Δ)
    rescaled    whether kept entries get a norm of Δ afterwards; they are then not weighted here
    norms       the node of ‖x_j‖₂ of the inputs of a linear layer, (n) float32, or (E, n) of stacked experts; None for
                other tensors, and for methods without `needs_activations`
    transposed  whether such a weight is stored (in, out) and not (out, in)
    cut         the node of the threshold (`methods.prune.select.Cut`) if the group is "model", otherwise None
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
        """Return the tensor's shape."""
        shape: tuple[int, ...] = self.delta.shape
        return shape

    def masked(self, *inputs: Any, **parameters: Any) -> Any:
        """Return the node of the method's function of a tile of `inputs`."""
        return self.make(self.method.function, inputs, shape=self.shape, **parameters)


def in_one_pass(masking: Masking) -> Any:
    """Return the node of a method that needs only a tile: `f(Δ, *, tile, density, **parameters)`, and key if random."""
    key = {"key": masking.key} if masking.method.random else {}
    return masking.masked(masking.delta, density=masking.share, **key, **masking.parameters)


@dataclass(frozen=True, slots=True)
class PruneMethod:
    """Which entries of a delta stay.

    parameters, options   the keys of `prune` that it accepts, besides the keys of every method
    random                kept entries are divided by the density (vanilla DARE), otherwise by 1, unless q or rescale is
                          given
    groups                the choices of `group`, the default first; "model" is one threshold for all tensors of a model
    factors               parameters whose product is the density, which is then not given
    needs_activations     calibration data is run through the fine-tune first, for `Masking.norms`
    q_decides_below       below this density the default q loses much of a fine-tune that a calibrated q keeps
                          (`recipe.prune` warns of it)
    shares                it distributes the bytes of a delta artifact, and masks no entry
    nodes                 for a method that needs more, such as a second pass: `(masking) -> node` of the kept entries;
                          see `Masking`, and the files of `methods.prune`

    The function is called `f(delta, *, tile, density, …)` with the parameters other than q. If `random`, it also gets
    `key`, from which the mask's bits must come (`methods.prune.bits`). It returns the kept entries, zeros elsewhere.
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
    shares: bool = False

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """Return the declared parameters without density and q."""
        return tuple(key for key in self.parameters if key not in ("density", "q"))


Method = TypeVar("Method", MergeMethod, PruneMethod)
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def merge_method(
    summary: str,
    paper: str | None = None,
    *,
    formula: Callable[..., Any] | None = None,
    loop: Callable[..., None] | None = None,
    patches: bool = False,
    needs: Callable[..., tuple[int, float]] | None = None,
    **fields: Any,
) -> Callable[[AnyFunction], AnyFunction]:
    """Declare a merge method under the name of its function, with the parameters of its signature.

    formula        the function that computes the method, if it is another method's; the signature then only declares
                   parameters
    loop, patches, needs   the function's traits (`tensors.traits`)
    fields         fields of `MergeMethod`
    """

    def enter(function: AnyFunction) -> AnyFunction:
        if formula is None:
            traits(loop=loop, patches=patches, needs=needs)(function)
        name, parameters = function.__name__, parameters_of(function)
        vars(function)["method"] = MergeMethod(name, formula or function, summary, paper, parameters, **fields)
        return function

    return enter


# A merge of deltas over a base.
delta_method = partial(merge_method, needs_base=True, deltas=True)


def prune_method(
    summary: str,
    paper: str | None = None,
    *,
    loop: Callable[..., None] | None = None,
    sparse: Callable[..., bool] | None = None,
    sorts: bool = False,
    vectors: bool = False,
    **fields: Any,
) -> Callable[[AnyFunction], AnyFunction]:
    """Declare a pruning method under the name of its function, with density, q and the parameters of its signature.

    loop, sparse, sorts, vectors   the function's traits (`tensors.traits`)
    fields                         fields of `PruneMethod`

    A function whose first argument is `masking` makes the node of kept entries: it is called
    `f(masking, **parameters)`.
    """

    def enter(function: AnyFunction) -> AnyFunction:
        own = parameters_of(function)
        if "masking" in function.__code__.co_varnames[: function.__code__.co_argcount]:
            fields["nodes"] = partial(_with_parameters, function, tuple(own))
        else:
            traits(loop=loop, sparse=sparse, sorts=sorts, vectors=vectors)(function)
        known = {"density": KEPT, "q": Q, **own}
        vars(function)["method"] = PruneMethod(function.__name__, function, summary, paper, known, **fields)
        return function

    return enter


def like(other: Any, **changes: Any) -> Any:
    """Return a function's method with other fields: a name, a summary, a formula of its parameters."""
    return replace(other.method, **changes)


def _with_parameters(function: Callable[..., Any], names: tuple[str, ...], masking: Masking) -> Any:
    """Make a node by calling a function with a masking and its parameters."""
    return function(masking, **{name: masking.parameters[name] for name in names})


def _entry(found: Any) -> MergeMethod | PruneMethod | None:
    """Return the method's entry: the object itself, or the entry that a function declares. None: neither."""
    found = getattr(found, "method", found)
    return found if isinstance(found, MergeMethod | PruneMethod) else None


class Methods(Mapping[str, Method], Generic[Method]):
    """The methods of one kind by name: the files of a package, and methods of other packages."""

    def __init__(self, package: str, kind: type[Method], order: tuple[str, ...]) -> None:
        self.package, self.order = package, order
        self.kind: type[Method] = kind
        self.found: dict[str, Method | None] = {}
        self.folder = Path(__file__).parent / package.rpartition(".")[2]

    def __getitem__(self, name: str) -> Method:
        found = self._own(name) or self.others().get(name)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter((*self.own_names(), *self.others()))

    def __len__(self) -> int:
        return len(self.own_names()) + len(self.others())

    def own_names(self) -> tuple[str, ...]:
        """Return the names of this package's methods, without importing their files."""
        return _names(self.folder, self.order)

    def others(self) -> Mapping[str, Method]:
        """Return the methods of other packages. Warns about a name that is taken."""
        table: dict[str, Method] = {}
        for point, method in _third_party():
            if isinstance(method, self.kind):
                if method.name in table or self._own(method.name) is not None:
                    plugins.refuse(point, f"there is another method {method.name}")
                    continue
                table[method.name] = method
        return table

    def _own(self, name: str) -> Method | None:
        """Return the method in the file of this name. None: there is no such file."""
        if name not in self.found:
            there = name.isidentifier() and name.islower() and (self.folder / f"{name}.py").is_file()
            module = importlib.import_module(f"{self.package}.{name}") if there else None
            found = _entry(vars(module).get(name)) if module is not None else None
            self.found[name] = found if isinstance(found, self.kind) else None
        return self.found[name]


@cache
def _names(folder: Path, order: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the files that declare a method, the names in `order` first."""
    files = {path.stem for path in folder.glob("*.py") if DECLARES.search(path.read_text(encoding="utf-8"))}
    return (*(name for name in order if name in files), *sorted(files - set(order)))


@cache
def _third_party() -> tuple[tuple[EntryPoint, MergeMethod | PruneMethod], ...]:
    return tuple(third_party())


def third_party() -> Iterator[tuple[EntryPoint, MergeMethod | PruneMethod]]:
    """Yield the methods of other packages. An entry point names a method, or an iterable of methods.

    A method is a function with `merge_method` or `prune_method`, or a `MergeMethod` or `PruneMethod`. An entry point
    that cannot be loaded, or is something else, is a warning that names the package.
    """
    for point in plugins.points(plugins.METHODS):
        found = plugins.loaded(point)
        if found is None:
            continue
        several = _entry(found) is None and isinstance(found, Iterable)
        for one in found if several else (found,):
            method = _entry(one)
            if method is None:
                plugins.refuse(point, "it is no MergeMethod or PruneMethod")
            elif (why := _misfit(method)) is not None:
                plugins.refuse(point, why)
            else:
                yield point, method


def _misfit(method: MergeMethod | PruneMethod) -> str | None:
    """Return why a plan cannot call a method's function, or its `nodes`. None: it can."""
    function, inputs, named = method.nodes or method.function, ["masking"], list[str]()
    if isinstance(method, MergeMethod):
        named = [param.argument(key) for key, param in method.parameters.items() if not param.prunes]
        if method.nodes is None:
            models = ["delta" if method.deltas else "model"] * method.minimum
            inputs = ["base"] * method.needs_base + models
            inputs += ["totals"] * (method.totals is not None) + ["rows"] * (method.rows is not None)
            named = ["tile", *named]
        else:
            inputs, named = ["make", "function", "inputs", "shape"], ["based", *named]
            named += ["form", "transposed"] * method.matrices
    elif method.nodes is in_one_pass:
        function, inputs = method.function, ["delta"]
        named = ["tile", "density", *["key"] * method.random, *method.own_parameters]
    elif isinstance(function, partial) and function.func is _with_parameters:
        function, named = function.args[0], list(function.args[1])
    if isinstance(function, str):
        if function.partition(":")[0] not in sys.modules:
            return None  # it is imported when it runs
        function = function_of(function)
    if function is None:
        return None
    loop = getattr(getattr(function, "traits", None), "loop", None) if "tile" in named else None
    of_loop = plugins.misfit(loop, ["assembly", "node"], [key for key in named if key != "tile"]) if loop else None
    return plugins.misfit(function, inputs, named) or of_loop


MERGE: Methods[MergeMethod] = Methods("deltamerge.methods.merge", MergeMethod, MERGE_ORDER)
PRUNE: Methods[PruneMethod] = Methods("deltamerge.methods.prune", PruneMethod, PRUNE_ORDER)

# Not in the table, because it merges no tensors: `experts` in a recipe stand for it.
MOE = MergeMethod(
    "moe",
    "deltamerge.methods.merge.mixture:router",
    "the MLPs of dense models become the experts of one mixture, with routers made from prompts",
    needs_base=True,
)
