"""Kill deltamerge's commands at every call that changes a file, do what the message says, and compare.

    python tests/kills.py [--scenario NAME]... [--every 1] [--twice 0] [--seed 0] [--folder DIR]

Each command works in a user's folder that holds other things too. It is killed (SIGKILL) just before its K-th call that
changes a file, for every K, which is just after the one before; amid each call that writes, half of it written; after
its last; and interrupted (Ctrl-C) before each. Whatever K is:

- the target is absent as before, or the old one, or the new one, whole; never absent where there was an old one
- nothing of the user's is changed or gone
- the same command again, with --resume if it says so, ends in the bytes of a run that nothing disturbed
- then nothing is left behind
- no traceback; exit code 0, 1 or 2; of the interrupted 130, with the truth on what is left behind

Calls are seen by a library that stands before libc (kill_shim.c says what it sees), in children of a process that has
everything imported (kill_server.py). A power cut, which loses what was not synced, is tests/run/test_durability.py's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kill_scenarios import FILES, PIPELINE, RUN, SCENARIOS, Scenario

HERE = Path(__file__).parent
NEVER, BEFORE, AFTER, HALF, INTERRUPT = range(5)
WHEN = {BEFORE: "killed before", AFTER: "killed after", HALF: "killed amid", INTERRUPT: "interrupted before"}
NOTHING_LEFT = "nothing was left behind"
WRITES = ("write", "pwrite", "sendfile", "copy_file_range")
SAVE_SECONDS = 1e-3  # between saves of a run, so that those of tiny models have work to resume
# Loaded once for all children; none of them leaves a thread.
HEAVY = (
    "torch", "transformers", "peft",
    "deltamerge.run.apply", "deltamerge.apps.chain.extract", "deltamerge.apps.chain.squash",
    "deltamerge.apps.inspect.study", "deltamerge.apps.recommend.prune", "deltamerge.apps.recommend.first_recipe",
)  # fmt: skip
HOME, TEMPORARY, MODELS = "home", "tmp", "models"


class Unable(Exception):
    """This machine has not what the kills need."""


class Ended(NamedTuple):
    """A command that ended: exit code or -signal, what it said, and its calls that changed files."""

    code: int
    said: str
    calls: list[str]


class Server:
    """The process that runs commands; a context that ends it."""

    def __init__(self, scratch: Path, *before: str) -> None:
        """`before`: words of a command that runs it."""
        library = scratch / "kill_shim.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        if sys.platform != "linux" or compiler is None:
            raise Unable("kills need Linux and a C compiler")
        build = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "kill_shim.c"), "-ldl"]
        built = subprocess.run(build, capture_output=True, text=True, check=False)
        if built.returncode:
            raise Unable(f"kill_shim.c does not compile here: {built.stderr}")
        paths = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.environment = os.environ | threads | {
            "LD_PRELOAD": str(library), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "MALLOC_ARENA_MAX": "2",
        }  # fmt: skip
        self.scratch = scratch
        self.said = (scratch / "server").open("w+")
        self.process = subprocess.Popen(
            [*before, sys.executable, str(HERE / "kill_server.py")], env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def warm(self, root: Path, command: str, modules: Sequence[str]) -> None:
        """Let the process load what commands load: run one, and import modules."""
        if self._ask(root, command, warm=modules):
            raise RuntimeError(f"`{command}` fails: {self._last_words()}")

    def run(self, root: Path, command: str, at: int = 0, when: int = NEVER, part: str = "") -> Ended:
        """Run a command in a child, which is killed at its `at`-th call that changes a file below `root`, or before the
        first that changes one whose path has `part`."""
        log, err = self.scratch / "log", self.scratch / "err"
        code = self._ask(root, command, at=at, when=when, part=part, log=str(log), err=str(err))
        return Ended(code, err.read_text(errors="replace"), log.read_text().splitlines())

    def _ask(self, root: Path, command: str, **more: Any) -> int:
        request = {
            "arguments": command.split(), "root": str(root), "cwd": str(root / HOME), "save": SAVE_SECONDS,
            "temporary": str(root / TEMPORARY), **more,
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"the server died: {self._last_words()}")
        return int(json.loads(answer)["code"])

    def _last_words(self) -> str:
        self.said.seek(0)
        return self.said.read()[-2000:]


Seen = dict[str, tuple[Any, ...]]


def look(root: Path) -> Seen:
    """Everything below a folder: kind and mode, and the content or where a link leads."""
    found: Seen = {}
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            content: Any = ""
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = hashlib.blake2b(path.read_bytes()).hexdigest()
            found[path.relative_to(root).as_posix()] = (mode, content)
    return found


def below(seen: Seen, top: str) -> Seen:
    """The part of it that is at or below the path `top`."""
    return {path: what for path, what in seen.items() if path == top or path.startswith(f"{top}/")}


def differences(now: Seen, wanted: Seen) -> str:
    """What of `wanted` is gone, what has changed, what is there besides."""
    gone = sorted(wanted.keys() - now.keys())
    changed = sorted(path for path in wanted.keys() & now.keys() if wanted[path] != now[path])
    more = sorted(now.keys() - wanted.keys())
    lists = (("gone", gone), ("changed", changed), ("left behind", more))
    return "; ".join(f"{word}: {', '.join(names[:4])}{' …' * (len(names) > 4)}" for word, names in lists if names)


class Finding(NamedTuple):
    """Where a command was killed, and what was wrong then."""

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def grouped(findings: Sequence[Finding]) -> list[str]:
    """Findings of one kind as one line: the first of them, and how many more there are."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(re.sub(r"[\w.-]*[0-9_][\w.-]*", "N", finding.what)[:160], []).append(finding)
    return [f"{some[0]}{f' (and {len(some) - 1} more)' if some[1:] else ''}" for some in kinds.values()]


