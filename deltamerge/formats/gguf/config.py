"""config.json from the key-value pairs of a GGUF file: transformers' own table of keys, and what it leaves out.

A key that changes what a model computes and has no place in the config is refused: the original's config.json, beside
the file, is then taken instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.formats.config_json import check_config
from deltamerge.formats.gguf.header import GgufHeader
from deltamerge.formats.gguf.names import GgufNames

HINT = "put the original model's config.json beside it, which is then taken"
# transformers' tables have other names for these.
TABLES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2", "t5encoder": "t5"}
# What its tables leave out, for every architecture and for some.
MORE = {"rope.freq_base": "rope_theta", "attention.layer_norm_epsilon": "layer_norm_epsilon"}
MORE_OF: Mapping[str, Mapping[str, str]] = {
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    },
    "gpt2": {"context_length": "n_positions", "feed_forward_length": "n_inner"},
    "lfm2": {"attention.layer_norm_rms_epsilon": "norm_eps"},
    "nemotron": {"attention.layer_norm_epsilon": "norm_eps"},
    "phi3": {"attention.sliding_window": "sliding_window"},
    "qwen2_moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3_moe": {"expert_feed_forward_length": "moe_intermediate_size"},
    "starcoder2": {"attention.sliding_window": "sliding_window"},
    "t5": {"decoder_block_count": "num_decoder_layers"},
    "umt5": {"decoder_block_count": "num_decoder_layers"},
}  # fmt: skip
PARTIAL = frozenset({"nemotron", "phi3", "stablelm"})  # of which a part of each head may be rotated
# Said by shapes, or of no effect.
SILENT = frozenset({
    "attention.key_length", "attention.value_length", "attention.causal", "tensor_data_layout", "vocab_size",
    "use_parallel_residual", "feed_forward_length", "expert_feed_forward_length", "attention.max_alibi_bias",
    "context_length", "rope.dimension_count", "attention.layer_norm_rms_epsilon",
})  # fmt: skip
SCALING = {"type", "factor", "original_context_length", "finetuned"}
LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
GATES = {0: "none", 1: "softmax", 2: "sigmoid"}
TIED = frozenset({"falcon", "bloom"})


def config_of(header: GgufHeader, known: GgufNames, names: Collection[str], rows: int) -> dict[str, Any]:
    """Return the config of a file whose tensors are `names`, with embeddings of `rows` tokens.

    InputError: a key that the config has no place for, or a value of another type.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    arch, pairs = header.architecture, header.pairs
    umt5 = known.model_type == "t5" and "umt5" in str(pairs.get("general.name")).lower()
    table_name = "umt5" if umt5 else TABLES.get(arch, arch)
    theirs: Mapping[str, Any] = GGUF_CONFIG_MAPPING
    if table_name not in theirs:
        raise InputError(f"this transformers has no config for {arch}", hint=f"upgrade transformers, or {HINT}")
    table: Mapping[str, str | None] = {**MORE, **theirs[table_name], **MORE_OF.get(table_name, {})}
    config: dict[str, Any] = {
        "architectures": [known.model.replace("T5", "UMT5") if umt5 else known.model],
        "model_type": "umt5" if umt5 else known.model_type,
        "tie_word_embeddings": "output.weight" not in names or arch in TIED,
        **GGUF_CONFIG_DEFAULTS_MAPPING.get(table_name, {}),
    }
    own = {key.removeprefix(f"{arch}."): value for key, value in pairs.items() if key.startswith(f"{arch}.")}
    unsaid = [f"{arch}.{key}" for key, value in own.items() if not _is_said(key, value, table, own)]
    rope = _rope(own, header.factors)
    if rope is None:
        unsaid += [*sorted(header.factors), *(f"{arch}.{key}" for key in own if key.startswith("rope.scaling."))]
    if unsaid:
        raise InputError(f"its {', '.join(unsaid[:4])} would be lost: transformers has no config for it", hint=HINT)
    for key, value in own.items():
        if (renamed := table.get(key)) is not None:
            config[renamed] = _plain(value)
    for key, renamed in theirs["tokenizer"].items():
        if renamed is not None and f"tokenizer.{key}" in pairs:
            config[renamed] = pairs[f"tokenizer.{key}"]
    config["vocab_size"] = rows
    if rope:
        config["rope_scaling"] = rope
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None
    config |= _by_family(known.model_type, own, names, config)
    check_config(config)
    return config


