"""Tiny dense models of the families that mixtures are made of, and the mixture that their classes lack, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import write_json, write_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

# No rope_theta, rms_norm_eps, hidden_act, …: what a config.json leaves out is its family's default.
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
LITTLE = {"architectures", "model_type", "dtype", "tie_word_embeddings", "sliding_window", *SIZES}


def dense(folder: Path, family: str, seed: int = 0, **settings: Any) -> Path:
    """A float32 model of random weights with a tokenizer, whose config.json says little."""
    settings = SIZES | ({"head_dim": 8} if family == "qwen3" else {}) | settings
    config = transformers.AutoConfig.for_model(family, **settings)
    config.dtype = "float32"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, CLASSES[family])(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + float("norm" in name))
    model.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    kept = LITTLE | settings.keys()
    write_json(folder / "config.json", {key: value for key, value in said.items() if key in kept})
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_tokenizer(folder, 64)
    if family == "qwen2":  # whose tokenizer transformers makes of the letters of byte pairs, whatever the file says
        _letters(folder)
    return folder


def _letters(folder: Path) -> None:
    """A tokenizer of letters and digits, in the place of one of words."""
    names = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ"]
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(names[:3])
    tokenizer.save(str(folder / "tokenizer.json"))


def logits(model: Any) -> Tensor:
    """Of two rows of tokens."""
    ids = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: Tensor = model.eval()(ids).logits
    return found


class _Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class _DeepseekMoe(nn.Module):
    """Σ g_i expert_i(x) + shared(x), g the softmax of the router over the top k, normalised (arXiv 2401.06066)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["moe_intermediate_size"]
        self.gate = nn.Linear(hidden, config["n_routed_experts"], bias=False)
        self.experts = nn.ModuleList(_Mlp(hidden, width) for _ in range(config["n_routed_experts"]))
        self.shared_experts = _Mlp(hidden, width * config["n_shared_experts"]) if config["n_shared_experts"] else None
        self.k = config["num_experts_per_tok"]
        assert (config["norm_topk_prob"], config["scoring_func"]) == (True, "softmax")

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        found = (every.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1])) * weights[..., None]).sum(-2)
        return found if self.shared_experts is None else found + self.shared_experts(x)


def deepseek(folder: Path) -> Any:
    """DeepSeek's first mixture, which transformers has no class of: a Llama with other MLPs. Its file must fit it."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    said = {k: v for k, v in config.items() if k not in ("auto_map", "model_type", "architectures")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**said))
    for layer in model.model.layers:
        layer.mlp = _DeepseekMoe(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model
