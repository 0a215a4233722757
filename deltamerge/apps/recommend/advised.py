"""Merge fine-tunes as `recommend` advises: the recipe is written beside the output, and run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from deltamerge.apps.recommend.forecast import SkillForecast
from deltamerge.apps.recommend.merge import (
    EACH,
    ROWS_CHOOSE,
    ROWS_SAVE,
    FoundFit,
    MergeAdvice,
    merge_advice,
    names_of,
)
from deltamerge.apps.search.folder import lock_of
from deltamerge.apps.search.judge import THE_BASE
from deltamerge.calibrate.rows.files import FILES, count
from deltamerge.errors import InputError, OutputError
from deltamerge.files.atomic import replace_file
from deltamerge.files.descriptors import writing
from deltamerge.files.ownership import Guard
from deltamerge.files.work_folder import check_target, refuse_inputs
from deltamerge.recipe.file import read_recipe
from deltamerge.run.lock import ROWS, Lock, fingerprint, refuse_foreign_lock
from deltamerge.run.options import Options
from deltamerge.run.runner import Result
from deltamerge.run.runner import run as run_recipe


@dataclass(frozen=True, slots=True)
class AdvisedMerge:
    """A merge as it was advised, in the file `recipe`, which `run` makes in the folder `out`.

    `fit` has the coefficients that were fitted to judge it.
    """

    advice: MergeAdvice
    recipe: Path
    out: Path
    options: Options
    fit: FoundFit | None = None

    def run(self) -> Result:
        """Make the merge, as `deltamerge run` would. Coefficients are not fitted again, nor after a run that failed."""
        lock = self._lock()
        try:
            return run_recipe(read_recipe(self.recipe), self.out, replace(self.options, lock=lock))
        except BaseException:
            if lock is not None:
                lock.write_beside(self.recipe.name)
            raise

    def keep_fit(self) -> bool:
        """Write the fit as a lock beside the recipe, for `deltamerge run --locked`. Return whether there is one."""
        if (lock := self._lock()) is not None:
            lock.write_beside(self.recipe.name)
        return lock is not None

    def _lock(self) -> Lock | None:
        file = read_recipe(self.recipe)
        if self.fit is None or self.fit.recipe != fingerprint(file.output.recipe):
            return None
        return lock_of(file, self.fit.values, self.options, file.lock_path)


def advised_merge(
    models: Sequence[str],
    base: str,
    out: Path,
    *,
    rows: Sequence[Mapping[str, Any]] = (),
    keep: Mapping[str, Any] | None = None,
    fit: bool = True,
    keys: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> AdvisedMerge:
    """Choose the merge of `models` over `base`, and write its recipe to OUT.yaml beside the folder `out`.

        models, base, rows, keep, fit   as `merge_advice` takes them
        keys                            more keys of the recipe: dtype, tokenizer_source, output, …

    Nothing is measured where OUT, OUT.yaml or another's OUT.lock is in the way; `Options.force` replaces them.
    OutputError: one is, or a run could not replace OUT.
    """
    options = options or Options()
    check_target(out)
    refuse_inputs(out, [(one, Path(one).expanduser()) for one in (base, *models)])
    recipe = out.with_name(f"{out.name}.yaml")
    if not options.force:
        _refuse_other(recipe, out)
    Guard.of(out).check(force=options.force)
    refuse_foreign_lock(recipe.with_suffix(".lock"), recipe.name, rows=True, force=options.force)
    advice, found = merge_advice(
        models, base, calibration=rows, keep=keep, fit=fit, folder=recipe.parent, keys=keys, options=options
    )
    with writing(recipe.parent):
        recipe.parent.mkdir(parents=True, exist_ok=True)
    replace_file(recipe, advice.recipe, new=not options.force)
    _forget_lock(recipe)
    return AdvisedMerge(advice, recipe, out, options, found)


def _forget_lock(recipe: Path) -> None:
    """Remove the lock beside a recipe that was chosen anew. Another's stays, and `run` refuses it."""
    lock = recipe.with_suffix(".lock")
    with suppress(OutputError):
        refuse_foreign_lock(lock, recipe.name, rows=True)
        for old in (lock, lock.with_suffix(ROWS)):
            old.unlink(missing_ok=True)


