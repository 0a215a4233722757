"""The pictures of a run's model card: the result is measured against its base and drawn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deltamerge.calibrate.spec import Spec
from deltamerge.engine.execute import shared_values
from deltamerge.engine.graph import Graph
from deltamerge.errors import InputError
from deltamerge.io import hub
from deltamerge.io.checkpoint import Checkpoint
from deltamerge.plan.inputs import open_inputs
from deltamerge.plan.planner import Plan
from deltamerge.run.calibration_record import Run
from deltamerge.run.options import Draw

if TYPE_CHECKING:
    from deltamerge.inspect.activations import Activations

BASE = "base"


def drawing(planned: Plan, data: bool) -> Draw:
    """What draws the pictures of a plan, once its weights are there: `Options.drawing` of a run.

    With `data`, if q is calibrated, the calibration rows run through the fine-tune once more. InputError: matplotlib is
    missing, or the recipe makes nothing that has a delta.
    """
    from deltamerge.inspect import plots

    plots.figure_of("--pictures")
    if planned.recipe.output.kind != "model" or planned.inputs.base is None:
        raise InputError("--pictures draws models made on a base", hint="run without it")
    return partial(illustrate, data=data)


def illustrate(planned: Plan, folder: Path, made: Run, *, data: bool) -> dict[str, str]:
    """Draw the finished weights in `folder`, whose q's were `made` so; returns the files' names and captions."""
    from deltamerge.inspect import plots
    from deltamerge.inspect.statistics import measure_deltas, pair_recipe, pairs_of, parse, report

    assert planned.inputs.base is not None
    base = planned.inputs.base.checkpoint

    def opener(reference: str, here: Path) -> Checkpoint:
        return base if reference == BASE else hub.open_model(reference, here, weights=True)

    inputs = open_inputs(parse(pair_recipe(str(folder), BASE)), folder, opener)
    pairs, lacking = pairs_of(inputs)
    found = measure_deltas(pairs, device=planned.device, workers=planned.workers, tile_elements=planned.tile_elements)
    specs = [spec for spec in planned.specs.values() if not spec.parts] if data else []
    seen = _activations(specs[0]) if specs else None
    drawn = plots.pictures(report(inputs, pairs, lacking, found, activations=seen, run=made))
    for name, picture in drawn.items():
        (folder / name).write_bytes(picture)
    return {name: plots.CAPTIONS[name] for name in drawn}


def _activations(spec: Spec) -> Activations:
    """The figures of the first fine-tune's linear layers on the rows; for a random mask with its measured error."""
    from deltamerge.calibrate.evidence import influence
    from deltamerge.inspect.activations import activations

    drawn = spec if spec.random and not spec.shared else None
    node = Graph().node(influence, kind="small", source=spec.source, spec=drawn)
    density = min(pruned.density for pruned in spec.pruned)
    return activations(shared_values([node], {})[node], density, spec.source.calibration.sequences)
