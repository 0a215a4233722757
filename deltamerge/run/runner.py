"""The whole story: load, plan, execute, write, finish, rename into place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from deltamerge import errors
from deltamerge.delta.writer import Summary
from deltamerge.engine.execute import shared_values
from deltamerge.engine.graph import depth_first
from deltamerge.errors import InputError
from deltamerge.inspect.pictures import Draw, drawing
from deltamerge.io.atomic import refuse_taken
from deltamerge.io.audit import NonFinite
from deltamerge.io.blobs import check_blobs
from deltamerge.io.checkpoint import INDEX
from deltamerge.io.pieces import Pieces
from deltamerge.io.reader import Reader
from deltamerge.io.seals import seal
from deltamerge.io.workspace import Workspace, is_begun, refuse_inputs, workspace
from deltamerge.io.writer import write_index
from deltamerge.plan.finite import replanned, set_aside, unexpected
from deltamerge.plan.kinship import unrelated
from deltamerge.plan.planner import Plan
from deltamerge.recipe.file import Document, documents
from deltamerge.run import hashes
from deltamerge.run import lock as locks
from deltamerge.run.assets import asset_files, write_assets
from deltamerge.run.budget import budget_of
from deltamerge.run.card import render
from deltamerge.run.intermediate import check_places, folder_of, is_current, is_result
from deltamerge.run.partition import Part, check_recipes, check_shards, drop_damaged, gather
from deltamerge.run.peft import write_adapter
from deltamerge.run.plans import make_plan, make_plans, target_of
from deltamerge.run.weights import Made, calibrated, check_finite, make_weights

T = TypeVar("T")


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
    mergekit_exact: bool = False,
    watch: Callable[[Plan], Callable[[int], None]] = lambda _: lambda _: None,
) -> Result:
    """Run the recipe at `path`; the target appears under its name only when complete.

    `text` is the recipe where there is no file at `path`; `mergekit_exact` writes mergekit's defaults into it. What
    `watch` returns, given the plan before the first byte, is told the bytes done. Of several documents those that
    others need are made first, unless their folders hold just what would be made. `pictures` are drawn for the card.
    With `pins`, which a stranger's recipe has, `output.path` of a document is not followed.
    With `part` only that part's shards are written, to the work folder, for `finish`. `resume` goes on where an
    interrupted run stopped, and is done at once where one had ended.
    """
    chain = documents(path, text, mergekit_exact=mergekit_exact)
    beside, target = path.resolve().parent, target_of(path, chain[-1].recipe, out)
    published = pins is not None
    if not (force or published):
        check_places(path, chain, beside)
    options: dict[str, Any] = {
        "device": device, "workers": workers, "memory": memory, "data": not locked, "pins": pins, "text": text,
        "mergekit_exact": mergekit_exact,
    }  # fmt: skip
    if part:
        check_recipes(path, [document.recipe for document in chain], "--part")
    if len(chain) > 1:
        make_plans(path, out, **options)  # a fault of any document ends the run before the first is made
    intermediate: dict[Path, bool] = {}
    for document in chain[:-1]:
        folder = folder_of(document, target, beside, published=published)
        is_begun(folder)  # removes what a run that was killed after its last rename left
        planned = make_plan(path, out, upto=document.name, **options)
        if _from_hub(planned):
            planned = make_plan(path, out, upto=document.name, weights=True, **options)
        intermediate[folder] = not is_current(document, planned, folder)
        if intermediate[folder]:
            ours = force or is_result(document, folder)
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
    if resume and not (part or is_begun(target)) and is_current(chain[-1], planned, target):
        lock = locks.read_lock(target / locks.LOCK_NAME)  # killed after its last rename, and started again
        return Result(target, planned, lock, intermediate=intermediate)
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
    if part:
        part.files(planned.layout)
    with workspace(target, force=force, resume=resume, part=part.name if part else None) as work:
        if _from_hub(planned):
            planned = make_plan(path, weights=True, upto=document.name, **options)
        planned = set_aside(_warned(planned))
        assets = asset_files(planned)  # links that leave a model's folder are refused before the work, not after
        facts = hashes.facts(planned, document.text)
        work.begin(facts)
        if part:
            drop_damaged(work, planned.workers)
        sound = _beside(lambda: check_blobs(_files_read(planned, part, assets.values()), planned.workers))
        lock_path = path.with_suffix(".lock") if locked else None
        lock = locks.read_lock(lock_path) if lock_path else {}
        pieces, takes = Pieces(), (part or Part(1, 1)).takes
        if lock_path and part is None:
            locks.check_inputs(lock, hashes.describe_inputs(planned, planned.workers, takes, pieces), lock_path)
        hashing = _beside(lambda: hashes.hash_ahead(planned, takes, pieces))
        check_deltas(planned)

        def replan(densities: Mapping[str, float]) -> Plan:
            return make_plan(path, **options, upto=document.name, weights=True, densities=densities)

        make = partial(
            make_weights, work=work, watch=watch, replan=replanned(replan), part=part, lock=lock,
            lock_path=lock_path, facts=facts, pieces=pieces,
        )  # fmt: skip
        made = make(planned)
        if part is None and budget_of(planned) is None:
            again = set_aside(planned, made.nonfinite)
            if again.tasks != planned.tasks:  # of large tensors what is not finite is seen only in the result
                work.empty()
                work.forget()
                made = make(again)
            made = replace(made, plan=again)
        planned = made.plan
        now = hashes.facts(planned, document.text)
        if changed := sorted(name for name in facts if now.get(name) != facts[name]):
            work.forget()
            raise InputError(f"changed during the run: {', '.join(changed)}", hint="run it again from the start")
        try:
            sound.result()
        except InputError:
            work.forget()
            raise
        made = replace(made, nonfinite=unexpected(planned, made.nonfinite))
        check_finite(planned, made.nonfinite, allow=allow_nonfinite)
        hashing.result()
        inputs = hashes.describe_inputs(planned, planned.workers, takes, pieces)
        if part:
            work.journal.append({"part": {"inputs": inputs, "outputs": made.hashed}})
            return Result(work.folder, part.of(planned), {}, None, made.nonfinite)
        planned, lock = _complete(made, work, document.text, target.name, inputs, draw)
    return Result(target, planned, lock, made.delta, made.nonfinite)


def finish(
    path: Path,
    out: Path | None = None,
    *,
    workers: int | None = None,
    force: bool = False,
    locked: bool = False,
    pictures: bool = False,
    pins: Mapping[str, str] | None = None,
    mergekit_exact: bool = False,
) -> Result:
    """Make the target of what all parts of a run wrote. OutputError: some part is missing or unfinished."""
    chain = documents(path, mergekit_exact=mergekit_exact)
    check_recipes(path, [document.recipe for document in chain], "--finish")
    planned = make_plan(path, device="cpu", workers=workers, data=not locked, pins=pins, mergekit_exact=mergekit_exact)
    target = target_of(path, planned.recipe, out)
    if not is_begun(target) and is_current(chain[-1], planned, target):  # killed after its last rename, and again
        return Result(target, planned, locks.read_lock(target / locks.LOCK_NAME))
    draw = drawing(planned, data=False) if pictures else None
    with workspace(target, force=force, finish=True) as work:
        text = planned.recipe.source.text
        facts = hashes.facts(planned, text)
        parts = gather(work, facts)
        outputs, seals = check_shards(work, planned.layout, parts, planned.workers)
        inputs: dict[str, Any] = {}
        for part in parts:
            for reference, entry in part["inputs"].items():
                inputs.setdefault(reference, {**entry, "files": {}})["files"] |= entry["files"]
        if locked:
            locks.check_inputs(locks.read_lock(path.with_suffix(".lock")), inputs, path.with_suffix(".lock"))
        known = calibrated(planned, work, path.with_suffix(".lock") if locked else None, facts, alone=False)
        write_index(work.folder, planned.layout)
        made = Made(set_aside(planned), known, outputs, seals=seals)
        planned, lock = _complete(made, work, text, target.name, inputs, draw)
    return Result(target, planned, lock)


def _complete(
    made: Made, work: Workspace, text: str, title: str, inputs: dict[str, Any], draw: Draw | None
) -> tuple[Plan, dict[str, Any]]:
    """Write all that is no weight and give the folder its name."""
    folder, planned, outputs = work.folder, _warned(made.plan), made.hashed
    if planned.recipe.output.kind != "delta":
        for path in folder.iterdir():  # of an attempt that was killed, or of what had been there before
            if path.name not in outputs and path.name != INDEX:
                path.unlink()
    found = {node: made.values[node] for node in planned.stages}
    if planned.recipe.output.kind == "peft":
        planned, outputs = replace(planned, notes=planned.notes + write_adapter(planned, folder)), {}
    else:
        write_assets(planned, folder)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    lock_path = folder / locks.LOCK_NAME
    lock_path.unlink(missing_ok=True)
    calibration = locks.write_calibration(planned, found, lock_path)
    pictures = {}
    if draw is not None:
        locks.write_lock(planned, lock_path, inputs, {}, calibration, made.choice)
        pictures = draw(planned, folder, lock_path)
        lock_path.unlink()
    card = render(planned, text, title, found, made.delta, made.choice, pictures)
    (folder / locks.CARD).write_text(card, encoding="utf-8")
    others = [path for path in folder.iterdir() if path.name not in outputs]
    seals = {**made.seals, **{path.name: seal(path) for path in others}}
    outputs = outputs | hashes.describe_files(others, planned.workers)
    lock = locks.write_lock(planned, lock_path, inputs, outputs, calibration, made.choice)
    work.publish(outputs, seals, planned.workers)
    return planned, lock


def _warned(planned: Plan) -> Plan:
    """The plan with a warning for each model that a sample of its weights tells to be no kin of its base."""
    return replace(planned, warnings=tuple(dict.fromkeys([*planned.warnings, *unrelated(planned.inputs)])))


def _files_read(planned: Plan, part: Part | None, assets: Iterable[Path]) -> list[Path]:
    """The files that the output depends on; of plain checkpoints' shards those that the part reads."""
    wanted = {path for _, paths in hashes.files_read(planned) for path in paths} | set(assets)
    if part is not None and not planned.stages:
        nodes = [node for task in part.of(planned).tasks for node in depth_first(task.root) if node.kind == "read"]
        read = {node.parameter("tensor").path for node in nodes}
        plain = [c for c in planned.inputs.checkpoints if c.adapter is None and c.base is None]
        wanted -= {path for c in plain for path in c.files if path not in read}
    return sorted(wanted)


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
    deltas = planned.inputs.deltas
    if not deltas:
        return
    from deltamerge.delta.over_base import check

    with Reader() as reader:
        for checkpoint in planned.inputs.checkpoints:
            if checkpoint.base is not None:
                with errors.context(checkpoint.reference):
                    delta = deltas[checkpoint.reference]
                    check(delta, checkpoint.base, reader, planned.workers, planned.tile_elements)


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
    lock_path = path.with_suffix(".lock")
    for written in (lock_path, lock_path.with_suffix(locks.ROWS)):
        with errors.context(str(written)):
            refuse_taken(written)
    check_deltas(planned)
    found = shared_values(planned.stages, {})
    calibration = locks.write_calibration(planned, found, lock_path)
    locks.write_lock(planned, lock_path, hashes.describe_inputs(planned, planned.workers), {}, calibration)
    return calibration


def _beside(work: Callable[[], T]) -> Future[T]:
    """Do `work` while the run goes on; a daemon, so that a run that fails or is interrupted does not wait for it."""
    future: Future[T] = Future()

    def go() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=go, daemon=True).start()
    return future
