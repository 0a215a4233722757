"""A model's tokenizer files: its tokens with their ids, the added tokens, and its chat template."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import refuse_link
from deltamerge.files.strict_json import read_json
from deltamerge.formats.components import kind
from deltamerge.formats.weight_files import GGUF
from deltamerge.models.checkpoint import Checkpoint, Tokens
from deltamerge.models.token_text import spelling_of

if TYPE_CHECKING:
    from deltamerge.formats.peft.adapter import Adapter

TOKENIZER, CONFIG, JINJA = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
PROCESSOR = "chat_template.json"
TEMPLATES = "additional_chat_templates"  # a folder of named chat templates: tool_use.jinja, …
SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "tiktoken.model")
MAP, GENERATION = "special_tokens_map.json", "generation_config.json"
OTHERS = (MAP, "added_tokens.json", "merges.txt", *SLOW)
COPIED = (CONFIG, MAP, GENERATION, PROCESSOR, "preprocessor_config.json", "processor_config.json")
# Purposes of tokens. A token with several purposes gets the first.
ROLES = ("eos_token", "bos_token", "unk_token", "sep_token", "cls_token", "mask_token", "pad_token")
MATCHING = ("single_word", "lstrip", "rstrip", "normalized", "special")

Entry = dict[str, Any]
MOST_TOKENS = 1 << 24  # arrays over a vocabulary have its largest id + 1 entries


def fetch(checkpoint: Checkpoint | Adapter, first: str, *others: str) -> None:
    """Download small files of a model of the hub, as `hub.fetch` does. A local folder is taken as it is."""
    if checkpoint.hub_id is not None:
        from deltamerge.models import hub

        hub.fetch(checkpoint, first, *others)


def fetched(checkpoint: Checkpoint | Adapter, *, whole: bool = False) -> Path:
    """Return the model's folder. Of a hub model, download into it the tokenizer files that are read here, or all if
    `whole`."""
    fetch(checkpoint, TOKENIZER, CONFIG, JINJA, *(OTHERS if whole else ()))
    return checkpoint.path


def check_copied(checkpoint: Checkpoint) -> None:
    """Read the small files that an output may copy. InputError: one is not a JSON object, or a link that leaves the
    folder."""
    with errors.context(checkpoint.reference):
        for name in COPIED:
            if (path := checkpoint.path / name).is_file():
                refuse_link(path)
                read_json(path)


def read_tokens(checkpoint: Checkpoint) -> Tokens | None:
    """Return the vocabulary of tokenizer.json, with tokens that only tokenizer_config.json adds; None without a
    tokenizer.

    InputError: only the files of a slow tokenizer, or an invalid vocabulary.
    """
    if checkpoint.tokens is not None:
        return checkpoint.tokens
    folder = fetched(checkpoint)
    with errors.context(checkpoint.reference):
        if not (folder / TOKENIZER).is_file():
            if slow := [name for name in SLOW if (folder / name).is_file()]:
                hint = "AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL) writes it"
                raise InputError(f"has {slow[0]} but no {TOKENIZER}, which vocabularies are read from", hint=hint)
            return None
        return tokens_of(read_json(folder / TOKENIZER), tokenizer_config(folder))


def tokens_of(whole: dict[str, Any], config: dict[str, Any]) -> Tokens:
    """Return the vocabulary in a tokenizer.json and the tokenizer_config.json beside it.

    InputError: it is not valid.
    """
    ids, added, plain = ids_of(whole, config)
    ordered = dict(sorted(ids.items(), key=itemgetter(1)))
    if len(set(ordered.values())) < len(ordered):
        raise InputError(f"{TOKENIZER}: two tokens have one id")
    added = {token: {**_strict(entry), "content": token} for token, entry in added.items()}
    return Tokens(ordered, added, plain, spelling_of(whole))


def ids_of(whole: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, int], dict[str, Entry], int]:
    """Return the ids of tokens, the model's own first; the entries of added tokens; and the number of the model's
    own."""
    with errors.context(TOKENIZER):
        ids = _plain(whole)
        plain = len(ids)
        added = _added(whole)
        ids |= {content: _id(entry.get("id"), content) for content, entry in added.items()}
    with errors.context(CONFIG):
        declared = list(declared_tokens(config))
    for content, entry in declared:
        if content not in added:
            ids.setdefault(content, _next(plain, ids, added))
            added[content] = entry | {"content": content}
    return ids, added, plain


def is_described(checkpoint: Checkpoint) -> bool:
    """Tell whether a model's tokenizer comes from its GGUF file, and not from a file beside it."""
    of_gguf = checkpoint.files[:1] != () and checkpoint.files[0].suffix == GGUF
    return of_gguf and not (checkpoint.path / TOKENIZER).is_file()


