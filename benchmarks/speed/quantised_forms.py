"""Weights of benchmarks in every quantised form: the tensors that store them, streamed; numpy, and torch for float8."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.synthetic import Array, bf16, widen

BLOCK, GROUP, NF4_BLOCK, MX_GROUP = 128, 128, 64, 32
LARGEST = 448.0
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
NF4 = np.array([-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803,
                0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"},
    "int4": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": GROUP, "strategy": "group", "symmetric": True},
        }},
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "mxfp4": {"quant_method": "mxfp4"},
}  # fmt: skip
Entry = tuple[str, tuple[int, ...], Array | int]  # dtype, shape, and its values or, of a hole, its bytes


def drawn(shape: tuple[int, ...], seed: int) -> Array:
    """Weights of deviation 0.02, a million drawn and repeated."""
    some = np.random.default_rng(seed).normal(0, 0.02, 1 << 20).astype(np.float32)
    return np.resize(some, shape)


def plain(name: str, shape: tuple[int, ...], model: int, sparse: bool) -> Iterator[tuple[str, Entry]]:
    if sparse:
        yield name, ("BF16", shape, 2 * math.prod(shape))
        return
    values = drawn(shape, 0)
    if model:
        values += np.resize(np.random.default_rng(model).normal(0, 7e-4, (1 << 20) + 7).astype(np.float32), shape)
    yield name, ("BF16", shape, bf16(values))


def fp8(name: str, shape: tuple[int, ...], sparse: bool) -> Iterator[tuple[str, Entry]]:
    grid = -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)
    if sparse:
        yield name, ("F8_E4M3", shape, math.prod(shape))
        yield f"{name}_scale_inv", ("F32", grid, np.full(grid, 0.1 / LARGEST, np.float32))
        return
    import torch

    values = widen(bf16(drawn(shape, 0)))
    starts = [np.arange(0, side, BLOCK) for side in shape]
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(values), starts[0], axis=0), starts[1], axis=1)
    scales = (largest / LARGEST).astype(np.float32)
    values /= np.repeat(np.repeat(scales, BLOCK, 0)[: shape[0]], BLOCK, 1)[:, : shape[1]]
    yield name, ("F8_E4M3", shape, torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    yield f"{name}_scale_inv", ("F32", grid, scales)


def int4(name: str, shape: tuple[int, ...], sparse: bool) -> Iterator[tuple[str, Entry]]:
    start, grid, words = name.removesuffix("weight"), (shape[0], shape[1] // GROUP), (shape[0], shape[1] // 8)
    if sparse:
        yield f"{start}weight_packed", ("I32", words, 4 * math.prod(words))
        scales = np.full(grid, 0.01, np.float32)
    else:
        values = widen(bf16(drawn(shape, 0))).reshape(*grid, GROUP)
        scales = np.abs(values).max(-1) / np.float32(7.5)
        codes = (np.clip(np.rint(values / scales[..., None]), -8, 7) + 8).astype(np.uint32).reshape(*words, 8)
        packed = (codes << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
        yield f"{start}weight_packed", ("I32", words, packed)
    yield f"{start}weight_scale", ("BF16", grid, bf16(scales))
    yield f"{start}weight_shape", ("I64", (2,), np.array(shape, np.int64))


def coded(shape: tuple[int, ...], group: int) -> tuple[Array, Array]:
    """Codes of 4 bits (uint8) of a weight, and the float32 scales of its groups of a row's columns."""
    values = widen(bf16(drawn(shape, 0))).reshape(*shape[:-1], -1, group)
    scales = np.abs(values).max(-1) / np.float32(7.5)
    codes = (np.clip(np.rint(values / scales[..., None]), -8, 7) + 8).astype(np.uint8)
    return codes.reshape(shape), scales


