"""What a sweep or a search takes, from headers alone. No torch."""

from __future__ import annotations

import math
from typing import Any

from deltamerge.calibrate.spec import BASELINE_BYTES, HELD_OUT, CalibrationInput
from deltamerge.calibrate.spec import memory as stage_memory
from deltamerge.io.names import numbered_blocks
from deltamerge.plan.planner import Plan
from deltamerge.recipe.study_keys import Study


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
    one part of the model each model's tensors and their deltas, a candidate's own, and those in float32."""
    hidden, part = 0, 0
    for tune, calibration in _rows(planned):
        tensors = tuple(tune.checkpoint.tensors.values())
        rows = calibration.model_copy(update={"sequences": max(calibration.sequences, HELD_OUT)})
        source = CalibrationInput(
            tune.name, tune.checkpoint.path, tensors, (), rows, planned.folder, 0, planned.device, False, 0
        )
        resident = 8 * _largest_part({info.name: info.shape for info in tensors})
        hidden += (stage_memory(source) - resident) * study.together // 8
        part = max(part, resident)
    shapes = {output.name: output.shape for output in planned.outputs}
    models = len(planned.inputs.all)
    shared = _largest_part(shapes) * (4 * models + 4 * len(planned.inputs.tunes) + 4)
    return BASELINE_BYTES + hidden + part + shared


def _largest_part(shapes: dict[str, tuple[int, ...]]) -> int:
    """Elements outside blocks and of the largest block."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    blocks = numbered_blocks(shapes) or {0: list(sizes)}
    inside = [sum(sizes[name] for name in names) for names in blocks.values()]
    return sum(sizes.values()) - sum(inside) + max(inside)
