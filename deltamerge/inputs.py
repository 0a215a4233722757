"""The models that a recipe names, opened (headers only) and matched tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltamerge import errors
from deltamerge.io.checkpoint import Checkpoint, TensorInfo, canonical, match_prefixes
from deltamerge.recipe import Recipe, model_name

Opener = Callable[[str, Path], Checkpoint]


@dataclass(frozen=True, slots=True)
class Input:
    """One model of the recipe: its name, its place in the recipe (None: the base), and its tensors by canonical name."""

    name: str
    index: int | None
    checkpoint: Checkpoint
    tensors: dict[str, TensorInfo]
    stored: dict[str, str]

    def get(self, canonical_name: str) -> TensorInfo | None:
        return self.tensors.get(canonical_name)


@dataclass(frozen=True, slots=True)
class Inputs:
    """`base` is None where the recipe names none; `tunes` are merged, in the recipe's order; `template` gives the
    output its tensors, their names, and its files; `vocabulary` gives it its embedding rows and tokenizer."""

    base: Input | None
    tunes: tuple[Input, ...]
    template: Input
    vocabulary: Input | None

    @property
    def all(self) -> tuple[Input, ...]:
        return self.tunes if self.base is None else (self.base, *self.tunes)


def open_inputs(recipe: Recipe, folder: Path, opener: Opener) -> Inputs:
    """Open every model of the recipe once, match their names, choose the template."""
    opened: dict[str, Checkpoint] = {}

    def checkpoint(reference: str, place: str) -> Checkpoint:
        if reference not in opened:
            with errors.context(place):
                opened[reference] = opener(reference, folder)
        return opened[reference]

    uses_base = recipe.method.deltas
    named: list[tuple[str, int | None, Checkpoint]] = []
    if recipe.base_model is not None and uses_base:
        named.append((recipe.base_model, None, checkpoint(recipe.base_model, "base_model")))
    for index, model in enumerate(recipe.models):
        if uses_base and model.model == recipe.base_model:
            continue
        named.append((model_name(model), index, checkpoint(model.model, f"models[{index}]")))
    matched = _match(named)
    base = matched[0] if matched[0].index is None else None
    tunes = tuple(m for m in matched if m.index is not None)
    template = _template(recipe, base, tunes)
    return Inputs(base, tunes, template, _vocabulary(recipe, base, tunes, template))


def _match(named: Sequence[tuple[str, int | None, Checkpoint]]) -> list[Input]:
    prefixes = match_prefixes([c for _, _, c in named])
    inputs = []
    for (name, index, checkpoint), prefix in zip(named, prefixes, strict=True):
        stored = {canonical(tensor, prefix): tensor for tensor in checkpoint.tensors}
        tensors = {c: checkpoint.tensors[tensor] for c, tensor in stored.items()}
        inputs.append(Input(name, index, checkpoint, tensors, stored))
    return inputs


def _template(recipe: Recipe, base: Input | None, tunes: tuple[Input, ...]) -> Input:
    """The model named by `template`; else the only fine-tune; else the base, or the first fine-tune if some have
    tensors (a task head) that the base lacks; without a base the first model."""
    everyone = tunes if base is None else (base, *tunes)
    if recipe.template is not None:
        for candidate in everyone:
            reference = recipe.base_model if candidate.index is None else recipe.models[candidate.index].model
            if recipe.template in (candidate.name, reference):
                return candidate
    if base is None or len(tunes) == 1:
        return tunes[0]
    has_more = any(tune.tensors.keys() - base.tensors.keys() for tune in tunes)
    return tunes[0] if has_more else base


def _vocabulary(
    recipe: Recipe, base: Input | None, tunes: tuple[Input, ...], template: Input
) -> Input | None:
    """Whose embedding rows and tokenizer the output has; None where the recipe leaves it to the template."""
    source = recipe.tokenizer_source
    if source is None:
        return None
    if source == "base":
        return base or template
    for tune in tunes:
        if source in (tune.name, recipe.models[tune.index or 0].model):
            return tune
    return base if source == recipe.base_model else template
