"""Tiny weights in every packed scheme: the tensors that store them, and their values in float64 from the formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from deltamerge.engine import kernels
from deltamerge.engine.execute import computed
from deltamerge.engine.fused.operations import StoredSource
from deltamerge.methods.merge.linear import linear
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph, TensorInfo

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
MLX = (
    Path(__file__).parent / "formats" / "mlx.safetensors"
)  # written by mlx 0.32.4: mx.quantize, and `truth` by mx.dequantize


class Packed(NamedTuple):
    """`tensors` store `values`, by plain name."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    values: dict[str, np.ndarray]


def check_the_loop(info: TensorInfo, reader: Reader, values: np.ndarray) -> None:
    """A compiled pass reads the codes of a quantised weight itself, and makes these values of them."""
    tensor = info.tensor
    if not kernels.available() or not tensor.size or tensor.dtype != "F32":
        return
    assert StoredSource.of(tensor, reader).coded is not None
    once = Graph().node(linear, [tensor], shape=tensor.shape, weights=(1.0,), normalize=False)
    found = computed({"x": once}, reader, workers=1)["x"].view(np.float32)
    assert np.array_equal(found, values.reshape(-1), equal_nan=True)


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def nibbles(data: np.ndarray) -> np.ndarray:
    return np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)


def bitstream(codes: np.ndarray, width: int) -> torch.Tensor:
    """Words (…, n width / 32) of codes (…, n), one after the other from the lowest bit."""
    bits = (codes[..., None] >> np.arange(width) & 1).reshape(*codes.shape[:-1], -1, 32).astype(np.uint64)
    return torch.from_numpy((bits << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32))


def random(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return drawn.to(torch.uint8)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mxfp4(rows: int = 10, experts: int = 3) -> Packed:
    blocks, scales = random(experts, rows, 5, 16), random(experts, rows, 5, low=100, high=140)
    values = FP4[nibbles(blocks.numpy())] * 2.0 ** (float64(scales) - 127)[..., None]
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}
    transposed = values.reshape(experts, rows, 160).transpose(0, 2, 1)
    return Packed(tensors, {"quant_method": "mxfp4"}, {"e.gate_up_proj": transposed})


def nvfp4(*, compressed: bool = False) -> Packed:
    codes, scales = random(7, 24), normal(7, 3).abs().to(torch.float8_e4m3fn)
    factor = torch.tensor([213.7]) if compressed else torch.tensor(0.0123)
    scale = float64(scales) / float64(factor) if compressed else float64(scales) * float64(factor)
    values = (FP4[nibbles(codes.numpy())].reshape(7, 3, 16) * scale[..., None]).reshape(7, 48)
    if compressed:
        tensors = {"a.weight_packed": codes, "a.weight_scale": scales, "a.weight_global_scale": factor,
                   "a.input_global_scale": torch.ones(1)}  # fmt: skip
        config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
        return Packed(tensors, config, {"a.weight": values})
    tensors = {"a.weight": codes, "a.weight_scale": scales, "a.weight_scale_2": factor, "a.input_scale": torch.ones(())}
    return Packed(tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"a.weight": values})


def mxfp4_packed() -> Packed:
    codes, scales = random(7, 48), random(7, 3, low=100, high=140)
    values = (FP4[nibbles(codes.numpy())].reshape(7, 3, 32) * 2.0 ** (float64(scales) - 127)[..., None]).reshape(7, 96)
    config = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    return Packed({"a.weight_packed": codes, "a.weight_scale": scales}, config, {"a.weight": values})


def gptq(bits: int, *, version: str = "gptq", ordered: bool = True, inputs: int = 96, outputs: int = 64) -> Packed:
    rng, group = np.random.default_rng(bits), 32
    groups = inputs // group
    codes = rng.integers(0, 1 << bits, (inputs, outputs))
    zeros = rng.integers(1, 1 << bits, (groups, outputs))
    scales = normal(groups, outputs).half()
    order = rng.permutation(np.arange(inputs) // group) if ordered else np.arange(inputs) // group
    values = (codes - zeros[order]) * float64(scales)[order]
    tensors = {
        "a.qweight": bitstream(codes.T, bits).T.contiguous(), "a.scales": scales,
        "a.qzeros": bitstream(zeros - (version == "gptq"), bits),
    }  # fmt: skip
    if ordered:
        tensors["a.g_idx"] = torch.from_numpy(order.astype(np.int32))
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version}
    return Packed(tensors, config, {"a.weight": values.T})


