"""The plan of a recipe, made from headers: every output tensor, the place of its bytes, passes and peak memory."""

from __future__ import annotations

import importlib
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from deltamerge import errors
from deltamerge.engine.devices import AUTO
from deltamerge.engine.worker import Task
from deltamerge.errors import InputError
from deltamerge.errors.shown import as_html, human, shown, some
from deltamerge.formats.audit import NonFinite
from deltamerge.formats.safetensors import Layout
from deltamerge.models.tokenizer_files import check_copied
from deltamerge.plan.delta_graph import Stages
from deltamerge.plan.inputs import Inputs, Opener, open_inputs, own_weights, remarks
from deltamerge.plan.kinship import heads_apart, strangers, swapped
from deltamerge.plan.memory import (
    Cost,
    Memory,
    check_size,
    cost,
    held_coded,
    held_rounding,
    largest,
    tiles,
)
from deltamerge.plan.output_config import OutputConfig, adapter_warnings
from deltamerge.plan.outputs import AppOutputs, Mixture, Outputs, OutputTensor, Row, mixture_outputs
from deltamerge.plan.stack import Stack
from deltamerge.plan.tensor_graph import Builder
from deltamerge.plan.tokenizer_differences import Differences, compare_tokenizers, rows_merged
from deltamerge.plan.vocabulary import ChatTemplate, Vocabulary, choose_chat_template, edit_config, make_vocabulary
from deltamerge.recipe import checks, prune
from deltamerge.recipe.output_keys import Output
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.names import numbered_blocks
from deltamerge.tensors.tensor import Node, TensorInfo
from deltamerge.tensors.traits import traits_of

if TYPE_CHECKING:
    from deltamerge.calibrate.merge.second_moments import InputMeasurement
    from deltamerge.calibrate.spec import CalibrationInput, Spec
    from deltamerge.formats.components import RunningSum
    from deltamerge.formats.peft.adapter import Adapter
    from deltamerge.formats.quantised.coder import Coding

SHOWN_PROBLEMS = 8
PRUNED_ADAPTER = "adapter"

Stored: TypeAlias = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """How a plan is to be run.

    device   where tiles are computed: cpu, cuda, cuda:N, cuda:N,M, cuda:all, or auto: a GPU for work that it does
             faster
    workers  threads
    fewer    whether fewer threads are taken where so many need more than `memory`
    memory   a cap in bytes; None: none
    data     whether the rows of calibrations are read, to check them
    whole    whether hub models are present with their weights, not only their headers
    """

    device: str = "cpu"
    workers: int = 1
    fewer: bool = False
    memory: int | None = None
    data: bool = True
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Budgeted:
    """A tensor of `size` elements whose density a budget decides: the fine-tune's and the base's tensor."""

    name: str
    size: int
    tune: TensorInfo
    base: TensorInfo


class OutputKind(Protocol):
    """A kind of output for a plan: its layout, the memory of its sink, and its notes.

    It is the object `OUTPUT` of a file of `outputs`, which is imported when a recipe names the kind.
    """

    def refuse(self, inputs: Inputs) -> None:
        """Raise InputError if these models cannot have such an output."""

    def layout(self, tensors: Sequence[Stored], wanted: Output, inputs: Inputs, weights: Mapping[str, str]) -> Layout:
        """Return the files of the output. `weights` maps the parts of a coded weight to its name."""

    def memory(
        self, wanted: Output, tensors: tuple[OutputTensor, ...], workers: int, cap: int | None, *, weighed: bool
    ) -> Memory:
        """Return the memory that the sink holds. `weighed`: deltas are weighed by the inputs of calibration."""

    def notes(self, wanted: Output, *, weighed: bool) -> Iterator[str]:
        """Yield a plan's lines on how the output is made."""

    def describe(self, plan: Plan) -> dict[str, Any]:
        """Return the keys that only this kind adds to `deltamerge plan --json`."""


