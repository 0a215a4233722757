"""`deltamerge run --ray`: the bytes of one process from several, one of them killed too. `make ray` runs it."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from calls import call
from interrupted import RECIPE, calibrated, files, models
from running import run

from deltamerge.files.journal import has_work, read_journal
from deltamerge.formats.safetensors import done_spans
from deltamerge.run.lock import verify

# In every process of the test: saves are frequent, writes slow, and told to a log, so that there is an amid; after its
# first large write each waits for `go`, however slow this machine is.
SLOW = """\
import os, sys, time
os.environ["DELTAMERGE_KERNELS"] = "off"  # fewer, larger writes would be too soon done; the bytes are the same
write, written = os.pwrite, []
def slow(fd, data, at):
    writer = sys.modules.get("deltamerge.formats.safetensors")
    if writer is not None:
        writer.SAVE_SECONDS = 0.05
    if writer is not None and len(data) > 4096:
        time.sleep(0.3)
        while written and not os.path.exists({go!r}):
            time.sleep(0.05)
        written.append(len(data))
        with open({log!r}, "a") as log:
            log.write(f"{{os.getpid()}} {{len(data)}}\\n")
    return write(fd, data, at)
os.pwrite = slow
"""


def has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None


ray = [pytest.mark.slow, pytest.mark.skipif(not has_ray(), reason="needs the extra ray: make ray")]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    models(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(method="dare_ties", shard="250KB"))
    return path


def slow_folder(recipe: Path) -> Path:
    """What makes every Python process slow that finds it in its path."""
    folder = recipe.parent / "slow"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SLOW.format(log=str(folder / "log"), go=str(folder / "go")))
    return folder


class Started:
    """`deltamerge run RECIPE --ray` in a process of its own, its writes slow and logged, or waiting for `go`."""

    def __init__(self, recipe: Path, out: Path, *flags: str, wait: bool = False) -> None:
        folder = slow_folder(recipe)
        self.go, self.log = folder / "go", folder / "log"
        self.go.unlink(missing_ok=True)
        if not wait:
            self.go.touch()
        command = [
            sys.executable,
            "-m",
            "deltamerge",
            "run",
            str(recipe),
            "--out",
            str(out),
            *flags,
        ]
        self.process = subprocess.Popen(
            command, env=environment(folder), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.state = out.parent / f".{out.name}.partial"

    def worker_amid(self, part: str) -> tuple[int, int]:
        """The process that writes `part`, as soon as some of its work is saved, and the bytes of that."""
        while self.process.poll() is None:
            records = read_journal(self.state / f"journal-{part}")[0]
            if has_work(records) and "part" not in records[-1]:
                found = re.match(r"process (\d+) ", (self.state / f"part-{part}.lock").read_text())
                assert found
                saved = done_spans(records).values()
                return int(found[1]), sum(stop - start for spans in saved for start, stop in spans)
            time.sleep(0.01)
        raise AssertionError(f"ended before: {self.process.communicate()}")

    def written(self) -> dict[int, int]:
        """Bytes written by each process."""
        counts: dict[int, int] = {}
        for line in self.log.read_text().splitlines():
            process, nbytes = map(int, line.split())
            counts[process] = counts.get(process, 0) + nbytes
        return counts

    def ended(self) -> str:
        out, err = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, err
        assert out == ""
        return err


def environment(*first: Path) -> dict[str, str]:
    paths = [*map(str, first), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    # the deltamerge of this tree on every worker; a small store of objects: nothing goes through it
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "80000000"}


class TestOnThisMachine:
    pytestmark = ray

    def test_a_killed_workers_part_goes_on_from_its_journal(self, recipe: Path, tmp_path: Path) -> None:
        truth = files(run(recipe, tmp_path / "truth" / "out").folder)
        out = tmp_path / "out"
        started = Started(recipe, out, "--ray", wait=True)
        killed, saved = started.worker_amid("2-of-2")
        os.kill(killed, signal.SIGKILL)
        started.go.touch()
        started.ended()
        assert files(out) == truth
        assert verify(out, 1)
        assert not started.state.exists()
        written = started.written()
        assert killed in written
        assert len(written) >= 2
        unsaved = written[killed] - saved  # done again, and no more than that
        total = sum(size for name, size in sizes(out).items() if name.endswith(".safetensors"))
        assert sum(written.values()) <= total + max(0, unsaved) + 64_000

    def test_an_interrupted_run_is_resumed_with_as_many_parts(self, recipe: Path, tmp_path: Path) -> None:
        truth = files(run(recipe, tmp_path / "truth" / "out").folder)
        out = tmp_path / "out"
        started = Started(recipe, out, "--ray", wait=True)
        started.worker_amid("1-of-2")
        started.process.send_signal(signal.SIGINT)
        _, err = started.process.communicate(timeout=300)
        assert started.process.returncode == 130, err
        assert "continue with --resume" in err
        again = Started(recipe, out, "--ray")
        _, err = again.process.communicate(timeout=300)
        assert again.process.returncode == 1
        assert "unfinished work" in err
        Started(recipe, out, "--ray", "--resume").ended()
        assert files(out) == truth

    def test_q_is_calibrated_once_for_all_parts(self, tmp_path: Path) -> None:
        path = calibrated(tmp_path)
        truth = files(run(path, tmp_path / "truth" / "out").folder)
        Started(path, tmp_path / "out", "--ray").ended()
        assert files(tmp_path / "out") == truth
        assert not (tmp_path / "r.lock").exists()


class TestOnACluster:
    pytestmark = ray

    @pytest.fixture
    def address(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """Two nodes of two cores each, as two machines would be."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
        settings = {**environment(slow_folder(recipe)), "RAY_raylet_start_wait_time_s": "120"}
        base = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=2", "--object-store-memory=80000000",
                "--block", "--disable-usage-stats"]  # fmt: skip
        nodes = [
            subprocess.Popen(
                [*base, "--head", f"--port={port}", "--include-dashboard=false"],
                env=settings,
                stdout=subprocess.DEVNULL,
            )
        ]
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert nodes[0].poll() is None
                    time.sleep(0.2)
            nodes.append(
                subprocess.Popen([*base, f"--address=127.0.0.1:{port}"], env=settings, stdout=subprocess.DEVNULL)
            )
            time.sleep(5)
            yield f"127.0.0.1:{port}"
        finally:
            for node in reversed(nodes):
                node.terminate()
            for node in nodes:
                node.wait(60)

    def test_the_bytes_of_one_process(self, recipe: Path, tmp_path: Path, address: str) -> None:
        truth = files(run(recipe, tmp_path / "truth" / "out").folder)
        started = Started(recipe, tmp_path / "out", "--ray", address)
        started.ended()
        assert files(tmp_path / "out") == truth
        assert len(started.written()) >= 2


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.parametrize("option", [("--ray",), ("--part", "1/2"), ("--finish",)])
@pytest.mark.parametrize("more", ["---\nmodels: [{model: ./a}]\nname: x\n", "output: {kind: delta}\n"])
def test_parts_are_of_one_document_that_makes_a_model(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...], more: str
) -> None:
    text = recipe.read_text()
    recipe.write_text(more.removeprefix("---\n") + "merge_method: passthrough\n---\n" + text.replace("./a", "x"))
    said = "has several documents"
    if "delta" in more:
        recipe.write_text(text[: text.index("output:")] + more)
        said = "output.kind is delta"
    code, out, err = call(capsys, "run", recipe, "--out", tmp_path / "out", *option)
    assert (code, out) == (1, ""), err
    assert f"r.yaml: {said}, {option[0]} " in err
    assert "hint: " in err
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.skipif(has_ray(), reason="ray is installed")
def test_without_ray_it_is_said(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deltamerge", "run", str(recipe), "--out", str(tmp_path / "out"), "--ray"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --ray needs ray\nhint: pip install 'deltamerge[ray]'\n"
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", (0, "cpu")),
        ("auto", (0, "auto")),
        ("cuda", (1, "cuda")),
        ("cuda:1", (1, "cuda")),
        ("cuda:all", (1, "cuda")),
        ("cuda:2,5", (2, "cuda:all")),
    ],
)
def test_a_task_takes_the_gpu_that_ray_gives_it(device: str, expected: tuple[int, str]) -> None:
    from deltamerge.run.ray import gpus_of

    assert gpus_of(device) == expected
