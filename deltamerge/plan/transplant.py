"""The output on another model's tokenizer: which tokens both have, and where the rows of the others come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.models.checkpoint import Tokens
from deltamerge.models.tokenizer_files import ROLES, read_generation, read_roles, read_tokens
from deltamerge.plan.inputs import Input, Inputs
from deltamerge.plan.pursuit import SCREENED, held
from deltamerge.plan.transplant_rows import Moves, Sums, transplant_rows
from deltamerge.plan.vocabulary import BYTES_PER_TOKEN, Rows, Vocabulary, make_vocabulary
from deltamerge.plan.vocabulary_rows import vocabularies
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.dtypes import PLAIN
from deltamerge.tensors.names import TOKEN_EMBEDDING, TOKEN_HEAD
from deltamerge.tensors.tensor import TensorInfo, viewed

TORCH_BYTES = 170_000_000  # of torch's code and its first product, measured

Key = tuple[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transplant(Vocabulary):
    """The vocabulary of a donor, and how the models' rows come to be its rows.

    union       of the models: under it each has a row for every token, as `tokenizer_source: union` gives it
    method, k   how rows of tokens that the union lacks are made
    origin      (rows) the union's id of an id, −1: made of other rows; −2: the mean row
    shared      pairs of ids, the union's and the output's, of tokens that are the same or have the same purpose
    donors      the donor's embedding and head by what they are; the same where the donor ties them
    roles       the donor's tokens of a purpose
    generation  the donor's generation_config.json
    """

    union: Vocabulary
    method: str
    k: int
    origin: Rows
    shared: Mapping[int, int]
    donors: Mapping[str, TensorInfo]
    roles: Mapping[str, str]
    generation: Mapping[str, Any]
    _sums: dict[str, Sums | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def changes(self) -> bool:
        """Always: an embedding must be found."""
        return True

    @property
    def others(self) -> Rows:
        """Ids whose rows are made of others."""
        return np.flatnonzero(self.origin == -1).astype(np.int32)

    @property
    def common(self) -> Rows:
        """Ids of tokens that both have, of which the donor has a row."""
        there = np.flatnonzero(self.origin >= 0)
        return there[there < self.donors["embedding"].shape[0]].astype(np.int32)

    @property
    def memory(self) -> int:
        """Return about the bytes of memory that reading the tokenizers takes."""
        return self.union.memory + BYTES_PER_TOKEN * len(self.ids)

    def held(self, workers: int) -> int:
        """Return the bytes of the donor's rows, of the sums, and of what each worker computes of them."""
        if self.method == "mean" or not len(self.others):
            return 0
        common, others, total = len(self.common), len(self.others), TORCH_BYTES
        for donor in self._searched:
            width = math.prod(donor.shape[1:])
            stored = 2 if donor.dtype == "BF16" else 4
            screened = 4 if common * width < SCREENED else 2 * (stored == 4)
            total += common * width * (stored + max(screened, 4 * (self.method == "common"))) + 8 * others * self.k
            total += workers * held(width, self.k, common)
        return total

    @property
    def operations(self) -> float:
        """Floating-point operations that finding the sums takes, about."""
        steps = {"omp": self.k, "common": 1, "mean": 0}[self.method]
        return sum(2.0 * steps * len(self.common) * len(self.others) * math.prod(d.shape[1:]) for d in self._searched)

    @property
    def _searched(self) -> list[TensorInfo]:
        """Return the donor's tensors that sums are found among, once."""
        return list({id(one): one for one in self.donors.values()}.values())

    def remap(self, model: Input, present: Sequence[tuple[Input, TensorInfo]]) -> TensorInfo:
        """Return the model's tensor under the donor's vocabulary: under the union's first, then row by row."""
        source = self.union.remap(model, present)
        if source.dtype not in PLAIN:
            raise InputError(f"rows of {source.dtype} cannot be put on another tokenizer")
        sums = self._sums_of(source.name) if len(source.shape) == 2 else None
        ids = self.origin[self.common]
        order = np.cumsum(self.origin == -1, dtype=np.int32) - 1
        digest = blake2b(self.origin.tobytes() + ids.tobytes(), digest_size=16).hexdigest()
        moves = Moves(sums, digest, self.origin, order, ids)
        inputs = [source] if sums is None else [source, self.donors[self._which(source.name)]]
        shape = (self.total, *source.shape[1:])
        return TensorInfo(source.name, viewed(transplant_rows, inputs, shape, "F32", moves=moves))

    def _which(self, name: str) -> str:
        return "head" if TOKEN_HEAD.search(name) else "embedding"

    def _sums_of(self, name: str) -> Sums | None:
        """Return the sums of the output's embedding, or of its head."""
        which = self._which(name)
        if which not in self._sums:
            common, others = self.common, self.others
            digest = blake2b(common.tobytes() + others.tobytes(), digest_size=16).hexdigest()
            made = self.method != "mean" and len(others)
            sums = Sums(self.method, self.k, digest, common, others) if made else None
            self._sums[which] = sums
        return self._sums[which]

    def describe(self) -> dict[str, Any]:
        """Return the vocabulary as `deltamerge plan --json` prints it."""
        made = {
            "method": self.method,
            "k": self.k,
            "kept": int((self.origin >= 0).sum()),
            "common": len(self.common),
            "made": int((self.origin == -1).sum()),
            "mean": int((self.origin == -2).sum()),
        }
        return {**Vocabulary.describe(self), "transplant": made}


