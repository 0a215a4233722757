"""Layer stacks of real architectures of several kinds of layer: each loads in transformers without a missing or an
unexpected tensor, and each layer does with its states what it did at home; or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from running import run

from deltamerge.errors import InputError

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_hidden_layers": 4,
}  # fmt: skip
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
ROUTED = {
    "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_d_conv": 2, "mamba_chunk_size": 4,
}  # fmt: skip
TYPES = ["sliding_attention", "full_attention"]

# class, config, its settings, and how many of RANGES load
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "bamba": ("BambaForCausalLM", "BambaConfig", MAMBA | {"attn_layer_indices": [1, 3]}, 6),
    "jamba": (
        "JambaForCausalLM", "JambaConfig",
        {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
         "num_experts": 2, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False}, 1,
    ),
    "ernie 4.5 moe": (
        "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig",
        {"moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 8, "moe_layer_start_index": 1,
         "moe_layer_end_index": 3, "moe_layer_interval": 1, "moe_num_shared_experts": 1}, 4,
    ),
    "llama 4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        {"intermediate_size_mlp": 24, "num_local_experts": 2, "interleave_moe_layer_step": 2,
         "attention_chunk_size": 8}, 6,
    ),
    "qwen 3 next": (
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        EXPERTS | {"full_attention_interval": 2, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 8}, 6,
    ),
    "nemotron h": (
        "NemotronHForCausalLM", "NemotronHConfig",
        {"hybrid_override_pattern": "M-M*", "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4,
         "n_groups": 1, "chunk_size": 4, "conv_kernel": 2}, 6,
    ),
    "deepseek v3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        ROUTED | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
                  "head_dim": 4, "num_key_value_heads": 2}, 4,
    ),
    "glm 4 moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", ROUTED, 4),
    "lfm 2 moe": (
        "Lfm2MoeForCausalLM", "Lfm2MoeConfig", EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", TYPES[1]] * 2},
        4,
    ),
    "qwen 2 moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        EXPERTS | {"decoder_sparse_step": 2, "shared_expert_intermediate_size": 8}, 2,
    ),
    "gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"sliding_window": 8, "sliding_window_pattern": 2}, 6),
    "gemma 3n": (
        "Gemma3nForCausalLM", "Gemma3nTextConfig",
        {"intermediate_size": [24, 32, 24, 32], "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
         "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2, "sliding_window": 8,
         "layer_types": TYPES * 2, "activation_sparsity_pattern": [0.0] * 4}, 0,
    ),
    "gemma 4": (
        "Gemma4ForCausalLM", "Gemma4TextConfig",
        {"layer_types": TYPES * 2, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
         "vocab_size_per_layer_input": 64}, 6,
    ),
    "cohere 2": ("Cohere2ForCausalLM", "Cohere2Config", {"sliding_window": 8, "sliding_window_pattern": 2}, 6),
}  # fmt: skip


def in_file(*lists: str, **keys: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The config as older repositories of the hub write it: without `lists` by layer, with the `keys` that say so."""
    return lambda config: {key: value for key, value in config.items() if key not in lists} | keys


# how a config of the hub says it, and how many of RANGES load then
HUB: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], int]] = {
    "llama 4": (in_file("moe_layers", "no_rope_layers", "layer_types"), 1),
    "qwen 3 next": (in_file("layer_types", full_attention_interval=2), 2),
    "nemotron h": (in_file("layers_block_type", hybrid_override_pattern="M-M*", num_hidden_layers=4), 6),
    "gemma 3": (in_file("layer_types", "_sliding_window_pattern", sliding_window_pattern=2), 2),
    "cohere 2": (in_file("layer_types", "_sliding_window_pattern", sliding_window_pattern=2), 2),
}

RANGES = [[(0, 2), (0, 4)], [(0, 3), (2, 4)], [(0, 4), (1, 4)], [(0, 4), (0, 4)], [(1, 4)], [(0, 1), (2, 4)]]


def build(family: str, folder: Path) -> Any:
    architecture, config, settings, _ = FAMILIES[family]
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(getattr(transformers, config)(**{**SMALL, **settings}))
    model.save_pretrained(folder)
    return model


def layers_of(model: Any) -> Any:
    return model.model.layers


def first_of(output: Any) -> torch.Tensor:
    """The hidden states that a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def at_home(home: Any) -> list[tuple[Any, dict[str, Any], torch.Tensor]]:
    """What each layer of a model is called with on some tokens (states, masks, positions), and what it returns."""
    calls: dict[int, tuple[Any, dict[str, Any], torch.Tensor]] = {}
    held = []
    for number, layer in enumerate(layers_of(home)):

        def note(_: Any, arguments: Any, keywords: Any, output: Any, number: int = number) -> None:
            calls[number] = arguments, keywords, first_of(output).clone()

        held.append(layer.register_forward_hook(note, with_kwargs=True))
    tokens = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        home.eval()(input_ids=tokens, use_cache=False)
    for hook in held:
        hook.remove()
    return [calls[number] for number in range(len(calls))]


def loads(folder: Path, family: str, home: Any, ranges: list[tuple[int, int]], calls: Sequence[Any]) -> bool:
    """Whether a stack is made; then it loads, and each layer does with its states what it did at home."""
    slices = "".join(f"- sources: [{{model: ./a, layer_range: [{a}, {b}]}}]\n" for a, b in ranges)
    (folder / "r.yaml").write_text(f"merge_method: passthrough\nslices:\n{slices}")
    try:
        run(folder / "r.yaml", folder / "out", force=True)
    except InputError:
        return False
    model, info = getattr(transformers, FAMILIES[family][0]).from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values()), (ranges, info)
    for number, source in enumerate(i for a, b in ranges for i in range(a, b)):
        arguments, keywords, wanted = calls[source]
        with torch.no_grad():
            found = first_of(layers_of(model)[number](*arguments, **keywords))
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6), (ranges, number, source)
    types = getattr(home.config, "layer_types", None)
    if types is not None:
        assert list(model.config.layer_types) == [types[i] for a, b in ranges for i in range(a, b)], ranges
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_load_or_are_refused(tmp_path, family):
    home = build(family, tmp_path / "a")
    calls = at_home(home)
    assert sum(loads(tmp_path, family, home, ranges, calls) for ranges in RANGES) == FAMILIES[family][3]


@pytest.mark.parametrize("family", HUB)
def test_so_do_those_of_the_hub_s_configs(tmp_path, family):
    home = build(family, tmp_path / "a")
    calls = at_home(home)
    rewrite, count = HUB[family]
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(rewrite(json.loads(path.read_text()))))
    assert sum(loads(tmp_path, family, home, ranges, calls) for ranges in RANGES) == count
