"""The documents of a recipe file: which need which, where their results lie, and whether one is still current."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from deltamerge import __version__
from deltamerge.engine.execute import default_workers
from deltamerge.errors import DeltamergeError, RecipeError
from deltamerge.io.checkpoint import Checkpoint, open_checkpoint
from deltamerge.io.component import CONFIG
from deltamerge.io.lock_file import not_made
from deltamerge.io.safetensors_file import PREFIX, parse_header
from deltamerge.io.tensor import TensorInfo
from deltamerge.plan.planner import Plan
from deltamerge.recipe.file import Document, RecipeFile, read_recipe
from deltamerge.run import hashes
from deltamerge.run import lock as locks
from deltamerge.run.assets import assets, config

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


def is_result(document: Document, folder: Path) -> bool:
    """Whether `folder` is a result of the document, as it is or as it was, and holds nothing else."""
    try:
        if not folder.is_dir() or not_made(folder):
            return False
        return read_recipe(folder / RECIPE).output.name == document.name
    except (DeltamergeError, OSError):
        return False


def is_unchanged(folder: Path) -> bool:
    """Whether `folder` holds the result of a run, just as its lock says, and nothing else."""
    try:
        if not os.path.isdir(folder) or not_made(folder):
            return False
        return bool(locks.verify(folder, default_workers()))
    except (DeltamergeError, OSError):
        return False


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
