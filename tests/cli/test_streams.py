"""The command line where a shell, a disk or a folder is not as it should be: an exit code, a line, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from calls import call
from conftest import make_checkpoint

from deltamerge.cli import commands, streams

RECIPE = "base_model: ./base\nmodels: [{model: ./a}]\n"
RUN = f"{sys.executable} -m deltamerge"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    weights = {f"layers.{i}.{'w' * 60}": torch.ones(2, 2) for i in range(600)}
    make_checkpoint(folder / "base", weights)
    make_checkpoint(folder / "a", {name: tensor + 1 for name, tensor in weights.items()})
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "bad.yaml").write_text("a: 1\n")
    os.mkdir(os.fsencode(folder) + b"/n\xff")
    return folder


def shell(folder: Path, script: str, **more: str) -> tuple[int, str]:
    """Exit code and all that is printed of a bash script, in which `$D` is deltamerge."""
    env = {**os.environ, "D": RUN, **more}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{script}"], cwd=folder, env=env, stdout=-1, stderr=-2, timeout=60, check=False
    )
    said = done.stdout.decode(errors="replace")
    assert "Traceback" not in said, said
    assert "Exception ignored" not in said, said
    assert "bug in deltamerge" not in said, said
    return done.returncode, said


# script, exit code, part of what is said
CASES = {
    "closed stderr": ("$D check r.yaml 2>&-", 0, ""),
    "closed stderr, an error": ("$D check bad.yaml 2>&-", 1, ""),
    "closed stderr, a run": ("rm -rf out; $D run r.yaml --out out 2>&- && $D verify out", 0, "match the lock"),
    "closed stdout, nothing for it": ("$D check r.yaml >&-", 0, "ok, 600 tensors"),
    "closed stdout": ("$D plan r.yaml >&-", 1, "output: Bad file descriptor"),
    "all closed": ("$D plan r.yaml >&- 2>&- <&-", 1, ""),
    "all closed, a run": ("rm -rf out; $D run r.yaml --out out >&- 2>&- <&- && $D verify out", 0, "match the lock"),
    "help to nowhere": ("$D --help >&-", 1, "output: Bad file descriptor"),
    "full stdout": ("$D plan r.yaml >/dev/full", 1, "output: No space left on device"),
    "full stdout, json": ("$D plan r.yaml --json >/dev/full", 1, "output: No space left on device"),
    "full stdout, help": ("$D --help >/dev/full", 1, "output: No space left on device"),
    "full stderr": ("$D check bad.yaml 2>/dev/full", 1, ""),
    "full stderr, usage": ("$D check 2>/dev/full", 2, ""),
    "a reader that has enough": ("$D plan r.yaml | (exec <&-; sleep 4)", 1, ""),
    "a reader that has enough, schema": ("$D schema | (exec <&-; sleep 3)", 1, ""),
    "a deleted folder": (
        "mkdir -p x && cd x && rmdir ../x && $D check r.yaml",
        1,
        "the current folder no longer exists",
    ),
    "a deleted folder, plan": ("mkdir -p x && cd x && rmdir ../x && $D plan ../r.yaml", 1, ""),
    "a deleted folder, help": ("mkdir -p x && cd x && rmdir ../x && $D --version", 0, "deltamerge"),
    "bytes: no recipe": ("$D check $'n\\xff.yaml'", 1, "n\\xff.yaml: no such file"),
    "bytes: a recipe": ("cp r.yaml $'n\\xff.yaml' && $D check $'n\\xff.yaml'", 0, "n\\xff.yaml: ok"),
    "bytes: a folder": ("cp -r base a r.yaml $'n\\xff' && $D plan $'n\\xff/r.yaml'", 0, "600 tensors"),
    "bytes: a model": ("$D inspect $'n\\xff/a' --base base", 2, "is not UTF-8"),
    "bytes: a command": ("$D $'\\xff'", 2, "\\udcff"),
    "bytes: an option": ("$D plan r.yaml $'--\\xff'", 2, "\\udcff"),
    "ascii": ("LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 PYTHONIOENCODING=ascii $D plan r.yaml", 0, "600 tensors"),
}
QUICK = ("closed stderr", "closed stdout", "full stdout", "a deleted folder",
         "bytes: no recipe", "all closed, a run", "full stderr")  # fmt: skip


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_shell_that_is_not_as_it_should_be(folder: Path, case: str) -> None:
    script, code, said = CASES[case]
    found = shell(folder, script)
    assert found[0] == code, found
    assert said in found[1]


ERRORS = {
    "end of file": (EOFError("Ran out of input"), 3, "bug in deltamerge"),
    "memory": (MemoryError(), 1, "not enough memory"),
    "a name": (UnicodeEncodeError("utf-8", "x\udcff", 1, 2, "surrogates not allowed"), 1, "x\\xff: a name that is not"),
    "a file": (PermissionError(13, "Permission denied", "\x1b[2J"), 1, "error: \\x1b[2J: Permission denied"),
    "a socket": (ConnectionResetError(104, "reset"), 3, "bug in deltamerge"),
    "a reader": (BrokenPipeError(32, "Broken pipe"), 1, ""),
    "depth": (RecursionError("deep\n::error::x"), 3, "deep\\n::error::x"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_every_error_has_its_exit_code(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, code, said = ERRORS[case]

    def broken(**_: object) -> None:
        raise error

    monkeypatch.setattr(commands.get_command(click.Context(commands), "methods"), "callback", broken)
    found, out, err = call(capsys, "methods")
    assert (found, out) == (code, "")
    assert said in err


def test_streams_that_are_there_stay_as_they_are() -> None:
    before = sys.stdout, sys.stderr
    streams.prepare()
    assert streams.finish() is None
    assert (sys.stdout, sys.stderr) == before
