"""A fine-tune and its base -> a delta artifact or a LoRA, by the recipe that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from deltamerge.apps.chain.link import Link
from deltamerge.errors import InputError, RecipeError, UsageError
from deltamerge.methods.registry import PRUNE
from deltamerge.models.chain.folder import NAME, is_chain
from deltamerge.models.chain.publish import one_writer
from deltamerge.recipe.advice import Advice, choose
from deltamerge.recipe.file import read_text
from deltamerge.run.options import Options
from deltamerge.run.runner import Result, run


def extract(
    model: str,
    base: str,
    out: Path | None = None,
    *,
    density: float | None = None,
    method: str | None = None,
    q: float | None = None,
    values: str | None = None,
    after: str | None = None,
    lora: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> Result:
    """Run the recipe of one fine-tune, `model` of `base` (folders or hub ids), whose output is a delta.

    With `lora` (keys of a recipe's output: rank, energy, budget, …) the output is an adapter. `calibration` weighs its
    factors. Without `density` everything that changed is kept, and stored as final values. `values` stores values to
    add, in that form. With a density, `pruning` decides, and `calibration` chooses q. `out` is NAME-delta or NAME-lora
    in this folder if not given. `options` are those of `run`.

    With `after`, a version of a chain, `out` is the next version beside it: `base` is what that makes, or the base of
    the chain. UsageError: a method, a q or rows without a density; `after` with values to add, a LoRA, or no `out`.
    RecipeError, of no line, as there is no file: a method that is not known or needs more settings.
    """
    if lora is None and density is None and calibration is not None:
        raise UsageError("--calibration is for --density, whose q it chooses, and --lora", hint="--density 0.01")
    if after is not None:
        if values is not None or lora is not None or out is None:
            raise UsageError("--after needs --out, and takes no --values and no --lora", hint="its values are final")
        link, options = Link.begin(after, out), options or Options()
        with one_writer(out.resolve().parent, "adding"):
            base, options = link.base(base, pickles=options.pickles), replace(options, ending=link.finish)
            chosen: dict[str, Any] = {"density": density, "method": method, "q": q, "calibration": calibration}
            return extract(model, base, out, **chosen, options=options)
    if density is None and (method is not None or q is not None):
        raise UsageError("--method and --q need --density", hint="--density 0.01 keeps a hundredth of the delta")
    if out is not None and not (options and options.ending) and is_chain(out):
        raise UsageError(f"--out {out}: is a chain", hint=f"--out {out}/NAME --after {out}/BEFORE")
    if model.rstrip("/") == base.rstrip("/"):
        raise InputError(f"{model}: is the base itself", hint="name a fine-tune, and behind it its base")
    output = _output(values)
    if lora is not None:
        output = {"kind": "peft", **lora, **({} if values is None else {"values": values})}
    recipe: dict[str, Any] = {"base_model": base, "models": [{"model": model}], "output": output}
    if calibration is not None:
        recipe["calibration"] = dict(calibration)
    if density is not None:
        recipe["prune"] = pruning(density, method, q, rows=calibration is not None).prune
    text = yaml.safe_dump(recipe, sort_keys=False)
    try:
        file = replace(
            read_text(text, Path.cwd() / "extract"), made_for="extract" if lora is None else "extract --lora"
        )
        return run(file, out or Path(name_of(model, lora=lora is not None)), options)
    except RecipeError as error:
        raise error.of("extract") from None


def pruning(density: float, method: str | None, q: float | None, *, rows: bool) -> Advice:
    """Return the pruning of a density: `method` and `q` where given, else the one that keeps most of a fine-tune.

    `rows`: whether there is calibration data, which chooses q. UsageError: q is given twice.
    """
    if method is None and q is None:
        return choose(density, rows=rows)
    method = method or "magnitude"
    measured = method in PRUNE and PRUNE[method].needs_activations
    if rows and q is not None and not measured:
        raise UsageError("--q and --calibration both say what q is", hint="keep one of the two")
    prune: dict[str, Any] = {"method": method, "density": density}
    chosen = "output_change" if rows and q is None else q
    return Advice(prune if chosen is None else prune | {"q": chosen}, "as asked for")


def name_of(model: str, *, lora: bool) -> str:
    """Return the folder's name of a model where none is given."""
    name = Path(model.partition("@")[0]).name or "model"
    return f"{name}-{'lora' if lora else 'delta'}"


def name_in_store(model: str) -> str:
    """Return the name of a model's folder in a store. UsageError: its name cannot be one."""
    name = Path(model.partition("@")[0]).name
    if NAME.fullmatch(name) is None:
        raise UsageError(f"{model}: {name!r} is no name in a store", hint="extract it by itself, with --out")
    return name


def _output(values: str | None) -> dict[str, Any]:
    return {"kind": "delta"} if values is None else {"kind": "delta", "semantics": "add", "values": values}
