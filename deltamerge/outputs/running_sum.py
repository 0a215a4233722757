"""A running sum as output: Σ wᵢ xᵢ in float32 and the list of its models, so that a later run can add more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltamerge.formats.components import RUNNING_SUM
from deltamerge.outputs.assets import Files, as_json
from deltamerge.outputs.checkpoint import CheckpointOutput
from deltamerge.outputs.output import RunOutput
from deltamerge.plan.planner import Plan


class RunningSumOutput(CheckpointOutput):
    """The sink of a checkpoint, with a file that lists the models in the sum."""

    hashes_as_read = False

    def files(self, plan: Plan) -> Files:
        """Return the files of a checkpoint, and the list of the sum's models."""
        assert plan.running_sum is not None
        return {**super().files(plan), RUNNING_SUM: as_json(plan.running_sum.describe(), ascii=True)}

    def nbytes(self, plan: Plan, written: Mapping[str, Any]) -> int:
        """Return the bytes of the weight files."""
        return RunOutput.nbytes(self, plan, written)

    def load_line(self, plan: Plan, folder: Path) -> str:
        """Return the recipe's line that continues the sum."""
        return f"models: [{folder}, CHECKPOINT] of merge_method: linear"


OUTPUT = RunningSumOutput()
