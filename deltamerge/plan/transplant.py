"""The output with another model's tokenizer: rows of tokens that both have, and sums of such rows for the others."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.models.checkpoint import Tokens
from deltamerge.models.tokenizer_files import ROLES, read_generation, read_roles, read_tokens
from deltamerge.plan.inputs import Input, Inputs, vocabularies
from deltamerge.plan.vocabulary import BYTES_PER_TOKEN, ID_KEYS, Rows, Vocabulary, make_vocabulary
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.dtypes import PLAIN, bits_type, torch_dtype, widen
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.names import TOKEN_EMBEDDING, TOKEN_HEAD
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed
from deltamerge.tensors.views import fill_lines, mean_row, stored_rows

TORCH_BYTES = 170_000_000  # bytes of torch's code and its first product, measured

Key = tuple[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transplant(Vocabulary):
    """The vocabulary of a donor, and the way from the models' rows to its rows.

    union       the models' union: each model gets a row for every token, as with `tokenizer_source: union`
    method, k   how rows of tokens that the union lacks are made
    origin      (rows) the union's id of an id, −1: a sum of other rows; −2: the mean row
    shared      pairs of ids, the union's and the output's, of tokens that are the same or have the same purpose
    donors      the donor's embedding and head by their role; the same tensor if the donor ties them
    roles       the donor's tokens by purpose
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
        """Return True: an embedding must be found."""
        return True

    @property
    def others(self) -> Rows:
        """Ids whose rows are sums of other rows."""
        return np.flatnonzero(self.origin == -1).astype(np.int32)

    @property
    def common(self) -> Rows:
        """Ids of tokens that both have, and for which the donor has a row."""
        there = np.flatnonzero(self.origin >= 0)
        return there[there < self.donors["embedding"].shape[0]].astype(np.int32)

    @property
    def memory(self) -> int:
        """Estimate the bytes of memory for reading the tokenizers."""
        return self.union.memory + BYTES_PER_TOKEN * len(self.ids)

    def held(self, workers: int) -> int:
        """Return the bytes of the donor's rows, of the sums, and of each worker's computations."""
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
        """Return the donor's tensors that are searched for sums, each once."""
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

    def move_ids(self, config: dict[str, Any], template: Input, *, generation: bool) -> None:
        """Put the donor's ids into a config.

        Ids of purposes come from the donor's config, or from its tokenizer; other ids follow their tokens. InputError:
        the donor lacks a token.
        """
        theirs = dict(self.start.checkpoint.config) | (dict(self.generation) if generation else {})
        roles: dict[str, int | None] = {}
        for role in ROLES:
            key, token = f"{role}_id", self.roles.get(role)
            own = None if token is None else self.ids.get(token)
            roles[key] = own if theirs.get(key) is None else theirs[key]
            if key in config or theirs.get(key) is not None or (own is not None and role in ("eos_token", "bos_token")):
                config[key] = roles[key]
        _follow(config, self, roles)

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
    """Return for each of their tokens that we have their id -> our id, and a note for each purpose whose token differs.

    A token with a purpose (the end of a text) matches our token of this purpose, whatever its name. Other tokens match
    if they stand for the same bytes, and both or neither are special. None of our tokens is used twice, because two
    tokens with one row would share their predictions. SentencePiece's bytes are matched last.
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
    """Return every token with its meaning, and 1 if it is SentencePiece's fallback for a byte, else 0.

    The last id comes first, so that a mapping keeps the first of equal tokens.
    """
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
    """Return the donor's tensors with a row per token: its embedding, and its head, or the embedding again."""
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
    """Raise InputError if a config states vocabularies of several sizes."""
    stated = vocabularies(model.checkpoint.config)
    if len(set(stated.values())) > 1:
        shown = ", ".join(f"{key} {size}" for key, size in stated.items())
        hint = "name its language model alone, if it has a folder of its own"
        raise InputError(f"has several vocabularies ({shown}): which is its tokenizer's is not known",
                         where=model.name, hint=hint)  # fmt: skip


def _refuse_few(made: Transplant, ours: str, theirs: str) -> None:
    """Raise InputError if the vocabularies have too few tokens in common."""
    common = len(made.common)
    if not common:
        hint = "name a tokenizer of the same languages; spelling (Ġ, ▁, bytes) is taken into account"
        raise InputError(f"{ours} and {theirs} have no token in common", hint=hint)
    if made.method != "mean" and len(made.others) and made.k > common:
        place = "tokenizer.k"
        raise InputError(f"{place}: {made.k} rows a sum, and {ours} and {theirs} have {common} tokens in common",
                         hint=f"k: {common}, or fewer")  # fmt: skip


