"""Merges over a quantised base beside the same merge over the same base in bfloat16: time, CPU and peak memory.

    python -m benchmarks.speed.quantised [--layers 2] [--schemes bf16 fp8 int4] [--methods task_arithmetic ties]
    python -m benchmarks.speed.quantised --model gpt-oss-20b --schemes bf16 mxfp4
    python -m benchmarks.speed.quantised --layers 32 --sparse --schemes fp8 --methods dare_ties --memory 1GB

Models have Llama 7B's shapes, cut to some layers, or gpt-oss-20b's with a quarter of its experts: a base, its quantised
forms, and two fine-tunes in bfloat16.
With `--sparse` weights are holes in their files that read as zeros and take no disk; only scales are real (FP8 and
int4), so that a merge of all 32 layers takes the room of its output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.process import Run, measure, warm
from benchmarks.speed.quantised_forms import SETTINGS, Entry, GptOss, entries
from benchmarks.synthetic import Size, split

SHARD = 5_000_000_000
LLAMA, GPT_OSS = "llama-7b", "gpt-oss-20b"
EXPERTS = 8  # of gpt-oss: a quarter
METHODS = {
    "task_arithmetic": "{weight: 0.5}", "ties": "{weight: 0.5, density: 0.1}", "linear": "{weight: 0.5}",
    "dare_ties": "{weight: 0.5, density: 0.1}",
}  # fmt: skip


def write_model(folder: Path, size: Size | GptOss, scheme: str, model: int, sparse: bool) -> None:
    folder.mkdir(parents=True)
    settings = {"quantization_config": SETTINGS[scheme]} if SETTINGS[scheme] else {}
    (folder / "config.json").write_text(json.dumps(size.config() | settings))
    shards = split(size.shapes(), SHARD)
    table: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = size.shapes()
        made = [entry for name in names for entry in entries(name, shapes[name], scheme, model, sparse)]
        _write(folder / file, made)
        table |= {name: file for name, _ in made}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def _write(path: Path, made: list[tuple[str, Entry]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, held) in made:
        nbytes = held if isinstance(held, int) else held.nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, (_, _, held) in made:
            out.seek(held, 1) if isinstance(held, int) else out.write(held.tobytes())
        out.truncate()


def recipe_of(folder: Path, base: str, method: str) -> Path:
    path = folder / f"{base}-{method}.yaml"
    models = "".join(f"  - {{model: ./{name}, parameters: {METHODS[method]}}}\n" for name in ("tune-a", "tune-b"))
    path.write_text(f"merge_method: {method}\nbase_model: ./{base}\nmodels:\n{models}")
    return path


def merge(folder: Path, base: str, method: str, memory: str | None) -> Run:
    if memory is None:
        warm([folder / name for name in (base, "tune-a", "tune-b")])
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ["run", str(recipe_of(folder, base, method)), "--out", str(folder / "out"), "-q"]
    arguments += ["--memory", memory] if memory else []
    found = measure([sys.executable, "-m", "deltamerge", *arguments], environment, folder / "log")
    shutil.rmtree(folder / "out")
    return found


def report(method: str, runs: Mapping[str, list[Run]], read: Mapping[str, int], parameters: int) -> None:
    """Medians; `per byte` is CPU over bytes read, as a multiple of the bfloat16 merge's."""
    cpu = {scheme: statistics.median(run.cpu for run in found) for scheme, found in runs.items()}
    for scheme, found in runs.items():
        wall = statistics.median(run.wall for run in found)
        anonymous = max(run.anonymous for run in found)
        line = (
            f"{method:<16} {scheme:<5} wall {wall:6.2f} s  CPU {cpu[scheme]:6.2f} s  {anonymous:5.0f} MB of its own  "
        )
        line += f"{read[scheme] / 1e9:5.1f} GB read  {1e9 * cpu[scheme] / parameters:5.2f} ns a parameter"
        if "bf16" in runs and scheme != "bf16":
            ratio = cpu[scheme] / cpu["bf16"]
            line += f"  CPU × {ratio:.2f}, per byte × {ratio * read['bf16'] / read[scheme]:.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".quantised"))
    parser.add_argument("--model", default=LLAMA, choices=[LLAMA, GPT_OSS], help="shapes; mxfp4: gpt-oss alone")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32_000, help="fewer, where few layers are to count for many")
    parser.add_argument("--schemes", nargs="+", default=["bf16", "fp8", "int4"], choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties", "dare_ties"], choices=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    options = parser.parse_args()
    size: Size | GptOss = Size(4096, 11008, options.layers, 32, 32, options.vocab, SHARD)
    if options.model == GPT_OSS:
        size = GptOss(options.layers, EXPERTS, options.vocab)
    folder = options.folder
    for number, name in ((0, ""), (1, "tune-a"), (2, "tune-b")):
        for scheme in ["bf16"] if name else options.schemes:
            if not (folder / (name or scheme)).exists():
                write_model(folder / (name or scheme), size, scheme, number, options.sparse)
    sizes = {
        name.name: sum(f.stat().st_size for f in name.glob("*.safetensors"))
        for name in folder.iterdir()
        if name.is_dir()
    }
    read = {scheme: sizes[scheme] + sizes["tune-a"] + sizes["tune-b"] for scheme in options.schemes}
    for method in options.methods:
        runs: dict[str, list[Run]] = {scheme: [] for scheme in options.schemes}
        for _ in range(options.rounds):
            for scheme in options.schemes:
                runs[scheme].append(merge(folder, scheme, method, options.memory))
        report(method, runs, read, size.parameters)
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
