"""`Memory`: bytes by what takes them, added up, and the largest of stages that follow one another."""

from __future__ import annotations

from deltamerge.plan.memory import Memory, largest


def test_what_is_held_at_one_time_adds_up_by_name() -> None:
    both = Memory({"process": 5, "tiles": 7}) + Memory({"tiles": 1, "output": 0})
    assert both == Memory({"process": 5, "tiles": 8, "output": 0})
    assert both.total == 13
    assert both.describe() == {"process": 5, "tiles": 8}


def test_of_stages_that_follow_one_another_the_largest_counts() -> None:
    stages = [Memory({"tiles": 3}), Memory({"process": 2, "calibration": 9}), Memory({"routers": 11})]
    assert largest(*stages) is stages[1]
    assert (largest(*stages) + Memory({"tokenizers": 4})).total == 15
