"""The encoding `steps`: exact for every pattern, the same by kernels, numpy and the documented reader; small; what is
damaged, truncated or of another base is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from format_reader import read_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from deltamerge.apps.chain.live import load_delta
from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.delta import steps, tensor_writer
from deltamerge.formats.delta.manifest import Base
from deltamerge.formats.delta.positions import CODINGS
from deltamerge.formats.delta.steps import STEP_TILE, decode_tile, encode_tile, ordered, unordered
from deltamerge.formats.delta.tensor_writer import BaseTensor
from deltamerge.formats.delta.writer import ArtifactWriter
from deltamerge.models.delta_file import DeltaFile, to_torch

Array = np.ndarray[Any, Any]
VECTORS = Path(__file__).with_name("vectors")
DTYPES = ("BF16", "F16")
PATTERNS = np.arange(1 << 16, dtype=np.uint16)


@pytest.fixture(params=["compiled", "numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "native", lambda: None)
    elif not kernels.available():
        pytest.skip("no compiled kernels here")
    return str(request.param)


def mixed(size: int) -> Array:
    """u(i) of vectors/README.md."""
    return ((np.arange(size) * 40503 + 7) & 0xFFFF).astype(np.uint16)


def weights(size: int) -> Array:
    i = np.arange(size)
    return ((mixed(size) & 0x807F) | (110 + i * i % 17) << 7).astype(np.uint16)


def stepped(base: Array, where: Array, steps: Array) -> Array:
    out = base.copy()
    out[where] = unordered(ordered(base[where]) + steps.astype(np.uint16))
    return out


def vectors() -> dict[str, tuple[str, tuple[int, ...], Array, Array]]:
    """Name: dtype, shape, the base's patterns (with rows added), the result's."""
    out = {}
    for name, dtype in (("patterns", "BF16"), ("half", "F16")):
        base = mixed(1 << 16)
        i = np.arange(0, base.size, 37)
        new = stepped(base, i, (i * 7919 % 5 - 2) * (1 + (i % 31 == 0) * 9000))
        new[::1009] ^= 0x8000
        out[name] = dtype, (256, 256), base, new
    for name, size, share in (("weights", 40_000, 20), ("most", 3000, 0.1), ("tiles", STEP_TILE + 600, 500)):
        base = weights(size)
        i = np.arange(size)
        draw = i * 2654435761 % (1 << 32) / 2**32
        fine = 2.0 ** (112 - (base >> 7 & 255).astype(int))
        where = np.flatnonzero(draw * share < np.minimum(4 * fine, 1.6))
        steps = np.where(where * 48271 % 7 < 3, -1, 1) * (1 + (where * 69621 % 11 < 2) * (where * 69621 % 5))
        out[name] = "BF16", (size,), base, stepped(base, where, steps)
    base = mixed(12 * 64)
    base[640:] = 0
    out["grown"] = "BF16", (12, 64), base, stepped(base, np.arange(3, 768, 11), np.arange(3, 768, 11) % 3 + 1)
    return out


def write(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...], Array, Array]], pieces: int = 1) -> Any:
    folder.mkdir(exist_ok=True, parents=True)
    with ArtifactWriter(folder, Base(id="formulas")) as writer:
        for name, (dtype, shape, base, new) in tensors.items():
            old_shape = (10, 64) if name == "grown" else shape
            old = BaseTensor(name, dtype, old_shape, lambda start, stop, base=base: base[start:stop])
            out = writer.tensor(name, dtype, shape, old)
            for part in np.array_split(np.arange(new.size), pieces):
                out.write(int(part[0]), new[part])
        return writer.finish()


def coded(base: Array, new: Array, dtype: str) -> Array:
    where = np.flatnonzero(base != new)
    return encode_tile(base, where, new[where], dtype)


def decoded(stored: Array, base: Array, dtype: str) -> Array:
    where, values = decode_tile(stored, base, dtype)
    assert (np.diff(where) > 0).all()
    out = base.copy()
    out[where] = values
    return out


def test_order_of_patterns() -> None:
    assert np.array_equal(unordered(ordered(PATTERNS)), PATTERNS)
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.from_numpy(PATTERNS.view(np.int16)).view(dtype).double().numpy()
        by_place = values[np.argsort(ordered(PATTERNS))]
        finite = by_place[~np.isnan(by_place)]
        assert (np.diff(finite[np.isfinite(finite)]) >= 0).all()
        assert np.isnan(by_place[[0, -1]]).all()
    assert ordered(np.array([0], np.uint16)) - ordered(np.array([0x8000], np.uint16)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, -1, 2, -2, 3, 5, -17, 255, 4096, -30000, 32767, -32768])
def test_every_pattern_takes_every_kind_of_step(backend: str, dtype: str, step: int) -> None:
    """All 65,536 of them, and then a part: with their neighbours unchanged, in order and not."""
    base = PATTERNS if step > 0 else np.random.default_rng(step & 0xFF).permutation(PATTERNS)
    for where in (np.arange(base.size), np.arange(abs(step) % 7, base.size, 13)):
        new = stepped(base, where, np.full(where.size, step))
        assert np.array_equal(decoded(coded(base, new, dtype), base, dtype), new)


def test_as_many_groups_as_exponents(backend: str) -> None:
    """Every second exponent changes: more groups than a header has room for."""
    base = (np.arange(1 << 14) % 256 << 7).astype(np.uint16)
    new = np.where(base >> 7 & 1, base ^ 1, base).astype(np.uint16)
    assert np.array_equal(decoded(coded(base, new, "BF16"), base, "BF16"), new)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1, 2, 7, 64, 1000, 5000]),
    density=st.sampled_from([0.001, 0.01, 0.3, 0.5, 0.9, 1.0]),
    spread=st.sampled_from([0, 1, 2, 50, 32767]),
    kind=st.sampled_from(["patterns", "weights", "equal"]),
    seed=st.integers(0, 1000),
)
def test_kernels_and_numpy_write_and_read_the_same(
    dtype: str, size: int, density: float, spread: int, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base = {"patterns": rng.integers(0, 1 << 16, size).astype(np.uint16), "weights": weights(size),
            "equal": np.full(size, seed, np.uint16)}[kind]  # fmt: skip
    where = np.flatnonzero(rng.random(size) < density)
    new = stepped(base, where, rng.integers(-spread - 1, spread + 1, where.size) | 1)
    stored = coded(base, new, dtype)
    assert np.array_equal(decoded(stored, base, dtype), new)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "native", lambda: None)
        assert np.array_equal(coded(base, new, dtype), stored)
        assert np.array_equal(decoded(stored, base, dtype), new)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(0, (1 << 15) - 1), max_size=40), k=st.integers(0, 15), wide=st.booleans())
def test_lists_are_as_documented(values: list[int], k: int, wide: bool) -> None:
    """Against the formula, a bit a character."""
    zeros = [(v + (1 << k)).bit_length() - 1 - k if wide else v >> k for v in values]
    text = "".join("0" * q + "1" for q in zeros)
    for value, q in zip(values, zeros, strict=True):
        width = k + q if wide else k
        field = value + (1 << k) - (1 << k + q) if wide else value & ((1 << k) - 1)
        text += "".join(str(field >> i & 1) for i in range(width))
    for native in (kernels.native(), None):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(kernels, "native", lambda native=native: native)
            writer = steps.BitWriter(40 * (1 << 15))
            writer.put_bits(np.ones(3, bool))
            writer.put(np.array(values, np.uint32), k, wide=wide)
            bits = "".join(map(str, np.unpackbits(writer.bytes(), bitorder="little")))
            assert bits == ("111" + text).ljust(len(bits), "0")
            assert 0 <= len(bits) - 3 - len(text) < 8
            reader = steps.BitReader(writer.bytes())
            assert reader.take_bits(3).all()
            assert reader.take(len(values), k, wide=wide).tolist() == values
            reader.end()


def test_vectors(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files in the repository: what we write, what we read, and what the reader of the documentation reads."""
    tensors = vectors()
    if backend == "numpy":
        monkeypatch.setattr(tensor_writer, "IN_MEMORY", 100)  # steps wait in files
    write(tmp_path, tensors, pieces=3)
    for name in ("delta.json", "delta.safetensors"):
        assert (tmp_path / name).read_bytes() == (VECTORS / name).read_bytes()
    manifest, arrays = json.loads((VECTORS / "delta.json").read_text()), load_file(VECTORS / "delta.safetensors")
    assert manifest["version"] == 2
    opened = DeltaFile.open(VECTORS)
    for name, record in manifest["tensors"].items():
        _, _, base, new = tensors[name]
        assert record["encoding"] == "steps"
        assert blake3(new.tobytes()).hexdigest(length=16) == record["result"]
        if backend == "numpy":
            assert np.array_equal(read_steps(record, arrays[f"{name}.steps"], base), new)
        got = np.concatenate(list(opened.entries[name].tiles(lambda start, stop, base=base: base[start:stop])))
        assert np.array_equal(got, new)


