"""Arbitrary and mutated files against every reader: each is read, or refused by a DeltamergeError.

`make fuzz` runs it for a night (FUZZ examples a test instead of 25, drawn anew every time).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from deltamerge import lock as locks
from deltamerge import recipe
from deltamerge.calibrate.rows import read as read_rows
from deltamerge.card import front_matter
from deltamerge.errors import DeltamergeError
from deltamerge.io.checkpoint import INDEX, open_checkpoint
from deltamerge.io.delta import DeltaFile
from deltamerge.io.delta_format import Base
from deltamerge.io.delta_tensor import BaseTensor
from deltamerge.io.delta_writer import DeltaWriter
from deltamerge.io.journal import Journal, read_journal
from deltamerge.io.safetensors_file import read_header
from deltamerge.io.workspace import workspace
from deltamerge.io.writer import Writer, plan_layout
from deltamerge.plans import make_plan
from deltamerge.runner import run

LONG = "FUZZ" in os.environ
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ", "25")),
    derandomize=not LONG,
    deadline=None if LONG else 10_000,
    suppress_health_check=list(HealthCheck),
)

NASTY = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf"),
    "", "..", "../x", "/etc/passwd", "x\0", "\ud800", "é", "x" * 2000, "F32", "bitmask", "2024-01-01", "1e3",
    [], {}, [[]], [0], [1, 2], [-1, 2**62], [2**62] * 3, [0, 2**62], ["a"], [None], {"a": 1}, {"": {}},
]  # fmt: skip
scalars = st.one_of(st.sampled_from(NASTY).map(copy.deepcopy), st.integers(), st.floats(), st.text(max_size=8))
keys = st.one_of(st.text(max_size=8), st.sampled_from(["", "..", "a.b", "__metadata__", "weight_map", "\ud800"]))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with some of its parts replaced, removed, added or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        node: Any = value
        while True:
            down = [
                k
                for k, v in (node.items() if isinstance(node, dict) else enumerate(node))
                if isinstance(v, dict | list)
            ]
            if not down or draw(st.booleans()):
                break
            node = node[draw(st.sampled_from(down))]
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        what = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename"]))
        if what == "add" or not places:
            if isinstance(node, dict):
                node[draw(keys)] = draw(scalars)
            else:
                node.append(draw(scalars))
            continue
        place = draw(st.sampled_from(places))
        if what == "replace":
            node[place] = draw(scalars)
        elif what == "rename" and isinstance(node, dict):
            node[draw(keys)] = node.pop(place)
        else:
            del node[place]
    return value


@st.composite
def bent(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes with some cut, doubled, overwritten or put in; or bytes of no kind."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 40)))
        piece = draw(st.one_of(st.binary(max_size=12), st.just(bytes(data[start:stop]) * 2), st.sampled_from(TOKENS)))
        data[start:stop] = piece
    return bytes(data)


TOKENS = [
    b"{", b"}", b"[" * 300, b"{" * 300, b'"', b"\\ud800", b"\xff", b"\0", b"&a ", b"*a", b"<<: ", b"\n  ", b": ", b"- ",
    b"!!python/object:os.system ", b"1e999", b"9" * 400, b"NaN", b"%YAML 9.9\n", b"---\n", b"|", b"? ",
]  # fmt: skip


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def tolerates(call: Callable[[], Any]) -> None:
    """The call ends well or with an error of ours that prints."""
    try:
        call()
    except DeltamergeError as error:
        said = str(error)
    else:
        return
    assert said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid files of every kind: base, a, a delta, an output with its lock, rows, a journal."""
    folder = tmp_path_factory.mktemp("fuzz")
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(6, 8, generator=generator).bfloat16() for i in range(3)} | {
        "ids": torch.arange(4)
    }
    make_checkpoint(folder / "base", base, shards=2)
    make_checkpoint(folder / "a", {n: t + 1 for n, t in base.items()}, shards=2)
    (folder / "r.yaml").write_text("base_model: ./base\nmodels: [{model: ./a, prune: {method: dare, density: 0.5}}]\n")
    run(folder / "r.yaml", folder / "out")
    (folder / "delta").mkdir()
    with DeltaWriter(folder / "delta", Base(id="base")) as writer:
        for name, tensor in base.items():
            bits = tensor.reshape(-1).view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int64).numpy()
            code = "BF16" if tensor.dtype == torch.bfloat16 else "I64"
            old = BaseTensor(name, code, tuple(tensor.shape), lambda start, stop, bits=bits: bits[start:stop])
            out = writer.tensor(name, code, tuple(tensor.shape), old)
            new = bits.copy()
            new[::5] += 1
            out.write(0, new)
        writer.finish()
    return folder


