"""Which pruning survives at a density: what `extract` takes, and the warnings of recipes where q decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters import write_adapter
from calls import call
from conftest import make_checkpoint, tiny_llama
from running import make_plan

from deltamerge.cli import main
from deltamerge.recipe.prune import choose


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes of it, and rows."""
    folder = tmp_path_factory.mktemp("advice")
    base = tiny_llama(folder / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate(("math", "code"), 1):
        tiny_llama(folder / name, seed=seed, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows = "\n".join(" ".join(f"w{4 + (i * j) % 50}" for j in range(1, 9)) for i in range(1, 30))
    (folder / "rows.txt").write_text(rows)
    return folder


def succeed(*arguments: object) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    assert not leaving.value.code


def warned(folder: Path, recipe: str) -> list[str]:
    path = folder / "r.yaml"
    path.write_text(f"base_model: ./base\n{recipe}")
    return [line for line in make_plan(path, device="cpu").warnings if "q" in line]


ONE = "models: [{{model: ./math, prune: {{{}}}}}]\n"
CALIBRATION = "calibration: {data: rows.txt, sequences: 4, length: 8}\n"


@pytest.mark.parametrize(
    ("prune", "said"),
    [
        ("method: magnitude, density: 0.01", "magnitude at density 0.01 with q = 1"),
        ("method: magnitude, density: 0.1", "magnitude at density 0.1 with q = 1"),
        ("method: magnitude, density: [0.1, 0.01]", "magnitude at density 0.0"),
        ("method: dare, density: 0.01", "dare at density 0.01 with q = density"),
        ("method: dare, density: 0.01, sampling: magnitude", "importance sampling at density 0.01 with q = density"),
        ("method: structured, a: 0.1, b: 0.1", "structured at density 0.01 with q = density"),
        ("method: breadcrumbs, density: 0.1, gamma: 0.01", "breadcrumbs at density 0.1 with q = 1"),
        ("method: della, density: 0.01, epsilon: 0.005", "della at density 0.01 with q = density"),
    ],
)
def test_where_q_decides_its_absence_is_warned_of(models: Path, prune: str, said: str) -> None:
    (line,) = warned(models, ONE.format(prune))
    assert line.startswith(f"./math: {said}")
    assert "`q: output_change` in models[0].prune and `calibration: {data: rows.jsonl}`" in line
    assert "--calibration" in line
    # what it tells to write mends it
    mended = ONE.format(f"{prune}, q: output_change") + CALIBRATION
    assert warned(models, mended) == []


@pytest.mark.parametrize(
    "prune",
    [
        "method: magnitude, density: 0.2",
        "method: magnitude, density: 0.01, q: 0.1",
        "method: magnitude, density: 0.01, q: 1",
        "method: magnitude, density: 0.01, rescale: l2",
        "method: dare, density: 0.05",
        "method: dare, density: 0.02, sampling: magnitude",
        "method: structured, a: 0.5, b: 0.2",
        # few of the entries
        "method: magnitude, density: [{filter: q_proj, value: 0.01}, {value: 0.5}]",
        "method: magnitude, density: [1, 0.7, 0.1]",
    ],
)
def test_what_survives_or_was_chosen_is_not_warned_of(models: Path, prune: str) -> None:
    assert warned(models, ONE.format(prune)) == []


BOTH = "models: [{{model: ./math, parameters: {{{0}}}}}, {{model: ./code, parameters: {{{0}}}}}]\n"


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("ties", "weight: 1, density: 0.01", "ties at density 0.01 with q = 1"),
        ("dare_ties", "weight: 1, density: 0.01", "dare at density 0.01 with q = density"),
        ("dare_linear", "weight: 1, density: 0.02", "dare at density 0.02 with q = density"),
        ("breadcrumbs", "weight: 1, density: 0.05", "breadcrumbs at density 0.05 with q = 1"),
        # mergekit's ordinary recipes
        ("ties", "weight: 1, density: 0.1", None),
        ("ties", "weight: 1, density: [1, 0.7, 0.1]", None),
        ("ties", "weight: 1, density: 0.5", None),
        ("dare_ties", "weight: 1, density: 0.1", None),
        ("della", "weight: 1, density: 0.3", None),
        ("breadcrumbs", "weight: 1, density: 0.5", None),
        ("task_arithmetic", "weight: 1", None),
        ("linear", "weight: 1", None),
    ],
)
def test_mergekits_recipes_are_warned_of_where_they_die(
    models: Path, method: str, parameters: str, said: str | None
) -> None:
    lines = warned(models, f"merge_method: {method}\n" + BOTH.format(parameters))
    assert len(lines) == (said is not None)
    for line in lines:
        assert line.startswith(f"./math, ./code: {said}")


