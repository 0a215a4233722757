"""The options of a run, beside its recipe."""

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
"""Gets the plan before the first byte, and returns a function that gets the number of bytes done."""

Draw: TypeAlias = "Callable[[Plan, Path, Run], dict[str, str]]"
"""Writes pictures of the finished weights into a folder, with the record of their q's. Returns names and captions."""

Drawing: TypeAlias = Callable[[Plan, bool], Draw]
"""Returns the drawer of a plan's pictures. With True it may read calibration rows. InputError: it cannot draw them."""


def unwatched(_: Plan) -> Callable[[int], None]:
    return lambda _: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a recipe is planned and run.

    device           where tiles are computed: auto (the first GPU, for work that it does faster), cpu, cuda (the
                     first), cuda:N, cuda:N,M or cuda:all
    workers          threads; None: one for each core, or as many as `memory` is enough for
    memory           a cap in bytes; None: no cap
    resume           continue an interrupted run with the same inputs; the default without `force`
    force            make the result again even if it is up to date; replace a target of another recipe or command, or
                     one that was changed
    lock             inputs must equal the inputs of this lock, and q's and densities are taken from it
    allow_nonfinite  keep NaN and infinities in the result
    pickles          read torch's own files where there are no safetensors, as a recipe with `pickles: true` does
    pins             a stranger's recipe: the commits of hub models that it names without a revision; the
                     `output.path` of its documents is not followed
    watch            follows the progress of a plan
    ending           gets the folder when its weights are written, before its lock; may add files, or refuse it
    drawing          draws the pictures of the card; None: no pictures
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

    def __post_init__(self) -> None:
        if self.memory is not None and not isinstance(self.memory, int):
            raise UsageError(f"memory={self.memory!r}: must be bytes", hint="memory=2 * 10**9")

    @property
    def goes_on(self) -> bool:
        """Whether to continue an interrupted run."""
        return not self.force if self.resume is None else self.resume

    @property
    def planning(self) -> PlanOptions:
        """The options that the plan depends on. UsageError: no such device, or too many workers."""
        if self.workers is not None and self.workers > MOST_WORKERS:
            raise UsageError(f"{self.workers} workers: more than {MOST_WORKERS}", hint="as many as there are cores")
        return PlanOptions(
            device=choose_device(self.device),
            workers=self.workers or default_workers(),
            fewer=self.workers is None,
            memory=self.memory,
            data=self.lock is None,
        )

    @contextmanager
    def merging(self, plan: Plan) -> Iterator[Callable[[int], None]]:
        """Open the phase in which the result of a plan is written. Yield the function that gets the bytes done."""
        told = self.watch(plan)
        with progress.phase("merging", plan.made_bytes) as one:

            def tell(nbytes: int) -> None:
                one.step(nbytes)
                told(nbytes)

            yield tell


def choose_device(device: str) -> str:
    """Return the device of a plan, without an import of torch. UsageError: no such device.

    "auto" stays on a machine with an NVIDIA device: its GPU gets the work that it does faster (`backends.choose`). On
    other machines it becomes the CPU.
    """
    if not DEVICES.fullmatch(device):
        raise UsageError(f"--device {device}: no such device", hint="auto, cpu, cuda, cuda:N, cuda:N,M or cuda:all")
    return "cpu" if device == AUTO and not shows_gpu() else device


def shows_gpu() -> bool:
    """Return whether the machine shows an NVIDIA device. Whether torch sees it is found out at first use."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
