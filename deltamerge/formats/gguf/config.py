"""The names that a GGUF file's tensors have in transformers, and config.json from its key-value pairs.

Names are by architecture, for all architectures that transformers reads. Each table follows transformers' loader
(integrations/ggml.py, modeling_gguf_pytorch_utils.py), and tests compare them. Names outside the table are refused.

A key that changes what a model computes and has no place in the config is refused, unless the original's config.json
lies beside the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.formats.components import check_config
from deltamerge.formats.gguf.file import GgufHeader

Names = Mapping[str, str]
BLOCK = re.compile(r"(?P<side>(?:enc\.|dec\.)?)blk\.(?P<number>\d+)\.(?P<rest>.+)")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = _ATTENTION | _NORMS | _GATED
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_up_exps.weight": "mlp.experts.gate_up_proj", "ffn_down_exps.weight": "mlp.experts.down_proj",
}  # fmt: skip
_SHARED = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip
_GEMMA = _ATTENTION | _GATED | {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_H = {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"}
_FUSED = {
    "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h", "attn_norm": "input_layernorm",
}  # fmt: skip
_T5_TOP = {
    "token_embd": "shared", "output": "lm_head", "enc.output_norm": "encoder.final_layer_norm",
    "dec.output_norm": "decoder.final_layer_norm",
}  # fmt: skip
_T5_SELF = {
    "attn_q": "layer.0.SelfAttention.q", "attn_k": "layer.0.SelfAttention.k", "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o", "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
}  # fmt: skip
_T5_CROSS = {
    "cross_attn_q": "layer.1.EncDecAttention.q", "cross_attn_k": "layer.1.EncDecAttention.k",
    "cross_attn_v": "layer.1.EncDecAttention.v", "cross_attn_o": "layer.1.EncDecAttention.o",
    "cross_attn_norm": "layer.1.layer_norm",
}  # fmt: skip


def _t5_mlp(layer: int) -> dict[str, str]:
    inner = f"layer.{layer}.DenseReluDense"
    parts = {"ffn_gate": "wi_0", "ffn_up": "wi_1", "ffn_down": "wo"}
    return {k: f"{inner}.{v}" for k, v in parts.items()} | {"ffn_norm": f"layer.{layer}.layer_norm"}


@dataclass(frozen=True, slots=True)
class GgufNames:
    """How transformers names the tensors of an architecture of GGUF.

    model_type   of its config, `model` the class of its causal language model
    top          names outside blocks, `block` within one, of layers that are called `stem`.N: GGUF's without its
                 ".weight" or ".bias", or whole, to transformers'
    sides        the stems and names of an encoder and a decoder, by "enc." and "dec."
    less_one     norms are stored as w + 1
    halves       q and k are stored for a rotary embedding of neighbours
    fused        q, k and v are interleaved by heads
    transposed   of names whose weights are Conv1D's
    """

    model_type: str
    model: str
    block: Names = field(default_factory=lambda: MappingProxyType(_DENSE))
    top: Names = field(default_factory=lambda: MappingProxyType(_TOP))
    stem: str = "model.layers"
    sides: Mapping[str, tuple[str, Names]] = field(default_factory=dict)
    less_one: bool = False
    halves: bool = False
    fused: bool = False
    transposed: frozenset[str] = frozenset()

    def name(self, stored: str) -> str | None:
        """Return transformers' name of a tensor, or None."""
        found = BLOCK.fullmatch(stored)
        if found is None:
            return _named(self.top, stored)
        stem, names = self.sides.get(found["side"], (self.stem, self.block))
        if found["side"] and not self.sides:
            return None
        inner = _named(names, found["rest"])
        return None if inner is None else f"{stem}.{int(found['number'])}.{inner}"


def _named(names: Names, stored: str) -> str | None:
    if stored in names:
        return names[stored]
    stem, dot, last = stored.rpartition(".")
    return f"{names[stem]}.{last}" if dot and last in ("weight", "bias") and stem in names else None


