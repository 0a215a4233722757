"""Figures go to a tracker as they come: by a recorder in the library's place, and by Trackio where it is."""

from __future__ import annotations

import json
import sqlite3
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from calibration_rows import rows
from calls import call
from conftest import load_tensors, tiny_bert_pair

from deltamerge import DeltaWriter
from deltamerge.apps.track import place_of, plain_figures
from deltamerge.errors import UsageError

RECIPE = """\
base_model: ./base
models:
  - {model: ./tuned, name: math, parameters: {weight: %s}}
calibration: {data: calib.jsonl, sequences: 4, length: 12}
study: {objective: accuracy, trials: 3}
"""


class Recorder(ModuleType):
    """A library with the calls of Trackio and Weights & Biases, which keeps what it is given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # transformers looks for it
        self.runs: list[Recorder] = []
        self.steps: list[tuple[int, dict[str, Any]]] = []
        self.told: dict[str, Any] = {}
        self.finished = self.breaks = False

    def init(self, **told: Any) -> Recorder:
        print("noise that no result may have")
        made = Recorder("run")
        made.told, made.breaks = told, self.breaks
        self.runs.append(made)
        return made

    def log(self, figures: dict[str, Any], step: int) -> None:
        if self.breaks:
            raise ConnectionError("no network\nat all")
        self.steps.append((step, figures))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_bert_pair(tmp_path, dtype=torch.float32, tokenizer=True)
    rows(tmp_path / "calib.jsonl", 8)
    monkeypatch.chdir(tmp_path)
    for name, value in (("plain", "0.5"), ("swept", "{sweep: [0.5, 1.0]}"), ("open", "{search: [0, 1]}")):
        Path(f"{name}.yaml").write_text(RECIPE % value)
    return tmp_path


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_every_command_logs_its_figures(folder: Path, recorder: Recorder, capsys) -> None:
    for words in (
        ("run", "plain.yaml", "--track", "wandb:merges"),
        ("sweep", "swept.yaml", "--track", "wandb"),
        ("search", "open.yaml", "--track", "wandb"),
        (
            "eval",
            "tuned",
            "plain-merged",
            "--head",
            "tuned",
            "--calibration",
            "calib.jsonl",
            "--length",
            "12",
            "--track",
            "wandb",
        ),
    ):
        code, out, err = call(capsys, *words, "--json")
        assert code == 0, err
        json.loads(out)
    merge, sweep, search, first, second = recorder.runs
    assert all(run.finished for run in recorder.runs)
    assert (merge.told["project"], merge.told["name"]) == ("merges", "run plain")
    assert merge.told["config"]["models"][0]["name"] == "math"
    steps = [step for step, _ in merge.steps]
    assert steps == sorted(set(steps))
    assert merge.steps[-1][0] == 100
    assert merge.steps[-1][1]["bytes"] == sum(
        tensor.nbytes for tensor in load_tensors(folder / "plain-merged").values()
    )
    assert [(step, one["value/models[0].parameters.weight"]) for step, one in sweep.steps] == [(0, "0.5"), (1, "1.0")]
    found = json.loads((folder / "open-search" / "study.json").read_text())
    for (step, one), trial in zip(search.steps, found["trials"], strict=False):
        assert step == trial["number"]
        assert one["mean accuracy"] == trial["objectives"][0]
        assert one["score/math/accuracy"] == trial["scores"]["math"]["accuracy"]
    assert search.steps[-1][1]["best/trial"] == found["best"]
    assert (first.told["name"], second.told["name"]) == ("tuned", "plain-merged")
    assert 0 <= second.steps[0][1]["accuracy"] <= 1
    # a study and a sweep that go on log what they have
    for words in (("sweep", "swept.yaml"), ("search", "open.yaml")):
        assert call(capsys, *words, "--track", "wandb", "--quiet")[0] == 0
    assert recorder.runs[-2].steps == sweep.steps
    assert recorder.runs[-1].steps == search.steps


def test_a_tracker_that_fails_later_ends_no_work(folder: Path, recorder: Recorder, capsys) -> None:
    recorder.breaks = True
    code, _, err = call(capsys, "run", "plain.yaml", "--track", "wandb")
    assert code == 0
    assert "warning: --track wandb: nothing more is logged: no network\n" in err
    assert load_tensors(folder / "plain-merged")


def test_an_absent_tracker_is_named_with_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    code, out, err = call(capsys, "run", "plain.yaml", "--track", "trackio")
    assert (code, out) == (1, "")
    assert "Trackio is not installed" in err
    assert "pip install 'deltamerge[trackio]'" in err
    assert not Path("plain-merged").exists()
    code, _, err = call(capsys, "run", "plain.yaml", "--track", "tensorboard")
    assert (code, "trackio or wandb" in err) == (2, True)


def test_figures_are_numbers_and_words() -> None:
    given = {"": {"a": 1.5}, "b": {"c": {"d": 2}}, "e": float("nan"), "f": [1], "g": "text", "h": None}
    assert plain_figures(given) == {"a": 1.5, "b/c/d": 2, "g": "text"}
    assert place_of("wandb:x:y") == ("wandb", "x:y")
    with pytest.raises(UsageError, match="is no tracker"):
        place_of("mlflow")


def test_a_chain_logs_each_version(folder: Path) -> None:
    seen: list[dict[str, Any]] = []
    state = load_tensors(folder / "base")
    with DeltaWriter(folder / "chain", base=folder / "base", log=seen.append) as writer:
        for _ in range(2):
            name = next(name for name, tensor in state.items() if tensor.is_floating_point())
            state = {**state, name: state[name] + 1}
            writer.write(state)
    assert [one["delta/version"] for one in seen] == [1, 2]
    assert seen[0]["delta/changed"] == state[name].numel()
    assert seen[0]["delta/bytes"] > 0


def test_trackio_itself_keeps_what_a_sweep_logs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    pytest.importorskip("trackio")
    code, out, err = call(capsys, "sweep", "swept.yaml", "--track", "trackio:toys", "--json")
    assert code == 0, err
    found = json.loads(out)
    with sqlite3.connect(folder / "trackio" / "toys.db") as kept:
        logged = kept.execute("select step, metrics from metrics order by step").fetchall()
    assert [json.loads(one)["mean accuracy"] for _, one in logged] == [row["objectives"][0] for row in found["rows"]]
