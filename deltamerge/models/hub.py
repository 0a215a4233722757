"""Model references: local folders, and hub ids through huggingface_hub (its cache, offline mode, token)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import DEEPEST, files_of
from deltamerge.files.hashes import blob_of, check_blobs
from deltamerge.files.strict_json import read_json
from deltamerge.formats.components import CONFIG as MODEL_CONFIG
from deltamerge.formats.components import MODULES, PIPELINE, code_of, is_composed, listed_folders
from deltamerge.formats.gguf.file import GgufHeader
from deltamerge.formats.peft.adapter import CONFIG, Adapter, checked_config
from deltamerge.formats.quantised.detect import states_of
from deltamerge.formats.safetensors import Header
from deltamerge.formats.weight_files import GGUF, PICKLES, is_index, is_weights, parts_of, read_weights, weight_source
from deltamerge.models.adapter import WEIGHTS, check_files, expand, open_adapter
from deltamerge.models.checkpoint import DELTA, Checkpoint, config_file_of, is_delta, open_checkpoint, open_folder
from deltamerge.models.hub_client import (
    COMMIT,
    Bounds,
    hub_errors,
    listing,
    near,
    range_bytes,
    range_gguf,
    range_header,
    within,
)
from deltamerge.models.hub_client import UnreachableError as UnreachableError
from deltamerge.models.hub_client import upload_errors as upload_errors
from deltamerge.models.tokenizer_files import TEMPLATES

_REVISION = r"(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?"
HUB_ID = re.compile(rf"(?P<id>\w[\w.-]*(/\w[\w.-]*)?){_REVISION}", re.ASCII)
# org/name:unet and org/name@revision:unet: a folder of a repository
IN_HUB = re.compile(rf"{HUB_ID.pattern}:(?P<inside>\w[\w.-]*(/\w[\w.-]*){{0,3}})", re.ASCII)
FILE_BYTES = 1_000_000_000  # of a file other than weights
MAX_SMALL = 1_000  # files other than weights

# Files that a run may need beside the weights, from the root of a repository.
ASSETS = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".spm")
CODE = ".py"  # code of models that bring their own; it is copied and never run


def open_model(reference: str, folder: Path, *, weights: bool, pickles: bool = False) -> Checkpoint:
    """Return the checkpoint that a recipe in `folder` calls `reference`.

    A reference is a local folder or weight file, otherwise a hub id, perhaps with a folder of its repository appended.
    "+" and a LoRA adapter (a folder or a hub id) may follow; the adapter is merged as it is read. `weights=True`
    downloads weights, tokenizer and other files of a hub id into huggingface_hub's cache. `weights=False` downloads
    only config, index and headers (by range requests), so `files` need not exist; torch's own files, where `pickles`
    allows them, are downloaded to be read.

    InputError: the reference is neither a folder nor a hub id, or names an adapter without a base. The hub has no such
    model or revision, it is gated, or there is no network and no copy. Or `open_checkpoint` refuses it.
    """
    if (path := _local(reference, folder)) is not None:
        return open_checkpoint(path, reference=reference, pickles=pickles)
    if "+" in reference:
        name, adapter = _split(reference, folder)
        base = open_model(name, folder, weights=weights, pickles=pickles)
        return expand(base, _adapter(adapter, folder, weights, pickles), reference)
    if inner := IN_HUB.fullmatch(reference):
        inside, file = inner["inside"], ""
        if inside.endswith(GGUF):
            inside, _, file = inside.rpartition("/")
        asked = _Asked(reference, inner["id"], inner["revision"], inside, weights, pickles, file)
    else:
        asked = _Asked(reference, *_hub_id(reference, folder), "", weights, pickles)
    return _from_hub(asked, folder)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A model of the hub: `inside` is a folder of its repository, or ""; `file` a GGUF file in it, or ""."""

    reference: str
    hub_id: str
    revision: str | None
    inside: str
    weights: bool
    pickles: bool
    file: str = ""

    def at(self, name: str) -> str:
        """Return the path in the repository of a file of the model."""
        return f"{self.inside}/{name}" if self.inside else name


def _local(reference: str, folder: Path) -> Path | None:
    path = os.path.join(folder, os.path.expanduser(reference))
    return Path(path) if os.path.exists(path) else None


def absent(reference: str, folder: Path) -> InputError | None:
    """Return the error for a reference that does not exist and is no hub id. Does not ask the hub."""
    try:
        for part in _split(reference, folder) if "+" in reference else (reference,):
            if _local(part, folder) is None and IN_HUB.fullmatch(part) is None:
                _hub_id(part, folder)
    except InputError as error:
        return error
    return None


