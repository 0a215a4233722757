"""A model on another tokenizer: rows against a float64 reference written from the papers, the files that follow the
tokenizer, how spellings are matched, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import load_tensors, make_checkpoint, write_json
from running import finish, make_plan, run
from tolerance import after_rounding
from transformers import AutoModelForCausalLM, AutoTokenizer
from transplants import DONOR_WORDS, interpolated64, pursuit64, two_models
from vocabularies import WORDS, rows64, vocab_of, word_tokenizer

from deltamerge.cli.plan import render_plan
from deltamerge.errors import DeltamergeError, RecipeError
from deltamerge.files.ownership import LOCK_NAME
from deltamerge.models.checkpoint import Tokens
from deltamerge.models.token_text import Spelling, spelling_of
from deltamerge.plan.transplant import Atoms, SharedBlocks, match, nearest, pursuit
from deltamerge.run.partition import Part

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ONE = "merge_method: passthrough\nmodels: [{{model: ./base}}]\ntokenizer: {{transplant: ./donor, {more}}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_models(tmp_path_factory.mktemp("transplant"))


def made(folder: Path, tmp_path: Path, text: str, **options: Any) -> Path:
    recipe = folder / f"{tmp_path.name}.yaml"
    recipe.write_text(text)
    return run(recipe, tmp_path / "out", device="cpu", **options).folder


def wanted(folder: Path, tensor: str, method: str, k: int, *, donor: str = "donor") -> np.ndarray[Any, Any]:
    """The rows of one model's tensor under the donor's tokenizer."""
    ours, theirs = vocab_of(folder / "base"), vocab_of(folder / donor)
    table, lender = rows64(folder / "base", tensor), rows64(folder / donor, tensor)
    same = {"<end>": "</s>", "<begin>": "<s>", "<blank>": "<pad>", "<unk>": "<unk>"}
    common = {i: ours[same.get(token, token)] for token, i in theirs.items() if same.get(token, token) in ours}
    others = [i for i in theirs.values() if i not in common and i < len(lender)]
    there = sorted(i for i in common if i < len(lender))
    result = np.tile(table.mean(0), (max(theirs.values()) + 1, 1))
    for new, old in common.items():
        result[new] = table[old]
    for new in others if method != "mean" else ():
        solve = pursuit64 if method == "omp" else interpolated64
        places, weights = solve(lender[new], lender[there], k)
        result[new] = weights @ table[[common[there[p]] for p in places]]
    return result


@pytest.mark.parametrize(("method", "k"), [("omp", 1), ("omp", 5), ("omp", 20), ("common", 3), ("mean", 64)])
def test_rows_are_the_reference_s(folder, tmp_path, method, k):
    more = f"method: {method}" + (f", k: {k}" if method != "mean" else "")
    out = made(folder, tmp_path, ONE.format(more=more))
    for tensor in (EMBEDDING, HEAD):
        np.testing.assert_allclose(rows64(out, tensor), wanted(folder, tensor, method, k), rtol=0, atol=2e-6)
    before, after = load_tensors(folder / "base"), load_tensors(out)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in (EMBEDDING, HEAD))
    same = [(i, vocab_of(folder / "base")[t]) for t, i in vocab_of(out).items() if t in WORDS and t in DONOR_WORDS]
    new, old = zip(*same, strict=True)
    assert torch.equal(after[EMBEDDING][list(new)], before[EMBEDDING][list(old)])


def test_the_same_bytes_whatever_the_tiles_and_threads(folder, tmp_path):
    text = ONE.format(more="k: 7")
    first = load_tensors(made(folder, tmp_path / "a", text, workers=1))
    second = load_tensors(made(folder, tmp_path / "b", text, workers=4))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_merge_is_of_models_on_the_new_tokenizer(folder, tmp_path):
    """task_arithmetic is linear, so that it is the transplant of the merge."""
    text = "base_model: ./base\nmodels: [{model: ./tune, parameters: {weight: 0.5}}]\n"
    out = made(folder, tmp_path, text + "dtype: float32\ntokenizer: {transplant: ./donor, k: 5}\n")
    base, tune = (rows64(folder / name, EMBEDDING) for name in ("base", "tune"))
    merged = made(folder, tmp_path / "plain", text + "dtype: float32\n")
    assert np.abs(rows64(merged, EMBEDDING) - (base + 0.5 * (tune - base))).max() < 1e-6
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (merged / name).write_bytes((folder / "base" / name).read_bytes())
    text = f"merge_method: passthrough\nmodels: [{{model: {merged}}}]\ntokenizer: {{transplant: ./donor, k: 5}}\n"
    after = made(folder, tmp_path / "after", text)
    np.testing.assert_allclose(rows64(out, EMBEDDING), rows64(after, EMBEDDING), rtol=0, atol=1e-6)


def test_config_generation_and_template_follow_the_tokenizer(folder, tmp_path):
    out = made(folder, tmp_path, ONE.format(more="k: 4, pad_to_multiple_of: 16"))
    config, generation = (json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json"))
    ids = vocab_of(folder / "donor")
    assert config["vocab_size"] == 48
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [
        ids[t] for t in ("<begin>", "<end>", "<blank>")
    ]
    assert generation["eos_token_id"] == [ids["<end>"], ids["d1"]]
    assert generation["bos_token_id"] == ids["<begin>"]
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<end>", "donor {{ 1 }}")
    batch = tokenizer("w1 d3 w5", return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        assert torch.isfinite(model(**batch).logits).all()
    mean = rows64(folder / "base", EMBEDDING).mean(0)
    np.testing.assert_allclose(rows64(out, EMBEDDING)[-1], mean, rtol=0, atol=1e-7)
    lock = yaml.safe_load((out / LOCK_NAME).read_text())
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= lock["inputs"]["./donor"][
        "files"
    ].keys()


def test_documents_lend_models_and_tokenizers_and_parts_make_the_same(folder, tmp_path):
    text = "name: lender\nmerge_method: passthrough\nmodels: [{model: ./donor}]\n---\n" + ONE.format(more="k: 3")
    recipe = folder / "documents.yaml"
    recipe.write_text(text.replace("transplant: ./donor", "transplant: lender"))
    whole = run(recipe, tmp_path / "out", device="cpu").folder
    assert vocab_of(whole) == vocab_of(folder / "donor")
    recipe = folder / "parts.yaml"
    recipe.write_text(ONE.format(more="k: 3") + "output: {shard_size: 10KB}\n")
    for index in (1, 2):
        run(recipe, tmp_path / "parts", device="cpu", part=Part(index, 2))
    parts = finish(recipe, tmp_path / "parts", device="cpu").folder
    first, second = load_tensors(whole), load_tensors(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_tied_model_has_one_table_and_the_plan_says_what_becomes_of_it(tmp_path):
    two_models(tmp_path, tied=True, dtype=torch.bfloat16)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(ONE.format(more="k: 4"))
    described = make_plan(recipe, device="cpu").describe()
    shown = render_plan(described, width=200)
    assert "tokens keep their rows" in shown
    assert "sums of 4 rows by matching pursuit over 24 common tokens" in shown
    assert described["tokenizer"]["transplant"] == {
        "method": "omp", "k": 4, "kept": 24, "common": 24, "made": 11, "mean": 1,
    }  # fmt: skip
    assert set(described["tokenizer"]["lacking"].values()) == {0}
    assert described["operations"] == 2 * 4 * 24 * 11 * 32
    out = run(recipe, tmp_path / "out", device="cpu").folder
    after = load_tensors(out)
    assert HEAD not in after
    assert after[EMBEDDING].dtype == torch.bfloat16
    np.testing.assert_allclose(
        rows64(out, EMBEDDING), wanted(tmp_path, EMBEDDING, "omp", 4), rtol=after_rounding(torch.bfloat16), atol=1e-6
    )


# ---- the sums


@pytest.mark.parametrize("screen", [False, True])
def test_pursuit_is_the_reference_s(screen):
    """In bfloat16 too, which only proposes: scores of float32 decide."""
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(12, 48, generator=generator)
    atoms = (
        torch.randn(400, 12, generator=generator) @ low + 0.5 * torch.randn(400, 48, generator=generator)
    ).bfloat16()
    targets = (torch.randn(9, 12, generator=generator) @ low).bfloat16()
    places, weights = pursuit(targets, Atoms.of(atoms, screen=screen), 16)
    for target, chosen, weight in zip(targets.double().numpy(), places, weights, strict=True):
        wanted_places, wanted_weights = pursuit64(target, atoms.double().numpy(), 16)
        assert chosen.tolist() == wanted_places.tolist()
        np.testing.assert_allclose(weight, wanted_weights, rtol=2e-4, atol=2e-5)


def test_pursuit_stops_where_nothing_is_left():
    """A target in the span of two atoms, a zero, a copy of an atom that is there twice: zeros for the rest, no NaN."""
    atoms = torch.eye(6, 8)
    atoms[5] = atoms[0]
    targets = torch.stack([3 * atoms[0] - 2 * atoms[4], torch.zeros(8), atoms[5]])
    places, weights = pursuit(targets, Atoms.of(atoms), 4)
    assert weights.tolist() == [[3, -2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert places[0, :2].tolist() == [0, 4]
    assert places[2, 0] == 0
    same, distance = nearest(targets[2:], Atoms.of(atoms), 2)
    assert same.tolist() == [[0, 5]]
    assert distance.tolist() == [[0.5, 0.5]]


def test_a_block_that_fails_fails_every_thread():
    def compute(block: int) -> Any:
        raise MemoryError(block)

    blocks = SharedBlocks(2, compute)
    for _ in range(2):
        with pytest.raises(MemoryError):
            blocks.get(1)


# ---- spellings

DECODERS: list[tuple[dict[str, Any], Spelling, dict[str, bytes]]] = [
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}, "model": {"type": "BPE"}},
     Spelling("bytes"), {"Ġa": b" a", "Ċ": b"\n", "Ã©": "é".encode(), "▁": "▁".encode()}),
    ({"decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]}},
     Spelling("sentencepiece"), {"▁a": b" a", "<0x0A>": b"\n", "é": "é".encode(), "▁▁": b"  "}),
    ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}, "model": {"type": "Unigram"}},
     Spelling("sentencepiece"), {"▁a": b" a"}),
    ({"model": {"type": "WordPiece", "continuing_subword_prefix": "##"}},
     Spelling("wordpiece", "##"), {"a": b" a", "##a": b"a", "##": b" ##"}),
    ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, Spelling(ends="</w>"), {"a</w>": b"a ", "a": b"a"}),
]  # fmt: skip


@pytest.mark.parametrize(("described", "spelling", "texts"), DECODERS)
def test_what_tokens_stand_for(described, spelling, texts):
    assert spelling_of(described) == spelling
    assert {token: spelling.text(token) for token in texts} == texts


def test_tokens_are_matched_by_what_they_stand_for_and_none_is_given_twice():
    special = {"special": True}
    ours = Tokens(
        {"<0x61>": 0, "<0xC3>": 1, "a": 2, "▁the": 3, "</s>": 4, "é": 5, "<tool>": 6, "▁": 7},
        {"</s>": special, "<tool>": {}}, 6, Spelling("sentencepiece"),
    )  # fmt: skip
    theirs = Tokens(
        {"a": 0, "Ã": 1, "Ġthe": 2, "<|end|>": 3, "Ã©": 4, "<tool>": 5, "<s>": 6, "Ġ": 7, "new": 8},
        {"<|end|>": special, "<tool>": special, "<s>": special}, 9, Spelling("bytes"),
    )  # fmt: skip
    there, notes = match(
        ours, theirs, {"eos_token": "</s>", "bos_token": "</s>"}, {"eos_token": "<|end|>", "bos_token": "<s>"}
    )
    assert there == {0: 2, 1: 1, 2: 3, 3: 4, 4: 5, 5: 6, 7: 7}
    assert notes == ["<|end|> takes the row of </s> (eos)"]
    back, _ = match(theirs, ours, {}, {})
    assert back == {1: 1, 2: 0, 3: 2, 5: 4, 6: 5, 7: 7}


# ---- what is refused

LINES: list[tuple[str, str]] = [
    ("transplant: ./donor, source: union", "cannot stand beside transplant"),
    ("transplant: ./donor, tokens: {w1: {source: ./base}}", "cannot stand beside transplant"),
    ("method: omp", "is for transplant"),
    ("transplant: ./donor, method: pca", "omp"),
    ("transplant: ./donor, k: 0", "k"),
    ("transplant: ./donor}\noutput: {kind: delta", "vocabulary of its base"),
]


@pytest.mark.parametrize(("keys", "said"), LINES)
def test_a_recipe_that_says_two_things_is_refused(folder, tmp_path, keys, said):
    (folder / "bad.yaml").write_text(f"base_model: ./base\nmodels: [{{model: ./tune}}]\ntokenizer: {{{keys}}}\n")
    with pytest.raises(RecipeError, match=said):
        make_plan(folder / "bad.yaml")


def spoiled(folder: Path, what: str) -> str:
    """A folder with two models one of which is at fault; the keys of `tokenizer` in the recipe."""
    two_models(folder)
    base, donor = folder / "base", folder / "donor"
    config = json.loads((base / "config.json").read_text())
    if what in ("no tokenizer", "no tokenizer of the model"):
        ((donor if what == "no tokenizer" else base) / "tokenizer.json").unlink()
    elif what == "nothing in common":
        word_tokenizer(donor, [f"x{i}" for i in range(36)], special=())
        (donor / "special_tokens_map.json").unlink(missing_ok=True)
    elif what == "no embedding":
        tensors = {n: t for n, t in load_tensors(donor).items() if t.shape[0] != 35}
        make_checkpoint(donor, tensors, config=json.loads((donor / "config.json").read_text()))
    elif what == "no embedding in the model":
        make_checkpoint(base, {n: t for n, t in load_tensors(base).items() if t.shape[0] != 44}, config=config)
    elif what == "two vocabularies":
        write_json(base / "config.json", config | {"vision_config": {"vocab_size": 8192}})
    elif what == "a token of pictures":
        write_json(base / "config.json", config | {"image_token_id": vocab_of(base)["w39"]})
    return "k: 25" if what == "k" else "k: 4"


FAULTS = {
    "no tokenizer": "donor: has no tokenizer.json",
    "no tokenizer of the model": "base: has no tokenizer.json",
    "nothing in common": "base and ./donor have no token in common",
    "k": "25 rows a sum, and ./base and ./donor have 24 tokens in common",
    "no embedding": "donor: has no embedding",
    "no embedding in the model": "no tensor of ./base has a row per token",
    "two vocabularies": "base: has several vocabularies .vocab_size 44, vision_config.vocab_size 8192",
    "a token of pictures": "image_token_id is of 'w39', a token that ./donor lacks",
}


@pytest.mark.parametrize("what", FAULTS)
def test_models_at_fault_are_refused_in_one_line(what, tmp_path):
    keys = spoiled(tmp_path, what)
    (tmp_path / "r.yaml").write_text(ONE.format(more=keys))
    with pytest.raises(DeltamergeError, match=FAULTS[what]) as caught:
        make_plan(tmp_path / "r.yaml", device="cpu")
    assert caught.value.exit_code == 1


def test_too_little_memory_is_refused_before_the_work(folder, tmp_path):
    recipe = folder / "small.yaml"
    recipe.write_text(ONE.format(more="k: 4"))
    with pytest.raises(DeltamergeError, match="is too little"):
        make_plan(recipe, device="cpu", memory=150_000_000)
