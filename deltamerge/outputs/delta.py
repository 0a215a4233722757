"""A delta artifact as output: the same tensors, stored as changes of the base."""

from __future__ import annotations

import math
import shlex
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge.engine.execute import execute, shared_values
from deltamerge.engine.worker import Task
from deltamerge.errors import InputError
from deltamerge.errors.shown import code
from deltamerge.files.descriptors import flat
from deltamerge.files.journal import Journal
from deltamerge.formats.delta.manifest import Base
from deltamerge.formats.delta.positions import CODINGS
from deltamerge.formats.delta.tensor_writer import BaseTensor, Spool, TensorWriter, is_related
from deltamerge.formats.delta.writer import ArtifactWriter, Summary
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.outputs.budget import Densities, budget_of, given, search
from deltamerge.outputs.output import Account, RunOutput, Weights, WriteJob
from deltamerge.outputs.shares import HEADERS, NEAR, SPARE, TRIES, ByteShares, bytes_of, refused, shared_outputs
from deltamerge.plan.finite import set_aside
from deltamerge.plan.memory import Memory
from deltamerge.plan.outputs import OutputTensor
from deltamerge.plan.planner import Plan, fit
from deltamerge.recipe.output_keys import Output
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.reader import Reader, elements
from deltamerge.tensors.tensor import Node, TensorInfo


