"""What torch's files may take of memory and work, counted; and archives, of which torch's own reader is the judge."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltamerge.errors import InputError
from deltamerge.formats import torch_bin
from deltamerge.formats.dcp import _Metadata
from deltamerge.formats.torch_bin import FREE, MAX_MEMBERS, Machine, read_torch_header, run

SIZE = 20_000_000
START = b"\x80\x02"
NUMBERS = b"".join(b"K\x01" for _ in range(10_000))

# name -> the pickle's beginning, what is then repeated, and what it has too many of
BOMBS: dict[str, tuple[bytes, bytes, str]] = {
    "lists": (b"", b"]", "places on its stack|lists"),
    "lists in a list": (b"]", b"]a", "lists|operations"),
    "a list in a list in a list": (b"", b"N\x85\x85\x85", "lists"),
    "marks": (b"", b"(", "places on its stack|lists"),
    "nothing": (b"", b"N", "places on its stack|operations"),
    "tables with one key": (b"]", b"}U\x01aNsa", "tables and lists"),
    "what is kept once, again": (b"]q\x00", b"h\x00", "places on its stack"),
    "one value under many keys": (b"]", b"PUT", "entries in its memo"),
}


def repeated(start: bytes, unit: bytes, size: int) -> bytes:
    if unit == b"PUT":
        return START + start + b"".join(b"r" + struct.pack("<I", i) for i in range(size // 5))
    return START + start + unit * (size // len(unit))


def peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("of", [Machine, _Metadata], ids=["a table", "metadata"])
def test_a_pickle_ends_where_it_makes_more_than_its_bytes_can_be_for(bomb: str, of: type[Machine]) -> None:
    """Whatever follows: what counts is what was read so far, so neither work nor memory grow with the file."""
    start, unit, what = BOMBS[bomb]
    data = io.BytesIO(repeated(start, unit, SIZE // 4 if unit == b"PUT" else SIZE))
    machine = of(data, {})
    with pytest.raises(InputError, match=what if of is Machine else "its pickle has"):
        run(machine)
    assert data.tell() < 3_000_000
    assert len(machine.stack) + len(machine.memo) + machine.containers < 40 * FREE


def test_the_file_of_the_issue_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", START + b"]" * SIZE)
        archive.writestr("x/version", b"3\n")

    def read() -> None:
        with pytest.raises(InputError, match="tables and lists in"):
            read_torch_header(path)

    assert peak(read) < 3 * SIZE  # the pickle itself, and a copy while it is read
    path.write_bytes(START + b"]" * SIZE)  # without an archive

    def plain() -> None:
        with pytest.raises(InputError, match=r"is no file of torch\.save"):
            read_torch_header(path)

    assert peak(plain) < 10_000_000


def test_values_of_metadata_are_not_copied_again_and_again() -> None:
    """A long tuple as a size, and a large table as the state of one object, each named by two bytes of the pickle."""
    size = b"ctorch\nSize\nq\x00(" + NUMBERS + b"tq\x01" + b"h\x00h\x01\x85R" * 100
    home = b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81"
    state = b"}q\x01(" + b"".join(b"U\x04%04dN" % i for i in range(1000)) + b"u0"
    state = state.replace(b"u0", b"u") + home + b"h\x01b" * 100
    for data, what in ((size, "has a size that is none"), (state, "an object with 1,000 attributes")):
        with pytest.raises(InputError, match=what):
            run(_Metadata(io.BytesIO(START + data + b"."), {}))


def test_a_text_has_an_end() -> None:
    with pytest.raises(InputError, match=r"a text of 1,000,001 bytes"):
        run(Machine(io.BytesIO(START + b"X" + struct.pack("<I", 1_000_001) + "€".encode() * 400_000 + b"."), {}))


@pytest.mark.parametrize("count", [1_000, 10_000])
@pytest.mark.parametrize("name", ["t{}", "model.layers.{}.mlp.experts.{}.weight"])
def test_what_torch_writes_is_far_below_the_bounds(
    tmp_path: Path, count: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a twentieth of what is free; views of one storage make the densest pickle."""
    monkeypatch.setattr(torch_bin, "FREE", FREE // 20)
    whole = torch.ones(count)
    for values in ([torch.ones(1, 1) for _ in range(count)], [whole[i : i + 1] for i in range(count)]):
        torch.save({name.format(i, i): value for i, value in enumerate(values)}, tmp_path / "x.bin")
        assert len(read_torch_header(tmp_path / "x.bin").tensors) == count


def members() -> dict[str, bytes]:
    made = io.BytesIO()
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(2)}, made)
    with zipfile.ZipFile(made) as archive:
        top = archive.namelist()[0].partition("/")[0]
        return {name.removeprefix(f"{top}/"): archive.read(name) for name in archive.namelist()}