def words_of(codes: Array, order: tuple[int, ...] = tuple(range(8))) -> Array:
    """int32 words of 8 codes each of the last axis, code order[k] in bits [4 k, 4 k + 4)."""
    eight = codes.reshape(*codes.shape[:-1], -1, 8)[..., order].astype(np.uint32)
    packed = (eight << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(packed)


def gptq(name: str, shape: tuple[int, ...], sparse: bool) -> Iterator[tuple[str, Entry]]:
    start, (codes, scales) = name.removesuffix("weight"), coded(shape, GROUP)
    grid = scales.shape[::-1]
    order = (np.arange(shape[1]) // GROUP).astype(np.int32)
    yield f"{start}qweight", ("I32", (shape[1] // 8, shape[0]), np.ascontiguousarray(words_of(codes).T))
    yield f"{start}qzeros", ("I32", (grid[0], grid[1] // 8), np.full((grid[0], grid[1] // 8), 0x77777777, np.uint32))
    yield f"{start}scales", ("F16", grid, np.ascontiguousarray(scales.T).astype(np.float16))
    yield f"{start}g_idx", ("I32", order.shape, order)


def awq(name: str, shape: tuple[int, ...], sparse: bool) -> Iterator[tuple[str, Entry]]:
    start, (codes, scales) = name.removesuffix("weight"), coded(shape, GROUP)
    grid = scales.shape[::-1]
    words = words_of(np.ascontiguousarray(codes.T), (0, 2, 4, 6, 1, 3, 5, 7))
    yield f"{start}qweight", ("I32", words.shape, words)
    yield f"{start}qzeros", ("I32", (grid[0], grid[1] // 8), np.full((grid[0], grid[1] // 8), 0x88888888, np.uint32))
    yield f"{start}scales", ("F16", grid, np.ascontiguousarray(scales.T).astype(np.float16))


def nf4(name: str, shape: tuple[int, ...], sparse: bool) -> Iterator[tuple[str, Entry]]:
    values = widen(bf16(drawn(shape, 0))).reshape(-1, NF4_BLOCK)
    scales = np.abs(values).max(-1)
    codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, values / scales[:, None]).astype(np.uint8).reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16", "shape": list(shape)}
    said = np.frombuffer(json.dumps(state).encode(), np.uint8)
    yield name, ("U8", (len(codes), 1), codes[:, 0] << 4 | codes[:, 1])
    yield f"{name}.absmax", ("F32", scales.shape, scales)
    yield f"{name}.quant_map", ("F32", NF4.shape, NF4)
    yield f"{name}.quant_state.bitsandbytes__nf4", ("U8", said.shape, said)


def mxfp4(name: str, shape: tuple[int, ...], sparse: bool) -> Iterator[tuple[str, Entry]]:
    """Experts as gpt-oss stores them; `shape` is theirs as they are used: (experts, inputs, outputs)."""
    experts, inputs, outputs = shape
    grid = experts, outputs, inputs // MX_GROUP
    values = widen(bf16(drawn((*grid, MX_GROUP), 0)))
    exponents = np.floor(np.log2(np.abs(values).max(-1))) - 2
    values *= np.exp2(-exponents).astype(np.float32)[..., None]
    codes = np.searchsorted((E2M1[1:] + E2M1[:-1]) / 2, np.abs(values)).astype(np.uint8)
    codes |= (values < 0).astype(np.uint8) << 3
    yield f"{name}_blocks", ("U8", (*grid, MX_GROUP // 2), codes[..., ::2] | codes[..., 1::2] << 4)
    yield f"{name}_scales", ("U8", grid, (exponents + 127).astype(np.uint8))


FORMS: dict[str, Callable[[str, tuple[int, ...], bool], Iterator[tuple[str, Entry]]]] = {
    "fp8": fp8, "int4": int4, "gptq": gptq, "awq": awq, "nf4": nf4, "mxfp4": mxfp4,
}  # fmt: skip


def entries(name: str, shape: tuple[int, ...], scheme: str, model: int, sparse: bool) -> Iterator[tuple[str, Entry]]:
    """What stores one weight: projections in the form of `scheme` (MXFP4: experts alone), the rest in bfloat16."""
    if scheme == "bf16" or len(shape) < (3 if scheme == "mxfp4" else 2) or "proj" not in name:
        yield from plain(name, shape, model, sparse)
    else:
        yield from FORMS[scheme](name, shape, sparse)


@dataclass(frozen=True, slots=True)
class GptOss:
    """gpt-oss-20b's shapes, cut to some layers and experts."""

    layers: int
    experts: int
    vocab: int
    hidden: int = 2880

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, e = self.hidden, self.experts
        layer = {
            "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (4096, h), "self_attn.k_proj.weight": (512, h),
            "self_attn.v_proj.weight": (512, h), "self_attn.o_proj.weight": (h, 4096), "self_attn.sinks": (64,),
            "mlp.router.weight": (e, h), "mlp.router.bias": (e,),
            "mlp.experts.gate_up_proj": (e, h, 2 * h), "mlp.experts.gate_up_proj_bias": (e, 2 * h),
            "mlp.experts.down_proj": (e, h, h), "mlp.experts.down_proj_bias": (e, h),
        }  # fmt: skip
        return {
            "model.embed_tokens.weight": (self.vocab, h),
            **{f"model.layers.{i}.{n}": s for i in range(self.layers) for n, s in layer.items()},
            "model.norm.weight": (h,),
            "lm_head.weight": (self.vocab, h),
        }

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": self.hidden,
            "intermediate_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": self.experts, "num_experts_per_tok": 4,
            "vocab_size": self.vocab, "tie_word_embeddings": False, "dtype": "bfloat16", "torch_dtype": "bfloat16",
        }  # fmt: skip
