"""Recipe and headers -> what will be done: every output tensor, where its bytes go, passes and peak memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltamerge import backends, errors
from deltamerge.build import Builder, Built, Merge
from deltamerge.calibrate.split import split
from deltamerge.errors import InputError
from deltamerge.execute import Task
from deltamerge.graph import Graph, Node, peak_tiles, schedule
from deltamerge.inputs import HEAD, Input, Inputs, Opener, open_inputs
from deltamerge.io.adapter import WEIGHTS
from deltamerge.io.checkpoint import Adapter, TensorInfo
from deltamerge.io.encodings import expected_bits
from deltamerge.io.gathered import cut
from deltamerge.io.writer import Layout, plan_layout
from deltamerge.lora import own_weights
from deltamerge.names import numbered_blocks
from deltamerge.parameters import layer_index
from deltamerge.recipe import Recipe
from deltamerge.stack import Target, like_template, repaired_config, targets
from deltamerge.stages import BASELINE_BYTES as CALIBRATING_BYTES
from deltamerge.stages import Source, Spec
from deltamerge.stages import memory as stage_memory
from deltamerge.tensors import FLOATING, ITEMSIZE, VALUE_BITS, block_elements
from deltamerge.tokenizer.chat import ChatTemplate, choose_chat_template
from deltamerge.tokenizer.vocabulary import Vocabulary, make_vocabulary

SHOWN_PROBLEMS = 8
TILE_ELEMENTS = 1 << 18
GPU_TILE_ELEMENTS = 1 << 22
# anonymous memory of the process before the first tile, measured (benchmarks/merge_speed.py)
BASELINE_BYTES = {"fused": 90_000_000, "torch": 260_000_000}


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of an output tensor made by one node; `offset` is the byte they start at."""

    built: Built
    offset: int
    backend: str


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    pieces: tuple[Piece, ...]
    file: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def delta_bytes(self, values: str | None) -> int:
        """About what a delta artifact stores of it, were the changed entries at random: `values` are added, or None."""
        bits = 8 * ITEMSIZE[self.dtype] if values is None else VALUE_BITS[values]
        return math.ceil(self.elements * expected_bits(self.pieces[0].built.changed, bits) / 8)


