"""A chain of a plain model, kept for a server that computes with its quantised checkpoint too.

Each version is a delta of codes and scales. Quantising the version's weights as a whole gives the same bytes. Only
units of rows with a changed element are coded again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from deltamerge import errors
from deltamerge.apps.train.trainer import assets_of, note_version
from deltamerge.errors import InputError, UsageError
from deltamerge.errors.shown import some
from deltamerge.files.descriptors import flat
from deltamerge.formats.delta.entry import TILE
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.tensor_writer import BaseTensor, TensorWriter
from deltamerge.formats.delta.writer import ArtifactWriter
from deltamerge.formats.quantised.coder import Coding
from deltamerge.formats.quantised.detect import keys_of
from deltamerge.formats.quantised.scheme import coding_like
from deltamerge.models.chain.folder import Named, Version, head, is_chain, line, names, open_version
from deltamerge.models.chain.mirror import BATCH, Kind, WrittenDiffs
from deltamerge.models.chain.publish import one_writer, publishing
from deltamerge.models.checkpoint import Checkpoint, decoded
from deltamerge.models.delta_file import DeltaFile
from deltamerge.models.delta_over_base import check_complete, folded
from deltamerge.models.references import open_model, open_origin
from deltamerge.outputs.delta import base_of
from deltamerge.tensors.dtypes import bits_type, widen
from deltamerge.tensors.reader import Reader, elements
from deltamerge.tensors.tensor import TensorInfo

PLAINLY = "quantise the base anew, with the nearest codes: deltamerge convert BASE BASE-FP8 --quantization fp8"
Turn = tuple[Array | None, Iterator[Array | None]]
"""A tensor's bits before a batch of versions, None: not known; and after each, None: as before it."""


@dataclass(frozen=True, slots=True)
class _QuantisedTensor:
    """A tensor of the plain model, and its coding in the quantised checkpoint. Without a `coding` it is plain."""

    plain: TensorInfo
    stored: tuple[TensorInfo, ...]
    coding: Coding | None

    def again(self, old: Array | None, new: Array, stored: Sequence[Array], reader: Reader) -> list[Array]:
        """Return the stored parts of the bits `new`.

        old      the previous bits, with the parts `stored`; None: not known, so every unit is coded

        InputError: a value is not finite.
        """
        if self.coding is None:
            return [new]
        made = [part.view(np.uint8).copy() for part in stored]
        for unit in self.coding.units(0, new.size):
            piece = new[unit.start : unit.stop]
            if old is not None and np.array_equal(piece, old[unit.start : unit.stop]):
                continue
            values = widen(piece, self.plain.dtype).reshape(-1, self.coding.matrix[1])
            if not np.isfinite(values).all():
                raise InputError("has values that are not finite, and cannot be quantised")
            parts = self.coding.coder.encode(values, reader)[0]
            for target, (_, begin, end), part in zip(made, self.coding.places(unit), parts, strict=True):
                target[begin:end] = np.frombuffer(flat(np.ascontiguousarray(part)), np.uint8)
        return [part.view(bits_type(info.dtype)) for part, info in zip(made, self.stored, strict=True)]


