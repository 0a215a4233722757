"""What scripts, CI and people in a hurry type: stdin, folders, JSON, annotations, CSV; and slips of the first day."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from calls import call
from conftest import tiny_llama
from safetensors.torch import load_file

import deltamerge
from deltamerge.recipe.file import read_recipe

RECIPE = "base_model: ./base\nmodels: [{model: ./math, prune: {method: dare, density: 0.2}}]\n"
WRONG = "base_model: ./base\nmodels: [{model: ./math, prune: {method: dare, density: 0.2, includ: [a]}}]\nsed: 1\n"

COLUMN = WRONG.splitlines()[1].index("includ") + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mile")
    base = tiny_llama(root / "base", seed=0)
    tiny_llama(root / "math", seed=1, base=base)
    (root / "good.yaml").write_text(RECIPE)
    return root


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_a_recipe_comes_from_stdin(capsys, monkeypatch, tmp_path):
    def type_in(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    type_in(RECIPE)
    assert call(capsys, "check", "-") == (0, "", "-: ok, 21 tensors, 43.3 kB\n")
    type_in(RECIPE)
    assert call(capsys, "run", "-", "--out", tmp_path / "a", "-q")[0] == 0
    assert call(capsys, "run", "good.yaml", "--out", tmp_path / "b", "-q")[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    type_in(WRONG)
    code, _, err = call(capsys, "plan", "-")
    assert (code, f"recipe.yaml:2:{COLUMN}: models[0].prune.includ: unknown key" in err) == (1, True)


def test_check_speaks_json_and_to_github(capsys, tmp_path):
    (tmp_path / "bad, 100%.yaml").write_text(WRONG)
    (tmp_path / "lost.yaml").write_text("base_model: ./base\nmodels: [{model: ./maths}]\n")
    paths = ["good.yaml", tmp_path / "bad, 100%.yaml", tmp_path / "lost.yaml"]
    for flags in (["--json"], ["--output-format", "json"]):
        code, out, err = call(capsys, "check", *paths, *flags)
        good, bad, lost = json.loads(out)["recipes"]
        assert (code, err) == (1, "")
        assert (good["ok"], good["tensors"], good["bytes"], good["notes"]) == (True, 21, 43328, [])
        assert not bad["ok"]
        places = [(problem["line"], problem["location"]) for problem in bad["error"]["problems"]]
        models = [(1, "base_model"), (2, "models[0].model")]  # neither is there
        assert places == [*models, (2, "models[0].prune.includ"), (3, "sed")]
        assert bad["error"]["problems"][3]["hint"] == "did you mean 'seed'?"
        assert f"no such folder in {tmp_path}\n" in lost["error"]["message"]
        assert (lost["error"]["exit_code"], [p["line"] for p in lost["error"]["problems"]]) == (1, [1, 2])
    code, out, err = call(capsys, "check", *paths, "--output-format", "github")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (1, "", 6)
    where = f"file={tmp_path}/bad%2C 100%25.yaml,line=2,col={COLUMN},title=deltamerge"
    assert lines[2] == f"::error {where}::models[0].prune.includ: unknown key: did you mean 'include'?"
    assert lines[4].startswith(f"::error file={tmp_path}/lost.yaml,line=1,col=13,title=deltamerge::base_model: ./base")


def test_a_folder_s_recipes_are_checked(capsys, tmp_path):
    code, _, err = call(capsys, "check", tmp_path)
    assert (code, f"{tmp_path}: no recipe in this folder" in err) == (1, True)
    for name, text in {
        "b.yml": RECIPE, "deep/a.yaml": RECIPE, ".git/c.yaml": WRONG, "compose.yaml": "services: {}\n",
        "x.yaml": "a: [\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code, _, err = call(capsys, "check", tmp_path, "--offline")
    assert code == 1
    assert err.startswith(f"{tmp_path}/b.yml: ok\n{tmp_path}/deep/a.yaml: ok\n{tmp_path}/x.yaml:2:1: not YAML")


def test_a_recipe_that_a_run_left_in_its_output_is_not_checked(capsys, tmp_path, monkeypatch, folder):
    for name in ("base", "math"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert call(capsys, "run", "recipe.yaml", "-q")[0] == 0
    assert call(capsys, "lock", "recipe.yaml")[0] == 0
    assert (tmp_path / "recipe-merged" / "recipe.yaml").is_file()
    assert call(capsys, "check", ".") == (0, "", "recipe.yaml: ok, 21 tensors, 43.3 kB\n")
    code, _, err = call(capsys, "check", "recipe-merged")
    assert (code, "no such folder in" in err) == (1, True)


@pytest.mark.parametrize("words", [["run"], ["run", "good.yaml", "--zork"], ["plan", "good.yaml", "--set", "x"]])
def test_usage_errors_are_json_too(capsys, words):
    code, out, err = call(capsys, *words, "--json")
    found = json.loads(out)["error"]
    assert (code, found["exit_code"], found["problems"], found["message"] in err) == (2, 2, [], True)


def test_a_bug_is_json_too(capsys, monkeypatch):
    monkeypatch.setattr("deltamerge.run.plans.plan", lambda *_, **__: 1 / 0)
    code, out, _ = call(capsys, "plan", "good.yaml", "--json")
    found = json.loads(out)["error"]
    assert (code, found["exit_code"], "ZeroDivisionError" in found["message"]) == (3, 3, True)


def test_an_error_names_its_model_once(capsys, tmp_path, folder):
    there = folder / "math"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"")
    alone = "merge_method: passthrough\nmodels: [{model: ./broken}]\n"
    based = f"base_model: ./broken\nmerge_method: nearswap\nparameters: {{t: 0.1}}\nmodels: [{{model: {there}}}]\n"
    for text in (alone, based):
        (tmp_path / "r.yaml").write_text(text)
        code, _, err = call(capsys, "check", tmp_path / "r.yaml")
        assert (code, err.count("./broken: ")) == (1, 1), err


def test_other_commands_speak_json_and_so_do_errors(capsys, tmp_path):
    made = tmp_path / "made"
    assert call(capsys, "run", "good.yaml", "--out", made, "-q")[0] == 0
    code, out, err = call(capsys, "verify", made, "--base", "base", "--json")
    found = json.loads(out)
    assert (code, err, "model.safetensors" in found["files"], bool(found["base"])) == (0, "", True, True)
    (made / "model.safetensors").write_bytes(b"")
    code, out, err = call(capsys, "verify", made, "--json")
    assert (code, json.loads(out)["error"]["message"] in err) == (1, True)
    code, out, err = call(capsys, "run", "good.yaml", "--device", "tpu", "--json")
    assert (code, json.loads(out)["error"]["exit_code"], "tpu" in err) == (2, 2, True)
    code, out, _ = call(capsys, "init", "math", "--base", "base", "--out", "-", "--json")
    assert (code, "base_model" in json.loads(out)["recipe"]) == (0, True)
    (tmp_path / "wrong.yaml").write_text(WRONG)
    code, out, err = call(capsys, "plan", tmp_path / "wrong.yaml", "--json")
    assert (code, len(json.loads(out)["error"]["problems"]), "unknown key" in err) == (1, 2, True)


def test_numbers_are_there_as_csv(capsys):
    code, out, _ = call(capsys, "inspect", "math", "--base", "base", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    _, said, _ = call(capsys, "inspect", "math", "--base", "base", "--json")
    tensors = json.loads(said)["tensors"]
    assert (code, [row["name"] for row in rows]) == (0, [one["name"] for one in tensors])
    for row, one in zip(rows, tensors, strict=True):
        assert float(row["norm"]) == one["norm"]
        assert float(row["quantiles.0.99"]) == one["quantiles"]["0.99"]
        assert row["shape"] == "x".join(map(str, one["shape"]))
    code, out, _ = call(capsys, "recommend", "math", "--base", "base", "--density", "0.1", "--csv")
    assert (code, out.splitlines()[0].startswith("name,prune.method")) == (0, True)


def test_extract_takes_the_base_behind_the_model(capsys, tmp_path):
    assert call(capsys, "extract", "math", "base", "--out", tmp_path / "a", "-q")[0] == 0
    assert call(capsys, "extract", "math", "--base", "base", "--out", tmp_path / "b", "-q")[0] == 0
    files = [(tmp_path / name / "delta.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    code, _, err = call(capsys, "extract", "math")
    assert (code, "name the base once" in err) == (2, True)
    for arguments, same in ((["math", "math/"], "math"), (["base", "--base", "base"], "base")):
        code, _, err = call(capsys, "extract", *arguments)
        assert (code, f"{same}: is the base itself" in err) == (1, True)


def test_memory_that_is_too_little_names_what_is_enough(capsys, tmp_path):
    code, _, err = call(capsys, "run", "good.yaml", "--out", tmp_path / "out", "--workers", "2", "--memory", "1MB")
    assert (code, "--memory 1.0 MB is too little for 2 workers" in err) == (1, True)
    enough = err.partition("give at least ")[2].partition(",")[0]
    assert call(capsys, "run", "good.yaml", "--out", tmp_path / "out", "--workers", "2", "--memory", enough)[0] == 0


SLIPS = {
    "a weight beside the model": (
        "models: [{model: ./math, weight: 0.5}]", "hint: it belongs under parameters: {weight: …}",
    ),
    "a method beside the model": ("models: [{model: ./math, q: 0.5}]", "hint: it belongs under prune: {q: …}"),
    "a density in percent": (
        "models: [{model: ./math, prune: {method: dare, density: 20}}]", "must be in (0, 1], got 20\nhint: 20 % is 0.2",
    ),
    "a path that is nearly right": ("models: [{model: ./maht}]", "hint: did you mean ./math?"),
    "the base's path": ("models: [{model: ./math}]\nbase_model: ./bsae", "hint: did you mean ./base?"),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_of_the_first_day_get_a_hint(capsys, folder, slip):
    text, wanted = SLIPS[slip]
    (folder / "slip.yaml").write_text(text + ("" if "base_model" in text else "\nbase_model: ./base") + "\n")
    code, _, err = call(capsys, "check", "slip.yaml")
    assert (code, wanted in err) == (1, True), err


@pytest.mark.parametrize("models", ["[./math]", "./math", "{model: ./math}"])
def test_a_model_without_its_list_or_key_is_one(capsys, folder, models):
    (folder / "short.yaml").write_text(f"models: {models}\nbase_model: ./base\n")
    assert call(capsys, "check", "short.yaml")[0] == 0
    (model,) = read_recipe(folder / "short.yaml").output.recipe.models
    assert model.model_dump(exclude_defaults=True) == {"model": "./math"}


def test_a_home_folder_is_found(capsys, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "home.yaml").write_text("base_model: ~/base\nmodels: [{model: ~/math}]\n")
    assert call(capsys, "check", "home.yaml")[0] == 0
    (folder / "home.yaml").write_text("base_model: ~/base\nmodels: [{model: ~/meth}]\n")
    assert "hint: did you mean ~/math?" in call(capsys, "check", "home.yaml")[2]


def test_dir_shows_the_interface():
    assert dir(deltamerge) == sorted(deltamerge.__all__)


def test_every_command_reads_torch_s_files_where_it_may(capsys, tmp_path, monkeypatch, folder):
    for name in ("base", "math"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((folder / name / "config.json").read_bytes())
        torch.save(load_file(folder / name / "model.safetensors"), tmp_path / name / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    for words in (
        ["init", "math", "--base", "base"],
        ["plan", "recipe.yaml", "--set", "pickles=false"],
        ["lock", "recipe.yaml"],
        ["inspect", "math", "--base", "base"],
        ["recommend", "math", "--base", "base", "--density", "0.1", "--out", "small.yaml"],
        ["diff", "base", "math"],
        ["extract", "math", "base", "--out", "delta"],
        ["verify", "delta", "--base", "base"],
    ):
        code, _, err = call(capsys, *words)
        assert (code, "--allow-pickles" in err) == (0 if words[0] == "lock" else 1, words[0] != "lock"), words
        assert call(capsys, *words, "--allow-pickles")[0] == 0, words
    assert call(capsys, "check", "small.yaml")[0] == 0


def test_notes_of_a_check_are_for_those_who_ask(capsys, folder):
    (folder / "noted.yaml").write_text(f"{RECIPE}seed: {{sweep: [1, 2]}}\n")
    assert json.loads(call(capsys, "check", "noted.yaml", "--json")[1])["recipes"][0]["notes"]
    assert ": note: " not in call(capsys, "check", "noted.yaml")[2]
    assert ": note: " in call(capsys, "check", "noted.yaml", "-v")[2]
