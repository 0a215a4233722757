"""The base's tensors with an adapter's updates, read as PEFT merges them; shapes are checked, nothing is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deltamerge.errors import InputError
from deltamerge.formats.peft.config import BY_PEFT, CONFIG, DERIVED, scale_of, tokens_of
from deltamerge.formats.peft.parts import factors_of
from deltamerge.formats.peft.updates import Experts, Hadamard, Kronecker, Residual, Rows, Shifted
from deltamerge.tensors.computed import LowRank
from deltamerge.tensors.dtypes import PLAIN
from deltamerge.tensors.tensor import Made, TensorInfo

Tensors = Mapping[str, TensorInfo]
Config = Mapping[str, Any]


def is_lora(factors: Tensors) -> bool:
    """Whether the factors are A and B, of a matrix or an embedding."""
    return not factors.keys().isdisjoint({"A", "B", "embedding_A", "embedding_B", "magnitude", "B.bias"})


def low_rank(factors: Tensors) -> tuple[TensorInfo, TensorInfo]:
    """A and B. InputError: not one of each, or of different ranks."""
    tail = "embedding_" if "embedding_A" in factors or "embedding_B" in factors else ""
    a, b = factors_of(factors, (f"{tail}A", f"{tail}B"), ("magnitude", *([] if tail else ["B.bias"])))
    if min(len(a.shape), len(b.shape)) < 2 or any(n != 1 for n in b.shape[2:]):
        raise InputError(f"A {list(a.shape)} and B {list(b.shape)} are no matrices", hint=BY_PEFT)
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        groups = " (a convolution in groups?)" if len(a.shape) > 2 else ""
        raise InputError(f"the ranks of A {list(a.shape)} and B {list(b.shape)} differ{groups}", hint=BY_PEFT)
    return a, b


def expected(factors: Tensors) -> tuple[int, ...] | None:
    """The shape (out, in, …) of the weight that A and B are for; None where factors do not tell it."""
    if not is_lora(factors) or "embedding_A" in factors:
        return None
    a, b = low_rank(factors)
    return (b.shape[0], *a.shape[1:])


def updated(info: TensorInfo, factors: Tensors, key: str, config: Config, *, turned: bool) -> TensorInfo:
    """A weight with its update. `key` is the module, as patterns match it; `turned` whether it is stored (in, out).

    InputError: shapes that do not fit, or a weight that is no plain float.
    """
    if info.dtype not in PLAIN:
        raise InputError(f"the base's weight is {info.dtype}", hint="adapters are merged into unquantised weights")
    if is_lora(factors):
        return _lora(info, factors, key, config, turned)
    made = (_hadamard if config.get("peft_type") == "LOHA" else _kronecker)(info, factors, key, config)
    return replace(info, begin=0, made=made)


def _lora(info: TensorInfo, factors: Tensors, key: str, config: Config, turned: bool) -> TensorInfo:
    a, b = low_rank(factors)
    shape = (b.shape[0], *a.shape[1:])
    embedding = "embedding_A" in factors
    transposed = embedding or turned or (len(shape) == 2 and shape != info.shape == shape[::-1])
    if info.shape != (shape[::-1] if transposed else shape):
        raise InputError(f"B A gives {list(shape)}, the base's weight is {list(info.shape)}")
    magnitude = factors.get("magnitude")
    if magnitude is not None and math.prod(magnitude.shape) != shape[0]:
        raise InputError(f"lora_magnitude_vector must have {shape[0]} elements, has the shape {list(magnitude.shape)}")
    if magnitude is None and config.get("use_dora"):
        raise InputError("has no lora_magnitude_vector, which use_dora needs", hint="download the adapter again")
    if config.get("lora_bias") and "B.bias" not in factors and not embedding:
        raise InputError("has no lora_B.bias, which lora_bias needs", hint="download the adapter again")
    start = config.get("init_lora_weights")
    # A decomposition has no more parts than the weight has rows or columns, whatever r says.
    most = min(shape) if start in DERIVED and not embedding else math.inf
    scale = scale_of(config, key, a.shape[0], most)
    if start in DERIVED and not embedding:
        if len(shape) != 2:
            raise InputError(f"init_lora_weights {start!r} of a convolution", hint=BY_PEFT)
        flipped = transposed and start == "pissa"  # PEFT takes OLoRA's Q and R of a Conv1D's weight as it is stored
        info = replace(info, begin=0, made=Residual(info, str(start), a.shape[0], scale, flipped))
    return replace(info, begin=0, made=LowRank(info, a, b, scale, transposed, magnitude))


def experts(info: TensorInfo, factors: Tensors, key: str, config: Config, transposed: bool | None) -> TensorInfo:
    """A stack of experts' weights with its update; `transposed` decides where shapes do not."""
    a, b = low_rank(factors)
    if not fits(info, factors):
        raise InputError(f"A {list(a.shape)} and B {list(b.shape)} do not fit the base's {list(info.shape)}")
    if config.get("init_lora_weights") in DERIVED or not factors.keys() <= {"A", "B"}:
        raise InputError("only plain LoRA of experts can be read", hint=BY_PEFT)
    straight, turned = _ways(info, factors)
    if straight and turned and transposed is None:
        raise InputError(f"square experts {list(info.shape)} do not tell whether they are transposed", hint=BY_PEFT)
    way = bool(transposed) if straight and turned else turned
    scale = scale_of(config, key, a.shape[0] // info.shape[0])
    return replace(info, begin=0, made=Experts(info, a, b, scale, way))


def fits(info: TensorInfo, factors: Tensors) -> bool:
    """Whether A and B are for the stack of experts `info`."""
    a, _ = low_rank(factors)
    return len(info.shape) == 3 and not a.shape[0] % info.shape[0] and any(_ways(info, factors))


def _ways(info: TensorInfo, factors: Tensors) -> tuple[bool, bool]:
    """Whether the experts can be (out, in), and whether they can be (in, out)."""
    a, b = low_rank(factors)
    return info.shape[1:] == (b.shape[0], a.shape[1]), info.shape[1:] == (a.shape[1], b.shape[0])


def stored_transposed(gate_up: TensorInfo | None, down: TensorInfo | None) -> bool | None:
    """Whether a container's fused experts are (in, out), told by both of their shapes; None if these do not tell."""
    if gate_up is None or down is None or len(gate_up.shape) != 3 or len(down.shape) != 3:
        return None
    (_, p, q), (_, s, t) = gate_up.shape, down.shape
    straight, turned = (p == 2 * t and q == s), (q == 2 * s and p == t)
    return turned if straight != turned else None


def _hadamard(info: TensorInfo, factors: Tensors, key: str, config: Config) -> Made:
    a1, b1, a2, b2 = factors_of(factors, ("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2"))
    rows, columns = info.shape[0], math.prod(info.shape[1:])
    cores = None
    if "t1" in factors or "t2" in factors:
        cores = tuple(factors_of(factors, ("t1", "t2"), ("w1_a", "w1_b", "w2_a", "w2_b")))
    for n, (a, b) in enumerate(((a1, b1), (a2, b2))):
        rank = b.shape[0]
        if cores is None:
            sound = a.shape == (rows, rank) and b.shape == (rank, columns)
        else:
            core = cores[n].shape
            sound = len(core) > 2 and core[:2] == (rank, rank) and a.shape == (rank, rows)
            sound = sound and b.shape[1] * math.prod(core[2:]) == columns
        if not sound:
            raise InputError(f"LoHa's factors do not fit the base's weight {list(info.shape)}", hint=BY_PEFT)
    scale = scale_of(config, key, b1.shape[0])
    return Hadamard(info, (a1, a2), (b1, b2), None if cores is None else (cores[0], cores[1]), scale)


def _kronecker(info: TensorInfo, factors: Tensors, key: str, config: Config) -> Made:
    names = tuple(factors)
    c = factors_of(factors, ("w1",) if "w1" in factors else ("w1_a", "w1_b"), names)
    d = factors_of(factors, ("w2",) if "w2" in factors else ("w2_a", "w2_b"), names)
    core = factors.get("t2")
    if len({*factors} - {"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"}) or (core is not None and len(d) == 1):
        raise InputError(f"not LoKr: {', '.join(sorted(factors))}", hint=BY_PEFT)
    if len(d) == 1 and len(d[0].shape) == 3:
        raise InputError("LoKr of a convolution over one dimension", hint=BY_PEFT)
    rows, columns = (c[0].shape[0], c[-1].shape[1]) if len(c[0].shape) == len(c[-1].shape) == 2 else (0, 0)
    if core is not None:
        inner, outer = d[0].shape[1], d[1].shape[1] * math.prod(core.shape[2:])
        sound = core.shape[:2] == (d[0].shape[0], d[1].shape[0])
    else:
        inner, outer = d[0].shape[0], math.prod(d[-1].shape[1:])
        sound = len(d) == 1 or d[0].shape[1] == d[1].shape[0]
    sound = sound and (len(c) == 1 or c[0].shape[1] == c[1].shape[0])
    if not sound or (rows * inner, columns * outer) != (info.shape[0], math.prod(info.shape[1:])):
        raise InputError(f"LoKr's factors do not fit the base's weight {list(info.shape)}", hint=BY_PEFT)
    rank = c[1].shape[0] if len(c) == 2 else d[1].shape[0] if len(d) == 2 else None
    return Kronecker(info, tuple(c), tuple(d), core, scale_of(config, key, rank))


def shifted(bias: TensorInfo | None, factors: Tensors, key: str, config: Config) -> TensorInfo:
    """The bias of a layer with that of B. InputError: the layer has none, or another shape."""
    a, _ = low_rank(factors)
    added = factors["B.bias"]
    if bias is None:
        raise InputError("lora_bias needs a bias in the base's layer, which has none", hint=BY_PEFT)
    if bias.shape != added.shape or bias.dtype not in PLAIN:
        raise InputError(f"lora_B.bias is {list(added.shape)}, the base's bias {list(bias.shape)} {bias.dtype}")
    return replace(bias, begin=0, made=Shifted(bias, added, scale_of(config, key, a.shape[0])))


def with_rows(info: TensorInfo, module: str, values: TensorInfo, config: Config) -> TensorInfo:
    """An embedding with the rows of `trainable_token_indices` replaced. InputError: no ids for it, or another shape."""
    ids = next((ids for end, ids in tokens_of(config).items() if not end or f".{module}".endswith(f".{end}")), None)
    if ids is None:
        raise InputError(f"{CONFIG} has no trainable_token_indices for it", hint="download the adapter again")
    if values.shape != (len(ids), *info.shape[1:]) or max(ids, default=0) >= info.shape[0]:
        message = f"{len(ids)} rows {list(values.shape)} do not fit the base's {list(info.shape)}"
        raise InputError(message, hint="give the base added tokens first: resize_token_embeddings()")
    if info.dtype not in PLAIN:
        raise InputError(f"the base's weight is {info.dtype}", hint="adapters are merged into unquantised weights")
    return replace(info, begin=0, made=Rows(info, values, tuple(ids)))
