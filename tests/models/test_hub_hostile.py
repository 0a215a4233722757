"""Answers that no hub should give: each is one line that names the repository, in bounded time, bytes and places."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama
from running import make_plan
from small_hub import COMMIT, TOKEN, Hub

from deltamerge.errors import InputError
from deltamerge.files.hashes import check_blobs
from deltamerge.models import hub, hub_client

Handler = BaseHTTPRequestHandler
WEIGHTS = "model.safetensors"
SLOW = ("a byte now and then", "a byte of the head now and then", "hints without end", "nothing", "slowly")
OTHER = "f" * 40


@pytest.fixture
def model(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """org/model."""
    folder = server.repositories["org/model"] = tiny_llama(tmp_path / "hub" / "model", seed=1)
    monkeypatch.setattr(hub_client, "SLOWEST", 1e9)
    monkeypatch.setattr(hub_client, "WAIT_SECONDS", 0)
    return folder


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a whole answer take half a second, in the cases that would take as long as there is time."""

    def less(name: str) -> None:
        if name in SLOW:
            monkeypatch.setattr(hub_client, "ANSWER_SECONDS", 0.5)

    return less


def refused(message: str, folder: Path, reference: str = "org/model", *, weights: bool = False) -> InputError:
    before = {path for path in folder.rglob("*") if "cache" not in path.parts}
    began = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        hub.open_model(reference, folder, weights=weights)
    assert time.monotonic() - began < 10
    assert str(caught.value).startswith(f"{reference}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert TOKEN not in f"{caught.value} {caught.value.hint}"
    assert {path for path in folder.rglob("*") if "cache" not in path.parts} == before
    return caught.value


def say(body: bytes, status: int = 200, **headers: str) -> Callable[[Handler], None]:
    """An answer; `_` in the names of headers is "-", and Content-Length is right unless it is given."""

    def answer(to: Handler) -> None:
        to.send_response(status)
        for key, value in ({"Content_Length": str(len(body)), "Connection": "close"} | headers).items():
            if value:
                to.send_header(key.replace("_", "-"), value)
        to.end_headers()
        if to.command != "HEAD":
            to.wfile.write(body)

    return answer


def stream(head: str, pieces: Callable[[], Iterator[bytes]]) -> Callable[[Handler], None]:
    """An answer whose lines are `head` and whose bytes go on until the client leaves."""

    def answer(to: Handler) -> None:
        to.wfile.write(head.replace("\n", "\r\n").encode())
        for piece in () if to.command == "HEAD" else pieces():
            to.wfile.write(piece)

    return answer


def endless(piece: bytes, pause: float = 0.0) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            time.sleep(pause)
            yield piece

    return pieces


OK, PART = "HTTP/1.1 200 OK\n", "HTTP/1.1 206 Partial Content\n"
RANGE = "Content-Range: bytes 0-99999/3000000000\n"
CHUNK = b"10000\r\n" + bytes(0x10000) + b"\r\n"
HEADER_ANSWERS: dict[str, tuple[Callable[[Handler], None], str]] = {
    "3 GB": (stream(f"{PART}{RANGE}Content-Length: 3000000000\n\n", endless(bytes(65536))), "more than the 100,000"),
    "3 GB in chunks": (stream(f"{PART}{RANGE}Transfer-Encoding: chunked\n\n", endless(CHUNK)), "more than the 100,000"),
    "3 GB without a length": (stream(f"{PART}{RANGE}\n", endless(bytes(65536))), "more than the 100,000"),
    "all of it": (say(bytes(1000)), "does not answer range requests"),
    "all 3 GB": (
        stream(f"{OK}Content-Length: 3000000000\n\n", endless(bytes(65536))),
        "more than the 100,000|range req",
    ),
    "compressed": (
        say(gzip.compress(bytes(10**7)), 206, Content_Encoding="gzip", Content_Range="bytes 0-99999/3000000000"),
        "answers in 'gzip', which was not asked for",
    ),
    "a byte now and then": (stream(f"{PART}{RANGE}\n", endless(b"x", 0.05)), "no whole answer in|at less than"),
    "a byte of the head now and then": (stream(f"{PART}X: ", endless(b"x", 0.05)), "no whole answer in"),
    "hints without end": (stream("", endless(b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.001)), "no whole answer in"),
    "nothing": (stream("", endless(b"", 0.1)), "no whole answer in"),
    "no range": (say(bytes(1000), 206), "the range '', which is none"),
    "a range of words": (say(bytes(1000), 206, Content_Range="bytes all"), "'bytes all', which is none"),
    "a long number": (say(b"", 206, Content_Range="bytes 0-9/" + "9" * 5000), "which is none"),
    "any size": (say(bytes(1000), 206, Content_Range="bytes 0-999/*"), "which is none"),
    "another range": (say(bytes(1000), 206, Content_Range="bytes 9-1008/3000"), "answers bytes 9-1008 of 3000"),
    "less": (say(bytes(1000), 206, Content_Range="bytes 0-999/3000"), "answers bytes 0-999 of 3000"),
    "less than it says": (say(bytes(10), 206, Content_Range="bytes 0-999/1000"), "of 1000 in 10 bytes"),
    "no such range": (say(b"", 416), "answered 416"),
    "redirects": (say(b"", 302, Location=f"/org/model/resolve/{COMMIT}/{WEIGHTS}"), "redirects do not end"),
    "a wait": (say(b"", 429, Retry_After="99999999999"), "answers 429 and asks to wait for 99999999999 seconds"),
    "a wait by limit": (say(b"", 429, ratelimit='"api";r=0;t=999'), "answers 429 and asks to wait for 999 seconds"),
    "an error without end": (stream("HTTP/1.1 418 No\n\n", endless(bytes(65536))), "answered 418"),
    "an error of brackets": (say(b"[" * 60_000, 418), "cannot be read: RecursionError|answered 418"),
    "an error of another form": (say(b"[1]", 418), "cannot be read: AttributeError|answered 418"),
    "another commit": (say(b"", 206, X_Repo_Commit=OTHER), f"answers with commit {OTHER}, not {COMMIT}"),
}


@pytest.mark.parametrize("name", HEADER_ANSWERS)
def test_answers_for_a_header(
    server: Hub, model: Path, tmp_path: Path, hurry: Callable[[str], None], name: str
) -> None:
    hub.open_model("org/model", tmp_path, weights=False)
    hurry(name)
    server.instead[WEIGHTS], message = HEADER_ANSWERS[name]
    error = refused(f"{WEIGHTS}: .*({message})|{message}", tmp_path)
    assert str(error).count(": ") < 6


def listing(**changes: Any) -> bytes:
    said = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}, {"rfilename": WEIGHTS}]}
    return json.dumps(said | changes).encode()


