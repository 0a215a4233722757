"""A commented first recipe for the user's models, checked against their headers before it is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from deltamerge import errors
from deltamerge.apps.recommend.prune import PruneCandidate, Recommendation, seen_from
from deltamerge.errors import OutputError
from deltamerge.files.atomic import replace_file
from deltamerge.files.descriptors import check_folder
from deltamerge.models.checkpoint import decoded
from deltamerge.models.references import open_model
from deltamerge.recipe.prune import Pruning, choose, q_decides
from deltamerge.recipe.yaml_source import dumped
from deltamerge.tensors.dtypes import TORCH_NAMES

HEAD = """\
# deltamerge check {name}    the headers of every model, no weights read
# deltamerge plan {name}     every output tensor, its sources, method and bytes
# deltamerge run {name}      the checkpoint, with card, recipe and lock
base_model: {base}
"""
ONE = """\
merge_method: task_arithmetic    # base + weight · delta
models:
  - model: {model}
    parameters: {{weight: 1.0}}
"""
SEVERAL = """\
merge_method: ties               # the largest entries of each delta, elected sign; or task_arithmetic, dare_ties, …
models:
"""
OF_SEVERAL = """\
  - model: {model}
    parameters: {{weight: 1.0, density: {density:g}}}    # the fraction of the delta that is kept
"""
ADVISED = """\
merge_method: task_arithmetic    # base + Σ weight · delta, each delta pruned first
models:
"""
WEIGHTED = """\
  - model: {model}
    parameters: {{weight: 1.0}}
"""
PRUNED = """\
prune: {plain}    # {plain_why}
# prune: {calibrated}    # {calibrated_why}
# calibration: {{data: sentences.jsonl}}    # unlabelled text; 50 sequences are enough
"""
CALIBRATION = """\
calibration: {rows}    # unlabelled text; 50 sequences are enough
"""
TAIL = """\
dtype: {dtype}    # of the output; arithmetic is float32
seed: 0    # the same recipe gives the same bytes
output: {{path: merged}}
"""
DTYPES = ("BF16", "F16", "F32")  # the most common becomes the output's; the first of equals


def first_recipe(
    base: str,
    models: Sequence[str],
    path: Path,
    *,
    density: float,
    calibration: Mapping[str, Any] | None = None,
    advice: Sequence[Recommendation] = (),
    pickles: bool = False,
) -> str:
    """Return the text of a recipe that merges `models` on `base`. InputError: a model cannot be opened.

        base          folder or hub id
        models        folders or hub ids
        path          the recipe's path; folders are written relative to it
        density       the density of the pruning
        calibration   the recipe's section, whose rows gave the advice
        advice        the recommended pruning of each model
        pickles       read torch's own files if there are no safetensors

    One model is pruned, several are merged by ties. With `advice`, the models are pruned as recommended and added up.
    So are several models at a density at which ties keeps too little of them. Only headers are read.
    """
    checkpoints = [open_model(reference, Path(), weights=False, pickles=pickles) for reference in (base, *models)]
    with errors.context(base):
        weights = decoded(checkpoints[0]).tensors.values()
    dtypes = [tensor.output_dtype for tensor in weights]
    dtype = max(DTYPES, key=dtypes.count)
    first, *named = [_scalar(seen_from(path.parent, reference)) for reference in (base, *models)]
    text = HEAD.format(name=quote(path.name), base=first)
    if advice:
        text += ADVISED + "".join(_advice_lines(model, one) for model, one in zip(named, advice, strict=True))
        if calibration and any(_choice(one).needs_calibration for one in advice):
            rows = {**calibration, "data": seen_from(path.parent, str(calibration["data"]))}
            text += CALIBRATION.format(rows=_flow(rows))
    elif len(models) == 1:
        text += ONE.format(model=named[0]) + _prune_lines(density)
    elif q_decides(Pruning("none"), density):  # of ties
        text += ADVISED + "".join(WEIGHTED.format(model=model) for model in named) + _prune_lines(density)
    else:
        text += SEVERAL + "".join(OF_SEVERAL.format(model=model, density=density) for model in named)
    return text + TAIL.format(dtype=TORCH_NAMES[dtype]) + ("pickles: true\n" if pickles else "")


def _prune_lines(density: float) -> str:
    """Return the lines of the pruning that keeps most without rows, and in comments the pruning with rows."""
    plain, calibrated = choose(density, rows=False), choose(density, rows=True)
    return PRUNED.format(
        plain=_flow(plain.prune),
        plain_why=plain.why,
        calibrated=_flow(calibrated.prune),
        calibrated_why=calibrated.why,
    )


def _choice(advice: Recommendation) -> PruneCandidate:
    return next(one for one in advice.candidates if one.name == advice.method)


def _advice_lines(model: str, advice: Recommendation) -> str:
    """Return a model of the recipe with its pruning, and above it the measurements of every candidate."""
    lines = [f"{advice.method}, by `deltamerge recommend`:", *advice.why, ""]
    rows = [f"{'':24}{'loses':>8}{'layer':>9}{'q':>9}"]
    for one in advice.candidates:
        lost = "" if one.lost is None else f"{one.lost:.1%}"
        layer, q = ("" if value is None else f"{value:.3g}" for value in (one.layer_error, one.q))
        rows.append(f"{one.name:24}{lost:>8}{layer:>9}{q:>9}")
    lines += [
        *rows,
        "",
        "loses: of the fine-tune's effect on held-out outputs; layer: relative error of a layer's output",
    ]
    comment = "".join(f"    # {line}".rstrip() + "\n" for line in lines)
    prune = _flow(_choice(advice).prune)
    return f"  - model: {model}\n    parameters: {{weight: 1.0}}\n{comment}    prune: {prune}\n"


def _flow(value: Mapping[str, Any]) -> str:
    """Return a mapping on one line of YAML."""
    return dumped(dict(value), flow=True, width=10**6, unicode=True).strip()


def _scalar(text: str) -> str:
    """Return `text` as a YAML scalar, quoted where necessary."""
    return dumped(text, width=10**6, unicode=text.isprintable()).removesuffix("\n...\n").strip()


def check_new(path: Path) -> None:
    """Refuse a path where a file exists."""
    if os.path.lexists(path):
        raise OutputError(f"{path}: is there already", hint="another name with --out, or - for stdout")
    check_folder(path.parent)


def write_new(path: Path, text: str) -> None:
    """Write `text` to a new file. OutputError: it exists, or cannot be created."""
    replace_file(path, text, new=True)
