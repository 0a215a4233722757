"""The documents of a recipe file: their plans, and the folders of their results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from deltamerge.errors import DeltamergeError, Problem, RecipeError
from deltamerge.files.ownership import LOCK_NAME, Guard, Maker, place_named, place_of
from deltamerge.files.work_folder import is_begun
from deltamerge.formats.components import CONFIG
from deltamerge.formats.safetensors import PREFIX, parse_header
from deltamerge.models.checkpoint import Checkpoint, open_checkpoint
from deltamerge.models.references import Models
from deltamerge.outputs.assets import config
from deltamerge.outputs.output import output_of
from deltamerge.plan.planner import Plan, plan
from deltamerge.recipe.checks import references
from deltamerge.recipe.file import FROM_STDIN, Document, RecipeFile
from deltamerge.recipe.yaml_source import Loc, YamlSource
from deltamerge.run.options import Options
from deltamerge.tensors.tensor import TensorInfo


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans the documents of a recipe file whose result will be the folder `target`."""

    file: RecipeFile
    target: Path
    options: Options
    models: Models = field(default_factory=Models)

    def folder(self, document: Document) -> Path:
        """Return the folder of a document's result that other documents need."""
        return folder_of(document, self.target, self.file.folder, published=self.options.pins is not None)

    def plans(self) -> tuple[Plan, ...]:
        """Return the plan of every document, in the order of their run, from headers alone.

        A document that needs the result of another is planned with the promised result. RecipeError: a model that a
        file names is not there.
        """
        if self.file.made_for in ("", FROM_STDIN):
            refuse_absent(self.file.path, [document.recipe.source for document in self.file.documents])
        promised: dict[str, Checkpoint] = {}
        plans: list[Plan] = []
        for document in self.file.documents:
            planned = self._plan(document, promised, whole=False)
            plans.append(planned)
            if document is not self.file.output:
                promised[document.name] = self.result(document, planned)
        return tuple(plans)

    def result(self, document: Document, planned: Plan) -> Checkpoint:
        """Return the result of a document: the content of its folder, or the promise of the plan if they differ."""
        return result_of(planned, self.folder(document), document.name)

    # A document is planned again if headers did not tell all: another's result was only promised, or the files of a hub
    # model, which are hashed and copied, had not been fetched.

    def settled(self, document: Document, planned: Plan, made: Mapping[str, Checkpoint]) -> Plan:
        """Return the plan with the finished results `made` of other documents."""
        lender = planned.inputs.vocabulary
        models = [*planned.inputs.checkpoints, *([lender.checkpoint] if lender is not None else [])]
        needs = any(checkpoint.reference in made for checkpoint in models)
        return self._plan(document, made, whole=False) if needs else planned

    def fetched(self, document: Document, planned: Plan, made: Mapping[str, Checkpoint]) -> Plan:
        """Return the plan with its hub models downloaded whole. A plan whose models are complete stays as it is."""
        remote = any(source.hub_id for checkpoint in planned.inputs.checkpoints for source in checkpoint.sources)
        return self._plan(document, made, whole=True) if remote and not planned.options.whole else planned

    def _plan(self, document: Document, made: Mapping[str, Checkpoint], *, whole: bool) -> Plan:
        pins = self.options.pins or {}
        pickles = document.recipe.pickles or self.options.pickles

        def opener(reference: str, folder: Path) -> Checkpoint:
            if reference in made:
                return made[reference]
            if reference in pins:
                pairs = zip(reference.split("+"), pins[reference].split("+"), strict=True)
                pinned = "+".join(part if "@" in part else f"{part}@{commit}" for part, commit in pairs)
                return replace(self.models.open(pinned, folder, weights=whole, pickles=pickles), reference=reference)
            return self.models.open(reference, folder, weights=whole, pickles=pickles, sums=True)

        planned = plan(document.recipe, self.file.folder, opener, replace(self.options.planning, whole=whole))
        output_of(planned).check(planned)
        return planned


def make_plans(file: RecipeFile, out: Path | None = None, options: Options | None = None) -> tuple[Plan, ...]:
    """Return the plan of every document of a recipe file, in the order of their run. Read headers."""
    return Planner(file, target_of(file, out), options or Options()).plans()


