"""The hash of an input from its pieces: what it is, who tells what, and that a merge hashes what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_checkpoint, needs_kernels
from running import run
from xxhash import xxh3_128

from deltamerge.files import hashes as module
from deltamerge.files.hashes import PIECE_BYTES, Pieces, inside
from deltamerge.run import hashes

SIZES = [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 200 * PIECE_BYTES + 5]


def reference(data: bytes) -> str:
    """From the definition in docs/why/how-it-works.md."""
    digests = [xxh3_128(data[i : i + 65536]).digest() for i in range(0, len(data), 65536)]
    return "xxh3-64k:" + xxh3_128(b"".join(digests)).hexdigest()


def written(path: Path, size: int) -> bytes:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("size", SIZES)
def test_the_hash_of_a_file(size: int, tmp_path: Path) -> None:
    data = written(tmp_path / "f", size)
    assert hashes.hash_input(tmp_path / "f") == reference(data)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_known_is_not_read(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pieces = tmp_path / "f", Pieces()
    data = written(path, size)
    random = np.random.default_rng(1)
    for number in range(size // PIECE_BYTES):
        if random.random() < 0.6:
            digest = xxh3_128(data[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]).intdigest()
            pieces.give(path, number, np.array([[digest >> 64, digest & (2**64 - 1)]], np.uint64))
    known = pieces.of(path).there.sum() * PIECE_BYTES
    read: list[int] = []
    learn = module.learn

    def seen(known: Any, wanted: Any, read_file: Any) -> None:
        learn(known, wanted, lambda offset, out: read.append(out.nbytes) or read_file(offset, out))

    monkeypatch.setattr(hashes, "learn", seen)
    assert hashes.hash_input(path, pieces) == reference(data)
    assert sum(read) == size - known


def test_a_file_that_is_shortened_is_an_error(tmp_path: Path) -> None:
    written(tmp_path / "f", 3 * PIECE_BYTES)
    pieces = Pieces()
    pieces.of(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"short")
    with pytest.raises(hashes.InputError, match="f: "):
        hashes.hash_input(tmp_path / "f", pieces)


def test_pieces_inside_ranges(tmp_path: Path) -> None:
    written(tmp_path / "f", 10 * PIECE_BYTES + 7)
    found = inside(Pieces().of(tmp_path / "f"), [(1, 2 * PIECE_BYTES), (4 * PIECE_BYTES, 6 * PIECE_BYTES + 1)])
    assert np.flatnonzero(found).tolist() == [1, 4, 5]


METHODS = {
    "linear": "merge_method: linear\nparameters: {weight: 0.5}\n",
    "dare_linear": "merge_method: dare_linear\nparameters: {density: 0.3}\n",
    "sparse": "merge_method: dare_linear\nparameters: {density: 0.01}\n",
    "ties": "merge_method: ties\nparameters: {density: 0.2}\n",
    "slerp": "merge_method: slerp\nparameters: {t: 0.3}\n",
    "rows": "prune: {method: magnitude, density: 0.2, group: row}\n",
    "passthrough": "merge_method: passthrough\n",
}
# within a block, rows that no piece is made of whole, several jobs
SHAPES = [(7,), (1000, 333), (3, 70_000), (3000, 1100)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_kernels), False])
def test_the_lock_of_a_run_has_the_hashes_of_its_inputs(
    fused: bool, method: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltamerge.engine.backends.fused_available", lambda: fused)
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        tensors = {f"w{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(SHAPES)}
        make_checkpoint(tmp_path / name, tensors)
    several = method not in ("slerp", "rows", "passthrough")
    base = "" if method in ("linear", "passthrough") else "base_model: ./base\n"
    models = "[{model: ./a, parameters: {weight: 0.5}}, {model: ./b, parameters: {weight: 0.5}}]"
    text = f"{METHODS[method]}{base}models: {models if several else '[{model: ./a}]'}\ndtype: bfloat16\n"
    (tmp_path / "r.yaml").write_text(text)
    given = 0
    give = Pieces.give

    def counted(self: Pieces, path: Path, first: int, halves: Any) -> None:
        nonlocal given
        given += len(halves)
        give(self, path, first, halves)

    monkeypatch.setattr(Pieces, "give", counted)
    lock = run(tmp_path / "r.yaml", tmp_path / "out").lock
    total = 0
    for reference_, entry in lock["inputs"].items():
        for name, file in entry["files"].items():
            data = (tmp_path / reference_ / name).read_bytes()
            total += len(data) // PIECE_BYTES
            assert file == {"hash": reference(data), "size": len(data)}
    others = {
        ("passthrough", torch.bfloat16),
    }
    streamed = (method, dtype) not in others
    assert (given > (0.8 if fused else 0.7) * total) == streamed  # torch's tiles are smaller: fewer pieces lie inside
    assert bool(given) == streamed
