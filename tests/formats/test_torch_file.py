"""torch's own files, read without torch: torch.load(weights_only=True) is the judge of every bit."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_checkpoint, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from running import run
from safetensors.torch import load_file, save_file

from deltamerge.errors import DeltamergeError, InputError
from deltamerge.formats.torch_bin import read_torch_header
from deltamerge.models.checkpoint import open_checkpoint
from deltamerge.tensors.dtypes import CODES
from deltamerge.tensors.reader import Reader

LEGACY = {"_use_new_zipfile_serialization": False}
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
UNTYPED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)  # no class of storages


def loaded(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    return found


def same_bits(path: Path, but: tuple[str, ...] = ()) -> None:
    """Names, dtypes, shapes and bytes are those that torch reads."""
    found, wanted = read_torch_header(path).tensors, loaded(path)
    assert [*found] == [name for name in wanted if name not in but]
    with Reader() as reader:
        for name, info in found.items():
            tensor = wanted[name].detach().contiguous()
            assert (info.shape, info.name) == (tuple(tensor.shape), name)
            raw = np.empty(info.nbytes, np.uint8)
            reader.read_into(info, 0, raw)
            assert raw.tobytes() == (tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")


def state(dtypes: tuple[torch.dtype, ...]) -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return OrderedDict((f"w.{d}", (100 * torch.randn(3, 5, generator=generator)).abs().to(d)) for d in dtypes)


@pytest.mark.parametrize("how", [{}, LEGACY], ids=["zip", "before 1.6"])
def test_every_bit_is_what_torch_reads(tmp_path: Path, how: dict[str, Any]) -> None:
    path, whole = tmp_path / "x.bin", torch.arange(24.0).reshape(4, 6)
    torch.save(state(DTYPES if how else (*DTYPES, *UNTYPED)), path, **how)
    same_bits(path)
    assert {i.dtype for i in read_torch_header(path).tensors.values()} >= {CODES["bfloat16"], "BOOL", "I16"}
    # parameters, views that share a storage, empty and scalar tensors, a column of one, and names of one tensor
    parameter = torch.nn.Parameter(torch.ones(2, 1)[:, :1])
    table = {"p": parameter, "rows": whole[1:3], "flat": whole.reshape(-1)[5:9], "whole": whole, "none": whole[:0],
             "scalar": torch.tensor(1.5), "lm_head.weight": whole[:2], "x.embed_tokens.weight": whole[:2]}  # fmt: skip
    torch.save(table, path, **how)
    same_bits(path, but=("lm_head.weight",))
    assert read_torch_header(path).aliases == {"lm_head.weight"}
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict(), path, **how)
    same_bits(path)


class Calls:
    """A pickle of it calls something."""

    def __init__(self, *what: Any) -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return self.what


def raw_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(name)))


def changed(path: Path, old: bytes, new: bytes) -> None:
    """The file with its pickle changed, in an archive of the same members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in members if n.endswith("data.pkl"))
    assert old in members[name]
    members[name] = members[name].replace(old, new, 1)
    raw_zip(path, members)