@dataclass(frozen=True, slots=True)
class Budgeted:
    """A tensor whose density a budget decides, the fine-tune's and the base's, of `size` elements."""

    name: str
    size: int
    tune: TensorInfo
    base: TensorInfo


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run does, as plain data; made without reading a weight."""

    recipe: Recipe
    inputs: Inputs
    outputs: tuple[Output, ...]
    layout: Layout
    notes: tuple[str, ...]
    device: str
    workers: int
    tile_elements: int
    peak_bytes: int
    stages: tuple[Node, ...] = ()
    sources: tuple[Source, ...] = ()
    budgeted: tuple[Budgeted, ...] = ()
    cut_bytes: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    pruned_adapter: Adapter | None = None
    vocabulary: Vocabulary | None = None
    chat_template: ChatTemplate | None = None

    @property
    def specs(self) -> dict[Node, Spec]:
        """What each calibration stage is to do."""
        return {node: node.parameter("spec") for node in self.stages}

    @property
    def tasks(self) -> list[Task]:
        """What the engine is to make: every piece of every output tensor."""
        return [
            Task(output.name, piece.built.root, piece.backend, piece.offset)
            for output in self.outputs
            for piece in output.pieces
        ]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def delta_values(self) -> str | None:
        """How a delta artifact stores what it adds; None: final values."""
        return (self.recipe.output.values or "bfloat16") if self.recipe.output.adds else None

    @property
    def read_bytes(self) -> int:
        """Bytes read from the inputs, counting every pass; not what calibration reads."""
        total = self.cut_bytes
        for piece in (piece for output in self.outputs for piece in output.pieces):
            root = piece.built.root
            if root.kind == "read":
                total += math.prod(root.shape) * ITEMSIZE[root.dtype]
            else:
                total += sum(
                    math.prod(node.shape) * ITEMSIZE[node.dtype]
                    for nodes in schedule(root).passes
                    for node in nodes
                    if node.kind == "read"
                )
        return total

    def describe(self) -> dict[str, Any]:
        """The plan for `--json`; a documented, stable shape."""
        return {
            "merge_method": self.recipe.method.name,
            "base_model": self.inputs.base.name if self.inputs.base else None,
            "models": list(self.inputs.names),
            "template": self.inputs.template.name,
            "device": self.device,
            "workers": self.workers,
            "tile_elements": self.tile_elements,
            "peak_bytes": self.peak_bytes,
            "read_bytes": self.read_bytes,
            "output_bytes": self.nbytes,
            "shards": [{"file": f.name, "bytes": f.size} for f in self.layout.files],
            "notes": list(self.notes),
            "kind": self.recipe.output.kind,
            **self._describe_delta(),
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
                    "passes": len(schedule(output.pieces[0].built.root).passes),
                    "backend": output.pieces[0].backend,
                }
                for output in self.outputs
            ],
        }

    def _describe_delta(self) -> dict[str, Any]:
        if self.recipe.output.kind != "delta":
            return {}
        sizes = {output.name: output.delta_bytes(self.delta_values) for output in self.outputs}
        how = {"semantics": "add" if self.delta_values else "replace", "values": self.delta_values}
        return {"delta": how | {"estimated_bytes": sum(sizes.values()), "estimated_tensor_bytes": sizes}}


def plan(
    recipe: Recipe,
    folder: Path,
    opener: Opener,
    *,
    device: str = "cpu",
    workers: int = 1,
    memory: int | None = None,
    data: bool = True,
    densities: Mapping[str, float] | None = None,
) -> Plan:
    """Resolve `recipe`; relative references start at `folder`, `opener` opens one by its headers.

    Raises InputError naming every mismatch between the models; nothing but headers and configs is read, and with `data`
    the calibration data of recipes that need it. `densities` are those of the tensors that a budget is for.
    """
    inputs = open_inputs(recipe, folder, opener)
    own = own_weights(recipe, inputs)
    inputs = own or inputs
    vocabulary = make_vocabulary(recipe, inputs)
    planner = _Planner(recipe, inputs, device, folder, memory, densities, vocabulary)
    rows = planner.rows()
    if planner.problems:
        shown = planner.problems[:SHOWN_PROBLEMS]
        more = len(planner.problems) - len(shown)
        raise InputError("\n".join(shown + ([f"… and {more} more"] if more else [])), hint=planner.hint or None)
    metas = [(name, dtype, shape) for name, shape, dtype, _ in rows]
    layout = plan_layout(metas, None, WEIGHTS) if own else plan_layout(metas, recipe.output.shard_size)
    outputs = tuple(
        Output(name, shape, dtype, math.prod(shape) * ITEMSIZE[dtype], pieces, layout.tensors[name].file)
        for name, shape, dtype, pieces in rows
    )
    held = _held_by_delta(outputs, workers) if recipe.output.kind == "delta" else 0
    tile, peak = _memory(outputs, device, workers, memory, held)
    stages = planner.builder.stages
    sources = {i: node.parameter("source") for i, node in planner.builder.activations.items()}
    sources |= {i: node.parameter("spec").source for i, node in stages.items()}
    together = planner.builder.together
    if together is not None:
        stages = {**stages, -1: together}
        sources |= {
            tune.index: source
            for tune, source in zip(inputs.tunes, together.parameter("spec").sources, strict=True)
            if tune.index is not None
        }
    if data:
        _check_data(sources, inputs)
    if sources:  # the stages come before the first tile, one after another
        resident = [stage_memory(source) for source in sources.values()]
        peak = max(peak, CALIBRATING_BYTES + (sum(resident) if together else max(resident)))
    peak += vocabulary.memory if vocabulary is not None else 0
    cuts = {recipe.names[i]: node.parameter("deltas") for i, node in planner.builder.cuts.items()}
    planner.notes += [
        f"group: model: one threshold over {len(deltas)} tensors of {name}, found in two or three passes before"
        for name, deltas in cuts.items()
    ]
    cut_bytes = 2 * sum(
        math.prod(read.shape) * ITEMSIZE[read.dtype]
        for deltas in cuts.values()
        for _, delta in deltas
        for read in delta.inputs
    )
    budgeted = tuple(
        Budgeted(merge.name, math.prod(merge.base.shape), tensor, merge.base)
        for merge, tensor in planner.builder.budgeted
        if merge.base is not None
    )
    if own is not None:
        planner.notes.append("written as a LoRA adapter: the deltas are the adapter's own A and B")
    elif recipe.output.kind == "peft":
        planner.notes.append("merged, then what differs from the base is written as a SHiRA adapter")
    adapter = inputs.tunes[0].checkpoint.adapter if own else None
    return Plan(
        recipe,
        inputs,
        outputs,
        layout,
        tuple(planner.notes),
        device,
        workers,
        tile,
        peak,
        tuple(stages.values()),
        tuple(sources.values()),
        budgeted,
        cut_bytes,
        planner.config,
        adapter,
        vocabulary,
        choose_chat_template(recipe, inputs),
    )


def _check_data(sources: Mapping[int, Source], inputs: Inputs) -> None:
    """InputError unless the rows are there, with the fields and labels that the model's head needs."""
    configs = {tune.index: tune.checkpoint.config for tune in inputs.tunes}
    for index, source in sources.items():
        with errors.context(f"calibration of {source.model}"):
            split(source.calibration, source.folder, source.seed, configs[index], labelled=source.labelled)