def _refuse_other(recipe: Path, out: Path) -> None:
    if os.path.lexists(recipe):
        locked = " --locked" if recipe.with_suffix(".lock").exists() else ""
        hint = f"deltamerge run {quote(str(recipe))} --out {quote(str(out))}{locked} makes it; --force chooses anew"
        raise OutputError(f"{recipe}: a recipe is there", hint=hint)
    if os.path.lexists(out):
        raise OutputError(f"{out}: is there already", hint="another --out, or --force")


def rows_in(folder: Path, models: Sequence[str], **keys: Any) -> list[dict[str, Any]]:
    """Return the rows of each model, a file named as the last part of its path: math.jsonl, .csv, .txt or .parquet.

    A file in the place of the folder holds rows for all. `keys` are more keys of a recipe's `calibration`; a file of
    fewer rows than `sequences` is used whole. InputError: a model has no file, or two.
    """
    if folder.is_file():
        return [_whole_if_few(folder, keys)]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="--rows takes a folder of NAME.jsonl, a file for each model")
    made = []
    for name in names_of(models):
        files = [path for ending in sorted(FILES) if (path := folder / f"{name}{ending}").is_file()]
        if len(files) != 1:
            wrong = f"has no {name}.jsonl" if not files else f"has {files[0].name} and {files[1].name}"
            raise InputError(f"{folder}: {wrong}", hint=f"one file of rows for each of {', '.join(names_of(models))}")
        made.append(_whole_if_few(files[0], keys))
    return made


def _whole_if_few(file: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `calibration` of a file of rows."""
    calibration = {"data": str(file), **keys}
    if "sequences" in keys:
        calibration["sequences"] = max(1, count(file, keys["sequences"]))
    return calibration


def in_five_lines(made: AdvisedMerge) -> list[str]:
    """Return the choice and its reasons, the forecast of each skill, and the dangers and their remedies."""
    advice = made.advice
    savers = [line for line in advice.rescue if line in (EACH, ROWS_SAVE)]
    dangers = [line for line in advice.rescue if line not in savers]
    told = all(one.loss != "unknown" for one in advice.forecast)
    doubt = (
        "no skill is expected to be lost"
        if told
        else "not known: give --rows, of a language model prompt and completion, or messages"
    )
    helps = [line.removeprefix("to save a skill: ").replace("--calibration", "--rows") for line in savers]
    why = "; ".join(line for line in advice.why if line != ROWS_CHOOSE)
    kept = ", ".join(map(_kept, advice.forecast))
    chosen = next((one for one in advice.candidates if one.name == advice.method), None)
    if chosen is not None and THE_BASE in chosen.lost:
        kept += f"; forgets {chosen.lost[THE_BASE]:.0%} of what the models forget of the base"
    fits = chosen is not None and chosen.coefficients
    if chosen is not None and THE_BASE not in chosen.lost and any(one.by == "texts" for one in advice.forecast):
        helps.append("to forget less of the base: --keep FILE, rows of text for it")
    start = "fitted from λ" if fits else "λ"
    return [
        f"chosen: {advice.method}, {start} = {advice.factor:.3g}, in {made.recipe}",
        f"why: {why}",
        f"keeps: {', '.join(filter(None, (kept or 'not known', advice.about_heads)))}",
        f"in danger: {'; '.join(dangers) or doubt}",
        f"what helps: {'; '.join(helps) or 'deltamerge eval scores the merge beside its models'}",
    ]


def _kept(one: SkillForecast) -> str:
    if one.share is None or one.low is None or one.high is None:
        return f"{one.model} ?"
    return f"{one.model} {one.share:.0%} ({one.low:.0%} to {one.high:.0%})"
