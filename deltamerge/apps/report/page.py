"""Write the results of inspect as one HTML page: SVG pictures and their figures, without scripts or external content.

Names come from strangers: every word passes through `svg.text`, and the page's policy allows only its own style.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltamerge.apps.report.svg import (
    Markup,
    Point,
    bars,
    columns,
    curve,
    document,
    element,
    figure,
    heat,
    pairs,
    scatter,
    text,
)
from deltamerge.errors import OutputError, context
from deltamerge.files.atomic import refuse_taken, replace_file
from deltamerge.tensors.names import block_name, numbers_as_stars

if TYPE_CHECKING:
    from deltamerge.apps.inspect.statistics import Activations, LayerInfluence, Report, TensorStatistics
    from deltamerge.run.calibration_record import ChosenQ, Run


NUMBERED = re.compile(r"(.+)\.(\d+)", re.DOTALL)
VECTORS = "biases and norms"


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Figures of several tensors: entries, mean |Δ|, ‖Δ‖/‖W‖, share changed, share of energy.

    ‖Δ‖/‖W‖ is None if the base is zero.
    """

    count: int
    mean_abs: float
    relative: float | None
    changed: float
    energy: float

    @classmethod
    def of(cls, tensors: Sequence[TensorStatistics]) -> TensorGroup:
        """Return the figures of these tensors together."""
        count = sum(t.count for t in tensors)
        norm, base = (math.hypot(*values) for values in ([t.norm for t in tensors], [t.base_norm for t in tensors]))
        mean = math.fsum(t.mean_abs * t.count for t in tensors) / count if count else 0.0
        changed = math.fsum((1 - t.unchanged) * t.count for t in tensors) / count if count else 0.0
        energy = math.fsum(t.energy_share for t in tensors)
        return cls(count, mean, norm / base if base else None, changed, energy)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of a group, and its format."""

    of: Callable[[TensorGroup], float | None]
    form: str = ".3g"


FIGURES: Mapping[str, Figure] = {
    "mean |Δ|": Figure(lambda group: group.mean_abs),
    "‖Δ‖/‖W‖": Figure(lambda group: group.relative),
}
CHANGED = Figure(lambda group: group.changed, ".2%")
Place = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LayerGrid:
    """Figures of one stack of numbered blocks: a row for each module, a column for each block."""

    stack: str
    layers: list[str]
    rows: list[tuple[str, list[float | None]]]


def stacks(layers: Iterable[str]) -> dict[str, list[str]]:
    """Return the numbers of numbered blocks, ascending, by container."""
    found: dict[str, list[str]] = {}
    for layer in dict.fromkeys(layers):
        if match := NUMBERED.fullmatch(layer):
            found.setdefault(match[1], []).append(match[2])
    return {stack: sorted(numbers, key=lambda n: (len(n), n)) for stack, numbers in found.items()}


def module_of(name: str, layer: str) -> str:
    """Return the module of a weight inside its block.

    It is the name without the block and `.weight`, with numbers (experts) as *.
    """
    inner = name.removeprefix(f"{layer}.").removesuffix(".weight")
    return numbers_as_stars(inner)


def place(name: str) -> Place | None:
    """Block and module of a tensor; None outside blocks."""
    block = block_name(name)
    return None if block is None else (block, module_of(name, block))


def group_tensors(
    tensors: Iterable[TensorStatistics], key: Callable[[TensorStatistics], Place] = lambda t: _place(t)
) -> dict[Place, TensorGroup]:
    """Group tensors by a key: by default by block and module, with all vectors of a block as one module."""
    groups: dict[Place, list[TensorStatistics]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return {name: TensorGroup.of(parts) for name, parts in groups.items()}


def _place(tensor: TensorStatistics) -> Place:
    return tensor.layer, VECTORS if tensor.kind == "vector" else module_of(tensor.name, tensor.layer)


def matrices(found: Report) -> dict[Place, TensorGroup]:
    """Return the matrices of every block, by block and module."""
    return group_tensors(t for t in found.tensors if t.kind != "vector" and NUMBERED.fullmatch(t.layer))


def grids(cells: Mapping[Place, float | None]) -> list[LayerGrid]:
    """Return a grid for each stack."""
    made = []
    for stack, numbers in stacks(layer for layer, _ in cells).items():
        modules = dict.fromkeys(module for layer, module in cells if layer.rpartition(".")[0] == stack)
        rows = [(module, [cells.get((f"{stack}.{n}", module)) for n in numbers]) for module in modules]
        made.append(LayerGrid(stack, numbers, rows))
    return made


def place_figures(values: Mapping[str, float | None]) -> dict[Place, float | None]:
    """Return figures by block and module, from figures by weight. Of several experts it is the mean."""
    together: dict[Place, list[float]] = {}
    for name, value in values.items():
        if (where := place(name)) is not None:
            together.setdefault(where, []).extend([] if value is None else [value])
    return {where: math.fsum(found) / len(found) if found else None for where, found in together.items()}


ROWS = 48
FLAT = 0.05  # share of the largest figure that figures of a heat map must differ by


def check_target(path: Path, *, force: bool) -> None:
    """Refuse a `path` without .html, a file that exists (without `force`), or a missing folder."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{path}: a report is a page", hint="name a .html file")
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path}: exists", hint="another name, or --force")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: {path.parent} is no folder")
    with context(str(path)):
        refuse_taken(path)


