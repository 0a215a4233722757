"""Mixtures of experts: every family of transformers is loaded, measured and calibrated, however its experts are stored.

A family is a model type of transformers, built small from its default config. `python -m pytest -m slow
tests/calibrate/test_moe.py` walks them all.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from calibration_rows import rows
from conftest import load_tensors, write_tokenizer
from running import activations_of, make_plan, run
from safetensors.numpy import load_file as load_rows
from safetensors.torch import load_file, save_file
from test_families import small

from deltamerge.calibrate.model.blocks import BlockModel, from_reader
from deltamerge.calibrate.model.layers import MatrixCut
from deltamerge.calibrate.q.statistics import LayerStatistics, collect, drawn
from deltamerge.calibrate.rows.heads import LANGUAGE_HEADS
from deltamerge.errors import InputError
from deltamerge.tensors.names import numbers_as_stars, stacked_transposed

DENSITY = 0.3
RECIPE = """\
base_model: ./base
models: [{model: ./tuned, name: t, prune: {method: %s, density: 0.3, exclude: [lm_head, embed], q: %s}}]
calibration: {data: calib.jsonl, sequences: 8, length: 12, seeds: 2}
"""
SCOPES = {
    "global": "output_change",
    "layer": "{objective: output_change, scope: layer}",
    "row": "{objective: output_change, scope: row}",
    "layer_mse": "layer_mse",
    "validation": "validation",
}
# what a family's default config needs besides `test_families.small` to be built, to run and to have experts
DENSE: dict[str, Any] = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
HEADS: dict[str, Any] = {"head_dim": 16}
MORE: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 0},
    "axk1": DENSE | {"qk_nope_head_dim": 16, "v_head_dim": 16},
    "bailing_hybrid": DENSE | {"mlp_layer_types": ["sparse", "sparse"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "max_seq_len": 64,
    },
    "beam": DENSE | {"mlp_layer_types": ["sparse", "sparse"]},
    "deepseek_v2": DENSE | {"num_experts_per_tok": 2},
    "deepseek_v3": DENSE,
    "deepseek_v32": DENSE,
    "dots1": DENSE
    | {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "glm_moe_dsa": DENSE | {"mlp_layer_types": ["sparse", "sparse"]},
    "hunyuan_v1_moe": HEADS | {"num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 0},
    "llama4_text": {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},
    "longcat_flash": {"qk_nope_head_dim": 16, "v_head_dim": 16},
    "mistral4": DENSE,
    "switch_transformers": {"decoder_start_token_id": 0},
}
FAMILIES = """
    afmoe aria axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
    dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2 inkling2_loop jamba jetmoe
    kimi_linear kolibri1 laguna lara_mini lfm2_moe llama4_text mellum minimax minimax_m2 minimax_m3_vl mistral_large4
    mixtral olmoe
    openai_privacy_filter phimoe qwen2_moe qwen3_moe qwen3_next qwen3_vl_moe solar_open
    switch_transformers
"""
# of transformers 5.24, those that are not walked
NOT_WALKED = """
    axk1 deepseek_ocr2 diffusion_gemma dots3_note ernie4_5_vl_moe flint gemma4 glm4v_moe glm5_next hy_v4_vl inkling
    longcat_flash mimo_v2_flash mistral4 muse_spark nemotron_h nllb_moe qwen3_5_moe qwen3_omni_moe qwen4_exp step3p7
    unlimited_ocr zaya
"""
EVERY_DAY = {"mixtral": "experts.0.w1.weight", "gpt_oss": "experts.gate_up_proj"}  # one stored apart, one fused


def built(folder: Path, kind: str) -> tuple[Any, Any]:
    """A base and a fine-tune of a family, both saved by transformers, and data; (the fine-tune, its config)."""
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    name = next(table[kind] for table in tables if kind in table)
    made = transformers.AutoConfig.for_model(kind).__class__
    config = made(**(small(made().to_dict()) | MORE.get(kind, {})))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name if isinstance(name, str) else name[0])(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # some are only filled where a file is loaded
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() < 2))
            model.save_pretrained(folder / "base")
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder / "tuned")
    write_tokenizer(folder / "tuned", 96)
    rows(folder / "calib.jsonl")
    return model, transformers.AutoConfig.from_pretrained(folder / "tuned")


def text() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 9), (3, 7))
    made = [torch.randint(4, 96, shape, generator=generator) for shape in shapes]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in made]


def is_expert(name: str, tensor: torch.Tensor) -> bool:
    return (tensor.dim() == 3 and 1 not in tensor.shape and "conv" not in name) or (
        tensor.dim() == 2 and "expert" in name and "bias" not in name
    )


class Caught:
    """A watch that keeps every input."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.cuts: dict[tuple[str, int], MatrixCut] = {}
        self.whole: set[str] = set()

    def enter(self, layers: Any) -> None: ...

    def see(self, layer: Any, x: torch.Tensor, batch: int) -> None:
        if isinstance(layer, MatrixCut):
            key = layer.layer.name, layer.lead
            self.cuts[key] = layer
            self.inputs.setdefault(key, []).append(x[:, layer.features].double())
        else:
            self.whole.add(layer.name)

    def leave(self, layers: Any) -> bool:
        return False


