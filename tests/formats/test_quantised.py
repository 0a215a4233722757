"""Quantised checkpoints: each scheme is named from headers and config.json, before a weight is read; what only looks
like one is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_llama, write_json
from running import make_plan, run
from safetensors.torch import save_file

from deltamerge.formats.quantised.detect import keys_of, scheme_of, without_keys
from deltamerge.tensors.tensor import TensorInfo, stored

W = "model.layers.0.mlp.up_proj"
Headers = dict[str, tuple[str, tuple[int, ...]]]


def headers(entries: Headers) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, stored(Path("x"), 0, shape, dtype, name)) for name, (dtype, shape) in entries.items()
    }


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}}
GPTQ: Headers = {
    f"{W}.qweight": ("I32", (4, 8)), f"{W}.qzeros": ("I32", (1, 1)), f"{W}.scales": ("F16", (1, 8)),
    f"{W}.g_idx": ("I32", (32,)),
}  # fmt: skip
AWQ: Headers = {
    f"{W}.qweight": ("I32", (32, 1)), f"{W}.qzeros": ("I32", (1, 1)), f"{W}.scales": ("F16", (1, 8)),
}  # fmt: skip
BLOCKS: Headers = {f"{W}.weight": ("F8_E4M3", (8, 8)), f"{W}.weight_scale_inv": ("F32", (1, 1))}
PACKED: Headers = {
    f"{W}.weight_packed": ("I32", (8, 1)), f"{W}.weight_scale": ("BF16", (8, 1)), f"{W}.weight_shape": ("I64", (2,)),
}  # fmt: skip
NF4: Headers = {
    f"{W}.weight": ("U8", (32, 1)), f"{W}.weight.absmax": ("F32", (1,)), f"{W}.weight.quant_map": ("F32", (16,)),
    f"{W}.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
}  # fmt: skip

SCHEMES: dict[str, tuple[dict[str, Any], Headers, str, str]] = {
    "fp8": (FP8, BLOCKS, "fp8, blocks of 128×128", f"{W}.weight"),
    "fp8 with scales of E8M0": (FP8, BLOCKS | {f"{W}.weight_scale_inv": ("F8_E8M0", (1, 1))}, "fp8, b", f"{W}.weight"),
    "fp8 unsaid": ({}, BLOCKS, "fp8", f"{W}.weight"),
    "fp8 of fused experts": (
        {}, {"a.gate_up_proj": ("F8_E4M3", (2, 8, 8)), "a.gate_up_proj_scale_inv": ("F32", (2, 1, 1))},
        "fp8", "a.gate_up_proj",
    ),
    "fp8 said, no scale": (FP8, {f"{W}.weight": ("F8_E4M3", (8, 8))}, "fp8, blocks of 128×128", f"{W}.weight"),
    "fp8 dynamic": (
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        {f"{W}.weight": ("F8_E4M3", (8, 8)), f"{W}.weight_scale": ("F32", (8, 1))}, "fbgemm_fp8", f"{W}.weight",
    ),
    "compressed-tensors int8": (
        {"compression_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
        {f"{W}.weight": ("I8", (8, 8)), f"{W}.weight_scale": ("BF16", (8, 1))}, "compressed-tensors", f"{W}.weight",
    ),
    "compressed-tensors int8 unsaid": (
        {}, {f"{W}.weight": ("I8", (8, 8)), f"{W}.weight_scale": ("BF16", (8, 1))}, "compressed-tensors",
        f"{W}.weight",
    ),
    "compressed-tensors 4 bits": ({}, PACKED, "compressed-tensors", f"{W}.weight"),
    "mxfp4": (
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"a.gate_up_proj_blocks": ("U8", (2, 8, 1, 16)), "a.gate_up_proj_scales": ("U8", (2, 8, 1))}, "mxfp4",
        "a.gate_up_proj",
    ),
    "mxfp4 unsaid": (
        {}, {"a.gate_up_proj_blocks": ("U8", (2, 8, 1, 16)), "a.gate_up_proj_scales": ("U8", (2, 8, 1))}, "mxfp4",
        "a.gate_up_proj",
    ),
    "nvfp4": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        {f"{W}.weight": ("U8", (8, 4)), f"{W}.weight_scale": ("F8_E4M3", (8, 1)), f"{W}.weight_scale_2": ("F32", ())},
        "modelopt, NVFP4", f"{W}.weight",
    ),
    "nvfp4 unsaid": (
        {}, {f"{W}.weight": ("F4", (8, 8)), f"{W}.weight_scale": ("F8_E4M3", (8, 1)),
             f"{W}.weight_scale_2": ("F32", ())}, "nvfp4", f"{W}.weight",
    ),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, GPTQ, "gptq, 4 bits", f"{W}.weight"),
    "gptq unsaid": ({}, GPTQ, "gptq", f"{W}.weight"),
    "awq unsaid": ({}, AWQ, "awq", f"{W}.weight"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, NF4, "bitsandbytes", f"{W}.weight"),
    "bitsandbytes unsaid": ({}, NF4, "bitsandbytes", f"{W}.weight"),
    "bitsandbytes int8": (
        {}, {f"{W}.weight": ("I8", (8, 8)), f"{W}.SCB": ("F32", (8,)), f"{W}.weight_format": ("U8", ())},
        "bitsandbytes", f"{W}.weight",
    ),
    "mlx": (
        {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}},
        {f"{W}.weight": ("U32", (8, 1)), f"{W}.scales": ("F16", (8, 1)), f"{W}.biases": ("F16", (8, 1))},
        "mlx, 4 bits", f"{W}.weight",
    ),
    "mlx unsaid": (
        {}, {f"{W}.weight": ("U32", (8, 1)), f"{W}.scales": ("F16", (8, 1)), f"{W}.biases": ("F16", (8, 1))}, "mlx",
        f"{W}.weight",
    ),
    "in a part's config": ({"text_config": FP8}, BLOCKS, "fp8, blocks of 128×128", f"{W}.weight"),
    "deep in a config": ({"a_config": {"b_config": FP8}}, BLOCKS, "fp8, blocks of 128×128", f"{W}.weight"),
    "of no known name": (
        {"quantization_config": {"quant_method": "brand\nnew"}}, {"x.codes": ("I32", (8, 8))}, "brand?new", "x.codes",
    ),
    "hqq unsaid": ({}, {"x.W_q": ("U8", (8, 8)), "x.scale": ("F16", (8, 1))}, "hqq", "x.weight"),
    "quanto unsaid": (
        {}, {"x.weight._data": ("I8", (8, 8)), "x.weight._scale": ("F16", (8, 1))}, "quanto", "x.weight",
    ),
    "integers and a scale": (
        {}, {"x.weight": ("I8", (8, 8)), "x.scale": ("F32", (1,))}, "a scheme that config.json does not name",
        "x.weight",
    ),
    "float weights whose scales stayed": (
        FP8, {f"{W}.weight": ("BF16", (8, 8)), f"{W}.weight_scale": ("F32", (1, 1))}, "fp8", f"{W}.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEMES)
def test_schemes_and_the_tensors_that_store_a_weight(case):
    config, entries, name, weight = SCHEMES[case]
    found = scheme_of(config, headers({**entries, "model.norm.weight": ("BF16", (8,))}))
    assert found is not None
    assert str(found).startswith(name)
    assert set(found.weights) == {weight}
    assert set(found.weights[weight]) == set(entries)


PLAIN: dict[str, tuple[dict[str, Any], Headers]] = {
    "null": ({"quantization_config": None, "quantization": {}}, {f"{W}.weight": ("BF16", (8, 8))}),
    "the key stayed": (FP8, {f"{W}.weight": ("BF16", (8, 8)), "embeddings.position_ids": ("I64", (1, 8))}),
    "a plain cast": ({}, {f"{W}.weight": ("F8_E4M3", (8, 8)), "norm.weight": ("BF16", (8,))}),
    "scales of models": (
        {}, {"norm.scale": ("BF16", (8,)), "ls1.lambda1": ("F32", (8,)), "logit_scale": ("F32", ()),
             "logit": ("F32", ()), "a.weight": ("F32", (8, 8)), "a.weight_scale": ("F32", (8,)),
             "a.scale": ("F32", (8,)),
             "a.scales": ("F32", (8,)), "a.biases": ("F32", (8,)), "b.relative_position_index": ("I64", (4, 4)),
             "b.logit_scale": ("F32", (2,))},
    ),
    "masks": (FP8, {"h.0.attn.bias": ("U8", (1, 1, 8, 8)), "h.0.attn.c.weight": ("F32", (8, 8))}),
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN)
def test_what_only_looks_quantised(case):
    config, entries = PLAIN[case]
    assert scheme_of(config, headers(entries)) is None


def test_keys_are_found_and_taken_out_wherever_they_are():
    config = {"text_config": {"a": 1, **FP8}, "quantization": {"bits": 4}, "b": 2}
    assert [path for path, _ in keys_of(config)] == [("quantization",), ("text_config", "quantization_config")]
    assert without_keys(config) == {"text_config": {"a": 1}, "b": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`base` and `tune`; `fp8`, whose linear weights are stored in blocks, and `aqlm`, which nothing decodes."""
    folder = tmp_path_factory.mktemp("quantised")
    base = tiny_llama(folder / "base", seed=0)
    tiny_llama(folder / "tune", seed=1, base=base)
    config = {"model_type": "llama", "num_hidden_layers": 2, **FP8}
    tensors = {}
    for name, tensor in load_tensors(base).items():
        tensors[name] = tensor
        if "proj" in name:
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    make_checkpoint(folder / "fp8", tensors, config=config)
    codes = {}
    for name, tensor in load_tensors(base).items():
        start = name.removesuffix("weight")
        stored = {
            f"{start}codes": torch.zeros(4, 4, 1, dtype=torch.int8),
            f"{start}codebooks": torch.zeros(1, 256, 1, 8),
        }
        codes |= stored if "proj" in name else {name: tensor}
    aqlm = {"quant_method": "aqlm", "nbits_per_codebook": 8}
    make_checkpoint(folder / "aqlm", codes, config={"model_type": "llama", "quantization_config": aqlm})
    return folder