def _hub_id(reference: str, folder: Path) -> tuple[str, str | None]:
    found = HUB_ID.fullmatch(reference)
    if found is None:
        forms = "hub ids are written org/name or org/name@revision, a folder in one org/name:folder"
        hint = near(reference, folder) or forms
        is_whole = os.path.isabs(os.path.expanduser(reference))
        raise InputError("no such folder" if is_whole else f"no such folder in {folder}", hint=hint, where=reference)
    return found["id"], found["revision"]


def _split(reference: str, folder: Path) -> tuple[str, str]:
    """Split base+adapter into its two parts; a folder's own name may contain "+"."""
    pieces = reference.split("+")
    pairs = [("+".join(pieces[:i]), "+".join(pieces[i:])) for i in range(1, len(pieces))]
    local = [pair for pair in pairs if all("+" not in part or _local(part, folder) for part in pair)]
    if not local:
        hint = "merge the first into the base: a recipe of its own with merge_method: passthrough"
        raise InputError("more than one adapter", hint=hint, where=reference)
    return local[0]


def _adapter(reference: str, folder: Path, weights: bool, pickles: bool) -> Adapter:
    if (path := _local(reference, folder)) is not None:
        return open_adapter(path, reference=reference, pickles=pickles)
    hub_id, revision = _hub_id(reference, folder)
    try:
        with errors.context(reference), hub_errors(hub_id, revision, folder, CONFIG):
            return _describe_adapter(reference, hub_id, revision, weights, pickles)
    except UnreachableError:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(hub_id, CONFIG, revision=revision)
        if not isinstance(config, str) or not (Path(config).parent / WEIGHTS).exists():
            raise
        snapshot = Path(config).parent
        _check_named([snapshot / CONFIG, snapshot / WEIGHTS])
        return open_adapter(snapshot, reference=reference, revision=snapshot.name, hub_id=hub_id)


def _describe_adapter(reference: str, hub_id: str, revision: str | None, weights: bool, pickles: bool) -> Adapter:
    """Return the adapter on the hub, from its config and header; `weights` downloads its tensors too."""
    commit, names = listing(f"models/{hub_id}", revision)
    file = check_files(names, pickles=pickles)
    snapshot = _file(hub_id, CONFIG, revision, commit).parent
    config = checked_config(read_json(snapshot / CONFIG))
    if weights or file != WEIGHTS:
        _files(hub_id, commit, [file])
    _check_named([snapshot / file])
    tensors = (
        range_header(hub_id, commit, snapshot / file) if file == WEIGHTS else read_weights(snapshot / file)
    ).tensors
    return Adapter(reference, snapshot, tensors, (snapshot / file, snapshot / CONFIG), config, commit, hub_id)


def fetch(checkpoint: Checkpoint | Adapter, first: str, *others: str) -> None:
    """Download small files of a hub model into its snapshot; names that the repository lacks are skipped.

    Offline, `first` must be in the cache; `others` are optional.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    assert checkpoint.hub_id is not None
    start = _inside(checkpoint)
    for name in (first, *others):
        if (checkpoint.path / name).exists():
            continue
        with (
            errors.context(checkpoint.reference),
            hub_errors(checkpoint.hub_id, checkpoint.revision, checkpoint.path),
        ):
            try:
                _file(checkpoint.hub_id, start + name, checkpoint.revision, checkpoint.revision)
            except EntryNotFoundError as error:
                if name == first and isinstance(error, LocalEntryNotFoundError):
                    raise


def _inside(checkpoint: Checkpoint | Adapter) -> str:
    """Return the folder of a model in its repository, with its slash: "unet/"."""
    parts = checkpoint.path.parts
    at = max((i for i, part in enumerate(parts) if part == checkpoint.revision), default=len(parts) - 1)
    return "".join(f"{part}/" for part in parts[at + 1 :])


def _from_hub(asked: _Asked, folder: Path) -> Checkpoint:
    pinned = asked.revision is not None and re.fullmatch("[0-9a-f]{40}", asked.revision)
    if pinned and not asked.weights and (cached := _from_cache(asked)):
        return cached
    try:
        with errors.context(asked.reference), hub_errors(asked.hub_id, asked.revision, folder):
            return _describe(asked)
    except UnreachableError:
        if cached := _from_cache(asked):
            return cached
        raise


def _from_cache(asked: _Asked) -> Checkpoint | None:
    """Return the cached checkpoint of a revision, or None if it is incomplete."""
    from huggingface_hub import try_to_load_from_cache

    for name in (asked.file,) if asked.file else (PIPELINE, MODULES, MODEL_CONFIG):
        found = try_to_load_from_cache(asked.hub_id, asked.at(name), revision=asked.revision)
        if isinstance(found, str):
            with suppress(InputError):
                return _open(asked, _snapshot(Path(found), asked.at(name)))
            return None
    return None


def _open(asked: _Asked, snapshot: Path) -> Checkpoint:
    """Return the checkpoint in a snapshot of the cache, whose files have the hub's own hashes for names."""
    path = snapshot / asked.at(asked.file)
    with errors.context(asked.reference):
        found = {path.name: path} if asked.file else files_of(path)
        _check_named(file for name, file in found.items() if name.endswith((*ASSETS, ".safetensors", GGUF)))
    return open_checkpoint(
        path, reference=asked.reference, revision=snapshot.name, hub_id=asked.hub_id, pickles=asked.pickles
    )


