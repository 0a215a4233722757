"""Kill, starve and break a merge of some hundred MB at random moments; whatever happens, the resumed bytes are equal.

    python tests/torture.py [--kills 50] [--size S] [--seed 0] [--folder .torture]

Prints one line per kind of fault, and exits 1 if any run ended otherwise than it must.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import synthetic
from deltamerge.files.journal import read_journal
from deltamerge.formats.safetensors import done_spans

SIZES = {"S": synthetic.Size(768, 2048, 12, 12, 4, 16_000, 40_000_000), "tiny": synthetic.SIZES["tiny"]}
RECIPE = """\
base_model: {folder}/base
merge_method: dare_ties
models:
  - {{model: {folder}/tune-a, parameters: {{weight: 0.5}}}}
  - {{model: {folder}/tune-b, parameters: {{weight: 0.5}}}}
parameters: {{density: 0.3}}
output: {{shard_size: {shard}}}
"""
PATHS = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
SECONDS = 3.0  # that the weights take to be written by a run that is to be killed: longer than many saves
# A run on a `bad_disk`, which saves often; it leaves the reads of compiled loops, and those that failed, in a file.
CHILD = """\
import sys
from bad_disk import BadDisk
disk = BadDisk(chance={chance}, lasting={lasting}, short={short}, pace={pace}, seed={seed})
import deltamerge.formats.safetensors as writer
from deltamerge.cli import main
writer.SAVE_SECONDS = {save}
try:
    main(sys.argv[1:])
finally:
    with open({counts!r}, "a") as file:
        print(disk.compiled, disk.faults, file=file)
