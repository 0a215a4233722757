"""A study of a fine-tune's delta: two models opened and measured, and the report of `deltamerge inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.apps.inspect.statistics import (
    DeltaMoments,
    Pair,
    Report,
    activations,
    measure_deltas,
    pair_recipe,
    pairs_of,
    parse,
    report,
)
from deltamerge.apps.report import page as pages
from deltamerge.engine.execute import default_workers
from deltamerge.errors import InputError
from deltamerge.files.ownership import LOCK_NAME
from deltamerge.models.checkpoint import Checkpoint, decoded
from deltamerge.models.references import open_model
from deltamerge.plan.inputs import Inputs, open_inputs
from deltamerge.plan.kinship import swapped, unrelated
from deltamerge.plan.output_config import remarks_on_configs
from deltamerge.plan.planner import PlanOptions, plan
from deltamerge.plan.tokenizer_differences import other_words
from deltamerge.run.lock import Lock
from deltamerge.run.options import choose_device
from deltamerge.tensors.tensor import Node


def inspect(
    model: str,
    base: str,
    *,
    calibration: dict[str, Any] | None = None,
    density: float = 0.01,
    out: Path | None = None,
    force: bool = False,
    device: str = "auto",
    workers: int | None = None,
    pickles: bool = False,
) -> Report:
    """Return statistics of the delta of `model` and, with `calibration`, of its layers' activations.

        model, base   folders or hub ids
        calibration   as in a recipe
        density       the density at which pruning is judged
        out           an HTML page to draw on
        force         replace `out`
        device        "cpu" or a GPU
        workers       threads
        pickles       read torch's own files if there are no safetensors

    OutputError: `out` exists without `force`, or cannot be written.
    """
    if out is not None:
        pages.check_target(out, force=force)
    inputs = open_pair(model, base, pickles=pickles)
    pairs, lacking = pairs_of(inputs)
    device = choose_device(device)
    found = measure(pairs, device, workers)
    seen = None
    if calibration is not None:
        prune = {"method": "dare", "density": density, "q": "output_change"}
        (stage,) = stages_of(pairs, model, base, calibration, [prune], device, pickles)
        from deltamerge.apps.inspect.evidence import influence

        sequences = stage.parameter("spec").source.calibration.sequences
        seen = activations(influence(stage), density, sequences)
    lock = inputs.tunes[0].checkpoint.path / LOCK_NAME
    made = Lock.read(lock).figures if lock.is_file() else None
    warnings = [*swapped(inputs), *unrelated(inputs), *other_words(inputs), *remarks_on_configs(inputs)]
    answer = report(inputs, pairs, lacking, found, activations=seen, run=made, warnings=warnings)
    if out is not None:
        pages.write(answer, out, force=force)
    return answer


def measure(pairs: Sequence[Pair], device: str, workers: int | None) -> dict[str, DeltaMoments]:
    """Return the moments of every delta by its name."""
    return measure_deltas(pairs, device=device, workers=workers or default_workers())


def stages_of(
    pairs: Sequence[Pair],
    model: str,
    base: str,
    calibration: dict[str, Any],
    prunes: Sequence[Mapping[str, Any]],
    device: str,
    pickles: bool,
) -> list[Node]:
    """Return the calibration stage of the recipe of each pruning."""
    more: dict[str, Any] = {"calibration": calibration}
    if any(pair.cut for pair in pairs):
        more["tokenizer_source"] = model
    stages = list[Node]()
    for prune in prunes:
        recipe = parse(pair_recipe(model, base, prune, **more))
        planned = plan(recipe, Path.cwd(), partial(_opener, pickles=pickles), PlanOptions(device=device))
        stages += planned.stages
    if len(stages) < len(prunes):
        raise InputError(f"{model}: nothing of its delta is pruned", hint="choose a density below 1")
    return stages


def open_pair(model: str, base: str, *, pickles: bool) -> Inputs:
    """Open a fine-tune and its base."""
    return open_inputs(parse(pair_recipe(model, base)), Path.cwd(), partial(_opener, pickles=pickles))


def _opener(reference: str, folder: Path, *, pickles: bool) -> Checkpoint:
    """Open a model with its weights; these are not downloaded if its headers show that they are useless."""
    seen = open_model(reference, folder, weights=False, pickles=pickles)
    with errors.context(reference):
        decoded(seen)
    return open_model(reference, folder, weights=True, pickles=pickles)
