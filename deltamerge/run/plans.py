"""The plans of a recipe file: of each of its documents, from the headers of the models that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from deltamerge.files.lock_file import LOCK_NAME
from deltamerge.models.chain.models import Models
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.outputs.output import output_of
from deltamerge.plan.planner import Plan, plan
from deltamerge.recipe.file import Document, RecipeFile
from deltamerge.run.intermediate import folder_of, result
from deltamerge.run.options import Options


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans the documents of a recipe file whose result will be the folder `target`."""

    file: RecipeFile
    target: Path
    options: Options
    models: Models = field(default_factory=Models)

    def folder(self, document: Document) -> Path:
        """Where the result of a document that others need lies."""
        return folder_of(document, self.target, self.file.folder, published=self.options.pins is not None)

    def plans(self) -> tuple[Plan, ...]:
        """The plan of every document, in the order of their run, from headers alone; those that need the result of
        another are promised it."""
        promised: dict[str, Checkpoint] = {}
        plans: list[Plan] = []
        for document in self.file.documents:
            planned = self._plan(document, promised, whole=False)
            plans.append(planned)
            if document is not self.file.output:
                promised[document.name] = self.result(document, planned)
        return tuple(plans)

    def result(self, document: Document, planned: Plan) -> Checkpoint:
        """What a document makes: what is in its folder, if that is as planned, else what it promises."""
        return result(planned, self.folder(document), document.name)

    # A document is planned a second time where headers do not tell all: where another's result was only promised, and
    # where a hub model's files, which are hashed and copied, had not been fetched.

    def settled(self, document: Document, planned: Plan, made: Mapping[str, Checkpoint]) -> Plan:
        """The plan now that the results `made` of others are there."""
        lender = planned.inputs.vocabulary
        models = [*planned.inputs.checkpoints, *([lender.checkpoint] if lender is not None else [])]
        needs = any(checkpoint.reference in made for checkpoint in models)
        return self._plan(document, made, whole=False) if needs else planned

    def fetched(self, document: Document, planned: Plan, made: Mapping[str, Checkpoint]) -> Plan:
        """The plan with its hub models downloaded whole; one that was already stays as it is."""
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
    """The plan of every document of a recipe file, in the order of their run, the output's last; reads headers."""
    return Planner(file, target_of(file, out), options or Options()).plans()


def target_of(file: RecipeFile, out: Path | None) -> Path:
    """`--out`; else `output.path` beside the recipe; else `<recipe name>-merged` beside it."""
    if out is not None:
        return out
    return file.folder / (file.output.recipe.output.path or f"{file.path.stem}-merged")


def lock_for(file: RecipeFile, out: Path | None, given: str | None = None) -> Path:
    """The lock that a run goes by: the one `given`, or of the folder given; else the one beside the recipe; else, where
    there is none, the one in the target."""
    if given is not None:
        return Path(given) / LOCK_NAME if Path(given).is_dir() else Path(given)
    there = target_of(file, out) / LOCK_NAME
    return there if there.is_file() and not file.lock_path.exists() else file.lock_path