def check_statistics(
    found: dict[str, LayerStatistics],
    caught: Caught,
    delta: dict[str, torch.Tensor],
    masked: dict[str, torch.Tensor],
) -> None:
    """Each expert's sums, and its q of the drawn mask, equal those in float64 over its own tokens; one without tokens
    has those of all."""
    for (name, lead), parts in caught.inputs.items():
        cut, x = caught.cuts[name, lead], torch.cat(parts)
        own = delta[name].double()
        matrix, mask = (
            (t[lead] if t.dim() == 3 else t)[cut.rows][:, cut.columns] for t in (own, masked[name].double())
        )
        y, kept = (x @ (t if cut.transposed else t.T) for t in (matrix, mask))
        got = found[name].parts[lead] if own.dim() == 3 else found[name]
        if own.dim() == 3 or matrix.shape == own.shape:
            assert got.tokens == len(x)
            assert got.transposed == cut.transposed
            np.testing.assert_allclose(got.energy[cut.outputs], y.square().mean(0), rtol=1e-4, atol=1e-9)
            assert drawn(got) == pytest.approx(float(kept.square().sum() / (y * kept).sum()), rel=1e-3)
            np.testing.assert_allclose(got.norm[cut.inputs], x.norm(dim=0), rtol=1e-4)
    for layer in found.values():
        unseen = [part for part in layer.parts if part.tokens == layer.tokens and len(layer.parts) > 1]
        for part in unseen:
            np.testing.assert_array_equal(part.square, layer.square)


