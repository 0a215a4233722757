"""What each test costs: `pytest -p costs` prints seconds of the processor, those of processes it started included.

`make costs` runs it. It ends with the lines that costly.txt should have: a test of one case above SINGLE seconds, or of
several above SEVERAL together, of which every n-th case is left. They are to be weighed: a test that alone looks at
something important stays quick, and a test that another one covers need not.
"""

from __future__ import annotations

import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest

SINGLE, SEVERAL, CASE = 0.22, 0.12, 0.8  # seconds of all of a test, of all its cases, and of the case that is left
SHOWN = 40

seconds: dict[str, float] = defaultdict(float)
cases: dict[str, list[float]] = defaultdict(list)


def used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = used()
    try:
        return (yield)
    finally:
        spent = used() - before
        seconds[item.nodeid.partition("::")[0]] += spent
        cases[f"{item.path.name}::{item.name.partition('[')[0]}"].append(spent)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    before = used()
    try:
        return (yield)
    finally:
        if isinstance(collector, pytest.Module):
            seconds[collector.nodeid] += used() - before


def every(costs: list[float]) -> int:
    """The n of costly.txt; 1: the test is quick."""
    if len(costs) == 1:
        return int(costs[0] <= SINGLE)
    n = min(math.ceil(sum(costs) / SEVERAL), len(costs))
    return n if sum(costs[::n]) <= CASE else 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    say = terminalreporter.write_line
    say(f"{used():.0f} s of the processor in all; by file:")
    for file, spent in sorted(seconds.items(), key=lambda pair: -pair[1])[:SHOWN]:
        say(f"{spent:7.1f} {file}")
    say("costly.txt would have:")
    for test, costs in sorted(cases.items()):
        if every(costs) != 1:
            say(f"{test} {every(costs)}")
