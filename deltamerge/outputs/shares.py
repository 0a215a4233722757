"""A delta artifact of so many bytes: every tensor's curve, one multiplier for all, and the parts that are made.

Deltas are computed twice. The first time each is factored and counted; its factors wait in the spool of the work
folder, where a crash leaves them. The second time its parts are made for the artifact. If the artifact has too many
bytes, or far too few, the second pass is repeated with the measured sizes. With rows an artifact is made whose codes
are to be learned: it has more components, in fewer bits. It is taken if it is then nearer to the fine-tune than the
first one.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from deltamerge import errors
from deltamerge.engine.backends import single_threaded
from deltamerge.engine.execute import execute, shared_values
from deltamerge.engine.worker import Task
from deltamerge.errors import InputError, VerifyError
from deltamerge.errors.shown import human
from deltamerge.files.descriptors import writing
from deltamerge.formats.delta import trellis
from deltamerge.formats.delta.manifest import parts_bytes
from deltamerge.formats.delta.parts import EntriesPart, Part, PartSum, matrix_shape, sum_of
from deltamerge.formats.delta.tensor_writer import Spool, is_related
from deltamerge.formats.delta.writer import Summary
from deltamerge.methods.low_rank import Factors, Wanted, factor
from deltamerge.methods.prune.bits import mask_key
from deltamerge.methods.rate import (
    MOST_LEARNED,
    Choice,
    Curve,
    affordable,
    curve_of,
    histogram,
    parts_of,
    share,
)
from deltamerge.methods.registry import PRUNE
from deltamerge.models.delta_file import DeltaFile
from deltamerge.outputs.collected import Collector
from deltamerge.outputs.output import Account, LearnedArtifact
from deltamerge.plan.outputs import OutputTensor
from deltamerge.plan.planner import Plan
from deltamerge.recipe.prune import effective_prune
from deltamerge.tensors.dtypes import Array
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.names import TOKEN_HEAD
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.views import floats

if TYPE_CHECKING:
    from deltamerge.calibrate.q.codes import Codes, LearnedCodes

NEAR, TRIES = 0.99, 5
SPARE = 200  # bytes that records of learned codes may take more, compressed
# Errors of norms, biases, and tables of a few token types are the same for every token: for the squares of norms and
# biases a fine-tune of the small encoder loses about 60 times the KL that it loses for squares of weights.
FEW, SHARED = 4, 64.0  # rows or columns of such a tensor at most, and the weight of its squares
HEADERS = 700  # bytes of the manifest, of the array's header, and of the records' first lines
FORMS = ("nothing", "factors", "entries")
CODES = {kind: f"{bits}-bit trellis codes" for kind, bits in trellis.BITS.items()}


def bytes_of(planned: Plan) -> int | None:
    """Return the bytes that the artifact of a plan may take, where a method shares them out."""
    recipe = planned.recipe
    if not recipe.output.rules.patches or not recipe.fine_tunes:
        return None
    prune = effective_prune(recipe, recipe.fine_tunes[0])
    if prune.method == "none" or not PRUNE[prune.method].shares:
        return None
    return prune.size_of(planned.nbytes)


@dataclass(frozen=True, slots=True)
class TensorShare:
    """The form of a tensor in the artifact, its bytes, and the share of its squares that is lost."""

    form: str
    nbytes: int
    lost: float


@dataclass(frozen=True)
class SharesAccount(Account):
    """The use of an artifact's bytes.

    nbytes    the budget
    tensors   the share of each tensor
    lost      the share of all squares that is lost, as predicted
    length    the recipe's `length`; None: each component has its own length
    learned   the divergence of the outputs from the fine-tune's on held-out rows, before and after learning
    """

    nbytes: int
    tensors: Mapping[str, TensorShare]
    lost: float
    delta: Summary
    length: float | None = None
    learned: tuple[float, float] | None = None

    def spent(self) -> dict[str, int]:
        """Return the bytes of each form of parts, and of the rest: final values, records and headers."""
        spent: Counter[str] = Counter()
        for one in self.tensors.values():
            spent[one.form.partition(" ")[0]] += one.nbytes
        rest = self.delta.nbytes - sum(spent.values())
        return {**{form: spent[form] for form in FORMS[1:] if spent[form]}, "records and whole tensors": rest}

    def describe(self) -> dict[str, Any]:
        """Return the keys that it adds to a lock."""
        lost = float(f"{self.lost:.4g}")
        found = {"bytes": self.delta.nbytes, "spent": self.spent(), "lost": lost, "length": self.length}
        if self.learned is not None:
            before, after = (float(f"{value:.4g}") for value in self.learned)
            found["learned"] = {"divergence": {"before": before, "after": after}}
        return {"budget": found}

    def line(self) -> str:
        """Return the size, the loss, and the use of the bytes, in one line."""
        spent = ", ".join(f"{name} {human(size)}" for name, size in self.spent().items())
        said = (
            f"{self.delta.nbytes:,} of {self.nbytes:,} bytes ({spent}); {self.lost:.3g} of the delta's squares are lost"
        )
        if self.learned is None:
            return said
        before, after = self.learned
        return f"{said}; learned codes: loss on held-out rows from {before:.3g} to {after:.3g}"

    def card(self, plan: Plan) -> list[str]:
        """Return the lines on the content of the artifact."""
        origin = plan.inputs.origin
        assert origin is not None
        return ["## Delta artifact", "", f"Values to add to the base, as sums of parts: {self.line()}.", ""]

    def table(self) -> list[str]:
        """Return the table of the tensors' shares."""
        rows = [f"| {name} | {one.form} | {one.nbytes:,} | {one.lost:.3g} |" for name, one in self.tensors.items()]
        return ["## Bytes", "", "| tensor | form | bytes | lost |", "|---|---|---|---|", *rows, ""]


