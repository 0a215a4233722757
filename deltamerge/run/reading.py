"""The files that a run reads: hashes and checks beside the work, and checks of models before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.hashes import Pieces, check_blobs
from deltamerge.formats.quantised.detect import without_keys
from deltamerge.plan.inputs import Input
from deltamerge.plan.planner import Plan
from deltamerge.plan.stack import Stack
from deltamerge.run import hashes
from deltamerge.run.lock import Lock
from deltamerge.run.partition import Part
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InputFiles:
    """The files that a run of `plan`, or of one part of it, reads.

    pieces    the hashes of pieces that have been read
    checked   ends when files of the hub's cache match the hub, and transformers builds the stacked layers as stored
    hashed    ends when the rest is hashed
    """

    plan: Plan
    takes: hashes.Mine
    pieces: Pieces
    checked: Future[None]
    hashed: Future[None]

    @classmethod
    def begin(cls, planned: Plan, part: Part | None, copied: Iterable[Path], lock: Lock | None) -> InputFiles:
        """Begin to check and hash the files, including the `copied` files.

        VerifyError: the lock has other inputs. A part reads only some inputs, so it skips this check.
        """
        paths, takes, pieces = _files_read(planned, part, copied), (part or Part(1, 1)).takes, Pieces()
        checked = _beside(lambda: _check(paths, planned))
        if lock is not None and part is None:
            lock.check_inputs(hashes.describe_inputs(planned, planned.workers, takes, pieces))
        hashed = _beside(lambda: hashes.hash_ahead(planned, takes, pieces))
        return cls(planned, takes, pieces, checked, hashed)

    def describe(self) -> dict[str, Any]:
        """Return the lock's entries for the files, once all are hashed."""
        self.hashed.result()
        return hashes.describe_inputs(self.plan, self.plan.workers, self.takes, self.pieces)


def _check(paths: list[Path], planned: Plan) -> None:
    check_blobs(paths, planned.workers)
    if planned.stacks:
        check_layers_built(planned)


def check_deltas(planned: Plan) -> None:
    """Raise InputError unless every delta among the models was made from the base that it is put on.

    The result must have the hash that the delta names.
    """
    deltas = planned.inputs.deltas
    if not deltas:
        return
    from deltamerge.models.delta_over_base import check, covers

    made = [(c.base, c.reference) for c in planned.inputs.checkpoints if c.base is not None]
    with Reader() as reader:
        for base, reference in made:
            delta = deltas[reference]
            beside = [deltas[other] for one, other in made if one.reference == base.reference]
            if not any(covers(other, delta) for other in beside):
                with errors.context(reference):
                    check(delta, base, reader, planned.workers, planned.tile_elements)


def places(planned: Plan) -> list[tuple[str, Path]]:
    """Return every folder that is read, and its model."""
    lender = planned.inputs.vocabulary
    models = [*planned.inputs.checkpoints, *([lender.checkpoint] if lender is not None else [])]
    return [(c.reference, source.path) for c in models for source in c.sources]


def _files_read(planned: Plan, part: Part | None, copied: Iterable[Path]) -> list[Path]:
    """Return the files that the output depends on. Of plain checkpoints, return only the shards that the part reads."""
    wanted = {path for _, paths in hashes.files_read(planned) for path in paths} | set(copied)
    if part is not None and not planned.stages:
        every = Graph().node("part", [task.root for task in part.of(planned).tasks])
        read = {leaf.path for leaf in every.leaves()}
        donor = planned.inputs.donor  # every part may read its rows
        models = [c for c in planned.inputs.checkpoints if donor is None or c is not donor.checkpoint]
        plain = [c for c in models if c.adapter is None and c.base is None]
        wanted -= {path for c in plain for path in c.files if path not in read}
    return sorted(wanted)


