"""Checks that rows of the models' embeddings mean the same tokens, and names the source of the output's tokenizer,
special tokens and chat template.

Every tokenizer is compared with the written tokenizer. Files of equal bytes are equal; others are read once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deltamerge import errors
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.errors.shown import some
from deltamerge.formats.components import check_folder, listed_folders
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.tokenizer_files import (
    CONFIG,
    MAP,
    MOST_TOKENS,
    OTHERS,
    ROLES,
    TOKENIZER,
    chat_template_in,
    fetch,
    fetched,
    roles_in,
    tokenizer_config,
)
from deltamerge.models.vocabulary_files import FILES, SENTENCEPIECE, Reading, Words, same_step
from deltamerge.plan.inputs import Input, Inputs, config_rows, has_vocabulary_rows
from deltamerge.recipe.output_keys import UNION
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.names import TOKEN_EMBEDDING, TOKEN_HEAD, layer_index

if TYPE_CHECKING:
    from deltamerge.formats.peft.adapter import Adapter
    from deltamerge.plan.outputs import Outputs, Row

SHARE = 100  # a merge is refused if more than one row in so many means other tokens
ELSEWHERE = 16  # special tokens that a family has at other ids than SentencePiece
SHOWN = 2  # rows in a message
LONGEST = 40  # characters of a token in a message
# Keys of tokenizer_config.json on how text is cut.
SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case")
BY_TOKEN = f"tokenizer_source: {UNION}"


@dataclass(frozen=True, slots=True)
class Differences:
    """Messages about tokenizers: `warnings`, and `notes` on a recipe's choice and on differences of the base alone."""

    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """A model's tokenizer.

    name      the model's name
    folder    the folder of its files
    limit     rows of its embedding
    is_base   whether the model is the base of the others
    meets     whether its rows contribute to the output, or its tokenizer is written
    made      its vocabulary, if the model is only planned; template: its chat template
    """

    name: str
    folder: Path
    limit: int = MOST_TOKENS
    is_base: bool = False
    meets: bool = False
    made: Words | None = None
    template: str | None = None

    @property
    def chat_template(self) -> str:
        return (self.template or chat_template_in(self.folder) or "").strip()


@dataclass(frozen=True, slots=True)
class _Apart:
    """The differences of the rows of two vocabularies.

    shared   rows that have a token in both
    other    row -> its token, for shared rows with another token
    more     row -> its token, for rows without a token in the other vocabulary
    special  tokens that are special in only one of the two
    steps    other parts by which text is cut differently
    """

    shared: int = 0
    other: Mapping[int, str] = field(default_factory=dict)
    more: Mapping[int, str] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    steps: tuple[str, ...] = ()

    @property
    def many(self) -> bool:
        """Tell whether these are two vocabularies, not one with a few tokens exchanged."""
        return len(self.other) * SHARE > self.shared


@dataclass(frozen=True, slots=True)
class _Finding:
    """The differences in words, and the tokenizers that differ from the one they are compared with."""

    kind: Literal["many", "rows", "more", "special", "steps", "role", "template", "unread"]
    text: str
    of: tuple[_Tokenizer, ...]
    asked: str = ""


def rows_merged(found: Outputs, rows: Sequence[Row]) -> set[str]:
    """Return the names of the models whose token tables (embedding, head) contribute to the output.

    A model with weight zero there, or at the unused end of slerp's arc, does not contribute.
    """
    built = {row.name: row.pieces[0].built for row in rows}
    names: set[str] = set()
    for merge in found.merges:
        base = next((group.base for group in found.inputs.groups if group.part is merge.part), None)
        models = [model for model, _ in merge.sources]
        members = models if merge.base is None or base is None else [base, *models]
        one = built.get(merge.name)  # none: packed weights are copied under their own names
        if one is not None and one.method != "copy" and all(_has_token_rows(merge.name, member) for member in members):
            values = found.builder.parameters(merge)
            lend = [True] * (len(members) - len(models)) + [bool(weight) for weight in values.get("weights", models)]
            if values.get("t") in (0, 1) and len(members) == 2:
                lend = [values["t"] == 0, values["t"] == 1]
            names |= {member.name for member, is_lent in zip(members, lend, strict=True) if is_lent}
    models_by_name = {model.name: model for model in found.inputs.all}
    for name, one in built.items():
        lender = models_by_name.get(one.details[0]) if one.method == "copy" and one.details else None
        if lender is not None and _has_token_rows(name, lender):
            names.add(lender.name)
    return names


