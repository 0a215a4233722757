from __future__ import annotations

import errno
import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama, write_json
from safetensors.torch import save_file

from deltamerge.errors import InputError, OutputError
from deltamerge.files import descriptors as files
from deltamerge.models.checkpoint import Checkpoint, open_checkpoint
from deltamerge.models.matching import match
from deltamerge.tensors.reader import Reader

TENSORS = {f"t{i}": torch.arange(12.0).reshape(3, 4) + i for i in range(6)}


def test_single_file_and_shards_are_the_same_checkpoint(tmp_path: Path) -> None:
    one = open_checkpoint(tiny_llama(tmp_path / "one", seed=1), reference="./one")
    many = open_checkpoint(tiny_llama(tmp_path / "many", seed=1, shards=3))
    assert one.reference == "./one"
    assert many.reference == str(tmp_path / "many")
    assert (one.revision, one.hub_id) == (None, None)
    assert [file.name for file in many.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert one.config["model_type"] == "llama"
    assert one.tensors.keys() == many.tensors.keys()
    with Reader() as reader:
        for name, expected in load_tensors(tmp_path / "one").items():
            for checkpoint in (one, many):
                out = torch.empty_like(expected)
                reader.read_into(checkpoint.tensors[name], 0, out.view(torch.uint16).numpy())
                assert torch.equal(out, expected)


def test_the_only_other_file_is_the_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == list(TENSORS)


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, shards=2)
    save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["only"]


def test_shards_of_the_hub_cache_are_symlinks(tmp_path: Path) -> None:
    snapshot = make_checkpoint(tmp_path / "snapshots" / "abc", TENSORS, shards=2)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{i}")
    assert list(open_checkpoint(snapshot).tensors) == list(TENSORS)


def refused(folder: Path, message: str, hint: str = "") -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder, reference="./x")
    assert str(caught.value).startswith("./x: ")
    assert "\n" not in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "the folder is empty")
    write_json(tmp_path / "config.json", {"architectures": ["X"]})
    refused(tmp_path, "no safetensors weights", "model.safetensors")
    refused(tmp_path / "config.json", "is a file")
    for inner, hint in (
        ("checkpoint-50", "/checkpoint-50"),
        ("checkpoint-9", "/checkpoint-50"),
        ("snapshots", "hub id"),
    ):
        (tmp_path / inner).mkdir()
        refused(tmp_path, "no safetensors weights", hint)
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, r"only PyTorch pickle files \(pytorch_model.bin\)", "pickles: true")
    write_json(tmp_path / "adapter_config.json", {})
    refused(tmp_path, "is an adapter, not a model", "base+adapter")


def test_config_must_be_a_json_object(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS)
    (tmp_path / "config.json").write_text("{,}")
    refused(tmp_path, "config.json: is not valid JSON")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json: no such file")


def test_shards_need_an_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, r"3 \.safetensors files but no model\.safetensors\.index\.json")


def test_missing_shards(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "missing shard model-00002-of-00003.safetensors$")
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    refused(tmp_path, "missing shard model-00002-of-00003.safetensors, 2 of 3 shards are missing")


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/model.safetensors", "../other/model.safetensors", "sub/model.safetensors", "..", "", "model.bin",
        "a\\b.safetensors", "a\n.safetensors", ".safetensors", "\x00.safetensors", 3, None, ["model.safetensors"],
    ],
)  # fmt: skip
def test_index_entries_stay_in_the_folder(tmp_path: Path, shard: object) -> None:
    make_checkpoint(tmp_path / "other", TENSORS)
    make_checkpoint(tmp_path / "x", TENSORS, shards=2)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    index["weight_map"]["t0"] = shard
    write_json(tmp_path / "x" / "model.safetensors.index.json", index)
    refused(tmp_path / "x", "index.json: shard .* is not a plain .safetensors file name")


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))

    write_json(path, {"weight_map": weight_map})  # no metadata: older files have none
    assert list(open_checkpoint(tmp_path).tensors) == list(TENSORS)
    write_json(path, {"weight_map": weight_map | {"more": first}})
    refused(tmp_path, f"more is missing in {first}")
    write_json(path, {"weight_map": {k: v for k, v in weight_map.items() if k != "t1"}})
    refused(tmp_path, f"{first} holds t1, the index does not list it")
    write_json(path, {"weight_map": weight_map | {"t1": second}})
    refused(tmp_path, f"{first} holds t1, the index lists it in {second}")
    for broken, message in [
        ("{}", "has no weight_map"), ('{"weight_map": []}', "has no weight_map"), ("[]", "is not a JSON object"),
        ("{", "is not valid JSON"), ('{"weight_map": {"a": "x", "a": "y"}}', "key 'a' twice"),
    ]:  # fmt: skip
        path.write_text(broken)
        refused(tmp_path, f"model.safetensors.index.json: {message}")
    os.truncate(path, 100_000_001)
    refused(tmp_path, "100,000,001 bytes, more than")


