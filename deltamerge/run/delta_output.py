"""The sink of a run that leaves a delta artifact: the same graph, its tensors stored as changes of the base."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge.engine.execute import Task, execute, shared_values
from deltamerge.files.descriptors import flat
from deltamerge.files.journal import Journal
from deltamerge.formats.delta.manifest import Base
from deltamerge.formats.delta.positions import CODINGS
from deltamerge.formats.delta.tensor_writer import BaseTensor, TensorWriter, is_related
from deltamerge.formats.delta.writer import DeltaWriter, Summary
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.outputs.budget import ChosenDensities, given, search
from deltamerge.plan.finite import set_aside
from deltamerge.plan.outputs import OutputTensor
from deltamerge.plan.planner import Plan, fit
from deltamerge.run.options import Options
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.graph import Node
from deltamerge.tensors.reader import Reader, elements
from deltamerge.tensors.tensor import TensorInfo


def write_delta(
    planned: Plan,
    folder: Path,
    progress: Callable[[int], None],
    known: Mapping[Node, Any],
    journal: Journal | None = None,
) -> tuple[dict[Node, Any], Summary]:
    """Execute `planned` and leave its delta in `folder`; the values of shared nodes, and what was written.

    Tensors that the journal has, with what of them is in `folder`, are not made again.
    """
    output, origin = planned.recipe.output, planned.inputs.origin
    assert origin is not None
    canonical = planned.inputs.canonical
    infos: dict[str, TensorInfo] = {}
    for out in planned.outputs:
        name = canonical.get(out.name, out.name)
        info = origin.get(name)
        if info is not None and is_related(info.dtype, info.shape, out.dtype, out.shape):
            infos[out.name] = info
    used, names = {info.name for info in infos.values()}, {out.name for out in planned.outputs}
    removed = [n for n in origin.checkpoint.tensors if n not in used and n not in names]
    components = planned.inputs.template.checkpoint.components
    options: dict[str, Any] = {"semantics": "replace", "journal": journal, "components": components}
    if output.steps is False:
        options["codings"] = CODINGS
    if output.adds:
        options |= {"semantics": "add", "values": output.values or "bfloat16"}
    with (
        Reader() as reader,
        DeltaWriter(
            folder,
            base_of(origin.checkpoint),
            shard_size=output.shard_size,
            removed=removed,
            **options,
        ) as writer,
    ):
        tasks, targets = [], {}
        for out in planned.outputs:
            info = infos.get(out.name)
            base = None if info is None else BaseTensor(info.name, info.dtype, info.shape, elements(reader, info))
            tensor = writer.tensor(out.name, out.dtype, out.shape, base)
            if tensor.is_done and out.elements:
                progress(out.nbytes)
                continue
            delta = _delta(out, info)
            targets[out.name] = _Target(tensor, out.dtype, delta is not None, out.elements)
            if delta is not None:
                tasks.append(Task(out.name, delta, out.pieces[0].backend))
                if not out.elements:
                    tensor.finish()
            else:
                tasks += [Task(out.name, p.built.root, p.backend, p.offset) for p in out.pieces]
        values = execute(
            tasks,
            reader,
            _Sink(targets, progress),
            device=planned.device,
            workers=planned.workers,
            tile_elements=planned.tile_elements,
            known=known,
        )
        return values, writer.finish()


def write_within_budget(
    planned: Plan, folder: Path, options: Options
) -> tuple[Plan, dict[Node, Any], Summary, ChosenDensities]:
    """As `write_delta`, with the densities of a lock or those that the budget allows; the plan that has them, too.

    Sizes are tried out with the first q's, as calibrating is costly; only what is kept has its own. InputError: the
    budget is too small for any.
    """
    lock = options.lock
    made: list[tuple[Plan, dict[Node, Any], Summary]] = []
    first: list[Any] = []

    def attempt(densities: Mapping[str, float], own: bool) -> int:
        for file in folder.glob("delta*"):
            file.unlink()
        plan = set_aside(fit(planned, densities))
        if own or not first:
            known: Mapping[Node, Any] = lock.calibrated(plan) if lock else shared_values(plan.stages, {})
            first[:] = [known[node] for node in plan.stages]
        else:
            known = dict(zip(plan.stages, first, strict=False))
        with options.merging(plan) as told:
            values, written = write_delta(plan, folder, told, known)
        made[:] = [(plan, values, written)]
        return written.nbytes

    choice = search(planned, attempt) if lock is None else given(planned, lock.densities, attempt)
    return *made[0], choice


def base_of(checkpoint: Checkpoint) -> Base:
    """How an artifact names its base: the hub's id and commit, or the reference as written."""
    return Base(id=checkpoint.hub_id or checkpoint.reference, commit=checkpoint.revision)


def _delta(out: OutputTensor, info: TensorInfo | None) -> Node | None:
    """What makes the values to add; None where final values are stored."""
    same = info is not None and info.shape == out.shape
    return out.pieces[0].built.delta if same and len(out.pieces) == 1 else None


@dataclass(slots=True)
class _Target:
    """A tensor of the artifact; values to add are put in order before they are handed on."""

    tensor: TensorWriter
    dtype: str
    adds: bool
    size: int
    done: int = 0
    early: dict[int, tuple[int, Any, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, offset: int, data: Any) -> None:
        if not self.adds:
            self.tensor.write(offset // ITEMSIZE[self.dtype], data)
            return
        start, values = offset // 4, np.frombuffer(flat(data), np.float32)
        positions = np.flatnonzero(values)
        with self.lock:
            self.early[start] = start + values.size, positions + start, values[positions]
            while (ready := self.early.pop(self.done, None)) is not None:
                self.done = ready[0]
                self.tensor.add(ready[1], ready[2])
                if self.done == self.size:
                    self.tensor.finish()
                    return


@dataclass(frozen=True, slots=True)
class _Sink:
    """`progress` is told of bytes of the result, whatever is computed for them."""

    targets: Mapping[str, _Target]
    progress: Callable[[int], None]

    def write(self, name: str, offset: int, data: Any) -> None:
        if data.nbytes:
            target = self.targets[name]
            target.write(offset, data)
            self.progress(data.nbytes // 4 * ITEMSIZE[target.dtype] if target.adds else data.nbytes)
