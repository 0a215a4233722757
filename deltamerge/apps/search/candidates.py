"""Candidates: recipes of the same models, as the nodes of their tensors. Nodes that two of them have are one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltamerge.errors import InputError
from deltamerge.models.chain.models import Models
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.plan.inputs import Inputs, Opener, open_inputs, own_weights
from deltamerge.plan.merge import Merge
from deltamerge.plan.outputs import Outputs
from deltamerge.plan.planner import PlanOptions
from deltamerge.plan.vocabulary import make_vocabulary
from deltamerge.recipe.effective_prune import effective_prune
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.schema import Recipe
from deltamerge.run.options import Options
from deltamerge.tensors.graph import Graph, Node

# Keys on which the models that a recipe opens, and how their tensors are matched, do not depend.
FREE = frozenset({"parameters", "prune", "seed", "calibration", "study", "dtype", "out_dtype"})
HINT = "objective: {command: {run: …}} is given the merged folder, whatever it holds"


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A recipe, and what of its output is merged.

    roots    by the output's name of a tensor the node that makes it, rounded to the output's dtype
    places   by a fine-tune's index and its own name of a tensor the output's name
    merges   what is merged, by the output's name
    stages   nodes that run before the first tile: activations, q's
    """

    recipe: Recipe
    roots: Mapping[str, Node]
    places: Mapping[int, Mapping[str, str]]
    merges: Mapping[str, Merge]
    stages: tuple[Node, ...]


@dataclass(eq=False)
class Candidates:
    """Makes the candidates of recipes in `folder`; models are opened once, and tensors matched once for all recipes
    that differ in numbers alone."""

    folder: Path
    opener: Opener
    options: PlanOptions
    graph: Graph = field(default_factory=Graph)
    _known: dict[str, Inputs] = field(default_factory=dict)

    def inputs(self, recipe: Recipe) -> Inputs:
        """The models of a recipe."""
        key = json.dumps(fixed(recipe.source.data), sort_keys=True)
        if key not in self._known:
            self._known[key] = open_inputs(recipe, self.folder, self.opener)
        found = self._known[key]
        groups = (replace(group, part=part) for group, part in zip(found.groups, recipe.parts, strict=True))
        return replace(found, groups=tuple(groups))

    def of(self, recipe: Recipe) -> Candidate:
        """The candidate of a recipe. InputError: its weights cannot be judged in memory, or cannot be made at all."""
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
        for merge in found.merges:
            if len(rows[merge.name].pieces) > 1:
                raise InputError(f"{merge.name}: the vocabulary changes, which no fine-tune can run with", hint=HINT)
            for tuned in merge.tunes:
                _check(merge, tuned.model.name, tuned.tensor.name, tuned.model.checkpoint.tensors)
                places[tuned.index][tuned.tensor.name] = merge.name
        stages = found.builder.deltas.stages
        whole = [node for node in (stages.totals, stages.rows) if node is not None]
        nodes = (*stages.activations.values(), *stages.cuts.values(), *stages.calibrations, *whole)
        roots = {merge.name: rows[merge.name].pieces[0].built.root for merge in found.merges}
        return Candidate(recipe, roots, places, {merge.name: merge for merge in found.merges}, nodes)


def candidates_of(file: TemplateFile, options: Options) -> Candidates:
    """The candidates of a template."""
    pickles = bool(file.template.source.data.get("pickles")) or options.pickles
    return candidates_in(file.path.resolve().parent, options, pickles=pickles)


def candidates_in(folder: Path, options: Options, *, pickles: bool) -> Candidates:
    """Candidates of recipes in `folder`; every model is opened once."""
    models, opened = Models(), dict[str, Checkpoint]()

    def opener(reference: str, folder: Path) -> Checkpoint:
        if reference not in opened:
            opened[reference] = models.open(reference, folder, weights=True, pickles=pickles, sums=True)
        return opened[reference]

    return Candidates(folder, opener, options.planning)


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
    """What of a recipe's data decides which models are opened, and how their tensors are matched."""
    if isinstance(value, dict):
        return {key: fixed(inner) for key, inner in value.items() if key not in FREE}
    return [fixed(inner) for inner in value] if isinstance(value, list) else value
