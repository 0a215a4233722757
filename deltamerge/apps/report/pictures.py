"""The pictures of a model card, and of a calibration's search: SVG files with the drawings of the report's page."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge.apps.inspect.statistics import Report, measure_deltas, pair_recipe, pairs_of, parse, report
from deltamerge.apps.report.page import (
    CHANGED,
    FIGURES,
    Place,
    heat_maps,
    legend,
    matrices,
    measured_errors,
    place_figures,
    search_curve,
)
from deltamerge.apps.report.svg import STYLE, Panel, picture, short
from deltamerge.calibrate.spec import Spec
from deltamerge.errors import InputError, OutputError
from deltamerge.files.ownership import refuse_others, replace_own
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.references import open_model
from deltamerge.plan.inputs import open_inputs
from deltamerge.plan.planner import Plan
from deltamerge.run.calibration_record import ChosenQ, Run, choices
from deltamerge.run.lock import PICTURES
from deltamerge.run.options import Draw
from deltamerge.tensors.tensor import Node

if TYPE_CHECKING:
    from deltamerge.apps.inspect.statistics import Activations

BASE = "base"
DELTA, SEARCH, ACTIVATIONS = PICTURES
CAPTIONS = {
    DELTA: "The delta by layer and module, and the share of entries that differ from the base",
    SEARCH: "The objective over what was searched, and what was chosen",
    ACTIVATIONS: "Coherence by layer and module, and the measured error over the predicted",
}


def drawing(planned: Plan, data: bool) -> Draw:
    """Return the function that draws the pictures of a plan from its weights: `Options.drawing` of a run.

    With `data`, if q is calibrated, the calibration rows run through the fine-tune once more. InputError: the recipe
    makes nothing that has a delta.
    """
    if not planned.recipe.output.rules.standalone or planned.inputs.base is None:
        raise InputError("--pictures draws models made on a base", hint="run without it")
    return partial(illustrate, data=data)


def illustrate(planned: Plan, folder: Path, made: Run, *, data: bool) -> dict[str, str]:
    """Draw the finished weights in `folder`, with the record `made` of their q's.

    Return the files' names and captions.
    """
    assert planned.inputs.base is not None
    base = planned.inputs.base.checkpoint

    def opener(reference: str, here: Path) -> Checkpoint:
        return base if reference == BASE else open_model(reference, here, weights=True)

    inputs = open_inputs(parse(pair_recipe(str(folder), BASE)), folder, opener)
    pairs, lacking = pairs_of(inputs)
    found = measure_deltas(pairs, device=planned.device, workers=planned.workers, tile_elements=planned.tile_elements)
    stages = [stage for stage, spec in planned.specs.items() if not spec.parts] if data else []
    seen = _activations(stages[0]) if stages else None
    drawn = pictures(report(inputs, pairs, lacking, found, activations=seen, run=made))
    for name, svg in drawn.items():
        (folder / name).write_text(svg, encoding="utf-8")
    return {name: CAPTIONS[name] for name in drawn}


def check_plot(path: Path, of: str = "", *, force: bool = False) -> None:
    """Refuse a file where a picture of the recipe file named `of` cannot be drawn.

    So is a file that was not drawn so, or was changed since. `force` allows it.
    """
    if path.suffix != ".svg":
        raise OutputError(f"{path}: cannot be drawn", hint="name a .svg file")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: no such folder", hint="make it, or name a file elsewhere")
    refuse_others(path, of, force=force)


def draw(calibration: Mapping[str, Mapping[str, Any]], path: Path, of: str = "", *, force: bool = False) -> None:
    """Draw every search of a lock's `calibration`, a panel each, into an .svg file.

    InputError: nothing was searched. OutputError: the file cannot be written.
    """
    check_plot(path, of, force=force)
    panels = [panel for one in choices(calibration, {}, "the lock") for panel in _searches(one)]
    if not panels:
        raise InputError("nothing was searched that could be drawn", hint="layer_mse is solved in closed form")
    replace_own(path, picture([panels], STYLE), of)


def pictures(found: Report) -> dict[str, str]:
    """Return the pictures of a report, as SVG by file name: figures by layer and module, searches, activations."""
    cells = matrices(found)
    named = {**FIGURES, "entries changed": CHANGED}
    heats = [_maps(name, {k: one.of(g) for k, g in cells.items()}, one.form) for name, one in named.items()]
    rows = {DELTA: [list(row) for row in zip(*filter(None, heats), strict=True)], SEARCH: [], ACTIVATIONS: []}
    if found.run is not None:
        names = {tensor.name for tensor in found.tensors if tensor.kind != "vector"}
        for one in found.run.choices:
            q = {name: value for name, value in one.q.items() if name in names}
            maps = _maps(f"q of {short(one.model)}", place_figures(q)) if len(set(q.values())) > 1 else []
            rows[SEARCH] += [[*_searches(one), *maps]]
    if (seen := found.activations) is not None:
        panels = _maps("coherence D/A", place_figures({one.name: one.coherence for one in seen.layers}))
        if seen.total.dare_measured is not None:
            chart = measured_errors([(one.name, one) for one in seen.layers])
            words = "blue: DARE, q = density; orange: at the q of least squares"
            panels.append(Panel(f"measured error over predicted, density {seen.density:g}", words, chart))
        rows[ACTIVATIONS] = [panels]
    drawn = {name: [row for row in some if row] for name, some in rows.items()}
    return {name: picture(some, STYLE) for name, some in drawn.items() if some}


def _maps(name: str, cells: Mapping[Place, float | None], form: str = ".3g") -> list[Panel]:
    return [Panel(title, f"{low} to {top}", drawn) for title, drawn, (low, top) in heat_maps(name, cells, form)]


def _searches(one: ChosenQ) -> list[Panel]:
    """Return the searches for q."""
    title = f"{short(one.model)}: {one.method}, {one.objective}"
    return [Panel(title, "; ".join(legend(one, v).values()), search_curve(one, v)) for v, _ in one.panels]


def _activations(stage: Node) -> Activations:
    """Return the figures of the first fine-tune's linear layers on the rows.

    For a random mask with its measured error.
    """
    from deltamerge.apps.inspect.evidence import influence
    from deltamerge.apps.inspect.statistics import activations

    spec: Spec = stage.parameter("spec")
    found = influence(stage, drawn=spec.random and not spec.shared)
    return activations(found, min(one.density for one in spec.pruned), spec.source.calibration.sequences)
