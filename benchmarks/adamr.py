"""AdamR beside AdamW: step time and memory; and what it leaves of a real fine-tune after pruning.

    python benchmarks/adamr.py                     # step time and memory, MiniLM-L6 shapes (22.6 M parameters), a minute
    python benchmarks/adamr.py --model bert-base   # 109 M parameters, 8 GB
    python benchmarks/adamr.py --quality           # fine-tune, drop 99 % of the delta, score; a few minutes a row

Times are medians over interleaved rounds on random gradients; memory is the peak of anonymous pages of a process of
its own, beyond that of AdamW. The table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from process import measure
from torch import Tensor, nn

from deltamerge.optim import AdamR

MODELS = {"minilm": (30522, 384, 1536, 6), "bert-base": (30522, 768, 3072, 12)}  # vocabulary, width, inner, layers
DENSITY = 0.01
MASK_SEEDS = 4


@dataclass(frozen=True)
class Variant:
    """An optimizer of the table: AdamW if `options` is None. `stored` is the dtype in which θ_P is given."""

    name: str
    options: dict[str, Any] | None = field(default_factory=dict)
    stored: torch.dtype = torch.float32
    foreach: bool = True


VARIANTS = (
    Variant("AdamW, foreach", None),
    Variant("AdamW, loop", None, foreach=False),
    Variant("AdamR λ = 0", {"decay": 0.0}),
    Variant("AdamR l2"),
    Variant("AdamR l1", {"regularizer": "l1"}),
    Variant("AdamR l2, θ_P in bfloat16", {"pretrained_dtype": torch.bfloat16}, torch.bfloat16),
    Variant("AdamR l1, θ_P in bfloat16", {"regularizer": "l1", "pretrained_dtype": torch.bfloat16}, torch.bfloat16),
    Variant("AdamR l2, loop", foreach=False),
)


def parameters(model: str) -> dict[str, nn.Parameter]:
    """Random weights with random gradients in the shapes of a BERT."""
    vocabulary, width, inner, layers = MODELS[model]
    shapes: dict[str, tuple[int, ...]] = {"words": (vocabulary, width), "positions": (512, width)}
    for i in range(layers):
        shapes |= {f"{i}.{part}": (width, width) for part in ("query", "key", "value", "output")}
        shapes |= {f"{i}.up": (inner, width), f"{i}.down": (width, inner), f"{i}.up.bias": (inner,)}
        shapes |= {f"{i}.bias.{j}": (width,) for j in range(9)}
    generator = torch.Generator().manual_seed(0)
    named = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    for p in named.values():
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)
    return named


def optimizer(variant: Variant, named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    if variant.options is None:
        return torch.optim.AdamW(named.values(), lr=1e-5, weight_decay=0.0, foreach=variant.foreach)
    generator = torch.Generator().manual_seed(1)
    pretrained = {n: torch.randn(p.shape, generator=generator, dtype=variant.stored) for n, p in named.items()}
    return AdamR(named.items(), pretrained, lr=1e-5, foreach=variant.foreach, **variant.options)


def step_times(model: str, rounds: int) -> dict[str, float]:
    """Median seconds a step; every round runs each variant once, two rounds of warm-up."""
    named = parameters(model)
    optimizers = {variant.name: optimizer(variant, named) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds + 2):
        for name, opt in optimizers.items():
            start = time.perf_counter()
            opt.step()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[2:]) for name, values in seconds.items()}


def peak_memory(model: str, variant: int) -> float:
    """Peak anonymous megabytes of a process that takes three steps."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, __file__, "--model", model, "--one", str(variant)]
        return measure(arguments, {"OMP_NUM_THREADS": "1"}, Path(folder) / "log", 0.002).anonymous


