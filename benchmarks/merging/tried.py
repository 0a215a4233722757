"""Merges that were measured and are not in the package, as their papers have them, in float64.

Each takes the deltas Δ_i (out, in) of a matrix, some also the base's W, and returns what is added to W at λ = 1.
docs/measurements/merging.md has what they keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def ace(deltas: Sequence[Tensor], _: Tensor, *, epsilon: float = 0.01, relative: bool = False) -> Tensor:
    """ACE-Merging (arXiv 2603.02945). `relative`: ε is a part of the mean eigenvalue of a delta's ΔᵀΔ, not absolute."""
    squares = torch.stack([(delta * delta).sum() for delta in deltas])
    logs = squares.log()
    differ = bool(logs.var(unbiased=False) / logs.mean() ** 2 > 0.3)
    centred = [delta - delta.mean(0) for delta in deltas]
    grams = [one.T @ one for one in centred]
    if differ:
        traces = [gram.diagonal().sum() for gram in grams]
        centred = [one / trace for one, trace in zip(centred, traces, strict=True)]
        grams = [gram / trace for gram, trace in zip(grams, traces, strict=True)]
    size = deltas[0].shape[1]
    ridge = epsilon * torch.eye(size, dtype=torch.float64) * (float(squares.mean()) / size if relative else 1.0)
    means = sum(grams, torch.zeros(())).mean(0) / (squares.mean() if differ else 1.0)
    whole = sum((gram + ridge for gram in grams), torch.zeros(())) + means.expand(size, size)
    pulled = sum((one @ (gram + ridge) for one, gram in zip(centred, grams, strict=True)), torch.zeros(()))
    merged: Tensor = pulled @ torch.linalg.inv(whole)
    if differ:
        mean = sum(grams, torch.zeros(())) / len(grams)
        found = merged + sum((d @ (gram - mean) for d, gram in zip(deltas, grams, strict=True)), torch.zeros(()))
        left, values, right = torch.linalg.svd(found, full_matrices=False)
        k = int(0.3 * len(values))
        merged = merged + values[:k].mean() * left[:, :k] @ right[:k]
    return merged


def svc(merged: Tensor, deltas: Sequence[Tensor], *, least: float = 0.1) -> Tensor:
    """Singular Value Calibration of a merged delta (arXiv 2602.05536): directions that tasks share are scaled down."""
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    total = torch.zeros_like(values)
    for delta in deltas:
        along = left.T @ delta
        share = values * (along * right).sum(1) / (along * along).sum(1).clamp(min=1e-30)
        total += share.clamp(min=least)
    return (left * (values * len(deltas) / total)) @ right


def ortho(deltas: Sequence[Tensor], base: Tensor, *, rest: float = 0.2) -> Tensor:
    """OrthoMerge-C: rotations of the base that conflicting rows ask for, added up, and a part of the rest.

    Rotations are of the smaller side, on which Wᵀ T determines them.
    """
    mean = sum(deltas, torch.zeros(())) / len(deltas)
    tunes = [base + delta * (cosine_similarity(delta, mean, dim=1) < 0)[:, None] for delta in deltas]
    wide = base.shape[0] < base.shape[1]
    if wide:
        base, tunes, deltas = base.T, [one.T for one in tunes], [one.T for one in deltas]
    unit = torch.eye(base.shape[1], dtype=torch.float64)
    rotations, skews = [], []
    for tune in tunes:
        left, _, right = torch.linalg.svd(base.T @ tune)
        rotations.append(left @ right)
        found = torch.linalg.solve(rotations[-1] + unit, rotations[-1] - unit)
        skews.append((found - found.T) / 2)
    total = sum(skews, torch.zeros(()))
    length = total.norm()
    if length > 0:
        total = total * (sum(one.norm() for one in skews) / len(skews)) / length
    turned = base @ torch.linalg.solve(unit - total, unit + total)
    left_over = sum((base + d - base @ r for d, r in zip(deltas, rotations, strict=True)), torch.zeros(()))
    merged = turned + rest * left_over - base
    return merged.T if wide else merged


def aim(merged: Tensor, loudness: Tensor, *, kept: float = 0.2) -> Tensor:
    """Activation-Informed Merging: columns of loud inputs of the base move less. `loudness` (in): mean abs(x)."""
    return merged * (1.0 - loudness / loudness.max() * (1.0 - kept))
