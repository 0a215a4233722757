"""Work that several devices share adds up in one order, and weights that are read ahead on a thread change nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_rows import rows
from conftest import tiny_llama
from running import calibrate
from test_stage import RUNS, recipe

from deltamerge.calibrate.model.blocks import BlockModel
from deltamerge.calibrate.model.devices import Ahead, ShareStop, add_gradients, in_turns, spread
from deltamerge.calibrate.model.passes import stored
from deltamerge.calibrate.q import subject

LAYERS = 4


@dataclass(frozen=True)
class Place:
    number: int

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_jobs_go_in_turns_and_their_gradients_are_added_in_order(count: int) -> None:
    """Numbers whose sum depends on the order: each job's own gradient is rounded, and then added to those before."""
    places = [Place(i) for i in range(count)]
    jobs = [1e8, 1.0, -1e8, 3.0, 0.25]
    assert list(in_turns(places, jobs, lambda place, job: (place.number, job))) == [
        (i % count, job) for i, job in enumerate(jobs)
    ]
    leaves = [torch.zeros((), requires_grad=True), torch.zeros(2, requires_grad=True), torch.zeros(1)]

    def descend(place: Place, job: float, copies: list[torch.Tensor]) -> None:
        for factor in (0.5, 0.5):  # two batches of a job
            (factor * job * (copies[0] + copies[1].sum())).backward()

    add_gradients(leaves, places, jobs, descend)
    wanted = torch.zeros((), dtype=torch.float32)
    for job in jobs:
        wanted = wanted + torch.tensor(job, dtype=torch.float32)
    assert float(wanted) != sum(jobs)
    assert torch.equal(leaves[0].grad, wanted)
    assert torch.equal(leaves[1].grad, wanted.expand(2))
    assert leaves[2].grad is None


def test_what_fails_in_one_place_is_raised() -> None:
    def work(place: Place, job: int) -> int:
        if job == 1:
            raise ValueError("no")
        return job

    with pytest.raises(ValueError, match="no"):
        list(in_turns([Place(0), Place(1)], range(4), work))


def test_a_failed_share_stops_the_others() -> None:
    stop = threading.Event()

    def work(place: Place, share: Sequence[int]) -> list[int]:
        if place.number == 1:
            raise ValueError("no")
        assert stop.wait(20)
        raise ShareStop

    with pytest.raises(ValueError, match="no"):
        spread([Place(0), Place(1)], range(2), work, stop)


def test_the_next_block_is_read_while_a_block_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base", seed=0, layers=LAYERS, dtype=torch.float32)
    tiny_llama(tmp_path / "tuned", seed=1, layers=LAYERS, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl")
    path = recipe(tmp_path, "r", RUNS["global"])
    with monkeypatch.context() as without:
        without.setattr(Ahead, "begin", lambda self, infos: None)
        plain = calibrate(path)

    begun = {i: threading.Event() for i in range(LAYERS)}
    threads, ended = set(), []
    block = BlockModel.block

    def read(reader: Any, info: Any) -> torch.Tensor:
        words = info.name.split(".")
        if words[1] == "layers":
            begun[int(words[2])].set()
        threads.add(threading.current_thread().name)
        return stored(reader, info)

    def computed(self: BlockModel, i: int, *rest: Any) -> None:
        block(self, i, *rest)
        begun[i].clear()
        if i + 1 < LAYERS:
            ended.append(begun[i + 1].wait(10))

    monkeypatch.setattr(subject, "stored", read)
    monkeypatch.setattr(BlockModel, "block", computed)
    assert calibrate(path) == plain
    assert threads == {"MainThread", "read-ahead_0"}
    assert all(ended)
    assert len(ended) > 2 * (LAYERS - 2)
