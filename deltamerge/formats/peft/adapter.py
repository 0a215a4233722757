"""A PEFT adapter as it is stored: its settings (`adapter_config.json`), and its tensors, module by module.

Names are `base_model.model.`, a module of the adapted model, and then `lora_A.weight`, `hada_w1_a`, `lokr_w1`,
`token_adapter.trainable_tokens_delta`, … A checkpoint of a training run has the adapter's name in them
(`lora_A.default.weight`). All other tensors (`modules_to_save`, biases) are whole and replace the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import PLAIN, bits_type
from deltamerge.tensors.dtypes import cast as cast_bits
from deltamerge.tensors.patterns import check, finds
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed

# Settings.


CONFIG = "adapter_config.json"
BY_PEFT = "merge it with peft first: merge_and_unload(), then save_pretrained()"
KINDS = ("LORA", "LOHA", "LOKR", "TRAINABLE_TOKENS")

# Settings that change the adapter's formula in ways that are not implemented.
_REFUSED = (
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "megatron_config",
)  # fmt: skip
_KNOWN = frozenset({
    "use_dora", "use_rslora", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "use_effective_conv2d",
})  # fmt: skip
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Initialisations that subtract the initial B A from the base. It can be computed again from the base's weights.
DERIVED = ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter, as its config and header say."""

    reference: str
    path: Path
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    config: dict[str, Any]
    revision: str | None = None
    hub_id: str | None = None


def checked_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of an adapter. InputError: another PEFT method, or settings that change the formula.

    Unknown keys are ignored, unless they turn something on (`use_…`, `…_config`).
    """
    with errors.context(CONFIG):
        kind = config.get("peft_type")
        if kind not in KINDS:
            raise InputError(f"peft_type {kind!r}: only {', '.join(KINDS)} adapters can be read", hint=BY_PEFT)
        unknown = [k for k in config if re.match("use_", k) or k.endswith("_config")]
        for key in (*_REFUSED, *(k for k in unknown if k not in _KNOWN)):
            if config.get(key) not in (None, False, [], {}):
                raise InputError(f"{key} is not supported", hint=BY_PEFT)
        _check_lists(config)
        if kind == "TRAINABLE_TOKENS":
            return config
        _check_start(config.get("init_lora_weights"))
        for key in ("r", "lora_alpha" if kind == "LORA" else "alpha"):
            _positive(config.get(key), key)
        for key in ("rank_pattern", "alpha_pattern"):
            table = config.get(key) or {}
            if not isinstance(table, dict):
                raise InputError(f"{key} is not a table")
            for pattern, value in table.items():
                _positive(value, f"{key}[{pattern[:80]!r}]")
                try:
                    check(pattern)
                except ValueError as error:
                    raise InputError(f"{key}: {pattern[:80]!r} is no regular expression: {error}") from error
        return config


def _check_start(start: Any) -> None:
    """InputError: an initialisation that changes the base's weights in a way that they do not tell (CorDA's data,
    random projections, LoftQ's codes)."""
    if not isinstance(start, str | bool | None) or start not in (*_INITIALISATIONS, *DERIVED):
        hint = "save it as plain LoRA: peft's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        raise InputError(f"init_lora_weights {start!r} changes the base's own weights", hint=hint)


def _check_lists(config: Mapping[str, Any]) -> None:
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise InputError("target_parameters is not a list of names")
    for indices in tokens_of(config).values():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise InputError("trainable_token_indices is not a list of ids")
        if len(set(indices)) < len(indices):
            raise InputError("trainable_token_indices has an id twice")


def tokens_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of the tokens whose rows an adapter replaces, by the end of the module's name; "" is any
    module."""
    key = "token_indices" if config.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices"
    said = config.get(key)
    return said if isinstance(said, dict) else {"": said} if said else {}


def _positive(value: Any, key: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{key} must be a positive number, got {str(value)[:80]!r}")


def scale_of(config: Mapping[str, Any], module: str, rank: int | None, most: float = math.inf) -> float:
    """Return the factor of a module's update: alpha / r, or alpha / √r (rsLoRA).

    The first pattern that matches the end of the module's name wins. InputError: the config gives another rank than the
    tensors have (`rank`; None: they do not tell), which have at most `most`.
    """

    def setting(table: str, default: str) -> float:
        for pattern, value in (config.get(table) or {}).items():
            if finds(rf"\A(.*\.)?({pattern})$", module):
                return float(value)
        return float(config[default])

    said = setting("rank_pattern", "r")
    if rank is not None and min(said, most) != rank:
        message = f"rank {rank}, {CONFIG} says {said:g}"
        raise InputError(message, hint="the config and the weights are not of one adapter")
    alpha = setting("alpha_pattern", "lora_alpha" if config.get("peft_type", "LORA") == "LORA" else "alpha")
    return alpha / (math.sqrt(said) if config.get("use_rslora") else said)


def parameters_of(config: Mapping[str, Any], module: str) -> list[str]:
    """Return the parameters of a module that `target_parameters` names: "gate_up_proj" of "….experts"."""
    found: Iterable[str] = (
        target.rpartition(".")[2]
        for target in config.get("target_parameters") or []
        if f".{module}.{target.rpartition('.')[2]}".endswith(f".{target}")
    )
    return list(dict.fromkeys(found))


# Tensors: factors of modules, replaced rows, and whole tensors.


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
        """Return the factors of each module's parameters, the innermost of PEFT's wrappers first.

        Most modules have one parameter.
        """
        found: dict[str, dict[int, dict[str, TensorInfo]]] = {}
        for module, factors in self.modules.items():
            root = module
            while root.endswith(LAYER):
                root = root.removesuffix(LAYER)
            found.setdefault(root, {})[(len(module) - len(root)) // len(LAYER)] = factors
        return {root: [levels[depth] for depth in sorted(levels, reverse=True)] for root, levels in found.items()}


def parts(adapter: Adapter) -> Parts:
    """Return the adapter's tensors by their role.

    InputError: there are none, or a name lacks PEFT's prefix or is unknown.
    """
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
    """Return the names of the adapter's A and B tensors."""
    keys = {"A", "B", "embedding_A", "embedding_B"}
    return frozenset(info.name for own in parts(adapter).modules.values() for key, info in own.items() if key in keys)


def factors_of(tensors: Mapping[str, TensorInfo], needed: tuple[str, ...], more: tuple[str, ...]) -> list[TensorInfo]:
    """Return the tensors `needed`. InputError: one is missing, or a tensor is neither needed nor in `more`."""
    if not set(needed) <= tensors.keys() <= {*needed, *more}:
        raise InputError(
            f"needs {' and '.join(needed)}, has {', '.join(sorted(tensors))}", hint="download the adapter again"
        )
    return [tensors[key] for key in needed]


@view(entrywise=True)
def replaced_rows(read: Read, tensor: Tensor, start: int, out: memoryview, *, places: tuple[int, ...]) -> None:
    """Replace the rows `places` of the first input by the second input's rows, in the first's dtype."""
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
