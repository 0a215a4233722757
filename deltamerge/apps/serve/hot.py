"""Hot merge: a running model follows edits of its recipe.

The plan that made the model's folder is compared with the plan of the edited recipe. An output tensor changes if its
nodes change: other functions, parameters or files. Only changed tensors are computed and written, in codes if the
output is quantised. A calibration whose models or settings change is made again.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from deltamerge import errors
from deltamerge.apps.chain.live import Change, Write, write_of
from deltamerge.engine.execute import execute, shared_values
from deltamerge.errors import InputError, OutputError
from deltamerge.errors.shown import some
from deltamerge.files.descriptors import flat
from deltamerge.files.ownership import LOCK_NAME, read_lock
from deltamerge.formats.delta.entry import TILE
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.tensor_writer import BaseTensor
from deltamerge.formats.delta.writer import ArtifactWriter
from deltamerge.formats.quantised.writer import CodedWriter
from deltamerge.models.chain.folder import is_version
from deltamerge.models.chain.publish import one_writer, publishing
from deltamerge.models.checkpoint import Checkpoint, open_checkpoint
from deltamerge.models.delta_file import to_torch
from deltamerge.outputs.assets import RECIPE
from deltamerge.outputs.delta import base_of
from deltamerge.plan.finite import set_aside
from deltamerge.plan.outputs import OutputTensor
from deltamerge.plan.planner import Plan
from deltamerge.recipe.file import RecipeFile, read_recipe, read_text
from deltamerge.run.lock import Lock
from deltamerge.run.options import Options
from deltamerge.run.plans import Planner
from deltamerge.tensors.dtypes import PLAIN, bits_type, code_of, nbytes_of
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader, elements
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.views import Buffer
from deltamerge.version import __version__

Key = tuple[Any, ...]
Keys = Mapping[str, Key]
UNNAMED = "default"  # vLLM's name of the weights that a server starts with
BASE = "base"  # the weight version of a server that holds the folder's own weights


@dataclass(frozen=True, slots=True)
class HotUpdate:
    """The effect of an edited recipe on a running model: the written tensors, the number of all, and seconds."""

    tensors: tuple[str, ...]
    of: int
    seconds: float


class Identities:
    """Numbers of nodes: equal for nodes of any plans that compute the same values of the same files.

    A file is the same while its inode, size and time of change are; they are looked at for every plan anew.
    """

    def __init__(self) -> None:
        self._numbers: dict[Key, int] = {}
        self._alone: list[Node] = []  # keeps nodes alive whose ids are in `_numbers`, so that the ids stay unique

    def keys(self, plan: Plan) -> dict[str, Key]:
        """Return a key of everything that decides each tensor of a plan's output, by the names of stored tensors."""
        known: dict[Node, int] = {}
        found: dict[str, Key] = {}
        for output in plan.outputs:
            pieces = ((self._of(piece.built.root, known), piece.offset) for piece in output.pieces)
            key = (output.dtype, output.shape, *pieces)
            coding = plan.codings.get(output.name)
            how = None if coding is None else (str(coding.coder), coding.matrix, coding.unit)
            found |= dict.fromkeys(stored_as(plan, output), (*key, how))
        return found

    def number(self, node: Node) -> int:
        """Return the number of a node."""
        return self._of(node, {})

    def _of(self, root: Node, known: dict[Node, int]) -> int:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in known:
                stack.pop()
            elif missing := [source for source in node.inputs if source not in known]:
                stack += missing
            else:
                known[stack.pop()] = self._number(node, [known[source] for source in node.inputs])
        return known[root]

    def _number(self, node: Node, sources: list[int]) -> int:
        held = signature(node.path) if node.kind == "stored" else None
        own = tuple((name, bytes(p.data) if isinstance(p, Buffer) else p) for name, p in node.parameters)
        key = (node.function, tuple(sources), own, node.shape, node.dtype, node.kind, held)
        try:
            return self._numbers.setdefault(key, len(self._numbers))
        except TypeError:  # a parameter that cannot be compared is no other's
            self._alone.append(node)
            return self._numbers.setdefault((id(node),), len(self._numbers))


def signature(path: Path) -> tuple[int, int, int] | None:
    """Return which file a path is now: inode, size and time of change. None: it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def stored_as(plan: Plan, output: OutputTensor) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtypes and shapes of the stored tensors that a tensor of the output becomes, by name."""
    if (coding := plan.codings.get(output.name)) is None:
        return {output.name: (output.dtype, tuple(output.shape))}
    return {part.name: (part.dtype, tuple(part.shape)) for part in coding.parts}


