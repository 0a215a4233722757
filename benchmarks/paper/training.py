"""The training loop of the small models that the experiments make from nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamerge.optim import AdamR

Batch = dict[str, Tensor]
# From the model, still at its base weights, and the learning rate.
OptimizerFactory = Callable[[PreTrainedModel, float], torch.optim.Optimizer]


def adamw(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)


def adamr(base: Path, decay: float, **options: Any) -> OptimizerFactory:
    return lambda model, lr: AdamR.for_model(model, base, lr=lr, decay=decay, **options)


def trained(
    make: Callable[[], Any], batches: Sequence[Batch], lr: float, seed: int, factory: OptimizerFactory = adamw
) -> Any:
    """The model of `make` after one step a batch: warm-up over the first tenth, linear decay, gradients clipped at 1.

    Fresh weights and dropout can only draw from the global generator: it is seeded here, and put back after.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        optimizer = factory(model, lr)
        warm_up = max(1, len(batches) // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, (len(batches) - step) / max(1, len(batches) - warm_up))
        )
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.train(False)
    return model
