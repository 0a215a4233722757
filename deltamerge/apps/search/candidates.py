"""Candidates: recipes of the same models, as the nodes of their tensors. Candidates share equal nodes.

`describe_study` estimates from headers alone the cost of judging them. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltamerge.calibrate.spec import BASELINE_BYTES, HELD_OUT, CalibrationInput, ahead, headers, hidden, resident
from deltamerge.errors import InputError
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.references import Models
from deltamerge.plan.delta_graph import Merge
from deltamerge.plan.inputs import Input, Inputs, Opener, open_inputs, own_weights
from deltamerge.plan.outputs import Outputs
from deltamerge.plan.planner import Plan, PlanOptions
from deltamerge.plan.tokenizer_differences import BY_TOKEN
from deltamerge.plan.vocabulary import Rows, Vocabulary, make_vocabulary
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.output_keys import UNION
from deltamerge.recipe.prune import effective_prune
from deltamerge.recipe.schema import Recipe, Study
from deltamerge.run.options import Options
from deltamerge.run.plans import refuse_absent
from deltamerge.tensors.names import resident_size
from deltamerge.tensors.tensor import Graph, Node
from deltamerge.tensors.views import moves_rows

# Keys on which the models that a recipe opens, and how their tensors are matched, do not depend.
FREE = frozenset({"parameters", "prune", "seed", "calibration", "study", "dtype", "out_dtype"})
HINT = "objective: {command: {run: …}} is given the merged folder, whatever it holds"
KEEP = f"{BY_TOKEN} keeps every token; {HINT}"
OF_BASE = -1  # the index of the base, where a candidate stands beside it


@dataclass(frozen=True, slots=True, eq=False)
class RecipeCandidate:
    """A recipe, and the merged tensors of its output.

    roots        output name -> the node of the tensor, rounded to the output's dtype
    places       (fine-tune's index or OF_BASE, its name of a tensor) -> output name
    merges       output name -> the merge
    stages       nodes that run before the first tile: activations, q's
    token_rows   (fine-tune's index or OF_BASE, its name of a tensor) -> the output's row of each of its ids, −1 for
                 padding; of tensors whose rows are moved to the output's vocabulary
    """

    recipe: Recipe
    roots: Mapping[str, Node]
    places: Mapping[int, Mapping[str, str]]
    merges: Mapping[str, Merge]
    stages: tuple[Node, ...]
    token_rows: Mapping[int, Mapping[str, Rows]]


@dataclass(eq=False)
class RecipeCandidates:
    """The candidates of recipes in `folder`.

    Models are opened once. Tensors are matched once for all recipes that differ in numbers alone.
    """

    folder: Path
    opener: Opener
    options: PlanOptions
    graph: Graph = field(default_factory=Graph)
    _known: dict[str, Inputs] = field(default_factory=dict)

    def inputs(self, recipe: Recipe) -> Inputs:
        """Return the models of a recipe."""
        key = json.dumps(fixed(recipe.source.data), sort_keys=True)
        if key not in self._known:
            self._known[key] = open_inputs(recipe, self.folder, self.opener)
        found = self._known[key]
        groups = (replace(group, part=part) for group, part in zip(found.groups, recipe.parts, strict=True))
        return replace(found, groups=tuple(groups))

    def of(self, recipe: Recipe) -> RecipeCandidate:
        """Return the candidate of a recipe.

        InputError: its weights cannot be judged in memory, or cannot be made at all.
        """
        inputs = self.inputs(recipe)
        _refuse(recipe, inputs)
        vocabulary = make_vocabulary(recipe, inputs)
        options = self.options
        found = Outputs(recipe, inputs, options.device, self.folder, options.memory, None, vocabulary, graph=self.graph)
        if found.stacks:
            raise InputError("layers are stacked, and a fine-tune's rows run through its own layers", hint=HINT)
        rows = {row.name: row for row in found.rows()}
        if found.problems:
            raise InputError(found.problems[0], also=found.problems[1:8], hint=found.hint or None)
        found.settled.check()
        places: dict[int, dict[str, str]] = {tune.index: {} for tune in inputs.tunes if tune.index is not None}
        moved: dict[int, dict[str, Rows]] = {index: {} for index in places}
        for merge in found.merges:
            if len(rows[merge.name].pieces) > 1:
                raise InputError(f"{merge.name}: the vocabulary changes, which no fine-tune can run with", hint=HINT)
            for tuned in merge.tunes:
                name, tensors = tuned.tensor.name, tuned.model.checkpoint.tensors
                cut = name in tensors and tensors[name].shape != tuned.tensor.shape
                if vocabulary is not None and (cut or moves_rows(tuned.tensor)):
                    moved[tuned.index][name] = _own_rows(vocabulary, tuned.model)
                else:
                    _check(merge, tuned.model.name, name, tensors)
                places[tuned.index][name] = merge.name
        if inputs.base is not None:
            based = {merge.name: merge.base for merge in found.merges if merge.base is not None}
            places[OF_BASE] = {info.name: name for name, info in based.items()}
            tables = [info.name for info in based.values() if vocabulary is not None and moves_rows(info)]
            moved[OF_BASE] = {name: vocabulary.rows_of(inputs.base) for name in tables} if vocabulary else {}
        stages = found.builder.deltas.stages
        whole = [node for node in (stages.totals, stages.rows) if node is not None]
        nodes = (*stages.activations.values(), *stages.cuts.values(), *stages.calibrations, *whole)
        roots = {merge.name: rows[merge.name].pieces[0].built.root for merge in found.merges}
        return RecipeCandidate(recipe, roots, places, {merge.name: merge for merge in found.merges}, nodes, moved)


def candidates_of(file: TemplateFile, options: Options) -> RecipeCandidates:
    """Return the candidates of a template. RecipeError: a model that it names is not there."""
    refuse_absent(file.path, [file.template.source])
    pickles = bool(file.template.source.data.get("pickles")) or options.pickles
    return candidates_in(file.path.resolve().parent, options, pickles=pickles)


def candidates_in(folder: Path, options: Options, *, pickles: bool) -> RecipeCandidates:
    """Return candidates of recipes in `folder`. Every model is opened once."""
    models, opened = Models(), dict[str, Checkpoint]()

    def opener(reference: str, folder: Path) -> Checkpoint:
        if reference not in opened:
            opened[reference] = models.open(reference, folder, weights=True, pickles=pickles, sums=True)
        return opened[reference]

    return RecipeCandidates(folder, opener, options.planning)


def _own_rows(vocabulary: Vocabulary, model: Input) -> Rows:
    """Return the output's row of each of a model's ids. InputError: the output lacks some of its tokens."""
    rows = vocabulary.rows_of(model)
    if vocabulary.kind != UNION and bool((rows < 0).any()):
        raise InputError(f"{model.name}: the output lacks some of its rows, which its texts may need", hint=KEEP)
    return rows


def _check(merge: Merge, model: str, name: str, tensors: Mapping[str, Any]) -> None:
    if name not in tensors:
        raise InputError(f"{model} stores its experts otherwise than the output: {name}", hint=HINT)
    if tensors[name].shape != merge.shape:
        raise InputError(f"{name} of {model} is {list(tensors[name].shape)}, merged {list(merge.shape)}", hint=HINT)


def _refuse(recipe: Recipe, inputs: Inputs) -> None:
    if recipe.output.scheme != "none":
        raise InputError("output.quantization: candidates are judged as they are before it", hint=HINT)
    if own_weights(recipe, inputs) is not None:
        raise InputError("an adapter's own A and B are pruned, and candidates are judged as weights", hint=HINT)
    for i in recipe.fine_tunes:
        if effective_prune(recipe, i).budget is not None:
            raise InputError("prune.budget: its densities are chosen as the artifact is written", hint="give a density")


def fixed(value: Any) -> Any:
    """Return the part of a recipe's data that decides which models are opened, and how their tensors are matched."""
    if isinstance(value, dict):
        return {key: fixed(inner) for key, inner in value.items() if key not in FREE}
    return [fixed(inner) for inner in value] if isinstance(value, list) else value


def describe_study(planned: Plan) -> dict[str, Any]:
    """Return the size of a study for `deltamerge plan --json`.

    It is candidates in one walk, trials, rows of each fine-tune, and bytes of memory.
    """
    study = planned.recipe.study or Study.model_validate({})
    rows = {tune.name: calibration.sequences for tune, calibration in _rows(planned)}
    return {"together": study.together, "trials": study.trials, "rows": rows, "memory": memory(planned, study)}


def _rows(planned: Plan) -> list[tuple[Any, Any]]:
    found = (
        (tune, planned.recipe.calibration_of(tune.index)) for tune in planned.inputs.tunes if tune.index is not None
    )
    return [(tune, calibration) for tune, calibration in found if calibration is not None]


def memory(planned: Plan, study: Study) -> int:
    """Estimate the bytes that judging takes.

    Held are imports, the hidden states of all candidates for every fine-tune, and the model's next part as stored. Of
    the present part, memory holds each model's tensors and deltas, a candidate's own, and both in float32.
    """
    states, part = 0, 0
    for tune, calibration in _rows(planned):
        tensors = headers(tune.checkpoint.tensors.values())
        rows = calibration.model_copy(update={"sequences": max(calibration.sequences, HELD_OUT)})
        source = CalibrationInput(
            tune.name, tune.checkpoint.path, tensors, (), rows, planned.folder, 0, planned.device, False, 0
        )
        states += study.together * hidden(source)
        part = max(part, 2 * resident(tensors) + ahead(tensors))
    shapes = {output.name: output.shape for output in planned.outputs}
    models = len(planned.inputs.all)
    shared = resident_size(shapes, {name: math.prod(shape) for name, shape in shapes.items()}) * (
        4 * models + 4 * len(planned.inputs.tunes) + 4
    )
    return BASELINE_BYTES + states + part + shared
