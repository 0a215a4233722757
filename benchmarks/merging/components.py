"""Coefficients by singular direction beside those by row and by layer, all fitted alike: what each keeps of experts.

    python -m benchmarks.merging.components                 from the deltas themselves, and from iso_c
    python -m benchmarks.merging.components iso_c row       those whose names have these words

A factor of every singular direction of every delta, Σ_i U_i diag(c_i σ_i) V_iᵀ, is what AdaRank selects (ICLR 2026).
Here as in the package the factors are fitted without labels: the merge shall answer each task's rows as its expert
does. The experts are the family `choose` of words.py, scored on validation rows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import kl_div, mse_loss

from benchmarks import RESULTS, encoder
from benchmarks.merging import words
from benchmarks.merging.scores import encoder_of, write

FILE = RESULTS / "merging_components.json"
ROWS, HELD, STEP, STEPS, PATIENCE = 50, 10, 32, 24, 5
STARTS = {"task_arithmetic": 0.4, "iso_c": 1.0}  # of each delta; of what iso_c makes at the λ of its rule
Parts = tuple[Tensor, ...]


class Factors:
    """The factors of one tensor's deltas."""

    def __init__(self, scope: str, base: Tensor, deltas: Sequence[Tensor], starts: Sequence[float]) -> None:
        self.base, self.parts = base, list[Parts]()
        size = {"layer": [1] * base.dim(), "row": [len(base), 1], "component": [min(base.shape)]}[scope]
        start = torch.tensor(starts).view(-1, *[1] * len(size))
        self.values = start.expand(-1, *size).clone().requires_grad_(True)
        for delta in deltas:
            if scope == "component":
                left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
                self.parts.append(((left * values).float(), right.float()))
            else:
                self.parts.append((delta,))

    def weight(self) -> Tensor:
        total = self.base
        for factor, part in zip(self.values, self.parts, strict=True):
            total = total + ((part[0] * factor) @ part[1] if len(part) == 2 else factor * part[0])
        return total


class Task:
    """One expert's rows without labels, and its answers to them."""

    def __init__(self, family: words.Family, name: str) -> None:
        texts = words.rows_of(name, "train")[:ROWS]
        self.family, self.name, self.scale = family, name, 1.0
        parts = (texts[HELD:], texts[:HELD])
        with torch.no_grad():
            self.batches = [encoder.encode(family.tokenizer, some) for some in parts]
            expert = encoder_of(family.folders[name])
            self.answers = [self.logits(expert, batch) for batch in self.batches]

    def logits(self, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        pool, pool_bias, last, last_bias = self.family.heads[self.name]
        hidden = functional_call(self.family.model, dict(weights), (), dict(batch)).last_hidden_state[:, 0]
        return torch.tanh(hidden @ pool.T + pool_bias) @ last.T + last_bias

    def distance(self, weights: Mapping[str, Tensor], held: bool, rows: Tensor | None = None) -> Tensor:
        """Distance of the answers from the expert's, as a share of the base's."""
        batch, answers = self.batches[held], self.answers[held]
        if rows is not None:
            batch, answers = {key: value[rows] for key, value in batch.items()}, answers[rows]
        ours = self.logits(weights, batch)
        if answers.shape[1] == 1:
            return mse_loss(ours, answers) / self.scale
        logs = answers.log_softmax(1)
        return kl_div(ours.log_softmax(1), logs, reduction="batchmean", log_target=True) / self.scale


def fitted(
    family: words.Family, scope: str, merged: Mapping[str, Tensor] | None, rate: float
) -> tuple[Any, list[float]]:
    """The merged weights of the best look at the held rows, and the values of all looks."""
    names = family.names
    starts = [STARTS["task_arithmetic"]] * len(names) if merged is None else [STARTS["iso_c"], *[0.0] * len(names)]
    factors = {}
    for key, base in family.weights.items():
        deltas = [family.deltas[name][key] for name in names]
        deltas = deltas if merged is None else [merged[key], *deltas]
        factors[key] = Factors(scope if base.dim() == 2 and "embeddings" not in key else "layer", base, deltas, starts)
    tasks = [Task(family, name) for name in names]
    with torch.no_grad():
        for task in tasks:
            task.scale = float(task.distance(family.weights, held=True))
    leaves = [one.values for one in factors.values()]
    optimiser = torch.optim.Adam(leaves, lr=rate)
    generator = torch.Generator().manual_seed(0)
    path, kept, best = list[float](), dict[str, Tensor](), 0
    for step in range(STEPS + 1):
        with torch.no_grad():
            weights = {key: one.weight() for key, one in factors.items()}
            path.append(float(torch.stack([task.distance(weights, held=True) for task in tasks]).mean()))
        if path[-1] <= min(path):
            best, kept = step, weights
        if step >= best + PATIENCE or step == STEPS:
            break
        optimiser.zero_grad()
        weights = {key: one.weight() for key, one in factors.items()}
        rows = torch.randperm(ROWS - HELD, generator=generator)[:STEP]
        torch.stack([task.distance(weights, held=False, rows=rows) for task in tasks]).mean().backward()  # type: ignore[no-untyped-call]
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / STEPS)
        optimiser.step()
    return kept, path


def main() -> None:
    from benchmarks.process import surroundings
    from benchmarks.pruning.quality import quiet

    quiet()
    torch.set_num_threads(1)
    family = words.Family(words.FAMILIES["choose"], *words.SEEN["choose"])
    iso = next(merge for merge in words.MERGES if merge.name == "iso_c")
    rule = iso.rule(len(family.names))
    found = {key: rule * tensor for key, tensor in family.merged(iso, family.names).items()}
    cells = json.loads(FILE.read_text(encoding="utf-8"))["cells"] if FILE.exists() else {}
    for start, merged in (("task_arithmetic", None), ("iso_c", found)):
        for scope, rate in (("layer", 0.1), ("row", 0.1), ("component", 0.1), ("component", 0.3), ("row", 0.3)):
            name = f"{start} + coefficients per {scope}, rate {rate}"
            if not set(sys.argv[1:]) <= set(name.replace(",", "").split()):
                continue
            begun = time.process_time()
            weights, path = fitted(family, scope, merged, rate)
            shares = family.shares(weights, family.names)
            made = {
                "mean": round(sum(shares) / len(shares), 1),
                "worst": round(min(shares), 1),
                "shares": dict(zip(family.names, (round(share, 1) for share in shares), strict=True)),
                "path": [round(value, 4) for value in path],
                "cpu_s": round(time.process_time() - begun, 1),
            }
            cells[name] = made
            print(name, made, file=sys.stderr, flush=True)
            write(FILE, surroundings({"python": sys.executable}) | {"cells": cells})


if __name__ == "__main__":
    main()
