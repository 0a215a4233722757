"""Vocabularies that differ: ids, embeddings against a float64 reference, tokenizers and models that load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import load_tensors, make_checkpoint, tiny_llama, write_json
from running import make_plan, run
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from vocabularies import TEMPLATE, WORDS, embedding_of, rows64, three_models, vocab_of, word_tokenizer

from deltamerge.cli.plan import render_plan
from deltamerge.errors import DeltamergeError, InputError, RecipeError
from deltamerge.models.checkpoint import open_checkpoint
from deltamerge.models.tokenizer_files import TEMPLATES, read_chat_template, read_tokens
from deltamerge.plan.inputs import has_vocabulary_rows
from deltamerge.recipe import load
from deltamerge.recipe.output_keys import BUILT_IN
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.views import gather

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DELTAS = """\
base_model: ./base
merge_method: task_arithmetic
models:
  - {model: ./a, parameters: {weight: 0.6}}
  - {model: ./b, parameters: {weight: 0.5}}
dtype: float32
"""
LINEAR = """\
merge_method: linear
models:
  - {model: ./a, parameters: {weight: 0.6}}
  - {model: ./b, parameters: {weight: 0.5}}
dtype: float32
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return three_models(tmp_path_factory.mktemp("vocabularies"))


def merged(models: Path, tmp_path: Path, text: str, **options) -> Path:
    recipe = models / f"{tmp_path.name}.yaml"
    recipe.write_text(text)
    return run(recipe, tmp_path / "out", force=True, **options).folder


def planned(models: Path, tmp_path: Path, text: str) -> dict:
    recipe = models / f"{tmp_path.name}.yaml"
    recipe.write_text(text)
    return make_plan(recipe, device="cpu").describe()


def check_rows(models: Path, out: Path, *, given=None) -> None:
    """Embedding and head are b + 0.6 (a − b) + 0.5 (b' − b) of tables under the output's vocabulary."""
    base, a, b = (models / name for name in ("base", "a", "b"))
    rows = json.loads((out / "config.json").read_text())["vocab_size"]
    for tensor in (EMBEDDING, HEAD):
        rows_given = {t: (f(tensor), force) for t, (f, force) in (given or {}).items()}
        table = embedding_of(vocab_of(out), [base, a, b], tensor, base=base, given=rows_given, rows=rows)
        wanted = table[base] + 0.6 * (table[a] - table[base]) + 0.5 * (table[b] - table[base])
        np.testing.assert_allclose(rows64(out, tensor), wanted, rtol=0, atol=1e-7)


# ---- ids


def test_a_union_keeps_the_base_s_ids_and_appends_words_then_added_tokens(models, tmp_path):
    out = merged(models, tmp_path, DELTAS + "tokenizer_source: union\n")
    base, vocab = vocab_of(models / "base"), vocab_of(out)
    assert {token: vocab[token] for token in base} == base
    assert sorted(vocab, key=vocab.__getitem__)[len(base) :] == ["new", "<|im_start|>", "both", "<tool>"]
    check_rows(models, out)


def test_what_loads_has_the_planned_vocabulary_and_marks(models, tmp_path):
    out = merged(models, tmp_path, DELTAS + "tokenizer_source: union\n")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == vocab_of(out)
    assert tokenizer.convert_ids_to_tokens(tokenizer("w3 <tool>new both w7")["input_ids"]) == [
        "w3", "<tool>", "new", "both", "w7",
    ]  # fmt: skip
    marks = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert (marks["<tool>"], marks["<|im_start|>"], marks["both"], marks["new"]) == (True, True, False, False)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.inference_mode():
        logits = model(**tokenizer("w1 <tool> both", return_tensors="pt", return_token_type_ids=False)).logits
    assert logits.shape == (1, 3, 48)
    assert torch.isfinite(logits).all()


def test_a_token_that_is_plain_in_the_base_and_added_elsewhere_is_added_under_its_id(tmp_path):
    for name, words, added in (("base", ["x", "<turn>"], []), ("a", ["x", "y"], [("<turn>", True)])):
        rows = word_tokenizer(tmp_path / name, words, added)
        tiny_llama(tmp_path / name, seed=len(added), vocab_size=rows)
    out = merged(tmp_path, tmp_path, "base_model: ./base\nmodels: [{model: ./a}]\ntokenizer_source: union\n")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(["<turn>", "y"]) == [5, 6]
    assert tokenizer("x<turn>x")["input_ids"] == [4, 5, 4]


