"""A tokenizer of words, which needs nothing that is only there for tests: `benchmarks/speed/gpu.py` writes it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return path


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of `vocab_size` words that AutoTokenizer loads: `<pad> <s> </s> <unk> w4 w5 …`."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), vocab_size)]
    added = [
        {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, word in enumerate(special)
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"}
    nothing = dict.fromkeys(["truncation", "padding", "normalizer", "post_processor", "decoder"])
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": model,
    }
    write_json(folder / "tokenizer.json", nothing | tokenizer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 48} | names,
    )
