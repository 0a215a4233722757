"""The compiled loop against the torch functions that it stands for, step by step and bit for bit, on every level."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LEVELS, needs_kernels
from safetensors.torch import save_file

from deltamerge.engine import kernels
from deltamerge.engine.backends import FusedBackend, choose
from deltamerge.engine.execute import Task, execute
from deltamerge.formats.safetensors import read_header
from deltamerge.methods.prune.bits import mask_key
from deltamerge.methods.prune.select import Bin, Bracket, Cut
from deltamerge.tensors.dtypes import torch_dtype
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import REDUCTIONS
from deltamerge.tensors.tensor import Graph, Node
from deltamerge.tensors.tiles import row_length

pytestmark = needs_kernels

KEY = mask_key(5, "tune", "w")
SPECIALS = np.array(
    [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-40, 3.4e38, -3.4e38, 65504, 65520, 1 + 2**-8, 1 + 3 * 2**-8, 1e-8],
    np.float32,
)
# less than a vector, a vector of more than a block, rows that no chunk is made of, rows longer than a block, many rows
SHAPES = [(7,), (70_001,), (300, 97), (2, 70_000), (64, 1024), (9, 20, 30), (2, 3, 50, 300)]
SELECT, MERGES = "deltamerge.methods.prune.select", "deltamerge.methods.merge"


def floats(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Ordinary values with every special one met by every other, and some zeros."""
    rng = np.random.default_rng(seed)
    x = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    places = rng.random(shape) < 0.05
    x[places] = rng.choice(SPECIALS, int(places.sum()))
    return torch.from_numpy(x)