RECIPES = {
    "base": "base_model: ./aqlm\nmodels: [{model: ./tune}]\n",
    "model": "base_model: ./base\nmodels: [{model: ./aqlm}]\n",
    "linear": "merge_method: linear\nmodels: [{model: ./base}, {model: ./aqlm}]\nparameters: {weight: 1}\n",
    "base of an adapter": "base_model: ./base\nmodels: [{model: ./aqlm+./lora}]\n",
}


@pytest.mark.parametrize("case", RECIPES)
def test_check_refuses_by_name(models, capsys, case):
    if not (models / "lora").exists():
        (models / "lora").mkdir()
        write_json(models / "lora" / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
        start = "base_model.model.model.layers.0.mlp.up_proj.lora_"
        save_file({f"{start}A.weight": torch.zeros(2, 32), f"{start}B.weight": torch.zeros(48, 2)},
                  models / "lora" / "adapter_model.safetensors")  # fmt: skip
    (models / "r.yaml").write_text(RECIPES[case])
    code, out, err = call(capsys, "check", models / "r.yaml")
    assert code == 1
    assert not out
    assert "./aqlm: is quantised (aqlm): 14 tensors such as model.layers.0.mlp.down_proj.weight" in err
    assert "hint: merge the originals that are not quantised" in err


@pytest.mark.parametrize("command", ["inspect", "recommend", "extract"])
def test_other_commands_refuse_it_too(models, capsys, tmp_path, command):
    more = {"recommend": ["--density", "0.1"], "extract": ["--out", tmp_path / "out"], "inspect": []}[command]
    code, _, err = call(capsys, command, models / "tune", "--base", models / "aqlm", *more)
    assert code == 1
    assert "is quantised (aqlm" in err


def test_a_quantised_model_may_lend_its_tokenizer(models, tmp_path):
    tiny_llama(tmp_path / "a", seed=0, tokenizer=True)
    tiny_llama(tmp_path / "b", seed=1, base=tmp_path / "a", tokenizer=True)
    fp8 = load_tensors(models / "fp8")
    make_checkpoint(tmp_path / "fp8", fp8, config={"model_type": "llama", "vocab_size": 96, **FP8})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "fp8" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    text = "merge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {weight: 1}\n"
    for more in ("tokenizer_source: ./fp8\n", "base_model: ./fp8\ntokenizer_source: base\n"):
        (tmp_path / "r.yaml").write_text(text + more)
        assert make_plan(tmp_path / "r.yaml").outputs


def test_a_key_that_stayed_is_dropped_with_a_note(models, tmp_path):
    tune = models / "tune"
    config = json.loads((tune / "config.json").read_text())
    make_checkpoint(tmp_path / "tune", load_tensors(tune), config=config | FP8)
    (tmp_path / "r.yaml").write_text(f"base_model: {models / 'base'}\nmodels: [{{model: ./tune}}]\n")
    result = run(tmp_path / "r.yaml", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    note = "config.json: quantization_config (fp8) is dropped: no weight is quantised"
    assert note in result.plan.notes
    assert note in (tmp_path / "out" / "README.md").read_text()


def test_a_plain_cast_is_merged(models, tmp_path):
    for name in ("base", "tune"):
        tensors = {n: t.to(torch.float8_e4m3fn) for n, t in load_tensors(models / name).items()}
        make_checkpoint(tmp_path / name, tensors)
    (tmp_path / "r.yaml").write_text("base_model: ./base\nmodels: [{model: ./tune}]\n")
    assert len(make_plan(tmp_path / "r.yaml").outputs) == 21


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_no_weight_of_the_hub_is_fetched(server, models, capsys, tmp_path, command):
    server.repositories["org/aqlm"] = models / "aqlm"
    (tmp_path / "r.yaml").write_text(f"base_model: org/aqlm\nmodels: [{{model: {models / 'tune'}}}]\n")
    arguments = {"run": [tmp_path / "r.yaml"], "inspect": [models / "tune", "--base", "org/aqlm"]}[command]
    code, _, err = call(capsys, command, *arguments)
    assert code == 1
    assert "org/aqlm: is quantised (aqlm" in err
    assert all(span for _, span in server.fetched(".safetensors"))
