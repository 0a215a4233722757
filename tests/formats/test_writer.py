from __future__ import annotations

import errno
import json
import math
import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_tensors, make_checkpoint, tiny_llama
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from deltamerge.errors import OutputError
from deltamerge.files import descriptors as files
from deltamerge.formats.safetensors import Layout, Writer, plan_layout, read_header
from deltamerge.models.checkpoint import open_checkpoint
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.reader import Reader

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(code: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if (size := math.prod(shape) * ITEMSIZE[code]) == 0:
        return torch.zeros(shape, dtype=DTYPES[code])
    raw = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, size, np.uint8)
    return torch.from_numpy(raw).view(DTYPES[code]).reshape(shape)


def layout_of(tensors: dict[str, torch.Tensor], shard_size: int = 10**9) -> Layout:
    return plan_layout([(name, CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()], shard_size)


def write(folder: Path, tensors: dict[str, torch.Tensor], layout: Layout) -> None:
    folder.mkdir()
    with Writer(folder, layout) as out:
        for name, tensor in tensors.items():
            raw = content(tensor)
            half = len(raw) // 2
            out.write(name, half, raw[half:])
            out.write(name, 0, memoryview(raw)[:half])
        out.finish()


names = st.text(st.characters(exclude_categories=["C"], include_characters='"\\/é'), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
metas = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(metas=metas, shard_size=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_bytes_are_those_of_save_file(
    tmp_path_factory: pytest.TempPathFactory,
    metas: dict[str, tuple[str, tuple[int, ...]]],
    shard_size: int,
    seed: int,
) -> None:
    tensors = {name: random_tensor(code, shape, seed) for name, (code, shape) in metas.items()}
    layout = layout_of(tensors, shard_size)
    folder = tmp_path_factory.mktemp("x") / "out"
    write(folder, tensors, layout)
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    expected = split.filename_to_tensors
    assert [file.name for file in layout.files] == list(expected)
    assert layout.total_size == split.metadata["total_size"]
    for file, members in expected.items():
        truth = save({name: tensors[name] for name in members}, metadata={"format": "pt"})
        assert (folder / file).read_bytes() == truth
        assert next(f.size for f in layout.files if f.name == file) == len(truth)
    for name, place in layout.tensors.items():
        raw = (folder / place.file).read_bytes()[place.offset : place.offset + place.nbytes]
        assert raw == content(tensors[name])
    index = folder / "model.safetensors.index.json"
    assert index.exists() == split.is_sharded
    if split.is_sharded:
        assert json.loads(index.read_text())["weight_map"] == split.tensor_to_filename


def test_all_dtypes_in_one_file(tmp_path: Path) -> None:
    tensors = {f"t{i % 3}_{code}": random_tensor(code, (3, 5), i) for i, code in enumerate(DTYPES)}
    write(tmp_path / "x", tensors, layout_of(tensors))
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


@pytest.mark.parametrize("size", [1, 3000, 20_000, 10**9])
def test_bytes_are_those_of_save_pretrained(tmp_path: Path, size: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", seed=0, layers=3))
    model.save_pretrained(tmp_path / "truth", max_shard_size=size)
    tensors = dict(sorted(model.state_dict().items()))  # transformers 5 sorts them before it splits
    write(tmp_path / "ours", tensors, layout_of(tensors, size))
    ours = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    truth = {file.name: file.read_bytes() for file in (tmp_path / "truth").glob("model*")}
    assert ours == truth


def test_shards_load_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_llama(tmp_path / "model", seed=0)
    tensors = load_tensors(source)
    write(tmp_path / "ours", tensors, layout_of(tensors, 10_000))
    (tmp_path / "ours" / "config.json").write_bytes((source / "config.json").read_bytes())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loaded[1].values())
    assert len(open_checkpoint(tmp_path / "ours").files) > 2


def test_layout_keeps_the_given_order_and_refuses_a_name_twice() -> None:
    layout = plan_layout([("b", "F32", (2,)), ("a", "I64", ())], 10**6)
    assert list(layout.tensors) == ["b", "a"]
    assert layout.tensors["a"].offset < layout.tensors["b"].offset
    assert plan_layout([], 10).files[0].name == "model.safetensors"
    with pytest.raises(ValueError, match="one name"):
        plan_layout([("a", "F32", ()), ("a", "F32", ())], 10)


def test_a_layout_of_many_tensors_costs_linear_work() -> None:
    layout = plan_layout([(f"model.layers.{i}.weight", "BF16", (4096, 4096)) for i in range(20_000)], 5 * 10**9)
    assert len(layout.files) == -(-20_000 // (5 * 10**9 // (2 * 4096**2)))
    assert layout.total_size == 20_000 * 2 * 4096**2


def test_writes_and_copies_from_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_OPEN", 2)
    tensors = {f"t{i}": random_tensor("BF16", (100, 7), i) for i in range(9)}
    source = open_checkpoint(make_checkpoint(tmp_path / "x", tensors, shards=4))
    layout = layout_of(tensors, 3000)
    (tmp_path / "out").mkdir()

    def work(number: int) -> None:
        for i in range(number, 9, 3):
            name = f"t{i}"
            if not number:
                out.copy(name, source.tensors[name], reader)
                continue
            for offset in range(0, 1400, 200):
                out.write(name, offset, content(tensors[name])[offset : offset + 200])

    with Reader() as reader, Writer(tmp_path / "out", layout) as out:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        out.finish()
    written = load_tensors(tmp_path / "out")
    assert all(content(written[name]) == content(tensors[name]) for name in tensors)


def test_finish_refuses_what_is_not_whole(tmp_path: Path) -> None:
    layout = plan_layout([("a", "F32", (4,)), ("b", "F32", (4,))], 16)
    with Writer(tmp_path, layout) as out:
        out.write("a", 0, bytes(16))
        out.write("b", 4, bytes(12))
        with pytest.raises(RuntimeError, match="12 of 16 bytes of b"):
            out.finish()
        with pytest.raises(ValueError, match="which has 16"):
            out.write("b", 12, bytes(5))
        with pytest.raises(KeyError):
            out.write("c", 0, b"")
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_files_are_whole_from_the_start_and_follow_the_umask(tmp_path: Path) -> None:
    layout = plan_layout([("a", "F32", (1000,))], 10**9)
    before = os.umask(0o027)
    try:
        Writer(tmp_path, layout).close()
    finally:
        os.umask(before)
    path = tmp_path / "model.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert read_header(path).tensors["a"].nbytes == 4000
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written: it is there already"):
        Writer(tmp_path, layout)


def test_free_space_is_checked_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 2000000\.0 TB, \d+\.\d [GMT]B are free") as caught:
        Writer(tmp_path, plan_layout([("a", "U8", (2 * 10**18,))], 10**9))
    assert "--out" in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanished(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: no such folder"):
        Writer(tmp_path / "nowhere", plan_layout([("a", "U8", (2,))], 10**9))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left"), (errno.EDQUOT, "quota"), (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"), (errno.EFBIG, "ulimit"), (errno.EIO, "Input/output error"),
    ],
)  # fmt: skip
def test_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    out = Writer(tmp_path, plan_layout([("a", "U8", (2,))], 10**9))
    for call in ("pwrite", "ftruncate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OutputError, match=rf"model\.safetensors: cannot be written: .*{message}"):
                out.write("a", 0, b"xy") if call == "pwrite" else Writer(tmp_path / "x", out._layout)
            (tmp_path / "x").mkdir(exist_ok=True)
    out.close()


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    tensors = {"a": torch.arange(100)}
    write(tmp_path / "x", tensors, layout_of(tensors))
    assert torch.equal(load_tensors(tmp_path / "x")["a"], tensors["a"])
