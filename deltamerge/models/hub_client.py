"""Requests to the hub: a repository's listing, bytes by ranges, bounds on every answer, errors as one line and a hint.

The other end may be a mirror, a proxy or an attacker. A hook on huggingface_hub's HTTP client checks every answer to a
request made `within` bounds, before any of it is used. That includes the client's own requests.
"""

from __future__ import annotations

import contextvars
import difflib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from deltamerge import errors
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.files.strict_json import parse_json
from deltamerge.formats.gguf.file import GgufHeader, parse_gguf_header, read_gguf_header, with_factors
from deltamerge.formats.safetensors import PREFIX, Header, header_length, parse_header, read_header
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.views import in_memory

FIRST_BYTES = 100_000
PIECE_BYTES = 1_000_000
LISTING_BYTES = 64_000_000
MAX_FILES = 100_000
TIMEOUT_SECONDS = 30
RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)

ANSWER_SECONDS = 120.0  # for a whole answer with retries, beside the time that its size takes
SLOWEST = 16_000  # bytes a second that an answer must bring
ERROR_BYTES = 64_000  # in the body of a redirect or an error
WAIT_SECONDS = 300  # the longest wait that an answer may ask for
COMMIT = re.compile("[0-9a-f]{40}")
HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # git's SHA-1 of a small file, the SHA-256 of a large one

NETWORK = ("httpx", "httpx2", "requests", "urllib3")  # errors of these libraries mean that no answer came
AGAIN = "push again: files that have arrived are not sent again"

T = TypeVar("T")


def listing(repository: str, revision: str | None, *, below: bool = False) -> tuple[str, list[str]]:
    """Return the commit of "models/org/name" or "datasets/org/name", and the names of its files.

    These are the names at the top level; with `below` also the paths of files in folders.

    InputError: not a listing, too long, or an invalid file name. Other errors are the client's.
    """
    raw = within(Bounds(LISTING_BYTES), partial(_ask, repository, revision))
    with errors.context("the hub's listing"):
        return read_listing(raw, revision, below=below)


def commit_of(repository: str, revision: str | None) -> str:
    """Return the commit of a repository."""
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
    """Return the commit and the plain names (`below`: and paths) of files in an answer. InputError: no listing."""
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
    """Return whether a file lies at the top level. InputError: a name that no system should store."""
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
    """Return the header of the weight file at `path`: from the file if it exists, else by range requests of `name`."""
    if path.exists():
        return read_header(path)
    with errors.context(path.name):
        return header_by_ranges(partial(_range, hub_id, commit, name or path.name), path)


def header_by_ranges(fetch: Callable[[int, int], tuple[bytes, int]], path: Path) -> Header:
    """Return a header; `fetch` gets its bytes [first, last], and the size of the whole file."""
    text, size = fetch(0, FIRST_BYTES - 1)
    end = PREFIX + header_length(text[:PREFIX], size)
    if end > len(text):
        more, again = fetch(len(text), end - 1)
        if again != size:
            raise InputError(f"the hub says that it has {size:,} bytes, and then {again:,}")
        text += more
    return parse_header(text[PREFIX:end], path, size)


def range_gguf(hub_id: str, commit: str, path: Path, name: str) -> GgufHeader:
    """Return the header of the GGUF file at `path`: from the file if it exists, else by range requests of `name`."""
    if path.exists():
        return read_gguf_header(path)
    fetch = partial(_range, hub_id, commit, name)
    with errors.context(path.name):
        return with_factors(gguf_by_ranges(fetch, path), lambda begin, count: fetch(begin, begin + count - 1)[0])


def gguf_by_ranges(fetch: Callable[[int, int], tuple[bytes, int]], path: Path) -> GgufHeader:
    """Return a GGUF header; `fetch` gets its bytes [first, last], and the size of the whole file.

    The header does not say its own length and holds the vocabulary: it is fetched a piece at a time.
    """
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
    """Return a small tensor of bytes that lies in the file `name`, with its bytes, which are fetched."""
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
    """Return the bytes of an answer with the Content-Range `said`, and the file's size. InputError: other bytes than
    requested."""
    found = RANGE.fullmatch(said)
    if found is None:
        raise InputError(f"the hub answers with the range {said[:80]!r}, which is none")
    begin, end, size = map(int, found.groups())
    if (begin, end) != (first, min(last, size - 1)) or len(raw) != end - begin + 1:
        raise InputError(f"the hub answers bytes {begin}-{end} of {size} in {len(raw)} bytes, asked for {first}-{last}")
    return raw, size


