"""AWQ weights: W_oi = scale_go · (code_io − zero_go), g = ⌊i / group⌋, in float32.

Codes of four bits lie transposed, as (inputs, outputs), in int32 words of eight outputs: output
(0, 2, 4, 6, 1, 3, 5, 7)_k of a word is in bits [4 k, 4 k + 4). So are zeros. (`version: gemm`; Lin et al. 2023;
AutoAWQ, utils/packing_utils.py)
"""

from __future__ import annotations

from deltamerge.errors import InputError
from deltamerge.formats.quantised.codes import WORD
from deltamerge.formats.quantised.gptq import INTEGERS, TurnedWords, matrix
from deltamerge.formats.quantised.scheme import StoredWeight, expect, weight, whole
from deltamerge.tensors.dtypes import PLAIN
from deltamerge.tensors.tensor import TensorInfo

BITS = 4


def read(stored: StoredWeight) -> TensorInfo:
    """Return the weight (outputs, inputs) of an AWQ layer. InputError: a version, width or shape that is not AWQ's."""
    settings = stored.settings
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise InputError(f"its version is {version[:40]!r}, must be gemm")
    said = settings.get("bits", settings.get("w_bit", BITS))
    if said != BITS:
        raise InputError(f"its codes are of {str(said)[:40]} bits, must be {BITS}")
    codes, scales = matrix(stored.codes, INTEGERS), matrix(stored.need("scales"), PLAIN)
    groups, outputs = scales.shape
    words = whole(outputs * BITS, WORD, "words")
    group = whole(codes.shape[0], groups, "groups")
    expect(codes, (codes.shape[0], words), INTEGERS)
    zeros = expect(stored.need("qzeros"), (groups, words), INTEGERS)
    return weight(
        stored,
        (outputs, codes.shape[0]),
        TurnedWords(codes, zeros, scales, None, codes.shape[0], group, BITS, awq=True),
    )
