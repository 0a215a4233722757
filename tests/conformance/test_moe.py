"""The same YAML through mergekit-moe 0.1.5 and deltamerge: the same experts by bytes, routers and config.json.

mergekit's states are those of one prompt each: it pads on the left, with tokens of which it does not tell positions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import load_tensors
from dense_models import dense
from running import run

HERE = Path(__file__).parent
PROMPTED = """base_model: ./base
gate_mode: {mode}
dtype: {dtype}
experts_per_token: 1
experts:
  - source_model: ./a
    positive_prompts: [w9 w8 w7, w30 w31 w5]
    negative_prompts: [w20 w6]
  - source_model: ./base
    positive_prompts: [w5 w6]
"""
SHARED = "shared_experts:\n  - source_model: ./a\n    positive_prompts: [w11 w12]\n    residual_scale: 0.5\n"
SILENT = "shared_experts: [{source_model: ./a, residual_scale: 0.5}]\n"
CASES = {
    "mixtral-hidden": ("llama", PROMPTED.format(mode="hidden", dtype="float32")),
    "mixtral-cheap": ("llama", PROMPTED.format(mode="cheap_embed", dtype="float32")),
    "mixtral-average": ("mistral", PROMPTED.format(mode="hidden_avg", dtype="float32")),
    "mixtral-half": ("mistral", PROMPTED.format(mode="hidden_last", dtype="float16")),
    "mixtral-random": ("llama", PROMPTED.format(mode="random", dtype="float32")),
    "qwen": ("qwen2", PROMPTED.format(mode="hidden", dtype="float32") + SHARED),
    "qwen3": ("qwen3", PROMPTED.format(mode="hidden", dtype="float32")),
    "deepseek": ("llama", PROMPTED.format(mode="hidden", dtype="float32") + SILENT),
    "qwen-of-llama": ("llama", PROMPTED.format(mode="hidden", dtype="float32") + SHARED + "architecture: qwen\n"),
}
COUNTS = (
    "model_type", "architectures", "num_local_experts", "num_experts", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob",
    "mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "moe_layer_freq", "scoring_func", "auto_map",
    "rms_norm_eps", "hidden_act", "vocab_size", "tie_word_embeddings", "num_key_value_heads",
)  # fmt: skip

pytestmark = [pytest.mark.conformance, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    python = Path(os.environ.get("MERGEKIT_PYTHON", HERE.parents[1] / ".bench" / "mergekit" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"no mergekit at {python}: make conformance, or set MERGEKIT_PYTHON")
    folder = tmp_path_factory.mktemp("moe")
    for family in {family for family, _ in CASES.values()}:
        for seed, name in enumerate(("base", "a")):
            dense(folder / family / name, family, seed, **({"sliding_window": None} if family == "mistral" else {}))
        recipes = [name for name, (wanted, _) in CASES.items() if wanted == family]
        for name in recipes:
            (folder / family / f"{name}.yaml").write_text(CASES[name][1])
        subprocess.run(
            [python, HERE / "mergekit_moe_side.py", *(f"{name}.yaml" for name in recipes)],
            cwd=folder / family,
            check=True,
            capture_output=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )
    return folder


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors as mergekit stores those of some layouts: experts stacked, gate over up, as transformers has them."""
    found, parts = {}, {}
    for name, tensor in tensors.items():
        name = name.replace("block_sparse_moe", "mlp")
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            found[name] = tensor
        else:
            kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[3], match[3])
            parts.setdefault(match[1], {})[int(match[2]), kind] = tensor
    for place, own in parts.items():
        count = 1 + max(number for number, _ in own)
        found[f"{place}.gate_up_proj"] = torch.stack(
            [torch.cat([own[i, "gate_proj"], own[i, "up_proj"]]) for i in range(count)]
        )
        found[f"{place}.down_proj"] = torch.stack([own[i, "down_proj"] for i in range(count)])
    return found


@pytest.mark.parametrize("name", CASES)
def test_mergekit_moe_makes_the_same_mixture(made, name):
    path = made / CASES[name][0] / f"{name}.yaml"
    refused = path.with_suffix(".refused")
    assert not refused.exists(), refused.read_text()
    result = run(path).folder
    theirs, ours = load_tensors(path.with_suffix(".mergekit")), load_tensors(result)
    if any(key.endswith("gate_up_proj") for key in theirs):
        ours = fused(ours)
    zeros = {key for key in theirs.keys() - ours.keys() if key.endswith("_proj.bias") and not theirs[key].any()}
    assert ours.keys() == theirs.keys() - zeros
    assert not zeros or name == "qwen-of-llama"
    for key in ours:
        router = key.endswith(("mlp.gate.weight", "expert_gate.weight"))
        if not router:
            assert torch.equal(ours[key], theirs[key]), key
        elif "random" not in name:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-5 if "half" not in name else 6e-4)
        else:
            assert ours[key].shape == theirs[key].shape
    said, known = (json.loads((p / "config.json").read_text()) for p in (result, path.with_suffix(".mergekit")))
    if name == "qwen3":  # written twice, under both names that transformers has for it
        assert known.pop("num_local_experts") == said["num_experts"]
    assert {k: said.get(k) for k in COUNTS if k in known} == {k: known.get(k) for k in COUNTS if k in known}
