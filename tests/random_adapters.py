"""Adapters drawn at random, of tiny real models: every form that PEFT writes, in any combination."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tiny_models import GROUPED

ENCODER = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "eos_token_id": 2}
MIXTURE = GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "num_hidden_layers": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3, "image_size": 16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BLOCK = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Family:
    """A model, and what an adapter of it can name.

    targets    modules that A and B are drawn for; LoHa and LoKr only where they are no embedding, head or Conv1D
    saved      modules for `modules_to_save`
    parameters for `target_parameters`
    embedding  the module with a row for each token
    """

    architecture: str
    config: Callable[[], Any]
    targets: Sequence[str]
    saved: Sequence[str]
    parameters: Sequence[str] = ()
    embedding: str | None = None

    def model(self) -> Any:
        return getattr(transformers, self.architecture)(self.config()).eval()


def _gpt2(**more: Any) -> Family:
    names = ["c_attn", "c_fc", "c_proj", "attn.c_proj", "mlp.c_proj", "lm_head", "wte", "wpe"]
    config = GPT2 | more
    parameters = ["attn.c_proj.weight", "mlp.c_fc.weight"]
    return Family(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(**config),
        names,
        ["ln_f", "wpe", "lm_head"],
        parameters,
        "wte",
    )


def _llama(**more: Any) -> Family:
    names, config = [*BLOCK, "lm_head", "embed_tokens"], GROUPED | {"num_hidden_layers": 2} | more
    return Family(
        "LlamaForCausalLM", lambda: transformers.LlamaConfig(**config), names, ["norm", "lm_head", "embed_tokens"],
        ["o_proj.weight", "up_proj.weight"], "embed_tokens",
    )  # fmt: skip


FAMILIES = {
    "gpt2": _gpt2(),
    "gpt2, untied": _gpt2(tie_word_embeddings=False),
    "llama": _llama(),
    "llama, tied": _llama(tie_word_embeddings=True),
    "bert": Family(
        "BertForSequenceClassification", lambda: transformers.BertConfig(**ENCODER, num_labels=3),
        ["query", "key", "value", "dense", "output.dense", "word_embeddings", "classifier"],
        ["classifier", "pooler"], ["query.weight"], "word_embeddings",
    ),
    "mixture": Family(
        "Qwen3MoeForCausalLM", lambda: transformers.Qwen3MoeConfig(**MIXTURE),
        [*ATTENTION, "lm_head"], ["norm", "lm_head"], ["experts.gate_up_proj", "experts.down_proj"], "embed_tokens",
    ),
    "convnext": Family(
        "ConvNextForImageClassification", lambda: transformers.ConvNextConfig(**CONVNEXT),
        ["pwconv1", "pwconv2", "patch_embeddings", "downsampling_layer.1", "classifier"], ["classifier", "layernorm"],
    ),
    "resnet": Family(
        "ResNetForImageClassification", lambda: transformers.ResNetConfig(**RESNET),
        ["convolution", "layer.0.convolution", "classifier.1"], ["classifier"],
    ),
}  # fmt: skip
CONVOLUTIONS = {"ConvNextForImageClassification", "ResNetForImageClassification"}
LOOKED_UP = {"wte", "wpe", "embed_tokens", "word_embeddings"}
# What PEFT raises for settings that it takes and cannot make, load or merge.
BY_PEFT = (ValueError, TypeError, NotImplementedError, RuntimeError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class Case:
    family: str
    kind: str
    settings: dict[str, Any]
    seed: int = 0
    dtype: str = "float32"
    save: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> bool:
        """Save `folder/base` and `folder/adapter`, every trained weight off its start; False where PEFT cannot."""
        transformers.logging.set_verbosity_error()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            quiet(FAMILIES[self.family].model().to(getattr(torch, self.dtype)).save_pretrained, folder / "base")
            try:
                config = quiet(getattr(peft, self.kind), **self.settings)
                adapted = quiet(peft.get_peft_model, self.base(folder), config)
                with torch.no_grad():
                    for parameter in adapted.parameters():
                        if parameter.requires_grad:
                            parameter.add_(0.1 * torch.randn_like(parameter))
                quiet(adapted.save_pretrained, folder / "adapter", **self.save)
            except BY_PEFT:
                return False
        return True

    def base(self, folder: Path) -> Any:
        kind = getattr(transformers, FAMILIES[self.family].architecture)
        return quiet(kind.from_pretrained, folder / "base", dtype="auto").eval()

    def adapted(self, folder: Path) -> Any | None:
        """PEFT's model of base and adapter; None where PEFT cannot load what it saved."""
        try:
            return quiet(peft.PeftModel.from_pretrained, self.base(folder), folder / "adapter").eval()
        except BY_PEFT:
            return None


