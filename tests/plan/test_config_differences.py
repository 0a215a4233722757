"""Models whose weights fit and whose configs do not: refused, warned of, and whose config is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_llama, tiny_vlm
from safetensors import safe_open

import deltamerge as dm
from deltamerge.errors import InputError
from deltamerge.models.config_class import class_of_type
from deltamerge.models.config_differences import differences, known_keys

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
QWEN = {"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
GEMMA = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 7}
VLM = {"model_type": "gemma3", "text_config": GEMMA, "vision_config": {"hidden_size": 16}}
MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 4, "max_position_embeddings": 2048}


# -- what configs mean


SAME = {
    "defaults written out": (LLAMA, LLAMA | {"rms_norm_eps": 1e-6, "head_dim": 8, "num_key_value_heads": 4}),
    "a float32": (LLAMA, LLAMA | {"rms_norm_eps": 9.999999974752427e-07}),
    "rope_parameters": (LLAMA | {"rope_theta": 5e5}, LLAMA | {"rope_parameters": {"rope_theta": 500000}}),
    "a scaled rope": (
        LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 5e5},
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "rope_theta": 5e5,
                "original_max_position_embeddings": 2048,
            }
        },
    ),
    "a window that is off": (
        QWEN | {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1},
        QWEN | {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "a period and a list": (
        GEMMA | {"sliding_window_pattern": 3},
        GEMMA | {"layer_types": ([*["sliding_attention"] * 2, "full_attention"] * 3)[:7]},
    ),
    "rope by kind of layer": (
        GEMMA
        | {"rope_theta": 1e6, "rope_local_base_freq": 20000, "rope_scaling": {"rope_type": "linear", "factor": 8}},
        GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            }
        },
    ),
    "one activation": (LLAMA, LLAMA | {"hidden_act": "swish"}),
    "bookkeeping": (
        LLAMA,
        LLAMA | {"torch_dtype": "float16", "_name_or_path": "x", "attention_dropout": 0.5, "architectures": ["X"]},
    ),
    "no window": (LLAMA, MISTRAL | {"sliding_window": None}),
    "a section left out": (VLM, VLM | {"text_config": GEMMA | {"final_logit_softcapping": None}}),
    "a model in another": ({"model_type": "llava", "text_config": LLAMA, "vision_config": {"hidden_size": 8}}, LLAMA),
}


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME)
def test_the_same_function(one, other):
    assert differences([("a", one), ("b", other)]) == ()


DIFFER = {
    "heads": (LLAMA, {"num_attention_heads": 2}, "positions", ["num_attention_heads"]),
    "a key and value for two": (LLAMA, {"num_key_value_heads": 2}, "positions", ["num_key_value_heads"]),
    "activation": (LLAMA, {"hidden_act": "relu"}, "positions", ["hidden_act"]),
    "gelu's approximation": (LLAMA | {"hidden_act": "gelu"}, {"hidden_act": "gelu_new"}, "function", ["hidden_act"]),
    "architecture": (LLAMA, {"model_type": "qwen2"}, "positions", ["model_type"]),
    "rope_theta": (LLAMA, {"rope_theta": 1e6}, "function", ["rope_theta"]),
    "rope_parameters": (LLAMA, {"rope_parameters": {"rope_theta": 1e6}}, "function", ["rope_theta"]),
    "rope_scaling": (LLAMA, {"rope_scaling": YARN}, "function", ["rope_scaling"]),
    "rms_norm_eps": (LLAMA, {"rms_norm_eps": 1e-5}, "function", ["rms_norm_eps"]),
    "tied": (LLAMA, {"tie_word_embeddings": True}, "function", ["tie_word_embeddings"]),
    "a bias": (LLAMA, {"attention_bias": True}, "function", ["attention_bias"]),
    "window": (MISTRAL, {"sliding_window": 64}, "function", ["sliding_window"]),
    "llama and a window": (LLAMA, MISTRAL | {"sliding_window": 64}, "function", ["sliding_window"]),
    "a softcap": (GEMMA, {"final_logit_softcapping": 30.0}, "function", ["final_logit_softcapping"]),
    "the local rope": (GEMMA, {"rope_local_base_freq": 5e4}, "function", ["rope_local_base_freq"]),
    "experts a token": (
        {"model_type": "mixtral", "hidden_size": 8}, {"num_experts_per_tok": 4}, "function", ["num_experts_per_tok"],
    ),
    "the end": (LLAMA, {"eos_token_id": [2, 7]}, "tokens", ["eos_token_id"]),
    "a section's": (
        VLM, {"text_config": GEMMA | {"final_logit_softcapping": 30.0}}, "function",
        ["text_config.final_logit_softcapping"],
    ),
    "a class that nobody knows": ({"model_type": "new", "x": 1}, {"x": 2}, "function", ["x"]),
    "a class of its own": (
        {"model_type": "llama", "auto_map": {"AutoConfig": "c.C"}, "knob": 1}, {"knob": 2}, "function", ["knob"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("one", "changes", "kind", "keys"), DIFFER.values(), ids=DIFFER)
def test_another_function(one, changes, kind, keys):
    found = differences([("a", one), ("b", one | changes)])
    assert {(item.kind, item.key) for item in found} == {(kind, key) for key in keys}
    assert known_keys(one | changes).keys() >= set(keys) - {"model_type"}


@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gemma3", "mixtral", "gpt2", "bert", "smollm3", "vit"],
)
def test_a_class_says_what_transformers_says(kind):
    real = transformers.AutoConfig.for_model(kind)
    known = class_of_type(kind)
    assert known is not None
    sections = {key: {} for key in known.sections}
    whole = json.loads(real.to_json_string(use_diff=False))
    short = {key: whole[key] for key in ("hidden_size", "n_embd") if key in whole}
    assert differences([("class", {"model_type": kind, **short, **sections}), ("saved", whole)]) == ()


# -- merges


def changed(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return folder


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """base, a, b and c, fine-tunes of it with its config."""
    monkeypatch.chdir(tmp_path)
    base = tiny_llama(tmp_path / "base", seed=1)
    for seed, name in enumerate("abc"):
        tiny_llama(tmp_path / name, seed=seed + 2, base=base)
    return tmp_path


def recipe(folder: Path, names: str, method: str = "task_arithmetic", **more: Any) -> Path:
    with_density = {"density": 0.5} if method == "ties" else {}
    listed = [{"model": name, "parameters": {"weight": 0.5, **with_density}} for name in names]
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"base_model": "base", "merge_method": method, "models": listed, **more}))
    return path


EIGHT = {"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (
        {"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4},
        "num_attention_heads is 4 in base, b, 8 in a",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is silu in base, b, gelu in a"),
    "architecture": ({"model_type": "granite"}, "model_type is llama in base, b, granite in a"),
    "turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 1.0 in base, b, 0.5 in a"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_refused(models, capsys, command, changes, said):
    changed(models / "a", **changes)
    code, out, err = call(capsys, command, recipe(models, "ab"))
    assert code == 1
    assert said in err
    assert "config: {" in err
    assert "Traceback" not in err
    assert out == ""
    assert not (models / "r-merged").exists()


def test_a_refused_merge_can_be_meant(models, capsys):
    changed(models / "a", hidden_act="gelu")
    code, _, err = call(capsys, "run", recipe(models, "ab", config={"hidden_act": "a"}))
    assert code == 0
    assert "warning" not in err
    assert json.loads((models / "r-merged" / "config.json").read_text())["hidden_act"] == "gelu"


def test_llama_beside_mistral_runs(models, capsys):
    changed(models / "a", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    code, _, err = call(capsys, "run", recipe(models, "ab"))
    assert code == 0
    assert "warning" not in err
    assert (models / "r-merged" / "config.json").read_bytes() == (models / "base" / "config.json").read_bytes()
    assert "llama, mistral, which compute the same" in (models / "r-merged" / "README.md").read_text()
    changed(models / "a", sliding_window=16)
    _, _, err = call(capsys, "check", recipe(models, "ab"))
    assert "sliding_window is absent in base, b, 16 in a; the output has absent, that of base" in err
    code, _, err = call(capsys, "check", recipe(models, "ab", config={"sliding_window": "a"}))
    assert code == 1
    assert "sliding_window is no key of model type 'llama'" in err
    code, _, err = call(capsys, "run", recipe(models, "ab", config={"model_type": "a"}), "--force")
    config = json.loads((models / "r-merged" / "config.json").read_text())
    assert code == 0
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 16)
    assert config["architectures"] == ["MistralForCausalLM"]


WARNED: dict[str, tuple[dict[str, Any], str]] = {
    "rope_theta": ({"rope_theta": 1e6}, "rope_theta is 10000.0 in base, b, 1000000.0 in a; the output has 10000.0"),
    "its new form": ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0 in base, b, 1000000.0 in a; the"),
    "rms_norm_eps": ({"rms_norm_eps": 0.01}, "0.01 in a; the output has"),
    "the end": ({"eos_token_id": 7}, "eos_token_id is 2 in base, b, 7 in a; the output has 2, that of base"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), WARNED.values(), ids=WARNED)
def test_warned_of_everywhere(models, capsys, changes, said):
    changed(models / "a", **changes)
    written = recipe(models, "ab")
    key = said.partition(" ")[0] if "is" in said else "rms_norm_eps"
    key = next(iter(changes)) if key not in ("rope_theta", "eos_token_id") else key
    for command in ("check", "plan", "run"):
        code, out, err = call(capsys, command, written)
        assert code == 0, command
        assert said in " ".join((out + err).split()), command
        assert f"config: {{{key}: MODEL or a value}}" in " ".join((out + err).split())
    assert (models / "r-merged" / "config.json").read_bytes() == (models / "base" / "config.json").read_bytes()
    assert said.partition(" is")[0] in (models / "r-merged" / "README.md").read_text()
    lock = yaml.safe_load((models / "r-merged" / "recipe.lock").read_text())
    assert lock["config"][key]["of"] == "base"
    assert set(lock["config"][key]["values"]) == {"base", "a", "b"}


def test_nothing_is_said_where_nothing_differs(models, capsys):
    changed(models / "a", head_dim=8, rope_theta=10000, dtype="float32")
    code, _, err = call(capsys, "run", recipe(models, "ab"))
    assert code == 0
    assert "config.json" not in err
    assert "config" not in yaml.safe_load((models / "r-merged" / "recipe.lock").read_text())


LONG = {"rope_theta": 1e6, "rope_scaling": YARN, "max_position_embeddings": 512, "eos_token_id": 7}


def longer(models: Path) -> None:
    for name in "ab":
        changed(models / name, **LONG)
        (models / name / "generation_config.json").write_text('{"eos_token_id": 7}')


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_what_all_fine_tunes_agree_on_is_written(models, capsys, method):
    longer(models)
    code, _, err = call(capsys, "run", recipe(models, "ab", method))
    assert code == 0
    assert "that of a, as all fine-tunes agree (a fine-tune for longer texts" in err
    made = transformers.AutoConfig.from_pretrained(models / "r-merged")
    wanted = transformers.AutoConfig.from_pretrained(models / "a")
    assert made.rope_parameters == wanted.rope_parameters
    assert made.rope_parameters["rope_theta"] == 1e6
    assert (made.max_position_embeddings, made.eos_token_id) == (512, 7)
    assert json.loads((models / "r-merged" / "generation_config.json").read_text()) == {"eos_token_id": 7}
    with safe_open(models / "r-merged" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(load_tensors(models / "base"))


def test_the_base_s_new_form_takes_older_fine_tunes(models, capsys):
    longer(models)
    changed(models / "base", rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert call(capsys, "run", recipe(models, "ab"))[0] == 0
    made = transformers.AutoConfig.from_pretrained(models / "r-merged")
    assert made.rope_parameters == transformers.AutoConfig.from_pretrained(models / "a").rope_parameters


def test_the_same_bytes_by_parts_and_by_a_delta(models, capsys):
    longer(models)
    small = {"output": {"shard_size": "8kB"}}
    assert call(capsys, "run", recipe(models, "ab", **small), "--out", "whole")[0] == 0
    for part in ("1/2", "2/2"):
        assert call(capsys, "run", "r.yaml", "--out", "parts", "--part", part)[0] == 0
    assert call(capsys, "run", "r.yaml", "--out", "parts", "--finish")[0] == 0
    assert call(capsys, "run", recipe(models, "ab", output={"kind": "delta"}), "--out", "delta")[0] == 0
    assert call(capsys, "apply", "delta", "--base", "base", "--out", "applied")[0] == 0
    for name in ("config.json", "generation_config.json"):
        assert len({(models / made / name).read_bytes() for made in ("whole", "parts", "applied")}) == 1


def test_a_lone_fine_tune_s_config_is_copied(models, capsys):
    longer(models)
    code, _, err = call(capsys, "run", recipe(models, "a"))
    assert code == 0
    assert "the output has 1000000.0, that of a, the fine-tune" in err
    assert (models / "r-merged" / "config.json").read_bytes() == (models / "a" / "config.json").read_bytes()


def test_a_template_that_is_named_keeps_its_config(models, capsys):
    longer(models)
    _, _, err = call(capsys, "run", recipe(models, "ab", template="base"))
    assert (models / "r-merged" / "config.json").read_bytes() == (models / "base" / "config.json").read_bytes()
    assert "the output has 10000.0, that of base" in err
    made = json.loads((models / "r-merged" / "generation_config.json").read_text())
    assert made["eos_token_id"] == 2


# -- the recipe's config


CHOSEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the base's": ({"rope_theta": "base"}, {"rope_theta": 10000.0, "rope_type": "yarn"}),
    "a number": ({"rope_theta": 5e5}, {"rope_theta": 500000.0, "rope_type": "yarn"}),
    "none": ({"rope_scaling": None}, {"rope_theta": 1e6, "rope_type": "default"}),
    "a mapping": (
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"rope_theta": 1e6, "rope_type": "linear", "factor": 3.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["older", "new"])
@pytest.mark.parametrize(("chosen", "wanted"), CHOSEN.values(), ids=CHOSEN)
def test_the_recipe_chooses(models, capsys, chosen, wanted, form):
    longer(models)
    if form == "new":
        changed(models / "base", rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    code, _, err = call(capsys, "run", recipe(models, "ab", config=chosen))
    key = next(iter(chosen))
    assert code == 0
    assert f"config.json: {key}" not in err
    made = transformers.AutoConfig.from_pretrained(models / "r-merged").rope_parameters
    assert {name: made[name] for name in wanted} == wanted


WRONG = {
    "rms_norm_epss: 3": "r.yaml:2:3: config.rms_norm_epss: rms_norm_epss is no key of these models' configs",
    "rope_theta: ab": "r.yaml:2:15: config.rope_theta: 'ab' is no model of this recipe",
    "hidden_size: 8": "r.yaml:2:3: config.hidden_size: hidden_size follows the weights",
    "dtype: float16": "r.yaml:2:3: config.dtype: 'dtype' has no effect on the model",
    "rope_parameters: {rope_theta: 3}": "hint: write rope_theta and rope_scaling",
    "rms_norm_eps: .nan": "r.yaml:2:",
    "model_type: 3": "is no model of this recipe",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_choice_is_refused_where_it_stands(models, capsys, line):
    (models / "r.yaml").write_text(f"config:\n  {line}\nbase_model: base\nmodels: [a]\n")
    code, _, err = call(capsys, "check", "r.yaml")
    assert code == 1
    assert WRONG[line] in err
    assert "did you mean 'rms_norm_eps'?" in err or "epss" not in line


# -- sections, mixtures, stacks


def test_a_section_s_key_is_written_and_chosen(models, capsys):
    tiny_vlm(models / "v0", models / "base")
    text = json.loads((models / "v0" / "config.json").read_text())["text_config"]
    for seed, name in enumerate(("v1", "v2")):
        tiny_vlm(models / name, models / "base", seed=8 + seed)
        changed(models / name, text_config=text | {"rope_theta": 7e5})
    (models / "r.yaml").write_text(
        "base_model: v0\nmerge_method: task_arithmetic\nparameters: {weight: 0.5}\nmodels: [v1, v2]\n"
    )
    code, _, err = call(capsys, "run", "r.yaml")
    assert code == 0
    assert "text_config.rope_theta is 10000.0 in v0, 700000.0 in v1, v2" in err
    made = json.loads((models / "r-merged" / "config.json").read_text())
    assert {"dtype": "bfloat16", "torch_dtype": "bfloat16"} | json.loads(
        (models / "v1" / "config.json").read_text()
    ) == made
    for line in ("text_config.rope_theta: v0", "text_config: {rope_theta: v0}"):
        with (models / "r.yaml").open("r+") as file:
            said = file.read().partition("config:")[0] + f"config: {{{line}}}\n"
            file.seek(0)
            file.write(said)
            file.truncate()
        code, _, err = call(capsys, "run", "r.yaml", "--force")
        assert code == 0
        assert "warning" not in err
        made = json.loads((models / "r-merged" / "config.json").read_text())
        assert "rope_theta" not in made["text_config"]  # as in v0


def test_a_stack_is_refused_and_warned_of(models, capsys):
    (models / "r.yaml").write_text(
        "merge_method: passthrough\nslices:\n- sources: [{model: base, layer_range: [0, 2]}]\n"
        "- sources: [{model: a, layer_range: [0, 2]}]\n"
    )
    assert "config.json: r" not in call(capsys, "check", "r.yaml")[2]
    changed(models / "a", rope_theta=1e6)
    code, _, err = call(capsys, "check", "r.yaml")
    assert code == 0
    assert "rope_theta is 10000.0 in base, 1000000.0 in a; the output has 10000.0, that of base" in err
    changed(models / "a", num_attention_heads=8, head_dim=4, num_key_value_heads=4)
    code, _, err = call(capsys, "check", "r.yaml")
    assert code == 1
    assert "num_attention_heads is 4 in base, 8 in a" in err


def test_a_mixture_asks_the_same(models, capsys):
    changed(models / "a", rope_theta=1e6)
    (models / "r.yaml").write_text("base_model: base\ngate_mode: random\nexperts:\n- {model: a}\n- {model: b}\n")
    code, _, err = call(capsys, "check", "r.yaml")
    assert code == 0
    assert "rope_theta is 10000.0 in base, b, 1000000.0 in a; the output has 10000.0" in err
    changed(models / "a", hidden_act="relu")
    code, _, err = call(capsys, "check", "r.yaml")
    assert code == 1
    assert "hidden_act is silu in base, b, relu in a" in err


# -- the other commands


def test_an_adapter_says_what_it_lacks(models, capsys):
    longer(models)
    code, _, err = call(capsys, "extract", "a", "--base", "base", "--lora", "4", "--out", "lora")
    assert code == 0
    assert "PEFT loads it on base, whose config says otherwise, and will not apply" in err
    kept = json.loads((models / "lora" / "config_changes.json").read_text())
    assert (kept["rope_theta"], kept["rope_scaling"]) == (1e6, dict(sorted(YARN.items())))
    assert call(capsys, "extract", "c", "--base", "base", "--lora", "4", "--out", "plain")[0] == 0
    assert not (models / "plain" / "config_changes.json").exists()


def test_inspect_recommend_and_diff_say_it(models, capsys):
    changed(models / "a", rope_theta=1e6, rope_parameters="absent")
    for words in (("inspect", "a", "--base", "base"), ("recommend", "a", "--base", "base", "--density", "0.1")):
        code, out, _ = call(capsys, *words, "--json")
        assert code == 0
        assert any("rope_theta is 10000.0 in base" in line for line in json.loads(out)["warnings"])
    code, out, _ = call(capsys, "diff", "base", "a")
    assert code == 0
    assert "config.json: rope_theta: 10000.0 -> 1000000.0" in out
    assert json.loads(call(capsys, "diff", "base", "b", "--json")[1])["config"] == {}
    changed(models / "a", hidden_act="relu")
    code, _, err = call(capsys, "recommend", "a", "--base", "base", "--density", "0.1")
    assert code == 1
    assert "hidden_act is silu in base, relu in a" in err


def test_switch_warns_and_refuses(models, capsys):
    changed(models / "a", rope_theta=1e6)
    changed(models / "b", hidden_act="relu")
    assert call(capsys, "extract", "a", "--base", "base", "--out", "da")[0] == 0
    (models / "r.yaml").write_text("base_model: base\nmodels: [b]\noutput: {kind: delta}\nconfig: {hidden_act: b}\n")
    assert call(capsys, "run", "r.yaml", "--out", "db")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.bfloat16)
    switch = dm.Switch(model)
    with pytest.warns(UserWarning, match="rope_theta is 10000.0 in the base, 1000000.0 in da"):
        switch.to(models / "da")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="hidden_act is silu in the base, relu in db"):
        switch.to(models / "db")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_model_without_a_config_says_nothing(models, capsys):
    make_checkpoint(models / "a", load_tensors(models / "a"), config={"model_type": "llama"})
    code, _, err = call(capsys, "check", recipe(models, "ab"))
    assert code == 0
    assert "warning" not in err
