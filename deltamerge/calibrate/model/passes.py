"""A pass through a model: weights by name, inputs, outputs, watches, precision, and logits in pieces of tokens.

The logits of a whole batch over a large vocabulary are never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from deltamerge.calibrate.model.layers import Linear, MatrixCut
from deltamerge.calibrate.spec import Precision
from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import ITEMSIZE, torch_dtype
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Tensor as LazyTensor
from deltamerge.tensors.tensor import TensorInfo

PIECE_BYTES = 1 << 24  # of the logits of a piece; three are held, and larger pieces are no faster
SHORT = 128  # places of a sequence up to which a CPU's fused attention is slower in the backward pass


class Stop(Exception):
    """Every block has been recorded."""


@contextmanager
def patched(blocks: Sequence[nn.Module], forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Put `forward(i)` in the place of block i's own forward."""
    for i, block in enumerate(blocks):
        block.forward = forward(i)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits x (…, V). With a last layer's `weight` (V, H) and `bias` (V), x (…, H) is its input: logits come later."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def per_token(self) -> bool:
        """Tell whether they score every token (B, T, V), as a language model does.

        InputError: they are several.
        """
        if isinstance(self.x, tuple | list):
            raise InputError(f"the model gives {len(self.x)} logits, and calibration compares one", hint="q: a number")
        return self.x.dim() == 3

    @property
    def computed(self) -> Tensor:
        """Return all of them (…, V)."""
        if self.weight is None:
            return self.x
        if torch.is_grad_enabled() and self.weight.requires_grad and self.weight.is_leaf:
            product: Callable[..., Tensor] = _LeafProduct.apply
            return product(self.x, self.weight, self.bias)
        return F.linear(self.x, self.weight, self.bias)

    def take(self, rows: Callable[[Tensor], Tensor]) -> Logits:
        """Return the logits of the tokens that `rows` leaves of x."""
        return replace(self, x=rows(self.x))

    def at(self, index: Tensor) -> Tensor:
        """Return (N, k) logits: for each row of x (N, H) the logits that `index` names."""
        if self.weight is None:
            return self.x.gather(-1, index)
        found, start = [], 0
        for x in self._split(index.shape[-1] * self.x.shape[-1]):
            some = index[start : start + len(x)]
            made = torch.bmm(self.weight[some], x.unsqueeze(-1)).squeeze(-1)
            found.append(made if self.bias is None else made + self.bias[some])
            start += len(x)
        return torch.cat(found)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, their logits) of x (N, H), computed piece by piece."""
        yield from ((rows, replace(self, x=x).computed) for rows, x in self._rows())

    def map(self, value: Callable[[slice, Tensor], Tensor]) -> list[Tensor]:
        """Return `value` of rows and their logits, piece by piece.

        Where gradients are wanted, the backward pass computes the logits again, so that one piece of them is held.
        """
        if self.weight is None or not torch.is_grad_enabled():
            return [value(rows, some) for rows, some in self.pieces()]

        def made(x: Tensor, rows: slice) -> Tensor:
            return value(rows, replace(self, x=x).computed)

        again = partial(checkpoint, made, use_reentrant=False, preserve_rng_state=False)
        return [again(x, rows) for rows, x in self._rows()]

    def _rows(self) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for x in (self.x,) if self.weight is None else self._split(len(self.weight)):
            yield slice(start, start + len(x)), x
            start += len(x)

    def _split(self, numbers: int) -> tuple[Tensor, ...]:
        """Cut x (N, H) into pieces of rows. `numbers` is how many float32 numbers a row makes."""
        return torch.split(self.x, max(1, PIECE_BYTES // (4 * numbers)))


class _LeafProduct(torch.autograd.Function):
    """The product with a leaf (V, H). Its gradient is added up in place, where autograd makes one for each product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.biased = weight, bias is not None and bias.requires_grad
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad = grads[0].reshape(-1, len(weight))
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.addmm_(grad.T, x.detach().reshape(len(grad), -1))
        return grads[0] @ weight.detach(), None, grad.sum(0) if ctx.biased else None


class LastLayer:
    """The linear layer whose product may be a model's logits, if the model has such a layer."""

    def __init__(self, model: Any) -> None:
        found = getattr(model, "get_output_embeddings", lambda: None)()
        self._layers = [found] if type(found) is nn.Linear else []
        self._is_last = bool(self._layers)  # as far as is known

    def stopping(self) -> AbstractContextManager[None]:
        """Let a forward that comes to the layer end by `Stop`."""

        def stop(x: Tensor) -> Tensor:
            raise Stop

        return patched(self._layers, lambda i: stop)

    def put_off(self, forward: Callable[[], BlockOutput]) -> BlockOutput:
        """Return the output of a forward. If the layer's product is the logits, it is not computed yet."""
        if self._is_last:
            products: dict[int, tuple[Tensor, Logits]] = {}
            with suppress(InputError), patched(self._layers, lambda i: partial(_put_off, self._layers[i], products)):
                made = forward()
                if made.scores is not None and id(made.scores.x) in products:
                    return replace(made, scores=products[id(made.scores.x)][1])
            self._is_last = False  # the model computes on
        return forward()


