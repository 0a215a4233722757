"""A tokenizer's words by their rows, from tokenizer.json or from the files of a slow tokenizer."""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.strict_json import MAX_VALUES, SharedParts, parse_json, read_bytes, read_json
from deltamerge.models.token_text import BYTES
from deltamerge.models.tokenizer_files import (
    CONFIG,
    MOST_TOKENS,
    SLOW,
    TOKENIZER,
    declared_tokens,
    ids_of,
    tokenizer_config,
)

TEKKEN, MERGES, ADDED = "tekken.json", "merges.txt", "added_tokens.json"
FILES = (TOKENIZER, *SLOW, TEKKEN)
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# The parts of tokenizer.json by which text becomes tokens.
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
NORMAL = 1  # SentencePiece's type of an ordinary piece
LETTERS = {byte: letter for letter, byte in BYTES.items()}


@dataclass(frozen=True, slots=True)
class Words:
    """A vocabulary.

    file      the file that it was read from
    rows      id -> token
    special   tokens that are marked as special
    steps     the parts that turn text into tokens, by name: merges, normalizer, …
    """

    file: str
    rows: dict[int, str]
    special: frozenset[str] = frozenset()
    steps: Mapping[str, Any] = field(default_factory=dict)


class Reading:
    """Reads vocabularies. A file's bytes are hashed once, and equal files are parsed once."""

    def __init__(self) -> None:
        self._parts = SharedParts()
        self._hashes: dict[Path, str] = {}

    def content(self, folder: Path) -> tuple[str, ...] | None:
        """Return a key that is equal for two folders only if their vocabularies are equal. None: a folder has none."""
        name = next((name for name in FILES if (folder / name).is_file()), None)
        if name is None:
            return None
        declared = [(content, entry) for content, entry in declared_tokens(tokenizer_config(folder))]
        others = [self._hash(folder / other) for other in (ADDED, MERGES) if name != TOKENIZER]
        return name, self._hash(folder / name), *others, json.dumps(declared, sort_keys=True)

    def words(self, folder: Path) -> Words:
        """Return the vocabulary of a folder that has one. InputError: it is not valid."""
        name = next(name for name in FILES if (folder / name).is_file())
        if name == TOKENIZER:
            return _fast(self._parts.read(folder / TOKENIZER, "model"), tokenizer_config(folder))
        raw = read_bytes(folder / name)
        with errors.context(name):
            rows, steps = _slow(name, raw)
        special = _add(rows, folder)
        if name == "vocab.json" and (folder / MERGES).is_file():
            steps["merges"] = self._hash(folder / MERGES)
        return Words(name, rows, special, steps)

    def _hash(self, path: Path) -> str:
        if not path.is_file():
            return ""
        real = path.resolve()
        if real not in self._hashes:
            self._hashes[real] = xxh3_128(read_bytes(path)).hexdigest()
        return self._hashes[real]


def _fast(whole: dict[str, Any], config: dict[str, Any]) -> Words:
    ids, added, _ = ids_of(whole, config)
    model = whole["model"]
    steps = {name: _plain(whole.get(name)) for name in STEPS}
    steps["model"] = _plain({key: value for key, value in model.items() if key not in ("vocab", "merges")})
    steps["merges"] = model.get("merges") or []
    if isinstance(vocab := model["vocab"], list):
        steps["scores"] = [entry[1:] for entry in vocab]
    special = frozenset(token for token, entry in added.items() if entry.get("special"))
    return Words(TOKENIZER, {i: token for token, i in ids.items()}, special, steps)


def _plain(value: Any) -> Any:
    """Return a part of tokenizer.json without keys that are false or empty, which older files leave out."""
    if isinstance(value, dict):
        return {key: plain for key, inner in value.items() if (plain := _plain(inner)) not in (None, False, "", [], {})}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def same_step(name: str, one: Any, other: Any) -> bool:
    """Tell whether two tokenizers agree in a step; merges are texts, or pairs in newer files."""
    if one == other:
        return True
    if name != "merges" or not isinstance(one, list) or not isinstance(other, list) or len(one) != len(other):
        return False
    return all(_pair(a) == _pair(b) for a, b in zip(one, other, strict=True))


def _pair(merge: Any) -> Any:
    return " ".join(map(str, merge)) if isinstance(merge, list) else merge


