"""A LoRA as output: deltas are collected one by one and factored at once, and only factors are kept.

A finished weight's factors lie in the work folder until all ranks are known; with the journal they survive a crash.
Changed tensors without factors are stored whole, as the recipe says.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.calibrate.merge.second_moments import measure
from deltamerge.engine.backends import single_threaded
from deltamerge.engine.execute import execute
from deltamerge.engine.worker import Task
from deltamerge.errors import InputError
from deltamerge.errors.shown import plain
from deltamerge.files.descriptors import flat, writing
from deltamerge.files.hashes import seal
from deltamerge.files.work_folder import Workspace
from deltamerge.formats.components import Component
from deltamerge.formats.delta.tensor_writer import Spool
from deltamerge.formats.peft.adapter import CONFIG
from deltamerge.formats.safetensors import Writer, plan_layout, read_header
from deltamerge.methods.low_rank import Array, Factors, Wanted, factor, factor_product, scratch_bytes
from deltamerge.methods.prune.bits import mask_key
from deltamerge.methods.rate import HELD
from deltamerge.outputs.adapter import AdapterOutput, ModelModules
from deltamerge.outputs.assets import Files
from deltamerge.outputs.assets import config as output_config
from deltamerge.outputs.collected import Collector
from deltamerge.outputs.lora_file import (
    REST,
    FactorFile,
    FactorTarget,
    affordable,
    finish,
    is_matrix,
    sides,
    stored_dtype,
)
from deltamerge.outputs.output import Account, LowRankSummary, Weights, WriteJob
from deltamerge.plan.memory import Memory
from deltamerge.plan.outputs import OutputTensor
from deltamerge.plan.planner import Plan
from deltamerge.recipe.output_keys import Output
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.patterns import finds
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node, TensorInfo
from deltamerge.tensors.views import flat_rows, floats

WIDER = 4  # largest rank to factor a weight for, as a multiple of the rank that a budget affords everywhere
LEAST = 16
MOMENTS = 10**6  # the number of the first of their files in the spool
TORCH = 170_000_000  # bytes of torch and transformers, which build the modules, beside the compiled loops
UNKNOWN = 256  # the assumed rank, if an energy or a budget chooses it later


class LoraOutput(AdapterOutput):
    """A folder with the factors of merged deltas, as PEFT stores a LoRA."""

    def memory(
        self, wanted: Output, tensors: tuple[OutputTensor, ...], workers: int, cap: int | None, *, weighed: bool
    ) -> Memory:
        """Return the memory of collecting deltas, of factoring them, and of files."""
        shapes = [sides(tensor.shape) for tensor in tensors if is_matrix(tensor)]
        sizes = sorted((4 * m * n if 4 * m * n <= HELD else 0 for m, n in shapes), reverse=True)
        rank = wanted.rank or UNKNOWN
        scratch = max((scratch_bytes(m, n, rank, moments=weighed) for m, n in shapes), default=0)
        files = super().memory(wanted, tensors, workers, cap, weighed=weighed)
        return files + Memory({"factors": TORCH + sum(sizes[: workers + 1]) + workers * scratch})

    def notes(self, wanted: Output, *, weighed: bool) -> Iterator[str]:
        """Yield a line on its size, and on the choice of ranks."""
        size = f"rank {wanted.rank}"
        if wanted.budget is not None:
            size = f"{wanted.budget} bytes" + (f", rank {wanted.rank} at most" if wanted.rank else "")
        elif wanted.energy is not None:
            size = f"{wanted.energy:g} of each delta" + (f", rank {wanted.rank} at most" if wanted.rank else "")
        how = "weighed by the inputs of calibration" if weighed else "by their entries"
        yield f"merged deltas are written as a LoRA: {size}, {how}"

    def write(self, plan: Plan, job: WriteJob) -> Weights:
        """Write the adapter and its config. Factors in the journal are not made again."""
        with job.values(plan) as known, job.merging(plan) as progress:
            values, lora = write_lora(plan, job.work, known, progress)
        seals = {name: seal(job.work.folder / name) for name in lora.hashed}
        return Weights(plan, values, lora.hashed, seals=seals, account=LoraAccount(lora))

    def settle(self, plan: Plan, job: WriteJob) -> Weights:
        """Write the adapter. A delta that is not finite is refused when it is factored."""
        return self.write(plan, job)

    def belongs(self, plan: Plan, weights: Weights, name: str) -> bool:
        """Return whether a file of the work folder is part of the adapter, or its config."""
        return name == CONFIG or super().belongs(plan, weights, name)

    def finish(self, plan: Plan, folder: Path, weights: Weights, files: Files) -> tuple[Weights, tuple[str, ...]]:
        """Return the notes. The adapter is already complete."""
        assert weights.account.lora is not None
        return weights, weights.account.lora.notes


OUTPUT = LoraOutput()


@dataclass(frozen=True)
class LoraAccount(Account):
    """The part of each weight's delta that a LoRA keeps."""

    lora: LowRankSummary

    def describe(self) -> dict[str, Any]:
        """Return the kept parts, for the lock."""
        return {"lora": self.lora.describe()}

    def table(self) -> list[str]:
        """Return a table of the kept parts by weight."""
        lora, weighed = self.lora, self.lora.output is not None
        also = "" if lora.output is None else f", {lora.output:.4g} of the change of the layers' outputs"
        head = "| weight | rank | kept of the delta |" + (" of the outputs |" if weighed else "")
        rows = [
            f"| {plain(name)} | {one.rank} | {one.energy:.4g} |" + (f" {_share(one.output)} |" if weighed else "")
            for name, one in lora.layers.items()
        ]
        said = f"{lora.nbytes:,} bytes keep {lora.energy:.4g} of the deltas' squares{also}."
        return ["## LoRA", "", said, "", head, "|---|---|---|" + "---|" * weighed, *rows, ""]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def write_lora(
    planned: Plan, work: Workspace, known: Mapping[Node, Any], progress: Callable[[int], None]
) -> tuple[dict[Node, Any], LowRankSummary]:
    """Execute `planned` and leave adapter_model.safetensors in the work folder. Return shared values and the summary.

    InputError: a delta is not finite, no weight changed, experts are in one tensor, or the budget is too small.
    """
    (work.folder / REST).unlink(missing_ok=True)
    with errors.context("output.kind: peft"):
        modules = ModelModules.of(output_config(planned), {out.name: out for out in planned.outputs}, parts=True)
        targets = _targets(planned, modules)
    bases = _bases(planned)
    rest, copied = list[OutputTensor](), list[OutputTensor]()
    for out in planned.outputs:
        if out.name not in targets:
            (copied if _is_copied(out, bases.get(out.name)) else rest).append(out)
    spool = Spool(work.folder, work.journal)
    done = False
    try:
        with Reader() as reader, single_threaded({"torch"}), _rest(work.folder, rest) as writer:
            sink = _FactorSink(planned, bases, reader, spool, targets, writer, progress)
            left = sink.unfinished()
            sink.measure({target.output.name for target in left})
            values = _factor(planned, sink, left, rest, reader, known)
            if writer is not None:
                writer.finish()
        progress(sum(out.nbytes for out in copied))
        results = read_header(work.folder / REST).tensors if rest else {}
        summary = finish(planned, work.folder, modules, sink.made, results)
        done = True
        return values, summary
    except InputError:  # the remedy is another recipe, whose run would not continue this work
        work.forget()
        done = True
        raise
    finally:
        (work.folder / REST).unlink(missing_ok=True)
        spool.close(done=done)


