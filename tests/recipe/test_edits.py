"""Keys set from outside a recipe: they are written into its text, which keeps all else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from calls import call
from conftest import tiny_llama

from deltamerge.errors import InputError, RecipeError
from deltamerge.recipe.edits import parse_setting, set_keys

TEXT = """\
# a merge
base_model: ./b   # the base
models:
  - model: ./a
    prune: {method: dare, density: 0.1}
  - prune:
      # by size
      method: magnitude   # m
      density: 0.2
    model: ./c
  - {model: ./d}
parameters:
  weight: [1, 2]
  "odd key": |
    text
output:
# end
"""
SETTINGS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "seed=3": (("seed",), 3),
    "base_model=./x": (("base_model",), "./x"),
    "models.0.prune.density=0.5": (("models", 0, "prune", "density"), 0.5),
    "models.0.prune.q=output_change": (("models", 0, "prune", "q"), "output_change"),
    "models.1.prune.density=[0.1, 0.2]": (("models", 1, "prune", "density"), [0.1, 0.2]),
    "models.1.prune.q={objective: layer_mse, scope: row}": (
        ("models", 1, "prune", "q"), {"objective": "layer_mse", "scope": "row"},
    ),
    "models.1.prune={method: none}": (("models", 1, "prune"), {"method": "none"}),
    "models.0={model: ./y}": (("models", 0), {"model": "./y"}),
    "models.1={model: ./y}": (("models", 1), {"model": "./y"}),
    "models.2.name=third": (("models", 2, "name"), "third"),
    "models=[{model: ./z}]": (("models",), [{"model": "./z"}]),
    "parameters.weight=0.5": (("parameters", "weight"), 0.5),
    "parameters.lambda=2": (("parameters", "lambda"), 2),
    "parameters.odd key=7": (("parameters", "odd key"), 7),
    "output.shard_size=2GB": (("output", "shard_size"), "2GB"),
    "calibration.data=x.jsonl": (("calibration", "data"), "x.jsonl"),
    "template=": (("template",), None),
}  # fmt: skip


def replaced(data: Any, loc: tuple[Any, ...], value: Any) -> Any:
    """The data with `value` at `loc`."""
    if not loc:
        return value
    head, *rest = loc
    if isinstance(data, list):
        return [replaced(item, tuple(rest), value) if i == head else item for i, item in enumerate(data)]
    return {**(data or {}), head: replaced((data or {}).get(head), tuple(rest), value)}


ROUGH = """\
base_model:   ./b
models:
- {model: ./a,  parameters: {weight: [{filter: mlp, value: [0.5, 1]}, {value: 0.5}]}}   # by filter
- model:    './c'
parameters: {weight:  1.0}
config: {name: "é", x: [ ~, TRUE, 1e-3 ]}
"""


@pytest.mark.parametrize(
    ("setting", "old", "new"),
    [
        ("seed=3", "", ""),
        ("parameters.weight=0.5", "weight:  1.0", "weight:  0.5"),
        ("models.1.model=./d", "'./c'", "./d"),
        ("models[1].model=./d", "'./c'", "./d"),
    ],
)
def test_lines_that_are_not_touched_keep_their_bytes(setting: str, old: str, new: str) -> None:
    """Spaces, quotes, braces and indents: a round trip by a library of YAML would make all of them its own."""
    parsed, text = parse_setting(setting)
    added = "seed: 3\n" if setting == "seed=3" else ""
    assert set_keys(ROUGH, {parsed: text}, "r.yaml") == ROUGH.replace(old, new) + added


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_key_is_set_and_nothing_else_changes(setting):
    loc, value = SETTINGS[setting]
    parsed, text = parse_setting(setting)
    assert parsed == loc
    result = set_keys(TEXT, {parsed: text}, "r.yaml")
    assert yaml.safe_load(result) == replaced(yaml.safe_load(TEXT), loc, value)
    assert set_keys(result, {parsed: text}, "r.yaml") == result
    for comment in ("# a merge", "# the base", "# end"):
        assert comment in result
    if len(loc) == 1 and loc[0] not in yaml.safe_load(TEXT):  # errors keep their lines
        assert result.startswith(TEXT.rstrip("\n"))


def test_every_document_of_a_file_gets_it():
    text = "{name: one, seed: 1}\n---\nname: two\n---\n  base_model: x\n"
    result = list(yaml.safe_load_all(set_keys(text, {("seed",): "5", ("output", "path"): "p"}, "r.yaml")))
    assert [(one["seed"], one["output"]) for one in result] == [(5, {"path": "p"})] * 3


SHORT = {
    "models: ./a  # one\n": 'models: [{prune: {density: 0.5}, model: "./a"}]  # one\n',
    "models: [./a, ./b]\n": 'models: [{prune: {density: 0.5}, model: "./a"}, {model: "./b"}]\n',
    "models:\n  # one\n  model: ./a\n": "models:\n  # one\n  - prune: {density: 0.5}\n    model: ./a\n",
}


@pytest.mark.parametrize("text", SHORT)
def test_a_key_is_set_of_a_model_in_its_short_form(text):
    assert set_keys(text, {("models", 0, "prune", "density"): "0.5"}, "r.yaml") == SHORT[text]


REFUSED = {
    "seed": "is not KEY=VALUE",
    "=1": "is not KEY=VALUE",
    "a..b=1": "is not KEY=VALUE",
    "seed=[": "not YAML",
    "seed=1\n---\n2": "not YAML",
    "models.7.name=x": "models is a list of 3, and has no 7",
    "models.name=x": "models is a list of 3, and has no name",
    "base_model.x=1": "base_model is a value, and has no x",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_set_is_refused(setting):
    with pytest.raises(InputError, match=REFUSED[setting]):
        set_keys(TEXT, dict([parse_setting(setting)]), "r.yaml")


@pytest.mark.parametrize("loc", [("b",), ("b", "x"), ("c", 0, "x")])
def test_an_alias_is_left_alone(loc):
    text = "a: &one {x: 1}\nb: *one\nc: [*one]\n"
    with pytest.raises(InputError, match="alias"):
        set_keys(text, {loc: "2"}, "r.yaml")


def test_the_text_must_be_a_recipe_s():
    with pytest.raises(RecipeError):
        set_keys("[1, 2]", {("seed",): "1"}, "r.yaml")


def test_commands_take_settings_and_the_output_says_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = tiny_llama(tmp_path / "base", seed=0)
    tiny_llama(tmp_path / "a", seed=1, base=base)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base_model: ./base\nmodels: [{model: ./a}]\n")
    settings = ("--set", "models.0.prune={method: dare, density: 0.1}", "--set", "seed=7")
    assert call(capsys, "check", recipe, *settings)[0] == 0
    code, out, _ = call(capsys, "plan", recipe, *settings, "--json")
    assert code == 0
    assert "density=0.1" in out
    assert call(capsys, "run", recipe, "--out", tmp_path / "one", *settings)[0] == 0
    said = yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text())
    assert (said["seed"], said["models"][0]["prune"]["density"]) == (7, 0.1)
    recipe.write_text((tmp_path / "one" / "recipe.yaml").read_text())
    assert call(capsys, "run", recipe, "--out", tmp_path / "two")[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    code, _, err = call(capsys, "check", recipe, "--set", "sed=1")
    assert (code, "unknown key" in err, "did you mean 'seed'?" in err) == (1, True, True)
    assert call(capsys, "check", recipe, "--set", "seed")[0] == 2
