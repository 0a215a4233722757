"""Rows of embeddings that mean other tokens: refused where they are many, said where they are few."""

from __future__ import annotations

import json
import random
import struct
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from calls import call
from conftest import tiny_llama, write_json
from running import make_plan, run
from safetensors.torch import save_file
from vocabularies import TEMPLATE, rows64, word_tokenizer

from deltamerge.apps.inspect.diff import diff
from deltamerge.errors import InputError
from deltamerge.files.strict_json import SharedParts, read_json
from deltamerge.models.vocabulary_files import Reading, sentences
from deltamerge.run.check import check_recipe
from deltamerge.run.options import Options

WORDS = [*(f"w{i}" for i in range(292)), "<r0>", "<r1>", "<r2>", "<r3>"]  # with special tokens 300
TWO = """\
base_model: ./base
merge_method: task_arithmetic
models: [{model: ./a}, {model: ./b}]
parameters: {weight: 1.0}
dtype: float32
"""
ONE = TWO.replace(", {model: ./b}", "")
PERMUTED = random.Random(0).sample(WORDS, len(WORDS))


def own(*changes: tuple[str, str]) -> list[str]:
    """The words with some in the rows of others."""
    exchanged = dict(changes)
    return [exchanged.get(word, word) for word in WORDS]


def models(folder: Path, **words: Sequence[str]) -> Path:
    """Fine-tunes of ./base of the same size, whose tokenizers have `words`; the base's are WORDS."""
    for seed, (name, own_words) in enumerate({"base": WORDS, **words}.items()):
        rows = word_tokenizer(folder / name, own_words)
        base = folder / "base" if name != "base" else None
        tiny_llama(folder / name, seed=seed, dtype=torch.float32, vocab_size=rows, base=base)
    return folder


def said(folder: Path, text: str) -> tuple[str, ...]:
    """The warnings of `check`, which are those of `plan`."""
    (folder / "m.yaml").write_text(text)
    found = check_recipe(folder / "m.yaml", Options(device="cpu"))
    if found.error is not None:
        raise found.error
    assert found.warnings == make_plan(folder / "m.yaml", device="cpu").warnings
    return found.warnings


def refused(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        said(folder, text)
    assert len(str(caught.value).splitlines()) == 1
    return f"{caught.value} | {caught.value.hint}"


# ---- many rows


def test_a_permuted_vocabulary_is_refused_and_names_models_rows_and_the_way(tmp_path, capsys):
    models(tmp_path, a=WORDS, b=PERMUTED)
    line = refused(tmp_path, TWO)
    apart = [i + 4 for i, (x, y) in enumerate(zip(WORDS, PERMUTED, strict=True)) if x != y]
    assert f"./base and ./b have other tokens in {len(apart)} of 300 rows" in line
    for row in apart[:2]:
        assert f"row {row} ({WORDS[row - 4]!r}, {PERMUTED[row - 4]!r})" in line
    assert "tokenizer_source: union (or base)" in line
    assert call(capsys, "run", tmp_path / "m.yaml", "--out", tmp_path / "out")[0] == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["tokenizer_source: union", "tokenizer_source: base", "tokenizer: {source: union}",
                                 "tokenizer: union"])  # fmt: skip
def test_with_rows_matched_by_token_it_is_merged_and_right(tmp_path, key):
    models(tmp_path, b=PERMUTED)
    (tmp_path / "m.yaml").write_text(ONE.replace("./a", "./b") + key + "\n")
    out = run(tmp_path / "m.yaml", tmp_path / "out").folder
    there = [*range(4), *(4 + PERMUTED.index(word) for word in WORDS)]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_allclose(rows64(out, name), rows64(tmp_path / "b", name)[there], rtol=0, atol=1e-6)


def test_one_in_a_hundred_rows_is_said_and_more_are_refused(tmp_path):
    exchanged = [(f"w{i}", f"x{i}") for i in range(4)]
    models(tmp_path, a=own(*exchanged[:3]), b=WORDS)
    assert "3 of 300 rows of the embedding mean other tokens" in said(tmp_path, TWO)[0]
    word_tokenizer(tmp_path / "a", own(*exchanged))
    assert "4 of 300 rows" in refused(tmp_path, TWO)


