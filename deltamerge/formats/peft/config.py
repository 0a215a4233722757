"""The settings of a PEFT adapter (`adapter_config.json`): which change its formula, and the factor of a module."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.tensors.patterns import check, finds
from deltamerge.tensors.tensor import TensorInfo

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
# Initialisations that subtract from the base what A and B begin with, which the base's own weights give again.
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
    """The config of an adapter. InputError: another PEFT method, or settings that change the formula.

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
    """The ids of the tokens whose rows an adapter replaces, by the end of the module's name; "" is any module."""
    key = "token_indices" if config.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices"
    said = config.get(key)
    return said if isinstance(said, dict) else {"": said} if said else {}


def _positive(value: Any, key: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{key} must be a positive number, got {str(value)[:80]!r}")


def scale_of(config: Mapping[str, Any], module: str, rank: int | None, most: float = math.inf) -> float:
    """The factor of a module's update: alpha / r, or alpha / √r (rsLoRA).

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
    """The parameters of a module that `target_parameters` names: "gate_up_proj" of "….experts"."""
    found: Iterable[str] = (
        target.rpartition(".")[2]
        for target in config.get("target_parameters") or []
        if f".{module}.{target.rpartition('.')[2]}".endswith(f".{target}")
    )
    return list(dict.fromkeys(found))
