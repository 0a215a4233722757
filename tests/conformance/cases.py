"""The recipes that both tools run, and what is known to differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A mergekit recipe; `ours` replaces it for deltamerge where the same result needs another recipe; `exact` runs it
    with `--mergekit-exact`.

    `differs` names the row of docs/howto/from-mergekit.md that says why results are not equal to 1e-6; `share` is the
    largest fraction of a tensor's entries that may differ then. With `same_norm` the sum of abs(result − base) may not.
    """

    text: str
    ours: str | None = None
    exact: bool = False
    differs: str | None = None
    share: float = 1.0
    same_norm: bool = False


def recipe(method: str, *models: str, base: str | None = "base", more: str = "") -> str:
    lines = [f"merge_method: {method}"] + ([f"base_model: ./{base}"] if base else []) + ["models:"]
    for model in models:
        name, _, parameters = model.partition(": ")
        lines += [f"  - model: ./{name}"] + ([f"    parameters: {{{parameters}}}"] if parameters else [])
    return "\n".join([*lines, *([more] if more else []), "dtype: float32", ""])


FILTERS = """parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5"""
WEIGHTED = ("a: weight: 0.7", "b: weight: 0.4")
DENSE = ("a: weight: 0.7, density: 0.4", "b: weight: 0.4, density: 0.6")

