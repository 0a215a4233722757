"""Random recipes and the inputs they merge, as hypothesis strategies.

`cases(method)` draws a `Case`; `Case.write` makes its files, `Case.reference` says what is to come out. The repr of a
case makes it again, which is what a failing test prints, with the recipe as YAML.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st
from raw_tensors import LARGEST, Stored, stored, widened, write_checkpoint
from reference_recipe import Place, Recipe

from deltamerge.methods.table import MERGE

MODELS = "abc"
DTYPES = ["F32", "BF16", "F16", "F64"]
OUTPUTS = [None, "float32", "bfloat16", "float16", "float64"]
SHAPES = [(4, 6), (7,), (1,), (), (1, 1), (0, 4), (3, 0), (5, 1), (1, 9), (3, 4, 5), (2, 3, 2, 2), (31, 33), (2047,),
          (2049,), (40, 52)]  # fmt: skip
# around a block, whole rows that no block is made of, more than one block
WIDE = [(65_535,), (65_536,), (65_537,), (131_073,), (3, 21_846), (300, 333), (1, 65_540), (70_000, 1), (257, 3, 86)]
DENSITIES = [0.5, 1.0, 0.9, 0.3, 0.1, 1 / 16, 0.0624, 0.05, 0.01, 0.001]
WEIGHTS = [1.0, 0.5, 0.3, 0.7, -0.5, -1.1, 0.0, 2.0, 0.001]
PROFILES = ["plain", "steps", "few", "same", "none", "scales", "tiny", "huge", "opposite", "equal", "zeros"]
EPSILONS = {1.0: 0.15, 0.9: 0.1, 0.5: 0.15, 0.3: 0.2, 0.1: 0.05, 1 / 16: 0.03, 0.0624: 0.03, 0.05: 0.03, 0.01: 0.005,
            0.001: 0.0005}  # fmt: skip
CALIBRATION = {"data": "rows.txt", "task": "causal-lm"}
SPANS = ("nuslerp", "multislerp")
DEFAULT_TILE, DEFAULT_JOB, DEFAULT_LISTED = 1 << 18, 1 << 21, 1 << 20


@dataclass(frozen=True)
class Case:
    """A recipe, the shapes of its tensors, the dtypes of base and models, what their values are like, how it is run."""

    recipe: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[str, ...]
    profile: str = "plain"
    seed: int = 0
    finite: bool = True
    tied: bool = False
    workers: int = 1
    tile: int = DEFAULT_TILE
    job: int = DEFAULT_JOB
    listed: int = DEFAULT_LISTED

    @property
    def calibrates(self) -> bool:
        return "calibration" in self.recipe

    @property
    def text(self) -> str:
        return yaml.safe_dump(self.recipe, sort_keys=False, default_flow_style=None)

    def inputs(self) -> dict[str, dict[str, Stored]]:
        made: dict[str, dict[str, Stored]] = {"./base": {}, **{f"./{m}": {} for m in MODELS}}
        for number, (name, shape) in enumerate(self.shapes.items()):
            arrays = values(self.profile, np.random.default_rng((self.seed, number)), shape, self.dtypes)
            if not self.finite:
                spoil(arrays, np.random.default_rng((self.seed, number, 1)))
            for tensors, array, code in zip(made.values(), arrays, self.dtypes, strict=True):
                tensors[name] = stored(array, code)
        return made

    def write(self, folder: Path) -> Path:
        layers = 1 + max((int(n.split(".")[1]) for n in self.shapes if n.startswith("layers.")), default=0)
        config = {"model_type": "test", "num_hidden_layers": layers, "tie_word_embeddings": self.tied}
        for name, tensors in self.inputs().items():
            write_checkpoint(folder / name, tensors, config)
        (folder / "rows.txt").write_text("a row\n" * 50)
        path = folder / "recipe.yaml"
        path.write_text(self.text)
        return path

    def reference(self) -> Recipe:
        inputs = {m: {n: widened(t) for n, t in tensors.items()} for m, tensors in self.inputs().items()}
        return Recipe(self.recipe, inputs, self.places(), norms, row_q)

    def places(self) -> list[Place]:
        """The tensors of the output: those of the models, or of slices of their layers."""
        names = [n for n in self.shapes if not (self.tied and n == "lm_head.weight" and "embed.weight" in self.shapes)]
        base, own = self.recipe.get("base_model"), [self.recipe.get("parameters", {})]
        if "slices" not in self.recipe:
            models = [m for m in self.recipe["models"] if m["model"] != base]
            layers = 1 + max((int(n.split(".")[1]) for n in names if n.startswith("layers.")), default=0)
            return [Place(n, position(n, layers), models, own, [n] * len(models), n if base else None) for n in names]
        places, at = [], 0
        slices = self.recipe["slices"]
        for name in names:
            if not name.startswith("layers."):
                part = slices[0 if "embed" in name else -1]
                sources = part["sources"]
                levels = [part.get("parameters", {}), *own]
                places.append(Place(name, 0.0, sources, levels, [name] * len(sources), name if base else None))
        for part in slices:
            sources = part["sources"]
            first, end = sources[0]["layer_range"]
            for i in range(end - first):
                for rest in (n.removeprefix("layers.0.") for n in names if n.startswith("layers.0.")):
                    t = i / (end - first - 1) if end - first > 1 else 1.0
                    there = [f"layers.{s['layer_range'][0] + i}.{rest}" for s in sources]
                    levels = [part.get("parameters", {}), *own]
                    of_base = f"layers.{first + i}.{rest}" if base else None
                    places.append(Place(f"layers.{at}.{rest}", t, sources, levels, there, of_base))
                at += 1
        return places


def position(name: str, layers: int) -> float:
    if not name.startswith("layers."):
        return 0.0
    return int(name.split(".")[1]) / (layers - 1) if layers > 1 else 1.0


def norms(name: str, count: int) -> np.ndarray:
    """Norms of a layer's input features, some 0, some equal."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (rng.integers(0, 9, count) * rng.choice([0.25, 0.1, 1.0])).astype(np.float32)


