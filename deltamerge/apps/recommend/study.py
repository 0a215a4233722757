"""Studies a fine-tune's delta: opens and measures the models, and reports statistics or a recommended pruning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.apps.inspect.activations import activations
from deltamerge.apps.inspect.moments import Moments
from deltamerge.apps.inspect.statistics import Pair, Report, measure_deltas, pair_recipe, pairs_of, parse, report
from deltamerge.apps.recommend import prune as recommendation
from deltamerge.apps.recommend.first_recipe import seen_from
from deltamerge.apps.recommend.prune import Recommendation
from deltamerge.apps.report import page as pages
from deltamerge.calibrate.rows.rows import has_head, metric_of
from deltamerge.calibrate.spec import Spec
from deltamerge.engine.execute import default_workers, shared_values
from deltamerge.errors import InputError, OutputError
from deltamerge.files.atomic import replace_file
from deltamerge.files.lock_file import LOCK_NAME
from deltamerge.models.chain.models import open_model
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.decode import decoded
from deltamerge.plan.inputs import Inputs, open_inputs
from deltamerge.plan.kinship import swapped, unrelated
from deltamerge.plan.output_config import remarks_on_configs
from deltamerge.plan.planner import PlanOptions, plan
from deltamerge.plan.tokenizer_differences import other_words
from deltamerge.recipe.schema import Calibration
from deltamerge.run.lock import Lock
from deltamerge.run.options import choose_device
from deltamerge.tensors.graph import Graph


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
    """Statistics of the delta of `model` and, with `calibration`, of its layers' activations.

        model, base   folders or hub ids
        calibration   as in a recipe
        density       at which pruning is judged
        out           an HTML page to draw on
        force         replace it
        device        "cpu" or a GPU
        workers       threads
        pickles       read torch's own files where there are no safetensors

    OutputError: `out` exists without `force`, or cannot be written.
    """
    if out is not None:
        pages.check_target(out, force=force)
    inputs = _open(model, base, pickles=pickles)
    pairs, lacking = pairs_of(inputs)
    device = choose_device(device)
    found = _measured(pairs, device, workers)
    seen = None
    if calibration is not None:
        prune = {"method": "dare", "density": density, "q": "output_change"}
        (spec,) = _specs(pairs, model, base, calibration, [prune], device, pickles)
        from deltamerge.apps.inspect.evidence import influence

        node = Graph().node(influence, kind="small", source=spec.source, spec=spec)
        seen = activations(shared_values([node], {})[node], density, spec.source.calibration.sequences)
    lock = inputs.tunes[0].checkpoint.path / LOCK_NAME
    made = Lock.read(lock).figures if lock.is_file() else None
    warnings = [*swapped(inputs), *unrelated(inputs), *other_words(inputs), *remarks_on_configs(inputs)]
    answer = report(inputs, pairs, lacking, found, activations=seen, run=made, warnings=warnings)
    if out is not None:
        pages.write(answer, out, force=force)
    return answer


def recommend(
    model: str,
    base: str,
    density: float,
    *,
    calibration: dict[str, Any] | None = None,
    out: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    pickles: bool = False,
) -> Recommendation:
    """The recommended pruning at `density`, and its recipe, which is written to `out`, a new file, if given.

    The other arguments are those of `inspect`; a `label` in `calibration` asks for the metric of the held-out rows.
    OutputError: `out` exists, or cannot be written.
    """
    if out is not None and os.path.lexists(out):
        raise OutputError(f"{out}: exists", hint="choose another name with --out")
    inputs = _open(model, base, pickles=pickles)
    differing = list(remarks_on_configs(inputs, refuse=True))
    pairs, _ = pairs_of(inputs)
    config = inputs.tunes[0].checkpoint.config
    device = choose_device(device)
    labelled = calibration is not None and "label" in calibration
    if calibration is not None and labelled:
        calibration = calibration | {"metric": metric_of(Calibration.model_validate(calibration), config)}
    found = _measured(pairs, device, workers)
    measured = None
    if calibration is not None:
        specs = _specs(pairs, model, base, calibration, recommendation.prunes(density), device, pickles)
        from deltamerge.apps.inspect.evidence import measure_influence as measure_on_data

        node = Graph().node(measure_on_data, kind="small", specs=tuple(specs))
        measured = shared_values([node], {})[node]
    decoder = has_head(config, "causal-lm")
    question = recommendation.Question(inputs.tunes[0].name, base, density, decoder, labelled)
    answer = recommendation.recommend(question, pairs, found, measured)
    warnings = [*swapped(inputs), *unrelated(inputs), *other_words(inputs), *differing]
    answer = answer.model_copy(update={"warnings": warnings})
    folder = Path.cwd() if out is None else out.resolve().parent
    chosen = next(one for one in answer.candidates if one.name == answer.method)
    more: dict[str, Any] = {}
    if chosen.needs_calibration and calibration is not None:
        more["calibration"] = calibration | {"data": seen_from(folder, calibration["data"])}
    if any(pair.cut for pair in pairs):
        more["tokenizer_source"] = seen_from(folder, model)
    if pickles:
        more["pickles"] = True
    recipe = pair_recipe(seen_from(folder, model), seen_from(folder, base), chosen.prune, **more)
    answer = recommendation.written(answer, recipe)
    if out is not None:
        replace_file(out, answer.recipe, new=True)
    return answer


def _measured(pairs: Sequence[Pair], device: str, workers: int | None) -> dict[str, Moments]:
    return measure_deltas(pairs, device=device, workers=workers or default_workers())


def _specs(
    pairs: Sequence[Pair],
    model: str,
    base: str,
    calibration: dict[str, Any],
    prunes: Sequence[Mapping[str, Any]],
    device: str,
    pickles: bool,
) -> list[Spec]:
    """The calibration stage of the recipe of each pruning."""
    more: dict[str, Any] = {"calibration": calibration}
    if any(pair.cut for pair in pairs):
        more["tokenizer_source"] = model
    specs = []
    for prune in prunes:
        recipe = parse(pair_recipe(model, base, prune, **more))
        planned = plan(recipe, Path.cwd(), partial(_opener, pickles=pickles), PlanOptions(device=device))
        specs += list(planned.specs.values())
    if len(specs) < len(prunes):
        raise InputError(f"{model}: nothing of its delta is pruned", hint="choose a density below 1")
    return specs


def _open(model: str, base: str, *, pickles: bool) -> Inputs:
    return open_inputs(parse(pair_recipe(model, base)), Path.cwd(), partial(_opener, pickles=pickles))


def _opener(reference: str, folder: Path, *, pickles: bool) -> Checkpoint:
    """Open a model with its weights; these are not downloaded if its headers show that they are useless."""
    seen = open_model(reference, folder, weights=False, pickles=pickles)
    with errors.context(reference):
        decoded(seen)
    return open_model(reference, folder, weights=True, pickles=pickles)
