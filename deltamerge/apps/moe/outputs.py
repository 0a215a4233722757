"""The tensors of a mixture of experts: the base's own, the MLPs of every expert, and routers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.apps.moe.layout import FAMILIES, MLP, OUTSIDE, MixtureLayout, Sizes, choose, config_of
from deltamerge.apps.moe.routers import Prompts, Routers, RouterSpec, from_lock, routers
from deltamerge.calibrate.spec import headers
from deltamerge.engine import backends
from deltamerge.errors import InputError
from deltamerge.errors.shown import some
from deltamerge.formats.components import CONFIG
from deltamerge.formats.quantised.detect import without_keys
from deltamerge.methods.merge import mixture
from deltamerge.methods.merge.passthrough import passthrough
from deltamerge.methods.prune.bits import mask_key
from deltamerge.plan.delta_graph import Merge
from deltamerge.plan.inputs import Input, Inputs
from deltamerge.plan.output_config import settle
from deltamerge.plan.outputs import Piece, Row
from deltamerge.plan.stack import Stack
from deltamerge.plan.tensor_graph import Builder, Built
from deltamerge.recipe.schema import DRAWN, Expert, Recipe
from deltamerge.tensors.dtypes import CODES, FLOATING, PLAIN
from deltamerge.tensors.names import TOKEN_EMBEDDING
from deltamerge.tensors.tensor import Graph, Node, TensorInfo

LAYER = re.compile(r"(?P<prefix>.*?\blayers)\.(?P<number>\d+)\.(?P<rest>.+)")
WEIGHT = re.compile(rf"mlp\.({'|'.join(MLP)})\.weight")
HEAD = "lm_head.weight"
BUFFER = "rotary_emb.inv_freq"  # that old checkpoints store and classes compute


@dataclass(frozen=True, slots=True)
class PlannedMixture:
    """A mixture of experts in a plan, as `plan.mixture.Mixture` wants it."""

    layout: MixtureLayout
    experts: tuple[str, ...]
    shared: tuple[str, ...]
    sizes: Sizes
    spec: RouterSpec
    routers: Node
    parameters: int
    active: int

    @property
    def memory(self) -> int:
        """Return about the bytes that making the routers takes."""
        return self.spec.memory

    def locked(self, lock: Mapping[str, Any], values: NDArray[np.float32] | None, where: str) -> Routers:
        """Return the routers of a lock. VerifyError: it has none that fit."""
        return from_lock(lock, self.spec, values, where)

    def describe(self) -> dict[str, Any]:
        """Return the mixture as `deltamerge plan --json` prints it."""
        return {
            "architecture": self.layout.model_type,
            "experts": list(self.experts),
            "shared_experts": list(self.shared),
            "experts_per_token": self.sizes.active,
            "expert_size": self.sizes.width,
            "gate_mode": self.spec.mode,
            "routers": self.sizes.layers,
            "prompts": len(self.spec.texts),
            "parameters": self.parameters,
            "active_parameters": self.active,
        }


class MixtureOutputs:
    """Decides about each tensor of a mixture, as `Outputs` does for a merge; collects problems and notes."""

    def __init__(self, recipe: Recipe, inputs: Inputs, device: str, folder: Path, memory: int | None) -> None:
        assert inputs.base is not None
        self.recipe, self.device, self.base = recipe, device, inputs.base
        self.builder = Builder.of(recipe, Graph(), folder, device, memory)
        self.problems: list[str] = []
        self.hint = ""
        self.notes: list[str] = list(inputs.notes)
        self.stacks: list[Stack] = []
        self.merges: list[Merge] = []  # none: experts are copied
        self.averaged: dict[str, str] = {}
        self.out_dtype = CODES.get(str(recipe.out_dtype or recipe.dtype))
        tunes = {tune.index: tune for tune in inputs.tunes}
        routed = len(recipe.experts)
        self.experts = [(tunes[i], one) for i, one in enumerate(recipe.experts)]
        self.shared = [(tunes[routed + i], one) for i, one in enumerate(recipe.shared_experts)]
        lenders = [model for model, _ in (*self.experts, *self.shared)]
        self.models = tuple({model.checkpoint.reference: model for model in lenders}.values())
        silent = all(one.residual_scale == 0 for one in recipe.shared_experts)
        self.gated = [bool(one.positive_prompts) or recipe.gate_mode in DRAWN for one in recipe.shared_experts]
        prompted = any(one.positive_prompts for one in recipe.shared_experts)
        families = [_family(model) for model in (self.base, *lenders)]
        self.layout = _choose(recipe.architecture, families, len(self.shared), prompted, self.gated, silent)
        self.layers = _layers(self.base)
        self._known: dict[str, Mapping[int, Mapping[str, TensorInfo]]] = {}
        self._check_layers()
        self.sizes = Sizes(
            len(self.layers),
            routed,
            recipe.experts_per_token,
            self._width([model for model, _ in self.experts]),
            self._width([model for model, _ in self.shared]) if self.shared else 0,
            any(rest.endswith("q_proj.bias") for rest in self.layers[0]),
        )
        if not self.layout.shared_gate and self.shared and self.sizes.shared != self.sizes.width:
            raise InputError(
                f"{self.layout.name}: its shared expert is as wide as the others, {self.sizes.width}, "
                f"and {self.shared[0][0].name} is {self.sizes.shared}"
            )
        self.settled = settle(recipe, inputs, without_keys(self.base.checkpoint.config))
        self.settled.check()
        self.config, notes = config_of(self.layout, self.settled.config, self.sizes)
        self.embedding = self._embedding()
        self.spec = self._spec(memory)
        read = [info.tensor for info in (*self.base.checkpoint.tensors.values(), self.embedding)]
        self.routers = self.builder.graph.node(routers, read, kind="stage", spec=self.spec)
        self.notes += [*self._remarks(), *notes]

    def rows(self) -> list[Row]:
        """Return the tensors of the output, in the base's order."""
        made, done = list[Row](), set[int]()
        dropped = []
        for name, tensor in self.base.tensors.items():
            stored, found = self.base.stored[name], LAYER.fullmatch(name)
            if found is None or not WEIGHT.fullmatch(found["rest"]):
                if name.endswith(BUFFER):
                    dropped.append(stored)
                else:
                    made.append(self._copy(stored, tensor, self._dtype(tensor), self.base.name))
            elif (number := int(found["number"])) not in done:
                done.add(number)
                made += self._mlp_rows(number, stored.rpartition(".mlp.")[0])
        if self.layout.untied and HEAD not in self.base.stored.values():
            made.append(self._copy(HEAD, self.embedding, self._dtype(self.embedding), self.base.name))
        if dropped:
            self.notes.append(f"left out, computed by its class: {some(dropped)}")
        return made

    def mixture(self, rows: Sequence[Row]) -> PlannedMixture:
        """Return the mixture of these tensors, for people."""
        total = sum(math.prod(row.shape) for row in rows)
        idle = self.sizes.experts - self.sizes.active
        expert = 3 * self.sizes.width * self.spec.width * self.sizes.layers
        experts, shared = (tuple(model.name for model, _ in some_) for some_ in (self.experts, self.shared))
        return PlannedMixture(
            self.layout, experts, shared, self.sizes, self.spec, self.routers, total, total - idle * expert
        )

    def _mlp_rows(self, number: int, layer: str) -> Iterator[Row]:
        """Yield the tensors that replace the MLP of a layer, whose stored name is `layer`."""
        like = self.layers[number]
        dtypes = {one: self._dtype(like[f"mlp.{one}.weight"]) for one in MLP}
        place, names = f"{layer}.{self.layout.block}", dict(zip(MLP, self.layout.weights, strict=True))
        yield self._router(f"{place}.gate.weight", number, 0, self.sizes.experts, dtypes[MLP[0]])
        if self.layout.correction:
            node = self.builder.graph.node(mixture.nothing, shape=(self.sizes.experts,))
            yield self._row(f"{place}.gate.{self.layout.correction}", Built(node, "router", ("zeros",)))
        for i, (model, expert) in enumerate(self.experts):
            for one in MLP:
                yield self._expert(f"{place}.experts.{i}.{names[one]}.weight", model, expert, number, one, dtypes[one])
        for model, expert in self.shared:
            for one in MLP:
                stored = f"{place}.{self.layout.shared}.{one}.weight"
                yield self._expert(stored, model, expert, number, one, dtypes[one])
            if self.layout.shared_gate:
                stored, end = f"{place}.{self.layout.shared_gate}.weight", len(self.spec.experts)
                yield self._router(stored, number, self.sizes.experts, end, dtypes[MLP[0]])

    def _router(self, stored: str, layer: int, first: int, end: int, dtype: str) -> Row:
        shape, graph = (end - first, self.spec.width), self.builder.graph
        if first == end:  # gate of a silent shared expert
            shape = (1, self.spec.width)
            node = graph.node(mixture.nothing, shape=shape)
        else:
            node = graph.node(mixture.router, [self.routers], shape=shape, layer=layer, first=first, end=end)
        if self.layout.sigmoid:
            node = graph.node(passthrough, [node], shape=shape, scales=(self.spec.width**-0.5,))
        return self._row(stored, Built(self.builder.cast(node, dtype), "router", (self.recipe.gate_mode,)))

    def _expert(self, stored: str, model: Input, expert: Expert, layer: int, one: str, dtype: str) -> Row:
        tensor = self._weights(model)[layer][one]
        scale = expert.residual_scale if one == "down_proj" and expert.residual_scale is not None else 1.0
        noise = expert.noise_scale or 0.0
        if scale == 1.0 and not noise:
            return self._copy(stored, tensor, dtype, model.name)
        graph, read = self.builder.graph, self.builder.graph.read(tensor)
        if noise:
            key = mask_key(self.recipe.seed, model.name, stored)
            node = graph.node(mixture.noisy, [read], shape=tensor.shape, noise=noise, scale=scale, key=key)
        else:
            node = graph.node(passthrough, [read], shape=tensor.shape, scales=(scale,))
        details = f"{model.name}{f' × {scale:g}' * (scale != 1)}{f' noise {noise:g}' * bool(noise)}"
        return self._row(stored, Built(self.builder.cast(node, dtype), "moe", (details,)))

    def _copy(self, stored: str, tensor: TensorInfo, dtype: str, model: str) -> Row:
        return self._row(stored, Built(self.builder.copy(tensor, dtype), "copy", (model,)))

    def _row(self, stored: str, built: Built) -> Row:
        piece = Piece(built, 0, backends.choose(built.root, self.device))
        return Row(stored, built.root.shape, built.root.dtype, (piece,))

    def _dtype(self, tensor: TensorInfo) -> str:
        """Return the dtype of the tensor that replaces a tensor of the base."""
        dtype = self.out_dtype or tensor.output_dtype
        if tensor.dtype not in FLOATING or dtype not in PLAIN:
            self.problems.append(f"{tensor.name}: {tensor.dtype} is no dtype that a mixture is made of")
            self.hint = "dtype: bfloat16, or a base in float32, bfloat16 or float16"
        return dtype

    def _weights(self, model: Input) -> Mapping[int, Mapping[str, TensorInfo]]:
        reference = model.checkpoint.reference
        if reference not in self._known:
            layers = _layers(model)
            self._known[reference] = {
                i: {one: layer[f"mlp.{one}.weight"] for one in MLP if f"mlp.{one}.weight" in layer}
                for i, layer in layers.items()
            }
        return self._known[reference]

    def _check_layers(self) -> None:
        """Refuse a base with layers that the layout does not hold, and an expert with other MLPs than the base."""
        where, hidden = self.base.name, self.base.checkpoint.config.get("hidden_size")
        inside = {name for name in self.base.tensors if LAYER.fullmatch(name)}
        for name in self.base.tensors.keys() - inside:
            if not OUTSIDE.search(name) and not name.endswith(BUFFER):
                raise InputError(f"{where}: {self.base.stored[name]}: {self.layout.name} has no such tensor")
        for number, layer in self.layers.items():
            known = {*self.layout.required, *self.layout.optional}
            for rest in layer:
                if not (rest in known or WEIGHT.fullmatch(rest) or rest.endswith(BUFFER)):
                    message = f"{where}: layers.{number}.{rest}: {self.layout.name} has no such tensor"
                    raise InputError(message, hint="another architecture may have: see docs/howto/moe.md")
            if missing := [rest for rest in self.layout.required if rest not in layer]:
                raise InputError(f"{where}: layers.{number}.{missing[0]}: missing, and {self.layout.name} needs it")
        for model in (self.base, *self.models):
            weights = self._weights(model)
            if weights.keys() != self.layers.keys():
                raise InputError(f"{model.name} has {len(weights)} layers, {where} has {len(self.layers)}")
            if any(len(layer) < len(MLP) for layer in weights.values()):
                raise InputError(f"{model.name}: its layers have no mlp.{', mlp.'.join(MLP)}")
            for mlp in weights.values():
                gate, up, down = (mlp[one].shape for one in MLP)
                if gate != up or down != gate[::-1] or gate[1] != hidden:
                    shapes = f"{list(gate)}, {list(up)}, {list(down)}"
                    raise InputError(f"{model.name}: its MLPs are {shapes}, and {where} is {hidden} wide")

    def _width(self, models: Sequence[Input]) -> int:
        """Return the width of all MLPs of some experts. InputError: they differ."""
        found = {
            (model.name, layer["gate_proj"].shape[0]) for model in models for layer in self._weights(model).values()
        }
        if len({width for _, width in found}) > 1:
            shown = ", ".join(f"{name} {width}" for name, width in sorted(found))
            raise InputError(f"experts must have MLPs of one width, got {shown}", hint="take models of one size")
        return next(iter(found))[1]

    def _embedding(self) -> TensorInfo:
        """Return the base's embedding of tokens. InputError: it has none, or no config.json."""
        if self.base.checkpoint.config_file != CONFIG:
            raise InputError(f"{self.base.name}: has no config.json, without which no mixture is made on it")
        embedding = next((t for name, t in self.base.tensors.items() if TOKEN_EMBEDDING.search(name)), None)
        if embedding is None:
            raise InputError(f"{self.base.name}: has no embedding of tokens")
        return embedding

    def _spec(self, memory: int | None) -> RouterSpec:
        """Return the parameters of the routers. InputError: they take more memory."""
        base, recipe = self.base, self.recipe
        gated = [x for x, gate in zip(self.shared, self.gated, strict=True) if gate] if self.layout.shared_gate else []
        experts = tuple(Prompts(model.name, *expert.prompts) for model, expert in (*self.experts, *gated))
        return RouterSpec(
            recipe.gate_mode,
            experts,
            len(self.experts),
            len(self.layers),
            self.embedding.shape[1],
            base.name,
            base.checkpoint.path,
            headers(base.checkpoint.tensors.values()),
            self.embedding.shape[0],
            recipe.seed,
            self.device,
        ).within(memory)

    def _remarks(self) -> Iterator[str]:
        """Yield the parts of the models that are left out, and signs of a mistake."""
        rows = self.spec.vocabulary
        for model in self.models:
            own = next((t for name, t in model.tensors.items() if TOKEN_EMBEDDING.search(name)), None)
            if own is not None and own.shape[0] != rows:
                yield f"{model.name} has {own.shape[0]} rows of tokens, the base {rows}: the base's tokens are kept"
        references = {model.checkpoint.reference for model, _ in self.experts}
        if len(references) == 1 and not any(expert.noise_scale for _, expert in self.experts):
            yield "all experts are the same model: it says what that model says until it is trained"
        if self.sizes.experts & (self.sizes.experts - 1):
            yield f"{self.sizes.experts} experts: llama.cpp wants a power of two"


