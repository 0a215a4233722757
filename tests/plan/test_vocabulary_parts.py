"""Vocabularies that differ, together with slices, modules, documents, adapters, deltas and pruning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_tensors, tiny_llama
from running import make_plan, make_plans, run
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import WORDS, embedding_of, rows64, three_models, vocab_of, word_tokenizer

from deltamerge.errors import InputError, OutputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DELTAS = """\
base_model: ./base
merge_method: task_arithmetic
models: [{model: ./a, parameters: {weight: 0.6}}, {model: ./b, parameters: {weight: 0.5}}]
dtype: float32
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = three_models(tmp_path_factory.mktemp("vocabularies"))
    (folder / "calib.jsonl").write_text("".join(json.dumps({"text": f"w{i} w{i + 7} w3"}) + "\n" for i in range(12)))
    return folder


def write(models: Path, tmp_path: Path, text: str) -> Path:
    path = models / f"{tmp_path.name}.yaml"
    path.write_text(text)
    return path


def merged(models: Path, tmp_path: Path, text: str) -> Path:
    return run(write(models, tmp_path, text), tmp_path / "out", force=True).folder


def tables(models: Path, out: Path, tensor: str, *names: str, base: str | None = "base") -> list[np.ndarray]:
    """Every model's tensor under the output's vocabulary, as rows that the base lacks are means of these models."""
    folders = [models / name for name in names]
    found = embedding_of(vocab_of(out), folders, tensor, base=models / base if base else None)
    return [found[folder] for folder in folders]


SLICES = """\
merge_method: linear
dtype: float32
tokenizer_source: union
parameters: {weight: 1}
slices:
  - sources: [{model: ./base, layer_range: [0, 1]}, {model: ./a, layer_range: [0, 1]}]
  - sources: [{model: ./b, layer_range: [0, 2]}, {model: ./a, layer_range: [0, 2]}]
"""


def test_slices_take_the_embedding_of_the_first_and_the_head_of_the_last(models, tmp_path):
    out = merged(models, tmp_path, SLICES)
    base, a = tables(models, out, EMBEDDING, "base", "a", base=None)
    np.testing.assert_allclose(rows64(out, EMBEDDING), (base + a) / 2, rtol=0, atol=1e-7)
    b, a = tables(models, out, HEAD, "b", "a", base=None)
    np.testing.assert_allclose(rows64(out, HEAD), (b + a) / 2, rtol=0, atol=1e-7)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (3, len(AutoTokenizer.from_pretrained(out)))


def test_slices_of_other_bases_have_the_rows_of_their_own(models, tmp_path):
    text = """\
base_model: ./base
merge_method: task_arithmetic
dtype: float32
tokenizer_source: union
parameters: {weight: 0.5}
slices:
  - sources: [{model: ./a, layer_range: [0, 1]}]
  - sources: [{model: ./a, layer_range: [1, 2]}]
    base_model: ./b
"""
    out = merged(models, tmp_path, text)
    for tensor, base in ((EMBEDDING, "base"), (HEAD, "b")):
        below, a = tables(models, out, tensor, base, "a", base=base)
        np.testing.assert_allclose(rows64(out, tensor), (below + a) / 2, rtol=0, atol=1e-7)


def test_an_embedding_that_no_module_merges_follows_the_vocabulary_too(models, tmp_path):
    text = """\
merge_method: linear
dtype: float32
tokenizer_source: ./b
parameters: {weight: 1}
modules:
  layers: {models: [{model: ./a}, {model: ./b}]}
"""
    out = merged(models, tmp_path, text)
    for tensor in (EMBEDDING, HEAD):
        a = tables(models, out, tensor, "a", base=None)[0]
        known = [i for token, i in vocab_of(out).items() if token in vocab_of(models / "a")]
        np.testing.assert_allclose(rows64(out, tensor)[known], a[known], rtol=0, atol=1e-7)
        assert not rows64(out, tensor)[vocab_of(out)["new"]].any()


CHAIN = """\
merge_method: linear
dtype: float32
parameters: {weight: 1}
models: [{model: first}, {model: ./base}]
tokenizer:
  source: first
  tokens: {more: {source: {kind: model_token, model: first, token: <tool>}}}
chat_template: first
---
name: first
merge_method: linear
dtype: float32
parameters: {weight: 1}
models: [{model: ./a}, {model: ./b}]
tokenizer: {source: union, pad_to_multiple_of: 16}
chat_template: chatml
"""