W = torch.arange(6.0).reshape(2, 3)
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a call of the system": (lambda p: torch.save({"a": Calls(os.system, ("touch ran",))}, p), "asks for posix.system"),
    "eval": (lambda p: torch.save(Calls(eval, ("1",)), p), r"asks for (__builtin__|builtins)\.eval"),
    "a module's class": (lambda p: torch.save(torch.nn.Linear(2, 2), p), "asks for torch.nn.modules.linear.Linear"),
    "getattr": (lambda p: torch.save({"a": Calls(getattr, (W, "shape"))}, p), r"asks for (__builtin__|builtins)\.get"),
    "numpy": (lambda p: torch.save({"a": np.ones(2)}, p), r"asks for numpy"),
    "no table": (lambda p: torch.save([W], p), "is no table of tensors"),
    "a number": (lambda p: torch.save({"step": 3}, p), "step is no tensor"),
    "a nested table": (lambda p: torch.save({"state_dict": {"a": W}}, p), "state_dict is no tensor"),
    "transposed": (lambda p: torch.save({"a": W.t()}, p), r"a: is not contiguous: strides \[1, 3\]"),
    "expanded": (lambda p: torch.save({"a": W[:1].expand(4, 3)}, p), "a: is not contiguous"),
    "sparse": (lambda p: torch.save({"a": W.to_sparse()}, p), "asks for torch._utils._rebuild_sparse_tensor"),
    "complex128": (lambda p: torch.save({"a": W.to(torch.complex128)}, p), "asks for torch.ComplexDoubleStorage"),
    "conjugate": (lambda p: torch.save({"a": W.to(torch.complex64).conj()}, p), "with attributes"),
    "keys of numbers": (lambda p: torch.save({1: W}, p), "keys are no texts but int"),
    "names that do not print": (lambda p: torch.save({"a\n": W}, p), "printable characters"),
    "protocol 4": (lambda p: torch.save({"a": W}, p, pickle_protocol=4), "has protocol 4"),
    "TorchScript": (lambda p: torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(p)), "asks for|TorchScript"),
    "a plain pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1}, 2)), "is no file of torch.save"),
    "a text": (lambda p: p.write_text("version https://git-lfs\n"), "is a git-lfs pointer"),
    "nothing": (lambda p: p.write_bytes(b""), "is no file of torch.save"),
    "a zip of other things": (lambda p: raw_zip(p, {"a.txt": b"x"}), "has no data.pkl"),
    "big-endian": (lambda p: raw_zip(p, {"x/data.pkl": b".", "x/byteorder": b"big"}), "not in little-endian"),
    "a damaged pickle": (
        lambda p: raw_zip(p, {"x/data.pkl": b"\x80\x02}q", "x/version": b"3"}), "pickle is damaged or ends early"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_never_run(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write, message = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what is rarely saved
        write(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=message) as caught:
        read_torch_header(tmp_path / "pytorch_model.bin")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("pytorch_model.bin: ")
    assert not (tmp_path / "ran").exists()


def test_damage_is_told_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_torch_header(path)

    torch.save({"a": W}, path)
    data = path.read_bytes()
    for cut in (1, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        refused("truncated|damaged|no file of torch.save")
    long = b"X" + struct.pack("<I", 1) + b"a"
    for old, new, message in (
        (b"K\x06", b"K\x07", "storage has 24 bytes, not 28"),  # elements of the storage
        (b"K\x02K\x03\x86", b"K\x03K\x03\x86", "ends at byte 36 of a storage of 24"),  # the shape
        (b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86", "no natural numbers"),
        (b"FloatStorage", b"FlotStorage", "asks for torch.FlotStorage"),
        (b"_rebuild_tensor_v2", b"_rebuild_wrapper_subclass", "asks for torch._utils._rebuild_wrapper_subclass"),
        (long, b"X" + struct.pack("<I", 1 << 31) + b"a", "a text of 2,147,483,648 bytes, more than 1,000,000"),
    ):
        torch.save({"a": W}, path)
        changed(path, old, new)
        refused(message)
    torch.save({"a": W}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    raw_zip(path, members, zipfile.ZIP_DEFLATED)
    refused("is compressed or encrypted")
    raw_zip(path, {n: d for n, d in members.items() if "/data/" not in n})
    refused("storage '0' is not in the file")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(next(n for n in members if n.endswith(".pkl")), b".")
    refused("two members of the archive have one name")
    torch.save({"a": W}, path, **LEGACY)
    path.write_bytes(path.read_bytes()[:-1])
    refused("truncated: storage")
    (tmp_path / "y.bin").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is a link that leaves"):
        read_torch_header(tmp_path / "y.bin")


VALID = {}
for _name, _how in (("zip", {}), ("old", LEGACY)):
    _buffer = io.BytesIO()
    torch.save({"a": W, "b": W.bfloat16()}, _buffer, **_how)
    VALID[_name] = _buffer.getvalue()


@settings(max_examples=25)
@given(kind=st.sampled_from([*VALID]), at=st.integers(0, 1 << 16), new=st.binary(min_size=1, max_size=8))
def test_what_is_accepted_is_what_torch_makes_of_it(kind: str, at: int, new: bytes, tmp_path_factory: Any) -> None:
    """Bytes changed anywhere: refused, or the tensors that torch reads, where it reads the file at all."""
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    data = VALID[kind]
    at %= len(data)
    path.write_bytes(data[:at] + new + data[at + len(new) :])
    try:
        found = read_torch_header(path).tensors
    except DeltamergeError:
        return
    try:
        wanted = loaded(path)
    except Exception:  # checksums, alignment: torch is stricter there
        return
    assert {n: i.shape for n, i in found.items()} == {n: tuple(t.shape) for n, t in wanted.items()}
    same_bits(path)


def test_models_and_adapters_in_torchs_files_merge_as_their_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a"):
        tensors = {f"model.layers.{i}.w.weight": torch.randn(4, 6, generator=generator).bfloat16() for i in range(3)}
        tensors["model.embed_tokens.weight"] = torch.randn(5, 6, generator=generator).bfloat16()
        make_checkpoint(tmp_path / name, tensors)
        if name == "base":
            continue
        head = tensors["model.embed_tokens.weight"]
        for folder, shards in (("bin", 1), ("sharded", 2)):
            target = tmp_path / folder
            target.mkdir()
            write_json(target / "config.json", {"model_type": "test"})
            names = [*tensors, "lm_head.weight"]
            parts = [names] if shards == 1 else [names[:2], names[2:]]
            weight_map = {}
            for i, part in enumerate(parts, 1):
                file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i:05d}-of-00002.bin"
                torch.save({n: tensors.get(n, head) for n in part}, target / file)
                weight_map |= dict.fromkeys(part, file)
            if shards > 1:
                write_json(target / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    lora = {f"base_model.model.model.layers.0.w.lora_{side}.weight": torch.randn(shape, generator=generator)
            for side, shape in (("A", (2, 6)), ("B", (4, 2)))}  # fmt: skip
    for folder in ("lora", "lora-bin"):
        (tmp_path / folder).mkdir()
        write_json(tmp_path / folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    save_file(lora, tmp_path / "lora" / "adapter_model.safetensors")
    torch.save(lora, tmp_path / "lora-bin" / "adapter_model.bin")

    def merged(first: str, second: str, more: str = "") -> dict[str, torch.Tensor]:
        text = f"merge_method: linear\nmodels: [{{model: ./{first}}}, {{model: ./{second}}}]\n"
        (tmp_path / "r.yaml").write_text(f"{text}parameters: {{weight: 0.5}}\n{more}")
        return load_file(run(tmp_path / "r.yaml", tmp_path / "out", force=True).folder / "model.safetensors")

    wanted = merged("base+./lora", "a")
    for first, second in (("base", "bin"), ("base", "sharded"), ("base+./lora-bin", "a")):
        with pytest.raises(DeltamergeError, match="never unpickles") as caught:
            merged(first, second)
        assert "--allow-pickles" in (caught.value.hint or "")
    for second in ("bin", "sharded", "bin/pytorch_model.bin"):
        found = merged("base+./lora-bin", second, "pickles: true\n")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    with pytest.raises(InputError, match="only PyTorch pickle files"):
        open_checkpoint(tmp_path / "sharded")
