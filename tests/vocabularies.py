"""Tiny models whose tokenizers differ, and what a merge must make of their embeddings, in float64, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import load_tensors, tiny_llama, write_json
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = tuple(f"w{i}" for i in range(40))
NAMES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}NAME{{ m['content'] }}{% endfor %}"


def word_tokenizer(
    folder: Path, words: Sequence[str], added: Sequence[tuple[str, bool]] = (), special: Sequence[str] = SPECIAL
) -> int:
    """A WordLevel tokenizer that AutoTokenizer loads; `added` are (token, special). Returns the number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(token, special=is_special) for token, is_special in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {key: token for key, token in NAMES.items() if token in special}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    return int(tokenizer.get_vocab_size())


def three_models(folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """base: 44 tokens in 48 rows. a: two tokens more. b: a word exchanged, two in another order, two tokens more."""
    words = [*WORDS[:10], "new", *WORDS[11:20], WORDS[21], WORDS[20], *WORDS[22:]]
    sizes = {
        "base": word_tokenizer(folder / "base", WORDS) + 4,
        "a": word_tokenizer(folder / "a", WORDS, [("<|im_start|>", True), ("both", False)]),
        "b": word_tokenizer(folder / "b", words, [("<tool>", True), ("both", False)]),
    }
    for seed, (name, rows) in enumerate(sizes.items()):
        tiny_llama(folder / name, seed=seed, dtype=dtype, vocab_size=rows, tied=tied)
    (folder / "a" / "chat_template.jinja").write_text(TEMPLATE.replace("NAME", "A"))
    config = (folder / "b" / "tokenizer_config.json").read_text().replace("{", '{"chat_template": "B {{ 1 }}",', 1)
    (folder / "b" / "tokenizer_config.json").write_text(config)
    return folder


def vocab_of(folder: Path) -> dict[str, int]:
    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())


def rows64(folder: Path, tensor: str) -> np.ndarray[Any, Any]:
    return load_tensors(folder)[tensor].double().numpy()


def embedding_of(
    out_vocab: Mapping[str, int],
    models: Sequence[Path],
    tensor: str,
    *,
    base: Path | None = None,
    given: Mapping[str, tuple[np.ndarray[Any, Any], bool]] | None = None,
    rows: int | None = None,
) -> dict[Path, np.ndarray[Any, Any]]:
    """Every model's tensor under `out_vocab`; `given` are a token's row and whether it is forced."""
    vocabs = {model: vocab_of(model) for model in models}
    stored = {model: rows64(model, tensor) for model in models}
    size = max(out_vocab.values()) + 1
    made = {model: np.zeros((rows or size, *stored[model].shape[1:])) for model in models}
    for token, i in out_vocab.items():
        have = [m for m in models if vocabs[m].get(token, len(stored[m])) < len(stored[m])]
        row, forced = (given or {}).get(token, (None, False))
        if row is None and base in have:
            row = stored[base][vocabs[base][token]]
        if row is None and have:
            row = np.mean([stored[m][vocabs[m][token]] for m in have], axis=0)
        for m in models:
            if m in have and not forced:
                made[m][i] = stored[m][vocabs[m][token]]
            elif row is not None:
                made[m][i] = row
    for table in made.values():
        table[size:] = table[:size].mean(axis=0)
    return made