_MLP = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_T5 = GgufNames(
    "t5", "T5ForConditionalGeneration", {}, _T5_TOP,
    sides={"enc.": ("encoder.block", _T5_SELF | _t5_mlp(1)),
           "dec.": ("decoder.block", _T5_SELF | _T5_CROSS | _t5_mlp(2))},
)  # fmt: skip
ARCHITECTURES: Mapping[str, GgufNames] = {
    "llama": GgufNames("llama", "LlamaForCausalLM", halves=True),
    "qwen2": GgufNames("qwen2", "Qwen2ForCausalLM"),
    "qwen3": GgufNames("qwen3", "Qwen3ForCausalLM", _DENSE | _HEAD_NORMS),
    "qwen2moe": GgufNames("qwen2_moe", "Qwen2MoeForCausalLM", _DENSE | _EXPERTS | _SHARED),
    "qwen3moe": GgufNames("qwen3_moe", "Qwen3MoeForCausalLM", _DENSE | _EXPERTS | _HEAD_NORMS),
    "minimax-m2": GgufNames(
        "minimax_m2", "MiniMaxM2ForCausalLM",
        _DENSE | _EXPERTS | _HEAD_NORMS | {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
    ),
    "gemma2": GgufNames("gemma2", "Gemma2ForCausalLM", _GEMMA, less_one=True),
    "gemma3": GgufNames("gemma3_text", "Gemma3ForCausalLM", _GEMMA | _HEAD_NORMS, less_one=True),
    "phi3": GgufNames(
        "phi3", "Phi3ForCausalLM",
        _NORMS | {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
                  "ffn_down": "mlp.down_proj"},
    ),
    "starcoder2": GgufNames(
        "starcoder2", "Starcoder2ForCausalLM",
        _ATTENTION | _NORMS | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    "stablelm": GgufNames("stablelm", "StableLmForCausalLM"),
    "nemotron": GgufNames("nemotron", "NemotronForCausalLM", _ATTENTION | _NORMS | _MLP, less_one=True),
    "falcon": GgufNames("falcon", "FalconForCausalLM", _FUSED, _H, "transformer.h"),
    "bloom": GgufNames(
        "bloom", "BloomForCausalLM", _FUSED | {"ffn_norm": "post_attention_layernorm"},
        _H | {"token_embd_norm": "transformer.word_embeddings_layernorm"}, "transformer.h", fused=True,
    ),
    "gpt2": GgufNames(
        "gpt2", "GPT2LMHeadModel",
        {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
         "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
         "output": "lm_head"},
        "transformer.h",
        transposed=frozenset({"attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"}),
    ),
    "mamba": GgufNames(
        "mamba", "MambaForCausalLM",
        {"attn_norm": "norm", "ssm_a": "mixer.A_log", "ssm_d": "mixer.D", "ssm_conv1d": "mixer.conv1d",
         "ssm_in": "mixer.in_proj", "ssm_x": "mixer.x_proj", "ssm_dt": "mixer.dt_proj", "ssm_out": "mixer.out_proj"},
        {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"},
        "backbone.layers",
    ),
    "lfm2": GgufNames(
        "lfm2", "Lfm2ForCausalLM",
        {"attn_norm": "operator_norm", "ffn_norm": "ffn_norm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.out_proj",
         "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm",
         "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
         "shortconv.conv": "conv.conv", "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj"},
        {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"},
    ),
    "t5": _T5,
    "t5encoder": replace(_T5, model="T5EncoderModel"),
}  # fmt: skip


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
PARTIAL = frozenset({"nemotron", "phi3", "stablelm"})  # architectures that may rotate only a part of each head
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
    """Return the config of a file with the tensors `names` and embeddings of `rows` tokens.

    InputError: a key has no place in the config, or a value has another type.
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
    """Return the `rope_scaling` of a config. {}: there is none. None: it cannot be told.

    Llama 3.1's scaling is known by its factors, which only one set of numbers gives (`llama3_factors`).
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
