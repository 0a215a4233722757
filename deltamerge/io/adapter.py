"""PEFT's LoRA adapters on a base, read as if merged: only headers and configs are opened, weights are computed when
read.

The format is PEFT's: `adapter_config.json` and `adapter_model.safetensors`. Tensor names are `base_model.model.`, a
module of the adapted model, and then `lora_A.weight`, `lora_B.weight`, `lora_embedding_A`, `lora_embedding_B` or
`lora_magnitude_vector`. All other tensors (`modules_to_save`, biases) are whole and replace the base's.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.io.checkpoint import Adapter, Checkpoint
from deltamerge.io.computed import Cast, LowRank
from deltamerge.io.dtypes import ITEMSIZE, PLAIN
from deltamerge.io.files import input_error
from deltamerge.io.names import LM_HEAD, TOKEN_EMBEDDING
from deltamerge.io.patterns import check, finds
from deltamerge.io.quantised.decode import decoded
from deltamerge.io.strict_json import read_json
from deltamerge.io.tensor import TensorInfo
from deltamerge.io.weight_files import ALLOW, read_weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
BY_PEFT = "merge it with peft first: merge_and_unload(), then save_pretrained()"

_PART = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB])|lora_(magnitude)_vector(?:\.weight)?)")
# Settings that change the adapter's formula in ways that `LowRank` does not implement.
_REFUSED = (
    "layer_replication", "trainable_token_indices", "target_parameters", "lora_bias", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip
_KNOWN = frozenset({
    "use_dora", "use_rslora", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config",
})  # fmt: skip
# Other initialisations (pissa, olora, corda, lora_ga, loftq) change the base's weights too.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


class Factors(NamedTuple):
    """The LoRA tensors of one adapted module."""

    a: TensorInfo
    b: TensorInfo
    magnitude: TensorInfo | None
    embedding: bool


def open_adapter(
    path: Path, *, reference: str, revision: str | None = None, hub_id: str | None = None, pickles: bool = False
) -> Adapter:
    """The adapter in the folder `path`. InputError: no such folder, not a LoRA adapter, pickled (unless `pickles` are
    allowed), or unsupported settings."""
    with errors.context(reference):
        if not path.is_dir():
            raise InputError("is a file, not an adapter's folder" if path.exists() else "no such folder")
        try:
            names = os.listdir(path)
        except OSError as error:
            raise input_error(error) from error
        file = check_files(names, pickles=pickles)
        config = checked_config(read_json(path / CONFIG))
        tensors = read_weights(path / file).tensors
        return Adapter(reference, path, tensors, (path / file, path / CONFIG), config, revision, hub_id)


def check_files(names: Collection[str], *, pickles: bool = False) -> str:
    """The weight file of an adapter's folder with files of these `names`. InputError: it is none, or only pickled."""
    if CONFIG not in names:
        raise InputError(
            f"has no {CONFIG}: not a PEFT adapter", hint="after + stands the folder or hub id of an adapter"
        )
    if WEIGHTS not in names and PICKLED in names:
        if pickles:
            return PICKLED
        raise InputError(
            f"only {PICKLED}, a PyTorch pickle; deltamerge reads safetensors and never unpickles", hint=ALLOW
        )
    if WEIGHTS not in names:
        raise InputError(f"has no {WEIGHTS}", hint="save the adapter with peft's save_pretrained()")
    return WEIGHTS


