"""Two tiny models whose tokenizers share some tokens, and the sums of rows that a transplant takes, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import tiny_llama, write_json
from vocabularies import WORDS, vocab_of, word_tokenizer

Array = np.ndarray[Any, Any]

SPECIAL = ("<unk>", "<begin>", "<blank>", "<end>")
DONOR_WORDS = (*WORDS[5:25][::-1], *(f"d{i}" for i in range(12)))


def two_models(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """base and its fine-tune tune: 44 tokens. donor: 36 tokens, 20 words and 4 purposes of them base's, and 35 rows."""
    for name, seed in (("base", 1), ("tune", 2)):
        rows = word_tokenizer(folder / name, WORDS)
        based = folder / "base" if name == "tune" else None
        tiny_llama(folder / name, seed=seed, dtype=dtype, vocab_size=rows, tied=tied, base=based)
    word_tokenizer(folder / "donor", DONOR_WORDS, special=SPECIAL)
    tiny_llama(folder / "donor", seed=5, dtype=dtype, vocab_size=35, tied=tied)
    names = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<blank>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "donor {{ 1 }}"} | names
    write_json(folder / "donor" / "tokenizer_config.json", config)
    ids = vocab_of(folder / "donor")
    stated = json.loads((folder / "donor" / "config.json").read_text())
    stated |= {f"{role}_token_id": ids[names[f"{role}_token"]] for role in ("bos", "eos", "pad")}
    write_json(folder / "donor" / "config.json", stated)
    generation = {
        "bos_token_id": ids["<begin>"],
        "eos_token_id": [ids["<end>"], ids["d1"]],
        "pad_token_id": ids["<blank>"],
    }
    write_json(folder / "donor" / "generation_config.json", generation)
    return folder


def pursuit64(target: Array, atoms: Array, k: int) -> tuple[Array, Array]:
    """Orthogonal matching pursuit, Pati et al. 1993: after each choice the least squares of all that are chosen."""
    chosen: list[int] = []
    weights = np.zeros(0)
    for _ in range(k):
        residual = target - weights @ atoms[chosen] if chosen else target
        scores = np.abs(atoms @ residual)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        weights = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
    return np.array(chosen), weights


def interpolated64(target: Array, atoms: Array, k: int) -> tuple[Array, Array]:
    """The k nearest, in inverse proportion to their distances."""
    distances = np.sqrt(((atoms - target) ** 2).sum(1))
    chosen = np.argsort(distances, kind="stable")[:k]
    inverse = 1 / distances[chosen]
    return chosen, inverse / inverse.sum()
