"""Recommend a merge of several fine-tunes: the method and its coefficients, beside measurements.

`measure` says how deltas meet: their signs, their angles, the subspaces that their layers share. Tensors are read tile
by tile. Of linear layers, a second pass holds one whole delta and the leading directions of the others. Counts are
integers, and sums of products are those of `spans.gram`: none depends on tiles.

From the weights alone the angles decide. With rows, every method of `WAYS` is tried at several λ. Candidates are judged
as in a search: in memory, on each fine-tune's own rows and by its own head. The λ of each method is chosen on the rows
that are searched on, the method on others. `lost` is the distance of a merge's outputs from the fine-tune's, divided by
the base's. An agreement is how often it answers as the fine-tune does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deltamerge.apps.inspect.statistics import Figures, parse
from deltamerge.apps.recommend.prune import seen_from, with_comment
from deltamerge.apps.search.candidates import candidates_in
from deltamerge.apps.search.evaluate import AGREEMENT, DISTANCE, SAME
from deltamerge.apps.search.judge import StudyJudge
from deltamerge.apps.search.outcome import one_line
from deltamerge.calibrate.rows.rows import has_head, task_of
from deltamerge.engine import backends
from deltamerge.engine.execute import Task, execute
from deltamerge.errors import DeltamergeError, InputError, OutputError, UsageError
from deltamerge.errors.shown import as_html, shown
from deltamerge.files import progress
from deltamerge.files.atomic import replace_file
from deltamerge.methods.low_rank import Wanted, factor
from deltamerge.methods.merge.matrices import Form
from deltamerge.methods.merge.spans import add_up, gram
from deltamerge.methods.merge.task_arithmetic import task_arithmetic
from deltamerge.methods.registry import MERGE
from deltamerge.plan.kinship import swapped, unrelated
from deltamerge.plan.output_config import remarks_on_configs
from deltamerge.plan.tokenizer_differences import other_words
from deltamerge.recipe.schema import Goal, Recipe, Study
from deltamerge.run.options import Options
from deltamerge.tensors.dtypes import nbytes_of
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import depth_first
from deltamerge.tensors.tensor import Graph, Node
from deltamerge.tensors.tiles import Tile, Whole, densify
from deltamerge.tensors.traits import traits

Floats = NDArray[np.float64]
DIRECTIONS = 16  # of a layer that are compared; a quarter of its smaller side where that is less


class Conflict(Figures):
    """How the models' deltas meet. Matrices have a row and a column for each model, in their order."""

    relative_norm: list[float | None] = Field(description="‖Δ‖/‖W‖ of each model; null where the base is zero.")
    cosine: list[list[float]] = Field(description="Of two deltas, flat: 1 the same direction, 0 unrelated.")
    opposed: list[list[float]] = Field(
        description="Of the entries that both change, the share that they change in opposite ways; unrelated: 0.5."
    )
    overlap: list[list[float | None]] = Field(
        description="Mean over linear layers of ‖UᵢᵀUⱼ‖²/k and ‖VᵢᵀVⱼ‖²/k, U and V the k ≤ 16 leading directions of a "
        "delta's outputs and inputs: 1 the same subspace; null without a linear layer that both change."
    )
    chance: float | None = Field(description="The overlap of random subspaces of these layers.")
    cosine_mean: float = Field(description="Over pairs of models.")
    opposed_mean: float = Field(description="Over pairs.")
    overlap_mean: float | None = Field(description="Over pairs.")


def signs(*deltas: Any, tile: Tile) -> NDArray[np.int64]:
    """Return, for each pair i < j, how many entries of a tile both change, and how many in opposite ways."""
    ways = [torch.sign(densify(delta, tile.size)) for delta in deltas]
    found = []
    for i, j in _different(len(ways)):
        product = ways[i] * ways[j]
        found.append([int((product != 0).sum()), int((product < 0).sum())])
    return np.array(found, np.int64)


def overlaps_needs(*, form: Form, transposed: bool = False) -> tuple[int, float]:
    """Return the memory of `overlaps`: a delta, and twice its size while its directions are found."""
    _, rows, columns = form
    small = min(rows, columns)
    return 16 * rows * columns + 24 * small**2, 2.0 * form[0] * rows * columns * small


