"""Table 13: what a pruned delta takes on disk, and how long it takes to be in the model."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.paper import published
from benchmarks.paper.frame import Experiment, Record, Setting, table
from benchmarks.serving import delta

MODEL = "BERT-base"
DROPS = (0.9, 0.99, 0.999)
KINDS = ("replace", "bfloat16", "int8")


def table_13(setting: Setting) -> Record:
    drops = setting.pick(DROPS, DROPS[:1])
    return {f"{p:g}": setting.once(f"storage-{p:g}", {"kinds": KINDS}, lambda p=p: stored(setting, p)) for p in drops}


def stored(setting: Setting, drop: float) -> list[dict[str, Any]]:
    """Everything that `delta.compare` measures, and the dense checkpoint in float32."""
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    base, deltas = delta.drawn(tensors(setting), drop)
    with tempfile.TemporaryDirectory(dir=setting.work) as work:
        folder = Path(work)
        rows = delta.compare(base, deltas, setting.pick(3, 1), folder, KINDS)
        dense = folder / "dense.safetensors"
        save_file(base, dense)

        def load() -> None:
            for name, tensor in load_file(dense).items():
                base[name].copy_(tensor)

        wall, cpu = delta.measure({"dense": load}, setting.pick(3, 1))["dense"]
        size = dense.stat().st_size
        first = {"kind": "dense", "MB": size / 1e6, "MiB": size / 2**20, "ms": 1e3 * wall, "CPU ms": 1e3 * cpu}
        return [first, *rows]


def tensors(setting: Setting) -> Iterator[tuple[str, tuple[int, ...]]]:
    if setting.toy:
        yield from ((f"layer.{i}.weight", (64, 48)) for i in range(3))
    else:
        yield from delta.shapes(*delta.MODELS[MODEL])


def show(record: Record) -> str:
    names = {
        "dense": "dense, float32",
        "CSR, torch.save": "CSR, float32, torch.save",
        "CSR, safetensors": "CSR, float32, safetensors",
        "replace": "deltamerge, final values, float32",
        "bfloat16": "deltamerge, bfloat16",
        "int8": "deltamerge, int8",
    }
    rows = []
    for p, found in record.items():
        mib, seconds = published.STORAGE[MODEL][float(p)], published.LOAD_SECONDS[float(p)]
        rows.append([p, "*CSR (paper)*", mib, None, f"{1e3 * seconds:.0f}", None])
        for row in found:
            rows.append([p, names[row["kind"]], row["MiB"], f"{row.get('error', 0):.1%}", *timed(row)])
    dense = published.STORAGE[MODEL][0.0], published.LOAD_SECONDS[0.0]
    return table(["p", "stored as", "MiB", "error", "load, ms", "CPU ms"], rows) + (
        f"\n{MODEL}'s shapes, synthetic deltas, one thread; load is from opening the file (in the page cache) to the "
        f"last tensor added to the base. Other work shared the machine: read the processor's time. In the paper the "
        f"dense checkpoint has {dense[0]} MB and loads in {1e3 * dense[1]:.0f} ms. *Error* is that of the stored "
        f"values, ‖Δ − stored‖/‖Δ‖. Final values make the pruned model exactly, in its own dtype.\n"
    )


def timed(row: dict[str, Any]) -> list[str]:
    return [f"{row[key]:.0f}" for key in ("ms", "CPU ms")]


EXPERIMENTS = (Experiment("table-13", "Table 13: storage and load time", table_13, show, 0.4),)
