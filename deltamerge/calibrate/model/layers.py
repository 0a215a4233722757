"""Linear layers of a model by the checkpoint's names, and the entries of the file that a matrix product reads.

Experts stacked in one parameter are seen from outside. A module takes one matrix of its parameter, or some of its rows,
and calls torch's matrix product. The operand is a view of the parameter, whose address and strides tell its entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltamerge.calibrate.model.loading import Index, Loading, StatePiece, is_linear, is_transposed, simple


@dataclass(frozen=True, slots=True)
class Box:
    """Rows and columns [first, last) of one `matrix` of a parameter `state`; `turned`: its columns are the outputs."""

    state: str
    matrix: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    turned: bool


See = Callable[[Box, Tensor], None]
"""Is given every product: the box, and its inputs (N, n)."""
LINEAR = frozenset({torch.nn.functional.linear})
# function -> the places of the two factors
PRODUCTS: dict[Any, tuple[int, int]] = {
    torch.matmul: (0, 1), torch.mm: (0, 1), torch.bmm: (0, 1), torch.addmm: (1, 2), torch.baddbmm: (1, 2),
    Tensor.matmul: (0, 1), Tensor.mm: (0, 1), Tensor.bmm: (0, 1), Tensor.__matmul__: (0, 1),
    Tensor.addmm: (1, 2), Tensor.baddbmm: (1, 2),
}  # fmt: skip


class Products(TorchFunctionMode):
    """Calls `see` for every product with a part of one of the `watched` parameters."""

    def __init__(self, watched: Mapping[str, Tensor], see: See) -> None:
        super().__init__()
        self.see = see
        self.places: dict[int, list[tuple[str, Tensor]]] = {}
        for state, tensor in watched.items():
            if tensor.is_contiguous() and tensor.dim() > 1:
                self.places.setdefault(tensor.untyped_storage().data_ptr(), []).append((state, tensor))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LINEAR and len(args) > 1:
            self._product(args[0], args[1].mT if args[1].dim() > 1 else args[1])
        elif func is Tensor.__rmatmul__:
            self._product(args[1], args[0])
        elif (places := PRODUCTS.get(func)) is not None and len(args) > places[1]:
            self._product(args[places[0]], args[places[1]])
        return func(*args, **kwargs)

    def _product(self, left: Tensor, right: Tensor) -> None:
        """Return X · M of a watched M, or M · X, which is (Xᵀ · Mᵀ)ᵀ."""
        if right.dim() > 1 and left.dim() > 0 and self._near(right):
            self._matrices(left, right)
        elif left.dim() > 1 and right.dim() > 1 and self._near(left):
            self._matrices(right.mT, left.mT)

    def _near(self, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return self.places.get(tensor.untyped_storage().data_ptr(), [])

    def _matrices(self, x: Tensor, matrix: Tensor) -> None:
        """See X · M with M (in, out), matrix by matrix of a batch of them."""
        if matrix.dim() == 2:
            self._one(x.reshape(-1, x.shape[-1]), matrix)
        elif matrix.dim() == 3 and x.dim() in (2, 3):
            for e, one in enumerate(matrix):
                self._one(x if x.dim() == 2 else x[e if len(x) > 1 else 0], one)

    def _one(self, x: Tensor, matrix: Tensor) -> None:
        for state, parameter in self._near(matrix):
            box = _box(state, parameter, matrix)
            if box is not None and x.numel():
                self.see(box, x)


def _box(state: str, parameter: Tensor, matrix: Tensor) -> Box | None:
    """Tell where a matrix (in, out) lies in a contiguous parameter; None: it is no view of rows and columns of it."""
    high, wide = parameter.shape[-2:]
    start = int(matrix.storage_offset() - parameter.storage_offset())
    if not 0 <= start < parameter.numel() or wide == 1 or 0 in matrix.shape:
        return None
    inputs, outputs = matrix.shape
    steps = matrix.stride()
    turned = _steps(steps, (wide, 1), (inputs, outputs))
    if not turned and not _steps(steps, (1, wide), (inputs, outputs)):
        return None
    tall, across = (inputs, outputs) if turned else (outputs, inputs)
    row, column = divmod(start, wide)
    number, row = divmod(row, high)
    if row + tall > high or column + across > wide:
        return None
    return Box(state, number, (row, row + tall), (column, column + across), turned)


def _steps(steps: tuple[int, ...], wanted: tuple[int, int], sides: tuple[int, int]) -> bool:
    """Tell whether strides are as wanted. The stride of a side of 1 may be any."""
    return all(step == want or side == 1 for step, want, side in zip(steps, wanted, sides, strict=True))


LOOKED_UP = nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d  # no matrix products


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of the file.

    name, bias   the checkpoint names of its weight and bias
    transposed   whether the weight is stored (in, out), as Conv1D's; of a parameter that is no module's `weight`,
                 such as stacked experts, only a forward tells (`BlockModel.turned`)
    stack        the common name of a layer's experts that the file stores one by one; "": it is no such expert
    """

    name: str
    bias: str | None
    transposed: bool = False
    stack: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class MatrixCut:
    """The entries of a tensor in the file that one product multiplies.

    layer          the tensor
    lead           which of its matrices, where it stacks several
    rows, columns  of that matrix
    transposed     whether its columns are the outputs
    features       the inputs x that meet the entries, in order
    """

    layer: Linear
    lead: int
    rows: Index
    columns: Index
    transposed: bool
    features: Index

    def of(self, tensor: Tensor) -> Tensor:
        """Return (outputs, inputs) the cut of a tensor of the file."""
        part = tensor.reshape(-1, *tensor.shape[-2:])[self.lead][self.rows][:, self.columns]
        return part.T if self.transposed else part

    @property
    def outputs(self) -> Index:
        """Return the file's rows, or columns, that are outputs."""
        return self.columns if self.transposed else self.rows

    @property
    def inputs(self) -> Index:
        """Return the file's columns, or rows, that are inputs."""
        return self.rows if self.transposed else self.columns


