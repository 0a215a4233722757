"""A transformers model without weights, and how its parameters are made of a checkpoint's tensors.

transformers' own conversion tables say how. Most tensors are one to one, some renamed; `WeightConverter`s stack experts
that a file stores one by one, join or split projections, transpose. They only move entries, so running one on the
entries' places tells where each lies in the file.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltamerge.calibrate.model.transformers_code import running
from deltamerge.errors import InputError

Index = slice | Tensor
"""Rows or columns of a matrix: a slice, or their numbers (int64)."""

HINT = "calibration needs a checkpoint whose tensors this version of transformers loads"


class ShapedTensor(Protocol):
    """A tensor, or the header's entry of one."""

    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class StatePiece:
    """Where rows of a state's matrix lie in the file (its columns, where `turned`).

    file      the checkpoint's tensor
    lead      which of its matrices, where it stacks several
    at        the rows of the state's matrix
    rows      the same rows in the file's matrix
    columns   the file's columns, in the order of the state's
    turned    whether the file's matrix is transposed
    """

    file: str
    lead: int
    at: Index
    rows: Index
    columns: Index
    turned: bool = False


@dataclass(frozen=True, slots=True)
class StateGroup:
    """States of the module that are made together, of tensors of the file.

    states, files   their names
    patterns        of each file the converter's pattern that found it
    converter       transformers' converter; None where one file is one state
    """

    states: tuple[str, ...]
    files: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: Any = None


