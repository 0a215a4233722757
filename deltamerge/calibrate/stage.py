"""Stages before the first tile: activations of a model, the threshold of `group: model`, a merge's totals.

A plan names these functions, so torch is imported when they run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.calibrate.model.transformers_code import quiet
from deltamerge.calibrate.spec import (
    CalibrationInput,
    models_of,
)
from deltamerge.calibrate.values import ModelCut
from deltamerge.engine import backends
from deltamerge.engine.devices import memory_of
from deltamerge.engine.execute import computed, default_workers, execute
from deltamerge.engine.worker import Task
from deltamerge.errors.shown import shown
from deltamerge.files import progress
from deltamerge.methods.prune import select
from deltamerge.tensors.dtypes import Array
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph, Kind, Tensor
from deltamerge.tensors.tiles import Tile
from deltamerge.tensors.traits import Function, traits
from deltamerge.tensors.views import ordered_product

if TYPE_CHECKING:
    import torch

    from deltamerge.calibrate.q.statistics import LayerStatistics

ACTIVATIONS = "measuring activations of"
TOGETHER = 32  # tensors whose histograms are held before they are added
LONG = 40  # characters of a model's name beside its progress


def activations(*inputs: Tensor, known: Mapping[Tensor, Any], source: CalibrationInput) -> dict[str, LayerStatistics]:
    """Return the statistics of the linear layers over the calibration rows, by the fine-tune's tensor names."""
    from deltamerge.calibrate.q.subject import Subject

    with calibrating(source.model, 1, ACTIVATIONS, device=source.device), Reader() as reader:
        (tensors,) = models_of(inputs, [source])
        subject = Subject(source, tensors, reader)
        found = subject.statistics(drawn=False)
        subject.forget()
        return found


@contextmanager
def calibrating(name: str, passes: int, what: str = "calibrating", *, device: str) -> Iterator[None]:
    """Name the model in errors and in the phase of its calibration, of at most `passes` forward passes over the rows.

    Silence transformers' advice on lengths and padding, and reuse memory that a pass frees. InputError: the device has
    too little memory.
    """
    with (
        quiet(),
        errors.context(f"calibration of {name}"),
        progress.phase(f"{what} {shown(name, LONG)}", passes, progress.PASSES, bound=True),
        backends.quiet_allocator(whole=True),
        memory_of(device),
    ):
        yield


@traits(reads=2)
def model_cut(*inputs: Tensor, known: Mapping[Tensor, Any], names: tuple[str, ...], k: int, device: str) -> ModelCut:
    """Return the cut that keeps the k largest magnitudes of the inputs, the deltas of a model.

    Of equal magnitudes the first are kept, tensor by tensor in the order of `names`, in flat order.
    """
    deltas = list(zip(names, inputs, strict=True))
    if k == 0:
        return ModelCut(select.nothing().threshold, dict.fromkeys(names, (0, 0)))
    with Reader() as reader:

        def reduced(function: Function, kind: Kind, **given: Any) -> Iterator[tuple[str, Any]]:
            """Yield the reduction of each delta, with further inputs of these values."""
            graph = Graph()
            values = {graph.node(name, kind="small"): value for name, value in given.items()}
            roots = [(n, graph.node(function, [delta, *values], kind=kind, shape=delta.shape)) for n, delta in deltas]
            return _in_turns(roots, {**known, **values}, reader, device)

        high = select.pick_bin(sum(counts for _, counts in reduced(select.high_histogram, "sum")), k=k)
        low = sum(counts for _, counts in reduced(select.low_histogram, "sum", bin=high))
        cut = select.pick_cut(low, high)
        if cut.equal_kept == cut.equal_total:
            return ModelCut(cut.threshold, dict.fromkeys(names, (0, 0)))
        counts = {name: int(np.sum(count)) for name, count in reduced(select.equal_counts, "concat", cut=cut)}
    left, equal = cut.equal_kept, {}
    for name in names:
        equal[name] = (min(left, counts[name]), counts[name])
        left -= equal[name][0]
    return ModelCut(cut.threshold, equal)


def _in_turns(
    roots: Sequence[tuple[str, Tensor]], known: Mapping[Tensor, Any], reader: Reader, device: str
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the value of each reduction, by the names of their tensors."""
    for start in range(0, len(roots), TOGETHER):
        some = roots[start : start + TOGETHER]
        tasks = [Task(name, root, backends.choose(root, device)) for name, root in some]
        values = execute(tasks, reader, None, device=device, workers=default_workers(), known=known)
        yield from ((name, values[root]) for name, root in some)


@traits(reads=1)
def totals(*inputs: Tensor, known: Mapping[Tensor, Any], names: tuple[str, ...], device: str) -> tuple[float, ...]:
    """Return the sums of the numbers of all blocks of all tensors, each exact and rounded once.

    The inputs are a reduction to (blocks, k) float64 for each of `names`, and the nodes that these need.
    """
    roots = list(zip(names, inputs, strict=False))
    with Reader() as reader:
        found = [one for _, one in _in_turns(roots, known, reader, device)]
    columns = np.concatenate([one for one in found if one.size] or [np.zeros((0, 0))]).T
    return tuple(math.fsum(column) if np.isfinite(column).all() else float(column.sum()) for column in columns)


def whole(*inputs: Tensor, known: Mapping[Tensor, Any]) -> Array:
    """Return the whole value of the first input, a small tensor: float32 on the CPU, in its shape."""
    with Reader() as reader:
        made = computed({"factor": inputs[0]}, reader, workers=1, known=known)["factor"]
    return made.view(np.float32).reshape(inputs[0].shape)


def product(a: Array, b: Array, *, tile: Tile, scale: float, transposed: bool) -> torch.Tensor:
    """Return s · B A, or its transpose, of masked factors, on a tile of the weight: flat float32.

    a            (r, in) masked
    b            (out, r) masked
    tile         the part of the weight
    scale        s
    transposed   whether the weight is stored (in, out)
    """
    import torch

    left, right = (a.T, b.T) if transposed else (b, a)
    top, bottom = tile.start // tile.columns, math.ceil(tile.stop / tile.columns)
    out = np.empty((bottom - top, tile.columns), np.float32)
    ordered_product(left[top:bottom], right, out)
    out *= np.float32(scale)
    first = tile.start - top * tile.columns
    return torch.from_numpy(out.reshape(-1)[first : first + tile.size])
