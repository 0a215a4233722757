"""Find the model, the layers and the tensors that cost a skill in a merge. Nothing is written.

One fine-tune's rows run through the merge, with that fine-tune's head. Tensors of the merge are exchanged, in memory,
for the fine-tune's own: first runs of layers, then layers, then the tensors of the worst layer. The cost of these
tensors is the fall in the distance of outputs. Then each other model is left out of the recipe in turn. A merge of at
most `KEPT` bytes is made once.

Distances are shares of the base's: 0 is the fine-tune, 1 is the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltamerge.apps.inspect.statistics import parse
from deltamerge.apps.report.pictures import check_plot
from deltamerge.apps.report.svg import STYLE, Panel, Point, bars, columns, picture
from deltamerge.apps.search.candidates import candidates_in
from deltamerge.apps.search.evaluate import AGREEMENT, DISTANCE, ScoredTask, measured
from deltamerge.apps.search.judge import StudyJudge, Walk
from deltamerge.apps.search.outcome import one_line
from deltamerge.calibrate.model.blocks import Weights
from deltamerge.engine import backends
from deltamerge.errors import DeltamergeError, InputError, UsageError
from deltamerge.files import progress
from deltamerge.files.ownership import replace_own
from deltamerge.recipe.file import RecipeFile
from deltamerge.recipe.schema import Goal, Recipe, Study
from deltamerge.run.options import Options
from deltamerge.tensors.names import block_name, natural

MOST = 40  # forward passes over the rows of the skill
BEGIN = 3  # of them: the fine-tune's outputs, the base, the merge
TENSORS = 12  # of them for tensors of the worst layer
MODELS = 12  # and for models that are left out
SHOWN = 8
LEAST = 5e-4  # of a distance won: less is no cost
TOGETHER = 8
KEPT = 2 * 2**30  # bytes of the merge that stay in memory
REMADE = "the merge is made of the rows of --rows; without --rows it is made of the recipe's own, as by run"
GOAL = Goal.model_validate({"measure": AGREEMENT})
STUDY = Study.model_validate({"together": 1})


@dataclass(frozen=True, slots=True)
class Suspect:
    """A part of the merge: the distance `lost` without it, and the reduction `won`.

    `size` counts its tensors or models.
    """

    name: str
    lost: float
    won: float
    size: int = 1


@dataclass(frozen=True, slots=True)
class Bisection:
    """The parts that cost one skill of a merge most, the worst first.

    lost      the merge's lost distance, by model
    skill     the model whose skill it is
    models    models that were left out of the recipe
    layers    layers whose tensors were exchanged for the skill's own; only layers of the best runs are tried alone
    tensors   tensors of the worst layer
    notes     trials that were not possible, and whether the merge is another than a run's
    """

    skill: str
    lost: Mapping[str, float]
    models: tuple[Suspect, ...]
    layers: tuple[Suspect, ...]
    tensors: tuple[Suspect, ...]
    passes: int
    notes: tuple[str, ...] = ()

    @property
    def costs(self) -> tuple[Suspect | None, Suspect | None, Suspect | None]:
        """Return the layer, the tensor in it and the model that cost most. None: it costs nothing."""
        kinds = (self.layers, self.tensors, self.models)
        layer, tensor, model = (some[0] if some and some[0].won >= LEAST else None for some in kinds)
        return layer, tensor if layer else None, model

    def describe(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)

    def picture(self) -> str:
        """Draw the cost of each layer, tensor and model, as SVG."""
        order = sorted(self.layers, key=lambda one: natural(one.name))
        numbers = [Point(_number(one.name), max(0.0, one.won)) for one in order if _number(one.name)]
        panels = []
        if numbers:
            chart = columns("layers", numbers, form=".1%")
            panels.append(Panel("won by exchanging a layer for its own", "of the base's distance", chart))
        for title, some in (
            ("… a part outside layers", [one for one in self.layers if not _number(one.name)]),
            ("… a tensor of the worst", self.tensors),
            ("… by leaving a model out", self.models),
        ):
            points = [Point(one.name, max(0.0, one.won)) for one in some[:SHOWN]]
            panels += [Panel(title, "of the base's distance", bars(title, points, form=".1%"))] if points else []
        layer, _, _ = self.costs
        worst = f"{layer.name} costs it most" if layer else "no layer alone costs it"
        title = f"{self.skill} loses {self.lost[self.skill]:.0%}; {worst}"
        return picture([[panel] for panel in panels], STYLE, title)


def _number(name: str) -> str:
    """Return the number of a layer. "": it is a part outside layers."""
    last = name.rpartition(".")[2]
    return last if last.isdigit() else ""


def bisect(
    file: RecipeFile,
    *,
    rows: Sequence[Mapping[str, Any]] = (),
    skill: str | None = None,
    options: Options | None = None,
) -> Bisection:
    """Return the parts that cost a skill of a recipe's merge most.

        rows    as `calibration` in a recipe: one for all models, one each in their order, or none: the recipe's own
        skill   name of the model whose skill it is; default: the model that loses most

    UsageError: no model has that name, or the number of `rows` does not fit. InputError: a search would refuse it.
    """
    if len(file.documents) > 1:
        hint = "run the others first, and name their results as models"
        raise InputError(f"{file.path}: has several documents", hint=hint)
    data = _with_rows(file.output.recipe, rows)
    options = options or Options()
    candidates = candidates_in(file.folder, options, pickles=bool(data.get("pickles")) or options.pickles)
    recipe = parse(data)
    with closing(StudyJudge(candidates, recipe, STUDY, [GOAL])) as judge:
        names = {task.name: index for index, task in judge.tasks.items()}
        if skill is not None and skill not in names:
            alike = [name for name in names if name.rpartition("/")[2] == skill]
            if len(alike) != 1:
                raise UsageError(f"no model is named {skill}", hint=f"--of {' | --of '.join(names)}")
            skill = alike[0]
        merge = judge.start
        walk = judge.walk([merge], KEPT)
        (of_merge,) = judge.judged(walk, ["search"])
        lost = {name: own[DISTANCE] for name, own in of_merge["search"].items()}
        worst = skill or max(lost, key=lambda name: lost[name])
        search = _Bisection(judge, walk, names[worst], lost[worst])
        if rows and merge.stages:
            search.notes.append(REMADE)
        others = [index for index in names.values() if index != names[worst]][:MODELS]
        layers = search.narrow(_layers(merge.places[names[worst]]), MOST - search.passes - TENSORS - len(others))
        tensors: list[Suspect] = []
        if layers:
            (run,) = [one for one in _layers(merge.places[names[worst]]) if one[0] == layers[0].name]
            tensors = search.narrow([(name, [name]) for name in run[1]], MOST - search.passes - len(others))
        models = [search.without(data, index, recipe.names[index]) for index in others]
        found = sorted((one for one in models if one is not None), key=lambda one: -one.won)
        return Bisection(worst, lost, tuple(found), tuple(layers), tuple(tensors), search.passes, tuple(search.notes))


def _with_rows(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a recipe's data with rows beside its models."""
    data = {key: value for key, value in recipe.source.data.items() if key != "study"}
    if not rows:
        return data
    models = data.get("models")
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise UsageError("--rows is for recipes whose models are listed at the top", hint="calibration beside models")
    tunes = recipe.fine_tunes
    if len(rows) not in (1, len(tunes)):
        raise UsageError(f"{len(rows)} files of rows for {len(tunes)} models", hint="one for all, or one each")
    own = dict(zip(tunes, list(rows) * (len(tunes) if len(rows) == 1 else 1), strict=True))
    beside = [one | ({"calibration": dict(own[i])} if i in own else {}) for i, one in enumerate(models)]
    return data | {"models": beside}


