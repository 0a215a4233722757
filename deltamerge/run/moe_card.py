"""The experts of a mixture on its card: models, prompts, and how far their routers are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltamerge.errors.markdown import plain
from deltamerge.plan.planner import Plan
from deltamerge.tensors.graph import Node

SHOWN = 3  # prompts of an expert
LONG = 80  # characters of a prompt
ALIKE = 0.95  # cosine of two routers that hardly tell their experts apart


def mixture_lines(plan: Plan, values: Mapping[Node, Any]) -> Iterator[str]:
    """The section of a mixture; nothing for other outputs."""
    mixture, recipe = plan.mixture, plan.recipe
    if mixture is None:
        return
    yield from ("## Experts", "", "| expert | model | positive prompts | negative prompts |", "|---|---|---|---|")
    names = [str(i) for i in range(len(mixture.experts))] + ["shared"] * len(mixture.shared)
    models, experts = (*mixture.experts, *mixture.shared), (*recipe.experts, *recipe.shared_experts)
    for name, model, expert in zip(names, models, experts, strict=True):
        yield f"| {name} | {plain(model)} | {_texts(expert.positive_prompts)} | {_texts(expert.negative_prompts)} |"
    sizes = f"{mixture.parameters:,} parameters, {mixture.active:,} of them active for a token"
    yield from ("", f"{mixture.layout.architecture}: {mixture.sizes.active} experts a token; {sizes}.", "")
    alike = values[mixture.routers].record["most_alike"]
    first, second = alike["experts"]
    said = f"Routers: {recipe.gate_mode}. The two that are most alike are those of experts {first} and {second} in "
    said += f"layer {alike['layer']}: cosine {alike['cosine']:.3g}"
    hardly = ", so that these two share their tokens about evenly" if alike["cosine"] > ALIKE else ""
    yield from (f"{said}{hardly}.", "")


def _texts(prompts: tuple[str, ...]) -> str:
    shown = [plain(text if len(text) <= LONG else f"{text[: LONG - 1]}…") for text in prompts[:SHOWN]]
    return "<br>".join([*shown, *([f"… {len(prompts) - SHOWN} more"] if len(prompts) > SHOWN else [])])
