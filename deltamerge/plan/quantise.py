"""The quantised weights of the output and their form, with the entries in config and remarks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from deltamerge.errors import InputError, RecipeError
from deltamerge.errors.shown import some
from deltamerge.formats.quantised.detect import Scheme, keys_of, stated
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.plan.inputs import Input, Inputs
from deltamerge.plan.stack import Target
from deltamerge.recipe.output_keys import Quantization
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.dtypes import FLOATING, TORCH_NAMES
from deltamerge.tensors.names import (
    EMBEDDING,
    LM_HEAD,
    TASK_HEAD,
    TOKEN_HEAD,
    is_transposed,
    layer_index,
    numbers_as_stars,
)
from deltamerge.tensors.tensor import Node, Tensor, TensorInfo

if TYPE_CHECKING:
    from deltamerge.formats.quantised.coder import Coding

KEY = "quantization_config"
PLAIN = "write plain weights: quantization: none"
SHOWN = 3  # names in a remark
FIXED = {"nvfp4": 16, "mxfp4": 32}  # columns of a group of these schemes
GROUPS = (128, 64, 32)  # columns of a group that vLLM's kernels take
# Weights inside layers that published FP8 checkpoints leave plain: routers, and towers for pictures and sound.
LEFT = re.compile(r"(^|\.)(gate|router|shared_expert_gate|[a-z_]*(vision|visual|audio)[a-z_]*)(\.|$)")
EXPERTS = re.compile(r"(^|\.)experts\.[^.]+$")
# Keys of a config's settings that list modules whose weights are plain.
LISTS = ("modules_to_not_convert", "ignore", "ignored_layers")
NUMBER = re.compile(r"\.\d+(\.|$)")


@dataclass(slots=True)
class Quantiser:
    """The quantisation of the output. This class quantises nothing: every tensor has its plain dtype."""

    template: Input

    def coding(self, target: Target, shape: tuple[int, ...], dtype: str) -> Coding | None:
        """Return the coding of a weight of the output. None: it is a plain tensor of `dtype`."""
        return None

    def more(self) -> list[TensorInfo]:
        """Return further tensors of the output, which are copied."""
        return []

    def config(self, config: Mapping[str, Any], plain: Iterable[str]) -> dict[str, Any]:
        """Return the config of an output whose matrices `plain` are not coded; `config` lacks its quantisation key."""
        return dict(config)

    def left(self) -> list[str]:
        """Return a note on weights that could not be coded as asked. Call it after `coding` of every weight."""
        return []

    def notes(self) -> list[str]:
        """Return the notes. Call it after `coding` of every weight."""
        config = self.template.checkpoint.config
        name, _ = stated(config) or ("", "")
        quantised = self.template.checkpoint.quantised
        why = "no weight is quantised" if quantised is None or not quantised.weights else "the output is not quantised"
        return [f"config.json: {'.'.join(path)} ({name}) is dropped: {why}" for path, _ in keys_of(config)]


def quantising(recipe: Recipe, inputs: Inputs, *, stacked: bool) -> Quantiser:
    """Return the quantisation of a recipe's output. RecipeError: it says keep, and no model is quantised."""
    wanted = recipe.output.scheme
    if wanted == "none":
        return Quantiser(inputs.template)
    if any(component.folder for component in inputs.template.checkpoint.components):
        message = f"{inputs.template.name} has several components, which are not quantised together"
        raise RecipeError(recipe.source.path, [recipe.problem(("output", "quantization"), message, PLAIN)])
    if isinstance(wanted, Quantization):
        return NewQuantisation(inputs.template, wanted, _group_for(wanted, inputs.template))
    models = [inputs.template, inputs.base, inputs.origin]
    for model in models:
        if model is not None and model.checkpoint.quantised is not None and model.checkpoint.quantised.weights:
            if not model.checkpoint.quantised.plain:  # a GGUF file's
                message = f"{model.name} ({model.checkpoint.quantised}) is in a form that cannot be written, only read"
                raise RecipeError(
                    recipe.source.path, [recipe.problem(("output", "quantization"), message, f"{PLAIN}, or fp8")]
                )
            return SameQuantisation(inputs.template, model, model.checkpoint.quantised, stacked)
    named = " nor ".join(dict.fromkeys(model.name for model in models if model is not None))
    message = f"nothing to keep: no weight of {named} is quantised"
    raise RecipeError(
        recipe.source.path, [recipe.problem(("output", "quantization"), message, "quantization: fp8, or none")]
    )


