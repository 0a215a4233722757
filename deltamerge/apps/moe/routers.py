"""The routers of a mixture of experts: a vector for each layer and expert, from the base's states on prompts.

h(p) is a vector of the base for prompt p. The router of an expert is the unit vector of mean h(positive) − mean
h(negative), as in mergekit-moe. h(p) in layer i is

    hidden, hidden_last   the input of block i (before its norms) at the prompt's last token
    hidden_avg            the same, mean over the prompt's tokens
    mlp_input             the input of block i's MLP at the last token, which the router gets when the mixture runs
    cheap_embed           the unit vector of the sum of the embeddings of all tokens of all prompts, in every layer
    random                standard normal numbers; uniform_random: uniform in ±1/√hidden

The base runs block by block in float32 on one thread, so that a machine always gives the same bytes. torch is imported
when `routers` runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.calibrate.model.transformers_code import quiet, running
from deltamerge.calibrate.spec import BASELINE_BYTES, TensorHeader, resident, rounded
from deltamerge.engine.devices import memory_of
from deltamerge.errors import InputError, VerifyError
from deltamerge.files import progress
from deltamerge.methods.prune.bits import mask_key, normals, uniforms
from deltamerge.recipe.schema import DRAWN
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Tensor

if TYPE_CHECKING:
    from deltamerge.calibrate.model.blocks import BlockModel, Inputs

BATCH = 8  # prompts that go through the model together
ROUTERS = "routers"  # their key in a lock
LEAST_NORM = 1e-8
ROUNDING = 1e-5  # of states in float32, relative
Tokens = Mapping[str, Sequence[int]]
Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prompts:
    """An expert's name and prompts."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """The routers of a mixture.

    mode        gate_mode
    experts     the experts with routers; shared experts with a gate of their own come last
    routed      the number of experts that are not shared
    layers      the model's layers
    width       the width of hidden states
    model       the base's name
    checkpoint  its folder, with config.json and tokenizer
    tensors     all tensors of the base, which are the inputs of the routers
    vocabulary  tokens of the base's embedding, which is the last input
    seed        the seed of random routers
    device      where the base runs
    """

    mode: str
    experts: tuple[Prompts, ...]
    routed: int
    layers: int
    width: int
    model: str
    checkpoint: Path
    tensors: tuple[TensorHeader, ...]
    vocabulary: int
    seed: int
    device: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Return every prompt once."""
        return tuple(dict.fromkeys(text for one in self.experts for text in (*one.positive, *one.negative)))

    @property
    def runs(self) -> bool:
        """Return whether the base is run."""
        return self.mode not in DRAWN and self.mode != "cheap_embed"

    @property
    def memory(self) -> int:
        """Return about the bytes that making them takes beside BASELINE_BYTES.

        They are a block stored and in float32, hidden states of prompts of a few hundred tokens, and the vectors.
        """
        vectors = 16 * self.layers * len(self.experts) * self.width
        if not self.runs:
            return vectors
        states = 4 * self.width * 256 * (len(self.texts) + 8 * BATCH) + 8 * self.layers * self.width * len(self.texts)
        return 2 * resident(self.tensors) + states + vectors

    def within(self, limit: int | None) -> RouterSpec:
        """Itself. InputError: it takes more than `limit` bytes."""
        need = BASELINE_BYTES + self.memory
        if limit is not None and self.mode not in DRAWN and need > limit:
            hint = f"give at least {-(-need // 10**6)}MB, or gate_mode: cheap_embed"
            raise InputError(f"--memory {limit} is too little to make routers of {self.model}", hint=hint)
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Routers:
    """The vectors of routers, (layers, experts, hidden) float32, and their record for a lock."""

    values: NDArray[np.float32]
    record: Mapping[str, Any]


def from_lock(lock: Mapping[str, Any], spec: RouterSpec, values: NDArray[np.float32] | None, where: str) -> Routers:
    """Return the routers of a lock. VerifyError: it has none, or its own are of another gate mode or shape."""
    record = lock.get(ROUTERS)
    if not isinstance(record, dict) or values is None:
        raise VerifyError(f"{where}: has no routers", hint="run without --locked, or copy the .rows file beside it")
    if record.get("gate_mode") != spec.mode:
        raise VerifyError(f"{where}: its routers are {record.get('gate_mode')}, the recipe says {spec.mode}")
    if values.shape != (spec.layers, len(spec.experts), spec.width) or values.dtype != np.float32:
        raise VerifyError(f"{where}: its routers have shape {list(values.shape)}, which does not fit the mixture")
    kept = {key: value for key, value in record.items() if key not in ("rows", "rows_hash")}
    return Routers(values, kept)


