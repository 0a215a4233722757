"""A transformers model without weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltamerge.calibrate.model.transformers_code import running
from deltamerge.errors import InputError

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
    """Return the children of the numbered container that holds most parameters, if they are all of one class."""
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
    """Return the last hidden state of each body that returns while this lasts, in that order."""
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
    """Keys that rows have unasked and that a model's forward does not accept."""
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
    """(B, T) the inputs of a decoder that is to say `ids`: after its start token, by the model's own function if it has
    one. InputError: neither that nor a start token is known."""
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
