"""The documents of a recipe file: which need which, where their results lie, and whether one is still current."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from deltamerge.errors import DeltamergeError, RecipeError
from deltamerge.files.ownership import Guard, Maker, place_named, place_of
from deltamerge.files.work_folder import is_begun
from deltamerge.formats.components import CONFIG
from deltamerge.formats.safetensors import PREFIX, parse_header
from deltamerge.models.chain.publish import replacing
from deltamerge.models.checkpoint import Checkpoint, open_checkpoint
from deltamerge.outputs.assets import assets, config
from deltamerge.plan.planner import Plan
from deltamerge.recipe.checks import references
from deltamerge.recipe.file import Document, RecipeFile, read_recipe
from deltamerge.run import hashes
from deltamerge.run import lock as locks
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.version import __version__

RECIPE = "recipe.yaml"


def folder_of(document: Document, target: Path, beside: Path, *, published: bool = False) -> Path:
    """Where an intermediate result lies: its own `output.path` beside the recipe, unless the recipe was `published` by
    a stranger, else TARGET-intermediate/NAME."""
    if document.recipe.output.path is not None and not published:
        return beside / document.recipe.output.path
    resolved = target.resolve()
    return resolved.parent / f"{resolved.name}-intermediate" / document.name


def check_places(file: RecipeFile) -> None:
    """RecipeError: a document that others need names a folder, by `output.path`, that is not below the recipe's."""
    home = file.folder.resolve()
    problems = [
        document.recipe.problem(
            ("output", "path"),
            f"leaves the recipe's folder, to {folder}",
            "a path below it; or --force, which replaces there only what a run made",
        )
        for document in file.documents[:-1]
        if (given := document.recipe.output.path) is not None
        and home not in (folder := Path(os.path.realpath(home / given))).parents
    ]
    if problems:
        raise RecipeError(str(file.path), problems)


def guard_of(
    file: RecipeFile, document: Document, target: Path, *, unasked: bool = False, adding: bool = False
) -> Guard:
    """What a run of a document, which begins now, may replace at `target`: what the same document of the same recipe
    made, or where the recipe is no file the same command of the same models.

    `unasked`: no --out said where; `adding`: it is a version that comes after one of its chain.
    """
    recipe = document.recipe
    is_begun(target)  # a killed run that only had to tidy up is no change of the target
    models = references(recipe)
    if not file.made_for:
        named = file.path.name.encode("utf-8", "replace").decode()
        maker = Maker("run", named, "" if document is file.output else document.name, models,
                      place_of(file.path, target), unasked)  # fmt: skip
    elif file.made_for.startswith("hf://"):
        maker = Maker("run", file.made_for, "" if document is file.output else document.name, models, own=True)
    else:
        places = [place_of(file.folder / os.path.expanduser(part), target)
                  if (file.folder / os.path.expanduser(part)).exists() else part
                  for model in sorted(models) for part in model.split("+")]  # fmt: skip
        maker = Maker(file.made_for, models=models, place=place_named(json.dumps(places).encode("utf-8", "replace")))
    is_delta = recipe.output.kind == "delta"
    return Guard.of(target, maker, partial(replacing, target, delta=is_delta, adding=adding))


def result(plan: Plan, folder: Path, name: str) -> Checkpoint:
    """The checkpoint that a run of `plan` to `folder` leaves, known before it is there.

    Its files but weights and config are, until it is made, those that it copies; tokens and chat template are planned.
    """
    headers = {
        file.name: parse_header(file.header[PREFIX:], folder / file.name, file.size) for file in plan.layout.files
    }
    template = plan.inputs.template.checkpoint
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        start = f"{file.rpartition('/')[0]}/" if "/" in file else ""
        tensors |= {start + n: replace(info, name=start + n) for n, info in header.tensors.items()}
    files = tuple(folder / file for file in headers)
    try:
        made = open_checkpoint(folder, reference=name, sums=True)
    except DeltamergeError:
        made = None
    summed = plan.running_sum
    tensors = tensors if summed is None else summed.marked(tensors)
    if made is not None and made.tensors == tensors and made.running_sum == summed:
        return made
    copied = (plan.inputs.vocabulary or plan.inputs.template).checkpoint.path
    tokens = plan.vocabulary.tokens if plan.vocabulary is not None else None
    chat = plan.chat_template.text if plan.chat_template is not None else None
    file = template.config_file or (CONFIG if template.config else "")
    return Checkpoint(name, copied, tensors, files, config(plan), tokens=tokens, chat_template=chat,
                      components=template.components, config_file=file, running_sum=summed)  # fmt: skip


def is_current(document: Document, planned: Plan, folder: Path) -> bool:
    """Whether `folder` holds what the document would make: recipe, version, inputs and outputs the same by content."""
    try:
        lock = locks.read_lock(folder / locks.LOCK_NAME)
        before = read_recipe(folder / RECIPE).output.recipe.source.data
        if before != document.recipe.source.data or lock.get("deltamerge") != __version__:
            return False
        if lock.get("inputs") != hashes.describe_inputs(planned, planned.workers):
            return False
        locks.verify(folder, planned.workers)
        for name, content in assets(planned).items():
            hashed = hashes.hash_output(content) if isinstance(content, Path) else hashes.hash_bytes(content)
            if lock["outputs"].get(name, {}).get("hash") != hashed:
                return False
        return True
    except DeltamergeError:
        return False
