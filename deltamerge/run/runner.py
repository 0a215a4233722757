"""The story of a run: plan, work beside the target, write, check, finish, rename into place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from deltamerge import errors
from deltamerge.engine.execute import shared_values
from deltamerge.errors import DeltamergeError, InputError, OutputError
from deltamerge.errors.shown import as_html, human, shown, some
from deltamerge.files.descriptors import check_folder, files_of, writing
from deltamerge.files.hashes import Pieces, seal
from deltamerge.files.ownership import LOCK_NAME, Guard, read_lock
from deltamerge.files.work_folder import CALIBRATION, SPOOL, Workspace, is_begun, refuse_inputs, workspace
from deltamerge.formats.audit import NonFinite
from deltamerge.formats.safetensors import write_index
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.outputs.assets import RECIPE, asset_files, write_files
from deltamerge.outputs.output import Weights, WriteJob, output_of
from deltamerge.plan.finite import set_aside, unexpected
from deltamerge.plan.kinship import unrelated
from deltamerge.plan.planner import Plan
from deltamerge.recipe.file import Document, RecipeFile, read_recipe
from deltamerge.run import hashes
from deltamerge.run.card import render
from deltamerge.run.lock import CARD, Lock, refuse_foreign_lock, verify
from deltamerge.run.options import Draw, Options
from deltamerge.run.partition import (
    Part,
    check_recipe,
    check_shards,
    drop_damaged,
    gather_parts,
    shared_calibration,
)
from deltamerge.run.plans import Planner, check_places, guard_of, target_of
from deltamerge.run.reading import InputFiles, check_deltas, places
from deltamerge.tensors.tensor import Node
from deltamerge.version import __version__

if TYPE_CHECKING:
    from deltamerge.formats.delta.writer import Summary
    from deltamerge.outputs.output import LowRankSummary


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: folder, plan, lock, size of a delta artifact, and counts of values that are not finite.

    For a file of several documents it is the output's result. `intermediate` has the folders of the other documents,
    and whether each was made now. `made` is False if the folder was already up to date.
    """

    folder: Path
    plan: Plan
    lock: dict[str, Any]
    delta: Summary | None = None
    nonfinite: Mapping[str, NonFinite] = field(default_factory=dict)
    intermediate: Mapping[Path, bool] = field(default_factory=dict)
    made: bool = True
    lora: LowRankSummary | None = None

    def __repr__(self) -> str:
        return shown(f"<Result {self.folder}: {self.name}, {human(self.size)}>")

    def _repr_html_(self) -> str:
        rows = {"made": f"{self.name}, {human(self.size)}"} | dict(line.split(maxsplit=1) for line in self.next_steps)
        if self.plan.warnings:
            rows["warnings"] = "; ".join(self.plan.warnings)
        return as_html(str(self.folder), rows)

    @property
    def size(self) -> int:
        """Bytes of the weights, as counted by the kind of output."""
        return self.delta.nbytes if self.delta else output_of(self.plan).nbytes(self.plan, self.lock.get("outputs", {}))

    @property
    def name(self) -> str:
        """The output in a few words."""
        return output_of(self.plan).name(self.plan)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """The lines that load and check the output. A part of a run has no lock and no such lines."""
        return output_of(self.plan).next_steps(self.plan, self.folder) if self.lock else ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes to show at the end."""
        return output_of(self.plan).remarks(self.plan)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(
            entry["size"] for name, entry in self.lock.get("outputs", {}).items() if name.endswith(".safetensors")
        )


def run(
    file: RecipeFile, out: Path | None = None, options: Options | None = None, *, part: Part | None = None
) -> Result:
    """Run a recipe file. The target, `out` if given, appears under its name only when complete.

    A target that is up to date stays. An earlier result of the same recipe is replaced if it matches its lock. A result
    that was changed, or that another recipe or command made, is replaced only with `force`. A version with successors,
    a member of a store, and a folder that no run made are never replaced.

    Documents that others need are made first, unless their folders are up to date. With `part` only that part's shards
    are written, to the work folder, for `finish`.
    """
    options = options or Options()
    if not (options.force or options.pins is not None):
        check_places(file)
    if part:
        check_recipe(file, "--part")
    if options.lock is not None:
        options.lock.check_recipe(file.output.recipe)
    planner = Planner(file, target_of(file, out), options)
    guard, *guards = guards_of(planner, unasked=out is None)
    *before, planned = planner.plans()  # a fault of any document ends the run before any result is made
    results: dict[str, Checkpoint] = {}
    made_now: dict[Path, bool] = {}
    for document, its_plan, its_guard in zip(file.documents[:-1], before, guards, strict=True):
        with errors.after_folders(folder for folder, made in made_now.items() if made):
            made_now |= _make_result(planner, document, its_plan, its_guard, results)
    output, target = file.output, planner.target
    planned = planner.settled(output, planned, results)
    if not (part or options.drawing) and (lock := _current(output, planned, target, options)) is not None:
        return Result(target, planned, lock, intermediate=made_now, made=False)
    options = replace(options, resume=options.goes_on)
    with errors.after_folders(folder for folder, made in made_now.items() if made):
        done = _make(planner, output, planned, guard, results, options, part)
    return replace(done, intermediate=made_now)


def guards_of(planner: Planner, *, unasked: bool) -> tuple[Guard, ...]:
    """Return the guards of a run that begins now: for its target, and for results of other documents."""
    file, adding = planner.file, planner.options.ending is not None
    others = [guard_of(file, one, planner.folder(one), unasked=True) for one in file.documents[:-1]]
    return (guard_of(file, file.output, planner.target, unasked=unasked, adding=adding), *others)


def _current(output: Document, planned: Plan, target: Path, options: Options) -> dict[str, Any] | None:
    """Return the lock of a target that is up to date. None: it is not, or shall be made again."""
    if not os.path.isdir(target) or not options.goes_on or is_begun(target) or not is_current(output, planned, target):
        return None
    lock = read_lock(target / LOCK_NAME)
    if options.lock is not None:
        options.lock.check_inputs(lock["inputs"])
    return lock


def is_current(document: Document, planned: Plan, folder: Path) -> bool:
    """Return whether `folder` holds the result of the document: recipe, version, inputs and outputs agree."""
    try:
        lock = read_lock(folder / LOCK_NAME)
        before = read_recipe(folder / RECIPE).output.recipe.source.data
        if before != document.recipe.source.data or lock.get("deltamerge") != __version__:
            return False
        if lock.get("inputs") != hashes.describe_inputs(planned, planned.workers):
            return False
        verify(folder, planned.workers)
        for name, content in output_of(planned).files(planned).items():
            hashed = hashes.hash_output(content) if isinstance(content, Path) else hashes.hash_bytes(content)
            if lock["outputs"].get(name, {}).get("hash") != hashed:
                return False
        return True
    except DeltamergeError:
        return False


def _make_result(
    planner: Planner, document: Document, planned: Plan, guard: Guard, results: dict[str, Checkpoint]
) -> dict[Path, bool]:
    """Make a result that other documents need, unless it exists; add it to `results`. Return {folder: is it new}."""
    folder = planner.folder(document)
    planned = planner.fetched(document, planner.settled(document, planned, results), results)
    missing = not is_current(document, planned, folder)
    if missing:
        asked = planner.options
        options = replace(asked, resume=asked.goes_on, lock=None, drawing=None)
        planned = _make(planner, document, planned, guard, results, options).plan
    results[document.name] = planner.result(document, planned)
    return {folder: missing}


def _make(
    planner: Planner,
    document: Document,
    planned: Plan,
    guard: Guard,
    results: Mapping[str, Checkpoint],
    options: Options,
    part: Part | None = None,
) -> Result:
    """Make the result of one document. `results` has the results of other documents that it may need."""
    draw, target = options.drawing(planned, options.lock is None) if options.drawing else None, guard.target
    refuse_inputs(target, places(planned))
    if part:
        part.files(planned.layout)
    named = part.name if part else None
    with workspace(target, force=options.force, resume=options.goes_on, part=named, guard=guard) as work:
        planned = set_aside(_warned(planner.fetched(document, planned, results)))
        copied = asset_files(planned)  # links that leave a model's folder are refused before the work, not after
        facts = hashes.facts(planned, document.text)
        work.begin(facts)
        if part:
            drop_damaged(work, planned.workers)
        reading = InputFiles.begin(planned, part, copied.values(), options.lock)
        check_deltas(planned)
        made = make_weights(planned, work, options, part, facts, reading.pieces)
        made = _checked(made, work, document.text, facts, reading, options)
        inputs = reading.describe()
        if part:
            work.journal.append({"part": {"inputs": inputs, "outputs": made.hashed, **made.account.record()}})
            return Result(work.folder, part.of(made.plan), {}, None, made.nonfinite)
        planned, lock = _complete(made, work, document.text, target.name, inputs, draw, options.lock, options.ending)
    return Result(target, planned, lock, made.account.delta, made.nonfinite, lora=made.account.lora)


def _checked(
    made: Weights, work: Workspace, text: str, facts: Mapping[str, Any], reading: InputFiles, options: Options
) -> Weights:
    """Return weights that passed all checks. Values that are not finite in all models alike do not count.

    InputError: inputs have changed during the run, or differ from the hub. OutputError: values that are not finite,
    unless they are allowed.
    """
    now = hashes.facts(made.plan, text)
    try:
        if changed := sorted(name for name in facts if now.get(name) != facts[name]):
            raise InputError(f"changed during the run: {', '.join(changed)}", hint="run it again from the start")
        reading.checked.result()
    except InputError:
        work.forget()
        raise
    made = replace(made, nonfinite=unexpected(made.plan, made.nonfinite))
    check_finite(made.plan, made.nonfinite, allow=options.allow_nonfinite)
    return made


def finish(file: RecipeFile, out: Path | None = None, options: Options | None = None) -> Result:
    """Make the target from the finished parts of a run. OutputError: a part is missing or unfinished."""
    options = options or Options()
    check_recipe(file, "--finish")
    planner = Planner(file, target_of(file, out), replace(options, device="cpu", memory=None))
    (guard,) = guards_of(planner, unasked=out is None)
    (planned,), target, text = planner.plans(), planner.target, file.output.text
    if not is_begun(target) and is_current(file.output, planned, target):  # killed after its last rename, and again
        return Result(target, planned, read_lock(target / LOCK_NAME), made=False)
    draw = options.drawing(planned, False) if options.drawing else None
    with workspace(target, force=options.force, finish=True, guard=guard) as work:
        facts = hashes.facts(planned, text)
        parts = gather_parts(work, facts)
        outputs, seals = check_shards(work, planned.layout, parts, planned.workers)
        inputs: dict[str, Any] = {}
        for part in parts:
            for reference, entry in part["inputs"].items():
                inputs.setdefault(reference, {**entry, "files": {}})["files"] |= entry["files"]
        if options.lock is not None:
            options.lock.check_inputs(inputs)
        found = calibrated(planned, work, options.lock, facts, alone=False, known={})
        write_index(work.folder, planned.layout)
        account = output_of(planned).join(parts)
        made = Weights(set_aside(_warned(planned)), found, outputs, seals=seals, account=account)
        planned, lock = _complete(made, work, text, target.name, inputs, draw, options.lock)
    return Result(target, planned, lock)


def _complete(
    made: Weights,
    work: Workspace,
    text: str,
    title: str,
    inputs: dict[str, Any],
    draw: Draw | None,
    given: Lock | None,
    ending: Callable[[Path], None] | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Write all files beside the weights, and rename the folder. Return the plan, with its notes, and the lock."""
    folder, planned, output = work.folder, made.plan, output_of(made.plan)
    for name, path in files_of(folder).items():  # files of a killed attempt, or of the previous result
        if not output.belongs(planned, made, name):
            path.unlink()
    (folder / LOCK_NAME).unlink(missing_ok=True)
    files = output.files(planned)
    made, notes = output.finish(planned, folder, made, files)
    planned = replace(planned, notes=planned.notes + notes)
    write_files(files, folder)
    if ending is not None:
        ending(folder)
    (folder / RECIPE).write_text(text, encoding="utf-8")
    planned = replace(planned, notes=planned.notes + output.add(planned, folder))
    found = {node: made.values[node] for node in planned.chosen}
    study = None if given is None else given.content.get("study")
    maker = work.guard.maker
    lock = Lock.of(folder / LOCK_NAME, planned, inputs, found, made.account.describe(), study, maker)
    lock.write_rows()
    pictures = draw(planned, folder, lock.figures) if draw is not None else {}
    card = render(planned, text, title, found, made.account, pictures, study)
    (folder / CARD).write_text(card, encoding="utf-8")
    others = {name: path for name, path in files_of(folder).items() if name not in made.hashed}
    seals = {**made.seals, **{name: seal(path) for name, path in others.items()}}
    outputs = made.hashed | hashes.describe_files(others.values(), planned.workers, root=folder)
    said = lock.write(outputs)
    work.publish(outputs, seals, planned.workers)
    return planned, said


