"""Phases of work: who hears of them, for whom a thread works, and that what commands count adds up."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import tiny_bert_pair
from running import calibrate, run

from deltamerge.apps.chain import extract
from deltamerge.apps.inspect import study
from deltamerge.apps.recommend.prune import recommend_prune
from deltamerge.calibrate.spec import WALKED
from deltamerge.files import progress
from deltamerge.files.hashes import PIECE_BYTES, Pieces, damages, hash_output, seal
from deltamerge.files.progress import BYTES, PASSES, Phase, heard, here, joined, phase
from deltamerge.run import apply, hashes
from deltamerge.run.lock import verify


class Heard:
    """Remembers every phase, and those that are open."""

    def __init__(self) -> None:
        self.all: list[Phase] = []
        self.open: list[Phase] = []

    def begun(self, one: Phase) -> None:
        self.all.append(one)
        self.open.append(one)

    def ended(self, one: Phase) -> None:
        self.open.remove(one)

    def named(self, name: str) -> list[Phase]:
        return [one for one in self.all if one.name.startswith(name)]


@pytest.fixture
def said():
    found = Heard()
    with heard(found):
        yield found
    assert found.open == []
    assert progress._here.phases == []


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    tiny_bert_pair(folder, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows = [json.dumps({"text": " ".join(f"w{(7 * i + j) % 90 + 4}" for j in range(6))}) for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "r.yaml").write_text(
        "base_model: ./base\nmodels: [{model: ./tuned, prune: {method: dare, density: 0.3, q: output_change}}]\n"
        "calibration: {data: rows.jsonl, length: 8, sequences: 8, seeds: 1}\n"
    )
    return folder


def test_a_step_counts_for_the_phase_that_its_thread_works_for(said):
    here().step(3)  # nobody's
    with phase("a", 10) as a:
        here().step(2)
        here(PASSES).step(5)
        with phase("b", 4, PASSES, bound=True) as b:
            here(PASSES).step()
            here(BYTES).step(7)  # is not the outer phase's
        threading.Thread(target=lambda: here().step(9)).start()

        def work(_: int) -> None:
            with joined(a):
                here().step()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(2000)))
        a.skip(4)
    assert [(one.name, one.done, one.total, one.bound) for one in (a, b)] == [
        ("a", 2002, 6, False),
        ("b", 1, 4, True),
    ]
    assert said.all == [a, b]


def test_a_walk_through_the_blocks_is_told_block_by_block_until_it_is_counted(models, tmp_path, monkeypatch):
    told: list[float] = []
    monkeypatch.setattr(Phase, "begin", lambda self, count: told.append(count))
    monkeypatch.setattr(Phase, "step", lambda self, count=1.0: told.append(count) if self.unit == PASSES else None)
    monkeypatch.setattr("deltamerge.calibrate.q.choices.HARDLY_LESS", math.inf)  # so that a model of the change finds q
    calibrate(models / "r.yaml")
    assert len(told) > 20
    walks = [*zip(told[::3], told[1::3], told[2::3], strict=True)]  # after each of 2 blocks, and when it is counted
    assert all(walk == pytest.approx((walk[2] / 3, 2 * walk[2] / 3, walk[2])) for walk in walks)
    # candidates on a quarter of the rows, 3 on all, 1
    assert {WALKED / 4, 3, 1} <= {counted for *_, counted in walks}
    one = Phase("a", 10, PASSES)
    monkeypatch.undo()
    one.begin(2.5)
    assert (one.done, one.reached) == (0, 2.5)
    one.step(4)
    assert (one.done, one.reached) == (4, 4)


def test_a_phase_ends_when_its_work_fails_and_without_a_listener_nothing_is_heard(said):
    with pytest.raises(ZeroDivisionError), phase("a", 1):
        raise ZeroDivisionError
    assert said.open == []
    inner = Heard()
    with heard(inner), phase("b", 1):
        pass
    assert ([one.name for one in said.all], [one.name for one in inner.all]) == (["a"], ["b"])


def test_hashing_counts_every_byte_that_is_read_and_no_other(said, tmp_path):
    sizes = {"a": 3 * PIECE_BYTES + 5, "b": 0, "c": 1, "d": PIECE_BYTES}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    paths = [tmp_path / name for name in sizes]
    for hash_file in (hash_output, hashes.hash_input):
        hashes.describe_files(paths, 2, hash_file)
    known = Pieces()
    known.of(paths[0]).there[1] = True
    with phase("some", sum(sizes.values())):
        for path in paths:
            hashes.learn_pieces(path, known, [(2 * PIECE_BYTES, 3 * PIECE_BYTES)])
    whole = sum(sizes.values())
    left = whole - 2 * PIECE_BYTES
    assert [(one.done, one.total) for one in said.all] == [(whole, whole), (whole, whole), (left, left)]
    entries = {path.name: {"hash": hash_output(path), "size": path.stat().st_size} for path in paths}
    assert damages(tmp_path, entries, {"a": seal(paths[0])}, 2) == {}
    assert (said.all[-1].done, said.all[-1].total) == (whole - sizes["a"], whole - sizes["a"])


def test_a_run_says_how_far_each_of_its_phases_is(said, models, tmp_path):
    done = run(models / "r.yaml", tmp_path / "out")
    (calibrating,), (merging,), (inputs,) = map(said.named, ("calibrating", "merging", "hashing inputs"))
    (stage,), (record,) = done.plan.describe()["stages"], done.lock["calibration"].values()
    assert (calibrating.unit, calibrating.bound, calibrating.total) == (PASSES, True, stage["forward_passes"])
    assert record["forward_passes"] - 1 < calibrating.done <= record["forward_passes"] <= calibrating.total
    assert merging.done == merging.total == done.plan.made_bytes
    assert inputs.done == inputs.total
    verify(done.folder, 2)
    assert said.all[-1].name == "hashing"
    assert said.all[-1].done == said.all[-1].total == sum(e["size"] for e in done.lock["outputs"].values())
    assert all(one.done <= one.total for one in said.all)


def test_inspect_recommend_extract_and_apply_say_how_far_they_are(said, models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    rows = {"data": "rows.jsonl", "sequences": 8, "length": 8}
    study.inspect("tuned", "base", calibration=rows)
    told: list[float] = []
    with monkeypatch.context() as watched:
        watched.setattr(Phase, "begin", lambda self, count: told.append(count))
        recommend_prune("tuned", "base", 0.3, calibration=rows)
    assert {8 / 3, 16 / 3} <= {*told}  # of a walk of 8 candidates over all rows, after each of 2 blocks
    extract.extract("tuned", "base", tmp_path / "delta")
    apply.apply(str(tmp_path / "delta"), "base", tmp_path / "again", workers=2)
    for name, exact in {
        "measuring activations of tuned": True,
        "measuring": True,
        "trying masks of tuned": False,
        "merging": True,
        "applying": True,
    }.items():
        one = said.named(name)[-1]
        assert 0 < one.done <= one.total, one
        assert not exact or one.bound or one.done == one.total, one
    (tried,) = said.named("trying")
    assert tried.done > 20
