from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save, save_file

from deltamerge.errors import InputError
from deltamerge.files import strict_json
from deltamerge.formats.safetensors import header_length, parse_header, read_header

F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, entries: Any, data: int, text: bytes | None = None) -> Path:
    """A file with the header `entries` (or its JSON `text`) and `data` zero bytes."""
    text = json.dumps(entries).encode() if text is None else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
        "ids": torch.arange(5),
        "f8": torch.arange(4).to(torch.float8_e4m3fn),
        "grüße": torch.ones(2, dtype=torch.float16),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    raw = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert header.size == len(raw)
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.path == path
        piece = bytearray(raw[info.begin : info.begin + info.nbytes])
        assert torch.equal(torch.frombuffer(piece, dtype=torch.uint8) if piece else torch.zeros(0, dtype=torch.uint8),
                           tensor.contiguous().view(-1).view(torch.uint8))  # fmt: skip
    with safe_open(path, "pt") as file:
        assert list(header.tensors) == list(file.offset_keys())


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ([], 0, "does not begin with {"),
        ({"a": 1}, 0, "must have dtype, shape and data_offsets"),
        ({"a": F32_PAIR | {"more": 1}}, 8, "nothing else"),
        ({"a": F32_PAIR | {"dtype": "F33"}}, 8, "unknown dtype 'F33'"),
        ({"a": F32_PAIR | {"dtype": ["F32"]}}, 8, "unknown dtype"),
        ({"a": F32_PAIR | {"shape": [-2]}}, 8, "natural numbers"),
        ({"a": F32_PAIR | {"shape": [2.0]}}, 8, "natural numbers"),
        ({"a": F32_PAIR | {"shape": [True, 2]}}, 8, "natural numbers"),
        ({"a": F32_PAIR | {"shape": "2"}}, 8, "natural numbers"),
        ({"a": F32_PAIR | {"shape": [2**63]}}, 8, "natural numbers"),
        ({"a": F32_PAIR | {"shape": [1] * 65}}, 8, "at most 64"),
        ({"a": F32_PAIR | {"shape": [2**62] * 64}}, 8, "beyond 64 bits"),
        ({"a": F32_PAIR | {"shape": [3]}}, 8, "takes 12 bytes, data_offsets give 8"),
        ({"a": F32_PAIR | {"data_offsets": [8, 0]}}, 8, "ascending"),
        ({"a": F32_PAIR | {"data_offsets": [0, 8, 8]}}, 8, "two natural numbers"),
        ({"a": F32_PAIR | {"data_offsets": [-8, 0]}}, 8, "two natural numbers"),
        ({"a": F32_PAIR | {"data_offsets": [4, 12]}}, 12, "leaves 4 bytes before it unused"),
        ({"a": F32_PAIR, "b": F32_PAIR}, 8, "'b': overlaps"),
        ({"a": F32_PAIR}, 9, "file has"),
        ({"a": F32_PAIR}, 7, "truncated: header promises"),
        ({"": F32_PAIR}, 8, "printable"),
        ({"a\n": F32_PAIR}, 8, "printable"),
        ({"\ud800": F32_PAIR}, 8, "half a surrogate pair"),
        ({"x" * 1001: F32_PAIR}, 8, "1 to 1000"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ({"__metadata__": "x"}, 0, "__metadata__"),
    ],
)
def test_lying_headers(tmp_path: Path, entries: Any, data: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_header(write(tmp_path / "x.safetensors", entries, data))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x.safetensors: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "key 'dtype' twice"),
        (b'{"a\xff": 1}', "not UTF-8 at byte 3"),
        (b'{"a": ', "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":[' + b"0," * 4_000_000 + b"0]}", "more than 4,000,000 values"),
        (b"{" + b'"data_offsets"' * 200_001, "more than 200,000 tensors"),
        (b" {}", "does not begin with {"),
        (b"", "does not begin with {"),
    ],
)
def test_hostile_json(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_header(write(tmp_path / "x.safetensors", None, 0, text))


@pytest.mark.parametrize(
    ("raw", "message", "hint"),
    [
        (b"", "truncated: it has 0 bytes", "download"),
        (b"1234567", "truncated: it has 7 bytes", "download"),
        (b"<!DOCTYPE html><html>", "not a safetensors file", None),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "not a safetensors file", None),
        (b"\xff" * 100, "not a safetensors file", None),
        ((1000).to_bytes(8, "little") + b"{}", "truncated: its header ends at byte 1008, file has 10", "download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs", "git lfs pull"),
    ],
)
def test_other_files(tmp_path: Path, raw: bytes, message: str, hint: str | None) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert (hint is None) or hint in (caught.value.hint or "")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "nowhere", "no such file"),
    ]:
        with pytest.raises(InputError, match=message):
            read_header(path)