class QuantisedChain:
    """A folder of versions over a quantised checkpoint, which follows a chain over the plain one.

    folder      made if missing; versions have the same names as in the plain chain
    quantised   the checkpoint: a folder or hub id
    plain       the base of the plain chain

    InputError: the checkpoint is not quantised, has a form that cannot be written, or other tensors than `plain`.
    OutputError: another process adds versions.
    """

    def __init__(self, folder: Path, quantised: str | Path, plain: Checkpoint) -> None:
        self.folder, self._named = folder, os.fspath(quantised)
        self._raw = open_model(self._named, Path.cwd(), weights=True)
        with errors.context(self._named):
            self._tensors = _tensors_of(self._raw, plain)
        changing = {info.name for one in self._tensors for info in one.stored}
        self._constant = [info for name, info in self._raw.tensors.items() if name not in changing]
        self._held: dict[str, list[Array]] | None = None
        self._lock = ExitStack()
        self._lock.enter_context(one_writer(folder, "adding"))
        self._last = self._line()[-1] if self.newest else None

    def __enter__(self) -> QuantisedChain:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def newest(self) -> int:
        """Return the number of versions."""
        return len(names(self.folder))

    def is_at(self, state: str | None) -> bool:
        """Return whether the newest version corresponds to the plain version with this `state`.

        For None: whether there is none.
        """
        return (None if self._last is None else _source(self._last)) == state

    def catch_up(self, versions: Sequence[Version], origin: Checkpoint, workers: int) -> list[WrittenDiffs]:
        """Publish the missing versions of a line over the base `origin`, and return them.

        InputError: the newest version here corresponds to none of the line; the checkpoint differs from quantising the
        base; or a version is damaged. OutputError: the disk.
        """
        first, gap = self._begin(versions)
        self._held = None
        check_complete(versions[0], origin)
        written = []
        for begin in range(first, len(versions), BATCH):
            batch = versions[begin : begin + BATCH]
            before = folded(versions[:begin]) if begin else None
            unknown = gap and begin == first
            with Reader() as reader:
                turn = partial(_turn, origin, before, reader, batch, unknown)
                written += self._publish(batch, turn, workers)
        return written

    def follow(
        self, version: Version, kinds: Mapping[str, Kind], old: Mapping[str, Array], new: Mapping[str, Array]
    ) -> None:
        """Publish the next version, from the plain model's bits before and after it.

        The quantised model stays in memory from the first call on. InputError, OutputError: as for `catch_up`.
        """
        held, self._held = self._held, None
        kept: dict[str, list[Array]] = {}
        self._publish([version], lambda name: (old[name], iter([new[name]])), 1, held, kept)
        self._held = kept

    def _begin(self, versions: Sequence[Version]) -> tuple[int, bool]:
        """Return the place in a line of the first version that is missing here, and whether there is a gap before it.

        There is a gap if the last corresponding version has been folded since. InputError: the line lacks it.
        """
        if self._last is None:
            return 0, False
        state = _source(self._last)
        for at, version in enumerate(versions):
            if version.state == state:
                return at + 1, False
            if version.note is not None and any(one.state == state for one in version.note.folded):
                return at, True
        raise InputError(
            f"{self._last.path}: is of no version of {versions[-1].path.parent}",
            hint="keep each chain in a folder of its own",
        )

    def _line(self) -> tuple[Version, ...]:
        return line(self.folder / head(self.folder)) if self.newest else ()

    def _publish(
        self,
        batch: Sequence[Version],
        turn: Callable[[str], Turn],
        workers: int,
        held: Mapping[str, list[Array]] | None = None,
        kept: dict[str, list[Array]] | None = None,
    ) -> list[WrittenDiffs]:
        """Publish a batch of versions.

        turn   gives a plain tensor before and after each version
        held   the stored parts before the batch, by plain tensor; None: they are read
        kept   gets the parts after the batch
        """
        own = self._line() if held is None else ()
        now, written, fresh = folded(own) if own else None, list[WrittenDiffs](), self._last is None
        with ExitStack() as stack:
            reader = stack.enter_context(Reader())
            ends, places = list[ExitStack](), list[_NewVersion]()
            for version in batch:
                ends.append(stack.enter_context(ExitStack()))
                folder = ends[-1].enter_context(publishing(self.folder, version.name, "adding"))
                places.append(_NewVersion(folder, ends[-1].enter_context(ArtifactWriter(folder, base_of(self._raw)))))
                for info in self._raw.tensors.values():
                    places[-1].begin(info)

            def stored(info: TensorInfo) -> Array:
                read = elements(reader, info)
                bits: Array = now.entries[info.name].whole(read) if now else read(0, math.prod(info.shape))
                return bits

            def one(tensor: _QuantisedTensor) -> None:
                name = tensor.plain.name
                parts = [*map(stored, tensor.stored)] if held is None else held[name]
                with errors.context(name):
                    old, after = turn(name)
                    if fresh and old is not None:
                        self._check(tensor, old, parts, reader)
                    for place, new in zip(places, after, strict=True):
                        made = parts if new is None else tensor.again(old, new, parts, reader)
                        for info, was, bits in zip(tensor.stored, parts, made, strict=True):
                            place.put(info.name, was, bits)
                        old, parts = old if new is None else new, made
                if kept is not None:
                    kept[name] = parts

            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(one, self._tensors))
            for info in self._constant:
                bits = stored(info)
                for place in places:
                    place.put(info.name, bits, bits)
            for version, place, end in zip(batch, places, ends, strict=True):
                summary = place.writer.finish()
                source = Named(name=version.name, state=version.state)
                step = None if version.note is None else version.note.step
                note_version(place.folder, version.name, self._last, assets_of(self._raw), step, source)
                end.close()  # published in order
                self._last = open_version(self.folder / version.name)
                changed = sum(bool(entry.record.count) for entry in self._last.delta.entries.values())
                written.append(WrittenDiffs(self._last.path, changed, summary.nbytes))
        return written

    def _check(self, tensor: _QuantisedTensor, bits: Array, stored: Sequence[Array], reader: Reader) -> None:
        """InputError: quantising the base's tensor gives other bytes than the checkpoint has."""
        made = tensor.again(None, bits, stored, reader)
        if not all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(made, stored, strict=True)):
            what = "is not the base's" if tensor.coding is None else "differs from the base's, quantised"
            raise InputError(f"{self._named}: {what}", hint=PLAINLY)