class EditedMerge:
    """The result of a run, and its changes by edits of the recipe.

    folder   the result: a checkpoint with the recipe.yaml and the lock of its run
    recipe   the edited file; relative references start at its folder

    InputError: the folder is no such result, or its inputs have changed since.
    """

    def __init__(self, folder: str | Path, recipe: str | Path, *, workers: int | None = None) -> None:
        self.folder, self.recipe = Path(folder), Path(recipe)
        self._options = Options() if workers is None else Options(workers=workers)
        self._identities = Identities()
        with errors.context(str(self.folder)):
            lock = read_lock(self.folder / LOCK_NAME)
            if lock.get("deltamerge") != __version__:
                raise InputError(f"was made by deltamerge {lock.get('deltamerge')}", hint="run the recipe again")
            text = (self.folder / RECIPE).read_text(encoding="utf-8")
        self.base: Checkpoint = open_checkpoint(self.folder)
        self._files = {info.path: signature(info.path) for info in self.base.tensors.values()}
        plan = self._plan(read_text(text, self.recipe))
        self._refuse_changed(plan)
        locked = Lock.read(self.folder / LOCK_NAME).calibrated(plan) if plan.chosen else {}
        self._calibrated = {self._identities.number(node): value for node, value in locked.items()}
        self.keys: Keys = self._identities.keys(plan)
        self._refuse_others(plan)

    def plan(self) -> tuple[Plan, Keys]:
        """Return the plan of the recipe as it is now, and the key of each tensor.

        RecipeError, InputError: the recipe is wrong, or makes other tensors than the folder has.
        """
        plan = self._plan(read_recipe(self.recipe))
        self._refuse_others(plan)
        return plan, self._identities.keys(plan)

    def refuse_stale(self, plan: Plan, keys: Keys) -> None:
        """InputError: files that a plan reads have changed since it was made."""
        if self._identities.keys(plan) != keys:
            raise InputError(f"{self.recipe}: models have changed since, and it cannot be made again", hint="update()")

    def values(self, plan: Plan, keys: Keys, names: Iterable[str]) -> dict[str, Array]:
        """Return the bits of tensors of a plan: read from the folder where it has them, else computed.

        OutputError: values are not finite.
        """
        wanted = [*names]
        found = {name: self.own(name) for name in wanted if keys[name] == self.keys[name]}
        made = {name for name in wanted if name not in found}
        part = set_aside(
            replace(plan, outputs=tuple(o for o in plan.outputs if not made.isdisjoint(stored_as(plan, o))))
        )
        kinds = {name: kind for output in part.outputs for name, kind in stored_as(part, output).items()}
        buffers = _ModelBuffers({name: nbytes_of(*kind) for name, kind in kinds.items()})
        with Reader() as reader:
            sink: Any = buffers
            if part.codings:
                sink = CodedWriter(buffers, part.codings, reader, self.folder)
            execute(
                part.tasks,
                reader,
                sink,
                device=part.device,
                workers=part.workers,
                tile_elements=part.tile_elements,
                known=self._known(part),
            )
        for name, (dtype, _) in kinds.items():
            bits = buffers.buffers[name].view(bits_type(dtype))
            if name not in part.alike and not _is_finite(bits, dtype):
                raise OutputError(f"{name} would hold values that are not finite", hint="nothing was written")
            found[name] = bits
        return {name: found[name] for name in wanted}

    def _known(self, plan: Plan) -> dict[Node, Any]:
        """Return the values of a plan's calibrations. New calibrations are calculated now."""
        numbers = {node: self._identities.number(node) for node in plan.chosen}
        missing = [node for node, number in numbers.items() if number not in self._calibrated]
        known = {node: self._calibrated[number] for node, number in numbers.items() if node not in missing}
        for node, value in (shared_values(missing, known) if missing else {}).items():
            if node in numbers:
                self._calibrated[numbers[node]] = value
        return {node: self._calibrated[number] for node, number in numbers.items()}

    def own(self, name: str) -> Array:
        """Return the bits of a tensor of the folder. InputError: its file was replaced."""
        info = self.base.tensors[name]
        if signature(info.path) != self._files[info.path]:
            raise InputError(f"{info.path}: was replaced meanwhile", hint="load the model again")
        with Reader() as reader:
            bits: Array = elements(reader, info)(0, info.tensor.size)
        return bits

    def _plan(self, file: RecipeFile) -> Plan:
        if len(file.documents) > 1:
            raise InputError(f"{self.recipe}: has several documents", hint="run it, and load the result")
        planner = Planner(file, self.folder, self._options)
        plan = planner.fetched(file.output, planner.plans()[-1], {})
        kind = plan.recipe.output.kind
        if kind != "model":
            raise InputError(f"{self.recipe}: makes output {kind}, which is not merged hot", hint="a checkpoint")
        if plan.moments is not None:
            raise InputError(f"{self.recipe}: output.rounding: inputs is not merged hot", hint="rounding: nearest")
        if plan.rows is not None or plan.budgeted or plan.weighing is not None or plan.measured:
            raise InputError(
                f"{self.recipe}: measures rows for its coefficients or has a budget, and is not merged hot",
                hint="write the weights and densities that a run chose into the recipe",
            )
        return plan

    def _refuse_others(self, plan: Plan) -> None:
        """InputError: a plan makes other tensors than the folder has."""
        made = {name: kind for output in plan.outputs for name, kind in stored_as(plan, output).items()}
        own = {name: (info.dtype, tuple(info.shape)) for name, info in self.base.tensors.items()}
        if other := sorted(name for name in {*made, *own} if made.get(name) != own.get(name)):
            raise InputError(
                f"{self.recipe}: makes other tensors than {self.folder} has: {some(other)}",
                hint="run it, and load the result",
            )

    def _refuse_changed(self, plan: Plan) -> None:
        """InputError: files that the folder was made of were written after it."""
        made = (self.folder / LOCK_NAME).stat().st_mtime_ns
        files = {leaf.path for output in plan.outputs for piece in output.pieces for leaf in piece.built.root.leaves()}
        if later := sorted(str(file) for file in files if file.stat().st_mtime_ns > made):
            raise InputError(f"{self.folder}: is older than its sources: {some(later)}", hint="run it again")


