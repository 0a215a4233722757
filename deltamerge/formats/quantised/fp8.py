"""FP8 weights, as transformers (fp8, fbgemm_fp8), DeepSeek-V3, Qwen3-FP8, modelopt and compressed-tensors store them.

W_ij = code_ij · scale of its block: codes (…, rows, columns) are float8_e4m3fn or e5m2; scales are floats or exponents
(E8M0), `…_scale_inv` or `…_scale`, one for each block of `weight_block_size` [m, n], row, column, group or tensor
(transformers, integrations/finegrained_fp8.py).
"""

from __future__ import annotations

from typing import Any

from deltamerge.errors import InputError
from deltamerge.formats.quantised import compressed
from deltamerge.formats.quantised.grid import Block
from deltamerge.formats.quantised.grid import scales_of as scales_of
from deltamerge.formats.quantised.scaled import values_of as values_of
from deltamerge.formats.quantised.weight import Stored
from deltamerge.tensors.tensor import TensorInfo

AGAIN = "download the model again, or merge the originals that are not quantised"


def decoded(stored: Stored) -> TensorInfo:
    """The weight that float8 codes and their scales store. InputError: codes of another dtype, no scales, or scales
    that do not fit."""
    codes = stored.codes
    if codes.dtype not in ("F8_E4M3", "F8_E5M2"):
        raise InputError(f"is {codes.dtype} beside scales, must be F8_E4M3 or F8_E5M2", hint=AGAIN)
    if "config_groups" in stored.settings:
        return compressed.decoded(stored)
    return compressed.scaled_by(stored, block_size(stored.settings))


def block_size(settings: Any) -> Block | None:
    """The rows and columns that share a scale, where config.json says it. InputError: it says something else."""
    said = settings.get("weight_block_size")
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != 2 or not all(type(x) is int and x > 0 for x in said):
        raise InputError(f"weight_block_size must be two positive integers, is {str(said)[:80]}")
    return said[0], said[1]
