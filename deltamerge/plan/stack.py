"""The tensors of the output and their sources: names as they are, or layers stacked and renumbered."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from deltamerge.errors import InputError, Problem, RecipeError
from deltamerge.formats.quantised.detect import without_keys
from deltamerge.plan.inputs import Input, InputGroup, Inputs, ties
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.dtypes import COPIED, FLOATING
from deltamerge.tensors.names import (
    BEFORE_LAYERS,
    LM_HEAD,
    TOKEN_EMBEDDING,
    block_of,
    blocks_of,
    layer_index,
    layer_position,
)
from deltamerge.tensors.tensor import Tensor, TensorInfo

if TYPE_CHECKING:
    from deltamerge.plan.layer_config import Followed, Kind, Place


# Floating-point buffers that old versions of transformers wrote into every layer; newer ones do not read them.
BUFFERS = re.compile(
    r"(^|\.)(rotary_emb(eddings)?\.(inv_freq|cos_cached|sin_cached)|(attn|attention|self_attn)\.masked_bias"
    r"|1\.EncDecAttention\.relative_attention_bias\.weight)$"
)
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")


@dataclass(frozen=True)
class Spares:
    """The tensors of numbered blocks that some of `models` may lack.

    - a whole block beyond the count of layers in its model's config (layers for multi-token prediction:
    `model.layers.61` of 61 layers); if no config counts them, a whole last block with a tensor that no layer has in all
    models

    - every block of a container that a model lacks altogether (`mtp.layers`, a decoder, a vision tower), unless the
    model has a container that the others lack, which may be the same under another name

    - buffers
    """

    models: Sequence[Input]

    def holds(self, name: str) -> bool:
        """Tell whether a tensor that some models lack may be copied or left out."""
        found = [tensor for model in self.models if (tensor := model.get(name)) is not None]
        if any(map(is_buffer, found)):
            return True
        if not found or len(found) == len(self.models):
            return False
        place = block_of(name)
        return place is not None and place in self._spare

    @cached_property
    def _spare(self) -> frozenset[tuple[str, int]]:
        from deltamerge.plan.layer_config import layer_count

        blocks = [blocks_of(model.tensors) for model in self.models]
        counts = [
            {p: layer_count(model.checkpoint.config, model.container(p), numbers) for p, numbers in own.items()}
            for model, own in zip(self.models, blocks, strict=True)
        ]
        spare = set()
        theirs: dict[
            tuple[int, ...], list[bool]
        ] = {}  # for the models with a block: whether it is the last block of each
        for prefix, number in {(prefix, n) for own in blocks for prefix, numbers in own.items() for n in numbers}:
            owners = tuple(i for i, own in enumerate(blocks) if number in own.get(prefix, ()))
            lackers = [i for i, own in enumerate(blocks) if number not in own.get(prefix, ())]
            known = [counts[i][prefix] for i in owners]
            beyond = all(count is not None and number >= count for count in known)
            beyond |= all(count is None for count in known) and self._is_odd(prefix, number)
            if owners not in theirs:
                every = {other for i in owners for other in blocks[i]}
                theirs[owners] = [bool(own) and own.keys() <= every for own in blocks]
            if lackers and all(beyond or (prefix not in blocks[i] and theirs[owners][i]) for i in lackers):
                spare.add((prefix, number))
        return frozenset(spare)

    @cached_property
    def _kinds(self) -> list[dict[str, dict[int, set[str]]]]:
        """Return each model's blocks by container and number: the endings of their tensors' names, after the number."""
        found: list[dict[str, dict[int, set[str]]]] = []
        for model in self.models:
            own: dict[str, dict[int, set[str]]] = {}
            for name in model.tensors:
                if (place := block_of(name)) is not None:
                    rest = name[len(place[0]) :].split(".", 2)[-1]
                    own.setdefault(place[0], {}).setdefault(place[1], set()).add(rest)
            found.append(own)
        return found

    @cached_property
    def _usual(self) -> dict[str, tuple[int, set[str]]]:
        """Return each container's last number that every model has (-1: none), and the content of such blocks."""
        found = {}
        for prefix in {prefix for own in self._kinds for prefix in own}:
            kinds = [own.get(prefix, {}) for own in self._kinds]
            shared = set.intersection(*map(set, kinds))
            found[prefix] = max(shared, default=-1), {rest for own in kinds for n in shared for rest in own[n]}
        return found

    def _is_odd(self, prefix: str, number: int) -> bool:
        """Tell whether a block after all shared blocks holds a tensor that no shared block has."""
        last, usual = self._usual[prefix]
        own = [blocks[number] for kinds in self._kinds if number in (blocks := kinds.get(prefix, {}))]
        return 0 <= last < number and all(block - usual for block in own)


