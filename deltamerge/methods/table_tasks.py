"""Merge methods that keep what each task's fine-tune can do: by singular vectors, interference, masks of tasks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from deltamerge.methods.registry import MergeMethod, Names, Param

if TYPE_CHECKING:
    from deltamerge.methods.merge import consensus, fisher, regmean, spectral, whole, wudi
else:
    consensus, fisher, regmean, spectral, whole, wudi = (
        Names(f"deltamerge.methods.merge.{module}")
        for module in ("consensus", "fisher", "regmean", "spectral", "whole", "wudi")
    )

_LAMBDA = Param("factor of the merged delta", 1.0)
_SCALED = {"weight": Param("factor of the model's delta", 1.0, per_model=True), "lambda": _LAMBDA}
_TASK = Param("number of the model whose task is kept, from 1", None, "integer", low=1, scalar=True)
_TALL = Param("abs(Δ_i) is at least this much of abs(Σ Δ − Δ_i)", 0.4, low=0)

_INPUTS = {
    "weight": Param("weight of the model's rows", 1.0, low=0, per_model=True),
    "off_diagonal": Param("factor of the products of two inputs; below 1 it is stabler", 0.9, low=0, high=1),
    "lambda": _LAMBDA,
}

_on_deltas = partial(MergeMethod, needs_base=True, deltas=True, adds=True)
_on_matrices = partial(_on_deltas, matrices=True, nodes=whole.nodes)

TASKS = (
    _on_matrices(
        "iso_c",
        spectral.iso_c,
        "mean(S) · U Vᵀ of U S Vᵀ = Σ w_i Δ_i: all its singular values made equal",
        "arXiv 2502.04959",
        _SCALED,
    ),
    _on_matrices(
        "iso_cts",
        spectral.iso_cts,
        "iso_c with 1 − common of the directions taken from each w_i Δ_i apart from the sum's",
        "arXiv 2502.04959",
        {**_SCALED, "common": Param("fraction of the directions that are the sum's", 0.8, low=0, high=1)},
    ),
    _on_matrices(
        "tsv_m",
        spectral.tsv_m,
        "U⊥ diag(S) V⊥ᵀ: the top r / n singular triplets of each w_i Δ_i, their vectors made orthonormal",
        "arXiv 2412.00081",
        _SCALED,
    ),
    _on_matrices(
        "wudi",
        wudi.wudi,
        "the Δ of least Σ ‖(Δ − w_i Δ_i) Δ_iᵀ‖² / ‖Δ_i‖²",
        "arXiv 2503.08099",
        {
            **_SCALED,
            "steps": Param("of Adam from Σ w_i Δ_i, as published: 300; 0 is the minimum itself", 0, "integer", low=0),
            "rho": Param("of the minimum: ridge as a fraction of the mean eigenvalue", 1.0, low=0, low_open=True),
        },
    ),
    _on_deltas(
        "consensus",
        consensus.consensus,
        "Σ Δ_i where at least agreement of the TALL masks abs(Δ_i) ≥ threshold · abs(Σ Δ − Δ_i) say so",
        "arXiv 2405.07813",
        {
            "threshold": _TALL,
            "agreement": Param("masks that have to say so", 2, "integer", low=0, scalar=True),
            "lambda": _LAMBDA,
        },
    ),
    _on_deltas(
        "tall_masks",
        consensus.tall_masks,
        "Σ Δ_i where the TALL mask of one task keeps it: that task's model",
        "arXiv 2405.07813",
        {"task": _TASK, "threshold": _TALL, "lambda": _LAMBDA},
        nodes=consensus.nodes,
    ),
    _on_deltas(
        "emr",
        consensus.emr,
        "elect a delta of the largest entries, mask those of one task's signs, rescale to its size: that task's model",
        "arXiv 2405.17461",
        {"task": _TASK},
        nodes=consensus.nodes,
        totals=consensus.emr_totals,
    ),
    _on_matrices(
        "regmean",
        regmean.regmean,
        "(Σ w_i Δ_i G_i)(Σ w_i G_i)⁻¹, G_i = E[x xᵀ] of a layer's inputs in fine-tune i on its own rows",
        "arXiv 2212.09849",
        _INPUTS,
        nodes=regmean.nodes,
        rows="inputs",
    ),
    _on_matrices(
        "regmean_plus",
        regmean.regmean,
        "regmean with the inputs that the merged blocks before a layer make of the rows",
        "arXiv 2508.03121",
        _INPUTS,
        nodes=regmean.nodes,
        rows="merged",
    ),
    _on_deltas(
        "fisher",
        fisher.fisher,
        "Σ w_i F_i Δ_i / Σ w_i F_i, F_i the mean squared gradient of fine-tune i's log-likelihood on its own rows",
        "arXiv 2111.09832",
        {
            "weight": _INPUTS["weight"],
            "floor": Param("added to each F_i, whose mean over the model is 1", 1e-6, low=0),
            "lambda": _LAMBDA,
        },
        rows="gradients",
    ),
)
