"""Tensors that are computed when they are read, against their formulas in float64, whatever the tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from raw_tensors import Stored, stored, widened, write_checkpoint
from tolerance import after_rounding

from deltamerge.formats.peft.adapter import replaced_rows
from deltamerge.formats.peft.lora import added, expert_updates, hadamard, kronecker, low_rank, residual
from deltamerge.formats.safetensors import read_header
from deltamerge.tensors import experts as experts_module
from deltamerge.tensors.experts import join, turned, unfold
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Tensor, TensorInfo, viewed

E, R = 3, 2
SHAPES = {
    "w": (6, 8), "conv": (6, 4, 3, 1), "stack": (E, 6, 8), "bias": (6,),
    "a": (R, 8), "b": (6, R), "m": (6,), "m8": (8,), "a6": (R, 6), "b8": (8, R), "conv_a": (R, 4, 3, 1),
    "conv_b": (6, R, 1, 1), "conv_m": (1, 6, 1, 1),
    "ea": (E * R, 8), "eb": (6, R * E), "ta": (E * R, 6), "tb": (8, R * E),
    "h1a": (6, R), "h1b": (R, 8), "h2a": (6, R), "h2b": (R, 8), "c1a": (R, 6), "c1b": (R, 4), "c2a": (R, 6),
    "c2b": (R, 4), "t1": (R, R, 3, 1), "t2": (R, R, 3, 1), "k1": (2, 4), "k2": (3, 2), "k1a": (2, R), "k1b": (R, 4),
    "k2a": (3, R), "k2b": (R, 2), "kca": (R, 3), "kcb": (R, 2), "k1c": (2, 2), "rows": (2, 8), "added": (6,),
}  # fmt: skip
S = 0.75
Values = dict[str, np.ndarray]
Infos = dict[str, TensorInfo]


def dora(weight: np.ndarray, magnitude: np.ndarray, axis: int) -> np.ndarray:
    flat = weight.reshape(len(weight), -1)
    norms = np.sqrt((flat**2).sum(1 - axis, keepdims=True))
    return (flat * magnitude.reshape(norms.shape) / norms).reshape(weight.shape)


def truncated(weight: np.ndarray) -> np.ndarray:
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :R] * s[:R]) @ v[:R]


def triangular(weight: np.ndarray) -> np.ndarray:
    q, r = np.linalg.qr(weight)
    return S * q[:, :R] @ r[:R]


def experts(a: np.ndarray, b: np.ndarray, equation: str) -> np.ndarray:
    """As PEFT reshapes them: A (E, r, in), B (out, r, E)."""
    return np.einsum(equation, b.reshape(len(b), R, E), a.reshape(E, R, -1))


def replaced(weight: np.ndarray, rows: np.ndarray) -> np.ndarray:
    weight = weight.copy()
    weight[[4, 1]] = rows
    return weight


def like(t: Infos, function: Callable[..., None], base: str, *others: str, **parameters: Any) -> Tensor:
    """A view of the base's shape and dtype."""
    inputs = [t[name] for name in (base, *others)]
    return viewed(function, inputs, t[base].shape, t[base].dtype, **parameters)


def lora(t: Infos, w: str, a: str, b: str, transposed: bool, *magnitude: str) -> Tensor:
    return like(t, low_rank, w, a, b, *magnitude, scale=S, transposed=transposed)


def stacked(t: Infos, a: str, b: str, transposed: bool) -> Tensor:
    return like(t, expert_updates, "stack", a, b, scale=S, transposed=transposed)


def loha(t: Infos, w: str, *factors: str) -> Tensor:
    return like(t, hadamard, w, *factors, scale=S)


def lokr(t: Infos, w: str, c: tuple[str, ...], d: tuple[str, ...], *core: str) -> Tensor:
    return like(t, kronecker, w, *c, *d, *core, scale=S, of_c=len(c), of_d=len(d))


def left_over(t: Infos, begins: str, transposed: bool) -> Tensor:
    return like(t, residual, "w", begins=begins, rank=R, scale=S, transposed=transposed)


