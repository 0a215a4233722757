"""Runs a transformers model block by block, with weights that come from the merge's own reader.

The model is built without weights (parameters on the meta device, no remote code). Every call gets its tensors through
`torch.func.functional_call`, so nothing is ever loaded into it. A pass has three steps:

    prologue   the model's own forward with the real block 0; every other block is a stub that records its call
    blocks     block after block, over all variants and batches: one block's weights are resident, and hidden states
    epilogue   the model's own forward again; every block is a stub that returns the last block's output

The result is that of the plain forward, whatever the architecture computes around its blocks. Where blocks cannot be
identified (`Model.whole`), or a model computes something between them, the plain forward runs with all weights.

With `precision` bfloat16 the matrix products inside blocks are of bfloat16 (torch's autocast, whose sums are float32).
The residual stream, norms, embeddings, the head and all watched inputs stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from deltamerge.calibrate.model.layers import Box, Linear, MatrixCut, Products, cuts, input_of, modules, stacks
from deltamerge.calibrate.model.loading import (
    Loading,
    ShapedTensor,
    StateGroup,
    bodies,
    find_blocks,
    hidden_states,
    ignored,
    place_buffers,
    shifted,
    skeleton,
)
from deltamerge.calibrate.model.passes import (
    COMPARED,
    BlockOutput,
    Callbacks,
    Inputs,
    LastLayer,
    Logits,
    Stop,
    Watch,
    Weights,
    from_reader,
    multiplying,
    patched,
    same_every_time,
)
from deltamerge.calibrate.model.transformers_code import running
from deltamerge.calibrate.spec import Precision
from deltamerge.errors import InputError


class NotAChain(Exception):
    """A block's input is not the output of the one before it."""


@dataclass(frozen=True, slots=True)
class _Previous:
    """A placeholder for element `index` of the previous block's output."""

    index: int


class Trace:
    """The calls of the blocks in one forward: their arguments, with placeholders for the previous block's output."""

    def __init__(self, first: Callable[..., Any], stop_after: int | None) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.outputs: Any = None
        self.first, self.stop_after = first, stop_after

    def stub(self, i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(self.calls) != i:
                raise NotAChain
            if i == 0:
                self.calls.append((args, kwargs))
                self.outputs = self.first(*args, **kwargs)
            else:
                previous = _elements(self.outputs)

                def note(value: Any) -> Any:
                    same = (k for k, element in enumerate(previous) if value is element)
                    return next((_Previous(k) for k in same), value) if isinstance(value, Tensor) else value

                call = tuple(map(note, args)), {key: note(value) for key, value in kwargs.items()}
                if _Previous(0) not in [v for v in (*call[0], *call[1].values()) if isinstance(v, _Previous)]:
                    raise NotAChain
                self.calls.append(call)
            if len(self.calls) == self.stop_after:
                raise Stop
            return self.outputs

        return forward

    def left(self, *, again: bool) -> Any:
        """Return block 0's output; it is forgotten here, as is its input unless the block runs `again`."""
        outputs, self.outputs = self.outputs, None
        if not again:
            self.calls[0] = ((), {})
        return outputs

    def call(self, i: int, outputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of block i, given the previous block's `outputs`."""
        args, kwargs = self.calls[i]
        previous = _elements(outputs)

        def fill(value: Any) -> Any:
            return previous[value.index] if isinstance(value, _Previous) else value

        return tuple(map(fill, args)), {key: fill(value) for key, value in kwargs.items()}


def _elements(outputs: Any) -> Sequence[Any]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _leaves(outputs: Any) -> Any:
    """Return a block's outputs as leaves, for the gradients of their elements."""
    found = [
        one.detach().requires_grad_(one.is_floating_point()) if isinstance(one, Tensor) else one
        for one in _elements(outputs)
    ]
    return found[0] if isinstance(outputs, Tensor) else tuple(found)


def _gradients(leaves: Any) -> list[Tensor | None]:
    return [one.grad if isinstance(one, Tensor) else None for one in _elements(leaves)]


def _backward(outputs: Any, gradients: Sequence[Tensor | None]) -> None:
    pairs = [(x, g) for x, g in zip(_elements(outputs), gradients, strict=True) if g is not None and x.requires_grad]
    torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])


