"""What finding the sums of `tokenizer.transplant` takes at a real size: CPU milliseconds of one thread a token.

    python -m benchmarks.speed.pursuit_speed [--common 110000] [--width 4096] [--k 64] [--tokens 128]

The rows are drawn at random in bfloat16. Tokens do not depend on one another, so that their number multiplies the time.
"""

from __future__ import annotations

import argparse
import time

import torch

from deltamerge.plan.transplant import Atoms, nearest, pursuit


def main() -> None:
    """A line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("common", 110_000), ("width", 4096), ("k", 64), ("tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.empty(options.common + options.tokens, options.width, dtype=torch.bfloat16)
    rows.normal_(generator=generator)
    atoms, targets = rows[: options.common], rows[options.common :]
    for name, method, screen in (("omp", pursuit, None), ("common", nearest, False)):
        start = time.process_time()
        method(targets, Atoms.of(atoms, screen=screen), options.k)
        print(f"{name}: {1e3 * (time.process_time() - start) / options.tokens:.1f} ms a token", flush=True)


if __name__ == "__main__":
    main()
