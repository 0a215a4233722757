"""GPUs without one: tensors that say `cuda:0`, whose work waits in streams until somebody synchronises.

It is as strict as CUDA, and as late as CUDA may be:

    a tensor of the host meets one of the device   refused, but for numbers (0-dim) and indices
    tensors of two devices meet                    refused
    a copy from pinned memory                      made when its stream is synchronised; it must not have changed
    a copy to pinned memory                        until then the memory has other bytes
    a tensor of another stream                     refused, unless an event was waited for
    float16 and bfloat16 of NaN                    0x7FFF, as CUDA's; NaN that arithmetic makes 0x7FFFFFFF
    sums of floats                                 in another order than the CPU's
    float8 by index, unsigned integers             refused, as by torch 2.6

`gpu.launches` counts kernels, `gpu.launched[i]` those of a device, `gpu.synchronisations` waits of the host,
`gpu.uploaded` and `gpu.downloaded` bytes. `limit` is a device's memory: beyond it torch.OutOfMemoryError is raised.
Results are those of the CPU's kernels.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CANONICAL = {torch.float16: (torch.int16, 0x7FFF), torch.bfloat16: (torch.int16, 0x7FFF),
             torch.float32: (torch.int32, 0x7FFFFFFF)}  # fmt: skip
MAKES_NAN = {"add", "sub", "rsub", "mul", "div", "addcmul", "mm", "_to_copy", "neg"}
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}
MAY_BE_ON_HOST = {"index", "index_put", "index_put_", "_index_put_impl_"}
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "view", "_unsafe_view", "as_strided", "slice",
             "select", "unsqueeze", "squeeze", "expand", "t", "transpose", "permute", "detach", "alias", "split",
             "unbind", "_reshape_alias", "narrow", "unfold", "diagonal", "lift_fresh", "resize_",
             "new_empty_strided"}  # fmt: skip
TAKEN = 0xAB
NUMBERS = {torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.__index__,
           torch.Tensor.item, torch.Tensor.tolist}  # fmt: skip
DIRECT = {torch.Tensor.__invert__: torch.bitwise_not, torch.Tensor.nonzero: aten.nonzero.default}
INDEXING = {torch.Tensor.__getitem__: "index", torch.Tensor.__setitem__: "index_put_"}


class Refused(RuntimeError):
    """What CUDA would refuse, or get wrong."""


def out_of_memory(name: str) -> None:
    """A `GPU.failing` of a device that has none left."""
    raise torch.OutOfMemoryError("CUDA out of memory.")


class Block:
    """Memory of the device, shared by views."""

    def __init__(self, gpu: GPU, nbytes: int, device: int) -> None:
        self.written: tuple[Stream, int] | None = None
        self.device = device
        gpu.take(nbytes, device)
        weakref.finalize(self, gpu.free, nbytes, device)


class Tensor(torch.Tensor):
    """A tensor on the device: what is known of it (`meta`), and its values once its stream has come so far."""

    meta: torch.Tensor
    host: torch.Tensor | None
    block: Block

    @staticmethod
    def __new__(cls, meta: torch.Tensor, block: Block) -> Tensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype,
            device=f"cuda:{block.device}", requires_grad=False,
        )  # fmt: skip
        made.meta, made.host, made.block = meta, None, block
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch's C++ would switch the device for, which this build cannot."""
        if func is torch.Tensor.new_tensor:
            return torch.tensor(*args[1:], dtype=(kwargs or {}).get("dtype", args[0].dtype), device=args[0].device)
        if func in INDEXING and not (torch.is_grad_enabled() and args[0].requires_grad):
            return GPU.here().index(func, args)
        if func in NUMBERS:
            return func(args[0].cpu())
        if func in DIRECT:
            return DIRECT[func](*args, **(kwargs or {}))
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "not linked with support" not in str(error):
                raise
            return GPU.here().python(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return GPU.here().call(func, args, kwargs or {})

    def record_stream(self, stream: Stream) -> None:
        """Memory is not used anew here."""

    def __repr__(self, **_: Any) -> str:
        return f"simulated {tuple(self.shape)} {self.dtype}"


class Stream:
    """Work in order; `seen[other]` is how much of another stream is known to be done before what comes next."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = GPU.here().number(device)
        GPU.here().streams.add(self)
        self.queue: list[Callable[[], None]] = []
        self.sent = self.done = 0
        self.seen: dict[Stream, int] = {}

    def send(self, work: Callable[[], None]) -> int:
        inference = torch.is_inference_mode_enabled()

        def within() -> None:
            with torch.inference_mode(inference), torch.no_grad():
                work()

        self.queue.append(within)
        self.sent += 1
        return self.sent

    def run(self, until: int) -> None:
        while self.done < until:
            work = self.queue.pop(0)
            self.done += 1
            work()

    def knows(self, written: tuple[Stream, int] | None) -> bool:
        if written is None or written[0] is self or written[0].done >= written[1]:
            return True
        return self.seen.get(written[0], 0) >= written[1]

    def wait_event(self, event: Event) -> None:
        with GPU.here().lock:
            if event.place is None:
                return
            stream, until, seen = event.place
            for other, count in [*seen.items(), (stream, until)]:
                self.seen[other] = max(self.seen.get(other, 0), count)
            self.send(lambda: stream.run(until))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        with GPU.here().lock:
            GPU.here().synchronisations += self.done < self.sent
            self.run(self.sent)


class Event:
    def __init__(self, **_: Any) -> None:
        self.place: tuple[Stream, int, dict[Stream, int]] | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or GPU.here().stream()
        self.place = stream, stream.sent, dict(stream.seen)

    def synchronize(self) -> None:
        with GPU.here().lock:
            if not self.query():
                GPU.here().synchronisations += 1
                self.place[0].run(self.place[1])

    def query(self) -> bool:
        return self.place is None or self.place[0].done >= self.place[1]


class GPU:
    """The device: its memory, its default stream, and what has been counted."""

    current: GPU | None = None

    def __init__(self, limit: int, devices: int) -> None:
        self.limit, self.devices = limit, devices
        self.used, self.peak = [0] * devices, [0] * devices
        self.kernels: Counter[str] = Counter()
        self.launched: Counter[int] = Counter()
        self.synchronisations = self.uploaded = self.downloaded = 0
        self.lock = threading.RLock()
        self.threads = threading.local()
        self.defaults: dict[int, Stream] = {}
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.pinned: dict[int, int] = {}
        self.asked = 0
        self.failing: Callable[[str], None] = lambda name: None

    @staticmethod
    def here() -> GPU:
        assert GPU.current is not None, "outside the simulation"
        return GPU.current

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    @property
    def now(self) -> int:
        """The current device of this thread."""
        return getattr(self.threads, "device", 0)

    def number(self, device: Any) -> int:
        """Of a device, which may be None, a number or torch's."""
        index = device if isinstance(device, int) else None if device is None else torch.device(device).index
        index = self.now if index is None else index
        assert index < self.devices, f"invalid device ordinal {index}"
        return index

    def stream(self, device: Any = None) -> Stream:
        """The current stream of a device, for this thread."""
        index = self.number(device)
        return self.threads.__dict__.get("streams", {}).get(index) or self.default(index)

    def default(self, device: Any = None) -> Stream:
        index = self.number(device)
        with self.lock:
            return self.defaults.get(index) or self.defaults.setdefault(index, Stream(index))

    def take(self, nbytes: int, device: int) -> None:
        if self.used[device] + nbytes > self.limit:  # what work that waits holds, CUDA would use anew in its order
            for stream in list(self.streams):
                stream.run(stream.sent)
        if self.used[device] + nbytes > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes")
        self.used[device] += nbytes
        self.peak[device] = max(self.peak[device], self.used[device])

    def free(self, nbytes: int, device: int) -> None:
        self.used[device] -= nbytes

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self.lock:
            return self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in ("_to_copy", "copy_"):
            return self._copy(name, func, args, kwargs)
        if name in ("to", "cpu", "cuda"):
            return self._to(name, func, args, kwargs)
        if func._can_decompose():
            with _Mode():
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in given if isinstance(x, Tensor)]
        device = self._check(name, given, ours, kwargs.get("device"))
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items() if k != "pin_memory"}
        try:
            plan = self._on_meta(func, args, kwargs)
        except Exception:  # sizes depend on values, or there is no such kernel: the host has to wait
            self._wait(device)
            return self._now(name, func, args, kwargs, device)
        return self._later(name, func, args, kwargs, plan, ours, device)

    def index(self, func: Any, args: Any) -> Any:
        """tensor[key], tensor[key] = value: an op by the name of what it does."""
        key = args[1] if isinstance(args[1], tuple) else (args[1],)
        by_tensor = any(isinstance(x, torch.Tensor) for x in key)
        name = INDEXING[func] if by_tensor else "slice" if func is torch.Tensor.__getitem__ else "copy_"
        return self.python(func, args, {}, name)

    def python(self, func: Any, args: Any, kwargs: Any, name: str = "") -> Any:
        """A function of Python's for which this build would switch the device, as one op."""
        name = name or func.__name__
        with self.lock:
            if func is torch.Tensor.copy_:
                return self._copy("copy_", aten.copy_.default, args, kwargs)
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            ours = [x for x in given if isinstance(x, Tensor)]
            device = self._check(name, given, ours)
            try:
                plan = self._on_meta(func, args, kwargs)
            except Exception:  # a mask: how many there are decides the size
                self._wait(device)
                return self._now(name, func, args, kwargs, device)
            if func is torch.Tensor.__setitem__:
                plan = args[0].meta
            return self._later(name, func, args, kwargs, plan, ours, device)

    def _to(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        source, other = given["self"], given.get("other")
        device = torch.device(
            {"cpu": "cpu", "cuda": "cuda"}.get(name)
            or given.get("device")
            or (source if other is None else other).device
        )
        dtype = given.get("dtype") or (source if other is None else other).dtype
        if self.same(device, source.device) and dtype == source.dtype and not given.get("copy"):
            return source
        wanted = {"device": device, "dtype": dtype, "non_blocking": given.get("non_blocking", False)}
        return self._copy("_to_copy", aten._to_copy.default, (source,), wanted)

    def same(self, one: torch.device, other: torch.device) -> bool:
        """Whether two devices are one; without a number it is the current."""
        return one.type == other.type and (one.type == "cpu" or self.number(one) == self.number(other))

    def _check(self, name: str, given: list[Any], ours: list[Tensor], device: Any = None) -> int:
        """The number of the device that an operation runs on."""
        there = {x.block.device for x in ours if x.dim()} or {x.block.device for x in ours} or {self.number(device)}
        self.asked = max((x.numel() * x.element_size() for x in ours), default=0)
        self.failing(name)
        if len(there) > 1:
            raise Refused(f"aten::{name}: Expected all tensors to be on the same device, found {sorted(there)}")
        (index,) = there
        strangers = [x for x in given if not isinstance(x, Tensor) and x.dim()]
        if ours and strangers and name not in MAY_BE_ON_HOST:
            raise Refused(f"aten::{name}: Expected all tensors to be on the same device, found cuda:0 and cpu")
        if name in MAY_BE_ON_HOST and not isinstance(given[0], Tensor):
            raise Refused(f"aten::{name}: indices should be on the same device as the indexed tensor (cpu)")
        if name in MAY_BE_ON_HOST and given[0].dtype in FLOAT8:
            raise Refused(f"aten::{name}: not implemented for {given[0].dtype}")
        if name not in NO_KERNEL and any(x.dtype in UNSIGNED for x in ours):
            raise Refused(f"aten::{name}: unsigned integers")
        for tensor in ours:
            if name not in NO_KERNEL and not self.stream(index).knows(tensor.block.written):
                raise Refused(f"aten::{name}: reads what another stream may not have written yet")
        return index

    def _on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        def meta(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.meta
            return x.to("meta") if isinstance(x, torch.Tensor) and x.dim() else x

        args, kwargs = tree_map(meta, (args, kwargs))
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("meta")}
        with torch.utils._python_dispatch._disable_current_modes():
            return func(*args, **kwargs)

    def _wait(self, device: int) -> None:
        self.synchronisations += 1
        stream = self.stream(device)
        stream.run(stream.sent)

    def _real(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        assert x.host is not None
        return x.host

    def _compute(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(self._real, (args, kwargs))
        with torch.utils._python_dispatch._disable_current_modes():
            if name == "sum" and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                args = (
                    (args[0].flip(tuple(range(args[0].dim()))).flip(()), *args[1:])
                    if not _axes(args)
                    else (args[0].flip(_axes(args)), *args[1:])
                )
            made = func(*args, **kwargs)
            if name.rstrip("_") in MAKES_NAN or name in MAKES_NAN:
                _canonical(made)
        return made

    def _now(self, name: str, func: Any, args: Any, kwargs: Any, device: int) -> Any:
        self._count(name, device)
        made = self._compute(name, func, args, kwargs)

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            for old in tree_leaves((args, kwargs)):
                if isinstance(old, Tensor) and old.host is x:
                    return old
            tensor = self._fresh(x.to("meta"), device)
            tensor.host = x
            return tensor

        return tree_map(wrapped, made)

    def _fresh(self, meta: torch.Tensor, device: int) -> Tensor:
        return Tensor(meta, Block(self, meta.untyped_storage().nbytes(), device))

    def _count(self, name: str, device: int) -> None:
        if name not in NO_KERNEL:
            self.kernels[name] += 1
            self.launched[device] += 1

    def _later(self, name: str, func: Any, args: Any, kwargs: Any, plan: Any, ours: list[Tensor], device: int) -> Any:
        """Results that exist when the stream has come so far."""
        self._count(name, device)
        old = {id(x.meta): x for x in ours}
        places = {x.meta.untyped_storage()._cdata: x.block for x in ours}
        made: list[Tensor] = []

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in old:
                tensor = old[id(x)]
            else:
                block = places.get(x.untyped_storage()._cdata)
                tensor = Tensor(x, block) if block is not None else self._fresh(x, device)
            made.append(tensor)
            return tensor

        result, stream = tree_map(wrapped, plan), self.stream(device)

        def work() -> None:
            found = [x for x in tree_leaves(self._compute(name, func, args, kwargs)) if isinstance(x, torch.Tensor)]
            for tensor, host in zip(made, found, strict=func not in INDEXING):
                tensor.host = host

        place = stream.send(work)
        for tensor in made if name not in NO_KERNEL else ():
            tensor.block.written = stream, place
        return result

    def _copy(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Copies between host and device, and casts on the device."""
        if name == "copy_":
            target, source = args[:2]
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            source, target = args[0], None
            blocking = not kwargs.get("non_blocking")
            device = torch.device(kwargs.get("device") or source.device)
            if isinstance(source, Tensor) and device.type == "cuda" and not self.same(device, source.device):
                return self._cross(source, self.number(device), func, kwargs)
            if device.type == "cpu" and isinstance(source, Tensor):
                return self._download(source, None, func, kwargs, blocking=blocking)
        if isinstance(target, torch.Tensor) and not isinstance(target, Tensor):
            return self._download(source, target, func, kwargs, blocking=blocking)
        if isinstance(source, Tensor):
            number = self._check(name, [source], _tensors(args))
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
            return self._later(name, func, args, kwargs, self._on_meta(func, args, kwargs), _tensors(args), number)
        return self._upload(name, func, args, kwargs, source, target, blocking=blocking)

    def _cross(self, source: Tensor, device: int, func: Any, kwargs: Any) -> Tensor:
        """A copy from one device to another, by way of the host."""
        there = self._download(source, None, func, {"dtype": kwargs.get("dtype")}, blocking=True)
        return self._upload("_to_copy", func, (there,), {"device": f"cuda:{device}"}, there, None, blocking=True)

    def _upload(self, name: str, func: Any, args: Any, kwargs: Any, source: Any, target: Any, *, blocking: bool) -> Any:
        self.uploaded += source.numel() * source.element_size()
        pinned = self.is_pinned(source)
        with torch.utils._python_dispatch._disable_current_modes():
            kept = source.clone()
        dtype = kwargs.get("dtype")
        if target is None:
            meta = torch.empty_like(source, device="meta", dtype=dtype)
            result = self._fresh(meta, self.number(kwargs.get("device")))
        else:
            result = target
        stream = self.stream(result.block.device)

        def work() -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                if pinned and not blocking and not torch.equal(_bytes(source), _bytes(kept)):
                    raise Refused("pinned memory was written while a copy from it was on its way")
                if target is None:
                    result.host = kept.to(dtype) if dtype is not None else kept
                else:
                    assert target.host is not None
                    target.host.copy_(kept)

        result.block.written = stream, stream.send(work)
        if blocking or not pinned:
            self._wait(stream.device)
        return result

    def _download(self, source: Any, target: Any, func: Any, kwargs: Any, *, blocking: bool) -> Any:
        device = self._check("_to_copy", [source], [source])
        with torch.utils._python_dispatch._disable_current_modes():
            if target is None:
                target = torch.empty_like(source.meta, device="cpu", dtype=kwargs.get("dtype"))
            self.downloaded += target.numel() * target.element_size()
            pinned = self.is_pinned(target)
            if pinned and target.is_contiguous():
                _bytes(target).fill_(TAKEN)

        def work() -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                target.copy_(source.host)

        self.stream(device).send(work)
        if blocking or not pinned:
            self._wait(device)
        return target

    def pin(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage.nbytes()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        at = tensor.untyped_storage().data_ptr()
        return any(begin <= at < begin + nbytes for begin, nbytes in self.pinned.items())


def _axes(args: Any) -> tuple[int, ...]:
    wanted = args[1] if len(args) > 1 else None
    return tuple(range(args[0].dim())) if wanted in (None, []) else tuple(wanted)


def _tensors(args: Any) -> list[Tensor]:
    return [x for x in tree_leaves(args) if isinstance(x, Tensor)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0)


def _canonical(made: Any) -> None:
    """NaN as CUDA makes it."""
    for x in tree_leaves(made):
        if isinstance(x, torch.Tensor) and x.dtype in CANONICAL and not x.requires_grad and bool(x.isnan().any()):
            integer, bits = CANONICAL[x.dtype]
            x.view(integer)[x.isnan()] = bits


class _Mode(TorchDispatchMode):
    """Sends what concerns the device to it, and remembers pinned memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu = kwargs or {}, GPU.here()
        name = func._schema.name.partition("::")[2]
        if name == "is_pinned":
            return gpu.is_pinned(args[0])
        device = kwargs.get("device")
        if (device is not None and torch.device(device).type == "cuda") or any(
            isinstance(x, Tensor) for x in tree_leaves((args, kwargs))
        ):
            return gpu.call(func, args, kwargs)
        if kwargs.get("pin_memory"):
            made = func(*args, **{k: v for k, v in kwargs.items() if k != "pin_memory"})
            gpu.pin(made)
            return made
        return func(*args, **kwargs)


@contextmanager
def _streamed(stream: Stream | None) -> Iterator[None]:
    """The stream is the current one of its device, which is the current device."""
    if stream is None:
        yield
        return
    gpu = GPU.here()
    before = gpu.threads.__dict__.get("streams", {})
    gpu.threads.streams = {**before, stream.device: stream}
    try:
        with _on(stream.device):
            yield
    finally:
        gpu.threads.streams = before


@contextmanager
def _on(device: Any) -> Iterator[None]:
    gpu = GPU.here()
    before, gpu.threads.device = gpu.now, gpu.number(device)
    try:
        yield
    finally:
        gpu.threads.device = before


@contextmanager
def simulated(limit: int = 1 << 34, devices: int = 1) -> Iterator[GPU]:
    """So many devices of `limit` bytes, for all threads begun within the block."""
    gpu = GPU(limit, devices)
    run = threading.Thread.run

    def within(thread: threading.Thread) -> None:
        with _Mode():
            run(thread)

    def synchronise(device: Any = None) -> None:
        gpu.synchronisations += 1
        with gpu.lock:
            gpu.stream(device).run(gpu.stream(device).sent)

    fakes = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: gpu.now,
        "device": _on,
        "set_device": lambda device: setattr(gpu.threads, "device", gpu.number(device)),
        "Stream": Stream,
        "Event": Event,
        "stream": _streamed,
        "current_stream": gpu.stream,
        "default_stream": gpu.default,
        "synchronize": synchronise,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (gpu.limit - gpu.used[gpu.number(device)], gpu.limit),
        "get_device_name": lambda device=None: "a simulated GPU",
        "max_memory_allocated": lambda device=None: gpu.peak[gpu.number(device)],
        "reset_peak_memory_stats": lambda device=None: gpu.peak.__setitem__(
            gpu.number(device), gpu.used[gpu.number(device)]
        ),
    }

    move = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        """torch's own would switch the device before anybody could see it."""
        other = args[0] if args else more.get("other")
        copy = more.get("copy", False)
        if isinstance(other, torch.Tensor):
            device, dtype, later = other.device, other.dtype, bool(more.get("non_blocking"))
        else:
            given = {k: v for k, v in more.items() if k in ("device", "dtype", "non_blocking")}
            device, dtype, later, _ = torch._C._nn._parse_to(*args[:3], **given)
        device, dtype = device or tensor.device, dtype or tensor.dtype
        if tensor.requires_grad or "cuda" not in (device.type, tensor.device.type):
            return move(tensor, *args, **more)
        if gpu.same(device, tensor.device) and dtype == tensor.dtype and not copy:
            return tensor
        return gpu.call(aten._to_copy.default, (tensor,), {"device": device, "dtype": dtype, "non_blocking": later})

    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **more: Any) -> torch.Tensor:
        return make(data, **more) if device is None else make(data, **more).to(device)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "tensor", tensor))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", to))
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mock.patch.object(threading.Thread, "run", within))
        stack.enter_context(mock.patch.object(GPU, "current", gpu))
        stack.enter_context(_Mode())
        yield gpu
