"""Quantised checkpoints read as plain ones: each weight is one float32 tensor, computed from its codes when it is read.

`detect.FORMATS` has a row for each form that the tensors' names and dtypes tell (`detect.Scheme.kinds`): the file
that reads it, and the names of schemes that config.json calls it by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.quantised.detect import HINT, SCHEMES, Scheme, keys_of, moved, orphans, reader_of, scheme_of
from deltamerge.models.checkpoint import Checkpoint, by_component, recombined
from deltamerge.tensors.dtypes import CODES, PLAIN
from deltamerge.tensors.tensor import TensorInfo

if TYPE_CHECKING:
    from deltamerge.formats.quantised.scheme import StoredWeight


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with each quantised weight as one float32 tensor under its plain name, and without companions.

    The tensors' order is that of their codes. `quantised` says how they were stored; the config is left as it is.
    InputError, naming scheme and tensor: a scheme without a decoder, or parts that do not fit one another.
    """
    if not checkpoint.is_simple:
        inner = {folder: decoded(part) for folder, (part,) in by_component([checkpoint]) if part is not None}
        found = next((part.quantised for part in inner.values() if part.quantised is not None), None)
        return replace(checkpoint, tensors=recombined(checkpoint, inner), quantised=found)
    scheme = scheme_of(checkpoint.config, checkpoint.tensors)
    if scheme is None:
        return checkpoint
    if why := moved(checkpoint.config, checkpoint.tensors):
        raise InputError(f"is quantised ({scheme}), and {why}: they are not the model's own", hint=HINT)
    if lone := orphans(scheme, checkpoint.tensors):
        raise InputError(f"is quantised ({scheme}): {lone[0]} belongs to no weight", hint="download the model again")
    from deltamerge.formats.quantised.scheme import StoredWeight

    decoders = {name: _decoder(scheme, name, checkpoint.tensors[parts[0]]) for name, parts in scheme.weights.items()}
    settings = next((value for _, value in keys_of(checkpoint.config) if isinstance(value, Mapping)), {})
    weight_of = {parts[0]: name for name, parts in scheme.weights.items()}
    companions = {*scheme.dropped, *(part for parts in scheme.weights.values() for part in parts[1:])}
    dtype = plain_dtype(checkpoint, companions)
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
            made = decoders[name](StoredWeight(name, parts, settings))
        tensors[name] = replace(made, saved_as=dtype)
    known = {part: checkpoint.tensors[part] for part in (*weight_of, *companions)}
    plain = {name: tensors[name] for name in scheme.weights}
    return replace(checkpoint, tensors=tensors, quantised=replace(scheme, stored=known, plain=plain))


def plain_dtype(checkpoint: Checkpoint, companions: Collection[str] = ()) -> str:
    """The dtype that a quantised model's weights have when they are not quantised: its config's, else that of most of
    its plain tensors but `companions`, else bfloat16."""
    config: Mapping[str, Any] = checkpoint.config
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, Mapping) else {}):
        said = CODES.get(str(settings.get("dtype") or settings.get("torch_dtype")))
        if said in PLAIN:
            return str(said)
    others = (info for name, info in checkpoint.tensors.items() if name not in companions)
    usual = Counter(info.dtype for info in others if info.dtype in PLAIN and len(info.shape) > 1)
    return usual.most_common(1)[0][0] if usual else "BF16"


def _decoder(scheme: Scheme, weight: str, codes: TensorInfo) -> Callable[[StoredWeight], TensorInfo]:
    """Return the reader of one weight. InputError: none reads it, or config.json names a scheme of other forms."""
    kind = scheme.kinds[weight]
    if not kind and scheme.name in SCHEMES:
        scales = weight.endswith(("_scale", "_scales", "_scale_inv"))
        what = f"{weight} belongs to no weight" if scales else f"the scales of {weight} are missing"
        raise InputError(f"is quantised ({scheme}): {what}", hint="download the model again")
    read = reader_of(kind, scheme.name, codes)
    if read is None:
        raise _unknown(scheme, weight)
    return read


def _unknown(scheme: Scheme, first: str) -> InputError:
    count = sum(kind == scheme.kinds[first] for kind in scheme.kinds.values())
    some = f"{count} tensors such as {first} are" if count > 1 else f"{first} is"
    return InputError(f"is quantised ({scheme}): {some} stored as codes, which cannot be merged", hint=HINT)
