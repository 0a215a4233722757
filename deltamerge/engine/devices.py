"""A worker's access to a device: its buffers, its stream, the tiles that wait there, and the free memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import ITEMSIZE, torch_dtype
from deltamerge.tensors.lazy import NDArray, torch
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.tiles import Tile

# Bytes of a GPU for each element of a tile: stored and float32 values, and scratch inside a step.
ALIVE = 128
# Tiles take at most half of a GPU's free memory, and tensors kept between passes a third.
TILES_SHARE, KEPT_SHARE = 2, 3

# The first GPU for work that it does faster than the compiled loops, the CPU for the rest.
AUTO = "auto"
# All GPUs, as in "cuda:all".
ALL = "all"

Take = Callable[[int], "NDArray[np.uint8]"]
Give = Callable[["NDArray[np.uint8]"], None]


def torch_devices(device: str) -> tuple[torch.device, ...]:
    """torch's devices of a name: "cpu"; "cuda" (the first), "cuda:1", "cuda:0,1" or "cuda:all"; of "auto" the first
    GPU, or the CPU where torch sees none. InputError: torch sees no such device."""
    kind, _, numbers = device.partition(":")
    if kind == "cpu" or (kind == AUTO and not torch.cuda.is_available()):
        return (torch.device("cpu"),)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = range(max(1, count)) if numbers == ALL else [int(number) for number in (numbers or "0").split(",")]
    if max(wanted) >= count:
        raise InputError(f"--device {device}: torch sees {count} CUDA devices", hint="--device cpu")
    return tuple(torch.device("cuda", number) for number in dict.fromkeys(wanted))


def torch_device(device: str) -> torch.device:
    """Return the first of `torch_devices`, for work that only one device does."""
    return torch_devices(device)[0]


def free_bytes(device: torch.device) -> int:
    """Free bytes of a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def fitting(device: torch.device, workers: int, tile_elements: int) -> int:
    """Return the elements of a tile, so that a tile for each of `workers` fits in half of a GPU's free memory."""
    room = free_bytes(device) // TILES_SHARE
    while tile_elements > 1024 and workers * ALIVE * tile_elements > room:
        tile_elements //= 2
    return tile_elements


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a GPU had too little memory for an operation."""
    return isinstance(error, torch.OutOfMemoryError)


def too_little(device: torch.device, what: str) -> InputError:
    """Return an error: the GPU has too little memory for `what`."""
    free, total = torch.cuda.mem_get_info(device)
    return InputError(
        f"{device}: too little memory for {what} ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free)",
        hint="end other programs on the GPU, give fewer --workers, or --device cpu",
    )


def pinned_tensor(nbytes: int) -> torch.Tensor:
    """Return the bytes that copies of a GPU go to and come from by themselves."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def pinned(nbytes: int) -> NDArray[np.uint8]:
    """Return the same for numpy."""
    return pinned_tensor(nbytes).numpy()


def new_stream(device: torch.device) -> Any:
    """Return a new stream of a GPU."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which torch starts its kernels on the device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def memory_of(device: str) -> Iterator[None]:
    """Raise InputError in place of torch's error if a GPU has too little memory for the work."""
    try:
        yield
    except RuntimeError as error:
        if device == "cpu" or not is_out_of_memory(error):
            raise
        raise too_little(torch_device(device), "it") from error


class _Slots:
    """Byte buffers reused from tile to tile, one for each read of the tile."""

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self.allocate = allocate
        self.buffers: list[Any] = []
        self.used = 0

    def take(self, nbytes: int) -> Any:
        if self.used == len(self.buffers):
            self.buffers.append(self.allocate(nbytes))
        elif len(self.buffers[self.used]) < nbytes:
            self.buffers[self.used] = self.allocate(nbytes)
        self.used += 1
        return self.buffers[self.used - 1][:nbytes]


