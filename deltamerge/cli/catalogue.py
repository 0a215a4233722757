"""The tables of methods as plain data, for printing and for other programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deltamerge.errors import UsageError
from deltamerge.methods.registry import MERGE, PRUNE, MergeMethod, Param, PruneMethod


def catalogue(name: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Every method of `merge` and `prune`, or those called `name`, in the order of the tables.

    A parameter's `default` is a value, or "density" for the q of random masks; a `required` one has none. UsageError,
    with the nearest name: no method has that name.
    """
    if name is not None and name not in MERGE and name not in PRUNE:
        from deltamerge.recipe.problems import suggest

        raise UsageError(f"unknown method {name!r}", hint=suggest(name, {*MERGE, *PRUNE}))
    return {
        "merge": [_merge(method) for method in MERGE.values() if name in (None, method.name)],
        "prune": [_prune(method) for method in PRUNE.values() if name in (None, method.name)],
    }


def _merge(method: MergeMethod) -> dict[str, Any]:
    """`base`: "needed", "optional" or "a model" (an input like the others); `models` from the least to the most."""
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.paper,
        "parameters": {key: _parameter(param, param.default) for key, param in method.parameters.items()},
        "base": "needed" if method.needs_base else "optional" if method.takes_base else "a model",
        "models": [method.minimum, method.maximum],
        "prunes": method.implies_prune,
    }


def _prune(method: PruneMethod) -> dict[str, Any]:
    defaults: dict[str, Any] = {"q": "density" if method.random else 1.0}
    if method.factors:
        defaults["density"] = " · ".join(method.factors)
    parameters = {key: _parameter(p, defaults.get(key, p.default)) for key, p in method.parameters.items()}
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.paper,
        "parameters": parameters,
        "options": sorted(method.options),
        "groups": list(method.groups),
        "random": method.random,
    }


def _parameter(param: Param, default: Any) -> dict[str, Any]:
    described = asdict(param)
    described.pop("prunes")
    return described | {"default": default, "required": default is None, "range": param.wanted()}
