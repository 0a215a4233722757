"""The common part of trainers' plug-ins: a round sends weights as a chain's next version, and servers receive it.

Sender and receivers see the chain's folder. Only changes are written. Names, dtypes and shapes are the base's.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltamerge.apps.chain.follow import follow
from deltamerge.apps.serve.fine_tunes import OnDisk
from deltamerge.apps.train.trainer import DeltaWriter, WrittenVersion
from deltamerge.errors import OutputError
from deltamerge.models.chain.folder import Content, base_contents, head, names
from deltamerge.models.references import open_model

Weights = Iterable[tuple[str, Any]]
POLL = 0.1  # seconds between looks for a version
PATIENCE = 1800.0  # seconds that a version is waited for


class ChainSender:
    """A trainer's side, in each of its processes; one of them writes.

    chain     the folder of versions
    base      the model that the servers were started from: a folder or hub id
    mirrors   as for `DeltaWriter`
    """

    def __init__(self, chain: str | Path, base: str | Path, *, mirrors: Mapping[str | Path, str] | None = None) -> None:
        self._given: dict[str, Any] = {"chain": chain, "base": base, "mirrors": mirrors}
        self._writer: DeltaWriter | None = None

    def send(self, weights: Weights, *, writes: bool, step: int | None = None) -> WrittenVersion | None:
        """Publish a round's weights. None: this process only takes part in gathering them, and has written nothing.

        InputError: they are not the base's tensors. OutputError: another process adds versions, or the disk.
        """
        state = {}
        for name, tensor in weights:
            if writes:
                state[name] = tensor.detach().cpu()
        if not writes:
            return None
        if self._writer is None:
            self._writer = DeltaWriter(**self._given)
            atexit.register(self.close)
        return self._writer.write(state, step=step).result()

    def close(self) -> None:
        """Let the chain go."""
        writer, self._writer = self._writer, None
        if writer is not None:
            atexit.unregister(self.close)
            writer.close()


class ChainReceiver:
    """A server's side, in each of its workers: keeps a copy of the model on the CPU, and yields changes.

    chain, base   as for the sender; a chain in codes with its quantised checkpoint works too
    """

    def __init__(self, chain: str | Path, base: str | Path) -> None:
        self._chain, self._base = Path(chain), base
        self._state: dict[str, Any] | None = None
        self._held: Mapping[str, Content] | None = None
        self._after: str | None = None

    def ready(self) -> None:
        """Take note of the newest version, before another is sent."""
        is_there = self._chain.is_dir() and bool(names(self._chain))
        self._after = head(self._chain) if is_there else None

    def receive(self, *, patience: float = PATIENCE) -> Iterator[tuple[str, Any]]:
        """Wait for the version after `ready`, and yield the tensors in which it differs from the held model.

        The held model is the last one yielded, at first the base. While a version is pinned, it comes instead.
        InputError, with nothing yielded: the version is damaged, or has another base. OutputError: none came in time.
        """
        version = next(follow(self._chain, after=self._after, latest=True, poll=POLL, timeout=patience), None)
        if version is None:
            raise OutputError(
                f"{self._chain}: no version has come in {patience:.0f} s", hint="does the trainer see it?"
            )
        if self._state is None:
            found = open_model(str(self._base), Path.cwd(), weights=True)
            self._state, self._held = dict(OnDisk(found)), base_contents(version.versions[0].delta.manifest)
        version.apply_(self._state, base=self._base)
        before, now = self._held or {}, version.versions[-1].contents
        self._held, self._after = now, version.name
        return iter([(name, self._state[name]) for name, content in now.items() if before.get(name) != content])
