"""AdamR beside AdamW: step time and memory; and what it leaves of a real fine-tune after pruning.

    python -m benchmarks.pruning.adamr                     # step time and memory at MiniLM-L6's shapes, a minute
    python -m benchmarks.pruning.adamr --model bert-base   # the same at 109 M parameters; takes 8 GB
    python -m benchmarks.pruning.adamr --quality           # fine-tune, drop 99 % of the delta, score; minutes a row

Step times are the best of interleaved rounds on random gradients, in one thread unless told; memory is the peak of
anonymous pages of a process of its own, beyond that of AdamW. The tables go to stdout, progress to stderr.
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
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, PreTrainedModel

from benchmarks import ROOT, encoder, tasks
from benchmarks.process import measure
from deltamerge import AdamR

MODELS = {"minilm": (30522, 384, 1536, 6), "bert-base": (30522, 768, 3072, 12)}  # vocabulary, width, inner, layers
DENSITY = 0.01
MASK_SEEDS = 4
QS = (1.0, 0.5, 0.25, 0.12, 0.06)  # tried on the validation rows
Prune = Callable[[Tensor, torch.Generator], Tensor]


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
    """Least seconds a step; every round runs each variant once.

    In one thread these are seconds of CPU, which other work on the machine disturbs less; nothing else is waited for.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    named = parameters(model)
    optimizers = {variant.name: optimizer(variant, named) for variant in VARIANTS}
    seconds = dict.fromkeys(optimizers, float("inf"))
    for _ in range(rounds):
        for name, opt in optimizers.items():
            start = clock()
            opt.step()
            seconds[name] = min(seconds[name], clock() - start)
    return seconds


def peak_memory(model: str, variant: int) -> float:
    """Peak anonymous megabytes of a process that takes three steps."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-m", "benchmarks.pruning.adamr", "--model", model, "--one", str(variant)]
        return measure(
            arguments, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, Path(folder) / "log", 0.002
        ).anonymous


def speed(model: str, rounds: int) -> None:
    count = sum(p.numel() for p in parameters(model).values())
    copy = 4 * count / 1e6
    threads, cores = torch.get_num_threads(), os.cpu_count()
    print(f"{model}: {count / 1e6:.1f} M float32 parameters, one copy is {copy:.0f} MB")
    print(f"torch {torch.__version__}, {threads} of {cores} cores, best of {rounds} steps")
    seconds = step_times(model, rounds)
    peaks = {variant.name: peak_memory(model, i) for i, variant in enumerate(VARIANTS)}
    first = VARIANTS[0].name
    print(f"{'':28}{'ms / step':>10}{'ratio':>8}{'MB more':>9}{'copies':>8}")
    for name, value in seconds.items():
        more = peaks[name] - peaks[first]
        ratio = value / seconds[first]
        print(f"{name:28}{1e3 * value:10.1f}{ratio:8.2f}{more:9.0f}{more / copy:8.2f}")


def dare(delta: Tensor, generator: torch.Generator) -> Tensor:
    return delta * (torch.rand(delta.shape, generator=generator) < DENSITY) / DENSITY


def magnitude(delta: Tensor, generator: torch.Generator, q: float = 1.0) -> Tensor:
    k = round(DENSITY * delta.numel())
    keep = delta.abs().flatten().topk(k).indices
    kept = torch.zeros_like(delta).flatten()
    kept[keep] = delta.flatten()[keep] / q
    return kept.view_as(delta)


def quality(task_name: str, steps: int, rows: list[tuple[str, float]]) -> None:
    """Scores of fine-tunes, whole and with 1 % of the delta of every tensor but the head."""
    task = tasks.TASKS[task_name]
    base = tasks.WORK / "base"
    if not base.exists():
        encoder.build_base(base)
    test = tasks.rows(task.name, "test")
    print(f"{task.name}: {steps} steps, lr {task.lr:g}, {len(test)} test rows; {task.metric} in %, density {DENSITY}")
    print(f"{'':16}{'whole':>7}{'DARE':>13}{'magnitude':>11}{'rescaled':>18}{'mean |Δ|':>11}{'last √v̄':>11}")
    for regularizer, decay in rows:
        row = quality_row(base, task, test, steps, regularizer, decay)
        label = "AdamW" if regularizer == "adamw" else f"{regularizer} λ = {decay:g}"
        print(f"{label:16}{row}", flush=True)


def quality_row(base: Path, task: tasks.Task, test: list[tasks.Row], steps: int, regularizer: str, decay: float) -> str:
    made: list[torch.optim.Optimizer] = []

    def factory(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
        if regularizer == "adamw":
            made.append(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01))
        else:
            made.append(AdamR.for_model(model, base, lr=lr, decay=decay, regularizer=regularizer))
        return made[0]

    with tempfile.TemporaryDirectory() as folder:
        tuned = Path(folder) / "tuned"
        encoder.fine_tune(base, task, tuned, steps=steps, factory=factory)
        model = encoder.load(tuned)
        tokenizer = AutoTokenizer.from_pretrained(tuned)
    start = {f"bert.{n}": t.float() for n, t in BertModel.from_pretrained(base).state_dict().items()}
    deltas = {n: p.detach() - start[n] for n, p in model.named_parameters() if n in start}

    def score(prune: Prune, rows: list[tasks.Row] = test, seed: int = 0) -> float:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, delta in deltas.items():
                model.get_parameter(name).copy_(start[name] + prune(delta, generator))
        return encoder.score(model, task, rows, tokenizer=tokenizer)

    dares = [score(dare, seed=seed) for seed in range(MASK_SEEDS)]
    validation = tasks.rows(task.name, "validation")
    q = max(QS, key=lambda q: score(partial(magnitude, q=q), validation))
    size = sum(d.abs().sum().item() for d in deltas.values()) / sum(d.numel() for d in deltas.values())
    root_v = made[0].root_v if isinstance(made[0], AdamR) else None
    root = "" if root_v is None else f"{root_v.item():.1e}"
    return (
        f"{score(lambda delta, _: delta):7.1f}{mean(dares):7.1f} ±{stdev(dares):4.1f}"
        f"{score(magnitude):11.1f}{score(partial(magnitude, q=q)):7.1f} (q = {q:4g}){size:11.1e}{root:>11}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--steps", type=int, default=400)
    default_rows = ["adamw:0", "l2:0.003", "l2:0.01", "l2:0.03", "l1:1e-5", "l1:3e-5", "l1:1e-4"]
    parser.add_argument("--rows", nargs="+", default=default_rows, help="adamw:0 or REGULARIZER:LAMBDA")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
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
