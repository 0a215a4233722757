"""mergekit's defaults written into a recipe (`--mergekit-exact`), and what those read who type mergekit's flags."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import load_tensors, tiny_llama, write_json
from running import finish, make_plan, run

from deltamerge import load_recipe
from deltamerge.cli import main
from deltamerge.cli import run as run_command
from deltamerge.cli.mergekit_flags import OF_EVOLVE_WITHOUT_USE, OF_LORA_WITHOUT_USE, VALUES_WITHOUT_USE, WITHOUT_USE
from deltamerge.errors import RecipeError
from deltamerge.methods.registry import NO_EFFECT_KEYS
from deltamerge.recipe import mergekit, yaml_source
from deltamerge.recipe.load import load_all

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "howto" / "from-mergekit.md"

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


ALONE = "merge_method: linear\nbase_model: ./base\nparameters: {weight: 1}\n"


def own(model: str) -> str:
    return f"{model}\n    parameters: {{weight: 1}}"


def resolved(text: str) -> str:
    return mergekit.write_defaults(text, load_all(yaml_source.loads_all(text, "r.yaml")))[0]


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
    "models by their references": (
        LINEAR.replace("- model: ./a", "- ./a   # first"),
        "template: base\n" + LINEAR.replace("- model: ./a", '- {model: ./base}\n  - {model: "./a"}   # first'),
    ),
    "a divisor beside a model's reference": (
        DARE.replace("{model: ./b, par", "{model: ./b, prune: {q: 0.5}, par") + "  - ./c\nparameters: {weight: 1}\n",
        "# a comment\ntemplate: base" + DARE.removeprefix("# a comment")
        .replace("- model: ./a", "- prune: {rescale: l1}\n    model: ./a")
        .replace("{model: ./b, par", "{model: ./b, prune: {q: 0.5}, par")
        + '  - {prune: {rescale: l1}, model: "./c"}\nparameters: {weight: 1}\n',
    ),
    "one model without a list": (
        f"{ALONE}models: ./a  # alone\n",
        f'template: base\n{ALONE}models: [{{model: ./base}}, {{model: "./a"}}]  # alone\n',
    ),
    "one mapping without a list": (
        f"{ALONE}models:\n  model: ./a\n\n  # its name\n  name: |\n    x\n",
        f"template: base\n{ALONE}models:\n  - {{model: ./base}}\n  - model: ./a\n\n    # its name\n    name: |\n"
        "      x\n",
    ),
    "modules of one model": (
        f"{ALONE}modules:\n  vision: {{models: {{model: ./a}}}}\n  text: {{models: ./b}}\n",
        f"template: base\n{ALONE}modules:\n  vision: {{models: [{{model: ./base}}, {{model: ./a}}]}}\n"
        '  text: {models: [{model: ./base}, {model: "./b"}]}\n',
    ),
    "a short form that stays": ("merge_method: linear\nmodels: ./a\n", "merge_method: linear\nmodels: ./a\n"),
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
    _, after = mergekit.write_defaults(text, before)
    for old, new in zip(before, after, strict=True):
        for key in ("merge_method", "base_model", "models"):
            assert new.source.locate((key,)) == old.source.locate((key,))
    assert after[1].source.locate(("models", 2, "model")) == before[1].source.locate(("models", 1, "model"))


def test_a_series_has_one_place(tmp_path):
    for step in ("1", "2"):
        (tmp_path / "run" / f"step-{step}").mkdir(parents=True)
    text = "merge_method: dare_linear\nbase_model: b\ntemplate: base\nmodels: [run/step-*, {model: x, prune: {q: 1}}]\n"
    text += "parameters: {density: 0.5, weight: 1}\n"
    wanted = text.replace("run/step-*", '{prune: {rescale: l1}, model: "run/step-*"}')
    read = load_all(yaml_source.loads_all(text, str(tmp_path / "r.yaml")))
    found, (recipe,) = mergekit.write_defaults(text, read)
    assert found == wanted
    assert [model.prune and model.prune.rescale for model in recipe.models] == ["l1", "l1", None]


def test_what_cannot_be_written_is_refused():
    anchored = LINEAR.replace("models:\n", "models: &them\n")
    with pytest.raises(RecipeError, match="mergekit's defaults cannot be written into this text") as caught:
        resolved(anchored)
    assert "anchors" in str(caught.value)
    with pytest.raises(RecipeError, match=r"r.yaml:\d+:\d+: base_model: is one more model of linear, as in mergekit"):
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


# What is typed after the recipe, keys that are then in recipe.yaml, and flags that the warning names.
TYPED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "OUT": ({}, []),
    "OUT --no-cuda --lazy-unpickle": ({}, ["--lazy-unpickle"]),
    "OUT --copy-tokenizer --out-shard-size 2M -j 4 --random-seed 1": (
        {"seed": 1, "output": {"shard_size": 2_000_000}}, [],
    ),
    "--out-path OUT -I x --lazy --lora-merge-dtype float16 -v": (
        {}, ["--intermediate-dir", "--lora-merge-dtype"],
    ),
    "OUT --no-write-model-card --allow-crimes --trust-remote-code --async-write --write-threads 3 --clone-tensors "
    "--low-cpu-memory --no-multi-gpu --quiet --safe-serialization --unsafe-truncate-embeddings": ({}, []),
}  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_the_command_line_of_mergekit_works(models, tmp_path, capsys, typed):
    keys, named = TYPED[typed]
    out = tmp_path / "out"
    (models / "flags.yaml").write_text(DARE)
    with pytest.raises(SystemExit) as leaving:
        main(["run", str(models / "flags.yaml"), *typed.replace("OUT", str(out)).split()])
    err = capsys.readouterr().err
    assert (leaving.value.code, err if leaving.value.code else "") == (0, "")
    said = yaml.safe_load((out / "recipe.yaml").read_text())
    assert said == yaml.safe_load(DARE) | keys
    warnings = [line for line in err.splitlines() if line.startswith("warning: no effect here: ")]
    assert len(warnings) == bool(named)
    assert all(f"{flag} (" in warnings[0] for flag in named)


def test_a_gpu_that_is_asked_for_and_missing_is_said(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (models / "flags.yaml").write_text(DARE)
    for flag in ("--cuda", "--gpu-rich", "--read-to-gpu", "--multi-gpu"):
        with pytest.raises(SystemExit) as leaving:
            main(["run", str(models / "flags.yaml"), str(tmp_path / "out"), flag])
        assert leaving.value.code == 1
        asked = "cuda:all" if flag == "--multi-gpu" else "cuda"
        assert f"error: --device {asked}: torch sees 0 CUDA devices" in capsys.readouterr().err


def test_every_flag_is_named_in_the_documentation_and_every_key_has_one():
    text = DOCUMENTATION.read_text(encoding="utf-8")
    flags = {name.partition("/")[0] for name in (*WITHOUT_USE, *VALUES_WITHOUT_USE)}
    of_others = (*OF_LORA_WITHOUT_USE, *OF_EVOLVE_WITHOUT_USE)
    assert [flag for flag in of_others if f"`{flag.partition('/')[0]}`" not in text] == []
    assert [flag for flag in flags if f"`{flag}" not in text] == []
    own = {option for parameter in run_command.command.params for option in parameter.opts}
    assert {f"--{key.replace('_', '-')}" for key in NO_EFFECT_KEYS} | flags <= own
    assert "mergekit_exact" in inspect.signature(load_recipe).parameters


# ---- parameters that mergekit ignores

IGNORED = {
    "density of a method that prunes nothing": (
        "merge_method: task_arithmetic\nbase_model: ./base\n"
        "models: [{model: ./a, parameters: {weight: 1, density: 0.5}}]\n",
        "models[0].parameters.density",
    ),
    "normalize of slerp": (
        "merge_method: slerp\nbase_model: ./base\nmodels: [{model: ./base}, {model: ./a}]\n"
        "parameters: {t: 0.5, normalize: true}\n",
        "parameters.normalize",
    ),
    "what is for the whole merge, of one model": (
        "merge_method: slerp\nbase_model: ./base\nmodels: [{model: ./base}, {model: ./a, parameters: {t: 1}}]\n"
        "parameters: {t: 0.5}\n",
        "models[1].parameters.t",
    ),
    "a slip of the pen": (
        "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1, densty: 2}}]\n",
        "models[0].parameters.densty",
    ),
}
ELSEWHERE = ("density of a method that prunes nothing", "normalize of slerp")  # other methods have it


@pytest.mark.parametrize("case", IGNORED)
def test_a_parameter_that_mergekit_ignores_is_a_warning_under_its_rules_a_fault_under_ours_if_no_method_has_it(
    models, tmp_path, case
):
    text, place = IGNORED[case]
    recipe, plain = models / "ignored.yaml", models / "plain.yaml"
    recipe.write_text(text)
    if case in ELSEWHERE:
        assert make_plan(recipe).warnings[0].startswith(f"{place}: no effect under ")
    else:
        with pytest.raises(RecipeError, match=re.escape(place)):
            make_plan(recipe)
    data = yaml.safe_load(text)
    node, *path, last = re.findall(r"\w+", place)
    inner = data[node]
    for part in path:
        inner = inner[int(part) if part.isdigit() else part]
    del inner[last]
    plain.write_text(yaml.safe_dump(data))
    expected = run(plain, tmp_path / "plain", mergekit_exact=True)
    recipe.write_text(f"{text}mergekit: true\n")
    for more in ({}, {"mergekit_exact": True}):
        made = run(recipe, tmp_path / f"out{len(more)}", **more)
        assert made.plan.warnings[0].startswith(f"{place}: no effect under ")
        assert made.lock["outputs"]["model.safetensors"] == expected.lock["outputs"]["model.safetensors"]


def test_parameters_of_other_methods_are_warned_of_once_each_before_any_model_is_opened(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: slerp\nbase_model: ./0\nnormalize: true\nint8_mask: true\nparameters: {t: 0.5, density: 0.5}\n"
        "models: [{model: ./0, parameters: {weight: 0.6}}, {model: ./1, parameters: {weight: 0.4}}]\n"
    )
    with pytest.raises(SystemExit) as leaving:
        main(["check", "--offline", str(recipe)])
    said = [line.partition(": warning: ")[2] for line in capsys.readouterr().err.splitlines()[1:]]
    assert (leaving.value.code, said) == (
        0,
        [
            "normalize: no effect at the top of a recipe, as in mergekit; move it to parameters",
            "parameters.density: no effect under slerp, as in mergekit: it prunes: set prune.method, or merge_method "
            "to ties, dare_ties or dare_linear",
            "models[0].parameters.weight, models[1].parameters.weight: no effect under slerp, as in mergekit",
        ],
    )


# What mergekit writes as mergekit_config.yml for a model whose layers it does not know.
WHOLE_MODULE = """\
merge_method: linear
modules:
  default:
    slices:
    - sources:
      - {layer_range: [0, 0], model: ./a, parameters: {weight: 0.6}}
      - {layer_range: [0, 0], model: ./b, parameters: {weight: 0.4}}
