"""Running sums of checkpoints: what the folder of one says beside its tensors, so that a later run goes on from it.

    {"format": 1, "schedule": "constant", "decay": null, "total": 20.0,
     "models": ["run/step-100", …], "dtypes": {"model.norm.weight": "BF16", …}}

The folder's tensors are Σ w_i x_i in float32, added from left to right; `total` is Σ w_i, added the same
way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.strict_json import read_json
from deltamerge.formats.weight_files import RUNNING_SUM

if TYPE_CHECKING:
    from deltamerge.tensors.tensor import TensorInfo

FORMAT = 1
SCHEDULES = ("constant", "ema")
"""Schedules under which a further checkpoint leaves the weights of those before it in proportion."""


@dataclass(frozen=True, slots=True)
class RunningSum:
    """What is in a running sum.

    models     the names of its checkpoints, in order
    total      the sum of their weights, a float32
    schedule   that the weights are of; `decay` is the ema's
    dtypes     of the tensors of an average that is made of it
    """

    models: tuple[str, ...]
    total: float
    schedule: str
    decay: float | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict, compare=False)

    def describe(self) -> dict[str, Any]:
        """The content of its file."""
        return {
            "format": FORMAT, "schedule": self.schedule, "decay": self.decay, "total": self.total,
            "models": list(self.models), "dtypes": dict(self.dtypes),
        }  # fmt: skip

    def marked(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors of its folder, those of outputs in the dtypes of an average."""
        return {name: replace(info, saved_as=self.dtypes.get(name)) for name, info in tensors.items()}


def read_running_sum(folder: Path) -> RunningSum | None:
    """What the folder's file says; None where it has none. InputError: it is damaged, or of a later version."""
    path = folder / RUNNING_SUM
    if not os.path.isfile(path):  # which says no where a path cannot be looked at: what opens it says why
        return None
    said = read_json(path)
    with errors.context(RUNNING_SUM):
        if said.get("format") != FORMAT:
            raise InputError(f"has format {str(said.get('format'))[:20]}, this version reads {FORMAT}")
        models, total, decay, dtypes = (said.get(key) for key in ("models", "total", "decay", "dtypes"))
        schedule = said.get("schedule")
        sound = (
            isinstance(models, list) and models and all(isinstance(name, str) for name in models)
            and isinstance(total, float | int) and not isinstance(total, bool) and math.isfinite(total) and total > 0
            and schedule in SCHEDULES
            and (isinstance(decay, float) and 0 < decay < 1 if schedule == "ema" else decay is None)
            and isinstance(dtypes, dict) and all(isinstance(code, str) for code in dtypes.values())
        )  # fmt: skip
        if not sound:
            raise InputError("is damaged", hint="make the running sum again from its checkpoints")
        assert isinstance(models, list)
        assert isinstance(dtypes, dict)
        assert isinstance(total, float | int)
        return RunningSum(tuple(models), float(total), str(schedule), decay, dtypes)