def steps(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Small multiples of one number: many are equal, many 0."""
    return torch.from_numpy((np.random.default_rng(seed).integers(-5, 6, shape) * 2.0**-9).astype(np.float32))


class Memory:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}

    def write(self, name: str, offset: int, data: Any) -> None:
        self.parts[offset] = bytes(data)

    def bits(self) -> bytes:
        return b"".join(part for _, part in sorted(self.parts.items()))


class Models:
    """Stored tensors t0, t1, ... of one shape, and the graph that is made of them."""

    def __init__(self, folder: Path, *tensors: torch.Tensor) -> None:
        path = folder / "models.safetensors"
        save_file({f"t{i}": x.contiguous() for i, x in enumerate(tensors)}, path)
        infos = read_header(path).tensors
        self.graph, self.shape = Graph(), tuple(tensors[0].shape)
        self.known: dict[Node, Any] = {}
        self.reads = [info.tensor for _, info in sorted(infos.items())]

    def small(self, value: Any) -> Node:
        node = self.graph.node("small", kind="small", number=len(self.known))
        self.known[node] = value
        return node

    def node(self, function: str, *inputs: Node, **parameters: Any) -> Node:
        return self.graph.node(function, inputs, shape=self.shape, **parameters)

    def delta(self, number: int = 1) -> Node:
        dtypes = (self.reads[number].dtype, self.reads[0].dtype)
        return self.node("deltamerge.methods.ops:subtract", self.reads[number], self.reads[0], dtypes=dtypes)

    def compute(self, root: Node, backend: str) -> Any:
        sink = Memory()
        with Reader() as reader:
            found = execute([Task("w", root, backend)], reader, sink, known=self.known, workers=2)
        return (
            found[root]
            if root.kind in REDUCTIONS
            else np.frombuffer(sink.bits(), f"u{4 if root.dtype == 'F32' else 2}")
        )


def floats_of(bits: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    return torch.from_numpy(bits.copy()).view(torch_dtype(dtype)).float().numpy()


def same(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], dtype: str) -> None:
    """Equal bits; any NaN of a float is as good as another."""
    assert ours.shape == theirs.shape
    if ours.dtype.kind == "f":
        nan = np.isnan(theirs)
        assert (np.isnan(ours) == nan).all()
        ours, theirs = ours.view(np.uint64), theirs.view(np.uint64)
    elif dtype and ours.dtype.kind == "u":
        nan = np.isnan(floats_of(theirs, dtype))
        assert (np.isnan(floats_of(ours, dtype)) == nan).all()
    else:
        nan = np.zeros(ours.shape, bool)
    assert (ours == theirs)[~nan].all()


def check(models: Models, root: Node, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loop makes the whole of `root`, and what torch makes."""
    assert choose(root, "cpu") == "fused"
    whole: Callable[..., Any] = FusedBackend.whole
    made: list[Any] = []
    monkeypatch.setattr(FusedBackend, "whole", lambda *a: made.append(whole(*a)) or made[-1])
    ours = models.compute(root, "fused")
    monkeypatch.setattr(FusedBackend, "whole", whole)
    assert made
    assert None not in made
    same(ours, models.compute(root, "torch"), "" if root.kind in REDUCTIONS else root.dtype)
    return ours


Build = Callable[[Models], Node]


def select(name: str, *values: Any, of: int = 1, **parameters: Any) -> Build:
    """A step of `pruners.select` on so many deltas and small values."""
    return lambda m: m.node(
        f"{SELECT}:{name}", *(m.delta(i + 1) for i in range(of)), *map(m.small, values), **parameters
    )


def pruned(function: str, **parameters: Any) -> Build:
    return lambda m: m.node(function, m.delta(), **parameters)


def dare(density: float, q: float | None = None, number: int = 1) -> Build:
    def build(m: Models) -> Node:
        pair = m.reads[number], m.reads[0]
        kept = m.node("deltamerge.methods.prune.dare:dare", *pair, key=(KEY[0] + number, KEY[1]), density=density)
        return kept if q is None else m.node("deltamerge.methods.prune.rescale:divide", kept, m.small(q))

    return build


def merged(function: str, *parts: Build, **parameters: Any) -> Build:
    def build(m: Models) -> Node:
        value = m.node(function, m.reads[0], *(part(m) for part in parts), **parameters)
        return m.node("deltamerge.methods.ops:cast", value, dtype=m.reads[0].dtype, to=m.reads[0].dtype)

    return build


def delta(number: int) -> Build:
    return lambda m: m.delta(number)


def gram(m: Models) -> Node:
    return m.node("deltamerge.methods.merge.spans:gram", *m.reads, kind="concat")


def spanned(based: bool) -> Build:
    return lambda m: m.node(
        "deltamerge.methods.merge.spans:combine",
        *m.reads,
        m.small(np.array([0.3, -1.2, 0.7][based:])),
        along="tensor",
        based=based,
    )


def norm(of: Build, kind: str) -> Build:
    return lambda m: m.node("deltamerge.methods.prune.rescale:norm", of(m), kind="concat", norm=kind)


def linear(*weights: float, normalize: bool) -> Build:
    return lambda m: m.node(f"{MERGES}.linear:linear", *m.reads[: len(weights)], weights=weights, normalize=normalize)


def sce(m: Models) -> Node:
    weights = tuple(float(np.float32(x)) for x in (0.25, 0.75))
    return m.node("deltamerge.methods.merge.sce:sce", m.reads[0], m.delta(1), m.delta(2), m.small(weights))


def columns_of(m: Models) -> int:
    return max(1, row_length(m.shape))


def rows_of(m: Models) -> int:
    return -(-int(np.prod(m.shape)) // columns_of(m))


def line(count: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(count).astype(np.float32)


def q_of_columns(m: Models) -> np.ndarray[Any, Any]:
    """One of each column; of a vector, whose rows are of one entry, one of each row."""
    return line(columns_of(m), 5)[None] if columns_of(m) > 1 else line(rows_of(m), 5)[:, None]


def q_of_matrices(m: Models) -> np.ndarray[Any, Any]:
    """One of each stacked matrix; of other tensors one of each row."""
    return line(m.shape[0], 5)[:, None, None] if len(m.shape) == 3 else line(rows_of(m), 5)[:, None]


def divided(of: Build, q: Callable[[Models], Any]) -> Build:
    return lambda m: m.node("deltamerge.methods.prune.rescale:divide_rows", of(m), m.small(q(m)))


def protected(which: str) -> Build:
    def build(m: Models) -> Node:
        columns = m.small(np.unique(np.random.default_rng(6).integers(0, columns_of(m), 5)))
        pair = m.reads[1:3] if which == "restore" else []
        return m.node(f"deltamerge.methods.prune.protect:{which}", m.delta(), *pair, columns)

    return build


ONE: dict[str, Any] = {"weights": (0.6,), "normalize": False, "lambda_": 1.0}
TASK, TIES, DELLA = (
    f"{MERGES}.task_arithmetic:task_arithmetic",
    "deltamerge.methods.merge.ties:ties",
    "deltamerge.methods.prune.della:della",
)


def on_zeros(m: Models) -> Node:
    """What a delta artifact stores of sparse deltas."""
    parts = dare(0.01, 0.01)(m), dare(0.04, None, 2)(m)
    value = m.node(TASK, m.node("deltamerge.methods.ops:zeros", m.reads[0]), *parts, **SUMMED)
    return m.node("deltamerge.methods.ops:cast", value, to="F32")


SUMMED: dict[str, Any] = {"weights": (0.6, -0.4), "normalize": False, "lambda_": 1.0}
SCALED: dict[str, Any] = {"weights": (0.6, 0.7), "normalize": True, "lambda_": 0.3}
EQUALS = Cut(int(np.float32(2**-8).view(np.uint32)), 0, 0)
STEPS: Mapping[str, Build] = {
    "subtract": delta(1),
    "cast": lambda m: m.node("deltamerge.methods.ops:cast", m.reads[1], dtype="BF16", to="BF16"),
    "cast to half": lambda m: m.node("deltamerge.methods.ops:cast", m.reads[2], dtype="F16", to="F16"),
    "zeros": lambda m: m.node("deltamerge.methods.ops:zeros", m.reads[0]),
    "passthrough": lambda m: m.node(f"{MERGES}.passthrough:passthrough", m.reads[1], scales=(0.3,)),
    "linear of one": linear(0.5, normalize=False),
    "linear of two": linear(0.5, 0.6, normalize=False),
    "linear of three, normalized": linear(0.5, 0.6, 0.1, normalize=True),
    **{f"dare {d:g}": dare(d, q) for d, q in ((1.0, None), (0.5, 0.5), (1 / 16, 0.3), (0.3, -2.0), (0.5, None))},
    "task_arithmetic": merged(TASK, delta(1), delta(2), **SUMMED),
    "task_arithmetic, normalized": merged(TASK, delta(1), delta(2), **SCALED),
    "task_arithmetic, sparse": merged(TASK, dare(0.01, 0.01), dare(0.04, None, 2), **SUMMED),
    "task_arithmetic, two regimes": merged(TASK, dare(0.01, 0.01), dare(0.4, 0.4, 2), **SUMMED),
    "task_arithmetic, sparse and whole": merged(TASK, dare(1e-3, 0.01), delta(2), **SCALED),
    "task_arithmetic, sparse, on zeros": on_zeros,
    "ties": merged(TIES, delta(1), delta(2), **SUMMED),
    "ties, normalized": merged(TIES, delta(1), delta(2), **SCALED),
    "ties, sparse": merged(TIES, dare(0.05, 0.05), dare(0.05, 0.05, 2), **SCALED),
    "ties of three": merged(TIES, delta(1), delta(2), delta(1), **{**SCALED, "weights": (0.3, 0.4, -0.5)}),
    "sce": sce,
    "variance": lambda m: m.node("deltamerge.methods.merge.sce:variance", m.delta(1), m.delta(2)),
    "gram": gram,
    "combine": spanned(False),
    "combine on a base": spanned(True),
    **{f"norm {kind}": norm(delta(1), kind) for kind in ("l1", "l2", "linf")},
    **{f"norm {kind} of a sparse delta": norm(dare(0.03), kind) for kind in ("l1", "l2", "linf")},
    "della": pruned(DELLA, key=KEY, density=0.5, epsilon=0.2),
    "della, not rescaled": pruned(DELLA, key=KEY, density=0.2, epsilon=0.1, weighted=False),
    "norm of della": norm(pruned(DELLA, key=KEY, density=0.5, epsilon=0.2), "l2"),
    "rows": pruned(f"{SELECT}:keep_largest_rows", density=0.3),
    "rows, nearly all": pruned(f"{SELECT}:keep_largest_rows", density=0.98),
    "rows, scored": lambda m: m.node(
        f"{SELECT}:keep_largest_rows_scored", m.delta(), m.small(line(columns_of(m), 3)), density=0.4
    ),
    "norm of rows": norm(pruned(f"{SELECT}:keep_largest_rows", density=0.3), "l1"),
    "divided by row": divided(delta(1), lambda m: line(rows_of(m), 4)[:, None]),
    "divided by column": divided(delta(1), q_of_columns),
    "divided by matrix": divided(delta(1), q_of_matrices),
    "divided by one number": divided(delta(1), lambda m: 0.3),
    "sparse, divided by row": merged(TASK, divided(dare(0.03), lambda m: line(rows_of(m), 4)[:, None]), **ONE),
    "sparse, divided by column": merged(TASK, divided(dare(0.03), q_of_columns), **ONE),
    "sparse, divided by matrix": merged(TASK, divided(dare(0.03), q_of_matrices), **ONE),
    "cleared": protected("clear"),
    "restored": protected("restore"),
    "high counts": select("high_histogram", kind="sum"),
    "low counts": select("low_histogram", Bin(0x3B80, 1), kind="sum"),
    "nonzero": select("count_nonzero", kind="sum"),
    "equals": select("equal_counts", EQUALS, kind="concat"),
    "sample": select("sample", kind="concat"),
    "bracket": select("bracketed", Bracket(0x3B000000, 0x3C000000), kind="concat"),
    "bracket of one": select("bracketed", Bracket(EQUALS.threshold, EQUALS.threshold), kind="concat"),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("values", [floats, steps])
@pytest.mark.parametrize("name", STEPS)
def test_steps_are_torch(name: str, values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, shape in enumerate(SHAPES):
        folder = tmp_path / str(number)
        folder.mkdir()
        dtypes = [torch.bfloat16, torch.bfloat16, torch.float32 if number % 2 else torch.float16]
        tensors = [values(shape, seed).to(dtype) for seed, dtype in enumerate(dtypes)]
        for level in LEVELS if number % 3 == 0 else LEVELS[:1]:
            kernels.native().choose(level)
            models = Models(folder, *tensors)
            check(models, STEPS[name](models), monkeypatch)
    kernels.native().choose(LEVELS[0])


@pytest.mark.parametrize("size", [1, 100, 1500, 2048, 2049, 3100, 4096])
def test_sums_of_negative_zeros_are_torchs(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_level: str
) -> None:
    models = Models(tmp_path, torch.full((size,), -0.0), torch.ones(size))
    check(models, gram(models), monkeypatch)


def counted(models: Models, score: Node, threshold: float, wanted: int) -> tuple[Cut, Any]:
    """A cut and its ranks, as the graph finds them."""
    bits = int(np.float32(threshold).view(np.uint32))
    equal = models.node(f"{SELECT}:equal_counts", score, models.small(Cut(bits, wanted, 0)), kind="concat")
    counts = models.compute(equal, "fused")
    return Cut(bits, wanted, int(counts.sum())), np.cumsum(counts) - counts


@pytest.mark.parametrize("shape", [(70_001,), (300, 970), (2, 70_000)])
@pytest.mark.parametrize("wanted", [0, 5, 12_345, 10**6])
def test_selection_by_a_cut_is_torch(
    shape: tuple[int, ...], wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_level: str
) -> None:
    models = Models(tmp_path, steps(shape, 0).bfloat16(), steps(shape, 1), steps(shape, 2))
    score, other = models.delta(1), models.delta(2)
    outer, inner = (counted(models, score, x, wanted) for x in (2**-9, 2**-8))
    smalls = [models.small(x) for x in (*outer, *inner)]
    for root in (
        models.node(f"{SELECT}:keep_largest", score, *smalls[:2]),
        models.node(f"{SELECT}:keep_largest", score, smalls[0], models.small(np.zeros(0, np.int64))),
        models.node(f"{SELECT}:keep_where", other, score, *smalls[:2]),
        models.node(f"{SELECT}:keep_between", score, *smalls),
    ):
        check(models, root, monkeypatch)


def test_ties_of_the_high_half_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_level: str) -> None:
    """A density whose low half is large: of 2**21 positions about 32 tie; rows of ranks whose bounds are nearly one."""
    models = Models(tmp_path, torch.zeros(2, 1 << 20).bfloat16(), torch.ones(2, 1 << 20).bfloat16())
    check(models, dare((30_000 * 65_536 + 50_000) / 2**32)(models), monkeypatch)
    check(models, pruned(DELLA, key=KEY, density=0.3, epsilon=1e-7)(models), monkeypatch)


def test_every_float_rounds_like_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_level: str) -> None:
    high = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    models = Models(tmp_path, torch.from_numpy((high | low).view(np.float32)))
    for dtype in ("BF16", "F16"):
        ours = check(
            models, models.node("deltamerge.methods.ops:cast", models.reads[0], dtype=dtype, to=dtype), monkeypatch
        )
        if dtype == "BF16":
            assert (ours[np.isnan(floats_of(ours, dtype))] == 0x7FC0).all()


def test_every_half_widens_like_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_level: str) -> None:
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    models = Models(tmp_path, halves, torch.zeros_like(halves))
    check(models, models.delta(1), monkeypatch)


@pytest.mark.parametrize("asked", ["off", "baseline", "nonsense"])
def test_the_switch(asked: str) -> None:
    """What an environment variable asks for, or a line."""
    code = "from deltamerge.engine import kernels; print(kernels.described())"
    environment = {**os.environ, kernels.SWITCH: asked}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if asked == "nonsense":
        assert f"{kernels.SWITCH}=nonsense: no such kernels" in done.stderr
        return
    assert done.stdout.strip() == {"off": f"off ({kernels.SWITCH})", "baseline": "baseline"}[asked]


def test_kernels_of_other_sources_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line says so, and torch computes; here they are of the sources that lie beside them."""
    assert kernels.missing() is None
    sources = tmp_path / "kernels" / "src"
    shutil.copytree(kernels.SOURCES, sources)
    shutil.copytree(kernels.SOURCES.parents[1] / "fused", tmp_path / "fused")
    monkeypatch.setattr(kernels, "SOURCES", sources)
    monkeypatch.setattr(kernels, "native", kernels.native.__wrapped__)
    assert kernels.available()
    with (sources / "vector" / "trellis.h").open("a") as file:
        file.write("// another\n")
    assert not kernels.available()
    line = kernels.missing()
    assert line is not None
    assert "pip install -e ." in line
    assert kernels.described() == "compiled of other sources, torch computes"


def test_arrays_that_are_too_short_are_refused() -> None:
    native, some = kernels.native(), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="shorter"):
        native.ordered_product(some, some, some, 2, 2, 3)
    with pytest.raises(TypeError, match="22 arguments"):
        native.run(some)


def test_the_loop_releases_the_gil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread is in the compiled loop, another runs Python."""
    models = Models(tmp_path, torch.zeros(1 << 24).bfloat16(), torch.ones(1 << 24).bfloat16())
    root = norm(dare(0.5), "l1")(models)
    native, seen = kernels.native(), 0

    class Watched:
        """The kernels; `inside` is true from before the loop until after it, which alone offers the GIL between."""

        inside = False

        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

        def run(self, *arguments: Any) -> Any:
            Watched.inside = True
            made = native.run(*arguments)
            Watched.inside = False
            return made

    monkeypatch.setattr(kernels, "native", Watched)
    thread = threading.Thread(target=models.compute, args=(root, "fused"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # nobody is made to give the GIL up
    try:
        thread.start()
        while thread.is_alive():
            time.sleep(0)  # offers the GIL
            seen += Watched.inside
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert seen


def test_a_run_imports_no_torch_no_calibration_and_no_other_method(tmp_path: Path) -> None:
    code = (
        "import sys; from deltamerge import load_recipe\n"
        "load_recipe('r.yaml', workers=2).run('out'); print(*{'torch', 'numba'} & set(sys.modules))\n"
        "print(*(m.removeprefix('deltamerge.') for m in sys.modules"
        " if m.startswith(('deltamerge.calibrate', 'deltamerge.methods.merge.', 'deltamerge.methods.prune.'))))"
    )
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "test"}))
        save_file({"w": torch.ones(300, 40).bfloat16()}, tmp_path / name / "model.safetensors", {"format": "pt"})
    (tmp_path / "r.yaml").write_text(
        "base_model: ./c\nmerge_method: ties\nparameters: {weight: 1, density: 0.5}\n"
        "models: [{model: ./a}, {model: ./b}]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found, methods = done.stdout.splitlines()
    assert not found
    assert set(methods.split()) == {
        f"methods.{name}" for name in ("merge.ties", "merge.sums", "prune.none", "prune.select")
    }
