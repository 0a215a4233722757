"""The kept machine code of the stream loop: that it is used, and what stands in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint

pytest.importorskip("numba")

from deltamerge.cli.output import Progress
from deltamerge.kernels import native

RECIPE = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: ./a}, {model: ./b}]\n"
SCRIPT = """
import sys
from pathlib import Path
from running import run
run(Path(sys.argv[1]), Path(sys.argv[2]), workers=2)
print([name for name in ("numba", "torch") if name in sys.modules])
"""


def test_a_process_that_finds_the_code_imports_no_compiler(tmp_path: Path) -> None:
    native.loop()  # compiled and kept, unless it was before
    for name in "ab":
        make_checkpoint(tmp_path / name, {"w": torch.ones(300, 40).bfloat16()})
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "r.yaml"), str(tmp_path / "out")]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("shown", [True, False])
def test_someone_who_waits_for_the_compiler_is_told(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native.loop()
    kept = (native._read(path) for folder in native._folders() for path in folder.glob("run-*.code"))
    code = next(filter(None, kept))
    progress = Progress(shown=shown)
    native._loop.__wrapped__()
    assert native.COMPILING not in capsys.readouterr().err
    monkeypatch.setattr(native, "_read", lambda _: None)
    monkeypatch.setattr(native, "_compile", lambda *_: code)
    monkeypatch.setattr(native, "_keep", lambda *_: None)
    native._loop.__wrapped__()
    progress.stop()
    assert (native.COMPILING in capsys.readouterr().err) == shown


def places(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(native, "_folders", lambda: iter(folders))


def test_code_is_read_as_it_was_written_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places(monkeypatch, tmp_path / "new")
    native._keep("x.code", b"machine code")
    path = tmp_path / "new" / "x.code"
    assert os.listdir(path.parent) == ["x.code"]
    assert native._read(path) == b"machine code"
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:-1], whole[:-1] + b"x", whole[: native.DIGEST_BYTES]):
        path.write_bytes(damaged)
        assert native._read(path) is None
    assert native._read(tmp_path / "none") is None


def test_a_folder_that_cannot_be_written_leaves_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    places(monkeypatch, tmp_path / "file", tmp_path / "file" / "below", tmp_path / "good")
    native._keep("x.code", b"machine code")
    assert native._read(tmp_path / "good" / "x.code") == b"machine code"
    places(monkeypatch, tmp_path / "file")
    native._keep("x.code", b"machine code")  # kept nowhere: compiled again next time


@pytest.mark.slow
def test_code_is_made_anew_where_none_is_kept(tmp_path: Path) -> None:
    for name in "ab":
        make_checkpoint(tmp_path / name, {"w": torch.ones(300, 40).bfloat16()})
    (tmp_path / "r.yaml").write_text(RECIPE)
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "r.yaml")]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    for turn in range(3):
        command[4:] = [str(tmp_path / f"out{turn}")]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        assert ("numba" in found.stdout) == (turn != 1)
        (code,) = cache.glob("*.code")
        if turn == 1:
            code.write_bytes(code.read_bytes()[:-1])
    outputs = {(tmp_path / f"out{turn}" / "model.safetensors").read_bytes() for turn in range(3)}
    assert len(outputs) == 1


def test_damaged_code_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "x.code").write_bytes(b"y" * 100)
    assert native._read(tmp_path / "x.code") is None
    assert not (tmp_path / "x.code").exists()


@pytest.mark.skipif(os.name != "posix", reason="owners and modes")
def test_code_that_others_may_have_written_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kept"
    places(monkeypatch, folder)
    native._keep("x.code", b"machine code")
    path = folder / "x.code"
    for one, mode in ((path, 0o666), (path, 0o602), (folder, 0o777)):
        kept = one.stat().st_mode
        one.chmod(mode)
        assert native._read(path) is None
        one.chmod(kept)
        assert native._read(path) == b"machine code"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert native._read(path) is None
    path.unlink()
    (tmp_path / "elsewhere").rename(path)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        assert native._read(path) is None
    assert path.exists()
