"""The files that a run reads: hashed and checked beside the work, and what of models must hold before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deltamerge import errors
from deltamerge.files.pieces import Pieces
from deltamerge.models.hub_cache import check_blobs
from deltamerge.plan.planner import Plan
from deltamerge.run import hashes
from deltamerge.run.lock import Lock
from deltamerge.run.partition import Part
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InputFiles:
    """The files that a run of `plan`, or of one part of it, reads. `pieces` are the hashes of what has been read;
    `checked` ends when files of the hub's cache are found to be what the hub says and transformers builds the layers
    that are stacked, `hashed` when the rest is hashed."""

    plan: Plan
    takes: hashes.Mine
    pieces: Pieces
    checked: Future[None]
    hashed: Future[None]

    @classmethod
    def begin(cls, planned: Plan, part: Part | None, copied: Iterable[Path], lock: Lock | None) -> InputFiles:
        """Check and hash them, and the files that are `copied`, from now on. VerifyError: the lock has others, of which
        a part, that reads some, cannot tell."""
        paths, takes, pieces = _files_read(planned, part, copied), (part or Part(1, 1)).takes, Pieces()
        checked = _beside(lambda: _check(paths, planned))
        if lock is not None and part is None:
            lock.check_inputs(hashes.describe_inputs(planned, planned.workers, takes, pieces))
        hashed = _beside(lambda: hashes.hash_ahead(planned, takes, pieces))
        return cls(planned, takes, pieces, checked, hashed)

    def describe(self) -> dict[str, Any]:
        """Return the entries of a lock for them, once all are hashed."""
        self.hashed.result()
        return hashes.describe_inputs(self.plan, self.plan.workers, self.takes, self.pieces)


def _check(paths: list[Path], planned: Plan) -> None:
    check_blobs(paths, planned.workers)
    if planned.stacks:
        from deltamerge.run.layers_built import check_layers_built

        check_layers_built(planned)


def check_deltas(planned: Plan) -> None:
    """Raise InputError unless every delta among the models was made from the base that it is put over.

    Its result must be what it was made for, by hash.
    """
    deltas = planned.inputs.deltas
    if not deltas:
        return
    from deltamerge.models.chain.fold import covers
    from deltamerge.models.delta_over_base import check

    made = [(c.base, c.reference) for c in planned.inputs.checkpoints if c.base is not None]
    with Reader() as reader:
        for base, reference in made:
            delta = deltas[reference]
            beside = [deltas[other] for one, other in made if one.reference == base.reference]
            if not any(covers(other, delta) for other in beside):
                with errors.context(reference):
                    check(delta, base, reader, planned.workers, planned.tile_elements)


def places(planned: Plan) -> list[tuple[str, Path]]:
    """Return every folder that is read, and whose it is."""
    lender = planned.inputs.vocabulary
    models = [*planned.inputs.checkpoints, *([lender.checkpoint] if lender is not None else [])]
    return [(c.reference, source.path) for c in models for source in c.sources]


def _files_read(planned: Plan, part: Part | None, copied: Iterable[Path]) -> list[Path]:
    """Return the files that the output depends on; of plain checkpoints only the shards that the part reads."""
    wanted = {path for _, paths in hashes.files_read(planned) for path in paths} | set(copied)
    if part is not None and not planned.stages:
        every = Graph().node("part", [task.root for task in part.of(planned).tasks])
        read = {leaf.path for leaf in every.leaves()}
        donor = planned.inputs.donor  # of which every part may read rows
        models = [c for c in planned.inputs.checkpoints if donor is None or c is not donor.checkpoint]
        plain = [c for c in models if c.adapter is None and c.base is None]
        wanted -= {path for c in plain for path in c.files if path not in read}
    return sorted(wanted)


def _beside(work: Callable[[], T]) -> Future[T]:
    """Do `work` while the run goes on; a daemon, so that a run that fails or is interrupted does not wait for it."""
    future: Future[T] = Future()

    def go() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=go, daemon=True).start()
    return future
