"""Merges over packed bases: what comes out is what a merge over the decoded base gives, byte for byte, and loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from adapters import write_adapter
from conftest import load_tensors, make_checkpoint, tiny_llama
from packed_files import CASES, awq, gptq, mlx_floats, mxfp4
from running import run

from deltamerge.apps.inspect.diff import diff
from deltamerge.formats.quantised.scheme import KEPT
from deltamerge.models.checkpoint import decoded, open_checkpoint
from deltamerge.tensors.reader import Reader

RECIPES = Path(__file__).parents[2] / "recipes"
GPT_OSS = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def plain(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint with its weights decoded, in float32."""
    tensors = {}
    with Reader() as reader:
        for name, info in decoded(open_checkpoint(folder)).tensors.items():
            if info.kind == "stored":
                tensors[name] = load_tensors(folder)[name]
                continue
            values = np.empty(info.shape, np.float32)
            reader.read_into(info, 0, values)
            tensors[name] = torch.from_numpy(values)
    config = json.loads((folder / "config.json").read_text())
    return make_checkpoint(out, tensors, config={k: v for k, v in config.items() if k != "quantization_config"})


def gpt_oss(folder: Path) -> None:
    """`base-mxfp4`, its experts in blocks, and two fine-tunes in bfloat16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**GPT_OSS)).to(torch.bfloat16)
        model.save_pretrained(folder / "plain")
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_tensors(folder / "plain").items():
            if name.endswith(("gate_up_proj", "down_proj")):
                rows, columns = tensor.shape[2], tensor.shape[1]
                blocks = torch.randint(0, 256, (len(tensor), rows, columns // 32, 16), dtype=torch.uint8)
                tensors[f"{name}_blocks"] = blocks
                tensors[f"{name}_scales"] = torch.randint(118, 122, blocks.shape[:-1], dtype=torch.uint8)
            else:
                tensors[name] = tensor
        config = json.loads((folder / "plain" / "config.json").read_text())
        make_checkpoint(
            folder / "base-mxfp4", tensors, config=config | {"quantization_config": {"quant_method": "mxfp4"}}
        )
        base = load_tensors(plain(folder / "base-mxfp4", folder / "decoded"))
        for task in ("code", "math"):
            tuned = {n: (t.float() + 1e-2 * torch.randn(t.shape)).to(torch.bfloat16) for n, t in base.items()}
            make_checkpoint(folder / task, tuned, config=config)


def test_the_mxfp4_recipe_merges_gpt_oss(tmp_path):
    gpt_oss(tmp_path / "models")
    text = (RECIPES / "mxfp4.yaml").read_text()
    (tmp_path / "r.yaml").write_text(text)
    (tmp_path / "plain.yaml").write_text(text.replace("base-mxfp4", "decoded"))
    result = run(tmp_path / "r.yaml", tmp_path / "out")
    plain_plan = run(tmp_path / "plain.yaml", tmp_path / "expected").plan
    assert result.plan.peak_bytes == plain_plan.peak_bytes + KEPT  # what is kept of the experts' codes
    merged, expected = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    assert all(merged[name].dtype == torch.bfloat16 for name in merged)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert any("quantization" in note or "mxfp4" in note for note in result.plan.notes), result.plan.notes
    model, info = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj.to(torch.bfloat16),
                       merged["model.layers.0.mlp.experts.gate_up_proj"])  # fmt: skip


# of more than 2^16 elements where they are turned inside the loop: its pieces end within rows
MERGED = {
    "mxfp4": lambda: mxfp4(500, 1),
    "gptq of 3 bits": lambda: gptq(3, outputs=736),
    "gptq of 4 bits": lambda: gptq(4, outputs=736),
    "gptq of 8 bits": lambda: gptq(8, outputs=736, ordered=False),
    "awq": lambda: awq(24, 1000),
    "mlx of small floats": lambda: mlx_floats(300),
    **{name: CASES[name] for name in CASES if name[:3] in ("nf4", "fp4", "nvf", "mlx", "int") or "compressed" in name},
}


@pytest.mark.parametrize("case", MERGED)
def test_a_merge_over_any_form_is_that_over_its_values(case, tmp_path):
    packed = MERGED[case]()
    config = {"model_type": "x", "dtype": "bfloat16"}
    make_checkpoint(tmp_path / "base", packed.tensors, config=config | {"quantization_config": packed.config})
    plain(tmp_path / "base", tmp_path / "decoded")
    generator = torch.Generator().manual_seed(0)
    for tune in "ab":
        values = {n: torch.from_numpy(v).float().contiguous() for n, v in packed.values.items()}
        tuned = {n: (v + 0.01 * torch.randn(v.shape, generator=generator)).bfloat16() for n, v in values.items()}
        make_checkpoint(tmp_path / tune, tuned, config=config)
    for method, given in (("ties", "density: 0.5, "), ("dare_ties", "density: 0.03, "), ("task_arithmetic", "")):
        text = f"merge_method: {method}\nmodels: [{{model: ./a}}, {{model: ./b}}]\ndtype: bfloat16\n"
        text += f"parameters: {{{given}weight: 0.5}}\n"
        for base in ("base", "decoded"):
            path = tmp_path / f"{base}.yaml"
            path.write_text(text + f"base_model: ./{base}\n")
            run(path, tmp_path / f"{method}-{base}")
        merged, expected = (load_tensors(tmp_path / f"{method}-{base}") for base in ("base", "decoded"))
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_a_merge_over_a_gguf_base_loads(tmp_path):
    from gguf_files import write

    write(tmp_path / "base.gguf", "llama", types=("Q8_0", "F16", "Q4_1"))
    base = decoded(open_checkpoint(tmp_path / "base.gguf"))
    tensors: dict[str, torch.Tensor] = {}
    with Reader() as reader:
        for name, info in base.tensors.items():
            raw = np.empty(info.shape, np.float32 if info.dtype == "F32" else np.uint16)
            reader.read_into(info, 0, raw)
            tensors[name] = torch.from_numpy(raw if info.dtype == "F32" else raw.view(np.float16).astype(np.float32))
    config = base.config | {"dtype": "bfloat16"}
    make_checkpoint(tmp_path / "plain", tensors, config=config)
    generator = torch.Generator().manual_seed(0)
    for task in ("a", "b"):
        tuned = {n: (t + 1e-2 * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in tensors.items()}
        make_checkpoint(tmp_path / task, tuned, config=config)
    text = "merge_method: ties\nbase_model: ./{}\nmodels: [{{model: ./a}}, {{model: ./b}}]\n"
    text += "parameters: {{weight: 0.5, density: 0.5}}\ndtype: bfloat16\n"
    for name, base_name in (("out", "base.gguf"), ("expected", "plain")):
        (tmp_path / f"{name}.yaml").write_text(text.format(base_name))
        result = run(tmp_path / f"{name}.yaml", tmp_path / name)
        if name == "out":
            said = result.plan.notes
    merged, expected = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert any("transformers makes config.json" in note for note in said)
    assert any("a tokenizer that transformers cannot make" in note for note in said)
    differ = diff(str(tmp_path / "base.gguf"), str(tmp_path / "plain"), 1)
    assert (differ["kind"], differ["changed"]) == ("checkpoints", 0)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_an_adapter_over_four_bits_is_merged_into_their_values(tmp_path):
    from bitsandbytes import functional

    base = tiny_llama(tmp_path / "base", seed=0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(base).items():
        tensors[name] = tensor
        if "proj" in name:
            tensors[name], state = functional.quantize_4bit(tensor.float(), quant_type="nf4", compress_statistics=True)
            tensors |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    config = json.loads((base / "config.json").read_text())
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    make_checkpoint(tmp_path / "nf4", tensors, config=config | {"quantization_config": said})
    plain(tmp_path / "nf4", tmp_path / "values")
    write_adapter(tmp_path / "lora", 3)
    for name in ("nf4", "values"):
        (tmp_path / f"{name}.yaml").write_text(
            f"merge_method: passthrough\nmodels: [{{model: ./{name}+./lora}}]\ndtype: bfloat16\n"
        )
        run(tmp_path / f"{name}.yaml", tmp_path / f"{name}-out")
    merged, expected = load_tensors(tmp_path / "nf4-out"), load_tensors(tmp_path / "values-out")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[name], load_tensors(base)[name])
