"""Quantised checkpoints read as plain ones: each weight is one float32 tensor, computed from its codes when it is read.

A scheme is one function, from the tensors that store a weight to the tensor that is read; `DECODERS` has them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.io.checkpoint import Checkpoint
from deltamerge.io.dtypes import CODES, PLAIN
from deltamerge.io.quantised import fp8
from deltamerge.io.quantised.detect import HINT, Scheme, keys_of, scheme_of
from deltamerge.io.quantised.weight import Stored
from deltamerge.io.tensor import TensorInfo

Decoder = Callable[[Stored], TensorInfo]

DECODERS: Mapping[str, Decoder] = {
    "fp8": fp8.decoded,
}


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with each quantised weight as one float32 tensor under its plain name, and without companions.

    The tensors' order is that of their codes. `quantised` says how they were stored; the config is left as it is.
    InputError, naming scheme and tensor: a scheme without a decoder, or parts that do not fit one another.
    """
    scheme = scheme_of(checkpoint.config, checkpoint.tensors)
    if scheme is None:
        return checkpoint
    decoder = DECODERS.get(scheme.name)
    if decoder is None:
        raise _unknown(scheme)
    settings = next((value for _, value in keys_of(checkpoint.config) if isinstance(value, Mapping)), {})
    dtype = plain_dtype(checkpoint)
    weight_of = {parts[0]: name for name, parts in scheme.weights.items()}
    companions = {part for parts in scheme.weights.values() for part in parts[1:]}
    tensors: dict[str, TensorInfo] = {}
    for stored, info in checkpoint.tensors.items():
        if stored in companions:
            continue
        if stored not in weight_of:
            tensors[stored] = info
            continue
        name = weight_of[stored]
        parts = tuple(checkpoint.tensors[part] for part in scheme.weights[name])
        with errors.context(name), errors.context(str(scheme)):
            made = decoder(Stored(name, parts, settings))
        tensors[name] = replace(made, saved_as=dtype)
    known = {part: checkpoint.tensors[part] for parts in scheme.weights.values() for part in parts}
    plain = {name: tensors[name] for name in scheme.weights}
    scheme = replace(scheme, stored=known, plain=plain, settings=settings)
    return replace(checkpoint, tensors=tensors, quantised=scheme)


def plain_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that a quantised model's weights have when they are not quantised: its config's, else that of most of
    its plain tensors, else bfloat16."""
    config: Mapping[str, Any] = checkpoint.config
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, Mapping) else {}):
        said = CODES.get(str(settings.get("dtype") or settings.get("torch_dtype")))
        if said in PLAIN:
            return str(said)
    usual = Counter(info.dtype for info in checkpoint.tensors.values() if info.dtype in PLAIN and len(info.shape) > 1)
    return usual.most_common(1)[0][0] if usual else "BF16"


def _unknown(scheme: Scheme) -> InputError:
    count, first = len(scheme.weights), next(iter(scheme.weights))
    some = f"{count} tensors such as {first} are" if count > 1 else f"{first} is"
    return InputError(f"is quantised ({scheme}): {some} stored as codes, which cannot be merged", hint=HINT)
