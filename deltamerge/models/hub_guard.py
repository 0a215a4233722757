"""Bounds on the hub's answers, also to huggingface_hub's own requests: bytes, seconds, hashes, waits.

The other end need not be the hub: it may be a mirror, a proxy or a stranger. A hook on huggingface_hub's HTTP client
checks every answer to a request made `within` bounds before any of it is read or believed.
"""

from __future__ import annotations

import contextvars
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from deltamerge.errors import DeltamergeError, InputError

ANSWER_SECONDS = 120.0  # for a whole answer with retries, beside the time that its size takes
SLOWEST = 16_000  # bytes a second that an answer must bring
ERROR_BYTES = 64_000  # in the body of a redirect or an error
WAIT_SECONDS = 300  # the longest wait that an answer may ask for
COMMIT = re.compile("[0-9a-f]{40}")
HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # git's SHA-1 of a small file, the SHA-256 of a large one

NETWORK = ("httpx", "httpx2", "requests", "urllib3")  # errors of these libraries mean that no answer came

T = TypeVar("T")


@dataclass
class Bounds:
    """The bounds of the answers to one question.

    most     bytes; None: as many as the first answer states
    commit   that the answers must name
    size     of the file, as an answer stated it
    asked    when the question was asked
    over     nobody waits any more: what still arrives is refused
    """

    most: int | None = None
    commit: str | None = None
    size: int | None = None
    over: bool = False
    asked: float = 0.0

    def limit(self) -> int | None:
        """The most bytes of a body. Beside a file the client may ask for small things, such as where the file is."""
        sized = None if self.size is None else max(self.size, ERROR_BYTES)
        return min((n for n in (self.most, sized) if n is not None), default=None)

    def seconds(self) -> float:
        """How long the whole answer may take."""
        return ANSWER_SECONDS + (self.limit() or 0) / SLOWEST


_BOUNDS: contextvars.ContextVar[Bounds | None] = contextvars.ContextVar("bounds", default=None)
_LOCK = threading.Lock()


def within(bounds: Bounds, call: Callable[[], T], *, whole: bool = True) -> T:
    """The result of `call`, whose requests are bounded. With `whole` its total time is bounded too; a thread that is
    late is left behind.

    InputError: an answer beyond the bounds, or one that the client cannot read.
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
    """Install the bounds on huggingface_hub's HTTP client, the present one and later ones."""
    from huggingface_hub.utils import _http, get_session  # type: ignore[attr-defined]  # public, without __all__

    with _LOCK:
        factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
        if factory is not None and not isinstance(factory, _Guarded):
            _http._GLOBAL_CLIENT_FACTORY = _Guarded(factory)
        _hook(get_session())


@dataclass(frozen=True)
class _Guarded:
    """A factory of guarded clients; huggingface_hub's set_client_factory would close a client that others
    may be using."""

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
    """InputError: the head of an answer is not understood, or states too much. Otherwise bound the answer's body."""
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
    response.stream = _stream_class(response)(response.stream, bounds, limit, plain)


def _check_file(bounds: Bounds, headers: Any, plain: bool) -> None:
    """Check the file hash, which becomes its name in the cache, and the file's size."""
    etag = headers.get("X-Linked-ETag") or headers.get("ETag")
    if etag is not None:
        name = etag.lstrip("W/").strip('"')
        if not HASH.fullmatch(name):
            what = "no SHA-1 or SHA-256, so that what arrives could not be compared with it"
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
    """Whether the client follows a redirect, and so takes nothing from this answer."""
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
    """Refuse an answer that asks for too long a wait: the client sleeps as long as it is told."""
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
    """A class of bounded bodies for the HTTP library `module`; huggingface_hub has used two."""

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


def _stream_class(response: Any) -> Any:
    return _class_of(type(response).__module__.partition(".")[0])


def _bounded(inner: Any, bounds: Bounds, limit: int | None, refuses: bool) -> Iterator[bytes]:
    """The pieces of a body up to its limit. Beyond it: an error, or, in the body of an error, the end."""
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
