"""Tiny random models of every architecture that calibration promises, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

torch.set_num_threads(1)  # threads that spin on shared cores make tiny models many times slower

SMALL = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
VIT = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip
ARCHITECTURES = {
    "BertForSequenceClassification": ("BertConfig", SMALL | {"num_labels": 3}),
    "BertModel": ("BertConfig", SMALL),
    "RobertaForSequenceClassification": ("RobertaConfig", SMALL | {"max_position_embeddings": 40}),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 60, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32},
    ),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "LlamaForSequenceClassification": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", GROUPED | {"sliding_window": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", SMALL | {"num_key_value_heads": 1}),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "eos_token_id": 2},
    ),
    "OPTForCausalLM": (
        "OPTConfig",
        {"vocab_size": 60, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 3, "ffn_dim": 24,
         "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0},
    ),
    "ViTForImageClassification": ("ViTConfig", VIT),
}  # fmt: skip


def make(architecture: str, folder: Path, **changes: object) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with random weights and the tensors of its checkpoint."""
    config_class, settings = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**{**settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def batches(architecture: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if architecture.startswith("ViT"):
        return [{"pixel_values": torch.randn(n, 3, 8, 8, generator=generator)} for n in (2, 3)]
    made = []
    for n, t in ((2, 9), (3, 7)):
        mask = torch.ones(n, t, dtype=torch.int64)
        mask[0, -3:] = 0
        ids = torch.randint(3, 60, (n, t), generator=generator) * mask
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def image_processor(folder: Path, side: int = 8) -> None:
    """Save one of square pictures; skip the test where transformers (before 5.18) loads none without torchvision."""
    transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    try:
        transformers.AutoImageProcessor.from_pretrained(folder)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