def is_buffer(tensor: Tensor | TensorInfo) -> bool:
    """Tell whether a tensor of a layer is a buffer rather than a weight: a mask, a table of frequencies."""
    name, shape = tensor.name, tensor.shape
    if tensor.dtype not in FLOATING | COPIED or BUFFERS.search(name):
        return True
    return CAUSAL_MASK.search(name) is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def named(names: Sequence[str], show: Callable[[Iterable[str]], str]) -> str:
    """Name tensors in a message. Tensors of numbered blocks are named by their block."""
    blocks: dict[str, int] = {}
    for name in names:
        place = block_of(name)
        key = name if place is None else f"{place[0]}.{place[1]}"
        blocks[key] = blocks.get(key, 0) + 1
    return show(f"{key} ({count} tensors)" if count > 1 else key for key, count in blocks.items())


# Names that mergekit gives parts of a model, where they are not components of tensor names.
SPELLINGS = {"text_decoder": "language_model", "default": ""}
LAST_MODULES = ("decoder", "text_decoder", "language_model", "text_model", "default")

# Names of one part in different families; the first name in the file stands for all names of its row.
LANGUAGE = ("language_model", "text_model", "llm", "language_backbone")
VISION = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "vision_backbone", "vit")
PROJECTOR = ("multi_modal_projector", "connector", "mm_projector", "aligner", "projector", "merger")
COMPONENT = re.compile(r"[./]")  # separator of a name's components
ROWS = (LANGUAGE, VISION, PROJECTOR)
_OTHER = re.compile(r"vision|visual|image|audio|video|speech|projector|connector")


class ModuleFinder:
    """The module of every tensor of a model, by its name in the files.

    The first component of the tensor's name that is a module, or another name of the same part, decides. A language
    model without a module of its own (Qwen2-VL: `model.layers` beside `visual`) consists of the tensors beside its
    token embedding. The head belongs to the decoder.
    """

    def __init__(self, wanted: Iterable[str | None], names: Iterable[str]) -> None:
        names = list(names)
        self.wanted = dict.fromkeys(wanted)
        self.components = {SPELLINGS.get(m, m): m for m in self.wanted if m is not None}
        self.stem: tuple[str, str] | None = None
        self.found: dict[str, str] = {}
        present = {part for name in names for part in COMPONENT.split(name)}
        for module in [m for m in self.components if m and m not in present]:
            row = next((row for row in ROWS if module in row), ())
            other = next((one for one in row if one in present and one not in self.components), None)
            if other is not None:
                self.components[other] = self.components.pop(module)
                self.found[module] = f"{other}.*"
            elif module in LANGUAGE and (stem := _beside_embedding(names)) is not None:
                self.stem = (stem, self.components.pop(module) or module)
                self.found[module] = f"{stem}*"

    def describe(self) -> list[str]:
        """Return the names in the file of modules that have other names there."""
        return [f"module {module}: {names} in the file" for module, names in self.found.items()]

    def of(self, name: str) -> str | None:
        """Return the module of a tensor, by its name in the files."""
        if None in self.wanted or "default" in self.wanted:
            return None if None in self.wanted else "default"
        parts = COMPONENT.split(name)
        known = next((self.components[part] for part in parts if part in self.components), None)
        if known is not None:
            return known
        if name == LM_HEAD or name.endswith(f".{LM_HEAD}"):
            return next((module for module in LAST_MODULES if module in self.wanted), None)
        if self.stem is not None and name.startswith(self.stem[0]) and not any(map(_OTHER.search, parts)):
            return self.stem[1]
        return None


def _beside_embedding(names: Iterable[str]) -> str | None:
    """Return the prefix of the only token embedding, with its dot; None if there are several, or none."""
    stems = {name[: found.start(1)] + found[1] for name in names if (found := TOKEN_EMBEDDING.search(name))}
    return stems.pop() if len(stems) == 1 else None