def _targets(planned: Plan, modules: ModelModules) -> dict[str, FactorTarget]:
    """Return the weights that get factors, by their names in the output. InputError: a pattern finds none."""
    wanted, by_stored = planned.recipe.output, {stored: name for name, stored in modules.stored.items()}
    found: dict[str, FactorTarget] = {}
    used: set[str] = set()
    adaptable = modules.linear | modules.turned | modules.convolved
    for number, out in enumerate(planned.outputs):
        state = by_stored.get(out.name, "")
        module = state.removesuffix(".weight")
        if not state.endswith(".weight") or module not in adaptable or state in modules.tied or not is_matrix(out):
            continue
        named = {pattern for pattern in wanted.targets or () if finds(pattern, out.name)}
        used |= named
        if named or (wanted.targets is None and module not in modules.heads):
            found[out.name] = FactorTarget(out, module, module in modules.turned, number)
    if unused := sorted(set(wanted.targets or ()) - used):
        hint = "patterns are searched in names such as model.layers.0.mlp.up_proj.weight"
        raise InputError(f"output.targets: {unused[0]!r} finds no weight that can have factors", hint=hint)
    return found


def _bases(planned: Plan) -> dict[str, TensorInfo]:
    """Return the base's own tensors, by the names of the output's."""
    base, canonical = planned.inputs.base, planned.inputs.canonical
    assert base is not None
    names = [out.name for out in planned.outputs]
    return {name: info for name in names if (info := base.get(canonical.get(name, name))) is not None}