def make_transplant(recipe: Recipe, inputs: Inputs) -> Transplant:
    """Return the vocabulary of a recipe with `tokenizer.transplant`.

    InputError: no tokenizer or embedding where one is needed, two vocabularies in one config, no token in common, fewer
    than k, or a config that names a token that the donor lacks.
    """
    donor, wanted = inputs.donor, recipe.tokenizer
    assert donor is not None
    assert wanted is not None
    for model in (inputs.template, donor):
        _refuse_two(model)
    union = make_vocabulary(recipe, replace(inputs, vocabulary=inputs.base or inputs.tunes[0]))
    assert union is not None
    theirs = read_tokens(donor.checkpoint)
    if theirs is None:
        raise InputError("has no tokenizer.json, which the output would be put on", where=donor.name)
    donors = _embeddings(donor)
    ours, roles = union.tokens, (read_roles(union.start.checkpoint), read_roles(donor.checkpoint))
    shared, notes = match(ours, theirs, *roles)
    size = 1 + max(theirs.ids.values(), default=-1)
    total = size + -size % (wanted.pad_to_multiple_of or 1)
    origin = np.full(total, -2, np.int32)
    rows = donors["embedding"].shape[0]
    origin[[i for i in theirs.ids.values() if i < rows]] = -1
    origin[list(shared)] = list(shared.values())
    made = Transplant(
        kind="transplant", start=donor, first=theirs, ids=dict(theirs.ids), entries=(), appended=0,
        dropped=frozenset(), size=size, padding=total - size, columns={}, base=None, given={},
        template_ids=union.template_ids, rows=union.rows,
        notes=(*union.notes, *notes), union=union, method=wanted.method, k=wanted.k, origin=origin,
        shared={old: new for new, old in shared.items()}, donors=donors, roles=roles[1],
        generation=read_generation(donor.checkpoint),
    )  # fmt: skip
    _refuse_few(made, union.start.name, donor.name)
    return made


