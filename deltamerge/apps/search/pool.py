"""Candidates judged on a Ray cluster: an actor for each of its places, whose work another one does if it dies."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltamerge.apps.search.candidates import candidates_of
from deltamerge.apps.search.judge import Part
from deltamerge.apps.search.outcome import Bench, Outcome
from deltamerge.errors import DeltamergeError, OutputError
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.yaml_source import Loc
from deltamerge.run.options import Options, unwatched
from deltamerge.run.ray import RETRIES, connected, ended, gpus_of, interrupts

Values = Mapping[Loc, Any]


class PoolWorker:
    """What an actor does: it opens the models once, and measures."""

    def __init__(self, file: TemplateFile, options: Options, commands: bool) -> None:
        first = file.template.values(file.template.start(), 1)
        self.error: DeltamergeError | None = None
        try:
            self.bench = Bench(file, first, candidates_of(file, options), options, commands=commands)
        except DeltamergeError as error:
            self.error = error

    def pid(self) -> int:
        """Return the id of its process."""
        return os.getpid()

    def measure(self, some: Sequence[Values], part: Part) -> list[Outcome] | DeltamergeError:
        """Return the outcomes, or the error for the user."""
        if self.error is not None:
            return self.error
        with tempfile.TemporaryDirectory(prefix="deltamerge-") as work:
            return self.bench.measure(some, part, Path(work))


class Pool:
    """Actors of a cluster; `size` of them work at a time."""

    def __init__(
        self, ray: Any, file: TemplateFile, options: Options, interrupted: threading.Event, *, commands: bool
    ) -> None:
        self.ray, self.interrupted = ray, interrupted
        workers = options.workers or 1
        self.size = max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)
        gpus, device = gpus_of(options.device)
        needs = {"num_cpus": workers, "num_gpus": gpus}
        asked = replace(options, device=device, workers=workers, watch=unwatched, drawing=None)
        actor = ray.remote(scheduling_strategy="SPREAD", **needs)(PoolWorker)
        self._actor, self._given = actor, (file, asked, commands)
        self.actors: list[Any] = []

    def _start(self) -> Any:
        return self._actor.remote(*self._given)

    def measure(self, some: Sequence[Values], part: Part) -> list[Outcome]:
        """Return the outcomes, in order. If an actor dies, a new one measures its candidates again.

        OutputError: actors die again and again.
        """
        count = min(self.size, len(some))
        while len(self.actors) < count:
            self.actors.append(self._start())
        shares = {i: list(range(i, len(some), count)) for i in range(count)}
        found: dict[int, Outcome] = {}
        for i, numbers in self._outcomes(shares, some, part):
            found |= dict(zip(shares[i], numbers, strict=True))
        return [found[i] for i in range(len(some))]

    def _outcomes(
        self, shares: Mapping[int, Sequence[int]], some: Sequence[Values], part: Part
    ) -> Iterator[tuple[int, list[Outcome]]]:
        deaths = dict.fromkeys(shares, 0)

        def begin(i: int) -> Any:
            return self.actors[i].measure.remote([some[n] for n in shares[i]], part)

        running = {begin(i): i for i in shares}
        while running:
            done = ended(self.ray, list(running), self.interrupted)[0]
            i = running.pop(done)
            try:
                answer = self.ray.get(done)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except self.ray.exceptions.RayError as error:
                deaths[i] += 1
                if deaths[i] > RETRIES:
                    raise OutputError(
                        f"a worker died {deaths[i]} times: {str(error).splitlines()[0]}",
                        hint="if it took too much memory, lower study.together",
                    ) from error
                self.actors[i] = self._start()
                running[begin(i)] = i
                continue
            if isinstance(answer, DeltamergeError):
                raise answer
            yield i, answer


@contextmanager
def pool_of(file: TemplateFile, options: Options, address: str | None, *, commands: bool) -> Iterator[Pool | None]:
    """Return the pool of a cluster. None where no address is given."""
    if address is None:
        yield None
        return
    with connected(address) as ray, interrupts() as interrupted:
        yield Pool(ray, replace(file, path=file.path.resolve()), options, interrupted, commands=commands)
