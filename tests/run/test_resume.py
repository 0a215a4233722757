"""Runs that are interrupted and go on, that write in parts, that meet NaN: the same bytes, or a clear refusal."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import call
from conftest import make_checkpoint
from interrupted import RECIPE, Stop, calibrated, earlier, files, models
from running import finish, make_plan, run

from deltamerge.engine import kernels
from deltamerge.errors import InputError, OutputError, UsageError
from deltamerge.files.journal import Journal, check_facts, read_journal
from deltamerge.files.work_folder import mark
from deltamerge.formats import safetensors as writer
from deltamerge.formats.audit import INFINITY, count_nonfinite
from deltamerge.formats.delta import tensor_writer as spool
from deltamerge.formats.delta.tensor_writer import TensorWriter
from deltamerge.plan.planner import Plan
from deltamerge.run.lock import verify
from deltamerge.run.partition import Part
from deltamerge.tensors.dtypes import ITEMSIZE, torch_dtype


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("resume")
    models(folder)

    def write(method: str = "dare_ties", shard: str = "250KB") -> Path:
        path = folder / f"{method}-{shard}.yaml"
        path.write_text(RECIPE.format(method=method, shard=shard))
        return path

    return write


@pytest.mark.parametrize("after", [1, 100_000, 500_000])
@pytest.mark.parametrize("method", ["dare_ties", "ties", "dare_linear"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: int
) -> None:
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    path, out = recipe(method), tmp_path / "out"
    truth = files(run(path, tmp_path / "truth" / "out").folder)
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        run(path, out, watch=Stop(out, after, KeyboardInterrupt()))
    assert not out.exists()
    with pytest.raises(InputError, match="no luck"):  # and once more, with other tiles
        run(
            path,
            out,
            memory=10**8 if kernels.available() else 4 * 10**8,
            workers=1,
            watch=Stop(out, 700_000, InputError("no luck")),
        )
    done = []
    run(path, out, watch=lambda plan: done.append)
    assert files(out) == truth
    assert sum(done) == make_plan(path).nbytes  # what was there already counts as progress
    assert verify(out, 1)
    assert [p.name for p in tmp_path.iterdir() if p.name != "truth"] == ["out"]


def test_work_that_is_saved_is_not_done_again(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    path, out = recipe("dare_ties"), tmp_path / "out"
    nbytes = make_plan(path).nbytes
    with pytest.raises(InputError):
        run(path, out, watch=Stop(out, nbytes, InputError("at the end")))
    written = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: written.append(len(data)) or pwrite(fd, data, at))
    run(path, out)
    assert sum(written) < nbytes / 4


DELTAS = {"final": "kind: delta", "signs": "kind: delta, semantics: add, values: sign"}


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("after", [1, 250_000, 600_000])
def test_a_delta_keeps_the_tensors_that_are_finished(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    monkeypatch.setattr(spool, "SECONDS", -1)
    path = recipe("dare_ties").with_name(f"delta-{name}.yaml")
    path.write_text(RECIPE.format(method="dare_ties", shard="250KB").replace("{shard", f"{{{DELTAS[name]}, shard"))
    truth, out = files(run(path, tmp_path / "truth" / "out").folder), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        run(path, out, workers=2, watch=Stop(out, after, KeyboardInterrupt()))
    journal = tmp_path / ".out.partial" / "journal"
    kept = {name for record in read_journal(journal)[0] for name in record.get("tensors", {})}
    assert kept
    lost = sorted((tmp_path / ".out.partial" / spool.SPOOL).iterdir())[-1]
    lost.write_bytes(b"")  # what is not there any more is made again
    again: set[str] = set()
    write = TensorWriter._append
    monkeypatch.setattr(TensorWriter, "_append", lambda self, bits: (again.add(self._name), write(self, bits)))
    done: list[int] = []
    result = run(path, out, workers=1, watch=lambda plan: done.append)
    assert files(out) == truth
    assert name == "signs" or sum(done) == make_plan(path).nbytes
    assert result.delta is not None
    assert result.delta.nbytes == sum(len(data) for name, data in truth.items() if name.startswith("delta"))
    assert len(again & kept) <= 1
    assert [p.name for p in tmp_path.iterdir() if p.name != "truth"] == ["out"]


def changed_recipe(path: Path) -> None:
    path.write_text(path.read_text() + "# other\n")


def changed_input(path: Path) -> None:
    weights = path.parent / "b" / "model.safetensors"
    os.utime(weights, ns=(1, 1))


def changed_version(path: Path) -> None:
    import deltamerge.run.hashes

    deltamerge.run.hashes.__version__ = "999"  # type: ignore[attr-defined]


CHANGES = {changed_recipe: "the recipe", changed_input: r"\./b: model.safetensors", changed_version: "deltamerge$"}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_refuses_what_differs_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr("deltamerge.run.hashes.__version__", "1")
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    models(tmp_path)
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(RECIPE.format(method="ties", shard="5GB"))
    with pytest.raises(InputError):
        run(path, out, watch=Stop(out, 1, InputError("stop")))
    change(path)
    with pytest.raises(OutputError, match=f"different now: {CHANGES[change]}") as caught:
        run(path, out)
    assert "--force" in (caught.value.hint or "")
    run(path, out, force=True)
    assert verify(out, 1)


def test_a_damaged_work_folder_is_done_again(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    path, out = recipe("ties"), tmp_path / "out"
    truth = files(run(path, tmp_path / "truth" / "out").folder)
    with pytest.raises(InputError):
        run(path, out, watch=Stop(out, 600_000, InputError("stop")))
    shards = sorted((tmp_path / ".out.partial" / "out").glob("*.safetensors"))
    shards[0].unlink()
    os.truncate(shards[1], 100)
    run(path, out)
    assert files(out) == truth


def test_an_input_that_changes_during_the_run_is_refused(tmp_path: Path) -> None:
    models(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(method="ties", shard="5GB"))

    def touch(_: Plan) -> Callable[[int], None]:
        os.utime(tmp_path / "a" / "model.safetensors", ns=(1, 1))
        return lambda _: None

    with pytest.raises(InputError, match=r"changed during the run: \./a: model.safetensors"):
        run(path, tmp_path / "out", watch=touch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["in place", "by another file"])
def test_an_input_that_changes_is_noticed_with_size_and_time_put_back(tmp_path: Path, how: str) -> None:
    models(tmp_path)
    path, weights = tmp_path / "r.yaml", tmp_path / "a" / "model.safetensors"
    path.write_text(RECIPE.format(method="ties", shard="5GB"))

    def change(_: Plan) -> Callable[[int], None]:
        status, raw = weights.stat(), bytearray(weights.read_bytes())
        raw[-1] ^= 1
        if how == "by another file":
            weights.unlink()
        weights.write_bytes(raw)
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        return lambda _: None

    with pytest.raises(InputError, match=r"changed during the run: \./a: model.safetensors"):
        run(path, tmp_path / "out", watch=change)
    assert not (tmp_path / "out").exists()


def test_on_two_machines_copies_of_an_input_are_the_same(tmp_path: Path) -> None:
    then = {"./a: model.safetensors": [9, 7, 1, 2, "one"]}
    check_facts(tmp_path, then, {"./a: model.safetensors": [9, 7, 3, 4, "two"]})
    for now in ([9, 7, 3, 4, "one"], [9, 8, 1, 2, "two"], [8, 7, 1, 2, "two"], "0" * 64):
        with pytest.raises(OutputError, match=r"different now: \./a: model\.safetensors"):
            check_facts(tmp_path, then, {"./a: model.safetensors": now})


def test_parts_make_the_bytes_of_one_run(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe("dare_ties")
    truth = files(run(path, tmp_path / "truth" / "out").folder)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="no parts"):
        finish(path, out)
    run(path, out, part=Part(2, 3))
    run(path, out, part=Part(1, 3))
    with pytest.raises(OutputError, match=r"unfinished parts: 3/3"):
        finish(path, out)
    run(path, out, part=Part(3, 3))
    assert not out.exists()
    finish(path, out)
    assert files(out) == truth
    assert [p.name for p in tmp_path.iterdir() if p.name != "truth"] == ["out"]


def missing(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, 1000)


def bent(path: Path) -> None:
    status, raw = path.stat(), bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGES = {missing: "is missing", cut: "has 1000 bytes, not", bent: "has other content than was written"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_is_damaged_between_part_and_finish_is_named(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    path, out = recipe("ties"), tmp_path / "out"
    truth = files(run(path, tmp_path / "truth" / "out").folder)
    for index in (1, 2):
        run(path, out, part=Part(index, 2))
    shard = sorted((tmp_path / ".out.partial" / "out").glob("*.safetensors"))[-1]
    damage(shard)
    code, _, err = call(capsys, "run", path, "--out", out, "--finish")
    assert code == 1
    assert f"{shard.name} {DAMAGES[damage]}" in err
    assert "hint: make it again with --part 2/2, then --finish" in err
    assert not out.exists()
    run(path, out, part=Part(2, 2))
    assert call(capsys, "run", path, "--out", out, "--finish")[0] == 0
    assert files(out) == truth


def test_what_was_just_hashed_is_not_read_again(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltamerge.files.hashes.hash_output", lambda path: pytest.fail(f"{path} read again"))
    assert verify(run(recipe("ties"), tmp_path / "out").folder, 1)


def put_back(target: Path, records: list[dict[str, Any]]) -> Path:
    """The work folder of a run that is killed after its last rename, before it removes that."""
    state = target.parent / f".{target.name}.partial"
    state.mkdir()
    mark(state)
    journal = Journal(state / "journal-1-of-1")
    for record in records:
        journal.append(record)
    journal.close()
    return state


@pytest.mark.parametrize("calibrates", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_finish_that_was_killed_after_its_rename_is_done(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], calibrates: bool
) -> None:
    """And with --force it does not replace the model by a folder without weights."""
    path, out = recipe("ties"), tmp_path / "out"
    flags: list[str] = []
    if calibrates:
        path = calibrated(tmp_path)
        (tmp_path / "r.lock").write_bytes((run(path, tmp_path / "t").folder / "recipe.lock").read_bytes())
        flags = ["--locked"]
    run(path, out, part=Part(1, 1), locked=calibrates)
    records = read_journal(tmp_path / ".out.partial" / "journal-1-of-1")[0]
    finish(path, out, locked=calibrates)
    truth, seen = files(out), {p: p.stat().st_ino for p in out.iterdir()}
    for more in ([], ["--force"]):
        for left in (False, True):
            if left:
                put_back(out, records)
            code, said, err = call(capsys, "run", path, "--out", out, "--finish", "--json", *flags, *more)
            assert (code, err) == (0, "")
            assert json.loads(said)["lock"]["outputs"]
            assert files(out) == truth
            assert {p: p.stat().st_ino for p in out.iterdir()} == seen
            assert not (tmp_path / ".out.partial").exists()
    (out / "README.md").write_text("other")
    put_back(out, records)
    code, _, err = call(capsys, "run", path, "--out", out, "--finish", "--force", *flags)
    assert (code, "no parts of a run are there" in err) == (1, True)
    assert files(out) == truth | {"README.md": b"other"}


def test_a_part_resumes_by_itself_and_all_must_be_of_one_run(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    path, out = recipe("ties"), tmp_path / "out"
    truth = files(run(path, tmp_path / "truth" / "out").folder)
    with pytest.raises(InputError):
        run(path, out, part=Part(1, 2), watch=Stop(out, 300_000, InputError("stop"), "-1-of-2"))
    run(path, out, part=Part(2, 2))
    run(path, out, part=Part(1, 2))
    other = recipe("dare_ties")
    with pytest.raises(OutputError, match="different now: the recipe"):
        finish(other, out)
    finish(path, out)
    assert files(out) == truth
    with pytest.raises(UsageError, match="has 1 shard"):
        run(recipe("ties", "5GB"), tmp_path / "x", part=Part(1, 2))


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2"])
def test_parts_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="no such part"):
        Part.parse(text)


@pytest.mark.parametrize(("count", "total"), [(1, 1), (3, 3), (4, 11), (7, 100)])
def test_every_shard_is_one_parts_and_every_part_has_some(count: int, total: int) -> None:
    taken = [[i for i in range(total) if Part(k, count).takes(i, total)] for k in range(1, count + 1)]
    assert all(taken)
    assert list(chain.from_iterable(taken)) == list(range(total))


def test_parts_of_a_calibrated_recipe_need_the_lock(tmp_path: Path) -> None:
    path = calibrated(tmp_path)
    truth = files(run(path, tmp_path / "truth" / "out").folder)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="calibrates q") as caught:
        run(path, out, part=Part(1, 2))
    assert "--locked" in (caught.value.hint or "")
    (tmp_path / "r.lock").write_bytes(truth["recipe.lock"])
    for index in (1, 2):
        run(path, out, part=Part(index, 2), locked=True)
    finish(path, out, locked=True)
    assert files(out) == truth


def test_what_calibration_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = calibrated(tmp_path)
    truth = files(run(path, tmp_path / "truth" / "out").folder)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        run(path, out, watch=Stop(out, 1, KeyboardInterrupt()))

    def again(*_: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("deltamerge.run.runner.shared_values", again)
    run(path, out)
    assert files(out) == truth


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_what_is_not_finite_is_counted(dtype: str) -> None:
    raw = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    if dtype == "BOOL":
        raw &= 1
    found = count_nonfinite(raw, dtype)
    if dtype not in INFINITY:
        assert found == (0, 0)
        return
    values = (
        torch.from_numpy(raw).view(torch_dtype(dtype)).float()
        if dtype != "F64"
        else torch.from_numpy(raw).view(torch.float64)
    )
    assert found == (int(values.isnan().sum()), int(values.isinf().sum()))
    finite = torch.where(values.isfinite(), values, 0).to(torch_dtype(dtype))
    assert count_nonfinite(finite.view(torch.uint8).numpy(), dtype) == (0, 0)
    assert count_nonfinite(raw[:0], dtype) == (0, 0)


def nonfinite_recipe(folder: Path, kind: str) -> Path:
    tune = {"w": torch.ones(300, 40), "copied": torch.zeros(3), "fine": torch.ones(2)}
    make_checkpoint(folder / "base", tune)
    tune["w"][7, 3], tune["w"][299, 39], tune["w"][0, 0] = torch.nan, torch.nan, -torch.inf
    tune["copied"][1] = torch.inf
    make_checkpoint(folder / "a", tune)
    path = folder / "r.yaml"
    path.write_text(
        f"base_model: ./base\nmodels: [{{model: ./a, prune: {{exclude: [copied]}}}}]\noutput: {{kind: {kind}}}\n"
    )
    return path


@pytest.mark.parametrize("kind", ["model", "delta", "delta, semantics: add, values: float32"])
def test_nan_and_inf_exit_1_with_names_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for module, name in ((writer, "SAVE_SECONDS"), (spool, "SECONDS")):
        monkeypatch.setattr(module, name, 1e6)  # however slow this machine is
    path = nonfinite_recipe(tmp_path, kind)
    code, out, err = call(capsys, "run", path, "--json")
    assert (code, json.loads(out)["error"]["exit_code"]) == (1, 1)
    assert "values that are not finite in copied (1 inf), w (2 NaN, 1 inf)\n" in err
    assert "--allow-nonfinite" in err
    assert "finished work is kept" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "r.yaml"]
    code, out, err = call(capsys, "run", path, "--json", "--allow-nonfinite")
    assert code == 0
    assert json.loads(out)["nonfinite"] == {"copied": {"nan": 0, "inf": 1}, "w": {"nan": 2, "inf": 1}}
    assert "warning: values that are not finite" in err


@pytest.mark.parametrize("kind", ["delta", "delta, semantics: add, values: float32"])
def test_a_delta_refused_for_nan_keeps_what_resume_is_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(spool, "SECONDS", -1)  # as in a run that takes long
    path, out, truth = nonfinite_recipe(tmp_path, kind), tmp_path / "out", tmp_path / "truth" / "out"
    assert call(capsys, "run", path, "--out", truth, "--allow-nonfinite")[0] == 0
    code, _, err = call(capsys, "run", path, "--out", out)
    assert (code, "finished work is kept" in err, out.exists()) == (1, True, False)
    again: set[str] = set()
    write = TensorWriter._append
    monkeypatch.setattr(TensorWriter, "_append", lambda self, bits: (again.add(self._name), write(self, bits)))
    assert call(capsys, "run", path, "--out", out, "--allow-nonfinite")[0] == 0
    assert not again
    assert files(out) == files(truth)
    assert not (tmp_path / ".out.partial").exists()


def test_leftovers_go_on_and_may_still_replace_a_target(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run with --force that dies beside a target leaves is taken up by the next, or cleared away by --force."""
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    path, out, left = recipe("ties"), tmp_path / "out", tmp_path / ".out.partial"
    truth = files(run(path, tmp_path / "truth" / "out").folder)

    def die() -> None:
        shutil.rmtree(out, ignore_errors=True)
        earlier(out)
        with pytest.raises(InputError):
            run(path, out, force=True, watch=Stop(out, 600_000, InputError("stop")))
        assert (out / "model.safetensors").read_text() == "old"

    pwrite = os.pwrite
    for flags, saved in (((), True), (("--resume",), True), (("--resume", "--force"), True), (("--force",), False)):
        die()
        written: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, data, at, to=written: to.append(len(data)) or pwrite(fd, data, at))
            assert call(capsys, "run", path, "--out", out, *flags)[0] == 0
        assert (sum(written) < make_plan(path).nbytes) == saved  # what was saved is not written again
        assert files(out) == truth
        assert not left.exists()


