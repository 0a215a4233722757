"""The weights of an output, however it is stored: shards of a model, a delta artifact, one that fits a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.devices import pinned
from deltamerge.engine.execute import execute, shared_values
from deltamerge.engine.tasks import on_gpu
from deltamerge.errors import InputError, OutputError, UsageError
from deltamerge.errors.shown import some
from deltamerge.files.descriptors import writing
from deltamerge.files.pieces import Pieces
from deltamerge.files.seals import Seal, seal
from deltamerge.files.work_folder import CALIBRATION, SPOOL, Workspace
from deltamerge.formats.audit import Findings, NonFinite
from deltamerge.formats.delta.writer import Summary
from deltamerge.formats.quantised.writer import CodedWriter, Losses
from deltamerge.formats.safetensors_writer import Writer
from deltamerge.outputs.budget import ChosenDensities, budget_of
from deltamerge.outputs.lora_file import LowRankSummary
from deltamerge.plan.finite import set_aside
from deltamerge.plan.memory import room
from deltamerge.plan.planner import Plan
from deltamerge.run.delta_output import write_delta, write_within_budget
from deltamerge.run.lock import Lock
from deltamerge.run.options import Options
from deltamerge.run.partition import Part, shared_calibration
from deltamerge.tensors.graph import Node, function_of
from deltamerge.tensors.reader import Reader

WORKERS_AN_OUTPUT_HASHER = 8  # threads that merge for each that hashes beside the first


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that are written: by which plan, the values of its shared nodes, hash and size of the files whose hash is
    known, what is not finite in them, what an artifact takes, the densities that fit a budget, the seals of the files
    as they were when they were hashed, what quantisation lost, and what a LoRA keeps."""

    plan: Plan
    values: Mapping[Node, Any]
    hashed: dict[str, Any] = field(default_factory=dict)
    nonfinite: Mapping[str, NonFinite] = field(default_factory=dict)
    delta: Summary | None = None
    choice: ChosenDensities | None = None
    seals: Mapping[str, Seal] = field(default_factory=dict)
    losses: Losses = field(default_factory=dict)
    lora: LowRankSummary | None = None


def make_weights(
    planned: Plan, work: Workspace, options: Options, part: Part | None, facts: Mapping[str, Any], pieces: Pieces
) -> Weights:
    """Write the weights of `planned`, or those of one `part` of its shards, to the work folder; `pieces` are told the
    hashes of what is read.

    What an interrupted run finished is kept, but for a budget, which tries sizes. Calibrated q's and the densities of a
    budget are those of the lock in `options`, if there is one.
    """
    if budget_of(planned) is not None:
        work.empty()
        planned, values, delta, choice = write_within_budget(planned, work.folder, options)
        return Weights(planned, values, {}, delta.nonfinite, delta, choice)
    if planned.recipe.output.lora:
        return _make_lora(planned, work, options, part, facts)
    made = _make(planned, work, options, part, facts, pieces)
    if part is not None:
        return made
    again = set_aside(planned, made.nonfinite)
    if again.tasks != planned.tasks:  # of large tensors what is not finite is seen only in the result
        work.empty()
        work.forget()
        made = _make(again, work, options, part, facts, pieces)
    return replace(made, plan=again)


def _make(
    planned: Plan, work: Workspace, options: Options, part: Part | None, facts: Mapping[str, Any], pieces: Pieces
) -> Weights:
    if planned.recipe.output.kind == "delta":
        work.empty()
        with _valued(planned, work, options, facts, alone=True) as values, options.merging(planned) as told:
            values, delta = write_delta(planned, work.folder, told, values, work.journal)
        return Weights(planned, values, {}, delta.nonfinite, delta)
    mine, alone = part.of(planned) if part else planned, part is None or part.index == 0
    with _valued(planned, work, options, facts, alone=alone) as values, options.merging(mine) as told:
        found, losses = _write_shards(mine, work, told, values, part, pieces)
    sizes = {file.name: file.size for file in planned.layout.files}
    hashed = {name: {"hash": digest, "size": sizes[name]} for name, digest in found.hashes.items()}
    seals = {name: seal(work.folder / name) for name in hashed}
    return Weights(planned, values, hashed, found.nonfinite, seals=seals, losses=losses)


def _make_lora(
    planned: Plan, work: Workspace, options: Options, part: Part | None, facts: Mapping[str, Any]
) -> Weights:
    from deltamerge.outputs.lora import write_lora

    if part is not None:
        raise UsageError("--part: a LoRA is one small file", hint="run it without --part")
    with _valued(planned, work, options, facts, alone=True) as values, options.merging(planned) as told:
        values, lora = write_lora(planned, work, values, told)
    seals = {name: seal(work.folder / name) for name in lora.hashed}
    return Weights(planned, values, lora.hashed, seals=seals, lora=lora)


