"""mergekit's defaults written into a recipe (`--mergekit-exact`), and what those read who type mergekit's flags."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import yaml
from conftest import load_tensors, tiny_llama, write_json
from running import finish, make_plan, run

from deltamerge import load_recipe
from deltamerge.cli import commands, main
from deltamerge.cli.mergekit_flags import FLAGS
from deltamerge.errors import RecipeError
from deltamerge.methods.table import NO_EFFECT_KEYS
from deltamerge.recipe import mergekit, yaml_source
from deltamerge.recipe.load import load_all

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "from-mergekit.md"

DARE = """\
# a comment
merge_method: dare_ties
base_model: ./base
models:
  - model: ./base
  - model: ./a
    parameters: {weight: 0.7, density: 0.5}
  - {model: ./b, parameters: {weight: 0.4, density: 0.5}}
"""
LINEAR = """\
merge_method: linear
base_model: ./base
parameters: {weight: 1}
models:

  # a comment
  - model: ./a
  - {model: ./b}
"""
SLICES = """\
base_model: ./base
merge_method: della
slices:
- sources:
  - model: ./a
    layer_range: [0, 2]
  parameters: {rescale: false, density: 0.5, weight: 1}
- sources:
  - {model: ./b, layer_range: [0, 2], parameters: {density: 0.5, weight: 1}}
