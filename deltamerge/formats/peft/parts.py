"""The tensors of a PEFT adapter, module by module: factors, replaced rows, and whole tensors.

Names are `base_model.model.`, a module of the adapted model, and then `lora_A.weight`, `hada_w1_a`, `lokr_w1`,
`token_adapter.trainable_tokens_delta`, … A checkpoint of a training run has the adapter's name in them
(`lora_A.default.weight`). All other tensors (`modules_to_save`, biases) are whole and replace the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.peft.config import BY_PEFT, CONFIG, Adapter, tokens_of
from deltamerge.tensors.dtypes import PLAIN, bits_type
from deltamerge.tensors.dtypes import cast as cast_bits
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed

PREFIX = "base_model.model."
LAYER = ".base_layer"

_NAME = r"(?:\.(?!weight$|bias$)\w+)?"  # of the adapter
_PARTS = (
    re.compile(rf"(.+)\.lora_([AB]){_NAME}\.(weight|bias)"),
    re.compile(rf"(.+)\.lora_(embedding_[AB]){_NAME}"),
    re.compile(rf"(.+)\.lora_(magnitude)_vector{_NAME}(?:\.weight)?"),
    re.compile(rf"(.+)\.hada_(w[12]_[ab]|t[12]){_NAME}"),
    re.compile(rf"(.+)\.lokr_(w[12](?:_[ab])?|t2){_NAME}"),
)
_ROWS = re.compile(rf"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta{_NAME}")
_INSIDE = re.compile(r"\.modules_to_save\.(?:default\.)?|(?:\.token_adapter)?\.base_layer\.")  # of PEFT's wrappers
_UNKNOWN = re.compile(r"(^|\.)(lora_|hada_|lokr_)|token_adapter")


@dataclass(slots=True)
class Parts:
    """An adapter's tensors, by names without PEFT's prefix.

    modules   of each adapted module its factors: "A", "B", "B.bias", "embedding_A", "magnitude", "w1_a", …
    rows      of each module the rows of its weight that are replaced
    whole     tensors that replace the base's
    """

    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    rows: dict[str, TensorInfo] = field(default_factory=dict)
    whole: dict[str, TensorInfo] = field(default_factory=dict)

    def nested(self) -> dict[str, list[dict[str, TensorInfo]]]:
        """Of each module the factors of its parameters, the innermost of PEFT's wrappers first; of one parameter
        mostly."""
        found: dict[str, dict[int, dict[str, TensorInfo]]] = {}
        for module, factors in self.modules.items():
            root = module
            while root.endswith(LAYER):
                root = root.removesuffix(LAYER)
            found.setdefault(root, {})[(len(module) - len(root)) // len(LAYER)] = factors
        return {root: [levels[depth] for depth in sorted(levels, reverse=True)] for root, levels in found.items()}


def parts(adapter: Adapter) -> Parts:
    """The adapter's tensors by what they are. InputError: none, without PEFT's prefix, or not understood."""
    if not adapter.tensors:
        raise InputError("has no tensors", hint="save the adapter with peft's save_pretrained()")
    found = Parts()
    for name, info in adapter.tensors.items():
        inner = name.removeprefix(PREFIX)
        if inner == name:
            raise InputError(
                f"{name[:80]!r} does not begin with {PREFIX}", hint="save it with peft's save_pretrained()"
            )
        if info.dtype not in PLAIN:
            raise InputError(f"{name}: dtype {info.dtype}, must be one of {', '.join(sorted(PLAIN))}")
        part = next((match for pattern in _PARTS if (match := pattern.fullmatch(inner))), None)
        if part is not None:
            module, key, *bias = part.groups()
            _add(found.modules.setdefault(module, {}), key + (".bias" if bias == ["bias"] else ""), name, info)
        elif rows := _ROWS.fullmatch(inner):
            _add(found.rows, rows[1], name, info)
        elif _UNKNOWN.search(_INSIDE.sub(".", inner)):
            raise InputError(f"{name}: not a tensor of an adapter that can be read", hint=BY_PEFT)
        elif ".original_module." not in inner:
            key = _INSIDE.sub(".", inner)
            if key == inner or PREFIX + key not in adapter.tensors:  # save_embedding_layers stores a saved one twice
                _add(found.whole, key, name, info)
    return found


def _add(table: dict[str, TensorInfo], key: str, name: str, info: TensorInfo) -> None:
    if key in table:
        raise InputError(f"{name} and {table[key].name} are of two adapters", hint="save one with save_pretrained()")
    table[key] = info


def factor_names(adapter: Adapter) -> frozenset[str]:
    """The names of the adapter's A and B tensors."""
    keys = {"A", "B", "embedding_A", "embedding_B"}
    return frozenset(info.name for own in parts(adapter).modules.values() for key, info in own.items() if key in keys)


def factors_of(tensors: Mapping[str, TensorInfo], needed: tuple[str, ...], more: tuple[str, ...]) -> list[TensorInfo]:
    """The tensors `needed`. InputError: one is missing, or there is one that is neither needed nor in `more`."""
    if not set(needed) <= tensors.keys() <= {*needed, *more}:
        raise InputError(
            f"needs {' and '.join(needed)}, has {', '.join(sorted(tensors))}", hint="download the adapter again"
        )
    return [tensors[key] for key in needed]


@view(entrywise=True)
def replaced_rows(read: Read, tensor: Tensor, start: int, out: memoryview, *, places: tuple[int, ...]) -> None:
    """Replace the rows `places` of the first input by those of the second, in the first's dtype."""
    base, values = tensor.inputs
    target = np.frombuffer(out, bits_type(tensor.dtype))
    read.read_into(base, start, out)
    width, stop = math.prod(tensor.shape[1:]), start + len(target)
    for row, place in enumerate(places):
        low, high = max(start, place * width), min(stop, (place + 1) * width)
        if low < high:
            raw = np.empty(high - low, bits_type(values.dtype))
            read.read_into(values, row * width + low - place * width, raw)
            target[low - start : high - start] = cast_bits(raw, values.dtype, tensor.dtype)


def with_rows(info: TensorInfo, module: str, values: TensorInfo, config: Mapping[str, Any]) -> TensorInfo:
    """Return an embedding with its rows replaced. InputError: no ids for it, or another shape."""
    ids = next((ids for end, ids in tokens_of(config).items() if not end or f".{module}".endswith(f".{end}")), None)
    if ids is None:
        raise InputError(f"{CONFIG} has no trainable_token_indices for it", hint="download the adapter again")
    if values.shape != (len(ids), *info.shape[1:]) or max(ids, default=0) >= info.shape[0]:
        message = f"{len(ids)} rows {list(values.shape)} do not fit the base's {list(info.shape)}"
        raise InputError(message, hint="give the base added tokens first: resize_token_embeddings()")
    if info.dtype not in PLAIN:
        raise InputError(f"the base's weight is {info.dtype}", hint="adapters are merged into unquantised weights")
    return replace(info, tensor=viewed(replaced_rows, [info, values], info.shape, info.dtype, places=tuple(ids)))