@contextmanager
def _valued(
    planned: Plan, work: Workspace, options: Options, facts: Mapping[str, Any], *, alone: bool
) -> Iterator[dict[Node, Any]]:
    """What stages before the first tile find: what the method needs of the rows, and what is calibrated with it."""
    with _rows(planned, work) as rows:
        yield {**rows, **calibrated(planned, work, options.lock, facts, alone=alone, known=rows)}


@contextmanager
def _rows(planned: Plan, work: Workspace) -> Iterator[dict[Node, Any]]:
    """What the merge method needs of every model's rows, by its node; files of it lie in the work folder meanwhile."""
    if (node := planned.rows) is None:
        yield {}
        return
    folder = work.state / SPOOL
    with writing():
        folder.mkdir(exist_ok=True)
    known = shared_values(node.inputs, {})
    given = [known[source] for source in node.inputs]
    found = function_of(node.function)(*given, folder=folder, **dict(node.parameters))
    try:
        yield {**known, node: found}
    finally:
        found.remove()


def calibrated(
    planned: Plan,
    work: Workspace,
    lock: Lock | None,
    facts: Mapping[str, Any],
    *,
    alone: bool,
    known: Mapping[Node, Any],
) -> dict[Node, Any]:
    """The calibrated q's, and a mixture's routers: an interrupted run's own, or part 0's, or the
    lock's, or, if `alone`, found now and kept."""
    if not planned.chosen:
        return {}
    own = work.state / CALIBRATION
    if any("calibrated" in record for record in work.journal.records) or shared_calibration(work, facts):
        lock = Lock.read(own)
    if lock is not None:
        return dict(lock.calibrated(planned))
    if not alone:
        made, command = ("calibrates q", "calibrate") if planned.stages else ("makes routers", "lock")
        raise InputError(
            f"--part: the recipe {made}, which all parts must share",
            hint=f"run `deltamerge {command} RECIPE` once, then every part and --finish with --locked",
        )
    found = shared_values(planned.chosen, known)
    kept = Lock.of(own, planned, {}, found)
    kept.write_rows()
    kept.write()
    work.journal.append({"calibrated": True})
    return found


def check_finite(planned: Plan, nonfinite: Mapping[str, NonFinite], *, allow: bool) -> None:
    """OutputError naming the tensors that hold NaN or infinities, unless they are allowed."""
    if not nonfinite or allow:
        return
    dtypes = {output.name: output.dtype for output in planned.outputs}
    half = any(dtypes[name] == "F16" and count.inf for name, count in nonfinite.items())
    advice = "float16 ends at 65504, give `dtype: bfloat16`; or keep them" if half else "keep them"
    raise OutputError(describe_nonfinite(nonfinite), hint=f"{advice} with --allow-nonfinite")


def describe_nonfinite(nonfinite: Mapping[str, NonFinite]) -> str:
    """Which tensors hold how much that is not finite, in a line."""
    named = [f"{n} ({', '.join(f'{x} {k}' for k, x in (('NaN', c.nan), ('inf', c.inf)) if x)})"
             for n, c in sorted(nonfinite.items())]  # fmt: skip
    return f"values that are not finite in {some(named, 8)}"


def pinned_memory(planned: Plan) -> Callable[[int], NDArray[np.uint8]] | None:
    """What makes memory that a GPU writes to by itself; None: no tensor is computed on one."""
    return pinned if any(on_gpu(task, planned.device) for task in planned.tasks) else None


def _write_shards(
    planned: Plan,
    work: Workspace,
    progress: Callable[[int], None],
    known: dict[Node, Any],
    part: Part | None,
    pieces: Pieces,
) -> tuple[Findings, Losses]:
    files = part.files(planned.layout) if part else None
    with (
        Reader(pieces) as reader,
        Writer(
            work.folder, planned.layout, files=files, journal=work.journal,
            room=room(planned.workers, planned.options.memory), hashers=1 + planned.workers // WORKERS_AN_OUTPUT_HASHER,
            allocate=pinned_memory(planned),
        ) as writer,
    ):  # fmt: skip
        sink = CodedWriter(writer, planned.codings, reader, work.folder)
        execute(
            sorted(planned.tasks, key=lambda task: sink.where(task.name, task.offset)),
            reader,
            sink,
            device=planned.device,
            workers=planned.workers,
            tile_elements=planned.tile_elements,
            progress=progress,
            known=known,
            done=sink.has,
        )
        found = writer.finish(keep=part is not None)
        parts = {part.name for coding in planned.codings.values() for part in coding.parts}
        counts = {name: count for name, count in found.nonfinite.items() if name not in parts}
        return replace(found, nonfinite=counts), sink.losses()