def files(*names: Any) -> bytes:
    return listing(siblings=[{"rfilename": name} for name in ("config.json", WEIGHTS, *names)])


LISTINGS: dict[str, tuple[Callable[[Handler], None], str]] = {
    "no JSON": (say(b"<html>"), "is not valid JSON"),
    "a list": (say(b"[]"), "is not a JSON object"),
    "nothing": (say(b""), "is not valid JSON"),
    "brackets": (say(b'{"siblings":' + b"[" * 100_000), "nested too deeply"),
    "many values": (say(b'{"siblings":[' + b"0," * 4_000_001 + b"0]}"), "more than 4,000,000 values"),
    "a key twice": (say(b'{"sha": "a", "sha": "b"}'), "key 'sha' twice"),
    "no end": (stream(f"{OK}\n", endless(b'{"siblings": [' + b'{"rfilename": "x"},' * 50_000)), "than the 64,000,000"),
    "a great length": (say(b"", Content_Length="99999999999"), "99,999,999,999 bytes, more than"),
    "compressed": (say(gzip.compress(bytes(10**8)), Content_Encoding="gzip"), "answers in 'gzip'"),
    "a byte now and then": (stream(f"{OK}\n", endless(b" ", 0.05)), "no whole answer in|at less than"),
    "redirects": (say(b"", 307, Location="/api/models/org/model"), "redirects do not end"),
    "redirects with bodies": (
        stream("HTTP/1.1 307 T\nLocation: /api/models/org/model\n\n", endless(bytes(65536))), "redirects do not end",
    ),
    "no commit": (say(listing(sha=None)), "commit is 'None', which is none"),
    "a branch for a commit": (say(listing(sha="main")), "commit is 'main', which is none"),
    "a path for a commit": (say(listing(sha="../../../../x")), r"commit is '\.\./"),
    "a short commit": (say(listing(sha=COMMIT[:39])), "which is none"),
    "no files": (say(listing(siblings=None)), "has no list of files"),
    "files of a number": (say(listing(siblings=7)), "has no list of files"),
    "files without names": (say(listing(siblings=[{}])), "a file without a name"),
    "names of numbers": (say(files(7)), "a file without a name: '7'"),
    "too many files": (say(listing(siblings=[{"rfilename": "x"}] * 100_001)), "100,001 files, more than 100,000"),
    "backslashes": (say(files("..\\..\\x.json")), r"named '\.\.\\\\\.\.\\\\x\.json', which is no plain name"),
    "upwards": (say(files("../../x.safetensors")), "which is no plain name"),
    "upwards within": (say(files("a/../../x.json")), "which is no plain name"),
    "absolute": (say(files("/etc/x.json")), "which is no plain name"),
    "a drive": (say(files("C:x.json")), "which is no plain name"),
    "a share": (say(files("\\\\host\\share\\x.json")), "which is no plain name"),
    "a NUL": (say(files("x\0.json")), "which is no plain name"),
    "an escape": (say(files("\x1b[2Jx.json")), "which is no plain name"),
    "a line": (say(files("x\n::add-mask::y.json")), "which is no plain name"),
    "right to left": (say(files("x\u202enosj.json")), "which is no plain name"),
    "half a pair": (say(b'{"sha": "%b", "siblings": [{"rfilename": "\\ud800"}]}' % COMMIT.encode()), "surrogate"),
    "a device": (say(files("aux.json")), "which is no plain name"),
    "a device in a folder": (say(files("x/NUL")), "which is no plain name"),
    "a dot at the end": (say(files("x.json.")), "which is no plain name"),
    "no name": (say(files("")), "which is no plain name"),
    "a long name": (say(files("x" * 5000 + ".json")), "which is no plain name"),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTINGS)
