"""What may not be read, written or searched: a line, exit 1, and nothing lost. root drops its right to everything."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from calls import call
from conftest import write_json
from interrupted import RECIPE, Stop, files, models
from running import run

from deltamerge.errors import InputError
from deltamerge.formats import safetensors as writer

PASSING = (1 << 1) | (1 << 2) | (1 << 3)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER


class Capabilities(ctypes.Structure):
    """The header and the two words of capget(2)."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("version", "pid", "effective", "permitted", "inheritable")] + [
        ("high", ctypes.c_uint32 * 3)
    ]


@contextmanager
def as_anybody() -> Iterator[None]:
    """Without root's passing of permissions, in this thread and those that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    known = Capabilities(version=0x20080522)
    data = ctypes.addressof(known) + 8
    assert libc.capget(ctypes.byref(known), ctypes.c_void_p(data)) == 0
    before = known.effective
    known.effective = before & ~PASSING
    assert libc.capset(ctypes.byref(known), ctypes.c_void_p(data)) == 0
    try:
        yield
    finally:
        known.effective = before
        assert libc.capset(ctypes.byref(known), ctypes.c_void_p(data)) == 0


@pytest.fixture
def place(tmp_path: Path) -> Path:
    models(tmp_path)
    for name in ("base", "a", "b"):
        write_json(tmp_path / name / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    (tmp_path / "r.yaml").write_text(RECIPE.format(method="ties", shard="250KB"))
    (tmp_path / "rows.txt").write_text("a b\n" * 50)
    (tmp_path / "q.yaml").write_text(
        "base_model: ./base\nmodels: [{model: ./a, prune: {method: dare, density: 0.5, q: output_change}}]\n"
        "calibration: {data: rows.txt}\n"
    )
    (tmp_path / "place").mkdir()
    return tmp_path


Modes = dict[str, int]
READS: dict[str, tuple[str, Modes, str]] = {
    "weights": ("r.yaml", {"a/model.safetensors": 0}, "./a: model.safetensors: cannot be read: Permission denied"),
    "config": ("r.yaml", {"base/config.json": 0}, "./base: config.json: cannot be read: Permission denied"),
    "folder": ("r.yaml", {"a": 0}, "./a: cannot be read: Permission denied"),
    "folder's names": ("r.yaml", {"a": 0o311}, "./a: cannot be read: Permission denied"),
    "folder's files": ("r.yaml", {"a": 0o444}, "ermission denied"),
    "calibration": ("q.yaml", {"rows.txt": 0}, "rows.txt: cannot be read: Permission denied"),
}


@pytest.mark.parametrize("case", READS)
@pytest.mark.parametrize("command", ["check", "run"])
def test_inputs_that_may_not_be_read(place: Path, capsys: pytest.CaptureFixture[str], case: str, command: str) -> None:
    recipe, modes, said = READS[case]
    refused(place, capsys, modes, said, command, str(place / recipe))
    assert not list(place.glob("*merged*"))


WRITES: dict[str, tuple[Modes, str]] = {
    "parent": ({"place": 0o555}, "place: cannot be written: permission denied"),
    "parent, unsearchable": ({"place": 0}, "out: cannot be written: permission denied"),
    "target": ({"place/out": 0}, "out: cannot be written: permission denied"),
}
LEFT: dict[str, tuple[Modes, str]] = {
    "journal": ({".out.partial/journal": 0}, ".out.partial/journal: cannot be read: Permission denied"),
    "journal, unwritable": ({".out.partial/journal": 0o444}, ".out.partial/journal: cannot be written: permission"),
    "lock": ({".out.partial/lock": 0}, ".out.partial: cannot be written: permission denied"),
    "folder": ({".out.partial": 0}, ".out.partial: cannot be written: permission denied"),
    "folder of files": ({".out.partial/out": 0}, "cannot be written: permission denied"),
    "files": ({".out.partial/out/model-00001-of-00004.safetensors": 0}, "permission denied"),
}


@pytest.mark.parametrize("case", WRITES)
@pytest.mark.parametrize("flags", [(), ("--force",), ("--resume",)])
def test_targets_that_may_not_be_written(
    place: Path, capsys: pytest.CaptureFixture[str], case: str, flags: tuple[str, ...]
) -> None:
    out = place / "place" / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    if case != "target":
        (out / "mine").rename(place / "mine")
        out.rmdir()
    modes, said = WRITES[case]
    refused(place, capsys, modes, said, "run", place / "r.yaml", "--out", out, *flags)
    assert [p.name for p in (place / "place").rglob("*")] == (["out", "mine"] if case == "target" else [])


@pytest.mark.parametrize("case", LEFT)
def test_work_that_may_not_be_resumed_is_kept(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    recipe, out, home = place / "r.yaml", place / "out", place / ".out.partial"
    truth = files(run(recipe, place / "truth" / "out").folder)
    with pytest.raises(InputError):
        run(recipe, out, watch=Stop(out, 500_000, InputError("stop")))
    journal = (home / "journal").read_bytes()
    modes, said = LEFT[case]
    refused(place, capsys, modes, said, "run", recipe, "--out", out, "--resume")
    assert (home / "journal").read_bytes().startswith(journal)
    run(recipe, out, resume=True)
    assert files(out) == truth


def refused(place: Path, capsys: pytest.CaptureFixture[str], modes: Modes, said: str, *arguments: str | Path) -> None:
    """With these modes of files in `place` the command ends with exit 1 and what is `said`."""
    before = {path: (place / path).stat().st_mode for path in modes}
    for path, mode in modes.items():
        (place / path).chmod(mode)
    try:
        with as_anybody():
            code, out, err = call(capsys, *arguments)
    finally:
        for path, mode in reversed(before.items()):
            (place / path).chmod(mode)
    assert (code, out) == (1, ""), err
    assert said in err
    assert all(line.startswith(("error: ", "hint: ", str(place))) for line in err.splitlines()), err
    assert len(err.splitlines()) <= 2


def test_an_outputs_files_that_may_not_be_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(place / "r.yaml", place / "out")
    for name in ("recipe.lock", "model-00002-of-00004.safetensors"):
        said = f"out/{name}: cannot be read: Permission denied"
        refused(place, capsys, {f"out/{name}": 0}, said, "verify", place / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_anothers_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.chown(place / "place", 65534, 65534)
    said = "place: cannot be written: permission denied"
    refused(place, capsys, {}, said, "run", place / "r.yaml", "--out", place / "place" / "out")
    assert not list((place / "place").iterdir())


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("no mounts here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_file_system_and_a_mount_point(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(place / "mount", "-o", "ro"):
        said = "mount: cannot be written: the file system is read-only"
        refused(place, capsys, {}, said, "run", place / "r.yaml", "--out", place / "mount" / "out")
        said = "mount: is a mount point"
        refused(place, capsys, {}, said, "run", place / "r.yaml", "--out", place / "mount")
    assert not list(place.glob(".mount*"))


FULL: dict[str, Callable[[Path], list[str]]] = {
    "plan": lambda place: ["plan", str(place / "r.yaml"), "--json"],
    "methods": lambda place: ["methods"],
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", FULL)
def test_stdout_on_a_full_disk(place: Path, command: str) -> None:
    with open("/dev/full", "w") as full:
        arguments = [sys.executable, "-m", "deltamerge", *FULL[command](place)]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: output: No space left on device\n")
