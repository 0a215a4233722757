"""The inputs of a mixture's routers as plain data, and their vectors; `calibrate.merge.router` computes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.calibrate.spec import BASELINE_BYTES, resident
from deltamerge.errors import InputError, VerifyError
from deltamerge.recipe.schema import DRAWN
from deltamerge.tensors.tensor import TensorInfo

BATCH = 8  # prompts that go through the model together
NAME = "routers"  # of them in a lock


@dataclass(frozen=True, slots=True)
class Prompts:
    """An expert's name and prompts."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """The routers of a mixture.

    mode        gate_mode
    experts     whose routers are made; the shared ones with a gate of their own are the last
    routed      how many of them are not shared
    layers      of the model
    width       of its hidden states
    model       the base's name
    checkpoint  its folder, with config.json and tokenizer
    tensors     all of the base's
    embedding   of its tokens
    seed        of drawn routers
    device      where the base runs
    """

    mode: str
    experts: tuple[Prompts, ...]
    routed: int
    layers: int
    width: int
    model: str
    checkpoint: Path
    tensors: tuple[TensorInfo, ...]
    embedding: TensorInfo
    seed: int
    device: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Every prompt once."""
        return tuple(dict.fromkeys(text for one in self.experts for text in (*one.positive, *one.negative)))

    @property
    def runs(self) -> bool:
        """Whether the base is run."""
        return self.mode not in DRAWN and self.mode != "cheap_embed"

    @property
    def memory(self) -> int:
        """About the bytes that making them takes beside BASELINE_BYTES: a block stored and in float32, hidden states of
        prompts of a few hundred tokens, and the vectors."""
        vectors = 16 * self.layers * len(self.experts) * self.width
        if not self.runs:
            return vectors
        states = 4 * self.width * 256 * (len(self.texts) + 8 * BATCH) + 8 * self.layers * self.width * len(self.texts)
        return 2 * resident(self.tensors) + states + vectors

    def within(self, limit: int | None) -> RouterSpec:
        """Itself. InputError: it takes more than `limit` bytes."""
        need = BASELINE_BYTES + self.memory
        if limit is not None and self.mode not in DRAWN and need > limit:
            hint = f"give at least {-(-need // 10**6)}MB, or gate_mode: cheap_embed"
            raise InputError(f"--memory {limit} is too little to make routers of {self.model}", hint=hint)
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Routers:
    """The vectors of routers, (layers, experts, hidden) float32, and what a lock says of them."""

    values: NDArray[np.float32]
    record: Mapping[str, Any]


def locked(lock: Mapping[str, Any], spec: RouterSpec, values: NDArray[np.float32] | None, where: str) -> Routers:
    """The routers of a lock. VerifyError: it has none, or those of another gate mode or shape."""
    record = lock.get(NAME)
    if not isinstance(record, dict) or values is None:
        raise VerifyError(f"{where}: has no routers", hint="run without --locked, or copy the .rows file beside it")
    if record.get("gate_mode") != spec.mode:
        raise VerifyError(f"{where}: its routers are {record.get('gate_mode')}, the recipe says {spec.mode}")
    if values.shape != (spec.layers, len(spec.experts), spec.width) or values.dtype != np.float32:
        raise VerifyError(f"{where}: its routers have shape {list(values.shape)}, which is not that of the mixture")
    kept = {key: value for key, value in record.items() if key not in ("rows", "rows_hash")}
    return Routers(values, kept)
