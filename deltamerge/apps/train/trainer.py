"""Writes the versions of a chain from a training run: the changes since the last version, in the background."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from deltamerge import errors
from deltamerge.errors import InputError, OutputError
from deltamerge.formats.delta.entry import TILE, Read
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.tensor_writer import BaseTensor
from deltamerge.formats.delta.writer import ArtifactWriter
from deltamerge.models.chain.folder import (
    Named,
    Note,
    Version,
    base_contents,
    contents,
    head,
    line,
    names,
    open_version,
    state_of,
    stored_files,
    write_note,
)
from deltamerge.models.chain.mirror import Kind, Mirror
from deltamerge.models.chain.publish import one_writer, publishing
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.delta_file import DeltaFile, bits_of, to_torch
from deltamerge.models.delta_over_base import check_complete, folded
from deltamerge.models.references import open_origin
from deltamerge.outputs.assets import RECIPE, copied_files, write_files
from deltamerge.outputs.delta import base_of
from deltamerge.tensors.dtypes import FLOATING, code_of, torch_dtype
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader, elements

if TYPE_CHECKING:
    from deltamerge.apps.chain.requantise import QuantisedChain

Bits = dict[str, Array]


@dataclass(frozen=True, slots=True)
class WrittenVersion:
    """A version that was published: its folder, entries that changed, elements, and bytes of the artifact."""

    path: Path
    changed: int
    elements: int
    nbytes: int


class ChainWriter:
    """The base of writers of a chain: a thread writes a version while the caller goes on, and the next waits."""

    def __init__(self, chain: str | Path, model: Any, base: str | Path | None) -> None:
        self.chain, self._model = Path(chain), model
        named = base if base is not None else getattr(getattr(model, "config", None), "name_or_path", None)
        self._named = None if not named else os.fspath(named)
        self._held = ExitStack()
        self._last: Version | None = None
        self._pending: Future[WrittenVersion] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise

    @property
    def last(self) -> str | None:
        """Return the name of the last published version. None: there is none yet."""
        return None if self._last is None else self._last.name

    def flush(self) -> None:
        """Wait until the current version is written. Raises its error, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._tell(pending.result())

    def close(self) -> None:
        """Wait for the last version, and release the chain. Raises the version's error."""
        try:
            self.flush()
        finally:
            self._held.close()

    def _start(self, new: Bits, step: int | None) -> Future[WrittenVersion]:
        """Have a thread publish the next version."""
        name = f"{next_number(self._last, step):06d}"
        self._pending = future = Future[WrittenVersion]()

        def work() -> None:
            try:
                future.set_result(self._publish(name, new, step))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="deltamerge-chain").start()
        return future

    def _publish(self, name: str, new: Bits, step: int | None) -> WrittenVersion:
        raise NotImplementedError

    def _tell(self, made: WrittenVersion) -> None:
        """Log the written versions, on the caller's thread."""


