"""deltamerge from Python: plans and runs of recipe files, and the same pruning of state dicts in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from deltamerge.engine.execute import default_workers, execute
from deltamerge.errors import InputError, RecipeError, app
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.plan.planner import Plan, PlanOptions, plan
from deltamerge.recipe.file import RecipeFile, read_recipe
from deltamerge.recipe.load import loads
from deltamerge.run.lock import Lock
from deltamerge.run.options import Options
from deltamerge.run.plans import make_plans
from deltamerge.run.runner import Result
from deltamerge.run.runner import run as run_recipe
from deltamerge.tensors.dtypes import code_of, torch_dtype
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.views import in_memory


@dataclass(frozen=True, slots=True)
class Planned:
    """A recipe's plan, made from headers alone, which can be run."""

    file: RecipeFile
    plan: Plan
    options: Options

    @property
    def recipe(self) -> Path:
        """Return the recipe's path."""
        return self.file.path

    def describe(self) -> dict[str, Any]:
        """Return the plan as `deltamerge plan --json` prints it."""
        return self.plan.describe()

    def run(
        self,
        out: str | Path | None = None,
        *,
        force: bool = False,
        resume: bool | None = None,
        locked: bool = False,
        allow_nonfinite: bool = False,
        pictures: bool = False,
    ) -> Result:
        """Make the recipe's result in `out`, as `deltamerge run` does; its folder, plan and lock.

        DeltamergeError: whatever the command line would print and exit for.
        """
        drawing = None
        if pictures:
            with app("report"):
                from deltamerge.apps.report import pictures as report

            drawing = report.drawing
        options = replace(
            self.options,
            force=force,
            resume=resume,
            lock=Lock.read(self.file.lock_path) if locked else None,
            allow_nonfinite=allow_nonfinite,
            drawing=drawing,
        )
        return run_recipe(self.file, None if out is None else Path(out), options)


def load_recipe(
    recipe: str | Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    mergekit_exact: bool = False,
) -> Planned:
    """Plan the recipe file `recipe`. No weight is read.

    `memory` is a cap in bytes. `mergekit_exact` takes mergekit's defaults where ours follow the papers.

    DeltamergeError: whatever `deltamerge plan` would print and exit for.
    """
    file = read_recipe(Path(recipe), mergekit_exact=mergekit_exact)
    options = Options(device=device, workers=workers, memory=memory)
    return Planned(file, make_plans(file, options=options)[-1], options)


def prune(
    fine_tune: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    *,
    name: str = "model",
    seed: int = 0,
    workers: int | None = None,
    **keys: Any,
) -> dict[str, torch.Tensor]:
    """Return base + the pruned delta of a fine-tune, state dict for state dict.

    The tensors have the fine-tune's dtypes and are on the CPU.

    `keys` are those of a recipe's `prune` (method, density, q, include, exclude, …); the result is that of a recipe
    with them, this `seed`, and a model of this `name`, bit for bit. Nothing calibrated: that needs a model's folder.
    RecipeError, InputError: what the recipe would be refused for.
    """
    if not keys.get("method"):
        raise InputError("prune needs a method", hint='method="magnitude", density=0.1')
    models = [{"model": "fine-tune", "name": name, "prune": keys}]
    try:
        recipe = loads(yaml.safe_dump({"base_model": "base", "models": models, "seed": seed}))
    except RecipeError as error:
        raise error.of("prune", within="models[0].prune") from None
    tensors = {"base": base, "fine-tune": fine_tune}

    def opener(reference: str, _: Path) -> Checkpoint:
        infos = {n: _info(n, tensor, Path(reference)) for n, tensor in tensors[reference].items()}
        return Checkpoint(reference, Path(reference), infos, (), {})

    planned = plan(recipe, Path(), opener, PlanOptions(workers=workers or default_workers()))
    if planned.stages or planned.sources:
        raise InputError("nothing can be calibrated in memory", hint="a number for q, or a recipe and deltamerge run")
    sink = _Results({o.name: torch.empty(o.shape, dtype=torch_dtype(o.dtype)) for o in planned.outputs})
    with Reader() as reader:
        execute(planned.tasks, reader, sink, workers=planned.workers, tile_elements=planned.tile_elements)
    return sink.tensors


def _info(name: str, tensor: torch.Tensor, path: Path) -> TensorInfo:
    code = code_of(tensor.dtype)
    if code is None:
        raise InputError(f"{name}: {tensor.dtype} is not a dtype of safetensors")
    return in_memory(name, code, tuple(tensor.shape), _bytes(tensor.detach().cpu()), path)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True, slots=True)
class _Results:
    """The sink of a pruning in memory."""

    tensors: dict[str, torch.Tensor]

    def write(self, name: str, offset: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        if len(view):  # an empty tensor's memory cannot be written
            _bytes(self.tensors[name])[offset : offset + len(view)] = view