def match(
    ours: Tokens, theirs: Tokens, our_roles: Mapping[str, str], their_roles: Mapping[str, str]
) -> tuple[dict[int, int], list[str]]:
    """Their id -> our id of every token of theirs that we have, and a note for purposes that differ in their token.

    A token of a purpose (the end of a text) is ours of that purpose, whatever it is called. Others are the same if they
    stand for the same bytes, and both or neither are special. None of ours is given twice, as two tokens with one row
    would share what it predicts; SentencePiece's bytes come after all others.
    """
    found: dict[int, int] = {}
    taken: set[int] = set()
    notes = []
    for role in ROLES:
        mine, other = our_roles.get(role), their_roles.get(role)
        if mine not in ours.ids or other not in theirs.ids or mine is None or other is None:
            continue
        new, old = theirs.ids[other], ours.ids[mine]
        if new not in found and old not in taken:
            found[new] = old
            taken.add(old)
            notes += [f"{other} takes the row of {mine} ({role.removesuffix('_token')})"] if mine != other else []
    for rank in (0, 1):
        known: dict[Key, int] = {}
        for own_rank in (1, 0):
            known |= {key: ours.ids[token] for token, key, r in _keys(ours) if r == own_rank}
        for token, key, r in reversed(_keys(theirs)):
            new, old = theirs.ids[token], known.get(key, -1)
            if token in theirs.added and token in ours.added and old < 0:
                old = ours.ids[token]
            if r == rank and old >= 0 and old not in taken and new not in found:
                found[new] = old
                taken.add(old)
    return dict(sorted(found.items())), notes


def _keys(tokens: Tokens) -> list[tuple[str, Key, int]]:
    """Return every token with what it stands for, and 1 if it is SentencePiece's way out for a byte, else 0; the last
    id first, so that the first of equals is what a mapping keeps."""
    result: list[tuple[str, Key, int]] = []
    for token in reversed(tokens.ids):
        entry = tokens.added.get(token)
        if entry is not None:
            result.append(
                (token, ("special" if entry.get("special") else "text", token.encode(errors="surrogatepass")), 0)
            )
        else:
            result.append((token, ("text", tokens.spelling.text(token)), int(tokens.spelling.is_byte(token))))
    return result


def _embeddings(donor: Input) -> dict[str, TensorInfo]:
    """Return the donor's tensors with a row per token: its embedding, and its head, or the embedding where it has
    none."""
    heads = [info for name, info in donor.tensors.items() if TOKEN_HEAD.search(name)]
    inputs = [info for name, info in donor.tensors.items() if TOKEN_EMBEDDING.search(name)]
    inputs = inputs or [info for info in donor.tensors.values() if info not in heads]
    if not inputs:
        hint = "name a language model with its weights: sums are found among the rows of its embedding"
        raise InputError("has no embedding with a row per token (vocab_size)", where=donor.name, hint=hint)
    if len(inputs) > 1:
        names = ", ".join(info.name for info in inputs[:4])
        raise InputError(f"has several embeddings, {names}: which is its tokenizer's is not known", where=donor.name)
    if inputs[0].dtype not in PLAIN:
        raise InputError(f"its embedding is {inputs[0].dtype}, of which no sums are made", where=donor.name)
    return {"embedding": inputs[0], "head": heads[0] if heads else inputs[0]}


def _refuse_two(model: Input) -> None:
    """InputError: a config that states vocabularies of several sizes."""
    stated = vocabularies(model.checkpoint.config)
    if len(set(stated.values())) > 1:
        shown = ", ".join(f"{key} {size}" for key, size in stated.items())
        hint = "name its language model alone, if it has a folder of its own"
        raise InputError(f"has several vocabularies ({shown}): which is its tokenizer's is not known",
                         where=model.name, hint=hint)  # fmt: skip


def _refuse_few(made: Transplant, ours: str, theirs: str) -> None:
    """InputError: too few tokens in common for what is to be made of them."""
    common = len(made.common)
    if not common:
        hint = "name a tokenizer of the same languages; spelling (Ġ, ▁, bytes) is taken into account"
        raise InputError(f"{ours} and {theirs} have no token in common", hint=hint)
    if made.method != "mean" and len(made.others) and made.k > common:
        place = "tokenizer.k"
        raise InputError(f"{place}: {made.k} rows a sum, and {ours} and {theirs} have {common} tokens in common",
                         hint=f"k: {common}, or fewer")  # fmt: skip
