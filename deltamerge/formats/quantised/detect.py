"""Recognise quantised checkpoints: which scheme stores which weights as codes, by names, dtypes and config.json.

A quantised weight is one tensor stored as several: codes and their companions (scales, zeros, shapes). Merging these
one by one gives nonsense, so a merge that does not decode them must recognise them. A config alone proves nothing: a
dequantised checkpoint may have kept its key.

`FORMATS` has a row for each form of a weight that a file of this folder reads, and `_RULES` its tensors' names. Rules
without a row are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from deltamerge.tensors.dtypes import PLAIN
from deltamerge.tensors.tensor import TensorInfo

if TYPE_CHECKING:
    from deltamerge.formats.quantised.scheme import StoredWeight

KEYS = ("quantization_config", "quantization", "compression_config")
HINT = (
    "merge the originals that are not quantised, or dequantise it with the library that made it "
    "(transformers: model.dequantize(), then save_pretrained)"
)
UNNAMED = "a scheme that config.json does not name"
DEEPEST = 6
# Integers that are never codes: masks, positions.
BUFFERS = frozenset({"I64", "U64", "BOOL"})


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint's weights are quantised.

    name      the scheme's name in config.json (`fp8`, `modelopt`)
    detail    its blocks or bits, if config.json states them
    weights   the tensors that store each quantised weight, by its plain name, codes first
    kinds     the form of each weight, from the names and dtypes of its tensors: a key of `FORMATS`, the name of a rule
              without a reader, or "" if the tensors do not tell. Schemes of several names may share a form
    dropped   tensors that belong to no weight, but to the quantisation of keys, values and activations
    stored, plain   the stored tensors, and the weights that they give, by name, once the checkpoint is decoded
    """

    name: str
    detail: str = ""
    weights: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    stored: Mapping[str, TensorInfo] = field(default_factory=dict, compare=False, repr=False)
    plain: Mapping[str, TensorInfo] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name + (f", {self.detail}" if self.detail else "")


class Format(NamedTuple):
    """A form of weights: the file that reads and writes it, and config.json's names of schemes that have it.

    Its own name is always one.
    """

    module: str
    schemes: frozenset[str] = frozenset()


_COMPRESSED_TENSORS = "compressed-tensors"
FORMATS: Mapping[str, Format] = {
    "fp8": Format("fp8", frozenset({"fbgemm_fp8", "FP8", "quark", "modelopt", _COMPRESSED_TENSORS})),
    _COMPRESSED_TENSORS: Format("packed"),
    "mxfp4": Format("mxfp4"),
    "nvfp4": Format("nvfp4", frozenset({"modelopt"})),
    "packed-fp4": Format("nvfp4", frozenset({_COMPRESSED_TENSORS})),
    "gptq": Format("gptq"),
    "awq": Format("awq"),
    "bitsandbytes": Format("bitsandbytes"),
    "mlx": Format("mlx"),
    "metal": Format("mlx"),
}
SCHEMES = frozenset(FORMATS).union(*(form.schemes for form in FORMATS.values()))