def awq(group: int = 32, outputs: int = 40) -> Packed:
    rng, inputs = np.random.default_rng(0), 3 * group
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (3, outputs))
    scales = normal(3, outputs).half()
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(numbers: np.ndarray) -> torch.Tensor:
        return bitstream(numbers.reshape(len(numbers), -1, 8)[:, :, order].reshape(len(numbers), -1), 4)

    values = (codes - np.repeat(zeros, group, 0)) * np.repeat(float64(scales), group, 0)
    tensors = {"a.qweight": packed(codes), "a.qzeros": packed(zeros), "a.scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Packed(tensors, config, {"a.weight": values.T})


def four_bits(kind: str, *, nested: bool, shape: tuple[int, ...] = (48, 128), storage: Any = torch.uint8) -> Packed:
    from bitsandbytes import functional

    stored, state = functional.quantize_4bit(
        normal(*shape), blocksize=64, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    parts = state.as_dict(packed=True)
    scales = float64(parts["absmax"])
    if nested:
        table, outer = float64(parts["nested_quant_map"]), float64(parts["nested_absmax"])
        scales = table[parts["absmax"].numpy()] * np.repeat(outer, 256)[: len(scales)] + state.offset.item()
    data = stored.reshape(-1).view(torch.uint8).numpy()
    codes = np.stack([data >> 4, data & 15], -1).reshape(-1)
    values = (float64(parts["quant_map"])[codes] * np.repeat(scales, 64)[: len(codes)])[: np.prod(shape)]
    tensors = {"a.weight": stored.contiguous()} | {f"a.weight.{key}": part for key, part in parts.items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return Packed(tensors, config, {"a.weight": values.reshape(shape)})


def int8() -> Packed:
    codes, scales = random(20, 33, high=255).to(torch.int16).sub(127).to(torch.int8), normal(20).abs()
    values = float64(codes) * float64(scales)[:, None] / 127
    tensors = {"a.weight": codes, "a.SCB": scales, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Packed(tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"a.weight": values})


def mlx() -> Packed:
    stored = load_file(MLX)
    names = sorted({name.rpartition(".")[0] for name in stored})
    config: dict[str, Any] = {"group_size": 64, "bits": 4}
    for name in names:
        mode, bits, group = name.split("-")
        config[name] = {"mode": mode, "bits": int(bits), "group_size": int(group)}
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith(".truth")}
    return Packed(tensors, config, {f"{name}.weight": float64(stored[f"{name}.truth"]) for name in names})


def metal() -> Packed:
    stored, name = load_file(MLX), "affine-4-64"
    tensors = {"a.weight": stored[f"{name}.weight"], "a.scales": stored[f"{name}.scales"],
               "a.qbiases": stored[f"{name}.biases"]}  # fmt: skip
    config = {"quant_method": "metal", "bits": 4, "group_size": 64}
    return Packed(tensors, config, {"a.weight": float64(stored[f"{name}.truth"])})


def mlx_floats(rows: int = 6) -> Packed:
    """MLX's modes of small floats, in rows of 320."""
    modes, tensors, values = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}, {}, {}
    for seed, (mode, group) in enumerate(modes.items()):
        codes = random(rows, 320 if mode == "mxfp8" else 160, seed=seed)
        scales = random(rows, 320 // group, low=100, high=125)
        if mode == "mxfp8":
            codes &= 0xBF  # no NaN
            numbers = float64(codes.view(torch.float8_e4m3fn))
        else:
            numbers = FP4[nibbles(codes.numpy())]
        factors = float64(scales.view(torch.float8_e4m3fn)) if mode == "nvfp4" else 2.0 ** (float64(scales) - 127)
        tensors |= {f"{mode}.weight": codes.view(torch.uint32), f"{mode}.scales": scales}
        values[f"{mode}.weight"] = numbers * np.repeat(factors, group, 1)
    settings = {mode: {"mode": mode, "bits": int(mode[-1]), "group_size": group} for mode, group in modes.items()}
    return Packed(tensors, {"group_size": 32, "bits": 4, **settings}, values)


CASES: dict[str, Callable[[], Packed]] = {
    "mxfp4": mxfp4,
    "mxfp4 of 37 rows": lambda: mxfp4(37),
    "nvfp4 of modelopt": nvfp4,
    "nvfp4 of compressed-tensors": lambda: nvfp4(compressed=True),
    "mxfp4 of compressed-tensors": mxfp4_packed,
    "gptq of 2 bits": lambda: gptq(2),
    "gptq of 3 bits": lambda: gptq(3),
    "gptq of 4 bits": lambda: gptq(4),
    "gptq of 8 bits": lambda: gptq(8),
    "gptq of 3 bits, version 2": lambda: gptq(3, version="gptq_v2"),
    "gptq of 4 bits, version 2, no order": lambda: gptq(4, version="gptq_v2", ordered=False),
    "gptq of 160 outputs": lambda: gptq(4, outputs=160),
    "gptq of 40 outputs": lambda: gptq(4, outputs=40),
    "awq": awq,
    "awq of groups of 24": lambda: awq(24, 144),
    "nf4": lambda: four_bits("nf4", nested=False),
    "nf4 nested": lambda: four_bits("nf4", nested=True),
    "nf4 of rows that share blocks": lambda: four_bits("nf4", nested=True, shape=(5, 7, 10)),
    "nf4 stored as bfloat16": lambda: four_bits("nf4", nested=True, storage=torch.bfloat16),
    "fp4": lambda: four_bits("fp4", nested=False),
    "fp4 nested, odd": lambda: four_bits("fp4", nested=True, shape=(9, 15)),
    "int8": int8,
    "mlx": mlx,
    "mlx of small floats": mlx_floats,
    "metal": metal,
}  # fmt: skip
