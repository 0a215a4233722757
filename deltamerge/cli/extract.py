"""The commands extract and apply: make a delta of two models, and put a delta on its base."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from deltamerge.cli.mergekit_flags import given_flags, lora_flags
from deltamerge.cli.options import (
    AS_JSON,
    BUDGET,
    FOLDER,
    FORCE,
    MEMORY,
    MODEL,
    NONFINITE,
    PICKLES,
    QUIET,
    RATIO,
    RESOURCES,
    RESUME,
    WORKERS,
    pruning_methods,
    rows_of_text,
)
from deltamerge.cli.output import of_command_line, say_json, tell
from deltamerge.cli.result import Warnings, report_run, summary_of
from deltamerge.errors import after_folders, app
from deltamerge.errors.shown import human


@click.command("extract")
@click.argument("models", type=MODEL, nargs=-1, metavar="MODEL... [BASE]")
@click.option(
    "--base", type=MODEL, help="Model that MODEL was fine-tuned from: a folder or a hub id. May be given as BASE."
)
@click.option(
    "--out",
    type=FOLDER,
    help="Output folder; for several models, the store. Default: NAME-delta or NAME-lora here.",
)
@click.option(
    "--after", type=MODEL, metavar="VERSION",
    help="Preceding version in the chain. BASE may be its checkpoint or the chain's base.",
)  # fmt: skip
@click.option(
    "--as", "style", type=click.Choice(["slime", "slime:overwrite", "skyrl"]),
    help="Write OUT as another project's version. If MODEL is a chain: write its versions that OUT lacks.",
)  # fmt: skip
@click.option(
    "--quantized", type=MODEL, metavar="MODEL",
    help="Quantised checkpoint of the base. Write the versions of the chain MODEL that OUT lacks as deltas of it, "
    "with the bytes of a full quantisation.",
)  # fmt: skip
@click.option("--density", type=float, help="Fraction of the delta to keep. Default: all of it, exactly.")
@click.option(
    "--method",
    shell_complete=pruning_methods,
    help="Pruning method. Default: dare with sampling: magnitude, or magnitude with --calibration, which keep "
    "most of a fine-tune. Methods with settings of their own need a recipe.",
)
@click.option("--q", type=float, help="Divisor of the kept entries. Default: as in recipes, or chosen on the rows.")
@click.option(
    "--values",
    type=click.Choice(["float32", "bfloat16", "int8", "sign"]),
    help="Store differences in this format. Default: final values. LoRA: dtype of the factors.",
)
@click.option(
    "--lora", is_flag=False, flag_value="", metavar="[RANK|energy:SHARE]",
    help="Write a LoRA: of this rank, of the ranks that keep a share of each delta, or without a value for --budget.",
)  # fmt: skip
@BUDGET
@RATIO
@click.option(
    "--for", "served_by", type=click.Choice(["vllm", "peft"]),
    help="LoRA: program that loads it. vllm: factors alone. peft: whole embeddings, norms and biases too. Default: "
    "factors and a task's head.",
)  # fmt: skip
@click.option(
    "--whole", type=click.Choice(["keep", "heads", "task_heads", "drop", "refuse"]),
    help="Of a LoRA: the tensors that are stored whole, instead of --for. keep: all changed tensors without factors. "
    "heads: heads, and tensors that the base lacks. task_heads: the same without a language model's head. drop: none. "
    "refuse: an error.",
)  # fmt: skip
@click.option("--target", "targets", multiple=True, metavar="PATTERN", help="LoRA: weights that get factors.")
@click.option("--dora", is_flag=True, help="LoRA: write a DoRA, with the norms of the weights' rows.")
@rows_of_text
@RESOURCES
@RESUME
@FORCE
@NONFINITE
@PICKLES
@AS_JSON
@QUIET
@click.option("-v", "--verbose", is_flag=True, help="LoRA: print a line per layer.")
@lora_flags
def extract(
    models: tuple[str, ...],
    base: str | None,
    out: Path | None,
    after: str | None,
    style: str | None,
    quantized: str | None,
    density: float | None,
    method: str | None,
    q: float | None,
    values: str | None,
    lora: str | None,
    budgets: tuple[int, ...],
    ratios: tuple[float, ...],
    served_by: str | None,
    whole: str | None,
    targets: tuple[str, ...],
    dora: bool,
    calibration: dict[str, Any] | None,
    resume: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Extract the delta of MODEL from its base: exact, pruned, or as a LoRA.

    Without a density the delta is exact. With a density it is pruned, and calibration rows choose q. That matters most
    at densities near 0.01; 50 unlabelled rows are enough. With --budget or --ratio the delta holds values to add, in
    few bits, chosen for the least loss. Several models are extracted one by one into a store, where files that several
    deltas share are kept once.

    \b
    deltamerge extract tuned --base base --density 0.05
    deltamerge extract tuned --base base --density 0.01 --calibration rows.jsonl
    deltamerge extract tuned --base base --budget 8MB
    deltamerge extract tuned --base base --ratio 32,64,128,256
    deltamerge extract a b c --base base --out store
    deltamerge extract tuned --base base --lora 32 --for vllm
    deltamerge extract a b --base base --lora --budget 20MB --calibration rows.jsonl
    deltamerge extract run --as slime --out updates
    deltamerge extract run --quantized base-fp8 --out run-fp8
    """
    with app("chain"):
        from deltamerge.apps.chain.extract import curve, look_at, name_in_store, name_of, pruning
        from deltamerge.apps.chain.extract import extract as extract_delta
    from deltamerge.models.chain.publish import Sharing, is_store
    from deltamerge.run.options import Options

    theirs = given_flags(click.get_current_context())
    models = models or theirs.models
    base, out = base or theirs.base, out or theirs.out_path
    lora = theirs.lora if lora is None else lora
    whole, targets = whole or theirs.whole, targets or theirs.targets
    options = {**options, "workers": options["workers"] or theirs.workers}
    if theirs.device and options["device"] == "auto":
        options["device"] = theirs.device
    if theirs.warning and not quiet:
        tell(f"warning: {theirs.warning}")
    if not models:
        raise click.UsageError("Missing argument 'MODEL... [BASE]'.")
    if base is None and len(models) == 2:
        base, models = models[1], models[:1]
    if style is not None or quantized is not None:
        others = (density, method, q, values, lora, calibration, *budgets, *ratios)
        if style is not None and quantized is not None:
            raise click.UsageError("--quantized makes a chain: extract that chain with --as in a second step")
        if len(models) > 1 or out is None or any(other is not None for other in others):
            flag = "--as is for one model or chain" if style is not None else "--quantized is for one chain"
            raise click.UsageError(f"{flag}, with --out; changes are exact")
        if quantized is not None and after is not None:
            raise click.UsageError("--after is for a model: a chain has its own order")
        _write_as(style, quantized, models[0], base, out, after, as_json=as_json, quiet=quiet, **options)
        return
    if base is None:
        raise click.UsageError("name the base once: as BASE, or with --base")
    sizes, size = _delta_sizes(lora, budgets, ratios), _lora_size(lora, budgets)
    if served_by is not None and (size is None or whole is not None):
        raise click.UsageError(
            "--for needs --lora" if size is None else "--for and --whole both choose the tensors that are stored whole"
        )
    if served_by == "vllm" and dora:
        raise click.UsageError("vLLM loads no DoRA: leave --dora out, or say --for peft")
    if size is not None:
        whole = whole or {"vllm": "drop", "peft": "keep", None: "task_heads"}[served_by]
    more = {"whole": whole, "targets": list(targets) or None, "dora": dora or None}
    more = {key: value for key, value in more.items() if value is not None}
    if size is None and more:
        raise click.UsageError(f"--{'target' if 'targets' in more else next(iter(more))} needs --lora")
    if sizes and (density is not None or method is not None or q is not None or values is not None):
        raise click.UsageError("--budget chooses the values, and takes no --density, --method, --q or --values")
    if size is not None and (density is not None or method is not None or q is not None):
        raise click.UsageError("--lora takes the whole delta: prune by a recipe with output: {kind: peft, rank: …}")
    if len(sizes) > 1:
        if len(models) > 1 or after is not None:
            raise click.UsageError("several sizes only print the loss of each, for one model")
        points = curve(models[0], base, sizes, calibration=calibration, options=Options(**options))
        _say_curve(points, as_json=as_json)
        return
    store = out if size is None and out is not None and (len(models) > 1 or is_store(out)) else None
    names = [name_of(model, lora=size is not None) if store is None else name_in_store(model) for model in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise click.UsageError(f"two of the models would be {twice}: extract one by one, with --out")
    if after is not None and len(models) > 1:
        raise click.UsageError("--after is for one model: each version comes after another")
    choice = None if density is None else pruning(density, method, q, rows=calibration is not None)
    chosen = {} if choice is None else {"pruning": {"prune": choice.prune, "why": choice.why}}
    line = "" if choice is None or quiet or as_json else str(choice)
    sharing = None if store is None else Sharing.of(store)
    summaries = []
    done: list[Path] = []
    given: dict[str, Any] = {
        "density": density,
        "method": method,
        "q": q,
        "values": values,
        "lora": None if size is None else size | more,
        "size": sizes[0] if sizes else None,
        "calibration": calibration,
    }
    if len(models) > 1:
        with of_command_line():
            look_at(models, base, Options(**options), **given)
    for model, name in zip(models, names, strict=True):
        begun, warnings = time.monotonic(), Warnings(line)
        line = ""
        target = out / name if out is not None and (store is not None or len(models) > 1) else out
        with after_folders(done), of_command_line():
            result = extract_delta(
                model, base, target, after=after, **given,
                options=Options(watch=warnings.watch, force=force, resume=resume or None, **options),
            )  # fmt: skip
        done.append(result.folder)
        warnings.end(result)
        if sharing is not None:
            sharing.add(name)
        if as_json and len(models) > 1:
            summaries.append(summary_of(result, begun, **chosen))
        else:
            report_run(result, begun, as_json=as_json, quiet=quiet, verbose=verbose, **chosen)
    if summaries:
        say_json({"results": summaries})


def _write_as(
    style: str | None,
    quantized: str | None,
    model: str,
    base: str | None,
    out: Path,
    after: str | None,
    *,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    from deltamerge.apps.chain.extract import extract_as
    from deltamerge.apps.chain.requantise import extract_quantised
    from deltamerge.engine.execute import default_workers

    workers = options["workers"] or default_workers()
    with of_command_line():
        pickles = options["pickles"]
        if style is not None:
            written = extract_as(style, model, base, out, after=after, workers=workers, pickles=pickles)
        else:
            assert quantized is not None
            written = extract_quantised(model, quantized, out, base=base, workers=workers, pickles=pickles)
    if as_json:
        found = [{"name": one.path.name, "tensors": one.tensors, "bytes": one.nbytes} for one in written]
        how = {"style": style} if style is not None else {"quantized": quantized}
        say_json({"folder": str(out), **how, "versions": found})
    elif not quiet:
        for one in written:
            tell(f"{one.path}: {one.tensors} tensors changed, {human(one.nbytes)}")
        if not written:
            tell(f"{out}: has all versions of {model}")


def _delta_sizes(lora: str | None, budgets: Sequence[int], ratios: Sequence[float]) -> list[dict[str, Any]]:
    """Return the keys of a recipe's prune for --budget and --ratio. A LoRA has none."""
    if lora is not None:
        if ratios:
            raise click.UsageError("--ratio is of a delta: --lora takes --budget 20MB")
        return []
    if budgets and ratios:
        raise click.UsageError("--budget and --ratio both say the size: keep one of the two")
    return [*({"bytes": size} for size in budgets), *({"ratio": ratio} for ratio in ratios)]


def _say_curve(points: Sequence[tuple[int, float]], *, as_json: bool) -> None:
    """Print the bytes of artifacts, and the share of the delta's squares that each would lose."""
    if as_json:
        say_json({"curve": [{"bytes": nbytes, "lost": float(f"{lost:.4g}")} for nbytes, lost in points]})
        return
    for nbytes, lost in points:
        tell(f"{nbytes:>15,} bytes   about {lost:.3g} of the delta's squares are lost")


def _lora_size(text: str | None, budgets: Sequence[int]) -> dict[str, Any] | None:
    """Return the keys of a recipe's output for --lora and --budget. None without --lora."""
    if text is None:
        return None
    if len(budgets) > 1:
        raise click.UsageError("--lora takes one --budget")
    size: dict[str, Any] = {"budget": budgets[0]} if budgets else {}
    name, _, share = text.replace("=", ":").partition(":")
    if text and text.isdecimal():
        size["rank"] = int(text)
    elif name == "energy" and share:
        try:
            size["energy"] = float(share)
        except ValueError:
            raise click.BadParameter(f"--lora {text}: no number") from None
    elif text:
        raise click.BadParameter(f"--lora {text}: a rank such as 32, energy:0.95, or nothing with --budget")
    if not size:
        raise click.UsageError("--lora needs a rank, energy:0.95, or --budget 20MB")
    return size


@click.command("apply")
@click.argument("delta", type=MODEL)
@click.option(
    "--base", required=True, type=MODEL, help="Checkpoint that the delta was made from: a folder or a hub id."
)
@click.option("--out", type=FOLDER, required=True, help="Folder to make.")
@WORKERS
@MEMORY
@FORCE
@PICKLES
@AS_JSON
@QUIET
def apply(
    delta: str,
    base: str,
    out: Path,
    workers: int | None,
    memory: int | None,
    force: bool,
    pickles: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Apply DELTA to its base.

    Writes the whole checkpoint. Every tensor is checked by hash before and after.
    """
    from deltamerge.engine.execute import default_workers
    from deltamerge.run.apply import apply as apply_delta

    begun = time.monotonic()
    done = apply_delta(
        delta, base, out, workers=workers or default_workers(), memory=memory, force=force, pickles=pickles
    )
    seconds = time.monotonic() - begun
    if as_json:
        summary = {
            "out": str(done.folder),
            "bytes": done.nbytes,
            "tensors": done.tensors,
            "seconds": round(seconds, 3),
            "lock": done.lock,
        }
        say_json(summary)
    elif not quiet:
        size = human(done.nbytes)
        tell(f"{done.folder}: {done.tensors} tensors, {size} in {seconds:.1f} s")