class DeltaOutput(RunOutput):
    """A folder with the changes of a base, which `deltamerge apply` puts on it."""

    def memory(
        self, wanted: Output, tensors: tuple[OutputTensor, ...], workers: int, cap: int | None, *, weighed: bool
    ) -> Memory:
        """Return the memory of positions, and of values to be coded, of the tensors that are open."""
        largest = sorted((t.elements * (0.125 + 4 * t.pieces[0].built.changed) for t in tensors), reverse=True)
        return Memory({"output": math.ceil(sum(largest[: workers + 1]))})

    def describe(self, plan: Plan) -> dict[str, Any]:
        """Return the coding of values, and an estimate of their bytes, for `plan --json`."""
        sizes = {output.name: output.delta_bytes(plan.delta_values) for output in plan.outputs}
        how = {"semantics": "add" if plan.delta_values else "replace", "values": plan.delta_values}
        if (nbytes := bytes_of(plan)) is not None:
            how["values"], whole = "parts", max(1, sum(sizes.values()))
            sizes = {name: size * nbytes // whole for name, size in sizes.items()}
        return {"delta": how | {"estimated_bytes": sum(sizes.values()), "estimated_tensor_bytes": sizes}}

    def expected_bytes(self, plan: Plan) -> int:
        """Return about the bytes of the artifact."""
        return bytes_of(plan) or sum(output.delta_bytes(plan.delta_values) for output in plan.outputs)

    def budget(self, plan: Plan) -> int | None:
        """Return the bytes that the recipe allows, if it gives bytes instead of a density."""
        return budget_of(plan)

    def write(self, plan: Plan, job: WriteJob) -> Weights:
        """Write the artifact. Tensors in the journal are not made again."""
        job.work.empty()
        with job.values(plan) as known, job.merging(plan) as progress:
            values, summary = write_delta(plan, job.work.folder, progress, known, job.work.journal)
        return Weights(plan, values, nonfinite=summary.nonfinite, account=DeltaAccount(summary))

    def settle(self, plan: Plan, job: WriteJob) -> Weights:
        """Write the artifact. With a budget, it fits the budget."""
        if bytes_of(plan) is not None:
            return write_shares(plan, job)
        return super().settle(plan, job) if budget_of(plan) is None else write_within_budget(plan, job)

    def belongs(self, plan: Plan, weights: Weights, name: str) -> bool:
        """Return True: the work folder was empty before the artifact was written."""
        return True

    def load_line(self, plan: Plan, folder: Path) -> str:
        """Return the command that applies it to its base."""
        assert plan.inputs.origin is not None
        names = (shlex.quote(str(name)) for name in (folder, plan.inputs.origin.checkpoint.base_reference))
        return "deltamerge apply {} --base {} --out DIR".format(*names)

    def front_matter(self, plan: Plan) -> dict[str, object]:
        """Return the library that reads it."""
        return {"library_name": "deltamerge"}


OUTPUT = DeltaOutput()


@dataclass(frozen=True)
class DeltaAccount(Account):
    """The summary of an artifact, and the densities that fit its budget."""

    delta: Summary
    densities: Densities | None = None

    def describe(self) -> dict[str, Any]:
        """Return the densities, for the lock."""
        return {} if self.densities is None else {"densities": self.densities.densities}

    def card(self, plan: Plan) -> list[str]:
        """Return a section on the artifact's content, the loss of its coding, and its use."""
        origin, delta = plan.inputs.origin, self.delta
        assert origin is not None
        holds = "Final values of what differs from the base: applying it is exact."
        if plan.delta_values:
            lost = f"; relative error ‖v − stored‖ / ‖v‖ = {delta.error:.3g}" if delta.error else ", exact"
            holds = f"Values to add to the base, stored as {plan.delta_values}{lost}."
        fitted: list[str] = []
        if self.densities is not None:
            p, error = sorted(self.densities.densities.values()) or [1.0], self.densities.error
            lost = "" if error is None else f"; predicted ‖lost‖ / ‖Δ‖ = {error:.3g}"
            fitted = [f"Densities from {p[0]:.3g} to {p[-1]:.3g}, for a budget of {budget_of(plan):,} bytes{lost}.", ""]
        name = origin.checkpoint.hub_id or origin.name
        return [
            "## Delta artifact",
            "",
            f"{holds} {delta.entries:,} entries, {delta.nbytes:,} bytes.",
            "",
            *fitted,
            f"{code(f'deltamerge apply . --base {name} --out DIR')} writes the whole checkpoint; a recipe may name "
            f"this folder as a model beside {code(f'base_model: {name}')}.",
            "",
        ]


def write_delta(
    planned: Plan,
    folder: Path,
    progress: Callable[[int], None],
    known: Mapping[Node, Any],
    journal: Journal | None = None,
    sharing: ByteShares | None = None,
) -> tuple[dict[Node, Any], Summary]:
    """Execute `planned` and leave its delta in `folder`; return the values of shared nodes, and the summary.

    Tensors in the journal, whose entries are in `folder`, are not made again. Tensors that share bytes get parts.
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
        ArtifactWriter(
            folder,
            base_of(origin.checkpoint),
            shard_size=output.shard_size,
            removed=removed,
            **options,
        ) as writer,
    ):
        tasks, targets, shared = [], {}, dict[str, TensorWriter]()
        for out in planned.outputs:
            info = infos.get(out.name)
            base = None if info is None else BaseTensor(info.name, info.dtype, info.shape, elements(reader, info))
            tensor = writer.tensor(out.name, out.dtype, out.shape, base)
            if tensor.is_done and out.elements:
                progress(out.nbytes)
                continue
            if sharing is not None and out.name in sharing.outputs:
                shared[out.name] = tensor
                continue
            delta = _delta(out, info)
            targets[out.name] = _OpenTensor(tensor, out.dtype, delta is not None, out.elements)
            if delta is not None:
                tasks.append(Task(out.name, delta, out.pieces[0].backend))
                if not out.elements:
                    tensor.finish()
            else:
                tasks += [Task(out.name, p.built.root, p.backend, p.offset) for p in out.pieces]
        values = execute(
            tasks,
            reader,
            _DeltaSink(targets, progress),
            device=planned.device,
            workers=planned.workers,
            tile_elements=planned.tile_elements,
            known=known,
        )
        if sharing is not None:
            values |= sharing.run([*shared], lambda name, d: shared[name].add_parts(*sharing.parts(name, d)), progress)
        return values, writer.finish()


def write_shares(planned: Plan, job: WriteJob) -> Weights:
    """Write the artifact of values to add with distributed bytes. InputError: the bytes are too few."""
    nbytes = bytes_of(planned)
    assert nbytes is not None
    outputs, rest = shared_outputs(planned)
    kept = job.choices.learned if job.choices is not None else None
    job.work.empty()
    sharing = ByteShares(planned, Spool(job.work.folder, job.work.journal), outputs, nbytes)
    done = False
    try:
        with job.values(planned) as known:
            sharing.known = known
            with job.merging(planned) as progress:
                sharing.measure(progress)

            def write(room: float) -> tuple[dict[Node, Any], Summary]:
                sharing.choose(room)
                for file in job.work.folder.glob("delta*"):
                    file.unlink()
                with job.merging(planned) as progress:
                    return write_delta(planned, job.work.folder, progress, known, sharing=sharing)

            def fit(most: int, room: float) -> tuple[dict[Node, Any], Summary, float]:
                fitting = room
                best, sizes = 0, list[int]()
                for _ in range(TRIES):
                    values, summary = write(room)
                    sizes += summary.nbytes - sharing.part_bytes, summary.nbytes
                    if best < summary.nbytes <= most:
                        best, fitting = summary.nbytes, room
                    if best >= NEAR * most or (best and sharing.is_whole):
                        break
                    room += 0.997 * most - summary.nbytes
                    if room < 0:
                        break
                if not best:
                    raise refused(planned, nbytes, min((s for s in sizes if s > nbytes), default=nbytes + SPARE))
                if summary.nbytes != best:
                    values, summary = write(fitting)
                return values, summary, fitting

            room = max(nbytes / 2, nbytes - HEADERS - rest)  # the rest may be less: a head that is the base's
            values, summary, room = fit(nbytes, room)
            if sharing.learns:
                plain = sharing.parts_in(job.work.folder) if kept is None else {}
                sharing.expect_learning(learned=True)
                values, summary, fitting = fit(nbytes - SPARE, room - SPARE)
                if kept is None:
                    sharing.learn(job.work.folder, plain)
                else:
                    sharing.restore(kept)
                if sharing.has_learned:
                    values, summary = write(fitting)
                if not sharing.has_learned or summary.nbytes > nbytes:  # records of learned codes may take more
                    sharing.stop_learning()
                    values, summary, _ = fit(nbytes, room)
        done = True
    except InputError:
        job.work.forget()
        done = True
        raise
    finally:
        sharing.spool.close(done=done)
    account = sharing.account(summary)
    return Weights(planned, values, nonfinite=summary.nonfinite, account=account)


def write_within_budget(planned: Plan, job: WriteJob) -> Weights:
    """Write the artifact with the densities of a lock, or with densities that the budget allows.

    Sizes are tried with the first q's, because calibration is slow; only the result gets its own q's. InputError: the
    budget is too small for any densities.
    """
    choices, work = job.choices, job.work
    work.empty()
    made: list[Weights] = []
    first: list[Any] = []

    def attempt(densities: Mapping[str, float], own: bool) -> int:
        for file in work.folder.glob("delta*"):
            file.unlink()
        plan = set_aside(fit(planned, densities))
        if own or not first:
            known: Mapping[Node, Any] = choices.calibrated(plan) if choices else shared_values(plan.stages, {})
            first[:] = [known[node] for node in plan.stages]
        else:
            known = dict(zip(plan.stages, first, strict=False))
        with job.merging(plan) as progress:
            values, summary = write_delta(plan, work.folder, progress, known)
        made[:] = [Weights(plan, values, nonfinite=summary.nonfinite, account=DeltaAccount(summary))]
        return summary.nbytes

    found = given(planned, choices.densities, attempt) if choices else search(planned, attempt)
    (weights,) = made
    assert weights.account.delta is not None
    return replace(weights, account=DeltaAccount(weights.account.delta, found))


def base_of(checkpoint: Checkpoint) -> Base:
    """Return the base as an artifact names it: the hub's id and commit, or the reference as written."""
    return Base(id=checkpoint.hub_id or checkpoint.reference, commit=checkpoint.revision)


def _delta(out: OutputTensor, info: TensorInfo | None) -> Node | None:
    """Return the node of the values to add. None: final values are stored."""
    same = info is not None and info.shape == out.shape
    return out.pieces[0].built.delta if same and len(out.pieces) == 1 else None


@dataclass(slots=True)
class _OpenTensor:
    """A tensor of the artifact. Values to add are put in order before they are passed on."""

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
class _DeltaSink:
    """A sink of the artifact. `progress` gets the bytes of the result, independent of the bytes computed for them."""

    targets: Mapping[str, _OpenTensor]
    progress: Callable[[int], None]

    def write(self, name: str, offset: int, data: Any) -> None:
        if data.nbytes:
            target = self.targets[name]
            target.write(offset, data)
            self.progress(data.nbytes // 4 * ITEMSIZE[target.dtype] if target.adds else data.nbytes)
