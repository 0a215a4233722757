"""The output's vocabulary: its ids, each model's ids of its tokens, and the sources of embedding rows."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, TypeAlias

from deltamerge.errors import InputError, Problem, RecipeError
from deltamerge.models.checkpoint import Tokens
from deltamerge.models.tokenizer_files import (
    TOKENIZER,
    Entry,
    fetched,
    plain_entry,
    read_chat_template,
    read_tokens,
)
from deltamerge.plan.inputs import Input, Inputs, config_rows, has_vocabulary_rows, input_named, sizes
from deltamerge.recipe.output_keys import BUILT_IN, UNION, ModelToken, Token, ZeroToken, is_literal
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.views import gather

# anonymous memory of a parsed tokenizer.json with a merge per token, measured
BYTES_PER_TOKEN = 400

Rows: TypeAlias = "NDArray[np.int32]"


@dataclass(frozen=True, slots=True)
class Given:
    """A row that the recipe assigns to a token: row `row` of the tensor of `model`; zeros if `row` is −1."""

    model: str
    row: int
    always: bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The output's tokens and how every model's rows map to them; no array is larger than tokens × models.

    start     reference of the model whose tokenizer files the output extends
    first     that model's tokens
    ids       token -> id in the output
    entries   entries for the list of added tokens in tokenizer.json, beyond `start`'s own
    appended  the number of entries that are new tokens
    dropped   tokens of `start` beyond its embedding, whose ids go to appended tokens
    size      rows that tokens need
    padding   rows after them
    columns   per model (by reference) the model's id of every output id, −1 if it lacks the token
    base      the key of the base in `columns`
    given     output id -> the row that the recipe assigns
    template_ids   the template's own ids
    rows      rows of each model's embedding
    """

    kind: str
    start: Input
    first: Tokens
    ids: dict[str, int]
    entries: tuple[Entry, ...]
    appended: int
    dropped: frozenset[str]
    size: int
    padding: int
    columns: dict[str, Rows]
    base: str | None
    given: dict[int, Given]
    template_ids: dict[str, int]
    rows: dict[str, int]
    notes: tuple[str, ...] = ()
    _picked: dict[Any, Rows] = field(default_factory=dict, compare=False, repr=False)

    @property
    def changes(self) -> bool:
        """Tell whether rows of a model move, are added or are assigned; if so, an embedding must be found."""
        moved = any(not np.array_equal(column, np.arange(self.size)) for column in self.columns.values())
        return moved or bool(self.padding or self.given)

    @property
    def tokens(self) -> Tokens:
        """Return the content of the output's tokenizer."""
        added = {token: entry for token, entry in self.first.added.items() if token in self.ids}
        for entry in self.entries:
            added[str(entry["content"])] = {key: value for key, value in entry.items() if key != "id"}
        return Tokens(
            dict(sorted(self.ids.items(), key=lambda item: item[1])), added, self.first.plain, self.first.spelling
        )

    @property
    def memory(self) -> int:
        """Estimate the bytes of memory for reading the tokenizers."""
        return BYTES_PER_TOKEN * sum(self.rows.values())

    @property
    def total(self) -> int:
        """Return the number of rows of the output's embedding."""
        return self.size + self.padding

    def move_ids(self, config: dict[str, Any], template: Input, *, generation: bool) -> None:
        """Move the ids in a config of `template` with their tokens. `generation`: it is a generation config."""
        if template.checkpoint.reference != self.start.checkpoint.reference:
            names = {i: token for token, i in self.template_ids.items()}
            _move(config, names, self, self.start.checkpoint.config)

    def held(self, workers: int) -> int:
        """Return the bytes for computing the rows, beyond reading them."""
        return 0

    @property
    def operations(self) -> float:
        """Estimated floating-point operations for computing the rows, if they are many."""
        return 0.0

    def holds(self, name: str, present: Sequence[tuple[Input, TensorInfo]]) -> bool:
        """Tell whether a tensor has a row per token in every model that has it."""
        configs = [model.checkpoint.config for model, _ in present]
        return all(
            has_vocabulary_rows(name, info.shape, self.rows[_reference(model)], config)
            for (model, info), config in zip(present, configs, strict=True)
        )

    def remap(self, model: Input, present: Sequence[tuple[Input, TensorInfo]]) -> TensorInfo:
        """Return the model's tensor under the output's vocabulary.

        `present` maps all models that have it to their tensors.

        If the model lacks a token, or the recipe forces it, its row is the recipe's. Without it, it is the base's, then
        the mean over the models that have the token, then zeros.
        """
        if len({info.shape[1:] for _, info in present}) > 1:
            shapes = ", ".join(f"{other.name} {list(info.shape)}" for other, info in present)
            raise InputError(f"shapes differ: {shapes}")
        own = next(i for i, (other, _) in enumerate(present) if other is model)
        base = next((i for i, (other, _) in enumerate(present) if other.index is None), None)
        sources = [info for _, info in present]
        picks = self._picks(own, base, tuple(_reference(other) for other, _ in present))
        return gather(sources[own], sources, picks, self.padding)

    def rows_of(self, model: Input) -> Rows:
        """Return the output's row of each of a model's ids; −1 where the output lacks the token."""
        reference = _reference(model)
        column = self.columns[reference]
        (there,) = np.nonzero(column >= 0)
        found = np.full(self.rows[reference], -1, np.int32)
        found[column[there]] = there
        return found

    def _picks(self, own: int, base: int | None, present: tuple[str, ...]) -> Rows:
        key = (own, base, present)
        if key not in self._picked:
            where = np.stack([self.columns[other] for other in present], axis=1)
            mine = where[:, own] >= 0
            mine[[row for row, given in self.given.items() if given.always]] = False
            picks = self._defaults(where, base, present)
            picks[mine] = -1
            picks[mine, own] = where[mine, own]
            self._picked[key] = picks
        return self._picked[key]

    def _defaults(self, where: Rows, base: int | None, present: tuple[str, ...]) -> Rows:
        """Return (tokens, models) the rows whose mean stands for tokens that a model lacks."""
        picks = where.copy()
        if base is not None:
            known = where[:, base] >= 0
            picks[known] = -1
            picks[known, base] = where[known, base]
        for row, given in self.given.items():
            picks[row] = -1
            if given.row >= 0:
                if given.model not in present:
                    raise InputError(f"{given.model} lacks this tensor, and the recipe takes a token's row from it")
                picks[row, present.index(given.model)] = given.row
        return picks

    def describe(self) -> dict[str, Any]:
        """Return the vocabulary as `deltamerge plan --json` prints it."""
        where = np.stack(list(self.columns.values()) or [np.zeros(0, np.int32)], axis=1)
        lacking = np.flatnonzero((where < 0).any(1))
        plain = np.setdiff1d(lacking, np.fromiter(self.given, np.int64, len(self.given)))
        from_base = self.columns[self.base][plain] >= 0 if self.base is not None else np.zeros(len(plain), bool)
        donors = (where[plain] >= 0).sum(1)[~from_base]
        return {
            "source": self.kind,
            "starts_from": self.start.name,
            "tokens": len(self.ids),
            "appended": self.appended,
            "dropped": len(self.dropped),
            "rows": self.total,
            "padding": self.padding,
            "lacking": {
                "base": int(from_base.sum()),
                "one_model": int((donors == 1).sum()),
                "mean": int((donors > 1).sum()),
                "zeros": int((donors == 0).sum()),
                "recipe": len(self.given),
            },
            "notes": list(self.notes),
        }


