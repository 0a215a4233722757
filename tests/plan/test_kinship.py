"""A base that is not a model's, base and fine-tune swapped, other architectures: never without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama, write_json
from running import make_plan, run

from deltamerge.errors import InputError
from deltamerge.models.checkpoint import open_checkpoint
from deltamerge.plan.inputs import Input
from deltamerge.plan.kinship import measured
from deltamerge.tensors.reader import Reader


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`tune` and `tune2` of `base`, `far` of a large change, `other` from another seed."""
    folder = tmp_path_factory.mktemp("kinship")
    base = tiny_llama(folder / "base", seed=0)
    tiny_llama(folder / "tune", seed=1, base=base)
    tiny_llama(folder / "tune2", seed=2, base=base)
    tiny_llama(folder / "far", seed=3, base=base, sigma=0.02)
    tiny_llama(folder / "other", seed=9)
    return folder


def opened(folder: Path, name: str) -> Input:
    checkpoint = open_checkpoint(folder / name)
    return Input(name, None, checkpoint, checkpoint.tensors, {n: n for n in checkpoint.tensors})


@pytest.mark.parametrize("name", ["tune", "far", "other", "base"])
def test_the_sample_is_near_the_whole(models, name):
    base, tune = (load_tensors(models / n) for n in ("base", name))
    matrices = [n for n in base if base[n].ndim > 1]
    x, y = (torch.cat([t[n].double().flatten() for n in matrices]) for t in (base, tune))
    with Reader() as reader:
        kin = measured(opened(models, "base"), opened(models, name), reader)
    if name == "base":
        assert kin is None  # the same bytes of the same file
        return
    assert kin.relative == pytest.approx(float((y - x).norm() / x.norm()), abs=0.1)
    assert kin.cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=0.1)