def _warned(planned: Plan) -> Plan:
    """Return the plan with a warning for each model whose sampled weights show that it is unrelated to its base."""
    return replace(planned, warnings=tuple(dict.fromkeys([*planned.warnings, *unrelated(planned.inputs)])))


def calibrate(file: RecipeFile, options: Options | None = None) -> Mapping[str, Any]:
    """Run only the calibration stages of a recipe, and write their choices to the lock beside it.

    Returns the lock's `calibration`. InputError: the recipe has no calibrated q.
    """
    planner, planned = _alone(file, options)
    if not planned.stages:
        raise InputError(
            f"{file.path}: no q is calibrated", hint="prune: {method: magnitude, density: 0.01, q: output_change}"
        )
    return _lock(planner, planned).calibration


def lock(file: RecipeFile, options: Options | None = None) -> Lock:
    """Write the lock beside a recipe: its inputs by content, and its q's, which are calibrated now.

    OutputError: without `force`, the file there is no lock of this recipe, or was changed.
    """
    return _lock(*_alone(file, options))


def check_lock(file: RecipeFile, options: Options | None = None) -> None:
    """Raise VerifyError if the lock beside a recipe belongs to another recipe or other inputs."""
    found = Lock.read(file.lock_path)
    found.check_recipe(file.output.recipe)
    planner, planned = _alone(file, options)
    planned = planner.fetched(file.output, planned, {})
    found.check_inputs(hashes.describe_inputs(planned, planned.workers))
    found.calibrated(planned)


