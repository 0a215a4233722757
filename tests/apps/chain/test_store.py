"""A store: deltas of one base in one folder, sizes as they are, each still an artifact by itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_tensors, make_checkpoint
from test_chain import call, refused, same, succeed

from deltamerge.files.descriptors import files_of
from deltamerge.models.chain import publish as stores
from deltamerge.models.chain.publish import Sharing, is_store

VOCABULARY = json.dumps({"model": {"vocab": {f"word-{i}": i for i in range(5000)}}})
QUICK = ("--workers", 1, "-q")


def models(folder: Path, *names: str) -> None:
    generator = torch.Generator().manual_seed(7)
    base = {"a": torch.randn(60, 50, generator=generator).bfloat16(), "b": torch.zeros(9)}
    make_checkpoint(folder / "base", base)
    for number, name in enumerate(names):
        changed = base["a"].clone()
        changed.view(-1)[number * 100 : number * 100 + 30] += 1
        make_checkpoint(folder / name, {"a": changed, "b": base["b"] + number})
        words = VOCABULARY if name != "other" else VOCABULARY.replace("word-7", "worm-7")
        (folder / name / "tokenizer.json").write_text(words)
        (folder / name / "tokenizer_config.json").write_text("{}")


def on_disk(folder: Path) -> tuple[int, int]:
    """Bytes of the files, each inode once, and of all their names."""
    found = [os.lstat(path) for path in files_of(folder).values()]
    return sum({one.st_ino: one.st_size for one in found}.values()), sum(one.st_size for one in found)


def test_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models(tmp_path, "one", "two", "other", "late")
    succeed("extract", "one", "two", "other", "--base", "base", "--out", "store", *QUICK)
    succeed("extract", "late", "--base", "base", "--out", "store", *QUICK)  # into the store that is there
    assert sorted(os.listdir("store")) == ["late", "one", "other", "two"]
    inode = {n: os.stat(f"store/{n}/tokenizer.json").st_ino for n in os.listdir("store")}
    assert inode["one"] == inode["two"] == inode["late"] != inode["other"]

    found = succeed("list", "store", "--json")
    assert (found["bytes"], found["unshared"]) == on_disk(Path("store"))
    assert found["unshared"] - found["bytes"] > 2 * len(VOCABULARY)
    assert (found["one_base"], found["checkpoints"]) == (True, 4 * (60 * 50 * 2 + 9 * 4))
    assert [one["name"] for one in found["deltas"]] == ["late", "one", "other", "two"]
    assert [one["changed"] for one in found["deltas"]] == [39, 30, 39, 39]
    code, out, _ = call("list", "store")
    assert code == 0
    assert out.startswith("store: 4 deltas of base, ")
    assert len(out.splitlines()) == 5

    for name in ("one", "other", "late"):  # each is whole, also where the others are gone
        shutil.copytree(f"store/{name}", f"alone-{name}")
        for delta in (f"store/{name}", f"alone-{name}"):
            succeed("apply", delta, "--base", "base", "--out", "again", "--force", *QUICK)
            assert same(load_tensors(tmp_path / "again"), load_tensors(tmp_path / name))
            assert Path("again/tokenizer.json").read_bytes() == Path(name, "tokenizer.json").read_bytes()
            assert call("verify", delta)[0] == 0
    shutil.rmtree("store/one")
    succeed("remove", "store/two", "-q")
    succeed("extract", "two", "--base", "base", "--out", "store/two", *QUICK)  # anew, not written through
    assert Path("store/late/tokenizer.json").read_text() == VOCABULARY


def test_only_files_that_still_are_the_same_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models(tmp_path, "one", "two")
    succeed("extract", "one", "two", "--base", "base", "--out", "store", *QUICK)
    shutil.rmtree("store/two")
    Path("store/one/tokenizer.json").write_text(VOCABULARY.replace("word-7", "worm-7"))  # not what its lock says
    for name in ("two", "three"):
        succeed("extract", "two", "--base", "base", "--out", f"store/{name}", *QUICK)
    sharing = Sharing.of(tmp_path / "store")
    assert sharing.add("two") < len(VOCABULARY)
    assert sharing.add("three") > len(VOCABULARY)
    assert Path("store/two/tokenizer.json").read_text() == VOCABULARY
    monkeypatch.setattr(stores.os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(18, "other device")))
    succeed("extract", "two", "--base", "base", "--out", "store/four", *QUICK)
    assert Sharing.of(tmp_path / "store").add("four") == 0
    assert [p for p in files_of(tmp_path / "store") if p.endswith(".deltamerge")] == []


def test_what_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models(tmp_path, "one", "two")
    (tmp_path / "empty").mkdir()
    assert "is no chain and no store" in refused("list", "empty")
    shutil.copytree("one", "-one")
    assert "no name in a store" in refused("extract", "two", "./-one", "--base", "base", "--out", "store")
    shutil.copytree("one", "x/one")
    assert "two of the models would be one" in refused("extract", "one", "x/one", "--base", "base", "--out", "store")
    assert "lacking" in refused("extract", "one", "lacking", "--base", "base", "--out", "store", *QUICK)
    assert not Path("store").exists()  # all models are looked at before one is extracted
    succeed("extract", "one", "--base", "base", "--out", "chain/1", *QUICK)
    succeed("extract", "two", "--base", "base", "--out", "chain/2", "--after", "chain/1", *QUICK)
    assert not is_store(tmp_path / "chain")
    assert "is a chain" in refused("extract", "two", "--base", "base", "--out", "chain")
    succeed("extract", "two", "--base", "one", "--out", "mixed/two", *QUICK)
    succeed("extract", "one", "--base", "base", "--out", "mixed/one", *QUICK)
    found = succeed("list", "mixed", "--json")
    assert found["one_base"] is False
    assert call("list", "mixed")[1].count("  of ") == 2


def test_a_store_is_verified_delta_by_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models(tmp_path, "one", "two", "late")
    succeed("extract", "one", "two", "late", "--base", "base", "--out", "store", *QUICK)
    code, _, err = call("verify", "store")
    assert code == 0
    assert [line.partition(":")[0] for line in err.splitlines()] == ["store/late", "store/one", "store/two"]
    found = succeed("verify", "store", "--base", "base", "--json")
    assert [one["name"] for one in found["deltas"]] == ["late", "one", "two"]
    assert (found["folder"], found["base"]) == ("store", "base")
    assert all("delta.safetensors" in one["files"] for one in found["deltas"])
    _, _, err = call("verify", "store", "--base", "base")
    assert "store: applied to base, every delta gives the tensors it promises" in err


def test_each_damaged_delta_of_a_store_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models(tmp_path, "one", "two", "late", "other")
    succeed("extract", "one", "two", "late", "other", "--base", "base", "--out", "store", *QUICK)
    with open("store/two/delta.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.unlink("store/other/recipe.lock")
    code, _, err = call("verify", "store")
    assert code == 1
    assert "store: of its 4 deltas 2 failed" in err
    assert "store/two: verification failed" in err
    assert "store/other: has neither version.json nor recipe.lock" in err
    assert "store/one" not in err


def test_a_store_on_another_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models(tmp_path, "one", "two")
    succeed("extract", "one", "two", "--base", "base", "--out", "store", *QUICK)
    make_checkpoint(tmp_path / "wrong", {"a": torch.ones(60, 50).bfloat16(), "b": torch.zeros(9)})
    code, _, err = call("verify", "store", "--base", "wrong")
    assert code == 1
    assert "store: of its 2 deltas 2 failed" in err
    assert call("verify", "store", "--base", "base")[0] == 0