# Tensors outside layers that hold a part for each layer.
PER_LAYER = re.compile(r"(^|[._])per_layer([._]|$)")


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output.

    name       canonical name
    stored     name in the output's files
    group      the inputs that it is merged from; None: it is the template's
    position   its layer's position, from 0 to 1
    owner      the model whose dtype it has, and whose `tensor` it is if it is not merged
    sources    every input of the group, and the canonical name of the tensor there
    """

    name: str
    stored: str
    group: InputGroup | None
    position: float
    owner: Input
    tensor: TensorInfo
    sources: tuple[tuple[Input, str], ...]


@dataclass(frozen=True, slots=True)
class StackedLayer:
    """A layer of the output: its inputs, and its number relative to their ranges."""

    group: InputGroup
    offset: int
    position: float

    def source(self, model: Input) -> int:
        """Return the layer's number in a model."""
        return self.group.range_of(model)[0] + self.offset


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers stacked into the numbered container `prefix` ("layers", "encoder.block"), which had `old` layers."""

    prefix: str
    old: int
    layers: tuple[StackedLayer, ...]

    def owner(self, layer: StackedLayer, template: Input) -> Input:
        """Return the model that determines the tensors of a merged layer: the template if it contributes, else the
        first."""
        known = (m for m in layer.group.all if m.checkpoint.reference == template.checkpoint.reference)
        return next(known, layer.group.tunes[0])

    def extra(self, model: Input, template: Input) -> list[str]:
        """Return the tensors of a model's layers that the layers' owners do not have."""
        found = []
        for layer in self.layers:
            lent = next((m for m in layer.group.all if m.name == model.name), None)
            owner = self.owner(layer, template)
            if lent is not None:
                start, kin = (f"{self.prefix}.{layer.source(m)}." for m in (lent, owner))
                found += [
                    n for n in lent.tensors if n.startswith(start) and kin + n.removeprefix(start) not in owner.tensors
                ]
        return found

    def holds(self, name: str) -> bool:
        """Tell whether a tensor belongs to a layer of the container."""
        return _inside(name, self.prefix)

    def describe(self) -> str:
        """Return the stack in words: "6 layers: ./a 0-3, ./b 2-3"."""
        groups = dict.fromkeys(layer.group for layer in self.layers)
        texts = []
        for group in groups:
            ranges = ((m.name, group.range_of(m)) for m in group.all)
            texts.append(" + ".join(f"{name} {first}-{end - 1}" for name, (first, end) in ranges))
        return f"{len(self.layers)} layers of {self.prefix}, of {self.old} before: {', '.join(texts)}"


def repaired_config(inputs: Inputs, stacks: Sequence[Stack]) -> tuple[dict[str, Any], list[str]]:
    """Return the template's config for the output's layers and head, with plain weights, and messages about the
    changes."""
    config, notes = dict(inputs.template.checkpoint.config), []
    for stack in stacks:
        config, changes = _for_layers(config, inputs.template, stack)
        notes += [f"config.json: {change}" for change in changes]
    if config and inputs.untied and LM_HEAD in inputs.template.tensors and ties(config, default=True):
        inner = config.get("text_config")
        if isinstance(inner, dict) and "tie_word_embeddings" in inner:
            config["text_config"] = {**inner, "tie_word_embeddings": False}
        config["tie_word_embeddings"] = False
        notes.append("config.json: tie_word_embeddings → false")
    return without_keys(config), notes


def _for_layers(config: dict[str, Any], template: Input, stack: Stack) -> tuple[dict[str, Any], list[str]]:
    """Return a config of the template for a stack's layers, and the changes."""
    from deltamerge.plan.layer_config import Stacked, repair, settle

    sources = []
    for layer in stack.layers:
        owner = stack.owner(layer, template)
        sources.append((owner.name, owner.checkpoint.config, layer.source(owner)))
    alone, kinds = _alone(template, stack.prefix), _kinds(stack, template)
    places = [(name, layer) for name, _, layer in sources]

    def settled(section: dict[str, Any], followed: Followed) -> list[str]:
        return settle(Stacked(template.name, *kinds, places, followed), section)

    return repair(config, template.container(stack.prefix), stack.old, sources, alone, settled)


