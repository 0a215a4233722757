"""Inputs and results of the calibration stages of a graph, as plain data; `calibrate.stage` has the functions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.methods.registry import PRUNE
from deltamerge.recipe.schema import CalibratedQ, Calibration
from deltamerge.tensors.names import (
    EMBEDDING,
    TASK_HEAD,
    Shaped,
    block_sizes,
    is_linear,
    is_stacked,
    is_unscaled,
    numbers_as_stars,
    outside_blocks,
    resident_size,
)
from deltamerge.tensors.tensor import Tensor, TensorInfo

Precision = Literal["float32", "bfloat16"]
CPU_INFO = Path("/proc/cpuinfo")
FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})  # x86's two, and ARM's
LARGE = 50_000_000  # parameters from which products, not the calls around them, take the time


def precision_of(asked: str, device: str, tensors: Iterable[Shaped]) -> Precision:
    """Return the precision of `calibration.precision`. `auto` is bfloat16 for a large model on a device with fast
    bfloat16."""
    if asked != "auto":
        return "bfloat16" if asked == "bfloat16" else "float32"
    large = sum(math.prod(tensor.shape) for tensor in tensors) >= LARGE
    return "bfloat16" if large and fast_bfloat16(device) else "float32"


def fast_bfloat16(device: str) -> bool:
    """Tell whether a device multiplies matrices of bfloat16 faster than of float32: GPUs, and CPUs that say so."""
    return device != "cpu" or bool(FLAGS & _flags(CPU_INFO))


@cache
def _flags(path: Path) -> frozenset[str]:
    """Return the flags of the first processor."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, "").split())


QValue = float | NDArray[np.float32]
UNSCALED = "vectors and embeddings are not rescaled"
OTHER = "no weight of a linear layer"
UNSEEN = "a linear layer that no row reached"
SHOWN = 8  # patterns of tensors in a message
EVALUATIONS = 20
STEPS = 40
ROUNDED = 6  # significant digits of a q in a lock
HELD_OUT = 200  # held-out rows at most; more where more rows are searched on
ROUND = 25  # held-out rows of a round of comparisons
LAST_ROUND = 2  # rounds at most where candidates differ by one number
CLOSER = 3  # further candidates, each between two others, of a search that ended at the base's predictions
MORE_ROUNDS = 4  # further candidates for a random mask whose q is searched by predictions
SCANNED = 8  # points of a search's first round, on a quarter of the rows
SHORTLIST = 4  # minima of a search that are compared on held-out rows,
MINIMA = 2  # and of a model of the output change
PASSED = 1 + SCANNED  # the base, and further points compared where a metric finds nothing better than the base
WALKED = 4  # candidates in one walk through the blocks; their hidden states are held
STEP_ROWS = 64  # rows of a step of learned scales
COEFFICIENT_STEP = 32  # rows of each fine-tune in a step of coefficients
FITTED_PASSES = 30  # over each fine-tune's rows, to fit coefficients
VARIED_PASSES = 150  # the same where rows are varied
VARIED_OPERATIONS = 5e14  # of these passes: about an hour of two cores. Where they take more, rows are not varied
KEPT_WEIGHT = 0.05  # of the base's rows beside a fine-tune's
STATES_BYTES = 1 << 29  # of the hidden states, before every block, of the rows that go back together
STOP_SHARE = 0.2  # share of the search rows that decide when learning stops
CACHE_BYTES = 1 << 31  # bytes of cached masks; further masks are drawn again
SPARSE_BELOW = 1 / 3  # share of entries below which positions (int32) and values are handled faster than the tensor
# anonymous memory with torch, transformers and a tokenizer loaded, and room for one layer's activations, measured
BASELINE_BYTES = 400_000_000
# freed blocks that wait in the heap for the next layer: at most half of the temporary memory; measured at 135 M
WAITING_BYTES = 1 << 28
HELD = 6  # bytes that a block holds for its backward pass, of each token and each input and output of its layers


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Name, shape and bytes of a model's tensor. The tensor itself is an input of the stage."""

    name: str
    shape: tuple[int, ...]
    nbytes: int


