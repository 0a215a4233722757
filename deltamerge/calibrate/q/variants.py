"""How far variants of a fine-tune's weights are from it on calibration rows: one walk for all, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from deltamerge.calibrate.merge.second_moments import InputMeasurement
from deltamerge.calibrate.stage import calibrating
from deltamerge.tensors.reader import Reader

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[[str, "Tensor"], "Tensor"]
"""Makes of a tensor of the fine-tune, by its name there, the variant's."""
COMPARING = "comparing lengths of"


def divergences(measured: InputMeasurement, variants: Sequence[Change]) -> list[float]:
    """Return the divergence of each variant's outputs from the fine-tune's, as `objectives.Distribution` has it."""
    from deltamerge.calibrate.q.subject import Subject

    source = measured.source
    with calibrating(source.model, 1 + len(variants), COMPARING, device=source.device), Reader() as reader:
        subject = Subject(source, measured.tensors, reader)

        def weights(change: Change) -> Callable[[Sequence[str]], Mapping[str, Tensor]]:
            return lambda names: {name: change(name, tensor) for name, tensor in subject.tune(names).items()}

        batches = subject.batches["search"].inputs
        distance = subject.distribution(batches)
        found = subject.model.run(batches, [weights(change) for change in variants], distance.reduce)
        subject.count(batches)
        values = [distance.value(parts) for parts in found]
        subject.forget()
    return values
