"""Weights are read ahead on a thread: the next block's reads begin before a block ends, and change nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_rows import rows
from conftest import tiny_llama
from running import calibrate
from test_stage import RUNS, recipe

from deltamerge.calibrate.model.blocks import BlockModel
from deltamerge.calibrate.model.devices import Ahead
from deltamerge.calibrate.model.passes import stored
from deltamerge.calibrate.q import subject

LAYERS = 4


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