Row = tuple[str, tuple[int, ...], str, tuple[Piece, ...]]


@dataclass(frozen=True, slots=True)
class _Merged:
    """A tensor to be merged, and the rows of the vocabulary's model that follow it."""

    merge: Merge
    rest: TensorInfo | None


class _Planner:
    """Goes through the template's tensors; collects problems and notes on the way."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        device: str,
        folder: Path,
        memory: int | None,
        densities: Mapping[str, float] | None,
        vocabulary: Vocabulary | None,
    ) -> None:
        self.recipe, self.inputs, self.device = recipe, inputs, device
        self.vocabulary, self.remapped, self.resized = vocabulary, False, False
        self.builder = Builder(recipe, Graph(), folder, device, memory, densities)
        self.problems: list[str] = []
        self.hint = ""
        self.notes: list[str] = []
        self.out_dtype = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}.get(
            str(recipe.out_dtype or recipe.dtype)
        )
        self.targets, self.stacks = targets(recipe, inputs)
        self.config, changes = repaired_config(inputs, self.stacks)
        self.notes += [*(stack.describe() for stack in self.stacks), *changes]

    def rows(self) -> list[Row]:
        parts = list(self._tensors())
        if self.problems:
            return []
        self.builder.prepare([part.merge for part in parts if isinstance(part, _Merged)])
        return [self._merged(part) if isinstance(part, _Merged) else part for part in parts]

    def _tensors(self) -> Iterator[Row | _Merged]:
        template = self.inputs.template
        tied = self._tied_head()
        copied: list[str] = []
        if self.inputs.stand_ins:
            self.notes.append(f"{HEAD}: untied; the embedding is the head of {', '.join(self.inputs.stand_ins)}")
        for target in self.targets:
            if target.name == tied:
                self.notes.append(f"{target.stored}: tied to the embedding, written once")
                continue
            row = self._row(target, copied)
            if row is not None:
                yield row
        self._check_vocabulary()
        if copied:
            self.notes.append(f"copied from {template.name}, not merged: {_some(copied)}")
        self._left_out()

    def _check_vocabulary(self) -> None:
        """Rows move only where there are any, and only in a whole model: a delta or an adapter has its base's rows."""
        kind, changes = self.recipe.output.kind, self.vocabulary is not None and self.vocabulary.changes
        if kind != "model" and (changes or self.resized):
            self.problems.append(f"output.kind {kind} cannot change the vocabulary of its base")
            self.hint = "write kind: model"
        elif changes and not self.remapped:
            self.problems.append(f"no tensor of {self.inputs.template.name} has a row per token of its vocabulary")

    def _row(self, target: Target, copied: list[str]) -> Row | _Merged | None:
        name, stored, tensor, owner = target.name, target.stored, target.tensor, target.owner
        like = like_template(target, self.stacks, self.inputs.template)
        dtype = tensor.dtype if like is None or tensor.dtype not in FLOATING else like.dtype
        dtype = self.out_dtype if self.out_dtype and tensor.dtype in FLOATING else dtype
        found = [(model, model.get(source)) for model, source in target.sources]
        lacking = [model.name for model, info in found if info is None]
        if lacking and layer_index(name) is not None:
            self.problems.append(f"{stored}: missing in {', '.join(lacking)}")
            self.hint = "models that are merged must have the same layers"
            return None
        present = [(model, info) for model, info in found if info is not None]
        same = target.group is not None and target.group.base is not None
        same = same and all(info is not None and info.is_same(tensor) for _, info in found)
        if lacking or same or target.group is None or tensor.dtype not in FLOATING:
            if owner.name == self.inputs.template.name:
                copied.append(stored)
            lenders = present if any(model is owner for model, _ in present) else [*present, (owner, tensor)]
            tensor = next(info for model, info in self._remapped(target, lenders) if model is owner)
            return self._whole(stored, Built(self.builder.copy(tensor, dtype), "copy", (owner.name,)))
        remapped = self._remapped(target, present)
        if like is not None and remapped is not present:
            like = replace(like, shape=(remapped[0][1].shape[0], *like.shape[1:]))
        shared, rest = self._rows(target, remapped, like)
        if shared is None:
            return None
        base = next((info for model, info in shared if model.index is None), None)
        tunes = [(model, info) for model, info in shared if model.index is not None]
        return _Merged(Merge(stored, target.group.part, target.position, base, tunes, dtype), rest)

    def _remapped(self, target: Target, present: list[tuple[Input, TensorInfo]]) -> list[tuple[Input, TensorInfo]]:
        """The models' tensors under the output's vocabulary, if their rows are tokens."""
        if self.vocabulary is None or not self.vocabulary.holds(target.name, present):
            return present
        self.remapped = True
        with errors.context(target.stored):
            remapped = [(model, self.vocabulary.remap(model, present)) for model, _ in present]
        self.resized |= [info for _, info in remapped] != [info for _, info in present]
        return remapped

    def _merged(self, part: _Merged) -> Row:
        merge, rest = part.merge, part.rest
        built = self.builder.merge(merge)
        if rest is None:
            return self._whole(merge.name, built)
        tail = Built(self.builder.copy(rest, merge.dtype), "copy", ())
        first = self._piece(built, 0)
        second = self._piece(tail, math.prod(built.root.shape) * ITEMSIZE[merge.dtype])
        shape = (built.root.shape[0] + rest.shape[0], *rest.shape[1:])
        return merge.name, shape, merge.dtype, (first, second)

    def _whole(self, name: str, built: Built) -> Row:
        return name, built.root.shape, built.root.dtype, (self._piece(built, 0),)

    def _piece(self, built: Built, offset: int) -> Piece:
        return Piece(built, offset, backends.choose(built.delta or built.root, self.device))

    def _rows(
        self, target: Target, present: list[tuple[Input, TensorInfo]], like: TensorInfo | None
    ) -> tuple[list[tuple[Input, TensorInfo]] | None, TensorInfo | None]:
        """The inputs cut to the rows that all have, and the rows beyond them that the vocabulary's model adds."""
        name, stored, template = target.name, target.stored, self.inputs.template
        compared = [*present, *([(template, like)] if like is not None else [])]
        shapes = {info.shape for _, info in compared}
        if len(shapes) == 1:
            return present, None
        text = ", ".join(dict.fromkeys(f"{model.name} {list(info.shape)}" for model, info in compared))
        same_width = len({shape[1:] for shape in shapes}) == 1
        if layer_index(name) is not None or not same_width:
            self.problems.append(f"{stored}: shapes differ: {text}")
            return None, None
        source = self.inputs.vocabulary
        if source is None:
            self.problems.append(f"{stored}: the models have different numbers of rows: {text}")
            self.hint = "set `tokenizer_source` to `base` or to the model whose added tokens are to be kept"
            return None, None
        if self.recipe.output.kind == "peft":
            self.problems.append(f"{stored}: an adapter cannot resize its base: {text}")
            self.hint = "write kind: model"
            return None, None
        count = min(shape[0] for shape in shapes)
        self.notes.append(f"{stored}: the {count} rows that all models share are merged, the rest is {source.name}'s")
        whole = source.get(name)
        rest = cut(whole, count, whole.shape[0]) if whole is not None and whole.shape[0] > count else None
        return [(model, cut(info, 0, count)) for model, info in present], rest

    def _stacked(self, name: str) -> bool:
        return any(stack.holds(name) for stack in self.stacks)

    def _tied_head(self) -> str | None:
        """The head that the template's config ties to its embedding although its file holds both, if any."""
        template = self.inputs.template
        head = template.tensors.get(HEAD)
        if head is None or self.inputs.untied or template.checkpoint.config.get("tie_word_embeddings") is not True:
            return None
        twins = (n for n, t in template.tensors.items() if "embed" in n and t.shape == head.shape)
        return HEAD if any(twins) else None

    def _left_out(self) -> None:
        """Tensors that an input has and the output has not: an error inside a numbered block, else a note."""
        template = self.inputs.template
        for model in self.inputs.all:
            extra = [n for n in model.tensors if n not in template.tensors]
            layers = [model.stored[n] for n in extra if layer_index(n) is not None and not self._stacked(n)]
            layers += [model.stored[n] for stack in self.stacks for n in stack.extra(model, template)]
            others = [model.stored[n] for n in extra if layer_index(n) is None]
            if layers:
                self.problems.append(f"{_some(layers)}: in {model.name}, missing in {template.name}")
                self.hint = "models that are merged must have the same layers"
            if others:
                self.notes.append(f"left out, only in {model.name}: {_some(others)}")


