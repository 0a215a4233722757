"""What a plan asks of the kind of output that it is for.

A kind is a file of `outputs` with an object `OUTPUT`. It is imported when a recipe names the kind.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from deltamerge.formats.layout import Layout
from deltamerge.plan.inputs import Inputs
from deltamerge.plan.memory import Memory
from deltamerge.plan.outputs import OutputTensor
from deltamerge.recipe.output_keys import Output

if TYPE_CHECKING:
    from deltamerge.plan.planner import Plan

PRUNED_ADAPTER = "adapter"

Stored: TypeAlias = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor in a file."""


class OutputKind(Protocol):
    """A kind of output: how a plan lays it out, what memory its sink takes, and what there is to say of it."""

    def refuse(self, inputs: Inputs) -> None:
        """Raise InputError: these models cannot have such an output."""

    def layout(self, tensors: Sequence[Stored], wanted: Output, inputs: Inputs, weights: Mapping[str, str]) -> Layout:
        """Return the files of the output. `weights` maps the parts of a coded weight to its name."""

    def memory(
        self, wanted: Output, tensors: tuple[OutputTensor, ...], workers: int, cap: int | None, *, weighed: bool
    ) -> Memory:
        """Return the memory that the sink holds. `weighed`: deltas are weighed by the inputs of calibration."""

    def notes(self, wanted: Output, *, weighed: bool) -> Iterator[str]:
        """Yield what a plan says of how the output is made."""

    def describe(self, plan: Plan) -> dict[str, Any]:
        """Return what only this kind adds to `deltamerge plan --json`."""


def output_kind(wanted: Output, *, own_weights: bool = False) -> OutputKind:
    """Return the kind of output that a recipe asks for. `own_weights`: an adapter's own A and B are pruned."""
    found: OutputKind = importlib.import_module(
        f"deltamerge.outputs.{PRUNED_ADAPTER if own_weights else wanted.form}"
    ).OUTPUT
    return found
