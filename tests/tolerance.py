"""How far a computed value may lie from the exact one: by formula, from the dtype, the lengths of sums and the sizes.

u is the unit roundoff. γ(n) = n u / (1 − n u) bounds n roundings that follow one another (Higham, "Accuracy and
Stability of Numerical Algorithms", §3.1). A sum of n terms, in whatever order, goes through n − 1 of them. So these
bounds hold for every processor, library and number of threads: what differs there is the order of sums, and whether a
product is rounded before it is added. Functions such as exp count as two roundings, for libraries return one of the two
nearest values.

Take a tolerance from here, or write its formula beside it; never widen a number until a test is green.
"""

from __future__ import annotations

import math

import torch


def roundoff(dtype: torch.dtype = torch.float32) -> float:
    """u: the largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def gamma(roundings: float, dtype: torch.dtype = torch.float32) -> float:
    """γ(n): the largest relative error of a product of n factors 1 + δ, each |δ| ≤ u."""
    nu = roundings * roundoff(dtype)
    assert nu < 0.5, f"{roundings} roundings to {dtype} leave nothing to compare"
    return nu / (1 - nu)


def after_rounding(dtype: torch.dtype) -> float:
    """Relative error of a value computed in float32 and rounded to a smaller dtype once.

    A rounding errs by u / (1 + u) at most. What that lacks of u, about u², is room for float32's own errors: 256
    roundings beside bfloat16, 4 beside float16. Values do come near this bound, on every machine alike.
    """
    return roundoff(dtype)


def of_sum(terms: int, size: float, dtype: torch.dtype = torch.float32) -> float:
    """Absolute error of a sum of products of `terms` terms whose absolute values add up to `size`."""
    return gamma(terms, dtype) * size


def of_log_softmax(classes: int, largest: float, dtype: torch.dtype = torch.float32) -> float:
    """Absolute error of z − m − log Σ exp(z − m), where no log-probability is below −`largest`.

    Every |z − m| and log C is at most `largest`. The difference is rounded (u · largest) and its exponential is (2u);
    their sum has C − 1 roundings more; the logarithm adds two of its value and the last two differences one each.
    """
    return gamma(classes + 1 + 6 * largest, dtype)


def of_divergence(classes: int, largest: float, dtype: torch.dtype = torch.float32) -> float:
    """Absolute error of KL(p ‖ q) of two distributions whose logits differ by less than √u, where it is 0 in truth.

    Both log-probabilities are rounded. The logits' own difference δ comes in by its square: KL ≤ δ²/2 ≤ u/2.
    """
    return 2 * of_log_softmax(classes, largest, dtype) + roundoff(dtype) / 2


def largest_log_probability(weight: torch.Tensor, bias: torch.Tensor, inputs: float = 1.0) -> float:
    """Of a linear head (C, H) with inputs within ±`inputs`, as tanh's are: no |log p| of its C classes is larger."""
    logits = float((weight.double().abs().sum(1) * inputs + bias.double().abs()).max())
    return math.log(len(weight)) + 2 * logits