class Shell(nn.Module):
    """Calls a block's own forward, even while `block.forward` is patched."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


class Generating(nn.Module):
    """A model whose forward generates."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model.generate(**inputs)


def together(walks: Sequence[Generator[None, None, T]]) -> list[T]:
    """Return the results of walks, which take their steps in turn. Models with the same number of blocks are at the
    same block, so that they can share their reads."""
    found: dict[int, T] = {}
    while len(found) < len(walks):
        for i, walk in enumerate(walks):
            if i not in found:
                try:
                    next(walk)
                except StopIteration as end:
                    found[i] = end.value
    return [found[i] for i in range(len(walks))]


__all__ = ["BlockModel", "BlockOutput", "Inputs", "Linear", "Watch", "Weights", "from_reader"]
T = TypeVar("T")
NO_CALLBACKS = Callbacks()


class BlockModel:
    """A model of `config.architectures[0]`, of the checkpoint's `tensors`, whose shapes are asked.

        parts     checkpoint names needed together: parts[0] everything outside blocks, parts[1 + i] block i
        layers    the linear layers of each part
        stacked   of each part the other tensors that may hold linear layers, such as experts stacked in one
        lookups   the weights of embeddings
        reached   names of the weights of linear layers that have had an input; experts of one layer that are stored
                  one by one count as reached together
        turned    whether a reached weight of `stacked` is stored (in, out)
        callbacks are told how far a walk is
        whole     True where blocks cannot be identified: then there is one part
        precision "bfloat16" or "float32": of the products inside blocks; float32 from then on where a block fails in
                  bfloat16

    Computes on `device`, outside these products in float32. InputError: unknown architecture, or a parameter that the
    checkpoint lacks.
    """

    def __init__(
        self,
        config: Any,
        tensors: Mapping[str, ShapedTensor],
        *,
        device: str | torch.device = "cpu",
        pad_token_id: int | None = None,
        precision: Precision = "float32",
        callbacks: Callbacks = NO_CALLBACKS,
    ) -> None:
        self.device, self.precision, self.callbacks = torch.device(device), precision, callbacks
        self.module = skeleton(config, pad_token_id)
        # the last of these to return gives the last hidden state; one may call another (OPT's decoder)
        self._bodies = bodies(self.module)
        self.loading = Loading(self.module, tensors)
        self.checkpoint_name = self.loading.checkpoint_name  # state name -> checkpoint name
        place_buffers(self.module, self.device, self.loading.states)
        self.blocks = find_blocks(self.module)
        self._ignored = ignored(self.module) | {COMPARED}
        self._last_layer = LastLayer(self.module)
        self.reached: set[str] = set()
        self.turned: dict[str, bool] = {}
        self._cuts: dict[Box, list[MatrixCut]] = {}
        self._seen: Callable[[MatrixCut, Tensor], None] | None = None
        self._noting: list[RemovableHandle] = []
        self._chained = False  # True once a forward has shown that each block is called once, after the block before it
        self._back: bool | None = None  # whether gradients flow from block to block alone, once that is known
        self._lay_out()

    @property
    def whole(self) -> bool:
        """Tell whether blocks cannot be identified, so that the model is one part."""
        return not self.blocks

    @property
    def headless(self) -> bool:
        """Tell whether the model has no head: its output is its last hidden state."""
        return bool(self.module.base_model is self.module)

    @property
    def _cannot_run(self) -> str:
        return f"transformers cannot run {type(self.module).__name__} on the calibration data"

    def _lay_out(self) -> None:
        path = {module: name for name, module in self.module.named_modules()}
        prefixes = [path[block] + "." for block in self.blocks]
        groups: list[list[StateGroup]] = [[] for _ in range(1 + len(prefixes))]
        owner: dict[str, int] = {}
        for group in self.loading.groups:
            part = next((1 + i for i, p in enumerate(prefixes) if group.states[0].startswith(p)), 0)
            owner |= dict.fromkeys(group.states, part)
            groups[part].append(group)
        self._groups = groups
        self._prefixes = prefixes
        self.parts = [[file for group in part for file in group.files] for part in groups]
        self.lookups = {
            self.checkpoint_name[f"{name}.weight"]
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Embedding) and f"{name}.weight" in self.checkpoint_name
        }
        self._linears: list[list[tuple[nn.Module, Linear]]] = [[] for _ in groups]
        self._halved: list[set[str]] = [set() for _ in groups]
        for weight, module, layer in modules(self.module, self.loading):
            if isinstance(module, nn.Linear):
                self._halved[owner[weight]].add(weight)
            self._linears[owner[weight]].append((module, layer))
        self.layers = [[layer for _, layer in part] for part in self._linears]
        self._stacks = stacks(self.module, self.loading)
        self.stacked: list[list[Linear]] = [[] for _ in groups]
        for state, (some, _) in self._stacks.items():
            self.stacked[owner[state]] += [one for one in some if one not in self.stacked[owner[state]]]
        self._cuts.clear()
        for handle in self._noting:
            handle.remove()
        self._noting = [m.register_forward_pre_hook(self._note(layer)) for part in self._linears for m, layer in part]

    def _note(self, layer: Linear) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, args: Any) -> None:
            if input_of(layer, module, args) is not None:
                self.reached.add(layer.name)

        return note

    def _products(self, tensors: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        """See the products with stacked parameters among `tensors`."""
        watched = {n: tensors[n] for n in self._stacks if n in tensors}
        return Products(watched, self._product) if watched else nullcontext()

    def _product(self, box: Box, x: Tensor) -> None:
        if box in self._cuts and self._seen is None:
            return
        x = x[x.detach().any(1)]  # a router's zeros are no tokens
        if not len(x):
            return
        if box not in self._cuts:
            some, pieces = self._stacks[box.state]
            named, shape = {layer.name: layer for layer in some}, self.loading.shape(box.state)
            found = cuts(box, pieces[box.matrix], named, shape)
            self._cuts[box] = found
            for layer in some:
                self.reached.add(layer.name)
                self.turned.setdefault(layer.name, any(cut.transposed for cut in found))
            self.turned |= {cut.layer.name: cut.transposed for cut in found}
        if self._seen is not None:
            for cut in self._cuts[box]:
                self._seen(cut, x)

    @torch.no_grad()
    def run(
        self,
        batches: Sequence[Inputs],
        variants: Sequence[Weights],
        reduce: Callable[[int, BlockOutput], T],
        *,
        watch: Watch | None = None,
    ) -> list[list[T]]:
        """Return [variant][batch] of reduce(batch index, output); all variants share one walk through the blocks.

        Batches are input tensors as the model's forward takes them, but `decoder_input_ids` are the text that the
        decoder is to say. Memory: one part's weights, and the hidden states of every variant and batch. `watch` sees
        the linear layers of the first variant.
        """
        try:
            return together([self.walk(batches, variants, reduce, watch=watch)])[0]
        except torch.OutOfMemoryError:
            if watch is not None or not self.callbacks.relieve():
                raise
            return self.run(batches, variants, reduce)

    @torch.no_grad()
    def walk(
        self,
        batches: Sequence[Inputs],
        variants: Sequence[Weights],
        reduce: Callable[[int, BlockOutput], T],
        *,
        watch: Watch | None = None,
    ) -> Generator[None, None, list[list[T]]]:
        """Run in steps, for `together`: wait before each variant's turn at a part of the model."""
        if self.blocks:
            try:
                return (yield from self._walk(batches, variants, reduce, watch))
            except NotAChain:
                self.blocks = ()
                self._lay_out()
            except InputError:
                if self.precision == "float32":
                    raise
                self.precision = "float32"
                return (yield from self.walk(batches, variants, reduce, watch=watch))
        return (yield from self._last(batches, variants, reduce, None, watch))

    def _walk(
        self,
        batches: Sequence[Inputs],
        variants: Sequence[Weights],
        reduce: Callable[[int, BlockOutput], T],
        watch: Watch | None,
    ) -> Generator[None, None, list[list[T]]]:
        traces, outputs = [], []
        self.callbacks.ahead(2, variants[0])
        for v, weights in enumerate(variants):
            yield
            traces.append(self.prologue(weights, batches))
            outputs.append([trace.left(again=watch is not None and v == 0) for trace in traces[v]])
        for i in range(len(self.blocks)):
            if i > 0:
                self.callbacks.ahead(2 + i, variants[0])
            for v, weights in enumerate(variants):
                seen = watch if v == 0 else None
                if i > 0 or seen is not None:  # the prologue has run block 0 already
                    yield
                    self.block(i, weights, traces[v], outputs[v], seen)
            self.callbacks.walked(batches, len(variants) * (i + 1) / (len(self.blocks) + 1))
        return (yield from self._last(batches, variants, reduce, outputs, watch))

    def _last(
        self,
        batches: Sequence[Inputs],
        variants: Sequence[Weights],
        reduce: Callable[[int, BlockOutput], T],
        outputs: Sequence[Any] | None,
        watch: Watch | None,
    ) -> Generator[None, None, list[list[T]]]:
        found = []
        for v, weights in enumerate(variants):
            yield
            found.append(self.epilogue(weights, batches, reduce, outputs and outputs[v], watch if v == 0 else None))
        return found

    def block(self, i: int, weights: Weights, traces: Sequence[Trace], outputs: list[Any], watch: Watch | None) -> None:
        """Turn the previous block's output on every batch into block i's; the block's tensors are freed on return."""
        quick = watch is None
        tensors, shell = self._tensors(weights, 1 + i, quick=quick), Shell(self.blocks[i])
        precision: Precision = self.precision if quick else "float32"
        local = self._local(tensors, i)

        with self._watching(1 + i, watch) as turn:
            for b, trace in enumerate(traces):
                turn(b)
                with running(self._cannot_run), self._products(tensors), multiplying(precision, self.device):
                    outputs[b] = functional_call(shell, local, *trace.call(i, outputs[b]))

    def epilogue(
        self,
        weights: Weights,
        batches: Sequence[Inputs],
        reduce: Callable[[int, BlockOutput], T],
        outputs: Sequence[Any] | None,
        watch: Watch | None,
    ) -> list[T]:
        """Run the forward on every batch; blocks, if there are any, are stubs that return the last block's output."""
        with self._watching(0, watch) as turn:
            return self._ends(self._tensors(weights, 0), batches, reduce, outputs, turn)

    def _ends(
        self,
        tensors: dict[str, Tensor],
        batches: Sequence[Inputs],
        reduce: Callable[[int, BlockOutput], T],
        outputs: Sequence[Any] | None,
        turn: Callable[[int], None] = lambda number: None,
    ) -> list[T]:
        found = []
        for b, inputs in enumerate(batches):
            turn(b)
            last = outputs[b] if outputs else None
            with patched(self.blocks, lambda i: lambda *args, **kwargs: last):  # noqa: B023  # called here
                found.append(reduce(b, self._last_layer.put_off(partial(self._forward, tensors, inputs))))
        return found

    def prologue(self, weights: Weights, batches: Sequence[Inputs]) -> list[Trace]:
        return list(self._begins(self._tensors(weights, 0) | self._tensors(weights, 1, quick=True), batches))

    def _begins(self, tensors: dict[str, Tensor], batches: Sequence[Inputs]) -> Iterator[Trace]:
        """Yield for every batch the calls of its blocks. Block 0 runs."""
        forward = self.blocks[0].forward

        def first(*args: Any, **kwargs: Any) -> Any:
            with multiplying(self.precision, self.device):
                return forward(*args, **kwargs)

        for inputs in batches:
            trace = Trace(first, stop_after=len(self.blocks) if self._chained else None)
            try:
                with patched(self.blocks, trace.stub), self._last_layer.stopping(), suppress(Stop):
                    self._forward(tensors, inputs)
            except InputError:
                if self._chained or self.precision != "float32":
                    raise
                raise NotAChain from None  # blocks pass on something that a stub does not
            if len(trace.calls) != len(self.blocks):
                raise NotAChain
            self._chained = True
            yield trace

    def differentiable(
        self, inputs: Inputs, weights: Weights, precision: Precision = "float32", *, held: bool = False
    ) -> BlockOutput:
        """Return the forward with gradients to the tensors that `weights` computes from.

        `weights` is called again in the backward pass (activation checkpointing, block by block), so that a block's
        tensors exist only while it runs. `held`: activations are held instead.
        """

        def wrap(i: int) -> Callable[..., Any]:
            shell = Shell(self.blocks[i])

            def inner(*args: Any, **kwargs: Any) -> Any:
                tensors = self._tensors(weights, 1 + i, quick=precision == "bfloat16")
                with same_every_time(self.device), multiplying(precision, self.device):
                    return functional_call(shell, self._local(tensors, i), args, kwargs)

            return inner if held else partial(checkpoint, inner, use_reentrant=False, preserve_rng_state=False)

        with patched(self.blocks, wrap), same_every_time(self.device):
            return self._last_layer.put_off(partial(self._forward, self._tensors(weights, 0), inputs))

    def descend(self, batches: Sequence[Inputs], weights: Weights, loss: Callable[[int, BlockOutput], Tensor]) -> None:
        """Add the gradient of the sum of `loss(batch index, output)` to the tensors that the weights are computed from.

        A block's weights are made twice, in the walk forward and in the walk back, for all batches. Memory: one part's
        weights and their gradients, and the hidden states of every batch before every block.
        """
        if not self._walks_back(batches, weights):
            for b, inputs in enumerate(batches):
                torch.autograd.backward(loss(b, self.differentiable(inputs, weights, self.precision)))
            return
        with torch.no_grad():
            traces = self.prologue(weights, batches)
            states = [[trace.left(again=False) for trace in traces]]
            for i in range(1, len(self.blocks)):
                states.append(list(states[-1]))
                self.block(i, weights, traces, states[-1], None)
                self.callbacks.walked(batches, i / len(self.blocks))

        def ended(b: int, output: BlockOutput) -> None:
            torch.autograd.backward(loss(b, output))

        last = [_leaves(outputs) for outputs in states.pop()]
        places = max(_elements(outputs)[0].shape[1] for outputs in last)
        with self._differentiating(weights, [0]) as tensors:
            self._ends(tensors, batches, ended, last)
        gradients = [_gradients(outputs) for outputs in last]
        for i in range(len(self.blocks) - 1, 0, -1):
            before, shell = [_leaves(outputs) for outputs in states.pop()], Shell(self.blocks[i])
            with self._differentiating(weights, [1 + i]) as tensors:
                local = self._local(tensors, i)
                for b, trace in enumerate(traces):
                    with same_every_time(self.device, places), multiplying(self.precision, self.device):
                        outputs = functional_call(shell, local, *trace.call(i, before[b]))
                    _backward(outputs, gradients[b])
                    gradients[b] = _gradients(before[b])
            self.callbacks.walked(batches, 3.0 - 2.0 * i / len(self.blocks))
        with self._differentiating(weights, [0, 1]) as tensors, same_every_time(self.device, places):
            for b, trace in enumerate(self._begins(tensors, batches)):
                _backward(trace.outputs, gradients[b])

    def _walks_back(self, batches: Sequence[Inputs], weights: Weights) -> bool:
        """Tell whether gradients flow from block to block alone: whatever else blocks are given has none."""
        if self._chained and self._back is None:
            (trace,) = self._begins(self._tensors(weights, 0) | self._tensors(weights, 1, quick=True), batches[:1])
            given = [value for args, kwargs in trace.calls[1:] for value in (*args, *kwargs.values())]
            given = [one for value in given for one in (value if isinstance(value, list | tuple) else [value])]
            self._back = not any(isinstance(one, Tensor) and one.requires_grad for one in given)
        return bool(self.blocks) and bool(self._back)

    @contextmanager
    def _differentiating(self, weights: Weights, parts: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Give the states of parts as leaves. Their gradients are handed on at the end."""
        made: dict[str, Tensor] = {}
        for part in parts:
            made |= self._tensors(weights, part, quick=part > 0)
        leaves = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in made.items()}
        yield leaves
        some = [name for name, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([made[name] for name in some], [leaves[name].grad for name in some])

    @torch.no_grad()
    def generate(self, prompts: Sequence[Inputs], weights: Weights, *, new_tokens: int) -> list[Tensor]:
        """Return greedy continuations of batches of left-padded prompts (B, T): new tokens (B, ≤ new_tokens) on the
        CPU. All weights are resident."""
        tensors = {n: t for part in range(len(self.parts)) for n, t in self._tensors(weights, part).items()}
        local = {f"model.{n}": t for n, t in tensors.items()}
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, "use_cache": True}
        made = []
        for inputs in prompts:
            placed = {k: self._placed(v) for k, v in inputs.items() if k not in self._ignored}
            with running(self._cannot_run):
                tokens = functional_call(Generating(self.module), local, (), {**placed, **options})
            start = 1 if self.module.config.is_encoder_decoder else placed["input_ids"].shape[1]
            made.append(tokens[:, start:].cpu())
        return made

    def _tensors(self, weights: Weights, part: int, *, quick: bool = False) -> dict[str, Tensor]:
        """Return the states of a part; `quick`: the weights of linear layers in the precision that was asked for."""
        half = self._halved[part] if quick and self.precision == "bfloat16" else set[str]()
        found, made = dict(weights(self.parts[part])), dict[str, Tensor]()
        for group in self._groups[part]:
            own = {file: found.pop(file) for file in group.files}
            for name, tensor in self.loading.made(group, own).items():
                made[name] = tensor.to(self.device, torch.bfloat16) if name in half else self._placed(tensor)
        return made

    def _local(self, tensors: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
        """Return block i's tensors, named as in `Shell`."""
        prefix = self._prefixes[i]
        return {f"block.{n.removeprefix(prefix)}": t for n, t in tensors.items()}

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def _forward(self, tensors: dict[str, Tensor], inputs: Inputs) -> BlockOutput:
        placed = {k: self._placed(v) for k, v in inputs.items() if k not in self._ignored}
        if (said := placed.get("decoder_input_ids")) is not None:
            placed["decoder_input_ids"] = shifted(self.module, said)
        with (
            hidden_states(self._bodies) as hidden,
            self._reading() as read,
            running(self._cannot_run),
            self._products(tensors),
        ):
            result = functional_call(self.module, tensors, (), placed)
        if not hidden:
            raise InputError(f"{type(self.module).__name__} gives no hidden state", hint="give a number as q")
        logits = getattr(result, "logits", None)
        return BlockOutput(hidden[-1], None if logits is None else Logits(logits), next(iter(read), None))

    @contextmanager
    def _reading(self) -> Iterator[list[Tensor]]:
        """Keep the input of the last linear layer outside of blocks that is called."""
        last: list[Tensor] = []

        def see(module: nn.Module, args: Any) -> None:
            last[:] = args[:1]

        hooks = [module.register_forward_pre_hook(see) for module, _ in self._linears[0]]
        try:
            yield last
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _watching(self, part: int, watch: Watch | None) -> Iterator[Callable[[int], None]]:
        """Let `watch` see the inputs of a part's layers. The value is called with each batch's number in its turn."""
        if watch is None:
            yield lambda number: None
            return
        batch, hooks = 0, list[RemovableHandle]()

        def turn(number: int) -> None:
            nonlocal batch
            batch = number

        for module, layer in self._linears[part]:

            def see(module: nn.Module, args: Any, layer: Linear = layer) -> None:
                if (x := input_of(layer, module, args)) is not None:
                    watch.see(layer, x, batch)

            hooks.append(module.register_forward_pre_hook(see))
        layers = [*self.layers[part], *self.stacked[part]]
        try:
            self._seen = lambda cut, x: watch.see(cut, x, batch)
            watch.enter(layers)
            yield turn
            watch.leave(layers)
        finally:
            self._seen = None
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def relay(model: BlockModel, batches: Sequence[Inputs], seen: Weights, passed: Weights, watch: Watch) -> Iterator[int]:
    """Watch block after block with the weights `seen`, on the outputs of the blocks before with the weights `passed`.

    Yields the number of each watched part, whose `passed` weights are asked for afterwards. Tensors outside of blocks
    (part 0) come last, but their `passed` weights are asked for first. Watched inputs depend on the `passed` weights,
    so both are float32. InputError: blocks cannot be told apart.
    """

    def start(names: Sequence[str]) -> Mapping[str, Tensor]:
        return passed(names) if names is model.parts[0] else seen(names)

    refused = InputError(
        f"{type(model.module).__name__}: its blocks cannot be told apart", hint="merge_method: regmean"
    )
    if model.whole:
        raise refused
    model.precision = "float32"
    try:
        traces = model.prologue(start, batches)
    except NotAChain:
        raise refused from None
    outputs = [trace.left(again=True) for trace in traces]
    for i in range(len(model.blocks)):
        model.callbacks.ahead(2 + i, seen)
        model.block(i, seen, traces, list(outputs), watch)
        yield 1 + i
        model.block(i, passed, traces, outputs, None)
    model.epilogue(seen, batches, lambda batch, output: None, outputs, watch)
    yield 0