@pytest.mark.parametrize("kind", ["model", "delta"])
def test_running_again_is_natural(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """The same recipe is up to date, a changed one replaces its result, and what someone changed is left alone."""
    models(tmp_path)
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    text = RECIPE.format(method="ties", shard=f"250KB, kind: {kind}")

    def times() -> dict[str, int]:
        return {name: (out / name).stat().st_mtime_ns for name in files(out)}

    path.write_text(text)
    assert call(capsys, "run", path, "--out", out)[0] == 0
    before, first = times(), files(out)
    code, said, err = call(capsys, "run", path, "--out", out)
    assert (code, said, err) == (0, "", f"{out}: up to date\n")
    code, said, _ = call(capsys, "run", path, "--out", out, "--json")
    assert (code, json.loads(said)["up_to_date"], bool(json.loads(said)["lock"]["outputs"])) == (0, True, True)
    assert times() == before
    assert call(capsys, "run", path, "--out", out, "--force")[0] == 0
    assert times() != before
    assert files(out) == first
    path.write_text(text.replace("0.4", "0.3", 1))
    code, said, _ = call(capsys, "run", path, "--out", out, "--json")
    assert (code, json.loads(said)["up_to_date"]) == (0, False)
    second = files(out)
    assert second == files(run(path, tmp_path / "fresh" / "out").folder) != first
    path.write_text(text)
    for name in ("notes.txt", "README.md"):
        (out / name).write_text("mine")
        kept = {file.name: file.read_bytes() for file in out.iterdir()}
        code, _, err = call(capsys, "run", path, "--out", out)
        assert (code, name in err) == (1, True)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == kept
        (out / "notes.txt").unlink(missing_ok=True)


def test_a_finished_target_is_checked_against_the_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models(tmp_path)
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(RECIPE.format(method="ties", shard="5GB"))
    assert call(capsys, "run", path, "--out", out)[0] == 0
    lock = (out / "recipe.lock").read_text()
    (tmp_path / "r.lock").write_text(lock)
    assert call(capsys, "run", path, "--out", out, "--locked") == (
        0, "", f"{out}: up to date\n{out}: the same bytes as {tmp_path / 'r.lock'}\n",
    )  # fmt: skip
    digest = re.search(r"hash: (\S+)", lock[lock.index("inputs:") :])[1]
    (tmp_path / "r.lock").write_text(lock.replace(digest, digest[:-2] + ("00" if digest[-2:] != "00" else "11")))
    code, _, err = call(capsys, "run", path, "--out", out, "--locked")
    assert (code, "the inputs differ from the lock" in err) == (1, True)


def test_two_commands_on_one_target(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, seen = recipe("ties"), tmp_path / "out", list[tuple[int, str]]()

    def second(_: Plan) -> Callable[[int], None]:
        for flags in ((), ("--force",), ("--resume",), ("--resume", "--force")):
            code, _, err = call(capsys, "run", path, "--out", out, *flags)
            seen.append((code, err))
        return lambda _: None

    run(path, out, watch=second)
    assert len(seen) == 4
    for code, err in seen:
        assert code == 1
        assert f"out: another run is writing it (process {os.getpid()} on " in err
        assert "hint: wait until it ends" in err
    assert verify(out, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_overflow_on_the_cast_to_float16_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    monkeypatch.setattr("deltamerge.engine.backends.fused_available", lambda: fused and kernels.available())
    make_checkpoint(tmp_path / "base", {"w": torch.full((4, 4), 60000.0)})
    make_checkpoint(tmp_path / "a", {"w": torch.full((4, 4), 65519.0).fill_diagonal_(65520.0)})
    path = tmp_path / "r.yaml"
    path.write_text("base_model: ./base\nmodels: [{model: ./a}]\ndtype: float16\n")
    code, _, err = call(capsys, "run", path)
    assert code == 1
    assert "w (4 inf)" in err
    assert "float16 ends at 65504" in err


def test_a_part_and_its_finish_from_the_command_line(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = recipe("ties"), tmp_path / "out"
    code, text, _ = call(capsys, "run", path, "--out", out, "--part", "1/2", "--json")
    assert code == 0
    whole = make_plan(path)
    assert 0 < json.loads(text)["bytes"] < whole.nbytes
    code, _, err = call(capsys, "run", path, "--out", out, "--part", "2/2")
    assert code == 0
    assert "--finish" in err
    assert call(capsys, "run", path, "--out", out, "--finish")[0] == 0
    assert call(capsys, "verify", out)[0] == 0
    assert call(capsys, "run", path, "--out", out, "--finish", "--part", "1/2")[0] == 2
    assert call(capsys, "run", path, "--out", out, "--part", "2/1")[0] == 2
