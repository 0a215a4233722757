"""Slices, modules, tied heads and chained documents through mergekit 0.1.5 and deltamerge: equal to 1e-6 in float32.

Off by default: `pytest -m conformance` with MERGEKIT_PYTHON the interpreter of an environment that has mergekit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import tiny_models
import torch
from conftest import load_tensors, make_checkpoint, tiny_llama
from running import run
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
DIFFERENCES = ROOT / "docs" / "howto" / "from-mergekit.md"

pytestmark = [pytest.mark.conformance, pytest.mark.filterwarnings("default")]

STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: ./a, layer_range: [0, 2]}]
  - sources: [{model: ./b, layer_range: [0, 3]}]
  - sources: [{model: ./base, layer_range: [2, 3]}]
"""
LINEAR = """\
merge_method: linear
slices:
  - sources:
      - {model: ./a, layer_range: [0, 2], parameters: {weight: [0, 1]}}
      - {model: ./b, layer_range: [1, 3], parameters: {weight: [{filter: attn, value: 3}]}}
    parameters: {weight: [0.5, 0.25]}
  - sources:
      - {model: ./a, layer_range: [1, 2], parameters: {weight: [0.1, 0.7]}}
      - {model: ./b, layer_range: [2, 3]}
parameters: {weight: 0.3, normalize: false}
"""
BASES = """\
merge_method: ties
base_model: ./base
slices:
  - sources:
      - {model: ./a, layer_range: [0, 2], parameters: {weight: 0.5, density: [0.2, 0.8]}}
      - {model: ./base, layer_range: [0, 2]}
  - sources:
      - {model: ./b, layer_range: [1, 3], parameters: {density: 0.3}}
      - {model: ./a, layer_range: [1, 3]}
    base_model: ./a
    parameters: {weight: [0.25, 1]}
parameters: {weight: 0.75, normalize: false, lambda: 0.5}
"""
MODULE = """\
merge_method: linear
modules:
  default:
    models:
      - {model: ./a, parameters: {weight: [1, {value: 0}]}}
      - {model: ./b, parameters: {weight: [0, 0.5, 1]}}
      - {model: ./base}
    parameters: {weight: 0.5}
parameters: {weight: 9}
""".replace("[1, {value: 0}]", "[{filter: mlp, value: [1, 0]}]")
CASES = {"stack": STACK, "linear": LINEAR, "bases": BASES, "module": MODULE}
TIED = {
    "stay-tied": "merge_method: linear\nmodels: [{model: ./tied}, {model: ./tied2}]\nparameters: {weight: 1}\n",
    "one-untied": "merge_method: linear\nmodels: [{model: ./tied}, {model: ./free}]\nparameters: {weight: 1}\n",
    "tied-base": "merge_method: task_arithmetic\nbase_model: ./tied\nmodels: [{model: ./free}, {model: ./tied2}]\n"
    "parameters: {weight: 0.5}\n",
    "last-tied": "merge_method: passthrough\nslices:\n- sources: [{model: ./free, layer_range: [0, 1]}]\n"
    "- sources: [{model: ./tied, layer_range: [1, 2]}]\n",
}
CHAIN = f"""\
name: second
merge_method: linear
models: [{{model: first}}, {{model: ./b}}]
parameters: {{weight: [1, 2]}}
---
name: first
{LINEAR}---
merge_method: passthrough
slices:
  - sources: [{{model: second, layer_range: [0, 2]}}]
  - sources: [{{model: first, layer_range: [1, 3]}}]
"""


def tool(name: str) -> Path:
    python = Path(os.environ.get("MERGEKIT_PYTHON", ROOT / ".bench" / "mergekit" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"no mergekit at {python}: set MERGEKIT_PYTHON")
    return python.parent / name


def theirs(folder: Path, name: str, text: str) -> dict[str, torch.Tensor]:
    recipe, out = folder / f"{name}.yaml", folder / f"{name}.mergekit"
    recipe.write_text(text)
    several = ["--out-path", out, "-I", folder / f"{name}.parts"] if "---" in text else [out]
    command = [tool("mergekit-multi" if len(several) > 1 else "mergekit-yaml"), recipe, *several, "--quiet"]
    command += ["--lora-merge-cache", folder / f"{name}.lora"] if "lora" in text else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2500:]
    return load_tensors(out)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    tool("mergekit-yaml")
    folder = tmp_path_factory.mktemp("keys")
    for architecture in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        for seed, name in enumerate(("base", "a", "b")):
            path = folder / architecture / name
            tiny_models.make(architecture, path)
            generator = torch.Generator().manual_seed(seed)
            noisy = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in load_tensors(path).items()}
            make_checkpoint(path, noisy, config=json.loads((path / "config.json").read_text()))
    for seed, name in enumerate(("tied", "tied2", "free")):
        tiny_llama(folder / "heads" / name, seed=seed, dtype=torch.float32, tied=name != "free")
    return folder


