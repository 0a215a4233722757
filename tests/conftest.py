"""Tiny real checkpoints: import the functions (`from conftest import tiny_llama`) or take their fixtures."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from small_hub import Hub, serve
from word_tokenizer import write_json as write_json
from word_tokenizer import write_tokenizer as write_tokenizer

from deltamerge.engine import kernels

settings.register_profile("deltamerge", deadline=None, derandomize=True)
settings.load_profile("deltamerge")

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")
LEVELS = kernels.native().levels() if kernels.available() else []
if not kernels.available():  # the line of a run that says so is looked at by tests/project/test_install.py
    os.environ[kernels.SWITCH] = kernels.OFF

MEMORY = Path("/dev/shm")
ROOM = 4 << 30  # what a whole run holds at most, several times


def pytest_configure(config: pytest.Config) -> None:
    """Files of tests lie in memory where there is room: they are small, and a disk takes half the time of a run.

    `--basetemp FOLDER` puts them elsewhere. Workers of pytest-xdist get theirs from the first process.
    """
    if config.option.basetemp is None and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        config.option.basetemp = str(MEMORY / f"deltamerge-tests-{os.getpid()}")
        config.add_cleanup(lambda: shutil.rmtree(MEMORY / f"deltamerge-tests-{os.getpid()}", ignore_errors=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out the costly tests of tests/costly.txt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases of a test marked `sampled(n)` every n-th runs each day, and the others with `-m slow`.

    `--quick` leaves out the tests that costly.txt lists: those with 0, and of the others all but every n-th case.
    """
    seen: Counter[str] = Counter()
    for item in items:
        marker, test = item.get_closest_marker("sampled"), item.nodeid.partition("[")[0]
        if marker is not None:
            if seen[test] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1
    if config.option.quick:
        seen.clear()
        costly, left_out = costly_tests(), []
        for item in items:
            test = f"{item.path.name}::{item.name.partition('[')[0]}"
            every = costly.get(test, 1)
            if item.get_closest_marker("slow") is None:
                if every == 0 or seen[test] % every:
                    left_out.append(item)
                seen[test] += 1
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def costly_tests() -> dict[str, int]:
    """By "file::test" the n of which every n-th case is quick enough for each day; 0: no case is."""
    lines = Path(__file__).with_name("costly.txt").read_text().splitlines()
    return {name: int(every) for name, every in (line.split() for line in lines if line and not line.startswith("#"))}


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96,
    "max_position_embeddings": 48, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip


def make_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write `tensors` as transformers would, in `shards` files of about as many tensors each."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "test"} if config is None else dict(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    return folder


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file in `folder`."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _fill(
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    dtype: torch.dtype,
    base: Mapping[str, torch.Tensor],
    sigma: float,
) -> dict[str, torch.Tensor]:
    """Random weights of deviation 0.05 (norms near 1); rows that `base` has: its own plus N(0, sigma²)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        value = 0.05 * noise + float(name.lower().endswith("norm.weight"))
        if name in base:
            rows = len(base[name])
            value[:rows] = base[name].float() + sigma * noise[:rows]
        tensors[name] = value.to(dtype)
    return tensors


def tiny_llama(
    folder: Path,
    *,
    seed: int,
    layers: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    base: Path | None = None,
    sigma: float = 7e-4,
    shards: int = 1,
    tied: bool = False,
    tokenizer: bool = False,
    vocab_size: int = 96,
) -> Path:
    """A LlamaForCausalLM for AutoModelForCausalLM (20 k parameters); a fine-tune of `base` if given."""
    h, inner, kv = 32, 48, 16
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, h)}
    for i in range(layers):
        parts = {
            "input_layernorm": (h,), "mlp.down_proj": (h, inner), "mlp.gate_proj": (inner, h),
            "mlp.up_proj": (inner, h), "post_attention_layernorm": (h,), "self_attn.k_proj": (kv, h),
            "self_attn.o_proj": (h, h), "self_attn.q_proj": (h, h), "self_attn.v_proj": (kv, h),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{part}.weight": shape for part, shape in parts.items()}
    shapes["model.norm.weight"] = (h,)
    if not tied:
        shapes["lm_head.weight"] = (vocab_size, h)
    tensors = _fill(shapes, seed, dtype, load_tensors(base) if base else {}, sigma)
    config = LLAMA | {"num_hidden_layers": layers, "tie_word_embeddings": tied, "vocab_size": vocab_size}
    config["dtype"] = str(dtype).removeprefix("torch.")
    make_checkpoint(folder, tensors, shards=shards, config=config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    if tokenizer:
        write_tokenizer(folder, vocab_size)
    return folder


def tiny_vlm(folder: Path, base: Path, *, seed: int = 7, sigma: float = 7e-4) -> Path:
    """A Llava as transformers saves it, its language model a fine-tune of `base`."""
    shapes = {f"language_model.{name}": tuple(tensor.shape) for name, tensor in load_tensors(base).items()}
    shapes |= {f"vision_tower.encoder.layers.{i}.mlp.fc1.weight": (16, 16) for i in range(3)}
    shapes["multi_modal_projector.linear_1.weight"] = (32, 16)
    known = {f"language_model.{name}": tensor for name, tensor in load_tensors(base).items()}
    text = json.loads((base / "config.json").read_text())
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text,
              "tie_word_embeddings": False, "vision_config": {"num_hidden_layers": 3}}  # fmt: skip
    make_checkpoint(folder, _fill(shapes, seed, torch.bfloat16, known, sigma), config=config)
    write_tokenizer(folder, text["vocab_size"])
    return folder


def tiny_pipeline(folder: Path, seed: int, base: Path | None) -> None:
    """A pipeline whose components are tiny models under diffusers' names."""
    for part in ("unet", "text_encoder", "vae"):
        tiny_llama(folder / part, seed=seed, base=base and base / part)
        if part != "text_encoder":
            (folder / part / "model.safetensors").rename(folder / part / "diffusion_pytorch_model.safetensors")
    parts = {part: ["diffusers", "X"] for part in ("unet", "text_encoder", "vae")}
    write_json(folder / "model_index.json", {"_class_name": "Pipeline", **parts})


