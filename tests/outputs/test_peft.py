"""`output.kind: peft`: what is written loads with plain PEFT and is what `kind: model` writes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import LLAMA, adapt, close, load, peft
from conftest import load_tensors, tiny_llama
from running import make_plan, run
from safetensors.torch import load_file
from tiny_models import batches, make

from deltamerge.engine.execute import computed
from deltamerge.errors import DeltamergeError, InputError, RecipeError
from deltamerge.formats.peft.shira import Candidate, choose_rank, difference
from deltamerge.run.lock import verify
from deltamerge.tensors.reader import Reader

SHIRA = """
base_model: base
models:
  - model: tuned
    prune: {{method: magnitude, density: 0.02, q: 0.5}}
{more}
output: {{kind: {kind}}}
"""


def tune(folder: Path, base: Path, architecture: str, *, only: str = "", dtype: torch.dtype = torch.float32) -> None:
    """A fine-tune of every tensor whose name holds `only`."""
    model = load(architecture, base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)


def both(folder: Path, recipe: str, more: str = "") -> tuple[Path, Path]:
    """The recipe run into a model and into an adapter."""
    for kind in ("model", "peft"):
        (folder / f"{kind}.yaml").write_text(recipe.format(kind=kind, more=more))
        run(folder / f"{kind}.yaml", folder / f"out-{kind}")
    assert not run(folder / "peft.yaml", folder / "out-peft").made  # it is up to date
    assert verify(folder / "out-peft", 1)
    return folder / "out-model", folder / "out-peft"


def adapted(architecture: str, base: Path, adapter: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load(architecture, base, **settings), adapter)
    return model.eval()


def outputs(model: Any, architecture: str) -> list[torch.Tensor]:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [model(**batch)[0] for batch in batches(architecture)]


def agree(architecture: str, base: Path, model: Path, adapter: Path, *, exact: bool, **settings: Any) -> Any:
    """The adapted base computes what the model does, and merges to the same weights."""
    got = adapted(architecture, base, adapter, **settings)
    want = load(architecture, model, **settings)
    for one, two in zip(outputs(got, architecture), outputs(want, architecture), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    merged, truth = dict(got.merge_and_unload().state_dict()), dict(want.state_dict())
    assert merged.keys() == truth.keys()
    for name, tensor in truth.items():
        if exact:
            assert torch.equal(merged[name], tensor), name
    close(truth, merged)
    return json.loads((adapter / "adapter_config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_as_shira(tmp_path: Path, dtype: torch.dtype) -> None:
    make("LlamaForCausalLM", tmp_path / "base", hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    tune(tmp_path / "base", tmp_path / "base", "LlamaForCausalLM", only="none", dtype=dtype)
    tune(tmp_path / "tuned", tmp_path / "base", "LlamaForCausalLM", only="layers", dtype=dtype)
    model, adapter = both(tmp_path, SHIRA)
    config = agree("LlamaForCausalLM", tmp_path / "base", model, adapter, exact=True)
    assert (config["peft_type"], config["task_type"], config["r"]) == ("SHIRA", "CAUSAL_LM", 1)
    assert len(config["target_modules"]) == 21
    # 0.02 of a norm's 64 entries is one: the norms are stored whole
    assert config["modules_to_save"] == sorted(
        f"model.layers.{i}.{norm}" for i in range(3) for norm in ("input_layernorm", "post_attention_layernorm")
    )
    assert {p.name for p in adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml", "recipe.lock"
    }  # fmt: skip
    card = (adapter / "README.md").read_text()
    assert "library_name: peft" in card
    assert "base_model_relation: adapter" in card
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, indices in tensors.items():
        if name.endswith("shira_indices"):
            flat = indices[0].long() * 1000 + indices[1]
            assert (flat.diff() > 0).all()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    make("LlamaForCausalLM", tmp_path / "base", hidden_size=64, intermediate_size=96)
    tune(tmp_path / "tuned", tmp_path / "base", "LlamaForCausalLM")
    model, adapter = both(tmp_path, SHIRA)
    config = agree("LlamaForCausalLM", tmp_path / "base", model, adapter, exact=True)
    assert "model.norm" in config["modules_to_save"]
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert "base_model.model.model.embed_tokens.weight" in names


def test_bert_with_a_head_and_biases(tmp_path: Path) -> None:
    """A base without head, biases and LayerNorms that changed."""
    make("BertModel", tmp_path / "base", hidden_size=64, intermediate_size=96)
    architecture = "BertForSequenceClassification"
    tune(tmp_path / "tuned", tmp_path / "base", architecture)
    model, adapter = both(tmp_path, SHIRA)
    config = agree(architecture, tmp_path / "base", model, adapter, exact=True)
    assert {"classifier", "bert.embeddings.word_embeddings"} <= set(config["modules_to_save"])
    assert "bert.encoder.layer.0.attention.self.query" in config["target_modules"]
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias" in names
    assert "stored whole, as modules_to_save" in (adapter / "README.md").read_text()


def test_gpt2_has_no_linear_layers(tmp_path: Path) -> None:
    make("GPT2LMHeadModel", tmp_path / "base")
    tune(tmp_path / "tuned", tmp_path / "base", "GPT2LMHeadModel")
    (tmp_path / "r.yaml").write_text(SHIRA.format(kind="peft", more=""))
    with pytest.raises(InputError, match="GPT2LMHeadModel has no linear layer that changed"):
        run(tmp_path / "r.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_fine_tunes_in_the_dtype_of_the_output(tmp_path: Path) -> None:
    make("LlamaForCausalLM", tmp_path / "base", hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    tune(tmp_path / "tuned", tmp_path / "base", "LlamaForCausalLM", only="self_attn")
    tune(tmp_path / "other", tmp_path / "base", "LlamaForCausalLM", only="mlp")
    more = "  - {model: other, prune: {method: dare, density: 0.03}}\nmerge_method: ties\n"
    more += "parameters: {weight: 1.0}\ndtype: bfloat16"
    model, adapter = both(tmp_path, SHIRA, more)
    config = agree("LlamaForCausalLM", tmp_path / "base", model, adapter, exact=True, dtype=torch.bfloat16)
    assert len(config["target_modules"]) == 21
    assert config["modules_to_save"] is None


def test_resized_embeddings_are_refused(tmp_path: Path) -> None:
    make("LlamaForCausalLM", tmp_path / "base", hidden_size=64, tie_word_embeddings=False)
    make("LlamaForCausalLM", tmp_path / "tuned", hidden_size=64, tie_word_embeddings=False, vocab_size=70)
    (tmp_path / "r.yaml").write_text(SHIRA.format(kind="peft", more="tokenizer_source: tuned"))
    with pytest.raises(InputError, match="an adapter cannot resize its base"):
        make_plan(tmp_path / "r.yaml")


def test_rank_is_chosen_for_the_fewest_bytes() -> None:
    square = {f"l{i}": Candidate((64, 64), 100, 64 * 64 * 4) for i in range(9)}
    assert choose_rank(square) == (1, tuple(square))
    rank, sparse = choose_rank(square | {"dense": Candidate((64, 64), 3000, 64 * 64 * 4)})
    assert (rank, sparse) == (1, tuple(square))
    assert choose_rank({"one": Candidate((1, 64), 3, 256)}) == (1, ())


def test_differences_are_exact_where_a_float_allows() -> None:
    rng = np.random.default_rng(0)
    old = rng.standard_normal(200_000).astype(np.float32)
    new = old + (rng.standard_normal(200_000) * 10 ** rng.uniform(-6, 3, 200_000)).astype(np.float32)
    found = difference(old, new)
    plain = new - old
    assert np.mean(old + found == new) >= np.mean(old + plain == new)
    assert np.mean(old + found == new) > 0.999


LORA = """
base_model: base
models:
  - model: base+adapter
    prune: {{method: {method}, density: 0.4{q}}}
