"""What an experiment is, what it may keep from run to run, and how its result becomes a file and a page."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.process import surroundings
from benchmarks.pruning.quality import spread

__all__ = ["Experiment", "Record", "Setting", "spread", "table"]

WORK = ROOT / ".paper"  # fine-tunes and single measurements; safe to delete
RECORDS = RESULTS / "paper"
PAGE = ROOT / "docs" / "measurements" / "paper.md"
PLOTS = PAGE.with_suffix("")
LOG = Path(__file__).with_name("log.md")

Record = dict[str, Any]  # JSON


class NotKept(Exception):
    """Something that an experiment may only take from earlier runs is not there."""


@dataclass(frozen=True)
class Experiment:
    """A table or figure: `run` measures a JSON record, `show` makes Markdown of it, `draw` a PNG.

    `show` has the paper's rows beside ours. `minutes` are those of one processor, at full scale, nothing kept.
    """

    name: str  # "table-1", "fig-2", "merging"
    title: str
    run: Callable[[Setting], Record]
    show: Callable[[Record], str]
    minutes: float
    draw: Callable[[Record, Path], None] | None = None


@dataclass
class Setting:
    """How an experiment is run: at `toy` scale it takes seconds and its numbers mean nothing.

    `once` and `folder` keep what they make in `work`, by what it was made of, so that experiments share it and
    one that was stopped goes on. With `again`, values that an earlier run measured are measured anew, once; with
    `kept_only` nothing is made, and what lacks raises NotKept, which an experiment may catch to leave a cell empty.
    """

    toy: bool = False
    seed: int = 0
    work: Path = WORK
    again: bool = False
    kept_only: bool = False
    kept: dict[str, float] = field(default_factory=dict)  # path -> CPU seconds it cost when it was made
    lacking: int = 0  # what `kept_only` did not find
    _measured: set[Path] = field(default_factory=set)
    _inner: float = 0.0  # CPU seconds of what was made inside the thing being made

    def pick(self, full: Any, toy: Any) -> Any:
        """The first at full scale, the second at toy scale."""
        return toy if self.toy else full

    def once(self, name: str, made_of: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The JSON value `measure` returns; `made_of` (JSON) has everything it depends on but the code."""
        path = self._path(name, made_of, ".json")
        if not path.exists() or (self.again and path not in self._measured):
            with self._making(path) as cost:
                value = measure()
            self._measured.add(path)
            text = json.dumps({"made_of": made_of, "cpu_s": cost[0], "value": value}, indent=1)
            _write(path, text)
            print(f"{name} {json.dumps(value)[:150]}", file=sys.stderr, flush=True)
        kept = json.loads(path.read_text(encoding="utf-8"))
        self.kept[str(path)] = kept["cpu_s"]
        return kept["value"]

    def folder(self, name: str, made_of: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """A folder that `make` creates at the path it is given, a fine-tune for one."""
        path = self._path(name, made_of, "")
        cost_file = path.with_name(f"{path.name}.cost.json")
        if not (path.exists() and cost_file.exists()):
            shutil.rmtree(path, ignore_errors=True)
            with self._making(path) as cost:
                make(path)
            _write(cost_file, json.dumps({"made_of": made_of, "cpu_s": cost[0]}, indent=1))
        self.kept[str(path)] = json.loads(cost_file.read_text(encoding="utf-8"))["cpu_s"]
        return path

    def _path(self, name: str, made_of: Mapping[str, Any], suffix: str) -> Path:
        key = json.dumps([name, made_of, self.toy, self.seed], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.work / ("folders" if not suffix else "values") / f"{name.replace('/', '-')}-{digest}{suffix}"

    @contextmanager
    def _making(self, path: Path) -> Iterator[list[float]]:
        if self.kept_only:
            self.lacking += 1
            raise NotKept(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        before, self._inner, start, cost = self._inner, 0.0, time.process_time(), [0.0]
        yield cost
        spent = time.process_time() - start
        cost[0] = round(spent - self._inner, 2)
        self._inner = before + spent


def measure(experiment: Experiment, setting: Setting) -> Record:
    """Run it; the record with how, when, where and for how long.

    `cpu_s` counts what was kept from earlier runs at what it cost then; `cpu_s_now` is this run's.
    """
    setting.kept.clear()
    setting._inner, setting.lacking = 0.0, 0
    wall, cpu = time.perf_counter(), time.process_time()
    record = experiment.run(setting)
    now = time.process_time() - cpu
    about = surroundings({"python": sys.executable})
    return about | {
        "name": experiment.name,
        "command": _command(experiment.name, setting.seed, toy=setting.toy),
        "scale": "toy" if setting.toy else "full",
        "seed": setting.seed,
        "lacking": setting.lacking,
        "seconds": {
            "wall_now": round(time.perf_counter() - wall, 1),
            "cpu_now": round(now, 1),
            "cpu": round(now - setting._inner + sum(setting.kept.values()), 1),
        },
        "kept": {Path(path).name: cost for path, cost in setting.kept.items()},  # CPU seconds of `cpu`
        "record": record,
    }


def result_file(experiment: Experiment, results: Path) -> Path:
    return results / f"{experiment.name}.json"


def finished(experiment: Experiment, results: Path) -> bool:
    """Whether it has a result in which nothing lacks."""
    result = _read(experiment, results)
    return result is not None and not result.get("lacking")


def save(experiment: Experiment, result: Record, results: Path) -> None:
    _write(result_file(experiment, results), json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def report(experiments: Iterable[Experiment], results: Path = RECORDS, page: Path = PAGE) -> None:
    """Write the page and its plots from the result files; experiments without one are named as missing."""
    experiments = list(experiments)
    plots = page.with_suffix("")
    for experiment in experiments:
        if experiment.draw and (result := _read(experiment, results)):
            plots.mkdir(parents=True, exist_ok=True)
            experiment.draw(result["record"], plots / f"{experiment.name}.svg")
    _write(page, markdown(experiments, results))


HEAD = """\
# The paper's experiments, scaled down

Written by `python -m benchmarks.paper --report` from `benchmarks/results/paper/*.json`, which have the command, commit,
seed, machine and versions of each. `python -m benchmarks.paper all` measures everything again, `table-1 fig-2` a part,
`--list` tells what there is. The paper is Deng et al., *DARE the Extreme*, ICLR 2025, arXiv 2410.09344.

**Read this first.** The paper fine-tunes BERT-base, RoBERTa-base and decoders of 0.5 to 13 B parameters on GLUE and
GSM8K; these are small models and other tasks, trained for a minute on a processor, one run each. So the paper's figures
stand beside ours to compare *which method keeps what*, never digit for digit. "q_v" and "q_e" are
`q: validation` and `q: output_change`; ± is the standard deviation over random masks, their number in brackets.

The encoder is MiniLM cut to three layers (12.8 M parameters); its tasks are sentiment (two classes, accuracy),
intensity (a regression, the mean of Pearson's and Spearman's correlation) and domain (four classes, accuracy);
160 steps of 16 rows, scored on the first 400 test rows, so that a point or two means nothing. q is calibrated on
at most 100 validation rows of 32 tokens, with two masks. The decoder is SmolLM2-135M, fine-tuned to a task of
reasoning-gym (`make decoder`); the ViT has learned half of Fashion-MNIST before it is fine-tuned to the other half.
"""


def markdown(experiments: Sequence[Experiment], results: Path = RECORDS) -> str:
    """The page, without its plots."""
    parts, missing, found = [HEAD], [], []
    for experiment in experiments:
        result = _read(experiment, results)
        if not result:
            missing.append(experiment.name)
            continue
        found.append(result)
        parts.append(f"## {experiment.title}\n\n{experiment.show(result['record']).strip()}\n")
        if experiment.draw:
            parts.append(f"![{experiment.title}]({PLOTS.name}/{experiment.name}.svg)\n")
        cost = result["seconds"]["cpu"] / 60
        if result.get("lacking"):
            parts.append("**Not finished**: what is empty above, or left out, was not measured.\n")
        command = _command(result["name"], result["seed"], toy=result["scale"] == "toy")
        note = f"`{command}` at {result['commit'][:9]}: {cost:.1f} CPU minutes with all that it shares."
        parts.append(f"{note}\n")
    if found:
        machines = {f"{r['machine']['cpu']} ({r['machine']['cores']} cores, one thread)" for r in found}
        about = f"Measured on {'; '.join(sorted(machines))}. CPU minutes are of training and measuring:"
        parts.insert(1, f"{about} {_minutes(found):.0f} in all, what experiments share counted once.\n")
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.\n")
    if LOG.exists():
        parts.append(LOG.read_text(encoding="utf-8"))
    return "\n".join(parts).rstrip() + "\n"


def _command(name: str, seed: int, *, toy: bool) -> str:
    return f"python -m benchmarks.paper {name}" + " --toy" * toy + f" --seed {seed}"


def _minutes(results: Iterable[Record]) -> float:
    """CPU minutes of them all; what several have kept counts once."""
    own, shared = 0.0, dict[str, float]()
    for result in results:
        own += result["seconds"]["cpu"] - sum(result.get("kept", {}).values())
        shared |= result.get("kept", {})
    return (own + sum(shared.values())) / 60


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell, a float has one decimal."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _read(experiment: Experiment, results: Path) -> Record | None:
    path = result_file(experiment, results)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