@dataclass
class Bounds:
    """The bounds of the answers to one question.

    most     bytes; None: as many as the first answer states
    commit   that the answers must name
    size     of the file, as an answer stated it
    asked    when the question was asked
    over     nobody waits any more: further answers are refused
    """

    most: int | None = None
    commit: str | None = None
    size: int | None = None
    over: bool = False
    asked: float = 0.0

    def limit(self) -> int | None:
        """Return the most bytes of a body. The client also asks for small things, such as where a file is."""
        sized = None if self.size is None else max(self.size, ERROR_BYTES)
        return min((n for n in (self.most, sized) if n is not None), default=None)

    def seconds(self) -> float:
        """Return how long the whole answer may take."""
        return ANSWER_SECONDS + (self.limit() or 0) / SLOWEST


_BOUNDS: contextvars.ContextVar[Bounds | None] = contextvars.ContextVar("bounds", default=None)
_LOCK = threading.Lock()


def within(bounds: Bounds, call: Callable[[], T], *, whole: bool = True) -> T:
    """Return the result of `call`, whose requests are bounded.

    With `whole` its total time is bounded too; a thread that is late is left behind.

    InputError: an answer exceeds the bounds, or the client cannot read it.
    """
    guard()
    bounds.asked = time.monotonic()
    if not whole:
        token = _BOUNDS.set(bounds)
        try:
            return _understood(call)
        finally:
            _BOUNDS.reset(token)
    results: list[T] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        _BOUNDS.set(bounds)
        try:
            results.append(_understood(call))
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
    try:
        while not done.wait(max(0.0, min(1.0, bounds.asked + bounds.seconds() - time.monotonic()))):
            if time.monotonic() > bounds.asked + bounds.seconds():
                raise InputError(f"no whole answer in {bounds.seconds():.0f} seconds", hint="try again later")
    finally:
        bounds.over = not done.is_set()
    if failures:
        raise failures[0]
    return results[0]


