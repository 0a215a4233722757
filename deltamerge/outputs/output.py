"""The interface of all outputs: the job that a run passes to an output, its result, and the methods of each kind.

A kind of output is a subclass of `RunOutput` in a file of its own, whose object is `OUTPUT`. It is its own sink:
`write` executes the plan's tensors and leaves the weights in the work folder. By default, all other methods behave as
for an ordinary checkpoint.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deltamerge.files.hashes import Pieces, Seal
from deltamerge.files.work_folder import Workspace
from deltamerge.formats.audit import NonFinite
from deltamerge.formats.safetensors import Layout, plan_layout
from deltamerge.outputs.assets import Files, assets, left_out
from deltamerge.plan.finite import set_aside
from deltamerge.plan.inputs import Inputs
from deltamerge.plan.memory import Memory
from deltamerge.plan.outputs import OutputTensor
from deltamerge.plan.planner import Plan, Stored, output_kind
from deltamerge.recipe.output_keys import Output
from deltamerge.tensors.tensor import Node

if TYPE_CHECKING:
    from deltamerge.formats.delta.writer import Summary


@dataclass(frozen=True, slots=True)
class LearnedArtifact:
    """A delta artifact whose codes were learned, and the divergences on the rows that decided, before and after."""

    folder: Path
    before: float
    after: float


class Choices(Protocol):
    """The choices of an earlier run, from a lock."""

    @property
    def densities(self) -> Mapping[str, float]:
        """The densities that a budget allowed."""

    @property
    def learned(self) -> LearnedArtifact | None:
        """The artifact that has its learned codes; None: none were learned."""

    def calibrated(self, plan: Plan) -> Mapping[Node, Any]:
        """Return the values of a plan's calibration stages."""


@dataclass(frozen=True, slots=True)
class WriteJob:
    """The job of an output: everything that it needs to write its weights.

    work     the work folder, with its journal
    pieces   gets the hashes of the bytes that are read
    values   yields the values of the stages before the first tile; their files exist while it is open
    merging  yields the function that gets the bytes done
    choices  the choices of a lock; None: q's and densities are chosen now
    files    the shards to write; None: all
    """

    work: Workspace
    pieces: Pieces
    values: Callable[[Plan], AbstractContextManager[dict[Node, Any]]]
    merging: Callable[[Plan], AbstractContextManager[Callable[[int], None]]]
    choices: Choices | None = None
    files: frozenset[str] | None = None

    def of(self, plan: Plan) -> Plan:
        """Return the plan of only the shards to write."""
        if self.files is None:
            return plan
        return replace(plan, outputs=tuple(output for output in plan.outputs if output.file in self.files))


@dataclass(frozen=True, slots=True)
class LayerRank:
    """The part of a weight's delta that a LoRA keeps.

    rank      0: it has no factors, because nothing changed or no byte was left
    energy    ‖B A‖² / ‖Δ‖², from 0 to 1
    output    E‖B A x‖² / E‖Δ x‖² on the calibration rows; None without calibration
    missed    bound on the gain of the best B A of this rank over this one, in the maximised measure
    """

    rank: int
    energy: float
    output: float | None
    missed: float

    def describe(self) -> dict[str, Any]:
        """Return it as locks and `--json` have it; four digits do not depend on the machine."""
        found = {"rank": self.rank, "energy": _digits(self.energy), "missed": _digits(self.missed)}
        return found if self.output is None else found | {"output": _digits(self.output)}


@dataclass(frozen=True, slots=True)
class LowRankSummary:
    """The written LoRA: the file's bytes and hash, the kept part of each weight, the shares of all deltas, notes.

    `whole` is the number of bytes of tensors without factors.
    """

    nbytes: int
    hashed: dict[str, Any]
    layers: Mapping[str, LayerRank]
    energy: float
    notes: tuple[str, ...] = ()
    output: float | None = None
    whole: int = 0

    def describe(self) -> dict[str, Any]:
        """Return it as locks and `--json` have it; four digits do not depend on the machine."""
        whole = {"energy": _digits(self.energy)} | ({} if self.output is None else {"output": _digits(self.output)})
        return whole | {"tensors": {name: layer.describe() for name, layer in self.layers.items()}}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


class Account:
    """An output's record of the written weights, for the lock and the card.

    delta  the summary of a delta artifact
    lora   the summary of a LoRA
    """

    delta: Summary | None = None
    lora: LowRankSummary | None = None

    def describe(self) -> dict[str, Any]:
        """Return the keys that it adds to a lock."""
        return {}

    def record(self) -> dict[str, Any]:
        """Return the content for the record of a run's part; see `RunOutput.join`."""
        return {}

    def card(self, plan: Plan) -> list[str]:
        """Return a section of the card."""
        return []

    def table(self) -> list[str]:
        """Return a long section of the card, which stands below all others."""
        return []