@dataclass(eq=False)
class ByteShares:
    """The tensors that share the bytes of an artifact: measured once, and then made for a multiplier."""

    planned: Plan
    spool: Spool
    outputs: dict[str, OutputTensor]
    nbytes: int
    known: Mapping[Node, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    made: dict[str, TensorShare] = field(default_factory=dict)
    learned: LearnedCodes | None = None
    restored: dict[str, tuple[list[Part], Array]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Number the tensors, and find the shapes of their matrices."""
        self.numbers = {name: number for number, name in enumerate(self.outputs)}
        self.shapes = {name: matrix_shape(out.shape) for name, out in self.outputs.items()}
        recipe = self.planned.recipe
        self.length = effective_prune(recipe, recipe.fine_tunes[0]).length
        self.tensors = {one.name: one for one in self.planned.budgeted if one.name in self.outputs}

    def measure(self, progress: Callable[[int], None]) -> None:
        """Factor and count the deltas that an interrupted run has not. InputError: one is not finite."""
        left = [name for name in self.outputs if not self._restored(name)]
        rank = affordable(self.shapes.values(), self.nbytes)

        def look(name: str, delta: Array) -> None:
            self._look(name, delta, rank)

        progress(sum(out.nbytes for name, out in self.outputs.items() if name not in left))
        self.run(left, look, progress)

    def run(
        self, names: list[str], use: Callable[[str, Array], None], progress: Callable[[int], None]
    ) -> dict[Node, Any]:
        """Compute deltas and hand each whole to `use`; return the values of shared nodes."""
        planned, tasks = self.planned, []
        for name in names:
            piece = self.outputs[name].pieces[0]
            assert piece.built.delta is not None
            tasks.append(Task(name, piece.built.delta, piece.backend))

        def used(name: str, delta: Array) -> None:
            use(name, delta)
            progress(self.outputs[name].nbytes)

        sink = Collector(self.shapes, self.spool.folder, used)
        with Reader() as reader, single_threaded({"torch"}):
            return execute(
                tasks,
                reader,
                sink,
                device=planned.device,
                workers=planned.workers,
                tile_elements=planned.tile_elements,
                known=self.known,
            )

    def choose(self, room: float) -> None:
        """Share out so many bytes. InputError: they are too few for the records alone."""
        names = list(self.curves)
        _, choices = share([self.curves[name] for name in names], room)
        self.choices = dict(zip(names, choices, strict=True))

    def parts(self, name: str, delta: Array) -> tuple[list[Part], Array]:
        """Make the parts of a tensor, as it was chosen."""
        choice, curve, parts = self.choices[name], self.curves[name], list[Part]()
        if name in self.restored:
            parts, stored = self.restored[name]
        elif self.learned is not None and (factors := self.learned.factors.get(self.tensors[name].tune.name)):
            part, stored = factors.store()
            parts.append(part)
        else:
            longer = None if self.length is None else choice.longer(curve.energy, self.length)
            parts, stored = parts_of(delta, choice, self._vectors(name), longer)
        lost = choice.lost / curve.energy if curve.energy else 0.0
        with self.lock:
            self.made[name] = TensorShare(_form(parts), int(stored.size), float(f"{lost:.4g}"))
        return parts, stored

    @property
    def learns(self) -> bool:
        """Whether codes of the artifact are learned: there are rows, and it is no larger than memory is planned for."""
        return bool(self.planned.measured) and self.nbytes <= MOST_LEARNED

    @property
    def has_learned(self) -> bool:
        """Whether learned codes are nearer to the fine-tune."""
        return self.learned is not None and self.learned.after < self.learned.before

    @cached_property
    def layers(self) -> frozenset[str]:
        """The layers whose codes are learned, by the fine-tune's names."""
        return frozenset(name for name in self.planned.measured[0].tensors.pairs if not TOKEN_HEAD.search(name))

    def expect_learning(self, *, learned: bool) -> None:
        """Share out bytes for codes that are learned, or that stay as they are."""
        for name, one in self.tensors.items():
            self.curves[name] = replace(self.curves[name], learned=learned and one.tune.name in self.layers)

    def stop_learning(self) -> None:
        """Take the codes that are best without rows."""
        self.expect_learning(learned=False)
        self.restored = {}
        self.learned = None if self.learned is None or self.has_learned else replace(self.learned, factors={})

    def learn(self, folder: Path, plain: Mapping[str, PartSum]) -> None:
        """Learn the codes of the layers of the artifact in `folder`, and compare it with the parts of another."""
        from deltamerge.calibrate.q.codes import learn_codes

        with Reader() as reader:
            start = self._codes(self.parts_in(folder), reader)
            if start.factors:
                self.learned = learn_codes(self.planned.measured[0], start, self._codes(plain, reader))

    def parts_in(self, folder: Path) -> dict[str, PartSum]:
        """Return the parts of the artifact in `folder`, by the fine-tune's names."""
        entries = DeltaFile.open(folder).entries
        return {
            one.tune.name: sum_of(entries[name].record.parts, entries[name].values, *self.shapes[name])
            for name, one in self.tensors.items()
        }

    def _codes(self, sums: Mapping[str, PartSum], reader: Reader) -> Codes:
        """Return an artifact's factors of layers, and the function that makes its other tensors."""
        from deltamerge.calibrate.q.codes import Codes

        stored = {one.tune.name: one for one in self.tensors.values()}

        def fixed(name: str) -> Any:
            if (one := stored.get(name)) is None:
                return None
            values = floats(reader, one.base, 0, one.size) + sums[name].values(0, one.size)
            return torch.from_numpy(np.asarray(values, np.float32)).reshape(one.base.shape)

        return Codes({name: one.factors for name, one in sums.items() if one.factors and name in self.layers}, fixed)

    def restore(self, kept: LearnedArtifact) -> None:
        """Take over the parts of an artifact whose codes were learned. VerifyError: it is not of these tensors."""
        from deltamerge.calibrate.q.codes import LearnedCodes

        entries = DeltaFile.open(kept.folder).entries
        for name in self.tensors:
            if name not in entries:
                raise VerifyError(f"{kept.folder}: has no codes of {name}", hint="run without --locked")
            record = entries[name].record
            stored = entries[name].values[: parts_bytes(record)] if record.parts else ()
            self.restored[name] = [*record.parts], np.array(stored, np.uint8)
        self.learned = LearnedCodes({}, kept.before, kept.after)

    @property
    def part_bytes(self) -> int:
        """The bytes of the parts that were made last."""
        return sum(one.nbytes for one in self.made.values())

    def account(self, summary: Summary) -> SharesAccount:
        """Return the account of the artifact that was written last."""
        learned = None if self.learned is None else (self.learned.before, self.learned.after)
        made = {name: self.made[name] for name in self.outputs}  # threads finish in any order
        return SharesAccount(self.nbytes, made, self.lost, summary, self.length, learned)

    def lost_at(self, nbytes: float) -> float:
        """Return the share of all squares that would be lost of so many bytes."""
        self.choose(nbytes)
        return self.lost

    @property
    def is_whole(self) -> bool:
        """Whether no more bytes would be taken."""
        return all(curve.choice(1e-30) == self.choices[name] for name, curve in self.curves.items())

    @property
    def lost(self) -> float:
        """The share of all squares that is lost, as predicted."""
        whole = sum(curve.energy for curve in self.curves.values())
        return sum(choice.lost for choice in self.choices.values()) / whole if whole else 0.0

    def _look(self, name: str, delta: Array, rank: int) -> None:
        m, n = self.shapes[name]
        if not np.isfinite(delta).all():
            raise InputError("its delta is not finite", hint="repair the fine-tune, or exclude the tensor from pruning")
        found: Factors | None = None
        if min(m, n) > FEW:
            key = mask_key(self.planned.recipe.seed, "budget", name)
            found = factor(delta, Wanted(min(m, n, rank)), key)
        counts, squares = _counted(delta, SHARED if min(m, n) <= FEW else 1.0)
        with writing():
            self._path(name).write_bytes(b"" if found is None else np.ascontiguousarray(found.a, np.float32).tobytes())
        state = {
            "gains": [] if found is None else found.gains.tolist(),
            "energy": float(squares.sum()), "nbytes": 0 if found is None else 4 * found.rank * n,
            "counts": counts.tolist(), "squares": squares.tolist(),
        }  # fmt: skip
        with self.lock:
            self.curves[name] = self._curve(name, state)
        self.spool.finished(f"curve {name}", self._path(name), {"bytes": state["nbytes"], "curve": state})

    def _restored(self, name: str) -> bool:
        """Take over the measurements of an interrupted run."""
        kept = self.spool.kept(f"curve {name}")
        path = self._path(name)
        if kept is None or not path.is_file() or path.stat().st_size != kept["bytes"]:
            return False
        self.curves[name] = self._curve(name, kept["curve"])
        return True

    def _curve(self, name: str, state: Mapping[str, Any]) -> Curve:
        m, n = self.shapes[name]
        counts, squares = (np.array(state[key], np.float64) for key in ("counts", "squares"))
        return curve_of(m, n, np.array(state["gains"], np.float64), float(state["energy"]), counts, squares)

    def _vectors(self, name: str) -> Array | None:
        """Return the right vectors (k, n)."""
        n, rank = self.shapes[name][1], self.curves[name].gains.size
        return np.fromfile(self._path(name), np.float32).reshape(rank, n) if rank else None

    def _path(self, name: str) -> Path:
        return self.spool.folder / f"{self.numbers[name]:07d}"


def curve(planned: Plan, sizes: Sequence[int]) -> list[tuple[int, float]]:
    """Return about the share of all squares that is lost of artifacts of so many bytes; nothing is left behind."""
    outputs, rest = shared_outputs(planned)
    with TemporaryDirectory(prefix="deltamerge-") as folder:
        spool = Spool(Path(folder), None)
        sharing = ByteShares(planned, spool, outputs, max(sizes), shared_values(planned.stages, {}))
        sharing.measure(lambda _: None)
        least = HEADERS + rest
        if min(sizes) < least:
            raise refused(planned, min(sizes), least)
        return [(nbytes, sharing.lost_at(nbytes - least)) for nbytes in sizes]


def shared_outputs(planned: Plan) -> tuple[dict[str, OutputTensor], int]:
    """Return the tensors that share the bytes of an artifact, and about the bytes of all others."""
    names = {tensor.name for tensor in planned.budgeted}
    outputs = {out.name: out for out in planned.outputs if out.name in names and _is_shared(planned, out)}
    return outputs, sum(out.delta_bytes(None) for out in planned.outputs if out.name not in outputs)


def _is_shared(planned: Plan, out: OutputTensor) -> bool:
    """Return whether a tensor's delta can be a sum of parts: it has the base's shape, and is made in one piece."""
    origin, name = planned.inputs.origin, planned.inputs.canonical.get(out.name, out.name)
    info = None if origin is None else origin.get(name)
    if info is None or not out.elements or len(out.pieces) > 1 or out.pieces[0].built.delta is None:
        return False
    return info.shape == out.shape and is_related(info.dtype, info.shape, out.dtype, out.shape)


def _counted(delta: Array, weight: float) -> tuple[Array, Array]:
    """Return the histogram of a delta, block by block of its rows."""
    m, n = delta.shape
    step = max(1, (1 << 22) // max(1, n))
    pairs = [histogram(delta[at : at + step], weight) for at in range(0, m, step)]
    counts, squares = (np.sum([pair[i] for pair in pairs], axis=0) for i in (0, 1))
    return counts, squares


def _form(parts: list[Part]) -> str:
    """Describe the parts of a tensor in a few words."""
    words = []
    for part in parts:
        if isinstance(part, EntriesPart):
            count = "all" if part.count is None else f"{part.count:,}"
            words.append(f"entries {count} of {part.levels} levels")
        else:
            ranks = ", ".join(f"{rank} of {CODES.get(levels, f'{levels} levels')}" for levels, rank in part.groups)
            words.append(f"factors of rank {part.rank}: {ranks}")
    return " and ".join(words) or FORMS[0]


def refused(planned: Plan, nbytes: int, needed: int) -> InputError:
    """Return the error of a budget that is smaller than the bytes that it needs."""
    with errors.context("prune.method budget"):
        return InputError(
            f"{nbytes:,} bytes are too few: names, hashes and tensors that stay whole take {needed:,}",
            hint="give more bytes, or prune more tensors (include, exclude)",
        )