def make_vocabulary(recipe: Recipe, inputs: Inputs) -> Vocabulary | None:
    """Return the output's vocabulary. None: rows are matched by number, because the recipe leaves the vocabulary to the
    template, or because its source has no tokenizer.json and needs none.

    Ids come from the model whose tokenizer the output extends. A union appends missing tokens: first the other models'
    tokens, in the order of models and ids, then their added tokens, then tokens that only the recipe names.

    RecipeError, InputError: a tokenizer that cannot be read, a source that lacks its token, or ids with gaps where
    tokens must be appended.
    """
    kind, start, whole = recipe.tokenizer_of, inputs.vocabulary, recipe.tokenizer
    if kind is None or start is None:
        return None
    merged = {_reference(model): model for model in inputs.all}
    among = _reference(start) in merged
    needed = kind == UNION or (whole is not None and bool(whole.tokens or whole.pad_to_multiple_of))
    if not needed and not (fetched(start.checkpoint, whole=not among) / TOKENIZER).is_file():
        return None
    if _reference(inputs.template) not in merged:
        hint = "leave template out, or name a model that is merged"
        raise InputError(
            "gives its tensors but is not merged: its vocabulary is not known", where=inputs.template.name, hint=hint
        )
    read = {reference: read_tokens(model.checkpoint) for reference, model in merged.items()}
    first = read[_reference(start)] if among else read_tokens(start.checkpoint)
    if first is None:
        raise InputError(
            "has no tokenizer.json, which the output's tokenizer would start from",
            where=start.name,
            hint="put it into the model's folder, or set tokenizer_source to a model that has one",
        )
    lacking = [model.name for reference, model in merged.items() if read[reference] is None]
    notes = [f"{name} has no tokenizer: its rows are taken to be the tokens of {start.name}" for name in lacking]
    tokens = {reference: found or first for reference, found in read.items()}
    rows = {r: config_rows(model.checkpoint.config) or _end(tokens[r].ids) for r, model in merged.items()}
    limit = rows[_reference(start)] if among else config_rows(start.checkpoint.config) or _end(first.ids)
    others = [(tokens[r], rows[r]) for r in merged if r != _reference(start)]
    ids = {token: i for token, i in first.ids.items() if i < limit}
    dropped = frozenset(first.ids.keys() - ids.keys())
    entries, new = _missing(first, ids, others if kind == UNION else [], whole.tokens if whole else {})
    if new:
        begin = max([first.plain, *(ids[token] + 1 for token in first.added if token in ids)])
        if begin != _end(ids):
            raise InputError("its ids have gaps or go beyond its embedding: no token can be appended", where=start.name)
        ids |= {token: begin + i for i, token in enumerate(new)}
    size = _end(ids)
    multiple = (whole.pad_to_multiple_of if whole else None) or 1
    columns = {reference: _column(ids, size, tokens[reference], rows[reference]) for reference in merged}
    total = size + -size % multiple
    for reference, model in merged.items():
        found = _resized(tokens[reference].ids, ids, columns[reference], rows[reference], total)
        notes += [f"{model.name}: {found}"] if found else []
    return Vocabulary(
        kind if kind in (UNION, "base") else start.name,
        start,
        first,
        ids,
        tuple({"id": ids[token], **entry} for token, entry in entries.items()),
        len(new),
        dropped,
        size,
        total - size,
        columns,
        _reference(inputs.base) if inputs.base is not None else None,
        _given(recipe, inputs, ids, columns, tokens, rows),
        tokens[_reference(inputs.template)].ids,
        rows,
        tuple(notes),
    )


