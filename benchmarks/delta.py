"""Size, and time to load and apply, of delta artifacts against the DAREx paper's CSR (float32 values, int32 columns).

    python benchmarks/delta.py                     BERT-base and RoBERTa-base shapes, synthetic deltas
    python benchmarks/delta.py --real ../shared/data    error of each value coding on real fine-tunes

Both are applied in place to the base's float32 state dict in memory (`replace` sets final values, the others add).
Times are the median of `--repeat` runs that take turns, from opening the file (in the page cache) to the last
tensor. CSR is read by safetensors and added by torch's dense.add_(csr), which beat scipy and index_add_.
Sizes are of everything in the folder, manifest and hashes included; MB = 10**6 bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from deltamerge.io.delta import DeltaFile
from deltamerge.io.delta_format import Base
from deltamerge.io.delta_writer import BaseTensor, DeltaWriter

KINDS = ("replace", "float32", "bfloat16", "int8", "sign")
State = dict[str, torch.Tensor]


def shapes(prefix: str, vocabulary: int, positions: int, types: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of a base-size BERT, pooler included."""
    h, inner = 768, 3072
    yield f"{prefix}.embeddings.word_embeddings.weight", (vocabulary, h)
    yield f"{prefix}.embeddings.position_embeddings.weight", (positions, h)
    yield f"{prefix}.embeddings.token_type_embeddings.weight", (types, h)
    parts = {"attention.self.query": (h, h), "attention.self.key": (h, h), "attention.self.value": (h, h),
             "attention.output.dense": (h, h), "attention.output.LayerNorm": (h,),
             "intermediate.dense": (inner, h), "output.dense": (h, inner), "output.LayerNorm": (h,)}  # fmt: skip
    layers: dict[str, tuple[int, ...]] = {"embeddings.LayerNorm": (h,)}
    layers |= {f"encoder.layer.{i}.{part}": shape for i in range(12) for part, shape in parts.items()}
    for name, shape in {**layers, "pooler.dense": (h, h)}.items():
        yield f"{prefix}.{name}.weight", shape
        yield f"{prefix}.{name}.bias", shape[:1]


MODELS = {"BERT-base": ("bert", 30522, 512, 2), "RoBERTa-base": ("roberta", 50265, 514, 1)}


def write_csr(path: Path, deltas: dict[str, tuple[torch.Tensor, torch.Tensor]], base: State) -> None:
    """Row ends and columns int32, values float32; a vector is one row."""
    arrays = {}
    for name, (positions, values) in deltas.items():
        columns = base[name].shape[-1]
        rows = positions // columns
        counts = torch.bincount(rows, minlength=base[name].numel() // columns)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        arrays[f"{name}.crow"] = ends.int()
        arrays[f"{name}.col"] = (positions % columns).int()
        arrays[f"{name}.values"] = values
    save_file(arrays, path)


def apply_csr(path: Path, state: State) -> None:
    arrays = load_file(path)
    for name, tensor in state.items():
        matrix = tensor.view(-1, tensor.shape[-1])
        crow, col, values = (arrays[f"{name}.{part}"] for part in ("crow", "col", "values"))
        matrix.add_(torch.sparse_csr_tensor(crow, col, values, matrix.shape, check_invariants=False))


def window(array: np.ndarray[Any, Any], start: int, stop: int) -> np.ndarray[Any, Any]:
    return array[start:stop]


def write_delta(
    folder: Path, kind: str, deltas: dict[str, tuple[torch.Tensor, torch.Tensor]], base: State
) -> dict[str, float]:
    """An artifact of `kind` ("replace": final values) in `folder`; its size in bytes and relative error."""
    folder.mkdir()
    values: Any = "bfloat16" if kind == "replace" else kind
    semantics: Any = "replace" if kind == "replace" else "add"
    with DeltaWriter(folder, Base(id="base"), semantics=semantics, values=values) as writer:
        for name, tensor in base.items():
            host = tensor.reshape(-1).view(torch.int32).numpy()
            shape = tuple(tensor.shape)
            out = writer.tensor(name, "F32", shape, BaseTensor(name, "F32", shape, partial(window, host)))
            positions, added = deltas[name]
            if kind == "replace":
                result = tensor.flatten().clone()
                result[positions] += added
                out.write(0, result.numpy())
            else:
                out.add(positions.numpy(), added.numpy())
                out.finish()
        summary = writer.finish()
    return {"bytes": summary.nbytes, "error": summary.error}


def measure(runs: dict[str, Callable[[], None]], repeat: int) -> dict[str, float]:
    """Median seconds of each run, the runs taking turns; the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def synthetic(model: str, drop: float, repeat: int, folder: Path) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    base, deltas = {}, {}
    for name, shape in shapes(*MODELS[model]):
        base[name] = torch.randn(shape, generator=generator) * 0.02
        kept = torch.rand(math.prod(shape), generator=generator) < 1 - drop
        positions = kept.nonzero().squeeze(1)
        deltas[name] = positions, torch.randn(len(positions), generator=generator) * 1e-3
    csr = folder / "csr.safetensors"
    write_csr(csr, deltas, base)
    rows = {kind: write_delta(folder / kind, kind, deltas, base) for kind in KINDS}
    runs: dict[str, Callable[[], None]] = {"csr": lambda: apply_csr(csr, base)}
    for kind in KINDS:
        runs[kind] = lambda kind=kind: DeltaFile.open(folder / kind).apply_to(base)  # type: ignore[misc]
    seconds = measure(runs, repeat)
    rows = {"csr": {"bytes": csr.stat().st_size, "error": 0.0}} | rows
    common = {"model": model, "p": drop, "kept": sum(len(p) for p, _ in deltas.values())}
    return [common | {"kind": k, "seconds": seconds[k], "ratio": seconds["csr"] / seconds[k]} | rows[k] for k in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--p", nargs="+", type=float, default=[0.9, 0.99, 0.999], help="drop rates")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="torch threads, for CSR as for deltas")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    print(f"{'model':13} {'p':>6} {'kind':>9} {'MB':>8} {'bits/kept':>9} {'ms':>7} {'CSR/it':>6} {'error':>8}")
    for model in arguments.models:
        for drop in arguments.p:
            with tempfile.TemporaryDirectory() as folder:
                for row in synthetic(model, drop, arguments.repeat, Path(folder)):
                    if arguments.json:
                        print(json.dumps(row))
                        continue
                    print(
                        f"{model:13} {drop:6} {row['kind']:>9} {row['bytes'] / 1e6:8.3f}"
                        f" {8 * row['bytes'] / row['kept']:9.2f} {1e3 * row['seconds']:7.1f}"
                        f" {row['ratio']:6.2f} {row['error']:8.2g}"
                    )


if __name__ == "__main__":
    main()
