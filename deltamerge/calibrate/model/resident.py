"""Models under calibration on a GPU: weights stay there as they are stored.

Weights that do not fit in a third of the free memory stream by. The next block's tensors are read and sent while a
block is computed, and freed when the walk has left it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deltamerge.calibrate.model.ahead import Ahead
from deltamerge.calibrate.model.arrivals import Arrivals
from deltamerge.engine.devices import KEPT_SHARE, Room, free_bytes
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo


class Resident:
    """Stored tensors on a GPU. `share` models share the room."""

    def __init__(self, reader: Reader, device: torch.device, share: int = 1) -> None:
        self.device = device
        self.room = Room(free_bytes(device) // (KEPT_SHARE * share))
        self.there: dict[TensorInfo, Tensor] = {}
        self.passing: dict[TensorInfo, Tensor] = {}
        self.ahead = Ahead(Arrivals(reader, device).send)
        self._next: set[TensorInfo] = set()
        self._entered: Any = None

    def begin(self, infos: Iterable[TensorInfo]) -> None:
        """Send what the next block needs, while the one that is entered is computed; free what was left before."""
        self.passing = {info: tensor for info, tensor in self.passing.items() if info in self._next}
        self._next = {info for info in infos if info not in self.there}
        if self._next and self._entered is not None:
            self._entered.synchronize()  # the host is one block ahead of the device at most, and so is its memory
        self._entered = torch.cuda.current_stream(self.device).record_event()
        self.ahead.begin(info for info in self._next if info not in self.passing)

    def stored(self, info: TensorInfo) -> Tensor:
        """A flat stored tensor on the GPU, which stays if there is room."""
        for kept in (self.there, self.passing):
            if info in kept:
                return kept[info]
        made = self.ahead(info).here()
        kept = self.there if self.room.take(info.nbytes) else self.passing
        kept[info] = made
        return made

    def shed(self) -> bool:
        """Free what stays there, from now on; whether there was any."""
        found = bool(self.there)
        self.clear()
        self.room = Room(0)
        return found

    def clear(self) -> None:
        """Free them."""
        self.ahead.close()
        for info in self.there:
            self.room.give(info.nbytes)
        self.there.clear()
        self.passing.clear()
