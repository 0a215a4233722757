"""Every form of adapter that PEFT writes: its own merge is the judge."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import close, peft
from conftest import load_tensors
from safetensors.torch import load_file, save_file
from test_adapter import expanded
from tiny_models import GROUPED, SMALL, VIT

from deltamerge.errors import InputError
from deltamerge.models import hub
from deltamerge.tensors.names import CONV1D_MODELS, is_conv1d
from deltamerge.tensors.reader import Reader

transformers = pytest.importorskip("transformers")

MOE = GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "num_hidden_layers": 2}
TEXT = GROUPED | {"num_hidden_layers": 2, "rope_parameters": None}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=2)
    ),
    "gpt2, untied": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False
        )
    ),
    "gpt": lambda: transformers.OpenAIGPTDoubleHeadsModel(
        transformers.OpenAIGPTConfig(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "imagegpt": lambda: transformers.ImageGPTForImageClassification(
        transformers.ImageGPTConfig(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3)
    ),
    "captions": lambda: transformers.VisionEncoderDecoderModel(
        transformers.VisionEncoderDecoderConfig(
            encoder={"model_type": "vit", **VIT},
            decoder={"model_type": "gpt2", "vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
                     "add_cross_attention": True, "is_decoder": True, "tie_word_embeddings": False},
            tie_word_embeddings=False,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=16,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ),
    "moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED | {"num_local_experts": 3, "num_hidden_layers": 2})
    ),
    "square": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**MOE | {"moe_intermediate_size": 8})
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **GROUPED | {"num_local_experts": 3, "intermediate_size_mlp": 24, "num_hidden_layers": 2},
            interleave_moe_layer_step=1,
        )
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config={"model_type": "llama", **GROUPED}, vision_config={"model_type": "clip_vision_model", **VIT}
        )
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config={"model_type": "qwen2_vl_text", **SMALL, "num_key_value_heads": 1,
                         "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
            vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
        )
    ),
}  # fmt: skip

LORA, LOHA, LOKR = "LoraConfig", "LoHaConfig", "LoKrConfig"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LINEAR = ["q_proj", "down_proj"]
CONV = ["projection", "query"]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora bias": ("gpt2", LORA, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_bias": True}),
    "dora of Conv1D": ("gpt2", LORA, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "square Conv1D beside a head": (
        "gpt2, untied", LORA, {"target_modules": ["c_attn", "c_proj", "lm_head"], "fan_in_fan_out": True},
    ),
    "square Conv1D before a head": ("imagegpt", LORA, {"target_modules": ["attn.c_proj", "score"]}),
    "square Conv1D, dora": ("gpt", LORA, {"target_modules": ["c_proj", "summary"], "use_dora": True}),
    "square Conv1D of a decoder": (
        "captions", LORA, {"target_modules": ["attn.c_proj", "enc_to_dec_proj", "q_attn", "lm_head"]},
    ),
    "square Conv1D, olora": (
        "gpt2, untied", LORA, {"target_modules": ["attn.c_proj", "lm_head"], "init_lora_weights": "olora"},
    ),
    "dora of an embedding": ("llama", LORA, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "conv": ("vit", LORA, {"target_modules": CONV}),
    "conv, dora": ("vit", LORA, {"target_modules": CONV, "use_dora": True}),
    "conv of one dimension": ("whisper", LORA, {"target_modules": ["conv1", "conv2", "q_proj"]}),
    "tokens": ("llama", LORA, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 4]}),
    "tokens of a tied model": ("tied", LORA, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
    "tokens of two": (
        "llama", LORA,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
    ),
    "tokens alone": ("tied", "TrainableTokensConfig", {"token_indices": [1, 5]}),
    "experts": ("moe", LORA, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts, one": ("moe", LORA, {"target_modules": [], "target_parameters": EXPERTS[1:], "use_rslora": True}),
    "experts by modules": ("moe", LORA, {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj", "gate"]}),
    "experts, square": ("square", LORA, {"target_modules": [], "target_parameters": EXPERTS}),
    "experts of Mixtral": ("mixtral", LORA, {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "experts, transposed": ("llama4", LORA, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "a parameter": ("llama", LORA, {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "all linear of a mixture": ("moe", LORA, {"target_modules": "all-linear"}),
    "loha": ("llama", LOHA, {"target_modules": LINEAR, "alpha": 3}),
    "loha, patterns": (
        "llama", LOHA, {"target_modules": LINEAR, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    ),
    "loha, conv": ("vit", LOHA, {"target_modules": ["projection"]}),
    "loha, cores": ("vit", LOHA, {"target_modules": ["projection"], "use_effective_conv2d": True}),
    "lokr": ("llama", LOKR, {"target_modules": LINEAR, "decompose_both": True}),
    "lokr, whole": ("llama", LOKR, {"target_modules": LINEAR, "r": 8}),
    "lokr, conv": ("vit", LOKR, {"target_modules": ["projection"], "r": 8}),
    "lokr, cores": ("vit", LOKR, {"target_modules": ["projection"], "r": 1, "use_effective_conv2d": True}),
    "pissa": ("llama", LORA, {"target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "pissa of Conv1D": (
        "gpt2", LORA, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"},
    ),
    "olora": ("llama", LORA, {"target_modules": LINEAR, "init_lora_weights": "olora"}),
    "pissa of a head": ("llama", LORA, {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}),
    "olora of a head": ("llama", LORA, {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "olora"}),
    "pissa of a head and an embedding": (
        "gpt2, untied", LORA,
        {"target_modules": ["wte", "c_attn", "lm_head"], "init_lora_weights": "pissa", "modules_to_save": ["wpe"]},
    ),
    "pissa of more than there is": (
        "llama", LORA, {"target_modules": ["k_proj", "lm_head"], "r": 12, "init_lora_weights": "pissa"},
    ),
    "mica": ("llama", LORA, {"target_modules": LINEAR, "init_lora_weights": "mica"}),
    "a VLM": ("llava", LORA, {"target_modules": ["q_proj", "lm_head", "linear_1"]}),
    "a VLM, saved": ("llava", LORA, {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}),
    "a VLM of two prefixes": ("qwen2_vl", LORA, {"target_modules": ["q_proj", "qkv", "fc1"], "bias": "lora_only"}),
}  # fmt: skip


def quiet(call: Any, *args: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **settings)


def save(model: str, kind: str, settings: dict[str, Any], folder: Path) -> None:
    """`folder/base`, as save_pretrained writes it, and `folder/adapter`, every weight of it off its start."""
    transformers.logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = MODELS[model]().eval()
        quiet(made.save_pretrained, folder / "base")
        made = quiet(type(made).from_pretrained, folder / "base")
        config = getattr(peft, kind)(**({"r": 2} if kind != "TrainableTokensConfig" else {}) | settings)
        adapted = quiet(peft.get_peft_model, made, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        quiet(adapted.save_pretrained, folder / "adapter")


def judged(model: str, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT makes of base and adapter, as save_pretrained writes it."""
    base = quiet(type(MODELS[model]()).from_pretrained, folder / "base")
    merged = quiet(quiet(peft.PeftModel.from_pretrained, base, folder / "adapter").merge_and_unload)
    quiet(merged.save_pretrained, folder / "merged")
    return load_tensors(folder / "merged")