def check_loading(folder: Path, reference: Any, config: Any) -> None:
    """The forward over tensors of the file is the model's own, and the experts' statistics are right."""
    tensors = load_file(folder / "tuned" / "model.safetensors")
    model = BlockModel(config, tensors, pad_token_id=0)
    data, caught = text(), Caught()
    if config.is_encoder_decoder:
        data = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in data]
    got = model.run(data, [from_reader(tensors.__getitem__)], lambda b, out: out.logits, watch=caught)[0]
    for logits, inputs in zip(got, data, strict=True):
        given = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
        labels = {"labels": inputs["input_ids"]} if config.is_encoder_decoder else {}
        with torch.no_grad():
            wanted = getattr(reference(**given, **labels, use_cache=False), "logits", None)
        if wanted is not None:
            assert logits is not None
            torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    own = BlockModel(config, reference.state_dict(), pad_token_id=0)  # the names and experts of the module itself
    again = own.run(data, [from_reader(reference.state_dict().__getitem__)], lambda b, out: out.hidden)[0]
    for one, other in zip(again, model.run(data, [from_reader(tensors.__getitem__)], lambda b, out: out.hidden)[0],
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    delta = {name: torch.sin(torch.arange(t.numel()) * 0.1).view(t.shape) for name, t in tensors.items()}
    seen = {name for name, _ in caught.inputs} | caught.whole
    assert any(is_expert(name, tensors[name]) and "shared" not in name for name in seen), "no expert has had an input"
    masked = {name: d * (torch.arange(d.numel()).view(d.shape) % 3 == 0) for name, d in delta.items()}
    found = collect(model, from_reader(tensors.__getitem__), data, delta.get, draw=masked.__getitem__)
    check_statistics(found, caught, delta, masked)
    hidden = config.get_text_config().hidden_size
    for name, turned in model.turned.items():
        if tensors[name].dim() == 3 and len({*tensors[name].shape[-2:], hidden}) > 1:
            assert stacked_transposed(name, tensors, hidden) == turned, name


def check_gradients(folder: Path, config: Any) -> None:
    """Learned scales reach the tensors of the file through the conversion."""
    tensors = load_file(folder / "tuned" / "model.safetensors")
    model = BlockModel(config, tensors, pad_token_id=0)
    scales = {name: torch.ones((), requires_grad=True) for name in tensors}
    out = model.differentiable(text()[0], lambda names: {n: tensors[n] * scales[n] for n in names})
    assert out.logits is not None
    torch.autograd.backward(out.logits.square().sum())
    experts = [name for name, tensor in tensors.items() if is_expert(name, tensor)]
    assert sum(scales[name].grad is not None for name in experts) > len(experts) / 2


def check_q(folder: Path, out: Path, lock: Any, scope: str) -> None:
    """⟨merged − base, Δ⟩ is what the q of each expert makes of ‖Δ‖²: in the mean density/q is kept, and every tensor is
    either calibrated or named with the q that it is divided by."""
    record = lock["calibration"]["t"]
    beside = load_rows(out / "recipe.rows") if (out / "recipe.rows").exists() else {}
    base, tune, merged = (load_tensors(path) for path in (folder / "base", folder / "tuned", out))
    named = {group["tensors"]: group["q"] for group in record.get("not_calibrated", [])}
    kept, wanted, alone = 0.0, 0.0, []
    for name in (name for name, tensor in tune.items() if is_expert(name, tensor)):
        delta, change = tune[name].double() - base[name].double(), merged[name].double() - base[name].double()
        q = torch.from_numpy(np.asarray(beside.get(f"t:{name}", record["q"].get(name, 1.0)), dtype=np.float64))
        if (pattern := numbers_as_stars(name)) in named:
            assert named[pattern] == pytest.approx(DENSITY), name
            assert float(q) == pytest.approx(DENSITY), name
        elif record["chosen"] == "calibrated" and scope == "global":
            assert float(q) == pytest.approx(record["searched"]["q"]), name
        kept += float((change * delta).sum())
        wanted += float((delta.square() * (DENSITY / q)).sum())
        alone.append(float((change * delta).sum() / (delta.square() * (DENSITY / q)).sum()))
    assert alone
    assert kept / wanted == pytest.approx(1.0, abs=0.15)
    assert min(alone) > 0.4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", EVERY_DAY)
def test_experts_are_calibrated(tmp_path: Path, kind: str) -> None:
    reference, config = built(tmp_path, kind)
    check_loading(tmp_path, reference, config)
    check_gradients(tmp_path, config)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % ("dare", SCOPES["layer"]))
    (stage,) = make_plan(path, device="cpu", workers=1).describe()["stages"]
    assert not any(group["tensors"].endswith(EVERY_DAY[kind]) for group in stage["not_calibrated"])
    result = run(path, tmp_path / "out", device="cpu", workers=1)
    check_q(tmp_path, result.folder, result.lock, "layer")
    path.with_suffix(".lock").write_bytes((result.folder / "recipe.lock").read_bytes())
    if (beside := result.folder / "recipe.rows").exists():
        path.with_suffix(".rows").write_bytes(beside.read_bytes())
    again = run(path, tmp_path / "again", device="cpu", workers=1, locked=True)
    assert (again.folder / "model.safetensors").read_bytes() == (result.folder / "model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_vision_language_model_loads_under_its_old_and_new_names(tmp_path: Path) -> None:
    """As transformers saves it (the hub's names), and as its modules are called since 4.52."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    side = sizes | {"image_size": 8, "patch_size": 4}
    language = sizes | {"vocab_size": 96, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **language}, vision_config={"model_type": "clip_vision_model", **side}
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    saved, data = load_file(tmp_path / "model.safetensors"), text()[:1]
    assert saved.keys() != model.state_dict().keys()
    with torch.no_grad():
        wanted = model(**data[0]).logits
    for tensors in (saved, model.state_dict()):
        block = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
        ((logits,),) = block.run(data, [from_reader(tensors.__getitem__)], lambda b, out: out.logits)
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe"])
def test_wanda_takes_each_experts_own_inputs(tmp_path: Path, kind: str) -> None:
    """Stacked (out, in): the best of each row by |Δ| ‖x‖; stacked (in, out): the best of the tensor. By float64."""
    built(tmp_path, kind)
    (tmp_path / "recipe.yaml").write_text(RECIPE % ("wanda", "1"))
    run(tmp_path / "recipe.yaml", tmp_path / "out", device="cpu", workers=1)
    base, tune, merged = (load_tensors(tmp_path / name) for name in ("base", "tuned", "out"))
    names = [name for name, tensor in tune.items() if is_expert(name, tensor)]
    assert len(names) == 4
    found = activations_of(tmp_path / "recipe.yaml")
    for name in names:
        delta = tune[name].double() - base[name].double()
        norms = torch.from_numpy(found[name].norm)
        turned = found[name].transposed
        score = delta.abs() * (norms[:, :, None] if turned else norms[:, None, :])
        flat = score.reshape(1, -1) if turned else score.reshape(-1, score.shape[-1])
        k = round(DENSITY * flat.shape[1])
        keep = torch.zeros_like(flat).scatter_(1, flat.topk(k, 1).indices, 1.0).view(delta.shape)
        wanted = base[name].double() + keep * delta
        same = torch.isclose(merged[name].double(), wanted, rtol=1e-5, atol=1e-6).double().mean()
        assert float(same) > 0.999, name


FAULTS = {
    "more experts for a token than there are": ({"num_experts_per_tok": 9}, None, "transformers cannot run Mixtral"),
    "an expert that the file lacks": (
        {},
        "model.layers.1.block_sparse_moe.experts.3.w1.weight",
        "transformers cannot make model.layers.1.mlp",
    ),
    "another number of experts": ({"num_local_experts": 5}, None, "and MixtralForCausalLM has [5, 64, 32]"),
}


@pytest.mark.filterwarnings("ignore")
def test_experts_that_do_not_fit_are_refused_in_a_line(tmp_path: Path) -> None:
    _, config = built(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    for changes, lacking, said in FAULTS.values():
        some = {name: tensor for name, tensor in tensors.items() if name != lacking}
        other = type(config)(**(config.to_dict() | changes))
        with pytest.raises(InputError, match=re.escape(said)) as error:
            BlockModel(other, some).run(text(), [from_reader(tensors.__getitem__)], lambda b, out: None)
        assert "\n" not in str(error.value)


MXFP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def as_mxfp4(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts (E, in, out) as blocks (E, out, in/32, 16) of two codes a byte, scales 2^(s − 127), and their values."""
    blocks = stored.mT.reshape(*stored.mT.shape[:-1], -1, 32)
    exponent = blocks.abs().amax(-1).log2().floor() - 2
    values = torch.cat([MXFP4, -MXFP4])
    codes = (blocks / 2 ** exponent[..., None])[..., None].sub(values).abs().argmin(-1)
    exact = (values[codes] * 2 ** exponent[..., None]).reshape(stored.mT.shape).mT.contiguous()
    bits = codes.to(torch.uint8)
    return bits[..., ::2] | bits[..., 1::2] << 4, (exponent + 127).to(torch.uint8), exact


@pytest.mark.filterwarnings("ignore")
def test_quantised_experts_are_calibrated_as_their_values_are(tmp_path: Path) -> None:
    built(tmp_path / "plain", "gpt_oss")
    for name in ("base", "tuned"):
        shutil.copytree(tmp_path / "plain" / name, tmp_path / "packed" / name)
        file = tmp_path / "plain" / name / "model.safetensors"
        exact, packed = load_file(file), {}
        for key, tensor in list(exact.items()):
            if key.endswith("_proj") and "experts" in key:
                packed[f"{key}_blocks"], packed[f"{key}_scales"], exact[key] = as_mxfp4(tensor)
            else:
                packed[key] = tensor
        save_file(exact, file, metadata={"format": "pt"})
        save_file(packed, tmp_path / "packed" / name / "model.safetensors", metadata={"format": "pt"})
        config = tmp_path / "packed" / name / "config.json"
        scheme = {"quant_method": "mxfp4", "modules_to_not_convert": []}
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": scheme}))
    found = []
    for folder in (tmp_path / "plain", tmp_path / "packed"):
        shutil.copy(tmp_path / "plain" / "calib.jsonl", folder / "copy.jsonl")
        (folder / "recipe.yaml").write_text((RECIPE % ("dare", "layer_mse")).replace("calib.jsonl", "copy.jsonl"))
        run(folder / "recipe.yaml", folder / "out", device="cpu", workers=1)
        found.append(load_rows(folder / "out" / "recipe.rows"))
    assert len(found[0]) == 4
    for name, q in found[0].items():
        np.testing.assert_allclose(found[1][name], q, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAMILIES.split())
def test_every_family(tmp_path: Path, kind: str) -> None:
    """Loaded right, measured right, and calibrated by every objective and scope with its delta kept in the mean."""
    transformers.utils.logging.disable_progress_bar()
    reference, config = built(tmp_path, kind)
    check_loading(tmp_path, reference, config)
    path = tmp_path / "recipe.yaml"
    for scope, q in SCOPES.items():
        if scope == "validation" and not type(reference).__name__.endswith(LANGUAGE_HEADS):
            continue
        path.write_text(RECIPE % ("dare", q))
        result = run(path, tmp_path / scope, device="cpu", workers=1)
        check_q(tmp_path, result.folder, result.lock, scope)


@pytest.mark.slow
def test_the_list_of_families_is_long_enough() -> None:
    """26 families are promised. A family of transformers that has experts is walked, or named as one that is not."""
    folder = Path(transformers.__file__).parent / "models"
    has = {
        p.parent.name for p in folder.glob("*/modeling_*.py") if re.search(r"^class \w*Experts\(", p.read_text(), re.M)
    }
    walked = {kind.removesuffix("_text") for kind in FAMILIES.split()}
    assert len(has & walked) >= 26
    assert walked.isdisjoint(NOT_WALKED.split())
    assert sorted(has - walked - set(NOT_WALKED.split())) == []