def checked_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a LoRA adapter. InputError: another PEFT method, or settings that change the formula.

    Unknown keys are ignored, unless they turn something on (`use_…`, `…_config`).
    """
    with errors.context(CONFIG):
        kind = config.get("peft_type")
        if kind != "LORA":
            raise InputError(f"peft_type {kind!r}: only LORA adapters can be read", hint=BY_PEFT)
        unknown = [k for k in config if re.match("use_", k) or k.endswith("_config")]
        for key in (*_REFUSED, *(k for k in unknown if k not in _KNOWN)):
            if config.get(key) not in (None, False, [], {}):
                raise InputError(f"{key} is not supported", hint=BY_PEFT)
        start = config.get("init_lora_weights")
        if not isinstance(start, str | bool | None) or start not in _INITIALISATIONS:
            hint = "save it as plain LoRA: peft's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
            raise InputError(f"init_lora_weights {start!r} changes the base's own weights", hint=hint)
        for key in ("r", "lora_alpha"):
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


def _positive(value: Any, key: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{key} must be a positive number, got {str(value)[:80]!r}")


def expand(base: Checkpoint, adapter: Adapter, reference: str) -> Checkpoint:
    """`base` with `adapter` merged into it, tensor by tensor; names are those of the model that was adapted.

    A quantised base is decoded. InputError: it cannot be, or a tensor of the adapter that the base has no place for or
    whose shape does not fit.
    """
    with errors.context(base.reference):
        base = decoded(base)
    with errors.context(adapter.reference):
        modules, whole = parts(adapter)
        names = dict(base.tensors)
        wanted = [f"{module}.weight" for module in modules]
        untied = _untie(base, adapter, names, {*wanted, *whole})
        added, taken = _prefix(names, wanted or list(whole))
        tensors = {}
        for name, info in names.items():
            full = name if untied and name == LM_HEAD else added + name
            tensors[full] = replace(info, name=full)
        usual = next((info.output_dtype for info in tensors.values() if info.dtype in PLAIN), "F32")
        for name, info in whole.items():
            old = tensors.get(taken + name)
            if old is not None and old.shape != info.shape:
                message = f"{name} has the shape {list(info.shape)}, in the base {list(old.shape)}"
                raise InputError(message, hint="give the base added tokens first: resize_token_embeddings()")
            kept = taken + name if old is not None else name
            tensors[kept] = _cast(info, kept, usual if old is None else old.output_dtype)
        transposed = _transposed(adapter, modules, tensors, taken)
        for module, factors in modules.items():
            name = f"{taken}{module}.weight"
            with errors.context(module):
                if name not in tensors:
                    raise InputError(
                        f"the base has no {name}", hint="is this the base that the adapter was trained on?"
                    )
                scale = scale_of(adapter.config, module, factors.a.shape[0])
                flip = factors.embedding or transposed
                tensors[name] = _updated(tensors[name], factors, scale, flip)
        config = _config(base.config, adapter, {n: i.shape for n, i in whole.items() if n not in names}, untied)
    files = (*base.files, *adapter.files)
    return replace(base, reference=reference, tensors=tensors, files=files, config=config, adapter=adapter)


def parts(adapter: Adapter) -> tuple[dict[str, Factors], dict[str, TensorInfo]]:
    """The factors of every adapted module, and the whole tensors, by names without PEFT's prefix."""
    found: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    if not adapter.tensors:
        raise InputError("has no tensors", hint="save the adapter with peft's save_pretrained()")
    for name, info in adapter.tensors.items():
        inner = name.removeprefix(PREFIX)
        if inner == name:
            raise InputError(
                f"{name[:80]!r} does not begin with {PREFIX}", hint="save it with peft's save_pretrained()"
            )
        if info.dtype not in PLAIN:
            raise InputError(f"{name}: dtype {info.dtype}, must be one of {', '.join(sorted(PLAIN))}")
        if part := _PART.fullmatch(inner):
            module, linear, embedding, magnitude = part.groups()
            key = "magnitude" if magnitude else (linear or embedding) + ("_embedding" if embedding else "")
            found.setdefault(module, {})[key] = info
        elif "lora_" in inner or "token_adapter" in inner:
            raise InputError(f"{name}: not a tensor of plain LoRA", hint=BY_PEFT)
        else:
            whole[inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = info
    return {module: _factors(module, tensors) for module, tensors in found.items()}, whole


def factor_names(adapter: Adapter) -> frozenset[str]:
    """The names of the adapter's A and B tensors."""
    modules, _ = parts(adapter)
    return frozenset(info.name for f in modules.values() for info in (f.a, f.b))


def _factors(module: str, tensors: Mapping[str, TensorInfo]) -> Factors:
    with errors.context(module):
        embedding = "A_embedding" in tensors or "B_embedding" in tensors
        tail = "_embedding" if embedding else ""
        a, b = tensors.get("A" + tail), tensors.get("B" + tail)
        if a is None or b is None or len(tensors) > 2 + ("magnitude" in tensors):
            raise InputError(f"needs one A and one B, has {', '.join(sorted(tensors))}", hint="download it again")
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise InputError(f"A {list(a.shape)} and B {list(b.shape)} are no matrices (a convolution?)", hint=BY_PEFT)
        if a.shape[0] != b.shape[1] or not a.shape[0]:
            raise InputError(f"the ranks of A {list(a.shape)} and B {list(b.shape)} differ", hint="download it again")
        return Factors(a, b, tensors.get("magnitude"), embedding)


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of B A for a module: alpha / r, or alpha / √r (rsLoRA).

    The first pattern that matches the end of the module's name wins. InputError: the config gives another rank than the
    tensors have.
    """

    def setting(table: str, default: str) -> float:
        for pattern, value in (config.get(table) or {}).items():
            if finds(rf"\A(.*\.)?({pattern})$", module):
                return float(value)
        return float(config[default])

    if setting("rank_pattern", "r") != rank:
        message = f"rank {rank}, {CONFIG} says {setting('rank_pattern', 'r'):g}"
        raise InputError(message, hint="the config and the weights are not of one adapter")
    return setting("alpha_pattern", "lora_alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _prefix(names: Collection[str], wanted: Collection[str]) -> tuple[str, str]:
    """The prefixes to add to the base's names and to the adapter's, so that most of `wanted` are found.

    A base saved as BertModel has `encoder.…` where an adapted BertForSequenceClassification has `bert.encoder.…`, or
    the other way round.
    """
    first = next(iter(wanted), "").partition(".")[0] + "."
    heads = dict.fromkeys(name.partition(".")[0] + "." for name in names)
    choices = [("", ""), (first, ""), *(("", head) for head in heads)]
    return max(choices, key=lambda c: sum((c[1] + w).removeprefix(c[0]) in names for w in wanted))


def _transposed(
    adapter: Adapter, modules: Mapping[str, Factors], tensors: Mapping[str, TensorInfo], taken: str
) -> bool:
    """Whether the base stores linear weights as (in, out): told by shapes, else by the config."""
    for module, factors in modules.items():
        info = tensors.get(f"{taken}{module}.weight")
        straight = (factors.b.shape[0], factors.a.shape[1])
        if info is not None and not factors.embedding and straight[0] != straight[1]:
            return info.shape == straight[::-1]
    return bool(adapter.config.get("fan_in_fan_out"))


def _updated(info: TensorInfo, factors: Factors, scale: float, transposed: bool) -> TensorInfo:
    a, b, magnitude = factors.a, factors.b, factors.magnitude
    shape = (b.shape[0], a.shape[1])
    if info.shape != (shape[::-1] if transposed else shape):
        raise InputError(f"B A gives {list(shape)}, the base's weight is {list(info.shape)}")
    if info.dtype not in PLAIN:
        raise InputError(f"the base's weight is {info.dtype}", hint="adapters are merged into unquantised weights")
    if magnitude is not None and transposed:
        raise InputError("DoRA is only supported for linear layers stored (out, in)", hint=BY_PEFT)
    if magnitude is not None and magnitude.shape != shape[:1]:
        raise InputError(f"lora_magnitude_vector must have the shape {list(shape[:1])}, has {list(magnitude.shape)}")
    return replace(info, begin=0, made=LowRank(info, a, b, scale, transposed, magnitude))


def _cast(info: TensorInfo, name: str, dtype: str) -> TensorInfo:
    """A whole tensor in the base's dtype, as PEFT loads it into the base's module."""
    if info.dtype != dtype and dtype not in PLAIN:
        raise InputError(f"{name}: the base's weight is {dtype}, the adapter's {info.dtype}")
    if info.dtype == dtype:
        return replace(info, name=name)
    nbytes = math.prod(info.shape) * ITEMSIZE[dtype]
    return replace(info, name=name, dtype=dtype, begin=0, nbytes=nbytes, made=Cast(info, dtype))


def _untie(base: Checkpoint, adapter: Adapter, names: dict[str, TensorInfo], touched: set[str]) -> bool:
    """Give `names` a head of its own if the adapter changes the head, or the embedding that it is tied to.

    This is what PEFT's forward pass computes; PEFT's merge changes both tensors. Returns whether the result is untied.
    """
    architecture = str((base.config.get("architectures") or ["?"])[0])
    generates = re.search("ForCausalLM|LMHead", architecture) or adapter.config.get("task_type") == "CAUSAL_LM"
    if not generates or LM_HEAD in names or base.config.get("tie_word_embeddings") is False:
        return False
    found = [name for name in names if TOKEN_EMBEDDING.search(name)]
    ends = {name.rpartition(".")[0].rpartition(".")[2] for name in found}
    if LM_HEAD not in touched and not any(name.split(".")[-2] in ends for name in touched if name.endswith(".weight")):
        return False
    if len(found) != 1 or adapter.config.get("ensure_weight_tying"):
        message = "changes an embedding that is tied to the head"
        raise InputError(message, hint=BY_PEFT)
    names[LM_HEAD] = names[found[0]]
    return True


def _config(
    config: dict[str, Any], adapter: Adapter, added: Mapping[str, tuple[int, ...]], untied: bool
) -> dict[str, Any]:
    """The base's config, changed where the adapter brings a classifier or unties the head."""
    changed: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    task = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
    heads = [shape[0] for name, shape in added.items() if len(shape) == 2 and name.endswith("weight")]
    suffix = task.get(str(adapter.config.get("task_type")))
    if suffix and heads:
        old = str((config.get("architectures") or [""])[0])
        stem = re.match(r"(\w+?)(Model|For\w+|LMHeadModel)$", old)
        if stem:
            changed["architectures"] = [stem[1] + suffix]
        if heads[-1] != len(config.get("id2label") or (0, 1)):
            labels = {str(i): f"LABEL_{i}" for i in range(heads[-1])}
            changed |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    return config | changed
