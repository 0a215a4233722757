"""What rounding to bfloat16 takes of a budget's delta of SmolLM2's fine-tunes, to the nearest and stochastically.

    python -m benchmarks.pruning.rounding sorting-slow needle --ratios 32 128 512

Each artifact is `extract --ratio`, without rows. Base + delta stays in float32, or is rounded to the nearest, or is
rounded as the artifact says. The model computes in float32. KL and score are of 100 validation rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import process, smollm2
from benchmarks.pruning import quality
from benchmarks.pruning.field import State
from benchmarks.pruning.subjects import Decoder
from deltamerge.apps.chain.extract import extract
from deltamerge.formats.delta.parts import matrix_shape, sum_of
from deltamerge.models.delta_file import DeltaFile
from deltamerge.run.apply import apply
from deltamerge.run.options import Options

ROWS = slice(100, 200)  # of validation; none of them is calibrated on


def states(one: Decoder, ratio: int, work: Path) -> dict[str, State]:
    """Base + delta by its rounding."""
    extract(str(one.tuned), str(one.base), work / "delta", size={"ratio": ratio}, options=Options(workers=1))
    apply(str(work / "delta"), str(one.base), work / "applied", workers=1)
    sums = {name: tensor.float() for name, tensor in load_file(one.base / "model.safetensors").items()}
    for name, entry in DeltaFile.open(work / "delta").entries.items():
        made = sum_of(entry.record.parts, entry.values, *matrix_shape(entry.record.shape)).values(0, entry.size)
        sums[name] = sums[name] + torch.from_numpy(np.asarray(made)).view(sums[name].shape)
    return {
        "float32": sums,
        "nearest": {name: tensor.bfloat16() for name, tensor in sums.items()},
        "stochastic": load_file(work / "applied" / "model.safetensors"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="fine-tunes of SMOLLM2")
    parser.add_argument("--ratios", type=int, nargs="+", default=[32, 128, 512])
    asked = parser.parse_args()
    quality.quiet()
    for name in asked.names:
        one = Decoder(f"smollm2:{name}", 1)
        one.model = AutoModelForCausalLM.from_pretrained(one.tuned, dtype=torch.float32)
        one.see(smollm2.rows(one.task, "validation")[ROWS])
        print(f"{name}: the fine-tune's score is {one.score:.0f}", flush=True)
        for ratio in asked.ratios:
            with tempfile.TemporaryDirectory() as work:
                for rounding, state in states(one, ratio, Path(work)).items():
                    kl, score = one.measure(state)
                    print(f"1/{ratio} {rounding}: KL {kl:.4g}, score {score:.0f}", flush=True)


if __name__ == "__main__":
    process.keep_pages()
    main()
