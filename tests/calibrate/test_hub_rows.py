"""Calibration rows of a hub data set: the real `datasets` in processes of their own, against a small hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_bert_pair
from small_hub import COMMIT, Hub, serve

from deltamerge.calibrate.rows import hub as hub_rows
from deltamerge.errors import InputError

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path, Command]]:
    """org/rows with two splits, a pair of models, and deltamerge asking that hub alone."""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    rows = folder / "rows"
    rows.mkdir()
    for part, count in (("train", 40), ("test", 12)):
        lines = [json.dumps({"text": f"w{4 + i} w{9 + i} {part}", "label": i % 2}) for i in range(count)]
        (rows / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    tiny_bert_pair(folder, dtype=torch.float32, sigma=0.05, tokenizer=True)
    with pytest.MonkeyPatch.context() as patch, serve(folder / "cache", patch) as state:
        state.repositories["datasets/org/rows"] = rows

        def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
            asked = {"HF_ENDPOINT": state.endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
            line = [sys.executable, *arguments]
            return subprocess.run(line, env=os.environ | asked | environment, capture_output=True, text=True)

        yield state, folder, command


def recipe(folder: Path, name: str, **calibration: Any) -> str:
    path = folder / f"{name}.yaml"
    content = {
        "base_model": "./base",
        "models": [{"model": "./tuned", "prune": {"method": "magnitude", "density": 0.1, "q": "output_change"}}],
        "calibration": {"data": "org/rows", "sequences": 8, "length": 8, **calibration},
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.slow
def test_a_split_is_read_at_a_commit_which_the_lock_has(hub: tuple[Hub, Path, Command]) -> None:
    state, folder, command = hub
    path = recipe(folder, "run", split="test", data="org/rows@v1")
    done = command("-m", "deltamerge", "run", path, "--out", str(folder / "out"))
    assert done.returncode == 0, done.stderr
    lock = yaml.safe_load((folder / "out" / "recipe.lock").read_text())
    assert lock["inputs"]["calibration data"] == {"files": {}, "commit": COMMIT}
    assert lock["calibration"]["./tuned"]["held_out"]["rows"] == 4  # of 12, 8 are searched on
    assert state.fetched(f"{COMMIT}/test.jsonl")


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "none": ({"data": "org/none"}, "no such file, and no such data set on the hub", ".jsonl, .csv or .txt"),
    "revision": ({"data": "org/rows@v9"}, "has no revision v9", "/datasets/org/rows/tree/main"),
    "split": ({"split": "dev"}, "Bad split: dev", "calibration.split"),
    "config": ({"config": "german"}, "german", "calibration.config"),
    "field": ({"text": "sentence"}, "row 1: no field 'sentence'", "'text', 'label'"),
    "few": ({"sequences": 50}, "40 rows, but 50 needed", "lower sequences"),
}


def test_one_line_says_what_is_wrong(hub: tuple[Hub, Path, Command]) -> None:
    _, folder, command = hub
    paths = [recipe(folder, name, **calibration) for name, (calibration, _, _) in WRONG.items()]
    done = command("-m", "deltamerge", "check", *paths, recipe(folder, "good"))
    assert done.returncode == 1
    *lines, good = (line for line in done.stderr.splitlines() if ": note: " not in line)
    assert "good.yaml: ok" in good
    assert len(lines) == 2 * len(WRONG)
    for (_, message, hint), first, second in zip(WRONG.values(), lines[::2], lines[1::2], strict=True):
        assert message in first
        assert hint in second


@pytest.mark.slow
def test_offline_takes_what_datasets_has_cached(hub: tuple[Hub, Path, Command]) -> None:
    _, folder, command = hub
    path = recipe(folder, "offline")
    missing = command("-m", "deltamerge", "check", path, HF_HUB_OFFLINE="1")
    assert missing.returncode == 1
    assert "HF_HUB_OFFLINE is set" in missing.stderr
    assert command("-c", "import datasets; datasets.load_dataset('org/rows')").returncode == 0
    cached = command("-m", "deltamerge", "check", path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert cached.returncode == 0, cached.stderr


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the datasets package") as caught:
        hub_rows.read_hub("org/other", config=None, split="train", limit=1)
    assert "deltamerge[data]" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["text", "csv", "pandas", "../rows", "org/rows/more", "org/..", "https://a/b"])
def test_names_that_are_no_hub_id_never_reach_datasets(name: str) -> None:
    assert not hub_rows.is_hub_id(name)