def test_two_fine_tunes_that_are_near_the_base_but_not_one_another_are_refused(tmp_path):
    models(
        tmp_path, a=own(*((f"w{i}", f"a{i}") for i in range(3))), b=own(*((f"w{i}", f"b{i}") for i in range(10, 13)))
    )
    assert "./a and ./b have other tokens in 6 of 300 rows of the embedding, such as row 4 ('a0', 'w0')" in refused(
        tmp_path, TWO
    )


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties"])
def test_methods_with_and_without_a_base_are_refused_alike(tmp_path, method):
    models(tmp_path, a=WORDS, b=PERMUTED)
    text = f"merge_method: {method}\nmodels: [{{model: ./a}}, {{model: ./b}}]\nparameters: {{weight: 0.5}}\n"
    if method == "slerp":
        text = "merge_method: slerp\nbase_model: ./a\nmodels: [{model: ./b}]\nparameters: {t: 0.5}\n"
    elif method != "linear":
        text += "base_model: ./base\n"
    assert "have other tokens" in refused(tmp_path, text)


def test_a_slerp_that_leaves_the_embeddings_alone_is_merged_and_so_are_weights_of_zero(tmp_path):
    models(tmp_path, a=WORDS, b=PERMUTED)
    tables = "[{filter: embed_tokens, value: 0}, {filter: lm_head, value: 0}, {value: 0.5}]"
    text = f"merge_method: slerp\nbase_model: ./a\nmodels: [{{model: ./b}}]\nparameters: {{t: {tables}}}\n"
    assert any("have other tokens" in line for line in said(tmp_path, text + "template: base\n"))
    text = "merge_method: linear\nmodels:\n  - {model: ./a, parameters: {weight: 1}}\n"
    text += f"  - {{model: ./b, parameters: {{weight: {tables}}}}}\n"
    assert any("have other tokens" in line for line in said(tmp_path, text))


def test_one_model_passes_with_its_own_tokenizer_and_not_with_another(tmp_path):
    models(tmp_path, b=PERMUTED)
    text = "merge_method: passthrough\nmodels: [{model: ./b}]\n"
    assert said(tmp_path, text) == ()
    stacked = "merge_method: passthrough\nslices:\n- sources: [{model: ./base, layer_range: [0, 1]}]\n"
    stacked += "- sources: [{model: ./b, layer_range: [1, 2]}]\n"
    assert "have other tokens" in refused(tmp_path, stacked)  # the embedding of one and the head of the other


@pytest.mark.parametrize("source", ["./other", "base"])
def test_a_setting_that_only_copies_files_lets_no_permuted_vocabulary_pass(tmp_path, source):
    """Without a tokenizer.json there is nothing to match by, and the files are copied."""
    models(tmp_path, a=WORDS, other=WORDS)
    for name, words in (("base", PERMUTED), ("a", WORDS), ("other", PERMUTED)):
        (tmp_path / name / "tokenizer.json").unlink()
        (tmp_path / name / "vocab.txt").write_text(
            "".join(f"{word}\n" for word in ["<pad>", "<s>", "</s>", "<unk>", *words])
        )
    if source == "./other":
        (tmp_path / "base" / "vocab.txt").write_bytes((tmp_path / "a" / "vocab.txt").read_bytes())
    assert "have other tokens" in refused(tmp_path, ONE + f"tokenizer_source: {source}\n")


# ---- tokenizers of other files


def _proto(words: Sequence[str]) -> bytes:
    """A SentencePiece model of nothing but its pieces."""
    found = b""
    for i, word in enumerate(words):
        text = word.encode()
        piece = bytes([10, len(text)]) + text + bytes([21]) + struct.pack("<f", -float(i)) + bytes([24, 1])
        found += bytes([10, len(piece)]) + piece
    return found


