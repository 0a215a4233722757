"""Recommends a pruning for a fine-tune at a density: the paper's decision procedure, beside measurements.

Without data the delta's own statistics decide. With calibration rows every candidate's mask is drawn, and its outputs
are compared with the fine-tune's on held-out rows, by the measure that calibration uses; `lost` is their distance
divided by the base's.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from deltamerge.apps.inspect.statistics import DeltaMoments, Figures, Pair, activations, pair_recipe, pairs_of, together
from deltamerge.apps.inspect.study import measure, open_pair, stages_of
from deltamerge.calibrate.rows.heads import has_head, metric_of
from deltamerge.errors import OutputError
from deltamerge.errors.shown import as_html, shown
from deltamerge.files.atomic import replace_file
from deltamerge.files.descriptors import check_folder
from deltamerge.formats.delta.positions import expected_bits
from deltamerge.formats.delta.values import VALUE_BITS
from deltamerge.plan.kinship import swapped, unrelated
from deltamerge.plan.output_config import remarks_on_configs
from deltamerge.plan.tokenizer_differences import other_words
from deltamerge.recipe.prune import Pruning, choose, q_decides
from deltamerge.recipe.schema import Calibration
from deltamerge.recipe.yaml_source import dumped
from deltamerge.run.options import choose_device

if TYPE_CHECKING:
    from deltamerge.apps.inspect.evidence import MaskEvidence, MaskLoss

# ‖Δ‖/‖W‖ · sqrt(p/d): the noise of DARE beside the weights. Real fine-tunes are within 3 points of the unpruned up to
# 0.5 (three measured at density 0.05 and above, one at 0.01) and lose 15 and more at 0.8 to 1.
LARGE_NOISE = 0.5
# The largest `lost` at which the simplest method is good enough. On the intensity task at density 0.01 importance
# sampling loses 13 % and keeps 81 % of the score, calibrated magnitude 10 % and 96 %.
GOOD = 0.1
COMMENT = 80  # columns of a comment in the recipe
MASKS: dict[str, dict[str, Any]] = {
    "dare": {"method": "dare"},
    "importance_sampling": {"method": "dare", "sampling": "magnitude"},
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
}
CALIBRATED = {
    "dare": "darex_q",
    "importance_sampling": "importance_sampling_q",
    "magnitude": "magnitude_q",
    "wanda": "wanda_q",
}


class PruneCandidate(Figures):
    """A method with its predicted errors; null where there is no data to tell."""

    name: str
    prune: dict[str, Any] = Field(description="The `prune` of its recipe.")
    needs_calibration: bool
    delta_error: float | None = Field(
        description="Expected ‖Δ − Δ'‖²/‖Δ‖², from the delta alone: the error of Δx if inputs were uncorrelated."
    )
    layer_error: float | None = Field(description="Mean over linear layers of ‖Δx − Δ'x‖²/‖Δx‖² on the rows.")
    lost: float | None = Field(
        description="Divergence of held-out outputs over that of the base: 0 none, 1 all is lost."
    )
    metric: float | None = Field(description="The metric on the held-out rows, with --label.")
    q: float | None = Field(description="The divisor of the linear weights' entries in the measurement.")


class Paper(Figures):
    """The answer of the decision procedure of arXiv 2410.09344 (Fig. 4, App. C.3)."""

    method: str
    prune: dict[str, Any]
    why: str


class Evidence(Figures):
    """The statistics that were looked at, of the tensors that are pruned."""

    mean_abs_delta: float
    relative_norm: float | None = Field(description="‖Δ‖/‖W‖ of the linear weights.")
    noise: float | None = Field(description="relative_norm · sqrt((1 − d)/d): DARE's noise beside the weights.")
    large: bool = Field(description=f"Whether noise exceeds {LARGE_NOISE}.")
    kept_energy: float = Field(description="Share of ‖Δ‖² in the largest entries at this density.")
    mean_abs_influence: float | None = Field(description="Mean of |Δ_ij x_j|, with data (the paper's Table 8).")
    coherence: float | None = Field(description="Mean over layers of D/A, with data.")
    dare_error: float | None = Field(description="Mean over layers of (p/d) D/A, DARE's expected error, with data.")
    least_squares_error: float | None = Field(description="Mean over layers of the error at the best q, with data.")
    metric: str | None = Field(description="Its name, with --label.")
    metric_fine_tune: float | None
    metric_base: float | None = Field(description="Of the base with the fine-tune's head.")
    held_out: int | None = Field(description="Rows that were compared on.")
    forward_passes: int | None = Field(description="That all of this took, over the search rows.")


class Conclusion(Figures):
    """Advice on `_what`, shown as its method in one line, in notebooks with the reasons."""

    if TYPE_CHECKING:  # each kind of advice has them, in its own order
        method: str
        why: list[str]
        warnings: list[str]

        @property
        def _what(self) -> str: ...

    def __repr__(self) -> str:
        return shown(f"<{type(self).__name__} {self._what}: {self.method}>")

    __str__ = __repr__

    def _repr_html_(self) -> str:
        why = "; ".join([*self.why, *(f"warning: {one}" for one in self.warnings)])
        return as_html(self._what, {"method": self.method, "why": why})


class Recommendation(Conclusion):
    """The output of `deltamerge recommend --json`."""

    model: str
    base: str
    density: float
    method: str = Field(description="The name of the recommended candidate.")
    why: list[str]
    paper: Paper
    evidence: Evidence
    candidates: list[PruneCandidate]
    recipe: str = Field(description="YAML, ready for `deltamerge run` in the current folder, or in that of --out.")
    warnings: list[str] = Field([], description="Signs that the base is not MODEL's, or that the two are swapped.")

    @property
    def _what(self) -> str:
        return f"{self.model} on {self.base}, density {self.density:g}"


@dataclass(frozen=True, slots=True)
class Question:
    """A pair of models and a density; `decoder`: a language model; `labelled`: the rows have labels."""

    model: str
    base: str
    density: float
    decoder: bool
    labelled: bool


def prunes(density: float) -> list[dict[str, Any]]:
    """Return the prunings whose masks are measured, in the order of MASKS."""
    return [{**mask, "density": density, "q": "output_change"} for mask in MASKS.values()]


def recommend_prune(
    model: str,
    base: str,
    density: float,
    *,
    calibration: dict[str, Any] | None = None,
    out: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    pickles: bool = False,
) -> Recommendation:
    """Return the recommended pruning at `density`, with its recipe. It is written to `out`, a new file, if given.

    The other arguments are those of `inspect`. A `label` in `calibration` asks for the metric of the held-out rows.
    OutputError: `out` exists, or cannot be written.
    """
    if out is not None:
        check_new_recipe(out)
    inputs = open_pair(model, base, pickles=pickles)
    differing = list(remarks_on_configs(inputs, refuse=True))
    pairs, _ = pairs_of(inputs)
    config = inputs.tunes[0].checkpoint.config
    device = choose_device(device)
    labelled = calibration is not None and "label" in calibration
    if calibration is not None and labelled:
        calibration = calibration | {"metric": metric_of(Calibration.model_validate(calibration), config)}
    found = measure(pairs, device, workers)
    measured = None
    if calibration is not None:
        stages = stages_of(pairs, model, base, calibration, prunes(density), device, pickles)
        from deltamerge.apps.inspect.evidence import measure_influence as measure_on_data

        measured = measure_on_data(stages)
    decoder = has_head(config, "causal-lm")
    question = Question(inputs.tunes[0].name, base, density, decoder, labelled)
    answer = advise(question, pairs, found, measured)
    warnings = [*swapped(inputs), *unrelated(inputs), *other_words(inputs), *differing]
    answer = answer.model_copy(update={"warnings": warnings})
    folder = Path.cwd() if out is None else out.resolve().parent
    chosen = next(one for one in answer.candidates if one.name == answer.method)
    more: dict[str, Any] = {}
    if chosen.needs_calibration and calibration is not None:
        more["calibration"] = calibration | {"data": seen_from(folder, calibration["data"])}
    if any(pair.cut for pair in pairs):
        more["tokenizer_source"] = seen_from(folder, model)
    if pickles:
        more["pickles"] = True
    recipe = pair_recipe(seen_from(folder, model), seen_from(folder, base), chosen.prune, **more)
    answer = with_recipe(answer, recipe)
    if out is not None:
        replace_file(out, answer.recipe, new=True)
    return answer


def advise(
    question: Question, pairs: Sequence[Pair], found: Mapping[str, DeltaMoments], measured: MaskEvidence | None
) -> Recommendation:
    """Return the candidates, their predicted errors, and the recommendation. `written` adds the recipe."""
    pruned = {pair.name: pair for pair in pairs if pair.kind != "head"}
    evidence = _evidence(question.density, [(pruned[n], m) for n, m in found.items() if n in pruned], measured)
    candidates = _candidates(question.density, [m for n, m in found.items() if n in pruned], measured)
    method, why = decide(evidence, candidates, question.density)
    bits = expected_bits(question.density, VALUE_BITS["bfloat16"])
    nbytes = math.ceil(sum(found[name].count for name in pruned if name in found) * bits / 8)
    why.append(
        f"if bytes matter rather than a density: extract --budget {nbytes} takes no more than this in bfloat16, and "
        "was nearer to the fine-tune than DARE, DAREx-q and magnitude of the same bytes wherever both were measured "
        "(docs/measurements/bytes.md)"
    )
    return Recommendation(
        model=question.model,
        base=question.base,
        density=question.density,
        method=method,
        why=why,
        paper=paper(question, evidence),
        evidence=evidence,
        candidates=candidates,
        recipe="",
        warnings=[],
    )


def _evidence(density: float, parts: Sequence[tuple[Pair, DeltaMoments]], measured: MaskEvidence | None) -> Evidence:
    linear = [m for pair, m in parts if pair.kind == "linear"] or [m for _, m in parts]
    whole, relative = together(m for _, m in parts), together(linear).relative_norm
    noise = None if relative is None else relative * math.sqrt((1 - density) / density)
    seen: dict[str, Any] = dict.fromkeys(
        ("mean_abs_influence", "coherence", "dare_error", "least_squares_error", "metric", "metric_fine_tune",
         "metric_base", "held_out", "forward_passes")
    )  # fmt: skip
    if measured is not None:
        total = activations(measured.influence, density, 0).total
        seen |= {
            "mean_abs_influence": total.mean_abs_influence,
            "coherence": total.coherence,
            "dare_error": total.dare_error,
            "least_squares_error": total.least_squares_error,
            "metric": measured.metric_name,
            "metric_fine_tune": measured.metric.get("fine_tune"),
            "metric_base": measured.metric.get("base"),
            "held_out": measured.held_out,
            "forward_passes": measured.forward_passes,
        }
    energy = math.fsum(m.square for _, m in parts)
    kept = math.fsum(m.square * m.kept_energy(density) for _, m in parts) / energy if energy else 1.0
    return Evidence(
        mean_abs_delta=whole.mean_abs,
        relative_norm=relative,
        noise=noise,
        large=noise is not None and noise > LARGE_NOISE,
        kept_energy=kept,
        **seen,
    )


def _candidates(density: float, parts: Sequence[DeltaMoments], measured: MaskEvidence | None) -> list[PruneCandidate]:
    """Return every mask, both plain and with a calibrated q.

    From the delta alone the error of DARE is p/d, of importance sampling v = Σ Δ²(1/π − 1)/Σ Δ², of magnitude the
    energy that it drops. At the best q an unbiased mask's v becomes v/(1 + v).
    """
    energy = math.fsum(m.square for m in parts)

    def mean(error: Any) -> float:
        return math.fsum(m.square * error(m) for m in parts) / energy if energy else 0.0

    sampled, kept = mean(lambda m: m.sampling_error(density)), mean(lambda m: m.kept_energy(density))
    alone = {
        "dare": ((1 - density) / density, 1 - density),
        "importance_sampling": (sampled, sampled / (1 + sampled)),
        "magnitude": (1 - kept, 1 - kept),
        "wanda": (None, None),
    }
    losses = measured.masks if measured is not None else [None] * len(MASKS)
    made = []
    for (mask, keys), loss in zip(MASKS.items(), losses, strict=True):
        if measured is not None and loss is None:
            continue  # WANDA has no norms for weights stored (in, out)
        prune = {**keys, "density": density}
        for calibrated in (False, True):
            made.append(
                PruneCandidate(
                    name=CALIBRATED[mask] if calibrated else mask,
                    prune=prune | ({"q": "output_change"} if calibrated else {}),
                    needs_calibration=calibrated or mask == "wanda",
                    delta_error=alone[mask][calibrated],
                    **_losses(loss, measured, calibrated),
                )
            )
    return made


def _losses(loss: MaskLoss | None, measured: MaskEvidence | None, calibrated: bool) -> dict[str, float | None]:
    if loss is None or measured is None:
        return dict.fromkeys(("layer_error", "lost", "metric", "q"))
    way = "calibrated" if calibrated else "plain"
    return {
        "layer_error": loss.layer_error[way],
        "lost": loss.lost[way] / measured.lost if measured.lost > 0 else 0.0,
        "metric": loss.metric.get(way),
        "q": loss.q if calibrated else loss.plain,
    }


def decide(evidence: Evidence, candidates: Sequence[PruneCandidate], density: float) -> tuple[str, list[str]]:
    """Return the simplest method whose predicted loss is small, else the method with the smallest."""
    lost = {one.name: one.lost for one in candidates if one.lost is not None}
    if not lost:
        return _without_rows(evidence, density)
    best = min(lost, key=lambda name: lost[name])
    for plain in ("dare", "importance_sampling"):
        if lost[plain] <= GOOD:
            return plain, [
                f"without calibration it loses {lost[plain]:.1%} of the fine-tune's effect on held-out outputs, "
                f"which is little (up to {GOOD:.0%}); least is {lost[best]:.1%}, {best}"
            ]
    why = [f"it loses {lost[best]:.1%} of the fine-tune's effect on held-out outputs, "
           f"plain DARE {lost['dare']:.1%}, DAREx-q {lost['darex_q']:.1%}"]  # fmt: skip
    return best, _add_warnings(why, lost[best])


def _without_rows(evidence: Evidence, density: float) -> tuple[str, list[str]]:
    """Return the choice of `recipe.prune`, and a remark on the size of the delta."""
    choice = choose(density, rows=False)
    method = next(name for name, keys in MASKS.items() if {**keys, "density": density} == choice.prune)
    noise = "none" if evidence.noise is None else f"{evidence.noise:.2g}"
    size = "large" if evidence.large else "small"
    where = f"‖Δ‖/‖W‖ · sqrt((1 − d)/d) is {noise}, {'above' if evidence.large else 'not above'} {LARGE_NOISE}"
    why = [choice.why, f"{where}: the delta is {size} for this density"]
    if q_decides(Pruning("dare", sampling="magnitude"), density):
        why.append(
            "give rows with --calibration: magnitude with a calibrated q keeps more (about 96 % of the score at "
            "density 0.01, where DARE keeps 50 to 80 %)"
        )
    return method, why


def _add_warnings(why: list[str], lost: float) -> list[str]:
    if lost > 0.6:
        why.append("that is most of the effect: consider a larger density")
    if lost > 0.3:
        why.append(
            "scales learned per row keep more at such densities, on 320 rows: "
            "q: {objective: output_change, scope: row, search: gradient}"
        )
    return why


def paper(question: Question, evidence: Evidence) -> Paper:
    """Return the answer of the decision procedure of arXiv 2410.09344 (Fig. 4, App. C.3)."""
    tuning = "; if you can fine-tune again, AdamR-L2 and then DAREx-q"
    if evidence.large:
        prune: dict[str, Any] = {"method": "wanda", "density": question.density}
        return Paper(method="wanda", prune=prune, why=f"no fine-tuning, large deltas: WANDA{tuning}")
    objective = "validation" if question.labelled else "output_change"
    scope = "global" if question.decoder else "layer"
    prune = {"method": "dare", "density": question.density, "q": {"objective": objective, "scope": scope}}
    data = "labels" if question.labelled else "no labels"
    why = f"no fine-tuning, small deltas, {data}: DAREx-q, {objective}, {scope} for this architecture{tuning}"
    return Paper(method="darex_q", prune=prune, why=why)


def with_recipe(answer: Recommendation, recipe: Mapping[str, Any]) -> Recommendation:
    """Return the recommendation with its recipe as YAML, named for its purpose."""
    head = [f"{answer.method} at density {answer.density:g}, by `deltamerge recommend`:", *answer.why]
    return answer.model_copy(update={"recipe": with_comment(head, recipe)})


def check_new_recipe(path: Path) -> None:
    """Raise OutputError unless a new file can be made at `path`."""
    if os.path.lexists(path):
        raise OutputError(f"{path}: exists", hint="choose another name with --out")
    check_folder(path.parent)


def with_comment(head: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML below a comment, a paragraph for each line of `head`."""
    wrapper = textwrap.TextWrapper(
        COMMENT, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )
    text = "".join(f"{line}\n" for words in head for line in wrapper.wrap(words))
    plain, escaped = (dumped(dict(recipe), width=1000, unicode=every) for every in (True, False))
    return text + (plain if plain.replace("\n", "").isprintable() else escaped)


def seen_from(folder: Path, reference: str) -> str:
    """Return a local reference, or each part of base+delta, as a recipe in `folder` writes it.

    Absolute paths and hub ids are unchanged.
    """
    expanded = Path(reference).expanduser()
    if expanded.exists():
        if expanded.is_absolute():
            return reference
        relative = os.path.relpath(expanded, folder)
        return relative if relative.startswith("..") else f"./{relative}"
    pieces = reference.split("+")
    for i in range(1, len(pieces)):
        parts = "+".join(pieces[:i]), "+".join(pieces[i:])
        if any(os.path.exists(os.path.expanduser(part)) for part in parts):
            return "+".join(seen_from(folder, part) for part in parts)
    return reference
