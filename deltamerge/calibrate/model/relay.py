"""A walk in which each part of a model is watched with other weights than those that make the next part's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from deltamerge.calibrate.model.blocks import BlockModel, Inputs, Watch, Weights
from deltamerge.calibrate.model.trace import NotAChain
from deltamerge.errors import InputError


@torch.no_grad()
def relay(model: BlockModel, batches: Sequence[Inputs], seen: Weights, passed: Weights, watch: Watch) -> Iterator[int]:
    """Watch block after block with the weights `seen`, on what the blocks before made of the batches with `passed`.

    Yields the number of each part that was watched; its `passed` weights are asked for afterwards. What is outside
    blocks (part 0) comes last, but its `passed` weights are asked for first. What is watched follows from what was
    passed, so both are float32. InputError: blocks cannot be told apart.
    """

    def start(names: Sequence[str]) -> Mapping[str, Tensor]:
        return passed(names) if names is model.parts[0] else seen(names)

    refused = InputError(
        f"{type(model.module).__name__}: its blocks cannot be told apart", hint="merge_method: regmean"
    )
    if model.whole:
        raise refused
    model.precision = "float32"
    try:
        traces = model.prologue(start, batches)
    except NotAChain:
        raise refused from None
    outputs = [trace.left(again=True) for trace in traces]
    for i in range(len(model.blocks)):
        model.entering(2 + i, seen)
        model.block(i, seen, traces, list(outputs), watch)
        yield 1 + i
        model.block(i, passed, traces, outputs, None)
    model.epilogue(seen, batches, lambda batch, output: None, outputs, watch)
    yield 0