@dataclass(slots=True)
class SameQuantisation(Quantiser):
    """Codes weights as `model` codes them."""

    model: Input
    scheme: Scheme
    stacked: bool
    count: int = 0
    kinds: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stacked:  # a weight's form in some layer, for layers that the model lacks
            prefix = _prefix(self.model)
            self.kinds = {numbers_as_stars(name.removeprefix(prefix)): name for name in self.scheme.weights}

    def coding(self, target: Target, shape: tuple[int, ...], dtype: str) -> Coding | None:
        name = self._name(target)
        if name is None or name not in self.scheme.weights:
            return None
        weight = self.scheme.plain[name]
        if weight.shape != shape:
            message = f"has the shape {list(weight.shape)} in {self.model.name}, {list(shape)} in the output"
            raise InputError(f"{target.stored}: {message}, and cannot keep its quantisation", hint=PLAIN)
        try:
            coding = _kept(self.scheme, self.model.checkpoint, name, target.stored)
        except InputError as error:
            raise InputError(f"{self.model.name}: {target.stored}: {error}", hint=PLAIN) from None
        self.count += 1
        return coding

    def _name(self, target: Target) -> str | None:
        """Return the name in `model` of the weight that is merged into a target, or of the weight in its place."""
        reference = self.model.checkpoint.reference
        for model, source in ((target.owner, None), *target.sources):
            if model.checkpoint.reference == reference:
                info = target.tensor if source is None else model.get(source)
                if info is not None:
                    return info.name
        if (name := self.model.stored.get(target.name)) is not None or not self.stacked:
            return name
        return self.kinds.get(numbers_as_stars(target.name))

    def more(self) -> list[TensorInfo]:
        """Return scales of keys, values and activations, which belong to no weight, under the template's names.

        InputError: layers are stacked, and the scales cannot follow.
        """
        names = self.scheme.dropped
        if names and self.stacked:
            raise InputError(f"{self.model.name}: {names[0]} cannot follow slices", hint=PLAIN)
        old, new = _prefix(self.model), _prefix(self.template)
        return [replace(self.scheme.stored[name], name=new + name.removeprefix(old)) for name in names]

    def config(self, config: Mapping[str, Any], plain: Iterable[str]) -> dict[str, Any]:
        found = dict(config)
        names = [_module(name) for name in plain if layer_index(name) is not None]
        for path, settings in keys_of(self.model.checkpoint.config):
            if self.stacked and isinstance(settings, Mapping):  # lists that name layers follow the layers
                lists = {key: settings[key] for key in LISTS if isinstance(settings.get(key), list)}
                settings = {**settings, **{key: _renumbered(value, names) for key, value in lists.items()}}
            _put(found, path, settings)
        return found

    def notes(self) -> list[str]:
        return [f"quantised as in {self.model.name} ({self.scheme}): {self.count} weights"]


