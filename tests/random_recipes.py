"""Random recipes and the inputs they merge, as hypothesis strategies.

`cases(method)` draws a `Case`; `Case.write` makes its files, `Case.reference` says what is to come out. The repr of a
case makes it again, which is what a failing test prints, with the recipe as YAML.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st
from raw_tensors import LARGEST, Stored, stored, widened, write_checkpoint
from reference_recipe import Place, Recipe

from deltamerge.methods.registry import MERGE

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
SHARES = [0.5, 0.2, 1.0, 3.0]
PARAMETERS: dict[str, list[Any]] = {
    "lambda": [1.0, 0.7, -1.5, 0.0, 2.0],
    "normalize": [True, False],
    "density": [*DENSITIES, 0.0],
    "gamma": [0.0, 0.1, 0.4],
    "rescale": [True, False],
    "scale": [0.3, 1.0, -2.0, 0.0],
    "select_topk": [0.3, 0.0, 1.0, 0.9],
    "r": [0.5, 0.0, -1.0],
    "alpha": [1.5, 0.0],
    "filter_wise": [True, False],
    "nuslerp_flatten": [True, False],
    "nuslerp_row_wise": [True, False],
    "normalize_weights": [True, False],
    "threshold": [0.4, 0.0, 1.2, 0.8],
    "agreement": [2, 0, 1, 3],
    "common": [0.8, 0.0, 1.0, 0.5],
    "rho": [0.1, 0.01, 1.0],
    "steps": [0, 3],
}
FOR_ALL = ("rescale", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "agreement", "common", "steps")
RARELY = [False, False, False, True]
DEFAULT_TILE, DEFAULT_JOB, DEFAULT_LISTED = 1 << 18, 1 << 21, 1 << 20


Pick = Callable[[Sequence[Any]], Any]


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
        if self.tied and {"lm_head.weight", "embed.weight"} <= self.shapes.keys():
            for tensors in made.values():
                tensors["lm_head.weight"] = tensors["embed.weight"]
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
        for name in names:
            if not name.startswith("layers."):
                part = slices[0 if "embed" in name else -1]
                sources = part["sources"]
                levels = [part.get("parameters", {}), *own]
                places.append(Place(name, 0.0, sources, levels, [name] * len(sources), name if base else None))
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


def valued(pick: Pick, numbers: list[Any], whole: bool = True) -> Any:
    """A number; at times a gradient, or filters, of which the last matches all if `whole`."""
    kind = pick(["number", "number", "number", "gradient", "filters"])
    if kind == "number":
        return pick(numbers)
    if kind == "gradient":
        return [pick(numbers) for _ in range(pick([1, 2, 3]))]
    named = {"filter": pick(["q", "layers.1", "bias", "nowhere"]), "value": pick(numbers)}
    return [named, *([{"value": pick(numbers)}] if whole or pick([True, False]) else [])]


def pruning(pick: Pick, sliced: bool, linear: list[str]) -> dict[str, Any]:
    """A pruning with a method of its own; `linear` are patterns that find matrices whose columns it may protect."""
    methods = ["dare", "dare", "magnitude", "magnitude", "structured", "della", "breadcrumbs", "magnitude_outliers"]
    method = pick(methods if sliced else [*methods, "wanda"])
    made: dict[str, Any] = {"method": method}
    if method == "structured":
        made |= {"a": valued(pick, [0.5, 1.0, 0.1, 0.3]), "b": valued(pick, [0.5, 1.0, 0.05, 0.2])}
    elif method == "della":
        density = pick(DENSITIES)
        made |= {"density": density, "epsilon": EPSILONS[density]}
    else:
        made["density"] = valued(pick, DENSITIES, whole=False)
    if method in ("breadcrumbs", "magnitude_outliers") and pick([False, True]):
        made["gamma"] = valued(pick, [0.0, 0.1, 0.4, 1.0])
    if method == "dare" and pick(RARELY):
        made["sampling"] = "magnitude"
    if method == "magnitude":
        made["group"] = pick(["tensor", "row", "model"])
    divide = pick(["method", "method", "q", "norm", "rows"])
    if divide == "rows" and not sliced:
        made["q"] = {"objective": "layer_mse", "scope": "row"}
    elif divide == "q":
        made["q"] = valued(pick, [0.25, 1.0, 0.03, 0.7])
    elif divide == "norm":
        made["rescale"] = pick(["l1", "l2", "linf"])
    if made.get("group") != "model" and linear and pick(RARELY):
        made["protect"] = {"columns": {pick(linear): pick([[0], [0, 2], [1]])}}
    if pick(RARELY):
        made[pick(["exclude", "include"])] = [pick(["bias", "q", "layers.1", "lm_head"])]
    return made


def parameters(pick: Pick, method: str, count: int) -> dict[str, Any]:
    """Parameters of the merge for all its `count` models."""
    known, made = MERGE[method].parameters, {}
    if "task" in known:
        made["task"] = pick(range(1, count + 1))
    if method == "slerp":
        made["t"] = valued(pick, [0.3, 0.0, 1.0, 0.5])
    if method == "nearswap":
        made["t"] = valued(pick, [0.004, 0.0, 1.0, 1e-5])
    if method == "karcher":
        made |= {"max_iter": 60, "tol": 1e-9}
    if method.startswith("della"):
        density = pick(DENSITIES)
        made |= {"density": density, "epsilon": EPSILONS[density]}
    numbers = PARAMETERS | ({"epsilon": [0.003, 0.0, 2.0**-7]} if method.startswith("ram") else {})
    for key in (key for key in numbers if key in known and key not in made):
        if pick([False, True]):
            made[key] = pick(numbers[key]) if key in FOR_ALL else valued(pick, numbers[key])
    return made


def tensors(pick: Pick, alike: bool, widest: int) -> dict[str, tuple[int, ...]]:
    """Shapes in and outside layers; `alike`: every layer has the same. None is larger than `widest` on a side."""
    parts = {part: pick(SHAPES) for part in pick([["q.weight"], ["q.weight", "bias"]])}
    made = {}
    for layer in range(3 if alike else pick([1, 2, 3])):
        for part, same in parts.items():
            made[f"layers.{layer}.{part}"] = same if alike or pick([True, False]) else pick(SHAPES)
    if pick(RARELY):
        made["embed.weight"] = made["lm_head.weight"] = pick(SHAPES)
    if pick(RARELY):
        made["wide.weight"] = pick([shape for shape in WIDE if max(shape[0], math.prod(shape[1:])) <= widest])
    return made


def model(pick: Pick, method: str, name: str, sliced: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"model": f"./{name}"}
    if not sliced and pick(RARELY):
        made["name"] = name * 2
    own: dict[str, Any] = {}
    if "weight" in MERGE[method].parameters:
        own["weight"] = valued(pick, SHARES if method in ("nuslerp", "multislerp") else WEIGHTS)
    if method in ("ties", "dare_linear", "dare_ties") and pick(RARELY):
        own["density"] = valued(pick, [*DENSITIES, 0.0])
    return made | ({"parameters": own} if own else {})


def models(pick: Pick, method: str, names: str, sliced: bool) -> dict[str, Any]:
    """`models`, or `slices` of them."""
    if not sliced:
        return {"models": [model(pick, method, name, False) for name in names]}
    slices = []
    for _ in range(pick([1, 2])):
        layers = pick([[0, 1], [1, 2], [0, 2], [1, 3], [0, 3]])
        slices.append({"sources": [model(pick, method, n, True) | {"layer_range": layers} for n in names]})
    return {"slices": slices}


def case(pick: Pick, method: str) -> Case:
    """A recipe of one merge method; every choice is made by `pick`, of options of which the first is the simplest."""
    merge = MERGE[method]
    based = merge.needs_base or (merge.takes_base and pick([True, False]))
    apart, sliced = based and merge.deltas, method != "karcher" and pick(RARELY)
    shapes = tensors(pick, sliced, 400 if merge.matrices else 1 << 17)  # whose squares wudi holds
    linear = [n for n, shape in shapes.items() if len(shape) == 2 and shape[1] > 2 and n != "embed.weight"]
    if sliced:
        linear = ["q.weight"] if "layers.0.q.weight" in linear else []
    counts = range(merge.minimum, 1 + min(merge.maximum or 3, 3))
    recipe: dict[str, Any] = {"merge_method": method, **({"base_model": "./base"} if based else {})}
    names = MODELS[: pick(list(counts))]
    recipe |= models(pick, method, names, sliced)
    recipe["parameters"] = parameters(pick, method, len(names))
    pruned = pick(["nothing", "all", "all" if sliced else "some"]) if apart else "nothing"
    holders = {"nothing": [], "all": [recipe], "some": recipe.get("models", [])}[pruned]
    for holder in holders:
        if pruned == "all" or pick([True, False]):
            holder["prune"] = pruning(pick, sliced, linear)
    if apart and not sliced and pick(RARELY):
        recipe["models"].append({"model": "./base"})
    if pick(RARELY):
        recipe["seed"] = pick([1, 2, 3])
    dtype = pick(OUTPUTS[sliced:])
    if dtype:
        recipe[pick(["dtype", "out_dtype"])] = dtype
    prunings = [holder["prune"] for holder in holders if "prune" in holder]
    if any(p["method"] == "wanda" or isinstance(p.get("q"), dict) for p in prunings):
        recipe["calibration"] = CALIBRATION
    alike, code = pick([True, False]), pick(DTYPES)
    return Case(
        recipe,
        shapes,
        tuple(code if alike else pick(DTYPES) for _ in range(1 + len(MODELS))),
        profile=pick(PROFILES),
        seed=pick(range(1000)),
        finite=pick([True, True, True, False]),
        tied=pick(RARELY),
        workers=pick([1, 2]),
        tile=pick([DEFAULT_TILE, 1 << 10, 1 << 16]),
        job=pick([DEFAULT_JOB, 1 << 16]),
        listed=pick([DEFAULT_LISTED, 0, 100]),
    )


@st.composite
def cases(draw: st.DrawFn, method: str) -> Case:
    """Cases whose choices are those of a generator; hypothesis makes them the simplest, one by one, to shrink."""
    rng, simple = random.Random(draw(st.integers(0, 2**64))), iter(draw(st.binary(min_size=300, max_size=300)))

    def pick(options: Sequence[Any]) -> Any:
        chosen = options[rng.randrange(len(options))]
        return chosen if next(simple, 0) else options[0]

    return case(pick, method)
