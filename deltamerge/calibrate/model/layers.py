"""Linear layers of a model by the checkpoint's names, and which entries of the file a matrix product reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltamerge.calibrate.model.loading import Index, Loading, Piece, simple
from deltamerge.calibrate.model.products import Box
from deltamerge.calibrate.model.skeleton import is_linear, is_transposed

LOOKED_UP = nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d  # no matrix products


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of the file.

    name, bias   the checkpoint names of its weight and bias
    transposed   whether the weight is stored (in, out), as Conv1D's; of a parameter that is no module's `weight`,
                 such as stacked experts, only a forward tells (`BlockModel.turned`)
    stack        what it shares with the other experts of its layer that the file stores one by one; "": nothing
    """

    name: str
    bias: str | None
    transposed: bool = False
    stack: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """The entries of a file's tensor that one product multiplies.

    layer      the tensor
    lead       which of its matrices, where it stacks several
    rows, columns   of that matrix
    transposed whether its columns are the outputs
    features   the inputs x that meet it, in order
    """

    layer: Linear
    lead: int
    rows: Index
    columns: Index
    transposed: bool
    features: Index

    def of(self, tensor: Tensor) -> Tensor:
        """(outputs, inputs) the cut of a tensor of the file."""
        part = tensor.reshape(-1, *tensor.shape[-2:])[self.lead][self.rows][:, self.columns]
        return part.T if self.transposed else part

    @property
    def outputs(self) -> Index:
        """The file's rows, or columns, that are outputs."""
        return self.columns if self.transposed else self.rows

    @property
    def inputs(self) -> Index:
        """The file's columns, or rows, that are inputs."""
        return self.rows if self.transposed else self.columns


def modules(model: nn.Module, loading: Loading) -> list[tuple[str, nn.Module, Linear]]:
    """(state, module, layer) of the modules that are linear layers and one matrix of the file."""
    names, found = loading.checkpoint_name, []
    for path, module in model.named_modules():
        weight = f"{path}.weight"
        if is_linear(module) and weight in names:  # a tied head is its embedding
            found.append((weight, module, Linear(names[weight], names.get(f"{path}.bias"), is_transposed(module))))
    return found


def stacks(model: nn.Module, loading: Loading) -> dict[str, tuple[list[Linear], list[list[Piece]]]]:
    """state -> (the file's tensors that it has, of each of its matrices where they lie), of all other parameters of two
    and three dimensions whose matrices are matrices of the file; without embeddings and convolutions."""
    known = {state for state, _, _ in modules(model, loading)}
    known |= {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, LOOKED_UP)}
    parameters = {name for name, _ in model.named_parameters()}
    found: dict[str, tuple[list[Linear], list[list[Piece]]]] = {}
    for group in loading.groups:
        wanted = {n for n in group.states if n in parameters and n not in known and len(loading.shape(n)) in (2, 3)}
        for state, pieces in loading.pieces(group).items() if wanted else ():
            if state not in wanted:
                continue
            files = list(dict.fromkeys(piece.file for matrix in pieces for piece in matrix))
            alone = group.converter is None
            patterns = dict(zip(group.files, group.patterns, strict=not alone))
            bias = loading.checkpoint_name.get(_bias(state)) if alone else None
            some = [Linear(file, bias, False, "" if alone else f"{state} {patterns[file]}") for file in files]
            found[state] = some, pieces
    return found


def input_of(layer: Linear, module: Any, args: tuple[Any, ...]) -> Tensor | None:
    """The matrix of inputs that a linear layer multiplies, as far as it has rows; None if it is called in
    another way."""
    x, width = args[0] if args else None, module.weight.shape[0 if layer.transposed else 1]
    return x if isinstance(x, Tensor) and x.dim() and x.shape[-1] == width and x.numel() else None


def _bias(state: str) -> str:
    return f"{state.removesuffix('.weight')}.bias" if state.endswith(".weight") else f"{state}_bias"


def cuts(box: Box, pieces: Sequence[Piece], layers: Mapping[str, Linear], shape: Sequence[int]) -> list[Cut]:
    """What of the file a box is; `shape` is the state's, `layers` have the file's tensors by name."""
    found = []
    for piece in pieces:
        rows, columns, inputs_are_rows, high = box.rows, box.columns, box.turned, shape[-2]
        if piece.turned:
            rows, columns, inputs_are_rows, high = columns, rows, not inputs_are_rows, shape[-1]
        at = _numbers(piece.at, high)
        inside = ((at >= rows[0]) & (at < rows[1])).nonzero()[:, 0]
        if not len(inside):
            continue
        of_file = _numbers(piece.rows)[inside]
        across = _numbers(piece.columns)[slice(*columns)]
        features = at[inside] - rows[0] if inputs_are_rows else torch.arange(len(across))
        found.append(
            Cut(layers[piece.file], piece.lead, simple(of_file), simple(across), inputs_are_rows, simple(features))
        )
    return found


def _numbers(index: Index, size: int | None = None) -> Tensor:
    if isinstance(index, Tensor):
        return index
    return torch.arange(index.start, index.stop if size is None else min(index.stop, size))