def refuse_absent(path: Path, sources: Iterable[YamlSource]) -> None:
    """Raise RecipeError with a problem for each model that the recipe file at `path` names and that is not there."""
    if missing := list(absent_models(sources, path.resolve().parent)):
        raise RecipeError(str(path), missing)


def absent_models(sources: Iterable[YamlSource], folder: Path) -> Iterator[Problem]:
    """Yield a problem for each model of recipes in `folder` that neither exists there nor has the form of a hub id."""
    sources = list(sources)
    made = {source.data.get("name") for source in sources if isinstance(source.data, dict)}
    for source in sources:
        for loc, reference in _references(source.data):
            if not made.isdisjoint(reference.split("+")) or os.path.exists(folder / os.path.expanduser(reference)):
                continue
            from deltamerge.models.hub import absent

            if (error := absent(reference, folder)) is not None:
                yield source.problem(loc, str(error), error.hint)


def _references(data: Any, loc: Loc = ()) -> Iterator[tuple[Loc, str]]:
    """Yield every `model` and `base_model` below a place of a recipe that is a reference to a single model."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if key in ("model", "base_model") and isinstance(value, str):
            if value and "*" not in value and ".." not in value.rpartition("/")[2]:
                yield (*loc, key), value
        elif key != "tokenizer":  # a token's model may be the name of a model
            yield from _references(value, (*loc, key))


def target_of(file: RecipeFile, out: Path | None) -> Path:
    """Return the target: `--out`, otherwise `output.path`, otherwise `<recipe name>-merged`, both beside the recipe."""
    if out is not None:
        return out
    return file.folder / os.path.expanduser(file.output.recipe.output.path or f"{file.path.stem}-merged")


def lock_for(file: RecipeFile, out: Path | None, given: str | None = None) -> Path:
    """Return the lock for a run: `given`, or the lock of the folder `given`.

    Otherwise it is the lock beside the recipe or, if there is none, the lock in the target.
    """
    if given is not None:
        return Path(given) / LOCK_NAME if Path(given).is_dir() else Path(given)
    there = target_of(file, out) / LOCK_NAME
    return there if there.is_file() and not file.lock_path.exists() else file.lock_path


# -- where results lie


def folder_of(document: Document, target: Path, beside: Path, *, published: bool = False) -> Path:
    """Return the folder of an intermediate result: its own `output.path`, otherwise TARGET-intermediate/NAME.

    The `output.path` of a recipe that somebody else `published` is ignored.
    """
    if document.recipe.output.path is not None and not published:
        return beside / document.recipe.output.path
    resolved = target.resolve()
    return resolved.parent / f"{resolved.name}-intermediate" / document.name


def check_places(file: RecipeFile) -> None:
    """Raise RecipeError if the `output.path` of a document that others need is not below the recipe's folder."""
    home = file.folder.resolve()
    problems = [
        document.recipe.problem(
            ("output", "path"),
            f"leaves the recipe's folder, to {folder}",
            "a path below it; or --force, which replaces there only results of runs",
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
    """Return the guard of `target`: it says which files a run of a document, begun now, may replace there.

    It may replace the result of the same document of the same recipe. If the recipe is no file, it may replace the
    result of the same command on the same models. `unasked`: the target was not given by --out. `adding`: the result is
    a further version of a chain.
    """
    recipe = document.recipe
    is_begun(target)  # leftovers of a killed run, which only had to tidy up, are no change of the target
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
    return Guard.of(target, maker, partial(_replacing, target, delta=recipe.output.rules.patches, adding=adding))


def _replacing(target: Path, *, delta: bool, adding: bool) -> AbstractContextManager[None]:
    """Return `replacing` for a target. If it does not exist and gets no delta, nothing is in the way."""
    if not delta and not os.path.exists(target):
        return nullcontext()
    from deltamerge.models.chain.publish import replacing

    return replacing(target, delta=delta, adding=adding)


def result_of(plan: Plan, folder: Path, name: str) -> Checkpoint:
    """Return the checkpoint that a run of `plan` will leave in `folder`.

    Until it is made, all files but weights and config are the models' files that will be copied. Tokens and chat
    template are planned.
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