@dataclass(slots=True)
class NewQuantisation(Quantiser):
    """The weights of linear layers are coded in the scheme that the recipe asks for."""

    wanted: Quantization
    group: int
    count: int = 0
    unfit: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)

    def coding(self, target: Target, shape: tuple[int, ...], dtype: str) -> Coding | None:
        if len(shape) == 3 and EXPERTS.search(target.stored):
            self.fused.append(target.stored)
        if dtype not in FLOATING or not _is_linear(self.template, target.stored, shape, target.tensor):
            return None
        from deltamerge.formats.quantised import fp8, mxfp4, nvfp4, packed  # only where codes are written

        name, wanted = target.stored, self.wanted
        if wanted.by == "block":
            block = self._block
            if any(size % side for size, side in zip(shape, block, strict=True)):
                self.unfit.append(name)
                return None
            coding = fp8.write_blocks(name, shape, block)
        elif wanted.by == "group":
            if shape[1] % self.group:
                self.unfit.append(name)
                return None
            if wanted.scheme == "int4":
                coding = packed.write_int4(name, shape, self.group, _scale(dtype), self.template.checkpoint.path)
            else:
                coding = {"nvfp4": nvfp4.write, "mxfp4": mxfp4.write}[wanted.scheme](name, shape)
        else:
            coding = packed.write_rows(name, shape, {"fp8": "F8_E4M3", "int8": "I8"}[wanted.scheme], _scale(dtype))
        self.count += 1
        return coding

    @property
    def _block(self) -> tuple[int, int]:
        given = self.wanted.block or (128, 128)
        return given[0], given[1]

    def config(self, config: Mapping[str, Any], plain: Iterable[str]) -> dict[str, Any]:
        modules = list(dict.fromkeys([_module(LM_HEAD), *map(_module, plain)]))
        from deltamerge.formats.quantised import fp8, packed

        wanted = self.wanted
        if wanted.by == "block":
            return {**config, KEY: fp8.settings_of(self._block, modules)}
        return {**config, KEY: packed.settings_of(wanted.scheme, wanted.by, self.group, modules)}

    @property
    def _way(self) -> str:
        ways = {"block": f"blocks of {'×'.join(map(str, self._block))}", "group": f"groups of {self.group}"}
        return ways.get(self.wanted.by, f"a scale a {self.wanted.by}")

    @property
    def _fits(self) -> str:
        """Return a hint at a scheme that fits any shape."""
        if self.wanted.by == "block":
            return "quantization: {scheme: fp8, strategy: channel} fits every shape"
        return "a smaller group, or quantization: int8, which fits every shape"

    def left(self) -> list[str]:
        found = []
        for why, names in ((f"{self._way} do not fit", self.unfit), ("experts fused in one tensor", self.fused)):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found += [f"left plain, {why}: {names[0]}{more}"] if names else []
        if self.unfit and self.count:
            found[0] += f"; {self._fits}"
        return found

    def notes(self) -> list[str]:
        words = f"{self.count} weights of linear layers in numbered blocks"
        found = [f"quantised to {self.wanted.scheme}, {self._way}: {words}", *self.left()]
        if not self.count:
            hint = f"{self._fits}; or {PLAIN}" if self.unfit else PLAIN
            raise InputError(f"{self.template.name}: no weight can be quantised: {found[-1]}", hint=hint)
        return found


def _group_for(wanted: Quantization, template: Input) -> int:
    """Return the columns of an int4 group: the recipe's, or the largest of `GROUPS` that fits as many as the smallest.

    All weights share one group size, because vLLM and compressed-tensors load that fastest.
    """
    if wanted.group is not None:
        return wanted.group
    if wanted.scheme in FIXED:
        return FIXED[wanted.scheme]
    columns = {
        info.shape[1]
        for name, info in template.tensors.items()
        if _is_linear(template, template.stored.get(name, name), info.shape, info)
    }
    codable = [count for count in columns if count % GROUPS[-1] == 0]
    return next(group for group in GROUPS if not any(count % group for count in codable))


def _is_linear(template: Input, name: str, shape: tuple[int, ...], tensor: TensorInfo) -> bool:
    """Return whether a tensor is the weight of a linear layer that published checkpoints quantise, by its name."""
    if len(shape) != 2 or not name.endswith(".weight") or layer_index(name) is None or "norm" in name:
        return False
    if any(pattern.search(name) for pattern in (EMBEDDING, TOKEN_HEAD, LEFT)) or re.search(TASK_HEAD, name):
        return False
    return not is_transposed(name, template.checkpoint.config, {name: tensor})