Run = tuple[str, list[str]]
"""A part of the model: its name, and the skill's own names of its tensors."""


def _layers(places: Mapping[str, str]) -> list[Run]:
    """Return the merged tensors by layer, in order. Outside layers each is a part of its own."""
    found: dict[str, list[str]] = {}
    for name in sorted(places, key=natural):
        found.setdefault(block_name(name) or name, []).append(name)
    return list(found.items())


@dataclass(eq=False)
class _Bisection:
    """The passes of one skill's rows, and the lost distance after each exchange."""

    judge: StudyJudge
    merge: Walk
    index: int
    lost: float
    passes: int = BEGIN
    notes: list[str] = field(default_factory=list)

    @property
    def task(self) -> ScoredTask:
        return self.judge.tasks[self.index]

    def narrow(self, runs: Sequence[Run], room: int) -> list[Suspect]:
        """Return the parts that were exchanged alone, the worst first, in at most `room` passes.

        If there are more parts, runs of parts are exchanged first, and the best runs are split.
        """
        if room < 1 or not runs:
            return []
        if len(runs) <= room:
            lost = self._measure([self._restored(names) for _, names in runs])
            made = [
                Suspect(name, value, self.lost - value, len(names))
                for (name, names), value in zip(runs, lost, strict=True)
            ]
            return sorted(made, key=lambda one: -one.won)
        size = math.ceil(len(runs) / max(2, room // 2))
        several = [list(runs[at : at + size]) for at in range(0, len(runs), size)]
        lost = self._measure([self._restored([n for _, names in some for n in names]) for some in several])
        room -= len(several)
        best: list[Run] = []
        for _, some in sorted(zip(lost, several, strict=True), key=lambda one: one[0]):
            if best and len(best) + len(some) > room:
                break
            best += some
        return self.narrow(best, room)

    def without(self, data: Mapping[str, Any], index: int, name: str) -> Suspect | None:
        """Return the effect of a model that is left out of the recipe.

        None, and a note: the others cannot be merged.
        """
        if self.passes >= MOST:
            return None
        models = [one for i, one in enumerate(data["models"]) if i != index] if "models" in data else []
        try:
            if len(models) < 1:
                raise InputError("its models are not listed at the top of the recipe")
            candidate = self.judge.candidates.of(parse({**data, "models": models}))
            place = self.index - (index < self.index)
            (lost,) = self._measure([self.judge.walk([candidate]).weights(0, place, self.task)])
        except DeltamergeError as error:
            self.notes.append(f"{name} cannot be left out: {one_line(error)}")
            return None
        return Suspect(name, lost, self.lost - lost)

    def _restored(self, names: Sequence[str]) -> Weights:
        """Return the merge's weights with these tensors the skill's own."""
        merged, own = self.merge.weights(0, self.index, self.task), frozenset(names)

        def of(wanted: Sequence[str]) -> dict[str, Any]:
            kept, others = [n for n in wanted if n in own], [n for n in wanted if n not in own]
            return {**self.task.own(kept), **merged(others)}

        return of

    def _measure(self, variants: Sequence[Weights]) -> list[float]:
        """Return the lost distance of each variant."""
        sheet = self.judge.sheet("search")[self.index]
        base = self.judge.bases["search"][self.task.name][DISTANCE]
        found: list[float] = []
        with progress.phase("exchanging", len(variants), progress.PASSES) as passing:
            for at in range(0, len(variants), TOGETHER):
                some = variants[at : at + TOGETHER]
                with backends.quiet_allocator(whole=True):
                    (scores,) = measured([(self.task, sheet)], [some])
                found += [one[DISTANCE] / base if base > 0 else one[DISTANCE] for one in scores]
                passing.step(len(some))
        self.passes += len(variants)
        return found


def draw(found: Bisection, path: Path, of: str = "", *, force: bool = False) -> None:
    """Write the picture of a bisection of the recipe file named `of`. OutputError: as for `check_plot`."""
    check_plot(path, of, force=force)
    replace_own(path, found.picture(), of)
