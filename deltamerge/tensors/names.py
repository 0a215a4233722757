"""The meaning of tensors' names and shapes: layers, embeddings, heads, weights and how they are stored.

There is no table of architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, Protocol

# The language model's head in transformers; files of models that tie it to the embedding leave it out.
LM_HEAD = "lm_head.weight"

# Tensors with a row for each token: they move where tokens do.
TOKEN_EMBEDDING = re.compile(
    r"(^|[./])(embed_tokens|word_embeddings|wte|tok_embeddings|embed_in|shared|token_embedding)\.weight$"
)
TOKEN_HEAD = re.compile(
    r"(^|[./])(lm_head|embed_out|vocab_projector)\.(decoder\.)?(weight|bias)$|(^|[./])predictions\.(bias|decoder\.(weight|bias))$"
)

# Tables of every kind (tokens, positions, types), whose rows are looked up. This finds too much rather than too little:
# a `q` or an input's norm has no meaning for any of them.
_TABLE = r"embed|(^|[./])(wte|wpe|shared)\."
EMBEDDING = re.compile(rf"{_TABLE}|\.relative_attention_bias\.")
# Experts stacked in one tensor of three dimensions; beside convolutions, no other weights have three. And the stacked
# tensor that leads back to the hidden size.
EXPERTS = re.compile(r"expert|moe|(^|\.)(input|output)_linear\.")
EXPERTS_OUT = re.compile(r"down|output_linear|(^|\.)w2(\.|$)")
# Outside layers, these belong to the first slice of a stack, norms and heads to the last. The relative bias by distance
# is not among them, because layers read it.
BEFORE_LAYERS = re.compile(rf"{_TABLE}|(^|[./])project_in\.")

# The task head, which the base lacks or the authors of DAREx leave whole: sequence and token classifiers, answer spans,
# and language-model heads by the names that transformers gives them, as a whole component of the tensor's name. The
# default of a recipe's `exclude`, so a pattern for `re.search`. Wider than `TOKEN_HEAD`: classifiers have no tokens.
TASK_HEAD = r"(^|[./])(classifier|score|lm_head|qa_outputs|classification_head|embed_out|cls)(\.|$)"
# The same without the heads of language models, which are as large as tables of embeddings.
SMALL_HEAD = r"(^|[./])(classifier|score|qa_outputs|classification_head|cls)(\.|$)"

# Model types of transformers with modules of its class Conv1D, whose weight is (in, out), and those modules' names.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
CONV1D = re.compile(r"(^|[./])(c_attn|q_attn|c_proj|c_fc)\.weight$")

_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")
_BLOCK = re.compile(r"\.([0-9]{1,9})(?=\.)")
_INSIDE = re.compile(r"(.*?\.\d+)\.")
# Not inside a container whose own name ends in a digit, as `layer1.0.conv1`: a model has several of them.
_NUMBERED = re.compile(r"(?<!\d)\.(\d+)\.")


def block_of(name: str) -> tuple[str, int] | None:
    """Return the container and number of a tensor's layer, from the first component that is a number.

    ("model.layers", 7) for `model.layers.7.mlp.up_proj.weight`; None outside layers.
    """
    found = _BLOCK.search(f".{name}.")
    return None if found is None else (name[: max(0, found.start() - 1)], int(found[1]))


def layer_index(name: str) -> int | None:
    """Return the number of a tensor's layer: 7 for `model.layers.7.mlp.up_proj.weight`; None outside layers."""
    found = _BLOCK.search(f".{name}.")
    return None if found is None else int(found[1])


def layer_position(name: str, layers: int) -> float:
    """t = index / (layers − 1) of the tensor's layer; 1 for a single layer, 0 outside layers (embeddings, head)."""
    index = layer_index(name)
    if index is None:
        return 0.0
    return 1.0 if layers <= 1 else min(1.0, index / (layers - 1))