@traits(needs=overlaps_needs)
def overlaps(*deltas: Whole, form: Form, transposed: bool = False) -> Floats:
    """Return, for each pair i < j, sums over a tensor's matrices: float64 (pairs, 3).

    They are of both overlaps, of the overlaps of random subspaces, and of the number of overlaps.
    """
    count, rows, columns = form
    k = max(1, min(DIRECTIONS, min(rows, columns) // 4))
    found = np.zeros((len(_different(len(deltas))), 3))
    values = torch.empty(rows * columns, dtype=torch.float32, device=deltas[0].device)
    for one in range(count):
        sides = []
        for i, delta in enumerate(deltas):
            delta.fill(one * rows * columns, values)
            made = factor(values.view(rows, columns).cpu().numpy(), Wanted(rank=k), (i, one))
            sides.append([_unit(made.b), _unit(made.a.T)])
        for at, (i, j) in enumerate(_different(len(deltas))):
            for u, v in zip(sides[i], sides[j], strict=True):
                least = min(u.shape[1], v.shape[1])
                if least:
                    chance = max(u.shape[1], v.shape[1]) / len(u)
                    found[at] += [float(np.sum((u.T @ v) ** 2)) / least, chance, 1]
    return found


def _unit(vectors: Any) -> Floats:
    """Scale orthogonal columns to length 1. Columns of length 0 are left out."""
    wide = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(wide, axis=0)
    return np.asarray(wide[:, lengths > 0] / lengths[lengths > 0])


def _different(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))


def measured(*found: Any) -> tuple[Any, ...]:
    """Return the results of a tensor's reductions: signs, Gram matrices and, of matrices, overlaps."""
    return found


def measure(roots: Mapping[str, Node], *, device: str, workers: int) -> Conflict:
    """Return the conflict of the deltas in the nodes of a merge by `iso_c`, by tensor."""
    graph, wanted, count, size = Graph(), {}, 0, 0
    for name, root in roots.items():
        base, deltas, form = _parts(root)
        parts = [
            graph.node(signs, deltas, kind="sum", shape=root.shape),
            graph.node(gram, [base, *deltas], kind="concat", shape=root.shape),
        ]
        if form is not None:
            parts.append(graph.node(overlaps, deltas, kind="whole", shape=root.shape, form=form))
        wanted[name] = graph.node(measured, parts, kind="small", shape=root.shape, dtype=root.dtype)
        count, size = len(deltas), size + nbytes_of(root.dtype, root.shape)
    tasks = [Task(name, node, backends.choose(node, device)) for name, node in wanted.items()]
    with Reader() as reader, progress.phase("comparing", size) as comparing:
        values = execute(tasks, reader, None, device=device, workers=workers, progress=comparing.step)
    found = [values[node] for node in wanted.values()]
    return _conflict(count, [one[0] for one in found], [one[1] for one in found], [x for one in found for x in one[2:]])


def _parts(root: Node) -> tuple[Node, list[Node], Form | None]:
    """Return the base, the deltas, and the matrix form of a tensor that iso_c merges. None: it is no matrix."""
    mean = f"{task_arithmetic.__module__}:{task_arithmetic.__qualname__}"
    nodes = depth_first(root)
    whole = next((node for node in nodes if node.kind == "whole"), None)
    over = next(node for node in nodes if whole in node.inputs or node.function == mean)
    if whole is None:
        return over.inputs[0], list(over.inputs[1:]), None
    form: Form = whole.parameter("form")
    return over.inputs[0], list(whole.inputs), form


def _conflict(count: int, counts: list[Any], grams: list[Floats], shared: list[Floats]) -> Conflict:
    changed, opposite = np.sum(counts, axis=0).T
    products = [add_up(one, count=count + 1) for one in grams]
    total = np.array([[math.fsum(one[i, j] for one in products) for j in range(count + 1)] for i in range(count + 1)])
    norms = np.sqrt(np.diagonal(total))
    size = np.outer(norms, norms)
    cosine = np.divide(total, size, out=np.zeros_like(total), where=size > 0)[1:, 1:]
    both = np.sum(shared, axis=0) if shared else np.zeros((len(changed), 3))
    opposed = np.divide(opposite, changed, out=np.zeros(len(changed)), where=changed > 0)
    overlap = [float(a / n) if n else None for a, _, n in both]
    some = [one for one in overlap if one is not None]
    chance = both[:, 1].sum() / both[:, 2].sum() if some else None
    return Conflict(
        relative_norm=[float(norm / norms[0]) if norms[0] else None for norm in norms[1:]],
        cosine=cosine.tolist(),
        opposed=_square(count, opposed.tolist(), 0.0),
        overlap=_square(count, overlap, 1.0),
        chance=chance,
        cosine_mean=float(np.mean([cosine[i, j] for i, j in _different(count)])),
        opposed_mean=float(opposed.mean()),
        overlap_mean=float(np.mean(some)) if some else None,
    )


def _square(count: int, of_pairs: list[Any], own: float) -> list[list[Any]]:
    """Return a symmetric matrix from values of pairs, with `own` on its diagonal."""
    made = [[own] * count for _ in range(count)]
    for (i, j), value in zip(_different(count), of_pairs, strict=True):
        made[i][j] = made[j][i] = value
    return made


RATIO, EACH_WAY, FURTHER = 1.5, 2, 3  # λ is tried at RATIO times the last: so often up and down, and then further
ALIKE = 0.5  # mean cosine from which on deltas go the same way
SPREAD = 0.8  # of sqrt(n): λ of iso_c was best at 1.5 of three fine-tunes and 2.25 of nine
LITTLE_KEPT = 0.6  # of a model's effect that is lost
LAMBDA = "lambda"
STUDY = Study.model_validate({"together": 1 + 2 * EACH_WAY})


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """A merge that is tried: `first` is the λ in the middle of those tried, `over_models` whether over their number.

    fitted   the scope of fitted coefficients, from task arithmetic at its best λ
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    first: float = 1.0
    over_models: bool = False
    fitted: str | None = None

    @property
    def needs_rows(self) -> bool:
        """Return whether a run of its recipe takes calibration rows."""
        return self.fitted is not None or MERGE[self.method].rows is not None


ARITHMETIC = Way("task_arithmetic", "task_arithmetic", first=2.25, over_models=True)  # from the mean of the deltas up
ISO_C = Way("iso_c", "iso_c", first=1.5)
WUDI = Way("wudi", "wudi")
WAYS = (
    ARITHMETIC,
    Way("ties", "ties", {"density": 0.2}),
    ISO_C,
    Way("tsv_m", "tsv_m"),
    WUDI,
    Way("regmean", "regmean"),
)
FITTED = tuple(Way(f"coefficients by {scope}", "task_arithmetic", fitted=scope) for scope in ("layer", "row"))


class MergeTrial(Figures):
    """One λ of a method, on the rows that are searched on."""

    factor: float = Field(description="λ")
    lost: float = Field(description="Mean over the models.")


class MergeCandidate(Figures):
    """A method at its best λ, on the rows that decide."""

    name: str
    method: str
    parameters: dict[str, Any] = Field(description="Of its recipe, but for λ.")
    factor: float | None = Field(description="λ; of fitted coefficients where fitting starts.")
    coefficients: str | None = Field(description="Scope of the fitted coefficients, if they are fitted.")
    lost: dict[str, float] = Field(
        description="By model: distance of outputs over that of the base: 0 none, 1 as if nothing was merged."
    )
    lost_mean: float | None
    lost_worst: float | None
    agreement: dict[str, float] = Field(
        description="By model: share of its rows that are answered as it answers them (tokens, of a language model; of "
        "numbers their correlation)."
    )
    tried: list[MergeTrial] = Field(description="The λ that were tried.")
    error: str | None = Field(description="Why it could not be judged.")


class MergeAdvice(Figures):
    """What `deltamerge recommend --json` prints of several models."""

    models: list[str]
    base: str
    method: str = Field(description="The name of the recommended candidate.")
    why: list[str]
    evidence: Conflict
    candidates: list[MergeCandidate] = Field(description="Empty without rows.")
    search: dict[str, int] = Field(description="Rows of each model that λ is chosen on.")
    held_out: dict[str, int] = Field(description="Rows of each that decide.")
    forward_passes: int = Field(description="Over the rows that are searched on, of each model; without fitting.")
    recipe: str = Field(description="YAML, ready for `deltamerge run` in the current folder, or in that of --out.")
    warnings: list[str] = Field([], description="Signs that the base is not that of the models.")

    def __repr__(self) -> str:
        return shown(f"<MergeAdvice {self._what}: {self.method}>")

    __str__ = __repr__

    def _repr_html_(self) -> str:
        why = "; ".join([*self.why, *(f"warning: {one}" for one in self.warnings)])
        return as_html(self._what, {"method": self.method, "why": why})

    @property
    def _what(self) -> str:
        return f"{len(self.models)} models on {self.base}"


def recommend_merge(
    models: Sequence[str],
    base: str,
    *,
    calibration: Sequence[Mapping[str, Any]] = (),
    fit: bool = True,
    out: Path | None = None,
    options: Options | None = None,
) -> MergeAdvice:
    """Return the recommended merge of `models` over `base`, with its recipe.

    It is written to `out`, a new file, if given.

        models, base   folders or hub ids
        calibration    rows as in a recipe: none, one for all models, or one a model in their order
        fit            whether coefficients are fitted, too

    UsageError: fewer than two models, or another number of `calibration`. OutputError: `out` exists. InputError: what a
    run, or a search, of these models would refuse.
    """
    if out is not None and os.path.lexists(out):
        raise OutputError(f"{out}: exists", hint="choose another name with --out")
    options = options or Options()
    setting = _Setting(tuple(models), base, _rows_of_each(calibration, models), options.pickles)
    found, way, factor = _Adviser(setting, options).advice(fit=fit)
    folder = Path.cwd() if out is None else out.resolve().parent
    recipe = setting.recipe(way, factor, seen=lambda one: seen_from(folder, one))
    head = [f"{found.method}, by `deltamerge recommend`:", *found.why]
    answer = found.model_copy(update={"recipe": with_comment(head, recipe)})
    if out is not None:
        replace_file(out, answer.recipe, new=True)
    return answer


def _rows_of_each(calibration: Sequence[Mapping[str, Any]], models: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    if len(calibration) not in (0, 1, len(models)):
        hint = "give one for all models, or one for each in their order"
        raise UsageError(f"--calibration: {len(calibration)} files for {len(models)} models", hint=hint)
    return tuple(calibration) * (len(models) if len(calibration) == 1 else 1)


@dataclass(frozen=True)
class _Setting:
    """What is merged: models, their base and their rows."""

    models: tuple[str, ...]
    base: str
    rows: tuple[Mapping[str, Any], ...]
    pickles: bool

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise UsageError("a merge takes two models or more")
        for one in self.models:
            if one == self.base:
                raise InputError(f"{one}: is the base itself", hint="name fine-tunes, and their base with --base")
        if len(set(self.models)) < len(self.models):
            raise InputError(f"{self.models[0]}: a model is named twice", hint="name each once")

    @cached_property
    def names(self) -> list[str]:
        """Return the last part of every model's path, with its number where that is not its own."""
        last = [one.rstrip("/").rpartition("/")[2] or one for one in self.models]
        return [one if last.count(one) == 1 else f"{one}-{i}" for i, one in enumerate(last, 1)]

    def recipe(
        self, way: Way, factor: float, *, judged: bool = False, seen: Callable[[str], str] = str
    ) -> dict[str, Any]:
        """Return the recipe of a way at a λ. `judged`: with the rows of every model, whether it needs them or not."""
        known, models = MERGE[way.method].parameters, []
        for i, (model, name) in enumerate(zip(self.models, self.names, strict=True)):
            one: dict[str, Any] = {"model": seen(model), "name": name}
            if "weight" in known and known["weight"].default is None:
                one["parameters"] = {"weight": 1.0}
            if self.rows and (judged or way.needs_rows):
                one["calibration"] = {**self.rows[i], "data": seen(str(self.rows[i]["data"]))}
            models.append(one)
        made: dict[str, Any] = {
            "base_model": seen(self.base),
            "merge_method": way.method,
            "models": models,
            "parameters": {**way.parameters, LAMBDA: factor},
        }
        if way.fitted is not None:
            made["calibration"] = {"per": "merge", "coefficients": way.fitted}
        return made | ({"pickles": True} if self.pickles else {})


class _Adviser:
    """Measures the evidence and, with rows, the candidates."""

    def __init__(self, setting: _Setting, options: Options) -> None:
        self.setting = setting
        self.candidates = candidates_in(Path.cwd(), options, pickles=setting.pickles)
        self.passes = 0

    def advice(self, *, fit: bool) -> tuple[MergeAdvice, Way, float]:
        """Return the advice without its recipe, and the input of the recipe."""
        start, planning = self._recipe(ISO_C, 1.0), self.candidates.options
        inputs = self.candidates.inputs(start)
        list(remarks_on_configs(inputs, refuse=True))
        roots = self.candidates.of(start).roots
        conflict = measure(roots, device=planning.device, workers=planning.workers)
        found: dict[Way, MergeCandidate] = {}
        search: dict[str, int] = {}
        held: dict[str, int] = {}
        if self.setting.rows:
            with closing(StudyJudge(self.candidates, start, STUDY, self._goals(start))) as judge:
                found = self._judge(judge, FITTED if fit else ())
                search, held = judge.rows("search"), judge.rows("held")
        judged = {way: one for way, one in found.items() if one.lost_mean is not None}
        if found and not judged:
            raise InputError(f"no merge of these models can be judged: {next(iter(found.values())).error}")
        if judged:
            way, factor, why = with_rows(judged)
        else:
            talks = all(has_head(tune.checkpoint.config, "causal-lm") for tune in inputs.tunes)
            way, factor, why = without_rows(conflict, len(self.setting.models), talks=talks)
        advice = MergeAdvice(
            models=list(self.setting.names),
            base=self.setting.base,
            method=way.name,
            why=why,
            evidence=conflict,
            candidates=list(found.values()),
            search=search,
            held_out=held,
            forward_passes=self.passes,
            recipe="",
            warnings=[*swapped(inputs), *unrelated(inputs), *other_words(inputs), *remarks_on_configs(inputs)],
        )
        return advice, way, factor

    def _recipe(self, way: Way, factor: float) -> Recipe:
        return parse(self.setting.recipe(way, factor, judged=True))

    def _goals(self, start: Recipe) -> list[Goal]:
        """Return the goals: distance from every fine-tune, and the answers of models that have a head."""
        goals = [Goal.model_validate({"measure": AGREEMENT})]
        for tune in self.candidates.inputs(start).tunes:
            config = tune.checkpoint.config
            calibration = start.calibration_of(tune.index or 0)
            assert calibration is not None
            if has_head(config, task_of(calibration, config)):
                goals.append(Goal.model_validate({"measure": SAME, "of": tune.name}))
        return goals

    def _judge(self, judge: StudyJudge, fitted: Sequence[Way]) -> dict[Way, MergeCandidate]:
        """Return every way at its best λ, on held-out rows."""
        found: dict[Way, MergeCandidate] = {}
        with progress.phase("trying merges", len(WAYS) + len(fitted), "methods") as trying:
            for way in (*WAYS, *fitted):
                first = way.first / len(self.setting.models) if way.over_models else way.first
                steps = EACH_WAY
                if way.fitted is not None:
                    first, steps = found[ARITHMETIC].factor or first, 0
                found[way] = self._best(judge, way, first, steps)
                trying.step(1)
        good = [way for way, one in found.items() if one.error is None]
        made = [self.candidates.of(self._recipe(way, found[way].factor or 1.0)) for way in good]
        for way, scores in zip(good, judge.scores(made, "held"), strict=True):
            lost = {name: own[DISTANCE] for name, own in scores.items()}
            same = {name: own[SAME] for name, own in scores.items() if SAME in own}
            worth = {"lost": lost, "lost_mean": fmean(lost.values()), "lost_worst": max(lost.values())}
            found[way] = found[way].model_copy(update=worth | {"agreement": same})
        return found

    def _best(self, judge: StudyJudge, way: Way, first: float, steps: int) -> MergeCandidate:
        """Return a way at the λ that loses least on the search rows, or the reason why it cannot be judged."""
        tried: dict[float, float] = {}
        error = None
        try:
            factors = [first * RATIO**k for k in range(-steps, steps + 1)]
            tried |= self._lost(judge, way, factors)
            while steps and len(tried) < len(factors) + FURTHER:
                best, ends = min(tried, key=lambda one: tried[one]), (min(tried), max(tried))
                if best not in ends:
                    break
                tried |= self._lost(judge, way, [best / RATIO if best == ends[0] else best * RATIO])
        except DeltamergeError as fault:
            error = one_line(fault)
        factor = None if error else min(tried, key=lambda one: tried[one])
        return MergeCandidate(
            name=way.name,
            method=way.method,
            parameters=dict(way.parameters),
            factor=factor,
            coefficients=way.fitted,
            lost={},
            lost_mean=None,
            lost_worst=None,
            agreement={},
            tried=[MergeTrial(factor=one, lost=tried[one]) for one in sorted(tried)],
            error=error,
        )

    def _lost(self, judge: StudyJudge, way: Way, factors: Sequence[float]) -> dict[float, float]:
        rounded = [float(f"{factor:.3g}") for factor in factors]
        made = [self.candidates.of(self._recipe(way, factor)) for factor in rounded]
        scores = judge.scores(made, "search")
        self.passes += len(made)
        found = [fmean(own[DISTANCE] for own in one.values()) for one in scores]
        if any(value != value for value in found):
            raise InputError("what it loses is not a number")
        return dict(zip(rounded, found, strict=True))


def without_rows(conflict: Conflict, count: int, *, talks: bool) -> tuple[Way, float, list[str]]:
    """Return the way that the angles of `count` deltas suggest. Language models share their heads."""
    said = f"the deltas' mean cosine is {conflict.cosine_mean:.2g}"
    if conflict.cosine_mean >= ALIKE:
        return (
            ARITHMETIC,
            float(f"{1 / count:.3g}"),
            [f"{said}: they go the same way, and their mean keeps what they do"],
        )
    more = "give rows with --calibration: they choose method and λ, and fit coefficients"
    if talks:
        kept = "of what needs no data wudi keeps most of language models whose deltas go different ways"
        return WUDI, 1.0, [f"{said}: {kept} (docs/measurements/merging.md)", more]
    factor = float(f"{SPREAD * math.sqrt(count):.3g}")
    return (
        ISO_C,
        factor,
        [
            f"{said}: without data iso_c keeps most of unlike fine-tunes (docs/measurements/merging.md)",
            f"λ = {SPREAD} sqrt(n), between what was best of three and of nine fine-tunes",
            more,
        ],
    )


def with_rows(judged: Mapping[Way, MergeCandidate]) -> tuple[Way, float, list[str]]:
    """Return the way that loses least on held-out rows."""
    lost = {way: one.lost_mean or 0.0 for way, one in judged.items()}
    way = min(lost, key=lambda one: lost[one])
    best = judged[way]
    plain = {one: value for one, value in lost.items() if one.fitted is None}
    others = [min(plain, key=lambda one: plain[one])] if way.fitted is not None and plain else []
    others += [ARITHMETIC] if ARITHMETIC in lost and ARITHMETIC not in (way, *others) else []
    beside = "".join(f", {one.name} {lost[one]:.1%}" for one in others)
    why = [f"it loses {lost[way]:.1%} of the fine-tunes' effect on held-out outputs{beside}"]
    if best.agreement:
        worst = min(best.agreement, key=lambda name: best.agreement[name])
        mean = fmean(best.agreement.values())
        why.append(
            f"it answers as the fine-tunes do on {mean:.1%} of their rows, as {worst} on {best.agreement[worst]:.1%}"
        )
    if (best.lost_worst or 0.0) > LITTLE_KEPT:
        worst = max(best.lost, key=lambda name: best.lost[name])
        why.append(f"of {worst} it loses {best.lost[worst]:.1%}: where the task is known, emr makes a model of each")
    return way, best.factor or 1.0, why