def _is_said(key: str, value: Any, table: Mapping[str, str | None], own: Mapping[str, Any]) -> bool:
    """Return whether a key's value comes into the config, or need not."""
    if table.get(key) is not None or key in SILENT:
        return True
    if key == "attention.head_count_kv":
        return bool(value == own.get("attention.head_count"))
    return key.startswith("rope.scaling.") or not value


def _rope(own: Mapping[str, Any], factors: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Return the `rope_scaling` of a config; {} where there is none, None where it cannot be told.

    Llama 3.1's is told by its factors, which are those of one set of numbers and no other (`llama3_factors`).
    """
    said = {key.removeprefix("rope.scaling."): value for key, value in own.items() if key.startswith("rope.scaling.")}
    kind = said.get("type", "none")
    if "rope_freqs.weight" in factors:
        stored = np.frombuffer(factors["rope_freqs.weight"], "<f4")
        size, theta = own.get("rope.dimension_count"), own.get("rope.freq_base", 10000.0)
        if len(factors) > 1 or kind != "none" or size != 2 * len(stored) or not np.isfinite(stored).all():
            return None
        rope = LLAMA3 | {"factor": float(stored.max())}
        return rope if np.allclose(llama3_factors(rope, size, theta), stored, rtol=1e-5, atol=0) else None
    if factors:
        return None
    if kind == "none":
        return {}
    rope = {"rope_type": kind, "factor": said.get("factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = said.get("original_context_length")
    is_known = kind in ("linear", "yarn") and said.keys() <= SCALING and all(rope.values())
    return {key: _plain(value) for key, value in rope.items()} if is_known else None


def llama3_factors(rope: Mapping[str, Any], size: int, theta: float) -> NDArray[np.float64]:
    """Return the divisors of the rotary frequencies of a head of `size` in Llama 3.1.

    They are 1 for wavelengths below a quarter of the original context, the factor above all of it, and between them a
    straight line of the inverse (transformers, modeling_rope_utils.py).
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((old / wavelengths - low) / (high - low), 0, 1)
    found: NDArray[np.float64] = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return found


def _plain(value: Any) -> Any:
    """Return a float32 as the shortest decimal that is rounded to it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _by_family(
    model_type: str, own: Mapping[str, Any], names: Collection[str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that follow from several keys, or from the tensors."""
    made: dict[str, Any] = {}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    key_length, rotated = own.get("attention.key_length"), own.get("rope.dimension_count")
    if type(heads) is int and type(hidden) is int and heads > 0:
        size = key_length if type(key_length) is int else hidden // heads
        if size * heads != hidden and "head_dim" not in config:
            made["head_dim"] = size
        if model_type in PARTIAL and type(rotated) is int and size:
            made["partial_rotary_factor"] = rotated / size
    if model_type == "stablelm":
        made["use_qkv_bias"] = any(name.endswith(("attn_q.bias", "attn_k.bias", "attn_v.bias")) for name in names)
        made["use_parallel_residual"] = not any("ffn_norm" in name for name in names)
    if model_type == "t5":
        gated = any("ffn_gate" in name for name in names)
        made["feed_forward_proj"] = "gated-gelu" if gated else "relu"
    if model_type == "lfm2" and isinstance(kv := own.get("attention.head_count_kv"), list) and kv:
        made |= {"num_key_value_heads": max(kv), "block_auto_adjust_ff_dim": False}
        made["layer_types"] = ["full_attention" if heads else "conv" for heads in kv]
    if model_type == "minimax_m2" and type(gate := config.get("scoring_func")) is int:
        made["scoring_func"] = GATES.get(gate, "softmax")
    return made
