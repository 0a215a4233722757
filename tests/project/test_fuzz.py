"""Arbitrary and mutated files against every reader: each is read, or refused by a DeltamergeError.

`make fuzz` runs it for a night (FUZZ examples a test instead of 25, drawn anew every time).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fuzz_targets import JSON, NAMES, Targets, make_valid_files, tolerates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import make_plan, run

from deltamerge.files.journal import Journal, read_journal
from deltamerge.files.work_folder import mark, workspace
from deltamerge.formats.safetensors import Writer, plan_layout
from deltamerge.models.checkpoint import INDEX, open_checkpoint
from deltamerge.models.delta_file import DeltaFile
from deltamerge.run.card import front_matter

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
    b"{", b"}", b"[" * 300, b"[" * 50_000, b"{" * 300, b'"', b"\\ud800",
    b"\xff", b"\0", b"&a ", b"*a", b"<<: ", b"\n  ", b": ", b"- ",
    b"!!python/object:os.system ", b"1e999", b"9" * 400, b"9" * 5000, b"NaN", b"%YAML 9.9\n", b"---\n", b"|", b"? ",
]  # fmt: skip


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    make_valid_files(folder)
    return folder


@pytest.fixture
def targets(place: Path, tmp_path: Path) -> Targets:
    return Targets(place, tmp_path, seldom=not LONG)


@pytest.mark.parametrize("name", NAMES)
@fuzz
@given(st.data())
def test_bytes(targets: Targets, name: str, data: st.DataObject) -> None:
    """The targets that fuzz_atheris.py has too."""
    getattr(targets, name)(data.draw(bent(data.draw(st.sampled_from(targets.seeds(name))))))


@pytest.mark.parametrize("name", NAMES)
def test_valid_bytes_are_read(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A target whose valid files are refused would test nothing."""
    monkeypatch.setattr("fuzz_targets.tolerates", lambda call: call())
    monkeypatch.setattr("fuzz_targets.REFUSALS", ())
    targets = Targets(place, tmp_path)
    for seed in targets.seeds(name):
        getattr(targets, name)(seed)


@pytest.mark.parametrize("name", JSON)
@fuzz
@given(st.data())
def test_json_of_the_right_syntax(targets: Targets, name: str, data: st.DataObject) -> None:
    getattr(targets, name)(dumped(data.draw(changed(json.loads(data.draw(st.sampled_from(targets.seeds(name))))))))


@fuzz
@given(st.data())
def test_recipes_of_the_right_syntax(targets: Targets, data: st.DataObject) -> None:
    valid = next(yaml.safe_load_all(data.draw(st.sampled_from(targets.seeds("recipe")))))
    targets.recipe(dumped(data.draw(changed(valid))))


@fuzz
@given(st.data())
def test_headers_of_the_right_syntax(targets: Targets, data: st.DataObject) -> None:
    _, text = targets.seeds("header")
    targets.header(dumped(data.draw(changed(json.loads(text)))))


@fuzz
@given(st.data())
def test_models(place: Path, targets: Targets, data: st.DataObject) -> None:
    """Index, config and headers of a model that is merged to the end."""
    folder = targets.fresh("a")
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
def test_model_cards(place: Path, targets: Targets, data: st.DataObject) -> None:
    folder = targets.fresh("a")
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
def test_deltas_of_the_right_syntax(targets: Targets, data: st.DataObject) -> None:
    targets.delta(dumped(data.draw(changed(json.loads(targets.seeds("delta")[0])))))


@fuzz
@given(st.data())
def test_delta_indices(targets: Targets, data: st.DataObject) -> None:
    folder = targets.fresh("delta")
    (folder / "delta.safetensors").rename(folder / "delta-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "delta-00001-of-00001.safetensors"}}
    raw = dumped(data.draw(changed(index))) if data.draw(st.booleans()) else data.draw(bent(dumped(index)))
    (folder / "delta.safetensors.index.json").write_bytes(raw)
    tolerates(lambda: DeltaFile.open(folder))


@fuzz
@given(st.data())
def test_locks_of_the_right_syntax(targets: Targets, data: st.DataObject) -> None:
    targets.lock(dumped(data.draw(changed(yaml.safe_load(targets.seeds("lock")[0])))))


@fuzz
@given(st.data())
def test_journals(tmp_path: Path, data: st.DataObject) -> None:
    """Records that pass their checksum but say what no run has written."""
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    state = tmp_path / ".out.partial"
    (state / "out").mkdir(parents=True)
    mark(state)
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
