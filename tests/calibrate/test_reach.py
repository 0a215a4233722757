"""What a calibrated q divides, and what happens to the rest: it is divided as without calibration, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from calibration_rows import rows
from conftest import write_tokenizer
from running import make_plan, run
from safetensors.numpy import load_file

from deltamerge.cli.plan import render_plan
from deltamerge.errors import VerifyError
from deltamerge.tensors.names import is_linear, is_stacked, is_unscaled

TEXT = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16, "patch_size": 4,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip
ROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", TEXT | LOCAL | {"sliding_window": 8}),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {"text_config": TEXT | EXPERTS | ROPE, "vision_config": VISION},
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {key: value for key, value in TEXT.items() if key != "head_dim"} | LOCAL,
    ),
}  # fmt: skip
SCOPES = {
    "global": "output_change",
}
DENSITY = 0.1
RECIPE = """\
base_model: ./base
models: [{model: ./tuned, name: t, prune: {method: %s, density: 0.1, q: %s}}]
calibration: {data: calib.jsonl, sequences: 8, length: 12, seeds: 2}
"""


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for family, (architecture, config, settings) in FAMILIES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, architecture)(getattr(transformers, config)(**settings)).eval()
            for name, scale in (("base", 0.3), ("tuned", 0.15)):
                with torch.no_grad():
                    for parameter in model.parameters():
                        noise = scale * torch.randn_like(parameter)
                        if name == "tuned" or parameter.dim() > 1:
                            parameter.copy_(noise if name == "base" else parameter + noise)
                model.save_pretrained(folder / family / name)
        write_tokenizer(folder / family / "tuned", 96)
        rows(folder / family / "calib.jsonl")
    return folder


def test_what_is_not_calibrated_is_divided_as_without_and_named(families: Path, tmp_path: Path) -> None:
    """Biases of stacked experts: lock, plan and card name them; the experts themselves have the searched q."""
    path = families / "gpt_oss" / "recipe.yaml"
    path.write_text(RECIPE % ("dare", SCOPES["global"]))
    result = run(path, tmp_path / "out", device="cpu", workers=1)
    found = result.lock["calibration"]["t"]
    assert found["chosen"] == "calibrated"
    planned = make_plan(path, device="cpu", workers=1)
    (stage,) = planned.describe()["stages"]
    groups = {group["tensors"]: group for group in stage["not_calibrated"]}
    listed = {group["tensors"]: group["q"] for group in found["not_calibrated"]}
    text, card = render_plan(planned.describe(), width=1000), (result.folder / "README.md").read_text()
    for part in ("down_proj", "gate_up_proj"):
        bias = f"model.layers.*.mlp.experts.{part}_bias"
        assert groups[bias] == {"tensors": bias, "count": 2, "q": DENSITY, "why": "no weight of a linear layer"}
        assert listed[bias] == DENSITY
        assert bias in text
        assert bias in card
        assert bias.removesuffix("_bias") not in groups
        assert bias.removesuffix("_bias") not in listed
        assert found["q"][f"model.layers.0.mlp.experts.{part}"] == found["searched"]["q"]


def test_a_lock_that_would_lose_the_experts_is_refused(families: Path, tmp_path: Path) -> None:
    """What versions before this one wrote: no q for what they did not calibrate."""
    folder = families / "granitemoe"
    path = folder / "old.yaml"
    path.write_text(RECIPE % ("dare", SCOPES["global"]))
    lock = run(path, tmp_path / "out", device="cpu", workers=1).lock
    found = lock["calibration"]["t"]
    found["q"] = {name: q for name, q in found["q"].items() if "block_sparse_moe" not in name}
    path.with_suffix(".lock").write_text(yaml.safe_dump(lock))
    with pytest.raises(VerifyError, match=r"has no q for model\.layers\.0\.block_sparse_moe") as error:
        run(path, tmp_path / "again", device="cpu", workers=1, locked=True)
    assert "without --locked" in str(error.value.hint)


def test_layers_that_no_row_reaches_are_divided_as_without_calibration(families: Path, tmp_path: Path) -> None:
    """Texts alone: the vision tower's linear layers are not part of what the q was searched on."""
    path = families / "qwen3_vl_moe" / "vision.yaml"
    path.write_text(RECIPE % ("dare", SCOPES["global"]))
    found = run(path, tmp_path / "out", device="cpu", workers=1).lock["calibration"]["t"]
    unseen = [group for group in found["not_calibrated"] if group["why"] == "a linear layer that no row reached"]
    assert {group["q"] for group in unseen} == {DENSITY}
    assert all(group["tensors"].startswith("model.visual.") for group in unseen)
    assert {"model.visual.blocks.*.attn.qkv.weight"} <= {group["tensors"] for group in unseen}


def test_importance_masks_calibrate_experts_too(families: Path, tmp_path: Path) -> None:
    folder = families / "gpt_oss"
    (folder / "magnitude.yaml").write_text(RECIPE % ("magnitude", "layer_mse"))
    result = run(folder / "magnitude.yaml", tmp_path / "out", device="cpu", workers=1)
    of_experts = {n: q for n, q in load_file(result.folder / "recipe.rows").items() if "experts" in n}
    assert len(of_experts) == 4
    assert all(q.shape == (4, 1, 1) and (q > 0).all() and len(np.unique(q)) == 4 for q in of_experts.values())
    assert not any("experts" in name for name in result.lock["calibration"]["t"]["q"])  # biases keep q = 1


@pytest.mark.slow
def test_learned_scales_reach_the_experts(families: Path, tmp_path: Path) -> None:
    folder = families / "granitemoe"
    learned = "{objective: output_change, scope: layer, search: gradient}"
    (folder / "learned.yaml").write_text(RECIPE % ("dare", learned))
    found = run(folder / "learned.yaml", tmp_path / "out", device="cpu", workers=1).lock["calibration"]["t"]
    if found["chosen"] == "calibrated" and found["searched"].get("family") == "learned":
        experts = [q for name, q in found["q"].items() if "input_linear" in name]
        assert len(set(experts)) == 2


RULES = {
    ("model.layers.0.mlp.up_proj.weight", (32, 16)): "linear",
    ("classifier.weight", (1, 16)): "linear",
    ("model.layers.0.mlp.gate.weight", (4, 16)): "linear",
    ("model.layers.0.input_layernorm.weight", (16,)): "unscaled",
    ("model.embed_tokens.weight", (96, 16)): "unscaled",
    ("shared.weight", (96, 16)): "unscaled",
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4)): "unscaled",
    ("model.layers.0.mlp.shared_expert.up_proj.weight", (32, 16)): "linear",
    ("embeddings.cls_token", (1, 1, 16)): "unscaled",
    ("embeddings.position_embeddings", (1, 5, 16)): "unscaled",
    ("embeddings.patch_embeddings.projection.weight", (16, 3, 4, 4)): "other",
    ("mixer.conv1d.weight", (32, 1, 4)): "other",
    ("mixer.A_log", (32, 8)): "other",
    ("mlp.experts.gate_up_proj", (4, 16, 32)): "stacked",
    ("block_sparse_moe.input_linear.weight", (4, 32, 16)): "stacked",
    ("mlp.experts.gate_up_proj_bias", (4, 32)): "other",
}


@pytest.mark.parametrize(("name", "shape"), RULES)
def test_names_and_shapes_tell_what_a_q_divides(name: str, shape: tuple[int, ...]) -> None:
    found = (
        "stacked"
        if is_stacked(name, shape)
        else "linear"
        if is_linear(name, shape)
        else "unscaled"
        if is_unscaled(name, shape)
        else "other"
    )
    assert found == RULES[name, shape]