def compare(folder: Path, name: str, text: str) -> tuple[set[str], float]:
    """Names that only one of the two has, and the largest difference of the others."""
    wanted = theirs(folder, name, text)
    got = load_tensors(run(folder / f"{name}.yaml", folder / f"{name}.deltamerge").folder)
    shared = got.keys() & wanted.keys()
    assert all(got[key].shape == wanted[key].shape for key in shared)
    return got.keys() ^ wanted.keys(), max(float((got[key] - wanted[key]).abs().max()) for key in shared)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_slices_and_modules(models, architecture, name):
    only, apart = compare(models / architecture, name, CASES[name])
    assert not only
    assert apart <= 1e-6
    ours, wanted = (json.loads((models / architecture / f"{name}.{t}" / "config.json").read_text())
                    for t in ("deltamerge", "mergekit"))  # fmt: skip
    count = "n_layer" if architecture.startswith("GPT2") else "num_hidden_layers"
    assert ours[count] == wanted[count]


@pytest.mark.parametrize("name", TIED)
def test_tied_heads(models, name):
    only, apart = compare(models / "heads", name, TIED[name])
    assert apart <= 1e-6
    named = "a head that the last slice ties is lost"
    assert only == ({"lm_head.weight"} if name == "last-tied" else set())
    assert named in DIFFERENCES.read_text(encoding="utf-8")


def test_chained_documents(models):
    only, apart = compare(models / "LlamaForCausalLM", "chain", CHAIN)
    assert not only
    assert apart <= 1e-6


def test_lora_references(models):
    folder = models / "LlamaForCausalLM"
    adapter, generator = folder / "lora", torch.Generator().manual_seed(9)
    weights = {}
    for name, tensor in load_tensors(folder / "a").items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(2, tensor.shape[1], generator=generator)
            weights[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(tensor.shape[0], 2, generator=generator)
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder / "a")}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    text = "merge_method: linear\nmodels:\n- {model: ./a+./lora, parameters: {weight: 0.75}}\n"
    only, apart = compare(folder, "lora", text + "- {model: ./b, parameters: {weight: 0.25}}\n")
    assert not only
    assert apart <= 1e-6
    assert len(weights) > 4


# mergekit's own examples, in our words: bio-merge, gradient-slerp, linear, orcamini-platy-44layer, ties, arcee_fusion
EXAMPLES = ("bio-merge", "gradient-slerp", "linear", "layer-stack", "ties-gradient", "arcee-fusion")


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    tool("mergekit-yaml")
    folder = tmp_path_factory.mktemp("examples")
    for depth, base, tunes in ((2, "base", ("math", "code", "chat")), (40, "base40", ("orca", "platypus"))):
        first = tiny_llama(folder / "models" / base, seed=depth, layers=depth, dtype=torch.float32)
        for seed, name in enumerate(tunes, 1):
            tiny_llama(folder / "models" / name, seed=seed, layers=depth, dtype=torch.float32, base=first, sigma=0.02)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_mergekit_s_own_examples(examples, name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    only, apart = compare(examples, name, re.sub(r"dtype: \w+", "dtype: float32", text))
    assert not only
    assert apart <= 1e-6 or name == "arcee-fusion"
    theirs, ours = (load_tensors(examples / f"{name}.{tool}") for tool in ("mergekit", "deltamerge"))
    differing = sum(int(((theirs[key] - ours[key]).abs() > 1e-6).sum()) for key in ours)
    assert differing <= 0.01 * sum(tensor.numel() for tensor in ours.values())


def test_config_and_tokenizer_are_the_base_s_if_mergekit_s_are_wanted(models):
    folder = models / "heads"
    for seed, name in enumerate(("start", "end"), 5):
        tiny_llama(folder / name, seed=seed, dtype=torch.float32, tokenizer=True)
    marked = json.loads((folder / "end" / "config.json").read_text()) | {"bos_token_id": 7}
    (folder / "end" / "config.json").write_text(json.dumps(marked))
    names = (folder / "end" / "tokenizer_config.json").read_text()
    (folder / "end" / "tokenizer_config.json").write_text(names.replace("<unk>", "w9"))
    text = (
        "merge_method: slerp\nbase_model: ./start\nmodels: [{model: ./start}, {model: ./end}]\nparameters: {t: 0.3}\n"
    )
    wanted = theirs(folder, "of-the-base", text)
    for exact, of, mark in ((True, "start", 1), (False, "end", 7)):
        out = run(folder / "of-the-base.yaml", folder / f"exact-{exact}", mergekit_exact=exact).folder
        got = load_tensors(out)
        assert max(float((got[key] - wanted[key]).abs().max()) for key in wanted) <= 1e-6
        assert json.loads((out / "config.json").read_text())["bos_token_id"] == mark
        assert (out / "tokenizer_config.json").read_bytes() == (folder / of / "tokenizer_config.json").read_bytes()
    mergekit_s = folder / "of-the-base.mergekit"
    assert json.loads((mergekit_s / "config.json").read_text())["bos_token_id"] == 1
    assert (mergekit_s / "tokenizer_config.json").read_bytes() == (
        folder / "start" / "tokenizer_config.json"
    ).read_bytes()
    assert "`template: base` gives mergekit's" in DIFFERENCES.read_text(encoding="utf-8")
