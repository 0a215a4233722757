"""What a plan says of quantised models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from deltamerge.errors.shown import some
from deltamerge.plan.inputs import Input, Inputs
from deltamerge.tensors.dtypes import TORCH_NAMES

SHOWN = 3


def remarks(inputs: Inputs, dtypes: Mapping[str, str]) -> Iterator[str]:
    """A line for each quantised model: scheme, and the dtypes in which it is computed and, by `dtypes` of the output's
    tensors, written; and a line for scales that belong to no weight."""
    for model in inputs.all:
        scheme = model.checkpoint.quantised
        if scheme is None:
            continue
        if scheme.weights:
            written = " and ".join(TORCH_NAMES[dtype] for dtype in _written(model, inputs, dtypes))
            yield f"{model.name}: quantised ({scheme}), read as float32, written as {written}"
        if scheme.dropped:
            yield f"{model.name}: left out, scales of a cache or of activations: {some(scheme.dropped, SHOWN)}"


def _written(model: Input, inputs: Inputs, dtypes: Mapping[str, str]) -> list[str]:
    """The dtypes of the output's tensors that quantised weights of a model become; of all tensors, where layers of a
    stack have other names."""
    stored = (inputs.template.stored.get(name) for name, info in model.tensors.items() if info.saved_as)
    found = {dtypes[name] for name in stored if name is not None and name in dtypes}
    return sorted(found or dtypes.values(), key=list(TORCH_NAMES).index)[: len(found) or 1]
