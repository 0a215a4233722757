"""Apply a delta artifact to its base: write the checkpoint of `output.kind: model`, byte for byte."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from deltamerge import errors
from deltamerge.errors import InputError, VerifyError
from deltamerge.errors.shown import code, human, plain
from deltamerge.files import progress
from deltamerge.files.atomic import replace_file
from deltamerge.files.descriptors import files_of
from deltamerge.files.hashes import check_blobs, seal
from deltamerge.files.outbox import ROOM, SLAB
from deltamerge.files.ownership import MADE_BY, Guard, Maker
from deltamerge.files.work_folder import refuse_inputs, workspace
from deltamerge.formats.components import card
from deltamerge.formats.delta.entry import TILE
from deltamerge.formats.delta.steps import STEP_TILE
from deltamerge.formats.safetensors import Writer, plan_layout
from deltamerge.models.chain.folder import line
from deltamerge.models.chain.publish import replacing
from deltamerge.models.checkpoint import Checkpoint, decoded, is_delta
from deltamerge.models.delta_file import DeltaFile, ResultTensor
from deltamerge.models.delta_over_base import check, check_complete, folded
from deltamerge.models.references import as_made_from, open_model
from deltamerge.outputs.assets import copied_files, write_files
from deltamerge.run import hashes
from deltamerge.run import lock as locks
from deltamerge.tensors.reader import Reader, elements
from deltamerge.version import __version__

# bytes of the process before the first tile, and of output on its way to the disk
BASELINE_BYTES = 60_000_000 + ROOM + 2 * SLAB
ELEMENT_BYTES = 32  # bytes per element of a tile at its peak: base, float32, positions, values, result


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """The finished folder, its tensors and their bytes, and its lock."""

    folder: Path
    tensors: int
    nbytes: int
    lock: dict[str, Any]


def apply(
    delta: str,
    base: str,
    out: Path,
    *,
    workers: int,
    memory: int | None = None,
    force: bool = False,
    pickles: bool = False,
) -> ApplyResult:
    """Write the checkpoint base + delta to `out`, tile by tile. `delta` and `base` are folders or hub ids.

    Every tensor of the base and of the result is checked before the first file appears under its name. `pickles`: the
    base may be in torch's own files. InputError: no delta, another base, or a damaged file.
    """
    maker = Maker("apply", models=frozenset((delta, base)))
    guard = Guard.of(out, None, partial(replacing, out))
    here = Path.cwd()
    artifact = open_model(delta, here, weights=True)
    origin = _base(base, here, pickles=pickles)
    if not artifact.is_delta or artifact.base is not None:
        raise InputError(f"{delta}: is not a delta artifact", hint="deltamerge apply DELTA --base BASE --out DIR")
    if origin.is_delta and origin.base is None:
        raise InputError(f"{base}: is a delta too", hint=f"name it with its base: BASE+{base}")
    with errors.context(delta):
        versions = line(artifact.path)
        opened, origin = folded(versions), as_made_from(origin, versions[0].delta)
        if len(versions) > 1:
            check_complete(versions[0], origin)
        entries = opened.entries.values()
        stepped = max((entry.size for entry in entries if len(versions) > 1 or entry.has_steps), default=0)
        tile = _tile(workers, memory, max(1024, min(stepped, STEP_TILE)))
        artifact = replace(artifact, files=opened.files)
        planned = opened.result({name: (info.dtype, info.shape) for name, info in origin.tensors.items()})
    components = opened.manifest.as_components()
    layout = plan_layout([(s.name, s.dtype, s.shape) for s in planned], opened.manifest.shard_size, components)
    refuse_inputs(out, [(delta, artifact.path), (base, origin.path)])
    with workspace(out, force=force, guard=guard) as work:
        folder = work.folder
        with (
            progress.phase("applying", layout.total_size) as one,
            Reader() as reader,
            Writer(folder, layout) as writer,
            errors.context(delta),
        ):
            _write(opened, planned, origin, reader, writer, workers, tile, one.step)
            found = writer.finish()
        seals = {file.name: seal(folder / file.name) for file in layout.files}
        copied = {name: path for version in versions for name, path in copied_files(version.path).items()}
        check_blobs([*hashes.input_files(artifact), *hashes.input_files(origin), *copied.values()], workers)
        write_files({**copied}, folder)
        (folder / "README.md").write_text(_card(opened, delta, base, out.name), encoding="utf-8")
        inputs = {name: hashes.describe_input(model, workers) for name, model in ((delta, artifact), (base, origin))}
        others = {name: path for name, path in files_of(folder).items() if name not in found.hashes}
        seals |= {name: seal(path) for name, path in others.items()}
        hashed = {file.name: {"hash": found.hashes[file.name], "size": file.size} for file in layout.files}
        outputs = hashed | hashes.describe_files(others.values(), workers, root=folder)
        lock = {"deltamerge": __version__, "format": locks.FORMAT, MADE_BY: maker.describe(), "inputs": inputs}
        lock["outputs"] = outputs
        replace_file(folder / locks.LOCK_NAME, yaml.safe_dump(lock, sort_keys=True))
        work.publish(outputs, seals, workers)
    return ApplyResult(out, len(planned), layout.total_size, lock)


def verify_base(folder: Path, base: str, workers: int, *, pickles: bool = False) -> str:
    """Check that the delta in `folder`, on `base`, gives each tensor its hash. Return the checks in words.

    For a folder without a delta, check that the files of `base` are among the inputs in its lock. InputError,
    VerifyError: a check failed.
    """
    origin = _base(base, Path.cwd(), pickles=pickles)
    if not is_delta([file.name for file in folder.iterdir()]):
        files = hashes.describe_input(origin, workers)["files"]
        known = locks.read_lock(folder / locks.LOCK_NAME).get("inputs") or {}
        name = next((name for name, entry in known.items() if entry.get("files") == files), None)
        if name is None:
            raise VerifyError(
                f"{folder}: {base} is none of the inputs of its lock", hint=f"they are {', '.join(known)}"
            )
        return f"{base} is its input {name}"
    with errors.context(str(folder)), Reader() as reader:
        versions = line(folder)
        opened, origin = folded(versions, every=True), as_made_from(origin, versions[0].delta)
        if len(versions) > 1:
            check_complete(versions[0], origin)
        planned = opened.result({name: (info.dtype, info.shape) for name, info in origin.tensors.items()})
        check(opened, origin, reader, workers)
    return f"{len(planned)} tensors, from {base}, as the delta says"


def _base(reference: str, folder: Path, *, pickles: bool = False) -> Checkpoint:
    """Return the base of a delta. A quantised base is decoded, as when the delta was made."""
    origin = open_model(reference, folder, weights=True, pickles=pickles)
    with errors.context(reference):
        return decoded(origin)


def _tile(workers: int, memory: int | None, least_tile: int) -> int:
    if memory is None:
        return TILE
    tile = (memory - BASELINE_BYTES) // (workers * ELEMENT_BYTES)
    if tile < least_tile:
        least = BASELINE_BYTES + workers * ELEMENT_BYTES * least_tile
        raise InputError(
            f"--memory {human(memory)} is too little for {workers} workers",
            hint=f"give at least {-(-least // 10**6)}MB, or fewer --workers",
        )
    return min(tile, TILE)


def _write(
    opened: DeltaFile,
    planned: list[ResultTensor],
    origin: Checkpoint,
    reader: Reader,
    writer: Writer,
    workers: int,
    tile: int,
    told: Callable[[int], None],
) -> None:
    """Write and check all tensors, `workers` at a time. After a failure no further tile is written."""
    stopped = threading.Event()

    def write(source: ResultTensor) -> None:
        info = None if source.base_name is None else origin.tensors[source.base_name]
        if source.entry is None:
            assert info is not None
            writer.copy(source.name, info, reader)
            told(info.nbytes)
            return
        offset = 0
        with errors.context(source.name):
            for bits in source.entry.tiles(None if info is None else elements(reader, info), tile=tile):
                if stopped.is_set():
                    return
                writer.write(source.name, offset, bits)
                offset += bits.nbytes
                told(bits.nbytes)

    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(write, source) for source in planned]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException as error:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, InputError):
                error.hint = error.hint or f"this delta was made from {opened.manifest.base}"
            raise


def _card(opened: DeltaFile, delta: str, base: str, title: str) -> str:
    matter = {
        "base_model": [opened.manifest.base.id],
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["deltamerge"],
    }
    lines = [
        *card(matter, plain(title)),
        f"Made with deltamerge {__version__}: the delta {code(delta)} applied "
        f"to {code(base)}; every tensor of the base and of the result has the hash that the delta names.",
        "",
        "Check it with `deltamerge verify .`.",
        "",
    ]
    return "\n".join(lines)
