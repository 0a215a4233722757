"""Mixtures of experts in a plan. The app `moe` makes them; a table names it, and it is imported for a mixture alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.plan.delta_graph import Merge
from deltamerge.plan.inputs import Inputs
from deltamerge.plan.output_config import OutputConfig
from deltamerge.plan.outputs import Row
from deltamerge.plan.stack import Stack
from deltamerge.plan.tensor_graph import Builder
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.traits import function_of

PLANNERS = {"moe": "deltamerge.apps.moe.outputs:MixtureOutputs"}  # an app, and the class that plans its outputs


class Mixture(Protocol):
    """A mixture: its layout, experts by name, numbers of parameters, and the node that makes its routers."""

    @property
    def layout(self) -> Any: ...
    @property
    def sizes(self) -> Any: ...
    @property
    def experts(self) -> tuple[str, ...]: ...
    @property
    def shared(self) -> tuple[str, ...]: ...
    @property
    def parameters(self) -> int: ...
    @property
    def active(self) -> int: ...
    @property
    def routers(self) -> Node: ...
    @property
    def memory(self) -> int: ...

    def locked(self, lock: Mapping[str, Any], values: NDArray[np.float32] | None, where: str) -> Any:
        """Return the routers of a lock. VerifyError: it has none that fit."""

    def describe(self) -> dict[str, Any]:
        """Return the mixture as `deltamerge plan --json` prints it."""


class AppOutputs(Protocol):
    """The output tensors of an app's plan, which `Outputs` decides about in a merge."""

    builder: Builder
    problems: list[str]
    hint: str
    notes: list[str]
    stacks: list[Stack]
    config: dict[str, Any]
    settled: OutputConfig
    merges: list[Merge]
    averaged: dict[str, str]

    def rows(self) -> list[Row]:
        """Return the tensors of the output, in the base's order."""

    def mixture(self, rows: Sequence[Row]) -> Mixture:
        """Return the mixture of these tensors."""


def mixture_outputs(recipe: Recipe, inputs: Inputs, device: str, folder: Path, memory: int | None) -> AppOutputs:
    """Return the outputs of a mixture. InputError: the app is not installed, or no mixture is made of these models."""
    with errors.app("moe"):
        make = function_of(PLANNERS["moe"])
    outputs: AppOutputs = make(recipe, inputs, device, folder, memory)
    return outputs