def test_listings(server: Hub, model: Path, tmp_path: Path, hurry: Callable[[str], None], name: str) -> None:
    hurry(name)
    server.instead["/api/models/org/model"], message = LISTINGS[name]
    refused(message, tmp_path)
    assert not server.fetched(".json")


def test_a_listing_of_another_commit(server: Hub, model: Path, tmp_path: Path) -> None:
    server.instead[f"/revision/{OTHER}"] = say(listing())
    refused(f"its commit is {COMMIT}, not {OTHER}, which was asked for", tmp_path, f"org/model@{OTHER}")


def test_names_in_folders_are_left_alone(server: Hub, model: Path, tmp_path: Path) -> None:
    server.instead["/api/models/org/model"] = say(files("onnx/config.json", "old\\config.json", ".gitattributes"))
    assert hub.open_model("org/model", tmp_path, weights=True).revision == COMMIT


def test_more_small_files_than_a_model_has(
    server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.instead["/api/models/org/model"] = say(files(*(f"{i}.txt" for i in range(2000))))
    refused("2,001 small files, more than 1,000", tmp_path, weights=True)


NOT_HASHES = {
    "a path": '"../../../../evil"', "absolute": '"/tmp/evil"', "md5": f'"{"0" * 32}"', "weak": f'W/"{"0" * 32}-gzip"',
    "parts": f'"{"0" * 32}-5"', "upper case": f'"{"A" * 40}"', "long": f'"{"a" * 5000}"', "empty": '""', "a word": "x",
    "41": f'"{"a" * 41}"',
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_HASHES)
@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag"])
def test_etags_that_are_no_hashes(server: Hub, model: Path, tmp_path: Path, name: str, header: str) -> None:
    etag = NOT_HASHES[name].replace("/tmp/evil", str(tmp_path / "evil"))
    server.headers |= {header: etag} | ({"ETag": None} if header != "ETag" else {})
    message = "lacks its commit, ETag or length|no SHA-1 or SHA-256, so that a download could not be compared"
    refused(f"config.json: .*{message}|{message}", tmp_path)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("etag", [f'W/"{hashlib.sha1(b"x").hexdigest()}"', f'"{hashlib.sha256(b"x").hexdigest()}"'])
def test_what_arrives_is_compared_with_a_hash_of_any_form(server: Hub, model: Path, tmp_path: Path, etag: str) -> None:
    server.headers["ETag"] = etag
    checkpoint = hub.open_model("org/model", tmp_path, weights=False)
    with pytest.raises(InputError, match="differs from the hub's file"):
        check_blobs([checkpoint.path / "config.json"], 1)


@pytest.mark.parametrize(
    "commit", ["main", COMMIT[:39], COMMIT.upper(), "../../../../evil", "/tmp/evil", f"{COMMIT}/..", ""]
)
def test_commits_that_are_none(server: Hub, model: Path, tmp_path: Path, commit: str) -> None:
    server.headers["X-Repo-Commit"] = commit.replace("/tmp/evil", str(tmp_path / "evil"))
    refused("answers with commit .*, which is none", tmp_path)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("header", ["ETag", "X-Repo-Commit"])
def test_headers_that_are_missing(server: Hub, model: Path, tmp_path: Path, header: str) -> None:
    server.headers[header] = None
    refused("the hub's answer lacks its commit, ETag or length", tmp_path)


def test_a_commit_that_is_not_the_listings(server: Hub, model: Path, tmp_path: Path) -> None:
    server.headers["X-Repo-Commit"] = OTHER
    refused(f"answers with commit {OTHER}, not {COMMIT}", tmp_path)


def test_files_that_are_not_there_leave_no_trace_of_a_path(server: Hub, model: Path, tmp_path: Path) -> None:
    server.instead["config.json"] = say(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit="../../../../evil")
    refused("answers with commit", tmp_path)
    assert not list(tmp_path.rglob("evil*"))


NAMED = {"ETag": f'"{"0" * 40}"', "X_Repo_Commit": COMMIT}
SAID = f'{OK}ETag: "{"0" * 40}"\nX-Repo-Commit: {COMMIT}\n'
FILES: dict[str, tuple[Callable[[Handler], None], str]] = {
    "more than was said": (
        say(bytes(200_000), **NAMED, X_Linked_Size="2", Content_Length=""),
        "more than the 64,000",
    ),
    "a great size": (say(b"", **NAMED, X_Linked_Size="9" * 15), "more than the 1,000,000,000"),
    "a size of words": (say(b"", **NAMED, X_Linked_Size="big"), "has 'big' bytes"),
    "a wait": (say(b"", 429, **NAMED, Retry_After="86400"), "wait for 86400 seconds"),
    "slowly": (stream(f"{SAID}X-Linked-Size: 100000\n\n", endless(b" ", 0.05)), "no whole answer in|at less than"),
    "compressed": (say(gzip.compress(b"{}"), **NAMED, Content_Encoding="gzip"), "in 'gzip'"),
}


@pytest.mark.parametrize("name", FILES)
def test_answers_for_a_file(server: Hub, model: Path, tmp_path: Path, hurry: Callable[[str], None], name: str) -> None:
    hurry(name)
    server.instead["config.json"], message = FILES[name]
    refused(message, tmp_path)


def test_weights_longer_than_was_said(server: Hub, model: Path, tmp_path: Path) -> None:
    head = f'{OK}ETag: "{"0" * 64}"\nX-Repo-Commit: {COMMIT}\nX-Linked-Size: 100\n\n'
    server.instead[WEIGHTS] = stream(head, endless(bytes(65536)))
    refused("more than the 64,000 bytes it may have", tmp_path, weights=True)


def test_a_cache_without_the_hubs_hashes(server: Hub, model: Path, tmp_path: Path) -> None:
    path = hub.open_model("org/model", tmp_path, weights=True).path / WEIGHTS
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw)
    for reference in ("org/model", f"org/model@{COMMIT}"):
        for weights in (False, True):
            refused(f"{WEIGHTS}: the cache has it without the hub's hash of it", tmp_path, reference, weights=weights)


