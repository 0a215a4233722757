"""Long sums in float64, in the order of `ops.halved`: norms and dot products of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from deltamerge.engine.fused.instructions import double, stack
from deltamerge.io.jit import compiled
from deltamerge.methods.tiles import LONGEST_ROW, RUN

_RUNS = LONGEST_ROW // RUN
_OF_HALF, _OF_RUN, _OF_SUMS = 4 * RUN, 8 * RUN, 8 * _RUNS


@compiled
def add_by_halving(part: Any, count: Any) -> Any:
    """Σ of the first `count` of `part`, which is changed and as long as a power of two that holds them."""
    half = 1
    while half < count:
        half *= 2
    for i in range(count, half):
        part[i] = 0.0
    while half > 1:
        half //= 2
        upper = part[half:]
        for i in range(half):
            part[i] += upper[i]
    return part[0]


@compiled
def norm_of_blocks(delta: Any, step: Any, kind: Any, out: Any) -> None:
    """Per block of `step` elements Σ abs (kind 1), Σ squares (2) or the largest abs (0); `LONGEST_ROW` at the most."""
    part, sums = carray(stack(_OF_RUN), RUN, np.float64), carray(stack(_OF_SUMS), _RUNS, np.float64)
    for block in range(out.size):
        values = delta[block * step : (block + 1) * step]
        if kind == 0:
            largest = abs(np.float64(values[0]))
            for i in range(values.size):
                x = abs(np.float64(values[i]))
                largest = x if x > largest or x != x else largest
            out[block] = largest
            continue
        count = (values.size + RUN - 1) // RUN
        for run in range(count):
            entries = values[run * RUN : (run + 1) * RUN]
            for i in range(entries.size):
                x = abs(np.float64(entries[i]))
                part[i] = x * x if kind == 2 else x
            sums[run] = add_by_halving(part, entries.size)
        out[block] = add_by_halving(sums, count)


@compiled
def dot_of_run(x: Any, y: Any, padded: Any) -> Any:
    """Σ x y of at most `RUN` elements, in float64, as `ops.halved`; `padded`: with zeros to all of `RUN`."""
    part = carray(stack(_OF_HALF), RUN // 2, np.float64)
    n, half = x.size, 1
    while 2 * half < n:
        half *= 2
    if n == 1:
        part[0] = double(x[0]) * double(y[0])
    else:
        upper_x, upper_y = x[half:], y[half:]
        for i in range(n - half):
            part[i] = double(x[i]) * double(y[i]) + double(upper_x[i]) * double(upper_y[i])
        for i in range(n - half, half):
            part[i] = double(x[i]) * double(y[i]) + 0.0
    total = add_by_halving(part, half)
    return total + 0.0 if padded and 2 * half < RUN else total  # -0 and zeros are +0


@compiled
def dots_of_blocks(x: Any, y: Any, step: Any, out: Any) -> None:
    """Per block of `step` elements (`LONGEST_ROW` at the most) Σ x y in float64, as `ops.halved`."""
    sums = carray(stack(_OF_SUMS), _RUNS, np.float64)
    for block in range(out.size):
        a, b = x[block * step : (block + 1) * step], y[block * step : (block + 1) * step]
        count = (a.size + RUN - 1) // RUN
        for run in range(count):
            sums[run] = dot_of_run(a[run * RUN : (run + 1) * RUN], b[run * RUN : (run + 1) * RUN], count > 1)
        out[block] = add_by_halving(sums, count)
