"""Block by block equals transformers' own forward, on tiny configs of every architecture that is promised."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from deltamerge.calibrate.blocks import Model, Output, from_reader
from deltamerge.calibrate.names import numbered_blocks
from deltamerge.errors import InputError

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
        {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "ViTForImageClassification": ("ViTConfig", VIT),
}  # fmt: skip


def make(architecture: str, folder: Path, **changes: object) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
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


def plain(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
    with torch.no_grad():
        result = model(**inputs)
        return getattr(result, "logits", None), model.base_model(**inputs)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_plain_forward(architecture: str, tmp_path: Path) -> None:
    reference, tensors = make(architecture, tmp_path)
    other = {name: tensor * 0.9 for name, tensor in tensors.items()}
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = Model(config, tensors)
    assert len(model.blocks) == 3
    assert not model.whole
    assert sorted(n for part in model.parts for n in part) == sorted(tensors)
    spelled = numbered_blocks({name: tuple(t.shape) for name, t in tensors.items()})
    assert spelled is not None
    assert [sorted(part) for part in model.parts[1:]] == [sorted(names) for names in spelled.values()]

    data = batches(architecture)
    got = model.run(data, [from_reader(tensors.__getitem__), from_reader(other.__getitem__)], lambda b, out: out)
    for row, scale in zip(got, (1.0, 0.9), strict=True):
        if scale != 1.0:
            with torch.no_grad():
                for parameter in reference.parameters():
                    parameter.mul_(scale)
        for out, inputs in zip(row, data, strict=True):
            logits, hidden = plain(reference, inputs)
            torch.testing.assert_close(out.hidden, hidden, rtol=1e-5, atol=1e-6)
            if logits is not None:
                assert out.logits is not None
                torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-6)
