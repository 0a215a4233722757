"""Folds the old versions of a chain into one, and checks whole chains."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.errors import GO_ON, InputError, VerifyError, interruptible
from deltamerge.files import progress
from deltamerge.files.ownership import LOCK_NAME
from deltamerge.formats.delta.entry import TILE, Entry
from deltamerge.formats.delta.tensor_writer import BaseTensor, TensorWriter
from deltamerge.formats.delta.writer import ArtifactWriter
from deltamerge.models.chain.folder import (
    VERSION,
    Named,
    Note,
    Version,
    check_hashes,
    contents,
    head,
    is_chain,
    line,
    names,
    stored_files,
    write_note,
)
from deltamerge.models.chain.publish import one_writer, publishing, refuse_foreign, refuse_pinned, remove
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.delta_file import DeltaFile
from deltamerge.models.delta_over_base import check, check_complete, folded
from deltamerge.models.references import open_origin
from deltamerge.outputs.assets import RECIPE, copied_files, write_files
from deltamerge.run.lock import verify
from deltamerge.tensors.reader import Reader, elements


@dataclass(frozen=True, slots=True)
class SquashResult:
    """The result of a squash: the version that others were folded into, and their names.

    None: there was nothing to fold. `before` and `after` are bytes of the chain's artifacts.
    """

    into: str | None
    folded: tuple[str, ...]
    before: int
    after: int


def squash(chain: Path, keep: int, base: str | None = None, *, workers: int, pickles: bool = False) -> SquashResult:
    """Fold all versions of a chain except the newest `keep` into one, over the base, then remove them.

    The result has the name of the last folded version, and replaces it in one step. Later versions stay valid, because
    the state that they change is the same. A killed process leaves the old chain or the new one. By default `base` is
    the base that the chain names. InputError: it is no chain, or another base. OutputError: another process folds, or a
    version holds files that no run wrote.
    """
    if not is_chain(chain):
        raise InputError(f"{chain}: is no chain", hint="a folder of versions, made by extract --after or a trainer")
    with interruptible(lambda _: f"{chain} is whole, as it was or folded: {GO_ON}"), one_writer(chain, "folding"):
        versions = line(chain / head(chain))
        old = versions[: len(versions) - keep]
        before = sum(map(_bytes, versions))
        if len(old) < 2:
            return SquashResult(None, (), before, before)
        refuse_pinned(chain, (version.name for version in old[:-1]))
        for version in old:
            refuse_foreign(version.path)
        target, manifest = old[-1], old[0].delta.manifest
        origin = open_origin(base or str(manifest.base), old[0].delta, pickles=pickles)
        check_complete(old[0], origin)
        with publishing(chain, target.name, "folding") as folder:
            _write(folder, old, origin, workers)
        for version in old[:-1]:
            remove(chain, version.name)
        return SquashResult(
            target.name, tuple(v.name for v in old[:-1]), before, sum(map(_bytes, line(chain / head(chain))))
        )


def verify_chain(path: Path, base: str | None, workers: int, *, pickles: bool = False) -> list[dict[str, Any]]:
    """Check a chain up to a version, or its newest, and return the checks of each version.

    Checked are the files of each version, and that it was made from the result of the previous version. With `base`,
    every tensor of every version is checked too, in one pass.

    InputError, VerifyError: the fault and its version.
    """
    versions = line(path / head(path) if is_chain(path) else path)
    found = []
    for version in versions:
        with errors.context(str(version.path)):
            files = [] if version.note is None else [VERSION, *check_hashes(version.path, version.note.files)]
        if (version.path / LOCK_NAME).is_file():
            files += verify(version.path, workers)
        elif version.note is None:
            raise VerifyError(f"{version.path}: has neither {VERSION} nor {LOCK_NAME}, which name its files' hashes")
        else:
            refuse_foreign(version.path)
        found.append({"name": version.name, "state": version.state, "files": sorted({*files})})
    if base is not None:
        origin = open_origin(base, versions[0].delta, pickles=pickles)
        check_complete(versions[0], origin)
        with errors.context(str(path)), Reader() as reader:
            check(folded(versions, every=True), origin, reader, workers)
    return found


def verify_store(store: Path, base: str | None, workers: int, *, pickles: bool = False) -> list[dict[str, Any]]:
    """Check every delta of a store, and with `base` every resulting tensor. Return the checks of each.

    VerifyError lists the fault of each delta that fails. All deltas are checked in any case.
    """
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for name in names(store):
        try:
            (delta,) = verify_chain(store / name, base, workers, pickles=pickles)
            found.append(delta)
        except (InputError, VerifyError) as error:
            wrong += str(error).splitlines()
    if wrong:
        count = len(names(store)) - len(found)
        raise VerifyError(f"{store}: of its {len(names(store))} deltas {count} failed", also=wrong)
    return found


def _bytes(version: Version) -> int:
    return sum(file.stat().st_size for file in version.delta.files)


def _write(folder: Path, versions: Sequence[Version], origin: Checkpoint, workers: int) -> None:
    """Write the version that others amount to: artifact, files beside its weights, version.json."""
    delta, last = folded(versions), versions[-1]
    planned = delta.result({name: (info.dtype, info.shape) for name, info in origin.tensors.items()})
    manifest = delta.manifest
    with (
        Reader() as reader,
        ArtifactWriter(
            folder,
            manifest.base,
            shard_size=manifest.shard_size,
            removed=manifest.removed,
            components=manifest.as_components(),
        ) as writer,
        progress.phase("folding", len(planned), "tensors") as folding,
        ThreadPoolExecutor(workers) as pool,
        errors.context(str(last.path)),
    ):
        work = []
        for source in planned:
            info = None if source.base_name is None else origin.tensors[source.base_name]
            base = None if info is None else BaseTensor(info.name, info.dtype, info.shape, elements(reader, info))
            assert source.entry is not None
            work.append((source.entry, base, writer.tensor(source.name, source.dtype, source.shape, base)))

        def fold(one: tuple[Entry, BaseTensor | None, TensorWriter]) -> None:
            entry, base, tensor = one
            done = 0
            with errors.context(entry.name):
                for bits in entry.tiles(None if base is None else base.read, tile=TILE):
                    tensor.write(done, bits)
                    done += bits.size
            folding.step()

        list(pool.map(fold, work))
        writer.finish()
    assets = {name: path for version in versions for name, path in copied_files(version.path).items()}
    assets.pop(RECIPE, None)  # of one version's making, not of the folded one's
    write_files({**assets}, folder)
    made = DeltaFile.open(folder)
    files = [*made.files, *(folder / name for name in assets)]
    gone = [Named(name=version.name, state=version.state) for version in versions[:-1]]
    earlier = [one for version in versions if version.note is not None for one in version.note.folded]
    note = Note(
        name=last.name,
        base=versions[0].base,
        state=last.state,
        step=None if last.note is None else last.note.step,
        quantised_from=None if last.note is None else last.note.quantised_from,
        folded=[*earlier, *gone],
        files=stored_files(folder, files),
    )
    if contents(made.manifest) != last.contents:
        raise InputError(f"{last.path}: folding made another state", hint="please report this")
    write_note(folder, note)
