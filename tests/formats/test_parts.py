"""Parts: the documented reader finds the same values; ranges are parts of the whole; damage is refused; vectors.

`python tests/formats/test_parts.py` writes the vectors of the newest version.
"""

from __future__ import annotations

import bz2
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from format_reader import documented
from safetensors.numpy import load_file, save_file

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.delta import parts, trellis
from deltamerge.formats.delta.entry import Decoder
from deltamerge.formats.delta.manifest import Base
from deltamerge.formats.delta.parts import BITS, LEVELS, pack, packed_bytes, store_entries, store_factors, unpack
from deltamerge.formats.delta.tensor_writer import BaseTensor
from deltamerge.formats.delta.writer import ArtifactWriter
from deltamerge.models.delta_file import DeltaFile

Array = np.ndarray[Any, Any]
# Of versions 3, 4 and 5. Writers write the last.
VECTORS, TRELLIS, ROUNDING = (Path(__file__).with_name(name) for name in ("parts", "trellis", "rounding"))
# Levels and numbers of components of the factors in the vectors.
RANKS = {
    VECTORS.name: ((2, 2), (3, 3), (4, 5), (8, 1), (16, 2), (255, 1)),
    TRELLIS.name: ((16, 1), (257, 4), (258, 3)),
    ROUNDING.name: ((4, 2), (255, 1), (257, 2)),
}
SHAPES = {
    "matrix": ("BF16", (37, 50)),
    "vector": ("F32", (64,)),
    "stack": ("F16", (2, 9, 11)),
    "same": ("BF16", (4, 4)),
}


def mixed(count: int, most: int, salt: int) -> Array:
    """Integers from 0 to most - 1, by a formula."""
    i = np.arange(count, dtype=np.uint64) + np.uint64(salt * 977)
    return ((i * 2654435761 >> np.uint64(7)) % np.uint64(most)).astype(np.int64)


def base_of(name: str) -> Array:
    """The base's bits, by a formula: exponents near 1, so that no sum overflows."""
    dtype, shape = SHAPES[name]
    u = mixed(math.prod(shape), 1 << 16, 5).astype(np.uint32)
    if dtype == "F32":
        return u << 7 | 0x3F000000
    return ((u & 0x83FF) | (0x3C00 if dtype == "BF16" else 0x3000)).astype(np.uint16)


def made_of(name: str, ranks: Sequence[tuple[int, int]]) -> tuple[list[parts.Part], Array]:
    """Parts of every kind, each with every number of levels somewhere."""
    shape = SHAPES[name][1]
    m, n = parts.matrix_shape(shape)
    found: list[tuple[parts.Part, Array]] = []
    groups = []
    for levels, rank in ranks:
        most = 1 << BITS[levels] if levels in trellis.BITS else levels
        u, v = (mixed(rank * side, most, levels + side).reshape(rank, side) for side in (m, n))
        groups.append((levels, u, v, 1e-4 * (1.0 + mixed(rank, 50, levels))))
    found.append(store_factors(groups))
    for levels, along, count in ((4, "row", 9), (3, "column", None), (255, "all", 5), (8, "row", None)):
        where = None if count is None else np.unique(mixed(count, m * n, levels))
        number = m * n if where is None else where.size
        scales = 1e-3 * (1.0 + mixed(parts.scales_of(along, m, n), 9, levels))  # type: ignore[arg-type]
        codes = mixed(number, levels, levels)
        found.append(store_entries(levels, codes, scales, along, where, m * n))  # type: ignore[arg-type]
    return [part for part, _ in found], np.concatenate([stored for _, stored in found])


def write(folder: Path, ranks: Sequence[tuple[int, int]]) -> None:
    folder.mkdir(exist_ok=True)
    with ArtifactWriter(folder, Base(id="formula"), semantics="add") as writer:
        for name, (dtype, shape) in SHAPES.items():
            bits = base_of(name)
            base = BaseTensor(name, dtype, shape, lambda start, stop, bits=bits: bits[start:stop])  # type: ignore[misc]
            tensor = writer.tensor(name, dtype, shape, base)
            tensor.add_parts(*(([], np.empty(0, np.uint8)) if name == "same" else made_of(name, ranks)))
        writer.finish()