def _blocks(source: Source) -> int:
    """How many blocks calibration goes through one by one, as the names tell; 0: the whole model is resident."""
    return len(numbered_blocks({tensor.name: tensor.shape for tensor in source.tensors}) or ())


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _held_by_delta(outputs: tuple[Output, ...], workers: int) -> int:
    """Bytes of positions and of values to be coded, of the tensors that a delta's sink has open."""
    largest = sorted((o.elements * (0.125 + 4 * o.pieces[0].built.changed) for o in outputs), reverse=True)
    return math.ceil(sum(largest[: workers + 1]))


def _memory(
    outputs: tuple[Output, ...], device: str, workers: int, memory: int | None, held: int = 0
) -> tuple[int, int]:
    """Elements of a tile, and the peak of anonymous memory; the tile shrinks until `memory` holds."""
    roots = {(piece.built.root, piece.backend) for output in outputs for piece in output.pieces}
    computed = [(root, backend) for root, backend in roots if root.kind != "read"]
    baseline = BASELINE_BYTES["torch" if any(b == "torch" for _, b in computed) else "fused"] + held
    alive = max((_alive_bytes(root) for root, _ in computed), default=0)
    largest_block = max((min(block_elements(r.shape), math.prod(r.shape)) for r, _ in computed), default=1)
    tile = GPU_TILE_ELEMENTS if device != "cpu" else TILE_ELEMENTS
    while True:
        peak = baseline + workers * alive * max(tile, largest_block)
        if memory is None or peak <= memory:
            return tile, peak
        if tile <= largest_block or tile <= 1024:
            raise InputError(
                f"--memory {memory} is too little for {workers} workers",
                hint=f"give at least {peak}, or fewer --workers",
            )
        tile //= 2


def _alive_bytes(root: Node) -> int:
    """Bytes a tile holds per element: stored reads and float32 values alive at once, and scratch inside a step."""
    plan = schedule(root)
    reads = max(sum(ITEMSIZE[n.dtype] for n in nodes if n.kind == "read") for nodes in plan.passes)
    return reads + 4 * (peak_tiles(plan) + 3) + ITEMSIZE[root.dtype]
