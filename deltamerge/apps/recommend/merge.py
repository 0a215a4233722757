"""Recommend a merge of several fine-tunes: the method and its coefficients, beside measurements.

From the weights alone the angles decide. With rows, every method of `WAYS` is tried at its usual λ. Other λ are tried
for a method among the best that has no rule for λ. Then coefficients are fitted. Candidates are judged as in a search:
in memory, on each fine-tune's own rows and by its own head.
`lost` is the distance of a merge's outputs from the fine-tune's, divided by the base's. An agreement is how often it
answers as the fine-tune does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from deltamerge.apps.inspect.statistics import Figures, parse
from deltamerge.apps.recommend.forecast import DANGER, SkillForecast, of_answers, of_weights
from deltamerge.apps.recommend.meeting import ALIKE, Conflict, measure
from deltamerge.apps.recommend.prune import Conclusion, check_new_recipe, seen_from, with_comment
from deltamerge.apps.search.candidates import candidates_in
from deltamerge.apps.search.evaluate import AGREEMENT, DISTANCE, SAME, SCORE_KEPT, ScoredTask, is_adapter
from deltamerge.apps.search.judge import THE_BASE, Part, StudyJudge
from deltamerge.apps.search.outcome import one_line
from deltamerge.calibrate.q.objectives import is_regression
from deltamerge.calibrate.rows.heads import LANGUAGE, check_base, has_head, task_of
from deltamerge.calibrate.spec import KEPT_WEIGHT, Calibrated
from deltamerge.errors import DeltamergeError, InputError, UsageError
from deltamerge.files import progress
from deltamerge.files.atomic import replace_file
from deltamerge.methods.parameters import UsualValue
from deltamerge.methods.registry import MERGE
from deltamerge.models.tokenizer_files import read_tokens
from deltamerge.plan.inputs import Inputs, config_rows
from deltamerge.plan.kinship import swapped, unrelated
from deltamerge.plan.output_config import remarks_on_configs
from deltamerge.plan.tokenizer_differences import BY_TOKEN, other_words
from deltamerge.recipe.output_keys import UNION
from deltamerge.recipe.schema import Calibration, Goal, Recipe, Study
from deltamerge.run.lock import fingerprint
from deltamerge.run.options import Options

FINALISTS = 3  # ways that are best at their usual λ
RATIO, FURTHER = 1.5, 3  # at RATIO times the last, up and down, and so often further
STAY = 0.8  # of the loss of the usual λ: another λ is taken if it loses less
LAMBDA = "lambda"
EACH = (
    "to save a skill: a model per task, where the task is known when it runs: merge_method: emr or tall_masks, "
    "parameters: {task: 1}"
)
ROWS_SAVE = (
    "to save a skill: 50 to 100 rows of every task (--calibration): they choose the method and λ, and fit coefficients"
)
ROWS_CHOOSE = "give rows with --calibration: they choose method and λ, and fit coefficients"
VOCABULARY_KEYS = frozenset({"tokenizer_source", "tokenizer"})
CHOSEN_KEYS = ("base_model", "merge_method", "models", "parameters", "balance", "calibration")
JOINED = f"the models have different vocabularies: {BY_TOKEN} gives the merge the tokens of all"
DIFFERS = 0.7  # worth of a classifier's answer that differs from the fine-tune's, where merges are compared
SCOPES = ("layer", "row")  # of coefficients that are fitted
STUDY = Study.model_validate({"together": 2})


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """A merge that is tried: `first` is the usual λ where the method has no rule, `over_models`: over their number.

    fitted     the scope of coefficients that are fitted from it
    balanced   whether its recipe has `balance: norm`
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    first: float = 1.0
    over_models: bool = False
    fitted: str | None = None
    balanced: bool = False

    def usual(self, models: int) -> float:
        """Return the λ of so many models in the middle of those tried."""
        if self.rule is not None:
            return float(self.rule.value(models))
        return self.first / models if self.over_models else self.first

    @property
    def rule(self) -> UsualValue | None:
        """Return the rule of its λ by the number of models."""
        return MERGE[self.method].parameters[LAMBDA].rule

    @property
    def is_searched(self) -> bool:
        """Return whether its λ is looked for: neither a rule gives it, nor the rows that the method solves for."""
        return self.rule is None and MERGE[self.method].rows is None

    def better(self, lost: Mapping[float, float], usual: float) -> float:
        """Return the λ of least loss, or the λ nearest to the usual if it loses hardly more."""
        best, near = min(lost, key=lambda one: lost[one]), min(lost, key=lambda one: abs(one - usual))
        return best if lost[best] < STAY * lost[near] else near

    def by(self, scope: str) -> Way:
        """Return the fit of coefficients that starts at this merge."""
        return replace(self, name=f"{self.name} + coefficients by {scope}", fitted=scope)

    @property
    def needs_rows(self) -> bool:
        """Return whether a run of its recipe takes calibration rows."""
        return self.fitted is not None or MERGE[self.method].rows is not None