def test_a_document_s_vocabulary_is_known_before_it_is_made_and_stays_current(models, tmp_path):
    path = write(models, tmp_path, CHAIN)
    before = make_plans(path, tmp_path / "out")[-1].describe()
    first = run(path, tmp_path / "out")
    assert list(first.intermediate.values()) == [True]
    after = first.plan.describe()
    assert (before["tokenizer"], before["chat_template"]) == (after["tokenizer"], after["chat_template"])
    vocab = vocab_of(first.folder)
    assert {"<tool>", "<|im_start|>", "new", "more"} <= vocab.keys()
    assert "<|im_start|>" in (AutoTokenizer.from_pretrained(first.folder).chat_template or "")
    head = rows64(first.folder, HEAD)
    middle = next(iter(first.intermediate))
    np.testing.assert_allclose(head[vocab["more"]], rows64(middle, HEAD)[vocab_of(middle)["<tool>"]], atol=1e-7)
    assert list(run(path, tmp_path / "out", force=True).intermediate.values()) == [False]
    path.write_text(CHAIN.replace("chatml", "llama3"))
    assert list(run(path, tmp_path / "out", force=True).intermediate.values()) == [True]


@pytest.mark.parametrize("kind", ["delta", "peft"])
@pytest.mark.parametrize("keys", ["tokenizer_source: union", "tokenizer_source: ./b", "tokenizer_source: base"])
def test_deltas_and_adapters_cannot_change_the_vocabulary(models, tmp_path, kind, keys):
    text = DELTAS + f"output: {{kind: {kind}}}\n{keys}\n"
    with pytest.raises(InputError, match=f"output.kind {kind} cannot change the vocabulary"):
        make_plan(write(models, tmp_path, text), device="cpu")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """`base` with a LoRA adapter on its attention and its embedding, and `b` with another vocabulary."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapted")
    words = {"base": WORDS, "b": ["new", *WORDS[20:], *WORDS[:20]]}
    for seed, (name, some) in enumerate(words.items()):
        rows = word_tokenizer(folder / name, some)
        tiny_llama(folder / name, seed=seed, dtype=torch.float32, vocab_size=rows)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
        with torch.no_grad():
            for parameter in lora.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        lora.save_pretrained(folder / "lora")
    return folder


def test_an_adapted_embedding_moves_to_another_vocabulary(adapted, tmp_path):
    text = "base_model: ./base\nmodels: [{model: ./base+./lora}]\ndtype: float32\n"
    plain = merged(adapted, tmp_path, text)
    embedding, vocab = rows64(plain, EMBEDDING), vocab_of(plain)
    assert not np.array_equal(embedding, rows64(adapted / "base", EMBEDDING))
    out = merged(adapted, tmp_path, text + "tokenizer: {source: ./b, pad_to_multiple_of: 64}\n")
    moved, other = rows64(out, EMBEDDING), vocab_of(out)
    shared = [token for token in other if token in vocab]
    np.testing.assert_allclose(
        moved[[other[token] for token in shared]], embedding[[vocab[token] for token in shared]], rtol=0, atol=1e-7
    )
    assert not moved[other["new"]].any()
    assert moved.shape[0] == 64


def test_an_adapter_s_own_weights_keep_the_vocabulary(adapted, tmp_path):
    text = "base_model: ./base\nmodels: [{model: ./base+./lora}]\noutput: {kind: peft}\n"
    with pytest.raises(InputError, match=r"output.kind peft cannot change the vocabulary"):
        make_plan(write(adapted, tmp_path, text + "tokenizer_source: ./b\n"), device="cpu")
    assert make_plan(write(adapted, tmp_path, text + "tokenizer_source: base\n"), device="cpu").pruned_adapter


@pytest.mark.parametrize("kind", ["peft", "delta"])
def test_what_goes_with_its_base_may_have_another_chat_template(adapted, tmp_path, kind):
    text = f"base_model: ./base\nmodels: [{{model: ./base+./lora}}]\noutput: {{kind: {kind}}}\nchat_template: chatml\n"
    out = merged(adapted, tmp_path, text)
    assert "<|im_start|>" in (out / "chat_template.jinja").read_text()


def test_a_model_that_lends_its_tokenizer_is_not_overwritten(models, tmp_path):
    text = "base_model: ./base\nmodels: [{model: ./a}]\ntokenizer_source: ./b\n"
    with pytest.raises(OutputError, match=r"holds the input ./b"):
        run(write(models, tmp_path, text), models / "b", force=True)


def test_one_threshold_for_a_model_counts_moved_rows(models, tmp_path):
    text = """\
base_model: ./base
models: [{model: ./a}]
dtype: float32
tokenizer_source: ./b
prune: {method: magnitude, density: 0.25, group: model, exclude: [lm_head]}
"""
    out = merged(models, tmp_path, text)
    kept = total = 0
    for name, tensor in load_tensors(out).items():
        if name != HEAD:
            base = tables(models, out, name, "base", "a")[0] if name == EMBEDDING else rows64(models / "base", name)
            kept += int((tensor.numpy() != base.astype(np.float32)).sum())
            total += base.size
    assert kept == total // 4


def test_a_merge_that_is_calibrated_as_a_whole_keeps_its_vocabulary(models, tmp_path):
    text = DELTAS + "tokenizer_source: union\ncalibration: {data: calib.jsonl, sequences: 4, length: 8, per: merge}\n"
    with pytest.raises(InputError, match="its vocabulary changes, and this calibration runs models with their own"):
        make_plan(write(models, tmp_path, text), device="cpu")
