"""The parts of a run as tasks of a Ray cluster. A part whose worker dies continues elsewhere, from its journal."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltamerge.errors import DeltamergeError, InputError, OutputError
from deltamerge.files.work_folder import parts_workspace
from deltamerge.formats.audit import NonFinite
from deltamerge.recipe.file import RecipeFile
from deltamerge.run.options import Options, unwatched
from deltamerge.run.partition import Part, check_recipe
from deltamerge.run.plans import guard_of, make_plans, target_of
from deltamerge.run.runner import Result, finish, run

RETRIES = 3
LOCAL = "local"
HOST_AND_PORT = re.compile(r"(ray://)?(?P<host>[^:/]+):(?P<port>\d+)")


def run_on_ray(file: RecipeFile, out: Path | None, options: Options, *, address: str = LOCAL) -> Result:
    """Run a recipe file in parts side by side on the Ray cluster at `address` (by default on this machine's cores).

    There are as many parts as shards, but no more than the cluster has room for, at `workers` cores (default 1) a task.
    `memory` is the limit of each task. q's are calibrated once, by a task that all parts wait for. Every machine must
    see the recipe's models and the target under the same paths. InputError: several documents, or an output that is no
    model. OutputError: a part's worker died repeatedly.
    """
    check_recipe(file, "--ray")
    planned = make_plans(file, out, replace(options, device="cpu"))[-1]
    file, target = replace(file, path=file.path.resolve()), target_of(file, out).resolve()
    guard = guard_of(file, file.output, target, unasked=out is None)
    workers = options.workers or 1
    gpus, device = gpus_of(options.device)
    asked = replace(options, workers=workers, resume=True, watch=unwatched, drawing=None, device=device)
    nonfinite: dict[str, NonFinite] = {}
    with (
        parts_workspace(target, force=options.force, resume=options.goes_on, guard=guard) as begun,
        connected(address) as ray,
        interrupts() as interrupted,
    ):
        cores = int(ray.cluster_resources().get("CPU", 1))
        count = begun or max(1, min(len(planned.layout.files), cores // workers))
        needs = {"num_cpus": workers, "num_gpus": gpus}
        task = ray.remote(max_retries=RETRIES, scheduling_strategy="SPREAD", **needs)(_run_part)

        def start(part: Part) -> Any:
            return task.options(name=f"deltamerge {part.name}").remote(file, target, part, asked)

        if planned.stages and options.lock is None:
            first = start(Part(0, count))
            ended(ray, [first], interrupted)
            _result(ray, first, Part(0, count))
        with options.merging(planned) as told:
            running = {start(part): part for part in (Part(i, count) for i in range(1, count + 1))}
            while running:
                for reference in ended(ray, list(running), interrupted):
                    nbytes, found = _result(ray, reference, running.pop(reference))
                    told(nbytes)
                    nonfinite |= found
    done = finish(file, out, options)
    return Result(done.folder, done.plan, done.lock, nonfinite=nonfinite)


def gpus_of(device: str) -> tuple[int, str]:
    """Return the number of GPUs of a task, and its device. Ray shows the task its GPUs from cuda:0 on."""
    if not device.startswith("cuda"):
        return 0, device
    count = device.count(",") + 1
    return count, "cuda:all" if count > 1 else "cuda"


def _run_part(file: RecipeFile, target: Path, part: Part, options: Options) -> Any:
    """Run a part on a worker. Return its bytes and its values that are not finite, or the error for the user."""
    try:
        done = run(file, target, options, part=part)
    except DeltamergeError as error:
        return error
    return done.plan.nbytes, dict(done.nonfinite)


def _result(ray: Any, reference: Any, part: Part) -> Any:
    """Return the result of a task. Raise its error, if that is one."""
    try:
        found = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise OutputError(
            f"part {part.index}/{part.count}: its worker died {RETRIES + 1} times: {str(error).splitlines()[0]}",
            hint="if it took too much memory, give --memory",
        ) from error
    if isinstance(found, DeltamergeError):
        found.where.insert(0, f"part {part.index}/{part.count}" if part.index else "calibration")
        raise found
    return found


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C, because a KeyboardInterrupt inside a callback of Ray is lost."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(*_: object) -> None:
        seen.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def ended(ray: Any, references: list[Any], interrupted: threading.Event) -> list[Any]:
    """Wait for tasks, and return the ended tasks. KeyboardInterrupt: the flag is set."""
    while not (done := ray.wait(references, timeout=1)[0]) and not interrupted.is_set():
        pass
    if interrupted.is_set():
        raise KeyboardInterrupt
    return done  # type: ignore[no-any-return]  # ray has no stub for it


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to Ray; its tasks end with the block. InputError: Ray is not installed, or no cluster is at `address`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent
    if address == LOCAL and not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # a token for this run's cluster alone; ray would make one in the user's home
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("--ray needs ray", hint="pip install 'deltamerge[ray]'") from None
    try:
        if found := HOST_AND_PORT.fullmatch(address):  # ray would try for half an hour
            socket.create_connection((found["host"], int(found["port"])), timeout=10).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ray has no error class for a node that is too slow to start
        raise InputError(
            f"--ray {address}: no cluster to use: {str(error).splitlines()[0]}",
            hint="start one with `ray start --head` and set RAY_AUTH_MODE and RAY_AUTH_TOKEN as there, "
            "or leave the address out for a cluster of this machine",
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # ray's log of workers that died
            yield ray
    finally:
        ray.shutdown()