def write(found: Report, path: Path, *, force: bool = False) -> None:
    """Write the page to `path`, which must be new unless `force`. OutputError: it exists, or cannot be written."""
    check_target(path, force=force)
    replace_file(path, page(found), new=not force)


def page(found: Report) -> str:
    """Return the page. The same report gives the same bytes."""
    blocks = [_words(f"on {found.base}"), element("p", text(conclusion(found)), class_="conclusion")]
    blocks += [element("p", text(f"Warning: {warning}."), class_="warning") for warning in found.warnings]
    blocks.append(_tiles(found))
    if found.run is not None:
        blocks += _run(found.run, {t.name for t in found.tensors if t.kind != "vector"})
    blocks += [*_layers(found), *_modules(found)]
    if found.activations is not None:
        blocks += _activations(found.activations)
    if found.without_delta:
        blocks += [_heading("Without a delta"), _words(", ".join(found.without_delta))]
    blocks.append(_table(found))
    return document(f"Delta of {found.model}", blocks)


def conclusion(found: Report) -> str:
    """Return the meaning of the figures, in two sentences."""
    total = found.total
    if not total.norm:
        return f"{found.model} is its base: no entry differs. There is nothing to prune or to merge."
    size = "" if total.relative_norm is None else f", by {total.relative_norm:.2%} of its norm"
    first = f"{found.model} differs from its base in {1 - total.unchanged:.1%} of the entries{size}."
    seen = found.activations
    if seen is not None:
        dare, best = figure(seen.total.dare_error), figure(seen.total.least_squares_error)
        return (
            f"{first} On {seen.sequences} rows, at density {seen.density:g}, the expected error of DARE is {dare}, and "
            f"{best} at the best q, where 1 is as if the delta were dropped."
        )
    module, group = _modules_of(found)[0]
    kept = next(iter(found.total.kept_energy.items()))
    return (
        f"{first} Most of the difference is in {module} ({group.energy:.0%} of ‖Δ‖²), and the largest "
        f"{100 * float(kept[0]):g} % of all entries hold {kept[1]:.0%} of it."
    )


def _heading(words: str) -> Markup:
    return element("h2", text(words))


def _words(words: str) -> Markup:
    return element("p", text(words))


def _grid(*cards: Markup, wide: bool = False) -> Markup:
    return element("div", *cards, class_="grid wide" if wide else "grid")


def _card(title: str, *parts: Markup) -> Markup:
    return element("section", element("h3", text(title)), *parts, class_="card")


def _tiles(found: Report) -> Markup:
    total = found.total
    tiles = {
        "entries": f"{total.count:,}",
        "mean |Δ|": figure(total.mean_abs),
        "largest |Δ|": figure(total.max_abs),
        "‖Δ‖/‖W‖": figure(total.relative_norm),
        "unchanged": f"{total.unchanged:.1%}",
        "kurtosis (normal: 3)": figure(total.kurtosis),
    }
    return _tile_cards(tiles)


