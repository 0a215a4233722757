"""`search --ray`: candidates judged by actors of a cluster, one of them killed."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_rows import rows
from conftest import tiny_bert_pair

from deltamerge.apps.search.search import Pool, pool_of, search
from deltamerge.errors import InputError
from deltamerge.recipe.file import read_template
from deltamerge.run.options import Options
from deltamerge.run.ray import connected

RECIPE = """\
base_model: ./base
models:
  - {model: ./tuned, name: a, parameters: {weight: {search: [0, 2]}}}
calibration: {data: calib.jsonl, sequences: 8, length: 12}
study: {trials: 8, together: 2, sampler: random}
"""

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray: make ray")


@pytest.mark.slow
@needs_ray
@pytest.mark.filterwarnings("ignore")  # of ray itself
def test_actors_find_what_one_process_does_and_one_may_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bert_pair(tmp_path, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl", 24)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    file, options = read_template(path), Options(device="cpu", workers=1)
    alone = search(file, options, tmp_path / "alone")
    killed: list[int] = []
    original = Pool.measure

    def murderous(self: Pool, some: Any, part: Any) -> Any:
        if len(self.actors) and not killed:
            pid = self.ray.get(self.actors[0].pid.remote())
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return original(self, some, part)

    monkeypatch.setattr(Pool, "measure", murderous)
    spread = search(file, options, tmp_path / "spread", ray="local")
    assert killed
    assert [t.outcome.values for t in spread.trials] == [t.outcome.values for t in alone.trials]
    assert spread.chosen.params == alone.chosen.params
    monkeypatch.undo()
    path.write_text(RECIPE.replace("random", "tpe"))
    file, cores = read_template(path), Options(device="cpu", workers=os.cpu_count())  # all for one worker
    alone = search(file, cores, tmp_path / "alone-tpe")
    one = search(file, cores, tmp_path / "one-tpe", ray="local")
    assert [(t.params, t.outcome.values) for t in one.trials] == [(t.params, t.outcome.values) for t in alone.trials]
    with pool_of(file, options, None, commands=False) as none:
        assert none is None


@pytest.mark.slow
@needs_ray
def test_a_cluster_that_is_too_slow_to_start_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def late(**_: Any) -> None:  # what ray raises after 30 s, of no class of its own
        raise Exception("The current node timed out during startup. This could happen because it is overloaded.")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(InputError, match="no cluster to use: The current node timed out"), connected("local"):
        pass
