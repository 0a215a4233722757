"""What `check` and `plan` do for models of many tensors: calls grow as the tensors do."""

from __future__ import annotations

import cProfile
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from deltamerge.errors import DeltamergeError, InputError
from deltamerge.formats.safetensors import read_header
from deltamerge.plan import inputs
from deltamerge.recipe.file import read_recipe
from deltamerge.run.plans import make_plans

Shape = Callable[[int], str]

NAMES: dict[str, tuple[Shape, Shape]] = {
    "one layer": (lambda i: f"model.layers.0.t{i}.weight", lambda i: f"model.layers.0.t{i}.weight"),
    "a layer each": (lambda i: f"model.layers.{i}.weight", lambda i: f"model.layers.{i}.weight"),
    "a container each": (lambda i: f"t{i}.0.weight", lambda i: f"t{i}.0.weight"),
    "a container each, others in the other model": (lambda i: f"t{i}.0.weight", lambda i: f"u{i}.0.weight"),
    "a layer each, others in the other model": (lambda i: f"h.{i}.weight", lambda i: f"h.{i}.{'bias' * (i % 2)}w"),
    "half of the layers in the other model": (lambda i: f"h.{i}.w", lambda i: f"h.{i // 2}.w{i % 2}"),
    "another prefix each": (lambda i: f"a{i}.w{i}.weight", lambda i: f"b{i}.w{i}.weight"),
    "deep": (lambda i: f"{'a.' * 200}{i}.b", lambda i: f"{'a.' * 200}{i}.b"),
    "numbers alone": (lambda i: f"{i}.{i}.{i}.{i}", lambda i: f"{i}.{i}.{i}.{i}"),
}


def model(folder: Path, name: Shape, count: int) -> Path:
    folder.mkdir(parents=True)
    table = {name(i): {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]} for i in range(count)}
    header = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (folder / "config.json").write_text('{"model_type": "made"}')
    return folder


def recipe(folder: Path, models: list[Path]) -> Path:
    path = folder / "recipe.yaml"
    listed = "".join(f"  - {{model: {one}, parameters: {{weight: 1}}}}\n" for one in models)
    path.write_text(f"merge_method: linear\nmodels:\n{listed}")
    return path


def calls(path: Path) -> int:
    """How many functions are called to plan a recipe, those of the interpreter too; whatever comes of it."""
    profile = cProfile.Profile()
    profile.enable()
    try:
        make_plans(read_recipe(path))
    except DeltamergeError:
        pass
    finally:
        profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize("case", NAMES)
def test_work_grows_with_the_tensors_and_no_faster(tmp_path: Path, case: str) -> None:
    counts = []
    calls(recipe(tmp_path, [model(tmp_path / "first", NAMES[case][0], 2)]))  # imports are not counted
    for count in (200, 400, 800):
        folder = tmp_path / str(count)
        models = [model(folder / str(i), name, count) for i, name in enumerate(NAMES[case])]
        counts.append(calls(recipe(folder, models)))
    # twice the tensors, and twice again: the second step costs at most twice the first, and a little
    assert counts[2] - counts[1] < 2.5 * (counts[1] - counts[0]) + 2000
    assert counts[2] < 800 * 2 * 1500


def small_matrices(folder: Path, count: int) -> Path:
    """A model of matrices of 2 × 2."""
    folder.mkdir(parents=True)
    table = {f"w{i}": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * i, 16 * i + 16]} for i in range(count)}
    header = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16 * count))
    (folder / "config.json").write_text('{"model_type": "made"}')
    return folder


@pytest.mark.parametrize(("method", "most"), [("task_arithmetic", 800), ("ties", 1040)])
def test_planning_a_tensor_takes_few_calls(tmp_path: Path, method: str, most: int) -> None:
    """About 760 and 990, of two models and their base; 920 and 2,180 when each tensor had a cost of its own."""
    counts = []
    for count in (2, 200, 400):
        base, *tuned = (small_matrices(tmp_path / f"{count}-{name}", count) for name in ("base", "a", "b"))
        path = tmp_path / f"{count}.yaml"
        listed = "".join(f"  - {{model: {one}, parameters: {{weight: 1, density: 0.5}}}}\n" for one in tuned)
        listed = listed if method == "ties" else listed.replace(", density: 0.5", "")
        path.write_text(f"merge_method: {method}\nbase_model: {base}\nmodels:\n{listed}")
        counts.append(calls(path))
    assert (counts[2] - counts[1]) / 200 < most


def test_models_are_not_opened_beyond_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SOURCES", 1000)
    opened: list[str] = []
    path = recipe(tmp_path, [model(tmp_path / f"m{i}", NAMES["one layer"][0], 300) for i in range(9)])
    original = inputs.open_inputs

    def counting(given, folder, opener):  # type: ignore[no-untyped-def]
        return original(given, folder, lambda *a: opened.append(a[0]) or opener(*a))

    monkeypatch.setattr("deltamerge.plan.planner.open_inputs", counting)
    with pytest.raises(InputError, match="have 1,200 tensors up to here, more than 1,000") as caught:
        make_plans(read_recipe(path))
    assert "\n" not in str(caught.value)
    assert len(opened) == 4


@pytest.mark.parametrize(
    ("entry", "count", "message"),
    [
        ({"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}, 1, "at most 64 natural numbers"),
        ({"dtype": "F32", "shape": [0] * 3_000_000, "data_offsets": [0, 0]}, 1, "at most 64 natural numbers"),
        ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, 200_001, "more than 200,000 tensors"),
        ({"dtype": "F" * 5_000_000, "shape": [0], "data_offsets": [0, 0]}, 1, "unknown dtype"),
    ],
    ids=["many dimensions", "three million dimensions", "many tensors", "a long dtype"],
)
def test_a_header_takes_little_more_than_its_bytes(tmp_path: Path, entry: object, count: int, message: str) -> None:
    text = json.dumps({f"t{i}": entry for i in range(count)} if count < 9 else {}).encode()
    if count > 9:
        one = json.dumps(entry)
        text = ("{" + ",".join(f'"t{i}":{one}' for i in range(count)) + "}").encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 600
    assert peak < 7 * len(text) + 1_000_000


def test_a_name_of_a_million_characters_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"a" * 1_000_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(InputError, match="1 to 1000 printable characters"):
        read_header(path)
