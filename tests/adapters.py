"""LoRA adapters of tiny models."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import write_json
from safetensors.torch import save_file


class _Peft:
    """The module, imported when it is first used: it takes seconds, and collecting tests needs none of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "pytest")):  # pytest looks for its own marks on whatever a module holds
            raise AttributeError(name)
        return getattr(importlib.import_module("peft"), name)


peft = _Peft()


def write_adapter(folder: Path, seed: int) -> None:
    """A rank-4 LoRA of the query projections."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(4, 32, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(32, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})


AUTO = {
    "LlamaForCausalLM": "AutoModelForCausalLM",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "MixtralForCausalLM": "AutoModelForCausalLM",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "BertModel": "AutoModel",
    "ViTForImageClassification": "AutoModelForImageClassification",
}


def load(architecture: str, folder: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, AUTO[architecture]).from_pretrained(folder, **{"dtype": "auto"} | settings).eval()


def adapt(model: Any, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Save a LoRA adapter of `model`, every one of its weights off its start."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        adapted.save_pretrained(folder)
    return folder


def close(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype, name
        torch.testing.assert_close(tensor, want[name], rtol=tolerance, atol=tolerance, msg=name)


LLAMA = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 7}
