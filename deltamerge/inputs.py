"""The models that a recipe names, opened (headers only) and matched tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.io.checkpoint import Checkpoint, TensorInfo, canonical, match_prefixes
from deltamerge.recipe import Recipe, model_name

Opener = Callable[[str, Path], Checkpoint]


@dataclass(frozen=True, slots=True)
class Input:
    """One model of the recipe: its name, its place in the recipe (None: the base), its tensors by canonical name."""

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
    output its tensors, their names, and its files; `vocabulary` is whose tokenizer the output's is or, for a union,
    starts from: it may be a model that is not merged, opened for its tokenizer alone; `origin` is what a delta artifact
    that is written is a change of, whether it is merged or not."""

    base: Input | None
    tunes: tuple[Input, ...]
    template: Input
    vocabulary: Input | None
    origin: Input | None = None

    @property
    def all(self) -> tuple[Input, ...]:
        return self.tunes if self.base is None else (self.base, *self.tunes)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint that is read, once: of the models, of a delta artifact's base, and under delta artifacts."""
        models = self.all if self.origin is None else (self.origin, *self.tunes)
        found = [c for m in models for c in (m.checkpoint.base, m.checkpoint) if c is not None]
        return tuple({checkpoint.reference: checkpoint for checkpoint in found}.values())


def open_inputs(recipe: Recipe, folder: Path, opener: Opener) -> Inputs:
    """Open every model of the recipe once, match their names, choose the template."""
    opened: dict[str, Checkpoint] = {}

    def checkpoint(reference: str, place: str) -> Checkpoint:
        if reference not in opened:
            with errors.context(place):
                found = opener(reference, folder)
                if found.delta is not None:
                    found = over_base(found)
                opened[reference] = found
        return opened[reference]

    def over_base(delta: Checkpoint) -> Checkpoint:
        from deltamerge.io.layered import over

        assert delta.delta is not None
        belongs = delta.delta.manifest.base
        if recipe.base_model is None or recipe.base_model == delta.reference:
            what = "cannot be the base" if recipe.base_model else "needs base_model"
            raise InputError(f"{delta.reference} is a delta of {belongs}, and {what}", hint=f"base_model: {belongs}")
        with errors.context(delta.reference):
            return over(delta, checkpoint(recipe.base_model, "base_model"))

    deltas = recipe.method.deltas
    named: list[tuple[str, int | None, Checkpoint]] = []
    mentioned = {"base", recipe.base_model} & {recipe.template, recipe.tokenizer_of} or recipe.tokenizer_of == "union"
    if recipe.base_model is not None and (deltas or mentioned or recipe.output.kind == "delta"):
        named.append((recipe.base_model, None, checkpoint(recipe.base_model, "base_model")))
    for index, model in enumerate(recipe.models):
        if not (deltas and model.model == recipe.base_model):
            named.append((model_name(model), index, checkpoint(model.model, f"models[{index}]")))
    matched = _match(named)
    base = matched[0] if matched[0].index is None else None
    tunes = tuple(m for m in matched if m.index is not None)
    template = input_named(recipe.template, recipe, base, tunes) or _template(base if deltas else None, tunes)
    vocabulary = _vocabulary(recipe, base, tunes, checkpoint)
    origin = base if recipe.output.kind == "delta" else None
    return Inputs(base if deltas else None, tunes, template, vocabulary, origin)


def _match(named: Sequence[tuple[str, int | None, Checkpoint]]) -> list[Input]:
    prefixes = match_prefixes([c for _, _, c in named])
    inputs = []
    for (name, index, checkpoint), prefix in zip(named, prefixes, strict=True):
        stored = {canonical(tensor, prefix): tensor for tensor in checkpoint.tensors}
        tensors = {c: checkpoint.tensors[tensor] for c, tensor in stored.items()}
        inputs.append(Input(name, index, checkpoint, tensors, stored))
    return inputs


def input_named(name: str | None, recipe: Recipe, base: Input | None, tunes: tuple[Input, ...]) -> Input | None:
    """The input that `template` or a token's source means: by name, reference, or "base"; None if it names none."""
    if name is None:
        return None
    if base is not None and name in ("base", recipe.base_model):
        return base
    return next((t for t in tunes if t.index is not None and name in (t.name, recipe.models[t.index].model)), None)


def _vocabulary(
    recipe: Recipe, base: Input | None, tunes: tuple[Input, ...], checkpoint: Callable[[str, str], Checkpoint]
) -> Input | None:
    """The model that `tokenizer_source` means; for a union the base, without one the first model."""
    source = recipe.tokenizer_of
    if source is None:
        return None
    if source == "union":
        return base or tunes[0]
    found = input_named(source, recipe, base, tunes)
    return found or Input(source, None, checkpoint(source, "tokenizer_source"), {}, {})


def _template(base: Input | None, tunes: tuple[Input, ...]) -> Input:
    """The only fine-tune; else the base, or the first fine-tune if some have tensors (a task head) that the base lacks;
    without a base the first model."""
    if base is None or len(tunes) == 1:
        return tunes[0]
    has_more = any(tune.tensors.keys() - base.tensors.keys() for tune in tunes)
    return tunes[0] if has_more else base