ARITHMETIC = Way("task_arithmetic", "task_arithmetic", first=2.25, over_models=True)  # from the mean
ISO_C = Way("iso_c, balanced", "iso_c", balanced=True)
WHOLE = Way("iso_cts", "iso_cts")  # whose nodes have whole deltas, of LoRAs too
TSV_M = Way("tsv_m, balanced", "tsv_m", balanced=True)
SVC = Way("svc, balanced", "svc", balanced=True)
WUDI = Way("wudi", "wudi")
WAYS = (
    ARITHMETIC,
    Way("ties", "ties", {"density": 0.2}),
    ISO_C,
    TSV_M,
    SVC,
    WUDI,
    Way("wudi, balanced", "wudi", balanced=True),
    Way("regmean", "regmean", {"off_diagonal": 0.99}),
)


@dataclass(frozen=True, slots=True)
class FoundFit:
    """Coefficients by the names of stages, of the recipe with the fingerprint `recipe`."""

    recipe: str
    values: Mapping[str, Calibrated]


class MergeTrial(Figures):
    """One λ of a method, on the rows that are searched on."""

    factor: float = Field(description="λ")
    lost: float = Field(description="Mean over the models.")


class MergeCandidate(Figures):
    """A method at its best λ, on the rows that decide."""

    name: str
    method: str
    parameters: dict[str, Any] = Field(description="Of its recipe, but for λ.")
    balance: Literal["norm"] | None = Field(None, description="Of its recipe.")
    factor: float | None = Field(description="λ; of fitted coefficients where fitting starts.")
    coefficients: str | None = Field(description="Scope of the fitted coefficients, if they are fitted.")
    lost: dict[str, float] = Field(
        description="By model: distance of outputs over that of the base: 0 none, 1 as if nothing was merged. "
        "`the base`, on rows of its own: distance from it over the models' mean one."
    )
    lost_mean: float | None = Field(description=f"The base counts {KEPT_WEIGHT} of a model.")
    lost_worst: float | None
    agreement: dict[str, float] = Field(
        description="By model: share of its rows that are answered as it answers them (tokens, of a language model; of "
        "numbers their correlation)."
    )
    forecast: list[SkillForecast] = Field(description="The forecast of each model, from answers on these rows.")
    tried: list[MergeTrial] = Field(description="The λ that were tried.")
    error: str | None = Field(description="Why it could not be judged.")


class MergeAdvice(Conclusion):
    """The output of `deltamerge recommend --json` for several models."""

    models: list[str]
    base: str
    method: str = Field(description="The name of the recommended candidate.")
    why: list[str]
    factor: float = Field(description="λ of the recipe; of fitted coefficients where fitting starts.")
    evidence: Conflict
    forecast: list[SkillForecast] = Field(description="The forecast of each model in the recommended merge.")
    head: str | None = Field(
        None, description="The model whose head the merge has; null: heads are merged, or the base's."
    )
    rescue: list[str] = Field(description="Ways to save the skills that may be lost.")
    candidates: list[MergeCandidate] = Field(description="Empty without rows.")
    search: dict[str, int] = Field(description="Rows of each model that coefficients are fitted on.")
    held_out: dict[str, int] = Field(description="Other rows of each, on which fits are judged; both judge the rest.")
    forward_passes: int = Field(description="Over the rows that are searched on, of each model; without fitting.")
    recipe: str = Field(description="YAML, ready for `deltamerge run` in the current folder, or in that of --out.")
    warnings: list[str] = Field([], description="Signs that the base is not that of the models.")

    @property
    def _what(self) -> str:
        return f"{len(self.models)} models on {self.base}"

    @property
    def about_heads(self) -> str:
        """Return what the forecasts of models with heads of their own mean; "": they have none."""
        return "" if self.head is None else f"with each model's own head; the merge has that of {self.head}"


