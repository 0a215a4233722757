"""What a calibration stage found: the q's or coefficients of tensors, as a stage or a lock gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.calibrate.reach import is_linear, is_unscaled
from deltamerge.calibrate.spec import Spec
from deltamerge.errors import VerifyError

QValue = float | NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """The chosen q's by the tensor's name in the output, without those that are 1; and the stage's record for the lock.

    Tensors that calibration does not reach have the q of their method without it.
    """

    q: Mapping[str, QValue]
    record: dict[str, Any]

    @property
    def scalars(self) -> dict[str, float]:
        """The q's that are single numbers."""
        return {name: value for name, value in self.q.items() if isinstance(value, float)}

    @property
    def rows(self) -> dict[str, NDArray[np.float32]]:
        """The q's of output rows, as arrays that broadcast to the stored tensor."""
        return {name: value for name, value in self.q.items() if not isinstance(value, float)}


def pick(calibrated: Calibrated, *, name: str, root: int = 1) -> QValue:
    """The q of one tensor, 1 if the stage gave it none. Of a product's `root` factors each has the root of its q."""
    value = calibrated.q.get(name, 1.0)
    return value if root == 1 else math.pow(float(value), 1 / root)


def pick_coefficient(calibrated: Calibrated, *, delta: str, name: str, start: float) -> QValue:
    """That of a delta of a tensor; `start`, the recipe's own, where the stage has none."""
    return calibrated.q.get(f"{delta}:{name}", start)


def locked(lock: Mapping[str, Any], spec: Spec, rows: Mapping[str, NDArray[np.float32]], where: str) -> Calibrated:
    """The q's of a stage, from a lock. VerifyError: it has none, or they belong to another objective, scope
    or search."""
    record = (lock.get("calibration") or {}).get(spec.name)
    if not isinstance(record, dict) or not isinstance(record.get("q"), dict):
        raise VerifyError(f"{where}: has no calibrated q for {spec.name}", hint="run without --locked")
    for key in ("objective", "scope", "search"):
        if record.get(key) != getattr(spec, key):
            raise VerifyError(
                f"{where}: q of {spec.name} was calibrated with {key} {record.get(key)}, "
                f"the recipe says {getattr(spec, key)}"
            )
    shapes = {pruned.name: pruned.masked[0].shape for pruned in spec.pruned}
    if spec.coefficients:
        shapes = {f"{delta}:{name}": shape for name, shape in shapes.items() for delta in spec.coefficients}
    q: dict[str, QValue] = {name: float(value) for name, value in record["q"].items()} | dict(rows)
    if unknown := sorted(q.keys() - shapes.keys()):
        raise VerifyError(f"{where}: has a q for {unknown[0]}, which the recipe does not prune")
    if record.get("chosen") == "calibrated":
        _refuse_unscaled(spec, q, where)
    for name, shape in shapes.items():
        found = np.shape(q.get(name, 1.0))
        if len(found) > len(shape) or any(a not in (1, b) for a, b in zip(found[::-1], shape[::-1], strict=False)):
            raise VerifyError(f"{where}: q of {name} has shape {list(found)}, the tensor {list(shape)}")
    return Calibrated(q, {key: value for key, value in record.items() if key not in ("q", "rows")})


def _refuse_unscaled(spec: Spec, q: Mapping[str, QValue], where: str) -> None:
    """VerifyError: an old lock, without the q's of random masks that calibration does not reach."""
    if spec.parts or spec.search == "gradient" or not spec.random:
        return
    for pruned in spec.pruned:
        shape = pruned.masked[0].shape
        if pruned.name not in q and not (is_linear(pruned.stored, shape) or is_unscaled(pruned.stored, shape)):
            message = f"{where}: has no q for {pruned.name}, whose delta would be lost but for {pruned.density:g} of it"
            raise VerifyError(message, hint="an earlier deltamerge made it: run without --locked")