def _has_token_rows(name: str, model: Input) -> bool:
    info, config = model.get(name), model.checkpoint.config
    known = layer_index(name) is None and bool(TOKEN_EMBEDDING.search(name) or TOKEN_HEAD.search(name))
    rows = config_rows(config)
    return known or (info is not None and rows is not None and has_vocabulary_rows(name, info.shape, rows, config))


def compare_tokenizers(recipe: Recipe, inputs: Inputs, meeting: Collection[str], *, by_token: bool) -> Differences:
    """Return the messages on the tokenizers of a merge.

    `meeting` are the models whose rows are merged; `by_token`: their rows were matched by token.

    InputError: more than one in a hundred rows that meet mean other tokens.
    """
    source = inputs.vocabulary or inputs.template
    based = recipe.method.deltas
    written = _tokenizers(source, meeting, based=based, written=True)
    models = [_tokenizers(model, meeting, based=based) for model in inputs.all]
    chosen = recipe.template is not None or recipe.transplant is not None or recipe.tokenizer_of not in (None, UNION)
    several = len(meeting) > 1
    warnings, notes, reading = list[str](), list[str](), Reading()
    for place in dict.fromkeys(place for places in (written, *models) for place in places):
        others = [places[place] for places in models if place in places]
        for one in _findings(written.get(place), others, reading, by_token=by_token):
            if one.kind == "many" and all(model.meets for model in one.of):
                raise InputError(one.text, hint=_way(recipe, one.of[0].name, several=several), where=place or None)
            if one.kind == "template" and recipe.chat_template is not None:
                continue
            own_base = one.kind != "many" and all(model.is_base for model in one.of)
            quiet = own_base or (chosen and one.kind not in ("many", "rows", "unread"))
            line = f"{place}: {one.text}" if place else one.text
            (notes if quiet else warnings).append(line + _tail(one, source.name, chosen=quiet))
    return Differences(tuple(dict.fromkeys(warnings)), tuple(dict.fromkeys(notes)))


def other_words(inputs: Inputs) -> Iterator[str]:
    """Yield a message for every model whose vocabulary differs from the first's, the base's.

    If there are several fine-tunes, a message names the rows that mean other words.
    """
    first, *others = (_tokenizers(model, (), based=True) for model in inputs.all)
    kinds = ("many", "rows") if len(inputs.tunes) > 1 else ("many",)
    for place, base in first.items():
        there = [places[place] for places in others if place in places]
        yield from (one.text for one in _of_rows(base, there, Reading(), by_token=False) if one.kind in kinds)


