"""Pictures of a calibration: the objective over what was searched, with what was chosen. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltamerge.errors import InputError, OutputError

NAMES = {
    "q": "q: kept entries are divided by it",
    "eta": "η: the layers' q follow from it",
    "kappa": "κ: factor of the layers' closed-form q",
    "factor of lambda": "factor of the recipe's λ",
    "step": "step of learning",
}


def draw(calibration: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw every search of a lock's `calibration`, a panel each, into a file of the kind that its suffix names.

    InputError: matplotlib is missing, or nothing was searched. OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib", hint="pip install 'deltamerge[plot]'") from None
    panels = [(model, record, *panel) for model, record in calibration.items() for panel in _panels(record)]
    if not panels:
        raise InputError("nothing was searched that could be drawn", hint="layer_mse is solved in closed form")
    figure = Figure(figsize=(6.4 * len(panels), 4.6), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (model, record, variable, series) in zip(grid, panels, strict=True):
        _panel(axes, model, record, variable, series)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be drawn: {error}", hint="name a .png, .svg or .pdf file") from None


Series = dict[str, list[tuple[float, float]]]


def _panels(record: Mapping[str, Any]) -> Iterator[tuple[str, Series]]:
    """(searched variable, points by family) of each search in a record's path."""
    panels: dict[str, Series] = {}
    for *names, x, value in record["path"]:
        family, variable = (names[0] if len(names) > 1 else ""), names[-1]
        panels.setdefault(variable, {}).setdefault(family, []).append((x, value))
    yield from panels.items()


def _panel(axes: Any, model: str, record: Mapping[str, Any], variable: str, series: Series) -> None:
    for family, points in series.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", markersize=4, linewidth=1, label=family or None)
    if variable == "q" and record["mask"] == "random":
        density = record["density"] if isinstance(record["density"], float) else record["density"][0]
        axes.axvline(density, color="grey", linestyle="--", label=f"vanilla DARE: q = density, 1/q = {1 / density:g}")
    elif variable == "q":
        axes.axvline(1.0, color="grey", linestyle="--", label="without calibration: q = 1")
    elif variable == "factor of lambda":
        axes.axvline(1.0, color="grey", linestyle="--", label="the recipe's λ")
    searched = record["searched"]
    if variable in searched:
        x = searched[variable]
        family = searched.get("family", "")
        values = dict(series.get(family) or next(iter(series.values())))
        value = values.get(x, record["value"])
        word = "chosen" if record["chosen"] == "calibrated" else "best, not taken"
        axes.plot([x], [value], "*", color="C3", markersize=15, label=f"{word}: {x:.4g}", zorder=3)
    learned = variable == "step"
    axes.set_xscale("linear" if learned else "log")
    axes.set_xlabel(NAMES.get(variable, variable))
    axes.set_ylabel("loss on the rows that stop" if learned else f"{record['objective']} (smaller is better)")
    axes.set_title(f"{model}: {record['method']}, density {_shown(record['density'])}")
    axes.grid(alpha=0.3)
    axes.legend()


def _shown(density: Any) -> str:
    return f"{density:g}" if isinstance(density, float) else " to ".join(f"{d:g}" for d in density)
