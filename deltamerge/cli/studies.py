"""What `inspect` and `recommend` found, as text for people that fits a number of columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltamerge.apps.inspect.layers import stacks
from deltamerge.cli.layout import Column, Row, paragraph, table
from deltamerge.cli.tables import figure
from deltamerge.errors.shown import lines as one_a_line
from deltamerge.errors.shown import some
from deltamerge.tensors.names import block_name

if TYPE_CHECKING:
    from deltamerge.apps.inspect.activations import Activations, Influence
    from deltamerge.apps.inspect.statistics import Report, Statistics
    from deltamerge.apps.recommend.conflict import Conflict
    from deltamerge.apps.recommend.merge import MergeAdvice, MergeCandidate
    from deltamerge.apps.recommend.prune import PruneCandidate, Recommendation

DELTA = (
    Column("entries", 2), Column("mean\n|Δ|"), Column("max\n|Δ|", 5), Column("‖Δ‖/\n‖W‖"), Column("energy"),
    Column("un-\nchanged", 3), Column("kur-\ntosis", 4), Column("kept\nat 0.01", 1),
)  # fmt: skip
ABOUT_DELTA = (
    "Δ: fine-tune − base; W: base; energy: share of ‖Δ‖²; kept at 0.01: energy of the largest 1% of entries, of each "
    "tensor its own"
)
LAYERS = (
    Column("mean\n|Δ|", 6), Column("mean\n|c|", 5), Column("D/A"), Column("rms\nΔx", 7), Column("bound", 8),
    Column("typical", 9), Column("DARE\nerror"), Column("meas-\nured", 3), Column("q*", 1), Column("error\nat q*", 1),
    Column("meas-\nured", 4), Column("massive", 2),
)  # fmt: skip
ABOUT_LAYERS = (
    "D/A, coherence: near 0 DARE is right, near 1 q should be 1; DARE error: expected E‖Δx − Δ'x‖²/E‖Δx‖², 1 as if the "
    "delta were dropped; q*: of least expected error; measured: of a drawn mask; massive: input features of largest "
    "mean |x|; c: Δ_ij x_j"
)
CANDIDATES = ("delta error", "layer error", "lost", "metric", "q")
ABOUT_CANDIDATES = "→: recommended. Smaller is better: delta error, expected ‖Δ − Δ'‖²/‖Δ‖²"
ABOUT_NOTHING = (
    ". Without rows it does not decide: what is kept and not rescaled has a small error, and still loses the skill"
)
ABOUT_ROWS = (
    "; layer error, mean ‖Δx − Δ'x‖²/‖Δx‖² of the linear layers; lost, of the fine-tune's effect on held-out outputs"
)

ABOUT_MERGES = (
    "→: recommended. lost: of the fine-tunes' effect on held-out outputs, mean and worst; alike: rows that the merge "
    "answers as the model does; λ: factor of the merged delta"
)


def render_inspect(found: Report, *, tensors: bool = False, width: int) -> str:
    """The delta in all, by kind, by layer, and with `tensors` by tensor; and its layers on calibration rows."""
    shorter = _Shorter([tensor.name for tensor in found.tensors])
    blocks: list[list[Row]] = [
        [("in all", _delta(found.total))],
        [(name, _delta(one)) for name, one in found.kinds.items()],
        [(name, _delta(one)) for name, one in found.layers.items()],
    ]
    if tensors:
        blocks.append([(shorter(tensor.name), _delta(tensor)) for tensor in found.tensors])
    lines = [f"delta of {found.model} on {found.base}", "", *table(DELTA, blocks, width)]
    lines += ["", *paragraph(ABOUT_DELTA, width)]
    if found.activations is not None:
        lines += ["", *_activations(found.activations, shorter, width)]
    if (tensors or found.activations is not None) and shorter.prefix:
        lines += ["", *paragraph(f"…: {shorter.prefix}", width)]
    if found.without_delta:
        lines += ["", *paragraph(f"without a delta: {some(found.without_delta, 12)}", width)]
    for warning in found.warnings:
        lines += ["", *paragraph(f"warning: {warning}", width)]
    return one_a_line(lines)


class _Shorter:
    """Names without the prefix that all numbered blocks have in common, which stands for `…`."""

    def __init__(self, names: Iterable[str]) -> None:
        found = list(stacks(block for name in names if (block := block_name(name)) is not None))
        self.prefix = f"{found[0]}." if len(found) == 1 else ""

    def __call__(self, name: str) -> str:
        return f"…{name.removeprefix(self.prefix)}" if self.prefix and name.startswith(self.prefix) else name


def _delta(one: Statistics) -> Sequence[str]:
    ends = f"{one.energy_share:.1%}", f"{one.unchanged:.1%}", _figure(one.kurtosis), f"{one.kept_energy['0.01']:.1%}"
    return f"{one.count:,}", _figure(one.mean_abs), _figure(one.max_abs), _figure(one.relative_norm), *ends


def _activations(found: Activations, shorter: _Shorter, width: int) -> list[str]:
    def cells(one: Influence) -> list[str]:
        numbers = (
            one.mean_abs_delta, one.mean_abs_influence, one.coherence, one.change, one.bound, one.typical,
            one.dare_error, one.dare_measured, one.least_squares_q, one.least_squares_error, one.least_squares_measured,
        )  # fmt: skip
        return list(map(_figure, numbers))

    total: list[Row] = [("linear layers", [*cells(found.total), ""])]
    layers: list[Row] = [
        (shorter(one.name).removesuffix(".weight"), [*cells(one), " ".join(str(m.feature) for m in one.massive)])
        for one in found.layers
    ]
    return [
        f"over {found.sequences} sequences, at density {found.density:g}",
        "",
        *table(LAYERS, [total, layers], width),
        "",
        *paragraph(ABOUT_LAYERS, width),
    ]


def render_recommend(answer: Recommendation, *, width: int) -> str:
    """The evidence, the candidates, the recommendation and its recipe."""
    seen = answer.evidence
    columns = [Column(seen.metric or head if head == "metric" else head) for head in CANDIDATES]
    judged = [one for one in answer.candidates if any(cell for cell in _candidate(one))]
    rows: list[Row] = [(("→ " if one.name == answer.method else "  ") + one.name, _candidate(one)) for one in judged]
    figures = [
        f"mean |Δ| {seen.mean_abs_delta:.3g}",
        *([f"mean |c| {seen.mean_abs_influence:.3g}"] if seen.mean_abs_influence is not None else []),
        *([f"‖Δ‖/‖W‖ {seen.relative_norm:.3g}, noise of DARE {seen.noise:.3g}"] if seen.noise is not None else []),
        *([f"coherence {seen.coherence:.3g}"] if seen.coherence is not None else []),
        f"{seen.kept_energy:.1%} of the energy in the largest {answer.density:g}",
    ]
    lines = [f"{answer.model} on {answer.base}, density {answer.density:g}", *paragraph("; ".join(figures), width), ""]
    on_rows = any(one.layer_error is not None for one in judged)
    about = f"{ABOUT_CANDIDATES}{ABOUT_ROWS if on_rows else ABOUT_NOTHING}."
    lines += [*table(columns, [rows], width), "", *paragraph(about, width)]
    if others := [one.name for one in answer.candidates if one not in judged]:
        lines += paragraph(f"Judged with --calibration alone: {', '.join(others)}", width)
    lines.append("")
    if seen.metric is not None and seen.metric_fine_tune is not None and seen.metric_base is not None:
        lines += [f"{seen.metric}: fine-tune {seen.metric_fine_tune:.3g}, base {seen.metric_base:.3g}", ""]
    said = [("the paper", answer.paper.why), ("recommended", f"{answer.method}: {answer.why[0]}")]
    said += [("", line) for line in answer.why[1:]] + [("warning", warning) for warning in answer.warnings]
    for title, words in said:
        lines += paragraph(words, width, first=f"{title:<15}", then=" " * 15)
    return one_a_line([*lines, "", *answer.recipe.rstrip().split("\n")])


def _candidate(one: PruneCandidate) -> list[str]:
    numbers: list[Any] = [one.delta_error, one.layer_error, one.lost, one.metric, one.q]
    return ["" if v is None else f"{v:.1%}" if i == 2 else f"{v:.3g}" for i, v in enumerate(numbers)]


def render_merge_advice(answer: MergeAdvice, *, width: int) -> str:
    """How the deltas meet, the candidates, the recommendation and its recipe."""
    lines = [f"{len(answer.models)} models on {answer.base}", *_meeting(answer.models, answer.evidence, width), ""]
    if answer.candidates:
        judged = [one for one in answer.candidates if one.error is None]
        columns = [Column("λ"), Column("lost"), Column("worst")]
        columns += [Column(f"alike\n{name}", 1) for name in answer.models if any(name in o.agreement for o in judged)]
        rows: list[Row] = [(("→ " if one.name == answer.method else "  ") + one.name, _merge(one)) for one in judged]
        lines += [*table(columns, [rows], width), "", *paragraph(ABOUT_MERGES, width)]
        lines += [f"{one.name}: not judged: {one.error}" for one in answer.candidates if one.error is not None]
        lines += [
            "",
            *paragraph(f"rows: {_rows(answer.search)} to choose λ, {_rows(answer.held_out)} to decide", width),
        ]
    said = [("recommended", f"{answer.method}: {answer.why[0]}"), *(("", line) for line in answer.why[1:])]
    for title, words in [*said, *(("warning", warning) for warning in answer.warnings)]:
        lines += paragraph(words, width, first=f"{title:<15}", then=" " * 15)
    return one_a_line([*lines, "", *answer.recipe.rstrip().split("\n")])


def _meeting(models: Sequence[str], found: Conflict, width: int) -> list[str]:
    """How deltas meet: means over pairs, and the pair that opposes most."""
    overlap = "" if found.overlap_mean is None else f"; overlap {found.overlap_mean:.3f} (by chance {found.chance:.3f})"
    pairs = [(i, j) for i in range(len(models)) for j in range(i)]
    i, j = max(pairs, key=lambda pair: found.opposed[pair[0]][pair[1]])
    most = f" (most: {models[j]} and {models[i]}, {found.opposed[i][j]:.1%})" if len(pairs) > 1 else ""
    norms = ", ".join(_figure(norm) for norm in found.relative_norm)
    return [
        *paragraph(f"cosine {found.cosine_mean:.3f}; opposite signs {found.opposed_mean:.1%}{most}{overlap}", width),
        *paragraph(f"‖Δ‖/‖W‖ {norms}", width),
    ]


def _merge(one: MergeCandidate) -> list[str]:
    factor = "" if one.factor is None or one.coefficients is not None else f"{one.factor:.3g}"
    lost = ["" if value is None else f"{value:.1%}" for value in (one.lost_mean, one.lost_worst)]
    return [factor, *lost, *(f"{share:.1%}" for share in one.agreement.values())]


def _rows(counts: Mapping[str, int]) -> str:
    some_counts = sorted(set(counts.values()))
    return f"{some_counts[0]}" if len(some_counts) == 1 else f"{some_counts[0]} to {some_counts[-1]}"


def _figure(number: float | None) -> str:
    return "–" if number is None else figure(number)