def test_what_ties_is_told_to_write_mends_it(models: Path) -> None:
    (line,) = warned(models, "merge_method: ties\n" + BOTH.format("weight: 1, density: 0.01"))
    keys = line.partition("give `")[2].partition("`")[0]
    assert keys == "prune: {method: magnitude, density: 0.01, q: output_change}"
    assert warned(models, "merge_method: ties\n" + BOTH.format("weight: 1") + f"{keys}\n{CALIBRATION}") == []


def test_a_merge_whose_factor_is_calibrated_is_not_warned_of(models: Path) -> None:
    recipe = (
        "merge_method: task_arithmetic\n" + BOTH.format("weight: 1") + "prune: {method: magnitude, density: 0.01}\n"
    )
    assert len(warned(models, recipe)) == 1
    assert warned(models, recipe + CALIBRATION.replace("{", "{per: merge, ")) == []


def test_rows_that_are_there_are_not_asked_for(models: Path) -> None:
    (line,) = warned(models, ONE.format("method: wanda, density: 0.05") + CALIBRATION)
    assert line.endswith("give `q: output_change` in models[0].prune")


def test_pruned_factors_have_the_square_of_the_density(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32, tokenizer=True)
    write_adapter(tmp_path / "lora", 3)
    recipe = "models: [{{model: ./base+./lora, prune: {{method: magnitude, density: {}}}}}]\noutput: {{kind: peft}}\n"
    (line,) = warned(tmp_path, recipe.format(0.3))
    assert "the product of two pruned factors has the square of the density" in line
    assert warned(tmp_path, recipe.format(0.5)) == []


def test_every_command_about_a_recipe_says_it_and_the_bytes_stay(models: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"base_model: {models}/base\nmodels: [{{model: {models}/math}}]\n"
                      "prune: {method: magnitude, density: 0.01}\n")  # fmt: skip
    said = "magnitude at density 0.01 with q = 1 loses much of a fine-tune"
    for command in (["check"], ["plan"], ["run", "--out", str(tmp_path / "out")]):
        code, out, err = call(capsys, command[0], recipe, *command[1:])
        assert (code, said in " ".join((out + err).split())) == (0, True), command
    for command in (["check"], ["plan"], ["run", "--out", str(tmp_path / "json")]):
        code, out, _ = call(capsys, command[0], recipe, *command[1:], "--json")
        found = json.loads(out)
        found = found["recipes"][0] if command == ["check"] else found
        line = found["notes" if command == ["plan"] else "warnings"][0]
        assert said in line, command
    spelt = tmp_path / "spelt.yaml"
    spelt.write_text(recipe.read_text().replace("density: 0.01", "density: 0.01, q: 1"))
    succeed("run", spelt, "--out", tmp_path / "spelt", "-q")
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "spelt" / weights).read_bytes()


# ---- extract


def extracted(models: Path, capsys: Any, *arguments: Any) -> tuple[str, dict[str, Any]]:
    """What `extract` says on stderr, and the `prune` of the recipe that it leaves."""
    out = arguments[arguments.index("--out") + 1]
    code, _, err = call(capsys, "extract", models / "math", "--base", models / "base", *arguments)
    assert code == 0, err
    return err, yaml.safe_load((out / "recipe.yaml").read_text())["prune"]


@pytest.mark.parametrize(("density", "warned_of"), [(0.01, True), (0.05, False), (0.5, False)])
def test_extract_takes_what_survives_without_rows(
    models: Path, tmp_path: Path, capsys: Any, density: float, warned_of: bool
) -> None:
    err, prune = extracted(models, capsys, "--density", density, "--out", tmp_path / "d")
    assert prune == {"method": "dare", "sampling": "magnitude", "density": density}
    assert err.splitlines()[0] == str(choose(density, rows=False))
    assert ("warning: " in err) == ("--calibration" in err) == warned_of


def test_extract_calibrates_magnitude_on_rows(models: Path, tmp_path: Path, capsys: Any) -> None:
    rows = ("--calibration", models / "rows.txt", "--sequences", 6, "--length", 8)
    err, prune = extracted(models, capsys, "--density", 0.05, *rows, "--out", tmp_path / "d")
    assert prune == {"method": "magnitude", "density": 0.05, "q": "output_change"}
    assert str(choose(0.05, rows=True)) in err.splitlines()
    assert "warning: " not in err
    lock = yaml.safe_load((tmp_path / "d" / "recipe.lock").read_text())
    assert lock["calibration"]
    # a recipe makes the same
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"base_model: {models}/base\nmodels: [{{model: {models}/math}}]\n"
        "prune: {method: magnitude, density: 0.05, q: output_change}\n"
        f"calibration: {{data: {models}/rows.txt, sequences: 6, length: 8}}\noutput: {{kind: delta}}\n"
    )
    succeed("run", recipe, "--out", tmp_path / "r", "-q")
    name = "delta.safetensors"
    assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "r" / name).read_bytes()


