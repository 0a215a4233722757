"""The weights of a run: the values before the first tile, then whatever kind of output the recipe asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deltamerge.engine.execute import shared_values
from deltamerge.errors import InputError, OutputError
from deltamerge.errors.shown import some
from deltamerge.files.descriptors import writing
from deltamerge.files.pieces import Pieces
from deltamerge.files.work_folder import CALIBRATION, SPOOL, Workspace
from deltamerge.formats.audit import NonFinite
from deltamerge.outputs.output import Job, Weights, output_of
from deltamerge.plan.planner import Plan
from deltamerge.run.lock import Lock
from deltamerge.run.options import Options
from deltamerge.run.partition import Part, shared_calibration
from deltamerge.tensors.graph import Node, function_of


def make_weights(
    planned: Plan, work: Workspace, options: Options, part: Part | None, facts: Mapping[str, Any], pieces: Pieces
) -> Weights:
    """Write the weights of `planned`, or the shards of one `part`, to the work folder.

    `pieces` are told the hashes of what is read. What an interrupted run finished is kept, but for a budget, which
    tries sizes. Calibrated q's and the densities of a budget are those of the lock in `options`, if there is one.
    """
    alone = part is None or part.index == 0

    @contextmanager
    def values(plan: Plan) -> Iterator[dict[Node, Any]]:
        with _rows(plan, work) as rows:
            yield {**rows, **calibrated(plan, work, options.lock, facts, alone=alone, known=rows)}

    files = part.files(planned.layout) if part else None
    return output_of(planned).settle(planned, Job(work, pieces, values, options.merging, options.lock, files))


@contextmanager
def _rows(planned: Plan, work: Workspace) -> Iterator[dict[Node, Any]]:
    """Give what the merge method needs of every model's rows, by its node.

    Its files lie in the work folder meanwhile.
    """
    if (node := planned.rows) is None:
        yield {}
        return
    folder = work.state / SPOOL
    with writing():
        folder.mkdir(exist_ok=True)
    known = shared_values(node.inputs, {})
    given = [known[source] for source in node.inputs]
    found = function_of(node.function)(*given, folder=folder, **dict(node.parameters))
    try:
        yield {**known, node: found}
    finally:
        found.remove()


def calibrated(
    planned: Plan,
    work: Workspace,
    lock: Lock | None,
    facts: Mapping[str, Any],
    *,
    alone: bool,
    known: Mapping[Node, Any],
) -> dict[Node, Any]:
    """Return the calibrated q's, and a mixture's routers.

    They are an interrupted run's own, or part 0's, or the lock's; if `alone`, they are calculated now and kept.
    """
    if not planned.chosen:
        return {}
    own = work.state / CALIBRATION
    if any("calibrated" in record for record in work.journal.records) or shared_calibration(work, facts):
        lock = Lock.read(own)
    if lock is not None:
        return dict(lock.calibrated(planned))
    if not alone:
        made, command = ("calibrates q", "calibrate") if planned.stages else ("makes routers", "lock")
        raise InputError(
            f"--part: the recipe {made}, which all parts must share",
            hint=f"run `deltamerge {command} RECIPE` once, then every part and --finish with --locked",
        )
    found = shared_values(planned.chosen, known)
    own_lock = Lock.of(own, planned, {}, found)
    own_lock.write_rows()
    own_lock.write()
    work.journal.append({"calibrated": True})
    return found


def check_finite(planned: Plan, nonfinite: Mapping[str, NonFinite], *, allow: bool) -> None:
    """Raise OutputError naming the tensors that hold NaN or infinities, unless they are allowed."""
    if not nonfinite or allow:
        return
    dtypes = {output.name: output.dtype for output in planned.outputs}
    half = any(dtypes[name] == "F16" and count.inf for name, count in nonfinite.items())
    advice = "float16 ends at 65504, give `dtype: bfloat16`; or keep them" if half else "keep them"
    raise OutputError(describe_nonfinite(nonfinite), hint=f"{advice} with --allow-nonfinite")


def describe_nonfinite(nonfinite: Mapping[str, NonFinite]) -> str:
    """Return which tensors hold how much that is not finite, in a line."""
    named = [f"{n} ({', '.join(f'{x} {k}' for k, x in (('NaN', c.nan), ('inf', c.inf)) if x)})"
             for n, c in sorted(nonfinite.items())]  # fmt: skip
    return f"values that are not finite in {some(named, 8)}"