"""


def test_a_layer_range_of_no_layers_in_the_only_slice_of_a_module_is_the_whole_module(models, tmp_path):
    (models / "whole.yaml").write_text(WHOLE_MODULE)
    (models / "models.yaml").write_text(
        "merge_method: linear\nmodels:\n- {model: ./a, parameters: {weight: 0.6}}\n"
        "- {model: ./b, parameters: {weight: 0.4}}\n"
    )
    ours = run(models / "whole.yaml", tmp_path / "whole")
    assert (
        ours.lock["outputs"]["model.safetensors"]
        == (run(models / "models.yaml", tmp_path / "models").lock["outputs"]["model.safetensors"])
    )
    (models / "whole.yaml").write_text(WHOLE_MODULE.replace("weight: 0.6", "weigth: 0.6"))
    with pytest.raises(RecipeError, match=re.escape("sources[0].parameters.weigth: unknown parameter of linear")):
        make_plan(models / "whole.yaml")


@pytest.mark.parametrize(
    "text",
    [WHOLE_MODULE.replace("[0, 0]", "[0, 1]", 1), WHOLE_MODULE.replace("modules:\n  default:\n    slices:", "slices:")],
)
def test_a_layer_range_of_no_layers_is_refused_elsewhere(text):
    with pytest.raises(RecipeError, match=re.escape("layer_range: [0, 0] has no layers")):
        resolved(text)


# ---- mergekit's other commands

TRANSLATED = {
    "mergekit-extract-lora --model ./a --base-model=./b --out-path ./x --max-rank 16": (
        "deltamerge extract ./a --base ./b --lora 16 --out ./x"
    ),
    "extract-lora": "deltamerge extract MODEL --base BASE --lora 128 --out OUT",
    "mergekit-moe c.yml ./o --i-understand-this-is-not-useful-without-training": "deltamerge run c.yml --out ./o",
    "mergekit-tokensurgeon ./a ./d ./o -k 32": (
        "deltamerge run RECIPE --out ./o; the recipe: {merge_method: passthrough, models: ./a, "
        "tokenizer: {transplant: ./d, k: 32}}"
    ),
    "mergekit-multi c.yml --out-path ./o -I ./i": "deltamerge run c.yml --out ./o",
    "mergekit-evolve g.yml --max-fevals 7": (
        "deltamerge search RECIPE --trials 7, with values of the recipe open: weight: {search: [0, 1]}"
    ),
    "mergekit-yaml c.yml ./o --cuda": "deltamerge run c.yml --out ./o",
}


@pytest.mark.parametrize("typed", TRANSLATED)
def test_a_command_of_mergekits_is_refused_with_the_whole_line_to_type(capsys, typed):
    with pytest.raises(SystemExit) as leaving:
        main(typed.split())
    said = f"{typed.split()[0]} is a command of mergekit's. Here: {TRANSLATED[typed]}\n"
    assert (leaving.value.code, capsys.readouterr().err.endswith(said)) == (2, True)


@pytest.mark.parametrize(("typed", "meant"), [("evaluate", "eval"), ("quantize", "convert"), ("chekc", "check")])
def test_a_command_that_there_is_not_gets_a_hint(capsys, typed, meant):
    with pytest.raises(SystemExit) as leaving:
        main([typed, "x"])
    said = f"No such command '{typed}'. Did you mean deltamerge {meant}?\n"
    assert (leaving.value.code, capsys.readouterr().err.endswith(said)) == (2, True)


def test_the_flags_of_mergekit_extract_lora_work(models, tmp_path, capsys):
    typed = f"--model {models}/a --base-model {models}/base --out-path {tmp_path}/x --max-rank 2 -i layers.0 --cuda "
    with pytest.raises(SystemExit) as leaving:
        main(["extract", *typed.replace("--cuda", "--no-cuda --skip-undecomposable --sv-epsilon 0.1").split()])
    err = capsys.readouterr().err
    assert (leaving.value.code, err if leaving.value.code else "") == (0, "")
    assert err.startswith("warning: no effect here: --sv-epsilon (--lora energy:0.95 leaves out small")
    written = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert written["r"] == 2
    assert all("layers.0." in name for name in load_tensors(tmp_path / "x"))


def test_a_flag_of_mergekit_extract_lora_that_would_change_the_adapter_is_refused(models, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["extract", str(models / "a"), "--base", str(models / "base"), "--lora", "2", "-e", "mlp"])
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert "--exclude-regex: name the weights that get factors instead, with --target" in err