MEMBERS = members()
OTHER = {"other/data.pkl": MEMBERS["data.pkl"], "other/data/0": b"abcd"}
PLAIN = {f"x/{name}": data for name, data in MEMBERS.items()}


def without(name: str) -> dict[str, bytes]:
    return {own: data for own, data in PLAIN.items() if own != f"x/{name}"}


VERSIONS = {f"version {text!r}": PLAIN | {"x/version": text} for text in (b"1", b"3", b"10", b" 3", b"4\n")}
BAD_VERSIONS = (b"99", b"11", b"0", b"", b"x", b"-1", b"\xb2", b"1" * 16, b"1" * 17)
NO_VERSIONS = {f"version {text!r}": PLAIN | {"x/version": text} for text in BAD_VERSIONS}
READ = {
    "as torch writes it": PLAIN,
    "without .data": without(".data/serialization_id"),
    "without byteorder": without("byteorder"),
    "its own version counts": PLAIN | {"x/.data/version": b"3", "x/version": b"99"},
    "names in capitals": {(n if n != "x/version" else "x/VERSION"): d for n, d in PLAIN.items()},
    **VERSIONS,
}
REFUSED = {
    "two folders": PLAIN | OTHER,
    "two folders, the other first": OTHER | PLAIN,
    "a file beside the folder": PLAIN | {"readme": b"x"},
    "a file before the folder": {"readme": b"x"} | PLAIN,
    "a member without a name": PLAIN | {"": b"x"},
    "no version": without("version"),
    "a version of its own": PLAIN | {"x/.data/version": b"99"},
    "a program": PLAIN | {"x/constants.pkl": b"\x80\x02)."},
    "another order": PLAIN | {"x/byteorder": b"LITTLE"},
    "no order": PLAIN | {"x/byteorder": b""},
    "another order in capitals": {n: d for n, d in PLAIN.items() if n != "x/byteorder"} | {"x/BYTEORDER": b"little\n"},
    **NO_VERSIONS,
}  # fmt: skip
# torch reads these, or one of two members; we refuse them rather than guess which
NARROWER = {
    "one name in two cases": PLAIN | {"x/DATA/0": bytes(24)},
    "a name with a zero byte": PLAIN | {"x/data/0\0x": bytes(24)},
    "a version and more": PLAIN | {"x/version": b"3x"},
}


def archived(path: Path, parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", how) as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name), data, how)
    return path


def by_torch(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of programs
            found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    except (RuntimeError, ValueError, IndexError):
        return None
    return found


@pytest.mark.parametrize("case", READ | REFUSED | NARROWER)
def test_an_archive_is_read_where_torch_reads_it(tmp_path: Path, case: str) -> None:
    path = archived(tmp_path / "x.bin", (READ | REFUSED | NARROWER)[case])
    judge = by_torch(path)
    assert (judge is None) == (case in REFUSED)
    if case in READ and judge is not None:
        for name, info in read_torch_header(path).tensors.items():
            stored = path.read_bytes()[info.begin : info.begin + info.nbytes]
            assert stored == judge[name].numpy().tobytes()
        return
    with pytest.raises(InputError) as caught:
        read_torch_header(path)
    assert "\n" not in str(caught.value)


def test_nothing_stands_before_an_archive_nor_is_compressed_in_it(tmp_path: Path) -> None:
    path = archived(tmp_path / "x.bin", PLAIN)
    path.write_bytes(b"PK\x03\x04" + path.read_bytes())
    assert by_torch(path) is None
    with pytest.raises(InputError, match="bytes before its zip archive"):
        read_torch_header(path)
    with pytest.raises(InputError, match="compressed or encrypted"):
        read_torch_header(archived(path, PLAIN, zipfile.ZIP_DEFLATED))


def test_an_archive_of_many_members_is_not_listed(tmp_path: Path) -> None:
    """2**20 members of 47 bytes each in the directory: Python's zipfile would make an object of each."""
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    assert len(entry) == 47
    directory = entry * (1 << 20)
    first = b"PK\x03\x04" + bytes(26)
    end = b"PK\x05\x06" + bytes(4) + struct.pack("<HHIIH", 65535, 65535, len(directory), len(first), 0)
    path = tmp_path / "x.bin"
    path.write_bytes(first + directory + end)

    def read() -> None:
        with pytest.raises(InputError, match=f"1,048,576 members, more than {MAX_MEMBERS:,}"):
            read_torch_header(path)

    assert peak(read) < 2 * len(directory)