class HotMerge:
    """A model in this process that follows edits of the recipe that it was merged by.

    model    a torch module, or a state dict of torch tensors on any device, loaded from `folder` in its dtypes. It is
             written in place, and nobody else may write to it
    folder   the result of `deltamerge run recipe`
    recipe   the file that is edited
    """

    def __init__(self, model: Any, folder: str | Path, recipe: str | Path, *, workers: int | None = None) -> None:
        state = model.state_dict() if hasattr(model, "state_dict") else model
        self._merge = EditedMerge(folder, recipe, workers=workers)
        self._state: dict[str, Any] = {}
        for name, info in self._merge.base.tensors.items():
            tensor = state.get(name)
            found = None if tensor is None else (code_of(tensor.dtype), tuple(tensor.shape))
            if found != (info.dtype, tuple(info.shape)):
                said = "is not there" if found is None else f"is {found[0]} {list(found[1])}"
                raise InputError(
                    f"{name} {said} in the model, and in {folder} {info.dtype} {list(info.shape)}",
                    hint="load the model from that folder, in its dtypes",
                )
            self._state[name] = tensor
        self._now: Keys = self._merge.keys
        self._before: list[tuple[Plan, Keys] | None] = []
        self._plan: tuple[Plan, Keys] | None = None

    def update(self) -> HotUpdate:
        """Update the model to the merge of the recipe as it is now, all or nothing.

        RecipeError, InputError, OutputError, with nothing written: the recipe is wrong, or makes other tensors, or
        values that are not finite.
        """
        begun = time.monotonic()
        plan, keys = self._merge.plan()
        done = self._go(plan, keys, begun)
        self._before.append(self._plan)
        self._plan = plan, keys
        return done

    def undo(self) -> HotUpdate:
        """Undo the last `update` that is not undone yet, exactly. InputError: there is none."""
        if not self._before:
            raise InputError("there is nothing to undo", hint="update() first")
        begun, target = time.monotonic(), self._before[-1]
        if target is not None:
            self._merge.refuse_stale(*target)
        plan, keys = (None, self._merge.keys) if target is None else target
        done = self._go(plan, keys, begun)
        self._plan = self._before.pop()
        return done

    def _go(self, plan: Plan | None, keys: Keys, begun: float) -> HotUpdate:
        names = [name for name in self._merge.keys if keys[name] != self._now[name]]
        if plan is None:
            values = {name: self._merge.own(name) for name in names}
        else:
            values = self._merge.values(plan, keys, names)
        with torch.no_grad():
            writes = [write_of(Change(name, None, values[name]), self._state[name]) for name in names]
            undo = list[Write]()
            try:
                for write in writes:
                    undo.append(write.kept())
                    write.put()
            except BaseException:
                for write in reversed(undo):
                    write.put()
                raise
        self._now = keys
        return HotUpdate(tuple(names), len(keys), time.monotonic() - begun)