def _put_off(layer: nn.Linear, products: dict[int, tuple[Tensor, Logits]], x: Tensor) -> Tensor:
    """Return a stand-in for a layer's product, and note the product under the stand-in's id."""
    stand_in = x.new_zeros(*x.shape[:-1], 1)
    products[id(stand_in)] = stand_in, Logits(x, layer.weight, layer.bias)
    return stand_in


Weights = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Checkpoint names -> tensors of any dtype and device. A pass asks for one part of the model at a time."""
Inputs = Mapping[str, Tensor]
COMPARED = "compared"  # of inputs, no argument of a forward: (B, T) whether a place's logits are compared


@dataclass(frozen=True, slots=True)
class BlockOutput:
    """What a forward gives.

    hidden   (B, T, H): last hidden state of the base model
    scores   logits (B, C) or (B, T, V); None without a head
    read     (B, …): input of the last linear layer outside of blocks, as a rule the head's; None without such a layer
    """

    hidden: Tensor
    scores: Logits | None
    read: Tensor | None = None

    @property
    def logits(self) -> Tensor | None:
        """Return the logits, computed."""
        return None if self.scores is None else self.scores.computed


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Functions that a model calls as it walks through its parts.

    ahead     before a block's turn, with the number of the part after it and the weights of the first variant
    walked    after each block, with the batches and the number of passes over them that the walk has made so far
    relieve   when a device runs out of memory; the walk begins again if it returns that some was freed
    """

    ahead: Callable[[int, Weights], None] = lambda part, weights: None
    walked: Callable[[Sequence[Inputs], float], None] = lambda batches, passes: None
    relieve: Callable[[], bool] = lambda: False


class Watch(Protocol):
    """Observes the inputs of every linear layer, part by part: of the whole layer, or of a cut of stacked ones."""

    def enter(self, layers: Sequence[Linear]) -> None: ...
    def see(self, layer: Linear | MatrixCut, x: Tensor, batch: int) -> None: ...
    def leave(self, layers: Sequence[Linear]) -> None: ...


def sequences(inputs: Inputs) -> int:
    """Count how many of them a batch has."""
    return len(next(iter(inputs.values())))


def stored(reader: Reader, info: LazyTensor | TensorInfo) -> Tensor:
    """Return a tensor as it is stored, or made, on the CPU."""
    return entries(reader, info, 0, info.nbytes // ITEMSIZE[info.dtype]).view(info.shape)


def entries(reader: Reader, info: LazyTensor | TensorInfo, start: int, stop: int) -> Tensor:
    """Return flat entries [start, stop) of a tensor as they are stored, or made, on the CPU."""
    raw = torch.empty((stop - start) * ITEMSIZE[info.dtype], dtype=torch.uint8)
    reader.read_into(info, start, raw.numpy())
    return raw.view(torch_dtype(info.dtype))


def from_reader(read: Callable[[str], Tensor]) -> Weights:
    """Return weights by name, read one by one."""
    return lambda names: {name: read(name) for name in names}


def renamed(theirs: Weights, places: Mapping[str, str], own: Weights) -> Weights:
    """Return a model's weights by another's names: `places` has its name of each. The other's `own` stay elsewhere."""

    def made(names: Sequence[str]) -> dict[str, Tensor]:
        found = theirs([places[name] for name in names if name in places])
        rest = own([name for name in names if name not in places])
        return {**rest, **{name: found[places[name]] for name in names if name in places}}

    return made


# Precision, and the order of sums.


def multiplying(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Compute matrix products in that precision, of bfloat16 with sums in float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def same_every_time(device: torch.device, places: int = SHORT + 1) -> AbstractContextManager[Any]:
    """Let the backward pass of attention add in one order. The fused attentions of a GPU do not.

    A CPU's fused attention does, but its backward pass over SHORT `places` or fewer takes longer than plain products.
    """
    return nullcontext() if device.type == "cpu" and places > SHORT else sdpa_kernel(SDPBackend.MATH)


def float_attention(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Compute attention of `dtype` in float32 where that is quicker: bfloat16 takes CPUs three times as long."""
    return _FloatAttention() if dtype == torch.bfloat16 and device.type == "cpu" else nullcontext()


class _FloatAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            kwargs = {**kwargs, "attn_mask": mask.float()}
        with torch.autocast("cpu", enabled=False):
            return func(*(side.float() for side in args[:3]), *args[3:], **kwargs).to(torch.bfloat16)
