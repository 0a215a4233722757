"""The model card of a finished run: README.md with the hub's front matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from deltamerge.calibrate.reach import in_words
from deltamerge.calibrate.values import Calibrated
from deltamerge.errors.markdown import code, fenced, plain
from deltamerge.formats.components import PIPELINE
from deltamerge.formats.delta.writer import Summary
from deltamerge.formats.quantised.writer import Losses
from deltamerge.models.front_matter import card
from deltamerge.models.front_matter import front_matter as read_front_matter
from deltamerge.outputs.budget import ChosenDensities, budget_of
from deltamerge.outputs.lora_file import LowRankSummary
from deltamerge.plan.planner import Plan
from deltamerge.run.heads import head_of
from deltamerge.run.lock import errors_of
from deltamerge.run.moe_card import mixture_lines
from deltamerge.tensors.graph import Node
from deltamerge.version import __version__


def _license(plan: Plan) -> str | None:
    """The licence that all inputs state in their cards, if they agree."""
    found = set()
    for file in [source.path / "README.md" for model in plan.inputs.all for source in model.checkpoint.sources]:
        stated = read_front_matter(file).get("license")
        found.add(stated if isinstance(stated, str) else None)
    return found.pop() if len(found) == 1 else None


def _library(plan: Plan) -> str:
    """The library that loads the output, as the hub calls it."""
    template = plan.inputs.template.checkpoint
    if template.config_file == PIPELINE or "_class_name" in template.config:
        return "diffusers"
    return "transformers" if template.is_simple else "sentence-transformers"


def front_matter(plan: Plan) -> dict[str, object]:
    """`base_model` lists the hub's models that the output was made of; one fine-tune is a `finetune`, several are a
    `merge`. Folders of this machine, which nobody else finds, are not listed."""
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
        "library_name": "deltamerge" if plan.recipe.output.kind == "delta" else _library(plan),
        "tags": ["deltamerge", *["merge"] * merged, *["moe"] * (plan.mixture is not None)],
    }
    if plan.recipe.output.kind == "peft" and plan.inputs.base is not None:
        matter["base_model"] = [name for name in [plan.inputs.base.checkpoint.hub_id] if name]
        matter |= {"base_model_relation": "adapter", "library_name": "peft"}
    if not matter["base_model"]:
        del matter["base_model"]
    if head := head_of(plan.config):
        matter["pipeline_tag"] = head.task
    licence = _license(plan)
    if licence is not None:
        matter["license"] = licence
    return matter


def calibration_table(found: Iterable[tuple[str, Mapping[str, Any], Iterable[float]]]) -> list[str]:
    """What every calibrated q was searched for, what it is, and why; (model, record, its q's) of each."""
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


def _delta(plan: Plan, written: Summary | None, choice: ChosenDensities | None) -> list[str]:
    """What a delta artifact holds, what its coding loses, and how it is used."""
    if written is None:
        return []
    origin = plan.inputs.origin
    assert origin is not None
    holds = "Final values of what differs from the base: applying it is exact."
    if plan.delta_values:
        lost = f"; relative error ‖v − stored‖ / ‖v‖ = {written.error:.3g}" if written.error else ", exact"
        holds = f"Values to add to the base, stored as {plan.delta_values}{lost}."
    fitted: list[str] = []
    if choice is not None:
        p = sorted(choice.densities.values()) or [1.0]
        lost = "" if choice.error is None else f"; predicted ‖lost‖ / ‖Δ‖ = {choice.error:.3g}"
        fitted = [f"Densities from {p[0]:.3g} to {p[-1]:.3g}, for a budget of {budget_of(plan):,} bytes{lost}.", ""]
    name = origin.checkpoint.hub_id or origin.name
    return [
        "## Delta artifact",
        "",
        f"{holds} {written.entries:,} entries, {written.nbytes:,} bytes.",
        "",
        *fitted,
        f"{code(f'deltamerge apply . --base {name} --out DIR')} writes the whole checkpoint; a recipe may name this "
        f"folder as a model beside {code(f'base_model: {name}')}.",
        "",
    ]


def _quantised(losses: Losses | None) -> list[str]:
    """How far quantised weights are from the merge."""
    if not losses:
        return []
    found = errors_of(losses)
    worst = max(found["tensors"], key=lambda name: found["tensors"][name])
    said = f"{len(losses)} weights are quantised: relative error {found['relative_error']:.3g} of the merge in float32"
    return ["## Quantisation", "", f"{said}, at most {found['tensors'][worst]:.3g} ({code(worst)}).", ""]


def _study(study: Mapping[str, Any]) -> list[str]:
    """How a search found the recipe."""
    if not study:
        return []
    goals = study.get("objectives") or {}
    searched = ", ".join(f"{code(str(name))} {value}" for name, value in (study.get("values") or {}).items())
    values = ", ".join(f"{plain(str(name))} {value}" for name, value in goals.items())
    said = f"The best {plain(str(study.get('why', '')))}, by {plain(str(study.get('sampler')))}: {values}."
    return ["## Search", "", f"{study.get('trials')} trials. {said}", "", f"Found: {searched}.", ""]


def _lora(written: LowRankSummary | None) -> list[str]:
    """What a LoRA keeps of each weight's delta."""
    if written is None:
        return []
    weighed = written.output is not None
    also = "" if written.output is None else f", {written.output:.4g} of the change of the layers' outputs"
    head = "| weight | rank | kept of the delta |" + (" of the outputs |" if weighed else "")
    rows = [
        f"| {plain(name)} | {one.rank} | {one.energy:.4g} |" + (f" {_share(one.output)} |" if weighed else "")
        for name, one in written.layers.items()
    ]
    said = f"{written.nbytes:,} bytes keep {written.energy:.4g} of the deltas' squares{also}."
    return ["## LoRA", "", said, "", head, "|---|---|---|" + "---|" * weighed, *rows, ""]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


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
    written: Summary | None = None,
    choice: ChosenDensities | None = None,
    pictures: Mapping[str, str] | None = None,
    losses: Losses | None = None,
    lora: LowRankSummary | None = None,
    study: Mapping[str, Any] | None = None,
) -> str:
    """The whole card; the same plan gives the same text. `written` is what a delta artifact takes, `choice` what a
    budget allowed, `pictures` files and their captions, `losses` what quantisation lost, `lora` what a LoRA keeps,
    `study` how a search found the recipe."""
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
        *mixture_lines(plan, calibrated),
        *_delta(plan, written, choice),
        *_quantised(losses),
        *_study(study or {}),
        *_lora(lora),
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
