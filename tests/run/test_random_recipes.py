"""Random recipes through the compiled loops, through torch, and through the formulas in float64.

Both backends give the same bytes, whatever the workers and tiles; those are the formula's numbers, to within float32's
rounding and one more to the output's dtype (`reference_recipe.Wanted`). `make fuzz` runs it for a night: FUZZ / 50
recipes a merge method instead of 4, drawn anew every time.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from backend_choice import TORCH, available, computed_by
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from made_up_stages import run_with_stages
from random_recipes import Case, case, cases, norms, row_q
from raw_tensors import DIGITS, LARGEST, LEAST, Stored, read_checkpoint, stored, widened
from reference_recipe import Unsure
from running import run

from deltamerge.calibrate.spec import Calibrated
from deltamerge.errors import DeltamergeError
from deltamerge.methods.registry import MERGE

LONG = "FUZZ" in os.environ
fuzz = settings(
    max_examples=max(4, int(os.environ["FUZZ"]) // 50) if LONG else 4,
    derandomize=not LONG,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# What a recipe may be refused for that these strategies draw now and then.
REFUSALS = ("must lie in (0, 1]", "add up to 0", "is none of them", "finds no pruned weight", "needs a density")
# Those that need rows need models to run them through: tests/calibrate/test_merge_rows.py.
BUILT_IN = [name for name in MERGE.own_names() if not MERGE[name].rows]


def stage_value(node: Any) -> Any:
    """What calibration finds, made up: norms of input features, or q's of rows."""
    if node.function.endswith(":activations"):
        infos = [info for info in node.parameter("source").tensors if len(info.shape) == 2]
        return {i.name: SimpleNamespace(norm=norms(i.name, i.shape[-1]), transposed=False) for i in infos}
    pruned = node.parameter("spec").pruned
    return Calibrated({p.name: row_q(p.name, p.shape) for p in pruned}, {})


def made(case: Case, path: Path, backend: str, *, plainly: bool) -> tuple[Any, dict[str, Stored]]:
    """What is not finite, and the tensors, or the text of a refusal; `plainly`: one worker, tiles as they are."""
    out = path.parent / f"{backend}-{plainly}"
    with ExitStack() as stack:
        stack.enter_context(computed_by(backend))
        if not plainly:
            stack.enter_context(patch("deltamerge.engine.execute.TILE_ELEMENTS", case.tile))
            stack.enter_context(patch("deltamerge.engine.execute.JOB_ELEMENTS", case.job))
            stack.enter_context(patch("deltamerge.methods.prune.select.MOST", case.listed))
        workers = 1 if plainly else case.workers
        try:
            if case.calibrates:
                return run_with_stages(path, out, stage_value, workers=workers), read_checkpoint(out)
            result = run(path, out, workers=workers, allow_nonfinite=True)
        except DeltamergeError as error:
            reason = next((reason for reason in REFUSALS if reason in str(error)), None)
            if reason is None:
                raise
            return reason, {}
        return dict(result.nonfinite), read_checkpoint(out)


def difference(case: Case, folder: Path) -> str | None:
    """What is wrong with the outputs of a case; None: nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    path = case.write(folder)
    nonfinite, ours = made(case, path, available()[0], plainly=False)
    others, theirs = made(case, path, TORCH, plainly=True)
    if nonfinite != others or ours.keys() != theirs.keys():
        return f"the backends differ: {nonfinite} {sorted(ours)} and {others} {sorted(theirs)}"
    for name, (code, array) in ours.items():
        if identity((code, array)) != identity(theirs[name]):
            where = np.flatnonzero(array.reshape(-1) != theirs[name][1].reshape(-1))[:4]
            found = [widened((code, x.reshape(-1)[where])).tolist() for x in (array, theirs[name][1])]
            return f"{name}: the backends differ at {where.tolist()}: {found[0]} and {found[1]}"
    if isinstance(nonfinite, str):
        event(f"refused: {nonfinite}")
        return None
    return beyond_rounding(case, ours) if case.finite else None


def identity(tensor: Stored) -> tuple[Any, ...]:
    """What is equal where two tensors are: bytes, but for NaN, of which only bfloat16 has one."""
    code, array = tensor
    return code, array.shape, (array if code == "BF16" else np.where(np.isnan(array), np.nan, array)).tobytes()


def beyond_rounding(case: Case, ours: dict[str, Stored]) -> str | None:
    """Where the output is not the formula's."""
    reference = case.reference()
    places = {place.name: place for place in reference.places}
    if places.keys() != ours.keys():
        return f"has {sorted(ours)}, not {sorted(places)}"
    for name, (code, array) in ours.items():
        try:
            with np.errstate(all="ignore"):
                wanted = reference.made(places[name])
        except Unsure:
            event(f"unsure: {reference.method}")
            continue
        got = widened((code, array))
        if got.shape != wanted.size.shape:
            return f"{name}: has shape {got.shape}, not {wanted.size.shape}"
        wrong = np.argwhere(wanted.misses(got, DIGITS[code], LEAST[code], LARGEST[code]))
        if wrong.size or wrong.shape[0]:
            at = tuple(wrong[0])
            either = " or ".join(repr(float(value[at])) for value in wanted.either)
            return f"{name}{list(map(int, at))} and {len(wrong) - 1} more: {float(got[at])!r} is not {either}"
    return None


@pytest.mark.parametrize("method", BUILT_IN)
@fuzz
@given(st.data())
def test_recipe(tmp_path_factory: pytest.TempPathFactory, method: str, data: st.DataObject) -> None:
    drawn = data.draw(cases(method))
    note(drawn.text)
    wrong = difference(drawn, tmp_path_factory.getbasetemp() / "random recipe")
    assert wrong is None, wrong


@pytest.mark.parametrize("method", BUILT_IN)
def test_a_wrong_number_is_seen(method: str) -> None:
    """The formula's own numbers pass, and one of them 1e-5 away does not: neither is left out as unsure."""
    simple = case(lambda options: options[0], method)
    reference = simple.reference()
    outputs = {place.name: stored(reference.made(place).either[0], "F32") for place in reference.places}
    assert beyond_rounding(simple, outputs) is None
    next(iter(outputs.values()))[1].reshape(-1)[-1] += np.float32(1e-5)
    assert beyond_rounding(simple, outputs) is not None