def routers(*inputs: Tensor, known: Mapping[Tensor, Any], spec: RouterSpec) -> Routers:
    """Return the routers of a mixture.

    InputError: there is no usable tokenizer, a prompt has no tokens or too many, or transformers cannot run the model.
    """
    if spec.mode in DRAWN:
        return _record(spec, _draw(spec), {})
    with quiet(), errors.context(f"routers of {spec.model}"), memory_of(spec.device), Reader() as reader:
        tokens = _tokens(spec)
        if spec.mode == "cheap_embed":
            made = _embed(spec, inputs[-1], reader, tokens)
        else:
            made = _run(spec, inputs, reader, tokens)
    if not np.isfinite(made).all():
        raise InputError(f"routers of {spec.model}: its states on the prompts are not finite", hint="check the base")
    return _record(spec, made.astype(np.float32), tokens)


def unit(vector: Vector) -> Vector:
    """Return v / ‖v‖ along the last axis, of a norm of at least 1e-8."""
    scaled: Vector = vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), LEAST_NORM)
    return scaled


def _draw(spec: RouterSpec) -> NDArray[np.float32]:
    count = spec.layers * len(spec.experts) * spec.width
    key = mask_key(spec.seed, "moe", "routers")
    if spec.mode == "random":
        flat = normals(key, 0, count)
    else:
        flat = ((2.0 * uniforms(key, 0, count)[0] - 1.0) / np.sqrt(spec.width)).astype(np.float32)
    return flat.reshape(spec.layers, len(spec.experts), spec.width)


def _record(spec: RouterSpec, values: NDArray[np.float32], tokens: Tokens) -> Routers:
    """Return the routers with their record for a lock, including the two most similar routers of a layer."""
    rows = unit(values[:, : spec.routed].astype(np.float64))
    cosines = np.round(np.einsum("lah,lbh->lab", rows, rows), 6)  # equal layers are equal, the first counts
    cosines[:, *np.tril_indices(spec.routed)] = -1.0
    layer, a, b = (int(i) for i in np.unravel_index(int(cosines.argmax()), cosines.shape))
    alike = {"layer": layer, "experts": [a, b], "cosine": rounded(float(cosines[layer, a, b]))}
    record: dict[str, Any] = {"gate_mode": spec.mode, "experts": len(spec.experts), "most_alike": alike}
    if tokens:
        record["tokens"] = sum(map(len, tokens.values()))
    return Routers(values, record)


