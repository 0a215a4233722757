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


def train(
    model: PreTrainedModel, batches: Sequence[Batch], lr: float, factory: OptimizerFactory = adamw
) -> list[float]:
    """One step a batch, warm-up over the first tenth, then linear decay, gradients clipped at norm 1; every loss.

    Dropout draws from the global generator: seed it around the call.
    """
    optimizer = factory(model, lr)
    warm_up = max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (len(batches) - step) / max(1, len(batches) - warm_up))
    )
    losses = []
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.train(False)
    return losses