def _beside(work: Callable[[], T]) -> Future[T]:
    """Do `work` while the run goes on, in a daemon thread: a run that fails or is interrupted does not wait for it."""
    future: Future[T] = Future()

    def go() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=go, daemon=True).start()
    return future


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The tensors of a model as transformers builds it, by name, and the name prefix that a file may lack."""

    shapes: Shapes
    prefix: str

    def container(self, stored: str, count: int) -> str | None:
        """Return the container of `count` numbered layers that a file calls `stored`. None: none, or several."""
        numbers: dict[str, set[int]] = {}
        for name in self.shapes:
            parts = name.split(".")
            for i, part in enumerate(parts):
                if part.isdigit():
                    numbers.setdefault(".".join(parts[:i]), set()).add(int(part))
        whole = [c for c, found in numbers.items() if found == set(range(count))]
        if stored in whole:
            return stored
        inside = [c for c in whole if c.endswith(f".{stored}") or stored.endswith(f".{c}")]
        inside = inside or [c for c in whole if c.split(".")[-1] == stored.split(".")[-1]] or whole
        return inside[0] if len(inside) == 1 else None

    def layer(self, container: str, number: int) -> Shapes:
        """Return the tensors of a layer, by their names inside it."""
        start = f"{container}.{number}."
        return {n.removeprefix(start): shape for n, shape in self.shapes.items() if n.startswith(start)}


def check_layers_built(planned: Plan) -> None:
    """Raise InputError if transformers would build other layers than the stacked layers, or cannot read the config."""
    template = planned.inputs.template
    home = _at_home(template) if planned.stacks else None
    if home is None:
        return
    made = _built(planned.config)
    assert made is not None
    models: dict[int, ModelShapes | None] = {id(template): home}
    containers = []
    for stack in planned.stacks:
        container = home.container(stack.prefix, stack.old)
        if container is not None:
            containers.append(container)
            for fault in _faults(stack, container, made, template, models):
                from deltamerge.plan.layer_config import which_layers

                raise InputError(fault, hint=which_layers(planned.config))
    if len(containers) == len(planned.stacks):
        _check_outside(planned, home, made, containers)


def _faults(
    stack: Stack, container: str, made: ModelShapes, template: Input, models: dict[int, ModelShapes | None]
) -> Iterator[str]:
    """Yield the faults of a stack's layers as texts."""
    for number, layer in enumerate(stack.layers):
        owner = stack.owner(layer, template)
        own = models.setdefault(id(owner), None) or _at_home(owner)
        models[id(owner)] = own
        at_home = own.layer(container, layer.source(owner)) if own is not None else {}
        differ = sorted(at_home.items() ^ made.layer(container, number).items()) if at_home else ()
        if differ:
            place = f"layer {layer.source(owner)} of {owner.name} would be layer {number} of {stack.prefix}"
            yield f"{place}, which transformers builds otherwise from config.json ({differ[0][0]} differs)"
    if made.layer(container, len(stack.layers)):
        yield f"{stack.prefix} has {len(stack.layers)} layers, and transformers builds more of them from config.json"


def _check_outside(planned: Plan, home: ModelShapes, made: ModelShapes, containers: list[str]) -> None:
    """Raise InputError if a tensor outside the stacked layers is built otherwise than it is stored."""
    template, shapes = planned.inputs.template, {output.name: output.shape for output in planned.outputs}
    within = tuple(f"{container}." for container in containers)
    old, new = ({n: s for n, s in b.shapes.items() if not n.startswith(within)} for b in (home, made))
    changed = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    for name in changed:
        bare, start = name.removeprefix(f"{home.prefix}."), f"{home.prefix}." if home.prefix else ""
        stored = next((shapes[n] for n in (name, bare, start + bare) if n in shapes), None)
        if name not in new or stored != new[name]:
            message = f"{template.name}: {name} would have to follow the number of layers"
            raise InputError(message, hint="merge whole models with `models`")


def _at_home(model: Input) -> ModelShapes | None:
    """Return an input as transformers builds it. None: it has no class for it, or needs more than the config."""
    try:
        return _built(model.checkpoint.config)
    except InputError:
        return None


def _built(config: Mapping[str, Any]) -> ModelShapes | None:
    """Return the model that transformers builds from a config. None: it has no class. InputError: it cannot."""
    kind = config.get("model_type")
    if not config.get("architectures") or not isinstance(kind, str):
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from deltamerge.calibrate.model.loading import skeleton
    from deltamerge.calibrate.model.transformers_code import running

    if kind not in CONFIG_MAPPING:
        return None
    with running("transformers does not read the config.json of the stack"):
        model = skeleton(CONFIG_MAPPING[kind].from_dict(without_keys(config)), None)
    return ModelShapes({n: tuple(t.shape) for n, t in model.state_dict().items()}, model.base_model_prefix)