seed: 5
output: {{kind: peft}}
"""


@pytest.mark.parametrize(
    ("method", "q"), [("dare", ""), ("dare", ", q: 0.7"), ("magnitude", ", q: 0.5"), ("none", None)]
)
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("LlamaForCausalLM", LLAMA | {"modules_to_save": ["lm_head"], "use_rslora": True}),
        ("GPT2LMHeadModel", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True, "bias": "all"}),
        ("BertForSequenceClassification", {"target_modules": ["query"], "task_type": "SEQ_CLS", "use_dora": True}),
    ],
)
def test_own_weights_of_a_lora(
    tmp_path: Path, architecture: str, settings: dict[str, Any], method: str, q: str | None
) -> None:
    make(architecture, tmp_path / "base", **({"tie_word_embeddings": False} if "Llama" in architecture else {}))
    adapt(load(architecture, tmp_path / "base"), tmp_path / "adapter", **settings)
    text = LORA.format(method=method, q=q)
    (tmp_path / "r.yaml").write_text(text.replace(", density: 0.4None", ""))
    result = run(tmp_path / "r.yaml", tmp_path / "out")
    assert not run(tmp_path / "r.yaml", tmp_path / "out").made
    assert verify(tmp_path / "out", 1)
    old = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    divisor = {"": 0.4, ", q: 0.7": 0.7, ", q: 0.5": 0.5}[q] if q is not None else 1.0
    factors = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    for name, tensor in old.items():
        kept = new[name] != 0
        if not name.endswith(factors) or method == "none":
            assert torch.equal(tensor, new[name]), name
        else:
            assert torch.equal(new[name][kept], (tensor / torch.tensor(divisor))[kept]), name
            if method == "magnitude":
                assert int(kept.sum()) == round(0.4 * tensor.numel())
    (tmp_path / "m.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+out}]\n")
    run(tmp_path / "m.yaml", tmp_path / "merged")
    want = dict(adapted(architecture, tmp_path / "base", tmp_path / "out").merge_and_unload().state_dict())
    got = load_tensors(tmp_path / "merged")
    if architecture.startswith("GPT2"):  # peft's merge changes the tied head too
        got.pop("lm_head.weight")
    close(got, want)
    assert result.plan.layout.files[0].name == "adapter_model.safetensors"
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (
        tmp_path / "adapter" / "adapter_config.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("models: [{model: base+adapter, parameters: {weight: 0.5}}]", "models\\[0\\].parameters.weight: must be 1"),
        ("models: [{model: base+adapter}]\nparameters: {lambda: 2}", "parameters.lambda: must be 1"),
        (
            "models: [{model: base+adapter, prune: {method: dare, density: 0.1, q: layer_mse}}]\n"
            "calibration: {data: c.jsonl}",
            "output.kind: peft cannot use layer_mse",
        ),
        (
            "models: [{model: base+adapter, prune: {method: wanda, density: 0.1}}]\ncalibration: {data: c.jsonl}",
            "output.kind: peft cannot use wanda",
        ),
        ("models: [{model: base+adapter}]\nmerge_method: linear\nparameters: {weight: 1}", "peft needs the deltas"),
        ("models: [{model: other+adapter}]", "not an adapter on base_model"),
    ],
)
def test_what_an_adapter_cannot_be_made_of(tmp_path: Path, recipe: str, message: str) -> None:
    for name in ("base", "other"):
        make("LlamaForCausalLM", tmp_path / name)
    adapt(load("LlamaForCausalLM", tmp_path / "base"), tmp_path / "adapter", **LLAMA)
    (tmp_path / "r.yaml").write_text(f"base_model: base\noutput: {{kind: peft}}\n{recipe}\n")
    with pytest.raises(DeltamergeError, match=message) as caught:
        make_plan(tmp_path / "r.yaml")
    assert isinstance(caught.value, RecipeError | InputError)


CALIBRATED = """
base_model: base
models: [{{model: base+adapter, name: t, prune: {{method: {method}, density: 0.5, q: {q}{more}}}}}]
calibration: {{data: calib.jsonl, sequences: 6, length: 12, seeds: 2}}
output: {{kind: peft}}
"""


@pytest.mark.parametrize(
    ("method", "q", "more"),
    [
        ("dare", "output_change", ""),
        ("dare", "{objective: output_change, scope: layer}", ""),
        ("magnitude", "output_change", ""),
        ("magnitude", "{objective: output_change, scope: layer, search: gradient}", ""),
        ("magnitude", "output_change", ", exclude: [lora_A]"),
    ],
)
def test_calibrated_q_of_own_weights(tmp_path: Path, method: str, q: str, more: str) -> None:
    """q is of the update B A, each of its pruned factors is divided by the root."""
    tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32, tokenizer=True)
    adapt(load("LlamaForCausalLM", tmp_path / "base"), tmp_path / "adapter", **LLAMA)
    lines = [json.dumps({"text": " ".join(f"w{4 + (7 * i + j) % 92}" for j in range(8))}) for i in range(20)]
    (tmp_path / "calib.jsonl").write_text("\n".join(lines))
    (tmp_path / "r.yaml").write_text(CALIBRATED.format(method=method, q=q, more=more))
    entry = run(tmp_path / "r.yaml", tmp_path / "out").lock["calibration"]["t"]
    modules = {"self_attn.q_proj", "mlp.down_proj"}
    weights = {f"model.layers.{layer}.{module}.weight" for layer in range(2) for module in modules}
    assert set(entry["q"]) <= weights
    old = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for weight in weights:
        for side in "AB":
            name = f"base_model.model.{weight.removesuffix('.weight')}.lora_{side}.weight"
            kept = new[name] != 0
            root = entry["q"].get(weight, 1.0) if more else entry["q"].get(weight, 1.0) ** 0.5
            if more and side == "A":
                assert torch.equal(new[name], old[name])
            else:
                assert 0 < int(kept.sum()) < kept.numel()
                torch.testing.assert_close(new[name][kept], old[name][kept] / root)
    (tmp_path / "r.lock").write_bytes((tmp_path / "out" / "recipe.lock").read_bytes())
    again = run(tmp_path / "r.yaml", tmp_path / "again", locked=True).folder
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_objective_is_that_of_the_adapted_model(tmp_path: Path) -> None:
    """The mask of the product that calibration sees is the update of the adapter that is written."""
    make("GPT2LMHeadModel", tmp_path / "base")
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapt(load("GPT2LMHeadModel", tmp_path / "base"), tmp_path / "adapter", **settings)
    (tmp_path / "c.jsonl").write_text("\n".join(['{"text": "a"}'] * 20))
    text = CALIBRATED.replace("calib.jsonl", "c.jsonl").format(method="magnitude", q="output_change", more="")
    (tmp_path / "r.yaml").write_text(text)
    planned = make_plan(tmp_path / "r.yaml", data=False)
    (tmp_path / "n.yaml").write_text(text.replace("output_change", "1.0").replace("calibration", "# "))
    run(tmp_path / "n.yaml", tmp_path / "out")
    merged = adapted("GPT2LMHeadModel", tmp_path / "base", tmp_path / "out").merge_and_unload().state_dict()
    base = load_tensors(tmp_path / "base")
    ((stage, spec),) = planned.specs.items()
    assert len(spec.pruned) == 9
    (model,) = spec.models(stage.inputs)
    (masked,) = model.masks
    for pruned in spec.pruned:
        node = masked[pruned.stored]
        with Reader() as reader:
            made = computed({pruned.name: node}, reader)[pruned.name]
        got = torch.from_numpy(made.view(np.float32)).view(base[pruned.name].shape)
        torch.testing.assert_close(got, merged[pruned.name] - base[pruned.name], rtol=1e-4, atol=1e-6)
