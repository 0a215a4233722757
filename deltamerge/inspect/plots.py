"""Pictures with matplotlib (extra `plot`) for model cards: the search of a calibration, and the figures of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge.errors import InputError, OutputError
from deltamerge.inspect.layers import CHANGED, FIGURES, Grid, grids, matrices, placed
from deltamerge.io.atomic import replace_file
from deltamerge.run.calibration_record import ChosenQ, Points, choices
from deltamerge.run.lock import PICTURES

if TYPE_CHECKING:
    from deltamerge.inspect.activations import Activations
    from deltamerge.inspect.statistics import Report

DELTA, SEARCH, ACTIVATIONS = PICTURES
CAPTIONS = {
    DELTA: "The delta by layer and module, and the share of entries that differ from the base",
    SEARCH: "The objective over what was searched, and what was chosen",
    ACTIVATIONS: "Coherence by layer and module, and the measured error over the predicted",
}
FIRST, SECOND = "#2268c0", "#d9541e"


def figure_of(option: str) -> Any:
    """matplotlib's Figure, which draws without a screen. InputError: matplotlib is missing and `option` needs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"{option} needs matplotlib", hint="pip install 'deltamerge[plot]'") from None
    return Figure


def draw(calibration: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw every search of a lock's `calibration`, a panel each, into a file; its suffix determines the format.

    InputError: matplotlib is missing, or nothing was searched. OutputError: the file cannot be written.
    """
    figure_class = figure_of("--plot")
    panels = [(one, *panel) for one in choices(calibration, {}, "the lock") for panel in one.panels]
    if not panels:
        raise InputError("nothing was searched that could be drawn", hint="layer_mse is solved in closed form")
    figure = figure_class(figsize=(6.4 * len(panels), 4.6), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (one, variable, series) in zip(grid, panels, strict=True):
        _search(axes, one, variable, series)
    file = BytesIO()
    try:
        figure.savefig(file, dpi=150, format=path.suffix.removeprefix(".") or None)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be drawn: {error}", hint="name a .png, .svg or .pdf file") from None
    replace_file(path, file.getvalue())


def pictures(found: Report) -> dict[str, bytes]:
    """The pictures of a report, as PNG by file name; each stack of layers is a row."""
    made = {}
    cells = matrices(found)
    named = {**FIGURES, "entries changed": CHANGED}
    heats = [[(name, grid) for grid in grids({k: one.of(g) for k, g in cells.items()})] for name, one in named.items()]
    if cells:
        made[DELTA] = _rows([[(_heat, *cell) for cell in row] for row in zip(*heats, strict=True)])
    if found.run is not None and found.run.choices:
        names = {tensor.name for tensor in found.tensors if tensor.kind != "vector"}
        made[SEARCH] = _rows([row for one in found.run.choices if (row := _choice(one, names))])
    if found.activations is not None:
        made[ACTIVATIONS] = _rows(_activations(found.activations))
    return {name: data for name, data in made.items() if data}


def _rows(rows: Sequence[Sequence[tuple[Any, ...]]]) -> bytes:
    """Panels in rows, as PNG without a date or a version. A panel is a function of axes, and its arguments."""
    if not rows:
        return b""
    across = max(map(len, rows))
    figure = figure_of("--pictures")(figsize=(4.8 * across, 3.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), across, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for one in line[len(row) :]:
            one.set_axis_off()
        for one, (panel, *arguments) in zip(line, row, strict=False):
            panel(one, *arguments)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    return file.getvalue()


def _choice(one: ChosenQ, names: set[str]) -> list[tuple[Any, ...]]:
    """The searches for q, and the q's by layer and module where they differ."""
    panels: list[tuple[Any, ...]] = [(_search, one, variable, series) for variable, series in one.panels]
    q = {name: value for name, value in one.q.items() if name in names}
    if len(set(q.values())) > 1:
        panels += [(_heat, f"q of {one.model}", grid) for grid in grids(placed(q))]
    return panels


def _activations(found: Activations) -> list[list[tuple[Any, ...]]]:
    panels: list[tuple[Any, ...]] = [
        (_heat, "coherence D/A", grid) for grid in grids(placed({one.name: one.coherence for one in found.layers}))
    ]
    if found.total.dare_measured is not None:
        panels.append((_errors, found))
    return [panels]


def _heat(axes: Any, name: str, grid: Grid) -> None:
    values = [[math.nan if v is None else v for v in row] for _, row in grid.rows]
    shown = [v for row in values for v in row if math.isfinite(v)]
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=max(shown, default=0) or 1)
    every = math.ceil(len(grid.layers) / 12)
    axes.set_xticks(range(0, len(grid.layers), every), grid.layers[::every])
    axes.set_yticks(range(len(grid.rows)), [_short(module) for module, _ in grid.rows], fontsize=8)
    axes.set_title(_plain(f"{name}, {grid.stack}"), fontsize=10)
    axes.figure.colorbar(image, ax=axes)


def _errors(axes: Any, found: Activations) -> None:
    """Measured over predicted error, a point for each layer, with the line of equality."""
    series = (
        ("DARE, q = density", FIRST, [(one.dare_error, one.dare_measured) for one in found.layers]),
        ("q of least squares", SECOND, [(one.least_squares_error, one.least_squares_measured) for one in found.layers]),
    )
    values = [v for _, _, points in series for point in points for v in point if v and math.isfinite(v)] or [1.0]
    axes.plot([min(values), max(values)], [min(values), max(values)], "--", color="grey", linewidth=1)
    for label, colour, points in series:
        axes.plot(*zip(*points, strict=True), "o", markersize=4, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("predicted error of a layer")
    axes.set_ylabel("measured")
    axes.set_title(f"density {found.density:g}, a point a layer", fontsize=10)
    axes.legend(fontsize=8)


def _search(axes: Any, one: ChosenQ, variable: str, series: Mapping[str, Points]) -> None:
    for family, points in series.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", markersize=4, linewidth=1, label=_plain(family) or None)
    reference, best = one.reference(variable), one.best(variable)
    if reference is not None:
        axes.axvline(reference[0], color="grey", linestyle="--", label=reference[1])
    if best is not None:
        axes.plot(best[0], best[1], "*", color="C3", markersize=15, label=best[2], zorder=3)
    axes.set_xscale("linear" if variable == "step" else "log")
    axes.set_xlabel(one.axis(variable))
    axes.set_ylabel(f"{one.measure(variable)} (smaller is better)")
    axes.set_title(_plain(f"{one.model}: {one.method}, density {_shown(one.density)}"), fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _shown(density: float | list[float]) -> str:
    return f"{density:g}" if isinstance(density, float) else " to ".join(f"{d:g}" for d in density)


def _short(name: str) -> str:
    return _plain(name if len(name) <= 28 else f"…{name[-27:]}")


def _plain(name: str) -> str:
    """A stranger's name as plain text: dollars start no formula, unprintable characters become �."""
    printed = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return printed.replace("$", r"\$")
