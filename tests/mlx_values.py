"""Write tests/formats/mlx.safetensors by MLX itself: weights in each of its modes, and its own float32 values of them.

Needs `pip install 'mlx[cpu]'`; the tests do not.

    python tests/mlx_values.py tests/formats/mlx.safetensors
"""

from __future__ import annotations

import sys

import mlx.core as mx

CASES = [
    *(("affine", 32, bits) for bits in (2, 3, 4, 5, 6, 8)),
    ("affine", 64, 4), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8),
]  # fmt: skip

if __name__ == "__main__":
    mx.random.seed(0)
    tensors = {}
    for mode, group, bits in CASES:
        settings = {"group_size": group, "bits": bits, "mode": mode}
        parts = mx.quantize(mx.random.normal((3, 64)), **settings)
        for part, key in zip(parts, ("weight", "scales", "biases"), strict=False):
            tensors[f"{mode}-{bits}-{group}.{key}"] = part
        tensors[f"{mode}-{bits}-{group}.truth"] = mx.dequantize(*parts, **settings, dtype=mx.float32)
    mx.save_safetensors(sys.argv[1], tensors)