WRONG = "./other shares nothing with ./base: ‖Δ‖/‖W‖ is 1.4"
RECIPES = {
    "one": "base_model: ./base\nmodels: [{model: ./other}]\n",
    "several": "base_model: ./base\nmerge_method: ties\nmodels: [{model: ./tune}, {model: ./other}]\n"
    "parameters: {weight: 0.5, density: 0.5}\n",
    "slerp": "base_model: ./base\nmerge_method: slerp\nmodels: [{model: ./base}, {model: ./other}]\n"
    "parameters: {t: 0.5}\n",
    "linear": "merge_method: linear\nmodels: [{model: ./base}, {model: ./other}]\nparameters: {weight: 0.5}\n",
    "slices": "merge_method: linear\nslices:\n- sources: [{model: ./base, layer_range: [0, 2]}, "
    "{model: ./other, layer_range: [0, 2]}]\nparameters: {weight: 0.5}\n",
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_wrong_base_is_said(models, tmp_path, capsys, case):
    recipe = models / f"{case}.yaml"
    recipe.write_text(RECIPES[case])
    code, out, err = call(capsys, "run", recipe, "--out", tmp_path / "out", "--json")
    assert code == 0
    (line,) = (line for line in err.splitlines() if line.startswith("warning: "))
    assert line.startswith(f"warning: {WRONG}")
    asked = "were they trained from one model?" if case in ("linear", "slices") else "is ./base its base?"
    assert line.endswith(f" weights; {asked}")
    (warning,) = json.loads(out)["warnings"]
    assert line == f"warning: {warning}"
    assert f"- {warning}\n" in (tmp_path / "out" / "README.md").read_text()


def test_parts_say_the_same(models, tmp_path):
    from running import finish

    from deltamerge.run.partition import Part

    text = RECIPES["one"] + "output: {shard_size: 20KB}\n"
    (models / "parts.yaml").write_text(text)
    for i in (1, 2):
        run(models / "parts.yaml", tmp_path / "parts", part=Part(i, 2))
    finish(models / "parts.yaml", tmp_path / "parts")
    run(models / "parts.yaml", tmp_path / "whole")
    card = (tmp_path / "parts" / "README.md").read_text()
    assert WRONG in card
    assert card.replace("# parts", "# whole") == (tmp_path / "whole" / "README.md").read_text()


def test_inspect_recommend_and_extract_say_it(models, tmp_path, capsys):
    pair = [models / "other", "--base", models / "base"]
    code, out, _ = call(capsys, "inspect", *pair, "--json")
    assert code == 0
    assert "shares nothing with" in json.loads(out)["warnings"][0]
    assert "warning: other shares nothing with " in " ".join(call(capsys, "inspect", *pair)[1].split())
    said = " ".join(call(capsys, "recommend", *pair, "--density", "0.1")[1].split())
    assert "warning other shares nothing with " in said
    code, _, err = call(capsys, "extract", *pair, "--out", tmp_path / "delta", "--density", "0.1")
    assert code == 0
    assert "warning: " in err
    assert "shares nothing with" in err


@pytest.mark.parametrize("name", ["tune", "far"])
def test_a_right_base_is_not(models, tmp_path, capsys, name):
    (models / "right.yaml").write_text(f"base_model: ./base\nmodels: [{{model: ./{name}}}]\n")
    code, out, err = call(capsys, "run", models / "right.yaml", "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["warnings"] == []
    assert "warning" not in err


def test_new_tensors_and_small_ones_prove_nothing(models, tmp_path):
    base = load_tensors(models / "base")
    tune = {n: t if i % 3 else torch.randn(t.shape).to(t.dtype) for i, (n, t) in enumerate(base.items())}
    make_checkpoint(tmp_path / "partly", tune)
    make_checkpoint(tmp_path / "zero", {n: torch.zeros_like(t) for n, t in base.items()})
    small = {f"w{i}": torch.randn(3, 3) for i in range(4)}
    make_checkpoint(tmp_path / "small", small)
    make_checkpoint(tmp_path / "small2", {n: torch.randn(t.shape) for n, t in small.items()})
    with Reader() as reader:
        kin = measured(opened(models, "base"), opened(tmp_path, "partly"), reader)
        assert kin is not None
        assert kin.cosine > 0.9
        assert measured(opened(models, "base"), opened(tmp_path, "zero"), reader) is None
        assert measured(opened(tmp_path, "small"), opened(tmp_path, "small2"), reader) is None


def card(folder: Path, base: str) -> None:
    (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\n")


def pair(folder: Path, recipe: str = "base_model: ./x\nmodels: [{model: ./y}]\n") -> tuple[str, ...]:
    (folder / "r.yaml").write_text(recipe)
    return make_plan(folder / "r.yaml").warnings


@pytest.fixture
def two(models, tmp_path) -> Path:
    """`x` and `y`, related."""
    for source, name in (("base", "x"), ("tune", "y")):
        config = json.loads((models / source / "config.json").read_text())
        make_checkpoint(tmp_path / name, load_tensors(models / source), config=config)
    return tmp_path


SWAPPED = "./x and ./y look swapped, as {}; base_model is what the others were trained from"


@pytest.mark.parametrize("said", ["org/y", "[org/y]", "Y", "y", "./y"])
def test_a_card_that_names_the_fine_tune(two, capsys, said):
    assert pair(two) == ()
    card(two / "x", said)
    wanted = SWAPPED.format("./x says that it was made of ./y")
    assert pair(two) == (wanted,)
    code, _, err = call(capsys, "check", two / "r.yaml")
    assert code == 0
    assert f"warning: {wanted}" in err
    assert wanted in json.loads(call(capsys, "plan", two / "r.yaml", "--json")[1])["notes"]


def test_a_config_that_names_it_and_cards_that_are_right(two):
    config = json.loads((two / "x" / "config.json").read_text())
    write_json(two / "x" / "config.json", config | {"_name_or_path": "/models/y/"})
    assert pair(two) == (SWAPPED.format("./x says that it was made of ./y"),)
    card(two / "y", "org/x")
    assert pair(two) == ()
    for nonsense in ("3", "{a: 1}", "[1, [2]]", "org/z", "''"):
        card(two / "x", nonsense)
        write_json(two / "x" / "config.json", config)
        assert pair(two) == ()


def test_a_head_that_only_the_base_has(tmp_path):
    base, tuned = tiny_bert_pair(tmp_path)
    base.rename(tmp_path / "y")
    tuned.rename(tmp_path / "x")
    assert pair(tmp_path) == (SWAPPED.format("./x has a task head (classifier.bias) that ./y lacks"),)
    assert pair(tmp_path, "base_model: ./y\nmodels: [{model: ./x}]\n") == ()


def test_a_chat_template_that_only_the_base_has(two):
    write_json(two / "x" / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    assert pair(two) == ()
    write_json(two / "y" / "tokenizer_config.json", {"eos_token": "x"})
    assert pair(two) == (SWAPPED.format("./x has a chat template and ./y none"),)


def test_other_architectures_are_one_line(models, tmp_path, capsys):
    tiny_bert_pair(tmp_path)
    (tmp_path / "r.yaml").write_text(f"base_model: {models / 'base'}\nmodels: [{{model: ./tuned}}]\n")
    code, _, err = call(capsys, "check", tmp_path / "r.yaml")
    assert code == 1
    first, hint = err.splitlines()
    assert "base is llama (LlamaForCausalLM), ./tuned is bert (BertForSequenceClassification): " in first
    assert first.endswith("models of different architectures cannot be merged")
    assert hint.startswith("hint: ")
    assert "tensors differ, such as " in hint


def test_architectures_of_the_same_tensors_are_merged(two):
    config = json.loads((two / "y" / "config.json").read_text())
    write_json(two / "y" / "config.json", config | {"model_type": "mistral"})
    assert pair(two) == ()
    tensors = load_tensors(two / "y")
    tensors["model.norm.weight"] = torch.zeros(16)
    make_checkpoint(two / "y", tensors, config=config)
    with pytest.raises(InputError, match=r"shapes differ|different numbers"):
        pair(two)


def test_a_head_apart_from_its_embedding_against_its_config_is_said(tmp_path):
    base = tiny_llama(tmp_path / "base", seed=0, tied=True)
    for seed, name in enumerate(("a", "b"), 1):
        tensors = load_tensors(tiny_llama(tmp_path / name, seed=seed, base=base, tied=True))
        head = tensors["model.embed_tokens.weight"] * (1.5 if name == "a" else 1)
        config = json.loads((tmp_path / name / "config.json").read_text())
        make_checkpoint(tmp_path / name, tensors | {"lm_head.weight": head}, config=config)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("merge_method: linear\nmodels: [./base, ./a, ./b]\nparameters: {weight: 1}\n")
    (warning,) = make_plan(recipe).warnings
    assert warning.startswith("./a: lm_head.weight differs from the embedding, but config.json ties them")
    write_json(tmp_path / "a" / "config.json", config | {"tie_word_embeddings": False})
    plan = make_plan(recipe)
    assert plan.warnings == ()  # `b` stores the head that its config ties, and the output has a head all the same
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is False
