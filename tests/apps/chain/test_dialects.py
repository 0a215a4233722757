"""Versions that we write as slime and SkyRL do, read by a reader written here from what they publish, and by our own.

slime: THUDM/slime at 624b824 (update_weight_from_disk_delta.py, sglang-pull_weights.patch). SkyRL: NovaSky-AI/SkyRL at
a956457 (weight_sync/delta_checkpoint.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import xxhash
from conftest import load_tensors, make_checkpoint
from test_chain import NAMES, Tensors, refused, same, states, succeed

import deltamerge as dm
from deltamerge.errors import InputError
from deltamerge.models.chain.mirror import Mirror

zstandard = pytest.importorskip("zstandard")
STYLES = ["slime", "slime:overwrite", "skyrl"]
Bytes = dict[str, np.ndarray[Any, Any]]


def raw(state: Tensors) -> Bytes:
    return {n: t.contiguous().reshape(-1).view(torch.uint8).numpy().copy() for n, t in state.items()}


def pull_slime(weights: Bytes, folder: Path, target: int, start: int = 0) -> None:
    """What SGLang's pull does: versions in order, each file's tensors decompressed whole, applied, checked."""
    for number in range(start + 1, target + 1):
        version = folder / f"weight_v{number:06d}"
        meta = json.loads((version / "model.safetensors.index.json").read_text())["metadata"]
        assert (int(meta["version"]), int(meta["base_version"])) == (number, number - 1)
        assert (meta["compression_format"], meta["checksum_format"]) == ("zstd", "xxh3-128")
        for file in sorted(version.glob("*.safetensors")):
            blob = file.read_bytes()
            length = int.from_bytes(blob[:8], "little")
            header = json.loads(blob[8 : 8 + length])
            wanted = header.pop("__metadata__")
            for name, info in header.items():
                begin, end = (8 + length + at for at in info["data_offsets"])
                diff = np.frombuffer(zstandard.ZstdDecompressor().decompress(blob[begin:end]), np.uint8)
                if meta["delta_encoding"] == "xor":
                    weights[name] ^= diff
                else:
                    count = int.from_bytes(diff[:4].tobytes(), "little")
                    weights[name][np.frombuffer(diff[4 : 4 + 4 * count].tobytes(), "<u4")] = diff[4 + 4 * count :]
                assert xxhash.xxh3_128(weights[name].tobytes()).hexdigest() == wanted[name]


def pull_skyrl(weights: Bytes, folder: Path, target: int, start: int = 0) -> None:
    """What SkyRL's store does: manifests in order, payloads by key, decompressed to the size given, XORed, checked."""
    for number in range(start + 1, target + 1):
        version = folder / f"delta-{number:08d}"
        manifest = json.loads((version / "manifest.json").read_text())
        assert (manifest["version"], manifest["base_version"]) == (number, number - 1)
        payloads = {file: safetensors.numpy.load_file(version / file) for file in manifest["payload_files"]}
        total = 0
        for record in manifest["tensors"]:
            stored, size = payloads[record["payload_file"]][record["payload_key"]], record["uncompressed_num_bytes"]
            assert stored.dtype == np.uint8
            assert stored.size == record["compressed_num_bytes"]
            diff = zstandard.ZstdDecompressor().decompress(stored.tobytes(), max_output_size=size)
            assert len(diff) == size == weights[record["name"]].size
            weights[record["name"]] ^= np.frombuffer(diff, np.uint8)
            assert record["checksum_algorithm"] == "xxh3-128"
            assert xxhash.xxh3_128(weights[record["name"]].tobytes()).hexdigest() == record["checksum"]
            kind = getattr(torch, record["dtype"])
            assert kind.itemsize * int(np.prod(record["shape"])) == size
            total += size
        assert manifest["total_uncompressed_num_bytes"] == total


PULLS: dict[str, Callable[..., None]] = {"slime": pull_slime, "slime:overwrite": pull_slime, "skyrl": pull_skyrl}
TITLES = {"slime": "weight_v{:06d}", "slime:overwrite": "weight_v{:06d}", "skyrl": "delta-{:08d}"}