def recommend_merge(
    models: Sequence[str],
    base: str,
    *,
    calibration: Sequence[Mapping[str, Any]] = (),
    keep: Mapping[str, Any] | None = None,
    fit: bool = True,
    out: Path | None = None,
    options: Options | None = None,
) -> MergeAdvice:
    """Return the recommended merge of `models` over `base`, with its recipe.

    It is written to `out`, a new file, if given. The others are those of `merge_advice`.

    OutputError: `out` exists.
    """
    if out is not None:
        check_new_recipe(out)
    folder = None if out is None else out.parent
    answer, _ = merge_advice(models, base, calibration=calibration, keep=keep, fit=fit, folder=folder, options=options)
    if out is not None:
        replace_file(out, answer.recipe, new=True)
    return answer


def merge_advice(
    models: Sequence[str],
    base: str,
    *,
    calibration: Sequence[Mapping[str, Any]] = (),
    keep: Mapping[str, Any] | None = None,
    fit: bool = True,
    folder: Path | None = None,
    keys: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> tuple[MergeAdvice, FoundFit | None]:
    """Return the recommended merge of `models` over `base`, and its fit; None: it fits nothing.

    The recipe is as a file in `folder` would have it.

        models, base   folders or hub ids
        calibration    rows as in a recipe: none, one for all models, or one a model in their order
        keep           rows of the base, which the merge shall answer as the base does, so that it forgets less
        fit            whether coefficients are fitted, too
        folder         of the recipe; default: the current one
        keys           more keys of the recipe, which candidates have, too; none of CHOSEN_KEYS

    UsageError: fewer than two models, another number of `calibration`, `keep` without it, or keys that are chosen.
    InputError: what a run, or a search, of these models would refuse.
    """
    options = options or Options()
    more = dict(keys or {})
    if taken := [key for key in CHOSEN_KEYS if key in more]:
        hint = 'give them with a method, as in method="ties"; keys of calibration stand beside its data, in rows'
        raise UsageError(f"{', '.join(taken)}: chosen with the method", hint=hint)
    setting = _Setting(tuple(models), base, _rows_of_each(calibration, models), options.pickles, keep, more)
    if keep is not None and not calibration:
        raise UsageError("--keep is measured beside rows of the models, and there are none", hint="give these, too")
    parse(setting.recipe(WHOLE, 1.0))  # keys that no recipe has are refused at once
    adviser = _Adviser(setting, options)
    found, way, factor, fitted = adviser.advice(fit=fit)
    place = Path.cwd() if folder is None else folder.resolve()
    recipe = adviser.setting.recipe(way, factor, seen=lambda one: seen_from(place, one))
    head = [f"{found.method}, by `deltamerge recommend`:", *(line for line in found.why if line != ROWS_CHOOSE)]
    return found.model_copy(update={"recipe": with_comment(head, recipe)}), fitted


def _rows_of_each(calibration: Sequence[Mapping[str, Any]], models: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    if len(calibration) not in (0, 1, len(models)):
        hint = "give one for all models, or one for each in their order"
        raise UsageError(f"--calibration: {len(calibration)} files for {len(models)} models", hint=hint)
    return tuple(calibration) * (len(models) if len(calibration) == 1 else 1)


def names_of(models: Sequence[str]) -> list[str]:
    """Return the last part of every model's path, with its number where that is not its own."""
    whole = [os.path.abspath(one) if os.path.basename(one.rstrip("/")) in (".", "..") else one for one in models]
    last = [one.rstrip("/").rpartition("/")[2] or one for one in whole]
    return [one if last.count(one) == 1 else f"{one}-{i}" for i, one in enumerate(last, 1)]


@dataclass(frozen=True)
class _Setting:
    """The models to merge, their base and their rows.

    keep     rows of the base, which a merge shall answer as the base does
    keys     further keys of the recipe
    joined   whether the models have different vocabularies: they are judged with the tokens of all
    """

    models: tuple[str, ...]
    base: str
    rows: tuple[Mapping[str, Any], ...]
    pickles: bool
    keep: Mapping[str, Any] | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    joined: bool = False

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise UsageError("a merge takes two models or more")
        base, *places = (os.path.realpath(os.path.expanduser(one)) for one in (self.base, *self.models))
        for i, (one, place) in enumerate(zip(self.models, places, strict=True)):
            if place == base:
                raise InputError(f"{one}: is the base itself", hint="name fine-tunes, and their base with --base")
            if place in places[:i]:
                raise InputError(f"{one}: a model is named twice", hint="name each once")
        if self.keep is not None and THE_BASE in self.names:
            raise InputError(f"a model is named {THE_BASE!r}, as the base is in figures", hint="rename its folder")

    @cached_property
    def names(self) -> list[str]:
        """Return the last part of every model's path, with its number where that is not its own."""
        return names_of(self.models)

    @property
    def chosen(self) -> bool:
        """Tell whether further keys choose the tokens."""
        return bool(VOCABULARY_KEYS & self.keys.keys())

    def recipe(
        self, way: Way, factor: float, *, judged: bool = False, seen: Callable[[str], str] = str
    ) -> dict[str, Any]:
        """Return the recipe of a way at a λ. `judged`: as a checkpoint, with the rows of every model, whether it needs
        them or not."""
        known, models = MERGE[way.method].parameters, []
        for i, (model, name) in enumerate(zip(self.models, self.names, strict=True)):
            whole = f"{self.base}+{model}" if is_adapter(os.path.expanduser(model), Path.cwd()) else model
            one: dict[str, Any] = {"model": seen(whole), "name": name}
            if "weight" in known and known["weight"].default is None:
                one["parameters"] = {"weight": 1.0}
            if self.rows and (judged or way.needs_rows):
                one["calibration"] = {**self.rows[i], "data": seen(str(self.rows[i]["data"]))}
            models.append(one)
        if self.keep is not None and (judged or way.fitted is not None):
            models.append({"model": seen(self.base)})
            if way.fitted is not None:
                models[-1]["calibration"] = {**self.keep, "data": seen(str(self.keep["data"]))}
        made: dict[str, Any] = {
            "base_model": seen(self.base),
            "merge_method": way.method,
            "models": models,
            "parameters": {**way.parameters, LAMBDA: factor},
        }
        if way.fitted is not None:
            made["calibration"] = {"per": "merge", "coefficients": way.fitted}
        if way.balanced:
            made["balance"] = "norm"
        if self.pickles:
            made["pickles"] = True
        apart = {"output", *VOCABULARY_KEYS} if judged else set()
        made |= {key: value for key, value in self.keys.items() if key not in apart}
        if self.joined and (judged or not self.chosen):
            made["tokenizer_source"] = UNION
        return made


class _Adviser:
    """Measures the evidence and, with rows, the candidates."""

    def __init__(self, setting: _Setting, options: Options) -> None:
        self.setting = setting
        self.candidates = candidates_in(Path.cwd(), options, pickles=setting.pickles)
        self.passes = 0

    def advice(self, *, fit: bool) -> tuple[MergeAdvice, Way, float, FoundFit | None]:
        """Return the advice without its recipe, the input of the recipe, and its fit."""
        start, planning = self.recipe(WHOLE, 1.0), self.candidates.options
        inputs = self.candidates.inputs(start)
        words = list(other_words(inputs))
        if joined := _needs_union(inputs, words):
            self.setting = replace(self.setting, joined=True)
            start = self.recipe(WHOLE, 1.0)
            inputs = self.candidates.inputs(start)
        list(remarks_on_configs(inputs, refuse=True))
        roots = self.candidates.of(start).roots
        count, talks = len(self.setting.models), all(has_head(t.checkpoint.config, "causal-lm") for t in inputs.tunes)
        found: dict[Way, MergeCandidate] = {}
        good: list[Way] = []
        search: dict[str, int] = {}
        held: dict[str, int] = {}
        fitted: FoundFit | None = None
        with ExitStack() as stack:
            judge: StudyJudge | None = None
            if self.setting.rows:  # before `measure`, so that rows which do not fit are refused at once
                judge = stack.enter_context(
                    closing(StudyJudge(self.candidates, start, STUDY, self._goals(start), (SCORE_KEPT,), self._kept()))
                )
                search, held = judge.rows("search"), judge.rows("held")
            conflict = measure(roots, device=planning.device, workers=planning.workers)
            if judge is not None:
                classes = {task.name: _classes(task) for task in judge.tasks.values() if task.name != THE_BASE}
                found, good = self._judge(judge, SCOPES if fit else (), conflict, classes)
                if not good:
                    raise InputError(f"no merge of these models can be judged: {next(iter(found.values())).error}")
                way, factor, why = with_rows(found, good)
                forecast = found[way].forecast
                if way.fitted is not None:
                    written = parse(self.setting.recipe(way, factor))
                    fitted = FoundFit(fingerprint(written), judge.calibrated(self.recipe(way, factor)))
            else:
                way, factor, why = without_rows(conflict, count, talks=talks)
                forecast = of_weights(self.setting.names, conflict, way.method)
        advice = MergeAdvice(
            models=list(self.setting.names),
            base=self.setting.base,
            method=way.name,
            why=why,
            factor=factor,
            evidence=conflict,
            forecast=forecast,
            head=inputs.template.name if inputs.template in inputs.tunes and not talks else None,
            rescue=rescue(self.setting.names, conflict, forecast, rows=bool(self.setting.rows)),
            candidates=list(found.values()),
            search=search,
            held_out=held,
            forward_passes=self.passes,
            recipe="",
            warnings=[
                *unchanged(self.setting.names, conflict),
                *swapped(inputs),
                *unrelated(inputs),
                *words,
                *([JOINED] if joined and not self.setting.chosen else []),
                *remarks_on_configs(inputs),
            ],
        )
        return advice, way, factor, fitted

    def recipe(self, way: Way, factor: float) -> Recipe:
        """Return the recipe of a way at a λ, with the rows of every model."""
        return parse(self.setting.recipe(way, factor, judged=True))

    def _kept(self) -> Calibration | None:
        """Return the rows of the base, as a recipe of fitted coefficients has them. InputError: it has no head."""
        if self.setting.keep is None:
            return None
        recipe = self.recipe(WHOLE.by("layer"), 1.0)
        assert recipe.kept is not None
        calibration = recipe.calibration_of(recipe.kept)
        assert calibration is not None
        base = self.candidates.inputs(recipe).base
        assert base is not None
        check_base(calibration, base.checkpoint.config)
        return calibration

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

    def _judge(
        self, judge: StudyJudge, scopes: Sequence[str], conflict: Conflict, classes: Mapping[str, int | None]
    ) -> tuple[dict[Way, MergeCandidate], list[Way]]:
        """Return all ways, and the ways that can be chosen.

        Each way is tried at its usual λ. The best ways settle theirs. Coefficients are fitted by layer from the best.
        For classifiers there is a fit by row, too. It moves so far that its start matters little, so it starts at what
        is recommended without rows. A fit can be chosen if it loses less than the best on the held-out rows. These rows
        alone then judge all ways.
        """
        trials = _Trials(self, judge, conflict, classes)
        count, talks = len(self.setting.models), None in classes.values()
        if talks:  # by row a fit of theirs added nothing that test rows show (docs/measurements/merging.md)
            scopes = [scope for scope in scopes if scope != "row"]
        with progress.phase("trying merges", len(WAYS) + FINALISTS + len(scopes), "methods") as trying:
            for way in WAYS:
                trials.try_at(way, [way.usual(count)])
                trying.step(1)
            leaders = trials.leaders()
            for way in leaders:
                trials.settle(way)
                trying.step(1)
            found = {way: trials.candidate(way) for way in WAYS}
            good = best_first({way: found[way] for way in leaders if found[way].error is None})
            without, usual, _ = without_rows(conflict, count, talks=talks)
            starts = {"layer": good[0], "row": without} if good else {}
            fits = {scope: start.by(scope) for scope, start in starts.items() if scope in scopes}
            for scope, way in fits.items():
                trials.try_at(way, [trials.factor(starts[scope]) or usual])
                trying.step(1)
        found |= {way: trials.candidate(way) for way in fits.values()}
        if fitted := [way for way in fits.values() if found[way].error is None]:
            on_held = {way: trials.candidate(way, ["held"]) for way in found if trials.is_known(way, "held")}
            first = min((good[0], *fitted), key=lambda way: mean_lost(on_held[way].lost))
            if first in fitted:
                assert first.fitted is not None
                start = starts[first.fitted]
                same = start in on_held and on_held[start].lost == on_held[first].lost  # no factors were better
                found, good = found | on_held, [start if same else first]
        return found, good


@dataclass(eq=False)
class _Trials:
    """The scores of ways at their λ, by part of the rows."""

    adviser: _Adviser
    judge: StudyJudge
    conflict: Conflict
    classes: Mapping[str, int | None]
    scores: dict[tuple[Way, float, Part], Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    tried: dict[Way, dict[float, float]] = field(default_factory=dict)
    errors: dict[Way, str] = field(default_factory=dict)

    @cached_property
    def rows(self) -> dict[Part, dict[str, int]]:
        """Return how many rows of each model a part has."""
        return {"search": self.judge.rows("search"), "held": self.judge.rows("held")}

    @cached_property
    def tuning(self) -> list[Part]:
        """Return the parts that choose λ: all, but where more rows are held out than are searched on."""
        counts = {name: count for name, count in self.rows["search"].items() if name != THE_BASE}
        many = any(self.rows["held"][name] > count for name, count in counts.items())
        return ["search"] if many else ["search", "held"]

    def try_at(self, way: Way, factors: Sequence[float]) -> None:
        """Measure the loss of a way at each λ, or keep the reason why not."""
        rounded = [float(f"{factor:.3g}") for factor in factors]
        parts = self._unseen(way, self.tuning) or ["held"]
        try:
            self._measure(way, rounded, parts)
            lost = {factor: mean_lost(self._pooled(way, factor, parts, DISTANCE)) for factor in rounded}
            if any(value != value for value in lost.values()):
                raise InputError("what it loses is not a number")
            self.tried.setdefault(way, {}).update(lost)
        except DeltamergeError as fault:
            self.errors[way] = one_line(fault)

    def _unseen(self, way: Way, parts: Sequence[Part]) -> list[Part]:
        """Return the parts that do not make the merge itself: it is nearer to the fine-tunes on rows that do."""
        return [part for part in parts if part == "held" or not way.needs_rows]

    def _measure(self, way: Way, factors: Sequence[float], parts: Sequence[Part]) -> None:
        """Measure a way at each λ on the parts on which it is not measured yet."""
        lacking: dict[tuple[Part, ...], list[float]] = {}
        for factor in factors:
            if left := tuple(part for part in parts if (way, factor, part) not in self.scores):
                lacking.setdefault(left, []).append(factor)
        for left, new in lacking.items():
            candidates = [self.adviser.candidates.of(self.adviser.recipe(way, factor)) for factor in new]
            found = self.judge.scores_by_part(candidates, left)
            self.adviser.passes += len(new) if "search" in left else 0
            for factor, own in zip(new, found, strict=True):
                self.scores.update({(way, factor, part): scores for part, scores in own.items()})

    def leaders(self) -> list[Way]:
        """Return the ways that are best at their usual λ."""
        judged = {way: self.candidate(way) for way in self.tried if way not in self.errors}
        return best_first(judged)[:FINALISTS]

    def settle(self, way: Way) -> None:
        """Find the λ of a way, and judge it on all rows."""
        if way.is_searched:
            self._narrow(way)
        if (factor := self.factor(way)) is not None:
            self._measure(way, [factor], self._unseen(way, list(self.rows)))

    def _narrow(self, way: Way) -> None:
        """Try λ on both sides of the usual one, and on where the best is at an end."""
        (usual,) = self.tried[way]
        self.try_at(way, [usual / RATIO, usual * RATIO])
        for _ in range(FURTHER):
            tried = self.tried[way]
            best, ends = min(tried, key=lambda one: tried[one]), (min(tried), max(tried))
            if way in self.errors or best not in ends:
                break
            self.try_at(way, [best / RATIO if best == ends[0] else best * RATIO])

    def factor(self, way: Way) -> float | None:
        """Return the λ of a way. None: it cannot be judged."""
        tried = self.tried.get(way)
        return None if way in self.errors or not tried else way.better(tried, next(iter(tried)))

    def is_known(self, way: Way, part: Part) -> bool:
        """Return whether a way is measured at its λ on a part of the rows."""
        factor = self.factor(way)
        return factor is not None and (way, factor, part) in self.scores

    def candidate(self, way: Way, among: Sequence[Part] = ("search", "held")) -> MergeCandidate:
        """Return a way at its λ, as those rows tell that it was judged on."""
        factor = self.factor(way)
        lost: dict[str, float] = {}
        same: dict[str, float] = {}
        forecast: list[SkillForecast] = []
        if factor is not None:
            parts = [part for part in self._unseen(way, among) if (way, factor, part) in self.scores]
            lost, same, kept = (self._pooled(way, factor, parts, one) for one in (DISTANCE, SAME, SCORE_KEPT))
            counts = {name: sum(self.rows[part][name] for part in parts) for name in lost}
            names = self.adviser.setting.names
            forecast = of_answers(names, self.conflict, kept, self.classes, counts)
        return MergeCandidate(
            name=way.name,
            method=way.method,
            parameters=dict(way.parameters),
            balance="norm" if way.balanced else None,
            factor=factor,
            coefficients=way.fitted,
            lost=lost,
            lost_mean=mean_lost(lost) if lost else None,
            lost_worst=max(lost.values()) if lost else None,
            agreement=same,
            forecast=forecast,
            tried=[MergeTrial(factor=one, lost=own) for one, own in sorted(self.tried.get(way, {}).items())],
            error=self.errors.get(way),
        )

    def _pooled(self, way: Way, factor: float, parts: Sequence[Part], measure: str) -> dict[str, float]:
        """Return a measure over the rows of parts, by model. A model that lacks it is left out."""
        found = {}
        for name, own in self.scores[way, factor, parts[0]].items():
            if measure in own:
                values = [(self.scores[way, factor, part][name][measure], self.rows[part][name]) for part in parts]
                found[name] = sum(value * count for value, count in values) / sum(count for _, count in values)
        return found


def _classes(task: ScoredTask) -> int | None:
    """Return the number of a classifier's classes. 1: numbers; None: a language model."""
    if task.kind in LANGUAGE:
        return None
    return 1 if is_regression(task.config) else int(task.config.num_labels)


def _needs_union(inputs: Inputs, words: Sequence[str]) -> bool:
    """Return whether rows must be matched by token: vocabularies have different sizes, or different words.

    `words` are the messages about different words. They count where every tokenizer can be read.
    """
    models = [model.checkpoint for model in inputs.all]
    apart = len({config_rows(model.config) for model in models}) > 1
    return apart or (bool(words) and all(read_tokens(model) is not None for model in models))


def unchanged(names: Sequence[str], conflict: Conflict) -> list[str]:
    """Name the models that equal the base, each in a message."""
    still = [name for name, norm in zip(names, conflict.relative_norm, strict=True) if norm == 0]
    return [f"{name} has the weights of the base: it adds nothing to the merge" for name in still]


def without_rows(conflict: Conflict, count: int, *, talks: bool) -> tuple[Way, float, list[str]]:
    """Return the way that the angles of `count` deltas suggest. Language models share their heads."""
    said = f"mean cosine {conflict.cosine_mean:.2g}"
    if conflict.cosine_mean >= ALIKE:
        return (
            ARITHMETIC,
            float(f"{1 / count:.3g}"),
            [f"the deltas go the same way ({said}), and their mean keeps what they do"],
        )
    said = f"the deltas go different ways ({said}), and without rows"
    if talks:
        way, kept = WUDI, "wudi kept most of language models' skills"
    else:
        way = SVC if count > 2 else TSV_M
        kept = f"{way.method} of balanced deltas was the safest for {'more' if count > 2 else 'two'} models"
    return way, float(f"{way.usual(count):.3g}"), [f"{said} {kept} (docs/measurements/merging.md)", ROWS_CHOOSE]


def best_first(judged: Mapping[Way, MergeCandidate]) -> list[Way]:
    """Return ways, the best answers first (`standing`); where rows do not tell answers, the least loss first."""

    def worth(way: Way) -> tuple[float, float]:
        return standing(judged[way]) or 0.0, -(judged[way].lost_mean or 0.0)

    return sorted(judged, key=worth, reverse=True)


def mean_lost(lost: Mapping[str, float]) -> float:
    """Return the mean over models. The base, if it has rows, counts KEPT_WEIGHT of a model."""
    weights = {name: KEPT_WEIGHT if name == THE_BASE else 1.0 for name in lost}
    return sum(weights[name] * value for name, value in lost.items()) / sum(weights.values())


def standing(candidate: MergeCandidate) -> float | None:
    """Return the mean over models by which merges are compared. Return None if a model's answers do not tell.

    A classifier's answer that differs from the fine-tune's is worth DIFFERS, and other models have their expected
    share. A classifier's expected share names the best merge less often with few rows (docs/measurements/merging.md).
    A base with rows counts as in `mean_lost`.
    """

    def worth(one: SkillForecast) -> float | None:
        if one.by != "answers":
            return one.share
        alike = candidate.agreement.get(one.model)
        return None if alike is None else DIFFERS + (1 - DIFFERS) * alike

    found = _mean_of_all(list(map(worth, candidate.forecast)))
    if found is None or THE_BASE not in candidate.lost:
        return found
    count, kept = len(candidate.forecast), KEPT_WEIGHT * max(0.0, 1.0 - candidate.lost[THE_BASE])
    return (count * found + kept) / (count + KEPT_WEIGHT)


def with_rows(judged: Mapping[Way, MergeCandidate], good: Sequence[Way]) -> tuple[Way, float, list[str]]:
    """Return the best of the `good` ways, its λ, and the reasons. `judged` has the ways to compare with."""
    way = best_first({way: judged[way] for way in good})[0]
    best, plain = judged[way], {one: found for one, found in judged.items() if found.lost and one.fitted is None}
    others = best_first(plain)[:1] if way.fitted is not None else []
    others += [ARITHMETIC] if ARITHMETIC in plain and ARITHMETIC not in (way, *others) else []
    beside = [judged[one] for one in others]
    of_tunes = [fmean(value for name, value in one.lost.items() if name != THE_BASE) for one in (best, *beside)]
    why = [f"it loses {of_tunes[0]:.1%} of the fine-tunes' effect on outputs"]
    why[0] += "".join(f", {one.name} {lost:.1%}" for one, lost in zip(beside, of_tunes[1:], strict=True))
    if (share := mean_share(best.forecast)) is not None:
        shares = "".join(f", {one.name} {mean_share(one.forecast) or 0.0:.1%}" for one in beside)
        why.insert(0, f"it should keep {share:.1%} of the fine-tunes' scores{shares}")
    if THE_BASE in best.lost:
        why.append(
            f"on rows of the base it leaves the base {best.lost[THE_BASE]:.0%} as far as the fine-tunes do on average"
        )
    if best.agreement:
        worst = min(best.agreement, key=lambda name: best.agreement[name])
        mean = fmean(best.agreement.values())
        why.append(
            f"it answers as the fine-tunes do on {mean:.1%} of their rows, as {worst} on {best.agreement[worst]:.1%}"
        )
    return way, best.factor or 1.0, why


def mean_share(forecast: Sequence[SkillForecast]) -> float | None:
    """Return the mean of expected shares. None: one is not known."""
    return _mean_of_all([one.share for one in forecast])


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def rescue(names: Sequence[str], conflict: Conflict, forecast: Sequence[SkillForecast], *, rows: bool) -> list[str]:
    """Return the danger to each skill that may be lost, and then, from SAVED on, the ways to save it."""
    said = []
    for one in forecast:
        if one.loss not in ("probable", "possible"):
            continue
        how = "will probably be lost" if one.loss == "probable" else "may be lost"
        kept = "" if one.by == "weights" else f", {one.share:.0%} of its score is expected and {one.low:.0%} at worst"
        rival = ""
        if one.rival is not None and (one.disturbance or 0.0) >= DANGER:
            rival = f": {one.rival}, as long, does {one.disturbance:.2g} times as much to its inputs; leave it out"
        said.append(f"{one.model} {how}{kept}{rival}")
    if not rows:
        for i, j in combinations(range(len(names)), 2):
            if conflict.cosine[i][j] >= ALIKE > conflict.cosine_mean:
                alike = f"{names[i]} and {names[j]} are alike (cosine {conflict.cosine[i][j]:.2g}), the others not"
                said.append(f"{alike}: together they outweigh these; leave one of them out")
        if any(one.loss == "unknown" for one in forecast) and forecast[0].low is not None:
            said.append(
                "any of these skills may be lost: in our benchmarks of decoders 2 of 11 skills kept less than half"
            )
    return [*said, EACH, *([] if rows else [ROWS_SAVE])] if said else []