def tiny_bert_pair(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    sigma: float = 7e-4,
    tokenizer: bool = False,
) -> tuple[Path, Path]:
    """`folder/base`: a BertModel; `folder/tuned`: BertForSequenceClassification, `bert.` and a head."""
    h, inner = 32, 64
    dense = {"attention.self.query": (h, h), "attention.self.key": (h, h), "attention.self.value": (h, h),
             "attention.output.dense": (h, h), "intermediate.dense": (inner, h),
             "output.dense": (h, inner)}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (96, h), "embeddings.position_embeddings.weight": (48, h),
        "embeddings.token_type_embeddings.weight": (2, h), "embeddings.LayerNorm.weight": (h,),
        "embeddings.LayerNorm.bias": (h,), "pooler.dense.weight": (h, h), "pooler.dense.bias": (h,),
    }  # fmt: skip
    for i in range(2):
        for part, shape in dense.items():
            shapes |= {f"encoder.layer.{i}.{part}.weight": shape, f"encoder.layer.{i}.{part}.bias": shape[:1]}
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{part}.weight": (h,), f"encoder.layer.{i}.{part}.bias": (h,)}
    base = _fill(shapes, seed, dtype, {}, sigma)
    prefixed = {f"bert.{name}": tensor for name, tensor in base.items()}
    head: dict[str, tuple[int, ...]] = {"classifier.weight": (2, h), "classifier.bias": (2,)}
    tuned = _fill({name: tuple(t.shape) for name, t in prefixed.items()} | head, seed + 1, dtype, prefixed, sigma)
    config = BERT | {"dtype": str(dtype).removeprefix("torch.")}
    make_checkpoint(folder / "base", base, config=config)
    make_checkpoint(folder / "tuned", tuned, config=config | {"architectures": ["BertForSequenceClassification"]})
    if tokenizer:
        write_tokenizer(folder / "base", 96)
        write_tokenizer(folder / "tuned", 96)
    return folder / "base", folder / "tuned"


@pytest.fixture(name="make_checkpoint")
def _make_checkpoint() -> Callable[..., Path]:
    return make_checkpoint


@pytest.fixture(name="tiny_llama")
def _tiny_llama() -> Callable[..., Path]:
    return tiny_llama


@pytest.fixture(name="tiny_bert_pair")
def _tiny_bert_pair() -> Callable[..., tuple[Path, Path]]:
    return tiny_bert_pair


@pytest.fixture(name="load_tensors")
def _load_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    return load_tensors


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real checkpoints `base`, `sentiment` and `intensity` (25 MB each); skips the test without them."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ["DELTAMERGE_SHARED"]) if "DELTAMERGE_SHARED" in os.environ else beside
    if not (folder / "base" / "model.safetensors").exists():
        pytest.skip(f"no shared data at {folder}")
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A small hub instead of huggingface.co."""
    with serve(tmp_path / "cache", monkeypatch) as state:
        yield state


@pytest.fixture(params=[pytest.param(level, id=level) for level in LEVELS or ["none"]])
def kernel_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of this processor's compiled kernels in turn."""
    native = kernels.native()
    if native is None:
        pytest.skip("no compiled kernels here")
    best = native.level()
    native.choose(request.param)
    yield request.param
    native.choose(best)
