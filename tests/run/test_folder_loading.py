"""Merged pipelines load in diffusers, sentence-transformers models in SentenceTransformer, with the merged weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama, write_tokenizer
from running import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of diffusers' own imports and defaults
]

RECIPE = """\
merge_method: task_arithmetic
base_model: ./base{part}
models:
  - {{model: ./a{part}, parameters: {{weight: 0.25}}}}
  - {{model: ./b{part}, parameters: {{weight: 0.5}}}}
"""
States = dict[str, dict[str, torch.Tensor]]


def moved(module: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def stable_diffusion(folder: Path) -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, down_block_types=("DownBlock2D",
        "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=6,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4),
        text_encoder=CLIPTextModel(text), tokenizer=clip_tokenizer(folder), unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def states(pipeline: Any) -> States:
    """The weights of each component, copied."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name: {n: t.clone() for n, t in part.state_dict().items()} for name, part in modules.items()}


def merged(base: torch.Tensor, tunes: list[torch.Tensor]) -> torch.Tensor:
    total = base.double() + sum(w * (t.double() - base.double()) for w, t in zip((0.25, 0.5), tunes, strict=True))
    return total.to(base.dtype)


def same(found: dict[str, torch.Tensor], base: dict[str, torch.Tensor], tunes: list[dict[str, torch.Tensor]]) -> None:
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        wanted = merged(base[name], [tune[name] for tune in tunes]) if base[name].is_floating_point() else base[name]
        assert torch.allclose(tensor.float(), wanted.float(), rtol=2e-3, atol=1e-6), name


SAVED = {
    "plain": {},
    "sharded": {"max_shard_size": "40KB"},
    "a variant": {"variant": "fp16"},
    "sharded variant": {"variant": "fp16", "max_shard_size": "40KB"},
    "pickled": {"safe_serialization": False},
}  # fmt: skip


@pytest.mark.parametrize("how", SAVED)
def test_a_pipeline_loads_and_draws(tmp_path: Path, how: str) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    saved, found = SAVED[how], []
    for seed, name in enumerate(("base", "a", "b")):
        pipeline = stable_diffusion(tmp_path / "words")
        for part in ("unet", "vae", "text_encoder") if seed else ():
            moved(getattr(pipeline, part), seed)
        if "variant" in saved:
            pipeline.to(dtype=torch.float16)
        found.append(states(pipeline))
        pipeline.save_pretrained(tmp_path / name, **saved)
    shard = "output: {shard_size: 40KB}\n" if "max_shard_size" in saved else ""
    more = shard + "pickles: true\n" * (how == "pickled")
    (tmp_path / "r.yaml").write_text(RECIPE.format(part="") + more)
    out = run(tmp_path / "r.yaml", tmp_path / "out").folder
    weights = {p.relative_to(out).as_posix() for p in out.rglob("*") if ".safetensors" in p.name}
    theirs = {p.relative_to(tmp_path / "base").as_posix() for p in (tmp_path / "base").rglob("*") if ".safe" in p.name}
    assert how == "pickled" or weights == theirs
    options = {"variant": saved["variant"], "torch_dtype": torch.float16} if "variant" in saved else {}
    again = StableDiffusionPipeline.from_pretrained(out, safety_checker=None, **options)
    for part, state in states(again).items():
        same(state, found[0][part], [tune[part] for tune in found[1:]])
    if not options:
        again.set_progress_bar_config(disable=True)
        picture = again("a b", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
        assert picture.images.shape[0] == 1
    # one component as the model
    (tmp_path / "r.yaml").write_text(RECIPE.format(part="/unet") + more)
    alone = UNet2DConditionModel.from_pretrained(run(tmp_path / "r.yaml", tmp_path / "unet").folder, **options)
    same(alone.state_dict(), found[0]["unet"], [tune["unet"] for tune in found[1:]])


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8, num_embeds_ada_norm=10
    )


@pytest.mark.parametrize("make", [flux, dit])
def test_a_transformer_of_diffusers_loads(tmp_path: Path, make: Callable[[], Any]) -> None:
    found = []
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = make().to(torch.bfloat16)
        if seed:
            moved(model, seed)
        found.append({n: t.clone() for n, t in model.state_dict().items()})
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    (tmp_path / "r.yaml").write_text(RECIPE.format(part="") + "output: {shard_size: 20KB}\n")
    out = run(tmp_path / "r.yaml", tmp_path / "out").folder
    assert (out / "diffusion_pytorch_model.safetensors.index.json").is_file()
    again, report = type(model).from_pretrained(out, torch_dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in again.state_dict().items():
        wanted = merged(found[0][name], [tune[name] for tune in found[1:]])
        assert torch.equal(tensor, wanted) or (tensor - wanted).abs().max() <= 2**-8 * wanted.abs().max(), name


def test_a_sentence_model_loads_and_embeds(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    found = []
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        encoder = tmp_path / f"{name}-encoder"
        config = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                            vocab_size=32, max_position_embeddings=32)  # fmt: skip
        BertModel(config).save_pretrained(encoder)
        write_tokenizer(encoder, 32)
        dense = Dense(in_features=16, out_features=8)
        parts = [Transformer(str(encoder), max_seq_length=16), Pooling(16), dense, Normalize()]
        model = SentenceTransformer(modules=parts, device="cpu", prompts={"query": "w5 "}, default_prompt_name="query")
        if seed:
            moved(model, seed)
        found.append({n: t.clone() for n, t in model.state_dict().items()})
        model.save_pretrained(str(tmp_path / name))
    (tmp_path / "r.yaml").write_text(RECIPE.format(part=""))
    out = run(tmp_path / "r.yaml", tmp_path / "out").folder
    again = SentenceTransformer(str(out), device="cpu")
    same(dict(again.state_dict()), found[0], found[1:])
    assert again.prompts["query"] == "w5 "
    assert (again.default_prompt_name, again.max_seq_length) == ("query", 16)
    vectors = again.encode(["w5 w6 w7", "w8"], convert_to_tensor=True)
    assert vectors.shape == (2, 8)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-5)


def test_mistrals_file_has_the_names_of_its_own(tmp_path: Path) -> None:
    """`consolidated.safetensors` is read where it lies alone, and its output is called so."""
    for seed, name in enumerate(("base", "a", "b")):
        folder = tiny_llama(tmp_path / name, seed=seed)
        (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
        (folder / "config.json").rename(folder / "params.json")
    (tmp_path / "r.yaml").write_text(RECIPE.format(part=""))
    out = run(tmp_path / "r.yaml", tmp_path / "out").folder
    assert {"consolidated.safetensors", "params.json"} <= {path.name for path in out.iterdir()}