def reader_of(kind: str, scheme: str) -> Callable[[StoredWeight], TensorInfo] | None:
    """Return `read` of the file for a form of weights; None: none reads it, or no scheme of that name has it."""
    form = FORMATS.get(kind)
    if form is None or not (kind == scheme or scheme in form.schemes):
        return None
    module = import_module(f"{__package__}.{form.module}")  # not at the start of every command
    read: Callable[[StoredWeight], TensorInfo] = module.read
    return read


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a scheme names its tensors: `codes` in a module beside `needs` (all of them) and perhaps `more`.

    `coded`: the codes must not be plain floats, since a module may have a parameter of the companion's name.
    """

    scheme: str
    codes: str
    needs: tuple[str, ...]
    more: tuple[str, ...] = ()
    coded: bool = False


_ACTIVATIONS = (
    "input_scale", "activation_scale", "activation_scale_inv", "input_zero_point", "output_scale", "output_zero_point",
    "input_global_scale", "output_global_scale",
)  # fmt: skip
# Of cached keys and values, and of queries and probabilities beside them.
_CACHE = re.compile(r"(?:^|[._])(?:[qkv]|kv|prob_output)_(?:scale|zero_point|global_scale)$")
_COMPRESSED = ("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")
# Names that only companions have.
_ORPHANS = re.compile(
    r"_scale_inv$|\.absmax$|(?:^|\.)(?:weight_(?:packed|scale|scale_2|zero_point|g_idx|shape)|qweight|qzeros|scales|SCB)$"
)
# What inputs are multiplied by, and was divided out of the weights, which are then not the model's own.
_MOVED = re.compile(r"(?:^|\.)(?:pre_quant_scale|act\.scales)$")
_RULES = (
    _Rule("fp8", "weight", ("weight_scale_inv",), _ACTIVATIONS),
    _Rule("nvfp4", "weight", ("weight_scale", "weight_scale_2"), _ACTIVATIONS, coded=True),
    _Rule(_COMPRESSED_TENSORS, "weight_packed", ("weight_scale",), (*_COMPRESSED, *_ACTIVATIONS)),
    _Rule(_COMPRESSED_TENSORS, "weight", ("weight_scale",), (*_COMPRESSED, *_ACTIVATIONS), coded=True),
    _Rule("gptq", "qweight", ("scales", "g_idx"), ("qzeros",)),
    _Rule("awq", "qweight", ("scales",), ("qzeros",)),
    _Rule("bitsandbytes", "weight", ("SCB",), ("weight_format",)),
    _Rule("mlx", "weight", ("scales", "biases"), coded=True),
    _Rule("metal", "weight", ("scales", "qbiases"), coded=True),
    _Rule("mlx", "weight", ("scales",), coded=True),
    _Rule("hqq", "W_q", ("scale",), ("zero",)),
    _Rule("aqlm", "codes", ("codebooks",), ("scales",)),
    _Rule("quanto", "_data", ("_scale",), ("_shift",), coded=True),
    _Rule(UNNAMED, "weight", ("scale",), ("zero_point", *_ACTIVATIONS), coded=True),
)
# Suffixes of companions, whatever the codes are called.
_SUFFIXES = (
    ("fp8", "_scale_inv", False),
    ("bitsandbytes", ".absmax", False),
    (UNNAMED, "_scale", True),
)
_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
MOST_STATE = 100_000  # bytes
_BITSANDBYTES = (".quant_map", ".nested_absmax", ".nested_quant_map", ".nested_offset", *_STATES)


def scheme_of(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Scheme | None:
    """Return the scheme of a checkpoint's quantised weights; None if nothing is quantised.

    Its name comes from config.json, or from the tensors' names. float8 weights without scales count as a plain cast,
    unless config.json says that they are quantised.
    """
    name, detail = stated(config) or ("", "")
    found = dict(_paired(tensors, named=bool(name)))
    if name:
        known = {part for _, parts in found.values() for part in parts}
        found |= {weight: ("", (weight,)) for weight in _lone_codes(tensors, known)}
    parts = {part for _, parts in found.values() for part in parts}
    dropped = tuple(_dropped(config, tensors, parts)) if name or found else ()
    if not found and not dropped:
        return None
    told = next((kind for kind, _ in found.values() if kind), UNNAMED)
    weights = {weight: parts for weight, (_, parts) in found.items()}
    kinds = {weight: kind for weight, (kind, _) in found.items()}
    name = told if name in ("", UNNAMED) else name
    return Scheme(name, detail, MappingProxyType(weights), MappingProxyType(kinds), dropped)


def moved(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return the reason why quantised weights are scaled or rotated against the activations, else None."""
    found = next((name for name in tensors if _MOVED.search(name)), None)
    if found is not None:
        return f"{found} scales the inputs of its weights"
    for _, part in keys_of(config):
        for key in ("transform_config", "rotation"):  # compressed-tensors, gptqmodel
            if isinstance(part, Mapping) and part.get(key):
                return f"{key} rotates its weights"
    return None


