"""Learned scales: they near known ones, stay in bounds, and stop when held-out data no longer improves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import batches, make

from deltamerge.calibrate.model.blocks import BlockModel
from deltamerge.calibrate.model.candidates import pruned
from deltamerge.calibrate.q.learned import Learned, Learner, learn, row_shape
from deltamerge.calibrate.q.objectives import Distribution, evaluate

BERT = "BertForSequenceClassification"


class Problem:
    """A fine-tune that *is* base + masked / truth for a known q of every tensor or row of its linear layers."""

    def __init__(
        self, folder: Path, architecture: str = "BertForSequenceClassification", *, rows: bool = False
    ) -> None:
        _, self.base = make(architecture, folder)
        self.model = BlockModel(transformers.AutoConfig.from_pretrained(folder), self.base)
        self.layers = {layer.name: layer for part in self.model.layers[1:] for layer in part}
        generator = torch.Generator().manual_seed(5)
        drawn = {n: torch.randn(self.base[n].shape, generator=generator) for n in self.layers}
        self.masked = {n: z * (z.abs() > 1.0) for n, z in drawn.items()}
        shapes = {n: row_shape(layer, self.base[n].shape) if rows else () for n, layer in self.layers.items()}
        self.truth = {n: 1.5 + 3.0 * torch.rand(shape, generator=generator) for n, shape in shapes.items()}
        self.start: dict[str, Any] = {n: torch.full(shape, 3.0) for n, shape in shapes.items()}
        self.tune = pruned(self.base.__getitem__, self.masked.get, self.truth)
        self.objective = Distribution.of(self.model, self.tune, batches(architecture) * 2)

    def learn(self, **options: Any) -> Learned:
        settings: dict[str, Any] = {"groups": [[0, 1]], "held_out": [2, 3], "bounds": (0.5, 10.0), **options}
        learner = Learner(self.model, self.objective, self.base.__getitem__, self.masked.get)
        return learn(learner, self.start, **settings)

    def loss(self, q: Any) -> float:
        return evaluate(self.model, self.objective, [pruned(self.base.__getitem__, self.masked.get, q)])[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", [BERT, "GPT2LMHeadModel"])
@pytest.mark.parametrize("rows", [False, True])
def test_the_divergence_falls(architecture: str, rows: bool, tmp_path: Path) -> None:
    problem = Problem(tmp_path, architecture, rows=rows)
    found = problem.learn(steps=30, patience=30)
    assert found.step > 0
    assert found.q.keys() == problem.layers.keys()
    assert all(found.q[n].shape == problem.truth[n].shape for n in found.q)
    assert problem.loss(problem.truth) < 1e-6
    assert problem.loss(found.q) < 0.3 * problem.loss(problem.start)
    assert dict(found.path)[0] == pytest.approx(problem.loss(problem.start), rel=1e-5)
    assert dict(found.path)[found.step] == min(value for _, value in found.path)
    assert problem.loss(found.q) == pytest.approx(dict(found.path)[found.step], rel=1e-5)


def test_is_deterministic(tmp_path: Path) -> None:
    problem = Problem(tmp_path)
    one, two = problem.learn(steps=4), problem.learn(steps=4)
    assert one.path == two.path
    assert all(torch.equal(one.q[n], two.q[n]) for n in one.q)


def test_bounds_hold(tmp_path: Path) -> None:
    found = Problem(tmp_path).learn(steps=20, bounds=(2.9, 3.1), lr=0.5)
    for q in found.q.values():
        assert 2.9 * (1 - 1e-6) <= float(q) <= 3.1 * (1 + 1e-6)


def test_stops_and_keeps_the_start_when_nothing_is_better(tmp_path: Path) -> None:
    problem = Problem(tmp_path)
    problem.start = problem.truth
    found = problem.learn(steps=40, lr=0.5, patience=2)
    assert found.step == 0
    assert len(found.path) == 3
    assert found.steps == 2
    assert all(torch.allclose(found.q[n], problem.truth[n]) for n in found.q)


def test_batches_of_a_group_add_up_to_one_step(tmp_path: Path) -> None:
    """Two batches of a group give the q's that one batch of all their sequences gives."""
    problem = Problem(tmp_path)
    apart = problem.learn(steps=3, groups=[[0, 1]])
    one, two = problem.objective.batches[:2]
    longer = {key: torch.nn.functional.pad(value, (0, 2)) for key, value in two.items()}
    problem.objective = Distribution.of(
        problem.model, problem.tune, [{key: torch.cat([one[key], longer[key]]) for key in one}, one, two]
    )
    together = problem.learn(steps=3, groups=[[0]], held_out=[1, 2])
    for name, q in apart.q.items():
        torch.testing.assert_close(q, together.q[name], rtol=1e-3, atol=0.0)
