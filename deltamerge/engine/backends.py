"""The two ways to make a tensor: the compiled loop on the CPU, pass by pass, and torch on any device, tile by tile."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from deltamerge.engine import kernels
from deltamerge.engine.devices import AUTO, KEPT_SHARE, GpuLane, Lane, Room, Uploads, free_bytes, torch_device
from deltamerge.engine.fused.program import Program, assemble, covers
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import REDUCTIONS, depth_first
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.traits import function_of, traits_of


@dataclass(frozen=True, slots=True)
class Step:
    """A node of a pass: its parameters looked up once for all tiles, and the nodes that are not used after it."""

    node: Node
    parameters: dict[str, Any]
    frees: tuple[Node, ...]


def steps(
    nodes: Sequence[Node], frees: Mapping[int, tuple[Node, ...]], root: Node, needless: Collection[int]
) -> list[Step]:
    """Return the nodes of a pass, each with the values to free after it.

    Needless reductions (by id) and their inputs are left out.

    A value that a left-out node would free is freed by the step before it.
    """
    ends = [n for n in nodes if n.kind in REDUCTIONS and id(n) not in needless]
    wanted = {node for node in (root, *ends) if id(node) not in needless}
    for node in reversed(nodes):
        if node in wanted:
            wanted.update(node.operands)
    made: list[Step] = []
    for i, node in enumerate(nodes):
        freed = tuple([n for n in frees.get(i, ()) if n in wanted])
        if node in wanted:
            made.append(Step(node, dict(node.parameters), freed))
        elif freed:
            made[-1] = replace(made[-1], frees=made[-1].frees + freed)
    return made


def is_needless(node: Node, values: Mapping[int, Any]) -> bool:
    """Tell whether a reduction is declared needless, given the small values known."""
    needless = traits_of(node.function).needless
    return needless is not None and bool(needless(*(values[id(s)] for s in node.inputs if id(s) in values)))


def fused_available() -> bool:
    """Tell whether the compiled kernels are there."""
    return kernels.available()


def choose(root: Node, device: str, *, fused: bool | None = None) -> str:
    """ "fused" if the compiled loop is present and can make a tensor on this device, otherwise "torch".

    Elementwise merges take as long as reading and hashing. So with "auto" the CPU's loop makes them, and torch on a
    GPU makes tensors whose rows are sorted.
    """
    if device not in ("cpu", AUTO):
        return "torch"
    available = fused_available() if fused is None else fused
    sorts = device == AUTO and any(traits_of(node.function).sorts for node in depth_first(root))
    return "fused" if available and not sorts and covers(root) else "torch"


def open_backend(name: str, device: str) -> TorchBackend:
    return FusedBackend() if name == "fused" else TorchBackend(device)


@contextmanager
def single_threaded(names: Collection[str]) -> Iterator[None]:
    """One math thread per worker: torch's threads inside each op make tiles slower, not faster."""
    if "torch" not in names:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchBackend:
    """torch tiles on `device`; on CUDA each lane has pinned buffers and a stream, so lanes overlap copies and math."""

    def __init__(self, device: str) -> None:
        self.device = torch_device(device)
        self.on_gpu = self.device.type != "cpu"
        self.kept = Room(free_bytes(self.device) // KEPT_SHARE if self.on_gpu else 0)

    def lane(self, reader: Reader) -> Lane:
        return GpuLane(reader, self.device) if self.on_gpu else Lane(reader, self.device)

    def uploads(self, passes: int) -> Uploads | None:
        """Return a store of a tensor's tiles on the device from pass to pass."""
        return Uploads(self.kept) if self.on_gpu and passes > 1 else None

    def function(self, node: Node) -> Callable[..., Any]:
        return function_of(node.function)

    def whole(self, steps: Sequence[Step], root: Node, values: Mapping[int, Any], reader: Reader) -> Program | None:
        """Return the steps of a pass as one, if this backend can run them so."""
        return None


class FusedBackend(TorchBackend):
    """Passes that run whole in the compiled loop, bit-equal to torch.

    If a pass fails, torch repeats it to find the error.
    """

    on_gpu = False

    def __init__(self) -> None:
        """Without a device: torch is imported by the first lane, which most passes do not need."""

    def lane(self, reader: Reader) -> Lane:
        return Lane(reader, torch_device("cpu"))

    def whole(self, steps: Sequence[Step], root: Node, values: Mapping[int, Any], reader: Reader) -> Program | None:
        return assemble(arguments_of(steps), values, reader, root.shape, root.dtype)


def arguments_of(steps: Sequence[Step]) -> list[tuple[Node, dict[str, Any], tuple[Node, ...]]]:
    """Convert engine steps to the arguments of `assemble`."""
    return [(step.node, step.parameters, step.frees) for step in steps]


@dataclass(frozen=True, slots=True)
class _Freed:
    """The freed memory that glibc keeps. Blocks below `mapped` bytes (32 MiB at most) come from the heap.

    The heap keeps up to `free` bytes at its end.
    """

    mapped: int
    free: int


_USUAL = _Freed(1 << 22, 1 << 22)
_TILES = _Freed(1 << 25, 1 << 28)
_ALL = _Freed(1 << 25, 1 << 30)
_kept = [_USUAL]


@contextmanager
def quiet_allocator(*, whole: bool = False) -> Iterator[None]:
    """Let glibc reuse freed buffers instead of mapping fresh zeroed pages for each; then give them back.

    Buffers of the size of tiles, or, with `whole`, as many as a model's forward pass has. Larger buffers are still
    mapped: otherwise small buffers would lie where a freed embedding was, and the next embedding would not fit there.
    Buffers that calibration frees after it drew a mask would otherwise stay with the process: 27 of 440 MB at 13 M
    parameters.
    """
    outer = _kept[-1]
    _kept.append(_ALL if whole else outer if outer is _ALL else _TILES)
    _keep_freed(_kept[-1])
    try:
        yield
    finally:
        _kept.pop()
        _keep_freed(_kept[-1], trimmed=whole and outer is not _ALL)


def trim() -> None:
    """Give freed memory back to the system now."""
    _keep_freed(_kept[-1], trimmed=True)


def _keep_freed(freed: _Freed, *, trimmed: bool = False) -> None:
    with suppress(OSError, AttributeError):
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 1 << 16)
        libc.mallopt(mmap_threshold, freed.mapped)
        libc.mallopt(trim_threshold, freed.free)
        if trimmed:
            libc.malloc_trim(0)