def _kinds(stack: Stack, template: Input) -> tuple[list[Kind], list[Kind]]:
    """Return the kinds of the template's layers and of the new layers."""
    from deltamerge.plan.layer_config import Kind

    old = _kinds_of(template, stack.prefix)
    owners = [(stack.owner(layer, template), layer) for layer in stack.layers]
    of_owners = {id(owner): _kinds_of(owner, stack.prefix) for owner, _ in owners}
    new = [of_owners[id(owner)].get(layer.source(owner), Kind()) for owner, layer in owners]
    return [old.get(number, Kind()) for number in range(stack.old)], new


def _kinds_of(model: Input, prefix: str) -> dict[int, Kind]:
    """Return the kind of every numbered layer, without buffers."""
    from deltamerge.plan.layer_config import Kind

    found: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in model.tensors.items():
        if _inside(name, prefix) and not is_buffer(tensor):
            number, _, rest = name.removeprefix(prefix + ".").partition(".")
            found.setdefault(int(number), set()).add((rest, tensor.shape))
    return {number: Kind(kind) for number, kind in found.items()}


def targets(recipe: Recipe, inputs: Inputs, spares: Spares) -> tuple[list[Target], list[Stack]]:
    """Return the tensors of the output in order, and its stacks. `spares` are no layers and do not count.

    RecipeError: a range beyond a model's layers, or a module without tensors. InputError: layers that cannot be stacked
    because they are not numbered plainly.
    """
    scopes = _scopes(recipe, inputs)
    sliced = {module: groups for module, groups in scopes.items() if groups[0].part.ranges is not None}
    stacks = {module: _stack(recipe, inputs, groups, module) for module, groups in sliced.items()}
    finder = ModuleFinder(scopes, inputs.template.stored.values())
    modules = {name: finder.of(stored) for name, stored in inputs.template.stored.items()}
    counts: dict[tuple[str | None, str], int] = {}  # a component's layers are its own
    for name, module in modules.items():
        if not spares.holds(name):
            place = module, name.rpartition("/")[0]
            counts[place] = max(counts.get(place, 1), 1 + (layer_index(name) or 0))
    found: list[Target] = []
    done: set[str | None] = set()
    for name, module in modules.items():
        groups, stack = scopes.get(module, []), stacks.get(module)
        if stack is None or not _inside(name, stack.prefix):
            group = groups[0 if BEFORE_LAYERS.search(name) else -1] if groups else None
            position = (
                0.0 if stack is not None else layer_position(name, counts.get((module, name.rpartition("/")[0]), 1))
            )
            found.append(_plain(name, inputs.template, group, position))
        elif module not in done:
            done.add(module)
            found += _stacked(stack, inputs.template)
    return found, list(stacks.values())


def behind(stacks: Sequence[Stack], models: Sequence[Input]) -> Iterator[tuple[Input, list[str]]]:
    """Yield the tensors of blocks that follow each model's layers, which a stack has no place for."""
    for stack in stacks:
        for model in models:
            count = _count(model, stack.prefix, _numbers(model.tensors, stack.prefix))
            place = ((name, name.removeprefix(stack.prefix + ".").partition(".")[0]) for name in model.tensors)
            names = [name for name, number in place if stack.holds(name) and int(number) >= count]
            if names:
                yield model, names


def like_template(target: Target, stacks: Sequence[Stack], template: Input) -> TensorInfo | None:
    """Return the template's tensor whose shape a target must have: the same one, or in a layer one of its kind.

    Layers of one model may differ in shape (in some MoE models they do), so the shape of any layer is accepted.
    """
    if not stacks:
        return None
    stack = next((s for s in stacks if s.holds(target.name)), None)
    if stack is None:
        return template.get(target.name)
    rest = target.name.removeprefix(stack.prefix + ".").partition(".")[2]
    first = None
    for number in range(stack.old):
        tensor = template.get(f"{stack.prefix}.{number}.{rest}")
        if tensor is not None and tensor.shape == target.tensor.shape:
            return tensor
        first = first or tensor
    return first


def _plain(name: str, template: Input, group: InputGroup | None, position: float) -> Target:
    sources = tuple((model, name) for model in group.all) if group is not None else ()
    return Target(name, template.stored[name], group, position, template, template.tensors[name], sources)


