"""Running sums in a plan: their allowed uses, their weight in an average, and the content of the next sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.components import RunningSum
from deltamerge.methods.merge.sums import divisor_of
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.recipe import series
from deltamerge.recipe.schema import Recipe


def check_sums(recipe: Recipe, named: Sequence[tuple[str, int | None, Checkpoint]]) -> None:
    """Raise InputError if a running sum is used as a model, or is not the first summand."""
    sums = [(name, index, checkpoint) for name, index, checkpoint in named if checkpoint.running_sum is not None]
    for name, index, checkpoint in sums:
        summed = checkpoint.running_sum
        assert summed is not None
        what = f"{name}: is the running sum of {len(summed.models)} checkpoints, no model"
        if index is None or recipe.method.name != "linear" or recipe.slices or recipe.modules or index > 0:
            raise InputError(f"{what}: it stands first, in a merge_method: linear of whole models")
        if recipe.models[index].parameters.get("weight", 1.0) != 1 or any(
            level.get("normalize", True) != 1 for level in recipe.parts[0].levels
        ):
            raise InputError(f"{what}: its weight is 1, and normalize true", hint="leave both out")
        following = [recipe.models[i].parameters.get("weight") for i in range(1, len(recipe.models))]
        wanted = series.running(summed.schedule, len(summed.models), len(following), summed.decay)
        if wanted is None or (following and tuple(following) != wanted):
            hint = "leave weights out; of a sum that the same file makes, make it first: a file of its own"
            raise InputError(f"{name}: checkpoints after a running sum have the weights of its schedule", hint=hint)


def counts(checkpoints: Iterable[Checkpoint], weights: Sequence[float]) -> tuple[float, ...]:
    """Return the share of each model in the divisor of an average: its weight, or a running sum's total."""
    return tuple(_count(checkpoint, weight) for checkpoint, weight in zip(checkpoints, weights, strict=True))


def _count(checkpoint: Checkpoint, weight: float) -> float:
    summed = checkpoint.running_sum
    return float(np.float32(weight)) if summed is None else summed.total


def made_of(recipe: Recipe, tunes: Sequence[tuple[str, Checkpoint]], dtypes: Mapping[str, str]) -> RunningSum:
    """Return the running sum of a recipe's models, given by name. `dtypes` are the dtypes of the average's tensors."""
    names: list[str] = []
    weights: list[float] = []
    schedule, decay = "constant", None
    for model, (name, checkpoint) in zip(recipe.models, tunes, strict=True):
        summed = checkpoint.running_sum
        names += [name] if summed is None else summed.models
        weight = model.parameters.get("weight", 1.0)
        assert isinstance(weight, bool | int | float)  # `recipe.checks` refuses all else
        weights.append(_count(checkpoint, weight))
        schedule = model.schedule or schedule if summed is None else summed.schedule
        decay = decay or model.decay if summed is None else summed.decay
    return RunningSum(tuple(names), divisor_of(tuple(weights)), schedule, decay, dict(dtypes))
