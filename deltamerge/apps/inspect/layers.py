"""Tensors grouped by numbered block and module, for pages and pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltamerge.tensors.names import block_name, numbers_as_stars

if TYPE_CHECKING:
    from deltamerge.apps.inspect.statistics import Report, TensorStatistics

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