def tokenizers_apart(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Return the differences of B's tokenizer from A's, in words."""
    one, other = (_places(checkpoint, checkpoint.reference) for checkpoint in (a, b))
    lines, reading = [], Reading()
    for place in one.keys() & other.keys():
        for found in _findings(one[place], [other[place]], reading, by_token=False):
            lines.append(f"{place}: {found.text}" if place else found.text)
    return lines


def _way(recipe: Recipe, name: str, *, several: bool) -> str:
    """Return the line of the recipe that puts rows in order."""
    if not recipe.output.rules.standalone:
        line = f"passthrough and tokenizer_source: {recipe.base_model or 'the other'}"
        return f"a {recipe.output.kind} has one vocabulary: put {name} on it by a recipe of {line}"
    if not several:
        return f"tokenizer_source: {name}, whose rows the output has, writes its tokenizer"
    base = " (or base)" if recipe.base_model is not None else ""
    return f"{BY_TOKEN}{base} matches rows by token; without it they are merged by number"


def _tail(found: _Finding, written: str, *, chosen: bool) -> str:
    """Name the source of the written tokenizer, and the line of the recipe that chooses another."""
    if found.kind == "unread":
        return ""
    if found.kind == "many":
        return f"; its rows are not in the output, which has the tokenizer of {written}"
    said = f"; {'that' if found.kind == 'template' else 'the tokenizer'} of {written} is written"
    if chosen:
        return said
    name = next((model.name for model in found.of if not model.is_base), found.of[0].name)
    if found.kind in ("rows", "more"):
        return f"{said}; {BY_TOKEN} keeps every token with its own row"
    if found.kind == "template":
        return f"{said}; chat_template: {found.asked or name} chooses another"
    return f"{said}; tokenizer_source: {name} writes that of {name}"


def _tokenizers(model: Input, meeting: Collection[str], *, based: bool, written: bool = False) -> dict[str, _Tokenizer]:
    """Return a model's tokenizers by their folder in a pipeline, "" for the model's own.

    An adapter's folder may have its own tokenizer, which is never `written`. `based`: the models are merged as
    fine-tunes of a base.
    """
    checkpoint, adapter = model.checkpoint, model.checkpoint.adapter
    meets = model.name in meeting
    found = _places(checkpoint, model.name if adapter is None else checkpoint.base_reference if written else model.name)
    if adapter is not None and not written and _has_tokenizer(adapter):
        trained = any(
            TOKEN_EMBEDDING.search(name) or TOKEN_HEAD.search(name) or "embed" in name for name in adapter.tensors
        )
        own = _Tokenizer(model.name, adapter.path)
        return {"": replace(own, limit=config_rows(checkpoint.config) or MOST_TOKENS, meets=meets and trained)}
    is_base = based and model.index is None and not written
    return {place: replace(one, is_base=is_base, meets=meets or written) for place, one in found.items()}


def _places(checkpoint: Checkpoint, name: str) -> dict[str, _Tokenizer]:
    if checkpoint.tokens is not None:
        special = frozenset(token for token, entry in checkpoint.tokens.added.items() if entry.get("special"))
        made = Words(TOKENIZER, {i: token for token, i in checkpoint.tokens.ids.items()}, special)
        return {"": _Tokenizer(name, checkpoint.path, made=made, template=checkpoint.chat_template)}
    if not checkpoint.files:  # of no folder at all
        return {}
    if checkpoint.is_delta and checkpoint.base is not None and not _has_tokenizer(checkpoint):
        return _places(checkpoint.base, name)
    found = {}
    if _has_tokenizer(checkpoint):
        limit = config_rows(checkpoint.config) or MOST_TOKENS
        found[""] = _Tokenizer(name, checkpoint.path, limit, template=checkpoint.chat_template)
    if not checkpoint.is_simple:
        folders = [folder for folder in listed_folders(checkpoint.path) if folder]
        found |= {
            folder: _Tokenizer(f"{name}/{folder}", checkpoint.path / folder)
            for folder in folders
            if check_folder(checkpoint.path, folder) and _is_tokenizer(checkpoint.path / folder)
        }
    return found


def _has_tokenizer(model: Checkpoint | Adapter) -> bool:
    """Tell whether a model's folder has a tokenizer.

    It is fetched for a hub model, but not for a pipeline's folders.
    """
    if model.hub_id is not None and (not isinstance(model, Checkpoint) or model.is_simple):
        with suppress(DeltamergeError):  # offline, files outside of the cache are not compared
            fetched(model)
            fetch(model, TOKENIZER, MAP)
            if not (model.path / TOKENIZER).is_file():
                fetch(model, *OTHERS)
    return _is_tokenizer(model.path)


def _is_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*FILES, CONFIG))


def _findings(
    written: _Tokenizer | None, others: Sequence[_Tokenizer], reading: Reading, *, by_token: bool
) -> Iterator[_Finding]:
    """Return the differences between tokenizers and the written tokenizer, or the first if none is written."""
    try:
        yield from _of_rows(written, others, reading, by_token=by_token)
    except InputError as error:
        yield _Finding("unread", f"tokenizers are not compared: {error}", tuple(others))
    if written is None:
        return
    try:
        yield from _of_roles(written, others)
        yield from _of_templates(written, others)
    except InputError as error:
        yield _Finding("unread", f"special tokens are not compared: {error}", tuple(others))


def _of_rows(
    written: _Tokenizer | None, others: Sequence[_Tokenizer], reading: Reading, *, by_token: bool
) -> Iterator[_Finding]:
    contents: dict[int, Hashable] = {}
    for i, one in enumerate(others):
        with errors.context(one.name):
            contents[i] = id(one.made) if one.made is not None else reading.content(one.folder)
    known = [one for i, one in enumerate(others) if contents[i] is not None]
    kinds = {i: content for i, content in contents.items() if content is not None}
    first = written
    if first is not None:
        with errors.context(first.name):
            mine: Hashable = id(first.made) if first.made is not None else reading.content(first.folder)
    if first is None or mine is None:
        first, mine = (known[0], next(iter(kinds.values()))) if known else (None, None)
    if first is None or set(kinds.values()) <= {mine}:
        return
    base = _words(first, reading)
    aparts: dict[Hashable, _Apart] = {}
    apart: list[tuple[_Tokenizer, _Apart]] = []
    for i, content in kinds.items():
        limit = min(first.limit, others[i].limit)
        if content != mine:
            if (content, limit) not in aparts:
                aparts[content, limit] = _compared(base, _words(others[i], reading), limit)
            apart.append((others[i], aparts[content, limit]))
    yield from _steps(apart, first)
    if by_token:
        return
    for one, found in apart:
        if found.many:
            yield _many(found.shared, first, one, base.rows, found.other)
    few = [(one, found) for one, found in apart if not found.many]
    for (a, of_a), (b, of_b) in combinations(_distinct(few), 2):
        shared = min(of_a.shared, of_b.shared)
        if a.meets and b.meets and (len(of_a.other) + len(of_b.other)) * SHARE > shared:
            rows = of_a.other.keys() | of_b.other.keys()
            tokens = {i: (of_a.other.get(i, base.rows[i]), of_b.other.get(i, base.rows[i])) for i in sorted(rows)}
            differ = {i: pair for i, pair in tokens.items() if pair[0] != pair[1]}
            if len(differ) * SHARE > shared:
                theirs, their_own = ({i: pair[k] for i, pair in differ.items()} for k in (0, 1))
                yield _many(shared, a, b, theirs, their_own)
    yield from _few(few, first, base.rows)


def _words(one: _Tokenizer, reading: Reading) -> Words:
    with errors.context(one.name):
        return one.made or reading.words(one.folder)


def _compared(base: Words, words: Words, limit: int) -> _Apart:
    rows, shifted = _as_rows_of(base, words)
    mine, there = base.rows, [i for i in rows if i < limit]
    apart = {i: rows[i] for i in there if mine.get(i) != rows[i]}
    other = {i: token for i, token in apart.items() if i in mine}
    shared = sum(map(mine.__contains__, there))
    if shifted and len(other) <= ELSEWHERE:
        return _Apart(shared)
    special = words.special ^ base.special
    if special:
        special &= set(mine.values()) & set(rows.values())
    alike = base.file == words.file
    steps = [s for s in words.steps if alike and s in base.steps and not same_step(s, base.steps[s], words.steps[s])]
    if other:  # whose pieces are scored, and split, as other tokens
        steps = [step for step in steps if step not in ("scores", "merges")]
    return _Apart(shared, other, {i: token for i, token in apart.items() if i not in mine}, special, tuple(steps))


def _as_rows_of(base: Words, words: Words) -> tuple[Mapping[int, str], bool]:
    """Return the rows of a vocabulary.

    In a SentencePiece file beside a tokenizer.json they are moved by the distance between a family's ids and its
    pieces.
    """
    if base.file == words.file or not {base.file, words.file} & {*SENTENCEPIECE}:
        return words.rows, False
    ids = {token: i for i, token in base.rows.items()}
    moves = Counter(ids[token] - i for i, token in words.rows.items() if token in ids)
    move, count = moves.most_common(1)[0] if moves else (0, 0)
    if not move or 2 * count <= moves.total():
        return words.rows, False
    return {i + move: token for i, token in words.rows.items()}, True


def _distinct(few: Sequence[tuple[_Tokenizer, _Apart]]) -> list[tuple[_Tokenizer, _Apart]]:
    """Return one tokenizer of each kind that has other tokens."""
    return list({id(found): (one, found) for one, found in few if found.other}.values())


def _many(
    shared: int, one: _Tokenizer, other: _Tokenizer, tokens: Mapping[int, str], others: Mapping[int, str]
) -> _Finding:
    shown = " and ".join(f"row {i} ({_quoted(tokens[i])}, {_quoted(others[i])})" for i in sorted(others)[:SHOWN])
    count = f"{len(others):,} of {shared:,} rows of the embedding"
    return _Finding("many", f"{one.name} and {other.name} have other tokens in {count}, such as {shown}", (other, one))


def _few(
    apart: Sequence[tuple[_Tokenizer, _Apart]], first: _Tokenizer, tokens: Mapping[int, str]
) -> Iterator[_Finding]:
    """Yield the rows that mean other tokens, rows of fine-tunes first, and tokens that the first tokenizer lacks."""
    for is_base in (False, True):
        those = [(one, found) for one, found in apart if one.is_base is is_base and found.other]
        rows = sorted({i for _, found in those for i in found.other})
        if rows:
            shared = max(found.shared for _, found in those)
            texts = []
            for i in rows[:SHOWN]:
                by_token: dict[str, list[str]] = {}
                for one, found in those:
                    if i in found.other:
                        by_token.setdefault(found.other[i], []).append(one.name)
                said = [f"{_quoted(token)} in {some(names)}" for token, names in by_token.items()]
                texts.append(f"row {i} is {some([f'{_quoted(tokens[i])} in {first.name}', *said])}")
            more = [f"{len(rows) - SHOWN} more"] * (len(rows) > SHOWN)
            text = f"{len(rows):,} of {shared:,} rows of the embedding mean other tokens: {'; '.join([*texts, *more])}"
            yield _Finding("rows", text, tuple(one for one, _ in those))
    for one, found in apart:
        if found.more and not one.is_base:
            shown = some([f"{_quoted(found.more[i])} (row {i})" for i in sorted(found.more)], SHOWN)
            count = f"{len(found.more):,} token{'s' * (len(found.more) > 1)}"
            yield _Finding("more", f"{one.name} has {count} that {first.name} lacks: {shown}", (one,))


def _steps(apart: Sequence[tuple[_Tokenizer, _Apart]], first: _Tokenizer) -> Iterator[_Finding]:
    for one, found in apart:
        if found.special and not found.many:
            tokens = some(sorted(map(_quoted, found.special)))
            yield _Finding("special", f"special in only one of {first.name} and {one.name}: {tokens}", (one,))
        if found.steps and not found.many:
            steps = ", ".join(found.steps)
            yield _Finding("steps", f"{one.name} cuts text otherwise than {first.name}: {steps}", (one,))


def _of_roles(written: _Tokenizer, others: Sequence[_Tokenizer]) -> Iterator[_Finding]:
    """Yield special tokens and settings in which others differ from the written tokenizer."""
    mine = _stated(written)
    apart: dict[tuple[str, Hashable, bool], list[_Tokenizer]] = {}
    for one in others:
        for key, value in _stated(one).items() if one.folder != written.folder else ():
            if value != mine.get(key) and (key in mine or key in ROLES):
                apart.setdefault((key, value, one.is_base), []).append(one)
    for (key, value, _), those in apart.items():
        ours = f"{_quoted(mine[key])} in {written.name}" if key in mine else f"none in {written.name}"
        text = f"{key} is {_quoted(value)} in {some(one.name for one in those)}, {ours}"
        yield _Finding("role" if key in ROLES else "steps", text, tuple(those))


def _stated(one: _Tokenizer) -> dict[str, Hashable]:
    with errors.context(one.name):
        config = tokenizer_config(one.folder)
        settings = {key: value for key in SETTINGS if isinstance(value := config.get(key), bool)}
        return {**roles_in(one.folder), **settings}


def _of_templates(written: _Tokenizer, others: Sequence[_Tokenizer]) -> Iterator[_Finding]:
    """Yield chat templates that differ from the written one."""
    mine = _template(written)
    found = [(one, text) for one in others if (text := _template(one)) and text != mine]
    for is_base in (False, True):
        those = [one for one, _ in found if one.is_base is is_base]
        if not those:
            continue
        several = len({text for one, text in found if one.is_base is is_base}) > 1
        asked = "auto, or a model," if several and len(those) > 1 else ""
        names = some(one.name for one in those)
        if mine:
            verb = "have other chat templates" if len(those) > 1 else "has another chat template"
            yield _Finding("template", f"{names} {verb} than {written.name}", tuple(those), asked)
        elif not is_base:
            verb = "have" if len(those) > 1 else "has"
            yield _Finding("template", f"{names} {verb} a chat template, {written.name} none", tuple(those), asked)


def _template(one: _Tokenizer) -> str:
    with errors.context(one.name):
        return one.chat_template


def _quoted(token: object) -> str:
    return repr(token if not isinstance(token, str) or len(token) <= LONGEST else token[:LONGEST] + "…")
