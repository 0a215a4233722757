"""What a run is told beside its recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from deltamerge.engine.devices import AUTO
from deltamerge.engine.execute import default_workers
from deltamerge.errors import UsageError
from deltamerge.files import progress
from deltamerge.plan.planner import Plan, PlanOptions

if TYPE_CHECKING:
    from deltamerge.run.calibration_record import Run
    from deltamerge.run.lock import Lock

MOST_WORKERS = 1024
DEVICES = re.compile(r"auto|cpu|cuda(:([0-9]{1,9}(,[0-9]{1,9}){0,63}|all))?")

Watch = Callable[[Plan], Callable[[int], None]]
"""Is given the plan before the first byte; what it returns is told the bytes done."""

Draw: TypeAlias = "Callable[[Plan, Path, Run], dict[str, str]]"
"""Writes pictures of the finished weights in a folder, whose q's were chosen so; their names and captions."""

Drawing: TypeAlias = Callable[[Plan, bool], Draw]
"""What draws the pictures of a plan; with True calibration rows may be read. InputError: it cannot draw them."""


def unwatched(_: Plan) -> Callable[[int], None]:
    return lambda _: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a recipe is planned and run.

    device           where tiles are computed: auto (the first GPU, if there is one, what it does faster), cpu, cuda
                     (the first), cuda:N, cuda:N,M or cuda:all
    workers          threads; None: as many as there are cores
    memory           a cap in bytes; None: none
    resume           go on where an interrupted run with the same inputs stopped; by default unless `force`
    force            make it again where it is up to date; replace a target that another recipe or command made, or that
                     someone changed
    lock             inputs must be those of this lock, and q's and densities are taken from it
    allow_nonfinite  keep NaN and infinities in the result
    pickles          read torch's own files where there are no safetensors, as a recipe with `pickles: true` does
    pins             a stranger's recipe: the commits of hub models that it names without a revision; the
                     `output.path` of its documents is not followed
    watch            sees the plan and how far the work is
    ending           is given the folder once its weights are there, before its lock; may add to it, or refuse it
    drawing          draws the pictures of the card; None: it has none
    """

    device: str = "auto"
    workers: int | None = None
    memory: int | None = None
    resume: bool | None = None
    force: bool = False
    lock: Lock | None = None
    allow_nonfinite: bool = False
    pickles: bool = False
    pins: Mapping[str, str] | None = None
    watch: Watch = unwatched
    ending: Callable[[Path], None] | None = None
    drawing: Drawing | None = None

    @property
    def goes_on(self) -> bool:
        """Whether the work of an interrupted run is taken up."""
        return not self.force if self.resume is None else self.resume

    @property
    def planning(self) -> PlanOptions:
        """What of it the plan depends on. UsageError: no such device, or too many workers."""
        if self.workers is not None and self.workers > MOST_WORKERS:
            raise UsageError(f"{self.workers} workers: more than {MOST_WORKERS}", hint="as many as there are cores")
        return PlanOptions(
            device=choose_device(self.device),
            workers=self.workers or default_workers(),
            memory=self.memory,
            data=self.lock is None,
        )

    @contextmanager
    def merging(self, plan: Plan) -> Iterator[Callable[[int], None]]:
        """Open the phase in which the result of a plan is written; give what is to be told the bytes done."""
        told = self.watch(plan)
        with progress.phase("merging", plan.made_bytes) as one:

            def tell(nbytes: int) -> None:
                one.step(nbytes)
                told(nbytes)

            yield tell


def choose_device(device: str) -> str:
    """Return the device of a plan, without an import of torch. UsageError: no such device.

    "auto" stays where the machine shows an NVIDIA device: its GPU then does what it does faster (`backends.choose`).
    Elsewhere it is the CPU.
    """
    if not DEVICES.fullmatch(device):
        raise UsageError(f"--device {device}: no such device", hint="auto, cpu, cuda, cuda:N, cuda:N,M or cuda:all")
    return "cpu" if device == AUTO and not shows_gpu() else device


def shows_gpu() -> bool:
    """Return whether the machine shows an NVIDIA device. Whether torch sees it is found out when it is used."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