def _tokens(spec: RouterSpec) -> dict[str, list[int]]:
    """Return the token ids of every prompt, after the tokenizer's first token where it has one."""
    from deltamerge.calibrate.rows.batches import tokenizer_of

    tokenizer = tokenizer_of(spec.checkpoint)
    start, rows = tokenizer.bos_token or "", spec.vocabulary
    found: dict[str, list[int]] = {}
    for text in spec.texts:
        with running("its tokenizer cannot take the prompts"):
            ids = list(tokenizer(start + text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise InputError(f"prompt {text[:40]!r} has no token")
        if max(ids) >= rows:
            raise InputError(f"prompt {text[:40]!r} has token {max(ids)}, and the embedding {rows} rows")
        found[text] = ids
    return found


def _embed(spec: RouterSpec, embedding: Tensor, reader: Reader, tokens: Tokens) -> Vector:
    """Return (layers, experts, hidden) from sums of rows of the embedding, in float64."""
    known: dict[int, Vector] = {}

    def sum_of(texts: Sequence[str]) -> Vector:
        ids = [i for text in texts for i in tokens[text]]
        for i in set(ids) - known.keys():
            known[i] = _row(embedding, reader, i)
        return unit(np.sum([known[i] for i in ids], axis=0))

    vectors = []
    for one in spec.experts:
        vector = sum_of(one.positive)
        vectors.append(unit(_apart(one, vector, sum_of(one.negative) if one.negative else None)))
    return np.broadcast_to(np.stack(vectors), (spec.layers, len(vectors), spec.width))


def _row(embedding: Tensor, reader: Reader, token: int) -> Vector:
    import torch

    from deltamerge.tensors.dtypes import torch_dtype

    width = embedding.shape[1]
    raw = torch.empty(width * ITEMSIZE[embedding.dtype], dtype=torch.uint8)
    reader.read_into(embedding, token * width, raw.numpy())
    values: Vector = raw.view(torch_dtype(embedding.dtype)).to(torch.float64).numpy()
    return values


def _run(spec: RouterSpec, inputs: Sequence[Tensor], reader: Reader, tokens: Tokens) -> Vector:
    """Return (layers, experts, hidden) from the states of the base, which goes through the prompts block by block."""
    states = _states(spec, inputs, reader, tokens)

    def mean(texts: Sequence[str]) -> Vector:
        total: Vector = np.sum([states[text] for text in texts], axis=0) / len(texts)
        return total

    vectors = [_apart(one, mean(one.positive), mean(one.negative) if one.negative else None) for one in spec.experts]
    return unit(np.stack(vectors, axis=1))


def _apart(expert: Prompts, positive: Vector, negative: Vector | None) -> Vector:
    """Return positive − negative. InputError: they are the same in every layer.

    It is zeros where they are the same but for rounding, as in the first layer of prompts that end alike.
    """
    if negative is None:
        return positive
    vector = positive - negative
    same = np.linalg.norm(vector, axis=-1) <= ROUNDING * np.linalg.norm(positive, axis=-1)
    if same.all():
        hint = "give it prompts that differ in more than words that the tokenizer does not know"
        raise InputError(f"{expert.name}: its positive and negative prompts are the same to the model", hint=hint)
    return np.where(same[..., None], 0.0, vector)


def _states(spec: RouterSpec, inputs: Sequence[Tensor], reader: Reader, tokens: Tokens) -> dict[str, Vector]:
    """Return (layers, hidden) of every prompt."""
    from deltamerge.calibrate.model.blocks import BlockModel, from_reader
    from deltamerge.calibrate.model.passes import Callbacks, stored
    from deltamerge.calibrate.rows.batches import config_of
    from deltamerge.engine.backends import single_threaded
    from deltamerge.engine.devices import torch_device

    config = config_of(spec.checkpoint)
    longest = max(tokens, key=lambda text: len(tokens[text]))
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and len(tokens[longest]) > most:
        raise InputError(f"prompt {longest[:40]!r} has {len(tokens[longest])} tokens, the model {most} positions")
    own = {header.name: tensor for header, tensor in zip(spec.tensors, inputs, strict=False)}

    ordered = sorted(tokens, key=lambda text: len(tokens[text]))
    # the first batch goes through the head too, which is large
    groups = [ordered[:1], *(ordered[i : i + BATCH] for i in range(1, len(ordered), BATCH))]
    batches = [_batch([tokens[text] for text in group]) for group in groups]
    callbacks = Callbacks(walked=lambda batches, passes: progress.here(progress.PASSES).begin(passes))
    model = BlockModel(config, own, device=torch_device(spec.device), pad_token_id=0, callbacks=callbacks)
    if len(model.blocks) != spec.layers:
        raise InputError(f"{type(model.module).__name__} has {len(model.blocks)} blocks, the files {spec.layers}")
    weights = from_reader(lambda name: stored(reader, own[name]))
    watch = _Watch(model, batches, mean=spec.mode == "hidden_avg", mlp=spec.mode == "mlp_input")
    with single_threaded({"torch"}), progress.phase(f"routers of {spec.model}", 1, progress.PASSES) as phase:
        with suppress(_Enough):
            model.run(batches, [weights], lambda batch, output: None, watch=watch)
        phase.step()
    layers = [np.concatenate(rows) for rows in watch.found]
    if [len(rows) for rows in layers] != [len(ordered)] * spec.layers:
        raise InputError("its blocks do not follow each other, so that their states cannot be seen one by one")
    return {text: np.stack([rows[i] for rows in layers]) for i, text in enumerate(ordered)}


def _batch(ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return inputs of a forward, padded on the right."""
    import torch

    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return {"input_ids": padded, "attention_mask": mask}


class _Enough(Exception):
    """The last block has been seen: the head need not be run."""


class _Watch:
    """Keeps of every batch in turn a vector (rows, hidden) float64 of each block: `found[layer][batch]`."""

    def __init__(self, model: BlockModel, batches: Sequence[Inputs], *, mean: bool, mlp: bool) -> None:
        self.model, self.mean = model, mean
        self.masks = [batch["attention_mask"] for batch in batches]
        self.places: list[Any] = [block.mlp if mlp else block.input_layernorm for block in model.blocks]
        self.found: list[list[Vector]] = [[] for _ in self.places]
        self.part, self.hooks = 0, list[Any]()

    def enter(self, layers: Sequence[Any]) -> None:
        if self.part < len(self.places) and self.model.blocks:
            keep = partial(self._keep, self.part)
            self.hooks = [self.places[self.part].register_forward_pre_hook(keep)]

    def see(self, layer: Any, x: Any, batch: int) -> None:
        """Linear layers are of no use here."""

    def leave(self, layers: Sequence[Any]) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.part = [], self.part + 1
        if self.part == len(self.places) and all(self.found):
            raise _Enough

    def _keep(self, layer: int, module: Any, args: Any) -> None:
        """Keep the input of a layer's module: (B, T, H), padded on the right."""
        hidden = args[0]
        mask = self.masks[len(self.found[layer])].to(hidden.device)
        lengths = mask.sum(1)
        if self.mean:
            kept = (hidden.double() * mask[:, :, None]).sum(1) / lengths[:, None]
        else:
            kept = hidden[range(len(hidden)), lengths - 1].double()
        self.found[layer].append(kept.cpu().numpy())