def test_a_step_of_training_takes_few_bits(tmp_path: Path) -> None:
    """As AdamW makes them: about lr each, however large the weight. At most 1.04 of the entropy of what changes, given
    the base's exponent, and of the sign; and half of what the other encodings take."""
    rng = np.random.default_rng(0)
    master = (rng.standard_normal(1 << 20) * 0.05).astype(np.float32)
    base, new = (
        torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        for x in (master, master + 3e-6 * rng.choice([-1, 1], master.size))
    )
    changed, exponents = base != new, base >> 7 & 255
    sizes, counts = np.bincount(exponents, minlength=256), np.bincount(exponents, changed, 256)
    p = np.clip(counts / np.maximum(sizes, 1), 1e-12, 1 - 1e-12)
    entropy = -(sizes * (p * np.log2(p) + (1 - p) * np.log2(1 - p))).sum() + changed.sum()
    stored = coded(base, new, "BF16")
    sizes_of = np.abs(ordered(new).astype(int) - ordered(base))[changed]
    more = 12 * (sizes_of > 1).sum()
    assert stored.size * 8 <= 1.04 * entropy + more
    summaries = {}
    for name, codings in (("all", None), ("others", CODINGS)):
        (tmp_path / name).mkdir()
        options = {} if codings is None else {"codings": codings}
        with ArtifactWriter(tmp_path / name, Base(id="b"), **options) as writer:
            old = BaseTensor("w", "BF16", (base.size,), lambda start, stop: base[start:stop])
            writer.tensor("w", "BF16", (base.size,), old).write(0, new)
            summaries[name] = writer.finish()
    assert summaries["all"].stored == {"steps": stored.size + 4}
    assert summaries["all"].nbytes * 2 < summaries["others"].nbytes
    assert json.loads((tmp_path / "others" / "delta.json").read_text())["version"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_damage_is_refused_or_harmless(backend: str, dtype: str) -> None:
    """Every byte cut, and every bit of every byte turned: an InputError, or changes that lie in the tile."""
    base = weights(700) if dtype == "BF16" else mixed(700)
    where = np.arange(0, 700, 9)
    stored = coded(base, stepped(base, where, where % 5 - 2 | 1), dtype)
    bent = [stored[:n] for n in range(1, stored.size)] + [np.append(stored, np.uint8(0))]
    bent += [
        stored ^ (np.arange(stored.size) == i) * np.uint8(1 << bit) for i in range(stored.size) for bit in range(8)
    ]
    refused = 0
    for damaged in bent:
        try:
            positions, values = decode_tile(damaged.astype(np.uint8), base, dtype)
        except InputError:
            refused += 1
        else:
            assert positions.size == values.size
            assert ((positions >= 0) & (positions < 700)).all()
    assert refused > stored.size
    with pytest.raises(InputError, match=r"another base|not there"):
        decode_tile(stored, base[:600], dtype)


@pytest.fixture
def artifact(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two tensors with steps, their base and result."""
    tensors = {name: entry for name, entry in vectors().items() if name in ("weights", "most")}
    write(tmp_path / "d", tensors)
    base, new = ({n: to_torch(e[i].copy(), "BF16").reshape(e[1]) for n, e in tensors.items()} for i in (2, 3))
    return tmp_path / "d", base, new


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.int16), b[name].view(torch.int16)) for name in b)


def test_another_base_is_refused_before_the_first_write(backend: str, artifact: Any) -> None:
    folder, base, _ = artifact
    state = {name: tensor.clone() for name, tensor in base.items()}
    state["most"][5] += 1
    before = {name: tensor.clone() for name, tensor in state.items()}
    delta = DeltaFile.open(folder)
    with pytest.raises(InputError, match="most: the base's tensor is not the one"):
        list(load_delta(folder, state))
    bits = state["most"].view(torch.int16).numpy().view(np.uint16)
    with pytest.raises(InputError, match=r"^the base's tensor is not the one"):
        list(delta.entries["most"].tiles(lambda start, stop: bits[start:stop]))
    assert same(state, before)
    with pytest.raises(InputError, match=r"load_delta\(path, base\)|cannot be told without"):
        next(load_delta(folder))


def test_damaged_arrays_are_refused(backend: str, artifact: Any) -> None:
    folder, base, _ = artifact
    raw = bytearray((folder / "delta.safetensors").read_bytes())
    raw[-3] ^= 16
    (folder / "delta.safetensors").write_bytes(bytes(raw))
    with pytest.raises(InputError):
        list(load_delta(folder, base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "steps are of version 2, this is version 1"),
        ({"dtype": "F32"}, "steps are final values of BF16 or F16"),
        ({"values": "int8"}, "steps are final values of BF16 or F16"),
        ({"count": 1}, "steps list 1190 entries, not 1"),
        ({"shape": [1 << 30]}, "do not have 1024 tiles"),
        ({"shape": [60], "count": 60}, "bytes, at most 120 can be needed"),
        ({"encoding": "rice"}, "weights.values is not stored"),
    ],
)
def test_manifests_that_contradict_are_refused(artifact: Any, change: dict[str, Any], message: str) -> None:
    folder, base, _ = artifact
    manifest = json.loads((folder / "delta.json").read_text())
    if "version" in change:
        manifest |= change
    else:
        manifest["tensors"]["weights"] |= change
    (folder / "delta.json").write_text(json.dumps(manifest))
    bits = base["weights"].view(torch.int16).numpy().view(np.uint16)
    with pytest.raises(InputError, match=message):
        list(DeltaFile.open(folder).entries["weights"].tiles(lambda start, stop: bits[start:stop]))


if __name__ == "__main__":
    for stale in VECTORS.glob("delta.*"):
        stale.unlink()
    write(VECTORS, vectors())
    sys.exit(0)