@dataclass
class Kills:
    """A user's folder in `root`, in which the commands of scenarios are killed."""

    server: Server
    root: Path
    findings: list[Finding] = field(default_factory=list)
    count: int = 0

    @property
    def home(self) -> Path:
        return self.root / HOME

    def prepare(self, modules: Sequence[str] = ()) -> None:
        """The models, once; and loaded what commands load."""
        from conftest import tiny_llama

        base = tiny_llama(self.root / MODELS / "base", seed=0, tokenizer=True)
        for seed, name in enumerate("ab", start=1):
            tiny_llama(self.root / MODELS / name, seed=seed, base=base, tokenizer=True, sigma=0.01)
        for name in ("base", "a", "b"):  # each as a component of a pipeline, beside one that is only copied
            whole, part = self.root / MODELS / f"{name}-pipeline", self.root / MODELS / name
            shutil.copytree(part, whole / "text_encoder")
            shutil.copytree(part, whole / "unet", ignore=shutil.ignore_patterns("tokenizer*"))
            (whole / "unet" / "model.safetensors").rename(whole / "unet" / "diffusion_pytorch_model.safetensors")
            (whole / "model_index.json").write_text(PIPELINE)
        self.models = look(self.root / MODELS)
        self.reset()
        self.server.warm(self.root, RUN, modules)

    def reset(self) -> None:
        """The user's folder as it was, and nothing beside it."""
        for name in (HOME, TEMPORARY):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for path in self.root.iterdir():
            if path.name != MODELS:
                path.unlink()
        (self.root / TEMPORARY).mkdir()
        (self.root / "letter.txt").write_text("dear all\n")
        for name, text in FILES.items():
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (self.home / "a link").symlink_to("../letter.txt")
        (self.home / "photos" / "up").symlink_to("../..")

    def step(self, command: str, part: str = "") -> Ended:
        """A command that is not killed, or only before it changes a file whose path has `part`."""
        if command.startswith("cp "):
            _, source, target = command.split()
            shutil.copyfile(self.home / source, self.home / target)
            return Ended(0, "", [])
        ended = self.server.run(self.root, command, part=part)
        if ended.code != (-signal.SIGKILL if part else 0):
            raise RuntimeError(f"`{command}` undisturbed: exit {ended.code}: {ended.said}")
        return ended

    def ahead(self, scenario: Scenario) -> None:
        """What comes before the command that is killed."""
        self.reset()
        for i, step in enumerate(scenario.steps[: scenario.index]):
            self.step(step, scenario.torn if i == 0 else "")
        shutil.rmtree(self.root / TEMPORARY)
        (self.root / TEMPORARY).mkdir()

    def undisturbed(self, scenario: Scenario) -> tuple[list[str], Seen, Seen, Seen]:
        """The killed command's calls, and what is there before it, after it, and at the end."""
        self.ahead(scenario)
        calls, seen = [], [look(self.root)]
        for step in scenario.steps[scenario.index :]:
            calls.append(self.step(step).calls)
            seen.append(look(self.root))
        return calls[0], seen[0], seen[1], seen[-1]

    def again(self, scenario: Scenario, step: str, at: int = 0) -> Ended:
        """The command again, with --resume if it says that."""
        ended = self.server.run(self.root, step, at, BEFORE if at else NEVER)
        if ended.code == 1 and "--resume" in ended.said and "--resume" not in step and scenario.resumable:
            ended = self.server.run(self.root, f"{step} --resume", at, BEFORE if at else NEVER)
        return ended

    def torture(self, scenario: Scenario, *, every: int = 1, some: int = 0, twice: int = 0, draw: random.Random) -> int:
        """Kill, and interrupt, the scenario's command at every `every`-th of its calls; or kill it at `some`, each of
        another kind. `twice`, at random, kill also the run after that. How many calls it makes."""
        calls, *seen = self.undisturbed(scenario)
        last = len(calls)
        places = [(k, BEFORE) for k in range(1, last + 1)]
        places += [(k, HALF) for k, call in enumerate(calls, start=1) if call.startswith(WRITES)]
        places.append((last, AFTER))
        if some:
            draw.shuffle(places)
            kinds = {(calls[k - 1].split()[0], when): (k, when) for k, when in places}
            picked = draw.sample(sorted(kinds.values()), min(some, len(kinds)))
        else:
            places += [(k, INTERRUPT) for k in range(1, last + 1)]
            picked = places[draw.randrange(min(every, len(places))) :: every]
        for k, when in picked:
            self.kill(scenario, k, when, *seen)
        for _ in range(twice):
            self.kill(scenario, *draw.choice(places), *seen, second=draw.randrange(1, last + 1))
        return last

    def kill(
        self, scenario: Scenario, k: int, when: int, before: Seen, after: Seen, truth: Seen, second: int = 0
    ) -> None:
        self.ahead(scenario)
        self.count += 1
        step, was = scenario.steps[scenario.index], look(self.root) if when == INTERRUPT else {}
        ended = self.server.run(self.root, step, k, when)
        call = ended.calls[k - 1] if len(ended.calls) >= k else f"{len(ended.calls)} calls in all"
        place = f"{scenario.name}: {WHEN[when]} call {k}, `{call}`"

        def find(what: str) -> None:
            self.findings.append(Finding(place, what))

        if ended.code not in (130 if when == INTERRUPT else -signal.SIGKILL, 0):
            find(f"exit {ended.code} instead: {ended.said}")
        if NOTHING_LEFT in ended.said and (wrong := differences(look(self.root), was)):
            find(f"says that {NOTHING_LEFT}: {wrong}")
        for what in self.wrong_amid(scenario, before, after):
            find(f"then {what}")
        if second:
            ended = self.again(scenario, step, second)
            place += f" and before call {second} of the run after it"
            for what in self.wrong_amid(scenario, before, after):
                find(f"then {what}")
        self.go_on(scenario, after, truth, find)
        if wrong := differences(look(self.root), truth):
            find(f"at the end {wrong}")
        if look(self.root / MODELS) != self.models:
            raise RuntimeError(f"{place}: the models are changed")

    def go_on(self, scenario: Scenario, after: Seen, truth: Seen, find: Callable[[str], None]) -> None:
        """The command again, as it says, and those after it. Exit 1 is right where there is nothing left to do."""
        for i, one in enumerate(scenario.steps[scenario.index :]):
            ended = self.again(scenario, one) if i == 0 else self.server.run(self.root, one)
            now, wanted = look(self.root), truth if i else after
            done = all(below(now, f"{HOME}/{t}") == below(wanted, f"{HOME}/{t}") for t in scenario.targets)
            crashed = ended.code not in (0, 1) or "Traceback" in ended.said or "bug in" in ended.said
            if crashed or (ended.code and not done):
                find(f"then `{one}` exits {ended.code}: {' | '.join(ended.said.splitlines())}")

    def wrong_amid(self, scenario: Scenario, before: Seen, after: Seen) -> Iterator[str]:
        """What must not be, whenever the process is killed."""
        now = look(self.root)
        targets = [f"{HOME}/{target}" for target in scenario.targets]
        for target in targets:
            there, old, new = (below(seen, target) for seen in (now, before, after))
            if there not in (old, new):
                yield f"{target} is neither the old nor the new one: " + (differences(there, new) if there else "gone")
        ours = [*targets, TEMPORARY, *(f"{HOME}/.{target}.partial" for target in scenario.targets)]
        users = {p: what for p, what in before.items() if not any(p == o or p.startswith(f"{o}/") for o in ours)}
        if lost := differences({p: what for p, what in now.items() if p in users}, users):
            yield lost


