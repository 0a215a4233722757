"""The names that GGUF's tensors have in transformers, by architecture, and what llama.cpp's converters did to them.

The architectures are those that transformers reads; each table says what its loader does (integrations/ggml.py,
modeling_gguf_pytorch_utils.py), and tests compare them. What a table does not name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

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