def _tile_cards(tiles: Mapping[str, str]) -> Markup:
    cards = (element("div", element("b", text(value)), text(name), class_="card") for name, value in tiles.items())
    return element("div", *cards, class_="tiles")


def _layers(found: Report) -> list[Markup]:
    numbered = stacks(found.layers)
    if not numbered:
        return []
    blocks = [_heading("Layers"), _words("All tensors of a numbered block together; energy is ‖Δ‖².")]
    for stack, numbers in numbered.items():
        rows = [(n, found.layers[f"{stack}.{n}"]) for n in numbers]
        mean, relative, energy = "mean |Δ|", "‖Δ‖/‖W‖", "share of energy"
        cards = [
            _card(f"{mean} · {stack}", columns(mean, [Point(n, one.mean_abs) for n, one in rows])),
            _card(f"{relative} · {stack}", columns(relative, [Point(n, one.relative_norm) for n, one in rows])),
            _card(f"{energy} · {stack}", columns(energy, [Point(n, one.energy_share) for n, one in rows], form=".1%")),
        ]
        blocks.append(_grid(*cards))
    cells = matrices(found)
    maps = [
        card
        for name, one in FIGURES.items()
        for card in _heat(name, {key: one.of(group) for key, group in cells.items()}, one.form)
    ]
    blocks += [_heading("Layers and modules"), _words("Weights of the blocks, without biases and norms.")]
    changed = {key: CHANGED.of(group) for key, group in cells.items()}
    return [
        *blocks,
        _grid(*maps, wide=True),
        _heading("What changed, and where"),
        _words("The share of entries that differ from the base: what pruning left, after rounding to the dtype."),
        _grid(*_heat("entries changed", changed, CHANGED.form), _card("entries changed by module", _by_module(found))),
    ]


def _by_module(found: Report) -> Markup:
    named = [(module, CHANGED.of(group)) for module, group in _modules_of(found)[:ROWS]]
    return bars("entries changed by module", [Point(m, v) for m, v in named], form=CHANGED.form)


def _modules_of(found: Report) -> list[tuple[str, TensorGroup]]:
    """Return the modules, each over all layers, by share of energy."""
    groups = group_tensors(found.tensors, lambda t: ("", VECTORS if t.kind == "vector" else module_of(t.name, t.layer)))
    return sorted(((module, group) for (_, module), group in groups.items()), key=lambda pair: -pair[1].energy)


def heat_maps(
    name: str, cells: Mapping[Place, float | None], form: str = ".3g"
) -> Iterator[tuple[str, Markup, tuple[str, str]]]:
    """Yield a heat map for each stack, all on one scale, or nothing where all figures are alike.

    Each is a title, a drawing, and the figures of the faintest and of the full colour.
    """
    low, top = extent(cells)
    for grid in () if is_flat(cells) else grids(cells):
        drawn = heat(f"{name} of {grid.stack}", grid.layers, grid.rows, low, top, form=form)
        yield f"{name} · {grid.stack}", drawn, (figure(low, form), figure(top, form))


def extent(cells: Mapping[Place, float | None]) -> tuple[float, float]:
    """Return the least and the largest figure. 0 without figures."""
    found = [v for v in cells.values() if v is not None and math.isfinite(v)]
    return min(found, default=0.0), max(found, default=0.0)


def is_flat(cells: Mapping[Place, float | None]) -> bool:
    """Return whether figures are so much alike that a heat map would show nothing."""
    low, top = extent(cells)
    return top - low <= FLAT * max(abs(top), abs(low))


def _heat(name: str, cells: Mapping[Place, float | None], form: str = ".3g") -> list[Markup]:
    """Return a card for each stack. One with words alone where all figures are alike."""
    if cells and is_flat(cells):
        ends = [figure(v, form) for v in extent(cells)]
        alike = ends[0] if ends[0] == ends[1] else " to ".join(ends)
        return [_card(name, _words(f"{alike} in all layers and modules"))]
    return [
        _card(title, drawn, element("div", text(low), element("i"), text(top), class_="scale"))
        for title, drawn, (low, top) in heat_maps(name, cells, form)
    ]


