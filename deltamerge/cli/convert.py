"""The command convert: a model in another form."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli import streams
from deltamerge.cli.options import AS_JSON, FILE, FOLDER, FORCE, NONFINITE, QUIET, RESOURCES, RESUME, some
from deltamerge.cli.output import of_command_line, say, say_json
from deltamerge.cli.plan import render_plan
from deltamerge.cli.result import Warnings, report_run

if TYPE_CHECKING:
    from deltamerge.recipe.file import RecipeFile

NAME = "convert"


@click.command(NAME)
@click.argument("model", type=FILE)
@click.argument("out", type=FOLDER)
@click.option(
    "--dtype", metavar="NAME", shell_complete=some("bfloat16", "float16", "float32"), help="Dtype of all weights."
)
@click.option("--shard-size", metavar="SIZE", help="Largest weight file, such as 2GB. Default: 5GB.")
@click.option(
    "--quantization", type=click.Choice(["none", "keep", "fp8", "int8", "int4", "nvfp4", "mxfp4"]),
    help="Linear layers. none: not quantized (default). keep: as they are. Others: quantized so.",
)  # fmt: skip
@click.option("--gguf", type=click.Choice(["q8_0", "f16", "bf16"]), help="Write a GGUF file beside the checkpoint.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@RESOURCES
@RESUME
@FORCE
@NONFINITE
@AS_JSON
@QUIET
def command(
    model: str,
    out: Path,
    dtype: str | None,
    shard_size: str | None,
    quantization: str | None,
    gguf: str | None,
    dry_run: bool,
    resume: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write MODEL to OUT in another dtype or format, without merging.

    MODEL is a folder, a weight file or a hub id, in safetensors, torch's own format or GGUF. OUT may differ in dtype,
    shard size and quantization. No code in torch's files is run. Weights whose dtype and format stay the same keep
    their bytes.

    \b
    deltamerge convert ./old ./new                        # pytorch_model.bin to safetensors
    deltamerge convert ./model ./small --dtype bfloat16 --shard-size 2GB
    deltamerge convert model.gguf ./plain                 # --gguf q8_0: the other way
    """
    from deltamerge.errors import UsageError
    from deltamerge.run.options import Options
    from deltamerge.run.plans import make_plans
    from deltamerge.run.runner import run

    begun, warnings = time.monotonic(), Warnings()
    if out.suffix in (".gguf", ".safetensors", ".bin") and not out.is_dir():
        hint = f"{NAME} {model} {out.with_suffix('')}" + " --gguf q8_0" * (out.suffix == ".gguf")
        raise UsageError(f"{out}: is named as a file, and OUT is a folder", hint=hint)
    file = recipe_of(model, dtype, shard_size=shard_size, quantization=quantization, gguf=gguf)
    chosen = Options(watch=warnings.watch, force=force, resume=resume or None, **options)
    if dry_run:
        with of_command_line():
            described = make_plans(file, out, chosen)[-1].describe()
        say_json(described) if as_json else say(render_plan(described, width=streams.columns(), target=out))
        return
    with of_command_line():
        result = run(file, out, chosen)
    warnings.end(result)
    report_run(result, begun, as_json=as_json, quiet=quiet)


def recipe_of(model: str, dtype: str | None = None, **output: Any) -> RecipeFile:
    """Return the recipe of `convert`: `passthrough` of one model (a folder, a lone file, a hub id).

    Paths are relative to the current folder. torch's own files are read too. Keys of `output` that are None are left
    out. RecipeError, without a line: a value that a recipe does not take.
    """

    from deltamerge.errors import RecipeError
    from deltamerge.recipe.file import read_text
    from deltamerge.recipe.yaml_source import dumped

    written = {key: value for key, value in output.items() if value is not None}
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": model}]}
    recipe |= {"dtype": dtype} if dtype is not None else {}
    recipe |= {"pickles": True, **({"output": written} if written else {})}
    try:
        file = read_text(dumped(recipe), Path.cwd() / NAME)
        return replace(file, made_for=NAME)
    except RecipeError as error:
        raise error.of(NAME) from None
