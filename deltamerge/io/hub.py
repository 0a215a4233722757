"""Model references: local folders, and hub ids through huggingface_hub (its cache, offline mode, token)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.io.adapter import WEIGHTS, check_files, expand, open_adapter
from deltamerge.io.adapter_config import CONFIG, checked_config
from deltamerge.io.blobs import blob_of, check_blobs
from deltamerge.io.checkpoint import (
    DELTA,
    INDEX,
    Adapter,
    Checkpoint,
    is_delta,
    join,
    open_checkpoint,
    read_index,
    shards_of,
    weight_source,
)
from deltamerge.io.config_file import read_config
from deltamerge.io.hub_answers import listing, range_header
from deltamerge.io.hub_guard import COMMIT, NETWORK, Bounds, within
from deltamerge.io.strict_json import read_json

HUB_ID = re.compile(r"(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?", re.ASCII)
FILE_BYTES = 1_000_000_000  # of a file other than weights
MAX_SMALL = 1_000  # files other than weights
AGAIN = "push again: what has arrived is not sent again"

# What a run may need beside the weights, from the root of a repository.
ASSETS = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")


class UnreachableError(InputError):
    """The hub cannot be reached, and its cache lacks what is needed."""


def open_model(reference: str, folder: Path, *, weights: bool) -> Checkpoint:
    """The checkpoint that a recipe in `folder` calls `reference`.

    A reference is a local folder, else a hub id; or one of them, "+" and a LoRA adapter (a folder or a hub id), which
    is merged as it is read. `weights=True` downloads weights, tokenizer and other files of a hub id into
    huggingface_hub's cache. `weights=False` downloads only config, index and headers (by range requests), so `files`
    need not exist.

    InputError: neither a folder nor a hub id, an adapter without a base, not found, gated, no such revision, offline
    and not in the cache, or anything that `open_checkpoint` refuses.
    """
    if (path := _local(reference, folder)) is not None:
        return open_checkpoint(path, reference=reference)
    if "+" in reference:
        name, adapter = _split(reference, folder)
        return expand(open_model(name, folder, weights=weights), _adapter(adapter, folder, weights), reference)
    hub_id, revision = _hub_id(reference, folder)
    return _from_hub(reference, hub_id, revision, folder, weights)


def _local(reference: str, folder: Path) -> Path | None:
    path = os.path.join(folder, os.path.expanduser(reference))
    return Path(path) if os.path.exists(path) else None


def _hub_id(reference: str, folder: Path) -> tuple[str, str | None]:
    found = HUB_ID.fullmatch(reference)
    if found is None:
        hint = "hub ids are written org/name or org/name@revision"
        raise InputError(f"no such folder in {folder}", hint=hint, where=reference)
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


def _adapter(reference: str, folder: Path, weights: bool) -> Adapter:
    if (path := _local(reference, folder)) is not None:
        return open_adapter(path, reference=reference)
    hub_id, revision = _hub_id(reference, folder)
    try:
        with errors.context(reference), _explained(hub_id, revision, folder, CONFIG):
            return _describe_adapter(reference, hub_id, revision, weights)
    except UnreachableError:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(hub_id, CONFIG, revision=revision)
        if not isinstance(config, str) or not (Path(config).parent / WEIGHTS).exists():
            raise
        snapshot = Path(config).parent
        _check_named([snapshot / CONFIG, snapshot / WEIGHTS])
        return open_adapter(snapshot, reference=reference, revision=snapshot.name, hub_id=hub_id)


def _describe_adapter(reference: str, hub_id: str, revision: str | None, weights: bool) -> Adapter:
    """The adapter on the hub, from its config and header; `weights` downloads its tensors too."""
    commit, names = listing(f"models/{hub_id}", revision)
    check_files(names)
    snapshot = _file(hub_id, CONFIG, revision, commit).parent
    config = checked_config(read_json(snapshot / CONFIG))
    if weights:
        _files(hub_id, commit, [WEIGHTS])
    _check_named([snapshot / WEIGHTS])
    tensors = range_header(hub_id, commit, snapshot / WEIGHTS).tensors
    return Adapter(reference, snapshot, tensors, (snapshot / WEIGHTS, snapshot / CONFIG), config, commit, hub_id)


def fetch(checkpoint: Checkpoint, first: str, *others: str) -> None:
    """Download small files of a hub model into its snapshot; names that the repository lacks are skipped.

    Offline, `first` must be in the cache; `others` are optional.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    assert checkpoint.hub_id is not None
    for name in (first, *others):
        if (checkpoint.path / name).exists():
            continue
        with (
            errors.context(checkpoint.reference),
            _explained(checkpoint.hub_id, checkpoint.revision, checkpoint.path),
        ):
            try:
                _file(checkpoint.hub_id, name, checkpoint.revision, checkpoint.revision)
            except EntryNotFoundError as error:
                if name == first and isinstance(error, LocalEntryNotFoundError):
                    raise


