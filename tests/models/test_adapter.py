"""LoRA adapters named as models; PEFT, which made them, is the judge."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import LLAMA, adapt, close, load, peft
from conftest import load_tensors, tiny_llama, write_json
from running import make_plan, run
from safetensors.torch import load_file, save_file
from tiny_models import make

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.models import hub
from deltamerge.tensors import patterns
from deltamerge.tensors.dtypes import torch_dtype
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.views import ordered_product

transformers = pytest.importorskip("transformers")


def merged(architecture: str, base: Path, adapter: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """What PEFT makes of base and adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load(architecture, base, **settings), adapter).merge_and_unload()
    return dict(model.state_dict())


def expanded(reference: str, folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of base+adapter, as the readers of deltamerge see it."""
    checkpoint = hub.open_model(reference, folder, weights=False)
    tensors = {}
    with Reader() as reader:
        for name, info in checkpoint.tensors.items():
            raw = torch.empty(info.nbytes, dtype=torch.uint8)
            reader.read_into(info, 0, raw.numpy())
            assert info.name == name
            tensors[name] = raw.view(torch_dtype(info.dtype)).view(info.shape)
    return tensors


GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 3}
BERT = {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "r": 2}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("LlamaForCausalLM", LLAMA),
        ("LlamaForCausalLM", LLAMA | {"use_rslora": True}),
        ("LlamaForCausalLM", LLAMA | {"rank_pattern": {"q_proj": 2, "down_proj": 5}, "alpha_pattern": {"1.*proj": 3}}),
        ("LlamaForCausalLM", LLAMA | {"use_dora": True}),
        ("LlamaForCausalLM", LLAMA | {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
        ("GPT2LMHeadModel", GPT2),
        ("GPT2LMHeadModel", GPT2 | {"bias": "all"}),
        ("GPT2LMHeadModel", GPT2 | {"target_modules": ["c_proj", "wpe"], "bias": "lora_only"}),
        ("GPT2LMHeadModel", GPT2 | {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]}),
        ("BertForSequenceClassification", BERT),
        ("BertForSequenceClassification", BERT | {"bias": "lora_only", "use_dora": True}),
        ("BertForSequenceClassification", BERT | {"target_modules": ["word_embeddings", "value"]}),
        ("BertModel", BERT | {"task_type": "FEATURE_EXTRACTION"}),
    ],
)
def test_as_peft_merges(tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    make(architecture, tmp_path / "base", **({"tie_word_embeddings": False} if "Llama" in architecture else {}))
    adapt(load(architecture, tmp_path / "base"), tmp_path / "adapter", **settings)
    got, base = expanded("base+adapter", tmp_path), load_tensors(tmp_path / "base")
    want = merged(architecture, tmp_path / "base", tmp_path / "adapter")
    assert got.keys() == base.keys()
    close(got, want)
    assert sum(not torch.equal(got[name], base[name]) for name in base) >= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_to_the_dtype_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    model, _ = make("LlamaForCausalLM", tmp_path / "base")
    model.to(dtype).save_pretrained(tmp_path / "base")
    adapt(load("LlamaForCausalLM", tmp_path / "base"), tmp_path / "adapter", **LLAMA)
    got = expanded("base+adapter", tmp_path)
    want = merged("LlamaForCausalLM", tmp_path / "base", tmp_path / "adapter")
    close(got, want, 1 / 128)
    differ = sum(int((got[name] != want[name]).sum()) for name in got)
    assert differ <= 3  # sums in another order, where they fall on a tie


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    """An adapter of BertForSequenceClassification on a BertModel: names as in the adapted model, config with labels."""
    make("BertModel", tmp_path / "base")
    model = load("BertForSequenceClassification", tmp_path / "base", num_labels=3)
    adapt(model, tmp_path / "adapter", **BERT)
    (tmp_path / "r.yaml").write_text("base_model: base\nmodels: [{model: base+adapter}]\n")
    run(tmp_path / "r.yaml", tmp_path / "out")
    want = merged("BertForSequenceClassification", tmp_path / "base", tmp_path / "adapter", num_labels=3)
    got = load_tensors(tmp_path / "out")
    assert got.keys() == want.keys()
    close(got, want)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 3
    close(dict(load("BertForSequenceClassification", tmp_path / "out").state_dict()), want)


@pytest.mark.parametrize("settings", [{"target_modules": ["wte", "c_attn"]}, {"target_modules": ["lm_head"]},
                                      {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
                                      {"target_modules": ["lm_head", "c_proj"]},
                                      {"target_modules": ["lm_head"], "init_lora_weights": "pissa"},
                                      {"target_modules": ["lm_head", "wte"], "init_lora_weights": "olora"}]
)  # fmt: skip
def test_a_tied_head_is_untied_as_the_adapted_model_computes(tmp_path: Path, settings: dict[str, Any]) -> None:
    make("GPT2LMHeadModel", tmp_path / "base")
    adapt(load("GPT2LMHeadModel", tmp_path / "base"), tmp_path / "adapter", r=3, **settings)
    (tmp_path / "r.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+adapter}]\n")
    run(tmp_path / "r.yaml", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.arange(3, 23)[None]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(load("GPT2LMHeadModel", tmp_path / "base"), tmp_path / "adapter")
        want = adapted.eval()(ids).logits
        got = load("GPT2LMHeadModel", tmp_path / "out")(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make("LlamaForCausalLM", tmp_path / "base")
    adapt(load("LlamaForCausalLM", tmp_path / "base"), tmp_path / "adapter", **LLAMA)
    return tmp_path


def test_the_same_bytes_whatever_the_tiles(llama: Path) -> None:
    checkpoint = hub.open_model("base+adapter", llama, weights=False)
    whole = expanded("base+adapter", llama)
    with Reader() as reader:
        for name, info in checkpoint.tensors.items():
            flat, size = whole[name].reshape(-1), whole[name].element_size()
            for start in range(0, flat.numel(), 37):
                piece = torch.empty(min(37, flat.numel() - start), dtype=flat.dtype)
                reader.read_into(info, start, piece.view(torch.uint8).numpy())
                assert torch.equal(piece, flat[start : start + 37]), (name, start, size)


def test_kernels_and_numpy_give_the_same_bits() -> None:
    native = kernels.native() or pytest.skip("no compiled kernels here")
    generator = torch.Generator().manual_seed(0)
    for rows, rank, columns in ((1, 1, 1), (5, 3, 7), (33, 16, 257), (64, 64, 1000)):
        left, right = (torch.randn(*shape, generator=generator).numpy() for shape in ((rows, rank), (rank, columns)))
        one, two = np.empty((rows, columns), np.float32), np.empty((rows, columns), np.float32)
        ordered_product(left, right, one)
        native.ordered_product(left, right, two, rows, rank, columns)
        assert one.tobytes() == two.tobytes()
        np.testing.assert_allclose(one, left.astype(np.float64) @ right.astype(np.float64), rtol=1e-4, atol=1e-4)


RECIPE = """
base_model: base
models:
  - model: base+adapter
    prune: {method: dare, density: 0.5}
  - model: base+other
    parameters: {weight: 0.5}
    prune: {method: magnitude, density: 0.5}
merge_method: task_arithmetic
parameters: {weight: 1.0}
dtype: bfloat16
"""


def test_merged_like_any_model_on_any_number_of_workers(llama: Path) -> None:
    adapt(load("LlamaForCausalLM", llama / "base"), llama / "other", seed=1, **LLAMA | {"r": 2})
    (llama / "r.yaml").write_text(RECIPE)
    one = run(llama / "r.yaml", llama / "one", workers=1)
    run(llama / "r.yaml", llama / "two", workers=3, memory=one.plan.peak_bytes)
    assert (llama / "one" / "model.safetensors").read_bytes() == (llama / "two" / "model.safetensors").read_bytes()
    for name in ("adapter", "other"):
        (llama / "p.yaml").write_text(f"merge_method: passthrough\nmodels: [{{model: base+{name}}}]\n")
        run(llama / "p.yaml", llama / f"full-{name}")
        close(load_tensors(llama / f"full-{name}"), merged("LlamaForCausalLM", llama / "base", llama / name))
    full = RECIPE.replace("base+adapter", "full-adapter\n    name: base+adapter").replace("base+other", "full-other")
    (llama / "f.yaml").write_text(full)
    run(llama / "f.yaml", llama / "three")
    assert (llama / "one" / "model.safetensors").read_bytes() == (llama / "three" / "model.safetensors").read_bytes()
    files = one.lock["inputs"]["base+adapter"]["files"]
    assert {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"} <= files.keys()


CALIBRATED = """
base_model: base
models: [{{model: {model}, name: t, prune: {{method: wanda, density: 0.2, q: output_change}}}}]
calibration: {{data: calib.jsonl, sequences: 6, length: 12}}
"""


def test_calibrated_like_any_model(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32, tokenizer=True)
    adapt(load("LlamaForCausalLM", tmp_path / "base"), tmp_path / "adapter", **LLAMA)
    lines = [json.dumps({"text": " ".join(f"w{4 + (7 * i + j) % 92}" for j in range(8))}) for i in range(20)]
    (tmp_path / "calib.jsonl").write_text("\n".join(lines))
    (tmp_path / "p.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+adapter}]\n")
    run(tmp_path / "p.yaml", tmp_path / "full")
    for name, model in (("one", "base+adapter"), ("two", "full")):
        (tmp_path / f"{name}.yaml").write_text(CALIBRATED.format(model=model))
    one = run(tmp_path / "one.yaml", tmp_path / "out-one").lock["calibration"]["t"]
    two = run(tmp_path / "two.yaml", tmp_path / "out-two").lock["calibration"]["t"]
    assert one["value"] == pytest.approx(two["value"])
    assert one["forward_passes"] > 6
    got, want = load_tensors(tmp_path / "out-one"), load_tensors(tmp_path / "out-two")
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def test_plan_reads_headers_only(llama: Path) -> None:
    (llama / "r.yaml").write_text("base_model: base\nmodels: [{model: base+adapter}]\n")
    path = llama / "adapter" / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\xff" * 4)
    planned = make_plan(llama / "r.yaml")
    assert sum(p.kind != "stored" for p in planned.inputs.tunes[0].checkpoint.tensors.values()) == 6


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is not supported"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters names experts.gate_up_proj"),
        ({"lora_bias": True}, "no lora_B.bias, which lora_bias needs"),
        ({"use_something_new": True}, "use_something_new is not supported"),
        ({"some_new_config": {"a": 1}}, "some_new_config is not supported"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
        ({"r": 8}, "rank 4, adapter_config.json says 8"),
        ({"r": 0}, "r must be a positive number"),
        ({"lora_alpha": "8"}, "lora_alpha must be a positive number"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"rank_pattern": {"(.|.|.|.|.)*[A-Z]$": 2}}, "takes more than 0.05 s to search"),
    ],
)
def test_settings_that_are_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    edit(llama / "adapter", **changes)
    with pytest.raises(InputError, match=message) as caught:
        hub.open_model("base+adapter", llama, weights=False)
    assert str(caught.value).startswith("adapter: ")
    assert "\n" not in str(caught.value)


def test_settings_that_are_let_pass(llama: Path) -> None:
    before = expanded("base+adapter", llama)
    edit(llama / "adapter", some_new_key=3, use_new=False, new_config=None, inference_mode=False, lora_dropout=0.1)
    assert all(torch.equal(before[name], tensor) for name, tensor in expanded("base+adapter", llama).items())


def broken(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in (load_file(path) | changes).items() if v is not None}, path)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: None}, "needs A and B, has B"),
        ({A: torch.zeros(3, 16)}, "ranks of A"),
        ({A: torch.zeros(4, 15)}, "B A gives"),
        ({A: torch.zeros(4)}, "no matrices"),
        ({A: torch.zeros(4, 16, 1, 1)}, "B A gives"),
        ({"x.lora_A.weight": torch.zeros(4, 16)}, "does not begin with base_model.model."),
        ({"base_model.model.x.lora_Z": torch.zeros(4)}, "not a tensor of an adapter"),
        ({A: torch.zeros(4, 16, dtype=torch.int32)}, "dtype I32"),
        ({A.replace("q_p", "p"): torch.zeros(4, 16), B.replace("q_p", "p"): torch.zeros(16, 4)}, "the base has no"),
        ({"base_model.model.model.norm.weight": torch.zeros(17)}, "has the shape"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(llama: Path, tensors: dict[str, torch.Tensor | None], message: str) -> None:
    broken(llama / "adapter", **tensors)
    with pytest.raises(InputError, match=message):
        hub.open_model("base+adapter", llama, weights=False)


def test_pickles_and_folders_that_are_no_adapters(llama: Path) -> None:
    (llama / "adapter" / "adapter_model.safetensors").rename(llama / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError, match="never unpickles") as caught:
        hub.open_model("base+adapter", llama, weights=False)
    assert "pickles: true" in (caught.value.hint or "")
    with pytest.raises(InputError, match="not a PEFT adapter"):
        hub.open_model("base+base", llama, weights=False)
    with pytest.raises(InputError, match="base\\+adapter\\+adapter: more than one adapter"):
        hub.open_model("base+adapter+adapter", llama, weights=False)
    with pytest.raises(InputError, match="adapter: is an adapter, not a model"):
        hub.open_model("adapter", llama, weights=False)
