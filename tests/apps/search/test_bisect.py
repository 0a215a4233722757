"""`bisect` finds faults that were planted in a merge: a wrong head, a swapped layer, λ × 10 on one layer."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calls import call
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

from deltamerge.apps.search.bisect import MOST, REMADE, Bisection, bisect
from deltamerge.apps.search.judge import IN_MERGE, StudyJudge, Walk
from deltamerge.cli.search import verdict
from deltamerge.errors import UsageError
from deltamerge.files import progress
from deltamerge.recipe.file import read_recipe
from deltamerge.run.options import Options

LAYERS, NAMES = 6, ("a", "b", "c")
OPTIONS = Options(device="cpu", workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bisect")
    base = tiny_llama(folder / "base", seed=0, layers=LAYERS, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate(NAMES, 1):
        made = {"seed": seed, "layers": LAYERS, "base": base, "sigma": 0.004, "dtype": torch.float32}
        tiny_llama(folder / name, tokenizer=True, **made)
    words = torch.randint(4, 96, (12, 9), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"text": " ".join(f"w{number}" for number in row)} for row in words]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layer 2 in the place of layer 4."""
    return tensors | {
        name: tensors[name.replace("layers.4.", "layers.2.")].clone() for name in tensors if "layers.4." in name
    }


def with_a_wrong_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    head = tensors["lm_head.weight"]
    return tensors | {
        "lm_head.weight": torch.randn(head.shape, generator=torch.Generator().manual_seed(5)) * head.std()
    }


def planted(folder: Path, place: Path, fault: Any = None, **parameters: Any) -> Path:
    """A recipe of the three models, `fault` in the weights of b."""
    for name in ("base", *NAMES):
        (place / name).symlink_to(folder / name)
    if fault is not None:
        (place / "b").unlink()
        shutil.copytree(folder / "b", place / "b")
        made = fault(load_file(folder / "b" / "model.safetensors"))
        save_file(made, place / "b" / "model.safetensors", metadata={"format": "pt"})
    recipe = {"base_model": "./base", "merge_method": "task_arithmetic", "parameters": parameters}
    models = [{"model": f"./{name}", "name": name, "parameters": {"weight": 0.4}} for name in NAMES]
    (place / "r.yaml").write_text(yaml.safe_dump(recipe | {"models": models}))
    return place / "r.yaml"


def found_in(folder: Path, recipe: Path, skill: str | None = "a") -> Bisection:
    rows = [{"data": str(folder / "rows.jsonl"), "sequences": 6, "length": 12}]
    found = bisect(read_recipe(recipe), rows=rows, skill=skill, options=OPTIONS)
    assert found.passes <= MOST
    return found


def test_a_swapped_layer_and_its_model_are_found(folder: Path, tmp_path: Path, monkeypatch) -> None:
    made: Counter[str] = Counter()
    make = Walk._make
    monkeypatch.setattr(Walk, "_make", lambda walk, k, names: made.update(names) or make(walk, k, names))
    shown: list[float] = []
    monkeypatch.setattr(progress.Phase, "begin", lambda _, count: shown.append(count))
    found = found_in(folder, planted(folder, tmp_path, swapped))
    assert len(set(shown)) > LAYERS  # progress within the passes of a walk
    assert set(made.values()) == {3}  # the merge, and without each of two models
    assert found.layers[0].name == "model.layers.4"
    assert found.models[0].name == "b"
    assert found.layers[0].won > 2 * found.layers[1].won
    assert all(one.name.startswith("model.layers.4.") for one in found.tensors)


def test_a_wrong_head_and_its_model_are_found(folder: Path, tmp_path: Path) -> None:
    found = found_in(folder, planted(folder, tmp_path, with_a_wrong_head))
    assert found.layers[0].name == "lm_head.weight"
    assert found.models[0].name == "b"


def test_a_factor_of_ten_on_one_layer_is_found(folder: Path, tmp_path: Path) -> None:
    factor = [{"filter": "layers.3.mlp", "value": 10}, {"value": 1}]
    found = found_in(folder, planted(folder, tmp_path, **{"lambda": factor}))
    assert found.layers[0].name == "model.layers.3"
    assert "layers.3.mlp" in found.tensors[0].name


