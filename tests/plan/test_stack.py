"""Layers stacked by slices and modules, against sums written out in float64; what transformers loads of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from conftest import load_tensors, make_checkpoint, tiny_llama
from running import make_plan, run

from deltamerge.errors import InputError, RecipeError

LAYERS = {"LlamaForCausalLM": "model.layers", "GPT2LMHeadModel": "transformer.h", "Gemma2ForCausalLM": "model.layers"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`base`, `a` and `b` of each architecture, with 3 layers; `llama/deep` has 5."""
    folder = tmp_path_factory.mktemp("models")
    for architecture in LAYERS:
        for shift, name in enumerate(("base", "a", "b")):
            path = folder / architecture / name
            tiny_models.make(architecture, path)
            tensors = load_tensors(path)
            torch.manual_seed(shift)
            changed = {n: t + shift * 0.1 * torch.randn_like(t) for n, t in tensors.items()}
            make_checkpoint(path, changed, config=json.loads((path / "config.json").read_text()))
    tiny_models.make("LlamaForCausalLM", folder / "LlamaForCausalLM" / "deep", num_hidden_layers=5)
    return folder


def merge(folder: Path, out: Path, text: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    recipe = folder / "stack.yaml"
    recipe.write_text(text)
    target = run(recipe, out, force=True).folder
    return load_tensors(target), json.loads((target / "config.json").read_text())


def layer(tensors: dict[str, torch.Tensor], prefix: str, index: int) -> dict[str, np.ndarray]:
    start = f"{prefix}.{index}."
    return {n.removeprefix(start): t.double().numpy() for n, t in tensors.items() if n.startswith(start)}


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-7)


STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: ./a, layer_range: [0, 2]}]
  - sources: [{model: ./b, layer_range: [0, 3]}]
"""


@pytest.mark.parametrize("architecture", LAYERS)
def test_a_stack_has_the_layers_of_its_slices_and_loads(models, tmp_path, architecture):
    folder, prefix = models / architecture, LAYERS[architecture]
    merged, config = merge(folder, tmp_path / "out", STACK)
    a, b = load_tensors(folder / "a"), load_tensors(folder / "b")
    for new, (tensors, old) in enumerate([(a, 0), (a, 1), (b, 0), (b, 1), (b, 2)]):
        got, wanted = layer(merged, prefix, new), layer(tensors, prefix, old)
        assert got.keys() == wanted.keys()
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    assert not layer(merged, prefix, 5)
    outside = {name for name in merged if not name.startswith(prefix + ".")}
    assert outside == {name for name in a if not name.startswith(prefix + ".")}
    for name in outside:
        first = any(part in name for part in ("embed", "wte", "wpe"))
        assert torch.equal(merged[name], (a if first else b)[name])
    count = "n_layer" if "n_layer" in config else "num_hidden_layers"
    assert config[count] == 5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())


def test_per_layer_lists_follow_the_layers(models, tmp_path):
    _, config = merge(models / "Gemma2ForCausalLM", tmp_path / "out", STACK)
    before = json.loads((models / "Gemma2ForCausalLM" / "a" / "config.json").read_text())["layer_types"]
    assert config["layer_types"] == [before[i] for i in (0, 1, 0, 1, 2)]


LINEAR = """\
merge_method: linear
slices:
  - sources:
      - {model: ./a, layer_range: [0, 3], parameters: {weight: [0, 1]}}
      - {model: ./deep, layer_range: [2, 5], parameters: {weight: {filter: q_proj, value: 3}}}
    parameters: {weight: [0.5, 0.25]}
  - sources:
      - {model: ./a, layer_range: [1, 2], parameters: {weight: [0.1, 0.7]}}
      - {model: ./b, layer_range: [2, 3]}
parameters: {weight: 0.3, normalize: false}
"""


def test_gradients_run_over_the_slice_and_sources_win(models, tmp_path):
    folder = models / "LlamaForCausalLM"
    merged, config = merge(folder, tmp_path / "out", LINEAR)
    a, b, deep = (load_tensors(folder / name) for name in ("a", "b", "deep"))
    assert config["num_hidden_layers"] == 4
    for new in range(3):
        t = new / 2
        got, x, y = (
            layer(merged, "model.layers", new),
            layer(a, "model.layers", new),
            layer(deep, "model.layers", 2 + new),
        )
        for name in got:
            close(got[name], t * x[name] + (3 if "q_proj" in name else 0.5 - 0.25 * t) * y[name])
    got, x, y = layer(merged, "model.layers", 3), layer(a, "model.layers", 1), layer(b, "model.layers", 2)
    for name in got:  # a slice of one layer stands at t = 1; neither source nor slice has a weight for b
        close(got[name], 0.7 * x[name] + 0.3 * y[name])
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    close(merged[embedding].double().numpy(), 0.5 * deep[embedding].double().numpy())
    close(merged[norm].double().numpy(), 0.1 * a[norm].double().numpy() + 0.3 * b[norm].double().numpy())


def test_every_slice_may_have_its_own_base(models, tmp_path):
    text = """\
