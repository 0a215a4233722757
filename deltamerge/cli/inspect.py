"""The command inspect: tables of a delta in total, by layer and by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli import streams
from deltamerge.cli.layout import Column, Row, cell, paragraph, table
from deltamerge.cli.options import AS_CSV, AS_JSON, BASE, DEVICE, MODEL, PICKLES, WORKERS, HomePath, rows_of_text
from deltamerge.cli.output import say, say_model, say_table, tell
from deltamerge.errors import app
from deltamerge.errors.shown import lines as one_a_line
from deltamerge.errors.shown import some

if TYPE_CHECKING:
    from deltamerge.apps.inspect.statistics import Activations, Influence, Report, Statistics


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


@click.command(
    "inspect", epilog="Example: deltamerge inspect ./models/math --base ./models/base --calibration calib.jsonl"
)
@click.argument("model", type=MODEL)
@BASE
@rows_of_text
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Density of the bound and the errors, with --calibration.",
)
@click.option("--tensors", is_flag=True, help="List every tensor, not only layers.")
@click.option("--report", "page", type=HomePath(path_type=Path), metavar="FILE", help="Draw figures on an HTML page.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@DEVICE
@WORKERS
@PICKLES
@AS_JSON
@AS_CSV
def command(
    model: str,
    base: str,
    calibration: dict[str, Any] | None,
    density: float,
    tensors: bool,
    page: Path | None,
    force: bool,
    as_json: bool,
    as_csv: bool,
    **options: Any,
) -> None:
    """Measure the delta of MODEL: how large it is, and where.

    Reports norms and shares per tensor, per layer and in total, and what pruning would keep. With --calibration, also
    what the delta does to activations: influence, coherence, massive activations, and DARE's bound and error. If MODEL
    is an output of `run`, --report also draws the figures in its lock.
    """
    with app("inspect"):
        from deltamerge.apps.inspect.study import inspect as inspect_delta

    if force and page is None:
        raise click.UsageError("--force is for the FILE of --report")
    report = inspect_delta(model, base, calibration=calibration, density=density, out=page, force=force, **options)
    if as_csv:
        say_table(report.tensors)
    else:
        say_model(report) if as_json else say(render_inspect(report, tensors=tensors, width=streams.columns()))
    if page is not None:
        tell(f"{page}: written")


def render_inspect(found: Report, *, tensors: bool = False, width: int) -> str:
    """Return tables of the delta in total, by kind, by layer, by tensor with `tensors`, and on calibration rows."""
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
    """Shortens names: `…` stands for the prefix that all numbered blocks have in common."""

    def __init__(self, names: Iterable[str]) -> None:
        from deltamerge.apps.report.page import stacks
        from deltamerge.tensors.names import block_name

        found = list(stacks(block for name in names if (block := block_name(name)) is not None))
        self.prefix = f"{found[0]}." if len(found) == 1 else ""

    def __call__(self, name: str) -> str:
        return f"…{name.removeprefix(self.prefix)}" if self.prefix and name.startswith(self.prefix) else name


def _delta(one: Statistics) -> Sequence[str]:
    ends = (
        f"{one.energy_share:.1%}",
        f"{one.unchanged:.1%}",
        cell(one.kurtosis),
        f"{one.kept_energy['0.01']:.1%}",
    )
    return (
        f"{one.count:,}",
        cell(one.mean_abs),
        cell(one.max_abs),
        cell(one.relative_norm),
        *ends,
    )


def _activations(found: Activations, shorter: _Shorter, width: int) -> list[str]:
    def cells(one: Influence) -> list[str]:
        numbers = (
            one.mean_abs_delta, one.mean_abs_influence, one.coherence, one.change, one.bound, one.typical,
            one.dare_error, one.dare_measured, one.least_squares_q, one.least_squares_error, one.least_squares_measured,
        )  # fmt: skip
        return list(map(cell, numbers))

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
