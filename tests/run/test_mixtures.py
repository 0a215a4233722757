"""Mixtures of experts made of dense models: the class that loads them, their routers, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from calls import call
from conftest import load_tensors, tiny_llama, write_json
from dense_models import deepseek, dense, logits
from running import finish, make_plan, run
from safetensors.torch import save_file
from tokenizers import Tokenizer

from deltamerge.apps.moe.layout import FAMILIES
from deltamerge.engine.execute import shared_values
from deltamerge.errors import DeltamergeError
from deltamerge.methods.prune.bits import mask_key, normals, uniforms
from deltamerge.run.lock import Lock
from deltamerge.run.partition import Part
from deltamerge.run.runner import lock as write_lock

pytestmark = pytest.mark.filterwarnings("ignore:.*rope:UserWarning")
TWO = "experts:\n  - {source_model: ./a, positive_prompts: [w9 w8]}\n  - {source_model: ./b, positive_prompts: [w7]}\n"


def recipe(folder: Path, text: str, name: str = "moe.yaml") -> Path:
    path = folder / name
    path.write_text(f"base_model: ./base\n{text}")
    return path


def loaded(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


LAYOUTS = {  # family, its settings, more of the recipe, model_type of the output
    "mixtral-llama": ("llama", {"tie_word_embeddings": True}, "", "mixtral"),
    "mixtral-mistral": ("mistral", {"sliding_window": 4, "head_dim": 16}, "experts_per_token: 1\n", "mixtral"),
    "qwen2": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "shared_experts: [{model: ./b, residual_scale: 0}]\n", "qwen2_moe",
    ),
    "qwen2-of-llama": (
        "llama", {}, "architecture: qwen\nshared_experts: [{model: ./a, residual_scale: 0, positive_prompts: [w5]}]\n",
        "qwen2_moe",
    ),
    "qwen3": ("qwen3", {"head_dim": 16}, "", "qwen3_moe"),
    "deepseek-v3-of-llama": (
        "llama", {"num_key_value_heads": 4},
        "architecture: deepseek_v3\nshared_experts: [{model: ./a, residual_scale: 0}]\n", "glm4_moe",
    ),
    "deepseek-v3-of-qwen2": (
        "qwen2", {"rms_norm_eps": 1e-3}, "architecture: glm4_moe\nshared_experts: [{model: ./a, residual_scale: 0}]\n",
        "glm4_moe",
    ),
    "deepseek-v3-of-qwen3": (
        "qwen3", {"head_dim": 16, "tie_word_embeddings": True},
        "architecture: deepseek\nshared_experts: [{model: ./a, residual_scale: 0}]\n", "glm4_moe",
    ),
    "deepseek": ("llama", {"attention_bias": True}, "architecture: deepseek\n", "deepseek"),
    "deepseek-shared": ("llama", {}, "shared_experts: [{model: ./a, residual_scale: 0}]\n", "deepseek"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_mixture_of_identical_experts_says_what_the_dense_model_says(tmp_path, name):
    """Whatever its config.json leaves to the defaults of its family, which are not those of the mixture's."""
    family, settings, more, kind = LAYOUTS[name]
    dense(tmp_path / "base", family, **settings)
    for other in ("a", "b"):
        (tmp_path / other).symlink_to("base")
    made = run(recipe(tmp_path, TWO + more)).folder
    model = deepseek(made) if kind == "deepseek" else loaded(made)
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == kind
    torch.testing.assert_close(logits(model), logits(loaded(tmp_path / "base")), rtol=2e-4, atol=2e-4)
    said = model.generate(torch.tensor([[1, 9, 8]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert said.shape == (1, 7)
    if kind != "deepseek":
        keys = transformers.AutoConfig.from_pretrained(tmp_path / "base").to_dict().keys() & {
            "rms_norm_eps", "hidden_act", "rope_parameters", "max_position_embeddings", "num_key_value_heads",
            "tie_word_embeddings", "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id",
        }  # fmt: skip
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / "base").to_dict()
        ours = model.config.to_dict()
        if kind == "glm4_moe":  # vLLM's class of it ties no head
            assert not ours["tie_word_embeddings"]
            keys -= {"tie_word_embeddings"}
        assert ours["rope_parameters"].pop("partial_rotary_factor", 1.0) == 1.0
        assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
    if kind == "glm4_moe":  # of length 1 they would saturate the sigmoids of real models
        lengths = load_tensors(made)["model.layers.1.mlp.gate.weight"].norm(dim=1)
        torch.testing.assert_close(lengths, torch.full((2,), 32**-0.5))


def test_each_expert_has_the_mlps_of_its_model_and_all_else_is_the_base(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        dense(tmp_path / name, "llama", seed)
    more = "dtype: bfloat16\nmerge_method: moe\n"
    text = TWO.replace("[w7]", "[w7], residual_scale: 0.5, noise_scale: 0.25") + more
    made = run(recipe(tmp_path, text)).folder
    base, a, b, found = (load_tensors(folder) for folder in (*(tmp_path / n for n in ("base", "a", "b")), made))
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    wanted = {name: tensor for name, tensor in base.items() if ".mlp." not in name}
    for layer in range(2):
        place = f"model.layers.{layer}.block_sparse_moe"
        for dense_name, name in names.items():
            own = f"model.layers.{layer}.mlp.{dense_name}.weight"
            wanted[f"{place}.experts.0.{name}.weight"] = a[own]
            noise = normals(mask_key(0, "./b", f"{place}.experts.1.{name}.weight"), 0, b[own].numel())
            noisy = b[own] + 0.25 * torch.from_numpy(noise).view(b[own].shape)
            wanted[f"{place}.experts.1.{name}.weight"] = noisy * (0.5 if name == "w2" else 1.0)
        wanted[f"{place}.gate.weight"] = found[f"{place}.gate.weight"]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name


def test_drawn_numbers_are_normal_and_uniform_and_the_same_in_every_part():
    key = mask_key(7, "moe", "x")
    whole = normals(key, 0, 100_003).astype(np.float64)
    assert np.array_equal(normals(key, 49_999, 50_010), normals(key, 0, 100_003)[49_999:50_010])
    for moment, wanted, near in ((1, 0, 0.02), (2, 1, 0.03), (4, 3, 0.15)):
        assert abs((whole**moment).mean() - wanted) < near
    halves = uniforms(key, 0, 100_003)
    assert abs(halves.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(halves)[0, 1]) < 0.02


PROMPTS = """experts:
  - {model: ./a, positive_prompts: [w9 w8 w7, w30], negative_prompts: [w20]}
  - {model: ./b, positive_prompts: [w5], negative_prompts: [w6 w11, w12]}
  - {model: ./a, positive_prompts: [w40 w41 w42 w43 w44]}
"""


def reference(folder: Path, mode: str) -> np.ndarray:
    """(layers, experts, hidden) float64: transformers' own hidden states of each prompt by itself, from the formula."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer, inputs = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    def of(text: str) -> np.ndarray:
        ids = tokenizer.encode("<s> " + text, add_special_tokens=False).ids
        inputs.clear()
        with torch.no_grad():
            states = torch.stack(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1])[:, 0]
        if mode == "cheap_embed":
            return states[0].sum(0).numpy()[None].repeat(2, 0)
        if mode == "mlp_input":
            states = torch.stack(inputs)[:, 0]
        return (states.mean(1) if mode == "hidden_avg" else states[:, -1]).numpy()

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    rows = []
    for expert in yaml.safe_load(PROMPTS)["experts"]:
        parts = []
        for key in ("positive_prompts", "negative_prompts"):
            some = [of(text) for text in expert.get(key, [])]
            if some:
                total = np.sum(some, 0) if mode == "cheap_embed" else np.mean(some, 0)
                parts.append(unit(total) if mode == "cheap_embed" else total)
        rows.append(unit(parts[0] - parts[1] if len(parts) > 1 else parts[0]))
    return np.stack(rows, 1)


def routers_of(planned):
    node = planned.mixture.routers
    return shared_values([node], {})[node]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_routers_are_those_of_the_formula_in_float64(tmp_path, family):
    for seed, name in enumerate(("base", "a", "b")):
        dense(tmp_path / name, family, seed)
    for mode in ("hidden", "hidden_last", "hidden_avg", "mlp_input", "cheap_embed"):
        planned = make_plan(recipe(tmp_path, f"{PROMPTS}gate_mode: {mode}\n"))
        found = routers_of(planned)
        np.testing.assert_allclose(found.values, reference(tmp_path / "base", mode), atol=2e-5, rtol=0)
        np.testing.assert_allclose(np.linalg.norm(found.values, axis=-1), 1.0, atol=1e-6)
        rows = found.values.astype(np.float64)
        cosines = [
            (round(rows[i, a] @ rows[i, b], 6), -i, [a, b]) for i in range(2) for a in range(3) for b in range(a + 1, 3)
        ]
        most = max(cosines)
        assert found.record["most_alike"]["experts"] == most[2]
        assert found.record["most_alike"]["layer"] == -most[1]
        assert found.record["most_alike"]["cosine"] == pytest.approx(most[0], abs=1e-5)


def test_drawn_routers_follow_the_seed_alone(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        dense(tmp_path / name, "llama", seed)
    text = TWO.replace("positive_prompts", "name: x, positive_prompts", 1) + "gate_mode: {}\nseed: {}\n"
    values = {}
    for mode in ("random", "uniform_random"):
        for seed in (0, 1):
            planned = make_plan(recipe(tmp_path, text.replace("{}", mode, 1).replace("{}", str(seed), 1)))
            values[mode, seed] = routers_of(planned).values
            assert np.array_equal(values[mode, seed], routers_of(planned).values)
        assert not np.array_equal(values[mode, 0], values[mode, 1])
    assert np.abs(values["uniform_random", 0]).max() <= 1 / np.sqrt(32)
    assert values["random", 0].std() > 0.8


def test_run_lock_parts_and_memory_are_those_of_every_recipe(tmp_path, capsys):
    """Sharded, quantised by an adapter or not: bytes follow from the recipe; the routers are in the lock by hash."""
    for seed, name in enumerate(("base", "a", "b")):
        tiny_llama(tmp_path / name, seed=seed, tokenizer=True, shards=2)
    path = recipe(tmp_path, TWO + "output: {shard_size: 20KB}\n")
    code, out, _ = call(capsys, "plan", path, "--json")
    planned = json.loads(out)
    sizes = sum(int(np.prod(tensor["shape"])) for tensor in planned["tensors"])
    assert code == 0
    assert planned["merge_method"] == "moe"
    assert planned["mixture"] == {
        "architecture": "mixtral",
        "experts": ["./a", "./b"],
        "shared_experts": [],
        "experts_per_token": 2,
        "expert_size": 48,
        "gate_mode": "hidden",
        "routers": 2,
        "prompts": 2,
        "parameters": sizes,
        "active_parameters": sizes,
    }
    code, out, _ = call(capsys, "plan", path)
    assert "mixtral: 2 experts of width 48, 2 a token; 2 routers, hidden from 2 prompts" in " ".join(out.split())
    whole = run(path, tmp_path / "whole")
    lock = yaml.safe_load((whole.folder / "recipe.lock").read_text())
    assert lock["routers"]["gate_mode"] == "hidden"
    assert lock["routers"]["rows_hash"]
    assert lock["routers"]["tokens"] > 2
    card = (whole.folder / "README.md").read_text()
    assert "## Experts" in card
    assert "| 1 | ./b | w7 |  |" in card
    assert "moe" in card.split("---")[1]
    weights = load_tensors(whole.folder)
    again = load_tensors(run(path, tmp_path / "again", workers=1, memory=700_000_000).folder)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    with pytest.raises(DeltamergeError, match="makes routers, which all parts"):
        run(path, tmp_path / "p", part=Part(1, 2))
    from deltamerge.recipe.file import read_recipe

    write_lock(read_recipe(path))
    for i in range(2):
        run(path, tmp_path / "p", part=Part(i + 1, 2), locked=True)
    joined = load_tensors(finish(path, tmp_path / "p", locked=True).folder)
    assert all(torch.equal(weights[name], joined[name]) for name in weights)
    tampered = path.with_suffix(".rows")
    tampered.write_bytes(tampered.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DeltamergeError, match="was written with"):
        Lock.read(path.with_suffix(".lock"))
    with pytest.raises(DeltamergeError, match="too little"):
        run(path, tmp_path / "q", memory=1_000_000)


BAD = {  # what of the recipe is changed, and what is said
    "no prompts": ("positive_prompts: [w7]", "name: x", r"experts\[1\]: has no positive_prompts"),
    "one expert": ("  - {source_model: ./b, positive_prompts: [w7]}\n", "", "at least 2 experts, got 1"),
    "no base": ("base_model: ./base\n", "", "moe needs base_model"),
    "same prompts": ("w9 w8", "w7", "the same prompts"),
    "too many a token": ("experts:", "experts_per_token: 3\nexperts:", "is 3, and there are 2 experts"),
    "no layout": ("experts:", "architecture: grok\nexperts:", "'grok' is no layout"),
    "another layout": ("experts:", "architecture: qwen3\nexperts:", "Qwen3 MoE: is made of qwen3, not of llama"),
    "unknown gate": ("experts:", "gate_mode: magic\nexperts:", "gate_mode"),
    "unknown key": ("experts:", "gate_modus: hidden\nexperts:", "gate_modus"),
    "unknown key of an expert": ("source_model: ./b", "source_model: ./b, prompts: [x]", "prompts"),
    "two models": ("source_model: ./b", "source_model: ./b, model: ./a", "either model or source_model"),
    "a key of merges": ("experts:", "parameters: {weight: 1}\nexperts:", "parameters: is not for moe"),
    "another method": ("experts:", "merge_method: ties\nexperts:", "merged by moe"),
    "a delta": ("experts:", "output: {kind: delta}\nexperts:", "moe makes a model"),
    "quantised": ("experts:", "output: {quantization: fp8}\nexperts:", "moe writes plain weights"),
    "a silent gate": (
        "experts:", "architecture: qwen2\nshared_experts: [{model: ./a}]\nexperts:", "give it positive_prompts",
    ),
    "no shared": ("experts:", "architecture: qwen2\nexperts:", "always has a shared expert"),
    "shared elsewhere": (
        "experts:", "architecture: mixtral\nshared_experts: [{model: ./a}]\nexperts:", "has no shared experts",
    ),
    "another width": ("./b,", "./wide,", "of one width, got ./a 48, ./wide 64"),
    "another hidden size": ("./b,", "./broad,", "./broad: its MLPs are"),
    "another depth": ("./b,", "./deep,", "./deep has 3 layers, ./base has 2"),
    "another kind": ("./b,", "./qwen,", "all models must be of one kind, got llama, qwen2"),
    "no language model": ("./b,", "./bert,", "no mixture is made of model type 'bert'"),
    "biases": ("./base", "./biased", "self_attn.k_proj.bias: Mixtral has no such tensor"),
    "no tokenizer": ("./base", "./mute", "no usable tokenizer"),
    "the same to the model": ("[w9 w8]", "[w9 w8], negative_prompts: [w9  w8]", "are the same to the model"),
    "a long prompt": ("w9 w8", "w9 " * 70, "tokens, the model 64 positions"),
    "moe of nothing": (TWO, "merge_method: moe\n", "moe needs experts"),
    "stray": (TWO, "gate_mode: random\nmerge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}]\n",
              "gate_mode: is for moe"),
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for seed, name in enumerate(("base", "a", "b", "mute")):
        dense(folder / name, "llama", seed, max_position_embeddings=64)
    (folder / "mute" / "tokenizer.json").unlink()
    dense(folder / "wide", "llama", intermediate_size=64)
    dense(folder / "broad", "llama", hidden_size=64)
    dense(folder / "deep", "llama", num_hidden_layers=3)
    dense(folder / "biased", "llama", attention_bias=True)
    dense(folder / "qwen", "qwen2")
    config = json.loads((folder / "a" / "config.json").read_text())
    (folder / "bert").mkdir()
    write_json(folder / "bert" / "config.json", config | {"model_type": "bert"})
    save_file(load_tensors(folder / "a"), folder / "bert" / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_what_no_mixture_can_be_made_of_is_refused_by_name(hostile, capsys, name):
    old, new, said = BAD[name]
    path = recipe(hostile, TWO)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    code, _, err = call(capsys, "run", path, "--out", hostile / "out", "--force")
    assert code in (1, 2)
    assert "Traceback" not in err
    assert re.search(said, " ".join(err.split())), err


def test_families_say_the_defaults_of_transformers():
    for family, said in FAMILIES.items():
        theirs = transformers.AutoConfig.for_model(family).to_dict()
        theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
        assert {key: theirs[key] for key in said} == dict(said), family