def _reference(model: Input) -> str:
    return model.checkpoint.reference


def _end(ids: Mapping[str, int]) -> int:
    return 1 + max(ids.values(), default=-1)


def _missing(
    first: Tokens, ids: Mapping[str, int], others: Sequence[tuple[Tokens, int]], named: Mapping[str, Token]
) -> tuple[dict[str, Entry], list[str]]:
    """Return, by id, the entries that the output adds to the first tokenizer, and the new tokens among them.

    A plain token of the first tokenizer that another model has as an added token becomes an added token under its id.
    """
    added: dict[str, Entry] = {}
    plain: dict[str, Entry] = {}
    for tokens, rows in others:
        for token, entry in tokens.added.items():
            if tokens.ids[token] < rows and token not in first.added:
                added.setdefault(token, entry)
    for tokens, rows in others:
        for token, i in tokens.ids.items():
            if i < rows and token not in ids and token not in added:
                plain[token] = plain_entry(token)
    known = ids.keys() | plain.keys() | added.keys()
    named_only = {token: plain_entry(token) for token in named if token not in known}
    entries = plain | added | named_only
    return entries, [token for token in entries if token not in ids]


def _column(ids: Mapping[str, int], size: int, tokens: Tokens, rows: int) -> Rows:
    """Return a model's id of every output id; an id without a token on either side keeps its number."""
    column = np.full(size, -1, np.int32)
    there = np.fromiter(ids.values(), np.int64, len(ids))
    own = np.fromiter(map(tokens.ids.get, ids, repeat(-1)), np.int32, len(ids))
    column[there] = np.where(own < rows, own, -1)
    free = np.arange(size) < rows
    free[there] = False
    named = np.fromiter(tokens.ids.values(), np.int64, len(tokens.ids))
    free[named[named < size]] = False
    column[free] = np.flatnonzero(free)
    return column


def _resized(own: Mapping[str, int], ids: Mapping[str, int], column: Rows, rows: int, total: int) -> str:
    """Return a message about a model's moved rows. It is "" if all stay and none is added."""
    lost = sum(i < rows and token not in ids for token, i in own.items())
    padding = rows - len(np.unique(column[column >= 0])) - lost
    left_out = [f"{padding} that no token names (padding)"] if padding > 0 else []
    left_out += [f"{lost} whose tokens the output lacks"] if lost else []
    if rows == total and not left_out:
        return ""
    return f"{rows} rows become {total}" + (f", left out: {' and '.join(left_out)}" if left_out else "")


