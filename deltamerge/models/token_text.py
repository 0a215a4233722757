"""The bytes of text that a vocabulary's tokens stand for, however its tokenizer spells them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

WORD_START = "▁"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """Return GPT-2's letters for bytes: a printable byte is itself, the others are U+0100 and on, in their order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_letters()


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a tokenizer spells its own tokens.

    letters     each letter is a byte (GPT-2's table, "Ġ" a space), "▁" is a space (SentencePiece), a token is a word's
                start unless it begins with `continues` (WordPiece), or tokens are the text itself
    continues   prefix of a WordPiece token inside a word
    ends        suffix of a token at a word's end (CLIP's "</w>")
    """

    letters: Literal["bytes", "sentencepiece", "wordpiece", "text"] = "text"
    continues: str = ""
    ends: str = ""

    def text(self, token: str) -> bytes:
        """Return the bytes of a token of the vocabulary, but not of an added token."""
        if self.letters == "bytes":
            found = [BYTES.get(letter) for letter in token]
            return token.encode() if None in found else bytes(byte for byte in found if byte is not None)
        if self.letters == "sentencepiece":
            byte = BYTE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(WORD_START, " ").encode(errors="surrogatepass")
        if self.letters == "wordpiece":
            inside = token.startswith(self.continues) and len(token) > len(self.continues)
            return (token[len(self.continues) :] if inside else f" {token}").encode(errors="surrogatepass")
        if self.ends and token.endswith(self.ends):
            token = token[: -len(self.ends)] + " "
        return token.encode(errors="surrogatepass")

    def is_byte(self, token: str) -> bool:
        """Tell whether a token is SentencePiece's token of one byte, used only for text that no other token has."""
        return self.letters == "sentencepiece" and BYTE.fullmatch(token) is not None


TEXT = Spelling()


def spelling_of(tokenizer: Mapping[str, Any]) -> Spelling:
    """Return the spelling that a tokenizer.json describes by its model, pre-tokenizer, normalizer and decoder."""
    model = tokenizer.get("model")
    model = model if isinstance(model, dict) else {}
    parts = list(_parts([tokenizer.get(key) for key in ("pre_tokenizer", "normalizer", "decoder")]))
    kinds = {str(part.get("type")) for part in parts}
    if "ByteLevel" in kinds:
        return Spelling("bytes")
    if model.get("type") == "WordPiece" or "WordPiece" in kinds:
        return Spelling("wordpiece", continues=str(model.get("continuing_subword_prefix") or "##"))
    marked = any(part.get("content") == WORD_START or WORD_START in str(part.get("pattern")) for part in parts)
    if "Metaspace" in kinds or "ByteFallback" in kinds or marked:
        return Spelling("sentencepiece")
    return Spelling(ends=str(model.get("end_of_word_suffix") or ""))


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object with a type in a part of a tokenizer.json."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, list):
            pending += one
        elif isinstance(one, dict):
            if "type" in one:
                yield one
            pending += one.values()
