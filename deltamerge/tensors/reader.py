"""Reads byte ranges of tensors into buffers, whether the bytes are stored or computed."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from deltamerge import errors
from deltamerge.files.descriptors import Descriptor, Descriptors, flat, input_error, read_at
from deltamerge.files.hashes import Pieces
from deltamerge.tensors.dtypes import ITEMSIZE, bits_type
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.tensor import Tensor, TensorInfo, fill


class Reader:
    """Reads byte ranges of tensors into buffers. Thread-safe; few files are kept open.

    Code that reads files through `stored` may report the hashes of read bytes to `pieces`.
    """

    def __init__(self, pieces: Pieces | None = None) -> None:
        self.pieces = pieces
        self._files = Descriptors(os.O_RDONLY, input_error)
        self._known: dict[Any, Any] = {}
        self._knowing = threading.RLock()  # one computed tensor may be read from another

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    def read_into(self, info: Tensor | TensorInfo, start_elem: int, out: Any) -> None:
        """Fill the contiguous buffer `out` with the tensor's bytes from element `start_elem`."""
        tensor, view = info.tensor, flat(out)
        offset = start_elem * ITEMSIZE[tensor.dtype]
        _check_range(tensor, offset, len(view))
        if tensor.kind != "stored":
            if view:
                fill(self, tensor, start_elem, view)
            return
        path = tensor.path
        with errors.context(str(path)):
            file = self._files.get(path)  # this reference keeps the file open while it is read
            read_at(file.fd, tensor.begin + offset, view)

    def read_hashed(self, info: Tensor | TensorInfo, start_elem: int, out: NDArray[np.uint8]) -> None:
        """Read like `read_into`, and add the hashes of the read pieces of a file to `pieces`."""
        self.read_into(info, start_elem, out)
        tensor = info.tensor
        if self.pieces is not None and tensor.kind == "stored":
            self.pieces.hash(tensor.path, tensor.begin + start_elem * ITEMSIZE[tensor.dtype], out)

    def read_runs(
        self, info: Tensor | TensorInfo, offsets: NDArray[np.int64], ends: NDArray[np.int64], out: Any
    ) -> None:
        """Fill `out` with runs of the tensor's bytes. Run i begins at byte `offsets[i]` and ends at `ends[i]` of
        `out`."""
        tensor, view, begin = info.tensor, flat(out), 0
        if tensor.kind != "stored":
            for offset, end in zip(offsets.tolist(), ends.tolist(), strict=True):
                self.read_into(tensor, offset // ITEMSIZE[tensor.dtype], view[begin:end])
                begin = end
            return
        lengths = np.diff(ends, prepend=0)
        _check_range(tensor, int(offsets.min()), 0)
        _check_range(tensor, int((offsets + lengths).max()), 0)
        path = tensor.path
        with errors.context(str(path)):
            file = self._files.get(path)
            for offset, end in zip((offsets + tensor.begin).tolist(), ends.tolist(), strict=True):
                read_at(file.fd, offset, view[begin:end])
                begin = end

    def stored(self, info: Tensor | TensorInfo) -> Descriptor | None:
        """Return the open file that holds the tensor's bytes from `begin` on; None if they are computed."""
        return self._files.get(info.path) if info.kind == "stored" else None

    def advise(self, info: Tensor | TensorInfo, start: int, nbytes: int) -> None:
        """Tell the kernel that the tensor's bytes [start, start + nbytes) will be read soon."""
        if hasattr(os, "posix_fadvise") and nbytes and (file := self.stored(info)) is not None:
            os.posix_fadvise(file.fd, info.begin + start, nbytes, os.POSIX_FADV_WILLNEED)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return the value of `compute` for `key`, computed by the first thread that asks."""
        with self._knowing:
            if key not in self._known:
                self._known[key] = compute()
            return self._known[key]


def elements(reader: Reader, info: Tensor | TensorInfo) -> Callable[[int, int], Any]:
    """Return a function that reads flat elements [start, stop) of a tensor as bits."""

    def read(start: int, stop: int) -> NDArray[Any]:
        out = np.empty(stop - start, bits_type(info.dtype))
        reader.read_into(info, start, out)
        return out

    return read


def _check_range(info: Tensor, offset: int, nbytes: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > info.nbytes:
        raise ValueError(f"bytes [{offset}, {offset + nbytes}) of {info.name}, which has {info.nbytes}")


T = TypeVar("T")


class RecentParts:
    """A cache of the values of recent keys. Each value is made by one thread, for which the others wait.

    Together they weigh at most `most`, each by `weigh`, but the last value is always kept. Without `weigh` each weighs
    1.
    """

    def __init__(self, most: int, weigh: Callable[[Any], int] | None = None) -> None:
        self._most, self._weigh, self._weight = most, weigh, 0
        self._lock = threading.Lock()
        self._made: OrderedDict[Hashable, tuple[threading.Lock, list[Any]]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, by `make` if it is not there."""
        with self._lock:
            lock, made = self._made.setdefault(key, (threading.Lock(), []))
            self._made.move_to_end(key)
            if self._weigh is None and len(self._made) > self._most:
                self._made.popitem(last=False)
        with lock:
            if not made:
                made.append(make())
                self._shed(key, made)
        found: T = made[0]
        return found

    def _shed(self, key: Hashable, new: list[Any]) -> None:
        """Count a new value, and forget the oldest values while all weigh too much."""
        with self._lock:
            if self._weigh is None or self._made.get(key, (None, None))[1] is not new:
                return
            self._weight += self._weigh(new[0])
            while self._weight > self._most and len(self._made) > 1:
                _, (_, made) = self._made.popitem(last=False)
                self._weight -= sum(map(self._weigh, made))

    def known(self, key: Hashable) -> Any:
        """Return the value of a key. None: it is not there, or not yet."""
        with self._lock:
            if key not in self._made:
                return None
            self._made.move_to_end(key)
            return next(iter(self._made[key][1]), None)
