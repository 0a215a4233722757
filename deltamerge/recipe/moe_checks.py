"""Checks of a recipe with `experts`: what a mixture needs, and the keys that it has no use for."""

from __future__ import annotations

from collections.abc import Iterator

from deltamerge.errors import Problem
from deltamerge.recipe.problems import is_given
from deltamerge.recipe.schema import DRAWN, Expert, Recipe
from deltamerge.recipe.values import show

OF_MERGES = (
    "models", "slices", "modules", "parameters", "prune", "calibration", "template", "tokenizer_source", "tokenizer",
    "chat_template",
)  # fmt: skip
OF_MIXTURES = ("shared_experts", "gate_mode", "experts_per_token", "architecture")
LEAST = 2  # experts


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield every fault of a mixture that the types of the keys cannot express."""
    if recipe.method_name != "moe":
        message = f"are merged by moe, not by {show(recipe.merge_method)}"
        yield recipe.problem(("experts",), message, "merge_method: moe, or leave it out", key=True)
        return
    if not is_given(recipe, "experts"):
        yield recipe.problem(("merge_method",), "moe needs experts", "experts: [{model: …, positive_prompts: […]}, …]")
        return
    if not is_given(recipe, "base_model"):
        yield recipe.problem((), "moe needs base_model", "attention, norms and embeddings are taken from it")
    for key in OF_MERGES:
        if is_given(recipe, key):
            yield recipe.problem((key,), "is not for moe", "remove it", key=True)
    if not recipe.output.rules.standalone:
        yield recipe.problem(("output", "kind"), "moe makes a model", "kind: model")
    if recipe.output.quantization != "none":
        yield recipe.problem(("output", "quantization"), "moe writes plain weights", "quantize what it wrote", key=True)
    if recipe.output.gguf is not None:
        yield recipe.problem(("output", "gguf"), "no GGUF file is written of a mixture", "remove it", key=True)
    yield from _counts(recipe)
    yield from _prompts(recipe)
    yield from _names(recipe)


def stray(recipe: Recipe) -> Iterator[Problem]:
    """Check that a recipe without experts has no keys of mixtures."""
    for key in OF_MIXTURES:
        if is_given(recipe, key):
            yield recipe.problem((key,), "is for moe, and there are no experts", "experts: […]", key=True)


def _counts(recipe: Recipe) -> Iterator[Problem]:
    count, wanted = len(recipe.experts), recipe.experts_per_token
    if count < LEAST:
        yield recipe.problem(("experts",), f"must be at least {LEAST} experts, got {count}")
    elif wanted > count:
        loc = ("experts_per_token",) if is_given(recipe, "experts_per_token") else ()
        yield recipe.problem(loc, f"experts_per_token is {wanted}, and there are {count} experts")


def _prompts(recipe: Recipe) -> Iterator[Problem]:
    """Check that routers made of prompts have some of every expert, and not the same of all."""
    shared = [bool(expert.positive_prompts) for expert in recipe.shared_experts]
    if recipe.gate_mode in DRAWN:
        return
    for i, expert in enumerate(recipe.experts):
        if not expert.positive_prompts:
            yield _without(recipe, i)
    for i, expert in enumerate(recipe.shared_experts):
        if expert.negative_prompts and not expert.positive_prompts:
            yield recipe.problem(("shared_experts", i), "has negative_prompts alone", "give positive_prompts too")
    if any(shared) and not all(shared):
        at = ("shared_experts", shared.index(False))
        yield recipe.problem(at, "has no positive_prompts, as others have", "give them to all shared experts or none")
    same = len(recipe.experts) >= LEAST and len({expert.prompts for expert in recipe.experts}) == 1
    if same and recipe.experts[0].positive_prompts:
        hint = "give each those texts that it is good at, or gate_mode: random"
        yield recipe.problem(("experts",), "have the same prompts: their routers would be the same", hint)


def _without(recipe: Recipe, index: int) -> Problem:
    message = f"has no positive_prompts, which gate_mode {recipe.gate_mode} makes its router of"
    return recipe.problem(("experts", index), message, "give some, or gate_mode: random")


def _names(recipe: Recipe) -> Iterator[Problem]:
    """Check that no two experts have one name."""
    seen: set[str] = set()
    for key, experts in (("experts", recipe.experts), ("shared_experts", recipe.shared_experts)):
        for i, expert in enumerate(experts):
            if expert.name is not None and expert.name in seen:
                yield recipe.problem((key, i, "name"), f"another expert is named {show(expert.name)}")
            seen |= {expert.name} if expert.name else set()


def names(experts: tuple[Expert, ...]) -> list[str]:
    """Return the name of every expert; one that is named before by the same reference has a number behind it."""
    found: list[str] = []
    for expert in experts:
        name, number = expert.name or expert.reference, 1
        while name in found:
            number += 1
            name = f"{expert.name or expert.reference} ({number})"
        found.append(name)
    return found