def test_exchanging_everything_would_win_all(folder: Path, tmp_path: Path) -> None:
    """A merge of which one layer alone is merged: exchanged for the skill's own, nothing is lost."""
    only = [{"filter": "layers.1.", "value": 0.4}, {"value": 0}]
    recipe = planted(folder, tmp_path)
    data = yaml.safe_load(recipe.read_text())
    for model in data["models"]:
        model["parameters"] = {
            "weight": only if model["name"] != "a" else [{"filter": "layers.1.", "value": 0.4}, {"value": 1.0}]
        }
    recipe.write_text(yaml.safe_dump(data))
    found = found_in(folder, recipe)
    assert found.lost["a"] > 0.01
    assert found.layers[0].name == "model.layers.1"
    assert found.layers[0].lost == pytest.approx(0, abs=1e-6)
    assert found.layers[0].won == pytest.approx(found.lost["a"], abs=1e-6)


def test_the_worst_skill_is_looked_into(folder: Path, tmp_path: Path) -> None:
    recipe = planted(folder, tmp_path)
    data = yaml.safe_load(recipe.read_text())
    data["models"][2]["parameters"]["weight"] = 0.0
    recipe.write_text(yaml.safe_dump(data))
    assert found_in(folder, recipe, None).skill == "c"


def test_the_command_prints_and_draws(folder: Path, tmp_path: Path, capsys) -> None:
    recipe, plot = planted(folder, tmp_path, swapped), tmp_path / "cost.svg"
    asked = ["bisect", recipe, "--rows", folder / "rows.jsonl", "--sequences", "6", "--length", "12", "--of", "a"]
    code, out, err = call(capsys, *asked, "--plot", plot, "--workers", "1", "--device", "cpu")
    assert code == 0, err
    assert re.search(
        r"a loses [\d.]+%; most by model\.layers\.4 \([\d.]+%\), there model\.layers\.4\.", " ".join(out.split())
    )
    assert "of the models most by b" in " ".join(out.split())
    assert 'data-name="4"' in plot.read_text()
    for taken, said in (
        (tmp_path / "gone" / "cost.svg", "no such folder"),
        (tmp_path / "mine.svg", "is there, and was not written for"),
        (tmp_path / "cost.png", "cannot be drawn"),
    ):
        if taken.parent.exists():
            taken.write_text("mine")
        code, out, err = call(capsys, *asked, "--plot", taken)
        assert (code, out, said in err) == (1, "", True)


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
def test_a_model_is_left_out_of_a_merge_of_its_rows(folder: Path, tmp_path: Path, method: str, monkeypatch) -> None:
    """The inputs that the others' layers have are measured anew, and old measurements in a merge are removed."""
    recipe = planted(folder, tmp_path)
    data = yaml.safe_load(recipe.read_text())
    rows = {"data": str(folder / "rows.jsonl"), "sequences": 6, "length": 12}
    models = [one | {"calibration": rows} for one in data["models"][:2]]
    recipe.write_text(yaml.safe_dump({**data, "merge_method": method, "models": models}))
    kept: list[int] = []
    close = StudyJudge.close
    monkeypatch.setattr(
        StudyJudge,
        "close",
        lambda judge: kept.append(sum(one.function == IN_MERGE for one in judge.known)) or close(judge),
    )
    found = found_in(folder, recipe)
    assert found.notes == (REMADE,)
    assert bisect(read_recipe(recipe), skill="a", options=OPTIONS).notes == ()
    kept.pop()
    (b,) = found.models
    assert (b.name, b.lost) == ("b", pytest.approx(0, abs=1e-5))  # of a alone nothing is lost
    assert kept == [int(method == "regmean_plus")]


def test_a_skill_that_loses_nothing_blames_nothing(folder: Path, tmp_path: Path) -> None:
    recipe = planted(folder, tmp_path)
    data = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**data, "models": [data["models"][0] | {"parameters": {"weight": 1.0}}]}))
    found = found_in(folder, recipe)
    assert verdict(found) == "a loses 0.0%; no layer alone costs it"
    assert "no layer alone costs it" in found.picture()


def test_what_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    recipe = planted(folder, tmp_path)
    with pytest.raises(UsageError, match="no model is named x"):
        found_in(folder, recipe, "x")
    code, out, err = call(capsys, "bisect", recipe)
    assert (code, out) == (1, "")
    assert "has no rows" in err
    several = tmp_path / "several.yaml"
    text = recipe.read_text()
    several.write_text(f"name: first\n{text}---\n{text.replace('./c', 'first')}")
    code, _, err = call(capsys, "bisect", several, "--rows", folder / "rows.jsonl")
    assert (code, "several.yaml: has several documents" in err) == (1, True)
    code, _, err = call(capsys, "bisect", recipe, "--rows", tmp_path)
    assert (code, "has no a.jsonl" in err) == (1, True)
