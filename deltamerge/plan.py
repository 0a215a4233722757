"""Recipe and headers -> what will be done: every output tensor, where its bytes go, passes and peak memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge import backends, errors
from deltamerge.build import Builder, Built, Merge
from deltamerge.calibrate.names import numbered_blocks
from deltamerge.calibrate.split import split
from deltamerge.errors import InputError
from deltamerge.graph import Graph, Node, peak_tiles, schedule
from deltamerge.inputs import Input, Inputs, Opener, open_inputs
from deltamerge.io.checkpoint import TensorInfo
from deltamerge.io.encodings import expected_bits
from deltamerge.io.gathered import cut
from deltamerge.io.writer import Layout, plan_layout
from deltamerge.parameters import layer_index, layer_position
from deltamerge.recipe import Recipe
from deltamerge.stages import Source, Spec
from deltamerge.stages import memory as stage_memory
from deltamerge.tensors import FLOATING, ITEMSIZE, VALUE_BITS, block_elements
from deltamerge.tokenizer.chat import ChatTemplate, choose_chat_template
from deltamerge.tokenizer.rows import TIED_HEAD, is_tied, tied_embedding
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
    vocabulary: Vocabulary | None = None
    chat_template: ChatTemplate | None = None

    @property
    def specs(self) -> dict[Node, Spec]:
        """What each calibration stage is to do."""
        return {node: node.parameter("spec") for node in self.stages}

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def delta_values(self) -> str | None:
        """How a delta artifact stores what it adds; None: final values."""
        return (self.recipe.output.values or "bfloat16") if self.recipe.output.adds else None

    @property
    def read_bytes(self) -> int:
        """Bytes read from the inputs, counting every pass."""
        total = 0
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
            "models": [tune.name for tune in self.inputs.tunes],
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
    vocabulary = make_vocabulary(recipe, inputs)
    planner = _Planner(recipe, inputs, device, folder, densities, vocabulary)
    rows = planner.rows()
    if planner.problems:
        shown = planner.problems[:SHOWN_PROBLEMS]
        more = len(planner.problems) - len(shown)
        raise InputError("\n".join(shown + ([f"… and {more} more"] if more else [])), hint=planner.hint or None)
    layout = plan_layout([(name, dtype, shape) for name, shape, dtype, _ in rows], recipe.output.shard_size)
    outputs = tuple(
        Output(name, shape, dtype, math.prod(shape) * ITEMSIZE[dtype], pieces, layout.tensors[name].file)
        for name, shape, dtype, pieces in rows
    )
    held = _held_by_delta(outputs, workers) if recipe.output.kind == "delta" else 0
    tile, peak = _memory(outputs, device, workers, memory, held)
    stages = planner.builder.stages
    sources = {i: node.parameter("source") for i, node in planner.builder.activations.items()}
    sources |= {i: node.parameter("spec").source for i, node in stages.items()}
    if data:
        _check_data(sources, inputs)
    peak += max((stage_memory(source) for source in sources.values()), default=0)
    peak += vocabulary.memory if vocabulary is not None else 0
    made = tuple(stages.values())
    notes = tuple(planner.notes)
    budgeted = tuple(
        Budgeted(merge.name, math.prod(merge.base.shape), tensor, merge.base)
        for merge, tensor in planner.builder.budgeted
        if merge.base is not None
    )
    found = tuple(sources.values())
    chat = choose_chat_template(recipe, inputs)
    return Plan(
        recipe, inputs, outputs, layout, notes, device, workers, tile, peak, made, found, budgeted, vocabulary, chat
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
        densities: Mapping[str, float] | None,
        vocabulary: Vocabulary | None,
    ) -> None:
        self.recipe, self.inputs, self.device = recipe, inputs, device
        self.vocabulary, self.remapped = vocabulary, False
        self.builder = Builder(recipe, Graph(), folder, device, densities)
        self.problems: list[str] = []
        self.hint = ""
        self.notes: list[str] = []
        self.out_dtype = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}.get(
            str(recipe.out_dtype or recipe.dtype)
        )
        indices = [layer_index(name) for name in inputs.template.tensors]
        self.layers = 1 + max((i for i in indices if i is not None), default=0)

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
        for name, tensor in template.tensors.items():
            if name == tied:
                self.notes.append(f"{template.stored[name]}: tied to the embedding, written once")
                continue
            row = self._row(name, tensor, copied)
            if row is not None:
                yield row
        if self.vocabulary is not None and self.vocabulary.changes and not self.remapped:
            self.problems.append(f"no tensor of {template.name} has a row per token of its vocabulary")
        if copied:
            self.notes.append(f"copied from {template.name}, not merged: {_some(copied)}")
        self._left_out()

    def _row(self, name: str, tensor: TensorInfo, copied: list[str]) -> Row | _Merged | None:
        stored = self.inputs.template.stored[name]
        dtype = self.out_dtype if self.out_dtype and tensor.dtype in FLOATING else tensor.dtype
        found = [(model, model.get(name) or self._tied(model, name)) for model in self.inputs.all]
        lacking = [model.name for model, info in found if info is None]
        if lacking and layer_index(name) is not None:
            self.problems.append(f"{stored}: missing in {', '.join(lacking)}")
            self.hint = "models that are merged must have the same layers"
            return None
        present = [(model, info) for model, info in found if info is not None]
        remapped = self._remapped(name, present)
        if lacking or tensor.dtype not in FLOATING:
            copied.append(stored)
            tensor = next((info for model, info in remapped if model is self.inputs.template), tensor)
            return self._whole(stored, Built(self.builder.copy(tensor, dtype), "copy", (self.inputs.template.name,)))
        shared, rest = self._rows(name, remapped)
        if shared is None:
            return None
        base = next((info for model, info in shared if model.index is None), None)
        tunes = [(model, info) for model, info in shared if model.index is not None]
        return _Merged(Merge(stored, layer_position(name, self.layers), base, tunes, dtype), rest)

    def _remapped(self, name: str, present: list[tuple[Input, TensorInfo]]) -> list[tuple[Input, TensorInfo]]:
        """The models' tensors under the output's vocabulary, if their rows are tokens."""
        if self.vocabulary is None or not present or not self.vocabulary.holds(name, present):
            return present
        self.remapped = True
        with errors.context(self.inputs.template.stored[name]):
            remapped = [(model, self.vocabulary.remap(model, present)) for model, _ in present]
        if self.recipe.output.kind != "model" and [info for _, info in remapped] != [info for _, info in present]:
            self.problems.append(f"{name}: output.kind {self.recipe.output.kind} cannot change the vocabulary")
        return remapped

    def _tied(self, model: Input, name: str) -> TensorInfo | None:
        """The embedding of a model without a head of its own, which is its head."""
        found = tied_embedding(model.tensors, model.checkpoint.config) if name == TIED_HEAD else None
        if found is not None:
            self.notes.append(f"{name}: {model.name} has none of its own, its embedding stands for it")
        return found

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
        self, name: str, present: list[tuple[Input, TensorInfo]]
    ) -> tuple[list[tuple[Input, TensorInfo]] | None, TensorInfo | None]:
        """The inputs cut to the rows that all have, and the rows beyond them that the vocabulary's model adds."""
        shapes = {info.shape for _, info in present}
        if len(shapes) == 1:
            return present, None
        stored = self.inputs.template.stored[name]
        text = ", ".join(f"{model.name} {list(info.shape)}" for model, info in present)
        same_width = len({shape[1:] for shape in shapes}) == 1
        if layer_index(name) is not None or not same_width:
            self.problems.append(f"{stored}: shapes differ: {text}")
            return None, None
        source = self.inputs.vocabulary
        if source is None:
            self.problems.append(f"{stored}: the models have different numbers of rows: {text}")
            self.hint = "set `tokenizer_source` to `base` or to the model whose added tokens are to be kept"
            return None, None
        count = min(shape[0] for shape in shapes)
        self.notes.append(f"{stored}: the {count} rows that all models share are merged, the rest is {source.name}'s")
        whole = source.get(name)
        rest = cut(whole, count, whole.shape[0]) if whole is not None and whole.shape[0] > count else None
        return [(model, cut(info, 0, count)) for model, info in present], rest

    def _tied_head(self) -> str | None:
        """The head that the template's config ties to its embedding although its file holds both, if any."""
        template = self.inputs.template
        head = template.tensors.get("lm_head.weight")
        if head is None or template.checkpoint.config.get("tie_word_embeddings") is not True:
            return None
        twins = (n for n, t in template.tensors.items() if "embed" in n and t.shape == head.shape)
        return "lm_head.weight" if any(twins) else None

    def _left_out(self) -> None:
        """Tensors that an input has and the output has not: an error inside a numbered block, else a note."""
        template = self.inputs.template
        for model in self.inputs.all:
            extra = [n for n in model.tensors if n not in template.tensors]
            layers = [model.stored[n] for n in extra if layer_index(n) is not None]
            others = [model.stored[n] for n in extra if layer_index(n) is None]
            if layers:
                self.problems.append(f"{_some(layers)}: in {model.name}, missing in {template.name}")
                self.hint = "models that are merged must have the same layers"
            if others:
                tied = TIED_HEAD in extra and is_tied(template.checkpoint.config)
                self.notes.append(
                    f"left out, only in {model.name}: {_some(others)}" + "; the output's is its embedding" * tied
                )


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