class DeltaWriter(ChainWriter):
    """Adds a version to a chain for every call of `write`, from the weights of a model that is being trained.

        chain   its folder; made if missing, otherwise continued
        model   an nn.Module, whose `state_dict()` is written; None: pass a state to every `write`
        base    the base of the chain's first version, a folder or hub id; by default the model's `name_or_path`
        mirrors folders that also get every version, in other projects' layouts: {"updates": "slime"}, as with `extract
                --as`; missing versions are written at once
        quantized  chains that also get every version, over a quantised checkpoint of the base: {"run-fp8":
                "base-fp8"}, as with `extract --quantized`
        log     gets the figures of each finished version, on the calling thread, like `wandb.log` and `trackio.log`:
                its step, changed entries, their share, bytes

    The tensors, their names and their dtypes are the base's: float32 masters of a bfloat16 base are rounded to
    bfloat16. `write` copies the weights and returns. A thread compares and writes them, and the next `write` waits for
    it. An error is raised by the next `write`, `flush` or `close`. On the CPU there are two copies of the weights, in
    the base's dtypes: the last version's, and the copy being written.

    InputError: the base or the chain cannot be read, or do not have the model's tensors. OutputError: another process
    adds versions to the chain.
    """

    def __init__(
        self,
        chain: str | Path,
        model: Any = None,
        *,
        base: str | Path | None = None,
        mirrors: Mapping[str | Path, str] | None = None,
        quantized: Mapping[str | Path, str | Path] | None = None,
        log: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__(chain, model, base)
        self._log = log
        self._held.enter_context(one_writer(self.chain, "adding"))
        try:
            versions, origin = open_chain(self.chain, self._named)
            self._last = versions[-1] if versions else None
            self._origin, self._base, self._assets = origin, base_of(origin), assets_of(origin)
            self._bits = dict(weights_of(origin, versions))
            self._spare: Bits = {}
            self._shapes = {name: (info.dtype, info.shape) for name, info in origin.tensors.items()}
            if self._last is not None:
                self._shapes = {name: (c.dtype, c.shape) for name, c in self._last.contents.items()}
            if model is not None:
                match(self._shapes, model.state_dict(), model)
            self._mirrors: list[Mirror | QuantisedChain] = []
            for folder, style in (mirrors or {}).items():
                self._mirrors.append(self._held.enter_context(Mirror(Path(folder), style)))
            for folder, model_of in (quantized or {}).items():
                from deltamerge.apps.chain.requantise import QuantisedChain

                self._mirrors.append(self._held.enter_context(QuantisedChain(Path(folder), model_of, origin)))
            for mirror in self._mirrors:
                _catch_up(mirror, versions, origin)
        except BaseException:
            self._held.close()
            raise

    def write(self, state: Mapping[str, Any] | None = None, *, step: int | None = None) -> Future[WrittenVersion]:
        """Write the changes since the last version as the next one. Return a future of the written version.

        `state` is by default the model's. `step` is recorded, and the version's number is at least `step`. InputError:
        the tensors differ from the base's tensors. If the previous version failed, its error is raised here, and that
        version does not exist. Call `write` again: the new version then includes its changes.
        """
        self.flush()
        if state is None:
            if self._model is None:
                raise InputError("there is no model", hint="write(state_dict)")
            state = self._model.state_dict()
        match(self._shapes, state, self._model)
        new = _copy(self._shapes, state, self._spare, self._bits)
        self._spare = {}
        return self._start(new, step)

    def _tell(self, made: WrittenVersion) -> None:
        if self._log is not None:
            share = made.changed / made.elements if made.elements else 0.0
            version = _number(made.path.name)
            figures = {"version": version, "changed": made.changed, "share": share, "bytes": made.nbytes}
            self._log({f"delta/{name}": value for name, value in figures.items()})

    def _publish(self, name: str, new: Bits, step: int | None) -> WrittenVersion:
        before = self._last
        with publishing(self.chain, name, "adding") as folder:
            with ArtifactWriter(folder, self._base) as writer:
                for tensor, (dtype, shape) in self._shapes.items():
                    old = self._bits[tensor]
                    source = BaseTensor(tensor, dtype, shape, _slices(old))
                    target = writer.tensor(tensor, dtype, shape, source)
                    for start in range(0, old.size, TILE):
                        target.write(start, new[tensor][start : start + TILE])
                summary = writer.finish()
            note_version(folder, name, before, self._assets, step)
        self._last = open_version(self.chain / name)
        before_bits, self._spare, self._bits = self._bits, self._bits, new
        for mirror in self._mirrors:
            if mirror.is_at(None if before is None else before.state):
                mirror.follow(self._last, self._shapes, before_bits, new)
            else:  # it failed at the version before
                mirror.catch_up(line(self._last.path), self._origin, workers=1)
        size = sum(bits.size for bits in new.values())
        return WrittenVersion(self.chain / name, summary.entries, size, summary.nbytes)


def open_chain(chain: Path, base: str | None) -> tuple[tuple[Version, ...], Checkpoint]:
    """Return the versions of the chain, and its base."""
    versions = line(chain / head(chain)) if names(chain) else ()
    if versions:
        base = base or str(versions[0].delta.manifest.base)
    if not base:
        raise InputError(f"{chain}: has no version yet, and no base", hint="DeltaWriter(chain, model, base=…)")
    origin = open_origin(base)
    if not origin.is_simple:
        raise InputError(f"{base}: has several components", hint="a chain of each")
    return versions, origin


def note_version(
    folder: Path,
    name: str,
    before: Version | None,
    assets: Mapping[str, Path],
    step: int | None,
    source: Named | None = None,
) -> None:
    """Put files beside the weights and version.json to the artifact in `folder`, the version that will be `name`.

    `source` is the version of a plain model's chain that it has in codes.
    """
    assets = assets if before is None else {n: p for n, p in assets.items() if n == "config.json"}
    write_files({**assets}, folder)
    opened = DeltaFile.open(folder)
    note = Note(
        name=name,
        base=state_of(base_contents(opened.manifest)) if before is None else before.base,
        state=state_of(contents(opened.manifest)),
        after=None if before is None else Named(name=before.name, state=before.state),
        step=step,
        quantised_from=source,
        files=stored_files(folder, [*opened.files, *(folder / name for name in assets)]),
    )
    write_note(folder, note)


def _catch_up(mirror: Mirror | QuantisedChain, versions: Sequence[Version], origin: Checkpoint) -> None:
    """Write the versions that a mirror lacks. InputError: it belongs to another chain."""
    if versions:
        mirror.catch_up(versions, origin, workers=1)
    elif mirror.newest:
        raise InputError(f"{mirror.folder}: has versions, and the chain none", hint="a mirror in a new folder")


def _slices(bits: Array) -> Read:
    return lambda start, stop: bits[start:stop]


def next_number(last: Version | None, step: int | None) -> int:
    """Return the number of the next version: at least the step's."""
    return max(0 if last is None else _number(last.name) + 1, step or 0, 1)


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    if not digits.isdigit():
        raise OutputError(
            f"{name}: is the newest version, and no number", hint="name its successor with extract --after"
        )
    return int(digits)


def assets_of(origin: Checkpoint) -> dict[str, Path]:
    """Config and tokenizer files of the base, which the first version has too."""
    folder = origin.path if origin.path.is_dir() else origin.path.parent
    return {name: path for name, path in copied_files(folder).items() if name != RECIPE}


def weights_of(origin: Checkpoint, versions: Sequence[Version]) -> Iterator[tuple[str, Array]]:
    """Yield the weights of the newest version, or of the base, checked by hash if they are a version's."""
    with Reader() as reader:
        if not versions:
            for name, stored in origin.tensors.items():
                yield name, elements(reader, stored)(0, math.prod(stored.shape))
            return
        check_complete(versions[0], origin)
        delta = folded(versions)
        shapes = {name: (info.dtype, info.shape) for name, info in origin.tensors.items()}
        with errors.context(str(versions[-1].path)):
            for one in delta.result(shapes):
                info = None if one.base_name is None else origin.tensors[one.base_name]
                assert one.entry is not None
                yield one.name, one.entry.whole(None if info is None else elements(reader, info))


def match(wanted: Mapping[str, Kind], state: Mapping[str, Any], model: Any, *, sharded: bool = False) -> None:
    """InputError unless a state has every tensor of the base, of a dtype that becomes its, and no weight more.

    The model's class may say which tensors of a checkpoint it does not load, such as layers that draft tokens: they
    may be missing.
    """
    hint = "model.save_pretrained(FOLDER) once, and base=FOLDER"
    hint += "" if sharded else "; or write(state) with the base's names"
    left_out = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    for name, (dtype, shape) in wanted.items():
        tensor = state.get(name)
        if tensor is None:
            if any(pattern.search(name) for pattern in left_out):
                continue
            raise InputError(f"the model has no {name}, which the base has", hint=hint)
        if hasattr(tensor, "full_tensor") and not sharded:
            raise InputError(
                f"{name} is spread over processes", hint="ShardedDeltaWriter, or write(full_state_dict) on one of them"
            )
        code = code_of(tensor.dtype)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} is {list(tensor.shape)}, in the base {list(shape)}", hint=hint)
        if code != dtype and not {code, dtype} <= FLOATING:
            raise InputError(f"{name} is {code or tensor.dtype}, in the base {dtype}", hint=hint)
    known = {local.data_ptr() for name in wanted if name in state and (local := local_of(state[name])).numel()}
    for name, tensor in state.items():
        local = local_of(tensor)
        is_weight = local.numel() > 0 and code_of(tensor.dtype) in FLOATING
        if name not in wanted and is_weight and local.data_ptr() not in known:
            raise InputError(f"the base has no {name}, which the model has", hint=hint)


def local_of(tensor: Any) -> Any:
    """Return this process's shard of a tensor, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _copy(wanted: Mapping[str, Kind], state: Mapping[str, Any], spare: Bits, before: Bits) -> Bits:
    """Return the bits of a state in the base's dtypes, rounded to the nearest, ties to even.

    They are written into `spare` memory if given. Tensors that the state lacks are as `before`.
    """
    found: Bits = {}
    with torch.no_grad():
        for name, (dtype, shape) in wanted.items():
            if name not in state:
                found[name] = before[name]
                continue
            target = spare.get(name)
            made = (
                torch.empty(shape, dtype=torch_dtype(dtype))
                if target is None
                else to_torch(target, dtype).reshape(shape)
            )
            made.copy_(state[name])
            found[name] = bits_of(made)
    return found
