"""Tokenizers of GGUF files: read by transformers' own conversion, and written as a vocabulary.

Byte-level BPE can be written, and SentencePiece with its original model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge.errors import InputError
from deltamerge.files import progress
from deltamerge.files.descriptors import scratch
from deltamerge.files.strict_json import read_json
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.tokenizer_files import CONFIG
from deltamerge.models.vocabulary_files import NORMAL, sentences

if TYPE_CHECKING:
    import gguf

PLAIN = "leave output.gguf out, and convert the result with llama.cpp's convert_hf_to_gguf.py"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS, _SPACES = r" ?[^\s\p{L}\p{N}]+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf"{_SIGNS}[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
# llama.cpp's names of how text is split before merges (llama-vocab.cpp), by the pattern in tokenizer.json.
SPLITS = {
    rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CASED}|\p{{N}}|{_SIGNS}[\r\n/]*|{_SPACES}": "tekken",
}
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # llama.cpp's types of tokens
ADDED_SCORE = -1000.0
MOST = 10_000_000  # tokens
LARGEST = 1 << 28  # bytes of a SentencePiece model
SPACE = "\u2581"
LOCAL = ("is_local", "local_files_only")  # the place of transformers' file, which is not part of the tokenizer


# Read.


def described(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the tokenizer's files by name; none if transformers cannot make them."""
    from transformers import AutoTokenizer

    file = checkpoint.files[0]
    try:
        with scratch(file.parent) as folder, progress.phase(f"making the tokenizer of {file.name}", 0, "tokens"):
            (folder / file.name).symlink_to(file.resolve())  # alone: files beside it may be another model's
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False)
            tokenizer.save_pretrained(folder / "made")
            found = {path.name: path.read_bytes() for path in sorted((folder / "made").iterdir()) if path.is_file()}
    except Exception:  # whatever transformers raises for a tokenizer that it does not know
        return {}
    if CONFIG in found:
        config = {key: value for key, value in json.loads(found[CONFIG]).items() if key not in LOCAL}
        found[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return found


# Written.


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """Tokens in the order of ids, with their types. `kind` and `pre` are llama.cpp's names of the splitting of text."""

    kind: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    space: bool | None = None

    def add_to(self, header: gguf.GGUFWriter) -> None:
        """Put it into a file's metadata."""
        header.add_tokenizer_model(self.kind)
        header.add_tokenizer_pre(self.pre)
        header.add_token_list(list(self.tokens))
        if self.scores:
            header.add_token_scores(list(self.scores))
        header.add_token_types(list(self.types))
        if self.space is not None:
            header.add_add_space_prefix(self.space)


def vocabulary(folder: Path, rows: int) -> GgufVocabulary:
    """Return the vocabulary of the tokenizer in `folder`, filled up to `rows` tokens.

    InputError: a kind of tokenizer that is not known.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder}: has no tokenizer.json, which output.gguf needs", hint=PLAIN)
    said = read_json(path)
    model = said.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, Mapping) else model
        raise InputError(f"{path}: a tokenizer of type {str(kind)[:40]} is not written as GGUF", hint=PLAIN)
    added = _checked(path, model["vocab"], said.get("added_tokens") or [])
    if _has_value(said.get("pre_tokenizer"), "type", "ByteLevel"):
        return _bytes(path, said, model["vocab"], added, rows)
    if model.get("byte_fallback") is True:
        return _pieces(folder, said, added, rows)
    raise InputError(f"{path}: neither byte-level BPE nor SentencePiece, and is not written as GGUF", hint=PLAIN)


def _checked(path: Path, vocab: Mapping[str, Any], added: Any) -> list[Mapping[str, Any]]:
    """Return the added tokens. InputError: an added token or an id is malformed."""
    whole = isinstance(added, list) and all(isinstance(token, Mapping) for token in added)
    ids = [*vocab.values(), *(token.get("id") for token in added)] if whole else [None]
    if not whole or not all(type(i) is int and 0 <= i < MOST for i in ids):
        raise InputError(f"{path}: has tokens without a number below {MOST:,}", hint="download the model again")
    if not all(isinstance(token.get("content"), str) for token in added):
        raise InputError(f"{path}: has added tokens without a text", hint="download the model again")
    return list(added)


def _bytes(
    path: Path, said: Mapping[str, Any], vocab: Mapping[str, int], added: list[Mapping[str, Any]], rows: int
) -> GgufVocabulary:
    """Return a vocabulary of byte-level BPE."""
    patterns = list(_patterns(said.get("pre_tokenizer")))
    if not patterns:
        pre = "gpt-2"
    elif len(patterns) == 1 and patterns[0] in SPLITS:
        pre = SPLITS[patterns[0]]
    else:
        raise InputError(f"{path}: splits text in a way that is not known here: {patterns[0][:60]}", hint=PLAIN)
    by_id = {i: (token, NORMAL) for token, i in vocab.items()}
    by_id |= {token["id"]: _added(token) for token in added}
    tokens, types = _filled(by_id, rows)
    return GgufVocabulary("gpt2", pre, tokens, types)


def _pieces(folder: Path, said: Mapping[str, Any], added: list[Mapping[str, Any]], rows: int) -> GgufVocabulary:
    """Return a vocabulary of SentencePiece: pieces, scores and types stand in tokenizer.model."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise InputError(f"{folder}: has no tokenizer.model, whose scores a GGUF of SentencePiece has", hint=PLAIN)
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: is larger than any SentencePiece model", hint="download the model again")
    pieces = list(sentences(path.read_bytes(), path))
    by_id = {i: (piece, kind) for i, (piece, _, kind) in enumerate(pieces)}
    scores = {i: score for i, (_, score, _) in enumerate(pieces)}
    for token in added:
        i, (text, kind) = token["id"], _added(token)
        if i not in by_id or by_id[i][0] != text:
            by_id[i], scores[i] = (text, kind), ADDED_SCORE
        elif token.get("special") and by_id[i][1] == NORMAL:
            by_id[i] = (text, CONTROL)
    tokens, types = _filled(by_id, rows)
    scored = tuple(scores.get(i, ADDED_SCORE * 10) for i in range(len(tokens)))
    return GgufVocabulary("llama", "default", tokens, types, scored, not _has_value(said, "prepend_scheme", "never"))


def _added(token: Mapping[str, Any]) -> tuple[str, int]:
    text = str(token["content"])
    if token.get("special") or (text.startswith(("<|", "<\uff5c")) and text.endswith(("|>", "\uff5c>"))):
        return text, CONTROL
    return text.replace(SPACE, " "), USER_DEFINED


def _filled(by_id: Mapping[int, tuple[str, int]], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return tokens and types of ids from 0. Ids without a token count as unused; models have them for round sizes."""
    count = max(rows, max(by_id, default=-1) + 1)
    if rows and count > rows:
        raise InputError(f"the tokenizer has {count} tokens, the embedding {rows} rows", hint=PLAIN)
    found = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(count)]
    return tuple(text for text, _ in found), tuple(kind for _, kind in found)


def _patterns(value: Any) -> Iterator[str]:
    """Yield the regular expressions that a pre-tokenizer splits by."""
    if isinstance(value, Mapping):
        if isinstance(pattern := value.get("pattern"), Mapping):
            yield str(pattern.get("Regex") or pattern.get("String"))
        for inner in value.values():
            if inner is not pattern:
                yield from _patterns(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner)


def _has_value(value: Any, key: str, wanted: str) -> bool:
    """Return whether a part of a tokenizer has this value of a key, or contains a part that has."""
    if isinstance(value, Mapping):
        return value.get(key) == wanted or any(_has_value(inner, key, wanted) for inner in value.values())
    return isinstance(value, list) and any(_has_value(inner, key, wanted) for inner in value)