class Loading:
    """The groups of a model that loads `tensors`, the checkpoint's by name; tied weights appear once.

    InputError: the model has a parameter that nothing of the checkpoint makes.
    """

    def __init__(self, model: Any, tensors: Mapping[str, ShapedTensor]) -> None:
        self.model, self.tensors = model, tensors
        self._sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._known: dict[Any, dict[str, list[list[tuple[int, StatePiece]]]]] = {}
        single, converted = _matched(model, tensors)
        made = {state for group in converted for state in group.states}
        _untie(model, lambda name: name in single or name in made)
        tied = aliases(model)
        parameters = [name for name, _ in model.named_parameters()]
        buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
        self.groups: list[StateGroup] = []
        missing = []
        for name in [*parameters, *buffers]:
            file = next((single[n] for n in (name, *tied.get(name, ())) if n in single), None)
            if file is not None:
                self.groups.append(StateGroup((name,), (file,)))
            elif made.isdisjoint((name, *tied.get(name, ()))) and name in parameters and not _computed(model, name):
                missing.append(name)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"{type(model).__name__} needs {missing[0]}{more}, which the checkpoint lacks under that name",
                hint=HINT,
            )
        self.groups += converted

    @cached_property
    def checkpoint_name(self) -> dict[str, str]:
        """Return state name -> checkpoint name, for states that are one tensor of the file."""
        return {g.states[0]: g.files[0] for g in self.groups if g.converter is None}

    @cached_property
    def states(self) -> frozenset[str]:
        """Return every state that is made of the checkpoint."""
        return frozenset(state for group in self.groups for state in group.states)

    def shape(self, state: str) -> tuple[int, ...]:
        """Return a state's."""
        return self._sizes[state]

    def made(self, group: StateGroup, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the states of a group, from the tensors of the file; gradients flow through."""
        if group.converter is None:
            return {group.states[0]: found[group.files[0]]}
        return _convert(group, [found[file] for file in group.files], self.model)

    def pieces(self, group: StateGroup) -> dict[str, list[list[StatePiece]]]:
        """Return state -> where each of its matrices lies in the file. States that are no matrices of the file are left
        out."""
        if group.converter is None:
            shape = tuple(self.tensors[group.files[0]].shape)
            if len(shape) < 2:
                return {}
            whole = slice(0, shape[-2]), slice(0, shape[-2]), slice(0, shape[-1])
            return {group.states[0]: [[StatePiece(group.files[0], e, *whole)] for e in range(math.prod(shape[:-2]))]}
        shapes = tuple(tuple(self.tensors[file].shape) for file in group.files)
        sizes = tuple(self._sizes[state] for state in group.states)
        key = id(group.converter), group.patterns, shapes, sizes
        if key not in self._known:
            placed = _placed(group, shapes, self.model)
            self._known[key] = {str(group.states.index(state)): found for state, found in placed.items()}
        return {
            group.states[int(number)]: [
                [replace(piece, file=group.files[k]) for k, piece in matrix] for matrix in matrices
            ]
            for number, matrices in self._known[key].items()
        }


def checkpoint_names(model: Any, names: Collection[str]) -> dict[str, str]:
    """Return state name -> checkpoint name, for parameters and stored buffers; tied weights appear once.

    InputError: the checkpoint's tensors are not the model's one to one.
    """
    return Loading(model, {name: _Nothing() for name in names}).checkpoint_name


class _Nothing:
    shape: tuple[int, ...] = ()


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return the first name of every parameter -> its other names (tied weights)."""
    first: dict[nn.Parameter, str] = {}
    others: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in first:
            others.setdefault(first[parameter], []).append(name)
        else:
            first[parameter] = name
    return others


def _untie(model: nn.Module, stored: Callable[[str], bool]) -> None:
    """Untie a tied weight that the checkpoint also stores under its own name."""
    for name, others in aliases(model).items():
        for alias in others:
            if stored(name) and stored(alias):
                path, _, leaf = alias.rpartition(".")
                parent = model.get_submodule(path)
                setattr(parent, leaf, nn.Parameter(torch.empty_like(getattr(parent, leaf)), requires_grad=False))


def _computed(model: Any, name: str) -> bool:
    """Tell whether a parameter that no file has is always the same (sinusoidal positions); it is then given its
    values."""
    path, _, leaf = name.rpartition(".")
    module, values = model.get_submodule(path), []
    if list(module._parameters) != [leaf]:
        return False
    meta = module._parameters[leaf]
    with torch.random.fork_rng(devices=[]), running(f"transformers cannot compute {name}"):
        for seed in (0, 1):
            torch.manual_seed(seed)
            module._parameters[leaf] = nn.Parameter(torch.full(meta.shape, float("nan")), requires_grad=False)
            model._init_weights(module)
            values.append(module._parameters[leaf].detach())
    if torch.equal(*values):
        return True
    module._parameters[leaf] = meta
    return False


def _matched(model: Any, tensors: Mapping[str, ShapedTensor]) -> tuple[dict[str, str], list[StateGroup]]:
    """Match the file's tensors with states: return (state -> tensor, groups that a converter makes)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.state_dict())
    single: dict[str, str] = {}
    found: dict[str, tuple[Any, list[str], list[str]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        renamed, converter, pattern = name, None, None
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for candidate in converters:
            renamed, pattern = candidate.rename_source_key(renamed)
            if pattern is not None:
                converter = candidate
                break
        state = _spelled(renamed, there, model.base_model_prefix)
        if state is None:
            state, converter = _spelled(name, there, model.base_model_prefix), None
        if state is None:
            continue
        if converter is None or pattern is None:
            if state not in single or renamed == state:
                single[state] = name
            continue
        _, files, patterns = found.setdefault(state, (converter, [], []))
        files.append(name)
        patterns.append(pattern)
    groups = [
        _checked(StateGroup((state,), tuple(files), tuple(patterns), converter), tensors, model)
        for state, (converter, files, patterns) in found.items()
    ]
    return single, groups


def _spelled(name: str, there: Collection[str], prefix: str) -> str | None:
    """Return a name as the model has it: the same, or after `prefix.` is taken off or put before it."""
    spellings = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if prefix else (name,)
    return next((spelling for spelling in spellings if spelling in there), None)


def _checked(group: StateGroup, tensors: Mapping[str, ShapedTensor], model: Any) -> StateGroup:
    """Return the group with all states that its converter makes. InputError: they do not have the model's shapes."""
    shapes = [tuple(tensors[file].shape) for file in group.files]
    if any(isinstance(tensors[file], _Nothing) for file in group.files):
        message = f"{group.files[0]} is only a part of {type(model).__name__}'s {group.states[0]}"
        raise InputError(message, hint="its tensors are not the model's one to one")
    made = _convert(group, [torch.empty(shape, device="meta") for shape in shapes], model)
    wanted = model.state_dict()
    for state, tensor in made.items():
        there = tuple(wanted[state].shape) if state in wanted else None
        if tuple(tensor.shape) != there:
            raise InputError(
                f"{group.files[0]} and the tensors loaded with it make {state} of {list(tensor.shape)}, "
                f"and {type(model).__name__} has {'none' if there is None else list(there)}",
                hint=HINT,
            )
    return replace(group, states=tuple(made))


def _convert(group: StateGroup, tensors: Sequence[Tensor], model: Any) -> dict[str, Tensor]:
    """Return a group's states by its converter's operations, as `WeightConverter.convert` does it, but with
    gradients."""
    collected: dict[str, Any] = {}
    for pattern, tensor in zip(group.patterns, tensors, strict=True):
        collected.setdefault(pattern, []).append(tensor)
    first = group.states[0]
    with running(f"transformers cannot make {first} of {group.files[0]}", HINT):
        for operation in group.converter.operations:
            convert = inspect.unwrap(type(operation).convert)  # without its no_grad
            collected = convert(
                operation,
                collected,
                source_patterns=group.converter.source_patterns,
                target_patterns=group.converter.target_patterns,
                full_layer_name=first,
                model=model,
                config=model.config,
                missing_keys=None,
            )
    prefix, suffix = "", ""
    for target in collected:
        if target in first:
            prefix, _, suffix = first.partition(target)
            break
    return {prefix + t + suffix: v[0] if isinstance(v, list) else v for t, v in collected.items()}


def _placed(
    group: StateGroup, shapes: Sequence[tuple[int, ...]], model: Any
) -> dict[str, list[list[tuple[int, StatePiece]]]]:
    """Return the pieces of each state's matrices, with the numbers of their files: the converter, run on places."""
    if any(len(shape) < 2 for shape in shapes):
        return {}
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + math.prod(shape[:-1]))
    rows, columns = [], []
    for start, shape in zip(starts, shapes, strict=False):
        number = torch.arange(start, start + math.prod(shape[:-1]), dtype=torch.int32)
        rows.append(number.view(*shape[:-1], 1).expand(shape))
        columns.append(torch.arange(shape[-1], dtype=torch.int32).expand(shape))
    found: dict[str, list[list[tuple[int, StatePiece]]]] = {}
    of_rows, of_columns = _convert(group, rows, model), _convert(group, columns, model)
    for state, places in of_rows.items():
        if places.dim() < 2:
            continue
        r, c = (made.reshape(-1, *made.shape[-2:]) for made in (places, of_columns[state]))
        turned = not (_same(r, 2) and _same(c, 1))
        if turned and not (_same(r, 1) and _same(c, 2)):
            continue
        r, c = (r[:, 0], c[:, :, 0]) if turned else (r[:, :, 0], c[:, 0])
        matrices = zip(r.to(torch.int64), c.to(torch.int64), strict=True)
        found[state] = [list(_cut(*matrix, shapes, starts, turned=turned)) for matrix in matrices]
    return found


