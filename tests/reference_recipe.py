"""What a whole recipe makes, in float64 numpy, written from the formulas; with how far float32 may be from it.

Nothing here computes with the package's code. Only the draws are its own (`prune.bits`): a mask is a contract, not a
number to be rounded. What is in float32 by contract is float32 here too: inputs widened, Δ = fine-tune − base, sums of
weights, scores that entries are ranked by.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference

from deltamerge.methods.prune import bits

F32 = np.float32
IMPLIED = {"dare_linear": "dare", "dare_ties": "dare", "della": "della", "della_linear": "della",
           "breadcrumbs": "breadcrumbs", "breadcrumbs_ties": "breadcrumbs"}  # fmt: skip
RANDOM = ("dare", "structured", "della")
TIES = ("ties", "dare_ties", "della", "breadcrumbs_ties")
SUMS = ("task_arithmetic", "dare_linear", "della_linear", "breadcrumbs")
BY_ENTRY = (*SUMS, *TIES, "nearswap", "ram", "consensus", "tall_masks")
NORMALIZED = ("linear", "ties", "della")
DEFAULTS = {"lambda": 1.0, "density": 1.0, "epsilon": 1e-5, "r": 0.1, "alpha": 0.2, "eps": 1e-8, "select_topk": 1.0,
            "scale": 1.0, "weight": 1.0, "threshold": 0.4, "agreement": 2, "common": 0.8, "rho": 1.0,
            "steps": 0}  # fmt: skip
# Rows of della and of arcee_fusion that are no rows of a matrix: a vector is cut here.
LONGEST = 1 << 16
# Float32 rounds every product, sum and quotient to 2**-24 of itself; no method has more than 16 of them in a row.
ROUNDING = 16 * 2.0**-24
LEAST = 2.0**-126
# Merges of whole matrices are within this of the largest entries (docs/why/merging.md). What they make of deltas with
# noise, a pruned entry's own rounding and what float64 leaves of squared singular values, says how much more an input
# is amplified; from this share of the largest entries on they are unsure.
OF_MATRICES, NOISE_OF_PRUNED, NOISE, AMPLIFIED = 2.0**-21, 2.0**-22, 2.0**-30, 2.0**-14
# Sums of magnitudes beyond which a step may leave float32.
MOST = 2.0**123


class Unsure(Exception):  # no error: a case that rounding may decide either way
    """The formula is too near to a jump to say what float32 makes of it."""


@dataclass
class Wanted:
    """What a tensor is to be: one of `either` in each entry, to within rounding of `size`, the sum of the magnitudes of
    the terms; entries that are `unsure` may be anything."""

    either: Sequence[np.ndarray]
    size: np.ndarray
    unsure: np.ndarray | bool = False

    def misses(self, got: np.ndarray, digits: int, least: int, largest: float) -> np.ndarray:
        """Where a tensor of a dtype is none of them: it has one rounding more, to the dtype."""
        slack = ROUNDING * self.size + LEAST
        wrong = np.ones(got.shape, bool)
        for value in self.either:
            with np.errstate(invalid="ignore", over="ignore"):
                exponent = np.maximum(np.frexp(np.abs(value) + slack)[1] - 1, least)
                near = np.abs(got - value) <= slack + 0.5 * np.ldexp(1.0, exponent - digits)
                over = (np.abs(got) >= largest) & (np.abs(value) + slack >= largest) & (got * value > 0)
            wrong &= ~(near | over)
        return wrong & ~self.unsure & (self.size < MOST)


@dataclass(frozen=True)
class Place:
    """A tensor of the output: its name, the position of its layer, its slice, and what it is called in each model."""

    name: str
    position: float
    models: Sequence[Mapping[str, Any]]
    levels: Sequence[Mapping[str, Any]]
    sources: Sequence[str]
    base: str | None


@dataclass
class Part:
    """A pruned delta; where `unsure` an entry may be dropped or kept."""

    values: np.ndarray
    unsure: np.ndarray | bool = False


@dataclass
class Recipe:
    """A recipe and its inputs (float64, by model and tensor name); norms of features and q's of rows are made up."""

    recipe: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, np.ndarray]]
    places: Sequence[Place]
    norms: Callable[[str, int], np.ndarray]
    row_q: Callable[[str, tuple[int, ...]], Any]
    cuts: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return str(self.recipe["merge_method"])

    def parameter(self, key: str, place: Place, model: Mapping[str, Any] | None = None, default: Any = None) -> Any:
        levels = ([model.get("parameters", {})] if model is not None else []) + list(place.levels)
        found = first(key, levels, place)
        if found is not None:
            return found
        if key == "normalize":
            return self.method in NORMALIZED
        return DEFAULTS.get(key) if default is None else default

    def apart(self) -> bool:
        return "base_model" in self.recipe and self.method not in ("linear", "passthrough", "karcher", "slerp")

    def made(self, place: Place) -> Wanted:
        base, xs = self.read(place)
        if not self.apart():
            return MERGES[self.method](self, place, base, [x.astype(np.float64) for x in xs])
        assert base is not None
        parts = self.parts(place)
        values = [part.values for part in parts]
        wide = base.astype(np.float64)
        unsure = np.zeros(base.shape, bool)
        for part in parts:
            unsure |= part.unsure
        if self.method not in BY_ENTRY and any((np.abs(part.values) >= MOST).any() for part in parts):
            raise Unsure
        if unsure.any() and self.method not in BY_ENTRY:
            raise Unsure
        with np.errstate(all="ignore"):
            wanted = MERGES[self.method](self, place, wide, values)
        wanted.unsure = wanted.unsure | unsure
        return wanted

    def read(self, place: Place) -> tuple[Any, list[np.ndarray]]:
        """The base's tensor, or None, and those of the models, in float32."""
        xs = [single(self.inputs[m["model"]][s]) for m, s in zip(place.models, place.sources, strict=True)]
        return None if place.base is None else single(self.inputs[self.recipe["base_model"]][place.base]), xs

    def parts(self, place: Place) -> list[Part]:
        """The pruned delta of each model."""
        base, xs = self.read(place)
        return [self.pruned(place, model, delta(x, base)) for model, x in zip(place.models, xs, strict=True)]

    def pruning(self, model: Mapping[str, Any]) -> tuple[str, list[Mapping[str, Any]]]:
        levels = [x for x in (model.get("prune"), self.recipe.get("prune")) if x]
        named = next((level["method"] for level in levels if "method" in level), None)
        return named or IMPLIED.get(self.method, "none"), levels

    def is_pruned(self, place: Place, model: Mapping[str, Any]) -> bool:
        method, levels = self.pruning(model)
        explicit = any("method" in level for level in levels)
        include = next((level["include"] for level in levels if "include" in level), None)
        exclude = next((level["exclude"] for level in levels if "exclude" in level), ["lm_head"] if explicit else [])
        if method == "none" or (include is not None and not any(p in place.name for p in include)):
            return False
        return not any(p in place.name for p in exclude)

    def density(self, place: Place, model: Mapping[str, Any]) -> float:
        method, levels = self.pruning(model)
        if method == "structured":
            return float(first("a", levels, place) * first("b", levels, place))
        found = first("density", [*levels, model.get("parameters", {}), *place.levels], place)
        return 1.0 if found is None else float(found)

    def pruned(self, place: Place, model: Mapping[str, Any], d: np.ndarray) -> Part:
        method, levels = self.pruning(model)
        if method == "none":
            return Part(self.trimmed(place, model, d))
        if not self.is_pruned(place, model):
            return Part(d.astype(np.float64))
        density = self.density(place, model)
        if density == 0:
            return Part(np.zeros(d.shape))
        q, rescale = self.divisor(place, levels, method, density)
        if density == 1 and (rescale or isinstance(q, dict) or q == 1):
            return Part(d.astype(np.float64))
        protect = next((level["protect"]["columns"] for level in levels if "protect" in level), {})
        columns = sorted({c for pattern, some in protect.items() if pattern in place.name for c in some})
        columns = columns if is_linear(place.name, d.shape) else []
        cleared = d.copy()
        if columns:
            cleared[..., columns] = 0
        part = self.masked(place, model, method, levels, cleared, density, len(columns), weighted=not rescale)
        kept = part.values
        if rescale:
            kept = reference.match_norm(kept, cleared.astype(np.float64), rescale)
            if np.any(part.unsure):
                raise Unsure
        elif isinstance(q, dict):
            kept = kept / self.row_q(place.name, d.shape)
        else:
            kept = kept / F32(q)
        if columns:
            kept[..., columns] = d[..., columns]
        return Part(kept, part.unsure)

    def divisor(self, place: Place, levels: Sequence[Mapping[str, Any]], method: str, density: float) -> Any:
        for level in levels:
            if "rescale" in level:
                return None, level["rescale"]
            if isinstance(level.get("q"), dict):
                return level["q"], None
            if (q := first("q", [level], place)) is not None:
                return q, None
        told = first("rescale", place.levels, place)
        if method in RANDOM:
            return (1.0 if told is False else density), None
        return (None, "l1") if told else (1.0, None)

    def trimmed(self, place: Place, model: Mapping[str, Any], d: np.ndarray) -> np.ndarray:
        density = self.parameter("density", place, model) if self.method == "ties" else 1.0
        wide = d.astype(np.float64)
        if density >= 1:
            return wide
        kept = reference.keep_top(wide, max(1, int(density * d.size)) if density else 0)
        return reference.match_norm(kept, wide, "l1") if self.parameter("rescale", place) else kept

    def masked(
        self, place: Place, model: Mapping[str, Any], method: str, levels: Sequence[Mapping[str, Any]], d: np.ndarray,
        density: float, protected: int, *, weighted: bool,
    ) -> Part:  # fmt: skip
        """mask ∘ Δ, in float64; `weighted`: over the probability of each entry, times the density."""
        wide, shape = d.astype(np.float64), d.shape
        key = bits.mask_key(self.recipe.get("seed", 0), model.get("name", model["model"]), place.name)
        sampling = next((level["sampling"] for level in levels if "sampling" in level), "uniform")
        group = next((level["group"] for level in levels if "group" in level), "tensor")
        if method == "dare" and sampling == "uniform":
            return Part(chosen(wide, bits.positions(key, 0, d.size, density)))
        if method == "structured":
            return Part(structured(wide, key, *(float(first(side, levels, place)) for side in "ab")))
        if method in ("breadcrumbs", "magnitude_outliers"):
            gamma = first("gamma", [*levels, model.get("parameters", {}), *place.levels], place)
            return Part(reference.breadcrumbs(wide, density, 0.01 if gamma is None else gamma))
        density *= 1 - protected / shape[-1] if protected else 1
        if method == "della":
            epsilon = first("epsilon", [*levels, model.get("parameters", {}), *place.levels], place)
            return Part(della(wide, key, density, 0.15 if epsilon is None else epsilon, weighted))
        if sampling == "magnitude":
            return sampled(d, key, density)
        if method == "wanda" and is_linear(place.name, shape):
            return Part(best_of_rows(wide, np.abs(d) * self.norms(place.sources[0], shape[-1]), density))
        if group == "row" and d.ndim > 1:
            return Part(best_of_rows(wide, np.abs(d), density))
        if group == "model":
            return Part(np.where(self.cut(model)[place.name], wide, 0))
        return Part(reference.magnitude(wide, density))

    def cut(self, model: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
        """Which entries of each tensor are among the largest of a model or of its layers in a slice."""
        if id(model) not in self.cuts:
            mine = [(place, i) for place in self.places for i, m in enumerate(place.models) if m is model]
            pruned = [(p, i) for p, i in mine if self.is_pruned(p, model) and self.density(p, model) < 1]
            deltas = {}
            for place, i in pruned:
                x, base = (
                    self.inputs[model["model"]][place.sources[i]],
                    self.inputs[self.recipe["base_model"]][place.base],
                )
                deltas[place.name] = delta(single(x), single(base))
            k = sum(round(self.density(p, model) * deltas[p.name].size) for p, _ in pruned)
            flat = np.concatenate([np.empty(0), *(d.reshape(-1) for d in deltas.values())])
            kept = np.zeros(flat.size, bool)
            kept[np.argsort(-np.abs(flat), kind="stable")[:k]] = True
            ends = np.cumsum([d.size for d in deltas.values()])
            self.cuts[id(model)] = {
                name: kept[end - d.size : end].reshape(d.shape)
                for (name, d), end in zip(deltas.items(), ends, strict=True)
            }
        return self.cuts[id(model)]


def single(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(x, F32)


def delta(x: np.ndarray, base: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x - base)


def first(key: str, levels: Sequence[Mapping[str, Any]], place: Place) -> Any:
    """The first level's value that there is for a tensor."""
    for level in levels:
        if key in level and (found := resolved(level[key], place)) is not None:
            return found
    return None


def resolved(value: Any, place: Place) -> Any:
    """A number, a gradient over the layers (of booleans the last reached), or the first filter found in the name."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    if isinstance(value[0], dict):
        return next((resolved(v["value"], place) for v in value if v.get("filter", "") in place.name), None)
    if isinstance(value[0], bool):
        return value[int(place.position * (len(value) - 1))]
    return float(np.interp(place.position * (len(value) - 1), range(len(value)), value))


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and "embed" not in name


def columns_of(shape: tuple[int, ...]) -> int:
    """A row of a convolution is all but its first dimension."""
    return int(np.prod(shape[1:])) if len(shape) > 3 else shape[-1]


def chosen(wide: np.ndarray, positions: np.ndarray) -> np.ndarray:
    kept = np.zeros(wide.size)
    kept[positions] = wide.reshape(-1)[positions]
    return kept.reshape(wide.shape)


def structured(wide: np.ndarray, key: Any, a: float, b: float) -> np.ndarray:
    if wide.ndim != 2:
        return chosen(wide, bits.positions(key, 0, wide.size, a * b))
    m, n = wide.shape
    if not wide.size:
        return wide
    columns = bits.choose_columns(key, n, max(1, round(a * n)))
    inside = bits.positions(key, 0, m * len(columns), b)
    rows, places = np.divmod(inside, len(columns))
    return chosen(wide, rows * n + columns[places])


def rows_of(wide: np.ndarray) -> list[np.ndarray]:
    """The rows that entries are ranked in, the last dimension; of a vector pieces."""
    flat = wide.reshape(-1)
    step = wide.shape[-1] if wide.ndim > 1 and wide.size else LONGEST
    return [flat[at : at + step] for at in range(0, flat.size, step)]


def della(wide: np.ndarray, key: Any, density: float, epsilon: float, weighted: bool) -> np.ndarray:
    rows = rows_of(wide)
    probability = np.concatenate([np.empty(0), *(reference.della_probability(row, density, epsilon) for row in rows)])
    kept = bits.words(key, 0, wide.size) < np.round(probability * 2.0**32)
    values = wide.reshape(-1) * density / probability if weighted else wide.reshape(-1)
    return np.where(kept, values, 0).reshape(wide.shape)


def sampled(d: np.ndarray, key: Any, density: float) -> Part:
    """Kept with π = min(1, c |Δ|), their mean the density; Δ · density / π."""
    size = np.abs(d).astype(np.float64).reshape(-1)
    expected, down = density * size.size, np.sort(size)[::-1]
    if np.count_nonzero(size) <= expected * (1 + 1e-9):
        c = float(np.finfo(F32).max)
    else:
        rest = down.sum() - np.concatenate([[0.0], np.cumsum(down)[:-1]])
        tries = (expected - np.arange(size.size)) / np.where(rest > 0, rest, 1)
        c = min(tries[np.flatnonzero(tries * down <= 1)[0]], float(np.finfo(F32).max))
    probability = np.minimum(1, c * size)
    words = bits.words(key, 0, size.size)
    edge = probability * 2.0**32
    unsure = (np.abs(words - edge) <= 1 + 2.0**-18 * edge) & (probability < 1 - 2.0**-18) | (size > 0) & (size < LEAST)
    values = np.divide(d.reshape(-1) * density, probability, out=np.zeros(size.size), where=probability > 0)
    kept = (words < edge) & (probability > 0)
    return Part(np.where(kept, values, 0).reshape(d.shape), unsure.reshape(d.shape))


def best_of_rows(wide: np.ndarray, score: np.ndarray, density: float) -> np.ndarray:
    if not wide.size:
        return wide
    columns = columns_of(wide.shape)
    kept = np.zeros(wide.shape).reshape(-1, columns)
    for row, of, rank in zip(kept, wide.reshape(-1, columns), score.reshape(-1, columns), strict=True):
        best = np.argsort(-rank, kind="stable")[: round(density * columns)]
        row[best] = of[best]
    return kept.reshape(wide.shape)


def summed(weights: Sequence[float]) -> float:
    """Σ w in float32, one after another; 1 where it is nearly 0."""
    total = F32(0)
    for weight in weights:
        total = F32(total + F32(weight))
    return 1.0 if abs(total) < 1e-8 else float(total)


def weights_of(recipe: Recipe, place: Place) -> list[float]:
    return [float(F32(recipe.parameter("weight", place, model))) for model in place.models]


def linear(recipe: Recipe, place: Place, base: Any, xs: list[np.ndarray]) -> Wanted:
    weights = weights_of(recipe, place)
    divisor = summed(weights) if recipe.parameter("normalize", place) else 1.0
    terms = [w * x / divisor for w, x in zip(weights, xs, strict=True)]
    return Wanted([sum(terms)], sum(map(np.abs, terms)))


def task_arithmetic(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    weights = weights_of(recipe, place)
    divisor = summed(weights) if recipe.parameter("normalize", place) else 1.0
    factor = float(F32(recipe.parameter("lambda", place))) / divisor
    terms = [factor * w * d for w, d in zip(weights, ds, strict=True)]
    return Wanted([base + sum(terms)], np.abs(base) + sum(map(np.abs, terms)))


def consensus(
    base: np.ndarray,
    es: np.ndarray,
    votes: np.ndarray,
    weights: Sequence[float],
    settle: Callable[[Any], Any],
    factor: float,
) -> Wanted:
    """base + the sum of the entries of the elected sign over their settled weights; either sign where it is unclear."""
    total, size = votes.sum(0), np.abs(votes).sum(0)
    unclear = (np.abs(total) <= ROUNDING * size + LEAST) & (size > 0)
    if len(es) < 3:
        unclear &= total != 0
    results = []
    for sign in (1, -1):
        agree = np.sign(votes) == sign
        divisor = np.zeros(base.shape, F32)
        for some, weight in zip(agree, weights, strict=True):
            divisor += np.where(some, F32(weight), F32(0))
        results.append(factor * (es * agree).sum(0) / settle(divisor))
    elected, other = np.where(total >= 0, results, results[::-1])
    either = [base + elected, base + np.where(unclear, other, elected)]
    return Wanted(either, np.abs(base) + np.abs(elected) + np.where(unclear, np.abs(other), 0))


def ties(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    weights = weights_of(recipe, place)
    es = np.stack([w * d for w, d in zip(weights, ds, strict=True)])
    divides = recipe.parameter("normalize", place)
    factor = float(F32(recipe.parameter("lambda", place)))
    return consensus(base, es, es, weights, lambda x: np.where(np.abs(x) < 1e-8, 1, x) if divides else 1.0, factor)


def sce(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    topk, d = recipe.parameter("select_topk", place), np.stack(ds)
    if topk < 1:
        d = d * varying(d, topk)
    squares = (d**2).reshape(len(d), -1).mean(1) if base.size else np.zeros(len(d))
    if abs(squares.sum() - 1e-6) < 1e-12:
        raise Unsure
    shares = np.full(len(d), 1 / len(d)) if squares.sum() < 1e-6 else squares / squares.sum()
    weights = shares.astype(F32).astype(np.float64)
    es = d * weights.reshape(-1, *[1] * base.ndim)
    return consensus(base, es, d, weights, lambda x: np.maximum(x, F32(1e-6)), 1.0)


def varying(d: np.ndarray, share: float) -> np.ndarray:
    """Where the variance over the models is among the largest; Unsure where float32 may rank entries otherwise."""
    variance, varies = d.var(0), (d != d[0]).any(0)
    k, down = int(np.count_nonzero(varies) * share), np.sort(variance[varies])[::-1]
    if k == 0:
        return np.zeros(varies.shape, bool)
    if down[-1] < 1e-36 or down[0] > 2.0**120 or (k < down.size and down[k - 1] - down[k] <= ROUNDING * down[k - 1]):
        raise Unsure
    return varies & (variance >= down[k - 1])


def ram(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    epsilon = float(F32(recipe.parameter("epsilon", place)))
    plus = recipe.method == "ramplus_tl"
    r, alpha = (recipe.parameter(key, place) if plus else 0.0 for key in ("r", "alpha"))
    size = np.abs(base) + (1 + abs(r) * alpha) * sum(map(np.abs, ds))
    near = np.zeros(base.shape, bool)
    for d in ds:
        near |= np.abs(np.abs(d) - epsilon) <= ROUNDING * epsilon
    if near.any() and plus:
        raise Unsure
    return Wanted([reference.ram(base, ds, epsilon, r, alpha)], size, near)


def nearswap(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    (d,), t = ds, float(F32(recipe.parameter("t", place)))
    return Wanted([base + np.clip(t / np.maximum(np.abs(d), 1e-6), 0, 1) * d], np.abs(base) + np.abs(d))


def arcee_fusion(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    (d,) = ds
    if not base.size:
        return Wanted([base], base)
    rows = zip(rows_of(base), rows_of(d), strict=True)
    with np.errstate(over="ignore", invalid="ignore"):
        found = [reference.arcee_importance(b[None], x[None])[0] for b, x in rows]
    importance = np.concatenate(found)
    ordered = np.sort(np.abs(importance))
    q1, median, q3 = (ordered[(size_ := ordered.size) - (size_ - p * (size_ - 1) // 4)] for p in (1, 2, 3))
    threshold = median + 1.5 * (q3 - q1)
    # exponentials are known to some 2**-52, and so are differences of logarithms near 0
    near = np.abs(importance - threshold) <= ROUNDING * (abs(threshold) + q3) + 2.0**-45 * np.abs(d).max()
    taken = np.where((importance >= threshold).reshape(base.shape), d, 0)
    left = np.where(near.reshape(base.shape), d - taken, taken)
    return Wanted([base + taken, base + left], np.abs(base) + np.abs(d))


def passthrough(recipe: Recipe, place: Place, base: Any, xs: list[np.ndarray]) -> Wanted:
    value = float(F32(recipe.parameter("scale", place, place.models[0]))) * xs[0]
    return Wanted([value], np.abs(value))


def length(x: np.ndarray) -> float:
    return float(np.sqrt((x * x).sum()))


def arc(
    a: np.ndarray, b: np.ndarray, t: float, norm: Callable[[float], float], straight: Callable[[float], bool]
) -> Any:
    """Between two vectors whose lengths count as `norm` says: the point, and the size of its terms."""
    cosine = np.clip((a * b).sum() / (norm(length(a)) * norm(length(b))), -1, 1)
    if cosine < -1 + 1e-6 or abs(abs(cosine) - 0.9995) < 1e-9:
        raise Unsure
    theta = np.arccos(cosine)
    factors = np.array([1 - t, t])
    if not (straight(cosine) or theta < 1e-6):
        factors = np.sin(factors * theta) / np.sin(theta)
    return factors[0] * a + factors[1] * b, np.abs(factors[0] * a) + np.abs(factors[1] * b)


def slerp(recipe: Recipe, place: Place, base: np.ndarray, xs: list[np.ndarray]) -> Wanted:
    wide = base.astype(np.float64)
    t = recipe.parameter("t", place)
    value, size = arc(wide, xs[0], t, lambda n: n if n > 1e-8 else 1.0, lambda cosine: abs(cosine) > 0.9995)
    return Wanted([value], size)


def on_base(base: np.ndarray | None, value: np.ndarray, size: np.ndarray) -> Wanted:
    return Wanted([value], size) if base is None else Wanted([base + value], np.abs(base) + size)


def nuslerp(recipe: Recipe, place: Place, base: np.ndarray | None, xs: list[np.ndarray]) -> Wanted:
    weights = [recipe.parameter("weight", place, model) for model in place.models]
    t = weights[1] / sum(weights) if abs(sum(weights)) > 1e-6 else 0.5
    base = base if recipe.apart() else None
    a, b = xs

    def between(x: np.ndarray, y: np.ndarray) -> Any:
        return arc(x, y, t, lambda n: max(n, 1e-7), lambda cosine: 1 - cosine**2 <= 1e-16)

    if recipe.parameter("nuslerp_flatten", place, default=True) or a.ndim < 2 or not a.size:
        return on_base(base, *between(a, b))
    axis = 0 if recipe.parameter("nuslerp_row_wise", place, default=False) else -1
    shape = np.moveaxis(a, axis, -1).shape
    rows = [np.moveaxis(x, axis, -1).reshape(-1, shape[-1]) for x in (a, b)]
    found = [between(x, y) for x, y in zip(*rows, strict=True)]
    return on_base(base, *(np.moveaxis(np.reshape(some, shape), -1, axis) for some in zip(*found, strict=True)))


def directions(xs: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """How large the terms of a mean of directions are, × Σ |w| ‖x‖; Unsure where the directions nearly cancel."""
    lengths = np.array([length(x) for x in xs])
    if lengths.any() and lengths.min() < 1e-4:
        raise Unsure
    units = [x / n if n else x for x, n in zip(xs, lengths, strict=True)]
    mean = length(sum(w * u for w, u in zip(weights, units, strict=True))) / np.abs(weights).sum()
    if lengths.any() and mean < 1e-2:
        raise Unsure
    return 4 * sum(map(np.abs, units)) * (np.abs(weights) @ lengths) / (mean or 1)


def multislerp(recipe: Recipe, place: Place, base: np.ndarray | None, xs: list[np.ndarray]) -> Wanted:
    weights = np.array([recipe.parameter("weight", place, model) for model in place.models], np.float64)
    normalize = recipe.parameter("normalize_weights", place, default=True)
    base = base if recipe.apart() else None
    if len(xs) == 1:
        return on_base(base, xs[0], np.abs(xs[0]))
    size = directions(xs, weights / weights.sum() if normalize else weights)
    return on_base(base, reference.multislerp(xs, weights, normalize, recipe.parameter("eps", place)), size)


def karcher(recipe: Recipe, place: Place, base: np.ndarray | None, xs: list[np.ndarray]) -> Wanted:
    if base is not None:
        xs = [base.astype(np.float64), *xs]
    if len(xs) == 1:
        return Wanted([xs[0]], np.abs(xs[0]))
    size = directions(xs, np.full(len(xs), 1 / len(xs)))
    cosines = [
        (a * b).sum() / (length(a) * length(b)) for a, b in itertools.combinations(xs, 2) if length(a) and length(b)
    ]
    if min(cosines, default=1) < 0.5:
        raise Unsure  # farther apart than that steps may not have come to their end
    return Wanted([reference.karcher(xs)], size)


def model_stock(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    by_rows = recipe.parameter("filter_wise", place, default=False) and base.ndim > 1 and base.size
    n, kept = len(ds), {"axis": -1, "keepdims": True} if by_rows else {}
    pairs = list(itertools.combinations(ds, 2))

    def cosine(a: np.ndarray, b: np.ndarray) -> Any:
        norms = np.sqrt((a * a).sum(**kept)) * np.sqrt((b * b).sum(**kept))
        return np.clip((a * b).sum(**kept) / np.maximum(norms, 1e-6), -1, 1)

    c = sum(cosine(a, b) for a, b in pairs) / len(pairs)
    divisor = 1 + (n - 1) * c
    if np.any(np.abs(divisor) < 1e-5):
        raise Unsure
    t = n * c / divisor
    # c is a sum that may cancel: float64 has it to some 2**-50
    error = 2.0**-24 * sum(map(np.abs, ds)) / np.abs(divisor) * 2.0**-20 / ROUNDING
    return Wanted([base + t / n * sum(ds)], np.abs(base) + np.abs(t) / n * sum(map(np.abs, ds)) + error)


def tall(ds: list[np.ndarray], task: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the TALL mask of a task keeps an entry, and where it may."""
    apart = threshold * np.abs(sum(ds) - ds[task])
    slack = ROUNDING * (np.abs(ds[task]) + threshold * sum(map(np.abs, ds))) + LEAST
    return np.abs(ds[task]) >= apart + slack, np.abs(ds[task]) >= apart - slack


def kept_sum(
    recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray], kept: Sequence[np.ndarray]
) -> Wanted:
    """base + λ Σ Δ where it is kept, which `kept` says for sure and at most."""
    factor = float(F32(recipe.parameter("lambda", place)))
    either = [base + factor * np.where(some, sum(ds), 0) for some in kept]
    return Wanted(either, np.abs(base) + abs(factor) * sum(map(np.abs, ds)))


def agreed(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    masks = [tall(ds, task, recipe.parameter("threshold", place)) for task in range(len(ds))]
    votes = [sum(some.astype(int) for some in either) for either in zip(*masks, strict=True)]
    return kept_sum(recipe, place, base, ds, [some >= recipe.parameter("agreement", place) for some in votes])


def tall_masks(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    task, threshold = recipe.parameter("task", place) - 1, recipe.parameter("threshold", place)
    return kept_sum(recipe, place, base, ds, tall(ds, task, threshold))


def elected(ds: list[np.ndarray], task: int) -> list[np.ndarray]:
    """What EMR elects where it has the sign of the task's delta; every choice where the sign of Σ Δ is unclear."""
    total, size = sum(ds), sum(map(np.abs, ds))
    unclear = (np.abs(total) <= ROUNDING * size + LEAST) & (size > 0)
    if len(ds) < 3:
        unclear &= total != 0
    found = []
    for sign in (np.sign(total), np.where(unclear, 0, np.sign(total)), np.where(unclear, -1, 1) * np.sign(total)):
        largest = np.max([np.where(d * sign > 0, np.abs(d), 0) for d in ds], axis=0)
        found.append(np.where(ds[task] * sign > 0, sign * largest, 0))
    return found


def emr(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    task, own, kept = recipe.parameter("task", place) - 1, 0.0, np.zeros(3)
    for other in recipe.places:
        parts = recipe.parts(other)
        if any(np.any(part.unsure) or (np.abs(part.values) >= MOST).any() for part in parts):
            raise Unsure
        values = [part.values for part in parts]
        sizes = np.abs(elected(values, task))
        own += np.abs(values[task]).sum()
        kept += [sizes[0].sum(), sizes.min(0).sum(), sizes.max(0).sum()]
    if kept[2] - kept[1] > 2.0**-22 * kept[0]:
        raise Unsure
    terms = [own / kept[0] * x if kept[0] else x for x in elected(ds, task)]
    return Wanted([base + term for term in terms], np.abs(base) + np.max(np.abs(terms), axis=0))


def whole_matrices(recipe: Recipe, place: Place, base: np.ndarray, ds: list[np.ndarray]) -> Wanted:
    """The formulas of `reference`, of matrices that have directions for all models; of other tensors the mean."""
    n = len(ds)
    factor = recipe.parameter("lambda", place, default=reference.usual_lambda(recipe.method, n))
    es = [recipe.parameter("weight", place, model) * d for model, d in zip(place.models, ds, strict=True)]
    rows, columns = (base.shape[0], int(np.prod(base.shape[1:]))) if base.ndim > 1 else (0, 0)
    if (
        not place.name.endswith("weight")
        or any(p in place.name for p in ("embed", "lm_head"))
        or min(rows, columns) < n
    ):
        terms = [min(factor, 1) / n * e for e in es]
        return Wanted([base + sum(terms)], np.abs(base) + sum(map(np.abs, terms)))
    formula = MATRICES[recipe.method](recipe, place)
    made = factor * reference.by_matrix(es, formula)
    rng, pruned = np.random.default_rng(0), any(recipe.pruning(model)[0] != "none" for model in place.models)
    relative = NOISE_OF_PRUNED if pruned else 0.0
    noisy = []
    for e in es:
        of_entry, of_matrix = rng.uniform(-1, 1, (2, *e.shape))
        noisy.append(e * (1 + relative * of_entry) + NOISE * np.abs(e).max() * of_matrix)
    amplified = np.abs(factor * reference.by_matrix(noisy, formula) - made).max()
    size = np.abs(base).max() + np.abs(made).max() + sum(np.abs(e).max() for e in es)
    if not amplified <= AMPLIFIED * size:
        raise Unsure
    return Wanted([base + made], np.full(base.shape, (OF_MATRICES * size + 4 * amplified) / ROUNDING))


def wudi(recipe: Recipe, place: Place) -> Callable[[list[np.ndarray]], np.ndarray]:
    steps, rho = recipe.parameter("steps", place), recipe.parameter("rho", place)
    return lambda es: reference.wudi_steps(es, steps) if steps else reference.wudi(es, rho)


MATRICES: dict[str, Callable[[Recipe, Place], Callable[[list[np.ndarray]], np.ndarray]]] = {
    "iso_c": lambda recipe, place: reference.iso_c,
    "iso_cts": lambda recipe, place: lambda es: reference.iso_cts(es, recipe.parameter("common", place)),
    "tsv_m": lambda recipe, place: reference.tsv_m,
    "svc": lambda recipe, place: reference.svc,
    "wudi": wudi,
}
MERGES: dict[str, Callable[[Recipe, Place, Any, list[np.ndarray]], Wanted]] = {
    "linear": linear, "slerp": slerp, "nuslerp": nuslerp, "multislerp": multislerp, "karcher": karcher,
    **dict.fromkeys(SUMS, task_arithmetic), **dict.fromkeys(TIES, ties), "model_stock": model_stock,
    "nearswap": nearswap, "sce": sce, "ram": ram, "ramplus_tl": ram, "arcee_fusion": arcee_fusion,
    "passthrough": passthrough, "consensus": agreed, "tall_masks": tall_masks, "emr": emr,
    **dict.fromkeys(MATRICES, whole_matrices),
}  # fmt: skip