@pytest.fixture
def scratch(place: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy of one of the valid folders."""

    def fresh(name: str) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return Path(shutil.copytree(place / name, tmp_path / name))

    return fresh


RECIPES = [path.read_bytes() for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))]


@fuzz
@given(st.data())
def test_recipes(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data.draw(bent(data.draw(st.sampled_from(RECIPES)))))
    tolerates(lambda: recipe.load(path))


@fuzz
@given(st.data())
def test_recipes_of_the_right_syntax(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "r.yaml"
    valid = yaml.safe_load(data.draw(st.sampled_from(RECIPES)))
    path.write_bytes(dumped(data.draw(changed(valid))))
    tolerates(lambda: recipe.load(path))


TENSORS = {"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.zeros(0, 2)}


@fuzz
@given(st.data())
def test_headers(tmp_path: Path, data: st.DataObject) -> None:
    raw = save(TENSORS)
    length = int.from_bytes(raw[:8], "little")
    if data.draw(st.booleans()):
        text = dumped(data.draw(changed(json.loads(raw[8 : 8 + length]))))
        raw = len(text).to_bytes(8, "little") + text + raw[8 + length :]
    else:
        raw = data.draw(bent(raw))
    (tmp_path / "x.safetensors").write_bytes(raw)
    tolerates(lambda: read_header(tmp_path / "x.safetensors"))


@fuzz
@given(st.data())
def test_models(place: Path, scratch: Callable[[str], Path], data: st.DataObject) -> None:
    """Index, config and headers of a model that is merged to the end."""
    folder = scratch("a")
    file = data.draw(st.sampled_from(["config.json", INDEX, "header"]))
    if file == "header":
        path = folder / "model-00001-of-00002.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        text = dumped(data.draw(changed(json.loads(raw[8 : 8 + length]))))
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    elif data.draw(st.booleans()):
        (folder / file).write_bytes(dumped(data.draw(changed(json.loads((folder / file).read_bytes())))))
    else:
        (folder / file).write_bytes(data.draw(bent((folder / file).read_bytes())))
    tolerates(lambda: open_checkpoint(folder))
    path = folder.parent / "r.yaml"
    path.write_text(f"base_model: {place / 'base'}\nmodels: [{{model: ./a}}]\ndtype: float16\n")
    tolerates(lambda: run(path, folder.parent / "out", force=True, allow_nonfinite=True, workers=1))


@fuzz
@given(st.data())
def test_model_cards(place: Path, scratch: Callable[[str], Path], data: st.DataObject) -> None:
    folder = scratch("a")
    matter = data.draw(changed({"license": "mit", "tags": ["a"], "base_model": "b"}))
    card = (
        b"---\n" + dumped(matter)[1:-1] + b"\n---\n"
        if data.draw(st.booleans())
        else b"---\nlicense: mit\nx: 2024-01-01\n---\n"
    )
    (folder / "README.md").write_bytes(data.draw(bent(card)) if data.draw(st.booleans()) else card)
    path = folder.parent / "r.yaml"
    path.write_text(f"base_model: {place / 'base'}\nmodels: [{{model: ./a}}]\n")
    plan = make_plan(path)
    tolerates(lambda: front_matter(plan))


@fuzz
@given(st.data())
def test_deltas(scratch: Callable[[str], Path], data: st.DataObject) -> None:
    folder = scratch("delta")
    if data.draw(st.booleans()):
        path = folder / "delta.json"
        path.write_bytes(dumped(data.draw(changed(json.loads(path.read_bytes())))))
    else:
        path = folder / data.draw(st.sampled_from(["delta.json", "delta.safetensors"]))
        path.write_bytes(data.draw(bent(path.read_bytes())))

    def read() -> None:
        delta = DeltaFile.open(folder)
        for entry in delta.entries.values():
            if entry.size < 1 << 16 or entry.index is not None:
                sum(len(positions) for positions in entry.positions())
        if all(entry.size < 1 << 16 for entry in delta.entries.values()):
            list(delta.patches())

    tolerates(read)


@fuzz
@given(st.data())
def test_delta_indices(scratch: Callable[[str], Path], data: st.DataObject) -> None:
    folder = scratch("delta")
    (folder / "delta.safetensors").rename(folder / "delta-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "delta-00001-of-00001.safetensors"}}
    raw = dumped(data.draw(changed(index))) if data.draw(st.booleans()) else data.draw(bent(dumped(index)))
    (folder / "delta.safetensors.index.json").write_bytes(raw)
    tolerates(lambda: DeltaFile.open(folder))


CALIBRATION = {"./a": {"objective": "output_change", "scope": "global", "search": "grid", "chosen": 0.5, "why": "best",
                       "value": 0.1, "plain": {"value": 0.2}, "forward_passes": 3, "sequences": 2, "path": [[1, 2]],
                       "q": {"layers.0.w": 0.5}}}  # fmt: skip


@fuzz
@given(st.data())
def test_locks(place: Path, scratch: Callable[[str], Path], data: st.DataObject) -> None:
    folder = scratch("out")
    path = folder / "recipe.lock"
    valid = {**yaml.safe_load(path.read_bytes()), "calibration": CALIBRATION}
    if data.draw(st.booleans()):
        path.write_bytes(dumped(data.draw(changed(valid))))
    else:
        path.write_bytes(data.draw(bent(yaml.safe_dump(valid).encode())))
    plan = make_plan(place / "r.yaml")
    inputs = locks.describe_inputs(plan, 1)
    tolerates(lambda: locks.verify(folder, 1))
    tolerates(lambda: locks.check_inputs(locks.read_lock(path), inputs, path))
    tolerates(lambda: locks.locked_calibration(plan, locks.read_lock(path), path))


@fuzz
@given(st.data())
def test_rows(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["jsonl", "csv", "txt"]))
    valid = {
        "jsonl": b'{"text": "a b", "label": 1}\n{"text": "c", "label": 0}\n',
        "csv": b'text,label\n"a, b",1\nc,0\n',
        "txt": "a b\nc é\n".encode(),
    }[kind]
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(data.draw(bent(valid)))
    tolerates(lambda: read_rows(path.name, folder=tmp_path, text="text", label="label" if kind != "txt" else None))


@fuzz
@given(st.data())
def test_journals(tmp_path: Path, data: st.DataObject) -> None:
    """Records that pass their checksum but say what no run has written."""
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    state = tmp_path / ".out.partial"
    (state / "out").mkdir(parents=True)
    layout = plan_layout([("a", "F32", (4,)), ("b", "F32", (4,))], 16)
    records = [{"run": {"x": 1}, "force": False}, {"done": {"model-00001-of-00002.safetensors": [[0, 8], [8, 16]]}}]
    records = data.draw(changed(records))
    journal = Journal(state / "journal")
    for record in records:
        journal.append(record)
    journal.close()
    if data.draw(st.booleans()):
        (state / "journal").write_bytes(data.draw(bent((state / "journal").read_bytes())))

    def resume() -> None:
        read_journal(state / "journal")
        with workspace(tmp_path / "out", resume=True, force=data.draw(st.booleans())) as work:
            work.begin({"x": 1})
            with Writer(work.folder, layout, journal=work.journal) as writer:
                for name in ("a", "b"):
                    writer.write(name, 0, np.ones(4, np.float32))
                writer.finish()

    tolerates(resume)