def speed(model: str, rounds: int) -> None:
    count = sum(p.numel() for p in parameters(model).values())
    print(f"{model}: {count / 1e6:.1f} M float32 parameters, one copy is {4 * count / 1e6:.0f} MB; "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")  # fmt: skip
    seconds = step_times(model, rounds)
    peaks = {variant.name: peak_memory(model, i) for i, variant in enumerate(VARIANTS)}
    first = VARIANTS[0].name
    print(f"{'':28}{'ms / step':>10}{'ratio':>8}{'MB more':>9}{'copies':>8}")
    for name, value in seconds.items():
        more = peaks[name] - peaks[first]
        print(f"{name:28}{1e3 * value:10.1f}{value / seconds[first]:8.2f}{more:9.0f}{more / (4 * count / 1e6):8.2f}")


def dare(delta: Tensor, generator: torch.Generator) -> Tensor:
    return delta * (torch.rand(delta.shape, generator=generator) < DENSITY) / DENSITY


def magnitude(delta: Tensor, generator: torch.Generator) -> Tensor:
    k = round(DENSITY * delta.numel())
    keep = delta.abs().flatten().topk(k).indices
    kept = torch.zeros_like(delta).flatten()
    kept[keep] = delta.flatten()[keep]
    return kept.view_as(delta)


def quality(task_name: str, steps: int, rows: list[tuple[str, float]]) -> None:
    """Scores of fine-tunes with AdamW and AdamR: whole, and with 1 % of the delta of every tensor but the head."""
    import encoder
    import tasks

    task = tasks.TASKS[task_name]
    base = tasks.WORK / "base"
    if not base.exists():
        encoder.build_base(base)
    test = tasks.rows(task.name, "test")
    print(f"{task.name}: {steps} steps, lr {task.lr}, {len(test)} test rows, density {DENSITY}; {task.metric} in %")
    print(f"{'':16}{'whole':>7}{'DARE':>14}{'magnitude':>11}{'mean |Δ|':>11}{'sqrt(v̄)':>11}")
    for regularizer, decay in rows:
        made: list[torch.optim.Optimizer] = []

        def factory(model: Any, lr: float, regularizer: str = regularizer, decay: float = decay) -> Any:
            made.append(
                torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
                if regularizer == "adamw"
                else AdamR.for_model(model, base, lr=lr, decay=decay, regularizer=regularizer)
            )
            return made[-1]

        with tempfile.TemporaryDirectory() as folder:
            tuned = Path(folder) / "tuned"
            encoder.fine_tune(base, task, tuned, steps=steps, optimizer_factory=factory)
            model = encoder.load(tuned)
            start = encoder.load(tuned).state_dict()
            start |= {f"bert.{n}": t.float() for n, t in encoder.BertModel.from_pretrained(base).state_dict().items()}
            deltas = {n: p.detach() - start[n] for n, p in model.named_parameters() if n.startswith("bert.")}
            score: Callable[[], float] = partial(encoder.score, model, task, test)
            whole = score()

            def pruned(prune: Callable[..., Tensor], seed: int) -> float:
                generator = torch.Generator().manual_seed(seed)
                with torch.no_grad():
                    for name, delta in deltas.items():  # noqa: B023 (called before the next round)
                        model.get_parameter(name).copy_(start[name] + prune(delta, generator))  # noqa: B023
                return score()  # noqa: B023

            dares = [pruned(dare, seed) for seed in range(MASK_SEEDS)]
            largest = pruned(magnitude, 0)
        size = sum(d.abs().sum().item() for d in deltas.values()) / sum(d.numel() for d in deltas.values())
        root = made[0].root_v.item() if isinstance(made[0], AdamR) and made[0].root_v is not None else float("nan")
        label = "AdamW" if regularizer == "adamw" else f"{regularizer} λ = {decay:g}"
        print(f"{label:16}{whole:7.1f}{mean(dares):7.1f} ± {stdev(dares):4.1f}{largest:11.1f}{size:11.1e}{root:11.1e}",
              flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--steps", type=int, default=400)
    default_rows = ["adamw:0", "l2:0.003", "l2:0.01", "l2:0.03", "l1:1e-5", "l1:3e-5", "l1:1e-4"]
    parser.add_argument("--rows", nargs="+", default=default_rows, help="adamw:0 or REGULARIZER:LAMBDA")
    arguments = parser.parse_args()
    if arguments.one is not None:
        named = parameters(arguments.model)
        chosen = optimizer(VARIANTS[arguments.one], named)
        for _ in range(3):
            chosen.step()
    elif arguments.quality:
        rows = [(row.partition(":")[0], float(row.partition(":")[2])) for row in arguments.rows]
        quality(arguments.task, arguments.steps, rows)
    else:
        speed(arguments.model, arguments.rounds)


if __name__ == "__main__":
    main()
