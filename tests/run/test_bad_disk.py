"""Disks that fail, fall short or fill up under compiled loops: the same bytes, or a line and --resume to them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import needs_kernels
from interrupted import RECIPE, files, models
from running import run

from deltamerge.errors import InputError, OutputError
from deltamerge.formats import safetensors as writer
from deltamerge.plan.planner import Plan

pytestmark = needs_kernels

TESTS = Path(__file__).parents[1]
# Python's own calls are replaced too: in a process of its own.
CHILD = """\
import shutil, sys
from pathlib import Path
from bad_disk import BadDisk
disk = BadDisk(short=0.4)
import deltamerge.formats.safetensors as writer
from deltamerge.errors import InputError, OutputError
from running import run
writer.SAVE_SECONDS = 0.001

recipe, out, truth = map(Path, sys.argv[1:])
wanted = {path.name: path.read_bytes() for path in truth.iterdir()}
def check(stopped=None):
    assert {path.name: path.read_bytes() for path in out.iterdir()} == wanted, stopped
    assert not list(out.parent.glob(".out*")), stopped
    shutil.rmtree(out)

run(recipe, out)
check()
assert disk.compiled > 20, "the loops did not read by the bound symbol"
disk.turn(chance=0.5, loops=True)
run(recipe, out)
check()
assert disk.faults > 3
stops = []
for seed in range(4):
    disk.turn(chance=0.03, lasting=seed % 2 == 0, short=0.3, seed=seed)
    try:
        run(recipe, out)
    except (InputError, OutputError) as error:
        stops.append(str(error))
        assert "cannot be" in stops[-1] and "\\n" not in stops[-1], stops
    disk.turn()
    if not out.exists():
        run(recipe, out, resume=True)
    check(stops)
assert stops
"""


@pytest.mark.parametrize("method", ["ties", pytest.param("dare_ties", marks=pytest.mark.slow)])
def test_faults_below_compiled_loops(tmp_path: Path, method: str) -> None:
    models(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(method=method, shard="250KB"))
    truth = run(recipe, tmp_path / "truth" / "out").folder
    (tmp_path / "work").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent))),
    }
    command = [sys.executable, "-c", CHILD, str(recipe), str(tmp_path / "work" / "out"), str(truth)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def cut_input(folder: Path) -> None:
    os.truncate(folder / "a" / "model.safetensors", 200_000)


def limit_files(_: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


FAULTS: dict[Callable[[Path], None], tuple[type[Exception], str]] = {
    cut_input: (InputError, r"a/model\.safetensors: truncated while reading"),
    limit_files: (OutputError, r"cannot be written: the file would be larger than the file system or `ulimit -f`"),
}


def _await_save(folder: Path) -> None:
    """Until a journal below the folder has what a resumed run goes on from; no longer than ten seconds."""
    end = time.monotonic() + 10
    while not any(b'"done"' in journal.read_bytes() for journal in folder.glob(".out*/journal")):
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_system_itself_fails_amid_compiled_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], None]
) -> None:
    """After the first tensor: an input is cut; files may not grow, as where a quota is met."""
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    models(tmp_path)
    recipe, out, cut = tmp_path / "r.yaml", tmp_path / "out", tmp_path / "a" / "model.safetensors"
    recipe.write_text(RECIPE.format(method="dare_ties", shard="250KB"))
    truth = files(run(recipe, tmp_path / "truth" / "out").folder)
    whole, status = cut.read_bytes(), cut.stat()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watch(_: Plan) -> Callable[[int], None]:
        once = iter([fault])

        def made(_: int) -> None:
            for fail in once:
                _await_save(tmp_path)
                fail(tmp_path)

        return made

    kind, said = FAULTS[fault]
    try:
        with pytest.raises(kind, match=said):
            run(recipe, out, workers=1, watch=watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not out.exists()
    if fault is cut_input:  # put back it is another file, for all that a resumed run can see
        cut.write_bytes(whole)
        os.utime(cut, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(OutputError, match=r"different now: \./a: model\.safetensors"):
            run(recipe, out, resume=True)
    run(recipe, out, resume=fault is not cut_input, force=fault is cut_input)
    assert files(out) == truth