def _slow(folder: Path, file: str, words: Sequence[str]) -> None:
    """Only a slow tokenizer's file, of the words of the folder's tokenizer.json."""
    (folder / "tokenizer.json").unlink(missing_ok=True)
    words = ["<pad>", "<s>", "</s>", "<unk>", *words]
    if file == "vocab.txt":
        (folder / file).write_text("".join(f"{word}\n" for word in words))
    elif file == "vocab.json":
        write_json(folder / file, {word: i for i, word in enumerate(words)})
        (folder / "merges.txt").write_text("#version: 0.2\nw 1\n")
    elif file == "tiktoken.model":
        lines = (b64encode(word.encode()) + f" {i}\n".encode() for i, word in enumerate(words))
        (folder / file).write_bytes(b"".join(lines))
    elif file == "tekken.json":
        vocab = [{"rank": i, "token_bytes": b64encode(w.encode()).decode()} for i, w in enumerate(words[4:])]
        special = [{"rank": i, "token_str": w} for i, w in enumerate(words[:4])]
        config = {"default_num_special_tokens": 4}
        write_json(folder / file, {"config": config, "vocab": vocab, "special_tokens": special})
    else:
        (folder / file).write_bytes(_proto(words))


FILES = ["vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "tiktoken.model", "tekken.json"]


@pytest.mark.parametrize("file", FILES)
def test_slow_tokenizers_are_compared_too(tmp_path, file):
    words = own(("<r0>", "<tool>"))
    models(tmp_path, a=words, b=WORDS)
    for name, own_words in (("base", WORDS), ("a", words), ("b", WORDS)):
        _slow(tmp_path / name, file, own_words)
    assert (
        "1 of 300 rows of the embedding mean other tokens: row 296 is '<r0>' in ./base, '<tool>' in ./a"
        in said(tmp_path, TWO)[0]
    )
    _slow(tmp_path / "b", file, PERMUTED)
    assert "./base and ./b have other tokens in" in refused(tmp_path, TWO)


@pytest.mark.parametrize("file", FILES)
def test_a_slow_tokenizer_beside_a_tokenizer_json(tmp_path, file):
    models(tmp_path, a=WORDS, b=WORDS)
    _slow(tmp_path / "b", file, WORDS)
    assert not [line for line in said(tmp_path, TWO) if "rows" in line]
    _slow(tmp_path / "b", file, PERMUTED)
    assert "./base and ./b have other tokens in" in refused(tmp_path, TWO)


def test_a_family_whose_ids_are_its_pieces_moved_on_is_one_vocabulary(tmp_path):
    """As XLM-RoBERTa's, whose token 4 is piece 3."""
    models(tmp_path, a=WORDS, b=WORDS)
    (tmp_path / "b" / "tokenizer.json").unlink()
    (tmp_path / "b" / "sentencepiece.bpe.model").write_bytes(_proto(["<unk>", "<s>", "</s>", *WORDS]))
    assert not [line for line in said(tmp_path, TWO) if "rows" in line]


def test_tokens_that_only_added_tokens_or_the_config_have(tmp_path):
    models(tmp_path, a=WORDS, b=WORDS)
    for name, token in (("a", "<tool>"), ("b", "<think>")):
        for folder in ("base", name):
            _slow(tmp_path / folder, "vocab.json", WORDS)
        config = read_json(tmp_path / name / "tokenizer_config.json")
        entry = {"content": token, "special": True}
        write_json(tmp_path / name / "tokenizer_config.json", config | {"added_tokens_decoder": {"297": entry}})
    write_json(tmp_path / "base" / "added_tokens.json", {"<own>": 298})
    lines = said(tmp_path, TWO)
    assert any("row 297 is '<r1>' in ./base, '<tool>' in ./a, '<think>' in ./b" in line for line in lines)


def test_a_token_that_only_tokenizer_config_adds_to_a_tokenizer_json(tmp_path):
    models(tmp_path, a=WORDS, b=WORDS)
    for name in ("base", "a", "b"):
        tiny_llama(tmp_path / name, seed=1, vocab_size=304)
    for name, token in (("a", "<tool>"), ("b", "<think>")):
        config = read_json(tmp_path / name / "tokenizer_config.json")
        decoder = {"300": {"content": token, "special": True}}
        write_json(tmp_path / name / "tokenizer_config.json", config | {"added_tokens_decoder": decoder})
    lines = said(tmp_path, TWO)
    for name, token in (("./a", "<tool>"), ("./b", "<think>")):
        line = next(line for line in lines if line.startswith(f"{name} has 1 token that ./base lacks"))
        assert f"{token!r} (row 300)" in line
        assert "tokenizer_source: union keeps" in line


def test_what_cannot_be_read_is_said_and_merged(tmp_path):
    models(tmp_path, a=WORDS, b=WORDS)
    (tmp_path / "b" / "tokenizer.json").write_text("[]")
    assert any(
        "tokenizers are not compared: ./b: tokenizer.json: is not a JSON object" in x for x in said(tmp_path, TWO)
    )


# ---- few rows, special tokens, templates


def test_two_fine_tunes_each_with_a_token_on_the_same_reserved_row(tmp_path):
    models(tmp_path, a=own(("<r1>", "<tool>")), b=own(("<r1>", "<think>")))
    line = next(line for line in said(tmp_path, TWO) if "rows" in line)
    assert "1 of 300 rows of the embedding mean other tokens: row 297 is '<r1>' in ./base, " in line
    assert ", '<tool>' in ./a, '<think>' in ./b; " in line
    assert "the tokenizer of ./base is written" in line
    assert "tokenizer_source: union keeps every token with its own row" in line


def test_two_fine_tunes_each_with_a_token_on_a_row_of_its_own(tmp_path):
    models(tmp_path, a=own(("<r1>", "<tool>")), b=own(("<r2>", "<think>")))
    line = next(line for line in said(tmp_path, TWO) if "rows" in line)
    assert "row 297 is '<r1>' in ./base, '<tool>' in ./a; row 298 is '<r2>' in ./base, '<think>' in ./b" in line


def test_a_new_word_of_the_only_fine_tune_is_a_note_as_its_tokenizer_is_written(tmp_path):
    models(tmp_path, a=own(("w7", "new")))
    assert said(tmp_path, ONE) == ()
    notes = make_plan(tmp_path / "m.yaml", device="cpu").notes
    assert any("row 11 is 'new' in ./a, 'w7' in ./base; the tokenizer of ./a is written" in note for note in notes)


def test_warnings_reach_plan_run_card_and_lock(tmp_path, capsys):
    models(tmp_path, a=own(("<r1>", "<tool>")), b=WORDS)
    (tmp_path / "m.yaml").write_text(TWO)
    for command in ("check", "plan", "run"):
        more = ["--out", str(tmp_path / "out")] if command == "run" else []
        code, out, err = call(capsys, command, tmp_path / "m.yaml", *more)
        assert code == 0
        assert "row 297 is" in " ".join((out + err).split())
    assert "row 297 is" in (tmp_path / "out" / "README.md").read_text()
    assert any(
        "row 297 is" in line for line in yaml.safe_load((tmp_path / "out" / "recipe.lock").read_text())["warnings"]
    )


def _edit(folder: Path, **keys: object) -> None:
    write_json(folder / "tokenizer_config.json", read_json(folder / "tokenizer_config.json") | keys)


@pytest.mark.parametrize("role", ["eos_token", "bos_token", "pad_token", "unk_token"])
def test_another_token_of_a_purpose(tmp_path, role):
    models(tmp_path, a=WORDS, b=WORDS)
    _edit(tmp_path / "b", **{role: "<r3>"})
    line = next(line for line in said(tmp_path, TWO) if role in line)
    assert f"{role} is '<r3>' in ./b, " in line
    assert "in ./base; the tokenizer of ./base is written; tokenizer_source: ./b writes that of ./b" in line
    assert said(tmp_path, TWO + "tokenizer_source: ./b\n") == ()


def test_a_purpose_that_only_special_tokens_map_names(tmp_path):
    models(tmp_path, a=WORDS, b=WORDS)
    for name, token in (("base", "</s>"), ("a", "</s>"), ("b", {"content": "<r2>"})):
        write_json(tmp_path / name / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        write_json(tmp_path / name / "special_tokens_map.json", {"eos_token": token})
    assert any("eos_token is '<r2>' in ./b, '</s>' in ./base" in line for line in said(tmp_path, TWO))


def test_a_token_that_is_special_in_one(tmp_path):
    models(tmp_path, a=WORDS, b=WORDS)
    word_tokenizer(tmp_path / "b", WORDS[:-1], [("<r3>", True)])
    assert any("special in only one of ./base and ./b: '<r3>'" in line for line in said(tmp_path, TWO))


def test_another_chat_template(tmp_path):
    models(tmp_path, a=WORDS, b=WORDS)
    (tmp_path / "b" / "chat_template.jinja").write_text(TEMPLATE)
    lines = [line for line in said(tmp_path, TWO) if "chat template" in line]
    assert lines == [
        "./b has a chat template, ./base none; that of ./base is written; chat_template: ./b chooses another"
    ]
    _edit(tmp_path / "base", chat_template="plain")
    _edit(tmp_path / "a", chat_template="plain ")
    lines = [line for line in said(tmp_path, TWO) if "chat template" in line]
    assert lines[0].startswith("./b has another chat template than ./base; that of ./base is written")
    assert not [line for line in said(tmp_path, TWO + "chat_template: ./b\n") if "chat template" in line]


def test_the_base_s_own_template_and_eos_are_no_warning_where_a_fine_tune_s_are_written(tmp_path):
    models(tmp_path, a=WORDS)
    _edit(tmp_path / "a", chat_template="chat", eos_token="<r0>")
    assert said(tmp_path, ONE) == ()


def test_text_that_is_cut_otherwise(tmp_path):
    models(tmp_path, a=WORDS, b=WORDS)
    whole = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    whole["normalizer"] = {"type": "Lowercase"}
    write_json(tmp_path / "b" / "tokenizer.json", whole)
    assert any("./b cuts text otherwise than ./base: normalizer" in line for line in said(tmp_path, TWO))


def test_merges_as_texts_and_as_pairs_are_the_same(tmp_path):
    models(tmp_path, a=WORDS, b=WORDS)
    whole = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    vocab = whole["model"]["vocab"]
    for name, merges in (("base", ["w 1", "w 2"]), ("a", [["w", "1"], ["w", "2"]]), ("b", [["w", "2"], ["w", "1"]])):
        write_json(
            tmp_path / name / "tokenizer.json", whole | {"model": {"type": "BPE", "vocab": vocab, "merges": merges}}
        )
    lines = [line for line in said(tmp_path, TWO) if "merges" in line]
    assert [line.split(":")[0] for line in lines] == ["./b cuts text otherwise than ./base"]


# ---- adapters, mixtures, pipelines, and other commands


def _adapter(folder: Path, words: Sequence[str]) -> None:
    word_tokenizer(folder, words)
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
    }
    write_json(folder / "adapter_config.json", config)
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{start}A.weight": torch.ones(1, 32), f"{start}B.weight": torch.ones(32, 1)}
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_an_adapter_s_own_tokenizer_is_compared_with_its_base_s_which_is_written(tmp_path):
    models(tmp_path)
    _adapter(tmp_path / "lora", own(("<r1>", "<tool>")))
    _edit(tmp_path / "lora", chat_template="chat")
    text = "base_model: ./base\nmodels: [{model: ./base+./lora}]\n"
    lines = said(tmp_path, text)
    assert any("row 297 is '<r1>' in ./base, '<tool>' in ./base+./lora" in line for line in lines)
    assert any("./base+./lora has a chat template, ./base none" in line for line in lines)
    _adapter(tmp_path / "lora", PERMUTED)  # its rows are the base's all the same
    assert any("have other tokens" in line for line in said(tmp_path, text))


def test_extract_against_a_base_with_a_permuted_vocabulary(tmp_path, monkeypatch, capsys):
    """The whole delta is exact, and said to be of another vocabulary; a part of it would mix two."""
    models(tmp_path, b=PERMUTED)
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "extract", "b", "base", "--out", "d")
    assert code == 0
    assert "warning: b and base have other tokens" in err
    code, _, err = call(capsys, "extract", "b", "base", "--density", "0.1", "--out", "p")
    assert code == 1
    assert "have other tokens" in err
    assert "passthrough and tokenizer_source: base" in err
    assert not (tmp_path / "p").exists()


