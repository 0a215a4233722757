"""Tensors inside numbered blocks that only some models of a merge have, and that may be copied or left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from deltamerge.plan.inputs import Input
from deltamerge.plan.layer_config import layer_count
from deltamerge.tensors.dtypes import COPIED, FLOATING
from deltamerge.tensors.names import block_of, blocks_of
from deltamerge.tensors.tensor import Tensor, TensorInfo

# Floating-point buffers that old versions of transformers wrote into every layer; newer ones do not read them.
BUFFERS = re.compile(
    r"(^|\.)(rotary_emb(eddings)?\.(inv_freq|cos_cached|sin_cached)|(attn|attention|self_attn)\.masked_bias"
    r"|1\.EncDecAttention\.relative_attention_bias\.weight)$"
)
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")


@dataclass(frozen=True)
class Spares:
    """The tensors of numbered blocks that some of `models` may lack.

    - a whole block beyond the count of layers in its model's config (layers for multi-token prediction:
    `model.layers.61` of 61 layers); where no config counts them, a whole last block with a tensor that no layer of all
    models has

    - every block of a container that a model lacks altogether (`mtp.layers`, a decoder, a vision tower), unless it has
    a container that the others lack, which may be the same under another name

    - buffers
    """

    models: Sequence[Input]

    def holds(self, name: str) -> bool:
        """Whether a tensor that some models lack may be copied or left out."""
        found = [tensor for model in self.models if (tensor := model.get(name)) is not None]
        if any(map(is_buffer, found)):
            return True
        if not found or len(found) == len(self.models):
            return False
        place = block_of(name)
        return place is not None and place in self._spare

    @cached_property
    def _spare(self) -> frozenset[tuple[str, int]]:
        blocks = [blocks_of(model.tensors) for model in self.models]
        counts = [
            {p: layer_count(model.checkpoint.config, model.container(p), numbers) for p, numbers in own.items()}
            for model, own in zip(self.models, blocks, strict=True)
        ]
        spare = set()
        theirs: dict[tuple[int, ...], list[bool]] = {}  # by the models that have a block: whether each has no more
        for prefix, number in {(prefix, n) for own in blocks for prefix, numbers in own.items() for n in numbers}:
            owners = tuple(i for i, own in enumerate(blocks) if number in own.get(prefix, ()))
            lackers = [i for i, own in enumerate(blocks) if number not in own.get(prefix, ())]
            known = [counts[i][prefix] for i in owners]
            beyond = all(count is not None and number >= count for count in known)
            beyond |= all(count is None for count in known) and self._is_odd(prefix, number)
            if owners not in theirs:
                every = {other for i in owners for other in blocks[i]}
                theirs[owners] = [bool(own) and own.keys() <= every for own in blocks]
            if lackers and all(beyond or (prefix not in blocks[i] and theirs[owners][i]) for i in lackers):
                spare.add((prefix, number))
        return frozenset(spare)

    @cached_property
    def _kinds(self) -> list[dict[str, dict[int, set[str]]]]:
        """Of each model, by container and number: what follows the number in the names of the block's tensors."""
        found: list[dict[str, dict[int, set[str]]]] = []
        for model in self.models:
            own: dict[str, dict[int, set[str]]] = {}
            for name in model.tensors:
                if (place := block_of(name)) is not None:
                    rest = name[len(place[0]) :].split(".", 2)[-1]
                    own.setdefault(place[0], {}).setdefault(place[1], set()).add(rest)
            found.append(own)
        return found

    @cached_property
    def _usual(self) -> dict[str, tuple[int, set[str]]]:
        """Of each container the last number that every model has (-1: none), and what those blocks hold."""
        found = {}
        for prefix in {prefix for own in self._kinds for prefix in own}:
            kinds = [own.get(prefix, {}) for own in self._kinds]
            shared = set.intersection(*map(set, kinds))
            found[prefix] = max(shared, default=-1), {rest for own in kinds for n in shared for rest in own[n]}
        return found

    def _is_odd(self, prefix: str, number: int) -> bool:
        """Whether a block behind all blocks that every model has holds a tensor that none of these has."""
        last, usual = self._usual[prefix]
        own = [blocks[number] for kinds in self._kinds if number in (blocks := kinds.get(prefix, {}))]
        return 0 <= last < number and all(block - usual for block in own)


def is_buffer(tensor: Tensor | TensorInfo) -> bool:
    """Tell whether a tensor of a layer is a buffer rather than a weight: a mask, a table of frequencies."""
    name, shape = tensor.name, tensor.shape
    if tensor.dtype not in FLOATING | COPIED or BUFFERS.search(name):
        return True
    return CAUSAL_MASK.search(name) is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def named(names: Sequence[str], show: Callable[[Iterable[str]], str]) -> str:
    """Tensors in a message; those of numbered blocks by their block."""
    blocks: dict[str, int] = {}
    for name in names:
        place = block_of(name)
        key = name if place is None else f"{place[0]}.{place[1]}"
        blocks[key] = blocks.get(key, 0) + 1
    return show(f"{key} ({count} tensors)" if count > 1 else key for key, count in blocks.items())