def headers(tensors: Iterable[TensorInfo]) -> tuple[TensorHeader, ...]:
    """Return the headers of tensors."""
    return tuple([TensorHeader(one.name, one.shape, one.nbytes) for one in tensors])


@dataclass(frozen=True, slots=True)
class CalibrationInput:
    """A fine-tune and the data that it runs on.

    tensors   all of the fine-tune's
    pairs     the pruned ones, cut to the rows that the base has too
    cache     bytes of masks that are kept
    share     how many fine-tunes are on a device at one time
    tokens    whether it answers with tokens, as language models do
    """

    model: str
    checkpoint: Path
    tensors: tuple[TensorHeader, ...]
    pairs: tuple[TensorHeader, ...]
    calibration: Calibration
    folder: Path
    seed: int
    device: str
    labelled: bool
    cache: int = CACHE_BYTES
    share: int = 1
    tokens: bool = False

    @property
    def precision(self) -> Precision:
        """Return the precision of the products of its forward passes."""
        return precision_of(self.calibration.precision, self.device, self.tensors)


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned tensor.

    name      in the output
    stored    in the fine-tune
    shape     its own
    density   of its masks
    plain     its q without calibration: the density for random masks, 1 for importance masks
    masks     how many inputs of the stage are its mask ∘ Δ, unscaled: one for each mask seed, or delta of a merge
    guarded   whether an input has the columns that its masks leave out and that stay whole
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    density: float
    plain: float
    masks: int = 1
    guarded: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ModelTensors:
    """The tensors that calibration reads of a fine-tune, by its names.

    own         all of its own
    pairs       of each pruned one its own and the base's
    masks       of each mask seed, or delta of a merge, the masked deltas
    protected   the columns that masks leave out
    """

    own: Mapping[str, Tensor]
    pairs: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: tuple[Mapping[str, Tensor], ...] = ()
    protected: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, own: Iterable[TensorInfo], pairs: Iterable[tuple[TensorInfo, TensorInfo]] = ()) -> ModelTensors:
        """Return a fine-tune's tensors, and its pairs."""
        return cls({t.name: t.tensor for t in own}, {t.name: (t.tensor, base.tensor) for t, base in pairs})

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Return the last inputs of a stage that runs the fine-tune: `own` and `pairs`."""
        return (*self.own.values(), *(tensor for pair in self.pairs.values() for tensor in pair))


def models_of(inputs: Sequence[Tensor], sources: Sequence[CalibrationInput]) -> list[ModelTensors]:
    """Return the tensors of the models that a stage runs. They are its last inputs, see `ModelTensors.inputs`."""
    count = sum(len(source.tensors) + 2 * len(source.pairs) for source in sources)
    last = iter(inputs[len(inputs) - count :])
    return [
        ModelTensors({t.name: next(last) for t in s.tensors}, {t.name: (next(last), next(last)) for t in s.pairs})
        for s in sources
    ]


def masked(inputs: Sequence[Tensor], pruned: Sequence[Pruned], count: int) -> tuple[dict[str, Tensor], ...]:
    """Return the masked deltas that are a stage's first inputs, `count` for each of `pruned`, by its names."""
    return tuple({one.stored: inputs[count * i + k] for i, one in enumerate(pruned)} for k in range(count))


@dataclass(frozen=True, slots=True)
class Share:
    """A fine-tune of a merge that is calibrated as a whole; its masked deltas are the merged ones."""

    source: CalibrationInput
    pruned: tuple[Pruned, ...] = ()