def _from_hub(reference: str, hub_id: str, revision: str | None, folder: Path, weights: bool) -> Checkpoint:
    pinned = revision is not None and re.fullmatch("[0-9a-f]{40}", revision)
    if pinned and not weights and (cached := _from_cache(reference, hub_id, revision)):
        return cached
    try:
        with errors.context(reference), _explained(hub_id, revision, folder):
            return _describe(reference, hub_id, revision, weights)
    except UnreachableError:
        if cached := _from_cache(reference, hub_id, revision):
            return cached
        raise


def _from_cache(reference: str, hub_id: str, revision: str | None) -> Checkpoint | None:
    """The cached checkpoint of a revision, or None if it is incomplete."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    with suppress(InputError):
        return _open(reference, hub_id, Path(config).parent) if isinstance(config, str) else None
    return None


def _open(reference: str, hub_id: str, snapshot: Path) -> Checkpoint:
    """The checkpoint in a snapshot of the cache, whose files have the hub's own hashes for names."""
    with errors.context(reference):
        _check_named(path for path in snapshot.iterdir() if path.name.endswith((*ASSETS, ".safetensors")))
    return open_checkpoint(snapshot, reference=reference, revision=snapshot.name, hub_id=hub_id)


def _check_named(paths: Iterable[Path]) -> None:
    """InputError: a cached file without the hub's hash in its name, so that `check_blobs` could not check it."""
    for path in paths:
        if not COMMIT.fullmatch(path.parent.name):
            raise InputError(f"{path.parent}: is no commit", hint="remove it, to have it downloaded again")
        if path.exists() and blob_of(path) is None:
            hint = "remove it, unset HF_HUB_DISABLE_SYMLINKS, and have the hub itself answer, not a mirror"
            raise InputError(f"{path}: the cache has it without the hub's hash of it", hint=hint)


def _file(hub_id: str, name: str, revision: str | None, commit: str | None, bounds: Bounds | None = None) -> Path:
    """A file in the cache, downloaded within bounds if it is missing; weights have no bound `most`.

    With a `revision` that is no commit the cache records that it is at `commit`.
    """
    from huggingface_hub import hf_hub_download

    bounds = bounds or Bounds(FILE_BYTES, commit)
    with errors.context(name):
        found = within(bounds, lambda: hf_hub_download(hub_id, name, revision=revision), whole=bounds.most is not None)
        path = Path(found)
        if commit is not None and path.parent.name != commit:
            raise InputError(f"the cache has it at commit {path.parent.name}, the hub is at {commit}", hint="try again")
        _check_named([path])
    return path


def _files(hub_id: str, commit: str, names: Sequence[str]) -> Path:
    """The cached snapshot with the files `names` of a commit, downloaded eight at a time; an interruption does not
    wait."""
    weights = {name for name in names if name.endswith(".safetensors")}
    if len(names) - len(weights) > MAX_SMALL:
        hint = "download what you need of it, and name that folder"
        raise InputError(f"has {len(names) - len(weights):,} small files, more than {MAX_SMALL:,}", hint=hint)
    bounds = {name: Bounds(None if name in weights else FILE_BYTES, commit) for name in names}
    pool = ThreadPoolExecutor(8)
    try:
        return list(pool.map(lambda name: _file(hub_id, name, commit, commit, bounds[name]), names))[-1].parent
    except BaseException:
        for bound in bounds.values():
            bound.over = True
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _describe(reference: str, hub_id: str, revision: str | None, weights: bool) -> Checkpoint:
    """The checkpoint on the hub, from its headers; `weights` downloads all files too."""
    # first: it fails at once without a network, while a download retries for long
    commit, names = listing(f"models/{hub_id}", revision)
    if is_delta(names):  # a delta artifact is small, and its manifest is what would be the header
        wanted = [name for name in names if name.endswith((*ASSETS, ".safetensors"))]
        _file(hub_id, DELTA, revision, commit)
        return _open(reference, hub_id, _files(hub_id, commit, wanted))
    source = weight_source(names)
    snapshot = _file(hub_id, "config.json", revision, commit).parent
    weight_map = None
    if source == INDEX:
        weight_map = read_index(_file(hub_id, INDEX, commit, commit))
    shards = [source] if weight_map is None else shards_of(weight_map, names)
    if weights:
        _files(hub_id, commit, [name for name in names if name in shards or name.endswith(ASSETS)])
    _check_named(snapshot / shard for shard in shards)
    with ThreadPoolExecutor(8) as pool:
        headers = pool.map(lambda shard: range_header(hub_id, commit, snapshot / shard), shards)
    tensors = join(dict(zip(shards, headers, strict=True)), weight_map)
    files = tuple(snapshot / shard for shard in shards)
    return Checkpoint(reference, snapshot, tensors, files, read_config(snapshot), commit, hub_id)


