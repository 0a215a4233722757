"""The table of decoders: a scheme is one function, from the tensors that store a weight to the tensor that is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deltamerge.formats.quantised import blockwise, columnwise, compressed, fp4, fp8, mlx
from deltamerge.formats.quantised.weight import Stored
from deltamerge.tensors.tensor import TensorInfo

Decoder = Callable[[Stored], TensorInfo]

DECODERS: Mapping[str, Decoder] = {
    "fp8": fp8.decoded,
    "compressed-tensors": compressed.decoded,
    "mxfp4": fp4.experts,
    "nvfp4": fp4.nvfp4,
    "packed-fp4": fp4.compressed,
    "gptq": columnwise.gptq,
    "awq": columnwise.awq,
    "bitsandbytes": blockwise.decoded,
    "mlx": mlx.decoded,
    "metal": mlx.decoded,
}
# The kinds of weights in a scheme that config.json names; what is not listed has the kind of its own name.
KINDS: Mapping[str, frozenset[str]] = {
    "fbgemm_fp8": frozenset({"fp8"}),
    "FP8": frozenset({"fp8"}),
    "quark": frozenset({"fp8"}),
    "modelopt": frozenset({"fp8", "nvfp4"}),
    "compressed-tensors": frozenset({"compressed-tensors", "fp8", "packed-fp4"}),
}
