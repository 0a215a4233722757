"""Merges of LoRAs in their core beside the same merges of whole models: CPU seconds, memory, and how far apart.

    python -m benchmarks.merging.loras FOLDER                 of SMOLLM2/base (or .smollm2/base), three LoRAs of rank 16
    python -m benchmarks.merging.loras FOLDER iso_c svc       some methods

The LoRAs are random, of every linear layer. Each is also merged into a float32 copy of the base, with nothing to
round; a merge is a process of `deltamerge run` on one thread.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks import process, smollm2
from benchmarks.pruning.quality import quiet

LAYER = re.compile(r"layers\.\d+\..*_proj\.weight$")
COUNT, RANK, ALPHA = 3, 16, 32
METHODS = ("iso_c", "tsv_m", "svc", "wudi")


def lora(base: Path, out: Path, seed: int) -> Path:
    """The folder of a random LoRA whose updates have about a hundredth of each weight's length."""
    if not out.exists():
        generator, made = torch.Generator().manual_seed(seed), {}
        for name, weight in load_file(base / "model.safetensors").items():
            if LAYER.search(name):
                rows, columns = weight.shape
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                size = 0.01 * float(weight.float().norm()) / (RANK * rows * columns) ** 0.5 * RANK / ALPHA
                made[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
                made[f"{stem}.lora_B.weight"] = size * torch.randn(rows, RANK, generator=generator)
        out.mkdir()
        save_file(made, out / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
        (out / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def merged(base: Path, models: list[str], method: str, out: Path) -> process.Run:
    recipe = {"base_model": str(base), "merge_method": method, "models": [{"model": one} for one in models]}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe | {"dtype": "float32"}), encoding="utf-8")
    command = [sys.executable, "-m", "deltamerge", "run", str(path), "--out", str(out), "--workers", "1", "--force"]
    return process.measure(command, {"OMP_NUM_THREADS": "1"}, out.with_suffix(".log"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for LoRAs and merges, 4 GB")
    parser.add_argument("methods", nargs="*", default=METHODS)
    asked = parser.parse_args()
    quiet()
    asked.folder.mkdir(parents=True, exist_ok=True)
    base = asked.folder / "base"
    if not base.exists():
        smollm2.deltamerge("convert", smollm2.base(), base, "--dtype", "float32")
    loras = [lora(base, asked.folder / f"lora-{seed}", seed) for seed in range(COUNT)]
    whole = [asked.folder / f"whole-{seed}" for seed in range(COUNT)]
    for one, out in zip(loras, whole, strict=True):
        if not out.exists():
            smollm2.deltamerge("convert", f"{base}+{one}", out, "--dtype", "float32")
    start = load_file(base / "model.safetensors")
    print("| method | in the core, CPU s | MB | of whole models, CPU s | MB | largest difference of a delta |")
    print("|---|---|---|---|---|---|")
    for method in asked.methods:
        runs = [merged(base, [f"{base}+{one}" for one in loras], method, asked.folder / "core")]
        runs.append(merged(base, [str(one) for one in whole], method, asked.folder / "full"))
        a, b = (load_file(asked.folder / name / "model.safetensors") for name in ("core", "full"))
        apart = max(
            float((a[name] - b[name]).norm() / (b[name] - weight).norm())
            for name, weight in start.items()
            if LAYER.search(name)
        )
        costs = " | ".join(f"{run.cpu:.1f} | {run.anonymous:.0f}" for run in runs)
        print(f"| {method} | {costs} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