def test_extract_says_in_json_what_it_took(models: Path, tmp_path: Path, capsys: Any) -> None:
    pair = (models / "math", "--base", models / "base", "--density", 0.01)
    code, out, _ = call(capsys, "extract", *pair, "--out", tmp_path / "d", "--json")
    found = json.loads(out)
    assert code == 0
    choice = choose(0.01, rows=False)
    assert found["pruning"] == {"prune": choice.prune, "why": choice.why}
    assert ["--calibration" in line for line in found["warnings"]] == [True]
    both = (models / "math", models / "code", "--base", models / "base", "--density", 0.5)
    code, out, _ = call(capsys, "extract", *both, "--out", tmp_path / "store", "--json")
    assert [one["pruning"]["prune"]["method"] for one in json.loads(out)["results"]] == ["dare", "dare"]


def test_extract_leaves_a_choice_that_was_made(models: Path, tmp_path: Path, capsys: Any) -> None:
    err, prune = extracted(models, capsys, "--density", 0.01, "--method", "magnitude", "--out", tmp_path / "m")
    assert prune == {"method": "magnitude", "density": 0.01}
    assert "warning: " in err
    assert "--calibration rows.jsonl with extract" in err
    err, prune = extracted(models, capsys, "--density", 0.01, "--q", 0.2, "--out", tmp_path / "q")
    assert prune == {"method": "magnitude", "density": 0.01, "q": 0.2}
    assert "warning: " not in err
    rows = ("--calibration", models / "rows.txt", "--sequences", 6, "--length", 8)
    chosen = ("--density", 0.05, "--method", "dare", *rows)
    _, prune = extracted(models, capsys, *chosen, "--out", tmp_path / "c")
    assert prune == {"method": "dare", "density": 0.05, "q": "output_change"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--calibration", "rows.txt"], "--calibration is for --density"),
        (["--calibration", "rows.txt", "--density", "0.1", "--q", "0.3"], "both give q"),
        (["--q", "0.3"], "need --density"),
    ],
)
def test_extract_refuses_what_contradicts_itself(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(models)
    code, _, err = call(capsys, "extract", "math", "base", *arguments, "--out", "none")
    assert (code, said in err) == (2, True)
    assert not (models / "none").exists()


def test_extract_calibrates_the_next_version_of_a_chain(models: Path, tmp_path: Path, capsys: Any) -> None:
    succeed("extract", models / "math", "--base", models / "base", "--out", tmp_path / "chain" / "1", "-q")
    rows = ("--calibration", models / "rows.txt", "--sequences", 6, "--length", 8)
    how = ("--after", tmp_path / "chain" / "1", "--density", 0.1, *rows, "--out", tmp_path / "chain" / "2")
    code, _, err = call(capsys, "extract", models / "code", "--base", models / "base", *how)
    assert code == 0, err
    made = yaml.safe_load((tmp_path / "chain" / "2" / "recipe.yaml").read_text())
    assert made["prune"]["q"] == "output_change"


# ---- init


@pytest.mark.parametrize("names", [["math"], ["math", "code"]])
def test_the_first_recipe_takes_what_survives(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, names: list[str]
) -> None:
    monkeypatch.chdir(models)
    code, text, _ = call(capsys, "init", *names, "--base", "base", "--density", "0.03", "--out", "-")
    assert code == 0
    recipe = yaml.safe_load(text)
    assert recipe["prune"] == choose(0.03, rows=False).prune
    assert "parameters" not in recipe
    path = tmp_path / "r.yaml"
    path.write_text(text.replace("./", f"{models}/"))
    assert make_plan(path, device="cpu").warnings == ()


def test_nothing_is_warned_of_where_nothing_is_pruned(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", {"w": torch.zeros(4, 4)})
    make_checkpoint(tmp_path / "math", {"w": torch.ones(4, 4)})
    assert warned(tmp_path, "models: [{model: ./math}]\n") == []
    assert (
        warned(tmp_path, "models: [{model: ./math}]\nprune: {method: magnitude, density: 0.01, include: [x]}\n") == []
    )