def output_kind(wanted: Output, *, own_weights: bool = False) -> OutputKind:
    """Return the recipe's kind of output. `own_weights`: an adapter's own A and B are pruned."""
    found: OutputKind = importlib.import_module(
        f"deltamerge.outputs.{PRUNED_ADAPTER if own_weights else wanted.form}"
    ).OUTPUT
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a run does, as plain data; made without reading a weight.

    Relative references of the recipe start at `folder`. `left_plain` names weights that could not be quantised as
    asked; it is also one of the `notes`. `settled` has the keys of config.json in which the models differ, and the
    sources of the written values. `alike` counts, by tensor, infinities and NaNs that all models hold alike. A run
    finds them, and keeps them out of arithmetic.
    """

    recipe: Recipe
    inputs: Inputs
    folder: Path
    options: PlanOptions
    outputs: tuple[OutputTensor, ...]
    layout: Layout
    notes: tuple[str, ...]
    tile_elements: int
    memory: Memory
    costs: Mapping[Node, Cost]
    stages: tuple[Node, ...] = ()
    sources: tuple[CalibrationInput, ...] = ()
    budgeted: tuple[Budgeted, ...] = ()
    weighing: Node | None = None
    measured: tuple[InputMeasurement, ...] = ()
    rows: Node | None = None
    moments: Node | None = None
    cut_bytes: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    left_plain: tuple[str, ...] = ()
    pruned_adapter: Adapter | None = None
    vocabulary: Vocabulary | None = None
    chat_template: ChatTemplate | None = None
    warnings: tuple[str, ...] = ()
    alike: Mapping[str, NonFinite] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    mixture: Mixture | None = None
    running_sum: RunningSum | None = None
    settled: OutputConfig = field(default_factory=lambda: OutputConfig({}))

    def __repr__(self) -> str:
        models = some([f"{name}" for name in self.inputs.names])
        base = f" on {self.inputs.base.name}" if self.inputs.base is not None else ""
        size = f"{len(self.outputs)} tensors, {human(self.nbytes)}, peak memory {human(self.peak_bytes)}"
        return shown(f"<Plan: {self.recipe.method.name} of {models}{base}; {size}>")

    def _repr_html_(self) -> str:
        return as_html(f"Plan: {self.recipe.method.name}", self.summary())

    def summary(self) -> dict[str, str]:
        """Return the plan in a few labelled lines."""
        files = len(self.layout.files)
        return {
            **({"base": self.inputs.base.name} if self.inputs.base is not None else {}),
            "models": some(self.inputs.names),
            "output": f"{len(self.outputs)} tensors, {human(self.nbytes)} in {files} file{'s' * (files != 1)}",
            "reads": human(self.read_bytes),
            "peak memory": human(self.peak_bytes),
            "device": f"{self.device}, {self.workers} threads",
            **({"warnings": "; ".join(self.warnings)} if self.warnings else {}),
            **({"notes": str(len(self.notes))} if self.notes else {}),
        }

    @property
    def device(self) -> str:
        """Where tiles are computed: cpu, GPUs, or auto, some on a GPU."""
        return self.options.device

    @property
    def workers(self) -> int:
        """Threads that compute them."""
        return self.options.workers

    @property
    def peak_bytes(self) -> int:
        """Return the bytes of anonymous memory at the peak."""
        return self.memory.total

    @property
    def remarks(self) -> tuple[str, ...]:
        """All messages about the plan, first `warnings` that a model may be the wrong one."""
        return (*self.warnings, *self.notes)

    @property
    def specs(self) -> dict[Node, Spec]:
        """The specification of each calibration stage."""
        return {node: node.parameter("spec") for node in self.stages}

    @property
    def chosen(self) -> tuple[Node, ...]:
        """The nodes whose values a lock keeps: calibration stages, and the routers of a mixture."""
        return self.stages if self.mixture is None else (*self.stages, self.mixture.routers)

    @property
    def tasks(self) -> list[Task]:
        """The engine's tasks: every piece of every output tensor."""
        return [
            Task(output.name, piece.built.root, piece.backend, piece.offset)
            for output in self.outputs
            for piece in output.pieces
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def made_bytes(self) -> int:
        """Return the total of the progress bar in bytes. Quantised outputs count 4 bytes an element, before
        quantisation."""
        return sum(4 * output.elements if output.coding is not None else output.nbytes for output in self.outputs)

    @property
    def codings(self) -> dict[str, Coding]:
        """How the output's coded weights are stored."""
        return {output.name: output.coding for output in self.outputs if output.coding is not None}

    @property
    def delta_values(self) -> str | None:
        """The coding of the values that a delta artifact adds; None: it holds final values."""
        return (self.recipe.output.values or "bfloat16") if self.recipe.output.adds else None

    @property
    def read_bytes(self) -> int:
        """Bytes read from the inputs in all passes, without the reads of calibration."""
        pieces = (piece for output in self.outputs for piece in output.pieces)
        return self.cut_bytes + sum(self.costs[piece.built.root].read_bytes for piece in pieces)

    @property
    def operations(self) -> float:
        """Floating-point operations on whole matrices, about."""
        vocabulary = 0.0 if self.vocabulary is None else self.vocabulary.operations
        roots = (piece.built.root for output in self.outputs for piece in output.pieces)
        return vocabulary + sum(self.costs[root].operations for root in roots)

    def describe(self) -> dict[str, Any]:
        """Return the plan as `deltamerge plan --json` prints it (docs/reference/json.md); its form is stable."""
        return {
            "merge_method": self.recipe.method.name,
            "base_model": self.inputs.base.name if self.inputs.base else None,
            "models": list(self.inputs.names),
            "template": self.inputs.template.name,
            "device": self.device,
            "workers": self.workers,
            "tile_elements": self.tile_elements,
            "peak_bytes": self.peak_bytes,
            "memory": self.memory.describe(),
            "read_bytes": self.read_bytes,
            "operations": round(self.operations),
            "output_bytes": self.nbytes,
            "shards": [{"file": f.name, "bytes": f.size} for f in self.layout.files],
            "notes": list(self.remarks),
            "kind": self.recipe.output.kind,
            **output_kind(self.recipe.output, own_weights=self.pruned_adapter is not None).describe(self),
            **({"config": self.settled.describe()} if self.settled.keys else {}),
            **({"mixture": self.mixture.describe()} if self.mixture is not None else {}),
            "tokenizer": self.vocabulary.describe() if self.vocabulary else None,
            "chat_template": self.chat_template.origin if self.chat_template else None,
            "stages": [{**spec.describe(), "blocks": _blocks(spec.source)} for spec in self.specs.values()],
            "tensors": [
                {
                    "name": output.name,
                    "dtype": output.dtype,
                    "shape": list(output.shape),
                    "bytes": output.nbytes,
                    "file": output.file,
                    "method": output.pieces[0].built.method,
                    "sources": list(output.pieces[0].built.details),
                    "passes": self.costs[output.pieces[0].built.root].passes,
                    "backend": output.pieces[0].backend,
                }
                for output in self.outputs
            ],
        }


def plan(recipe: Recipe, folder: Path, opener: Opener, options: PlanOptions | None = None) -> Plan:
    """Plan `recipe`. Relative references start at `folder`; `opener` opens a reference by its headers.

    Only headers, configs and calibration data are read. InputError names every mismatch between the models.
    """
    options = options or PlanOptions()
    inputs = open_inputs(recipe, folder, opener)
    check_size(inputs)
    return _plan(recipe, inputs, folder, options, None)


def fit(planned: Plan, densities: Mapping[str, float]) -> Plan:
    """Return the plan of the same models with `densities` for the tensors under a budget. Nothing is opened again."""
    made = _plan(planned.recipe, planned.inputs, planned.folder, planned.options, densities)
    return replace(made, warnings=planned.warnings)


def _plan(
    recipe: Recipe, inputs: Inputs, folder: Path, options: PlanOptions, densities: Mapping[str, float] | None
) -> Plan:
    """Return the plan of opened models.

    `densities` are for tensors under a budget. Without them all get the same density.
    """
    output_kind(recipe.output).refuse(inputs)
    for checkpoint in inputs.checkpoints:
        check_copied(checkpoint)
    own = own_weights(recipe, inputs)
    kind = output_kind(recipe.output, own_weights=own is not None)
    inputs = own or inputs
    vocabulary = _vocabulary(recipe, inputs)
    decided = _decided(recipe, inputs, folder, options, densities, vocabulary)
    rows = _rows(decided, inputs)
    weights = {name: row.name for row in rows if row.coding is not None for name, _, _ in row.stored}
    layout = kind.layout([part for row in rows for part in row.stored], recipe.output, inputs, weights)
    outputs = tuple(row.output(layout) for row in rows)
    costs = {root: cost(root) for root in dict.fromkeys(p.built.root for output in outputs for p in output.pieces)}
    builder, stages = decided.builder, decided.builder.deltas.stages
    while True:
        held = _held(kind, recipe, inputs, outputs, options, builder, vocabulary)
        try:
            tile, merging = tiles(outputs, costs, options.device, options.workers, options.memory, held)
            break
        except InputError:
            if options.workers == 1 or not options.fewer:
                raise
            options = replace(options, workers=options.workers - 1)
    moments = decided.moments if isinstance(decided, Outputs) else None
    sources = _sources(
        stages, inputs, recipe.kept, check=options.data and densities is None
    )  # only once: `fit` keeps the result
    of_result = () if moments is None else _of_result(moments, inputs, check=options.data)
    mixture = decided.mixture(rows)
    read = Memory({"tokenizers": vocabulary.memory if vocabulary is not None else 0})
    tokenizers = Differences() if own is not None else _tokenizers(recipe, inputs, decided, rows, vocabulary)
    kept = builder.kept(decided.merges) if recipe.method.deltas else {}
    return Plan(
        recipe=recipe,
        inputs=inputs,
        folder=folder,
        options=options,
        outputs=outputs,
        layout=layout,
        notes=tuple(_notes(kind, recipe, inputs, options, decided, outputs, tokenizers, calibrates=bool(sources))),
        tile_elements=tile,
        memory=largest(merging, *_before(stages, sources, mixture, moments)) + read,
        costs=costs,
        stages=stages.calibrations,
        sources=(*sources.values(), *of_result),
        budgeted=tuple(Budgeted(t.name, math.prod(t.base.shape), t.tensor, t.base) for t in builder.budgeted),
        weighing=next(iter(stages.weighing.values()), None),
        measured=tuple(stages.inputs.values()),
        rows=stages.rows,
        moments=moments,
        cut_bytes=_read_before(stages),
        config=decided.config,
        left_plain=tuple(decided.left_plain) if isinstance(decided, Outputs) else (),
        pruned_adapter=inputs.tunes[0].checkpoint.adapter if own else None,
        vocabulary=vocabulary,
        chat_template=choose_chat_template(recipe, inputs),
        warnings=(
            *checks.warnings(recipe),
            *swapped(inputs),
            *heads_apart(inputs),
            *tokenizers.warnings,
            *decided.settled.warnings,
            *adapter_warnings(decided.settled, inputs),
            *prune.warnings(recipe, kept, factors=own is not None),
            *(prune.idle_keys(recipe, [m.name for m in decided.merges]) if isinstance(decided, Outputs) else ()),
        ),
        settled=decided.settled,
        stacks=tuple(decided.stacks),
        mixture=mixture,
        running_sum=_sum(recipe, inputs, decided) if mixture is None else None,
    )


def _decided(
    recipe: Recipe,
    inputs: Inputs,
    folder: Path,
    options: PlanOptions,
    densities: Mapping[str, float] | None,
    vocabulary: Vocabulary | None,
) -> Outputs | AppOutputs:
    """Return the object that decides about each output tensor. InputError: the config cannot follow a transplant."""
    if recipe.transplant is not None and vocabulary is not None:
        edit_config(inputs.template.checkpoint.config, vocabulary, inputs.template)
    if recipe.is_moe:
        return mixture_outputs(recipe, inputs, options.device, folder, options.memory)
    return Outputs(recipe, inputs, options.device, folder, options.memory, densities, vocabulary)


def _rows(decided: Outputs | AppOutputs, inputs: Inputs) -> list[Row]:
    """Return the output's tensors in order. InputError: the first problems, or the models are unrelated."""
    rows, problems = decided.rows(), decided.problems
    if problems:
        differ = any("missing in" in problem or "shapes differ" in problem for problem in problems)
        if differ and (others := strangers(inputs.all)) is not None:
            raise InputError(others, hint=f"{len(problems)} tensors differ, such as {problems[0]}")
        first, *also = problems[:SHOWN_PROBLEMS]
        more = len(problems) - SHOWN_PROBLEMS
        raise InputError(first, also=also + [f"… and {more} more"] * (more > 0), hint=decided.hint or None)
    decided.settled.check()
    return rows


def _kept(inputs: Inputs) -> dict[str, int]:
    """Return the memory that a reader keeps: slabs of quantised tensors, and decoded parts and positions of deltas."""
    infos = [info for model in inputs.all for info in model.tensors.values()]
    tensors = {tensor for info in infos for tensor in info.tensor.graph() if tensor.kind == "view"}
    deltas = [tensor for tensor in tensors if tensor.function == "over_base"]
    found = {"quantised_inputs": 0, "delta_inputs": 0}
    if any(tensor.keeps for tensor in tensors):
        from deltamerge.formats.quantised.scheme import KEPT

        found["quantised_inputs"] = KEPT
    if deltas:
        from deltamerge.models.delta_over_base import decoded_bytes

        found["delta_inputs"] = decoded_bytes(deltas)
    return found


def _held(
    kind: OutputKind,
    recipe: Recipe,
    inputs: Inputs,
    outputs: tuple[OutputTensor, ...],
    options: PlanOptions,
    builder: Builder,
    vocabulary: Vocabulary | None,
) -> Memory:
    """Return the memory held beside the tiles while tensors are merged."""
    stages = builder.deltas.stages
    workers = options.workers
    shared = {tuned.name for tuned in builder.budgeted if builder.deltas.method_of(tuned).shares}
    return kind.memory(recipe.output, outputs, workers, options.memory, weighed=bool(stages.inputs)) + Memory(
        {
            **_kept(inputs),
            "quantised_outputs": held_coded(outputs, workers),
            "rounding": held_rounding(outputs, workers),
            "vocabulary_rows": vocabulary.held(workers) if vocabulary is not None else 0,
            "sharing": _shared_bytes(recipe, outputs, shared, workers) if shared else 0,
        }
    )


def _shared_bytes(recipe: Recipe, outputs: Sequence[OutputTensor], shared: Container[str], workers: int) -> int:
    """Return the memory of deltas that share the bytes of an artifact, while they are factored and coded."""
    from deltamerge.formats.delta.parts import matrix_shape
    from deltamerge.methods.rate import scratch

    nbytes = prune.effective_prune(recipe, recipe.fine_tunes[0]).size_of(sum(out.nbytes for out in outputs))
    return scratch([matrix_shape(out.shape) for out in outputs if out.name in shared], nbytes, workers)


def _sources(stages: Stages, inputs: Inputs, kept: int | None, *, check: bool) -> Mapping[int, CalibrationInput]:
    """Return the data that stages run on, by the fine-tune's place.

    InputError: the rows do not suit the model's head.
    """
    if not stages.any:
        return {}
    from deltamerge.plan.calibration_graph import check_data, sources_of

    sources = sources_of(stages, inputs, kept)
    if check:
        check_data(sources, inputs)
    return sources


def _of_result(moments: Node, inputs: Inputs, *, check: bool) -> tuple[CalibrationInput]:
    """Return the rows on which the inputs of the result's layers are measured. InputError: there are no rows."""
    from deltamerge.calibrate.rows.splits import split

    source: CalibrationInput = moments.parameter("source")
    if check:
        with errors.context("calibration of the merge"):
            split(source.calibration, source.folder, source.seed, inputs.template.checkpoint.config, labelled=False)
    return (source,)


def _before(
    stages: Stages, sources: Mapping[int, CalibrationInput], mixture: Mixture | None, moments: Node | None
) -> Iterator[Memory]:
    """Yield the memory of each stage before the first tile. The stages run one after another."""
    if not sources and mixture is None and moments is None:
        return
    from deltamerge.calibrate.spec import BASELINE_BYTES
    from deltamerge.plan.calibration_graph import result_bytes, stage_bytes

    process = Memory({"process": BASELINE_BYTES})
    if moments is not None:
        yield process + Memory({"calibration": result_bytes(moments)})
    for size in stage_bytes(stages, sources):
        yield process + Memory({"calibration": size})
    if mixture is not None:
        yield process + Memory({"routers": mixture.memory})


def _read_before(stages: Stages) -> int:
    """Return the bytes that are read for thresholds and totals of whole models, before the first tile."""
    return sum(
        traits_of(stage.function).reads * cost(one).read_bytes
        for stage in (*stages.cuts.values(), *(() if stages.totals is None else (stages.totals,)))
        for one in stage.inputs
        if one.kind not in ("small", "stage")
    )


def _notes(
    kind: OutputKind,
    recipe: Recipe,
    inputs: Inputs,
    options: PlanOptions,
    decided: Outputs | AppOutputs,
    outputs: Sequence[OutputTensor],
    tokenizers: Differences,
    *,
    calibrates: bool,
) -> Iterator[str]:
    """Yield a line for everything that is copied, left out, or unusual."""
    stages, template = decided.builder.deltas.stages, inputs.template
    for series in recipe.series:
        yield from series.describe()
    yield from decided.notes
    yield from remarks(template.name, template.checkpoint, [(model.name, model.checkpoint) for model in inputs.all])
    yield from tokenizers.notes
    yield from decided.settled.notes
    for index, node in stages.cuts.items():
        tensors = f"{len(node.inputs)} tensors of {recipe.names[index]}"
        yield f"group: model: one threshold over {tensors}, found in two or three passes before"
    if cores := [one.built.core for output in outputs for one in output.pieces if one.built.core]:
        yield f"{len(cores)} matrices: LoRAs are merged in their core of at most {max(cores)} directions, expanded once"
    if options.device == AUTO:
        yield _where(outputs, calibrates=calibrates)
    if stages.on_one_gpu(options.device):
        yield f"device {options.device}: the first GPU alone measures what layers are given, or gradients"
    for node in stages.calibrations:
        if remark := node.parameter("spec").remark:
            yield remark
    yield from filter(None, (one.note for one in stages.inputs.values()))
    yield from kind.notes(recipe.output, weighed=bool(stages.inputs))


def _vocabulary(recipe: Recipe, inputs: Inputs) -> Vocabulary | None:
    if recipe.transplant is None:
        return make_vocabulary(recipe, inputs)
    from deltamerge.plan.transplant import make_transplant

    return make_transplant(recipe, inputs)


def _sum(recipe: Recipe, inputs: Inputs, decided: Outputs | AppOutputs) -> RunningSum | None:
    """Return the output's running sum. None: the output is no running sum."""
    if not recipe.output.rules.accumulates:
        return None
    from deltamerge.plan.running_sum import made_of

    return made_of(recipe, [(tune.name, tune.checkpoint) for tune in inputs.tunes], decided.averaged)


def _tokenizers(
    recipe: Recipe,
    inputs: Inputs,
    decided: Outputs | AppOutputs,
    rows: Sequence[Row],
    vocabulary: Vocabulary | None,
) -> Differences:
    """Return the differences between the models' tokenizers. A mixture only has the rows of its base."""
    meeting = rows_merged(decided, rows) if isinstance(decided, Outputs) else {inputs.template.name}
    return compare_tokenizers(recipe, inputs, meeting, by_token=vocabulary is not None)


def _where(outputs: Sequence[OutputTensor], *, calibrates: bool) -> str:
    """Return a line on the work that "auto" gives to the GPU, and the reason."""
    pieces = [piece for output in outputs for piece in output.pieces if not piece.built.root.is_source]
    there = sum(piece.backend == "torch" for piece in pieces)
    parts = ["calibration"] * calibrates + [f"{there} tensors that are sorted or decomposed"] * bool(there)
    here = len(pieces) - there
    left = f"the CPU makes {here} tensors, as fast as they are read and hashed"
    if not parts:
        return f"device auto: {left}; nothing of it is faster on the GPU"
    return f"device auto: the GPU is for {' and '.join(parts)}; {left}"


def _blocks(source: CalibrationInput) -> int:
    """Return the number of blocks that calibration runs one by one, from names; 0: the whole model is resident."""
    return len(numbered_blocks({tensor.name: tensor.shape for tensor in source.tensors}) or ())