"""


class Failed(Exception):
    """A run did not end as it must."""


class Killed(NamedTuple):
    """A killed run: bytes of weights it had written, those of them that --resume did again, whether it was done."""

    written: int
    lost: int
    complete: bool


class Torture:
    def __init__(self, folder: Path, size: str, seed: int, save: float) -> None:
        self.draw = random.Random(seed)
        self.save = save
        self.folder = folder
        synthetic.make_checkpoints(folder / size, SIZES[size])
        self.recipe = folder / f"{size}.yaml"
        shard = "20MB" if size == "S" else "60KB"
        self.recipe.write_text(RECIPE.format(folder=(folder / size).resolve(), shard=shard))
        self.out = folder / "out"
        self.counts = (folder / "counts").resolve()
        for _ in range(2):  # the first compiles the kernels
            self.clean()
            started = time.monotonic()
            process = self.start()
            while not list((self.state / "out").glob("*.safetensors")) and process.poll() is None:
                time.sleep(0.002)
            begun = time.monotonic()
            self.expect((process.wait(), ""), 0)
            self.seconds, self.writing = time.monotonic() - started, time.monotonic() - begun
        self.truth = digests(self.out)
        self.nbytes = sum(path.stat().st_size for path in self.out.iterdir())

    @property
    def state(self) -> Path:
        return self.out.parent / f".{self.out.name}.partial"

    def clean(self) -> None:
        for path in (self.out, self.state):
            shutil.rmtree(path, ignore_errors=True)

    def start(
        self,
        *flags: str,
        chance: float = 0.0,
        lasting: bool = False,
        pace: float = 0.0,
        limit: Callable[[], None] | None = None,
    ) -> subprocess.Popen[str]:
        code = CHILD.format(
            save=self.save, chance=chance, lasting=lasting, short=0.3 if chance else 0.0, pace=pace,
            seed=self.draw.randrange(1 << 30), counts=str(self.counts),
        )  # fmt: skip
        command = [sys.executable, "-c", code, "run", str(self.recipe), "--out", str(self.out), "-q", *flags]
        environment = {**os.environ, "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=limit)

    def run(self, *flags: str, **faults: Any) -> tuple[int, str]:
        process = self.start(*flags, **faults)
        _, err = process.communicate(timeout=600)
        return process.returncode, err

    def expect(self, ended: tuple[int, str], code: int, text: str = "") -> None:
        if ended[0] != code or text not in ended[1] or "Traceback" in ended[1]:
            raise Failed(f"exit {ended[0]}, not {code} with {text!r}: {ended[1]}")

    def check(self) -> None:
        """The target is what an undisturbed run makes, and nothing is left beside it."""
        if digests(self.out) != self.truth:
            raise Failed(f"{self.out}: other bytes than an undisturbed run's")
        if self.state.exists():
            raise Failed(f"{self.state}: left behind")

    @property
    def saved(self) -> int:
        """Bytes of weights that the journal says are done."""
        spans = done_spans(read_journal(self.state / "journal")[0]).values()
        return sum(stop - start for some in spans for start, stop in some)

    def kill(self) -> Killed:
        """SIGKILL at a random moment, then --resume to equal bytes.

        Of ten moments eight are when a random share of the weights is saved, one is any, one after the last weight.
        """
        self.clean()
        process = self.start(pace=SECONDS / self.nbytes)
        dice, share = self.draw.random(), self.draw.uniform(0, 0.98)
        if dice < 0.1:
            time.sleep(self.draw.uniform(0.0, 1.0) * self.seconds)
        else:
            wanted = share if dice < 0.9 else 0.99
            while self.saved < wanted * self.nbytes and process.poll() is None:
                time.sleep(0.005)
            time.sleep(self.draw.uniform(0.0, 1.5) * self.save)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = self.out.exists()
        if there and digests(self.out) != self.truth:
            raise Failed("a target that is not complete")
        kept = self.saved
        written = max(kept, self.written())
        if not there:
            self.expect(self.run("--resume"), 0)
        self.check_after_kill()
        return Killed(written, written - kept, there)

    def written(self) -> int:
        """Bytes of the unfinished weight files that are as they must be, by blocks of 64 KiB."""
        count = 0
        for path in (self.state / "out").glob("*.safetensors"):
            with path.open("rb") as ours, (self.folder / "truth" / path.name).open("rb") as truth:
                while wanted := truth.read(1 << 16):
                    count += len(wanted) * (ours.read(1 << 16) == wanted)
        return count

    def check_after_kill(self) -> None:
        if self.state.exists():  # killed between the last rename and the cleaning: the next run clears it away
            self.expect(self.run("--force"), 0)
        self.check()

    def kills_in_a_row(self) -> int:
        """One merge, killed again and again until a run comes through."""
        self.clean()
        kills = 0
        while not self.out.exists():
            wanted = self.saved + self.draw.uniform(0.1, 0.4) * self.nbytes
            process = self.start("--resume", pace=SECONDS / self.nbytes)
            while self.saved < wanted and process.poll() is None:
                time.sleep(0.005)
            kills += process.poll() is None
            process.kill()
            process.wait()
        self.check_after_kill()
        return kills

    def faults(self) -> bool:
        """Random I/O errors and short reads and writes until one stops the run, then --resume; whether one did."""
        self.clean()
        chance = self.draw.choice([0.0005, 0.003, 0.01])
        code, err = self.run(chance=chance, lasting=self.draw.random() < 0.5)
        if code not in (0, 1) or "Traceback" in err or (code and not err.startswith("error: ")):
            raise Failed(f"exit {code}: {err}")
        if code:
            self.expect(self.run("--resume"), 0)
        self.check()
        return code != 0

    def file_limit(self) -> None:
        """RLIMIT_FSIZE below the shards' size, as a quota would be."""
        self.clean()
        most = max(path.stat().st_size for path in (self.folder / "truth").iterdir()) // 2

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        self.expect(self.run(limit=limit), 1, "cannot be written")
        self.expect(self.run("--resume"), 0)
        self.check()

    def amid(self, fault: Callable[[subprocess.Popen[str]], None], said: str) -> None:
        """A fault of the system itself while compiled loops write: a line, exit 1."""
        self.clean()
        process = self.start(pace=SECONDS / self.nbytes)
        while self.saved < 0.2 * self.nbytes and process.poll() is None:
            time.sleep(0.005)
        fault(process)
        self.expect((process.wait(), process.communicate()[1]), 1, said)

    def limit_amid(self) -> None:
        """RLIMIT_FSIZE comes down on a run that writes, as a quota that is met."""

        def limit(process: subprocess.Popen[str]) -> None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))

        self.amid(limit, "cannot be written: the file would be larger")
        self.expect(self.run("--resume"), 0)
        self.check()

    def cut_amid(self) -> None:
        """An input is truncated while it is read, then written back: the run says so, and starts over by --force."""
        path = max((self.recipe.with_suffix("") / "tune-a").glob("*.safetensors"), key=lambda p: p.stat().st_size)
        status, keep = path.stat(), path.stat().st_size // 8
        with path.open("rb") as file:
            file.seek(keep)
            rest = file.read()
        try:
            self.amid(lambda _: os.truncate(path, keep), "truncated while reading")
        finally:
            with path.open("r+b") as file:
                file.seek(keep)
                file.write(rest)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.expect(self.run("--resume"), 1, "begun with other inputs")  # it was written to, though its bytes are back
        self.expect(self.run("--force"), 0)
        self.check()

    def full_disk(self) -> str:
        """A tmpfs too small for the output, then one that fills up behind the run's back; "" or why it was left out."""
        mount = Path(tempfile.mkdtemp(dir=self.folder))
        size = self.nbytes // 2
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], check=False, capture_output=True
        )
        if made.returncode:
            mount.rmdir()
            return "no mounts here"
        home, self.out = self.out, mount / "out"
        try:
            self.expect(self.run(), 1, "are free")
            if list(mount.iterdir()):
                raise Failed(f"{mount}: something was left behind")
            # room for the weights alone: what comes after them fails, then there is room again
            subprocess.run(["mount", "-o", f"remount,size={self.weights() + 16_384}", mount], check=True)
            code, err = self.run()
            if code != 1 or "no space left" not in err:
                raise Failed(f"exit {code}: {err}")
            subprocess.run(["mount", "-o", f"remount,size={3 * self.nbytes}", mount], check=True)
            self.expect(self.run("--resume"), 0)
            self.check()
        finally:
            self.out = home
            subprocess.run(["umount", mount], check=True)
            mount.rmdir()
        return ""

    def weights(self) -> int:
        """The weight files' bytes, in whole pages, as a tmpfs counts them."""
        return sum(-(-p.stat().st_size // 4096) * 4096 for p in (self.folder / "truth").glob("*.safetensors"))

    def two_at_once(self) -> None:
        """Two runs on one target: one writes it, the other is refused."""
        self.clean()
        pair = [self.start() for _ in range(2)]
        ended = sorted((p.communicate(timeout=600)[1], p.returncode) for p in pair)
        if [code for _, code in ended] != [0, 1] or not any(w in ended[1][0] for w in ("another run", "not empty")):
            raise Failed(f"two runs at once: {ended}")
        self.check()

    def parts(self) -> int:
        """Four parts, of which one is killed and resumed, then --finish: the bytes of one run."""
        self.clean()
        processes = [self.start("--part", f"{i}/4") for i in range(1, 5)]
        time.sleep(0.6 * self.seconds)
        processes[1].send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate(timeout=600)
        if processes[1].returncode:
            self.expect(self.run("--finish"), 1, "unfinished parts: 2/4")
            self.expect(self.run("--part", "2/4", "--resume"), 0)
        self.expect(self.run("--finish"), 0)
        self.check()
        return 4


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.file_digest(path.open("rb"), "blake2b").hexdigest() for path in folder.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=float, default=0.1, help="seconds between saves; a real run's are 2")
    parser.add_argument("--folder", type=Path, default=Path(".torture"))
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    torture = Torture(options.folder, options.size, options.seed, options.save)
    shutil.rmtree(options.folder / "truth", ignore_errors=True)
    shutil.copytree(torture.out, options.folder / "truth")
    print(
        f"a merge of {torture.nbytes / 1e6:.0f} MB takes {torture.seconds:.1f} s, {torture.writing:.1f} s of it "
        f"writing; saves every {options.save} s; "
        f"those to be killed write for {SECONDS:.0f} s",
        flush=True,
    )

    killed = [torture.kill() for _ in range(options.kills)]
    midway = [one for one in killed if one.written > 0 and not one.complete]
    amid = sum(one.written < 0.99 * torture.weights() for one in midway)
    lost = sorted(one.lost for one in midway) or [0]
    complete = sum(one.complete for one in killed)
    mean = sum(one.written for one in midway) / max(1, len(midway))
    print(
        f"killed            {len(killed)} times by SIGKILL: {len(killed) - len(midway) - complete} before the first "
        f"weight, {amid} amid them, {len(midway) - amid} between the last and the rename, {complete} after it; all "
        f"resumed to equal bytes\nwork lost         median {lost[len(lost) // 2] / 1e6:.1f} MB, at most "
        f"{lost[-1] / 1e6:.1f} MB of {mean / 1e6:.0f} MB written on average",
        flush=True,
    )
    print(f"killed in a row   {torture.kills_in_a_row()} times in one merge, equal bytes", flush=True)
    torture.counts.unlink()
    stopped = sum(torture.faults() for _ in range(options.kills // 2))
    calls, faults = map(sum, zip(*(map(int, line.split()) for line in torture.counts.open()), strict=True))
    print(
        f"faulty disk       {options.kills // 2} runs, {stopped} stopped by an error, all resumed to equal bytes; "
        f"{faults} of {calls} reads of compiled loops failed",
        flush=True,
    )
    torture.file_limit()
    torture.limit_amid()
    print("file size limit   before and amid the weights: one line, exit 1, equal bytes after", flush=True)
    torture.cut_amid()
    print(
        "input cut short   amid the weights: one line, exit 1; written back: one line, --force",
        flush=True,
    )
    print(f"full disk         {torture.full_disk() or 'one line, exit 1, equal bytes after'}", flush=True)
    torture.two_at_once()
    print("two at once       one wrote, one was refused", flush=True)
    print(f"in parts          {torture.parts()}, one of them killed and resumed, equal bytes", flush=True)
    torture.clean()


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"FAILED: {failure}")
