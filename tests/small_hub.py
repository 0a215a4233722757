"""A small hub on 127.0.0.1 for the real huggingface_hub client: reads by revision and range, uploads by LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecretsecretsecret"


@dataclass
class Hub:
    """Repositories as folders; every request is kept as (method, path, range, authorization)."""

    endpoint: str = ""
    cache: Path = Path()
    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)  # what was uploaded, by its sha256
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    status: int | None = None
    broken: bool = False  # large files do not arrive
    instead: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)  # by a path's end
    headers: dict[str, str | None] = field(default_factory=dict)  # of files, for what they should be

    def fetched(self, suffix: str) -> list[tuple[str, str | None]]:
        return [(method, span) for method, path, span, _ in self.requests if path.endswith(suffix)]


def handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            span, token = self.headers.get("Range"), self.headers.get("Authorization")
            state.requests.append((self.command, path, span, token))
            if state.status is not None:
                return self.answer(b"", state.status)
            if answer := next((answer for end, answer in state.instead.items() if path.endswith(end)), None):
                self.close_connection = True
                with suppress(OSError):  # whoever asked has gone
                    return answer(self)
                return None
            found = re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?", path)
            if found:
                name = f"datasets/{found[2]}" if found[1] == "datasets" else found[2]
                return self.describe(name, found[3], found[4] or "main", found[5] or "")
            found = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
            if found:
                return self.resolve(found[1], found[2], found[3])
            return self.answer(b"", 404)

        def known(self, repository: str, revision: str) -> Path | None:
            folder = state.repositories.get(repository)
            if folder is None:
                self.answer(b"", 401, "RepoNotFound")
            elif revision not in ("main", "v1", COMMIT):
                self.answer(b"", 404, "RevisionNotFound")
                return None
            return folder

        def describe(self, repository: str, what: str | None, revision: str, below: str) -> None:
            if (folder := self.known(repository, revision)) is None:
                return None
            if not (folder / below).is_dir():
                return self.answer(b"", 404, "EntryNotFound")
            files = [p for p in sorted((folder / below).rglob("*")) if p.is_file()]
            names = [str(p.relative_to(folder)) for p in files]
            if what == "tree":
                entries = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
                    for name, path in zip(names, files, strict=True)
                ]
                return self.answer(json.dumps(entries).encode(), 200)
            siblings = [{"rfilename": name} for name in names]
            model = {
                "id": repository.removeprefix("datasets/"),
                "sha": COMMIT,
                "siblings": siblings,
                "private": repository in state.private,
                "tags": [],
                "downloads": 0,
            }
            return self.answer(json.dumps(model).encode(), 200)

        def resolve(self, repository: str, revision: str, name: str) -> None:
            if (folder := self.known(repository, revision)) is None:
                return None
            if repository in state.gated:
                return self.answer(b"", 403, "GatedRepo")
            if not (folder / name).is_file():
                return self.answer(b"", 404, "EntryNotFound")
            data = (folder / name).read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(folder / name)}"', "Accept-Ranges": "bytes"}
            headers = {k: v for k, v in {**headers, **state.headers}.items() if v is not None}
            if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
                first, last = int(found[1]), min(int(found[2]), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                return self.answer(data[first : last + 1], 206, **headers)
            return self.answer(data, 200, **headers)

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            text = self.body()
            state.requests.append((self.command, path, None, self.headers.get("Authorization")))
            if state.status is not None:
                return self.answer(b"", state.status)
            if path.endswith("/commit/main"):
                return self.commit(path.split("/", 3)[3].removesuffix("/commit/main"), text)
            if found := re.fullmatch(r"/api/datasets/(.+?)/paths-info/([^/]+)", path):
                return self.paths_info(f"datasets/{found[1]}", found[2], parse_qs(text.decode()).get("paths", []))
            asked = json.loads(text)
            if path == "/api/repos/create":
                name = f"{asked['organization']}/{asked['name']}"
                known = name in state.repositories
                folder = state.repositories.setdefault(name, state.cache.parent / "pushed" / name)
                folder.mkdir(parents=True, exist_ok=True)
                if (asked.get("visibility") == "private" or asked.get("private")) and not known:
                    state.private.add(name)
                return self.say({"url": f"{state.endpoint}/{name}"}, 409 if known else 200)
            if path.endswith("/preupload/main"):
                modes = {True: "lfs", False: "regular"}
                files = [
                    {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for f in asked["files"]
                ]
                return self.say({"files": files})
            if path.endswith("/objects/batch"):
                objects = [
                    o
                    if o["oid"] in state.large
                    else {**o, "actions": {"upload": {"href": f"{state.endpoint}/{o['oid']}"}}}
                    for o in asked["objects"]
                ]
                return self.say({"transfer": "basic", "objects": objects})
            return self.say({})

        def paths_info(self, repository: str, revision: str, names: list[str]) -> None:
            if (folder := self.known(repository, revision)) is None:
                return None
            files = {name: folder / name for name in names if (folder / name).is_file()}
            return self.say(
                [{"type": "file", "path": n, "size": p.stat().st_size, "oid": etag(p)} for n, p in files.items()]
            )

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def do_PUT(self) -> None:
            state.requests.append((self.command, self.path, None, self.headers.get("Authorization")))
            data = self.body()
            if state.status is not None or state.broken:
                return self.answer(b"", state.status or 400)
            state.large[hashlib.sha256(data).hexdigest()] = data
            return self.answer(b"", 200)

        def commit(self, repository: str, text: bytes) -> None:
            for item in map(json.loads, text.splitlines()):
                value = item["value"]
                if item["key"] == "file":
                    data = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    data = state.large[value["oid"]]
                else:
                    continue
                (state.repositories[repository] / value["path"]).write_bytes(data)
            url = f"{state.endpoint}/{repository}/commit/{COMMIT}"
            self.say({"success": True, "commitOid": COMMIT, "commitUrl": url})

        def say(self, value: Any, status: int = 200) -> None:
            self.answer(json.dumps(value).encode(), status, **{"Content-Type": "application/json"})

        def answer(self, data: bytes, status: int, code: str | None = None, **headers: str) -> None:
            self.send_response(status)
            for key, value in (headers | ({"X-Error-Code": code} if code else {})).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


def etag(path: Path) -> str:
    """As the hub has it: the SHA-256 of a large file, git's hash of a small one."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def serve(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that huggingface_hub asks until the end of the block."""
    from huggingface_hub import constants

    state = Hub(cache=cache)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    httpd.daemon_threads = True
    httpd.block_on_close = False
    state.endpoint = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", state.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(state.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers are the hub's own
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield state
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
