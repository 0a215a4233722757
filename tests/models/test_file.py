"""Delta artifacts: what is written comes back, through every door; what is damaged is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_tensors, tiny_bert_pair
from format_reader import documented
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltamerge.apps.chain.live import load_delta
from deltamerge.errors import InputError
from deltamerge.formats.delta.entry import Decoder
from deltamerge.formats.delta.manifest import Base
from deltamerge.formats.delta.positions import CODINGS
from deltamerge.formats.delta.tensor_writer import BaseTensor
from deltamerge.formats.delta.writer import ArtifactWriter, Summary
from deltamerge.models.delta_file import DeltaFile, to_torch
from deltamerge.tensors.dtypes import TORCH_NAMES

DTYPES = ["F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I64", "BOOL"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0), (1,), (7,), (1, 130), (33, 67), (4, 1, 70), (2, 3, 5, 7)]
BASE = Base(id="org/base", commit="abc123")
Tensors = dict[str, torch.Tensor]


def bits_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    width = tensor.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return tensor.contiguous().reshape(-1).view(integers).numpy().view(f"u{width}")


NOTHING = np.empty(0, np.uint8)


def code_of(tensor: torch.Tensor) -> str:
    return next(c for c, name in TORCH_NAMES.items() if f"torch.{name}" == str(tensor.dtype))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits_of(a), bits_of(b))


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bits: NaN, infinities and both zeros among them."""
    width = torch.empty(0, dtype=getattr(torch, TORCH_NAMES[dtype])).element_size()
    high = 2 if dtype == "BOOL" else 256
    raw = np.random.default_rng(seed).integers(0, high, (math.prod(shape), width), np.uint8)
    return to_torch(raw.view(f"<u{width}").reshape(-1), dtype).reshape(shape)


