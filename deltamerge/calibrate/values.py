"""Values of calibration stages, as a stage or a lock gives them, and the part that a node of one tensor takes of them.

They are q's or coefficients of tensors, norms and columns of inputs, a model's threshold, and spooled moments. Plans
name the functions here, so that planning imports no stage.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.calibrate.spec import Calibrated, QValue, Spec
from deltamerge.errors import InputError, VerifyError
from deltamerge.files.descriptors import writing
from deltamerge.methods.prune import select
from deltamerge.tensors.names import is_linear, is_unscaled

FIRST = 4_000_000  # first of the numbers that name files in a spool folder
MOMENTS = 7_000_000  # first number of files with a result's moments, which lie beside others


def pick(calibrated: Calibrated, *, name: str, root: int = 1) -> QValue:
    """Return the q of one tensor; 1 if the stage gave none.

    The q of a product of `root` factors is shared out: each factor has its root.
    """
    value = calibrated.q.get(name, 1.0)
    return value if root == 1 else math.pow(float(value), 1 / root)


def pick_coefficient(calibrated: Calibrated, *, delta: str, name: str, start: float) -> QValue:
    """Return the coefficient of a tensor's delta; `start`, the recipe's own, where the stage has none."""
    return calibrated.q.get(f"{delta}:{name}", start)


def locked(lock: Mapping[str, Any], spec: Spec, rows: Mapping[str, NDArray[np.float32]], where: str) -> Calibrated:
    """Return the q's of a stage, from a lock. VerifyError: it has none, or they belong to another objective, scope
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
    shapes = {pruned.name: pruned.shape for pruned in spec.pruned}
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
    """Raise VerifyError for an old lock, without the q's of random masks that calibration does not reach."""
    if spec.parts or spec.search == "gradient" or not spec.random:
        return
    for pruned in spec.pruned:
        shape = pruned.shape
        if pruned.name not in q and not (is_linear(pruned.stored, shape) or is_unscaled(pruned.stored, shape)):
            message = f"{where}: has no q for {pruned.name}, whose delta would be lost but for {pruned.density:g} of it"
            raise VerifyError(message, hint="an earlier deltamerge made it: run without --locked")


def norm(
    statistics: Mapping[str, Any], *, name: str, count: int, transposed: bool, stacked: int = 0
) -> NDArray[np.float32]:
    """Return (n) ‖x_j‖₂ of a layer's input, (E, n) of `stacked` experts.

    For a weight that saw no input they are 1, which makes WANDA magnitude per output.

    InputError: the weight is not stored (in, out) where `transposed`, or (out, in) where not.
    """
    if name not in statistics:
        return np.ones((stacked, count) if stacked else count, np.float32)
    if statistics[name].transposed != transposed:
        stored, taken = ("(in, out)", "(out, in)")[:: 1 if statistics[name].transposed else -1]
        raise InputError(f"{name} is stored {stored}, but was taken for {taken}", hint="use method magnitude")
    return np.asarray(statistics[name].norm, dtype=np.float32)


def massive(statistics: Mapping[str, Any], *, name: str, k: int) -> NDArray[np.int64]:
    """Return the k input features of a layer with the largest mean |x_j|, ascending; none for a weight that saw no
    input."""
    if name in statistics and statistics[name].transposed:
        raise InputError(f"{name} is stored (in, out): massive_activations needs (out, in)", hint="leave protect out")
    found = statistics[name].massive(k) if name in statistics else []
    return np.array(found, dtype=np.int64)


def columns(*, numbers: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the columns that a recipe lists, ascending."""
    return np.array(numbers, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class ModelCut:
    """The threshold of a model; `equal` has (kept, all) of the entries equal to it, by tensor."""

    threshold: int
    equal: Mapping[str, tuple[int, int]]


def cut_of(cut: ModelCut, *, name: str) -> select.Cut:
    """Return one tensor's cut, from a model's."""
    kept, count = cut.equal[name]
    return select.Cut(cut.threshold, kept, count)


@dataclass(eq=False)
class Spooled:
    """Files by the tensor's name in the output and the model's number, in `folder`.

    They hold moments, (in, in) float64, or squares of gradients, float32. `scales` has each model's mean square.
    """

    folder: Path
    files: dict[tuple[str, int], Path] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    owner: tempfile.TemporaryDirectory[str] | None = None  # of a folder of their own
    first: int = FIRST

    def begun(self, name: str, model: int) -> Path:
        """Return the path of a new file, of a tensor in a model."""
        path = self.folder / f"{self.first + len(self.files):07d}"
        self.files[name, model] = path
        return path

    def keep(self, name: str, model: int, moments: NDArray[np.float64]) -> None:
        """Write the moments or squares of a layer in a model."""
        with writing():
            moments.tofile(self.begun(name, model))

    def remove(self) -> None:
        """Remove the files, and the folder if it is their own."""
        for path in self.files.values():
            path.unlink(missing_ok=True)
        self.files.clear()
        if self.owner is not None:
            self.owner.cleanup()


def spool(*, of: Hashable = None) -> Spooled:
    """Return no files yet, in a folder of their own, for a stage to fill; a run gives its own folder instead.

    `of` tells one stage's files from another's, where candidates of several recipes have one graph.
    """
    own = tempfile.TemporaryDirectory(prefix="deltamerge-")
    return Spooled(Path(own.name), owner=own)


@dataclass(frozen=True, slots=True)
class OfLayer:
    """The moments of one layer, read when they are asked for."""

    moments: Spooled
    name: str

    def read(self, model: int) -> NDArray[np.float64] | None:
        """Return (in, in), or None: no row of that model reached the layer."""
        path = self.moments.files.get((self.name, model))
        if path is None:
            return None
        values = np.fromfile(path, np.float64)
        side = round(len(values) ** 0.5)
        return values.reshape(side, side)


def of_layer(moments: Spooled, *, name: str) -> OfLayer:
    """Return the moments of one layer, by its weight's name in the output."""
    return OfLayer(moments, name)


@dataclass(frozen=True, slots=True)
class OfTensor:
    """The squares of one tensor, read a tile at a time."""

    squares: Spooled
    name: str

    def part(self, model: int, start: int, stop: int) -> NDArray[np.float32] | None:
        """Return flat entries [start, stop), scaled to a mean of 1 over the model.

        None: no row of that model reached the tensor, or its answers are so sure that squares underflow float32.
        """
        path = self.squares.files.get((self.name, model))
        scale = np.float32(self.squares.scales.get(model, 0.0))
        if path is None or scale <= 0.0:
            return None
        values = np.fromfile(path, np.float32, stop - start, offset=4 * start)
        return np.asarray(values / scale, np.float32)


def of_tensor(squares: Spooled, *, name: str) -> OfTensor:
    """Return the squares of one tensor, by its name in the output."""
    return OfTensor(squares, name)
