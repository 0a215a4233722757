"""The model card of a finished run: README.md with the hub's front matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deltamerge.errors.shown import code, fenced, plain
from deltamerge.formats.components import card
from deltamerge.formats.components import front_matter as read_front_matter
from deltamerge.outputs.checkpoint import head_of
from deltamerge.outputs.output import Account, output_of
from deltamerge.plan.planner import Plan
from deltamerge.tensors.tensor import Node
from deltamerge.version import __version__

if TYPE_CHECKING:
    from deltamerge.calibrate.spec import Calibrated

SHOWN = 3  # prompts shown of an expert
LONG = 80  # characters shown of a prompt
ALIKE = 0.95  # cosine above which two routers hardly tell their experts apart


def _license(plan: Plan) -> str | None:
    """Return the licence that all inputs state in their cards, if they agree."""
    found = set()
    for file in [source.path / "README.md" for model in plan.inputs.all for source in model.checkpoint.sources]:
        stated = read_front_matter(file).get("license")
        found.add(stated if isinstance(stated, str) else None)
    return found.pop() if len(found) == 1 else None


def front_matter(plan: Plan) -> dict[str, object]:
    """Return the card's fields for the hub.

    `base_model` lists the hub's models that the output was made of; folders of this machine are not listed. One
    fine-tune is a `finetune`, several are a `merge`.
    """
    sources: list[str | None] = []
    models = [model for model in (plan.inputs.origin, *plan.inputs.all) if model is not None]
    for model in models:
        checkpoint, adapter = model.checkpoint, model.checkpoint.adapter
        if adapter is None:
            sources.append(checkpoint.hub_id)
        else:
            sources += [checkpoint.hub_id, adapter.hub_id]
    merged = len(plan.inputs.tunes) > 1
    matter: dict[str, object] = {
        "base_model": [source for source in dict.fromkeys(sources) if source],
        "base_model_relation": "merge" if merged else "finetune",
        **output_of(plan).front_matter(plan),
        "tags": ["deltamerge", *["merge"] * merged, *["moe"] * (plan.mixture is not None)],
    }
    if not matter["base_model"]:
        del matter["base_model"]
    if head := head_of(plan.config):
        matter["pipeline_tag"] = head.task
    licence = _license(plan)
    if licence is not None:
        matter["license"] = licence
    return matter


def calibration_table(found: Iterable[tuple[str, Mapping[str, Any], Iterable[float]]]) -> list[str]:
    """Return a table of calibrated q's: objective, value and reason. `found` has (model, record, its q's) for each."""
    rows = []
    for model, record, values in found:
        q = sorted(values) or [1.0]
        shown = f"{q[0]:.4g}" if q[0] == q[-1] else f"{q[0]:.4g} … {q[-1]:.4g}"
        how = plain(f"{record['objective']}, {record['scope']}, {record['search']}")
        why, chosen = plain(str(record["why"])), plain(str(record["chosen"]))
        rows.append(f"| {plain(model)} | {how} | {chosen} | {shown} | {why} | {record['forward_passes']} |")
    return [
        "| model | objective, scope, search | chosen | q | why | forward passes |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def _calibration(plan: Plan, calibrated: Mapping[Node, Calibrated]) -> list[str]:
    if not plan.stages:
        return []
    from deltamerge.calibrate.spec import in_words

    found = [
        (spec.name, calibrated[node].record, [float(x) for v in calibrated[node].q.values() for x in np.ravel(v)])
        for node, spec in plan.specs.items()
    ]
    explained = "Kept entries of the weights of linear layers are divided by q; 1-D tensors and embeddings have q = 1."
    records = [(name, record) for name, record, _ in found]
    words = [(name, in_words(record.get("not_calibrated", ()))) for name, record in records]
    explained = " ".join([explained, *(f"{name}: {said}." for name, said in words if said)])
    if any(spec.parts for spec in plan.specs.values()):
        explained = "The merged delta is divided by q: λ is the recipe's over q."
    if any(spec.coefficients for spec in plan.specs.values()):
        explained = "Each delta of the recipe is multiplied by its coefficient, in the column of q."
    return ["## Calibration", "", *calibration_table(found), "", explained, ""]


def _mixture(plan: Plan, values: Mapping[Node, Any]) -> Iterator[str]:
    """Yield lines on the experts of a mixture: models, prompts, and the similarity of their routers."""
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
    said = f"Routers: {recipe.gate_mode}. The most similar two belong to experts {first} and {second} in "
    said += f"layer {alike['layer']}: cosine {alike['cosine']:.3g}"
    hardly = ", so that these two share their tokens about evenly" if alike["cosine"] > ALIKE else ""
    yield from (f"{said}{hardly}.", "")


def _texts(prompts: tuple[str, ...]) -> str:
    shown = [plain(text if len(text) <= LONG else f"{text[: LONG - 1]}…") for text in prompts[:SHOWN]]
    return "<br>".join([*shown, *([f"… {len(prompts) - SHOWN} more"] if len(prompts) > SHOWN else [])])


def _study(study: Mapping[str, Any]) -> list[str]:
    """Return lines on the search that found the recipe."""
    if not study:
        return []
    goals = study.get("objectives") or {}
    searched = ", ".join(f"{code(str(name))} {value}" for name, value in (study.get("values") or {}).items())
    values = ", ".join(f"{plain(str(name))} {value}" for name, value in goals.items())
    said = f"The best {plain(str(study.get('why', '')))}, by {plain(str(study.get('sampler')))}: {values}."
    return ["## Search", "", f"{study.get('trials')} trials. {said}", "", f"Found: {searched}.", ""]


def _pictures(named: Mapping[str, str]) -> list[str]:
    if not named:
        return []
    shown = (f"![{caption}]({name})" for name, caption in named.items())
    return ["## Pictures", "", *(line for picture in shown for line in (picture, ""))]


def render(
    plan: Plan,
    recipe_text: str,
    title: str,
    calibrated: Mapping[Node, Any],
    account: Account,
    pictures: Mapping[str, str] | None = None,
    study: Mapping[str, Any] | None = None,
) -> str:
    """Return the whole card; the same plan gives the same text.

    account   lines of the output about its weights
    pictures  files and their captions
    study     the search that found the recipe
    """
    what = Counter((p.built.method, p.built.details) for o in plan.outputs for p in o.pieces)
    rows = [
        f"| {count} | {plain(method)} | {'<br>'.join(map(plain, details))} |"
        for (method, details), count in sorted(what.items(), key=lambda item: (-item[1], item[0]))[:40]
    ]
    base = f" on top of {code(plan.inputs.base.name)}" if plan.inputs.base else ""
    models = ", ".join(map(code, plan.inputs.names))
    lines = [
        *card(front_matter(plan), plain(title)),
        f"Made with deltamerge {__version__}: `{plan.recipe.method.name}` of {models}{base}.",
        "",
        "| tensors | method | sources |",
        "|---|---|---|",
        *rows,
        *([f"| … | {len(what) - 40} more combinations | see `deltamerge plan` |"] if len(what) > 40 else []),
        "",
        *[f"- {plain(note)}" for note in plan.remarks],
        *([""] if plan.remarks else []),
        *_calibration(plan, calibrated),
        *_mixture(plan, calibrated),
        *account.card(plan),
        *_study(study or {}),
        *account.table(),
        *_pictures(pictures or {}),
        "## Recipe",
        "",
        *fenced(recipe_text.rstrip(), "yaml"),
        "",
        f"Reproduce it with `deltamerge run recipe.yaml{' --pictures' * bool(pictures)} --lock recipe.lock`, where the "
        "recipe's paths lead to the models; check it with `deltamerge verify .`.",
        "",
    ]
    return "\n".join(lines)
