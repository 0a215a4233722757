"""Every family of vision-language models and mixtures that transformers stores under other names than it has in memory:
a fine-tune in either form merges to the same bytes, its text model alone too, and recipes find its modules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tensors, make_checkpoint
from running import make_plan, run
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

T = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
V = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
Q = {"depth": 3, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "patch_size": 4, "intermediate_size": 20}


def text(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **T, **more}


def vision(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **V, **more}


VLMS: dict[str, dict[str, Any]] = {
    "Gemma3": {"text_config": text("gemma3_text"), "vision_config": vision("siglip_vision_model")},
    "Llava": {"text_config": text("llama"), "vision_config": vision("clip_vision_model")},
    "LlavaNext": {"text_config": text("llama"), "vision_config": vision("clip_vision_model")},
    "Mistral3": {"text_config": text("mistral"), "vision_config": vision("pixtral", head_dim=8)},
    "InternVL": {
        "text_config": text("qwen2"),
        "vision_config": vision("internvl_vision", image_size=[8, 8], patch_size=[4, 4]),
    },
    "Idefics3": {"text_config": text("llama"), "vision_config": vision("idefics3_vision")},
    "SmolVLM": {"text_config": text("llama"), "vision_config": vision("smolvlm_vision")},
    "PaliGemma": {"text_config": text("gemma"), "vision_config": vision("siglip_vision_model")},
    "Mllama": {
        "text_config": T | {"cross_attention_layers": [1], "pad_token_id": 0},
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 3, "num_global_layers": 1, "attention_heads": 2, "patch_size": 4,
            "intermediate_size": 20, "image_size": 8, "vision_output_dim": 32, "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
    },
    "Qwen2VL": {
        "text_config": text("qwen2_vl_text", **ROPE),
        "vision_config": {"depth": 3, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
    },
    "Qwen2_5_VL": {"text_config": text("qwen2_5_vl_text", **ROPE), "vision_config": Q},
    "Qwen3VL": {
        "text_config": text("qwen3_vl_text", **ROPE),
        "vision_config": Q | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "Qwen3VLMoe": {
        "text_config": text(
            "qwen3_vl_moe_text", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, **ROPE
        ),
        "vision_config": Q | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "Llama4": {
        "text_config": T | {"intermediate_size_mlp": 24, "num_local_experts": 3, "interleave_moe_layer_step": 1},
        "vision_config": V | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "Glm4v": {"text_config": text("glm4v_text", **ROPE), "vision_config": Q | {"image_size": 8}},
    "Aria": {
        "text_config": text("aria_text", moe_num_experts=3, moe_num_shared_experts=1),
        "vision_config": vision("idefics3_vision"),
    },
    "AyaVision": {"text_config": text("cohere2"), "vision_config": vision("siglip_vision_model")},
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 10}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": T | {"num_local_experts": 3},
    "Qwen2Moe": T | EXPERTS | {"num_experts": 3, "shared_expert_intermediate_size": 12, "decoder_sparse_step": 1},
    "Qwen3Moe": T | EXPERTS | {"num_experts": 3},
    "DeepseekV3": T | EXPERTS | {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2,
    },
    "Olmoe": T | {"num_experts": 3, "num_experts_per_tok": 2},
    "Phimoe": T | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Lfm2Moe": T | EXPERTS | {"num_experts": 3, "layer_types": ["full_attention"] * 2, "num_dense_layers": 0},
    "GraniteMoe": T | {"num_local_experts": 3},
}  # fmt: skip
FAMILIES = {f"{n}ForConditionalGeneration": (f"{n}Config", c) for n, c in VLMS.items()}
FAMILIES |= {f"{n}ForCausalLM": (f"{n}Config", c) for n, c in MIXTURES.items()}


@contextmanager
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


def in_memory(model: Any) -> dict[str, torch.Tensor]:
    """The tensors under the names that they have in memory, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    saved = {name for name, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    return {n: t.contiguous().clone() for n, t in model.state_dict().items() if n in saved and n not in tied}


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Any:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        """`base`, `a` and `b`, as save_pretrained writes them; `a-memory` and `b-memory`, as they are in memory."""
        if family in made:
            return made[family]
        made[family] = folder = tmp_path_factory.mktemp(family)
        config_class, settings = FAMILIES[family]
        with quiet():
            torch.manual_seed(0)
            model = getattr(transformers, family)(getattr(transformers, config_class)(**settings)).eval()
            for name in ("base", "a", "b"):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.01)
                model.save_pretrained(folder / name)
                if name != "base":
                    memory = folder / f"{name}-memory"
                    memory.mkdir()
                    save_file(in_memory(model), memory / "model.safetensors")
                    (memory / "config.json").write_text((folder / name / "config.json").read_text())
        return folder

    return make


