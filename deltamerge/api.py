"""deltamerge from Python: recipes, the commands as functions, and pruning of state dicts in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge.engine.execute import default_workers, execute
from deltamerge.errors import InputError, RecipeError, UsageError, app
from deltamerge.errors.shown import as_html
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.plan.planner import Plan, PlanOptions, plan
from deltamerge.recipe.file import RecipeFile, read_recipe, read_text
from deltamerge.recipe.load import loads
from deltamerge.recipe.yaml_source import dumped
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

if TYPE_CHECKING:
    from deltamerge.apps.inspect.statistics import Report
    from deltamerge.apps.recommend.merge import MergeAdvice
    from deltamerge.apps.recommend.prune import Recommendation
    from deltamerge.run.apply import ApplyResult

Reference = str | Path
"""A model: a folder, or a hub id."""

Rows = Mapping[str, Any]
"""Calibration rows, by the keys of a recipe's `calibration`."""


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

    def __repr__(self) -> str:
        return f"<Planned {self.recipe}: {self.plan!r}>"

    def _repr_html_(self) -> str:
        return as_html(str(self.recipe), {"method": self.plan.recipe.method.name, **self.plan.summary()})

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
        """Make the recipe's result in `out`, as `deltamerge run` does. Return its folder, plan and lock.

        DeltamergeError: any error that the command would print.
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

    DeltamergeError: any error that `deltamerge plan` would print.
    """
    file = read_recipe(Path(recipe), mergekit_exact=mergekit_exact)
    options = Options(device=device, workers=workers, memory=memory)
    return Planned(file, make_plans(file, options=options)[-1], options)


def merge(
    models: Sequence[Reference | Mapping[str, Any]],
    out: Reference,
    *,
    method: str | None = None,
    base: Reference | None = None,
    rows: Rows | Sequence[Rows] | None = None,
    keep: Rows | None = None,
    device: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    force: bool = False,
    **keys: Any,
) -> Result:
    """Merge models into the folder `out`, by a method, or by a chosen method that suits the models.

        models         folders, hub ids, or items of a recipe's `models`: {"model": …, "parameters": {…}}
        method, base   `merge_method` and `base_model` of a recipe
        rows           without a method: rows of text for all models, or a list with rows for each; they choose the
                       method
        keep           beside `rows`: rows of text which the merge shall answer as the base does
        keys           other keys of the recipe: parameters, prune, calibration, dtype, tokenizer_source, output, …

    Without a method, a method is chosen and its recipe written to OUT.yaml, as `deltamerge merge` does. It is chosen
    for merges with the other keys; base_model, parameters, balance and calibration are chosen with it.

    RecipeError: the recipe is refused. DeltamergeError: any error that `deltamerge run` would print.
    """
    options = Options(device=device, workers=workers, memory=memory, force=force)
    if isinstance(models, str | Path):
        raise UsageError(f"models: {str(models)!r} is one path", hint=f"a list: [{str(models)!r}, …]")
    if method is None:
        named = [str(one) for one in models if not isinstance(one, Mapping)]
        if base is None or len(named) < len(models):
            raise UsageError("without a method merge needs a base, and models by name", hint='method="ties"')
        with app("recommend"):
            from deltamerge.apps.recommend.advised import advised_merge

        for name, given in (("rows", rows), ("keep", keep)):
            if isinstance(given, str | Path):
                many = ", or a list with one for each model" if name == "rows" else ""
                raise UsageError(f"{name}: {given}: is a path", hint=f'{name}={{"data": "rows.jsonl"}}{many}')
        several = [] if rows is None else [rows] if isinstance(rows, Mapping) else list(rows)
        return advised_merge(named, str(base), Path(out), rows=several, keep=keep, keys=keys, options=options).run()
    if keep is not None:
        hint = "list the base among the models, with its calibration"
        raise UsageError("keep is of a merge whose method is chosen, and one is given", hint=hint)
    if rows is not None:
        raise UsageError("rows choose a method, and one is given", hint="calibration={…} for a method that takes rows")
    items = [dict(one) if isinstance(one, Mapping) else {"model": str(one)} for one in models]
    recipe = {"merge_method": method, **({} if base is None else {"base_model": str(base)}), "models": items, **keys}
    try:
        file = replace(read_text(dumped(recipe), Path.cwd() / "merge"), made_for="merge")
        return run_recipe(file, Path(out), options)
    except RecipeError as error:
        raise error.of("merge") from None


def extract(
    model: Reference,
    base: Reference,
    out: Reference | None = None,
    *,
    density: float | None = None,
    method: str | None = None,
    q: float | None = None,
    values: str | None = None,
    after: Reference | None = None,
    lora: int | Mapping[str, Any] | None = None,
    calibration: Rows | None = None,
    device: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    force: bool = False,
) -> Result:
    """Make a delta artifact of a fine-tune, or a LoRA, as `deltamerge extract` does.

    `lora` is a rank, or keys of a recipe's output (rank, energy, budget, whole, targets, dora). The other arguments are
    the options of the command. `out` is by default NAME-delta or NAME-lora in the current folder.

    DeltamergeError: any error that the command would print.
    """
    with app("chain"):
        from deltamerge.apps.chain.extract import extract as make

    return make(
        str(model), str(base), None if out is None else Path(out),
        density=density, method=method, q=q, values=values, after=None if after is None else str(after),
        lora={"rank": lora} if isinstance(lora, int) else lora, calibration=calibration,
        options=Options(device=device, workers=workers, memory=memory, force=force),
    )  # fmt: skip