def _follow(config: dict[str, Any], vocabulary: Transplant, roles: Mapping[str, int | None]) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            value |= {role: own for role, own in roles.items() if value.get(role) is not None}
            _follow(value, vocabulary, roles)
        elif key.removesuffix("_id") in ROLES or not key.endswith(ID_KEYS):
            continue
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            config[key] = _found(key, value, vocabulary)
        elif isinstance(value, list) and all(isinstance(item, int) for item in value):
            config[key] = [vocabulary.shared[item] for item in value if item in vocabulary.shared]


def _found(key: str, value: int, vocabulary: Transplant) -> int | None:
    if value in vocabulary.shared:
        return vocabulary.shared[value]
    names = {i: token for token, i in vocabulary.union.ids.items()}
    if value not in names:
        return None
    message = f"{key} is of {names[value]!r}, a token that {vocabulary.start.name} lacks"
    raise InputError(message, hint="add it to that tokenizer, with a row of its model's embedding")


# -- rows


@dataclass(frozen=True, slots=True)
class Sums:
    """The sums of common tokens' rows that make the rows of other tokens.

    method    omp or common
    k         rows of a sum
    common    the donor's rows of tokens that both have
    others    the donor's rows to be written as sums of common rows
    digest    digest of both
    """

    method: str
    k: int
    digest: str
    common: NDArray[np.int32] = field(compare=False, repr=False)
    others: NDArray[np.int32] = field(compare=False, repr=False)

    def of(self, read: Read, donor: Tensor, first: int, last: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return (last − first, k) places in `common`, and coefficients, of the sums [first, last).

        `donor` is the donor's embedding (rows, width).
        """
        blocks: SharedBlocks = read.once(("sums", donor, self), lambda: self._blocks(read, donor))
        size = self._block(donor)
        found = [blocks.get(i) for i in range(first // size, -(-last // size))]
        low = first // size * size
        places, weights = (np.concatenate(part)[first - low : last - low] for part in zip(*found, strict=True))
        return places, weights

    def _block(self, donor: Tensor) -> int:
        """Return the number of rows that are computed at once."""
        return block_of(math.prod(donor.shape[1:]), self.k)

    def _blocks(self, read: Read, donor: Tensor) -> SharedBlocks:
        # distances are differences, which bfloat16 would not tell apart
        atoms = Atoms.of(_values(read, donor, self.common), screen=False if self.method == "common" else None)

        def compute(block: int) -> Any:
            rows = self.others[block * size : (block + 1) * size]
            return METHODS[self.method](_values(read, donor, rows), atoms, self.k)

        size = self._block(donor)
        return SharedBlocks(-(-len(self.others) // size), compute)


def _values(read: Read, donor: Tensor, rows: NDArray[np.int32]) -> Any:
    """Return the donor's rows as a torch tensor, in bfloat16 if they are stored so, else in float32."""
    bits = stored_rows(read, donor, rows, math.prod(donor.shape[1:]))
    if donor.dtype == "BF16":
        return torch.from_numpy(bits.view(np.int16)).view(torch_dtype("BF16"))
    return torch.from_numpy(widen(bits.view(bits_type(donor.dtype)), donor.dtype))


@dataclass(frozen=True, slots=True)
class Moves:
    """The rows of a tensor under another tokenizer.

    sums     the sums; None: such rows get the mean row
    digest   digest of the arrays below
    origin   (rows) the source's row for a row; −1: a sum; −2: the mean of all rows of the source
    order    (rows) the number of a row's sum
    common   the rows of the source in sums, as `sums.common` has the donor's
    """

    sums: Sums | None
    digest: str
    origin: NDArray[np.int32] = field(compare=False, repr=False)
    order: NDArray[np.int32] = field(compare=False, repr=False)
    common: NDArray[np.int32] = field(compare=False, repr=False)


@view(moves=True)
def transplant_rows(read: Read, tensor: Tensor, start: int, out: memoryview, *, moves: Moves) -> None:
    """Compute a tensor (rows, width) in float32 under another tokenizer.

    The first input is the tensor under the old vocabulary. The second, if any, is the donor's embedding.
    """
    width = math.prod(tensor.shape[1:])
    fill_lines(width, "F32", start, out, lambda top, bottom: _rows(read, tensor, moves, top, bottom))


def _rows(read: Read, tensor: Tensor, moves: Moves, first: int, last: int) -> NDArray[np.float32]:
    source, origin = tensor.inputs[0], moves.origin[first:last]
    result = np.empty((len(origin), math.prod(tensor.shape[1:])), np.float32)
    copied, summed, mean = (np.flatnonzero(chosen) for chosen in (origin >= 0, origin == -1, origin == -2))
    if copied.size:
        result[copied] = _source(read, source, origin[copied])
    if mean.size or (summed.size and moves.sums is None):
        row = read.once(("mean row", source), lambda: _mean(read, source))
        result[mean] = row
        if moves.sums is None:
            result[summed] = row
    if summed.size and moves.sums is not None:
        wanted = moves.order[first:last][summed]
        places, weights = moves.sums.of(read, tensor.inputs[1], int(wanted[0]), int(wanted[-1]) + 1)
        result[summed] = _summed(read, source, moves.common, places, weights)
    return result


def _summed(
    read: Read, source: Tensor, common: NDArray[np.int32], places: NDArray[np.int32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return Σ_j w_j · row_j in float32 in the order of j, each product and sum rounded."""
    rows, where = np.unique(common[places], return_inverse=True)
    values, where = _source(read, source, rows), where.reshape(places.shape)
    total = np.zeros((len(places), values.shape[1]), np.float32)
    for j in range(places.shape[1]):
        total += weights[:, j, None] * values[where[:, j]]
    return total


def _source(read: Read, source: Tensor, rows: NDArray[np.int32]) -> NDArray[np.float32]:
    width = math.prod(source.shape[1:])
    return widen(stored_rows(read, source, rows, width).view(bits_type(source.dtype)), source.dtype)


def _mean(read: Read, source: Tensor) -> NDArray[np.float32]:
    def rows(first: int, last: int) -> NDArray[np.float32]:
        return _source(read, source, np.arange(first, last, dtype=np.int32))

    return mean_row(rows, source.shape[0], math.prod(source.shape[1:]))


# -- vectors as sums of few others: orthogonal matching pursuit, and interpolation of the nearest

CANDIDATES = 8  # best candidates of a step, whose scores are computed again in float32
SCREENED = 1 << 22  # elements of the atoms from which on scores are first computed in bfloat16
HELD = 1 << 25  # float32 elements of the bases of one block of targets
SPARE = 8  # nearest atoms, beyond k, whose distances are computed again in float64
DEPENDENT = 1e-4  # share of an atom: a smaller part outside the span of the chosen atoms is only rounding
DONE = 1e-6  # share of a target: a smaller residual is only rounding

Indices = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Atoms:
    """(atoms, width) vectors, in float32 or bfloat16, and in the form that is screened."""

    exact: Any
    screened: Any

    @classmethod
    def of(cls, exact: Any, *, screen: bool | None = None) -> Atoms:
        """Return the atoms of a torch tensor. `screen`: scores are first computed in bfloat16, where that is faster."""
        if screen is None:
            screen = exact.numel() >= SCREENED and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return cls(exact, exact.bfloat16() if screen else exact.float())

    def rows(self, indices: Any) -> Any:
        """Return atoms in float32."""
        return self.exact[indices].float()

    @cached_property
    def squares(self) -> Any:
        """|a|² of every atom, in float32."""
        return self.screened.float().norm(dim=1).square()


def block_of(width: int, k: int) -> int:
    """Return the number of targets of a block, whose bases fit into 128 MiB."""
    return max(8, min(512, HELD // (k * width)))


def held(width: int, k: int, atoms: int) -> int:
    """Return the bytes that one thread holds while it computes a block: bases, their candidates, scores."""
    targets = block_of(width, k)
    return 4 * targets * (k * width + 2 * (CANDIDATES + 4) * width + 2 * atoms) + 16 * 8 * k * width


def pursuit(targets: Any, atoms: Atoms, k: int) -> tuple[Indices, Floats]:
    """Find (targets, k) indices of atoms, and float32 coefficients, by orthogonal matching pursuit (Pati et al. 1993).

    A step takes the atom a with the greatest |a · r| (the first of equals), where r is the part of the target outside
    the span of the chosen atoms. Scores are float32. If they are screened in bfloat16, the best 8 are computed again.
    The coefficients are the least squares of the chosen atoms, in float64, rounded once. A target that is spanned
    sooner has zeros for the rest.
    """
    targets = targets.float()
    count, width = targets.shape
    chosen = np.zeros((count, k), np.int64)
    used = np.zeros((count, k), bool)
    bases = torch.zeros((count, k, width))
    residual = targets.clone()
    norms = targets.norm(dim=1)
    active = (norms > 0).numpy()
    for step in range(k):
        if not active.any():
            break
        best = _best(residual, atoms, chosen[:, :step], used[:, :step])
        atom = atoms.rows(torch.from_numpy(best))
        direction = atom.clone()
        if step:
            past = bases[:, :step]
            direction -= torch.bmm(torch.bmm(direction[:, None], past.transpose(1, 2)), past)[:, 0]
        length = direction.norm(dim=1)
        active &= (length > DEPENDENT * atom.norm(dim=1)).numpy()
        active &= (residual.norm(dim=1) > DONE * norms).numpy()
        direction *= torch.where(torch.from_numpy(active), 1 / length, 0.0)[:, None]
        bases[:, step] = direction
        residual -= (residual * direction).sum(1, keepdim=True) * direction
        chosen[active, step], used[:, step] = best[active], active
    return chosen.astype(np.int32), _least_squares(targets, atoms, chosen, used)


def _best(residual: Any, atoms: Atoms, chosen: NDArray[np.int64], used: NDArray[Any]) -> NDArray[np.int64]:
    """Return for each target the atom with the greatest |a · r| that is not chosen yet."""
    scores = (residual.to(atoms.screened.dtype) @ atoms.screened.T).abs_()
    if chosen.shape[1]:
        at, places = np.nonzero(used)
        scores[torch.from_numpy(at), torch.from_numpy(chosen[at, places])] = -1
    found = scores.topk(min(CANDIDATES, scores.shape[1]), dim=1).indices.sort(dim=1).values
    # residuals as rows: as columns they take 4 times as long
    exact = torch.bmm(residual[:, None], atoms.rows(found).transpose(1, 2))[:, 0].abs()
    exact[scores.gather(1, found) < 0] = -1
    places = exact.numpy().argmax(1)
    picked: NDArray[np.int64] = found.numpy()[np.arange(len(places)), places]
    return picked


def _least_squares(targets: Any, atoms: Atoms, chosen: NDArray[np.int64], used: NDArray[Any]) -> Floats:
    """Return the coefficients of the chosen atoms, by normal equations in float64. Unused coefficients are zero."""
    result = np.zeros(chosen.shape, np.float32)
    for first in range(0, len(chosen), 16):
        part = slice(first, first + 16)
        live = torch.from_numpy(used[part].astype(np.float64))
        rows = atoms.rows(torch.from_numpy(chosen[part])).double() * live[:, :, None]
        gram = rows @ rows.transpose(1, 2) + torch.diag_embed(1 - live)
        wanted = rows @ targets[part].double()[:, :, None]
        scale = gram.diagonal(dim1=1, dim2=2).rsqrt()[:, :, None]
        factor = torch.linalg.cholesky_ex(gram * scale * scale.transpose(1, 2)).L
        result[part] = (torch.cholesky_solve(wanted * scale, factor) * scale)[:, :, 0].float().numpy()
    return result


def nearest(targets: Any, atoms: Atoms, k: int) -> tuple[Indices, Floats]:
    """Return (targets, k) indices of the nearest atoms, and weights in inverse proportion to their distances.

    Distances are Euclidean, at least 1e-6, and in float64 for the candidates. The first of equals is nearer.
    """
    targets = targets.float()
    # |x − a|² without |x|², which is the same for all atoms
    plain = atoms.screened.float()
    sums = atoms.squares - 2 * (targets @ plain.T)
    chosen = np.zeros((len(targets), k), np.int32)
    weights = np.zeros((len(targets), k), np.float32)
    near = sums.topk(min(k + SPARE, sums.shape[1]), dim=1, largest=False).indices.sort(dim=1).values
    for i, (target, found) in enumerate(zip(targets, near, strict=True)):
        distances = (atoms.exact[found].double() - target.double()).norm(dim=1).numpy()
        order = np.argsort(distances, kind="stable")[:k]
        chosen[i] = found.numpy()[order]
        inverse = 1 / np.maximum(distances[order], 1e-6)
        weights[i] = inverse / inverse.sum()
    return chosen, weights


METHODS: dict[str, Callable[..., Any]] = {"omp": pursuit, "common": nearest}


class SharedBlocks:
    """Blocks of a table that threads compute as they come.

    A thread whose block another one computes takes the next free block. It waits only where none is free.
    """

    def __init__(self, count: int, compute: Any) -> None:
        self.compute = compute
        self.results: list[Any] = [None] * count
        self.free = dict.fromkeys(range(count))
        self.changed = threading.Condition()
        self.failed: BaseException | None = None

    def get(self, block: int) -> Any:
        """Return the block's value. Raises the error that any block's computation raised."""
        while True:
            with self.changed:
                if self.failed is not None:
                    raise self.failed
                if self.results[block] is not None:
                    return self.results[block]
                mine = block if block in self.free else next(iter(self.free), None)
                if mine is None:
                    self.changed.wait()
                    continue
                del self.free[mine]
            try:
                with one_thread():
                    made = self.compute(mine)
            except BaseException as error:
                with self.changed:
                    self.failed = error
                    self.changed.notify_all()
                raise
            with self.changed:
                self.results[mine] = made
                self.changed.notify_all()


_counting = threading.Lock()
_inside: list[int] = []


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's operations on one thread, while any worker is inside."""
    with _counting:
        _inside.append(torch.get_num_threads() if not _inside else _inside[0])
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _counting:
            before = _inside.pop()
            if not _inside:
                torch.set_num_threads(before)
