"""The differences between two checkpoints, tensor by tensor, or between two locks; weights are streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError, UsageError
from deltamerge.files import progress
from deltamerge.formats.delta.entry import TILE
from deltamerge.formats.weight_files import is_weights
from deltamerge.models.checkpoint import Checkpoint, decoded
from deltamerge.models.config_differences import Difference, differences, in_words
from deltamerge.models.delta_over_base import check
from deltamerge.models.matching import form_of, regrouped, shared_names
from deltamerge.models.references import Models
from deltamerge.plan.tokenizer_differences import tokenizers_apart
from deltamerge.run import lock as locks
from deltamerge.tensors.dtypes import FLOATING, PACKED, widen
from deltamerge.tensors.reader import Reader, elements
from deltamerge.tensors.tensor import TensorInfo, as_bytes


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """The difference of a tensor in B from A: Δ = b − a in float32, if both are floating.

        changed   entries whose bits differ; if the dtypes differ, entries whose values differ
        max_abs, mean_abs   of Δ over all entries; the maximum ignores NaN
        norm      ‖Δ‖ / ‖a‖
        a, b      dtype and shape, if they differ

    Figures of Δ are None for dtypes that are not floating, and if shapes differ.
    """

    name: str
    elements: int
    changed: int
    max_abs: float | None = None
    mean_abs: float | None = None
    norm: float | None = None
    a: str | None = None
    b: str | None = None


def diff(a: str, b: str, workers: int, *, pickles: bool = False) -> dict[str, Any]:
    """Return the differences between two checkpoints (folders, weight files, hub ids) or two locks (other files).

    UsageError: a checkpoint and a lock.
    """
    are_files = [Path(reference).is_file() and not is_weights(reference) for reference in (a, b)]
    if any(are_files):
        if not all(are_files):
            raise UsageError("one is a lock, the other a checkpoint", hint="give two locks, or two folders")
        return {"kind": "locks", **diff_locks(Path(a), Path(b))}
    return {"kind": "checkpoints", **diff_checkpoints(a, b, workers, pickles=pickles)}


def diff_checkpoints(a: str, b: str, workers: int, *, pickles: bool = False) -> dict[str, Any]:
    """Return the differences between two checkpoints. One may be a delta of the other.

    `tensors` are the differing tensors, the largest norm first. `config` has keys of config.json with different
    meanings, and the meanings in A and in B. `added` and `removed` are names that only B, or only A, has. There are
    also counts, the relative norm, and `tokenizers`, the differences of B's tokenizer in words.
    """
    here = Path.cwd()
    models = Models()
    first, second = (_plain(models.open(reference, here, weights=True, pickles=pickles)) for reference in (a, b))
    if second.is_delta and second.base is None:
        second, _ = models.over(second, first)
    elif first.is_delta and first.base is None:
        first, _ = models.over(first, second)
    tensors, names = shared_names([first.tensors, second.tensors], [a, b])
    named = [{n.canonical[t]: own[t] for t in own} for own, n in zip(tensors, names, strict=True)]
    form = form_of(named[0], first.tensors)
    named[1], _ = regrouped(named[1], {name: name for name in named[1]}, form)
    named[0], _ = regrouped(named[0], {name: name for name in named[0]}, form)
    shared = [name for name in named[1] if name in named[0]]
    with Reader() as reader, ThreadPoolExecutor(workers) as pool:
        for checkpoint in (first, second):
            if checkpoint.base is not None:
                with errors.context(checkpoint.reference):
                    check(models.artifact(checkpoint.path), checkpoint.base, reader, workers)
        with progress.phase("comparing", sum(named[1][name].nbytes for name in shared)) as comparing:

            def compare_one(name: str) -> tuple[TensorDifference, float, float]:
                found = _compare(reader, named[0][name], named[1][name])
                comparing.step(named[1][name].nbytes)
                return found

            found = list(pool.map(compare_one, shared))
    changes = [change for change, _, _ in found if change.changed or change.a is not None]
    changes.sort(key=lambda change: (-(math.inf if change.norm is None else change.norm), change.name))
    squares = math.fsum(square for _, square, _ in found)
    return {
        "a": a,
        "b": b,
        "tensors": [asdict(change) for change in changes],
        "added": [named[1][name].name for name in named[1] if name not in named[0]],
        "removed": [named[0][name].name for name in named[0] if name not in named[1]],
        "config": {one.key: _values(one) for one in differences([("a", first.config), ("b", second.config)])},
        "same": len(shared) - len(changes),
        "elements": sum(change.elements for change, _, _ in found),
        "changed": sum(change.changed for change, _, _ in found),
        "norm": _ratio(squares, math.fsum(of_a for _, _, of_a in found)),
        "tokenizers": tokenizers_apart(first, second),
    }


def _values(one: Difference) -> list[str]:
    """Return the meaning of a key of config.json in A and in B, in words."""
    return [in_words(one.values[name]) for name in ("a", "b")]


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    """Return a quantised checkpoint decoded, so that values are compared.

    A checkpoint that cannot be decoded is returned as it is.
    """
    try:
        return decoded(checkpoint)
    except InputError:
        return checkpoint


def _ratio(squares: float, of_a: float) -> float | None:
    """Return the ratio of two norms, from their squares. None if A is all zeros and B is not."""
    return math.sqrt(squares / of_a) if of_a else (None if squares else 0.0)


def _compare(reader: Reader, a: TensorInfo, b: TensorInfo) -> tuple[TensorDifference, float, float]:
    """Return the difference of two tensors, Σ Δ² and Σ a²."""
    if a.dtype == b.dtype and a.shape == b.shape and b.dtype in PACKED:  # compared byte by byte
        a, b = (replace(info, tensor=as_bytes(info.tensor)) for info in (a, b))
    size = math.prod(b.shape)
    differ = (a.dtype, a.shape) != (b.dtype, b.shape)
    kinds = (f"{a.dtype} {list(a.shape)}", f"{b.dtype} {list(b.shape)}") if differ else (None, None)
    floating = {a.dtype, b.dtype} <= FLOATING
    if a.shape != b.shape or (a.dtype != b.dtype and not floating):
        return TensorDifference(b.name, size, size, None, None, None, *kinds), 0.0, 0.0
    changed, largest = 0, 0.0
    sums: list[tuple[float, float, float]] = []
    for x, y in _tiles(reader, a, b):
        if not floating:
            changed += int(np.count_nonzero(x != y))
            continue
        old, new = widen(x, a.dtype), widen(y, b.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            changed += int(np.count_nonzero(x != y if a.dtype == b.dtype else old != new))
            delta = np.abs(new - old).astype(np.float64)
            largest = float(np.fmax.reduce(delta, axis=None, initial=largest))  # without NaN
            squares, of_a = np.square(delta).sum(), np.square(old, dtype=np.float64).sum()
            sums.append((float(delta.sum()), float(squares), float(of_a)))
    if not floating:
        return TensorDifference(b.name, size, changed, None, None, None, *kinds), 0.0, 0.0
    total, square, of_old = (math.fsum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0, 0.0)
    mean = total / size if size else 0.0
    return TensorDifference(b.name, size, changed, largest, mean, _ratio(square, of_old), *kinds), square, of_old


def _tiles(reader: Reader, a: TensorInfo, b: TensorInfo) -> Iterator[tuple[Any, Any]]:
    read_a, read_b, size = elements(reader, a), elements(reader, b), math.prod(b.shape)
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        yield read_a(start, stop), read_b(start, stop)


def diff_locks(a: Path, b: Path) -> dict[str, Any]:
    """Return `changes`: key path -> [in A, in B]. None: absent. Files are compared by hash, q's by value."""
    first, second = (dict(_flat(locks.read_lock(path))) for path in (a, b))
    if first.keys().isdisjoint(second):
        raise InputError(f"{a} and {b} have nothing in common")
    keys = [*first, *(key for key in second if key not in first)]
    changes = {key: [first.get(key), second.get(key)] for key in keys if first.get(key) != second.get(key)}
    return {"a": str(a), "b": str(b), "changes": changes}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield leaves by their path. A file's hash and size are one leaf, and a list is one."""
    if isinstance(value, dict) and value.keys() == {"hash", "size"}:
        yield path, value["hash"]
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}: {key}" if path else str(key))
    else:
        yield path, value