def test_a_bad_header_names_model_and_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS)
    os.truncate(tmp_path / "model.safetensors", 500)
    refused(tmp_path, "^./x: model.safetensors: the file is truncated")


def test_reads_ranges_from_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_OPEN", 2)
    tensors = {f"t{i}": torch.arange(1000, dtype=torch.int32) + 1000 * i for i in range(8)}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tensors, shards=8))
    faults: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            i, start = int(rng.integers(8)), int(rng.integers(1000))
            out = np.empty(int(rng.integers(1000 - start + 1)), np.int32)
            reader.advise(checkpoint.tensors[f"t{i}"], 4 * start, out.nbytes)
            reader.read_into(checkpoint.tensors[f"t{i}"], start, out)
            if not np.array_equal(out, np.arange(start, start + out.size) + 1000 * i):
                faults.append(f"t{i}[{start}:]")

    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with Reader() as reader:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        if before:
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


def test_reading_faults(tmp_path: Path) -> None:
    info = open_checkpoint(make_checkpoint(tmp_path, {"a": torch.zeros(100)})).tensors["a"]
    out = np.empty(100, np.float32)
    with Reader() as reader:
        reader.read_into(info, 0, out)
        with pytest.raises(ValueError, match="which has 400"):
            reader.read_into(info, 1, out)
        os.truncate(info.path, info.begin + 300)
        with pytest.raises(InputError, match=r"model\.safetensors: truncated while reading: 100 bytes are missing"):
            reader.read_into(info, 0, out)
    info.path.unlink()
    with Reader() as reader, pytest.raises(InputError, match="it vanished"):
        reader.read_into(info, 0, out)


@pytest.mark.parametrize("code", [None, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_copies_in_the_kernel_or_through_a_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    monkeypatch.setattr(files, "COPY_PIECE", 1000)
    if code is not None:

        def refuse(*_: int) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    text = random.Random(0).randbytes(40_000)
    (tmp_path / "in").write_bytes(text)
    (tmp_path / "out").write_bytes(b"-" * 20_000)
    source, target = os.open(tmp_path / "in", os.O_RDONLY), os.open(tmp_path / "out", os.O_RDWR)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        files.copy_at(source, 80, 16_000, target, 5)
        files.copy_at(source, 0, 0, target, 0)
        with pytest.raises(InputError, match="truncated while reading: 10 bytes are missing"):
            files.copy_at(source, 39_990, 20, target, 16_005)
        with pytest.raises(OutputError, match="no space left"):
            files.copy_at(source, 0, 400, full, 0)
    finally:
        for fd in (source, target, full):
            os.close(fd)
    assert (tmp_path / "out").read_bytes()[:16_005] == b"-" * 5 + text[80:16_080]


def renamings(*models: Checkpoint) -> list[dict[str, str]]:
    shapes = [{name: info.shape for name, info in model.tensors.items()} for model in models]
    return [names.canonical for names in match(shapes, [model.reference for model in models])]


def test_names_of_real_files(shared_data: Path) -> None:
    base, *tuned = renamings(*(open_checkpoint(shared_data / name) for name in ("base", "sentiment", "intensity")))
    for names in tuned:
        assert all(new == old.removeprefix("bert.") for old, new in names.items())
        assert names.values() - base.keys() == {"classifier.weight", "classifier.bias"}


def test_names_of_tiny_files(tmp_path: Path) -> None:
    names = renamings(*(open_checkpoint(folder) for folder in tiny_bert_pair(tmp_path)))[1]
    assert all(new == old.removeprefix("bert.") for old, new in names.items())