@dataclass(frozen=True, slots=True)
class Weights:
    """Written weights.

    plan       the plan by which they were made
    values     the values of its shared nodes
    hashed     hash and size of the files whose hash is known
    nonfinite  their values that are not finite
    seals      the seals of the files when they were hashed
    account    the record for lock and card
    """

    plan: Plan
    values: Mapping[Node, Any]
    hashed: dict[str, Any] = field(default_factory=dict)
    nonfinite: Mapping[str, NonFinite] = field(default_factory=dict)
    seals: Mapping[str, Seal] = field(default_factory=dict)
    account: Account = field(default_factory=Account)


class RunOutput:
    """A kind of output. The methods here are for an ordinary checkpoint."""

    hashes_as_read = False
    """Whether the run hashes the merged bytes as it reads them, so that they need no second read."""

    # Methods that a plan calls.

    def refuse(self, inputs: Inputs) -> None:
        """Raise InputError: these models cannot have such an output."""

    def layout(self, tensors: Sequence[Stored], wanted: Output, inputs: Inputs, weights: Mapping[str, str]) -> Layout:
        """Return the files of the output. `weights` maps the parts of a coded weight to its name."""
        return plan_layout(tensors, wanted.shard_size, inputs.template.checkpoint.components, weights)

    def memory(
        self, wanted: Output, tensors: tuple[OutputTensor, ...], workers: int, cap: int | None, *, weighed: bool
    ) -> Memory:
        """Return the memory that the sink holds. `weighed`: deltas are weighed by the inputs of calibration."""
        raise NotImplementedError

    def notes(self, wanted: Output, *, weighed: bool) -> Iterator[str]:
        """Yield a plan's lines on how the output is made."""
        yield from ()

    def describe(self, plan: Plan) -> dict[str, Any]:
        """Return the keys that only this kind adds to `deltamerge plan --json`."""
        return {}

    def check(self, plan: Plan) -> None:
        """Raise InputError if headers and configs already show that it cannot be written."""

    def expected_bytes(self, plan: Plan) -> int:
        """Estimate the bytes of its weights."""
        return plan.nbytes

    def budget(self, plan: Plan) -> int | None:
        """Return the bytes that it may take, if densities are chosen for them during writing."""
        return None

    # Methods that a run calls.

    def write(self, plan: Plan, job: WriteJob) -> Weights:
        """Execute `plan` and leave the weights in the work folder. Finished work of an interrupted run is not repeated.

        InputError: such an output cannot be made of these models.
        """
        raise NotImplementedError

    def settle(self, plan: Plan, job: WriteJob) -> Weights:
        """Write the weights. Write them again if values that are not finite are found only in the result."""
        made = self.write(plan, job)
        if job.files is not None:
            return made
        again = set_aside(plan, made.nonfinite)
        if again.tasks != plan.tasks:
            job.work.empty()
            job.work.forget()
            made = self.write(again, job)
        return replace(made, plan=again)

    def belongs(self, plan: Plan, weights: Weights, name: str) -> bool:
        """Return whether a file of the work folder belongs to the finished weights, not to a killed attempt."""
        return name in weights.hashed or name in plan.layout.indexes

    def files(self, plan: Plan) -> Files:
        """Return every file beside weights, card, recipe and lock: config, tokenizer, processors."""
        return assets(plan)

    def finish(self, plan: Plan, folder: Path, weights: Weights, files: Files) -> tuple[Weights, tuple[str, ...]]:
        """Turn the weights in `folder` into their final form, before `files` are added. Return notes."""
        return weights, tuple(left_out(plan, files))

    def add(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """Write further files from the finished checkpoint in `folder`. Return notes."""
        return ()

    def join(self, parts: Sequence[Mapping[str, Any]]) -> Account:
        """Return the account of the weights that a run's parts wrote, from their records."""
        return Account()

    # Descriptions of a finished run.

    def nbytes(self, plan: Plan, written: Mapping[str, Any]) -> int:
        """Return the bytes of the weights; `written` are the lock's outputs."""
        return sum(entry["size"] for name, entry in written.items() if name.endswith(".safetensors"))

    def name(self, plan: Plan) -> str:
        """Return the output in a few words."""
        return f"{len(plan.outputs)} tensors"

    def remarks(self, plan: Plan) -> tuple[str, ...]:
        """Return the notes to show at the end."""
        return ()

    def load_line(self, plan: Plan, folder: Path) -> str:
        """Return the line that loads the result in `folder`."""
        raise NotImplementedError

    def next_steps(self, plan: Plan, folder: Path) -> tuple[str, str]:
        """Return the line that loads the result in `folder`, and the line that checks it."""
        return f"load    {self.load_line(plan, folder)}", f"verify  deltamerge verify {shlex.quote(str(folder))}"

    def front_matter(self, plan: Plan) -> dict[str, object]:
        """Return this kind's own fields of the card for the hub."""
        return {}


def output_of(plan: Plan) -> RunOutput:
    """Return the kind of output that a plan is for."""
    found = output_kind(plan.recipe.output, own_weights=plan.pruned_adapter is not None)
    assert isinstance(found, RunOutput)
    return found