class _NewVersion:
    """A version that is being written, tensor by tensor."""

    def __init__(self, folder: Path, writer: ArtifactWriter) -> None:
        self.folder, self.writer = folder, writer
        self._tensors: dict[str, tuple[TensorWriter, list[Array]]] = {}

    def begin(self, info: TensorInfo) -> None:
        """Make the writer of a tensor; its bits before are known when it is put."""
        old: list[Array] = [np.empty(0, bits_type(info.dtype))]
        base = BaseTensor(info.name, info.dtype, tuple(info.shape), lambda start, stop: old[0][start:stop])
        self._tensors[info.name] = self.writer.tensor(info.name, info.dtype, tuple(info.shape), base), old

    def put(self, name: str, was: Array, now: Array) -> None:
        """Write a tensor, from its bits before and after."""
        writer, old = self._tensors[name]
        old[0] = was
        for start in range(0, now.size, TILE):
            writer.write(start, now[start : start + TILE])
        old[0] = was[:0]


def extract_quantised(
    chain: str, quantised: str, out: Path, *, base: str | None = None, workers: int, pickles: bool = False
) -> list[WrittenDiffs]:
    """Write the versions of a chain that `out` lacks, over the quantised checkpoint of its base; return them.

    UsageError: it is no chain. InputError, OutputError: as `QuantisedChain`.
    """
    if not is_chain(Path(chain)):
        raise UsageError(f"{chain}: is no chain of versions", hint="--quantized is for a chain: extract RUN")
    versions = line(Path(chain) / head(Path(chain)))
    origin = open_origin(base or str(versions[0].delta.manifest.base), versions[0].delta, pickles=pickles)
    with errors.context(chain), QuantisedChain(out, quantised, origin) as mirror:
        return mirror.catch_up(versions, origin, workers)


def _tensors_of(raw: Checkpoint, plain: Checkpoint) -> list[_QuantisedTensor]:
    """Return how a quantised checkpoint stores the tensors of the plain one. InputError: it has other tensors."""
    form = decoded(raw)
    scheme = form.quantised
    if scheme is None or not scheme.plain:
        raise InputError("is not quantised, or in a form that cannot be written", hint=PLAINLY)
    if other := sorted(form.tensors.keys() ^ plain.tensors.keys()):
        raise InputError(f"has other tensors than {plain.reference}: {some(other)}", hint=PLAINLY)
    settings = next((value for _, value in keys_of(raw.config) if isinstance(value, Mapping)), {})
    found = []
    for name, info in plain.tensors.items():
        theirs = form.tensors[name]
        coded = name in scheme.plain
        if tuple(theirs.shape) != tuple(info.shape) or (not coded and theirs.dtype != info.dtype):
            said = f"{theirs.dtype} {list(theirs.shape)}, in {plain.reference} {info.dtype} {list(info.shape)}"
            raise InputError(f"{name} is {said}", hint=PLAINLY)
        if not coded:
            found.append(_QuantisedTensor(info, (theirs,), None))
            continue
        parts = [scheme.stored[part] for part in scheme.weights[name]]
        with errors.context(name):
            coding = replace(coding_like(scheme.plain[name], parts, settings, name), like=None, like_parts=())
        found.append(_QuantisedTensor(info, tuple(scheme.stored[part.name] for part in coding.parts), coding))
    return found


def _turn(
    origin: Checkpoint, before: DeltaFile | None, reader: Reader, batch: Sequence[Version], unknown: bool, name: str
) -> Turn:
    """Return a tensor before and after the versions of a batch.

    `unknown`: its stored parts do not match the state before.
    """
    info = origin.tensors[name]
    read = elements(reader, info)
    bits: Array = before.entries[name].whole(read) if before else read(0, math.prod(info.shape))
    return None if unknown else bits, _after(bits, name, batch, every=unknown)


def _part(bits: Array, start: int, stop: int) -> Array:
    return bits[start:stop]


def _after(bits: Array, name: str, batch: Sequence[Version], *, every: bool) -> Iterator[Array | None]:
    """Yield a tensor after each version of a batch, or None if it has not changed.

    With `every` the first is never None.
    """
    for number, version in enumerate(batch):
        entry = version.delta.entries[name]
        if not entry.record.count:
            yield bits if every and not number else None
            continue
        with errors.context(str(version.path)):
            bits = entry.whole(partial(_part, bits))
        yield bits


def _source(version: Version) -> str | None:
    """Return the state of the version that a version here has in codes."""
    note = version.note
    return None if note is None or note.quantised_from is None else note.quantised_from.state