def _slow(name: str, raw: bytes) -> tuple[dict[int, str], dict[str, Any]]:
    """Return the words of a slow tokenizer's file, and its steps. InputError: it is no such file."""
    if name in SENTENCEPIECE and not _is_ranks(raw):
        pieces = list(sentences(raw, Path(name)))
        return {i: piece for i, (piece, _, _) in enumerate(pieces)}, {"scores": [score for _, score, _ in pieces]}
    if name == "vocab.json":
        return {_id(i): token for token, i in parse_json(raw).items()}, {}
    if name == "vocab.txt":
        return {i: line.removesuffix("\r") for i, line in enumerate(_text(raw).removesuffix("\n").split("\n"))}, {}
    return (_tekken(parse_json(raw)) if name == TEKKEN else dict(_ranks(raw))), {}


def _text(raw: bytes) -> str:
    if raw.count(b"\n") > MAX_VALUES:
        raise InputError(f"has more than {MAX_VALUES:,} lines")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 at byte {error.start}") from error


def _is_ranks(raw: bytes) -> bool:
    """Tell whether a tokenizer.model is a list of tiktoken's, as Llama 3 has it: base64, a space, a number."""
    first = raw[:1000].split(b"\n", 1)[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit()


def _ranks(raw: bytes) -> Iterator[tuple[int, str]]:
    for line in _text(raw).splitlines():
        token, _, rank = line.partition(" ")
        if not rank.isdecimal():
            raise InputError("is no list of tokens and ranks")
        yield _id(int(rank[:20])), _letters(token)


def _tekken(whole: Mapping[str, Any]) -> dict[int, str]:
    config, vocab = whole.get("config"), whole.get("vocab")
    special = whole.get("special_tokens") or []
    first = config.get("default_num_special_tokens") if isinstance(config, dict) else None
    if not isinstance(vocab, list) or not isinstance(first, int) or not isinstance(special, list):
        raise InputError("is no tekken.json")
    rows: dict[int, str] = {}
    for entry in special:
        if isinstance(entry, dict) and isinstance(entry.get("token_str"), str):
            rows[_id(entry.get("rank"))] = entry["token_str"]
    for entry in vocab:
        if not isinstance(entry, dict) or not isinstance(entry.get("token_bytes"), str):
            raise InputError("is no tekken.json")
        rows[_id(entry.get("rank")) + first] = _letters(entry["token_bytes"])
    return rows


def _letters(token: str) -> str:
    """Return a token of base64 as byte-level BPE spells it in tokenizer.json."""
    try:
        return "".join(map(LETTERS.__getitem__, b64decode(token, validate=True)))
    except ValueError as error:
        raise InputError(f"{token[:40]!r} is no base64") from error


def _id(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MOST_TOKENS:
        raise InputError("a token has no valid id")
    return value


def _add(rows: dict[int, str], folder: Path) -> frozenset[str]:
    """Put the tokens that other files add to a slow tokenizer into its rows. Return the special tokens."""
    if (folder / ADDED).is_file():
        added = read_json(folder / ADDED)
        with errors.context(ADDED):
            rows |= {_id(i): token for token, i in added.items()}
    decoder = tokenizer_config(folder).get("added_tokens_decoder")
    special = set()
    with errors.context(CONFIG):
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(entry, dict) and isinstance(token := entry.get("content"), str):
                rows[_id(int(key) if key.isdecimal() and len(key) < 10 else None)] = token
                special |= {token} if entry.get("special") else set()
    return frozenset(special)


def sentences(data: bytes, path: Path) -> Iterator[tuple[str, float, int]]:
    """Yield the pieces of a SentencePiece model: text, score and type (sentencepiece_model.proto: ModelProto.pieces).

    InputError: it is none.
    """
    try:
        for field, value in fields(data):
            if field == 1 and isinstance(value, bytes):
                piece = dict(fields(value))
                raw = piece.get(2, b"\0\0\0\0")
                score = struct.unpack("<f", raw)[0] if isinstance(raw, bytes) else 0.0
                text, kind = piece.get(1, b""), piece.get(3, NORMAL)
                assert isinstance(text, bytes)
                assert isinstance(kind, int)
                yield text.decode(), score, kind
    except (AssertionError, IndexError, ValueError, struct.error):
        raise InputError(f"{path}: is no SentencePiece model", hint="download the model again") from None


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield the fields of a protocol buffer, by number: numbers, and bytes of all else."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("no protocol buffer")

    while at < len(data):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            if kind != 2:
                raise ValueError("no protocol buffer")
            size = number()
        if at + size > len(data):
            raise ValueError("no protocol buffer")
        yield key >> 3, data[at : at + size]
        at += size
