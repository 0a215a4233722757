"""Writes the versions of a chain from a training run whose weights are spread over processes, without gathering them.

Each process compares its own shards with the last version's shards, and sends changes to the tensor's owner. The owner
codes them over the whole tensor of the last version, which it keeps in memory. The first process joins the parts to one
version, with the bytes of a gathered write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge.apps.train.trainer import (
    Bits,
    ChainWriter,
    WrittenVersion,
    assets_of,
    local_of,
    match,
    note_version,
    open_chain,
    weights_of,
)
from deltamerge.errors import InputError, OutputError
from deltamerge.formats.delta.entry import TILE
from deltamerge.formats.delta.manifest import ENCODINGS
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.tensor_writer import SPOOL, BaseTensor, Spool, Storing, TensorWriter
from deltamerge.formats.delta.writer import ArtifactWriter, Summary
from deltamerge.models.chain.folder import line
from deltamerge.models.chain.mirror import Kind
from deltamerge.models.chain.publish import one_writer, publishing
from deltamerge.models.delta_file import bits_of
from deltamerge.outputs.delta import base_of
from deltamerge.tensors.dtypes import nbytes_of, torch_dtype
from deltamerge.tensors.lazy import torch

Changed = dict[str, tuple[Array, Array]]  # flat positions and values of a tensor


class ShardedDeltaWriter(ChainWriter):
    """Adds a version to a chain for every call of `write`, from a model that FSDP2 or tensor parallelism has sharded.

        chain   its folder, which all processes see; made if missing, otherwise continued
        model   an nn.Module with DTensors as parameters (other parameters must be the same in all processes)
        base    the base of the chain's first version, a checkpoint; None: the model's `name_or_path`

    All processes of the default group create a writer, and call `write` at the same steps. `write` copies the local
    shards and returns. A thread compares and writes, over a gloo group of its own, and the next `write` waits for it.
    An error in one process is raised in all, by the next `write`, `flush` or `close`; the version is then not written.
    On the CPU a process holds two copies of its shards, and the tensors that it owns: about its share of the model.

    InputError: the base or the chain cannot be read, or do not have the model's tensors. OutputError: another process
    adds versions to the chain.
    """

    def __init__(self, chain: str | Path, model: Any, *, base: str | Path | None = None) -> None:
        dist = torch.distributed
        super().__init__(chain, model, base)
        self._group = dist.new_group(backend="gloo")
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._together(self._lock)
        try:
            self._together(self._open)
        except BaseException:
            self._held.close()
            raise

    def write(self, *, step: int | None = None) -> Future[WrittenVersion]:
        """Write the changes since the last version as the next one. Return a future of the written version.

        `step` is recorded, and the version's number is at least `step`. If the previous version failed, its error is
        raised here, and that version does not exist. Call `write` again: the new version then includes its changes.
        """
        self.flush()
        new = self._together(self._copied)
        return self._start(new, step)

    def _lock(self) -> None:
        if not self._rank:
            self._held.enter_context(one_writer(self.chain, "adding"))

    def _open(self) -> None:
        versions, origin = open_chain(self.chain, self._named)
        self._last = versions[-1] if versions else None
        self._base, self._assets = base_of(origin), assets_of(origin)
        self._kinds: dict[str, Kind] = {name: (info.dtype, tuple(info.shape)) for name, info in origin.tensors.items()}
        if self._last is not None:
            self._kinds = {name: (c.dtype, c.shape) for name, c in self._last.contents.items()}
        state = self._model.state_dict()
        match(self._kinds, state, self._model, sharded=True)
        self._places = {n: places_of(state[n], self._rank) if n in state else None for n in self._kinds}
        self._owners = _owners(self._kinds, self._world)
        self._local: Bits = {}
        self._owned: Bits = {}
        for name, bits in weights_of(origin, versions):
            if self._owners[name] == self._rank:
                self._owned[name] = bits
            if (places := self._places[name]) is not None:
                self._local[name] = np.ascontiguousarray(bits.reshape(self._kinds[name][1])[np.ix_(*places)]).reshape(
                    -1
                )

    def _copied(self) -> Bits:
        """Return the bits of the local shards, rounded to the base's dtypes."""
        state, found = self._model.state_dict(), Bits()
        with torch.no_grad():
            for name, (dtype, _) in self._kinds.items():
                if self._places[name] is not None:
                    local = local_of(state[name])
                    made = torch.empty(local.shape, dtype=torch_dtype(dtype))
                    found[name] = bits_of(made.copy_(local))
        return found

    def _publish(self, name: str, new: Bits, step: int | None) -> WrittenVersion:
        mine = self._exchanged(self._together(lambda: self._changed(new)))
        with self._folder(name) as folder:
            made, states = self._together(lambda: self._coded(folder, mine))
            gathered: list[Any] | None = [None] * self._world if not self._rank else None
            torch.distributed.gather_object(states, gathered, group=self._group)
            summary = self._together(lambda: self._joined(folder, gathered, name, step))
        self._last = line(self.chain / name)[-1]
        self._local |= new
        self._owned |= made
        count, nbytes = self._from_first(None if summary is None else (summary.entries, summary.nbytes))
        size = sum(int(np.prod(shape)) for _, shape in self._kinds.values())
        return WrittenVersion(self.chain / name, count, size, nbytes)

    def _changed(self, new: Bits) -> list[Changed]:
        """Return the changes in the local shards, by the tensors' owners: positions in the whole tensors."""
        found: list[Changed] = [{} for _ in range(self._world)]
        for name, bits in new.items():
            where = np.flatnonzero(bits != self._local[name])
            places = self._places[name]
            if where.size and places is not None:
                shape = self._kinds[name][1]
                indices = np.unravel_index(where, tuple(len(place) for place in places)) if places else ()
                whole = tuple(place[index] for place, index in zip(places, indices, strict=True))
                flat = np.ravel_multi_index(whole, shape) if shape else where
                found[self._owners[name]][name] = np.asarray(flat, np.int64), bits[where]
        return found

    def _exchanged(self, changed: list[Changed]) -> list[Changed]:
        """Return the changes of all processes in the tensors that this process owns."""
        mine: list[Any] = [None] * self._world
        for owner in range(self._world):
            target = mine if owner == self._rank else None
            torch.distributed.gather_object(changed[owner], target, dst=owner, group=self._group)
        return mine

    def _coded(self, folder: Path, changed: list[Changed]) -> tuple[Bits, dict[str, Any]]:
        """Code the tensors that this process owns into the spool. Return their new bits, and their states."""
        spool, made = _Finished(folder), Bits()
        storing = Storing("bfloat16", frozenset(ENCODINGS), spool)
        for number, (name, (dtype, shape)) in enumerate(self._kinds.items()):
            if self._owners[name] != self._rank:
                continue
            old = self._owned[name]
            new = old
            for one in changed:
                if name in one:
                    new = old.copy() if new is old else new
                    where, values = one[name]
                    new[where] = values
            base = BaseTensor(name, dtype, shape, lambda start, stop, old=old: old[start:stop])  # type: ignore[misc]
            writer = TensorWriter(storing, name, dtype, shape, base, spool.folder / f"{number:06d}")
            try:
                for start in range(0, old.size, TILE):
                    writer.write(start, new[start : start + TILE])
            finally:
                writer.close()
            made[name] = new
        return made, spool.states

    def _joined(self, folder: Path, gathered: list[Any] | None, name: str, step: int | None) -> Summary | None:
        """Join the parts in the first process."""
        if gathered is None:
            return None
        states = {tensor: state for part in gathered for tensor, state in part.items()}
        with ArtifactWriter(folder, self._base, kept=states) as writer:
            for tensor, (dtype, shape) in self._kinds.items():
                writer.tensor(tensor, dtype, shape, BaseTensor(tensor, dtype, shape, _nothing))
            summary = writer.finish()
        note_version(folder, name, self._last, self._assets, step)
        return summary

    @contextmanager
    def _folder(self, name: str) -> Iterator[Path]:
        """Give all processes the folder in which a version is written; the first one publishes it."""
        with ExitStack() as stack:
            made = None

            def begin() -> None:
                nonlocal made
                if not self._rank:
                    made = stack.enter_context(publishing(self.chain, name, "adding"))
                    (made / SPOOL).mkdir()

            self._together(begin)
            yield Path(self._from_first(made))
            self._together(stack.close)

    def _from_first(self, value: Any) -> Any:
        """Return the first process's value in all."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do a part of the work in all processes. An error in one is raised in all."""
        error, value = None, None
        try:
            value = work()
        except BaseException as raised:
            error = raised
        said: list[Any] = [None] * self._world
        torch.distributed.all_gather_object(said, None if error is None else str(error), group=self._group)
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise OutputError(f"process {rank}: {text}", hint="no version was written")
        return value