def modules(model: nn.Module, loading: Loading) -> list[tuple[str, nn.Module, Linear]]:
    """Return (state, module, layer) of each module that is a linear layer and one matrix of the file."""
    names, found = loading.checkpoint_name, []
    for path, module in model.named_modules():
        weight = f"{path}.weight"
        if is_linear(module) and weight in names:  # a tied head is its embedding
            found.append((weight, module, Linear(names[weight], names.get(f"{path}.bias"), is_transposed(module))))
    return found


def stacks(model: nn.Module, loading: Loading) -> dict[str, tuple[list[Linear], list[list[StatePiece]]]]:
    """Return state -> (tensors of the file, where each matrix of the state lies in them).

    States are the parameters of two or three dimensions whose matrices are matrices of the file. Modules of `modules`,
    embeddings and convolutions are left out.
    """
    known = {state for state, _, _ in modules(model, loading)}
    known |= {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, LOOKED_UP)}
    parameters = {name for name, _ in model.named_parameters()}
    found: dict[str, tuple[list[Linear], list[list[StatePiece]]]] = {}
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
    """Return the inputs that a linear layer multiplies; None if it is called in another way, or without rows."""
    x, width = args[0] if args else None, module.weight.shape[0 if layer.transposed else 1]
    return x if isinstance(x, Tensor) and x.dim() and x.shape[-1] == width and x.numel() else None


def _bias(state: str) -> str:
    return f"{state.removesuffix('.weight')}.bias" if state.endswith(".weight") else f"{state}_bias"


def cuts(box: Box, pieces: Sequence[StatePiece], layers: Mapping[str, Linear], shape: Sequence[int]) -> list[MatrixCut]:
    """Return the parts of the file in a box; `shape` is the state's, `layers` have the file's tensors by name."""
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
        layer, rows_of_file, columns_of_file = layers[piece.file], simple(of_file), simple(across)
        found.append(MatrixCut(layer, piece.lead, rows_of_file, columns_of_file, inputs_are_rows, simple(features)))
    return found


def _numbers(index: Index, size: int | None = None) -> Tensor:
    if isinstance(index, Tensor):
        return index
    return torch.arange(index.start, index.stop if size is None else min(index.stop, size))