def remarks(inputs: Inputs, dtypes: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each quantised model, and one for scales that belong to no weight.

    The line has its scheme, and the dtypes in which it is computed and, by `dtypes` of the output's tensors, written.
    """
    for model in inputs.all:
        scheme = model.checkpoint.quantised
        if scheme is None:
            continue
        if scheme.weights:
            written = " and ".join(TORCH_NAMES[dtype] for dtype in _written(model, inputs, dtypes))
            yield f"{model.name}: quantised ({scheme}), read as float32, written as {written}"
        if scheme.dropped:
            yield f"{model.name}: left out, scales of a cache or of activations: {some(scheme.dropped, SHOWN)}"


def _written(model: Input, inputs: Inputs, dtypes: Mapping[str, str]) -> list[str]:
    """Return the dtypes of the output's tensors that quantised weights of a model become.

    If layers of a stack have other names, return the dtypes of all tensors.
    """
    stored = (inputs.template.stored.get(name) for name, info in model.tensors.items() if info.saved_as)
    found = {dtypes[name] for name in stored if name is not None and name in dtypes}
    return sorted(found or dtypes.values(), key=list(TORCH_NAMES).index)[: len(found) or 1]


def copies(inputs: Inputs) -> dict[Tensor, tuple[Checkpoint, str]]:
    """Return the model and name of every weight that some model stores coded."""
    models = [model for model in inputs.checkpoints if model.quantised is not None]
    return {info.tensor: (m, name) for m in models if m.quantised for name, info in m.quantised.plain.items()}


def copied(root: Node, coding: Coding, known: Mapping[Tensor, tuple[Checkpoint, str]], output: str) -> Coding | None:
    """Return the coding if `root` reads a weight that is already stored in it, so that its tensors are copied."""
    if root not in known:
        return None
    model, name = known[root]
    assert model.quantised is not None
    try:
        other = _kept(model.quantised, model, name, output)
    except InputError:
        return None
    same = other.parts == coding.parts and [c.name for c in other.copied] == [c.name for c in coding.copied]
    return other if same and type(other.coder) is type(coding.coder) else None


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a quantised model's config lists this plain tensor as plain."""
    return (len(shape) == 2 and name.endswith(".weight")) or (len(shape) == 3 and EXPERTS.search(name) is not None)


def _kept(scheme: Scheme, model: Checkpoint, name: str, output: str) -> Coding:
    settings = next((value for _, value in keys_of(model.config) if isinstance(value, Mapping)), {})
    from deltamerge.formats.quantised.scheme import coding_like

    return coding_like(scheme.plain[name], [scheme.stored[part] for part in scheme.weights[name]], settings, output)


def _prefix(model: Input) -> str:
    """Return the prefix of a model's stored names before the canonical names."""
    canonical, stored = next(iter(model.stored.items()))
    return stored.removesuffix(canonical)


def _module(name: str) -> str:
    """Return the module of a weight: of fused experts, all of them."""
    return name.rpartition(".")[0]


def _scale(dtype: str) -> str:
    return dtype if dtype in ("BF16", "F16", "F32") else "F32"


def _renumbered(listed: Sequence[Any], names: Sequence[str]) -> list[Any]:
    rest = [entry for entry in listed if not (isinstance(entry, str) and NUMBER.search(entry))]
    return list(dict.fromkeys([*rest, *names])) if len(rest) < len(listed) else rest


def _put(config: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a key in a config's section, or in the config if it has no such section."""
    inner = config
    for key in path[:-1]:
        section = inner.get(key)
        if not isinstance(section, dict):
            config[path[-1]] = value
            return
        inner[key] = dict(section)
        inner = inner[key]
    inner[path[-1]] = value
