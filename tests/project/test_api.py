"""deltamerge as a library: the same bytes as the command line, and no torch until something is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import load_tensors, make_checkpoint, tiny_llama

import deltamerge
from deltamerge import api
from deltamerge.errors import DeltamergeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    base = tiny_llama(folder / "base", seed=0)
    tiny_llama(folder / "tuned", seed=1, base=base, sigma=0.05)
    return folder


def recipe(folder: Path, **prune: Any) -> Path:
    path = folder / "recipe.yaml"
    models = [{"model": "./tuned", "name": "model", "prune": prune}]
    path.write_text(yaml.safe_dump({"base_model": "./base", "models": models, "seed": 3}))
    return path


CASES: list[dict[str, Any]] = [
    {"method": "dare", "density": 0.5},
    {"method": "dare", "density": 0.05, "q": 0.2},
    {"method": "dare", "density": 0.1, "sampling": "magnitude"},
    {"method": "magnitude", "density": 0.1, "q": 0.5},
    {"method": "magnitude", "density": 0.1, "group": "row", "include": ["mlp"]},
    {"method": "structured", "a": 0.5, "b": 0.5},
    {"method": "magnitude", "density": 0.1, "rescale": "l1"},
    {"method": "none"},
]


@pytest.mark.parametrize("keys", CASES, ids=lambda keys: " ".join(map(str, keys.values())))
@pytest.mark.parametrize("workers", [1, 3])
def test_pruning_in_memory_gives_the_bytes_of_a_run(folder: Path, tmp_path: Path, keys: dict, workers: int) -> None:
    planned = api.load_recipe(recipe(folder, **keys))
    written = load_tensors(planned.run(tmp_path / "out").folder)
    tuned, base = load_tensors(folder / "tuned"), load_tensors(folder / "base")
    before = {name: tensor.clone() for name, tensor in tuned.items()}
    found = api.prune(tuned, base, seed=3, workers=workers, **keys)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert all(torch.equal(tuned[name], tensor) for name, tensor in before.items())


def test_other_dtypes_shapes_and_buffers_go_through_memory(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "w": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "h": torch.randn(3, generator=generator).half(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(4),
        "flag": torch.tensor([True, False]),
        "transposed": torch.randn(6, 4, generator=generator).T,
    }
    tuned = {n: t + 1 if t.is_floating_point() else t for n, t in base.items()}
    found = api.prune(tuned, base, method="magnitude", density=0.5)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in tuned.items()}
    assert torch.equal(found["ids"], base["ids"])
    assert torch.equal(found["flag"], base["flag"])
    changed = (found["transposed"] != base["transposed"]).sum()
    assert changed == 12
    make_checkpoint(tmp_path / "m", {n: t.contiguous() for n, t in found.items()})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "needs a method"),
        ({"method": "magnitude"}, "^prune: magnitude needs a density"),
        ({"method": "magnitud", "density": 0.1}, "^prune: method: unknown pruning method"),
        ({"method": "magnitude", "density": 1.5}, "must be in (0, 1]"),
        ({"method": "magnitude", "density": 0.1, "q": "output_change"}, "needs calibration"),
        ({"method": "magnitude", "density": 0.1, "densty": 1}, "^prune: densty: "),
    ],
)
def test_what_a_recipe_would_be_refused_for(keys: dict, message: str) -> None:
    base = {"w": torch.zeros(4, 4)}
    with pytest.raises(DeltamergeError, match=message.replace("(", r"\(").replace("]", r"\]")):
        api.prune({"w": torch.ones(4, 4)}, base, **keys)


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(DeltamergeError, match="w"):
        api.prune({"w": torch.ones(4, 4)}, {"w": torch.zeros(4, 5)}, method="magnitude", density=0.1)


def test_a_plan_reads_no_weights_and_says_what_the_command_says(folder: Path) -> None:
    planned = api.load_recipe(str(recipe(folder, method="dare", density=0.5)), device="cpu")
    described = planned.describe()
    assert {tensor["name"] for tensor in described["tensors"]} == load_tensors(folder / "tuned").keys()


def test_merging_from_python_gives_the_bytes_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    tuned = {"model": "tuned", "parameters": {"weight": 0.5}}
    text = yaml.safe_dump({"merge_method": "ties", "base_model": "base", "models": [tuned], "dtype": "float32"})
    (folder / "ties.yaml").write_text(text)
    written = load_tensors(api.load_recipe(folder / "ties.yaml").run(tmp_path / "by_recipe").folder)
    item = tuned | {"model": str(folder / "tuned")}
    made = api.merge([item], tmp_path / "out", method="ties", base=folder / "base", dtype="float32")
    found = load_tensors(made.folder)
    assert made.made
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
    assert not api.merge([item], tmp_path / "out", method="ties", base=folder / "base", dtype="float32").made


def test_a_fault_of_a_merge_from_python_is_named_without_a_line(folder: Path) -> None:
    with pytest.raises(DeltamergeError, match=r"^merge: densty: unknown key") as caught:
        api.merge([folder / "tuned"], folder / "none", method="ties", base=folder / "base", densty=1)
    assert caught.value.hint


def test_the_commands_are_functions(folder: Path, tmp_path: Path) -> None:
    tuned, base = folder / "tuned", folder / "base"
    delta = api.extract(tuned, base, tmp_path / "delta")
    applied = api.apply(delta.folder, base, tmp_path / "again")
    found, wanted = load_tensors(applied.folder), load_tensors(tuned)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert api.inspect(tuned, base, workers=1).total.relative_norm > 0
    advice = api.recommend(tuned, base, density=0.1, workers=1)
    assert yaml.safe_load(advice.recipe)["models"][0]["prune"]["density"] == 0.1
    with pytest.raises(DeltamergeError, match="density"):
        api.recommend(tuned, base)
    with pytest.raises(DeltamergeError, match="density"):
        api.recommend([tuned, tuned], base, density=0.1)


def test_a_plan_and_a_result_are_shown_in_a_line(folder: Path, tmp_path: Path) -> None:
    planned = api.load_recipe(recipe(folder, method="dare", density=0.5), device="cpu")
    result = planned.run(tmp_path / "<out>")
    for shown in (planned, planned.plan, result, api.Lock.read(result.folder / "recipe.lock")):
        assert len(repr(shown)) < 500, repr(shown)
        assert "\n" not in repr(shown)
    assert f"{len(planned.plan.outputs)} tensors" in repr(planned)
    assert "peak memory" in planned._repr_html_()
    assert "deltamerge verify" in result._repr_html_()
    assert "<out>" not in result._repr_html_()


@pytest.mark.parametrize("command", ["--help", "check --help", "plan --help", "run --help"])
def test_help_comes_without_a_heavy_import(command: str) -> None:
    script = (
        "import sys\n"
        "from deltamerge.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *command.split()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "Usage: " in done.stdout


def test_the_package_is_light_and_says_what_it_has() -> None:
    script = (
        "import sys, deltamerge as dm\n"
        "names = ['AdamR', 'DeltaCallback', 'DeltaWriter', 'DeltamergeError', 'EngineSwitch', 'Switch',\n"
        "         '__version__', 'apply', 'extract', 'follow', 'inspect', 'load_delta', 'load_recipe', 'merge',\n"
        "         'prune', 'recommend']\n"
        "assert sorted(dm.__all__) == names, dm.__all__\n"
        "assert not {'torch', 'pydantic', 'numpy'} & sys.modules.keys()\n"
        "assert callable(dm.load_recipe) and callable(dm.prune) and callable(dm.load_delta)\n"
        "import deltamerge.cli, deltamerge.api\n"
        "assert callable(dm.load_recipe) and callable(dm.prune)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", sorted(set(deltamerge.__all__) - {"__version__"}))
def test_a_public_name_is_the_one_of_its_module(name: str) -> None:
    found = getattr(deltamerge, name)
    assert found.__name__ == name
    assert deltamerge._HOME.keys() == set(deltamerge.__all__) - {"__version__"}