class HotServer:
    """A vLLM server that follows edits of the recipe that its model was merged by.

    url      where it answers, with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "deltamerge"}'
    folder   the model that it serves, as the server's machine names it too
    recipe   the file that is edited
    store    where the changes are written for it, a folder that it sees; None: FOLDER-hot
    """

    def __init__(
        self,
        url: str,
        folder: str | Path,
        recipe: str | Path,
        *,
        store: str | Path | None = None,
        workers: int | None = None,
    ) -> None:
        self._url, self._merge = url.rstrip("/"), EditedMerge(folder, recipe, workers=workers)
        where = self._merge.folder.resolve()
        self.store = Path(store).resolve() if store is not None else where.with_name(f"{where.name}-hot")

    def update(self) -> HotUpdate:
        """Update the server's model to the merge of the recipe as it is now.

        RecipeError, InputError, OutputError: the recipe is wrong, or makes other tensors; the server does not answer,
        or refuses the change. Its model is then unchanged.
        """
        begun = time.monotonic()
        plan, keys = self._merge.plan()
        names = [name for name, key in self._merge.keys.items() if keys[name] != key]
        path = self._written(plan, keys, names) if names else None
        self._send(path)
        return HotUpdate(tuple(names), len(keys), time.monotonic() - begun)

    def undo(self) -> HotUpdate:
        """Restore the server's model to its folder's tensors, exactly."""
        begun = time.monotonic()
        self._send(None)
        return HotUpdate((), len(self._merge.keys), time.monotonic() - begun)

    def _written(self, plan: Plan, keys: Keys, names: list[str]) -> Path:
        """Return the artifact that makes a plan's tensors of the folder's, written where it is not there."""
        values = self._merge.values(plan, keys, names)
        digest = blake3((self._merge.folder / LOCK_NAME).read_bytes())  # the base of the changed tensors
        for name in names:
            digest.update(f"{name}\0".encode("utf-8", "surrogatepass"))
            digest.update(flat(values[name]))
        path = self.store / digest.hexdigest()[:16]
        with one_writer(self.store, "adding"):
            if is_version(path):
                return path
            origin = replace(self._merge.base, reference=str(self._merge.folder.resolve()))
            with (
                publishing(self.store, path.name, "adding") as folder,
                Reader() as reader,
                ArtifactWriter(folder, base_of(origin), codings=()) as writer,
            ):
                for name in names:
                    info = origin.tensors[name]
                    base = BaseTensor(name, info.dtype, info.shape, elements(reader, info))
                    tensor = writer.tensor(name, info.dtype, info.shape, base)
                    for start in range(0, values[name].size, TILE):
                        tensor.write(start, values[name][start : start + TILE])
                writer.finish()
        return path

    def _send(self, delta: Path | None) -> None:
        held = self._ask("GET", "/weight_info").get("weight_version")
        version = BASE if delta is None else delta.name
        if held == version:
            return
        if held not in (None, UNNAMED, BASE) and not is_version(self.store / str(held)):
            raise OutputError(
                f"{self._url}: holds weights named {str(held)!r}, which are not of {self.store}",
                hint="name their --store, or start the server again",
            )
        if held in (None, UNNAMED):
            folder = str(self._merge.folder.resolve())
            self._ask("POST", "/init_weight_transfer_engine", {"init_info": {"base": folder}})
        self._ask("POST", "/pause?mode=wait")
        try:
            self._ask("POST", "/start_weight_update")
            self._ask("POST", "/update_weights", {"update_info": {"delta": None if delta is None else str(delta)}})
            self._ask("POST", "/finish_weight_update", {"weight_version": version})
        finally:
            self._ask("POST", "/resume")

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=3600) as answer:
                found: dict[str, Any] = json.loads(answer.read() or b"{}")
                return found
        except urllib.error.HTTPError as error:
            hint = "VLLM_SERVER_DEV_MODE=1 serves these routes" if error.code == 404 else None
            said = error.read().decode("utf-8", "replace")[:400]
            raise OutputError(f"{self._url}{path}: {error.code} {said}", hint=hint) from None
        except (OSError, ValueError) as error:
            raise OutputError(f"{self._url}{path}: {error}", hint="is it the address of a vLLM server?") from None


def _is_finite(bits: Array, dtype: str) -> bool:
    return dtype not in PLAIN or bool(to_torch(bits, dtype).isfinite().all())


class _ModelBuffers:
    """A sink that holds whole tensors, a `CodedSink` too."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.buffers: dict[str, Array] = {name: np.empty(size, np.uint8) for name, size in sizes.items()}
        self.records: tuple[Mapping[str, Any], ...] = ()

    def where(self, name: str, offset: int) -> tuple[str, int]:
        """Return the place of a byte: each tensor is by itself."""
        return name, offset

    def lend(self, name: str, offset: int, nbytes: int) -> Array:
        """Return the memory of bytes of a tensor."""
        return self.buffers[name][offset : offset + nbytes]

    def give(self, name: str, offset: int, buffer: Array) -> None:
        """Do nothing, because the lent memory is the tensor's own."""

    def has(self, name: str, offset: int, nbytes: int) -> bool:
        """Return False: nothing is there from an earlier run."""
        return False

    def note(self, key: str, name: str, values: Mapping[Any, Any]) -> None:
        """Do nothing, because no journal is kept."""

    def write(self, name: str, offset: int, data: Any) -> None:
        self.buffers[name][offset : offset + data.nbytes] = np.frombuffer(flat(data), np.uint8)