def orphans(scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of companions of weights that are not there."""
    known = {part for parts in scheme.weights.values() for part in parts}
    return [name for name in tensors if _ORPHANS.search(name) and name not in known]


def _dropped(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], parts: set[str]) -> Iterator[str]:
    """Yield the names of scales that belong to activations, or to the cache of keys and values.

    A model may have parameters with such names. They are no single numbers, and config.json does not mention a cache.
    """
    said = any("kv_cache" in str(key) and value for _, part in keys_of(config) for key, value in _items(part))
    for name, info in tensors.items():
        of_cache = _CACHE.search(name) and (said or math.prod(info.shape) == 1)
        if name not in parts and (of_cache or name.rpartition(".")[2] in _ACTIVATIONS):
            yield name


def _items(settings: Any) -> Iterable[tuple[Any, Any]]:
    return settings.items() if isinstance(settings, Mapping) else ()


def states_of(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the tensors whose bytes hold the shape of a weight: bitsandbytes' quantisation states."""
    return [name for name, info in tensors.items() if name.endswith(_STATES) and info.nbytes <= MOST_STATE]


def stated(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the scheme that a config names (at its top level or in a part's config) and its details, or None."""
    for _, settings in keys_of(config):
        return _name(settings), _detail(settings)
    return None


def keys_of(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of each key of a config that speaks of quantisation."""
    for key in KEYS:
        if config.get(key):
            yield (key,), config[key]
    for key, inner in config.items():
        if isinstance(inner, Mapping) and key not in KEYS and depth < DEEPEST:
            yield from (((key, *path), value) for path, value in keys_of(inner, depth + 1))


def without_keys(config: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Return a config without its keys about quantisation."""
    result = {key: value for key, value in config.items() if key not in KEYS}
    return {
        key: without_keys(value, depth + 1) if isinstance(value, Mapping) and depth < DEEPEST else value
        for key, value in result.items()
    }


def _name(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return _shown(settings)
    known = next((settings[key] for key in ("quant_method", "quant_algo", "format") if settings.get(key)), None)
    if known is not None:
        return _shown(known)
    if any(str(key).startswith(("load_in_", "_load_in_")) for key in settings):
        return "bitsandbytes"
    return "mlx" if "group_size" in settings and "bits" in settings else UNNAMED


def _detail(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return ""
    block, bits, algorithm = (settings.get(key) for key in ("weight_block_size", "bits", "quant_algo"))
    if isinstance(settings.get("config_groups"), Mapping):
        return _grouped(settings)
    if isinstance(block, list) and block:
        return f"blocks of {'×'.join(map(_shown, block[:4]))}"
    if algorithm and settings.get("quant_method"):
        return _shown(algorithm)
    return f"{bits} bits" if type(bits) is int else ""


def _grouped(settings: Mapping[str, Any]) -> str:
    """Return the format of compressed-tensors, and the bits and blocks of its groups."""
    words = [_shown(settings["format"])] if settings.get("format") else []
    for group in settings["config_groups"].values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            size, block = weights.get("group_size"), weights.get("block_structure")
            by = f"groups of {size}" if type(size) is int and size > 0 else _shown(weights.get("strategy") or "tensor")
            by = f"blocks of {'×'.join(map(_shown, block[:4]))}" if isinstance(block, list) and block else by
            words.append(f"{_shown(weights.get('num_bits', 8))} bits by {by}")
    return ", ".join(dict.fromkeys(words[:5]))


def _shown(value: Any) -> str:
    """Return the name that a stranger's config gives a scheme, on one line."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:40])


def _paired(tensors: Mapping[str, TensorInfo], *, named: bool) -> Iterator[tuple[str, tuple[str, tuple[str, ...]]]]:
    """Yield each quantised weight, its form by its tensors' names, and its tensors.

    `named`: a config mentions quantisation, so scales beside plain floats count as companions too.
    """
    for name, info in tensors.items():
        stem, _, last = name.rpartition(".")
        start = f"{stem}." if stem else ""
        coded = info.dtype not in PLAIN | BUFFERS
        if name.endswith("_blocks") and (scales := name.removesuffix("_blocks") + "_scales") in tensors:
            yield name.removesuffix("_blocks"), ("mxfp4", (name, scales))
            continue
        for rule in _RULES:
            if last != rule.codes or not (coded or not rule.coded or (named and rule.scheme != UNNAMED)):
                continue
            if all(start + part in tensors for part in rule.needs):
                parts = [start + part for part in (*rule.needs, *rule.more) if start + part in tensors]
                yield _weight(stem, name, last), (_kind(rule, info, tensors[parts[0]]), (name, *parts))
                break
        else:
            yield from _suffixed(name, info, tensors)


def _kind(rule: _Rule, codes: TensorInfo, scales: TensorInfo) -> str:
    """Return the form of a weight whose names match `rule`, by dtypes and shapes."""
    if codes.dtype.startswith("F8") and rule.codes == "weight":
        return "fp8"
    if codes.dtype in ("U8", "F4") and rule.codes == "weight_packed":
        return "packed-fp4"
    unordered = rule.scheme == "awq" and codes.shape[-1:] == scales.shape[-1:]
    return "gptq" if unordered else rule.scheme


def _weight(stem: str, name: str, last: str) -> str:
    """Return the name of the unquantised weight that codes store."""
    if last == "_data":
        return stem
    return name if last == "weight" else f"{stem}.weight" if stem else "weight"


def _suffixed(
    name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, tuple[str, tuple[str, ...]]]]:
    coded = info.dtype not in PLAIN | BUFFERS
    for scheme, suffix, only_coded in _SUFFIXES:
        if name + suffix in tensors and (coded or not only_coded):
            more: list[str] = []
            if scheme == "bitsandbytes":
                more = [name + part for part in _BITSANDBYTES if name + part in tensors]
            kind = "fp8" if info.dtype.startswith("F8") else scheme
            yield name, (kind, (name, name + suffix, *more))
            return


def _lone_codes(tensors: Mapping[str, TensorInfo], known: set[str]) -> Iterator[str]:
    """Yield weights that are not plain floats and have no known companion."""
    for name, info in tensors.items():
        last = name.rpartition(".")[2]
        codes = info.dtype not in PLAIN | BUFFERS and len(info.shape) > 1 and "bias" not in last
        if codes and name not in known:
            yield name