class Lane:
    """One worker's buffers."""

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.reader, self.device = reader, device
        self.slots = _Slots(self._host)

    def _host(self, nbytes: int) -> Any:
        return torch.empty(nbytes, dtype=torch.uint8)

    @contextmanager
    def tile(self) -> Iterator[None]:
        """Everything between reading a tile's inputs and writing its output."""
        self.slots.used = 0
        with torch.inference_mode():
            yield

    def read(self, node: Node, tile: Tile, kept: Uploads | None = None) -> Any:
        """Return the stored values of a read node on a tile, valid until the next tile."""
        buffer = self.slots.take(tile.size * ITEMSIZE[node.dtype])
        self.reader.read_hashed(node, tile.start, buffer.numpy())
        return buffer.view(torch_dtype(node.dtype))

    def emit(self, value: Any, take: Take, give: Give) -> None:
        """Give a finished tile's bytes, in the memory that `take` lends for so many."""
        flat = value.contiguous().view(torch.uint8).numpy()
        memory = take(flat.nbytes)
        memory[:] = flat
        give(memory)

    def flush(self) -> None:
        """Pass on the tiles that were emitted and are not yet passed on."""

    def wait(self) -> None:
        """Wait until all started work is done, so that other lanes may use its results."""


class GpuLane(Lane):
    """One worker's stream and two sets of pinned buffers.

    One tile's buffers are filled while the previous tile's are on their way. A finished tile is passed on when the next
    tile has been sent.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        super().__init__(reader, device)
        self.stream = new_stream(device)
        self.sets = [self.slots, _Slots(self._host)]
        self.sent: list[Any] = [None, None]
        self.turn = 0
        self.waiting: list[tuple[Any, Any, NDArray[np.uint8], Give]] = []

    def _host(self, nbytes: int) -> Any:
        return pinned_tensor(nbytes)

    @contextmanager
    def tile(self) -> Iterator[None]:
        self.turn = 1 - self.turn
        if self.sent[self.turn] is not None:
            self.sent[self.turn].synchronize()
        self.slots = self.sets[self.turn]
        with torch.cuda.stream(self.stream):
            try:
                with super().tile():
                    yield
            finally:
                self.sent[self.turn] = self.stream.record_event()

    def read(self, node: Node, tile: Tile, kept: Uploads | None = None) -> Any:
        found = None if kept is None else kept.get(node, tile, self.stream)
        if found is None:
            found = super().read(node, tile).to(self.device, non_blocking=True)
            if kept is not None:
                kept.put(node, tile, found, self.stream)
        return found

    def emit(self, value: Any, take: Take, give: Give) -> None:
        flat = value.contiguous().view(torch.uint8)
        memory = take(flat.numel())
        target = torch.from_numpy(memory)
        if not target.is_pinned():
            target = self.slots.take(flat.numel())
        target.copy_(flat, non_blocking=True)
        before, self.waiting = self.waiting, [(self.stream.record_event(), target, memory, give)]
        _give(before)

    def wait(self) -> None:
        self.stream.synchronize()

    def flush(self) -> None:
        before, self.waiting = self.waiting, []
        _give(before)


def _give(waiting: list[tuple[Any, Any, NDArray[np.uint8], Give]]) -> None:
    """Pass on memory whose tiles were copied into it, or are in pinned memory beside it."""
    for event, host, memory, give in waiting:
        event.synchronize()
        if memory.size and host.data_ptr() != memory.ctypes.data:
            memory[:] = host.numpy()
        give(memory)


class Room:
    """The bytes of a GPU that are left for tensors kept there. Thread-safe."""

    def __init__(self, nbytes: int) -> None:
        self.left = nbytes
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Take `nbytes` if there is room, and return whether there was."""
        with self._lock:
            there = nbytes <= self.left
            self.left -= nbytes * there
            return there

    def give(self, nbytes: int) -> None:
        with self._lock:
            self.left += nbytes


class Uploads:
    """The stored tiles of one tensor on a GPU, as far as there is room: they are read and sent once for all passes."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.tiles: dict[tuple[int, int, int], tuple[Any, Any]] = {}
        self.taken = 0
        self._lock = threading.Lock()

    def get(self, node: Node, tile: Tile, stream: Any) -> Any:
        """Return a tile that is there, for use on `stream`; else None."""
        with self._lock:
            found = self.tiles.get((id(node), tile.start, tile.stop))
        if found is None:
            return None
        stream.wait_event(found[1])
        return found[0]

    def put(self, node: Node, tile: Tile, value: Any, stream: Any) -> None:
        """Keep a tile that was sent on `stream`, if there is room."""
        nbytes = value.numel() * value.element_size()
        if self.room.take(nbytes):
            event = stream.record_event()
            with self._lock:
                self.tiles[id(node), tile.start, tile.stop] = value, event
                self.taken += nbytes

    def clear(self) -> None:
        """Free them; no work that uses them may be on its way."""
        with self._lock:
            self.tiles.clear()
            self.room.give(self.taken)
            self.taken = 0