def blocks_of(names: Iterable[str]) -> dict[str, frozenset[int]]:
    """Return the numbers of the layers of every container."""
    found: dict[str, set[int]] = {}
    for name in names:
        if (block := block_of(name)) is not None:
            found.setdefault(block[0], set()).add(block[1])
    return {container: frozenset(numbers) for container, numbers in found.items()}


def block_name(name: str) -> str | None:
    """Return the module that is a tensor's layer: `model.layers.7` for `model.layers.7.mlp.up_proj.weight`.

    None outside layers, and where the name begins with its number (`0.weight` of a plain sequence of modules).
    """
    found = _INSIDE.match(name)
    return None if found is None else found[1]


def numbers_as_stars(name: str) -> str:
    """Return a name with every component that is a number as `*`: one pattern for the same tensor of every layer."""
    return _NUMBER.sub(r"\1*", name)


def numbered_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, list[str]] | None:
    """Return the names of the tensors in each repeated block, by number, from the shapes of all tensors by name.

    The blocks are in the container that holds most elements. None: no container is numbered 0 … L−1, and the whole
    model must be in memory for calibration.
    """
    containers: dict[str, dict[int, list[str]]] = {}
    elements: dict[str, int] = {}
    for name, shape in shapes.items():
        match = _NUMBERED.search(name)  # the outermost number: experts inside a block are part of it
        if match is not None:
            prefix = name[: match.start()]
            containers.setdefault(prefix, {}).setdefault(int(match[1]), []).append(name)
            elements[prefix] = elements.get(prefix, 0) + prod(shape)
    for prefix in sorted(containers, key=lambda p: -elements[p]):
        if set(containers[prefix]) == set(range(len(containers[prefix]))):
            return dict(sorted(containers[prefix].items()))
    return None


def resident_size(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> int:
    """Return the sizes, by name, of all tensors outside repeated blocks and in the largest block."""
    return outside_blocks(shapes, sizes) + max(block_sizes(shapes, sizes), default=sum(sizes.values()))


def outside_blocks(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> int:
    """Return the total size of tensors outside repeated blocks; 0 without blocks."""
    inside = block_sizes(shapes, sizes)
    return sum(sizes.values()) - sum(inside) if inside else 0


def block_sizes(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> list[int]:
    """Return the total size of each repeated block."""
    blocks = numbered_blocks(shapes) or {}
    return [sum(sizes[name] for name in names) for names in blocks.values()]


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor of a model with this config is the weight of transformers' Conv1D, stored (in, out).

    A model made of others (`encoder`, `decoder`, `text_config`) has the modules of each.
    """
    if CONV1D.search(name) is None:
        return False
    if config.get("model_type") in CONV1D_MODELS:
        return True
    made_of = {key: part for key, part in config.items() if isinstance(part, dict) and "model_type" in part}
    inside = [part for key, part in made_of.items() if name.startswith(f"{key}.")] or list(made_of.values())
    return any(part["model_type"] in CONV1D_MODELS for part in inside)


def is_unscaled(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor keeps q = 1 beside calibrated weights, which scores better: vectors and looked-up rows.

    Sides of 1 do not count in tensors of three and more dimensions: a class token (1, 1, n) is a vector.
    """
    sides = len(shape) if len(shape) < 3 else sum(side != 1 for side in shape)
    return sides < 2 or (sides == 2 and EMBEDDING.search(name) is not None)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor is a linear layer's weight, by name and shape."""
    return len(shape) == 2 and name.endswith("weight") and not is_unscaled(name, shape)


def is_stacked(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor stacks experts' weights, by name and shape."""
    return len(shape) == 3 and 1 not in shape and EXPERTS.search(name) is not None


class Shaped(Protocol):
    """A tensor of a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def stacked_transposed(name: str, tensors: Mapping[str, Shaped], hidden: int | None) -> bool:
    """Tell whether stacked experts are stored (in, out), told by which side is the hidden size.

    A square tensor is stored like another tensor of the same module among `tensors`, the checkpoint's.
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


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names by the numbers in them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
