"""What a version of a chain costs a training run, beside `save_pretrained`: seconds of processor time, and bytes.

    python -m benchmarks.serving.chain BASE [TEACHER] [--steps 8] [--lr 1e-5] [--folder .bench/chain] [--json PATH]

BASE is an encoder's folder in bfloat16 whose float32 masters are trained by AdamW: towards the hidden states of
TEACHER, or with no teacher towards those of the base with noise. Every step is written by `DeltaWriter` and saved by
`save_pretrained` (in bfloat16, the folder removed after). Times are processor time: of the caller's thread in `write`,
of the thread in the background, of `save_pretrained`; `apply` is `Delta.apply_` from one version to the next, its
hashes checked. Last come the bytes that other projects' layouts take of the same versions (medians of those but the
first).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

import deltamerge as dm
from deltamerge.formats.weight_files import is_weights
from deltamerge.models.chain.folder import line
from deltamerge.models.chain.mirror import Mirror
from deltamerge.models.references import open_origin


def batches(vocabulary: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, vocabulary, (16, 32), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def targets(base: Any, teacher: Path | None, rows: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    model = base if teacher is None else AutoModel.from_pretrained(teacher, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        found = [model.eval()(**row).last_hidden_state for row in rows]
    return [f + 0.3 * torch.randn(f.shape, generator=generator) for f in found] if teacher is None else found


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if is_weights(path.name))


def measure(base: Path, teacher: Path | None, folder: Path, steps: int, rate: float) -> dict[str, Any]:
    """A row for every step, and medians."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(folder / "base32")
    AutoModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder / "base")
    rows = batches(model.config.vocab_size, steps)
    wanted = targets(model, teacher, rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    served = AutoModel.from_pretrained(folder / "base", dtype=torch.bfloat16)
    found = []
    with dm.DeltaWriter(folder / "chain", model, base=folder / "base") as writer:
        for number, (row, target) in enumerate(zip(rows, wanted, strict=True), 1):
            begun = time.process_time()
            loss = (model.train()(**row).last_hidden_state - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step = time.process_time() - begun
            whole, begun = time.process_time(), time.thread_time()
            future = writer.write(step=number)
            called = time.thread_time() - begun
            written = future.result()
            both = time.process_time() - whole
            begun = time.process_time()
            half = {
                name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in model.state_dict().items()
            }
            model.save_pretrained(folder / "saved", state_dict=half)
            saved = time.process_time() - begun
            begun = time.process_time()
            dm.load_delta(written.path).apply_(served.state_dict())
            applied = time.process_time() - begun
            found.append(
                {
                    "step": step, "write": called, "background": both - called, "save_pretrained": saved,
                    "apply": applied, "bytes": written.nbytes, "saved_bytes": folder_bytes(folder / "saved"),
                    "changed": written.changed / written.elements,
                }
            )  # fmt: skip
            shutil.rmtree(folder / "saved")
    mirrors = {}
    chain = line(folder / "chain" / f"{steps:06d}")
    origin = open_origin(str(folder / "base"))
    for style in ("slime", "slime:overwrite", "skyrl"):
        with Mirror(folder / style.replace(":", "-"), style) as mirror:
            mirrors[style] = statistics.median(one.nbytes for one in mirror.catch_up(chain, origin, 1)[1:])
    return {
        "mirrors": mirrors,
        "rows": found,
        **{key: statistics.median(row[key] for row in found[1:]) for key in found[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("teacher", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--folder", type=Path, default=Path(".bench/chain"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = measure(options.base, options.teacher, options.folder, options.steps, options.lr)
    for key in ("step", "write", "background", "save_pretrained", "apply"):
        print(f"{key:16} {made[key] * 1000:8.1f} ms")
    whole = f"{made['saved_bytes'] / 1e6:.1f} MB, {made['changed']:.2%} changed"
    print(f"{'bytes':16} {made['bytes'] / 1e3:8.1f} kB of {whole}")
    for style, size in made["mirrors"].items():
        print(f"{style:16} {size / 1e3:8.1f} kB, {size / made['bytes']:.2f} of the chain's")
    if options.json:
        options.json.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