def _understood(call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        module = type(error).__module__.partition(".")[0]
        if type(error).__name__ == "TooManyRedirects":
            raise InputError("the hub's redirects do not end") from error
        if isinstance(error, DeltamergeError | OSError) or module in ("huggingface_hub", *NETWORK):
            raise
        said = " ".join(str(error).split())[:200]
        raise InputError(f"the hub's answer cannot be read: {type(error).__name__}: {said}") from error


def guard() -> None:
    """Install the bounds on huggingface_hub's HTTP clients.

    The first call closes the present client, as every `set_client_factory` does; the next one has the bounds.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http, get_session  # type: ignore[attr-defined]  # public, without __all__

    with _LOCK:
        # the only way to keep a user's own factory (proxies, certificates): the library has no public getter
        factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
        if factory is None:
            _hook(get_session())
        elif not isinstance(factory, _Factory):
            set_client_factory(_Factory(factory))


@dataclass(frozen=True)
class _Factory:
    """A factory of clients with bounds."""

    factory: Callable[[], Any]

    def __call__(self) -> Any:
        return _hook(self.factory())


def _hook(client: Any) -> Any:
    hooks = client.event_hooks
    if check not in hooks["response"]:
        client.event_hooks = {"request": [*hooks["request"], _prepare], "response": [*hooks["response"], check]}
    return client


def _prepare(request: Any) -> None:
    bounds = _BOUNDS.get()
    if bounds is None:
        return
    if bounds.over:
        raise InputError("nobody waits for the answer any more")
    request.headers["Accept-Encoding"] = "identity"  # uncompressed, so that the bytes counted are the bytes stored


def check(response: Any) -> None:
    """Check the head of an answer, and bound its body. InputError: it is not understood, or states too much."""
    bounds = _BOUNDS.get()
    if bounds is None:
        return
    headers, status, method = response.headers, response.status_code, response.request.method
    _check_wait(status, headers)
    commit = headers.get("X-Repo-Commit")
    if commit is not None and not COMMIT.fullmatch(commit):
        raise InputError(f"the hub answers with commit {commit[:80]!r}, which is none")
    if commit is not None and bounds.commit not in (None, commit):
        raise InputError(f"the hub answers with commit {commit}, not {bounds.commit}", hint="try again")
    plain = status < 300
    if headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
        if plain and method != "HEAD":
            raise InputError(f"the hub answers in {headers['Content-Encoding'][:40]!r}, which was not asked for")
        del headers["Content-Encoding"]
    if method == "HEAD" and status < 400 and not _is_followed(response):
        _check_file(bounds, headers, plain)
    limit = bounds.limit() if plain else ERROR_BYTES
    length = headers.get("Content-Length")
    if method != "HEAD" and plain and limit is not None and length is not None and length.isdecimal():
        _check_length(int(length[:20]), limit)
    body = _class_of(type(response).__module__.partition(".")[0])
    response.stream = body(response.stream, bounds, limit, plain)


def _check_file(bounds: Bounds, headers: Any, plain: bool) -> None:
    """Check the file hash, which becomes its name in the cache, and the file's size."""
    etag = headers.get("X-Linked-ETag") or headers.get("ETag")
    if etag is not None:
        name = etag.lstrip("W/").strip('"')
        if not HASH.fullmatch(name):
            what = "no SHA-1 or SHA-256, so that a download could not be compared with it"
            raise InputError(
                f"the hub's ETag is {name[:80]!r}: {what}", hint="HF_ENDPOINT may name a mirror: ask the hub"
            )
    size = headers.get("X-Linked-Size") or (headers.get("Content-Length") if plain else None)
    if size is None:
        return
    if not size.isdecimal() or len(size) > 18:
        raise InputError(f"the hub says that the file has {size[:40]!r} bytes")
    bounds.size = int(size)
    if bounds.most is not None:
        _check_length(bounds.size, bounds.most)


def _check_length(size: int, limit: int) -> None:
    if size > limit:
        raise InputError(f"the hub's answer has {size:,} bytes, more than the {limit:,} it may have")


def _is_followed(response: Any) -> bool:
    """Return whether the client follows a redirect, and so takes nothing from this answer."""
    from huggingface_hub.utils import _http

    location = response.headers.get("Location")
    if not 300 <= response.status_code < 400 or location is None:
        return False
    if not urlsplit(location).netloc:
        return True
    known = getattr(_http, "_is_same_or_hub_host", None)
    url = str(response.request.url)
    return known is not None and bool(known(url, urljoin(url, location)))


def _check_wait(status: int, headers: Any) -> None:
    """Refuse an answer that asks for too long a wait, because the client would sleep that long."""
    if status not in (408, 429) and status < 500:
        return
    asked = [headers.get("Retry-After", "").strip(), *re.findall(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))]
    for text in asked:
        if text.isdecimal() and (len(text) > 6 or int(text) > WAIT_SECONDS):
            raise InputError(
                f"the hub answers {status} and asks to wait for {text[:20]} seconds", hint="try again later"
            )


@cache
def _class_of(module: str) -> Any:
    """Return a class of bounded bodies for the HTTP library `module`; huggingface_hub has used two."""

    class Body(sys.modules[module].SyncByteStream):  # type: ignore[misc]  # chosen at run time
        def __init__(self, inner: Any, bounds: Bounds, limit: int | None, refuses: bool) -> None:
            self.inner, self.bounds, self.limit, self.refuses = inner, bounds, limit, refuses

        def __iter__(self) -> Iterator[bytes]:
            return _bounded(self.inner, self.bounds, self.limit, self.refuses)

        def close(self) -> None:
            self.inner.close()

        @property
        def elapsed(self) -> Any:
            return getattr(self.inner, "elapsed", None)

    return Body