def download(reference: str, names: Sequence[str], *, optional: Sequence[str] = ()) -> Path:
    """The folder of huggingface_hub's cache that holds the files `names` of a repository; its name is the commit.

    InputError: not a hub id, what `resolve` refuses, or a missing file that is not `optional`.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found = HUB_ID.fullmatch(reference)
    if found is None:
        raise InputError("not a hub id", hint="org/name or org/name@revision")
    revision, folder, commit = found["revision"], Path(), None
    with _explained(found["id"], revision, Path()):
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


@contextmanager
def explained_upload() -> Iterator[None]:
    """Turn what huggingface_hub raises during an upload into one line and a hint, which never hold the token."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    try:
        yield
    except DeltamergeError:
        raise
    except Exception as raised:
        # the client wraps failures of its threads
        error = raised.__cause__ if type(raised) is RuntimeError and raised.__cause__ else raised
        if isinstance(error, hub.HfHubHTTPError):
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403, 404):
                hint = "`hf auth login` with a token that may write"
                raise InputError("may not be written", hint=hint) from raised
            raise InputError(f"{constants.ENDPOINT} answered {status or 'an error'}", hint=AGAIN) from raised
        if constants.HF_HUB_OFFLINE:
            raise InputError("HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE") from raised
        if type(error).__module__.partition(".")[0] in NETWORK or isinstance(error, ConnectionError):
            raise InputError(f"{constants.ENDPOINT} cannot be reached", hint=AGAIN) from raised
        raise


@contextmanager
def _explained(hub_id: str, revision: str | None, folder: Path, config: str = "config.json") -> Iterator[None]:
    """Turn what huggingface_hub raises into one line and a hint."""
    try:
        yield
    except DeltamergeError:
        raise
    except Exception as error:
        explained = _explain(error, hub_id, revision, folder, config)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, hub_id: str, revision: str | None, folder: Path, config: str) -> InputError | None:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    here, page = f"no such folder in {folder}", f"{constants.ENDPOINT}/{hub_id}"
    if isinstance(error, hub.GatedRepoError):
        return InputError("is gated on the hub", hint=f"accept its terms at {page}, then `hf auth login`")
    if isinstance(error, hub.RepositoryNotFoundError | hub.HFValidationError):
        return InputError(
            f"{here}, and no such model on the hub",
            hint="write the path of a local folder; for a private model `hf auth login`",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return InputError(f"has no revision {revision}", hint=f"see its branches, tags and commits at {page}/tree/main")
    if isinstance(error, hub.HfHubHTTPError) and not isinstance(error, hub.EntryNotFoundError):
        status = error.response.status_code if error.response is not None else "an error"
        return InputError(f"{constants.ENDPOINT} answered {status}", hint="try again; HF_HUB_OFFLINE=1 uses the cache")
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        return InputError(f"has no {config} on the hub", hint=f"see {page}/tree/main")
    if constants.HF_HUB_OFFLINE:
        return UnreachableError(
            f"{here}, not (wholly) in the hub's cache, and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE, or write the path of a local folder",
        )
    if isinstance(error.__cause__, hub.FileMetadataError):
        hint = "HF_ENDPOINT may name what is no hub"
        return InputError("the hub's answer lacks its commit, ETag or length: what arrives is not known", hint=hint)
    network = type(error).__module__.partition(".")[0] in NETWORK
    if network or isinstance(error, hub.LocalEntryNotFoundError | ConnectionError):
        return UnreachableError(
            f"{here}, not (wholly) in the hub's cache, and {constants.ENDPOINT} cannot be reached",
            hint="see the connection and HF_ENDPOINT, or write the path of a local folder",
        )
    if isinstance(error, OSError):
        return InputError(f"cannot be downloaded: {error.strerror or type(error).__name__}")
    return None
