"""`make torture`'s kills at every call that changes a file: a few of each command here."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from kill_scenarios import DELTA, RUN, SCENARIOS, Scenario
from kills import Kills, Server, Unable, grouped

HERE = (
    "run",
    "resume",
    "force",
    "part 1",
    "finish",
    "chain",
    "delta",
    "extract",
    "apply",
    "apply --force",
    "init",
)
FEW = 2  # kills of each


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kills]:
    folder = tmp_path_factory.mktemp("kills")
    try:
        server = Server(folder)
    except Unable as reason:
        pytest.skip(str(reason))
    with server:
        kills = Kills(server, folder / "root")
        kills.prepare()
        yield kills


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(s, id=s.name, marks=() if s.name in HERE else pytest.mark.slow) for s in SCENARIOS],
)
def test_killed_at_any_call_nothing_is_lost(kills: Kills, scenario: Scenario) -> None:
    kills.findings.clear()
    kills.torture(scenario, some=FEW, draw=random.Random(scenario.name))
    assert not grouped(kills.findings)


KINDS = {
    "open": "open", "openat": "open", "creat": "open", "write": "write", "pwrite": "write", "writev": "write",
    "pwritev": "write", "pwritev2": "write", "sendfile": "copy", "copy_file_range": "copy", "fsync": "sync",
    "fdatasync": "sync", "truncate": "truncate", "ftruncate": "truncate", "fallocate": "reserve",
    "posix_fallocate": "reserve", "rename": "rename", "renameat": "rename", "renameat2": "rename", "unlink": "unlink",
    "unlinkat": "unlink", "rmdir": "unlink", "mkdir": "mkdir", "mkdirat": "mkdir", "link": "link", "linkat": "link",
    "symlink": "link", "symlinkat": "link", "chmod": "chmod", "fchmod": "chmod", "fchmodat": "chmod",
}  # fmt: skip


def kind(call: str) -> str:
    return KINDS[call.removesuffix("64")]


@pytest.mark.slow
@pytest.mark.parametrize("command", [RUN, DELTA, "run shards.yaml -q --workers 1 --part 1/2"])
def test_no_call_escapes_the_kills(tmp_path: Path, command: str) -> None:
    """What strace sees below the folder the shim has counted."""
    if not (strace := shutil.which("strace")):
        pytest.skip("no strace")
    log = tmp_path / "strace"
    traced = ",".join(f"?{call}" for call in (*KINDS, "pwrite64", "truncate64", "ftruncate64", "sendfile64"))
    with Server(tmp_path, strace, "-f", "-y", "-s", "0", "--seccomp-bpf", "-o", str(log), "-e", traced) as server:
        kills = Kills(server, tmp_path / "root")
        kills.prepare()
        kills.reset()
        begun = log.stat().st_size
        ended = server.run(kills.root, command)
        assert ended.code == 0, ended.said
    seen: Counter[str] = Counter()
    for line in log.read_text()[begun:].splitlines():
        called = re.match(r"\d+ +(\w+)\(", line)
        if called is None or f"{kills.root}/" not in line:
            continue
        if kind(called[1]) != "open" or re.search(r"O_CREAT|O_TRUNC", line):
            seen[kind(called[1])] += 1
    assert seen == Counter(kind(call.split()[0]) for call in ended.calls)