merge_method: task_arithmetic
base_model: ./base
slices:
  - sources:
      - {model: ./a, layer_range: [0, 2], parameters: {weight: 0.5}}
  - sources:
      - {model: ./b, layer_range: [2, 3]}
      - {model: ./a, layer_range: [1, 2]}
    base_model: ./a
parameters: {weight: 0.25}
"""
    folder = models / "LlamaForCausalLM"
    merged, _ = merge(folder, tmp_path / "out", text)
    base, a, b = (load_tensors(folder / name) for name in ("base", "a", "b"))
    for new in range(2):
        got, x, y = layer(merged, "model.layers", new), layer(base, "model.layers", new), layer(a, "model.layers", new)
        for name in got:
            close(got[name], x[name] + 0.5 * (y[name] - x[name]))
    got, x, y = layer(merged, "model.layers", 2), layer(a, "model.layers", 1), layer(b, "model.layers", 2)
    for name in got:
        close(got[name], x[name] + 0.25 * (y[name] - x[name]))


def test_slices_may_be_pruned(models, tmp_path):
    text = """\
base_model: ./base
merge_method: task_arithmetic
slices:
  - sources: [{model: ./a, layer_range: [0, 1], prune: {density: 0.5}}]
  - sources: [{model: ./b, layer_range: [1, 3]}]
prune: {method: magnitude, density: 0.25}
"""
    folder = models / "LlamaForCausalLM"
    merged, _ = merge(folder, tmp_path / "out", text)
    base = load_tensors(folder / "base")
    for new, density in enumerate((0.5, 0.25, 0.25)):
        got, x = layer(merged, "model.layers", new), layer(base, "model.layers", new)
        for name in got:
            assert np.count_nonzero(got[name] - x[name]) == round(density * x[name].size)


def test_a_module_named_default_is_the_whole_model(models, tmp_path):
    text = """\
merge_method: linear
modules:
  default:
    models: [{model: ./a, parameters: {weight: 1}}, {model: ./b, parameters: {weight: [0, 1]}}, {model: ./base}]
    parameters: {weight: 0.5}
parameters: {weight: 9, normalize: false}
"""
    folder = models / "LlamaForCausalLM"
    merged, _ = merge(folder, tmp_path / "out", text)
    base, a, b = (load_tensors(folder / name) for name in ("base", "a", "b"))
    for index in range(3):
        got, x, y, z = (layer(m, "model.layers", index) for m in (merged, a, b, base))
        for name in got:
            close(got[name], x[name] + index / 2 * y[name] + 0.5 * z[name])


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2,
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder / name)
    return folder


T5 = """\
merge_method: linear
modules:
  encoder: {slices: [{sources: [{model: ./a, layer_range: [0, 2]}]}, {sources: [{model: ./b, layer_range: [1, 2]}]}]}
  decoder: {models: [{model: ./a}, {model: ./b, parameters: {weight: 3}}]}
  shared: {models: [{model: ./b}]}