def quiet(call: Any, *args: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **settings)


def drawn(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    name = rng.choice(list(FAMILIES))
    family = FAMILIES[name]
    plain = [t for t in family.targets if t not in LOOKED_UP | {"lm_head"}]
    conv1d = name.startswith("gpt2")
    kinds = ["LoraConfig"] * 8 + (["TrainableTokensConfig"] if family.embedding else [])
    kind = rng.choice(kinds + ([] if conv1d else ["LoHaConfig", "LoKrConfig"]))
    tokens = sorted(rng.sample(range(60), rng.randint(1, 4)), key=lambda _: rng.random())
    dtype = rng.choice(["float32"] * 5 + ["bfloat16"])
    save = {} if rng.random() < 0.7 else {"save_embedding_layers": rng.random() < 0.6}
    if kind == "TrainableTokensConfig":
        return Case(name, kind, {"token_indices": tokens, "target_modules": [family.embedding]}, seed, dtype, save)
    few = kind == "LoraConfig"
    targets = rng.sample(family.targets if few else plain, rng.randint(1, min(4, len(plain))))
    settings: dict[str, Any] = {"r": rng.randint(1, 5), "target_modules": targets}
    settings["lora_alpha" if few else "alpha"] = rng.choice([1, 3, 8, 2.5] if few else [1, 3, 8])
    settings |= _patterns(rng, targets)
    if rng.random() < 0.3:
        settings["modules_to_save"] = rng.sample(family.saved, rng.randint(1, 2) if len(family.saved) > 1 else 1)
    settings |= _lora(rng, family, targets, tokens) if few else _other(rng, kind)
    return Case(name, kind, settings, seed, dtype, save)


def _patterns(rng: random.Random, targets: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, values in (("rank_pattern", range(1, 6)), ("alpha_pattern", [1, 2, 7])):
        if rng.random() < 0.25:
            place = rng.choice([rng.choice(targets), rf".*1\..*{targets[0].rpartition('.')[2]}"])
            found[key] = {place: rng.choice(list(values))}
    return found


def _other(rng: random.Random, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {"use_effective_conv2d": True} if rng.random() < 0.4 else {}
    if kind == "LoKrConfig" and rng.random() < 0.5:
        found["decompose_both"] = True
    return found


def _lora(rng: random.Random, family: Family, targets: list[str], tokens: list[int]) -> dict[str, Any]:
    """Settings that LoRA alone has. Most of what PEFT refuses is not drawn."""
    found: dict[str, Any] = {}
    convolutions, conv1d = family.architecture in CONVOLUTIONS, "c_attn" in family.targets
    start = rng.choice([True, True, "gaussian", "pissa", "pissa", "olora", "olora", "mica", "orthogonal"])
    if not convolutions:
        found["init_lora_weights"] = start
    if start == "orthogonal":
        found["r"] = 4
    if start == "olora" and conv1d:  # which PEFT makes of square weights alone
        found["target_modules"] = rng.sample(["attn.c_proj", "lm_head", "wte"], rng.randint(1, 3))
    chances = {"use_rslora": 0.2, "use_dora": 0.2, "lora_bias": 0.1, "fan_in_fan_out": 0.3}
    found |= {key: True for key, chance in chances.items() if rng.random() < chance}
    if start is not True or LOOKED_UP & {*targets}:
        found.pop("lora_bias", None)
    if start == "mica":
        found.pop("use_dora", None)
    if rng.random() < 0.25:
        found["bias"] = rng.choice(["all", "lora_only"])
    if family.parameters and rng.random() < 0.2:
        found["target_parameters"] = rng.sample(family.parameters, rng.randint(1, len(family.parameters)))
        found["target_modules"] = rng.sample(["lm_head", *targets], 1) if rng.random() < 0.5 else []
        found = {key: value for key, value in found.items() if key not in ("use_dora", "lora_bias", "fan_in_fan_out")}
    elif family.embedding and not LOOKED_UP & {*targets} and rng.random() < 0.2:
        found["trainable_token_indices"] = tokens if rng.random() < 0.5 else {family.embedding: tokens}
    return found
