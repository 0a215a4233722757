"""The documents of a recipe file: which need which, where their results lie, and whether one is still current."""

from __future__ import annotations

import graphlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge import __version__
from deltamerge.errors import DeltamergeError, RecipeError
from deltamerge.io.checkpoint import Checkpoint, join, open_checkpoint
from deltamerge.io.files import scratch
from deltamerge.io.lock_file import not_made
from deltamerge.io.safetensors_file import PREFIX, parse_header
from deltamerge.plan.planner import Plan
from deltamerge.recipe import mergekit, yaml_source
from deltamerge.recipe.documents import references
from deltamerge.recipe.schema import Recipe, load_all, loads
from deltamerge.run import hashes
from deltamerge.run import lock as locks
from deltamerge.run.assets import config, write_assets

RECIPE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class Document:
    """One recipe of a file; `text` is what its result's recipe.yaml says: the documents that it needs, and itself."""

    recipe: Recipe
    text: str

    @property
    def name(self) -> str:
        """By which others use its result; "" of the one that is the output."""
        return self.recipe.name or ""


def documents(path: Path, text: str | None = None, *, mergekit_exact: bool = False) -> tuple[Document, ...]:
    """The documents of the file `path`, or the recipe `text` as if it stood there, each after those that it needs; the
    output is the last. With `mergekit_exact` mergekit's defaults are written into them first.

    The output is the document without a name; where all have one, the last of the file. RecipeError: any fault of any
    document, or documents that need each other.
    """
    if text is not None:
        return (Document(loads(text, str(path)), text),)
    whole = yaml_source.read(path)
    recipes = load_all(yaml_source.loads_all(whole, str(path)))
    if mergekit_exact:
        whole, recipes = mergekit.written_out(whole, recipes)
    if len(recipes) == 1:
        return (Document(recipes[0], whole),)
    output = next((recipe for recipe in recipes if recipe.name is None), recipes[-1])
    by_name = {recipe.name: recipe for recipe in recipes}
    needs = {name: [n for n in by_name if n in references(recipe) and n != name] for name, recipe in by_name.items()}
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        circle = [str(name) for name in error.args[1]]
        problem = by_name[circle[0]].problem(("name",), f"documents need each other: {' → '.join(circle)}")
        raise RecipeError(str(path), [problem]) from None
    order = [*(name for name in order if name != output.name), output.name]
    return tuple(Document(by_name[n], whole if n == output.name else _text(n, needs, by_name)) for n in order)


def _text(name: str | None, needs: Mapping[Any, list[Any]], by_name: Mapping[Any, Recipe]) -> str:
    wanted: dict[str | None, None] = {}
    pending = [name]
    while pending:
        wanted |= dict.fromkeys(pending)
        pending = [n for one in pending for n in needs[one] if n not in wanted]
    texts = [by_name[n].source.text.rstrip() for n in reversed(wanted)]
    return "\n---\n".join(texts) + "\n"


def folder_of(document: Document, target: Path, beside: Path, *, published: bool = False) -> Path:
    """Where an intermediate result lies: its own `output.path` beside the recipe, unless the recipe was `published` by
    a stranger, else TARGET-intermediate/NAME."""
    if document.recipe.output.path is not None and not published:
        return beside / document.recipe.output.path
    resolved = target.resolve()
    return resolved.parent / f"{resolved.name}-intermediate" / document.name


def check_places(path: Path, chain: Sequence[Document], beside: Path) -> None:
    """RecipeError: a document that others need names a folder, by `output.path`, that is not below the recipe's."""
    home = beside.resolve()
    problems = [
        document.recipe.problem(
            ("output", "path"),
            f"leaves the recipe's folder, to {folder}",
            "a path below it; or --force, which replaces there only what a run made",
        )
        for document in chain[:-1]
        if (given := document.recipe.output.path) is not None
        and home not in (folder := Path(os.path.realpath(beside / given))).parents
    ]
    if problems:
        raise RecipeError(str(path), problems)


def is_result(document: Document, folder: Path) -> bool:
    """Whether `folder` is a result of the document, as it is or as it was, and holds nothing else."""
    try:
        if not folder.is_dir() or not_made(folder):
            return False
        return documents(folder / RECIPE)[-1].name == document.name
    except (DeltamergeError, OSError):
        return False


def result(plan: Plan, folder: Path, name: str) -> Checkpoint:
    """The checkpoint that a run of `plan` to `folder` leaves, known before it is there.

    Its files but weights and config are, until it is made, those that it copies; tokens and chat template are planned.
    """
    headers = {
        file.name: parse_header(file.header[PREFIX:], folder / file.name, file.size) for file in plan.layout.files
    }
    tensors = join(headers, None)
    files = tuple(folder / file for file in headers)
    try:
        made = open_checkpoint(folder, reference=name)
    except DeltamergeError:
        made = None
    if made is not None and made.tensors == tensors:
        return made
    copied = (plan.inputs.vocabulary or plan.inputs.template).checkpoint.path
    tokens = plan.vocabulary.tokens if plan.vocabulary is not None else None
    chat = plan.chat_template.text if plan.chat_template is not None else None
    return Checkpoint(name, copied, tensors, files, config(plan), tokens=tokens, chat_template=chat)


def is_current(document: Document, planned: Plan, folder: Path) -> bool:
    """Whether `folder` holds what the document would make: recipe, version, inputs and outputs the same by content."""
    try:
        lock = locks.read_lock(folder / locks.LOCK_NAME)
        before = documents(folder / RECIPE)[-1].recipe.source.data
        if before != document.recipe.source.data or lock.get("deltamerge") != __version__:
            return False
        if lock.get("inputs") != hashes.describe_inputs(planned, planned.workers):
            return False
        locks.verify(folder, planned.workers)
        with scratch(folder.resolve().parent) as made:
            write_assets(planned, made)
            found = {path.name: hashes.hash_output(path) for path in made.iterdir()}
        return all(lock["outputs"].get(name, {}).get("hash") == digest for name, digest in found.items())
    except DeltamergeError:
        return False
