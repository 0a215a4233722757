"""The hub's answers about a repository: commit and files from a listing, headers of weight files by range requests."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.strict_json import parse_json
from deltamerge.formats.gguf.header import GgufHeader, parse_gguf_header, read_gguf_header, with_factors
from deltamerge.formats.safetensors import PREFIX, Header, header_length, parse_header, read_header
from deltamerge.models.hub_guard import COMMIT, Bounds, within
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.views import in_memory

FIRST_BYTES = 100_000
PIECE_BYTES = 1_000_000
LISTING_BYTES = 64_000_000
MAX_FILES = 100_000
TIMEOUT_SECONDS = 30
RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def listing(repository: str, revision: str | None, *, below: bool = False) -> tuple[str, list[str]]:
    """The commit of "models/org/name" or "datasets/org/name", and the names of the files at its top level; `below`:
    and the paths of those in its folders.

    InputError: not a listing, too long, or an invalid file name. Other errors are the client's.
    """
    raw = within(Bounds(LISTING_BYTES), partial(_ask, repository, revision))
    with errors.context("the hub's listing"):
        return read_listing(raw, revision, below=below)


def commit_of(repository: str, revision: str | None) -> str:
    """The commit of a repository."""
    raw = within(Bounds(LISTING_BYTES), partial(_ask, repository, revision))
    with errors.context("the hub's listing"):
        return _commit(parse_json(raw), revision)


def _ask(repository: str, revision: str | None) -> bytes:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, without __all__

    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    raw, _ = _get(f"{constants.ENDPOINT}/api/{repository}{at}", build_hf_headers())
    return raw


def _get(url: str, headers: dict[str, str]) -> tuple[bytes, Any]:
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, without __all__
        get_session,
        hf_raise_for_status,
    )

    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code not in (200, 206):
            raise InputError(f"the hub answers {response.status_code}")
        if "Range" in headers and response.status_code != 206:
            raise InputError("the server does not answer range requests", hint="download the model first")
        return response.read(), response.headers


def read_listing(raw: bytes, revision: str | None, *, below: bool = False) -> tuple[str, list[str]]:
    """The commit, and the plain names among the files (`below`: and paths), of the answer `raw`. InputError: it is no
    listing."""
    answer = parse_json(raw)
    commit, files = _commit(answer, revision), answer.get("siblings")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise InputError("has no list of files")
    if len(files) > MAX_FILES:
        raise InputError(f"has {len(files):,} files, more than {MAX_FILES:,}")
    return commit, [name for file in files if _is_at_top(name := file.get("rfilename")) or below]


def _commit(answer: dict[str, Any], revision: str | None) -> str:
    commit = answer.get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise InputError(f"its commit is {str(commit)[:80]!r}, which is none")
    if revision is not None and COMMIT.fullmatch(revision) and commit != revision:
        raise InputError(f"its commit is {commit}, not {revision}, which was asked for")
    return commit


def _is_at_top(name: Any) -> bool:
    """Whether a file lies at the top level. InputError: a name that no system should store."""
    if not isinstance(name, str):
        raise InputError(f"has a file without a name: {str(name)[:80]!r}")
    parts = re.split(r"[/\\]", name)
    faults = (
        not name.isprintable() or len(name) > 1000,
        any(part in ("", ".", "..") or part.endswith((" ", ".")) for part in parts),
        any(":" in part or DEVICES.fullmatch(part) for part in parts),
    )
    if any(faults):
        raise InputError(f"has a file named {name[:80]!r}, which is no plain name", hint="ask its owner to rename it")
    return len(parts) == 1


def range_header(hub_id: str, commit: str, path: Path, name: str | None = None) -> Header:
    """The header of the weight file at `path`: from the file if it exists, else by range requests of `name`."""
    if path.exists():
        return read_header(path)
    with errors.context(path.name):
        return header_by_ranges(partial(_range, hub_id, commit, name or path.name), path)


def header_by_ranges(fetch: Callable[[int, int], tuple[bytes, int]], path: Path) -> Header:
    """A header of which `fetch` gets bytes [first, last], and the size of the whole file."""
    text, size = fetch(0, FIRST_BYTES - 1)
    end = PREFIX + header_length(text[:PREFIX], size)
    if end > len(text):
        more, again = fetch(len(text), end - 1)
        if again != size:
            raise InputError(f"the hub says that it has {size:,} bytes, and then {again:,}")
        text += more
    return parse_header(text[PREFIX:end], path, size)


def range_gguf(hub_id: str, commit: str, path: Path, name: str) -> GgufHeader:
    """The header of the GGUF file at `path`: from the file if it exists, else by range requests of `name`."""
    if path.exists():
        return read_gguf_header(path)
    fetch = partial(_range, hub_id, commit, name)
    with errors.context(path.name):
        return with_factors(gguf_by_ranges(fetch, path), lambda begin, count: fetch(begin, begin + count - 1)[0])


def gguf_by_ranges(fetch: Callable[[int, int], tuple[bytes, int]], path: Path) -> GgufHeader:
    """A GGUF header of which `fetch` gets bytes [first, last], and the size of the whole file. It does not say its own
    length, and has the whole vocabulary in it: it is fetched a piece at a time."""
    text, size = fetch(0, FIRST_BYTES - 1)
    end = len(text)

    def read(count: int) -> bytes:
        nonlocal text, end
        if len(text) < count and end < size:
            more, again = fetch(end, end + max(count - len(text), PIECE_BYTES) - 1)
            if again != size:
                raise InputError(f"the hub says that it has {size:,} bytes, and then {again:,}")
            text, end = text + more, end + len(more)
        taken, text = text[:count], text[count:]
        return taken

    return parse_gguf_header(read, path, size)


def range_bytes(hub_id: str, commit: str, name: str, info: TensorInfo) -> TensorInfo:
    """A small tensor of bytes that lies in the file `name`, with its bytes, which are fetched."""
    raw, _ = _range(hub_id, commit, name, info.begin, info.begin + info.nbytes - 1)
    return replace(info, tensor=in_memory(info.name, info.dtype, info.shape, memoryview(raw), info.path).tensor)


def _range(hub_id: str, commit: str, name: str, first: int, last: int) -> tuple[bytes, int]:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, without __all__

    url = hf_hub_url(hub_id, name, revision=commit)
    headers = {**build_hf_headers(), "Range": f"bytes={first}-{last}"}
    raw, answered = within(Bounds(last - first + 1, commit), partial(_get, url, headers))
    return check_range(raw, answered.get("Content-Range", ""), first, last)


def check_range(raw: bytes, said: str, first: int, last: int) -> tuple[bytes, int]:
    """The bytes of an answer with the Content-Range `said`, and the file's size. InputError: other bytes than
    requested."""
    found = RANGE.fullmatch(said)
    if found is None:
        raise InputError(f"the hub answers with the range {said[:80]!r}, which is none")
    begin, end, size = map(int, found.groups())
    if (begin, end) != (first, min(last, size - 1)) or len(raw) != end - begin + 1:
        raise InputError(f"the hub answers bytes {begin}-{end} of {size} in {len(raw)} bytes, asked for {first}-{last}")
    return raw, size
