"""The whole story: load, plan, execute, write, finish, rename into place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge import lock as locks
from deltamerge.adapter import write_adapter
from deltamerge.artifact import write_delta, write_within_budget
from deltamerge.assets import asset_files, write_assets
from deltamerge.budget import Choice, budget_of
from deltamerge.card import render
from deltamerge.chain import Document, documents, folder_of, is_current
from deltamerge.distribute import Part, gather, shared_calibration
from deltamerge.errors import InputError, OutputError
from deltamerge.execute import execute, shared_values
from deltamerge.graph import Node
from deltamerge.illustrate import Draw, drawing
from deltamerge.io.audit import Findings, NonFinite
from deltamerge.io.checkpoint import Reader, TensorInfo
from deltamerge.io.delta_writer import Summary
from deltamerge.io.files import Descriptor, sync_path
from deltamerge.io.workspace import Workspace, refuse_inputs, workspace
from deltamerge.io.writer import Writer, write_index
from deltamerge.planner import Plan
from deltamerge.plans import make_plan, make_plans, target_of


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: the folder, its plan, what its lock says, what a delta artifact takes, and what is not finite; of
    a file of several documents the output's.

    `intermediate` are the folders of the other documents, and whether each was made now or was there and current.
    """

    folder: Path
    plan: Plan
    lock: dict[str, Any]
    delta: Summary | None = None
    nonfinite: Mapping[str, NonFinite] = field(default_factory=dict)
    intermediate: Mapping[Path, bool] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(
            entry["size"] for name, entry in self.lock.get("outputs", {}).items() if name.endswith(".safetensors")
        )


def run(
    path: Path,
    out: Path | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    part: Part | None = None,
    resume: bool = False,
    force: bool = False,
    locked: bool = False,
    allow_nonfinite: bool = False,
    pictures: bool = False,
    pins: Mapping[str, str] | None = None,
    text: str | None = None,
    watch: Callable[[Plan], Callable[[int], None]] = lambda _: lambda _: None,
) -> Result:
    """Run the recipe at `path`; the target appears under its name only when complete.

    `text` is the recipe where there is no file at `path`. `watch` is given the plan before the first byte and returns
    what is told the bytes done. Of several documents those that others need are made first, unless their folders hold
    just what would be made. `pictures` are drawn for the card. With `part` only that part's shards are written, to
    the work folder, for `finish`. `resume` goes on where an interrupted run stopped.
    """
    chain = documents(path, text)
    beside, target = path.resolve().parent, target_of(path, chain[-1].recipe, out)
    options: dict[str, Any] = {
        "device": device, "workers": workers, "memory": memory, "data": not locked, "pins": pins, "text": text,
    }  # fmt: skip
    if part and len(chain) > 1:
        raise InputError(f"{path}: has several documents, --part takes one", hint="give each document its own file")
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
            _run(
                path,
                document,
                planned,
                folder,
                force=ours,
                resume=resume,
                allow_nonfinite=allow_nonfinite,
                watch=watch,
                out=out,
                **options,
            )
    planned = make_plan(path, out, **options)
    done = _run(
        path, chain[-1], planned, target, force=force, resume=resume, part=part, locked=locked,
        allow_nonfinite=allow_nonfinite, pictures=pictures, watch=watch, out=out, **options,
    )  # fmt: skip
    return replace(done, intermediate=intermediate)


