"""Tiny float32 checkpoints of several architectures, as transformers saves them: a base and fine-tunes of it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {
    "llama": ("AutoModelForCausalLM", DECODER),
    "mistral": ("AutoModelForCausalLM", DECODER | {"head_dim": 8}),
    "qwen2": ("AutoModelForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "gpt2": (
        "AutoModelForCausalLM",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
    ),
    "bert": ("AutoModelForSequenceClassification", SMALL | {"max_position_embeddings": 64}),
}
TUNES = ("a", "b", "c")


def make_models(folder: Path, architecture: str, sigma: float = 0.02) -> Path:
    """`folder/base`: random weights of deviation 0.05; `folder/a` … `c`: the base's plus N(0, sigma²)."""
    kind, settings = ARCHITECTURES[architecture]
    config = transformers.AutoConfig.for_model(architecture, **settings)
    config.dtype = "float32"
    base: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(("base", *TUNES)):
        generator = torch.Generator().manual_seed(seed)
        model = getattr(transformers, kind).from_config(config)
        with torch.no_grad():
            for key, parameter in sorted(model.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(base[key] + sigma * noise if base else 0.05 * noise + float("norm" in key.lower()))
        model.save_pretrained(folder / name)
        base = base or {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    return folder