def test_a_truncated_file_says_how_much(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = save({"a": torch.zeros(1000)})
    path.write_bytes(whole[:1000])
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(caught.value) == (
        f"x.safetensors: the file is truncated: header promises {len(whole)} bytes, file has 1000"
    )


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes by Linux's /proc")
def test_no_weight_byte_is_read(tmp_path: Path) -> None:
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    entry = {"dtype": "U8", "shape": [10**9], "data_offsets": [0, 10**9]}
    path = write(tmp_path / "x.safetensors", {"a": entry}, 0)
    os.truncate(path, path.stat().st_size + 10**9)
    before = bytes_read()
    assert read_header(path).tensors["a"].nbytes == 10**9
    assert bytes_read() - before < 4096


def test_many_tensors(tmp_path: Path) -> None:
    count = 20_000
    names = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.down_proj.weight" for i in range(count)]
    shape = {"dtype": "BF16", "shape": [64, 4]}
    entries = {name: shape | {"data_offsets": [512 * i, 512 * (i + 1)]} for i, name in enumerate(names)}
    text = json.dumps(entries).encode()
    header = parse_header(text, tmp_path, 8 + len(text) + 512 * count)
    assert list(header.tensors) == names
    assert header.tensors[names[-1]].begin == 8 + len(text) + 512 * (count - 1)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 400))
def test_garbage_is_refused_or_read(text: bytes, size: int, length: int) -> None:
    for first in (text[:8], length.to_bytes(8, "little")):
        with suppress(InputError):
            assert 0 <= header_length(first, size) <= size - 8
    for raw in (text, b'{"a":' + text + b"}"):
        with suppress(InputError):
            assert all(info.begin + info.nbytes <= size for info in parse_header(raw, Path("x"), size).tensors.values())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_never_laxer_than_safetensors(data: st.DataObject) -> None:
    """A header that is accepted is one that safetensors accepts, with the same tensors."""
    raw = bytearray(save({"a": torch.zeros(2, 2), "b": torch.ones(3, dtype=torch.int16)}, metadata={"k": "v"}))
    for _ in range(data.draw(st.integers(0, 2))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.sampled_from(b'0123456789"[]{},: FIBU\x00\xff'))
    del raw[len(raw) - data.draw(st.sampled_from([0, 0, 0, 1, 6])) :]
    try:
        length = header_length(bytes(raw[:8]), len(raw))
        header = parse_header(bytes(raw[8 : 8 + length]), Path("x"), len(raw))
    except InputError:
        return
    try:
        truth = dict(deserialize(bytes(raw)))  # type: ignore[no-untyped-call]  # Rust
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses {bytes(raw)!r}") from error
    assert {name: list(info.shape) for name, info in header.tensors.items()} == {
        n: t["shape"] for n, t in truth.items()
    }


def test_read_json_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        strict_json.read_json(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        strict_json.read_json(path)
    path.write_text('{"a": Infinity}')
    assert strict_json.read_json(path) == {"a": float("inf")}
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="git-lfs pointer"):
        strict_json.read_json(path)
    monkeypatch.setattr(strict_json, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="more than 10"):
        strict_json.read_json(path)
