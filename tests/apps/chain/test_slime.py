"""slime's directories, written here by its definition: THUDM/slime at 624b824."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
import safetensors.numpy
import torch
import xxhash
from conftest import load_tensors, make_checkpoint
from test_chain import refused, same, states, succeed

import deltamerge as dm

zstandard = pytest.importorskip("zstandard")
HASHES: dict[str, Callable[[bytes], str]] = {
    "xxh3-128": lambda raw: xxhash.xxh3_128(raw).hexdigest(),
    "blake3": lambda raw: blake3.blake3(raw).hexdigest(),
    "adler32": lambda raw: f"{zlib.adler32(raw):08x}",
}


def raw(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def write(
    folder: Path, number: int, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], encoding: str, algorithm: str
) -> Path:
    """A version in two files, as two ranks write it."""
    version = folder / f"weight_v{number:06d}"
    version.mkdir(parents=True)
    parts: tuple[dict[str, Any], ...] = ({}, {})
    sums: tuple[dict[str, str], ...] = ({}, {})
    for i, name in enumerate(new):
        a, b = raw(old[name]), raw(new[name])
        if np.array_equal(a, b):
            continue
        diff = a ^ b
        if encoding == "overwrite":
            at = np.flatnonzero(a != b).astype("<u4")
            diff = np.concatenate([np.array([at.size], "<u4").view(np.uint8), at.view(np.uint8), b[at]])
        parts[i % 2][name] = np.frombuffer(zstandard.ZstdCompressor(level=1).compress(diff.tobytes()), np.uint8)
        sums[i % 2][name] = HASHES[algorithm](b.tobytes())
    weight_map = {}
    for i, (part, checksums) in enumerate(zip(parts, sums, strict=True)):
        file = f"model-{i:05d}-of-00002.safetensors"
        (version / file).write_bytes(safetensors.numpy.save(part, metadata=checksums))
        weight_map |= dict.fromkeys(part, file)
    said = {"version": f"{number:06d}", "base_version": f"{number - 1:06d}", "delta_encoding": encoding,
            "compression_format": "zstd", "checksum_format": algorithm}  # fmt: skip
    index = {"metadata": said, "weight_map": weight_map}
    (version / "model.safetensors.index.json").write_text(json.dumps(index))
    return version


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    found = states(3)
    make_checkpoint(tmp_path / "base", found[0])
    for number, (encoding, algorithm) in enumerate(
        [("xor", "xxh3-128"), ("overwrite", "blake3"), ("xor", "adler32")], 1
    ):
        write(tmp_path / "slime", number, found[number - 1], found[number], encoding, algorithm)
    monkeypatch.chdir(tmp_path)
    return found


def model(reference: str, out: str) -> tuple[str, ...]:
    Path(f"{out}.yaml").write_text(f"merge_method: passthrough\nmodels: [{{model: {reference}}}]\n")
    return "run", f"{out}.yaml", "--out", out, "--workers", "2", "-q"


def test_versions_are_models_and_become_ours(made: list[dict[str, torch.Tensor]]) -> None:
    for number in (1, 2, 3):
        succeed(*model(f"base+slime/weight_v{number:06d}", f"out-{number}"))
        assert same(load_tensors(Path(f"out-{number}")), made[number])
    succeed(*model("base+slime", "newest"))
    assert same(load_tensors(Path("newest")), made[3])
    succeed("extract", "base+slime/weight_v000001", "base", "--out", "chain/000001", "-q")
    for number in (2, 3):
        words = ("--out", f"chain/00000{number}", "--after", f"chain/00000{number - 1}", "-q")
        succeed("extract", f"base+slime/weight_v00000{number}", "base", *words)
    state = {name: tensor.clone() for name, tensor in made[0].items()}
    assert dm.load_delta("chain").apply_(state) == 3
    assert same(state, made[3])
    # a plain version stands for itself: what came before is not needed
    shutil.rmtree("slime/weight_v000001")
    assert "has no version weight_v000001" in refused(*model("base+slime/weight_v000002", "x"))
    shutil.rmtree("slime/weight_v000002")
    make_checkpoint(Path("slime/weight_v000002"), made[2])
    succeed(*model("base+slime/weight_v000003", "reset"))
    assert same(load_tensors(Path("reset")), made[3])


def index(change: Callable[[dict[str, Any]], object]) -> None:
    path = Path("slime/weight_v000002/model.safetensors.index.json")
    said = json.loads(path.read_text())
    change(said["metadata"])
    path.write_text(json.dumps(said))


def recode(content: bytes) -> None:
    path = next(Path("slime/weight_v000002").glob("model-00000*"))
    header = safetensors.safe_open(path, "np")
    tensors = {name: np.frombuffer(zstandard.ZstdCompressor().compress(content), np.uint8) for name in header.keys()}  # noqa: SIM118
    path.write_bytes(safetensors.numpy.save(tensors, metadata=header.metadata()))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda: index(lambda said: said.update(delta_encoding="sub")), "'sub', known: xor, overwrite"),
        (lambda: index(lambda said: said.update(compression_format="lz4")), "known: zstd"),
        (lambda: index(lambda said: said.update(checksum_format="md5")), "known: xxh3-128"),
        (lambda: index(lambda said: said.pop("base_version")), "metadata.base_version is missing"),
        (lambda: index(lambda said: said.update(version="000001")), "is version 000001 after 000001"),
        (lambda: next(Path("slime/weight_v000002").glob("model-00001*")).unlink(), "is not whole"),
        (lambda: recode(b"\0\0\0\0"), "has the checksum of"),
        (lambda: recode(b"\xff\xff\0\0"), "65535 entries take"),
        (lambda: recode(b"\1\0\0\0\xff\xff\0\0\0"), "position outside"),
        (lambda: recode(bytes(1 << 20)), "more than"),
        (lambda: make_checkpoint(Path("base"), states(1, seed=9)[0]), "it is another base"),
        (lambda: make_checkpoint(Path("base"), {"b": torch.ones(3)}), "which the base lacks"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(made: Any, spoil: Callable[[], object], said: str) -> None:
    spoil()
    assert said in refused(*model("base+slime/weight_v000003", "out")).replace("\n", " ")
    assert not Path("out").exists()