TWO = """\
base_model: ./base
merge_method: task_arithmetic
template: base
models: [{{model: ./{a}}}, {{model: ./{b}}}]
parameters: {{weight: [0.3, 0.6]}}
"""


def merge(folder: Path, text: str, out: str) -> dict[str, torch.Tensor]:
    (folder / "r.yaml").write_text(text)
    run(folder / "r.yaml", folder / out, force=True)
    return load_tensors(folder / out)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_in_memory_merge_to_the_same_bytes(families: Any, family: str) -> None:
    folder = families(family)
    want = merge(folder, TWO.format(a="a", b="b"), "saved")
    got = merge(folder, TWO.format(a="a-memory", b="b"), "mixed")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    with quiet():
        _, info = getattr(transformers, family).from_pretrained(folder / "mixed", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


TOWERS = r"vision|visual|image_newline|projector|connector|merger|(^|\.)class_embedding"


@pytest.mark.parametrize("family", [f for f in FAMILIES if "Conditional" in f])
def test_the_text_model_alone_merges_into_the_whole(families: Any, family: str, tmp_path: Path) -> None:
    """A language model as its own repository has it, `model.layers…` and `lm_head`, trained from the same one."""
    folder = families(family)
    saved = load_tensors(folder / "a")
    own = {n: t for n, t in saved.items() if not re.search(TOWERS, n)}
    plain = {re.sub(r"^(model\.)?(language_model|text_model)\.(model\.)?", "model.", n): t for n, t in own.items()}
    plain = {n.replace("model.lm_head", "lm_head"): t for n, t in plain.items()}
    make_checkpoint(folder / "text", plain, config={"architectures": ["TextForCausalLM"], "model_type": "text"})
    one = TWO.format(a="text", b="b").replace(", {model: ./b}", "").replace("weight: [0.3, 0.6]", "weight: 1")
    got, base = merge(folder, one, "texts"), load_tensors(folder / "base")
    assert got.keys() == base.keys()
    for name, tensor in base.items():
        want = base[name] + (saved[name] - base[name]) if name in own else tensor
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", [f for f in FAMILIES if "Conditional" in f])
def test_modules_find_the_names_that_the_file_has(families: Any, family: str) -> None:
    folder = families(family)
    recipe = """\
merge_method: linear
modules:
  language_model:
    models: [{model: ./a}]
  vision_tower:
    models: [{model: ./b}]
  multi_modal_projector:
    models: [{model: ./base}]
parameters: {weight: 1.0}
"""
    names = load_tensors(folder / "base")
    if any(re.search(r"(^|\.)visual\.", name) for name in names):  # which has the projector
        recipe = recipe.replace("  multi_modal_projector:\n    models: [{model: ./base}]\n", "")
    (folder / "r.yaml").write_text(recipe)
    planned = make_plan(folder / "r.yaml")
    sources = {output.name: output.pieces[0].built.details for output in planned.outputs}
    for name, (source, *_) in sources.items():
        if name.rpartition(".")[2] != "image_newline":  # of no module
            assert source.startswith("./a") == (not re.search(TOWERS, name)), name