def chosen(names: Iterable[str]) -> list[Scenario]:
    wanted = set(names)
    return [scenario for scenario in SCENARIOS if not wanted or scenario.name in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", action="append", default=[], choices=[s.name for s in SCENARIOS])
    parser.add_argument("--every", type=int, default=1, help="only every so many-th call")
    parser.add_argument("--twice", type=int, default=0, help="runs a scenario that are killed a second time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="scenarios at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()

    def one(scenario: Scenario) -> tuple[int, list[Finding]]:
        started = time.monotonic()
        draw, calls = random.Random(f"{options.seed} {scenario.name}"), 0
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, Server(Path(folder)) as server:
            kills = Kills(server, Path(folder) / "root")
            try:
                kills.prepare(HEAVY)
                calls = kills.torture(scenario, every=options.every, twice=options.twice, draw=draw)
            except RuntimeError as error:
                kills.findings.append(Finding(scenario.name, str(error)))
        found = "".join(f"\n  {finding}" for finding in grouped(kills.findings))
        seconds = time.monotonic() - started
        print(f"{scenario.name:16} {calls:4} calls, {kills.count:4} kills in {seconds:.0f} s{found}", flush=True)
        return kills.count, kills.findings

    with ThreadPoolExecutor(options.jobs) as pool:
        done = list(pool.map(one, chosen(options.scenario)))
    count, findings = sum(n for n, _ in done), sum(len(found) for _, found in done)
    if findings:
        sys.exit(f"FAILED: {findings} findings in {count} kills")
    print(f"killed {count} times; nothing lost, the same bytes in the end")


if __name__ == "__main__":
    try:
        main()
    except Unable as reason:
        sys.exit(f"cannot be done here: {reason}")
