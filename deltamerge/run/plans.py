"""The plans of a recipe file: of each of its documents in turn, from the headers of the models they name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltamerge.engine.execute import default_workers
from deltamerge.errors import UsageError
from deltamerge.io import hub
from deltamerge.io.checkpoint import Checkpoint
from deltamerge.plan.planner import Plan, plan
from deltamerge.recipe.file import documents
from deltamerge.recipe.schema import Recipe
from deltamerge.run.intermediate import folder_of, result

MOST_WORKERS = 1024
DEVICES = re.compile(r"auto|cpu|cuda(:[0-9]{1,9})?")


def make_plan(path: Path, out: Path | None = None, **options: Any) -> Plan:
    """The plan of the recipe at `path`, of its output where it has several documents; `make_plans` has the options."""
    return make_plans(path, out, **options)[-1]


def make_plans(
    path: Path,
    out: Path | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    weights: bool = False,
    data: bool = True,
    upto: str | None = None,
    pins: Mapping[str, str] | None = None,
    text: str | None = None,
    mergekit_exact: bool = False,
    densities: Mapping[str, float] | None = None,
) -> tuple[Plan, ...]:
    """The plans of every document of the recipe at `path`, or of `text` as if it stood there, in the order of their
    run, the output's last, or up to that of the document `upto`; `weights` fetches hub models whole instead of their
    headers, `data` reads the calibration data to check it, `pins` has the commits of hub models that the recipe names
    without a revision, `mergekit_exact` writes mergekit's defaults into the recipe, `densities` are those that a budget
    allows."""
    if workers is not None and workers > MOST_WORKERS:
        raise UsageError(f"{workers} workers: more than {MOST_WORKERS}", hint="as many as there are cores")
    chain = documents(path, text, mergekit_exact=mergekit_exact)
    beside, target = path.resolve().parent, target_of(path, chain[-1].recipe, out)
    made: dict[str, Checkpoint] = {}

    def opener(reference: str, folder: Path) -> Checkpoint:
        if reference in made:
            return made[reference]
        if pins and reference in pins:
            pairs = zip(reference.split("+"), pins[reference].split("+"), strict=True)
            pinned = "+".join(part if "@" in part else f"{part}@{commit}" for part, commit in pairs)
            return replace(hub.resolve(pinned, folder, weights=weights), reference=reference)
        return hub.resolve(reference, folder, weights=weights)

    plans: list[Plan] = []
    for document in chain:
        planned = plan(
            document.recipe,
            beside,
            opener,
            device=choose_device(device),
            workers=workers or default_workers(),
            memory=memory,
            data=data,
            densities=densities if document is chain[-1] else None,
        )
        plans.append(planned)
        if document.name == upto:
            break
        if document is not chain[-1]:
            folder = folder_of(document, target, beside, published=pins is not None)
            made[document.name] = result(planned, folder, document.name)
    return tuple(plans)


def choose_device(device: str) -> str:
    """ "auto" is the first GPU where there is one; torch is asked only if the machine shows an NVIDIA device."""
    if not DEVICES.fullmatch(device):
        raise UsageError(f"--device {device}: no such device", hint="auto, cpu, cuda or cuda:N")
    if device != "auto":
        return device
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def target_of(path: Path, recipe: Recipe, out: Path | None) -> Path:
    """`--out`; else `output.path` beside the recipe; else `<recipe name>-merged` beside it."""
    if out is not None:
        return out
    return path.resolve().parent / (recipe.output.path or f"{path.stem}-merged")
