"""Tiny GGUF files of every architecture that is read, written by the gguf package with random tensors."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

S = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
H = {"vocab_size": 64, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
      "feed_forward_proj": "gated-gelu"}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# GGUF's name -> the config class of transformers and its settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", S),
    "qwen2": ("Qwen2Config", S),
    "qwen3": ("Qwen3Config", S | {"head_dim": 32}),
    "qwen2moe": ("Qwen2MoeConfig", S | MOE | {"shared_expert_intermediate_size": 32}),
    "qwen3moe": ("Qwen3MoeConfig", S | MOE | {"head_dim": 16}),
    "minimax-m2": ("MiniMaxM2Config", S | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "gemma2": ("Gemma2Config", S | {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", S | {"head_dim": 16}),
    "phi3": ("Phi3Config", S),
    "starcoder2": ("Starcoder2Config", S),
    "stablelm": ("StableLmConfig", S | {"use_qkv_bias": True}),
    "nemotron": ("NemotronConfig", S),
    "falcon": ("FalconConfig", H | {"num_hidden_layers": 2, "num_attention_heads": 4}),
    "bloom": ("BloomConfig", H | {"n_layer": 2, "n_head": 4}),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "mamba": ("MambaConfig", H | {"num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}),
    "lfm2": ("Lfm2Config", S | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "t5": ("T5Config", T5),
}  # fmt: skip
TABLES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2"}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def write(
    path: Path,
    arch: str,
    *,
    seed: int = 0,
    types: tuple[str, ...] = TYPES,
    pairs: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> Path:
    """A GGUF file of `arch`: its matrices of one type after the other, vectors in float32; `pairs` and `more`
    are further keys and vectors."""
    name, settings = MODELS[arch]
    config = getattr(transformers, name)(**settings)
    auto = transformers.AutoModelForSeq2SeqLM if arch == "t5" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=config.to_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = get_gguf_hf_weights_map(model, processor)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (pairs_of(arch, config) | (pairs or {})).items():
        add(writer, key, value)
    rng = np.random.default_rng(seed)
    tied = arch not in ("qwen2", "stablelm", "mamba", "gpt2")
    kinds = iter((*(t for t in types if not (arch == "lfm2" and t.startswith("Q5"))),) * 1000)  # it reads no Q5 there
    for stored, shape in ((g, shapes[h]) for g, h in names.items()):
        if stored == "output.weight" and tied:
            continue
        add_tensor(writer, stored + ".weight" * ("_exps" in stored), stored_shape(arch, stored, shape), rng, kinds)
    for stored, values in (more or {}).items():
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pairs_of(arch: str, config: Any) -> dict[str, Any]:
    """The keys of a config, through the inverse of transformers' table."""
    found: dict[str, Any] = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(64)]}
    for key, renamed in GGUF_CONFIG_MAPPING[TABLES.get(arch, arch)].items():
        value = getattr(config, renamed, None) if renamed else None
        if value is not None and type(value) in (int, float):
            found[f"{arch}.{key}"] = value
    for key in ("bos", "eos", "padding"):
        found[f"tokenizer.ggml.{key}_token_id"] = {"bos": 1, "eos": 2, "padding": 0}[key]
    if arch == "gpt2":
        found["gpt2.context_length"] = 128
    if arch == "falcon":
        found["falcon.attention.head_count_kv"] = 1
    if arch == "lfm2":
        found["lfm2.attention.layer_norm_rms_epsilon"] = 1e-5
        found["lfm2.attention.head_count_kv"] = [0, 2]
        found["lfm2.rope.freq_base"] = 1e6
    if arch in ("qwen2moe", "qwen3moe"):
        found[f"{arch}.expert_feed_forward_length"] = 32
    if arch == "qwen2moe":
        found[f"{arch}.expert_shared_feed_forward_length"] = 32
    if arch == "qwen3":
        found["qwen3.attention.key_length"] = found["qwen3.attention.value_length"] = 32
    return found


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def stored_shape(arch: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that llama.cpp stores a weight in that transformers has in `shape`."""
    if re.search(r"ffn_(gate|up)_exps", name):
        return shape[0], shape[1] // 2, shape[2]
    if "conv" in name and len(shape) == 3:
        return shape[0], shape[2]
    if "ffn_gate_inp_shexp" in name:
        return shape[1:]
    if arch == "gpt2" and len(shape) == 2 and "blk" in name:
        return shape[::-1]
    return shape


def add_tensor(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], rng: np.random.Generator, kinds: Any
) -> None:
    values = rng.standard_normal(shape).astype(np.float32) * np.float32(0.1)
    if "ssm_a" in name:
        values = -np.abs(values) - np.float32(0.01)
    kind = next(kinds) if len(shape) > 1 and not re.search("ssm_a|conv|norm", name) and math.prod(shape) else "F32"
    if shape[-1] % 32:
        kind = "F32"
    known = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        writer.add_tensor(name, values)
    elif kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(values, known), raw_dtype=known)