def _alone(file: RecipeFile, options: Options | None) -> tuple[Planner, Plan]:
    """Return the plan of a recipe whose lock can be written before a run."""
    if len(file.documents) > 1:
        raise InputError(f"{file.path}: has several documents", hint="`deltamerge run` locks each as it makes it")
    planner = Planner(file, target_of(file, None), options or Options())
    (planned,) = planner.plans()
    if output_of(planned).budget(planned) is not None:
        raise InputError(
            f"{file.path}: a budget's densities are chosen as the artifact is written, and q for them",
            hint=f"deltamerge run {quote(str(file.path))}",
        )
    return planner, planned


def _lock(planner: Planner, planned: Plan) -> Lock:
    path, force = planner.file.lock_path, planner.options.force
    refuse_foreign_lock(path, planner.file.path.name, rows=bool(planned.chosen), force=force)
    check_folder(path.parent)
    planned = planner.fetched(planner.file.output, planned, {})
    check_deltas(planned)
    found = shared_values(planned.chosen, {})
    lock = Lock.of(path, planned, hashes.describe_inputs(planned, planned.workers), found)
    refuse_foreign_lock(path, planner.file.path.name, rows=bool(lock.rows), force=force)  # a search is slow
    lock.write_beside(planner.file.path.name)
    return lock


