"""Spooled E[x xᵀ] of the inputs of every layer in every fine-tune of a merge, on its own rows: what RegMean takes.

They are as large as the models, or larger, so they lie in files, and are read layer by layer. Plans name the functions
here, so torch is imported when they run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.calibrate import spec
from deltamerge.calibrate.merge.second_moments import MEASURING, Keep, Measured, Moments, measure
from deltamerge.calibrate.spec import Share
from deltamerge.calibrate.stage import calibrating
from deltamerge.files import progress
from deltamerge.files.descriptors import writing
from deltamerge.tensors.graph import Node
from deltamerge.tensors.reader import Reader

if TYPE_CHECKING:
    from deltamerge.calibrate.model.blocks import Weights
    from deltamerge.calibrate.q.subject import Subject

FIRST = 4_000_000  # of the numbers that files in a spool folder are called by


@dataclass(eq=False)
class Spooled:
    """Files by the tensor's name in the output and the model's number, in `folder`.

    They hold moments, (in, in) float64, or squares of gradients, float32, of which `scales` has each model's mean.
    """

    folder: Path
    files: dict[tuple[str, int], Path] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    owner: tempfile.TemporaryDirectory[str] | None = None  # of a folder of their own

    @classmethod
    def beginning(cls, folder: Path | None) -> Spooled:
        """No files yet, in a folder that there is, or in one of their own."""
        if folder is not None:
            return cls(folder)
        own = tempfile.TemporaryDirectory(prefix="deltamerge-")
        return cls(Path(own.name), owner=own)

    def begun(self, name: str, model: int) -> Path:
        """The path of a new file, of a tensor in a model."""
        path = self.folder / f"{FIRST + len(self.files):07d}"
        self.files[name, model] = path
        return path

    def keep(self, name: str, model: int, moments: NDArray[np.float64]) -> None:
        """Write those of a layer in a model."""
        with writing():
            moments.tofile(self.begun(name, model))

    def remove(self) -> None:
        """Remove the files, and the folder if it is their own."""
        for path in self.files.values():
            path.unlink(missing_ok=True)
        self.files.clear()
        if self.owner is not None:
            self.owner.cleanup()


@dataclass(frozen=True, slots=True)
class OfLayer:
    """The moments of one layer, read when they are asked for."""

    moments: Spooled
    name: str

    def read(self, model: int) -> NDArray[np.float64] | None:
        """(in, in), or None: no row of that model reached the layer."""
        path = self.moments.files.get((self.name, model))
        if path is None:
            return None
        values = np.fromfile(path, np.float64)
        side = round(len(values) ** 0.5)
        return values.reshape(side, side)


def of_layer(moments: Spooled, *, name: str) -> OfLayer:
    """Those of one layer, by its weight's name in the output."""
    return OfLayer(moments, name)


def memory(parts: Sequence[Share]) -> int:
    """About the bytes that measuring takes: fine-tunes run one after another, or side by side where they have deltas to
    make."""
    block = max((_measured(part).memory for part in parts), default=0)
    each = [Share(part.source) for part in parts]
    if any(one.masked for part in parts for one in part.pruned):
        return 4 * block + spec.memory(*each)
    return block + max(map(spec.memory, each), default=0)


def _measured(part: Share) -> Measured:
    return Measured(part.source, {one.name: one.stored for one in part.pruned})


def inputs(*, parts: tuple[Share, ...], folder: Path | None = None) -> Spooled:
    """The moments of the layers in `parts`, fine-tune after fine-tune, block by block."""
    found = Spooled.beginning(folder)
    for model, part in enumerate(parts):
        measured = _measured(part)
        measure(measured, set(measured.names.values()), _kept(found, measured.names, model))
    return found


def merged(
    *shared: Any, parts: tuple[Share, ...], wanted: tuple[str, ...], known: tuple[Node, ...], so_far: Node,
    folder: Path | None = None,
) -> Spooled:  # fmt: skip
    """The same of inputs that the merged blocks before a layer make of each fine-tune's rows (Nguyen et al.,
    "RegMean++", arXiv 2508.03121): inside a block, and outside blocks, the fine-tune's own weights run.

    parts    the fine-tunes; `masked` of their tensors is what the merge adds, made with the moments that there are
    wanted   the layers' names in the output
    known    the nodes whose values are `shared`
    so_far   the node in `masked` whose value these moments are

    All fine-tunes walk side by side, a block at a time. InputError: a model whose blocks cannot be told apart.
    """
    from deltamerge.calibrate.q.subject import Subject

    found = Spooled.beginning(folder)
    values = {**dict(zip(known, shared, strict=True)), so_far: found}
    with ExitStack() as stack:
        stack.enter_context(calibrating("the merge", len(parts), MEASURING, device=parts[0].source.device))
        reader = stack.enter_context(Reader())
        subjects = []
        for part in parts:
            with errors.context(part.source.model):
                masks = [{one.stored: one.masked[0] for one in part.pruned}]
                subjects.append(Subject(part.source, reader, masks, values))
        walks = []
        for model, (subject, part) in enumerate(zip(subjects, parts, strict=True)):
            names = {one.name: one.stored for one in part.pruned if one.name in wanted}
            walks.append(
                _walk(subject, _onward(subject, part, subjects[0], parts[0]), names, _kept(found, names, model))
            )
        for _ in zip(*walks, strict=True):
            progress.here(progress.PASSES).step(len(parts) / len(subjects[0].model.parts))
        for subject in subjects:
            subject.forget()
    return found


def _walk(subject: Subject, passed: Weights, names: Mapping[str, str], keep: Keep) -> Iterator[int]:
    from deltamerge.calibrate.model.relay import relay

    batches = subject.batches["search"].inputs
    return relay(subject.model, batches, subject.tune, passed, Moments(batches, set(names.values()), keep))


def _onward(subject: Subject, part: Share, first: Subject, of_first: Share) -> Weights:
    """The merged weights under a fine-tune's names and with its own head; `first` makes the merged deltas for all."""
    from deltamerge.calibrate.model.candidates import pruned

    by_name = {one.name: one.stored for one in of_first.pruned}
    own = {one.stored: by_name[one.name] for one in part.pruned}
    made = first.masks[0]
    return pruned(subject.start, lambda name: made(own[name]) if name in own else None, {})


def _kept(found: Spooled, names: Mapping[str, str], model: int) -> Keep:
    by_stored = {stored: name for name, stored in names.items()}
    return lambda stored, moments: found.keep(by_stored[stored], model, moments)