def pulled(base: Tensors, folder: Path, style: str, target: int) -> bool:
    """Whether a puller that has the base gets version `target` exactly."""
    weights = raw(base)
    PULLS[style](weights, folder, target)
    return {n: b.tobytes() for n, b in weights.items()} == {n: b.tobytes() for n, b in raw(states(4)[target]).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and tuned-1…4; a chain, and mirrors of it that its writer kept."""
    folder, found = tmp_path_factory.mktemp("dialects"), states(4)
    for number, state in enumerate(found):
        make_checkpoint(folder / ("base" if not number else f"tuned-{number}"), state)
    mirrors = {folder / style.replace(":", "-"): style for style in STYLES}
    with dm.DeltaWriter(folder / "chain", base=folder / "base", mirrors=mirrors) as writer:
        for state in found[1:]:
            writer.write(state)
        writer.write(found[4])  # nothing changed
    return folder


@pytest.mark.parametrize("style", STYLES)
def test_a_writers_mirrors_are_read_by_others_and_by_us(
    made: Path, style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    folder, base = made / style.replace(":", "-"), states(4)[0]
    for number in range(1, 5):
        assert pulled(base, folder, style, number)
        title = TITLES[style].format(number)
        found = succeed("diff", f"base+{folder.name}/{title}", f"tuned-{number}", "--json")
        assert (found["changed"], found["tensors"]) == (0, [])
    weights = raw(states(4)[4])
    PULLS[style](weights, folder, 5, 4)  # a version without a change
    assert succeed("diff", f"base+{folder.name}", "tuned-4", "--json")["changed"] == 0
    assert not [one for one in folder.rglob(".*") if one.is_dir()]


@pytest.mark.parametrize("style", STYLES)
def test_a_chain_is_mirrored_as_it_grows(
    made: Path, style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    shutil.copytree(made / "chain" / NAMES[0], tmp_path / "chain" / NAMES[0])
    words = ("extract", tmp_path / "chain", "--as", style, "--out", tmp_path / "out", "--workers", 2, "--json")
    assert [one["name"] for one in succeed(*words)["versions"]] == [TITLES[style].format(1)]
    for name in NAMES[1:]:
        shutil.copytree(made / "chain" / name, tmp_path / "chain" / name)
    monkeypatch.setattr("deltamerge.models.chain.mirror.BATCH", 2)
    assert len(succeed(*words, "--base", "base")["versions"]) == 3
    assert succeed(*words)["versions"] == []
    own = made / style.replace(":", "-")
    for number in range(1, 5):
        assert pulled(states(4)[0], tmp_path / "out", style, number)
        title = TITLES[style].format(number)
        for file in (own / title).iterdir():
            assert file.read_bytes() == (tmp_path / "out" / title / file.name).read_bytes(), file


@pytest.mark.parametrize("style", STYLES)
def test_models_are_extracted_one_after_another(
    made: Path, style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    out = [tmp_path / TITLES[style].format(number) for number in range(4)]
    succeed("extract", "tuned-1", "base", "--as", style, "--out", out[1], "-q")
    succeed("extract", "tuned-2", "--base", "base", "--as", style, "--out", out[2], "--after", out[1], "-q")
    succeed("extract", "tuned-3", "--base", "tuned-2", "--as", style, "--out", out[3], "--after", out[2], "-q")
    assert pulled(states(4)[0], tmp_path, style, 3)


def test_what_cannot_be_written_is_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    first, second = tmp_path / "out" / "weight_v000001", tmp_path / "out" / "weight_v000002"
    words = ("--as", "slime", "-q")
    state = states(4)[1]
    make_checkpoint(tmp_path / "more", state | {"new": torch.ones(2)})
    make_checkpoint(tmp_path / "cast", state | {"b": state["b"].double()})
    assert "adds new" in refused("extract", tmp_path / "more", "base", "--out", first, *words)
    assert "b is F64 [129], in the base F32" in refused("extract", tmp_path / "cast", "base", "--out", first, *words)
    assert "is no version of slime's" in refused("extract", "tuned-1", "base", "--out", tmp_path / "x", *words)
    assert "the next version is weight_v000001" in refused("extract", "tuned-1", "base", "--out", second, *words)
    assert "changes are exact" in refused("extract", "tuned-1", "base", "--out", first, "--density", 0.1, *words)
    assert not [one for one in (tmp_path / "out").iterdir() if one.is_dir()]
    succeed("extract", "tuned-1", "base", "--out", first, *words)
    assert "does not come after the base" in refused("extract", "tuned-2", "base", "--out", second, *words)
    after = ("--after", first)
    assert "has the checksum of" in refused("extract", "tuned-2", "tuned-4", "--out", second, *after, *words)
    assert "is of no version of" in refused("extract", "chain", "--out", tmp_path / "out", *words)
    assert "a chain has its own order" in refused("extract", "chain", "--out", tmp_path / "o", *after, *words)
    make_checkpoint(tmp_path / "other", {**states(4)[0], "b": states(4)[0]["b"] + 1})
    assert "not the one" in refused("extract", "chain", "--base", tmp_path / "other", "--out", tmp_path / "o", *words)
    assert [one.name for one in (tmp_path / "out").iterdir() if one.is_dir()] == [first.name]


@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_mirror_that_failed_catches_up(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    found, real = states(4), Mirror.write
    with dm.DeltaWriter(tmp_path / "chain", base=made / "base", mirrors={tmp_path / "out": "slime"}) as writer:
        writer.write(found[1]).result()

        def write(self: Mirror, *words: Any) -> Any:
            if fails == "after":
                real(self, *words)
            raise OSError("the disk is gone")

        monkeypatch.setattr(Mirror, "write", write)
        writer.write(found[2])
        with pytest.raises(OSError, match="gone"):
            writer.flush()
        monkeypatch.setattr(Mirror, "write", real)
        writer.write(found[3]).result()
    assert pulled(found[0], tmp_path / "out", "slime", 3)
    shutil.rmtree(tmp_path / "out" / "weight_v000003")
    with dm.DeltaWriter(tmp_path / "chain", base=made / "base", mirrors={tmp_path / "out": "slime"}) as writer:
        assert pulled(found[0], tmp_path / "out", "slime", 3)
    with pytest.raises(InputError, match="no dialect that is written"):
        dm.DeltaWriter(tmp_path / "chain", base=made / "base", mirrors={tmp_path / "o": "verl"})


def spoil(path: Path, **changes: Any) -> None:
    said = json.loads(path.read_text())
    said["tensors"][0].update(changes.pop("tensor", {}))
    path.write_text(json.dumps(said | changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 3}, "is version 3 after 1, in delta-00000002"),
        ({"base_version": "1"}, "base_version"),
        ({"tensor": {"payload_file": "../x.safetensors"}}, "is no name of a file"),
        ({"tensor": {"payload_key": "other"}}, "has no compressed diff of it"),
        ({"tensor": {"checksum_algorithm": "crc"}}, "has no checksum of a known kind"),
        ({"tensor": {"checksum": "0" * 32}}, "has the checksum of"),
        ({"tensor": {"name": "c"}}, "which the base lacks"),
    ],
)
def test_a_skyrl_version_that_is_wrong_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(made)
    shutil.copytree(made / "skyrl", tmp_path / "sync")
    spoil(tmp_path / "sync" / "delta-00000002" / "manifest.json", **change)
    answer = refused("extract", f"base+{tmp_path}/sync/delta-00000002", "base", "--out", tmp_path / "out", "-q")
    assert said in answer.replace("\n", " ")


def test_an_old_skyrl_checksum_is_read(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.chdir(made)
    shutil.copytree(made / "skyrl", tmp_path / "sync")
    path = tmp_path / "sync" / "delta-00000001" / "manifest.json"
    said, new = json.loads(path.read_text()), raw(states(4)[1])
    for record in said["tensors"]:
        del record["checksum"], record["checksum_algorithm"]
        record["sha256"] = hashlib.sha256(new[record["name"]].tobytes()).hexdigest()
    path.write_text(json.dumps(said))
    succeed("extract", f"base+{tmp_path}/sync/delta-00000001", "base", "--out", tmp_path / "out", "-q")
    state = load_tensors(made / "base")
    dm.load_delta(tmp_path / "out").apply_(state)
    assert same(state, states(4)[1])
