"""Stored tensors on their way to a GPU: through two pinned slabs, on a stream beside the one that computes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamerge.engine.devices import new_stream, pinned_tensor
from deltamerge.tensors.dtypes import ITEMSIZE, torch_dtype
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo

SLAB = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class Arriving:
    """A flat tensor on a GPU, whose values are there after `event`."""

    tensor: Tensor
    event: Any

    def here(self) -> Tensor:
        """The tensor, for use on this thread's stream."""
        stream = torch.cuda.current_stream(self.tensor.device)
        stream.wait_event(self.event)
        self.tensor.record_stream(stream)  # its memory is not used anew before that stream has come so far
        return self.tensor


class Arrivals:
    """Sends tensors to a device. Thread-safe; a slab is filled while the other one is on its way."""

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.reader, self.device = reader, device
        self.stream = new_stream(device)
        self._slabs = [_Slab(), _Slab()]
        self._lock = threading.Lock()

    def send(self, info: TensorInfo) -> Arriving:
        """Read a tensor and send it, as it is stored."""
        with self._lock, torch.no_grad(), torch.cuda.stream(self.stream):
            made = torch.empty(info.nbytes, dtype=torch.uint8, device=self.device)
            for start in range(0, info.nbytes, SLAB):
                self._slabs.reverse()
                part = self._slabs[0].room(min(SLAB, info.nbytes - start))
                self.reader.read_into(info, start // ITEMSIZE[info.dtype], part.numpy())
                made[start : start + len(part)].copy_(part, non_blocking=True)
                self._slabs[0].sent = self.stream.record_event()
            return Arriving(made.view(torch_dtype(info.dtype)), self.stream.record_event())


class _Slab:
    """Pinned memory, and the event after which it may be filled again."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.sent: Any = None

    def room(self, nbytes: int) -> Tensor:
        if self.sent is not None:
            self.sent.synchronize()
        if len(self.memory) < nbytes:
            self.memory = pinned_tensor(nbytes)
        return self.memory[:nbytes]
