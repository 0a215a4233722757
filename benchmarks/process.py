"""What a whole process costs, the roofline it is held against, and where and of what it was measured. Linux only."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT

BUFFER = 1 << 22
PACKAGES = ("deltamerge", "mergekit", "torch", "transformers", "numpy", "safetensors")  # whose versions count
FIELD = re.compile(r"^(RssAnon|RssShmem|VmRSS|VmHWM):\s+(\d+) kB", re.MULTILINE)
# settings of the shell that would decide how a tool runs; without bytecode, one run from its sources would compile them
SETTINGS = re.compile(r"(OMP|MKL|OPENBLAS)_NUM_THREADS|MALLOC_.*|GLIBC_TUNABLES|PYTHON(DONTWRITEBYTECODE|UNBUFFERED)")


@dataclass(frozen=True, slots=True)
class Run:
    """One process: wall seconds, user + system CPU seconds, peak anonymous and resident megabytes (10⁶)."""

    wall: float
    cpu: float
    anonymous: float
    resident: float


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from family(int(child))


def memory(pid: int) -> tuple[int, int]:
    """Anonymous and resident kB of a process and all below it; shared memory counts as anonymous."""
    anonymous = resident = highest = 0
    try:
        for member in family(pid):
            fields = {k: int(v) for k, v in FIELD.findall(Path(f"/proc/{member}/status").read_text())}
            anonymous += fields.get("RssAnon", 0) + fields.get("RssShmem", 0)
            resident += fields.get("VmRSS", 0)
            highest = max(highest, fields.get("VmHWM", 0))
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended between two reads: what was seen counts
    return anonymous, max(resident, highest)


def measure(arguments: Sequence[str], extra: Mapping[str, str], log: Path, interval: float = 0.01) -> Run:
    """Run a process to its end; CPU from wait4, memory sampled every `interval` seconds.

    wait4's ru_maxrss is of no use: a child starts with the peak of the process that forked it.
    """
    environment = {k: v for k, v in os.environ.items() if not SETTINGS.fullmatch(k)}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(extra)
    peaks = [0, 0]
    ended = threading.Event()

    def sample(pid: int) -> None:
        while not ended.wait(interval):
            peaks[:] = map(max, peaks, memory(pid))

    with open(log, "w", encoding="utf-8") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment)
        sampler = threading.Thread(target=sample, args=(process.pid,))
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
            sampler.join()
    if status:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        sys.exit(f"{shlex.join(arguments)}: exit status {process.returncode}\n{tail}")
    anonymous, resident = (peak * 1024 / 1e6 for peak in peaks)
    return Run(wall, usage.ru_utime + usage.ru_stime, anonymous, resident)


def read_through(path: Path, buffer: memoryview, out: Path | None = None) -> None:
    """Read a file with one thread into a small buffer; write it to `out`, if given."""
    with ExitStack() as stack:
        source = stack.enter_context(open(path, "rb", buffering=0))
        target = stack.enter_context(open(out, "wb", buffering=0)) if out else None
        while count := source.readinto(buffer):
            if target:
                target.write(buffer[:count])


def warm(models: Sequence[Path]) -> None:
    """Read every input once, and settle what earlier runs wrote."""
    buffer = memoryview(bytearray(BUFFER))
    for model in models:
        for file in sorted(model.iterdir()):
            read_through(file, buffer)
    os.sync()


def roofline(models: Sequence[Path], out: Path) -> float:
    """Seconds one thread takes to copy the first input (as large as the output) and read the others once."""
    buffer = memoryview(bytearray(BUFFER))
    out.mkdir(parents=True)
    start = time.perf_counter()
    for model in models:
        for file in sorted(model.glob("*.safetensors")):
            read_through(file, buffer, out / file.name if model == models[0] else None)
    return time.perf_counter() - start


# glibc gives large blocks back at once and takes them anew: zeroing their pages costs more than a small decoder's step.
MALLOC = {"hugetlb": 1, "mmap_threshold": 1 << 33, "trim_threshold": 1 << 34}


def keep_pages() -> None:
    """Start this program again with a malloc that keeps its memory and asks for large pages, if it has not one yet."""
    name = "GLIBC_TUNABLES"
    if sys.platform == "linux" and name not in os.environ:
        tunables = ":".join(f"glibc.malloc.{key}={value}" for key, value in MALLOC.items())
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, name: tunables})


def surroundings(programs: Mapping[str, str]) -> dict[str, Any]:
    """Command, commit, machine, versions."""

    def git(*arguments: str) -> str:
        line = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
        done = subprocess.run(line, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    def versions(program: str) -> dict[str, str]:
        code = "import importlib.metadata as m, json\nprint(json.dumps({d.name: d.version for d in m.distributions()}))"
        python = Path(program).with_name("python")
        have = json.loads(subprocess.check_output([python, "-I", "-c", code], text=True))
        return {name: have[name] for name in PACKAGES if name in have}

    cpus = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git("rev-parse", "--verify", "-q", "HEAD"),
        "uncommitted": git("status", "--porcelain", "--", ":/deltamerge").splitlines(),
        "machine": {
            "cpu": cpus[0] if cpus else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "versions": {name: versions(program) for name, program in programs.items()},
    }