parameters: {weight: 1}
"""


def test_modules_merge_an_encoder_and_a_decoder_apart(t5, tmp_path):
    merged, config = merge(t5, tmp_path / "out", T5)
    a, b = load_tensors(t5 / "a"), load_tensors(t5 / "b")
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 3)
    got, wanted = layer(merged, "encoder.block", 2), layer(b, "encoder.block", 1)
    assert all(np.array_equal(got[name], wanted[name]) for name in got)
    for name in (n for n in a if n.startswith("decoder.") or n == "lm_head.weight"):
        close(merged[name].double().numpy(), (a[name].double().numpy() + 3 * b[name].double().numpy()) / 4)
    assert torch.equal(merged["shared.weight"], b["shared.weight"])
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert len(model.encoder.block) == 3


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (STACK, InputError, r"./a: slices could stack decoder.block or encoder.block"),
        (T5.replace("shared:", "vision:"), RecipeError, r"modules.vision: no tensor of ./a belongs to it"),
        (T5.replace("[1, 2]", "[1, 3]"), RecipeError, r"layer_range: is \[1, 3\), ./b has 2 layers"),
    ],
)
def test_what_cannot_be_stacked_is_named(t5, text, error, message):
    (t5 / "bad.yaml").write_text(text)
    with pytest.raises(error) as caught:
        make_plan(t5 / "bad.yaml")
    assert re.search(message, str(caught.value))


def test_experts_go_with_their_layer(tmp_path):
    config = transformers.MixtralConfig(**tiny_models.GROUPED, num_local_experts=4, num_experts_per_tok=2)
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / name)
    merged, _ = merge(tmp_path, tmp_path / "out", STACK)
    b = load_tensors(tmp_path / "b")
    got, wanted = layer(merged, "model.layers", 4), layer(b, "model.layers", 2)
    assert any("experts.3." in name for name in wanted)
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[name], wanted[name]) for name in got)


WRONG = {
    "stages": (
        {f"stages.{i}.norm.weight": (8 * (i + 1),) for i in range(3)},
        {"num_layers": 3},
        "stages are stages of different width",
    ),
    "no count": ({f"layers.{i}.w": (4, 4) for i in range(3)}, {}, "whose count config.json has; found layers"),
    "one count of two": (
        {f"{c}.{i}.w": (4, 4) for c in ("layers", "cross_layers") for i in range(3)},
        {"num_layers": 3},
        "slices of cross_layers would change num_layers of config.json, which counts layers too",
    ),
    "a list beside": (
        {f"layers.{i}.w": (4, 4) for i in range(3)} | {f"queries.{i}": (4,) for i in range(3)},
        {"num_layers": 3},
        "queries has a tensor for each of 3 layers, which cannot follow slices",
    ),
    "no layers": ({"w": (4, 4)}, {"num_layers": 3}, "found none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_numberings_that_are_no_layers_are_refused(tmp_path, case):
    shapes, config, message = WRONG[case]
    for name in ("a", "b"):
        make_checkpoint(tmp_path / name, {n: torch.zeros(s) for n, s in shapes.items()}, config=config)
    (tmp_path / "r.yaml").write_text(STACK)
    with pytest.raises(InputError, match=message):
        make_plan(tmp_path / "r.yaml")


def test_layers_of_another_width_or_kind_are_refused(models, tmp_path):
    tiny_llama(tmp_path / "wide", seed=0, layers=3)
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(models / "LlamaForCausalLM" / name)
    (tmp_path / "r.yaml").write_text(STACK.replace("./b", "./wide"))
    with pytest.raises(InputError, match="shapes differ"):
        make_plan(tmp_path / "r.yaml")
    extra = {**load_tensors(models / "LlamaForCausalLM" / "b"), "model.layers.1.mlp.bias": torch.zeros(4)}
    config = json.loads((models / "LlamaForCausalLM" / "b" / "config.json").read_text())
    make_checkpoint(tmp_path / "odd", extra, config=config)
    text = "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources: [{model: ./a, layer_range: [0, 2]}, "
    (tmp_path / "r.yaml").write_text(text + "{model: ./odd, layer_range: [0, 2]}]\n")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.bias: in \./odd, missing in \./a"):
        make_plan(tmp_path / "r.yaml")


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    """`tied` and `tied2` have no head of their own, `free` has one."""
    folder = tmp_path_factory.mktemp("heads")
    for seed, name in enumerate(("tied", "tied2", "free")):
        tiny_llama(folder / name, seed=seed, dtype=torch.float32, tied=name != "free")
    return folder


TIED = {
    "stay tied": ("merge_method: linear\nmodels: [{model: ./tied}, {model: ./tied2}]\n", None),
    "linear": ("merge_method: linear\nmodels: [{model: ./tied}, {model: ./free}]\n", (0.5, 0.0, 0.5)),
    "task_arithmetic": (
        "merge_method: task_arithmetic\nbase_model: ./tied\nmodels: [{model: ./free}, {model: ./tied2}]\n",
        (-1.0, 1.0, 1.0),
    ),
    "last slice tied": (
        "merge_method: passthrough\nslices:\n- sources: [{model: ./free, layer_range: [0, 1]}]\n"
        "- sources: [{model: ./tied, layer_range: [1, 2]}]\n",
        (1.0, 0.0, 0.0),
    ),
    "last slice free": (
        "merge_method: passthrough\nslices:\n- sources: [{model: ./tied, layer_range: [0, 1]}]\n"
        "- sources: [{model: ./free, layer_range: [1, 2]}]\n",
        (0.0, 0.0, 1.0),
    ),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_s_head_is_its_embedding(heads, tmp_path, case):
    text, factors = TIED[case]
    if "passthrough" not in text:
        text += "parameters: {weight: 1}\n"
    merged, config = merge(heads, tmp_path / "out", text)
    assert config["tie_word_embeddings"] is (factors is None)
    assert ("lm_head.weight" in merged) is (factors is not None)
    if factors is None:
        return
    tied, tied2, free = (load_tensors(heads / name) for name in ("tied", "tied2", "free"))
    sources = (tied["model.embed_tokens.weight"], tied2["model.embed_tokens.weight"], free["lm_head.weight"])
    wanted = sum(f * source.double().numpy() for f, source in zip(factors, sources, strict=True))
    close(merged["lm_head.weight"].double().numpy(), wanted)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, merged["lm_head.weight"])
    notes = make_plan(heads / "stack.yaml").notes
    assert any("untied; the embedding is the head of ./tied" in note for note in notes)


def test_out_dtype_wins_over_dtype(models, tmp_path):
    merged, config = merge(models / "LlamaForCausalLM", tmp_path / "out", STACK + "dtype: fp32\nout_dtype: bf16\n")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert config["dtype"] == "bfloat16"


def test_execution_flags_and_int8_mask_change_nothing(models, tmp_path):
    folder = models / "LlamaForCausalLM"
    plain, _ = merge(folder, tmp_path / "plain", STACK)
    flags = "low_cpu_memory: true\nallow_crimes: true\nlazy_unpickle: true\nparameters: {int8_mask: true}\n"
    flagged, _ = merge(folder, tmp_path / "flagged", STACK + flags)
    assert all(torch.equal(plain[name], flagged[name]) for name in plain | flagged)