def _choose(
    wanted: str | None, families: Sequence[str], shared: int, prompted: bool, gated: Sequence[bool], silent: bool
) -> MixtureLayout:
    """Return the layout. A shared expert that is silent, or whose gate is drawn, needs no prompts for its gate."""
    try:
        return choose(wanted, families, shared, prompted)
    except InputError:
        if not shared or prompted or not (silent or all(gated)):
            raise
    return choose(wanted, families, shared, True)


def _family(model: Input) -> str:
    """Return the model type. InputError: no mixture is made of it."""
    config = model.checkpoint.config
    family, classes = config.get("model_type"), config.get("architectures") or ()
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"{model.name}: no mixture is made of model type {family!r}", hint=f"one of {known}")
    if not model.checkpoint.is_simple or not (classes and str(classes[0]).endswith("ForCausalLM")):
        raise InputError(f"{model.name}: is {some(map(str, classes)) or 'of no class'}, and no …ForCausalLM")
    return str(family)


def _layers(model: Input) -> dict[int, dict[str, TensorInfo]]:
    """Return the tensors of every layer by their names after the layer's number. InputError: layers are missing."""
    found: dict[int, dict[str, TensorInfo]] = {}
    for name, tensor in model.tensors.items():
        if (match := LAYER.fullmatch(name)) is not None:
            found.setdefault(int(match["number"]), {})[match["rest"]] = tensor
    if not found or found.keys() != set(range(len(found))):
        raise InputError(f"{model.name}: its layers are not numbered from 0")
    return dict(sorted(found.items()))
