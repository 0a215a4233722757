"""The whole story: load, plan, execute, write, finish, rename into place."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltamerge import lock as locks
from deltamerge.adapter import write_adapter
from deltamerge.artifact import write_delta, write_within_budget
from deltamerge.assets import write_assets
from deltamerge.budget import Choice, budget_of
from deltamerge.card import render
from deltamerge.chain import Document, documents, folder_of, is_current, result
from deltamerge.errors import InputError, OutputError, UsageError
from deltamerge.execute import Task, default_workers, execute, shared_values
from deltamerge.graph import Node
from deltamerge.io import hub
from deltamerge.io.checkpoint import Checkpoint, Reader, TensorInfo
from deltamerge.io.delta_writer import Summary
from deltamerge.io.writer import Writer
from deltamerge.plan import Plan, plan
from deltamerge.recipe import Recipe
from deltamerge.stages import Calibrated

DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: the folder, its plan, what its lock says, and what a delta artifact takes; of a file of several
    documents the output's.

    `intermediate` are the folders of the other documents, and whether each was made now or was there and current.
    """

    folder: Path
    plan: Plan
    lock: dict[str, Any]
    delta: Summary | None = None
    intermediate: Mapping[Path, bool] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(
            entry["size"] for name, entry in self.lock.get("outputs", {}).items() if name.endswith(".safetensors")
        )


def make_plan(path: Path, out: Path | None = None, **options: Any) -> Plan:
    """The plan of the recipe at `path`, of its output where it has several documents; `make_plans` has the options."""
    return make_plans(path, out, **options)[-1]


def make_plans(
    path: Path,
    out: Path | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    weights: bool = False,
    data: bool = True,
    upto: str | None = None,
    pins: Mapping[str, str] | None = None,
    text: str | None = None,
    densities: Mapping[str, float] | None = None,
) -> tuple[Plan, ...]:
    """The plans of every document of the recipe at `path`, or of `text` as if it stood there, in the order of their
    run, the output's last, or up to that of the document `upto`; `weights` fetches hub models whole instead of their
    headers, `data` reads the calibration data to check it, `pins` has the commits of hub models that the recipe names
    without a revision, `densities` are those that a budget allows."""
    chain = documents(path, text)
    beside, target = path.resolve().parent, target_of(path, chain[-1].recipe, out)
    made: dict[str, Checkpoint] = {}

    def opener(reference: str, folder: Path) -> Checkpoint:
        if reference in made:
            return made[reference]
        if pins and reference in pins:
            pairs = zip(reference.split("+"), pins[reference].split("+"), strict=True)
            pinned = "+".join(part if "@" in part else f"{part}@{commit}" for part, commit in pairs)
            return replace(hub.resolve(pinned, folder, weights=weights), reference=reference)
        return hub.resolve(reference, folder, weights=weights)

    plans: list[Plan] = []
    for document in chain:
        planned = plan(
            document.recipe,
            beside,
            opener,
            device=choose_device(device),
            workers=workers or default_workers(),
            memory=memory,
            data=data,
            densities=densities if document is chain[-1] else None,
        )
        plans.append(planned)
        if document.name == upto:
            break
        if document is not chain[-1]:
            made[document.name] = result(planned, folder_of(document, target, beside), document.name)
    return tuple(plans)


def choose_device(device: str) -> str:
    """ "auto" is the first GPU where there is one; torch is asked only if the machine shows an NVIDIA device."""
    if not DEVICES.fullmatch(device):
        raise UsageError(f"--device {device}: no such device", hint="auto, cpu, cuda or cuda:N")
    if device != "auto":
        return device
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def target_of(path: Path, recipe: Recipe, out: Path | None) -> Path:
    """`--out`; else `output.path` beside the recipe; else `<recipe name>-merged` beside it."""
    if out is not None:
        return out
    return path.resolve().parent / (recipe.output.path or f"{path.stem}-merged")