CASES: dict[str, tuple[str, Callable[[Infos], Tensor], Callable[[Values], np.ndarray]]] = {
    "LoRA": ("w", lambda t: lora(t, "w", "a", "b", False), lambda v: v["w"] + S * v["b"] @ v["a"]),
    "LoRA, transposed": (
        "w", lambda t: lora(t, "w", "a6", "b8", True), lambda v: v["w"] + S * (v["b8"] @ v["a6"]).T,
    ),
    "DoRA": (
        "w", lambda t: lora(t, "w", "a", "b", False, "m"),
        lambda v: dora(v["w"] + S * v["b"] @ v["a"], v["m"], 0),
    ),
    "DoRA, transposed": (
        "w", lambda t: lora(t, "w", "a6", "b8", True, "m8"),
        lambda v: dora(v["w"] + S * (v["b8"] @ v["a6"]).T, v["m8"], 1),
    ),
    "convolution": (
        "conv", lambda t: lora(t, "conv", "conv_a", "conv_b", False),
        lambda v: v["conv"] + S * np.einsum("or,rikl->oikl", v["conv_b"][:, :, 0, 0], v["conv_a"]),
    ),
    "convolution, DoRA": (
        "conv", lambda t: lora(t, "conv", "conv_a", "conv_b", False, "conv_m"),
        lambda v: dora(
            v["conv"] + S * np.einsum("or,rikl->oikl", v["conv_b"][:, :, 0, 0], v["conv_a"]), v["conv_m"], 0
        ),
    ),
    "experts": (
        "stack", lambda t: stacked(t, "ea", "eb", False),
        lambda v: v["stack"] + S * experts(v["ea"], v["eb"], "ore,eri->eoi"),
    ),
    "experts, transposed": (
        "stack", lambda t: stacked(t, "ta", "tb", True),
        lambda v: v["stack"] + S * experts(v["ta"], v["tb"], "ore,eri->eio"),
    ),
    "LoHa": (
        "w", lambda t: loha(t, "w", "h1a", "h2a", "h1b", "h2b"),
        lambda v: v["w"] + S * (v["h1a"] @ v["h1b"]) * (v["h2a"] @ v["h2b"]),
    ),
    "LoHa, cores": (
        "conv", lambda t: loha(t, "conv", "c1a", "c2a", "c1b", "c2b", "t1", "t2"),
        lambda v: v["conv"] + S * np.prod(
            [np.einsum("ijkl,jr,ip->prkl", v[f"t{n}"], v[f"c{n}b"], v[f"c{n}a"]) for n in (1, 2)], axis=0
        ),
    ),
    "LoKr": (
        "w", lambda t: lokr(t, "w", ("k1",), ("k2",)),
        lambda v: v["w"] + S * np.kron(v["k1"], v["k2"]),
    ),
    "LoKr, of products": (
        "w", lambda t: lokr(t, "w", ("k1a", "k1b"), ("k2a", "k2b")),
        lambda v: v["w"] + S * np.kron(v["k1a"] @ v["k1b"], v["k2a"] @ v["k2b"]),
    ),
    "LoKr, a core": (
        "conv", lambda t: lokr(t, "conv", ("k1c",), ("kca", "kcb"), "t1"),
        lambda v: v["conv"] + S * np.kron(
            v["k1c"][:, :, None, None], np.einsum("ijkl,ip,jr->prkl", v["t1"], v["kca"], v["kcb"])
        ),
    ),
    "PiSSA": ("w", lambda t: left_over(t, "pissa", False), lambda v: v["w"] - truncated(v["w"])),
    "OLoRA": ("w", lambda t: left_over(t, "olora", False), lambda v: v["w"] - triangular(v["w"])),
    "OLoRA, transposed": (
        "w", lambda t: left_over(t, "olora", True), lambda v: v["w"] - triangular(v["w"].T).T,
    ),
    "rows": ("w", lambda t: like(t, replaced_rows, "w", "rows", places=(4, 1)), lambda v: replaced(v["w"], v["rows"])),
    "a bias": ("bias", lambda t: like(t, added, "bias", "added", scale=S), lambda v: v["bias"] + S * v["added"]),
}  # fmt: skip


@pytest.fixture(scope="module", params=["F32", "BF16", "F16"])
def tensors(request, tmp_path_factory) -> tuple[Infos, Values]:
    """Weights of one dtype, factors in float32."""
    generator = np.random.default_rng(0)
    weights = {"w", "conv", "stack", "bias"}
    drawn: dict[str, Stored] = {
        name: stored(generator.normal(size=shape), request.param if name in weights else "F32")
        for name, shape in SHAPES.items()
    }
    folder = write_checkpoint(tmp_path_factory.mktemp("tensors"), drawn)
    infos = read_header(folder / "model.safetensors").tensors
    return infos, {name: widened(tensor) for name, tensor in drawn.items()}


def read(info: TensorInfo, step: int) -> np.ndarray:
    """The numbers of a tensor, read `step` elements at a time."""
    size = info.nbytes // int(np.prod(info.shape))
    raw = np.empty(info.nbytes, np.uint8)
    with Reader() as reader:
        for start in range(0, info.nbytes // size, step):
            reader.read_into(info, start, raw[start * size : (start + step) * size])
    array = raw.view({"F32": np.float32, "BF16": np.uint16, "F16": np.float16}[info.dtype]).reshape(info.shape)
    return widened((info.dtype, array))


@pytest.mark.parametrize("case", CASES)
def test_as_the_formula(tensors: tuple[Infos, Values], case: str) -> None:
    infos, values = tensors
    base, made, formula = CASES[case]
    info = TensorInfo(base, made(infos))
    got, want = read(info, 10**6), formula(values)
    tolerance = {"F32": 2e-6, "BF16": after_rounding(torch.bfloat16), "F16": 2**-10}[info.dtype]
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=4e-6)
    for step in (1, 7, 13):
        np.testing.assert_array_equal(read(info, step), got)


@pytest.mark.parametrize("whole", [0, 1 << 24])
def test_stacks_joined_turned_and_taken_apart(tensors: tuple[Infos, Values], monkeypatch, whole: int) -> None:
    monkeypatch.setattr(experts_module, "WHOLE", whole)
    infos, values = tensors
    pair = [infos["w"].part(0, (3, 8)), infos["w"]]
    joined = TensorInfo("j", viewed(join, pair, (9, 8), infos["w"].dtype))
    rows_of_both = np.concatenate([values["w"][:3], values["w"]])
    stack = TensorInfo("s", viewed(join, pair, (3, 3, 8), infos["w"].dtype))
    swapped = turned(infos["stack"])
    twice = turned(swapped)
    for step in (10**6, 1, 5, 11, 50):
        np.testing.assert_array_equal(read(joined, step), rows_of_both)
        np.testing.assert_array_equal(read(turned(stack), step), rows_of_both.reshape(3, 3, 8).swapaxes(1, 2))
        np.testing.assert_array_equal(read(swapped, step), values["stack"].swapaxes(1, 2))
        np.testing.assert_array_equal(read(twice, step), values["stack"])
    for name, part in unfold(swapped, ("gate_proj", "up_proj")).items():
        expert, which, _ = name.split(".")
        want = values["stack"].swapaxes(1, 2)[int(expert)][4 * (which == "up_proj") :][:4]
        np.testing.assert_array_equal(read(part, 7), want)
