"""Size, and time to load and apply, of delta artifacts against the DAREx paper's CSR (float32 values, int32 columns).

    python -m benchmarks.serving.delta                          BERT-base and RoBERTa-base shapes, synthetic deltas
    python -m benchmarks.serving.delta --real ../shared/data    what value codings keep of two real fine-tunes' scores

Both are put into a float32 state dict in memory: ours by the patches of `load_delta`, as a server takes them; those of
values to add (all but `replace`) are computed from the base and checked by hash. Times are medians of `--repeat` runs
that take turns, from opening the file (in the page cache) to the last tensor.
CSR is added by torch's dense.add_(csr), which beat scipy, index_add_ and scatter_add_; it is kept as torch.save
writes it, and as bare arrays in a safetensors file, which is the fastest we could make it and what ratios are of.
Sizes are of everything in the folder, manifest and hashes included; MB = 10**6, MiB (the paper's unit) 2**20 bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from deltamerge.apps.chain.live import load_delta
from deltamerge.formats.delta.manifest import Base
from deltamerge.formats.delta.tensor_writer import BaseTensor
from deltamerge.formats.delta.writer import ArtifactWriter

KINDS = ("replace", "float32", "bfloat16", "int8", "sign")
State = dict[str, torch.Tensor]
Deltas = dict[str, tuple[torch.Tensor, torch.Tensor]]  # flat positions, values


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


def write_csr(path: Path, deltas: Deltas, base: State) -> None:
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


def to_csr(arrays: State, name: str, tensor: torch.Tensor) -> torch.Tensor:
    shape = (tensor.numel() // tensor.shape[-1], tensor.shape[-1])
    crow, col, values = (arrays[f"{name}.{part}"] for part in ("crow", "col", "values"))
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def apply_csr(path: Path, state: State) -> None:
    arrays = load_file(path)
    for name, tensor in state.items():
        tensor.view(-1, tensor.shape[-1]).add_(to_csr(arrays, name, tensor))


def apply_pickled(path: Path, state: State) -> None:
    matrices = torch.load(path, weights_only=True)
    for name, tensor in state.items():
        tensor.view(-1, tensor.shape[-1]).add_(matrices[name])


def window(array: np.ndarray[Any, Any], start: int, stop: int) -> np.ndarray[Any, Any]:
    return array[start:stop]


def write_delta(folder: Path, kind: str, deltas: Deltas, base: State) -> dict[str, float]:
    """An artifact of `kind` ("replace": final values) in `folder`; its size in bytes and relative error."""
    folder.mkdir()
    values: Any = "bfloat16" if kind == "replace" else kind
    semantics: Any = "replace" if kind == "replace" else "add"
    with ArtifactWriter(folder, Base(id="base"), semantics=semantics, values=values) as writer:
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


def measure(runs: dict[str, Callable[[], None]], repeat: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each run, the runs taking turns; the first turn does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            if turn:
                seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    medians = {}
    for name, times in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        medians[name] = wall, cpu
    return medians


def synthetic(model: str, drop: float, repeat: int, folder: Path) -> list[dict[str, Any]]:
    rows = compare(*drawn(shapes(*MODELS[model]), drop), repeat, folder)
    return [{"model": model, "p": drop} | row for row in rows]


def drawn(tensors: Iterable[tuple[str, tuple[int, ...]]], drop: float) -> tuple[State, Deltas]:
    """A base of these shapes, and deltas of which a share `drop` is gone at random."""
    generator = torch.Generator().manual_seed(0)
    base, deltas = {}, {}
    for name, shape in tensors:
        base[name] = torch.randn(shape, generator=generator) * 0.02
        kept = torch.rand(math.prod(shape), generator=generator) < 1 - drop
        positions = kept.nonzero().squeeze(1)
        deltas[name] = positions, torch.randn(len(positions), generator=generator) * 1e-3
    return base, deltas


def compare(
    base: State, deltas: Deltas, repeat: int, folder: Path, kinds: Sequence[str] = KINDS
) -> list[dict[str, Any]]:
    """Of CSR, in both files, and of each kind of artifact: size and error, and with `repeat` the time to apply it."""
    count = sum(len(positions) for positions, _ in deltas.values())
    csr, pickled = folder / "csr.safetensors", folder / "csr.pt"
    state = {name: tensor.clone() for name, tensor in base.items()}
    write_csr(csr, deltas, base)
    torch.save({name: to_csr(load_file(csr), name, tensor) for name, tensor in base.items()}, pickled)
    sizes: dict[str, dict[str, float]] = {
        "CSR, torch.save": {"bytes": pickled.stat().st_size, "error": 0.0},
        "CSR, safetensors": {"bytes": csr.stat().st_size, "error": 0.0},
    }
    runs: dict[str, Callable[[], None]] = {
        "CSR, torch.save": partial(apply_pickled, pickled, state),
        "CSR, safetensors": partial(apply_csr, csr, state),
    }
    for kind in kinds:
        sizes[kind] = write_delta(folder / kind, kind, deltas, base)
        runs[kind] = partial(put_delta, folder / kind, base, state)
    rows: list[dict[str, Any]] = [
        {
            "kind": kind, "MB": size["bytes"] / 1e6, "MiB": size["bytes"] / 2**20,
            "bits": 8 * size["bytes"] / count, "error": size["error"],
        }
        for kind, size in sizes.items()
    ]  # fmt: skip
    if repeat:
        seconds = measure(runs, repeat)
        csr = seconds["CSR, safetensors"][0]
        for row in rows:
            wall, cpu = seconds[row["kind"]]
            row |= {"ms": 1e3 * wall, "CPU ms": 1e3 * cpu, "CSR / this": csr / wall}
    return rows


def put_delta(folder: Path, base: State, state: State) -> None:
    """Write the patches of an artifact into a state dict; `base` is that of the base, which some are computed from."""
    for patch in load_delta(folder, base):
        where = slice(None) if patch.indices is None else patch.indices
        state[patch.name].view(-1)[where] = patch.values


def real(data: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Test scores of `data`'s fine-tunes, pruned and stored; the head is the fine-tune's and not counted."""
    from benchmarks.encoder import load, score
    from benchmarks.tasks import TASKS, rows

    base_tensors = load_file(data / "base" / "model.safetensors")
    for task in (TASKS["sentiment"], TASKS["intensity"]):
        test = rows(task.name, "test")
        model = load(data / task.name)
        state = model.state_dict()
        yield {"task": task.name, "mask": "none", "kind": "fine-tune", "score": score(model, task, test)}
        tuned = {name: tensor.clone() for name, tensor in state.items()}
        base = {n: base_tensors.get(n.removeprefix("bert."), tuned[n]).float() for n in tuned}
        for mask in ("random, p = 0.9, q = 0.1", "magnitude, p = 0.99, q = 0.25"):
            deltas = {}
            for i, (name, tensor) in enumerate(base.items()):
                delta = (tuned[name] - tensor).flatten()
                if mask.startswith("random"):
                    kept = torch.rand(delta.shape, generator=torch.Generator().manual_seed(i)) < 0.1
                    positions, q = (kept & (delta != 0)).nonzero().squeeze(1), 0.1
                else:
                    positions, q = delta.abs().topk(round(0.01 * delta.numel())).indices.sort().values, 0.25
                deltas[name] = positions, delta[positions] / q
            for kind in KINDS:
                row = write_delta(folder / f"{task.name} {mask} {kind}", kind, deltas, base)
                for name, tensor in base.items():
                    state[name].copy_(tensor)
                put_delta(folder / f"{task.name} {mask} {kind}", base, state)
                yield {"task": task.name, "mask": mask, "kind": kind, "score": score(model, task, test)} | row


def report(rows: Iterator[dict[str, Any]], as_json: bool) -> None:
    """Print rows as they come, under a head where their keys change."""
    keys: list[str] = []
    for row in rows:
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if list(row) != keys:
            keys = list(row)
            print("| " + " | ".join(keys) + " |\n" + "|---" * len(keys) + "|")
        print(
            "| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else f"{v}" for v in row.values()) + " |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--p", nargs="+", type=float, default=[0.9, 0.99, 0.999], help="drop rates")
    parser.add_argument("--repeat", type=int, default=9, help="0: only sizes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, for CSR as for deltas")
    parser.add_argument("--real", type=Path, help="the folder of base, sentiment and intensity")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.real:
            report(real(arguments.real, Path(folder)), arguments.json)
            return
        for model in arguments.models:
            for drop in arguments.p:
                path = Path(folder) / f"{model} {drop}"
                path.mkdir()
                report(iter(synthetic(model, drop, arguments.repeat, path)), arguments.json)


if __name__ == "__main__":
    main()
