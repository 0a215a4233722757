"""Which tensors are weights of layers, experts among them, whose inputs calibration sees: how they are stored, whether
a calibrated q divides them, and what the others are divided by.

Names and shapes predict it before anything runs; a run, which sees what the data reaches, decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from deltamerge.tensors.names import EMBEDDING, EXPERTS, EXPERTS_OUT, TASK_HEAD, is_conv1d, numbers_as_stars

UNSCALED = "vectors and embeddings are not rescaled"
OTHER = "no weight of a linear layer"
UNSEEN = "a linear layer that no row reached"
SHOWN = 8


def products(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """About how many entries are multiplied for each token, without the head's, and how many are the head's: those of
    matrices that are no embeddings, of which one may be tied where there is no head. All experts count."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) > 1}
    looked_up = {name: size for name, size in sizes.items() if EMBEDDING.search(name)}
    heads = {name: size for name, size in sizes.items() if re.search(TASK_HEAD, name)}
    head = sum(heads.values()) or max(looked_up.values(), default=0)
    return sum(size for name, size in sizes.items() if name not in {**looked_up, **heads}), head


def is_unscaled(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor keeps q = 1 beside calibrated weights, which measures better: vectors, and rows that are
    looked up.

    Sides of 1 do not count in tensors of three and more dimensions: a class token (1, 1, n) is a vector.
    """
    sides = len(shape) if len(shape) < 3 else sum(side != 1 for side in shape)
    return sides < 2 or (sides == 2 and EMBEDDING.search(name) is not None)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether name and shape are those of a linear layer's weight."""
    return len(shape) == 2 and name.endswith("weight") and not is_unscaled(name, shape)


def is_stacked(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether name and shape are those of experts' weights, stacked in one tensor."""
    return len(shape) == 3 and 1 not in shape and EXPERTS.search(name) is not None


class Shaped(Protocol):
    """A tensor of a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def stacked_transposed(name: str, tensors: Mapping[str, Shaped], hidden: int | None) -> bool:
    """Tell whether stacked experts are stored (in, out), told by which side is the hidden size.

    A square one is stored as another of `tensors`, the checkpoint's, of the same module.
    """
    parent = name.removesuffix(".weight").rpartition(".")[0]
    beside = [n for n in tensors if n.startswith(parent) and n.removesuffix(".weight").rpartition(".")[0] == parent]
    for one in (name, *beside):
        shape = tensors[one].shape
        if hidden is not None and len(shape) == 3 and (shape[-2] == hidden) != (shape[-1] == hidden):
            out = EXPERTS_OUT.search(one.removeprefix(parent)) is not None
            return shape[-1 if out else -2] == hidden
    return False


def is_transposed(name: str, config: Mapping[str, Any], tensors: Mapping[str, Shaped]) -> bool:
    """Tell whether one of a checkpoint's tensors is a weight stored (in, out): transformers' Conv1D, which GPT and
    GPT-2 are made of, and the experts of some models."""
    if is_stacked(name, tensors[name].shape):
        parts = (config, *(part for key in ("text_config", "llm_config") if isinstance(part := config.get(key), dict)))
        widths = (part.get(key) for part in parts for key in ("hidden_size", "d_model"))
        return stacked_transposed(name, tensors, next((n for n in widths if isinstance(n, int)), None))
    return is_conv1d(name, config)


def has_norm(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether WANDA scores a tensor by the norms of its inputs: a matrix that is no embedding, or stacked
    experts."""
    return (len(shape) == 2 and EMBEDDING.search(name) is None) or is_stacked(name, shape)


def has_columns(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether columns of a tensor can be protected: it is a matrix that is no embedding."""
    return len(shape) == 2 and has_norm(name, shape)


def grouped(left: Iterable[tuple[str, float, str]]) -> list[dict[str, Any]]:
    """Tensors (name, q, why) without a calibrated q; those whose names differ only in their numbers are one pattern."""
    found: dict[tuple[str, float, str], int] = {}
    for name, q, why in left:
        key = numbers_as_stars(name), q, why
        found[key] = found.get(key, 0) + 1
    return [{"tensors": pattern, "count": n, "q": q, "why": why} for (pattern, q, why), n in found.items()]


def in_words(groups: Iterable[dict[str, Any]]) -> str:
    """Return a message about the tensors that are divided as without calibration; "" where there are none."""
    some = [group for group in groups if group["why"] != UNSCALED]
    shown = [f"{g['count']} × {g['tensors']} (q = {g['q']:.4g}: {g['why']})" for g in some[:SHOWN]]
    more = f", and {len(some) - SHOWN} more patterns" if len(some) > SHOWN else ""
    return f"not calibrated, divided as without calibration: {', '.join(shown)}{more}" if shown else ""
