"""Models that are not there, at their places: all at once, and in `check` beside typos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint

from deltamerge.apps.search.candidates import candidates_of
from deltamerge.errors import RecipeError
from deltamerge.recipe.file import read_recipe, read_template
from deltamerge.run.check import RecipeCheck, check_recipe
from deltamerge.run.options import Options
from deltamerge.run.runner import run

RECIPE = """\
merge_method: linear
models:
- model: {first}
  parameters: {{weight: 1}}
- model: {second}
  parameters: {{{word}: 1, weight: 1}}
"""


def checked(folder: Path, first: str, second: str, word: str = "weight", *, offline: bool = False) -> RecipeCheck:
    text = RECIPE.format(first=first, second=second, word=word)
    (folder / "r.yaml").write_text(text.replace("weight: 1, weight: 1", "weight: 1"))
    weight = torch.from_numpy(np.ones((4, 4), np.float32))
    make_checkpoint(folder / "there", {"w": weight}, config={"architectures": ["LlamaForCausalLM"]})
    return check_recipe(folder / "r.yaml", None if offline else Options(device="cpu"))


def places(found: RecipeCheck) -> list[tuple[int | None, int | None, str]]:
    assert isinstance(found.error, RecipeError)
    return [(one.line, one.column, one.location) for one in found.error.problems]


def test_all_missing_models_are_named_at_once(tmp_path: Path) -> None:
    found = checked(tmp_path, "./one", "./there+./two")
    assert places(found) == [(3, 10, "models[0].model"), (5, 10, "models[1].model")]
    assert "./one: no such folder in" in str(found.error)
    assert "./two: no such folder in" in str(found.error)


def test_a_run_and_a_sweep_name_missing_models_at_their_places_too(tmp_path: Path) -> None:
    checked(tmp_path, "./one", "./there+./two")
    recipe, options = tmp_path / "r.yaml", Options(device="cpu")
    wanted = ["r.yaml:3:10: models[0].model: ./one", "r.yaml:5:10: models[1].model: ./two"]
    with pytest.raises(RecipeError) as made:
        run(read_recipe(recipe), tmp_path / "out", options)
    recipe.write_text(recipe.read_text().replace("weight: 1", "weight: {sweep: [1, 2]}", 1))
    with pytest.raises(RecipeError) as swept:
        candidates_of(read_template(recipe), options)
    for found in (made, swept):
        said = [line for line in str(found.value).splitlines() if not line.startswith("hint")]
        assert [line.removeprefix(f"{tmp_path}/").rpartition(": ")[0] for line in said] == wanted
    assert not (tmp_path / "out").exists()


def test_missing_models_are_named_beside_typos(tmp_path: Path) -> None:
    found = checked(tmp_path, "./one", "./there", "wieght")
    assert places(found) == [(3, 10, "models[0].model"), (6, 16, "models[1].parameters.wieght")]


def test_offline_no_model_is_looked_for(tmp_path: Path) -> None:
    assert checked(tmp_path, "./one", "./two", offline=True).error is None
    assert places(checked(tmp_path, "./one", "./two", "wieght", offline=True)) == [
        (6, 16, "models[1].parameters.wieght")
    ]


@pytest.mark.parametrize("there", ["./there", "there", "there/model.safetensors"])
def test_what_is_there_is_not_missing(tmp_path: Path, there: str) -> None:
    found = checked(tmp_path, there, "./other")
    assert places(found) == [(5, 10, "models[1].model")]


def test_a_name_of_another_document_or_of_the_hub_is_not_missing(tmp_path: Path) -> None:
    from deltamerge.run.plans import absent_models

    text = "name: soup\nmerge_method: linear\nmodels: [{model: org/hub@main}, {model: org/hub:folder}]\n---\n"
    text += "merge_method: linear\nmodels: [{model: soup}, {model: ./gone}]\ntokenizer: {tokens: {a: {model: x}}}\n"
    from deltamerge.recipe.yaml_source import loads_all

    assert [one.location for one in absent_models(loads_all(text, "r.yaml"), tmp_path)] == ["models[1].model"]