def _snapshot(path: Path, name: str) -> Path:
    """Return the snapshot of the cache that has the file `name` at `path`."""
    return path.parents[name.count("/")]


def _check_named(paths: Iterable[Path]) -> None:
    """Raise InputError for a cached file without the hub's hash in its name: `check_blobs` could not check it."""
    for path in paths:
        if not any(COMMIT.fullmatch(parent.name) for parent in [*path.parents][: DEEPEST + 2]):
            raise InputError(f"{path.parent}: is no commit", hint="remove it, to have it downloaded again")
        if path.exists() and blob_of(path) is None:
            hint = "remove it, unset HF_HUB_DISABLE_SYMLINKS, and have the hub itself answer, not a mirror"
            raise InputError(f"{path}: the cache has it without the hub's hash of it", hint=hint)


def _file(hub_id: str, name: str, revision: str | None, commit: str | None, bounds: Bounds | None = None) -> Path:
    """Return a file in the cache, downloaded within bounds if it is missing; weights have no bound `most`.

    With a `revision` that is no commit the cache records that it is at `commit`.
    """
    from huggingface_hub import hf_hub_download

    bounds = bounds or Bounds(FILE_BYTES, commit)
    with errors.context(name):
        found = within(bounds, lambda: hf_hub_download(hub_id, name, revision=revision), whole=bounds.most is not None)
        path = Path(found)
        there = _snapshot(path, name).name
        if commit is not None and there != commit:
            raise InputError(f"the cache has it at commit {there}, the hub is at {commit}", hint="try again")
        _check_named([path])
    return path


def _files(hub_id: str, commit: str, names: Sequence[str]) -> Path:
    """Return the cached snapshot with the files `names` of a commit, downloaded eight at a time.

    An interruption does not wait for them.
    """
    weights = {name for name in names if is_weights(name)}
    if len(names) - len(weights) > MAX_SMALL:
        hint = "download the needed part, and name its folder"
        raise InputError(f"has {len(names) - len(weights):,} small files, more than {MAX_SMALL:,}", hint=hint)
    bounds = {name: Bounds(None if name in weights else FILE_BYTES, commit) for name in names}
    pool = ThreadPoolExecutor(8)
    try:
        found = list(pool.map(lambda name: _file(hub_id, name, commit, commit, bounds[name]), names))
        return _snapshot(found[-1], names[-1])
    except BaseException:
        for bound in bounds.values():
            bound.over = True
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _describe(asked: _Asked) -> Checkpoint:
    """Return the checkpoint on the hub, from its headers; `weights` downloads all its files too."""
    # first, because it fails at once without a network, while a download retries for long
    commit, listed = listing(f"models/{asked.hub_id}", asked.revision, below=True)
    start = asked.at("")
    names = [name.removeprefix(start) for name in listed if name.startswith(start) and "\\" not in name]
    if asked.file:
        others = {name for name in names if is_weights(name)} - {*parts_of(asked.file, names)}
        names = [name for name in names if name not in others]
    top = [name for name in names if "/" not in name]
    if asked.file and asked.file not in top:
        raise InputError(f"has no file {asked.file} on the hub")
    if asked.inside and not names:
        raise InputError(f"has no folder {asked.inside} on the hub")
    folders, first = [""], next((name for name in (DELTA, PIPELINE, MODULES) if name in top), "")
    if not first:  # finds faults before anything is downloaded
        source, small = weight_source(top, pickles=asked.pickles), [name for name in top if not is_weights(name)]
        has_none = source.endswith(GGUF) and MODEL_CONFIG not in top
        first = ("" if has_none else config_file_of(top, source)) or next(iter(small), MODEL_CONFIG)
    snapshot = _snapshot(_file(asked.hub_id, asked.at(first), asked.revision, commit), asked.at(first))
    if is_composed(top):
        lists = [asked.at(name) for name in (PIPELINE, MODULES) if name in top]
        _files(asked.hub_id, commit, lists)
        folders = listed_folders(snapshot / asked.inside)
    folder = _HubFolder(asked, commit, snapshot, names)
    own = is_composed(top) or (first == MODEL_CONFIG and code_of(read_json(snapshot / asked.at(first))))
    kept = (*ASSETS, CODE) if own else ASSETS
    # a delta artifact is small, and its manifest replaces headers
    below = tuple(f"{inner}/" for inner in (*folders, TEMPLATES) if inner)
    wanted = [name for name in names if name in top or name.startswith(below)]
    if is_delta(top):
        small = [name for name in wanted if name.endswith((*kept, ".safetensors"))]
    elif asked.weights:
        small = [name for name in wanted if name.endswith(kept)]
    else:
        small = [name for inner in folders for name in _first(folder.names(inner), inner, pickles=asked.pickles)]
    if small:
        _files(asked.hub_id, commit, [asked.at(name) for name in small])
    if is_delta(top):
        return _open(asked, snapshot)
    return open_folder(folder, asked.reference, commit, asked.hub_id, pickles=asked.pickles)