def run(
    path: Path,
    out: Path | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    force: bool = False,
    locked: bool = False,
    pins: Mapping[str, str] | None = None,
    text: str | None = None,
    watch: Callable[[Plan], Callable[[int], None]] = lambda _: lambda _: None,
) -> Result:
    """Run the recipe at `path`; the target appears under its name only when complete.

    `text` is the recipe where there is no file at `path`. `watch` is given the plan before the first byte and returns
    what is told the bytes done. Of several documents those that others need are made first, unless their folders hold
    just what would be made.
    """
    chain = documents(path, text)
    beside, target = path.resolve().parent, target_of(path, chain[-1].recipe, out)
    options: dict[str, Any] = {
        "device": device, "workers": workers, "memory": memory, "data": not locked, "pins": pins, "text": text,
    }  # fmt: skip
    if len(chain) > 1:
        make_plans(path, out, **options)  # a fault of any document ends the run before the first is made
    intermediate: dict[Path, bool] = {}
    for document in chain[:-1]:
        folder = folder_of(document, target, beside)
        planned = make_plan(path, out, upto=document.name, **options)
        if _from_hub(planned):
            planned = make_plan(path, out, upto=document.name, weights=True, **options)
        intermediate[folder] = not is_current(document, planned, folder)
        if intermediate[folder]:
            ours = force or (folder / locks.LOCK_NAME).is_file()
            _run(path, document, planned, folder, force=ours, locked=False, watch=watch, out=out, **options)
    planned = make_plan(path, out, **options)
    done = _run(path, chain[-1], planned, target, force=force, locked=locked, watch=watch, out=out, **options)
    return replace(done, intermediate=intermediate)


def _run(
    path: Path,
    document: Document,
    planned: Plan,
    target: Path,
    *,
    force: bool,
    locked: bool,
    watch: Callable[[Plan], Callable[[int], None]],
    **options: Any,
) -> Result:
    """Make the result of one document of the recipe at `path`."""
    with finished_folder(target, force=force, inputs=_places(planned)) as folder:
        if _from_hub(planned):
            planned = make_plan(path, weights=True, upto=document.name, **options)
        known: dict[Node, Calibrated] = {}
        inputs = _beside(lambda: locks.describe_inputs(planned, 1))
        if locked:
            lock_path = path.with_suffix(".lock")
            lock = locks.read_lock(lock_path)
            locks.check_inputs(lock, inputs.result(), lock_path)
            known = locks.locked_calibration(planned, lock, lock_path)
        check_deltas(planned)
        written: Summary | None = None
        choice: Choice | None = None
        if budget_of(planned) is not None:

            def remake(densities: Mapping[str, float]) -> Plan:
                return make_plan(path, **options, upto=document.name, weights=True, densities=densities)

            densities = locks.locked_densities(lock, lock_path) if locked else None
            planned, values, written, choice = write_within_budget(planned, folder, watch, remake, densities)
        elif planned.recipe.output.kind == "delta":
            values, written = write_delta(planned, folder, watch(planned), known)
        else:
            values = _write_weights(planned, folder, watch(planned), known)
        calibrated = {node: values[node] for node in planned.stages}
        if planned.recipe.output.kind == "peft":
            planned = replace(planned, notes=planned.notes + write_adapter(planned, folder))
        else:
            write_assets(planned, folder)
        (folder / "recipe.yaml").write_text(document.text, encoding="utf-8")
        card = render(planned, document.text, target.name, calibrated, written, choice)
        (folder / locks.CARD).write_text(card, encoding="utf-8")
        lock_path = folder / locks.LOCK_NAME
        calibration = locks.write_calibration(planned, calibrated, lock_path)
        outputs = locks.describe_files((p for p in folder.iterdir() if p.is_file()), planned.workers)
        lock = locks.write_lock(planned, lock_path, inputs.result(), outputs, calibration, choice)
    return Result(target, planned, lock, written)


def _from_hub(planned: Plan) -> bool:
    return any(source.hub_id for checkpoint in planned.inputs.checkpoints for source in checkpoint.sources)