def apply(
    delta: Reference,
    base: Reference,
    out: Reference,
    *,
    workers: int | None = None,
    memory: int | None = None,
    force: bool = False,
) -> ApplyResult:
    """Put a delta artifact on its base, in the folder `out`, as `deltamerge apply` does."""
    from deltamerge.run.apply import apply as put

    workers = workers or default_workers()
    return put(str(delta), str(base), Path(out), workers=workers, memory=memory, force=force)


def inspect(
    model: Reference,
    base: Reference,
    *,
    calibration: Rows | None = None,
    density: float = 0.01,
    report: Reference | None = None,
    device: str = "auto",
    workers: int | None = None,
    force: bool = False,
) -> Report:
    """Measure the delta of a fine-tune, as `deltamerge inspect --json` prints it; `report` is a page to draw it on."""
    with app("inspect"):
        from deltamerge.apps.inspect.study import inspect as measure

    rows, page = None if calibration is None else dict(calibration), None if report is None else Path(report)
    more: dict[str, Any] = {"device": device, "workers": workers, "force": force}
    return measure(str(model), str(base), calibration=rows, density=density, out=page, **more)


def recommend(
    models: Reference | Sequence[Reference],
    base: Reference,
    *,
    density: float | None = None,
    calibration: Rows | Sequence[Rows] | None = None,
    keep: Rows | None = None,
    out: Reference | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> Recommendation | MergeAdvice:
    """Advise on the pruning of one model at a density, or on the merge of several, as `deltamerge recommend` does.

    `calibration` is rows for all models, or a list with rows for each model. `keep` is rows which a merge shall answer
    as the base does. The recipe is in `.recipe` of the result, and is written to `out` if given.

    UsageError: a density for several models, none for one, or several rows or `keep` for one.
    """
    several = [models] if isinstance(models, str | Path) else list(models)
    rows = [] if calibration is None else [calibration] if isinstance(calibration, Mapping) else list(calibration)
    page = None if out is None else Path(out)
    if len(several) > 1:
        if density is not None:
            raise UsageError("a density is for one model, and these are several")
        with app("recommend"):
            from deltamerge.apps.recommend.merge import recommend_merge

        options = Options(device=device, workers=workers)
        return recommend_merge(
            [str(m) for m in several], str(base), calibration=rows, keep=keep, out=page, options=options
        )
    if density is None or len(several) != 1 or len(rows) > 1 or keep is not None:
        raise UsageError("one model needs a density, one set of rows at most, and nothing to keep", hint="density=0.1")
    with app("recommend"):
        from deltamerge.apps.recommend.prune import recommend_prune

    one = dict(rows[0]) if rows else None
    where: dict[str, Any] = {"device": device, "workers": workers}
    return recommend_prune(str(several[0]), str(base), density, calibration=one, out=page, **where)


def prune(
    fine_tune: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    *,
    name: str = "model",
    seed: int = 0,
    workers: int | None = None,
    **keys: Any,
) -> dict[str, torch.Tensor]:
    """Return base + pruned delta of a fine-tune, as a state dict.

    The tensors have the fine-tune's dtypes and are on the CPU.

    `keys` are the keys of a recipe's `prune` (method, density, q, include, exclude, …). The result equals, bit for bit,
    the result of a recipe with these keys, this `seed`, and a model of this `name`. A calibrated q needs a model's
    folder, so it is refused here. RecipeError, InputError: the recipe would be refused.
    """
    if not keys.get("method"):
        raise InputError("prune needs a method", hint='method="magnitude", density=0.1')
    models = [{"model": "fine-tune", "name": name, "prune": keys}]
    try:
        recipe = loads(dumped({"base_model": "base", "models": models, "seed": seed}))
    except RecipeError as error:
        raise error.of("prune", within="models[0].prune") from None
    tensors = {"base": base, "fine-tune": fine_tune}

    def opener(reference: str, _: Path) -> Checkpoint:
        infos = {n: _info(n, tensor, Path(reference)) for n, tensor in tensors[reference].items()}
        return Checkpoint(reference, Path(reference), infos, (), {})

    planned = plan(recipe, Path(), opener, PlanOptions(workers=workers or default_workers()))
    if planned.stages or planned.sources:
        raise InputError("nothing can be calibrated in memory", hint="give q a number, or write a recipe and run it")
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
        if len(view):  # the memory of an empty tensor cannot be written
            _bytes(self.tensors[name])[offset : offset + len(view)] = view