def _is_copied(out: OutputTensor, info: TensorInfo | None) -> bool:
    """Return whether a tensor is copied from the base's tensor `info`."""
    root = out.pieces[0].built.root
    return info is not None and root.is_source and root.is_same(info)


@contextmanager
def _rest(folder: Path, rest: list[OutputTensor]) -> Iterator[Writer | None]:
    """Open the writer of tensors without factors, which are compared with the base's."""
    if not rest:
        yield None
        return
    metas = [(out.name, out.dtype, out.shape) for out in rest]
    with Writer(folder, plan_layout(metas, None, (Component(stem=REST.partition(".")[0]),))) as writer:
        yield writer


def _factor(
    planned: Plan,
    sink: _FactorSink,
    left: list[FactorTarget],
    rest: list[OutputTensor],
    reader: Reader,
    known: Mapping[Node, Any],
) -> dict[Node, Any]:
    """Factor all remaining targets, sums of adapters from their own factors, and make the tensors without factors."""
    dora = planned.recipe.output.dora
    sums = [target for target in left if target.output.pieces[0].built.updates and not dora]
    with ThreadPoolExecutor(planned.workers) as pool:
        list(pool.map(sink.factor_sum, sums))
    tasks = []
    for target in left:
        built = target.output.pieces[0].built
        assert built.delta is not None
        if target not in sums:
            tasks.append(Task(target.output.name, built.delta, target.output.pieces[0].backend))
    tasks += [Task(out.name, piece.built.root, piece.backend, piece.offset) for out in rest for piece in out.pieces]
    return execute(
        tasks,
        reader,
        sink,
        device=planned.device,
        workers=planned.workers,
        tile_elements=planned.tile_elements,
        known=known,
    )