def _run(
    path: Path,
    document: Document,
    planned: Plan,
    target: Path,
    *,
    force: bool,
    resume: bool = False,
    part: Part | None = None,
    locked: bool = False,
    allow_nonfinite: bool = False,
    pictures: bool = False,
    watch: Callable[[Plan], Callable[[int], None]],
    **options: Any,
) -> Result:
    """Make the result of one document of the recipe at `path`."""
    draw = drawing(planned, data=not locked) if pictures else None
    refuse_inputs(target, _places(planned))
    if part and planned.recipe.output.kind != "model":
        hint = "run without --part; or the parts with output.kind model, then deltamerge extract of what they make"
        raise InputError("--part writes models only", hint=hint)
    if part:
        part.files(planned.layout)
    with workspace(target, force=force, resume=resume, part=part.name if part else None) as work:
        if _from_hub(planned):
            planned = make_plan(path, weights=True, upto=document.name, **options)
        asset_files(planned)  # links that leave a model's folder are refused before the work, not after
        facts = locks.facts(planned, document.text)
        work.begin(facts)
        share = part or Part(1, 1)
        inputs = _beside(lambda: locks.describe_inputs(planned, 1, share.takes))
        lock_path = path.with_suffix(".lock") if locked else None
        lock = locks.read_lock(lock_path) if lock_path else {}
        if lock_path and part is None:
            locks.check_inputs(lock, inputs.result(), lock_path)
        check_deltas(planned)
        if planned.recipe.output.kind == "delta":
            work.empty()
        written: Summary | None = None
        choice: Choice | None = None
        outputs: dict[str, Any] = {}
        nonfinite: Mapping[str, NonFinite] = {}
        if budget_of(planned) is not None:

            def remake(densities: Mapping[str, float]) -> Plan:
                return make_plan(path, **options, upto=document.name, weights=True, densities=densities)

            def settle(plan: Plan) -> Mapping[Node, Any]:
                return locks.locked_calibration(plan, lock, lock_path) if lock_path else shared_values(plan.stages, {})

            densities = locks.locked_densities(lock, lock_path) if lock_path else None
            planned, values, written, choice = write_within_budget(
                planned, work.folder, watch, remake, settle, densities
            )
        else:
            values = _calibration(planned, work, lock_path, facts, alone=part is None or part.index == 0)
            if planned.recipe.output.kind == "delta":
                values, written = write_delta(planned, work.folder, watch(planned), values, work.journal)
            else:
                mine = part.of(planned) if part else planned
                found = _write_weights(mine, work, watch(mine), values, part)
                nonfinite = found.nonfinite
                sizes = {file.name: file.size for file in planned.layout.files}
                outputs = {name: {"hash": digest, "size": sizes[name]} for name, digest in found.hashes.items()}
        if written is not None:
            nonfinite = written.nonfinite
        now = locks.facts(planned, document.text)
        if changed := sorted(name for name in facts if now.get(name) != facts[name]):
            raise InputError(f"changed during the run: {', '.join(changed)}", hint="run again with --force")
        _check_finite(planned, nonfinite, allow=allow_nonfinite)
        if part:
            work.journal.append({"part": {"inputs": inputs.result(), "outputs": outputs}})
            return Result(work.folder, mine, {}, None, nonfinite)
        text, found_inputs = document.text, inputs.result()
        planned, lock = _complete(
            planned, work, text, target.name, found_inputs, outputs, values, written, choice, draw=draw
        )
    return Result(target, planned, lock, written, nonfinite)


def finish(
    path: Path,
    out: Path | None = None,
    *,
    workers: int | None = None,
    force: bool = False,
    locked: bool = False,
    pictures: bool = False,
    pins: Mapping[str, str] | None = None,
) -> Result:
    """Make the target of what all parts of a run wrote. OutputError: some part is missing or unfinished."""
    if len(documents(path)) > 1:
        raise InputError(f"{path}: has several documents, --part takes one", hint="give each document its own file")
    planned = make_plan(path, device="cpu", workers=workers, data=not locked, pins=pins)
    target = target_of(path, planned.recipe, out)
    draw = drawing(planned, data=False) if pictures else None
    with workspace(target, force=force, finish=True) as work:
        text = planned.recipe.source.text
        facts = locks.facts(planned, text)
        parts = gather(work, facts)
        outputs: dict[str, Any] = {}
        inputs: dict[str, Any] = {}
        for part in parts:
            outputs |= part["outputs"]
            for reference, entry in part["inputs"].items():
                inputs.setdefault(reference, {**entry, "files": {}})["files"] |= entry["files"]
        if locked:
            locks.check_inputs(locks.read_lock(path.with_suffix(".lock")), inputs, path.with_suffix(".lock"))
        known = _calibration(planned, work, path.with_suffix(".lock") if locked else None, facts, alone=False)
        write_index(work.folder, planned.layout)
        planned, lock = _complete(planned, work, text, target.name, inputs, outputs, known, draw=draw)
    return Result(target, planned, lock)