# -- the weights: the values of stages before the first tile, then the kind of output that the recipe asks for


def make_weights(
    planned: Plan, work: Workspace, options: Options, part: Part | None, facts: Mapping[str, Any], pieces: Pieces
) -> Weights:
    """Write the weights of `planned`, or the shards of one `part`, to the work folder.

    `pieces` gets the hashes of the bytes that are read. Finished work of an interrupted run is kept, except for a
    budget, which tries sizes. Calibrated q's and the densities of a budget come from the lock in `options`, if given.
    """
    alone = part is None or part.index == 0

    @contextmanager
    def values(plan: Plan) -> Iterator[dict[Node, Any]]:
        with _spooled(plan.rows, work, {}) as rows:
            found = {**rows, **calibrated(plan, work, options.lock, facts, alone=alone, known=rows)}
            with _spooled(plan.moments, work, found, second=True) as moments:
                yield {**found, **moments}

    files = part.files(planned.layout) if part else None
    return output_of(planned).settle(planned, WriteJob(work, pieces, values, options.merging, options.lock, files))


@contextmanager
def _spooled(
    node: Node | None, work: Workspace, known: Mapping[Node, Any], *, second: bool = False
) -> Iterator[dict[Node, Any]]:
    """Yield the measurements of a stage on rows, by its node; empty without such a stage.

    The files lie in the work folder during the block. A `second` stage has other file names.
    """
    if node is None:
        yield {}
        return
    from deltamerge.calibrate.values import FIRST, MOMENTS, Spooled

    folder = work.state / SPOOL
    with writing():
        folder.mkdir(exist_ok=True)
    found = Spooled(folder, first=MOMENTS if second else FIRST)
    try:
        yield shared_values([node], {**known, node.inputs[0]: found})
    finally:
        found.remove()


