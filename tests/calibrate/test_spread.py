"""Work that several devices share: the same sums, in the same order, whatever their number."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from deltamerge.calibrate.model.devices import add_gradients, in_turns


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