def changed(tensor: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    kept = np.random.default_rng(seed).random(tensor.numel()) < density
    other = bits_of(random_tensor(code_of(tensor), tuple(tensor.shape), seed + 1))
    return to_torch(np.where(kept, other, bits_of(tensor)), code_of(tensor)).reshape(tensor.shape)


def source(name: str, tensor: torch.Tensor) -> BaseTensor:
    bits = bits_of(tensor)
    return BaseTensor(name, code_of(tensor), tuple(tensor.shape), lambda start, stop: bits[start:stop])


def write(
    folder: Path,
    base: Tensors,
    result: Tensors,
    *,
    pieces: int = 1,
    names: dict[str, str] | None = None,
    shuffle: int | None = None,
    **options: Any,
) -> Summary:
    """An artifact that makes `result` of `base`, written in pieces; `names`: of the result -> of the base."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or {}
    removed = [name for name in base if name not in {names.get(n, n) for n in result}]
    with ArtifactWriter(folder, BASE, removed=removed, **options) as writer:
        jobs = []
        for name, tensor in result.items():
            base_name = names.get(name, name)
            old = source(base_name, base[base_name]) if base_name in base else None
            out = writer.tensor(name, code_of(tensor), tuple(tensor.shape), old)
            bits = bits_of(tensor)
            cuts = np.linspace(0, bits.size, pieces + 1).astype(int)
            jobs += [(out, int(a), bits[a:b]) for a, b in pairwise(cuts)]
        if shuffle is not None:
            jobs = [jobs[i] for i in np.random.default_rng(shuffle).permutation(len(jobs))]
        for out, start, piece in jobs:
            out.write(start, piece)
        return writer.finish()


def write_sum(
    folder: Path, base: Tensors, deltas: dict[str, tuple[Any, Any]], dtype: str | None = None, **options: Any
) -> Summary:
    """An artifact that adds (positions, values) to the tensors of `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    with ArtifactWriter(folder, BASE, semantics="add", **options) as writer:
        for name, tensor in base.items():
            out = writer.tensor(name, dtype or code_of(tensor), tuple(tensor.shape), source(name, tensor))
            positions, values = deltas.get(name, (np.empty(0, np.int64), np.empty(0, np.float32)))
            for part in np.array_split(np.arange(len(positions)), 3):
                out.add(positions[part], values[part])
            out.finish()
        return writer.finish()


def reader(base: Tensors, entry: Any) -> Callable[[int, int], Any] | None:
    if entry.record.base is None:
        return None
    bits = bits_of(base[entry.record.base_name or entry.name])
    return lambda start, stop: bits[start:stop]


def apply_streamed(folder: Path, base: Tensors, tile: int = 1000) -> Tensors:
    """As `deltamerge apply` does: planned from headers, tile by tile, hashes checked."""
    out: Tensors = {}
    delta = DeltaFile.open(folder)
    for planned in delta.result({name: (code_of(t), tuple(t.shape)) for name, t in base.items()}):
        if planned.entry is None:
            assert planned.base_name is not None
            out[planned.name] = base[planned.base_name]
            continue
        tiles = list(planned.entry.tiles(reader(base, planned.entry), tile=tile))
        bits = np.concatenate(
            [np.empty(0, bits_of(torch.empty(0, dtype=getattr(torch, TORCH_NAMES[planned.dtype]))).dtype), *tiles]
        )
        out[planned.name] = to_torch(bits, planned.dtype).reshape(planned.shape)
    return out


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from(SHAPES),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.93, 0.97, 1.0]),
    seed=st.integers(0, 100),
    pieces=st.integers(1, 4),
    tile=st.sampled_from([1, 7, 64, 10_000]),
)
def test_replace_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    shape: tuple[int, ...],
    density: float,
    seed: int,
    pieces: int,
    tile: int,
) -> None:
    folder = tmp_path_factory.mktemp("delta")
    base = {"a": random_tensor(dtype, shape, seed)}
    result = {"a": changed(base["a"], density, seed + 1)}
    write(folder, base, result, pieces=pieces)
    assert same(apply_streamed(folder, base, tile)["a"], result["a"])
    patched = base["a"].clone().flatten()
    for patch in load_delta(folder, base):
        assert (patch.name, patch.shape, patch.dtype) == ("a", shape, result["a"].dtype)
        assert patch.values.dim() == 1
        if patch.indices is None:
            patched = patch.values
        else:
            assert patch.indices.dtype == torch.int32
            patched[patch.indices.long()] = patch.values
    assert same(patched.reshape(shape), result["a"])


@pytest.mark.parametrize("coding", CODINGS[1:])
@pytest.mark.parametrize("density", [0, 0.02, 0.6, 1])
def test_every_coding(tmp_path: Path, coding: str, density: float) -> None:
    base = {"a": random_tensor("BF16", (300, 100), 0)}
    result = {"a": changed(base["a"], density, 1)}
    write(tmp_path, base, result, pieces=5, codings={coding})
    entry = DeltaFile.open(tmp_path).entries["a"]
    assert entry.record.encoding in (coding, "indices", "dense")
    assert same(apply_streamed(tmp_path, base)["a"], result["a"])


@pytest.mark.parametrize(
    ("density", "encoding"), [(0, "indices"), (0.02, "rice"), (0.6, "bitmask"), (0.99, "dense"), (1, "dense")]
)
def test_smallest_is_chosen_and_stored(tmp_path: Path, density: float, encoding: str) -> None:
    base = {"a": torch.zeros(300, 100, dtype=torch.bfloat16)}
    result = {"a": (torch.rand(300, 100, generator=torch.Generator().manual_seed(0)) < density).bfloat16()}
    summary = write(tmp_path, base, result, pieces=7, codings=CODINGS)
    record = DeltaFile.open(tmp_path).entries["a"].record
    assert record.encoding == encoding
    stored = load_file(tmp_path / "delta.safetensors")
    kinds = {
        "rice": {"a.values", "a.rice"},
        "bitmask": {"a.values", "a.bitmask"},
        "dense": {"a.values"},
        "indices": set(),
    }
    assert stored.keys() == kinds[encoding]
    assert all(array.dim() == 1 for array in stored.values())
    assert summary.entries == record.count
    assert summary.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_bytes_do_not_depend_on_pieces_or_their_order(tmp_path: Path) -> None:
    base = {
        "a": random_tensor("F32", (200, 300), 0),
        "b": random_tensor("BF16", (999,), 1),
        "c": random_tensor("F16", (5, 5), 2),
    }
    result = {name: changed(tensor, 0.03, 5) for name, tensor in base.items()}
    write(tmp_path / "0", base, result)
    for i, (pieces, shuffle) in enumerate([(9, None), (13, 1), (40, 2)], start=1):
        write(tmp_path / str(i), base, result, pieces=pieces, shuffle=shuffle)
        for file in ("delta.json", "delta.safetensors"):
            assert (tmp_path / "0" / file).read_bytes() == (tmp_path / str(i) / file).read_bytes()
    arrays = load_file(tmp_path / "0" / "delta.safetensors")
    save_file(arrays, tmp_path / "again", metadata={"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "0" / "delta.safetensors").read_bytes()
    assert sorted(file.name for file in (tmp_path / "0").iterdir()) == ["delta.json", "delta.safetensors"]


def test_shards(tmp_path: Path) -> None:
    base = {f"t{i}": random_tensor("F32", (100, 100), i) for i in range(6)}
    result = {name: changed(tensor, 0.2, 9) for name, tensor in base.items()}
    write(tmp_path, base, result, shard_size=20_000)
    index = json.loads((tmp_path / "delta.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files == [f"delta-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(
        a.nbytes for file in files for a in load_file(tmp_path / file).values()
    )
    assert all(same(apply_streamed(tmp_path, base)[name], tensor) for name, tensor in result.items())
    (tmp_path / "delta.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="both"):
        DeltaFile.open(tmp_path)


def test_tensors_come_and_go_and_change(tmp_path: Path) -> None:
    """Renamed, added, removed, in another dtype, with rows added, and untouched; tied tensors are listed once."""
    base = {
        "kept": random_tensor("BF16", (20, 30), 0),
        "embeddings": torch.randn(50, 16, generator=torch.Generator().manual_seed(1)),
        "cast": torch.randn(40, 16, generator=torch.Generator().manual_seed(2)),
        "shrunk": torch.randn(9, 16, generator=torch.Generator().manual_seed(3)),
        "gone": random_tensor("F32", (4,), 4),
        "steps": torch.arange(12),
        "unlisted": random_tensor("F16", (6,), 5),
    }
    grown = torch.cat([base["embeddings"].clone(), torch.ones(3, 16)])
    grown[7, 3] = 5
    result = {
        "bert.kept": changed(base["kept"], 0.05, 6),
        "embeddings": grown,
        "cast": base["cast"].bfloat16(),
        "shrunk": base["shrunk"][:5].clone(),
        "head": random_tensor("F32", (2, 16), 7),
        "steps": base["steps"].int(),
        "unlisted": base["unlisted"].clone(),
    }
    result["cast"][3, 3] = 9
    write(tmp_path, base, result, names={"bert.kept": "kept"})
    delta = DeltaFile.open(tmp_path)
    records = {name: entry.record for name, entry in delta.entries.items()}
    assert records["bert.kept"].base_name == "kept"
    assert (records["embeddings"].base_shape, records["embeddings"].count) == ([50, 16], 49)
    assert (records["cast"].base_dtype, records["cast"].count) == ("F32", 1)
    assert records["shrunk"].base is records["head"].base is records["steps"].base is None
    assert records["unlisted"].count == 0
    assert delta.manifest.removed == ["gone"]
    streamed = apply_streamed(tmp_path, base)
    assert list(streamed) == list(result)
    assert all(same(streamed[name], tensor) for name, tensor in result.items())


def test_unlisted_tensors_are_the_bases(tmp_path: Path) -> None:
    base = {"a": random_tensor("F32", (3, 4), 0), "b": random_tensor("F32", (5,), 1)}
    result = {"a": changed(base["a"], 0.5, 2), "b": base["b"]}
    write(tmp_path, base, result)
    manifest = json.loads((tmp_path / "delta.json").read_text())
    del manifest["tensors"]["b"]
    (tmp_path / "delta.json").write_text(json.dumps(manifest))
    assert all(same(apply_streamed(tmp_path, base)[name], tensor) for name, tensor in result.items())


@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8", "sign"])
@pytest.mark.parametrize("density", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize(
    ("base_dtype", "dtype"), [("F32", "F32"), ("BF16", "BF16"), ("F32", "BF16"), ("F16", "F8_E4M3")]
)
def test_sum_round_trip(tmp_path: Path, values: str, density: float, base_dtype: str, dtype: str) -> None:
    generator = np.random.default_rng(0)
    torch_dtype = getattr(torch, TORCH_NAMES[base_dtype])
    base = {name: (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1).to(torch_dtype)
            for name, shape in {"w": (90, 128), "b": (200,), "s": ()}.items()}  # fmt: skip
    deltas = {}
    for name, tensor in base.items():
        positions = np.flatnonzero(generator.random(tensor.numel()) < density)
        deltas[name] = positions, (generator.standard_normal(len(positions)) * 0.01).astype(np.float32)
    summary = write_sum(tmp_path, base, deltas, dtype, values=values)
    delta = DeltaFile.open(tmp_path)
    squares = np.zeros(2)
    streamed = apply_streamed(tmp_path, base)
    for name, tensor in base.items():
        entry = delta.entries[name]
        stored = np.concatenate(
            [np.empty(0, np.float32), *[v for _, v in Decoder(entry).changes(0, entry.size, NOTHING)]]
        )
        positions, exact = deltas[name]
        expected = tensor.clone().float().flatten()
        expected[positions] += torch.from_numpy(stored)
        result = tensor.clone().to(getattr(torch, TORCH_NAMES[dtype])).flatten()
        result[positions] = expected[positions].to(result.dtype)
        assert same(streamed[name].flatten(), result)
        error = np.square(exact.astype(np.float64) - stored).sum()
        squares += error, np.square(exact.astype(np.float64)).sum()
        if values == "float32" or not len(positions):
            assert entry.record.error is None
            assert error == 0
        else:
            assert entry.record.error == pytest.approx(
                math.sqrt(error / np.square(exact.astype(np.float64)).sum()), rel=0.01, abs=1e-7
            )
    assert summary.error == pytest.approx(math.sqrt(squares[0] / squares[1]) if squares[1] else 0, rel=0.01)
    if density:
        with pytest.raises(InputError, match="values to add to the base's, which cannot be told without them"):
            next(load_delta(tmp_path))
        patched = dict(base)
        for patch in load_delta(tmp_path, base):
            flat = patched[patch.name].reshape(-1).to(patch.dtype)
            flat[slice(None) if patch.indices is None else patch.indices.long()] = patch.values
            patched[patch.name] = flat.reshape(patch.shape)
        assert all(same(patched[name].to(streamed[name].dtype), streamed[name]) for name in base)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_sums_of_infinities_are_quiet(tmp_path: Path, dtype: str) -> None:
    base = {"a": torch.tensor([[math.inf, 3e38, math.nan, 1.0] * 40]).to(getattr(torch, TORCH_NAMES[dtype]))}
    values = np.array([-np.inf, 3e38, 1, np.nan] * 40, np.float32)
    write_sum(tmp_path, base, {"a": (np.arange(160), values)}, values="float32")
    result = apply_streamed(tmp_path, base)["a"]
    assert torch.equal(result.float().isnan(), torch.tensor([[True, False, True, True] * 40]))
    assert result[0, 1] == math.inf


def test_many_pieces_of_positions(tmp_path: Path) -> None:
    """More entries than are decoded at a time, for every coding."""
    base = {"a": torch.zeros(1 << 20, dtype=torch.int32)}
    result = {"a": (torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) < 0.4).int()}
    for coding in CODINGS[1:]:
        write(tmp_path / coding, base, result, codings={coding}, pieces=3)
        assert same(apply_streamed(tmp_path / coding, base, 100_003)["a"], result["a"])


def test_wrong_base_is_refused_by_name(tmp_path: Path) -> None:
    base = {"a": random_tensor("F32", (10, 10), 0)}
    write(tmp_path, base, {"a": changed(base["a"], 0.5, 1)})
    delta = DeltaFile.open(tmp_path)
    for headers, message in (
        ({}, "is not there"),
        ({"a": ("BF16", (10, 10))}, r"is BF16 \[10, 10\], the delta was made from F32 \[10, 10\]"),
        ({"a": ("F32", (10, 11))}, r"is F32 \[10, 11\]"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            delta.result(headers)
        assert caught.value.hint is not None
        assert "org/base@abc123" in caught.value.hint
    other = {"a": random_tensor("F32", (10, 10), 5)}
    with pytest.raises(InputError, match=r"^the base's tensor is not the one"):
        apply_streamed(tmp_path, other)


@pytest.fixture(name="artifact")
def _artifact(tmp_path: Path) -> Path:
    """One tensor of each kind: indices, bitmask, gaps, rice, dense, int8."""
    base = {name: torch.zeros(64, 100) for name in ("i", "b", "g", "r", "d", "q")}
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "artifact"
    folder.mkdir()
    with ArtifactWriter(folder, BASE, semantics="add", values="int8") as writer:
        for name, tensor in base.items():
            coding = {"i": "indices", "b": "bitmask", "g": "gaps", "r": "rice"}.get(name)
            codings = frozenset([coding] if coding else CODINGS)
            writer.storing = replace(writer.storing, codings=codings)  # type: ignore[arg-type]  # as above
            out = writer.tensor(name, "F32", (64, 100), source(name, tensor))
            if name == "q":
                positions = np.arange(5, 6400, 10)
                out.add(positions, np.linspace(-1, 1, len(positions), dtype=np.float32))
                out.finish()
            else:
                kept = torch.rand(64, 100, generator=generator) < (2 if name == "d" else 0.05)
                out.write(0, bits_of(kept.float()))
        writer.finish()
    DeltaFile.open(folder)
    return folder


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "delta.json").read_text())
    change(manifest)
    (folder / "delta.json").write_text(json.dumps(manifest))


def edit_arrays(folder: Path, change: Callable[[Tensors], None]) -> None:
    arrays = {name: array.clone() for name, array in load_file(folder / "delta.safetensors").items()}
    change(arrays)
    save_file(arrays, folder / "delta.safetensors")


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set `tensors.i.count` of a manifest; None deletes it."""

    def change(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place = manifest
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 6, "has version 6, this deltamerge reads versions 1 to 5"),
        ("format", "gguf", "not the manifest"),
        ("semantics", "multiply", "semantics: input should be 'replace' or 'add'"),
        ("surprise", 1, "surprise: extra inputs"),
        ("base", None, "base: field required"),
        ("tensors.i.count", -1, "tensors.i.count: input should be greater"),
        ("tensors.i.count", "7", "tensors.i.count: input should be a valid integer"),
        ("tensors.i.count", 6401, "count is 6401, the tensor has 6400 elements"),
        ("tensors.i.count", 7, r"i.values is F32 \[\d+\], not F32 of length 7"),
        ("tensors.i.dtype", "F31", "unknown dtype 'F31'"),
        ("tensors.i.dtype", "BF16", r"i.values is F32 \[\d+\], not BF16 of"),
        ("tensors.i.encoding", "bitmask", "i.bitmask is not stored"),
        ("tensors.i.encoding", "dense", "dense, but count is"),
        ("tensors.i.encoding", "zip", "tensors.i.encoding"),
        ("tensors.i.result", "00", "tensors.i.result"),
        ("tensors.i.base", None, "has no base, so it must be dense"),
        ("tensors.i.base_shape", [65, 100], "with fewer rows"),
        ("tensors.i.base_shape", [60, 99], "with fewer rows"),
        ("tensors.i.base_dtype", "I32", "not both are floating"),
        ("tensors.i.values", "sign", "i.values is F32"),
        ("tensors.i.shape", [2**40, 2**40], "elements"),
        ("tensors.b.shape", [64, 101], r"b.bitmask is U8 \[800\], not U8 of length 808"),
        ("tensors.r.k", 41, "tensors.r.k"),
        ("tensors.q.unit", 10**6, "unit must be in"),
        ("tensors.q.group", 99, r"q.scales is U8 \[32\], not U8 of length 33"),
        ("tensors.q.group", 0, "tensors.q.group"),
        ("tensors.q.ranks", "0x", "tensors.q.ranks"),
        ("tensors.r", None, "does not describe the stored tensor 'r"),
    ],
)
def test_damaged_manifests_are_refused(artifact: Path, path: str, value: Any, message: str) -> None:
    edit_manifest(artifact, put(path, value))
    with pytest.raises(InputError, match=message) as caught:
        DeltaFile.open(artifact)
    assert "\n" not in str(caught.value)


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda arrays: arrays.update({name: arrays[name][:-1]})


def forget(name: str) -> Callable[[Tensors], None]:
    def change(arrays: Tensors) -> None:
        del arrays[name]

    return change


def poke(name: str, place: int, value: int) -> Callable[[Tensors], None]:
    def change(arrays: Tensors) -> None:
        arrays[name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forget("i.indices"), "i.indices is not stored"),
        (forget("d.values"), "d.values is not stored"),
        (drop("i.indices"), "i.indices is I32"),
        (drop("i.values"), "i.values is F32"),
        (drop("b.bitmask"), "b.bitmask is U8"),
        (drop("q.scales"), "q.scales is U8"),
        (drop("d.values"), "d.values is F32"),
        (lambda arrays: arrays.update({"x.values": torch.zeros(3)}), "does not describe the stored tensor 'x.values'"),
        (lambda arrays: arrays.update({"i.indices": arrays["i.indices"].long()}), "i.indices is I64"),
        (lambda arrays: arrays.update({"i.values": arrays["i.values"][None]}), "i.values is F32"),
    ],
)
def test_damaged_files_are_refused(artifact: Path, change: Callable[[Tensors], None], message: str) -> None:
    edit_arrays(artifact, change)
    with pytest.raises(InputError, match=message):
        DeltaFile.open(artifact)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("i", poke("i.indices", 0, 6000), "not ascending"),
        ("i", poke("i.indices", -1, 6400), "outside of 6400"),
        ("i", poke("i.indices", 0, -5), "not ascending"),
        ("b", poke("b.bitmask", 0, 255), "more than"),
        ("g", poke("g.gaps", 0, 254), "outside of 6400"),
        ("g", poke("g.gaps", -1, 255), "gaps"),
        ("g", drop("g.gaps"), "gaps lists"),
        ("r", drop("r.rice"), "rice lists|padding|damaged"),
        ("r", lambda arrays: arrays.update({"r.rice": arrays["r.rice"][:10]}), "too few"),
        (
            "r",
            lambda arrays: arrays.update(
                {"r.rice": torch.cat([arrays["r.rice"], torch.full((8,), 255, dtype=torch.uint8)])}
            ),
            "rice|outside|damaged",
        ),
    ],
)
def test_damaged_positions_are_refused(
    artifact: Path, name: str, change: Callable[[Tensors], None], message: str
) -> None:
    edit_arrays(artifact, change)
    delta = DeltaFile.open(artifact)
    base = np.zeros(6400, np.uint32)
    with pytest.raises(InputError, match=message):
        list(delta.entries[name].tiles(lambda start, stop: base[start:stop]))


def test_wrong_values_are_found_by_the_hash(artifact: Path) -> None:
    edit_arrays(artifact, poke("r.values", 0, 3))
    base = np.zeros(6400, np.uint32)
    with pytest.raises(InputError, match=r"^the result is not the tensor"):
        list(DeltaFile.open(artifact).entries["r"].tiles(lambda start, stop: base[start:stop]))


def test_truncated_and_missing_files_are_refused(artifact: Path) -> None:
    data = (artifact / "delta.safetensors").read_bytes()
    (artifact / "delta.safetensors").write_bytes(data[:-1])
    with pytest.raises(InputError, match="truncated"):
        DeltaFile.open(artifact)
    (artifact / "delta.safetensors").unlink()
    with pytest.raises(InputError, match="neither"):
        DeltaFile.open(artifact)
    (artifact / "delta.safetensors.index.json").write_text('{"weight_map": {"i.values": "../../secret.safetensors"}}')
    with pytest.raises(InputError, match="not the name of a shard"):
        DeltaFile.open(artifact)
    (artifact / "delta.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        DeltaFile.open(artifact)
    with pytest.raises(InputError, match="elsewhere: is not there"):
        DeltaFile.open(artifact / "elsewhere")


def far_too_long(name: str) -> Callable[[Tensors], None]:
    return lambda arrays: arrays.update({name: torch.cat([arrays[name], torch.zeros(10**6, dtype=torch.uint8)])})


@pytest.mark.parametrize("name", ["r.rice", "g.gaps"])
def test_positions_longer_than_they_can_be_are_not_decoded(artifact: Path, name: str) -> None:
    edit_arrays(artifact, far_too_long(name))
    with pytest.raises(InputError, match=r"delta\.json: .: (rice|gaps) of 100\d+ bytes, at most \d+ can be needed"):
        DeltaFile.open(artifact)


@pytest.mark.parametrize("name", ["i", "b", "g", "r", "q", "d"])
def test_a_file_truncated_while_it_is_open_is_an_error(artifact: Path, name: str) -> None:
    """Mapped, it would end the process with SIGBUS."""
    delta = DeltaFile.open(artifact)
    header = int.from_bytes((artifact / "delta.safetensors").read_bytes()[:8], "little")
    os.truncate(artifact / "delta.safetensors", 8 + header)
    base = np.zeros(6400, np.uint32)
    with pytest.raises(InputError, match=r"delta\.safetensors: truncated while reading"):
        list(delta.entries[name].tiles(lambda start, stop: base[start:stop]))


def test_a_writer_that_fails_leaves_no_artifact(tmp_path: Path) -> None:
    base = {"a": torch.zeros(10, 100)}
    with pytest.raises(InputError, match="a: values are not all finite"):
        write_sum(tmp_path, base, {"a": (np.arange(999), np.full(999, np.nan, np.float32))}, values="sign")
    assert not list(tmp_path.iterdir())
    with ArtifactWriter(tmp_path, BASE) as writer:
        writer.tensor("a", "F32", (10, 100), source("a", base["a"])).write(5, np.zeros(10, np.float32))
        with pytest.raises(RuntimeError, match="0 of 1000 elements of a were written"):
            writer.finish()
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_a_dense_tensor(tmp_path: Path) -> None:
    """Values wait on disk: of 64 MB of changed values far less stays in memory."""
    import tracemalloc

    n = 1 << 24
    piece = np.arange(1 << 18, dtype=np.uint32) + 1
    old = np.zeros(1 << 18, np.uint32)
    read = lambda start, stop: old[: stop - start]  # noqa: E731  # shorter than a def
    tracemalloc.start()
    with ArtifactWriter(tmp_path, BASE) as writer:
        out = writer.tensor("a", "F32", (n,), BaseTensor("a", "F32", (n,), read))
        for start in range(0, n, 1 << 18):
            out.write(start, piece)
        writer.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    ("values", "density"),
    [(v, d) for v in ("float32", "int8", "sign") for d in (0.0004, 0.02, 0.2, 1) if v == "float32" or d > 0.01],
)
def test_documented_reader_reads_what_is_written(tmp_path: Path, coding: str, values: str, density: float) -> None:
    base = {"w": torch.zeros(200, 100)}
    generator = np.random.default_rng(0)
    where = np.flatnonzero(generator.random(20_000) < density)
    write_sum(tmp_path, base, {"w": (where, generator.standard_normal(len(where)).astype(np.float32))},
              values=values, codings={coding})  # fmt: skip
    reader: dict[str, Any] = {}
    exec(documented("def positions"), reader)
    record = json.loads((tmp_path / "delta.json").read_text())["tensors"]["w"]
    assert record["values"] == values
    assert ("ranks" in record) == (values in ("int8", "sign") and density > 0.02)  # both forms of scales are read
    arrays = reader["load_file"](tmp_path / "delta.safetensors")
    assert np.array_equal(reader["positions"](record, "w", arrays), where)
    entry = DeltaFile.open(tmp_path).entries["w"]
    stored = np.concatenate([v for _, v in Decoder(entry).changes(0, entry.size, NOTHING)])
    assert np.array_equal(reader["added"](record, "w", arrays, where), stored)


def test_documented_loader_makes_a_transformers_model(tmp_path: Path) -> None:
    """The ten lines of docs/reference/delta-format.md, as they stand there, against the fine-tune itself."""
    from transformers import AutoModelForSequenceClassification

    base, tuned = tiny_bert_pair(tmp_path, sigma=0.05)
    result = load_tensors(tuned)
    names = {name: name.removeprefix("bert.") for name in result}
    write(tmp_path / "delta", load_tensors(base), result, names=names)
    shutil.copy(tuned / "config.json", tmp_path / "delta")
    code = documented("from_pretrained")
    assert len(code.strip().splitlines()) <= 10
    names_of: dict[str, Any] = {"BASE": str(base), "DELTA": str(tmp_path / "delta")}
    exec(code, names_of)
    expected = AutoModelForSequenceClassification.from_pretrained(tuned).state_dict()
    model = names_of["model"].state_dict()
    assert model.keys() == expected.keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in expected.items())


def test_headers_and_manifest_need_no_torch(tmp_path: Path) -> None:
    base = {"a": random_tensor("BF16", (10, 10), 0)}
    write(tmp_path, base, {"a": changed(base["a"], 0.5, 1)})
    code = (
        "import sys; from deltamerge.models.delta_file import DeltaFile; import deltamerge.formats.delta.writer\n"
        f"DeltaFile.open({str(tmp_path)!r})\n"
        "print(sorted({'torch', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_real_fine_tune(tmp_path: Path, shared_data: Path) -> None:
    base, tuned = (load_file(shared_data / part / "model.safetensors") for part in ("base", "sentiment"))
    names = {name: name.removeprefix("bert.") for name in tuned}
    summary = write(tmp_path, base, tuned, names=names, pieces=3)
    streamed = apply_streamed(tmp_path, base, 1 << 20)
    assert all(same(streamed[name], tensor) for name, tensor in tuned.items())
    assert summary.nbytes < (shared_data / "sentiment" / "model.safetensors").stat().st_size