def _first(names: Sequence[str], inner: str, *, pickles: bool) -> list[str]:
    """Return the files of a folder that must be there before its weights are opened: its config, and their index."""
    if not any(map(is_weights, names)):
        return []
    source = weight_source(names, pickles=pickles)
    wanted = [MODEL_CONFIG] * (MODEL_CONFIG in names) + [source] * is_index(source)
    return [f"{inner}/{name}" if inner else name for name in wanted]


@dataclass(frozen=True, slots=True)
class _HubFolder:
    """A folder on the hub, whose files `listed` names; headers come by range requests."""

    asked: _Asked
    commit: str
    snapshot: Path
    listed: Sequence[str]

    @property
    def path(self) -> Path:
        return self.snapshot / self.asked.inside

    def names(self, inner: str = "") -> list[str]:
        start = f"{inner}/" if inner else ""
        below = (name.removeprefix(start) for name in self.listed if name.startswith(start))
        return [name for name in below if "/" not in name]

    def read(self, paths: Sequence[Path]) -> list[Header]:
        if self.asked.weights:
            _files(self.asked.hub_id, self.commit, [path.relative_to(self.snapshot).as_posix() for path in paths])
        _check_named(paths)
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self._header, paths))

    def read_gguf(self, paths: Sequence[Path]) -> list[GgufHeader]:
        names = [path.relative_to(self.snapshot).as_posix() for path in paths]
        if self.asked.weights:
            _files(self.asked.hub_id, self.commit, names)
        _check_named(paths)
        return [range_gguf(self.asked.hub_id, self.commit, path, n) for path, n in zip(paths, names, strict=True)]

    def _header(self, path: Path) -> Header:
        name = path.relative_to(self.snapshot).as_posix()
        if path.name.endswith(PICKLES):
            _files(self.asked.hub_id, self.commit, [name])
            return read_weights(path)
        header = range_header(self.asked.hub_id, self.commit, path, name)
        if path.exists():
            return header
        fetch = partial(range_bytes, self.asked.hub_id, self.commit, name)
        with ThreadPoolExecutor(8) as pool:  # shapes that are stored in a weight's bytes
            stated = dict(pool.map(lambda n: (n, fetch(header.tensors[n])), states_of(header.tensors)))
        return replace(header, tensors=header.tensors | stated)


def download(reference: str, names: Sequence[str], *, optional: Sequence[str] = ()) -> Path:
    """Return the folder of the hub's cache with the files `names` of a repository; its name is the commit.

    InputError: not a hub id, not on the hub, or a missing file that is not `optional`.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found = HUB_ID.fullmatch(reference)
    if found is None:
        raise InputError("not a hub id", hint="org/name or org/name@revision")
    revision, folder, commit = found["revision"], Path(), None
    with hub_errors(found["id"], revision, None):
        for name in (*names, *optional):
            try:
                path = _file(found["id"], name, revision, commit)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                if name not in optional:
                    raise InputError(f"has no {name} on the hub", hint="deltamerge push puts it there") from None
                continue
            check_blobs([path], 1)
            folder = path.parent
            revision = commit = folder.name
    return folder
