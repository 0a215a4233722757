"""The tensors of the output: each tensor of the template is merged, copied or left out, or refused with a reason."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deltamerge import errors
from deltamerge.engine import backends
from deltamerge.errors import InputError
from deltamerge.formats.components import folders_of, split
from deltamerge.formats.safetensors import Layout
from deltamerge.plan.delta_graph import Merge
from deltamerge.plan.inputs import Input, Inputs, has_tied_head
from deltamerge.plan.kinship import seem_equal
from deltamerge.plan.output_config import OutputConfig, settle
from deltamerge.plan.quantise import copied as copied_as
from deltamerge.plan.quantise import copies, is_matrix, quantising, remarks
from deltamerge.plan.stack import (
    ModuleFinder,
    Spares,
    Stack,
    Target,
    behind,
    is_buffer,
    like_template,
    named,
    repaired_config,
    targets,
)
from deltamerge.plan.tensor_graph import Builder, Built
from deltamerge.plan.vocabulary import Vocabulary
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.dtypes import CODES, COPIED, FLOATING, ITEMSIZE, PACKED, PLAIN, nbytes_of
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.names import LM_HEAD, SMALL_HEAD, TOKEN_HEAD, layer_index
from deltamerge.tensors.tensor import Graph, Node, TensorInfo
from deltamerge.tensors.traits import function_of
from deltamerge.tensors.views import cut

if TYPE_CHECKING:
    from deltamerge.formats.quantised.coder import Coding


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of an output tensor that one node makes. `offset` is their first byte."""

    built: Built
    offset: int
    backend: str


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output.

    With a `coding` it is a weight, computed in float32, that files store as several tensors. `dtype` is the first
    tensor's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    pieces: tuple[Piece, ...]
    file: str
    coding: Coding | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def delta_bytes(self, values: str | None) -> int:
        """Estimate the bytes of this tensor in a delta artifact, with changed entries at random positions.

        `values` is the coding of added values; None: final values.
        """
        from deltamerge.formats.delta.positions import expected_bits
        from deltamerge.formats.delta.values import VALUE_BITS

        bits = 8 * ITEMSIZE[self.dtype] if values is None else VALUE_BITS[values]
        return math.ceil(self.elements * expected_bits(self.pieces[0].built.changed, bits) / 8)


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor of the output that has no file yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    coding: Coding | None = None

    @property
    def stored(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Name, dtype and shape of the tensors that store it."""
        if self.coding is None:
            return ((self.name, self.dtype, self.shape),)
        return tuple((part.name, part.dtype, part.shape) for part in self.coding.parts)

    def output(self, layout: Layout) -> OutputTensor:
        """Return the tensor with its file."""
        nbytes = sum(nbytes_of(dtype, shape) for _, dtype, shape in self.stored)
        first, dtype, _ = self.stored[0]
        return OutputTensor(self.name, self.shape, dtype, nbytes, self.pieces, layout.tensors[first].file, self.coding)


@dataclass(frozen=True, slots=True)
class Merged:
    """A tensor to be merged, and the rows of the vocabulary's model that follow it."""

    merge: Merge
    rest: TensorInfo | None
    coding: Coding | None = None


class Outputs:
    """Decides about each of the template's tensors; collects problems and notes."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        device: str,
        folder: Path,
        memory: int | None,
        densities: Mapping[str, float] | None,
        vocabulary: Vocabulary | None,
        graph: Graph | None = None,
    ) -> None:
        self.recipe, self.inputs, self.device = recipe, inputs, device
        self.vocabulary, self.remapped, self.resized = vocabulary, False, False
        self.builder = Builder.of(recipe, graph or Graph(), folder, device, memory, densities, inputs.base)
        self.merges: list[Merge] = []
        self.problems: list[str] = []
        self.hint = ""
        self.notes: list[str] = []
        self.averaged: dict[str, str] = {}
        self.out_dtype = CODES.get(str(recipe.out_dtype or recipe.dtype))
        self.spares = Spares(inputs.all)
        self.targets, self.stacks = targets(recipe, inputs, self.spares)
        repaired, changes = repaired_config(inputs, self.stacks)
        self.settled = settle(recipe, inputs, repaired, stacked=bool(self.stacks))
        self.config = self.settled.config
        scopes = {group.part.module for group in inputs.groups}
        self.notes += [*inputs.notes, *ModuleFinder(scopes, inputs.template.stored.values()).describe()]
        self.notes += [*(stack.describe() for stack in self.stacks), *changes]
        self.left_plain: list[str] = []
        self.quantising = quantising(recipe, inputs, stacked=bool(self.stacks))
        self.coded = copies(inputs)
        self.moments: Node | None = None

    def rows(self) -> list[Row]:
        """Decide about every tensor, in order. Return an empty list if there are problems."""
        parts = list(self._tensors())
        if self.problems:
            return []
        self.merges = [part.merge for part in parts if isinstance(part, Merged)]
        self.builder = self.builder.prepared(self.merges)
        built = [self._built(part) if isinstance(part, Merged) else part for part in parts]
        self.moments = self._moments(built)
        rows = [stored for row in built for stored in self._stored(row)]
        rows += [self._copied(info) for info in self.quantising.more()]
        plain = [row.name for row in built if row.coding is None and is_matrix(row.name, row.shape)]
        self.config = self.quantising.config(self.config, plain)
        self.notes += self.quantising.notes()
        self.left_plain = self.quantising.left()
        if self.recipe.output.scheme == "none":
            self.notes += remarks(self.inputs, {row.name: row.dtype for row in rows})
        return rows

    def _moments(self, rows: Sequence[Row]) -> Node | None:
        """Return the stage that measures the inputs of the coded weights. None: codes are chosen without it.

        InputError: the result cannot run like its template.
        """
        codings = {row.name: row.coding for row in rows if row.coding is not None and row.coding.rounding is not None}
        if self.recipe.calibration is None or not codings:
            return None
        moved = self.resized or (self.vocabulary is not None and self.vocabulary.changes)
        if self.stacks or moved or any(len(row.pieces) > 1 for row in rows):
            what = "layers are stacked" if self.stacks else "the vocabulary changes"
            message = f"output.rounding: {what}, so that {self.inputs.template.name}'s config does not run the result"
            raise InputError(message, hint="merge in one document, and quantise its result in the next")
        from deltamerge.calibrate.merge.second_moments import MeasuredInput
        from deltamerge.formats.quantised.coder import Adjustable

        wanted = {
            name: MeasuredInput(coding.inputs, isinstance(coding.coder, Adjustable) and coding.coder.turned)
            for name, coding in codings.items()
        }
        roots = {row.name: row.pieces[0].built.root for row in rows}
        rows_said = f"{self.recipe.calibration.sequences} rows through the merge as it is before"
        self.notes.append(f"rounding: the inputs of {len(wanted)} quantised weights are measured, {rows_said}")
        return self.builder.maker.of_result(self.builder.deltas, self.inputs.template, roots, wanted)

    def mixture(self, rows: list[Row]) -> None:
        """Return nothing: a merge has no experts."""

    def _stored(self, row: Row) -> Iterator[Row]:
        """Yield a row, or the rows of its stored parts if they are copied."""
        coding = row.coding
        if coding is None:
            yield row
            return
        same = copied_as(row.pieces[0].built.root, coding, self.coded, row.name) if len(row.pieces) == 1 else None
        if same is None:
            yield row
        made = () if same is None else zip(same.parts, same.like_parts, strict=True)
        for part, source in made:
            yield self._whole(part.name, Built(self.builder.graph.read(source), "copy", row.pieces[0].built.details))
        for info in (same or coding).copied:
            yield self._copied(info)

    def _copied(self, info: TensorInfo) -> Row:
        return self._whole(info.name, Built(self.builder.graph.read(info), "copy", ()))

    def _tensors(self) -> Iterator[Row | Merged]:
        template = self.inputs.template
        tied = self._tied_head()
        copied: list[str] = []
        if self.inputs.stand_ins:
            self.notes.append(f"{LM_HEAD}: untied; the embedding is the head of {', '.join(self.inputs.stand_ins)}")
        elif has_tied_head(template):
            self.notes.append(f"{LM_HEAD}: stays tied to the embedding")
        for target in self.targets:
            if target.name == tied:
                self.notes.append(f"{target.stored}: tied to the embedding, written once")
                continue
            row = self._row(target, copied)
            if row is not None:
                yield row
        self._check_vocabulary()
        if copied:
            self.notes.append(f"copied from {template.name}, not merged: {named(self._by_folder(copied), _some)}")
        self._left_out()

    def _by_folder(self, copied: list[str]) -> list[str]:
        """Return copied tensors by name; components that are copied whole are named by their folder."""
        folders = folders_of(self.inputs.template.checkpoint.components)
        counts = Counter(split(target.stored, folders)[0] for target in self.targets)
        ours = Counter(split(name, folders)[0] for name in copied)
        whole = [folder for folder in folders if ours[folder] and ours[folder] == counts[folder]]
        shown = [f"{folder}/ (all of its {counts[folder]} tensors)" for folder in whole]
        return shown + [name for name in copied if split(name, folders)[0] not in whole]

    def _check_vocabulary(self) -> None:
        """Note a problem if rows move but no tensor has a row per token.

        Deltas and adapters keep their base's vocabulary.
        """
        wanted, changes = self.recipe.output, self.vocabulary is not None and self.vocabulary.changes
        if not wanted.rules.standalone and (changes or self.resized):
            self.problems.append(f"output.kind {wanted.kind} cannot change the vocabulary of its base")
            self.hint = "write kind: model"
        elif changes and not self.remapped:
            self.problems.append(f"no tensor of {self.inputs.template.name} has a row per token of its vocabulary")

    def _row(self, target: Target, copied: list[str]) -> Row | Merged | None:
        name, stored, tensor, owner = target.name, target.stored, target.tensor, target.owner
        like = like_template(target, self.stacks, self.inputs.template)
        dtype = (tensor if like is None or tensor.dtype not in FLOATING else like).output_dtype
        dtype = self._own_dtype(target, dtype)
        dtype = self.out_dtype if self.out_dtype and tensor.dtype in FLOATING else dtype
        found = [(model, model.get(source)) for model, source in target.sources]
        lacking = [model.name for model, info in found if info is None]
        if lacking and layer_index(name) is not None and not self.spares.holds(name):
            self.problems.append(f"{stored}: missing in {', '.join(lacking)}")
            self.hint = "models that are merged must have the same layers"
            return None
        present = [(model, info) for model, info in found if info is not None]
        coding = self.quantising.coding(target, tensor.shape, dtype)
        if coding is not None and self.recipe.output.rounding is not None:
            base = next((info for model, info in present if model.index is None and info.shape == coding.shape), None)
            with errors.context(stored):
                coding = coding.rounded(self.recipe.output.rounding, base)
        dtype = "F32" if coding is not None else dtype
        if self.recipe.output.rules.accumulates and not is_buffer(tensor):
            if lacking:
                self.problems.append(f"{stored}: missing in {', '.join(lacking)}")
                self.hint = "checkpoints of a running sum have the same tensors"
                return None
            self.averaged[stored], dtype = dtype, "F32"
        same = target.group is not None and target.group.base is not None
        same = same and all(info is not None and info.is_same(tensor) for _, info in found)
        packed = tensor.dtype in PACKED and not self.recipe.output.rules.standalone
        if lacking or same or target.group is None or is_buffer(tensor):
            if owner.name == self.inputs.template.name:
                copied.append(stored)
            lenders = present if any(model is owner for model, _ in present) else [*present, (owner, tensor)]
            tensor = next(info for model, info in self._remapped(target, lenders) if model is owner)
            if packed:
                self._refuse_dtype(stored, tensor.dtype)
                return None
            row = self._whole(stored, Built(self.builder.copy(tensor, dtype), "copy", (owner.name,)))
            return replace(row, coding=coding)
        remapped = self._remapped(target, present)
        if like is not None and remapped is not present:
            like = like.part(0, (remapped[0][1].shape[0], *like.shape[1:]))
        shared, rest = self._rows(target, remapped, like)
        if shared is None:
            return None
        base = next((info for model, info in shared if model.index is None), None)
        tunes = [(model, info) for model, info in shared if model.index is not None]
        summed = self.recipe.output.rules.accumulates or any(model.checkpoint.running_sum for model, _ in shared)
        if rest is not None and summed:
            self.problems.append(f"{stored}: a running sum cannot get rows of another vocabulary")
            self.hint = "checkpoints of a running sum have the same tensors"
            return None
        if coding is not None and (rest is not None or shared[0][1].shape != coding.shape):
            self.problems.append(f"{stored}: a quantised weight cannot get rows of another vocabulary")
            self.hint = "quantization: none, or without tokenizer_source"
            return None
        return Merged(Merge(stored, target.group.part, target.position, base, tunes, dtype), rest, coding)

    @staticmethod
    def _own_dtype(target: Target, dtype: str) -> str:
        """Return the dtype of an output if the recipe gives none.

        Float8 without scales is only how a fine-tune was stored: the output takes the base's dtype.
        """
        if dtype not in FLOATING - PLAIN:
            return dtype
        base = next((info for model, name in target.sources if model.index is None and (info := model.get(name))), None)
        return base.output_dtype if base is not None and base.output_dtype in PLAIN else dtype

    def _remapped(self, target: Target, present: list[tuple[Input, TensorInfo]]) -> list[tuple[Input, TensorInfo]]:
        """Return the models' tensors with their rows moved to the output's vocabulary, if their rows are tokens."""
        if self.vocabulary is None or not self.vocabulary.holds(target.name, present):
            return present
        self.remapped = True
        with errors.context(target.stored):
            remapped = [(model, self.vocabulary.remap(model, present)) for model, _ in present]
        self.resized |= [info for _, info in remapped] != [info for _, info in present]
        return remapped

    def _built(self, part: Merged) -> Row:
        merge, rest = part.merge, part.rest
        built = self.builder.merge(merge)
        infos = [info for info in (merge.base, *(t.tensor for t in merge.tunes)) if info is not None]
        uncomputed = next((info.dtype for info in infos if info.dtype in COPIED), None)
        if uncomputed and (built.method != "copy" or rest is not None or not self.recipe.output.rules.standalone):
            self._refuse_dtype(merge.name, uncomputed)
        if rest is None:
            return replace(self._whole(merge.name, built), coding=part.coding)
        tail = Built(self.builder.copy(rest, merge.dtype), "copy", ())
        first = self._piece(built, 0)
        second = self._piece(tail, math.prod(built.root.shape) * ITEMSIZE[merge.dtype])
        shape = (built.root.shape[0] + rest.shape[0], *rest.shape[1:])
        return Row(merge.name, shape, merge.dtype, (first, second))

    def _refuse_dtype(self, name: str, dtype: str) -> None:
        self.problems.append(f"{name}: {dtype} is only copied, and this recipe would compute with it")
        self.hint = "merge checkpoints in float32, bfloat16, float16 or float8"

    def _whole(self, name: str, built: Built) -> Row:
        return Row(name, built.root.shape, built.root.dtype, (self._piece(built, 0),))

    def _piece(self, built: Built, offset: int) -> Piece:
        return Piece(built, offset, backends.choose(built.delta or built.root, self.device))

    def _rows(
        self, target: Target, present: list[tuple[Input, TensorInfo]], like: TensorInfo | None
    ) -> tuple[list[tuple[Input, TensorInfo]] | None, TensorInfo | None]:
        """Return the inputs cut to the rows that all have, and further rows from the vocabulary's model."""
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
        if re.search(SMALL_HEAD, stored) and not TOKEN_HEAD.search(stored):
            self.problems.append(f"{stored}: the models' heads have different labels: {text}")
            self.hint = "name a base without a head: the merge then has the head of its template, as it is"
            return None, None
        source = self.inputs.vocabulary
        if source is None:
            self.problems.append(f"{stored}: the models have different numbers of rows: {text}")
            self.hint = "set `tokenizer_source` to `base` or to the model whose added tokens are to be kept"
            if not self.recipe.output.rules.standalone:
                self.hint = f"a {self.recipe.output.kind} has the rows of its base: write the whole model instead"
            return None, None
        if self.recipe.output.rules.adapts:
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
        """Return the head that the template's config ties to its embedding although its file holds both.

        None: there is none.

        A head with other values than the embedding does not count, because not every class of transformers ties as the
        config says.
        """
        template = self.inputs.template
        head = template.tensors.get(LM_HEAD)
        if head is None or self.inputs.untied or template.checkpoint.config.get("tie_word_embeddings") is not True:
            return None
        twins = (t for n, t in template.tensors.items() if "embed" in n and t.shape == head.shape)
        return LM_HEAD if any(seem_equal(head, twin) for twin in twins) else None

    def _left_out(self) -> None:
        """Report tensors that an input has and the output lacks: an error inside a numbered block, otherwise a note."""
        template = self.inputs.template
        for model, names in behind(self.stacks, self.inputs.all):
            left = named([model.stored[name] for name in names], _some)
            self.notes.append(f"left out, behind the layers of {model.name}: {left}")
        for model in self.inputs.all:
            extra = [n for n in model.tensors if n not in template.tensors]
            inside = [n for n in extra if layer_index(n) is not None and not self._stacked(n)]
            layers = [model.stored[n] for n in inside if not self.spares.holds(n)]
            layers += [model.stored[n] for stack in self.stacks for n in stack.extra(model, template)]
            others = [
                model.stored[n] for n in extra if layer_index(n) is None or (n in inside and self.spares.holds(n))
            ]
            if layers:
                self.problems.append(f"{_some(layers)}: in {model.name}, missing in {template.name}")
                self.hint = "models that are merged must have the same layers"
            if others:
                self.notes.append(f"left out, only in {model.name}: {named(others, _some)}")


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Mixtures of experts. The app `moe` makes them. A table names it, and it is imported only for a mixture.

PLANNERS = {"moe": "deltamerge.apps.moe.outputs:MixtureOutputs"}  # an app, and the class that plans its outputs


class Mixture(Protocol):
    """A mixture: its layout, experts by name, numbers of parameters, and the node of its routers."""

    @property
    def layout(self) -> Any: ...
    @property
    def sizes(self) -> Any: ...
    @property
    def experts(self) -> tuple[str, ...]: ...
    @property
    def shared(self) -> tuple[str, ...]: ...
    @property
    def parameters(self) -> int: ...
    @property
    def active(self) -> int: ...
    @property
    def routers(self) -> Node: ...
    @property
    def memory(self) -> int: ...

    def locked(self, lock: Mapping[str, Any], values: NDArray[np.float32] | None, where: str) -> Any:
        """Return the routers of a lock. VerifyError: the lock has none that fit."""

    def describe(self) -> dict[str, Any]:
        """Return the mixture as `deltamerge plan --json` prints it."""


class AppOutputs(Protocol):
    """The output tensors of an app's plan, in place of `Outputs` for a merge."""

    builder: Builder
    problems: list[str]
    hint: str
    notes: list[str]
    stacks: list[Stack]
    config: dict[str, Any]
    settled: OutputConfig
    merges: list[Merge]
    averaged: dict[str, str]

    def rows(self) -> list[Row]:
        """Return the tensors of the output, in the base's order."""

    def mixture(self, rows: Sequence[Row]) -> Mixture:
        """Return the mixture of these tensors."""


def mixture_outputs(recipe: Recipe, inputs: Inputs, device: str, folder: Path, memory: int | None) -> AppOutputs:
    """Return the outputs of a mixture. InputError: the app is not installed, or no mixture is made of these models."""
    with errors.app("moe"):
        make = function_of(PLANNERS["moe"])
    outputs: AppOutputs = make(recipe, inputs, device, folder, memory)
    return outputs