def _modules(found: Report) -> list[Markup]:
    named = _modules_of(found)
    more = len(named) - ROWS
    named = named[:ROWS]
    whole = found.total.count or 1
    cards = [
        _card(
            "share of energy, and of entries (tick)",
            bars("share of energy", [Point(m, g.energy, g.count / whole) for m, g in named], form=".1%"),
        )
    ]
    cards += [_card(n, bars(n, [Point(m, f.of(g)) for m, g in named], form=f.form)) for n, f in FIGURES.items()]
    kept = [Point(f"largest {100 * float(d):g} % of entries", share) for d, share in found.total.kept_energy.items()]
    words = "A module of all layers together, by share of energy"
    words += f"; {more} more are left out." if more > 0 else "."
    kinds = [Point(name, one.energy_share, one.count / whole) for name, one in found.kinds.items()]
    return [
        _heading("Modules"),
        _words(words),
        _grid(*cards),
        _heading("Kinds, and what the largest entries hold"),
        _grid(
            _card(
                "share of energy, and of entries (tick)", bars("share of energy by kind", kinds, form=".1%", whole=1.0)
            ),
            _card("share of energy kept by magnitude", bars("kept energy", kept, form=".1%", whole=1.0)),
            wide=True,
        ),
    ]


def _key(first: str, second: str) -> Markup:
    """Return the legend of two colours."""
    one, two = element("span", element("i"), text(first)), element("span", element("i", class_="second"), text(second))
    return element("div", one, two, class_="key")


def _activations(found: Activations) -> list[Markup]:
    named = stacks(where[0] for one in found.layers if (where := place(one.name)))
    prefix = f"{next(iter(named))}." if len(named) == 1 else ""
    rows = [(one.name.removeprefix(prefix).removesuffix(".weight"), one) for one in found.layers]
    errors = [Point(name, one.dare_error, one.least_squares_error) for name, one in rows]
    largest = []
    for name, one in rows:
        if top := max(one.massive, key=lambda m: m.mean_abs, default=None):
            note = f"feature {top.feature} · {figure(top.ratio)} ×"
            largest.append((top.ratio or 0.0, Point(name, top.ratio, note=note)))
    chosen = sorted(errors, key=lambda p: -(p.value or 0.0))[:ROWS]
    strongest = [point for _, point in sorted(largest, key=lambda pair: -pair[0])[:12]]
    key = _key("DARE, q = density", "at the q of least squares")
    total = found.total
    return [
        _heading("Activations"),
        _words(
            f"Over {found.sequences} sequences, at density {found.density:g}. Coherence D/A near 0: DARE is right;"
            f" near 1: q should be 1. In all: D/A {figure(total.coherence)}, error of DARE {figure(total.dare_error)},"
            f" at the best q {figure(total.least_squares_error)}."
        ),
        _grid(
            *_heat("coherence D/A", place_figures({one.name: one.coherence for one in found.layers})),
            *_heat("q of least squares", place_figures({one.name: one.least_squares_q for one in found.layers})),
            wide=True,
        ),
        _heading("Predicted error, measured error, massive activations"),
        _words(
            "The error is E‖Δx − Δ'x‖²/E‖Δx‖² (1, dashed: as if the delta were dropped)"
            + (f"; the {ROWS} layers of largest error." if len(errors) > ROWS else ".")
            + " Measured: of the mask of seed 0, on the same rows; the dashed line is where both agree."
            + " Massive: the input feature of largest mean |x|, and how many times the median of all features that is;"
            + f" the {len(strongest)} layers where it is most."
        ),
        _grid(
            _card(
                "predicted error: DARE → least squares",
                key,
                pairs("predicted error, DARE and least squares", "error (smaller is better)", chosen),
            ),
            element(
                "div",
                _card("measured error over predicted, a point a layer", key, measured_errors(rows)),
                _card("massive activations", bars("massive activations", strongest)),
                class_="stack",
            ),
            wide=True,
        ),
    ]


