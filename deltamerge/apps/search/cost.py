"""What a sweep or a search takes, from headers alone. No torch."""

from __future__ import annotations

import math
from typing import Any

from deltamerge.calibrate.spec import BASELINE_BYTES, HELD_OUT, CalibrationInput, ahead, hidden, resident
from deltamerge.plan.planner import Plan
from deltamerge.recipe.study_keys import Study
from deltamerge.tensors.names import resident_size


def describe_study(planned: Plan) -> dict[str, Any]:
    """Candidates in one walk, trials, rows of each fine-tune, bytes of memory, as `deltamerge plan --json` has them."""
    study = planned.recipe.study or Study.model_validate({})
    rows = {tune.name: calibration.sequences for tune, calibration in _rows(planned)}
    return {"together": study.together, "trials": study.trials, "rows": rows, "memory": memory(planned, study)}


def _rows(planned: Plan) -> list[tuple[Any, Any]]:
    found = (
        (tune, planned.recipe.calibration_of(tune.index)) for tune in planned.inputs.tunes if tune.index is not None
    )
    return [(tune, calibration) for tune, calibration in found if calibration is not None]


def memory(planned: Plan, study: Study) -> int:
    """About the bytes that judging takes: what is imported; of every fine-tune the hidden states of all candidates; of
    one part of the model each model's tensors and their deltas, a candidate's own, and those in float32; the next part
    as it is stored."""
    states, part = 0, 0
    for tune, calibration in _rows(planned):
        tensors = tuple(tune.checkpoint.tensors.values())
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