def _given(
    recipe: Recipe,
    inputs: Inputs,
    ids: Mapping[str, int],
    columns: Mapping[str, Rows],
    tokens: Mapping[str, Tokens],
    rows: Mapping[str, int],
) -> dict[int, Given]:
    """Return the rows that the recipe's `tokenizer.tokens` assigns."""
    given: dict[int, Given] = {}
    problems: list[Problem] = []
    for token, wanted in (recipe.tokenizer.tokens if recipe.tokenizer else {}).items():
        source, place = wanted.source, ("tokenizer", "tokens", token, "source")
        if source is None:
            continue
        if isinstance(source, ZeroToken):
            given[ids[token]] = Given("", -1, wanted.force)
            continue
        reference = source.model if isinstance(source, ModelToken) else source
        model = input_named(reference, recipe, inputs.base, inputs.tunes)
        if model is None:
            problems.append(recipe.problem(place, f"{reference} is none of the merged models"))
            continue
        of = _reference(model)
        if isinstance(source, ModelToken):
            row = tokens[of].ids.get(source.token, -1) if source.token is not None else source.token_id
        else:
            row = int(columns[of][ids[token]])
        if row is None or not 0 <= row < rows[of]:
            shown = token if not isinstance(source, ModelToken) else source.token or source.token_id
            problems.append(recipe.problem(place, f"{model.name} has no row for {shown!r}"))
            continue
        given[ids[token]] = Given(of, row, wanted.force)
    if problems:
        raise RecipeError(recipe.source.path, problems)
    return given


ID_KEYS = ("_token_id", "_token_ids", "_token_index", "suppress_tokens")


def edit_config(
    config: Mapping[str, Any], vocabulary: Vocabulary, template: Input, *, generation: bool = False
) -> dict[str, Any]:
    """Return a config, or generation config, of `template` under the output's vocabulary; unchanged if nothing moved.

    An id follows its token. For a token that the output lacks, the id comes from the vocabulary's own model, or is
    null.
    """
    result = copy.deepcopy(dict(config))
    for holder, key in sizes(result):
        holder[key] = vocabulary.total
    vocabulary.move_ids(result, template, generation=generation)
    return result


def _move(config: dict[str, Any], names: Mapping[int, str], vocabulary: Vocabulary, other: Mapping[str, Any]) -> None:
    def moved(value: int, key: str) -> Any:
        if value not in names:
            return value
        return vocabulary.ids.get(names[value], other.get(key))

    for key, value in config.items():
        if isinstance(value, dict):
            inner = other.get(key)
            _move(value, names, vocabulary, inner if isinstance(inner, dict) else other)
        elif key.endswith(ID_KEYS):
            if isinstance(value, int) and not isinstance(value, bool):
                config[key] = moved(value, key)
            elif isinstance(value, list) and all(isinstance(item, int) for item in value):
                found = [moved(item, key) for item in value]
                config[key] = [item for item in found if isinstance(item, int)]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja text, and a description of its origin."""

    text: str
    origin: str


def choose_chat_template(recipe: Recipe, inputs: Inputs) -> ChatTemplate | None:
    """Return the chat template that the recipe sets.

    None: it sets none, or `auto` finds none, and the tokenizer keeps its own.

    InputError: the model that the recipe names has no chat template.
    """
    wanted = recipe.chat_template
    if wanted is None:
        return None
    if wanted == "auto":
        return _most_common(inputs.all)
    model = input_named(wanted, recipe, inputs.base, inputs.tunes)
    if model is not None:
        text = read_chat_template(model.checkpoint)
        if text is None:
            raise InputError("has no chat template", where=model.name)
        return ChatTemplate(text, model.name)
    if is_literal(wanted):
        return ChatTemplate(wanted, "the recipe")
    return ChatTemplate(BUILT_IN[wanted], f"built-in {wanted}")


def _most_common(models: Sequence[Input]) -> ChatTemplate | None:
    """Return the most frequent template, the first of equals. Surrounding white space is ignored."""
    read = ((model.name, (read_chat_template(model.checkpoint) or "").strip()) for model in models)
    found = [(text, name) for name, text in read if text]
    if not found:
        return None
    best = Counter(text for text, _ in found).most_common(1)[0][0]
    return ChatTemplate(best, "auto: " + ", ".join(name for text, name in found if text == best))