def floats(bits: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def rounded(values: Array, dtype: str) -> Array:
    """Bits of float32 values in a dtype, rounded to the nearest, ties to even; no NaN."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    return (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)).astype(np.uint16)


def records(folder: Path) -> dict[str, Any]:
    arrays = load_file(folder / "delta.safetensors")
    found: dict[str, Any] = json.loads(bz2.decompress(arrays["tensors"].tobytes()))
    return found


@pytest.mark.parametrize("levels", [*LEVELS])
def test_codes_are_packed_and_unpacked(levels: int) -> None:
    for count in (1, 7, 8, 9, 41):
        codes = mixed(3 * count, levels, count).reshape(3, count)
        packed = pack(codes, levels)
        assert packed.shape == (3, packed_bytes(count, levels))
        assert (unpack(packed, count, levels) == LEVELS[levels][codes]).all()


@pytest.mark.parametrize("vectors", [VECTORS, TRELLIS, ROUNDING])
@pytest.mark.parametrize("folder", ["made", "kept"])
def test_the_documented_reader_finds_the_same_result(tmp_path: Path, folder: str, vectors: Path) -> None:
    made = vectors if folder == "kept" else tmp_path / "made"
    if folder == "made":
        write(made, RANKS[vectors.name])
        assert load_file(made / "delta.safetensors")["parts"].tobytes() == (
            load_file(vectors / "delta.safetensors")["parts"].tobytes()
        )
        if vectors == ROUNDING:
            assert (made / "delta.json").read_bytes() == (vectors / "delta.json").read_bytes()
    reader: dict[str, Any] = {}
    exec(documented("def positions"), reader)
    exec(documented("def sum_of_parts"), reader)
    exec(documented("def rounded_by_chance"), reader)
    stored, at = load_file(made / "delta.safetensors")["parts"], 0
    opened = DeltaFile.open(made)
    assert list(opened.entries) == list(SHAPES)
    for name, record in records(made).items():
        entry, bits = opened.entries[name], base_of(name)
        dtype, shape = SHAPES[name]
        ours = entry.whole(lambda start, stop, bits=bits: bits[start:stop])  # type: ignore[misc]
        if name == "same":
            assert (ours == bits).all()
            continue
        m, n = parts.matrix_shape(shape)
        size = sum(part.nbytes(m, n) for part in entry.record.parts)
        added = reader["sum_of_parts"](record, stored[at : at + size]).reshape(-1)
        at += size
        by_chance = record.get("rounding") == "stochastic"
        assert by_chance == (dtype != "F32" and (folder == "made" or vectors == ROUNDING))
        sums = floats(bits, dtype) + added
        expected = reader["rounded_by_chance"](sums, dtype) if by_chance else rounded(sums, dtype)
        assert (ours == expected).all()
        assert blake3(expected.tobytes()).hexdigest(length=16) == record["result"]
        assert not (ours == bits).all()
    assert at == stored.size


def test_any_range_is_a_part_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = DeltaFile.open(VECTORS).entries["matrix"]
    decoder = Decoder(entry)
    whole = decoder.codes(0, entry.size)
    for step in (1, 49, 50, 613):
        ranges = [decoder.codes(at, min(at + step, entry.size)) for at in range(0, entry.size, step)]
        assert (np.concatenate(ranges) == whole).all()
    monkeypatch.setattr(parts, "ROWS", 100)
    assert (decoder.codes(0, entry.size) == whole).all()


def test_it_is_the_same_in_any_order_of_the_sum() -> None:
    """Sums of factors are integers below 2**53, so that float64 adds them exactly in any order."""
    rng = np.random.default_rng(0)
    groups = [(16, rng.integers(0, 16, (300, 20)), rng.integers(0, 16, (300, 30)), rng.random(300))]
    part, stored = store_factors(groups)
    made = parts.sum_of([part], stored, 20, 30)
    order = rng.permutation(300)
    (factors,) = made.parts
    assert isinstance(factors, parts.Factored)
    exact = sum(
        int(np.ldexp(s, -part.unit)) * np.outer(u, v).astype(object)
        for s, u, v in zip(
            factors.scales[order], factors.left[order].astype(int), factors.right[order].astype(int), strict=True
        )
    )
    found = made.values(0, 600).reshape(20, 30)
    assert (found == np.ldexp(exact.astype(np.float64), part.unit).astype(np.float32)).all()


def damaged(tmp_path: Path, change: Any, vectors: Path = VECTORS) -> Path:
    """A copy of the vectors with other records, or other bytes."""
    arrays = load_file(vectors / "delta.safetensors")
    found = records(vectors)
    manifest = json.loads((vectors / "delta.json").read_text())
    change(manifest, found, arrays)
    if "tensors" in arrays and arrays["tensors"].size:
        arrays["tensors"] = np.frombuffer(bz2.compress(json.dumps(found).encode()), np.uint8)
    (tmp_path / "delta.json").write_text(json.dumps(manifest))
    save_file(arrays, tmp_path / "delta.safetensors")
    return tmp_path


def no_table(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
    del arrays["tensors"]


def old_version(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
    manifest |= {"version": 2, "tensors": found}
    del arrays["tensors"]


def short(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
    arrays["parts"] = arrays["parts"][:-1].copy()


def long(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
    arrays["parts"] = np.append(arrays["parts"], np.uint8(0))


def huge_rank(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
    found["vector"]["parts"][0]["ranks"]["2"] = 1 << 30


def contradiction(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
    found["vector"]["values"] = "bfloat16"


def too_many(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
    found["vector"]["parts"][1]["count"] = 65


def positions_of_all(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
    del found["vector"]["parts"][1]["count"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_table, "tensors: field required"),
        (old_version, "parts are of version 3, this is version 2"),
        (short, "its parts end at byte"),
        (long, "the tensors have"),
        (huge_rank, "less than or equal to 262144"),
        (contradiction, "values are parts where there are parts"),
        (too_many, "65 entries, the tensor has 64"),
        (positions_of_all, "lists no positions"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        DeltaFile.open(damaged(tmp_path, change))


def test_trellis_codes_are_of_factors_in_version_4(tmp_path: Path) -> None:
    assert json.loads((VECTORS / "delta.json").read_text())["version"] == 3
    assert json.loads((TRELLIS / "delta.json").read_text())["version"] == 4

    def older(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
        manifest["version"] = 3

    def entries(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
        found["vector"]["parts"][1]["levels"] = 257

    with pytest.raises(InputError, match="trellis codes are of version 4, this is version 3"):
        DeltaFile.open(damaged(tmp_path, older, TRELLIS))
    with pytest.raises(InputError, match=r"vector\.parts\.1"):
        DeltaFile.open(damaged(tmp_path, entries, TRELLIS))


def test_stochastic_rounding_is_of_halves_in_version_5(tmp_path: Path) -> None:
    assert json.loads((ROUNDING / "delta.json").read_text())["version"] == 5

    def older(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
        manifest["version"] = 4

    def of_float32(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
        found["vector"]["rounding"] = "stochastic"

    with pytest.raises(InputError, match="stochastically rounded tensors are of version 5, this is version 4"):
        DeltaFile.open(damaged(tmp_path, older, ROUNDING))
    with pytest.raises(InputError, match="vector: rounding is of parts, and of results in BF16 or F16"):
        DeltaFile.open(damaged(tmp_path, of_float32, ROUNDING))


def test_a_range_is_rounded_as_in_the_whole() -> None:
    for name in ("matrix", "stack"):
        entry, bits = DeltaFile.open(ROUNDING).entries[name], base_of(name)
        read = lambda start, stop, bits=bits: bits[start:stop]  # noqa: E731
        for tile in (1, 7, 50):
            assert (np.concatenate([*entry.tiles(read, tile=tile)]) == entry.whole(read)).all()


def test_a_code_of_no_level_is_refused() -> None:
    with pytest.raises(InputError, match="3 levels have a byte 243, 242 is the largest"):
        unpack(np.array([243], np.uint8), 5, 3)
    with pytest.raises(InputError, match="255 levels have a byte 255, 254 is the largest"):
        unpack(np.array([255], np.uint8), 1, 255)


def test_a_table_that_is_no_bzip2_stream_is_refused(tmp_path: Path) -> None:
    def change(manifest: dict[str, Any], found: dict[str, Any], arrays: dict[str, Array]) -> None:
        arrays["tensors"] = np.empty(0, np.uint8)

    folder = damaged(tmp_path, change)
    with pytest.raises(InputError, match="the array tensors is cut short"):
        DeltaFile.open(folder)


# ---- trellis codes


@pytest.mark.parametrize("levels", [*trellis.BITS])
def test_a_trellis_level_is_that_of_the_last_eight_bits(levels: int) -> None:
    bits, count = BITS[levels], 41
    codes = mixed(3 * count, 1 << bits, 1).reshape(3, count)
    packed = pack(codes, levels)
    assert packed.shape == (3, packed_bytes(count, levels))
    found = unpack(packed, count, levels)
    for row, own in zip(codes.tolist(), found.tolist(), strict=True):
        window = 0
        for code, level in zip(row, own, strict=True):
            window = (window << bits | code) & 255
            assert level == trellis.TABLES[levels][window]
    assert (trellis.TABLES[levels] == -trellis.TABLES[levels][::-1]).all()


@pytest.mark.parametrize(("levels", "count"), [(257, 11), (258, 6)])
def test_no_other_codes_are_nearer(levels: int, count: int) -> None:
    x = np.random.default_rng(0).standard_normal((4, count)) / trellis.UNIT[levels]
    each = np.array([*itertools.product(range(1 << BITS[levels]), repeat=count)], np.uint8)
    lost = np.square(x[:, None] - trellis.levels_of(each, levels)[None]).sum(-1)
    found = np.square(x - trellis.levels_of(trellis.nearest(x, levels), levels)).sum(-1)
    np.testing.assert_allclose(found, lost.min(1), rtol=1e-5)


@pytest.mark.parametrize("levels", [*trellis.BITS])
def test_kernels_and_numpy_find_the_same_codes(levels: int, kernel_level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(1).standard_normal((3, 300)) / trellis.UNIT[levels]
    x[1] = 0
    compiled = trellis.nearest(x, levels)
    monkeypatch.setattr(kernels, "native", lambda: None)
    assert (trellis.nearest(x, levels) == compiled).all()
    assert trellis.nearest(x[:0], levels).shape == (0, 300)


@pytest.mark.parametrize("levels", [*trellis.BITS])
def test_a_gaussian_loses_what_is_said(levels: int) -> None:
    x = np.random.default_rng(2).standard_normal((20, 2000))
    unit = trellis.UNIT[levels]
    made = unit * trellis.levels_of(trellis.nearest(x / unit, levels), levels)
    assert np.square(x - made).mean() == pytest.approx(trellis.DISTORTION[levels], rel=0.01)


if __name__ == "__main__":
    for file in ROUNDING.glob("delta*"):
        file.unlink()
    write(ROUNDING, RANKS[ROUNDING.name])