def _places(planned: Plan) -> list[tuple[str, Path]]:
    """Every folder that is read, and whose it is."""
    lender = planned.inputs.vocabulary
    models = [*planned.inputs.checkpoints, *([lender.checkpoint] if lender is not None else [])]
    return [(c.reference, source.path) for c in models for source in c.sources]


def check_deltas(planned: Plan) -> None:
    """InputError unless every delta among the models was made from the base that it is put over, by hash."""
    deltas = [checkpoint for checkpoint in planned.inputs.checkpoints if checkpoint.delta is not None]
    if not deltas:
        return
    from deltamerge.io.layered import check_base

    with Reader() as reader:
        for delta in deltas:
            check_base(delta, reader, planned.workers)


def calibrate(
    path: Path, *, device: str = "auto", workers: int | None = None, memory: int | None = None
) -> dict[str, Any]:
    """Run only the calibration stages of the recipe at `path` and write what they chose to the lock beside it.

    Returns the lock's `calibration`. InputError: the recipe has no calibrated q.
    """
    if len(documents(path)) > 1:
        raise InputError(f"{path}: has several documents", hint="`deltamerge run` calibrates each as it makes it")
    planned = make_plan(path, device=device, workers=workers, memory=memory, weights=True)
    if not planned.stages:
        raise InputError(
            f"{path}: no q is calibrated", hint="prune: {method: magnitude, density: 0.01, q: output_change}"
        )
    found = shared_values(planned.stages, {})
    lock_path = path.with_suffix(".lock")
    calibration = locks.write_calibration(planned, found, lock_path)
    locks.write_lock(planned, lock_path, locks.describe_inputs(planned, planned.workers), {}, calibration)
    return calibration


def _beside(work: Callable[[], dict[str, Any]]) -> Future[dict[str, Any]]:
    """Do `work` while the run goes on; a daemon, so that a run that fails or is interrupted does not wait for it."""
    future: Future[dict[str, Any]] = Future()

    def go() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=go, daemon=True).start()
    return future


@dataclass(frozen=True, slots=True)
class _Shards:
    """The sink of a run: tiles go to their known place in the output's shards."""

    writer: Writer

    def write(self, name: str, offset: int, data: Any) -> None:
        self.writer.write(name, offset, data)

    def copy(self, name: str, offset: int, source: TensorInfo, start: int, nbytes: int, reader: Reader) -> None:
        self.writer.copy(name, offset + start, source, start, nbytes, reader)


def _write_weights(
    planned: Plan, folder: Path, progress: Callable[[int], None], known: dict[Node, Calibrated]
) -> dict[Node, Any]:
    tasks = [
        Task(output.name, piece.built.root, piece.backend, piece.offset)
        for output in planned.outputs
        for piece in output.pieces
    ]
    with Reader() as reader, Writer(folder, planned.layout) as writer:
        values = execute(
            tasks,
            reader,
            _Shards(writer),
            device=planned.device,
            workers=planned.workers,
            tile_elements=planned.tile_elements,
            progress=progress,
            known=known,
        )
        writer.finish()
    return values


@contextmanager
def finished_folder(target: Path, *, force: bool, inputs: Iterable[tuple[str, Path]]) -> Iterator[Path]:
    """A folder beside `target` to work in; renamed to it if all goes well, removed if not; no input is in it."""
    resolved = target.resolve()
    for name, path in inputs:
        if path.resolve().is_relative_to(resolved):
            raise OutputError(f"{target}: holds the input {name}", hint="choose another folder with --out")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file", hint="choose another folder with --out")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputError(f"{target}: not empty", hint="choose another folder with --out, or replace it with --force")
    work = resolved.parent / f".{resolved.name}.{os.getpid()}.partial"
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{work.parent}: cannot be written: {error.strerror}") from error
    try:
        yield work
        _replace(resolved, work)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{error.filename}: vanished during the run") from error
        raise OutputError(f"{target}: cannot be written: {error.strerror}", hint="free space and run again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(target: Path, work: Path) -> None:
    """Put `work` under the name `target`; an old target stays whole until the new one is there."""
    if not target.exists():
        os.rename(work, target)
        return
    old = work.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(work, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old)