class _Finished(Spool):
    """The spool of one process. It keeps finished tensors as states for the first process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None, {})
        self.states: dict[str, Any] = {}

    def finished(self, name: str, path: Path, state: Any) -> None:
        self.states[name] = state


def places_of(tensor: Any, rank: int) -> tuple[Array, ...] | None:
    """Return the indices of a process's shard in the whole tensor, of each dimension. None: it has no part of its own.

    InputError: the tensor is a partial sum, or is placed in an unknown way.
    """
    indices: list[Any] = [torch.arange(size) for size in tensor.shape]
    if not hasattr(tensor, "placements"):
        return None if rank else tuple(index.numpy() for index in indices)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    for at, (placement, here) in enumerate(zip(tensor.placements, coordinate, strict=True)):
        if placement.is_replicate():
            if here:
                return None
        elif type(placement).__name__ in ("Shard", "_StridedShard"):
            pieces = _chunks(indices[placement.dim], getattr(placement, "split_factor", 1))
            own = [_chunks(piece, mesh.size(at))[here] for piece in pieces]
            indices[placement.dim] = torch.cat(own)
        else:
            raise InputError(f"a tensor is placed as {placement}", hint="reduce it first")
    return tuple(index.numpy() for index in indices)


def _chunks(index: Any, count: int) -> list[Any]:
    """Split an index as DTensor does: pieces of one size, the last ones shorter or empty."""
    found = list(torch.chunk(index, count))
    return found + [index[:0]] * (count - len(found))


def _owners(kinds: Mapping[str, Kind], world: int) -> dict[str, int]:
    """Return the process that codes each tensor: the largest go first, to who has least."""
    owners, loads = dict[str, int](), [0] * world
    for name in sorted(kinds, key=lambda name: (-nbytes_of(*kinds[name]), name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += nbytes_of(*kinds[name])
    return owners


def _nothing(start: int, stop: int) -> Array:
    raise AssertionError("a tensor that is finished is not read")