EVERYDAY = {
    "square Conv1D beside a head", "pissa of a head",
    "lora bias", "dora of Conv1D", "conv", "tokens of a tied model", "tokens alone", "experts", "experts of Mixtral",
    "experts, transposed", "all linear of a mixture", "loha, cores", "lokr", "pissa", "a VLM",
}  # fmt: skip


@pytest.mark.parametrize("case", [c if c in EVERYDAY else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    model, kind, settings = CASES[case]
    save(model, kind, settings, tmp_path)
    got, want, base = expanded("base+adapter", tmp_path), judged(model, tmp_path), load_tensors(tmp_path / "base")
    assert got.keys() == want.keys()
    close(got, want, 1e-5)
    assert any(not torch.equal(got[name], base[name]) for name in base)
    assert list(got) == list(base)
    with Reader() as reader:  # and the same bytes whatever the tiles
        for name, info in hub.open_model("base+adapter", tmp_path, weights=False).tensors.items():
            flat = got[name].reshape(-1)
            for start in range(0, flat.numel() if info.kind != "stored" else 0, 101):
                piece = torch.empty(min(101, flat.numel() - start), dtype=flat.dtype)
                reader.read_into(info, start, piece.view(torch.uint8).numpy())
                assert torch.equal(piece, flat[start : start + 101]), (name, start)


def test_a_training_run_names_its_adapter(tmp_path: Path) -> None:
    """Tensors as a training run's state dict (unsloth, FSDP) has them, with the adapter's name."""
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"], "use_dora": True}
    save("llama", LORA, settings, tmp_path)
    want = expanded("base+adapter", tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    named = {}
    for name, tensor in load_file(path).items():
        for end in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
            name = name.replace(f".{end}", f".{end}.default") if f".{end}" in f"{name}." else name
        named[name.replace("model.norm.weight", "model.norm.modules_to_save.default.weight")] = tensor
    named["base_model.model.model.norm.original_module.weight"] = torch.zeros(16)
    save_file(named, path)
    got = expanded("base+adapter", tmp_path)
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def experts_apart(folder: Path, name: str) -> None:
    """The adapter of an older transformers, whose experts were modules of their own, and a base in either form."""
    stem = "base_model.model.model.layers.{}.mlp.experts.{}.{}.lora_{}.weight"
    generator = torch.Generator().manual_seed(3)
    shapes = {"gate_proj": (6, 16), "up_proj": (6, 16), "down_proj": (16, 6)}
    tensors = {}
    for layer in range(2):
        for expert in range(3):
            for part, (out, inner) in shapes.items():
                tensors[stem.format(layer, expert, part, "A")] = torch.randn(2, inner, generator=generator)
                tensors[stem.format(layer, expert, part, "B")] = torch.randn(out, 2, generator=generator)
    (folder / name).mkdir()
    save_file(tensors, folder / name / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (folder / name / "adapter_config.json").write_text(json.dumps(config))


def test_adapters_of_experts_on_bases_in_the_other_form(tmp_path: Path) -> None:
    save("moe", LORA, {"target_modules": [], "target_parameters": EXPERTS}, tmp_path)
    experts_apart(tmp_path, "older")
    apart = load_tensors(tmp_path / "base")
    stacked = {name: tensor for name, tensor in apart.items() if ".experts." not in name}
    (tmp_path / "fused").mkdir()
    (tmp_path / "turned").mkdir()
    for layer in range(2):
        start = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([apart[f"{start}.{e}.{part}.weight"] for e in range(3)])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        stacked |= {f"{start}.gate_up_proj": torch.cat([gate, up], 1), f"{start}.down_proj": down}
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in stacked.items()}
    for folder, tensors in (("fused", stacked), ("turned", turned)):
        save_file(tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    for adapter in ("adapter", "older"):
        one, fused, swapped = (expanded(f"{base}+{adapter}", tmp_path) for base in ("base", "fused", "turned"))
        assert (list(one), list(fused), list(swapped)) == (list(apart), sorted(stacked), sorted(turned))
        for layer in range(2):
            start = f"model.layers.{layer}.mlp.experts"
            for e in range(3):
                gate_up = torch.cat([one[f"{start}.{e}.{part}.weight"] for part in ("gate_proj", "up_proj")])
                torch.testing.assert_close(fused[f"{start}.gate_up_proj"][e], gate_up)
                torch.testing.assert_close(swapped[f"{start}.gate_up_proj"][e], gate_up.T)
                torch.testing.assert_close(fused[f"{start}.down_proj"][e], one[f"{start}.{e}.down_proj.weight"])
                torch.testing.assert_close(swapped[f"{start}.down_proj"][e], one[f"{start}.{e}.down_proj.weight"].T)
        assert not torch.equal(fused[f"{start}.gate_up_proj"], stacked[f"{start}.gate_up_proj"])


Q = "base_model.model.model.layers.0.self_attn.q_proj"
STACKED = ("moe", LORA, {"target_modules": [], "target_parameters": EXPERTS})
PLAIN = ("llama", LORA, {"target_modules": ["q_proj"]})
TOKENS = ("llama", LORA, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]})
A = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
REFUSED = {
    "experts that do not fit": (STACKED, {A: torch.zeros(5, 6)}, {}, "ranks of A"),
    "another parameter": (STACKED, {}, {"target_parameters": ["experts.down_proj"]}, "factors for 2 parameters"),
    "no list": (STACKED, {}, {"target_parameters": 3}, "not a list of names"),
    "loha": (
        ("llama", LOHA, {"target_modules": ["q_proj"]}),
        {f"{Q}.hada_w1_a": torch.zeros(3, 2)},
        {},
        "LoHa's factors",
    ),
    "half a loha": (
        ("llama", LOHA, {"target_modules": ["q_proj"]}),
        {f"{Q}.hada_w1_a": None},
        {},
        "needs w1_a and w1_b",
    ),
    "lokr": (
        ("llama", LOKR, {"target_modules": ["q_proj"]}),
        {f"{Q}.lokr_w1": torch.zeros(3, 2)},
        {},
        "LoKr's factors",
    ),
    "ids": (TOKENS, {}, {"trainable_token_indices": [1]}, "1 rows"),
    "an id beyond": (TOKENS, {}, {"trainable_token_indices": [1, 60]}, "do not fit"),
    "ids twice": (TOKENS, {}, {"trainable_token_indices": [1, 1]}, "an id twice"),
    "corda": (PLAIN, {}, {"init_lora_weights": "corda"}, "'corda' changes the base's own weights"),
    "a random pissa": (PLAIN, {}, {"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes"),
    "a bias that is not there": (PLAIN, {f"{Q}.lora_B.bias": torch.zeros(16)}, {}, "lora_bias needs a bias"),
    "no magnitude": (PLAIN, {}, {"use_dora": True}, "no lora_magnitude_vector"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    (model, kind, settings), tensors, changes, message = REFUSED[case]
    save(model, kind, settings, tmp_path)
    path, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    save_file({n: t for n, t in (load_file(path) | tensors).items() if t is not None}, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(InputError, match=message) as caught:
        expanded("base+adapter", tmp_path)
    assert "\n" not in str(caught.value)


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_that_transformers_lacks_is_told_by_its_biases(tmp_path: Path) -> None:
    save("gpt2, untied", LORA, {"target_modules": ["attn.c_proj", "lm_head"]}, tmp_path)
    want = judged("gpt2, untied", tmp_path)
    edited(tmp_path / "base" / "config.json", model_type="mine")
    close(expanded("base+adapter", tmp_path), want, 1e-5)


def test_a_square_weight_that_nothing_tells_of_is_refused(tmp_path: Path) -> None:
    save("llama", LORA, {"target_modules": ["o_proj", "lm_head"]}, tmp_path)
    edited(tmp_path / "adapter" / "adapter_config.json", fan_in_fan_out=True)
    with pytest.raises(InputError, match=r"o_proj: nothing tells whether its square weight is stored \(in, out\)"):
        hub.open_model("base+adapter", tmp_path, weights=False)


def test_a_bias_that_the_base_has_no_place_for_is_refused(tmp_path: Path) -> None:
    """A ViT that was saved under older names: its biases must not be written beside them."""
    save("vit", LORA, {"target_modules": ["classifier"], "bias": "all"}, tmp_path)
    with pytest.raises(InputError, match=r"the base has no vit\.layers\.0.*bias"):
        hub.open_model("base+adapter", tmp_path, weights=False)


def test_a_stored_head_is_no_longer_tied(tmp_path: Path) -> None:
    save("llama", LORA, {"target_modules": ["lm_head"]}, tmp_path)
    edited(tmp_path / "base" / "config.json", tie_word_embeddings=True)
    assert hub.open_model("base+adapter", tmp_path, weights=False).config["tie_word_embeddings"] is False


def test_every_family_with_conv1d_is_known() -> None:
    """The modules of transformers' source that are Conv1D are those that names and model types tell."""
    found: dict[str, set[str]] = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        if names := set(re.findall(r"self\.(\w+) = Conv1D\(", path.read_text())):
            found[path.parent.name] = names
    types = {"openai": "openai-gpt"}
    assert {types.get(family, family) for family in found} | {"clvp_decoder"} == CONV1D_MODELS
    for family, names in found.items():
        config = {"model_type": types.get(family, family)}
        assert all(is_conv1d(f"h.0.{name}.weight", config) for name in names), family