def measured_errors(rows: Sequence[tuple[str, LayerInfluence]]) -> Markup:
    """Return the error of a drawn mask over the expected one, a point for each layer, of DARE and at the best q."""
    dare = [(name, one.dare_error, one.dare_measured) for name, one in rows]
    best = [(name, one.least_squares_error, one.least_squares_measured) for name, one in rows]
    return scatter("measured error over predicted error", "predicted error", "measured error", [dare, best])


def _run(found: Run, drawn: Set[str]) -> list[Markup]:
    """Yield the lock's record of the run that made the model: every search, and the q's of the `drawn` tensors."""
    blocks = []
    for one in found.choices:
        blocks += [_heading(f"How q of {one.model} was chosen"), _words(f"{one.chosen}: {one.why}.")]
        blocks.append(_choice_tiles(one))
        cards = [_card(f"{one.measure(v)} over {v}", *_search(one, v)) for v, _ in one.panels]
        if len(set(one.q.values())) > 1:
            cards += _heat(f"q{' (mean of rows)' if one.rows else ''}", place_figures(_only(one.q, drawn)))
        blocks.append(_grid(*cards, wide=True))
    if found.densities:
        blocks += [
            _heading("Densities that the budget allowed"),
            _grid(*_heat("density", place_figures(_only(found.densities, drawn)), ".2%"), wide=True),
        ]
    return blocks


def _only(values: Mapping[str, float], names: Set[str]) -> dict[str, float | None]:
    return {name: value for name, value in values.items() if name in names}


def _choice_tiles(one: ChosenQ) -> Markup:
    values = [end for ends in one.rows.values() for end in ends] + [v for n, v in one.q.items() if n not in one.rows]
    low, high = min(values, default=1.0), max(values, default=1.0)
    density = one.density if isinstance(one.density, list) else [one.density]
    return _tile_cards(
        {
            "method": one.method,
            "density": " to ".join(f"{d:.4g}" for d in density),
            "q of linear weights": f"{low:.4g}" if low == high else f"{low:.3g} to {high:.3g}",
            "1/q": f"{1 / high:.4g}" if low == high else f"{1 / high:.3g} to {1 / low:.3g}",
            f"{one.objective}, scope {one.scope}": figure(one.value, ".4g"),
            "the same without calibration": figure(one.plain, ".4g"),
        }
    )


def _search(one: ChosenQ, variable: str) -> list[Markup]:
    """Return the objective over the searched number, below its legend."""
    keys = [element("span", element("i", class_=kind), text(words)) for kind, words in legend(one, variable).items()]
    return [element("div", *keys, class_="key"), search_curve(one, variable)]


def legend(one: ChosenQ, variable: str) -> dict[str, str]:
    """Return the meaning of a search's points and lines by their look.

    They are chosen, without calibration, and families if several.
    """
    series, reference, best = dict(one.panels)[variable], one.reference(variable), one.best(variable)
    words = {} if best is None else {"best": best[2]}
    if reference is not None:
        words["dashed"] = reference[1]
    return words | (dict(zip(("first", "second"), series, strict=False)) if len(series) > 1 else {})


def search_curve(one: ChosenQ, variable: str) -> Markup:
    """Return the objective over the searched number, with the chosen point and the point without calibration."""
    reference, best = one.reference(variable), one.best(variable)
    return curve(
        f"{one.measure(variable)} over {variable}",
        one.axis(variable),
        f"{one.measure(variable)} (smaller is better)",
        list(dict(one.panels)[variable].values()),
        logarithmic=variable != "step",
        reference=reference and reference[0],
        best=best and best[:2],
    )


def _table(found: Report) -> Markup:
    """Return the drawn figures as numbers."""
    groups = group_tensors(found.tensors)
    names = ("layer", "module", "entries", *FIGURES, "changed", "energy")
    rows = [element("tr", *(element("th", text(name)) for name in names))]
    for (layer, module), group in groups.items():
        numbers = (
            f"{group.count:,}",
            *(figure(f.of(group), f.form) for f in (*FIGURES.values(), CHANGED)),
            f"{group.energy:.2%}",
        )
        rows.append(element("tr", *(element("td", text(cell)) for cell in (layer, module, *numbers))))
    table = element("div", element("table", *rows), class_="scroll")
    return element("details", element("summary", text("The figures")), table)