@pytest.mark.parametrize(("source", "of"), [("base", "base"), ("./a", "a"), ("./b", "b"), ("./other", "other")])
def test_a_model_s_tokenizer_is_copied_and_every_embedding_follows_it(models, tmp_path, source, of):
    other = models / "other"
    if not other.exists():
        tiny_llama(other, seed=9, vocab_size=word_tokenizer(other, ["nobody", *WORDS[5:9], "new", "both"]))
    out = merged(models, tmp_path, DELTAS + f"tokenizer_source: {source}\n")
    assert (out / "tokenizer.json").read_bytes() == (models / of / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == vocab_of(models / of)
    check_rows(models, out)


def test_without_a_base_a_missing_token_is_the_mean_of_the_others(models, tmp_path):
    tiny_llama(models / "c", seed=7, dtype=torch.float32, vocab_size=word_tokenizer(models / "c", WORDS[:5]))
    text = LINEAR.replace("dtype", "  - {model: ./c, parameters: {weight: 0.3}}\ndtype")
    out = merged(models, tmp_path, text + "tokenizer_source: union\n")
    names = [models / name for name in "abc"]
    table = embedding_of(vocab_of(out), names, EMBEDDING)
    wanted = sum(w * table[m] for w, m in zip((0.6, 0.5, 0.3), names, strict=True)) / 1.4
    np.testing.assert_allclose(rows64(out, EMBEDDING), wanted, rtol=0, atol=1e-7)


def test_an_unlisted_base_lends_linear_its_tokenizer_and_is_in_the_lock(models, tmp_path):
    out = merged(models, tmp_path, LINEAR + "base_model: ./base\ntokenizer_source: union\nchat_template: auto\n")
    base, vocab = vocab_of(models / "base"), vocab_of(out)
    assert {token: vocab[token] for token in base} == base
    table = embedding_of(vocab, [models / "a", models / "b"], EMBEDDING)
    wanted = (0.6 * table[models / "a"] + 0.5 * table[models / "b"]) / 1.1
    np.testing.assert_allclose(rows64(out, EMBEDDING), wanted, rtol=0, atol=1e-7)
    inputs = yaml.safe_load((out / "recipe.lock").read_text())["inputs"]
    assert sorted(inputs["./base"]["files"]) == ["tokenizer.json", "tokenizer_config.json"]
    assert {"chat_template.jinja", "tokenizer.json", "config.json"} < inputs["./a"]["files"].keys()


# ---- what the recipe says of single tokens, and padding

TOKENS = """\
tokenizer:
  source: union
  pad_to_multiple_of: 16
  tokens:
    <|im_start|>: {source: ./a, force: true}
    w5: {source: {kind: model_token, model: ./b, token: new}, force: true}
    w10: {source: {kind: zero}}
    both: {source: ./b}
    fresh: {source: {kind: model_token, model: base, token_id: 7}}
    w6: {}
"""


def test_sources_of_tokens_forced_tokens_and_padding(models, tmp_path):
    out = merged(models, tmp_path, DELTAS + TOKENS)

    def row(model: str, token: str):
        return lambda tensor: rows64(models / model, tensor)[vocab_of(models / model)[token]]

    given = {
        "<|im_start|>": (row("a", "<|im_start|>"), True),
        "w5": (row("b", "new"), True),
        "w10": (lambda tensor: np.zeros(32), False),
        "both": (row("b", "both"), False),
        "fresh": (row("base", "w3"), False),
    }
    check_rows(models, out, given=given)
    vocab = vocab_of(out)
    assert (len(vocab), vocab["fresh"], len(rows64(out, EMBEDDING))) == (49, 48, 64)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == vocab
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 64


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_neither_tiles_nor_workers_nor_the_backend_change_a_byte(models, tmp_path, monkeypatch, method):
    text = DELTAS.replace("task_arithmetic", method).replace("weight", "density: 0.5, weight") + TOKENS
    first = merged(models, tmp_path, text, workers=1)
    before = (first / "model.safetensors").read_bytes()
    monkeypatch.setattr("deltamerge.engine.execute.TILE_ELEMENTS", 64)
    assert (merged(models, tmp_path, text, workers=3) / "model.safetensors").read_bytes() == before
    monkeypatch.setattr("deltamerge.engine.backends.fused_available", lambda: False)
    assert (merged(models, tmp_path, text, workers=2) / "model.safetensors").read_bytes() == before


def test_rows_that_are_only_moved_keep_their_bits(tmp_path):
    three_models(tmp_path, dtype=torch.bfloat16)
    text = "models: [{model: ./b}]\nmerge_method: passthrough\ntokenizer_source: union\n"
    out = merged(tmp_path, tmp_path, text.replace("passthrough\n", "passthrough\nbase_model: ./base\n"))
    vocab, own = vocab_of(out), vocab_of(tmp_path / "b")
    before, after = load_tensors(tmp_path / "b")[EMBEDDING], load_tensors(out)[EMBEDDING]
    assert after.dtype == torch.bfloat16
    assert all(torch.equal(after[vocab[token]], before[own[token]]) for token in own)


# ---- heads


def test_tied_stays_tied(tmp_path):
    three_models(tmp_path, tied=True)
    out = merged(tmp_path, tmp_path, DELTAS + "tokenizer_source: union\n")
    assert HEAD not in load_tensors(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == 48 == len(AutoTokenizer.from_pretrained(out))


@pytest.mark.parametrize("source", ["", "tokenizer_source: union\n"])
def test_the_embedding_of_a_tied_model_is_its_head_among_untied_ones(tmp_path, source):
    tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32, vocab_size=word_tokenizer(tmp_path / "base", WORDS))
    for seed, name in enumerate(("a", "b"), 1):
        rows = word_tokenizer(tmp_path / name, WORDS)
        tiny_llama(tmp_path / name, seed=seed, dtype=torch.float32, vocab_size=rows, tied=name == "a")
    text = DELTAS + source
    head = {name: rows64(tmp_path / name, EMBEDDING if name == "a" else HEAD) for name in ("base", "a", "b")}
    wanted = head["base"] + 0.6 * (head["a"] - head["base"]) + 0.5 * (head["b"] - head["base"])
    np.testing.assert_allclose(rows64(merged(tmp_path, tmp_path, text), HEAD), wanted, rtol=0, atol=1e-7)
    assert any("the embedding is the head of ./a" in note for note in planned(tmp_path, tmp_path, text)["notes"])


def bert(folder: Path, texts: list[str], seed: int) -> Path:
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts, WordPieceTrainer(special_tokens=special, show_progress=False))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertForMaskedLM(config)
        torch.nn.init.normal_(model.cls.predictions.bias)
        model.save_pretrained(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    return folder


def test_a_masked_language_model_s_bias_follows_the_vocabulary_too(tmp_path):
    base = bert(tmp_path / "base", ["the cat sat on the mat"], 0)
    tune = bert(tmp_path / "a", ["the dog sat on a log", "cats"], 1)
    text = "base_model: ./base\nmodels: [{model: ./a, parameters: {weight: 0.5}}]\ntokenizer_source: union\n"
    out = merged(tmp_path, tmp_path, text)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        table = embedding_of(vocab_of(out), [base, tune], name, base=base)
        np.testing.assert_allclose(rows64(out, name), (table[base] + table[tune]) / 2, rtol=0, atol=5e-7)
    model = transformers.BertForMaskedLM.from_pretrained(out)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    tokenizer = AutoTokenizer.from_pretrained(out)
    with torch.inference_mode():
        assert AutoModel.from_pretrained(out)(**tokenizer("the cat", return_tensors="pt"))[0].isfinite().all()


def test_bpe_keeps_its_merges_and_moves_special_ids(tmp_path):
    for seed, (name, texts, special) in enumerate(
        (("base", ["low lower lowest"], ["<eos>"]), ("a", ["new newer newest low"], ["<pad>", "<eos>"]))
    ):
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        trainer = BpeTrainer(vocab_size=40, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        write_json(tmp_path / name / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        tiny_llama(tmp_path / name, seed=seed, vocab_size=tokenizer.get_vocab_size())
        eos = tokenizer.token_to_id("<eos>")
        for file in ("config.json", "generation_config.json"):
            path = tmp_path / name / file
            ids = {"eos_token_id": [eos, 2], "bos_token_id": eos, "pad_token_id": None}
            write_json(path, json.loads(path.read_text()) | ids)
    text = "base_model: ./base\nmodels: [{model: ./a}]\ntokenizer_source: union\n"  # the template is the fine-tune
    out = merged(tmp_path, tmp_path, text)
    vocab, own = vocab_of(out), vocab_of(tmp_path / "a")
    second = next(token for token, i in own.items() if i == 2)
    for file in ("config.json", "generation_config.json"):
        stated = json.loads((out / file).read_text())
        assert (stated["bos_token_id"], stated["eos_token_id"]) == (vocab["<eos>"], [vocab["<eos>"], vocab[second]])
    before = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(out).tokenize("lower lowest") == before.tokenize("lower lowest")


# ---- chat templates


@pytest.mark.parametrize(
    ("wanted", "text", "origin"),
    [
        ("auto", TEMPLATE.replace("NAME", "A"), "auto: ./a"),
        ("./b", "B {{ 1 }}", "./b"),
        ("chatml", BUILT_IN["chatml"], "built-in chatml"),
        ("'{{ messages[0].content }}'", "{{ messages[0].content }}", "the recipe"),
    ],
)
@pytest.mark.parametrize("source", ["base", "./a", "./b", "union"])
def test_the_chat_template_is_the_one_asked_for_in_either_form(models, tmp_path, wanted, text, origin, source):
    recipe = DELTAS + f"tokenizer_source: {source}\nchat_template: {wanted}\n"
    out = merged(models, tmp_path, recipe)
    assert AutoTokenizer.from_pretrained(out).chat_template == text
    assert planned(models, tmp_path, recipe)["chat_template"] == origin
    in_config = "chat_template" in json.loads((out / "tokenizer_config.json").read_text())
    assert in_config is (source == "./b") is not (out / "chat_template.jinja").exists()


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_templates_render_a_conversation_and_end_where_the_model_goes_on(models, tmp_path, name):
    out = merged(models, tmp_path, DELTAS + f"tokenizer_source: base\nchat_template: {name}\n")
    turns = [("system", "Be brief."), ("user", "Hello?"), ("assistant", "Hi."), ("user", "Bye!")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = AutoTokenizer.from_pretrained(out).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    places = [text.index(content) for _, content in turns]
    assert places == sorted(places)
    assert not text.endswith("Bye!")


def test_the_tokenizer_s_own_chat_template_is_kept_in_its_form(models, tmp_path):
    for source, file in (("./a", "chat_template.jinja"), ("./b", "tokenizer_config.json")):
        out = merged(models, tmp_path, DELTAS + f"tokenizer_source: {source}\n")
        assert (out / file).read_bytes() == (models / source / file).read_bytes()


def test_named_templates_stay_beside_the_default(models, tmp_path):
    for name in "xy":
        shutil.copytree(models / "a", tmp_path / name)
    (tmp_path / "x" / TEMPLATES).mkdir()
    (tmp_path / "x" / TEMPLATES / "tools.jinja").write_text("T")
    (tmp_path / "y" / "chat_template.jinja").unlink()
    listed = [{"name": "default", "template": "D"}, {"name": "tools", "template": "T"}]
    config = json.loads((tmp_path / "y" / "tokenizer_config.json").read_text())
    write_json(tmp_path / "y" / "tokenizer_config.json", config | {"chat_template": listed})
    for name in "xy":
        for asked in ("", "chat_template: '{{ 1 }}'\n"):
            recipe = f"base_model: ./{name}\nmodels: [{{model: {models / 'b'}}}]\n{asked}tokenizer_source: base\n"
            out = merged(tmp_path, tmp_path, recipe)
            found = AutoTokenizer.from_pretrained(out).chat_template
            given = AutoTokenizer.from_pretrained(tmp_path / name).chat_template
            assert found == given | ({"default": "{{ 1 }}"} if asked else {})
            assert found["tools"] == "T"


def test_named_templates_of_a_config_give_the_default(tmp_path):
    make_checkpoint(tmp_path, {"x": torch.ones(1)})
    templates = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": templates})
    assert read_chat_template(open_checkpoint(tmp_path)) == "D"


# ---- what the plan says, and what is refused


def test_the_plan_says_what_happens_to_the_vocabulary(models, tmp_path):
    found = planned(models, tmp_path, DELTAS + TOKENS)["tokenizer"]
    assert found == {
        "source": "union", "starts_from": "./base", "tokens": 49, "appended": 5, "dropped": 0, "rows": 64,
        "padding": 15, "notes": [
            "./base: 48 rows become 64, left out: 4 that no token names (padding)",
            "./a: 46 rows become 64",
            "./b: 46 rows become 64",
        ],
        "lacking": {"base": 0, "one_model": 2, "mean": 0, "zeros": 0, "recipe": 5},
    }  # fmt: skip


ROWS = {
    "tokenizer_source: base": [
        "./base: 48 rows become 44, left out: 4 that no token names (padding)",
        "./a: 46 rows become 44, left out: 2 whose tokens the output lacks",
        "./b: 46 rows become 44, left out: 3 whose tokens the output lacks",
    ],
    "tokenizer_source: union": [
        "./base: 48 rows become 48, left out: 4 that no token names (padding)",
        "./a: 46 rows become 48",
        "./b: 46 rows become 48",
    ],
    "tokenizer: {source: ./a, pad_to_multiple_of: 46}": [
        "./base: 48 rows become 46, left out: 4 that no token names (padding)",
        "./b: 46 rows become 46, left out: 2 whose tokens the output lacks",
    ],
}


@pytest.mark.parametrize("keys", ROWS)
def test_the_plan_says_what_becomes_of_padding_and_of_each_model_s_rows(models, tmp_path, keys):
    plan = planned(models, tmp_path, DELTAS + keys + "\n")
    assert plan["tokenizer"]["notes"] == ROWS[keys]
    assert all(note in render_plan(plan, width=1000) for note in ROWS[keys])


def test_the_plan_says_that_a_tied_head_stays_tied(tmp_path):
    three_models(tmp_path, tied=True)
    plan = planned(tmp_path, tmp_path, DELTAS + "tokenizer_source: union\n")
    assert "lm_head.weight: stays tied to the embedding" in plan["notes"]
    assert HEAD not in {tensor["name"] for tensor in plan["tensors"]}


REFUSED = {
    "tokenizer: {tokens: {x: {force: true}}}": "tokenizer.tokens.x.force: needs a source",
    "tokenizer: {tokens: {x: {source: ./nobody}}}": "./nobody is none of the merged models",
    "tokenizer: {tokens: {new: {source: ./a}}}": "./a has no row for 'new'",
    "tokenizer: {tokens: {x: {source: {kind: model_token, model: ./a, token_id: 46}}}}": "./a has no row for 46",
    "tokenizer: {tokens: {x: {source: {kind: model_token, model: ./b, token: w10}}}}": "./b has no row for 'w10'",
    "chat_template: chatm": "did you mean 'chatml'?",
    "tokenizer_source: ./nowhere": "./nowhere",
}


@pytest.mark.parametrize("keys", REFUSED)
def test_refused_with_the_reason(models, tmp_path, keys):
    with pytest.raises(DeltamergeError) as caught:
        planned(models, tmp_path, DELTAS + keys + "\n")
    assert REFUSED[keys] in str(caught.value)
    if "source" in keys and "tokenizer:" in keys and isinstance(caught.value, RecipeError):
        assert caught.value.problems[0].line == 7


def test_pruning_with_calibration_refuses_an_embedding_whose_rows_move(models, tmp_path):
    (models / "calib.jsonl").write_text("".join(json.dumps({"text": f"w{i} w{i + 7} w3"}) + "\n" for i in range(12)))
    text = DELTAS + "prune: {method: magnitude, density: 0.1, q: layer_mse}\n"
    text += "calibration: {data: calib.jsonl, sequences: 4, length: 8}\n"
    with pytest.raises(InputError, match=r"embed_tokens.weight: its vocabulary changes"):
        planned(models, tmp_path, text + "tokenizer_source: union\n")
    text = text.replace("q: layer_mse", "q: layer_mse, exclude: [embed, lm_head]")
    out = merged(models, tmp_path, text + "tokenizer_source: union\n")
    assert "calibration:" in (out / "recipe.lock").read_text()
    check_rows(models, out)


def test_a_slow_tokenizer_alone_has_no_vocabulary_to_merge(tmp_path):
    three_models(tmp_path)
    (tmp_path / "b" / "tokenizer.json").rename(tmp_path / "b" / "tokenizer.model")
    with pytest.raises(InputError, match=r"./b: has tokenizer.model but no tokenizer.json"):
        planned(tmp_path, tmp_path, DELTAS + "tokenizer_source: union\n")
    (tmp_path / "b" / "tokenizer.model").unlink()
    notes = planned(tmp_path, tmp_path, DELTAS + "tokenizer_source: union\n")["tokenizer"]["notes"]
    assert notes == [
        "./b has no tokenizer: its rows are taken to be the tokens of ./base",
        "./base: 48 rows become 46, left out: 4 that no token names (padding)",
        "./b: 46 rows become 46, left out: 2 that no token names (padding)",
    ]


def test_ids_with_gaps_take_no_new_tokens_but_are_kept_by_their_own_model(tmp_path):
    three_models(tmp_path)
    path = tmp_path / "base" / "tokenizer.json"
    spec = json.loads(path.read_text())
    del spec["model"]["vocab"]["w20"]
    path.write_text(json.dumps(spec))
    with pytest.raises(InputError, match="gaps"):
        planned(tmp_path, tmp_path, DELTAS + "tokenizer_source: union\n")
    out = merged(tmp_path, tmp_path, DELTAS + "tokenizer_source: base\n")
    gap = vocab_of(tmp_path / "a")["w20"]
    np.testing.assert_allclose(rows64(out, EMBEDDING)[gap], rows64(tmp_path / "base", EMBEDDING)[gap], atol=1e-7)


# ---- the parts


def test_tokens_beyond_the_embedding_make_room_for_new_ones(tmp_path):
    word_tokenizer(tmp_path / "base", WORDS, [("<pad2>", True)])
    tiny_llama(tmp_path / "base", seed=0, vocab_size=44)
    tiny_llama(tmp_path / "a", seed=1, vocab_size=word_tokenizer(tmp_path / "a", WORDS, [("<tool>", True)]))
    text = "base_model: ./base\nmodels: [{model: ./a}]\ntokenizer_source: union\n"
    out = merged(tmp_path, tmp_path, text)
    assert vocab_of(out)["<tool>"] == 44
    assert "<pad2>" not in vocab_of(out)
    assert planned(tmp_path, tmp_path, text)["tokenizer"]["dropped"] == 1


def test_tokens_that_only_the_config_declares_are_counted(tmp_path):
    make_checkpoint(tmp_path, {"x": torch.ones(1)})
    word_tokenizer(tmp_path, WORDS[:2])
    config = {"added_tokens_decoder": {"7": {"content": "late"}, "6": {"content": "soon", "special": True}}}
    write_json(tmp_path / "tokenizer_config.json", config | {"mask_token": {"content": "<mask>", "lstrip": True}})
    tokens = read_tokens(open_checkpoint(tmp_path))
    assert tokens is not None
    assert [tokens.ids[token] for token in ("soon", "late", "<mask>")] == [6, 7, 8]
    assert (tokens.added["<mask>"]["lstrip"], tokens.added["<mask>"]["special"]) == (True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_gathered_rows_are_those_of_numpy_wherever_reading_starts(tmp_path, dtype, padding):
    rng = np.random.default_rng(0)
    tensors = {name: torch.from_numpy(rng.normal(size=(9, 5))).to(dtype) for name in ("x", "y")}
    infos = open_checkpoint(make_checkpoint(tmp_path, tensors)).tensors
    picks = np.array([[3, -1], [4, -1], [-1, 0], [2, 8], [-1, -1], [0, -1]], np.int32)
    info = gather(infos["x"], [infos["x"], infos["y"]], picks, padding)
    assert info.tensor.function == "gather_rows"
    x, y = (tensors[name].double().numpy() for name in ("x", "y"))
    wanted = np.stack([x[3], x[4], y[0], (x[2] + y[8]) / 2, np.zeros(5), x[0]])
    wanted = np.concatenate([wanted, np.repeat(wanted.mean(0, keepdims=True), padding, 0)]).reshape(-1)
    with Reader() as reader:
        for start, stop in ((0, wanted.size), (7, 8), (3, 29), (wanted.size - 4, wanted.size)):
            out = np.empty(stop - start, np.float32)
            reader.read_into(info, start, out)
            np.testing.assert_allclose(out, wanted[start:stop], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "config", "holds"),
    [
        ("model.embed_tokens.weight", (64, 8), {"hidden_size": 64}, True),
        ("lm_head.bias", (64,), {}, True),
        ("some.table.weight", (64, 8), {"hidden_size": 8}, True),
        ("some.table.weight", (64, 8), {"text_config": {"hidden_size": 64}}, False),
        ("embeddings.position_embeddings.weight", (64, 8), {}, False),
        ("model.layers.0.embed_tokens.weight", (64, 8), {}, False),
        ("model.embed_tokens.weight", (65, 8), {}, False),
    ],
)
def test_rows_are_tokens_by_name_and_number(name, shape, config, holds):
    assert has_vocabulary_rows(name, shape, 64, config | {"vocab_size": 64, "eos_token_id": 64}) is holds


def test_the_recipe_is_checked_without_models() -> None:
    with pytest.raises(RecipeError, match="chat_template: must be auto, a model"):
        load.loads(DELTAS + "chat_template: nothing\n")