def _stacked(stack: Stack, template: Input) -> Iterator[Target]:
    """Yield the tensors of every layer: its owner's, with the new number and the template's names."""
    container = template.container(stack.prefix)
    spelled = {  # the endings after the number, in canonical names and in the template's
        _behind(name, stack.prefix): _behind(stored, container)
        for name, stored in template.stored.items()
        if _inside(name, stack.prefix)
    }
    for number, layer in enumerate(stack.layers):
        owner = stack.owner(layer, template)
        start = f"{stack.prefix}.{layer.source(owner)}."
        for name, tensor in owner.tensors.items():
            if not name.startswith(start):
                continue
            rest = name.removeprefix(start)
            sources = tuple((m, f"{stack.prefix}.{layer.source(m)}.{rest}") for m in layer.group.all)
            new = f"{stack.prefix}.{number}.{rest}"
            stored = f"{container}.{number}.{spelled.get(rest, rest)}"
            yield Target(new, stored, layer.group, layer.position, owner, tensor, sources)


def _scopes(recipe: Recipe, inputs: Inputs) -> dict[str | None, list[InputGroup]]:
    """Return the groups of each module, in order; without modules all belong to None."""
    scopes: dict[str | None, list[InputGroup]] = {}
    for group in inputs.groups:
        scopes.setdefault(group.part.module, []).append(group)
    stored = list(inputs.template.stored.values())
    finder = ModuleFinder(scopes, stored)
    found = set(map(finder.of, stored))
    for module in scopes:
        if module is not None and module not in found:
            present = dict.fromkeys(part for n in stored for part in re.split(r"[./]", n)[: 1 if "/" in n else 2])
            hint = f"default is the whole model; names here: {', '.join([p for p in present if not p.isdigit()][:8])}"
            problem = recipe.problem(("modules", module), f"no tensor of {inputs.template.name} belongs to it", hint)
            raise RecipeError(recipe.source.path, [problem])
    return scopes


def _inside(name: str, prefix: str) -> bool:
    rest = name.removeprefix(prefix + ".")
    return rest != name and rest.partition(".")[0].isdigit()


def _behind(name: str, prefix: str) -> str:
    """Return the end of the name of a layer's tensor, after the layer's number."""
    return name.removeprefix(prefix + ".").partition(".")[2]


def _stack(recipe: Recipe, inputs: Inputs, groups: Sequence[InputGroup], module: str | None) -> Stack:
    scopes = dict.fromkeys(group.part.module for group in inputs.groups)
    prefix, old = _container(inputs.template, module, scopes)
    layers = []
    problems: list[Problem] = []
    for group in groups:
        for model in group.all:
            count = min(len(numbers := _numbers(model.tensors, prefix)), _count(model, prefix, numbers))
            first, end = group.range_of(model)
            if end > count:
                member = group.base_member if model.index is None else group.part.members.index(model.index)
                at = (*group.part.places[member], "layer_range")
                problems.append(recipe.problem(at, f"is [{first}, {end}), {model.name} has {count} layers"))
        n = group.part.layers
        layers += [StackedLayer(group, i, i / (n - 1) if n > 1 else 1.0) for i in range(n)]
    if problems:
        raise RecipeError(recipe.source.path, problems)
    stack = Stack(prefix, old, tuple(layers))
    _check_outside(inputs.template, stack)
    return stack