def test_a_fine_tune_put_on_its_base_s_tokens_can_be_extracted(tmp_path, monkeypatch, capsys):
    models(tmp_path, b=PERMUTED)
    (tmp_path / "m.yaml").write_text("merge_method: passthrough\nmodels: [{model: ./b}]\ntokenizer_source: ./base\n")
    run(tmp_path / "m.yaml", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "extract", "moved", "base", "--density", "0.1", "--out", "p")
    assert (code, "tokens" in err) == (0, False)


def test_inspect_and_recommend_warn_of_another_vocabulary(tmp_path, monkeypatch, capsys):
    models(tmp_path, a=own(("<r1>", "<tool>")), b=PERMUTED)
    monkeypatch.chdir(tmp_path)
    for command in (["inspect", "b", "--base", "base"], ["recommend", "b", "--base", "base", "--density", "0.1"]):
        code, out, _ = call(capsys, *command, "--json")
        assert code == 0
        assert any("base and b have other tokens" in line for line in json.loads(out)["warnings"])
    code, out, _ = call(capsys, "recommend", "a", "b", "--base", "base", "--json")
    lines = json.loads(out)["warnings"]
    assert any("have other tokens" in line for line in lines)
    assert any("row 297 is '<r1>' in base, '<tool>' in a" in line for line in lines)
    assert "different vocabularies" in lines[-1]
    assert "tokenizer_source: union" in json.loads(out)["recipe"]
    code, out, _ = call(capsys, "inspect", "a", "--base", "base", "--json")
    assert json.loads(out)["warnings"] == []