def _same(numbers: Tensor, axis: int) -> bool:
    """Tell whether numbers (E, rows, columns) are the same along an axis."""
    return bool((numbers == numbers.narrow(axis, 0, 1)).all())


def _cut(
    rows: Tensor, columns: Tensor, shapes: Sequence[tuple[int, ...]], starts: Sequence[int], *, turned: bool
) -> Iterator[tuple[int, StatePiece]]:
    """Yield the pieces of one matrix. `rows` (columns, where `turned`) and `columns` are places in the files."""
    bounds = torch.tensor(starts)
    of_file = torch.bucketize(rows, bounds, right=True) - 1
    for k in torch.unique(of_file).tolist():
        at = (of_file == k).nonzero()[:, 0]
        high = shapes[k][-2]
        own = rows[at] - starts[k]
        for lead in torch.unique(own // high).tolist():
            chosen = own // high == lead
            yield k, StatePiece("", lead, simple(at[chosen]), simple(own[chosen] % high), simple(columns), turned)


def simple(numbers: Tensor) -> Index:
    """Return a slice for ascending neighbours, else the numbers."""
    first = int(numbers[0])
    neighbours = torch.arange(first, first + len(numbers), device=numbers.device)
    return slice(first, first + len(numbers)) if torch.equal(numbers, neighbours) else numbers


UNASKED = frozenset({"token_type_ids", "decoder_attention_mask"})


class _OnMeta(TorchFunctionMode):
    """`torch.empty` gives meta tensors: weights are not allocated, while computed buffers (rotary tables) are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(config: Any, pad_token_id: int | None) -> Any:
    """Return the model of a config, built without weights. InputError: its architecture is unknown to transformers."""
    import transformers

    name = (config.architectures or ["?"])[0]
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise InputError(
            f"transformers {transformers.__version__} has no model class {name!r}", hint="remote code is never run"
        )
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))):
        if part is not None:  # a key-value cache would see a block's inputs twice
            part.use_cache = False
            part.__dict__.pop("quantization_config", None)  # weights are read as numbers
    # one matrix product per expert, which `products` sees
    config._experts_implementation = "eager"
    if pad_token_id is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id
    with running(f"transformers cannot build {name}"), torch.random.fork_rng(devices=[]), _OnMeta():
        model = cls(config)
    return model.requires_grad_(False).train(False)


def place_buffers(model: nn.Module, device: torch.device, stored: Collection[str]) -> None:
    """Move computed buffers to the device; stored ones stay on the meta device."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            key = f"{path}.{name}" if path else name
            if buffer is not None and key not in stored:
                module._buffers[name] = buffer.to(device)


def find_blocks(model: Any) -> tuple[nn.Module, ...]:
    """Return the blocks: the children of the numbered container with most parameters, if all have one class; else
    ()."""
    if getattr(model.config, "is_encoder_decoder", False):
        return ()
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return ()
    largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    one_class = len({type(child) for child in largest}) == 1
    return tuple(largest) if one_class and len(set(map(id, largest))) == len(largest) else ()


def bodies(model: Any) -> list[nn.Module]:
    """Return the base models inside a model with a head; the model itself if it has none."""
    from transformers import PreTrainedModel

    inner: list[nn.Module] = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    return [*inner, model] if model.base_model is model else inner


@contextmanager
def hidden_states(some: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the last hidden state of each body that returns, in that order."""
    hidden: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if state is not None:
            hidden.append(state)

    hooks = [body.register_forward_hook(keep) for body in some]
    try:
        yield hidden
    finally:
        for hook in hooks:
            hook.remove()


def ignored(model: nn.Module) -> frozenset[str]:
    """Return the keys of rows that a model's forward does not accept."""
    taken = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return frozenset()
    return UNASKED - {parameter.name for parameter in taken}


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer (a router of experts included): its own parameters are a matrix, and
    maybe a bias."""
    if isinstance(module, nn.Linear) or is_transposed(module):
        return True
    own = dict(module.named_parameters())
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    if own or weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return False
    return bias is None or bias.shape == weight.shape[:1]


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer whose weight is stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def shifted(model: Any, ids: Tensor) -> Tensor:
    """Return (B, T) the inputs of a decoder that must say `ids`: a start token, then `ids` without the last.

    The model's own function is used if it has one. InputError: no start token is known.
    """
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        with suppress(Exception):  # where it needs a start token that the config lacks
            made: Tensor = prepare(labels=ids)
            return made
    config = model.config.get_text_config(decoder=True)
    known = (getattr(config, key, None) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = next((token for token in known if token is not None), None)
    if start is None:
        raise InputError(f"{type(model).__name__} has no decoder_start_token_id", hint="set it in config.json")
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