CASES = {
    "linear": Case(recipe("linear", "a: weight: 1.0", "b: weight: 0.3", "c: weight: 0.5", base=None)),
    "linear-raw": Case(recipe("linear", *WEIGHTED, base=None, more="parameters: {normalize: false}")),
    "linear-base-unlisted": Case(
        recipe("linear", "a", "b", more="parameters: {weight: 0.5}"), differs="An unlisted base"
    ),
    "linear-base-unlisted-exact": Case(recipe("linear", "a", "b", more="parameters: {weight: 0.5}"), exact=True),
    "linear-base-listed": Case(recipe("linear", "base: weight: 0.2", *WEIGHTED)),
    "passthrough": Case(recipe("passthrough", "a", base=None)),
    "passthrough-scale": Case(recipe("passthrough", "a: scale: [0.5, 1.5]", base=None)),
    "slerp": Case(recipe("slerp", "base", "a", more=FILTERS)),
    "slerp-base-second": Case(recipe("slerp", "b", "base", more="parameters: {t: 0.25}")),
    "slerp-base-unlisted": Case(recipe("slerp", "a", more="parameters: {t: 0.25}")),
    "slerp-beyond": Case(recipe("slerp", "a", "b", base="a", more="parameters: {t: 1.5}")),
    "nuslerp": Case(recipe("nuslerp", *WEIGHTED, base=None)),
    "nuslerp-deltas": Case(recipe("nuslerp", *WEIGHTED)),
    "nuslerp-rows": Case(recipe("nuslerp", *WEIGHTED, more="parameters: {nuslerp_flatten: false}")),
    "nuslerp-columns": Case(
        recipe("nuslerp", *WEIGHTED, base=None, more="parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}")
    ),
    "multislerp": Case(recipe("multislerp", *WEIGHTED, "c: weight: 0.5", base=None)),
    "multislerp-deltas": Case(
        recipe("multislerp", *WEIGHTED, "c: weight: 0.5", more="parameters: {normalize_weights: false}")
    ),
    "karcher": Case(recipe("karcher", "a", "b", "c", base=None)),
    "karcher-short": Case(recipe("karcher", "a", "b", base=None, more="parameters: {max_iter: 2, tol: 1.0e-3}")),
    "karcher-base-listed": Case(recipe("karcher", "base", "a", "b")),
    "karcher-base-unlisted": Case(recipe("karcher", "a", "b")),
    "task_arithmetic": Case(recipe("task_arithmetic", *WEIGHTED, "c: weight: -0.3", more="parameters: {lambda: 1.5}")),
    "task_arithmetic-normalized": Case(recipe("task_arithmetic", *WEIGHTED, more="parameters: {normalize: true}")),
    "ties": Case(recipe("ties", *DENSE)),
    "ties-raw": Case(recipe("ties", *DENSE, more="parameters: {normalize: false, lambda: 0.8, int8_mask: true}")),
    "ties-rescaled": Case(recipe("ties", *DENSE, more="parameters: {rescale: true}")),
    "ties-gradient": Case(
        recipe("ties", "a: weight: [0, 0.3, 0.7, 1], density: [1, 0.7, 0.1]", "b: weight: 0.5, density: 0.33")
    ),
    "ties-nothing": Case(recipe("ties", "a: weight: 1, density: [1, 0.5, 0]", "b: weight: 0.5, density: 0.33")),
    "dare_ties-nothing": Case(recipe("dare_ties", "a: weight: 1, density: 0", "b: weight: 0.5")),
    "della-nothing": Case(recipe("della", "a: weight: 1, density: 0", "b: weight: 0.5")),
    "breadcrumbs-nothing": Case(recipe("breadcrumbs", "a: weight: 1, density: 0", "b: weight: 0.5, density: 0.5")),
    "long-references": Case(
        recipe("linear", "a: weight: 1.0", "b: weight: '0.3'", base=None).replace("./a", "{model: {path: ./a}}")
    ),
    "dare_linear-whole": Case(recipe("dare_linear", *WEIGHTED)),
    "dare_ties-whole": Case(recipe("dare_ties", *WEIGHTED)),
    "della-whole": Case(recipe("della", *WEIGHTED)),
    "della_linear-whole": Case(recipe("della_linear", *WEIGHTED)),
    "breadcrumbs": Case(recipe("breadcrumbs", *DENSE)),
    "breadcrumbs-gamma": Case(
        recipe("breadcrumbs", *DENSE, more="parameters: {gamma: 0.1, normalize: true, lambda: 1.2}")
    ),
    "breadcrumbs-rescaled": Case(recipe("breadcrumbs", *DENSE, more="parameters: {rescale: true, gamma: 0.05}")),
    "breadcrumbs-overfull": Case(recipe("breadcrumbs", "a: weight: 1, density: 0.97", more="parameters: {gamma: 0.2}")),
    "breadcrumbs_ties": Case(recipe("breadcrumbs_ties", *DENSE, "c: weight: 1.0, density: 0.9, gamma: 0.05")),
    "model_stock": Case(recipe("model_stock", "a", "b", "c")),
    "model_stock-base-listed": Case(recipe("model_stock", "base", "a", "b")),
    "model_stock-rows": Case(recipe("model_stock", "a", "b", "c", more="parameters: {filter_wise: true}")),
    "nearswap": Case(recipe("nearswap", "a", more="parameters: {t: 0.01}")),
    "nearswap-base-listed": Case(recipe("nearswap", "b", "base", more="parameters: {t: [0.001, 0.05]}")),
    "sce": Case(recipe("sce", "a", "b", "c")),
    "sce-topk": Case(recipe("sce", "a", "b", "c", more="parameters: {select_topk: 0.1}")),
    "ram": Case(recipe("ram", "a", "b", "c")),
    "ram-epsilon": Case(recipe("ram", "a", "b", "c", more="parameters: {epsilon: 0.02}")),
    "ramplus_tl": Case(recipe("ramplus_tl", "a", "b", "c", more="parameters: {epsilon: 0.02, r: 0.5, alpha: 0.6}")),
    "ramplus_tl-default": Case(recipe("ramplus_tl", "a", "b")),
    "arcee_fusion": Case(recipe("arcee_fusion", "base", "a"), differs="Importance", share=0.01),
    **{
        f"{method}-pruned": Case(recipe(method, "a: weight: 1, density: 0.5"), differs="Random masks")
        for method in ("dare_linear", "dare_ties", "della", "della_linear")
    },
    **{
        f"{method}-l1": Case(
            recipe(method, "a: weight: 1, density: 0.5"),
            recipe(method, "a: weight: 1, density: 0.5", more="prune: {rescale: l1}"),
            differs="Rescaling",
            same_norm=True,
        )
        for method in ("dare_linear", "della_linear")
    },
    **{
        f"{method}-exact": Case(
            recipe(method, "a: weight: 1, density: 0.5"), exact=True, differs="Random masks", same_norm=True
        )
        for method in ("dare_linear", "dare_ties", "della", "della_linear")
    },
}

# Whose layers, names and ties are different enough to be worth a second look.
ELSEWHERE = ("slerp", "ties", "model_stock", "breadcrumbs", "sce", "nuslerp-deltas", "karcher", "linear")