def test_diff_says_how_tokenizers_differ(tmp_path, capsys):
    models(tmp_path, a=own(("<r1>", "<tool>")), b=PERMUTED)
    _edit(tmp_path / "a", eos_token="<r0>")
    base, a, b = (str(tmp_path / name) for name in ("base", "a", "b"))
    lines = diff(base, a, 1)["tokenizers"]
    assert any("row 297 is '<r1>'" in line for line in lines)
    assert any("eos_token is '<r0>'" in line for line in lines)
    assert any("have other tokens" in line for line in diff(base, b, 1)["tokenizers"])
    _, out, _ = call(capsys, "diff", base, a)
    assert "eos_token is '<r0>'" in " ".join(out.split())
    assert diff(base, base, 1)["tokenizers"] == []


# ---- what it costs, and hostile files


def _large(folder: Path, count: int, own_token: str) -> None:
    vocab = {f"t{i}": i for i in range(count)}
    merges = [["t", str(i)] for i in range(count)]
    added = [{"id": count - 1, "content": own_token, "special": True}]
    del vocab[f"t{count - 1}"]
    write_json(
        folder / "tokenizer.json", {"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    )


def test_a_file_that_is_there_twice_is_hashed_and_not_parsed(tmp_path, monkeypatch):
    models(tmp_path, a=WORDS, b=WORDS)
    monkeypatch.setattr(Reading, "words", lambda *_: pytest.fail("parsed"))
    assert said(tmp_path, TWO) == ()


def test_large_vocabularies_of_four_models_take_about_a_second(tmp_path):
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).mkdir()
        _large(tmp_path / name, 256_000, f"<{name}>")
    reading = Reading()
    begun = time.process_time()
    for name in ("base", "a", "b", "c"):
        reading.content(tmp_path / name)
        assert len(reading.words(tmp_path / name).rows) == 256_000
    assert time.process_time() - begun < 3  # 0.7 s where nothing else runs


def test_parts_that_were_read_before_are_the_same_values(tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text('{"a": 1, "model": {"vocab": {"x": 1}, "k": [1, 2]}}')
    other.write_text(' {"a":12,"model":{"vocab": {"x": 1},"k":[1, 3]} , "z": "\\u00e9"}\n')
    parts = SharedParts()
    first, second = parts.read(one, "model"), parts.read(other, "model")
    assert (first, second) == (read_json(one), read_json(other))
    assert first["model"]["vocab"] is second["model"]["vocab"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a"', '{"a":', '{"a":1', '{"a":1,}', '{"a":1 "b":2}', '{"a":1}{', '{"a":1,"a":2}', "{a:1}",
     '{"a":}', '{"model":{"v":1,"v":2}}', '{"model":{"v":1', '{"a":"\\ud800"}', '{"a":' + "[" * 100_000,
     '{"model":{"v":{"x":1,"x":2}}}'],
)  # fmt: skip
def test_json_in_parts_is_refused_as_read_json_refuses_it(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError) as wanted:
        read_json(path)
    with pytest.raises(InputError) as caught:
        SharedParts().read(path, "model")
    assert str(caught.value) == str(wanted.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [("vocab.json", b'{"a": -1}'), ("vocab.json", b'{"a": 99999999999}'), ("vocab.txt", b"\xff\xfe"),
     ("tokenizer.model", b"\x0a\xff\xff\xff"), ("tiktoken.model", b"no ranks"), ("tiktoken.model", b"%% 1"),
     ("tekken.json", b'{"vocab": 1}'), ("tokenizer.json", b'{"model": {"vocab": 3}}'),
     ("tokenizer.json", b'{"model": {"vocab": {"a": true}}}'),
     ("tokenizer.json", b'{"added_tokens": 1, "model": {"vocab": {}}}')],
)  # fmt: skip
def test_files_that_are_no_vocabulary_are_said(tmp_path, file, content):
    models(tmp_path, a=WORDS, b=WORDS)
    (tmp_path / "b" / "tokenizer.json").unlink()
    (tmp_path / "b" / file).write_bytes(content)
    assert any("tokenizers are not compared: ./b: " in line for line in said(tmp_path, TWO))


def test_pieces_of_sentencepiece():
    assert [text for text, _, _ in sentences(_proto(["a", "▁b"]), Path("x"))] == ["a", "▁b"]


def test_a_pipeline_s_tokenizers_are_compared_folder_by_folder(tmp_path):
    table = {"text_model.embeddings.token_embedding.weight": torch.ones(300, 8)}
    for name, words in (("base", WORDS), ("a", own(("<r1>", "<style>"))), ("b", WORDS)):
        folder = tmp_path / name
        listed = {"_class_name": "P", "text_encoder": ["transformers", "C"], "tokenizer": ["transformers", "T"]}
        for part in ("tokenizer", "text_encoder"):
            (folder / part).mkdir(parents=True)
        write_json(folder / "model_index.json", listed)
        write_json(folder / "text_encoder" / "config.json", {"model_type": "clip_text_model", "vocab_size": 300})
        save_file(table, folder / "text_encoder" / "model.safetensors")
        _slow(folder / "tokenizer", "vocab.json", words)
    assert any("tokenizer: 1 of 300 rows of the embedding mean other tokens" in line for line in said(tmp_path, TWO))
    _slow(tmp_path / "b" / "tokenizer", "vocab.json", PERMUTED)
    assert "tokenizer: ./base/tokenizer and ./b/tokenizer have other tokens" in refused(tmp_path, TWO)


def test_an_expert_of_another_vocabulary_is_said_as_the_mixture_has_the_base_s(tmp_path):
    models(tmp_path, a=WORDS, b=PERMUTED)
    text = "base_model: ./base\ngate_mode: random\nexperts:\n- {source_model: ./a}\n- {source_model: ./b}\n"
    assert any("its rows are not in the output, which has the tokenizer of ./base" in x for x in said(tmp_path, text))


def test_a_delta_has_the_tokenizer_beside_it(tmp_path, monkeypatch, capsys):
    models(tmp_path, a=own(("<r1>", "<tool>")), b=own(("<r1>", "<think>")))
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        assert call(capsys, "extract", name, "base", "--out", f"{name}-delta")[0] == 0
    lines = said(tmp_path, TWO.replace("./a}", "./a-delta}").replace("./b}", "./b-delta}"))
    assert any("'<tool>' in ./a-delta, '<think>' in ./b-delta" in line for line in lines)
