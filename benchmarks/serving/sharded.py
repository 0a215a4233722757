"""What a version of a 0.5 B model costs its training step, written by processes that each hold a part of it.

    python -m benchmarks.serving.sharded [--processes 2] [--tokens 64] [--rounds 4] [--size M] [--folder .bench/sharded]

A random Llama in bfloat16 is the base; FSDP2 spreads its float32 masters over processes on the CPU (torchrun, gloo). A
step is forward and backward of `--tokens` tokens a process, and every parameter moves by 1e-6 in its gradient's
direction, as AdamW's steps are about. Steps without a writer and with one come in turns. Of each the first process
notes seconds and its processor time, of `write` what the training thread waits, and of the last version its bytes. The
processor's cores are shared by training and writing, which is not so where a GPU trains.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.synthetic import SIZES


def moved(parameter: Any) -> None:
    """Move a parameter against its gradient's signs, and let the gradient go."""
    import torch

    with torch.no_grad():
        parameter.add_(parameter.grad.sign_(), alpha=-1e-6)
    parameter.grad = None


def train(folder: Path, size: str, tokens: int, rounds: int) -> None:
    """One process's training."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, LlamaConfig

    from deltamerge.apps.train.sharded import ShardedDeltaWriter

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    if not rank and not (folder / "base").exists():
        torch.manual_seed(0)
        config = LlamaConfig(**SIZES[size].config())
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "base")
    torch.distributed.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(moved)
    generator, rows = torch.Generator().manual_seed(rank), list[dict[str, Any]]()
    with ShardedDeltaWriter(folder / "run", model, base=folder / "base") as writer:
        for number in range(2 * rounds + 1):
            ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)
            torch.distributed.barrier()
            begun, used = time.perf_counter(), time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
            trained, used, waited = time.perf_counter(), time.process_time() - used, 0.0
            written = number % 2 == 0
            if written:
                writing = writer.write(step=number)
                waited = time.perf_counter() - trained
            rows.append({
                "written": written, "seconds": time.perf_counter() - begun, "step": trained - begun, "waited": waited,
                "processor": used,
            })  # fmt: skip
            if not rank:
                print(json.dumps(rows[-1]), flush=True)
        made = writing.result()
        if not rank:
            found = {"rows": rows, "changed": made.changed, "elements": made.elements, "bytes": made.nbytes}
            (folder / "sharded.json").write_text(json.dumps(found, indent=1) + "\n")
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--size", choices=SIZES, default="M")
    parser.add_argument("--folder", type=Path, default=Path(".bench/sharded"))
    given = parser.parse_args()
    if "RANK" in os.environ:
        train(given.folder, given.size, given.tokens, given.rounds)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.processes)]
    subprocess.run([*command, "-m", "benchmarks.serving.sharded", *sys.argv[1:]], check=True)
    found = json.loads((given.folder / "sharded.json").read_text())
    # A version is written in the background of the step that follows: that step's time has its cost.
    rows = found["rows"][1:-1]
    for what in ("step", "processor"):
        beside = statistics.median(row[what] for row in rows if not row["written"])
        alone = statistics.median(row[what] for row in rows if row["written"])
        print(f"{what}: {alone:.2f} s alone, {beside:.2f} s beside the writing of a version, {beside / alone - 1:+.1%}")
    waited = statistics.median(row["waited"] for row in found["rows"] if row["written"])
    print(
        f"waited for in the training thread: {waited:.2f} s; changed {found['changed'] / found['elements']:.2%}, "
        f"{found['bytes'] / 1e6:.1f} MB of {2 * found['elements'] / 1e6:.0f}"
    )


if __name__ == "__main__":
    main()
