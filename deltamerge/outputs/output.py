"""The seam of all outputs: what a run hands one, what one hands back, and what each kind may say otherwise.

A kind of output is a subclass of `RunOutput` in a file of its own, whose object is `OUTPUT`. It is its own sink:
`write` executes the plan's tensors and leaves the weights in the work folder. Everything else has the answer of an
ordinary checkpoint here.
"""

from __future__ import annotations

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
    """What an earlier run chose, as a lock has it."""

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
    """What a run hands an output, to write its weights.

    work     the work folder, with its journal
    pieces   are told the hashes of what is read
    values   gives the values of the stages before the first tile; their files are there while it is open
    merging  gives what is to be told of the bytes done, while it is open
    choices  of a lock; None: q's and densities are chosen now
    files    the shards to write; None: all
    """

    work: Workspace
    pieces: Pieces
    values: Callable[[Plan], AbstractContextManager[dict[Node, Any]]]
    merging: Callable[[Plan], AbstractContextManager[Callable[[int], None]]]
    choices: Choices | None = None
    files: frozenset[str] | None = None

    def of(self, plan: Plan) -> Plan:
        """Return the plan of the shards alone that are to be written."""
        if self.files is None:
            return plan
        return replace(plan, outputs=tuple(output for output in plan.outputs if output.file in self.files))


@dataclass(frozen=True, slots=True)
class LayerRank:
    """What a LoRA keeps of a weight's delta.

    rank      0: it has no factors, since nothing changed or no byte was left
    energy    ‖B A‖² / ‖Δ‖², from 0 to 1
    output    E‖B A x‖² / E‖Δ x‖² on the calibration rows; None without calibration
    missed    what the best B A of that rank would keep more of the one that was made largest, at most
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
    """What was written: bytes of the file, its hash, what each weight keeps, the shares of all deltas, notes.

    `whole` is how many of the bytes are of tensors without factors.
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
    """What an output says of the weights that were written, in the lock and on the card.

    delta  the summary of a delta artifact
    lora   the summary of a LoRA
    """

    delta: Summary | None = None
    lora: LowRankSummary | None = None

    def describe(self) -> dict[str, Any]:
        """Return the keys that it adds to a lock."""
        return {}

    def record(self) -> dict[str, Any]:
        """Return what the record of a part of a run keeps of it; see `RunOutput.join`."""
        return {}

    def card(self, plan: Plan) -> list[str]:
        """Return a section of the card."""
        return []

    def table(self) -> list[str]:
        """Return a section of the card that is long: it stands below all others."""
        return []


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that are written.

    plan       by which they were made
    values     of its shared nodes
    hashed     hash and size of the files whose hash is known
    nonfinite  what is not finite in them
    seals      of the files, as they were when they were hashed
    account    what there is to say of them
    """

    plan: Plan
    values: Mapping[Node, Any]
    hashed: dict[str, Any] = field(default_factory=dict)
    nonfinite: Mapping[str, NonFinite] = field(default_factory=dict)
    seals: Mapping[str, Seal] = field(default_factory=dict)
    account: Account = field(default_factory=Account)


class RunOutput:
    """A kind of output; the answers here are those of an ordinary checkpoint."""

    hashes_as_read = False
    """Whether the run hashes the bytes that it merges as it reads them, so that they need no second reading."""

    # What a plan asks.

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
        """Yield what a plan says of how the output is made."""
        yield from ()

    def describe(self, plan: Plan) -> dict[str, Any]:
        """Return what only this kind adds to `deltamerge plan --json`."""
        return {}

    def check(self, plan: Plan) -> None:
        """Raise InputError: headers and configs tell already that it cannot be written."""

    def expected_bytes(self, plan: Plan) -> int:
        """Return the bytes of its weights, as well as a plan can tell."""
        return plan.nbytes

    def budget(self, plan: Plan) -> int | None:
        """Return the bytes that it may take, where densities are chosen for them as it is written."""
        return None

    # What a run asks.

    def write(self, plan: Plan, job: WriteJob) -> Weights:
        """Execute `plan` and leave the weights in the work folder. What an interrupted run finished is not made again.

        InputError: such an output cannot be made of these models.
        """
        raise NotImplementedError

    def settle(self, plan: Plan, job: WriteJob) -> Weights:
        """Write the weights; again, where values that are not finite are found only in the result."""
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
        """Return whether a file of the work folder is of the finished weights; others are left by killed attempts."""
        return name in weights.hashed or name in plan.layout.indexes

    def files(self, plan: Plan) -> Files:
        """Return every file beside weights, card, recipe and lock: config, tokenizer, processors."""
        return assets(plan)

    def finish(self, plan: Plan, folder: Path, weights: Weights, files: Files) -> tuple[Weights, tuple[str, ...]]:
        """Turn the weights in `folder` into what is left of them, before `files` are put beside; notes on it."""
        return weights, tuple(left_out(plan, files))

    def add(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """Write what is made of the finished checkpoint in `folder`; notes on it."""
        return ()

    def join(self, parts: Sequence[Mapping[str, Any]]) -> Account:
        """Return what there is to say of weights that parts of a run wrote, from their records."""
        return Account()

    # What is said of a finished run.

    def nbytes(self, plan: Plan, written: Mapping[str, Any]) -> int:
        """Return the bytes of the weights; `written` are the lock's outputs."""
        return sum(entry["size"] for name, entry in written.items() if name.endswith(".safetensors"))

    def name(self, plan: Plan) -> str:
        """Return what was made, in a few words."""
        return f"{len(plan.outputs)} tensors"

    def remarks(self, plan: Plan) -> tuple[str, ...]:
        """Return the notes that are shown when it is finished."""
        return ()

    def load_line(self, plan: Plan, folder: Path) -> str:
        """Return the line that loads the result in `folder`."""
        raise NotImplementedError

    def next_steps(self, plan: Plan, folder: Path) -> tuple[str, str]:
        """Return the line that loads the result in `folder`, and the line that checks it."""
        return f"load    {self.load_line(plan, folder)}", f"verify  deltamerge verify {folder}"

    def front_matter(self, plan: Plan) -> dict[str, object]:
        """Return the card's fields for the hub that are this kind's own."""
        return {}


def output_of(plan: Plan) -> RunOutput:
    """Return the kind of output that a plan is for."""
    found = output_kind(plan.recipe.output, own_weights=plan.pruned_adapter is not None)
    assert isinstance(found, RunOutput)
    return found
