"""FP8 weights, as transformers (fp8, fbgemm_fp8), DeepSeek-V3, Qwen3-FP8, modelopt and compressed-tensors store them.

W_ij = code_ij · scale of its block: codes (…, rows, columns) are float8_e4m3fn or e5m2; scales are floats or exponents
(E8M0), `…_scale_inv` or `…_scale`, one for each block of `weight_block_size` [m, n], row, column, group or tensor
(transformers, integrations/finegrained_fp8.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import BlockCoder, Coding, StoredPart, by_rows
from deltamerge.formats.quantised.codes import E4M3, Shape
from deltamerge.formats.quantised.packed import of_groups, one_by_one, scaled_by
from deltamerge.formats.quantised.scheme import AGAIN, Block, StoredWeight
from deltamerge.tensors.tensor import TensorInfo

ORIGINALS = f"{AGAIN}, or merge the originals that are not quantised"


def read(stored: StoredWeight) -> TensorInfo:
    """Return the weight that float8 codes and their scales store.

    InputError: codes of another dtype, no scales, or scales that do not fit.
    """
    codes = stored.codes
    if codes.dtype not in ("F8_E4M3", "F8_E5M2"):
        raise InputError(f"is {codes.dtype} beside scales, must be F8_E4M3 or F8_E5M2", hint=ORIGINALS)
    if "config_groups" in stored.settings:
        return of_groups(stored, lambda group: one_by_one(stored, group))
    return scaled_by(stored, block_size(stored.settings))


def block_size(settings: Any) -> Block | None:
    """Return the rows and columns that share a scale, if config.json states them.

    InputError: the value is malformed.
    """
    said = settings.get("weight_block_size")
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != 2 or not all(type(x) is int and x > 0 for x in said):
        raise InputError(f"weight_block_size must be two positive integers, is {str(said)[:80]}")
    return said[0], said[1]


def settings_of(block: Block, plain: Sequence[str]) -> dict[str, Any]:
    """Return config.json's settings as Qwen3-FP8 and DeepSeek-V3 state them. Modules `plain` are not coded."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": list(plain),
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }


def write_blocks(name: str, shape: Shape, block: Block) -> Coding:
    """Return the coding of a matrix as DeepSeek-V3 and Qwen3-FP8 store it: E4M3 with a float32 scale a block."""
    (rows, columns), (m, n) = shape, block
    scales = StoredPart(f"{name}_scale_inv", "F32", (-(-rows // m), -(-columns // n)), m)
    return by_rows(shape, BlockCoder(E4M3, block, "F32"), StoredPart(name, "F8_E4M3", shape), scales, multiple=m)