@dataclass(eq=False)
class _FactorSink:
    """Collects deltas, and factors each when its last tile arrives, in the thread that brought it."""

    planned: Plan
    bases: Mapping[str, TensorInfo]
    reader: Reader
    spool: Spool
    targets: Mapping[str, FactorTarget]
    writer: Writer | None
    progress: Callable[[int], None]
    made: dict[str, FactorFile] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    moments: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Collect the targets' deltas."""
        shapes = {name: target.shape for name, target in self.targets.items()}
        self.collector = Collector(shapes, self.spool.folder, self._factor)

    def unfinished(self) -> list[FactorTarget]:
        """Return the targets that an interrupted run did not finish, and take over the finished targets."""
        left = []
        for name, target in self.targets.items():
            path, state = self._path(target.number), self.spool.kept(name)
            rows, columns = target.sides
            extra = rows if self.planned.recipe.output.dora else 0
            if state is not None:
                made = FactorFile(target, path, state)
                if path.is_file() and path.stat().st_size == 4 * (made.rank * (rows + columns) + extra):
                    self.made[name] = made
                    self.progress(target.output.nbytes)
                    continue
            left.append(target)
        return left

    def measure(self, names: set[str]) -> None:
        """Measure the second moments of the inputs of these tensors' layers, the mean over all fine-tunes."""
        measured = self.planned.measured if names else ()
        counts: dict[str, int] = {}
        for one in measured:
            by_stored = {stored: name for name, stored in one.names.items() if name in names}

            def keep(stored: str, c: Array, by_stored: Mapping[str, str] = by_stored) -> None:
                name = by_stored[stored]
                path = self._path(MOMENTS + self.targets[name].number)
                before = counts.get(name, 0)
                if before:
                    c = c + np.fromfile(path, np.float64).reshape(c.shape)
                counts[name] = before + 1
                with writing():
                    c.tofile(path)
                self.moments[name] = path

            measure(one, set(by_stored), keep)

    def write(self, name: str, offset: int, data: Any) -> None:
        if name in self.targets:
            self.collector.write(name, offset, data)
            return
        assert self.writer is not None
        self.writer.write(name, offset, data)
        self.progress(len(flat(data)))

    def factor_sum(self, target: FactorTarget) -> None:
        """Factor a sum of adapters' updates, whose factors are concatenated."""
        left, right = [], []
        for coefficient, update in target.output.pieces[0].built.updates:
            a, b = (flat_rows(self.reader, factor) for factor in update.inputs[1:3])
            left.append(b.astype(np.float64) * (coefficient * update.parameter("scale")))
            right.append(a)
        b, a = np.concatenate(left, axis=1), np.concatenate(right)
        self._keep(target, lambda wanted, c: factor_product(b, a, wanted, c), None)

    def _factor(self, name: str, matrix: Array) -> None:
        target = self.targets[name]
        delta = np.ascontiguousarray(matrix.T) if target.turned else matrix
        key = mask_key(self.planned.recipe.seed, "lora", target.output.name)
        lengths = self._lengths(target, delta) if self.planned.recipe.output.dora else None
        self._keep(target, lambda wanted, c: factor(delta, wanted, key, c), lengths)

    def _keep(
        self, target: FactorTarget, made: Callable[[Wanted, Array | None], Factors], lengths: Array | None
    ) -> None:
        name, columns = target.output.name, target.sides[1]
        c = np.fromfile(self.moments[name], np.float64).reshape(columns, columns) if name in self.moments else None
        try:
            found = made(self._wanted, c)
        except ValueError:
            with errors.context(f"tensor {name}"):
                hint = "repair the fine-tune; targets leaves weights out"
                raise InputError("its delta is not finite", hint=hint) from None
        path = self._path(target.number)
        with writing(), path.open("wb") as file:
            for part in (found.b.T, found.a, lengths):
                if part is not None:
                    file.write(np.ascontiguousarray(part, np.float32).tobytes())
        if name in self.moments:
            self.moments[name].unlink(missing_ok=True)
        state = {
            "energies": found.energies.tolist(), "gains": found.gains.tolist(), "energy": found.energy,
            "gain": found.gain, "missed": found.missed, "weighed": c is not None,
        }  # fmt: skip
        with self.lock:
            self.made[name] = FactorFile(target, path, state)
        self.spool.finished(name, path, state)
        self.progress(target.output.nbytes)

    def _lengths(self, target: FactorTarget, delta: Array) -> Array:
        """Return ‖W + Δ‖ of every output, which DoRA stores beside the factors."""
        info = self.bases[target.output.name]
        weight = floats(self.reader, info, 0, math.prod(info.shape)).reshape(target.shape)
        total = (weight.T if target.turned else weight) + delta
        return np.asarray(np.sqrt(np.square(total, dtype=np.float64).sum(axis=1)), np.float32)

    @cached_property
    def _wanted(self) -> Wanted:
        output = self.planned.recipe.output
        if output.budget is None:
            return Wanted(output.rank, output.energy)
        size = ITEMSIZE[stored_dtype(self.planned)]
        prices = {name: size * sum(target.sides) for name, target in self.targets.items()}
        most = max(LEAST, WIDER * affordable(prices, output.budget))
        return Wanted(min(most, output.rank or most))

    def _path(self, number: int) -> Path:
        return self.spool.folder / f"{number:07d}"
