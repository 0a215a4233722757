"""A transformers model without weights, and the names that its tensors have in a checkpoint."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deltamerge.calibrate.foreign import running
from deltamerge.errors import InputError
from deltamerge.io.names import resolve_prefix

UNASKED = frozenset({"token_type_ids"})


class _OnMeta(TorchFunctionMode):
    """`torch.empty` gives meta tensors: weights are not allocated, while computed buffers (rotary tables) are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(config: Any, pad_token_id: int | None) -> Any:
    """The model of a config, built without weights. InputError: its architecture is unknown to transformers."""
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
    if pad_token_id is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id
    with running(f"transformers cannot build {name}"), torch.random.fork_rng(devices=[]), _OnMeta():
        model = cls(config)
    return model.requires_grad_(False).train(False)


def checkpoint_names(model: Any, names: Collection[str]) -> dict[str, str]:
    """State name -> checkpoint name, for parameters and stored buffers; tied weights appear once."""
    # transformers renames some checkpoints (ViT) as it loads them
    renamed = {_rename(name, transforms): name for transforms in [_renamings(model)] for name in names}
    prefix = model.base_model_prefix
    _untie(model, lambda name: resolve_prefix([name], renamed, prefix)[name] is not None)
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    found = resolve_prefix([*parameters, *buffers], renamed, prefix)
    tied = aliases(model)
    for name in parameters:
        alias = next((a for a in tied.get(name, ()) if resolve_prefix([a], renamed, prefix)[a] is not None), None)
        if found[name] is None and alias is not None:
            found[name] = resolve_prefix([alias], renamed, prefix)[alias]
    missing = [name for name in parameters if found[name] is None]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{type(model).__name__} needs {missing[0]}{more}, which the checkpoint lacks under that name",
            hint="calibration needs a checkpoint whose tensors transformers loads one to one",
        )
    return {name: renamed[key] for name, key in found.items() if key is not None}


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name of every parameter -> its other names (tied weights)."""
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


def _renamings(model: Any) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4 does not rename
        return []
    return [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]


def _rename(name: str, transforms: Sequence[Any]) -> str:
    for transform in transforms:
        name = transform.rename_source_key(name)[0]
    return name


def place_buffers(model: nn.Module, device: torch.device, stored: Collection[str]) -> None:
    """Move computed buffers to the device; stored ones stay on the meta device."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            key = f"{path}.{name}" if path else name
            if buffer is not None and key not in stored:
                module._buffers[name] = buffer.to(device)


def find_blocks(model: Any) -> tuple[nn.Module, ...]:
    """The children of the numbered container that holds most parameters, if they are all of one class."""
    if getattr(model.config, "is_encoder_decoder", False):
        return ()
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return ()
    largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    one_class = len({type(child) for child in largest}) == 1
    return tuple(largest) if one_class and len(set(map(id, largest))) == len(largest) else ()


def bodies(model: Any) -> list[nn.Module]:
    """The base models inside a model with a head; the model itself if it has none."""
    from transformers import PreTrainedModel

    inner: list[nn.Module] = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    return [*inner, model] if model.base_model is model else inner


def ignored(model: nn.Module) -> frozenset[str]:
    """Keys that tokenizers return unasked and that a model's forward does not accept."""
    taken = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return frozenset()
    return UNASKED - {parameter.name for parameter in taken}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer (a router of experts included): its own parameters are a matrix, and maybe a
    bias."""
    if isinstance(module, nn.Linear) or is_transposed(module):
        return True
    own = dict(module.named_parameters())
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    if own or weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return False
    return bias is None or bias.shape == weight.shape[:1]


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
