"""A LoRA made of deltas, as far as headers tell: which tensors are matrices, and the memory that factoring takes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from deltamerge.methods.low_rank import scratch_bytes
from deltamerge.plan.outputs import OutputTensor
from deltamerge.recipe.output_keys import Output
from deltamerge.tensors.names import EMBEDDING

HELD = 1 << 28  # bytes of a float32 delta that is collected in memory; larger ones in a file
TORCH = 170_000_000  # of torch and transformers, which tell what the modules are, beside the compiled loops
UNKNOWN = 256  # the rank that is assumed where an energy or a budget chooses it


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of the matrix that a weight is for its factors: a convolution's (out, in, …) is (out, in · …)."""
    return shape[0], math.prod(shape[1:])


def is_matrix(output: OutputTensor) -> bool:
    """Whether a tensor may have factors, as its name and shape tell."""
    known = output.pieces[0].built.delta is not None and len(output.pieces) == 1
    return known and len(output.shape) > 1 and EMBEDDING.search(output.name) is None


def held_by_factors(wanted: Output, outputs: Iterable[OutputTensor], workers: int, *, moments: bool) -> int:
    """Bytes of deltas that are being collected, and of factoring them."""
    shapes = [sides(output.shape) for output in outputs if is_matrix(output)]
    sizes = sorted((4 * m * n if 4 * m * n <= HELD else 0 for m, n in shapes), reverse=True)
    rank = wanted.rank or UNKNOWN
    scratch = max((scratch_bytes(m, n, rank, moments=moments) for m, n in shapes), default=0)
    return TORCH + sum(sizes[: workers + 1]) + workers * scratch


def factoring_note(wanted: Output, *, calibrated: bool) -> str:
    """What a plan says of the factors."""
    size = f"rank {wanted.rank}"
    if wanted.budget is not None:
        size = f"{wanted.budget} bytes" + (f", rank {wanted.rank} at most" if wanted.rank else "")
    elif wanted.energy is not None:
        size = f"{wanted.energy:g} of each delta" + (f", rank {wanted.rank} at most" if wanted.rank else "")
    how = "weighed by the inputs of calibration" if calibrated else "by their entries"
    return f"merged deltas are written as a LoRA: {size}, {how}"
