"""Quantised tensors and checkpoints made from float weights, scheme by scheme, and what they must be read as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import load_tensors, make_checkpoint

Tensors = dict[str, torch.Tensor]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def blocks_of(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude of each block of m × n, of the last two dimensions."""
    m, n = block
    rows, columns = weight.shape[-2:]
    padded = torch.zeros(*weight.shape[:-2], -(-rows // m) * m, -(-columns // n) * n)
    padded[..., :rows, :columns] = weight
    cut = padded.unflatten(-1, (-1, n)).unflatten(-3, (-1, m))
    return cut.abs().amax(dim=(-1, -3))


def spread(scales: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """Each element's scale."""
    wide = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def fp8(
    name: str,
    weight: torch.Tensor,
    block: tuple[int, int],
    *,
    codes: torch.dtype = torch.float8_e4m3fn,
    scales: torch.dtype = torch.float32,
    suffix: str = "_scale_inv",
) -> tuple[Tensors, torch.Tensor]:
    """A weight in FP8 with a scale a block, and its values in float64."""
    found = (blocks_of(weight.float(), block) / LARGEST[codes]).clamp_min(2.0**-100)
    if scales is torch.float8_e8m0fnu:
        found = torch.exp2(torch.ceil(torch.log2(found)))
    found = found.to(scales)
    wide = spread(found.float(), weight.shape, block)
    stored = (weight.float() / wide).to(codes)
    scales_name = name.removesuffix("weight") + "scale" if suffix == ".scale" else name + suffix
    return {name: stored, scales_name: found}, stored.double() * wide.double()


def fp8_checkpoint(
    folder: Path, source: Path, block: tuple[int, int], config: Mapping[str, Any], **how: Any
) -> dict[str, torch.Tensor]:
    """`source` with its linear weights in FP8, and all its values in float64."""
    written: Tensors = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(source).items():
        written[name], values[name] = tensor, tensor.double()
        if "proj" in name:
            stored, values[name] = fp8(name, tensor, block, **how)
            written |= stored
    said = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    make_checkpoint(folder, written, config={**config, "quantization_config": said})
    return values


def packed(name: str, weight: torch.Tensor, group: int) -> tuple[Tensors, torch.Tensor]:
    """A weight in 4 bits as compressed-tensors packs it, a scale a group, and its values in float64."""
    scales = (blocks_of(weight.float(), (1, group)) / 7.5).clamp_min(1e-6).bfloat16()
    wide = spread(scales.double(), weight.shape, (1, group))
    codes = torch.clamp(torch.round(weight.double() / wide), -8, 7).to(torch.int64)
    nibbles = (codes + 8).reshape(len(weight), -1, 8) << (4 * torch.arange(8))
    words = nibbles.sum(-1).to(torch.int32)  # the upper half wraps to negative words
    shape = torch.tensor(weight.shape)
    start = name.removesuffix("weight")
    stored = {start + "weight_packed": words, start + "weight_scale": scales, start + "weight_shape": shape}
    return stored, codes.double() * wide


PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 8, "strategy": "group"}}},
}  # fmt: skip