@dataclass(frozen=True, slots=True)
class Spec:
    """A search for q: which tensors it divides, and how it is searched.

    The inputs of its stage are: the masked deltas of each of `pruned`, one for each seed; the columns of guarded
    tensors; `shared` measurements and thresholds that the masks need; and the tensors of the fine-tunes that run.

    With `parts` it is the factor of a merge's λ: q divides the merged delta, and the objective is the sum over
    fine-tunes. With `coefficients`, the names of deltas, a tensor's masked deltas are these deltas. Each is multiplied
    by a number that is fitted, beginning at `starts`, for each model, layer or row, which is the scope. `differences`
    of them are plain differences of two files. With `base_weight` the last part is the base itself, on rows of its own,
    which count so much beside a fine-tune's.
    """

    source: CalibrationInput
    method: str
    pruned: tuple[Pruned, ...]
    random: bool
    objective: str
    scope: str
    search: str
    bounds: tuple[float, float] | None
    shared: int = 0
    parts: tuple[Share, ...] = ()
    coefficients: tuple[str, ...] = ()
    starts: tuple[float, ...] = ()
    differences: int = 0
    base_weight: float = 0.0

    @property
    def seeds(self) -> int:
        """Return the number of masks that the search averages over."""
        return 1 if self.coefficients else self.pruned[0].masks

    def models(self, inputs: Sequence[Tensor]) -> list[ModelTensors]:
        """Return the tensors of the fine-tunes from the inputs of the stage."""
        first = sum(one.masks for one in self.pruned)
        columns = dict(zip((one.stored for one in self.pruned if one.guarded), inputs[first:], strict=False))
        own = [part.pruned for part in self.parts] or [self.pruned]
        return [
            replace(model, masks=masked(inputs, some, self.pruned[0].masks), protected=columns)
            for model, some in zip(models_of(inputs, self.sources), own, strict=True)
        ]

    def shared_inputs(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the measurements and thresholds that the masks need."""
        first = sum(one.masks + one.guarded for one in self.pruned)
        return inputs[first : first + self.shared]

    @property
    def passes(self) -> int:
        """Return the most forward passes over the calibration rows; a backward pass counts as two."""
        if self.coefficients:
            return (VARIED_PASSES if self.varies else FITTED_PASSES) * len(self.parts)
        return math.ceil(max(map(sum, self._cases)))

    @property
    def varies(self) -> bool:
        """Tell whether data is varied to fit coefficients. The many factors of rows fit a classifier's few texts or
        pictures by heart."""
        if not self.coefficients or self.scope != "row" or self.source.tokens:
            return False
        apart, _ = products({tensor.name: tensor.shape for tensor in self.source.tensors})
        tokens = self.source.calibration.sequences * self.source.calibration.length
        return VARIED_PASSES * len(self.parts) * 2 * apart * tokens <= VARIED_OPERATIONS

    @property
    def _cases(self) -> tuple[tuple[float, float], ...]:
        """Return the most passes of the search, and of its comparison on held-out rows, for each possible case.

        One q is searched by a model of the output change, or by predictions. The plain choice takes extra passes if no
        point of the first round equals it.
        """
        rows, how = self.source.calibration.sequences, (self.objective, self.scope, self.search)
        if how != ("output_change", "global", "auto") or self.source.labelled or self.parts:
            return ((self._searching(rows), self._judging(rows)),)
        two, one, more = min(self.seeds, 2), ROUND / rows, LAST_ROUND - 1
        first = 1 + (SCANNED + 1) * max(1, rows // 4) / rows + (two if self.random or self.bounds else 0)
        closer, further = (1, MORE_ROUNDS) if self.random else (CLOSER, 0)
        by_predictions = 2 + SCANNED - 1 + closer + 5 * more + 4 * further
        return (first + 3 * self.seeds + two, (2 + MINIMA) * (1 + more) * one), (first, by_predictions * one)

    def _searching(self, rows: int) -> float:
        """Return the passes of the search; the fine-tune's outputs and the plain choice's objective are among them."""
        few, two = SCANNED * max(1, rows // 4) / rows, min(self.seeds, 2)
        by_model = few + 3 * self.seeds + two  # three points for every mask, and a fourth for two of them
        one = by_model if self.objective == "output_change" else self.seeds * EVALUATIONS
        if self.parts:
            return len(self.parts) * (1 + one + self.seeds)
        if self.objective == "layer_mse":
            return 2
        if self.search == "gradient":
            stops = STOP_SHARE * (STEPS + SHORTLIST + 3) + 1
            return 3 + by_model + math.ceil(3 * STEPS * min(STEP_ROWS, rows) / rows + stops)
        if self.search == "grid":
            low, high = self.bounds or (min(pruned.density for pruned in self.pruned), 1.0)
            found = math.ceil((high - low) / grid_step(low)) + EVALUATIONS
            one = self.seeds * (found if self.scope == "global" else EVALUATIONS)
        families = 2 if self.random and self.scope != "global" else 1
        statistics = 0 if self.scope == "global" else 1
        return 1 + statistics + families * one + self.seeds

    @property
    def _whole_passes(self) -> int:
        """Return the most passes that need all logits: an output change is of a few of them."""
        if self.coefficients or self.search == "gradient" or self.objective == "validation":
            return self.passes
        return min(self.passes, math.ceil(1 + max(judging for _, judging in self._cases)))

    def _judging(self, rows: int) -> float:
        """Return the passes of a comparison on held-out rows: the fine-tune, the plain choice, candidates, the base."""
        held = max(HELD_OUT, rows)
        if self.parts or self.source.labelled:
            return (len(self.parts) * (SHORTLIST + 2) or 3 + SHORTLIST + PASSED) * held / rows
        if self.scope == "global" and self.search != "gradient":
            return (2 + SHORTLIST) * ROUND * LAST_ROUND / rows
        return ((3 + SHORTLIST) * ROUND + (2 + SHORTLIST) * (held - ROUND)) / rows

    @property
    def name(self) -> str:
        """Return the stage's key in a lock."""
        return "merge" if self.parts else self.source.model

    @property
    def memory(self) -> int:
        """Return about the anonymous bytes that the stage takes beside BASELINE_BYTES."""
        parts = self.parts or (Share(self.source, self.pruned),)
        if self.runs_together:  # one model walks at a time, and reads the deltas of all
            return self._states_bytes + memory(parts[0], dense=self._dense, held=self._held)
        shared = self._shared_bytes if self.shares_weights else 0
        return shared + memory(*parts, dense=self._dense, held=self._held)

    @property
    def _states_bytes(self) -> int:
        """Return the bytes of the hidden states before every block, of a batch at least, of a step at most."""
        shapes = {tensor.name: tensor.shape for tensor in self.source.tensors}
        blocks = len(block_sizes(shapes, {name: math.prod(shape) for name, shape in shapes.items()}))
        of_row = 4 * width(self.source) * blocks * self.source.calibration.length
        rows = min(COEFFICIENT_STEP, self.source.calibration.sequences)
        return min(len(self.parts) * rows * of_row, max(STATES_BYTES, COEFFICIENT_STEP * of_row))

    @property
    def runs_together(self) -> bool:
        """Tell whether rows of all fine-tunes run at once to fit coefficients: of language models merged whole. Not on
        GPUs, where the sums would depend on their number."""
        if not self.coefficients or self.source.device != "cpu":
            return False
        names = [{tensor.name for tensor in part.source.tensors} for part in self.parts]
        if any(
            own != names[0] or own != {one.stored for one in part.pruned}
            for own, part in zip(names, self.parts, strict=True)
        ):
            return False
        return any(EMBEDDING.search(name) for name in names[0]) and not any("encoder" in name for name in names[0])

    @property
    def shares_weights(self) -> bool:
        """Tell whether fine-tunes share merged weights and gradients, 8 bytes an entry, when coefficients are fitted.

        They do if there is room beside the deltas. They do not on GPUs, where the sums would depend on their number.
        """
        if not self.coefficients or self.source.device != "cpu" or self.runs_together:
            return False
        return self._shared_bytes + self._held * mask_bytes(self.pruned, self._dense) <= self.source.cache

    @property
    def _shared_bytes(self) -> int:
        """Return the bytes of merged weights and their gradients, in float32."""
        return 8 * sum(math.prod(one.shape) for one in self.pruned)

    @property
    def halved(self) -> bool:
        """Tell whether deltas with coefficients are kept in bfloat16, to which their sum is rounded for products."""
        return bool(self.coefficients) and self.source.precision == "bfloat16"

    @property
    def _dense(self) -> int:
        """Return the bytes of an entry of a dense masked delta."""
        return 2 if self.halved else 4

    @property
    def _held(self) -> float:
        """Return the share of masked deltas that are kept: differences of files are read anew where `halved`."""
        anew = self.differences if self.halved and self.source.device == "cpu" else 0
        return 1 - anew / max(1, len(self.coefficients))

    @property
    def sources(self) -> tuple[CalibrationInput, ...]:
        """Return the fine-tunes that run."""
        return tuple(part.source for part in self.parts) or (self.source,)

    @property
    def not_calibrated(self) -> list[dict[str, Any]]:
        """Return the tensors without a q of their own, as names and shapes predict, by pattern, and their q."""
        if self.parts or self.search == "gradient":
            return []
        others = ((p, is_unscaled(p.stored, p.shape)) for p in self.pruned if not _is_layer(p.stored, p.shape))
        return grouped((p.name, 1.0, UNSCALED) if unscaled else (p.name, p.plain, OTHER) for p, unscaled in others)

    @property
    def remark(self) -> str:
        """Return a message about the tensors without a q of their own; "" if there are none."""
        words = in_words(self.not_calibrated)
        return f"calibration of {self.name}: {words}" if words else ""

    def describe(self) -> dict[str, Any]:
        """Return the stage as `deltamerge plan --json` prints it."""
        calibration = self.source.calibration
        tokens = calibration.sequences * calibration.length
        apart, head = products({tensor.name: tensor.shape for tensor in self.source.tensors})
        return {
            "model": self.name,
            "objective": self.objective,
            "scope": self.scope,
            "search": self.search,
            "tensors": len(self.pruned),
            "not_calibrated": self.not_calibrated,
            "mask_seeds": self.seeds,
            "sequences": calibration.sequences,
            "length": calibration.length,
            "precision": self.source.precision,
            "forward_passes": self.passes,
            "operations": 2 * apart * tokens,
            "head_operations": 2 * head * tokens,
            "head_passes": self._whole_passes,
            "memory": self.memory,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """The chosen q's other than 1, by the tensor's name in the output; and the stage's record for the lock.

    Tensors that calibration does not reach have the same q as without calibration.
    """

    q: Mapping[str, QValue]
    record: dict[str, Any]

    @property
    def scalars(self) -> dict[str, float]:
        """Return the q's that are single numbers."""
        return {name: value for name, value in self.q.items() if isinstance(value, float)}

    @property
    def rows(self) -> dict[str, NDArray[np.float32]]:
        """Return the q's of output rows, as arrays that broadcast to the stored tensor."""
        return {name: value for name, value in self.q.items() if not isinstance(value, float)}


def products(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Estimate (entries multiplied for each token, entries of the head). All experts count.

    Entries of matrices count, except embeddings. Without a head, the largest embedding counts as a tied head.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) > 1}
    looked_up = {name: size for name, size in sizes.items() if EMBEDDING.search(name)}
    heads = {name: size for name, size in sizes.items() if re.search(TASK_HEAD, name)}
    head = sum(heads.values()) or max(looked_up.values(), default=0)
    return sum(size for name, size in sizes.items() if name not in {**looked_up, **heads}), head


def grouped(left: Iterable[tuple[str, float, str]]) -> list[dict[str, Any]]:
    """Return the tensors (name, q, why) without a calibrated q as patterns. Names that differ only in numbers share
    one."""
    found: dict[tuple[str, float, str], int] = {}
    for name, q, why in left:
        key = numbers_as_stars(name), q, why
        found[key] = found.get(key, 0) + 1
    return [{"tensors": pattern, "count": n, "q": q, "why": why} for (pattern, q, why), n in found.items()]


def in_words(groups: Iterable[dict[str, Any]]) -> str:
    """Return a message about the tensors that are divided as without calibration; "" if there are none."""
    some = [group for group in groups if group["why"] != UNSCALED]
    shown = [f"{g['count']} × {g['tensors']} (q = {g['q']:.4g}: {g['why']})" for g in some[:SHOWN]]
    more = f", and {len(some) - SHOWN} more patterns" if len(some) > SHOWN else ""
    return f"not calibrated, divided as without calibration: {', '.join(shown)}{more}" if shown else ""


def mask_seeds(source: CalibrationInput, method: str, q: CalibratedQ) -> int:
    """Return the number of masks that a search averages over.

    Only random masks have further seeds: the recipe's + 1, + 2, …
    """
    averaged = PRUNE[method].random and q.objective == "output_change" and q.search != "gradient"
    return source.calibration.seeds if averaged else 1


def _is_layer(name: str, shape: tuple[int, ...]) -> bool:
    return is_linear(name, shape) or is_stacked(name, shape)


def rounded(value: float) -> float:
    """Round to six significant digits, so that a lock has the very numbers that were used."""
    return float(f"{value:.{ROUNDED}g}")


def grid_step(low: float) -> float:
    """Return the step of the authors' coarse grid, which starts at `low`."""
    return min(low, 0.05)


def memory(*parts: Share, dense: int = 4, held: float = 1.0) -> int:
    """Estimate the anonymous bytes of a stage, with these fine-tunes side by side.

    They are the `held` share of the masks, at `dense` bytes an entry if dense; temporary memory of a walk; and freed
    blocks that wait in the heap.
    """
    masks = sum(min(math.ceil(held * mask_bytes(part.pruned, dense)), part.source.cache) for part in parts)
    passing = sum(_passing(part.source) for part in parts)
    return masks + passing + min(passing // 2, WAITING_BYTES)


def _passing(source: CalibrationInput) -> int:
    """Return the temporary bytes of a walk.

    They are: a block as stored and in float32, the next block as stored, the hidden states of the candidates, and for
    pruned deltas the largest while it is drawn.
    """
    found = 2 * resident(source.tensors) + ahead(source.tensors) + WALKED * hidden(source)
    if source.pairs:
        found += 5 * max(math.prod(tune.shape) for tune in source.pairs)
    return found


def hidden(source: CalibrationInput) -> int:
    """Return the bytes of one candidate's hidden states, in float32."""
    rows = max(source.calibration.sequences, HELD_OUT if source.labelled else ROUND)
    return rows * source.calibration.length * width(source) * 4


def width(source: CalibrationInput) -> int:
    """Return the size of a hidden state."""
    widths = Counter(t.shape[0] for t in source.tensors if len(t.shape) == 1)  # most are of norms and outer biases
    return max(widths, key=lambda size: (widths[size], size), default=1)


def ahead(tensors: Sequence[TensorHeader]) -> int:
    """Return the bytes that are read ahead: a model's largest block, or the tensors outside its blocks, as stored."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    stored = {tensor.name: tensor.nbytes for tensor in tensors}
    return max([outside_blocks(shapes, stored), *block_sizes(shapes, stored)])


def held_weights(source: CalibrationInput) -> int:
    """Return the bytes of all weights as they are multiplied: of blocks in the precision of products."""
    shapes = {tensor.name: tensor.shape for tensor in source.tensors}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    inside = sum(block_sizes(shapes, sizes))
    return (2 if source.precision == "bfloat16" else 4) * inside + 4 * (sum(sizes.values()) - inside)


def held_rows(source: CalibrationInput, rows: int, length: int | None = None) -> int:
    """Return about the bytes of all that blocks compute of so many rows, which a backward pass takes."""
    shapes = {tensor.name: tensor.shape for tensor in source.tensors if len(tensor.shape) == 2}
    sides = block_sizes(shapes, {name: sum(shape) for name, shape in shapes.items()})
    return HELD * sum(sides) * rows * (length or source.calibration.length)


def mask_bytes(pruned: Sequence[Pruned], dense: int = 4) -> float:
    """Return the bytes of masked deltas, of `dense` bytes an entry where they are dense."""
    return sum(
        one.masks * math.prod(one.shape) * (8 * one.density if one.density < SPARSE_BELOW else dense) for one in pruned
    )


def resident(tensors: Sequence[TensorHeader]) -> int:
    """Return the bytes in float32 of a model's largest block and of tensors outside its blocks."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return resident_size(shapes, {name: 4 * math.prod(shape) for name, shape in shapes.items()})


def within(source: CalibrationInput, limit: int | None, share: int = 1) -> CalibrationInput:
    """Return the source with a cache that fits into one of `share` parts of `limit` bytes. InputError: not even an
    empty one."""
    if limit is None:
        return replace(source, cache=CACHE_BYTES // share, share=share)
    least = memory(Share(replace(source, cache=0)))
    room = (limit - BASELINE_BYTES) // share - least
    if room < 0:
        raise InputError(
            f"--memory {limit} is too little to calibrate {source.model}",
            hint=f"give at least {BASELINE_BYTES + share * least}, or lower calibration.sequences or length",
        )
    return replace(source, cache=min(room, CACHE_BYTES // share), share=share)