def calibrated(
    planned: Plan,
    work: Workspace,
    lock: Lock | None,
    facts: Mapping[str, Any],
    *,
    alone: bool,
    known: Mapping[Node, Any],
) -> dict[Node, Any]:
    """Return the calibrated q's, and a mixture's routers.

    They come from an interrupted run, from part 0 or from the lock. If `alone`, they are calculated now and kept.
    """
    if not planned.chosen:
        return {}
    own = work.state / CALIBRATION
    if any("calibrated" in record for record in work.journal.records) or shared_calibration(work, facts):
        lock = Lock.read(own)
    if lock is not None:
        return dict(lock.calibrated(planned))
    if not alone:
        made, command = ("calibrates q", "calibrate") if planned.stages else ("makes routers", "lock")
        raise InputError(
            f"--part: the recipe {made}, which all parts must share",
            hint=f"run `deltamerge {command} RECIPE` once, then every part and --finish with --locked",
        )
    found = shared_values(planned.chosen, known)
    own_lock = Lock.of(own, planned, {}, found)
    own_lock.write_rows()
    own_lock.write()
    work.journal.append({"calibrated": True})
    return found


def check_finite(planned: Plan, nonfinite: Mapping[str, NonFinite], *, allow: bool) -> None:
    """Raise OutputError naming the tensors that hold NaN or infinities, unless they are allowed."""
    if not nonfinite or allow:
        return
    dtypes = {output.name: output.dtype for output in planned.outputs}
    half = any(dtypes[name] == "F16" and count.inf for name, count in nonfinite.items())
    advice = "float16 ends at 65504, give `dtype: bfloat16`; or keep them" if half else "keep them"
    raise OutputError(describe_nonfinite(nonfinite), hint=f"{advice} with --allow-nonfinite")


def describe_nonfinite(nonfinite: Mapping[str, NonFinite]) -> str:
    """Return a line on the tensors with values that are not finite, and the numbers of these values."""
    named = [f"{n} ({', '.join(f'{x} {k}' for k, x in (('NaN', c.nan), ('inf', c.inf)) if x)})"
             for n, c in sorted(nonfinite.items())]  # fmt: skip
    return f"values that are not finite in {some(named, 8)}"