def _container(template: Input, module: str | None, scopes: Mapping[str | None, object]) -> tuple[str, int]:
    """Return the prefix of the numbered layers that slices stack, and their number.

    The first number in a tensor's name counts: experts and blocks inside a layer belong to it. InputError: no such
    numbering, two of them (an encoder and a decoder, two towers), or stages of different width.
    """
    found: dict[str, set[int]] = {}
    modules = ModuleFinder(scopes, template.stored.values())
    inside: dict[str, bool] = {}
    for name, stored in template.stored.items():
        block = block_of(name.rpartition(".")[0])
        if block is not None:
            found.setdefault(block[0], set()).add(block[1])
            inside[block[0]] = inside.get(block[0], False) or modules.of(stored) == module
    whole = {prefix: len(numbers) for prefix, numbers in found.items() if numbers == set(range(len(numbers)))}
    from deltamerge.plan.layer_config import count_keys

    config, where = template.checkpoint.config, f"{template.name}: slices"
    places = {p: set(count_keys(config, template.container(p), n, alone=_alone(template, p))) for p, n in whole.items()}
    counted = {p: n for p, n in whole.items() if places[p] and inside[p]}
    behind = {p: n for p in found if inside[p] and (n := _count(template, p, found[p])) < len(found[p])}
    counted = counted or behind
    if not counted:
        names = ", ".join(f"{prefix} (0-{count - 1})" for prefix, count in whole.items() if inside[prefix]) or "none"
        hint = "without modules, merge whole models with `models`"
        raise InputError(f"{where} need numbered layers whose count config.json has; found {names}", hint=hint)
    shared = {p: both for p in counted if (both := _shared(p, places)) is not None}
    if len(counted) > 1 and len(shared) < len(counted):
        hint = "name one: modules: {encoder: {slices: …}}; a module is a component of the tensors' names"
        raise InputError(f"{where} could stack {' or '.join(sorted(counted))}", hint=hint)
    prefix, count = min(counted.items())
    if prefix in shared:
        other, key = shared[prefix]
        message = f"{where} of {prefix} would change {key} of config.json, which counts {other} too"
        raise InputError(message, hint="merge whole models with `models`")
    _check_width(template, prefix)
    return prefix, count


def _shared(prefix: str, places: Mapping[str, Collection[Place]]) -> tuple[str, str] | None:
    """Return another container whose count the config states by a key of `prefix`, and that key; None: there is
    none."""
    for other, keys in places.items():
        common = [] if other == prefix else sorted(set(keys) & set(places.get(prefix, ())))
        if common:
            return other, ".".join((*common[0][0], common[0][1]))
    return None


def _check_outside(template: Input, stack: Stack) -> None:
    """Raise InputError if the layers have changed and a tensor outside has a part for each of them."""
    moved = [layer.source(stack.owner(layer, template)) for layer in stack.layers] != list(range(stack.old))
    for name, tensor in template.tensors.items() if moved and stack.old > 1 else ():
        parts = any(size % stack.old == 0 for size in tensor.shape)
        if parts and PER_LAYER.search(name) and not stack.holds(name):
            message = f"{template.name}: {template.stored[name]} has a part for each of {stack.old} layers"
            raise InputError(f"{message}, which cannot follow slices", hint="merge whole models with `models`")
    lists = Counter(name.rpartition(".")[0] for name in template.tensors if name.rpartition(".")[2].isdigit())
    for name, count in lists.items() if moved and stack.old > 1 else ():
        if count == stack.old and not _inside(f"{name}.0", stack.prefix) and not stack.holds(name):
            message = f"{template.name}: {name} has a tensor for each of {stack.old} layers, which cannot follow slices"
            raise InputError(message, hint="merge whole models with `models`")


def _alone(template: Input, prefix: str) -> bool:
    """Tell whether a decoder's layers are the model's only layers."""
    return not any("encoder" in name.split(".") for name in template.tensors) or "encoder" in prefix.split(".")


def _check_width(template: Input, prefix: str) -> None:
    """Raise InputError if layers are stages, whose norms differ in width, so that they cannot be reordered.

    Norms of heads may differ: layers may have heads of several sizes.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in template.tensors.items():
        if _inside(name, prefix) and len(tensor.shape) == 1 and "norm" in name.lower():
            number, _, rest = name.removeprefix(prefix + ".").partition(".")
            layers.setdefault(number, {})[rest] = tensor.shape
    first, *others = layers.values() or [{}]
    for norms in others:
        shared = [rest for rest in norms if rest in first]
        if shared and all(norms[rest] != first[rest] for rest in shared):
            message = f"{template.name}: {prefix} are stages of different width ({shared[0]}), which cannot be stacked"
            raise InputError(message, hint="merge whole models with `models`")


def _numbers(names: Mapping[str, object], prefix: str) -> set[int]:
    return {int(name.removeprefix(prefix + ".").partition(".")[0]) for name in names if _inside(name, prefix)}


def _count(model: Input, prefix: str, numbers: Collection[int]) -> int:
    """Return the number of layers among numbered blocks, without blocks that follow them, by the config."""
    from deltamerge.plan.layer_config import layer_count

    config, alone = model.checkpoint.config, _alone(model, prefix)
    count = layer_count(config, model.container(prefix), numbers, alone=alone)
    return len(numbers) if count is None else count