def read_roles(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tokens of a purpose that tokenizer_config.json or, without it, special_tokens_map.json names:
    "eos_token" -> the token."""
    folder = fetched(checkpoint)
    fetch(checkpoint, TOKENIZER, MAP)
    with errors.context(checkpoint.reference):
        return roles_in(folder)


def roles_in(folder: Path) -> dict[str, str]:
    """`read_roles` of a folder whose files are there."""
    found: dict[str, str] = {}
    listed = read_json(folder / MAP) if (folder / MAP).is_file() else {}
    for config in (listed, tokenizer_config(folder)):
        for role in ROLES:
            value = config.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            found |= {role: text} if isinstance(text, str) and text else {}
    return found


def read_generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the model's generation_config.json; empty if there is none."""
    folder = fetched(checkpoint)
    fetch(checkpoint, TOKENIZER, GENERATION)
    with errors.context(checkpoint.reference):
        return read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}


def _plain(whole: dict[str, Any]) -> dict[str, int]:
    """Return the model's own tokens: token -> id, or a list of [token, score]."""
    model = whole.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        for i, entry in enumerate(vocab):
            if not (isinstance(entry, list) and entry and isinstance(entry[0], str)):
                raise InputError(f"model.vocab: entry {i} must be a list of a token and its score")
        return {entry[0]: i for i, entry in enumerate(vocab)}
    if not isinstance(vocab, dict):
        raise InputError("has no vocabulary")
    values = vocab.values()
    if set(map(type, values)) <= {int} and 0 <= min(values, default=0) <= max(values, default=0) < MOST_TOKENS:
        return dict(vocab)
    return {token: _id(index, token) for token, index in vocab.items()}


def _added(whole: dict[str, Any]) -> dict[str, Entry]:
    """Return the added tokens, by their text."""
    listed = whole.get("added_tokens") or []
    if not isinstance(listed, list):
        raise InputError(f"added_tokens must be a list, got {kind(listed)}")
    for i, entry in enumerate(listed):
        if not (isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise InputError(f"added_tokens: entry {i} must be an object with a text as content")
    return {entry["content"]: entry for entry in listed}


def _id(value: Any, token: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MOST_TOKENS:
        raise InputError(f"token {token[:40]!r} has no valid id")
    return value


def _next(plain: int, ids: dict[str, int], added: dict[str, Entry]) -> int:
    """Return the id that the tokenizers library gives the next added token."""
    return max([plain, *(ids[token] + 1 for token in added)])


def declared_tokens(config: dict[str, Any]) -> Iterator[tuple[str, Entry]]:
    """Tokens that transformers adds when it loads tokenizer_config.json, as it orders them."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for key in sorted((key for key in decoder if key.isdecimal() and len(key) < 10), key=int):
            if isinstance(entry := decoder[key], dict) and isinstance(entry.get("content"), str):
                yield entry["content"], entry
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or ()
        if not isinstance(more, list | dict | tuple):
            raise InputError(f"{key} must be a list of tokens, got {kind(more)}")
        named += more.values() if isinstance(more, dict) else more
    for value in named:
        if isinstance(value, str) and value:
            yield value, {"special": True}
        elif isinstance(value, dict) and isinstance(value.get("content"), str):
            yield value["content"], value | {"special": True}


def _strict(entry: Entry) -> Entry:
    """Return an entry with exactly the keys that tokenizer.json requires, in their order."""
    special = bool(entry.get("special", False))
    known = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"content": entry.get("content"), **{key: bool(entry.get(key, known[key])) for key in MATCHING}}


def plain_entry(token: str) -> Entry:
    """Return the entry of a token that is added without being special, as transformers' `add_tokens` makes it."""
    return _strict({"content": token})


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; empty if there is none."""
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def read_chat_template(checkpoint: Checkpoint) -> str | None:
    """Return the model's default chat template: chat_template.jinja, else the key of tokenizer_config.json."""
    if checkpoint.chat_template is not None:
        return checkpoint.chat_template
    folder = fetched(checkpoint)
    with errors.context(checkpoint.reference):
        return chat_template_in(folder)


def chat_template_in(folder: Path) -> str | None:
    """`read_chat_template` of a folder whose files are there."""
    if (folder / JINJA).is_file():
        refuse_link(folder / JINJA)
        try:
            return (folder / JINJA).read_text(encoding="utf-8") or None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{JINJA}: cannot be read") from error
    found = tokenizer_config(folder).get("chat_template")
    if found is None and (folder / PROCESSOR).is_file():
        found = read_json(folder / PROCESSOR).get("chat_template")
    if isinstance(found, list):
        found = {str(item.get("name")): item.get("template") for item in found if isinstance(item, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) and found else None