def _bounded(inner: Any, bounds: Bounds, limit: int | None, refuses: bool) -> Iterator[bytes]:
    """Yield the pieces of a body up to its limit. Beyond it: an error, or, in the body of an error, the end."""
    received, started = 0, time.monotonic()
    for piece in inner:
        received += len(piece)
        if bounds.over:
            raise InputError("nobody waits for the answer any more")
        if limit is not None and received > limit:
            if refuses:
                raise InputError(f"the hub's answer has more than the {limit:,} bytes it may have")
            return
        if time.monotonic() - started > ANSWER_SECONDS + received / SLOWEST:
            raise InputError(f"the hub's answer comes at less than {SLOWEST:,} bytes a second", hint="try again later")
        yield piece


class UnreachableError(InputError):
    """The hub cannot be reached, and its cache lacks a file."""


@contextmanager
def upload_errors() -> Iterator[None]:
    """Turn an error of huggingface_hub during an upload into one line and a hint, which never hold the token."""
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
def hub_errors(hub_id: str, revision: str | None, folder: Path | None, config: str = "config.json") -> Iterator[None]:
    """Turn an error of huggingface_hub into one line and a hint.

    `folder` is where a local model was looked for; None: nowhere.
    """
    try:
        yield
    except DeltamergeError:
        raise
    except Exception as error:
        explained = _explain(error, hub_id, revision, folder, config)
        if explained is None:
            raise
        raise explained from error


def _explain(
    error: Exception, hub_id: str, revision: str | None, folder: Path | None, config: str
) -> InputError | None:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    page = f"{constants.ENDPOINT}/{hub_id}"
    here = "" if folder is None else f"no such folder in {folder}, "
    meant = None if folder is None else near(hub_id, folder)
    path = "" if folder is None else ", or write the path of a local folder"
    if isinstance(error, hub.GatedRepoError):
        return InputError("is gated on the hub", hint=f"accept its terms at {page}, then `hf auth login`")
    if isinstance(error, hub.RepositoryNotFoundError | hub.HFValidationError):
        private = "for a private model `hf auth login`"
        if folder is None:
            return InputError("no such model on the hub", hint=f"see its name at {constants.ENDPOINT}; {private}")
        hint = meant or f"write the path of a local folder; {private}"
        return InputError(f"{here}and no such model on the hub", hint=hint)
    if isinstance(error, hub.RevisionNotFoundError):
        return InputError(f"has no revision {revision}", hint=f"see its branches, tags and commits at {page}/tree/main")
    if isinstance(error, hub.HfHubHTTPError) and not isinstance(error, hub.EntryNotFoundError):
        status = error.response.status_code if error.response is not None else "an error"
        return InputError(f"{constants.ENDPOINT} answered {status}", hint="try again; HF_HUB_OFFLINE=1 uses the cache")
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        return InputError(f"has no {config} on the hub", hint=f"see {page}/tree/main")
    if constants.HF_HUB_OFFLINE:
        return UnreachableError(
            f"{here}not (wholly) in the hub's cache, and HF_HUB_OFFLINE is set",
            hint=meant or f"unset HF_HUB_OFFLINE{path}",
        )
    if isinstance(error.__cause__, hub.FileMetadataError):
        hint = "HF_ENDPOINT may name a server that is no hub"
        return InputError("the hub's answer lacks its commit, ETag or length, to check a download", hint=hint)
    network = type(error).__module__.partition(".")[0] in NETWORK
    if network or isinstance(error, hub.LocalEntryNotFoundError | ConnectionError):
        return UnreachableError(
            f"{here}not (wholly) in the hub's cache, and {constants.ENDPOINT} cannot be reached",
            hint=meant or f"see the connection and HF_ENDPOINT{path}",
        )
    if isinstance(error, OSError):
        return InputError(f"cannot be downloaded: {error.strerror or type(error).__name__}")
    return None


def near(reference: str, folder: Path) -> str | None:
    """Return a hint that names the folder that was probably meant, or None."""
    parent, name = os.path.split(os.path.expanduser(reference).rstrip("/"))
    try:
        names = [entry.name for entry in os.scandir(folder / parent) if entry.is_dir()]
    except OSError:
        return None
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f"did you mean {os.path.join(os.path.split(reference.rstrip('/'))[0], found[0])}?" if found else None