def test_blobs_that_repositories_share(server: Hub, model: Path, tmp_path: Path) -> None:
    """As huggingface_hub keeps them from 2.4 on: a blob is a link to a file that is named by another hash."""
    checkpoint = hub.open_model("org/model", tmp_path, weights=True)
    path = checkpoint.path / WEIGHTS
    blob, store = path.resolve(), server.cache / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(store)
    again = hub.open_model("org/model", tmp_path, weights=True)
    assert again.tensors == checkpoint.tensors
    check_blobs([path], 1)
    raw = bytearray(store.read_bytes())
    raw[-1] ^= 1
    store.write_bytes(raw)
    with pytest.raises(InputError, match="differs from the hub's file"):
        check_blobs([path], 1)
    blob.unlink()
    blob.symlink_to(model / WEIGHTS)
    refused("is a link that leaves the folder", tmp_path, f"org/model@{COMMIT}")


def test_the_guard_leaves_others_alone(server: Hub, model: Path) -> None:
    from huggingface_hub import HfApi

    hub_client.guard()
    server.instead["/api/models/org/model"] = say(listing(sha="main"))
    assert HfApi().model_info("org/model").sha == "main"


def test_a_users_own_client_stays_and_has_the_bounds(server: Hub, model: Path, tmp_path: Path) -> None:
    """Its factory (of proxies, certificates) makes every client: also after the library has closed one, and after a
    process has set it late."""
    from huggingface_hub import close_session, get_session, set_client_factory
    from huggingface_hub.utils import _http

    before, made = _http._GLOBAL_CLIENT_FACTORY, list[Any]()

    def own() -> Any:
        made.append(_http.default_client_factory())
        return made[-1]

    try:
        for _ in range(2):
            set_client_factory(own)
            hub_client.guard()
            hub_client.guard()
            close_session()
            first = get_session()
            assert first is made[-1]
            assert first.event_hooks["response"].count(hub_client.check) == 1
            server.instead["/api/models/org/model"] = say(listing(sha="main"))
            refused("its commit is 'main', which is none", tmp_path)
        assert get_session() is made[-1]
    finally:
        set_client_factory(before)


def test_data_sets_have_commits(server: Hub, model: Path, tmp_path: Path) -> None:
    from deltamerge.calibrate.rows.hub import commit

    commit.cache_clear()
    server.repositories["datasets/org/data"] = tmp_path / "hub"
    assert commit("org/data") == COMMIT
    commit.cache_clear()
    server.instead["/api/datasets/org/data"] = say(b'{"sha": "../x"}')
    with pytest.raises(InputError, match=r"commit is '\.\./x', which is none"):
        commit("org/data")
    commit.cache_clear()


def test_a_plan_of_a_hostile_repository_is_one_line(server: Hub, model: Path, tmp_path: Path) -> None:
    server.instead["/api/models/org/model"] = say(files("..\\..\\x.json"))
    (tmp_path / "r.yaml").write_text("merge_method: passthrough\nmodels: [{model: org/model}]\n")
    with pytest.raises(InputError, match="org/model: the hub's listing: has a file named") as caught:
        make_plan(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)