def row_q(name: str, shape: tuple[int, ...]) -> Any:
    """A q for each output row of a matrix, one number for another tensor."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.uniform(0.05, 1, (shape[0], 1)).astype(np.float32) if len(shape) == 2 else 0.25


def values(profile: str, rng: np.random.Generator, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> list[np.ndarray]:
    """The base and the models, in float64; what no dtype of theirs has a number for is cut off."""
    largest = min(LARGEST[code] for code in (*dtypes, "F32"))
    base = 0.05 * rng.standard_normal(shape)
    ds = [0.01 * rng.standard_normal(shape) for _ in MODELS]
    match profile:
        case "steps":
            base = np.round(base * 64) / 64
            ds = [rng.integers(-4, 5, shape) * 2.0**-7 for _ in MODELS]
        case "few":
            ds = [np.where(rng.random(shape) < 0.8, rng.choice([0.0, -0.0]), d) for d in ds]
        case "same":
            ds = [np.full(shape, 2.0**-6 * rng.choice([-1, 1, 2])) for _ in MODELS]
            base = np.round(base * 64) / 64
        case "none":
            ds[rng.integers(3)] = np.zeros(shape)
        case "scales":
            ds = [d * 10.0 ** rng.integers(-9, 3, shape) for d in ds]
        case "tiny":
            small = 6e-7 if "F16" in dtypes else 1e-41
            base, ds = small * rng.integers(-20, 21, shape), [small * rng.integers(-9, 10, shape) for _ in MODELS]
        case "huge":
            most = largest * 2.0 ** -rng.integers(0, 9)
            base, ds = most * rng.uniform(-0.3, 0.3, shape), [most * rng.uniform(-0.7, 0.7, shape) for _ in MODELS]
        case "opposite":
            ds = [ds[0], -ds[0], ds[2]]
        case "equal":
            ds = [ds[0]] * 3
        case "zeros":
            base, ds = np.zeros(shape), [np.where(rng.random(shape) < 0.5, 0.0, d) for d in ds]
    return [np.clip(x, -largest, largest) for x in (base, *(base + d for d in ds))]


def spoil(arrays: list[np.ndarray], rng: np.random.Generator) -> None:
    """Put NaN and infinities in some places of some of them."""
    for array in arrays:
        if array.size and rng.random() < 0.6:
            places = rng.integers(0, array.size, min(array.size, 3))
            array.reshape(-1)[places] = rng.choice([np.nan, np.inf, -np.inf], places.size)


def some() -> st.SearchStrategy[bool]:
    """True once in a while."""
    return st.sampled_from([False, False, False, True])


@st.composite
def valued(draw: st.DrawFn, numbers: list[float], whole: bool = True) -> Any:
    """A number; at times a gradient, or filters, of which the last matches all if `whole`."""
    kind = draw(st.sampled_from(["number"] * 4 + ["gradient", "filters"]))
    number = st.sampled_from(numbers)
    if kind == "number":
        return draw(number)
    if kind == "gradient":
        return draw(st.lists(number, min_size=1, max_size=3))
    named = {"filter": draw(st.sampled_from(["q", "layers.1", "bias", "nowhere"])), "value": draw(number)}
    return [named, *([{"value": draw(number)}] if whole or draw(st.booleans()) else [])]


@st.composite
def prunes(draw: st.DrawFn, sliced: bool) -> dict[str, Any]:
    """A pruning with a method of its own."""
    method = draw(st.sampled_from(["dare", "magnitude", "structured", "della", "breadcrumbs", "magnitude_outliers",
                                   "dare", "magnitude", "wanda"][: 8 if sliced else 9]))  # fmt: skip
    made: dict[str, Any] = {"method": method}
    if method == "structured":
        made |= {"a": draw(st.sampled_from([0.5, 1.0, 0.1, 0.3])), "b": draw(st.sampled_from([0.5, 1.0, 0.05, 0.2]))}
    elif method == "della":
        density = draw(st.sampled_from(DENSITIES))
        made |= {"density": density, "epsilon": EPSILONS[density]}
    else:
        made["density"] = draw(valued(DENSITIES, whole=False))
    if method in ("breadcrumbs", "magnitude_outliers") and draw(st.booleans()):
        made["gamma"] = draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
    if method == "dare" and draw(some()):
        made["sampling"] = "magnitude"
    if method == "magnitude":
        made["group"] = draw(st.sampled_from(["tensor", "row", "model"]))
    divide = draw(st.sampled_from(["none", "none", "q", "norm", "rows"]))
    if divide == "rows" and not sliced and made.get("group") != "model":
        made["q"] = {"objective": "layer_mse", "scope": "row"}
    elif divide == "q":
        made["q"] = draw(valued([0.25, 1.0, 0.03, 0.7]))
    elif divide == "norm":
        made["rescale"] = draw(st.sampled_from(["l1", "l2", "linf"]))
    if made.get("group") == "model":
        made.pop("q", None)  # density 1 with a q: known, not yet mended
    elif draw(some()):
        made["protect"] = {"columns": {draw(st.sampled_from(["q", "weight"])): [0, *draw(st.sampled_from([[], [2]]))]}}
    if draw(some()):
        key = draw(st.sampled_from(["include", "exclude"]))
        made[key] = [draw(st.sampled_from(["q", "bias", "layers.1", "lm_head"]))]
    return made


@st.composite
def parameters(draw: st.DrawFn, method: str) -> dict[str, Any]:
    """Parameters of the merge for all its models."""
    known, made = MERGE[method].parameters, {}
    if method == "slerp":
        made["t"] = draw(valued([0.3, 0.0, 1.0, 0.5]))
    if method == "nearswap":
        made["t"] = draw(valued([0.004, 0.0, 1.0, 1e-5]))
    if method == "karcher":
        made |= {"max_iter": 60, "tol": 1e-9}
    choices: dict[str, Any] = {
        "lambda": valued([1.0, 0.7, -1.5, 0.0, 2.0]),
        "normalize": st.booleans(),
        "density": valued([*DENSITIES, 0.0]),
        "gamma": st.sampled_from([0.0, 0.1, 0.4]),
        "rescale": st.booleans(),
        "scale": valued([0.3, 1.0, -2.0, 0.0]),
        "select_topk": st.sampled_from([0.3, 0.0, 1.0, 0.9]),
        "r": st.sampled_from([0.5, 0.0, -1.0]),
        "alpha": st.sampled_from([1.5, 0.0]),
        "filter_wise": st.booleans(),
        "nuslerp_flatten": st.booleans(),
        "nuslerp_row_wise": st.booleans(),
        "normalize_weights": st.booleans(),
    }
    if method.startswith("ram"):
        choices["epsilon"] = st.sampled_from([0.003, 0.0, 2.0**-7])
    if method.startswith("della"):
        density = draw(st.sampled_from(DENSITIES))
        made |= {"density": density, "epsilon": EPSILONS[density]}
    for key in choices.keys() & known.keys() - made.keys():
        if draw(st.booleans()):
            made[key] = draw(choices[key])
    return made


@st.composite
def shapes(draw: st.DrawFn, alike: bool) -> dict[str, tuple[int, ...]]:
    """Tensors in and outside layers; `alike`: every layer has the same."""
    shape, made = st.sampled_from(SHAPES), {}
    layers = draw(st.integers(1, 3)) if not alike else 3
    parts = {part: draw(shape) for part in draw(st.sampled_from([["q.weight"], ["q.weight", "bias"]]))}
    for layer in range(layers):
        for part, same in parts.items():
            made[f"layers.{layer}.{part}"] = same if alike or draw(st.booleans()) else draw(shape)
    if draw(some()):
        made["embed.weight"] = made["lm_head.weight"] = draw(shape)
    if draw(some()):
        made["wide.weight"] = draw(st.sampled_from(WIDE))
    return made


def weight_of(method: str) -> st.SearchStrategy[Any]:
    return valued([0.5, 0.2, 1.0, 3.0] if method in SPANS else WEIGHTS)


@st.composite
def model(draw: st.DrawFn, method: str, name: str, own: bool, sliced: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"model": f"./{name}"}
    known = MERGE[method].parameters
    given: dict[str, Any] = {}
    if "weight" in known:
        given["weight"] = draw(weight_of(method))
    if method in ("ties", "dare_linear", "dare_ties") and draw(some()):
        given["density"] = draw(valued([*DENSITIES, 0.0]))
    if given:
        made["parameters"] = given
    if own and draw(st.booleans()):
        made["prune"] = draw(prunes(sliced))
    return made


@st.composite
def cases(draw: st.DrawFn, method: str) -> Case:
    """A recipe of one merge method."""
    merge = MERGE[method]
    most = min(merge.maximum or 3, 3)
    based = merge.needs_base or (merge.takes_base and draw(st.booleans()))
    apart = based and merge.deltas
    sliced = draw(some()) and method != "karcher"
    tensors = draw(shapes(sliced))
    where = draw(st.sampled_from(["none", "all", "own", "own"])) if apart else "none"
    recipe: dict[str, Any] = {"merge_method": method, **({"base_model": "./base"} if based else {})}
    names = MODELS[: draw(st.integers(merge.minimum, most))]
    if sliced:
        recipe["slices"] = []
        for _ in range(draw(st.integers(1, 2))):
            first = draw(st.integers(0, 2))
            layers = [first, draw(st.integers(first + 1, 3))]
            sources = [draw(model(method, n, False, True)) | {"layer_range": layers} for n in names]
            recipe["slices"].append({"sources": sources})
        where = "all" if where == "own" else where
    else:
        recipe["models"] = [draw(model(method, n, where == "own", False)) for n in names]
        if apart and draw(some()):
            recipe["models"].append({"model": "./base"})
    recipe["parameters"] = draw(parameters(method))
    if where == "all":
        recipe["prune"] = draw(prunes(sliced))
    if draw(some()):
        recipe["seed"] = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from(OUTPUTS[sliced:]))
    if dtype:
        recipe[draw(st.sampled_from(["dtype", "out_dtype"]))] = dtype
    prunings = [m["prune"] for m in (recipe, *recipe.get("models", [])) if "prune" in m]
    if any(p["method"] == "wanda" or isinstance(p.get("q"), dict) for p in prunings):
        recipe["calibration"] = CALIBRATION
    if any(p["method"] in ("dare", "structured") for p in prunings):
        recipe["parameters"].pop("select_topk", None)  # after a sparse prune, without compiled loops: known
    alike = draw(st.booleans())
    code = st.sampled_from(DTYPES)
    first_code = draw(code)
    dtypes = tuple(first_code if alike else draw(code) for _ in range(1 + len(MODELS)))
    return Case(
        recipe,
        tensors,
        dtypes,
        profile=draw(st.sampled_from(PROFILES)),
        seed=draw(st.integers(0, 999)),
        finite=draw(st.sampled_from([True, True, True, False])),
        tied=draw(some()),
        workers=draw(st.integers(1, 2)),
        tile=draw(st.sampled_from([DEFAULT_TILE, 1 << 10, 1 << 16])),
        job=draw(st.sampled_from([DEFAULT_JOB, 1 << 16])),
        listed=draw(st.sampled_from([DEFAULT_LISTED, 0, 100])),
    )