"""


def own(model: str) -> str:
    return f"{model}\n    parameters: {{weight: 1}}"


def resolved(text: str) -> str:
    return mergekit.written_out(text, load_all(yaml_source.loads_all(text, "r.yaml")))[0]


WRITTEN = {
    "dare": (DARE, DARE.replace("merge_method", "prune: {rescale: l1}\ntemplate: base\nmerge_method")),
    "linear": (LINEAR, "template: base\n" + LINEAR.replace("- model: ./a", "- {model: ./base}\n  - model: ./a")),
    "one line": (
        "{merge_method: linear, base_model: b, models: [{model: x}], parameters: {weight: 1}}",
        "{template: base, merge_method: linear, base_model: b, "
        "models: [{model: b}, {model: x}], parameters: {weight: 1}}",
    ),
    "a slice with a divisor of its own": (
        SLICES, "template: base\n" + SLICES.replace("- {model", "- {prune: {rescale: l1}, model"),
    ),
    "a prune that says otherwise": (
        DARE + "template: ./a\nprune: {q: 0.5}\n", DARE + "template: ./a\nprune: {q: 0.5}\n",
    ),
    "a prune that says nothing of it": (
        DARE + "template: ./a\nprune: {exclude: [head]}\n",
        DARE.replace("- model: ./a", "- prune: {rescale: l1}\n    model: ./a").replace(
            "- {model", "- {prune: {rescale: l1}, model"
        ) + "template: ./a\nprune: {exclude: [head]}\n",
    ),
    "nothing to write": (
        "merge_method: passthrough\nmodels: [{model: x}]\n", "merge_method: passthrough\nmodels: [{model: x}]\n",
    ),
    "documents": (
        f"name: one\n{DARE}---\n{LINEAR.replace('./a', 'one')}",
        f"prune: {{rescale: l1}}\ntemplate: base\nname: one\n{DARE}---\ntemplate: base\n"
        + LINEAR.replace("./a", "one").replace("- model: one", "- {model: ./base}\n  - model: one"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_defaults_are_written_where_they_belong(case):
    text, wanted = WRITTEN[case]
    assert resolved(text) == wanted
    assert resolved(wanted) == wanted  # and only once


def test_places_are_those_of_the_file_as_it_was():
    text = f"name: one\n{DARE}---\n{LINEAR}"
    before = load_all(yaml_source.loads_all(text, "r.yaml"))
    _, after = mergekit.written_out(text, before)
    for old, new in zip(before, after, strict=True):
        for key in ("merge_method", "base_model", "models"):
            assert new.source.locate((key,)) == old.source.locate((key,))
    assert after[1].source.locate(("models", 2, "model")) == before[1].source.locate(("models", 1, "model"))


def test_what_cannot_be_written_is_refused():
    anchored = LINEAR.replace("models:\n", "models: &them\n")
    with pytest.raises(RecipeError, match="mergekit's defaults cannot be written into this text") as caught:
        resolved(anchored)
    assert "anchors" in str(caught.value)
    with pytest.raises(RecipeError, match=r"r.yaml:6:5: models\[0\]: needs a weight"):
        resolved(
            LINEAR.replace("parameters: {weight: 1}\n", "")
            .replace("./a", own("./a"))
            .replace("{model: ./b}", f"model: {own('./b')}")
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mergekit")
    base = tiny_llama(folder / "base", seed=0)
    for seed, name in enumerate(("a", "b"), 1):
        tiny_llama(folder / name, seed=seed, base=base, shards=2)
        config = json.loads((folder / name / "config.json").read_text())
        write_json(folder / name / "config.json", config | {"bos_token_id": 7})
    return folder


def test_a_run_leaves_the_recipe_that_makes_the_same_again(models, tmp_path):
    (models / "dare.yaml").write_text(DARE)
    exact = run(models / "dare.yaml", tmp_path / "exact", mergekit_exact=True).folder
    plain = run(models / "dare.yaml", tmp_path / "plain").folder
    (models / "again.yaml").write_text((exact / "recipe.yaml").read_text())
    again = run(models / "again.yaml", tmp_path / "again").folder
    names = ["model.safetensors", "config.json", "recipe.yaml"]
    assert [(exact / name).read_bytes() for name in names] == [(again / name).read_bytes() for name in names]
    assert json.loads((exact / "config.json").read_text())["bos_token_id"] == 1
    base, kept, ours = (load_tensors(folder) for folder in (models / "base", exact, plain))
    assert all(any((model[name] != base[name]).any() for name in base) for model in (kept, ours))
    assert any((kept[name] != ours[name]).any() for name in base)


def test_parts_and_chains_keep_the_flag(models, tmp_path):
    from deltamerge.run.partition import Part

    recipe = models / "parts.yaml"
    recipe.write_text(DARE + "output: {shard_size: 30kB}\n")
    whole = run(recipe, tmp_path / "whole", mergekit_exact=True)
    for i in (1, 2):
        run(recipe, tmp_path / "parts", part=Part(i, 2), mergekit_exact=True)
    parts = finish(recipe, tmp_path / "parts", mergekit_exact=True)
    assert parts.lock["outputs"].keys() == whole.lock["outputs"].keys()
    assert all(
        parts.lock["outputs"][name]["hash"] == entry["hash"]
        for name, entry in whole.lock["outputs"].items() if name.endswith(".safetensors")
    )  # fmt: skip
    chain = models / "chain.yaml"
    chain.write_text(f"name: one\n{DARE}---\n{LINEAR.replace('./a', 'one')}")
    made = run(chain, tmp_path / "chain", mergekit_exact=True)
    again = run(chain, tmp_path / "chain", mergekit_exact=True, force=True)
    assert (list(made.intermediate.values()), list(again.intermediate.values())) == ([True], [False])
    (folder,) = made.intermediate
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["prune"] == {"rescale": "l1"}


def test_plan_and_check_show_what_the_run_will_do(models, capsys):
    (models / "linear.yaml").write_text(LINEAR)
    assert make_plan(models / "linear.yaml", mergekit_exact=True).inputs.names == ("./base", "./a", "./b")
    for command in ("plan", "check"):
        for flags, models_named in (([], 2), (["--mergekit-exact"], 3)):
            with pytest.raises(SystemExit) as leaving:
                main([command, str(models / "linear.yaml"), *flags])
            assert leaving.value.code == 0
            out = capsys.readouterr().out
            assert command == "check" or f"of {', '.join(['./base', './a', './b'][3 - models_named :])}\n" in out


# ---- mergekit's flags


HABITS = {
    "./out": [],
    "./out --cuda --lazy-unpickle": ["--cuda", "--lazy-unpickle"],
    "--no-copy-tokenizer --out-shard-size=1B -j 4": ["--copy-tokenizer", "--out-shard-size", "-j"],
    "--out-path x -I y": ["--out-path", "-I"],
}


@pytest.mark.parametrize("typed", HABITS)
def test_a_flag_of_mergekit_is_answered_with_ours(capsys, typed):
    with pytest.raises(SystemExit) as leaving:
        main(["run", "recipe.yaml", *typed.split()])
    hints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: ")]
    assert leaving.value.code == 2
    assert hints[0] == "hint: mergekit-yaml RECIPE OUT is here: deltamerge run RECIPE --out OUT"
    assert hints[1:] == [f"hint: {flag}: {FLAGS[flag]}" for flag in HABITS[typed]]


def test_other_mistakes_are_not_taken_for_mergekit_s(capsys):
    for arguments in (["run", "recipe.yaml", "--ot", "x"], ["plan", "a.yaml", "b.yaml"], ["run"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "mergekit-yaml" not in capsys.readouterr().err


def test_every_flag_is_named_in_the_documentation_and_every_key_has_one():
    text = DOCUMENTATION.read_text(encoding="utf-8")
    assert [flag for flag in FLAGS if f"`{flag}" not in text] == []
    own = {option for parameter in commands.commands["run"].params for option in parameter.opts}
    assert {f"--{key.replace('_', '-')}" for key in NO_EFFECT_KEYS} - own <= FLAGS.keys()
    assert not FLAGS.keys() & own
    assert "mergekit_exact" in inspect.signature(load_recipe).parameters
