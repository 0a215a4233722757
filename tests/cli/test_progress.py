"""What stderr says of the work: bars on a terminal of any width, lines elsewhere, nothing where it is not wanted."""

from __future__ import annotations

import io
import re
import time

import pytest
import torch
from calls import call
from conftest import make_checkpoint
from rich.console import Console
from terminals import terminal

from deltamerge.cli import progress
from deltamerge.cli.output import tell
from deltamerge.cli.progress import PhaseHistory, State, bars, lasting, line
from deltamerge.files.progress import PASSES, Phase, phase

GB = 10**9


def looked(one: Phase, *steps: tuple[float, float]) -> State:
    """What is said at the last of several times, at each of which so much had been done."""
    seen = PhaseHistory(one)
    for at, done in steps:
        one.done = done
        state = seen.look(one.begun + at)
    return state


# phase, (seconds, done)…, what a line of a log says
SAID = {
    "just begun": (Phase("merging", 10 * GB, "bytes"), [(0.5, 0)], "merging: 0 %, 0 B of 10.0 GB"),
    "too early to tell": (Phase("merging", 10 * GB, "bytes"), [(1.9, 5 * GB)], "merging: 50 %, 5.0 GB of 10.0 GB"),
    "too little to tell": (
        Phase("merging", 10 * GB, "bytes"), [(60, 0.19 * GB)], "merging: 1 %, 190.0 MB of 10.0 GB, 3.2 MB/s",
    ),
    "some": (
        Phase("merging", 10 * GB, "bytes"), [(3, 3 * GB), (4, 4 * GB)],
        "merging: 40 %, 4.0 GB of 10.0 GB, 1.0 GB/s, about 6 s left",
    ),
    "an estimate alone": (
        Phase("merging", 10 * GB, "bytes"), [(4, 4 * GB)], "merging: 40 %, 4.0 GB of 10.0 GB, 1.0 GB/s",
    ),
    "estimates apart": (  # from memory first, then from the disk
        Phase("merging", 10 * GB, "bytes"), [(3, 6 * GB), (9, 6.3 * GB)],
        "merging: 63 %, 6.3 GB of 10.0 GB, 700.0 MB/s",
    ),
    "nothing known": (Phase("reading m.gguf", 0, "tokens"), [(4, 0)], "reading m.gguf …"),
    "resumed": (  # what was there does not count for the rate for long
        Phase("merging", 10 * GB, "bytes"), [(1, 5 * GB), (20.5, 5.195 * GB), (21.5, 5.205 * GB), (22.5, 5.215 * GB)],
        "merging: 52 %, 5.2 GB of 10.0 GB, 10.0 MB/s, about 8 min left",
    ),
    "all": (Phase("merging", 10 * GB, "bytes"), [(4, 10 * GB)], "merging: 100 %, 10.0 GB of 10.0 GB, 2.5 GB/s"),
    "stuck": (Phase("hashing", 10 * GB, "bytes"), [(9, 0)], "hashing: 0 %, 0 B of 10.0 GB"),
    "unknown": (Phase("hashing", 0, "bytes"), [(4, 2 * GB)], "hashing: 2.0 GB of 2.0 GB, 500.0 MB/s"),
    "passes": (
        Phase("calibrating m", 370, PASSES, bound=True), [(20, 20), (41, 41)],
        "calibrating m: 41 of at most 370 passes, at most 5 min left",
    ),
    "a part of a pass": (Phase("running", 370, PASSES, bound=True), [(1, 0.99)], "running: 0 of at most 370 passes"),
    "tensors": (Phase("checking", 12_000, "tensors"), [(1, 1500)], "checking: 12 %, 1,500 of 12,000 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_an_estimate_stands_only_where_it_means_something(case):
    one, steps, wanted = SAID[case]
    assert line(looked(one, *steps)) == wanted


def test_times_are_in_the_units_that_people_use():
    seconds = (0.2, 1.6, 89, 91, 3600, 5399, 5401, 7300, 86_000)
    assert [lasting(s) for s in seconds] == [
        "1 s", "2 s", "89 s", "2 min", "60 min", "1 h 30 min", "1 h 30 min", "2 h", "24 h",
    ]  # fmt: skip


STATES = [
    State("merging", 0.28, "2.8 GB of 10.0 GB", "889.6 MB/s", "about 8 s left"),
    State("calibrating models/math", None, "28 of at most 370 passes", "", "at most 38 s left"),
]
DRAWN = {
    120: [
        "merging                  ━━━━━━╸                   28 %  2.8 GB of 10.0 GB  889.6 MB/s  about 8 s left",
        "calibrating models/math                            28 of at most 370 passes  at most 38 s left",
    ],
    80: [
        "merging                  ━╸      28 %  2.8 GB of 10.0 GB  about 8 s left",
        "calibrating models/math          28 of at most 370 passes  at most 38 s left",
    ],
    40: ["merging        28 %  2.8 GB of 10.0 GB", "calibrating …  28 of at most 370 passes"],
    24: ["merg…  28 %  2.8 GB of…", "cali…  28 of at most 3…"],
}


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)


@pytest.mark.parametrize("width", DRAWN)
def test_bars_fit_the_terminal(width):
    drawn = bars(STATES, console(width))
    assert drawn == DRAWN[width]
    assert all(len(text) < max(columns, 20) for columns in range(140) for text in bars(STATES, console(columns)))


def some_work(said: str | None = None) -> None:
    """A phase of a quarter of a second that nobody has to wait for."""
    with phase("merging", 4 * GB) as one:
        one.step(GB)
        time.sleep(0.15)
        if said:
            tell(said)
        time.sleep(0.05)
        with phase("a short one", 1):
            pass


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.04)
    monkeypatch.setattr(progress, "TICK", 0.02)
    monkeypatch.setattr(progress, "SLOW", 0.01)


COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MOVES = re.compile(r"\r|\x1b\[2K|\x1b\[1A")


@pytest.mark.parametrize("plain", [False, True], ids=["colour", "NO_COLOR"])
def test_a_terminal_shows_a_bar_and_is_left_clean(monkeypatch, quick, plain):
    with terminal(monkeypatch, 100, **({"NO_COLOR": "1"} if plain else {})) as shown:
        with progress.display(quiet=False, machine=True):
            some_work("warning: odd")
        text = shown.read()
    assert bool(COLOUR.search(text)) is not plain
    assert "merging  " in COLOUR.sub("", text)
    assert "25 %  1.0 GB of 4.0 GB" in text
    assert "a short one" not in text
    stays = MOVES.sub("", COLOUR.sub("", re.sub(r"[^\n]*\r\x1b\[2K", "", text)))
    assert stays == "warning: odd\n"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_gets_lines(monkeypatch, quick, term):
    with terminal(monkeypatch, 80, TERM=term) as shown:
        with progress.display(quiet=False, machine=False):
            some_work()
        text = shown.read()
    assert "\x1b" not in text
    assert "\r" not in text
    assert set(text.splitlines()) == {"merging: 25 %, 1.0 GB of 4.0 GB"}


def test_a_file_gets_a_line_now_and_then_unless_it_is_not_wanted(capsys, quick, monkeypatch):
    with progress.display(quiet=False, machine=False):
        some_work()
        lines = capsys.readouterr().err.splitlines()
        assert set(lines) == {"merging: 25 %, 1.0 GB of 4.0 GB"}
        assert len(lines) == 1  # none is repeated
    for quiet, machine in ((True, False), (False, True)):
        with progress.display(quiet=quiet, machine=machine):
            some_work()
        assert capsys.readouterr().err == ""
    with progress.display(quiet=False, machine=False), phase("calibrating ##[error]", 3, PASSES):
        time.sleep(0.1)
    assert "##[" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "EVERY", 10.0)
    with progress.display(quiet=False, machine=False):
        some_work()
    assert capsys.readouterr().err == ""


def test_a_stderr_that_breaks_ends_no_work(monkeypatch, quick):
    with terminal(monkeypatch, 80) as shown:
        shown.hang_up()
        with progress.display(quiet=False, machine=False):
            some_work("warning: nobody reads it")


def test_commands_show_their_phases(capsys, monkeypatch, tmp_path):
    for name in ("EVERY", "SLOW"):
        monkeypatch.setattr(progress, name, 0.0005)
    monkeypatch.chdir(tmp_path)
    weights = {f"layers.{i}.w": torch.ones(64, 512) for i in range(40)}
    make_checkpoint(tmp_path / "base", weights)
    make_checkpoint(tmp_path / "a", {name: tensor + 1 for name, tensor in weights.items()})
    (tmp_path / "r.yaml").write_text("base_model: ./base\nmodels: [{model: ./a}]\n")
    for arguments, name in (
        (("run", "r.yaml", "--out", "out", "--workers", "1"), "merging: "),
        (("verify", "out"), "hashing: "),
        (("inspect", "a", "--base", "base"), "measuring: "),
        (("diff", "a", "base"), "comparing: "),
    ):
        code, _, err = call(capsys, *arguments)
        assert code == 0, err
        assert any(text.startswith(name) for text in err.splitlines()), (arguments, err)
    for more in (("--json",), ("-q",)):
        code, _, err = call(capsys, "run", "r.yaml", "--out", f"out{more[0]}", *more)
        assert (code, err) == (0, "")