def _complete(
    planned: Plan,
    work: Workspace,
    text: str,
    title: str,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    values: Mapping[Node, Any],
    written: Summary | None = None,
    choice: Choice | None = None,
    draw: Draw | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Write all that is no weight and give the folder its name; `outputs` are the files whose hash is known."""
    folder = work.folder
    calibrated = {node: values[node] for node in planned.stages}
    if planned.recipe.output.kind == "peft":
        planned, outputs = replace(planned, notes=planned.notes + write_adapter(planned, folder)), {}
    else:
        write_assets(planned, folder)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    lock_path = folder / locks.LOCK_NAME
    lock_path.unlink(missing_ok=True)
    calibration = locks.write_calibration(planned, calibrated, lock_path)
    pictures = {}
    if draw is not None:
        locks.write_lock(planned, lock_path, inputs, {}, calibration, choice)
        pictures = draw(planned, folder, lock_path)
        lock_path.unlink()
    card = render(planned, text, title, calibrated, written, choice, pictures)
    (folder / locks.CARD).write_text(card, encoding="utf-8")
    others = (p for p in folder.iterdir() if p.is_file() and p.name not in outputs)
    outputs = outputs | locks.describe_files(others, planned.workers)
    lock = locks.write_lock(planned, lock_path, inputs, outputs, calibration, choice)
    work.publish()
    return planned, lock


def _calibration(
    planned: Plan, work: Workspace, lock_path: Path | None, facts: Mapping[str, Any], *, alone: bool
) -> dict[Node, Any]:
    """The calibrated q's: an interrupted run's own, or part 0's, or the lock's, or, if `alone`, found now and kept."""
    if not planned.stages:
        return {}
    own = work.state / "calibration.lock"
    if any("calibrated" in record for record in work.journal.records) or shared_calibration(work, facts):
        lock_path = own
    if lock_path is not None:
        return dict(locks.locked_calibration(planned, locks.read_lock(lock_path), lock_path))
    if not alone:
        raise InputError(
            "--part: the recipe calibrates q, which all parts must share",
            hint="run `deltamerge calibrate RECIPE` once, then every part and --finish with --locked",
        )
    found = shared_values(planned.stages, {})
    calibrated = {node: found[node] for node in planned.stages}
    locks.write_lock(planned, own, {}, {}, locks.write_calibration(planned, calibrated, own))
    for path in (own, own.with_suffix(locks.ROWS)):
        if path.exists():
            sync_path(path)
    work.journal.append({"calibrated": True})
    return found


def _check_finite(planned: Plan, nonfinite: Mapping[str, NonFinite], *, allow: bool) -> None:
    """OutputError naming the tensors that hold NaN or infinities, unless they are allowed."""
    if not nonfinite or allow:
        return
    dtypes = {output.name: output.dtype for output in planned.outputs}
    half = any(dtypes[name] == "F16" and count.inf for name, count in nonfinite.items())
    advice = "float16 ends at 65504, give `dtype: bfloat16`; or keep them" if half else "keep them"
    raise OutputError(describe_nonfinite(nonfinite), hint=f"{advice} with --allow-nonfinite")


def describe_nonfinite(nonfinite: Mapping[str, NonFinite]) -> str:
    """Which tensors hold how much that is not finite, in a line."""
    named = [f"{n} ({', '.join(f'{x} {k}' for k, x in (('NaN', c.nan), ('inf', c.inf)) if x)})"
             for n, c in sorted(nonfinite.items())]  # fmt: skip
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"values that are not finite in {', '.join(named[:8])}{more}"


def _from_hub(planned: Plan) -> bool:
    return any(source.hub_id for checkpoint in planned.inputs.checkpoints for source in checkpoint.sources)


def _places(planned: Plan) -> list[tuple[str, Path]]:
    """Every folder that is read, and whose it is."""
    lender = planned.inputs.vocabulary
    models = [*planned.inputs.checkpoints, *([lender.checkpoint] if lender is not None else [])]
    return [(c.reference, source.path) for c in models for source in c.sources]


def check_deltas(planned: Plan) -> None:
    """InputError unless every delta among the models was made from the base that it is put over, and makes of it what
    it was made for, by hash."""
    deltas = [checkpoint for checkpoint in planned.inputs.checkpoints if checkpoint.delta is not None]
    if not deltas:
        return
    from deltamerge.io.layered import check

    with Reader() as reader:
        for delta in deltas:
            assert delta.delta is not None
            assert delta.base is not None
            with errors.context(delta.reference):
                check(delta.delta, delta.base, reader, planned.workers, planned.tile_elements)


def calibrate(
    path: Path, *, device: str = "auto", workers: int | None = None, memory: int | None = None
) -> dict[str, Any]:
    """Run only the calibration stages of the recipe at `path` and write what they chose to the lock beside it.

    Returns the lock's `calibration`. InputError: the recipe has no calibrated q.
    """
    if len(documents(path)) > 1:
        raise InputError(f"{path}: has several documents", hint="`deltamerge run` calibrates each as it makes it")
    planned = make_plan(path, device=device, workers=workers, memory=memory, weights=True)
    if budget_of(planned) is not None:
        raise InputError(
            f"{path}: a budget's densities are chosen as the artifact is written, and q for them",
            hint=f"deltamerge run {path}",
        )
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

    def place(self, name: str, offset: int) -> tuple[Descriptor, int]:
        return self.writer.place(name, offset)

    def wrote(self, name: str, offset: int, nbytes: int) -> None:
        self.writer.wrote(name, offset, nbytes)


def _write_weights(
    planned: Plan, work: Workspace, progress: Callable[[int], None], known: dict[Node, Any], part: Part | None
) -> Findings:
    files = part.files(planned.layout) if part else None
    with Reader() as reader, Writer(work.folder, planned.layout, files=files, journal=work.journal) as writer:
        execute(
            planned.tasks,
            reader,
            _Shards(writer),
            device=planned.device,
            workers=planned.workers,
            tile_elements=planned.tile_elements,
            progress=progress,
            known=known,
            done=writer.has,
        )
        return writer.finish(keep=part is not None)
