"""recipe.lock: the inputs, choices and outputs of a run, by content hash; sorted YAML, to be diffed and verified."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from deltamerge.errors import InputError, OutputError, VerifyError
from deltamerge.files.atomic import replace_file
from deltamerge.files.descriptors import is_inside, leads_out
from deltamerge.files.hashes import hash_bytes, hash_output
from deltamerge.files.ownership import FORMAT as FORMAT
from deltamerge.files.ownership import LOCK_NAME as LOCK_NAME
from deltamerge.files.ownership import MADE_BY, Maker, has_weights, refuse_others, replace_own, unlisted
from deltamerge.files.ownership import ROWS as ROWS
from deltamerge.files.ownership import read_lock as read_lock
from deltamerge.formats.safetensors import read_header
from deltamerge.outputs.output import LearnedArtifact
from deltamerge.plan.planner import Plan
from deltamerge.recipe.schema import Recipe
from deltamerge.run.hashes import DATA, describe_files
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.tensor import Node
from deltamerge.version import __version__

if TYPE_CHECKING:
    from deltamerge.run.calibration_record import Run

CARD = "README.md"
PICTURES = ("delta.svg", "calibration.svg", "activations.svg")  # pictures of the card

Rows: TypeAlias = "Mapping[str, NDArray[np.float32]]"
"""The q's of rows, by "model:tensor"; the vectors of a mixture's routers."""
ROUTERS = "routers"


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock as a value, made by a run or read from `path`. `content` is the content of the file.

    `rows` are in a safetensors file beside it, NAME.rows. Loaders would take the name .safetensors for weights. None:
    there is no such file.
    """

    path: Path
    content: Mapping[str, Any]
    rows: Rows | None = None

    def __repr__(self) -> str:
        return f"<Lock {self.path}>"

    @classmethod
    def of(
        cls,
        path: Path,
        plan: Plan,
        inputs: Mapping[str, Any],
        found: Mapping[Node, Any],
        written: Mapping[str, Any] | None = None,
        study: Mapping[str, Any] | None = None,
        maker: Maker | None = None,
    ) -> Lock:
        """Return the lock, not yet written, of a run's inputs and choices: the q's of stages, a mixture's routers.

        `written` is the output's record of its weights, `study` the search that found the recipe, `maker` the command
        that makes the output.
        """
        rows = {
            f"{spec.name}:{name}": value
            for node, spec in plan.specs.items()
            for name, value in sorted(found[node].rows.items())
        }
        routers = found[plan.mixture.routers] if plan.mixture is not None else None
        rows |= {ROUTERS: routers.values} if routers is not None else {}
        beside = {"rows": path.with_suffix(ROWS).name, "rows_hash": hash_bytes(_safetensors(rows))} if rows else {}
        calibration = {
            spec.name: {**found[node].record, "q": found[node].scalars, **(beside if found[node].rows else {})}
            for node, spec in plan.specs.items()
        }
        content = {
            "deltamerge": __version__,
            "format": FORMAT,
            **({MADE_BY: maker.describe()} if maker is not None else {}),
            "recipe": fingerprint(plan.recipe),
            "seed": plan.recipe.seed,
            "inputs": inputs,
            "outputs": {},
            **({"warnings": list(plan.warnings)} if plan.warnings else {}),
            **({"config": plan.settled.describe()} if plan.settled.keys else {}),
            **({"calibration": calibration} if calibration else {}),
            **({ROUTERS: {**routers.record, **beside}} if routers is not None else {}),
            **(written or {}),
            **({"study": study} if study else {}),
        }
        return cls(path, content, rows or None)

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Return the lock at `path`, with the rows beside it if it names them.

        InputError: no lock, or a malformed file of rows. VerifyError: the rows belong to another lock.
        """
        content, file = read_lock(path), path.with_suffix(ROWS)
        entries = [*(content.get("calibration") or {}).values(), content.get(ROUTERS) or {}]
        named = [entry for entry in entries if entry.get("rows")]
        if not named or not file.is_file():
            return cls(path, content)
        if {entry.get("rows_hash") for entry in named} - {None, hash_output(file)}:
            raise VerifyError(
                f"{file}: holds other q's of rows than the lock beside it was written with",
                hint="run `deltamerge calibrate` again, or copy the file that belongs to the lock",
            )
        from safetensors.numpy import load_file

        read_header(file)  # ours names what is wrong with it
        return cls(path, content, load_file(file))

    @property
    def calibration(self) -> Mapping[str, Any]:
        """The record of every calibrated model."""
        return self.content.get("calibration") or {}

    def write_rows(self) -> None:
        """Write the file of rows, if there are rows. It comes before the lock, which has its hash."""
        if self.rows:
            replace_file(self.path.with_suffix(ROWS), _safetensors(self.rows))

    def write(self, outputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write the lock with the `outputs` of the run, and return its content."""
        content = {**self.content, "outputs": outputs or {}}
        replace_file(self.path, yaml.safe_dump(content, sort_keys=True))
        return content

    def write_beside(self, of: str) -> None:
        """Write the lock and its rows beside the recipe file named `of`. Call `refuse_foreign_lock` before."""
        self.write_rows()
        replace_own(self.path, yaml.safe_dump({**self.content, "outputs": {}}, sort_keys=True), of)

    def calibrated(self, plan: Plan) -> dict[Node, Any]:
        """Return the q's for a plan's stages, and a mixture's routers. VerifyError: the lock has none that fit."""
        found: dict[Node, Any] = {}
        if plan.mixture is not None:
            values = (self.rows or {}).get(ROUTERS)
            found[plan.mixture.routers] = plan.mixture.locked(self.content, values, str(self.path))
        if plan.stages:
            from deltamerge.calibrate.values import locked
        for node, spec in plan.specs.items():
            rows: Rows = {}
            if (self.calibration.get(spec.name) or {}).get("rows"):
                if self.rows is None:
                    missing = self.path.with_suffix(ROWS)
                    raise VerifyError(f"{missing}: missing, it holds the q's of rows", hint="copy it beside the lock")
                prefix = f"{spec.name}:"
                rows = {n.removeprefix(prefix): v for n, v in self.rows.items() if n.startswith(prefix)}
            found[node] = locked(self.content, spec, rows, str(self.path))
        return found

    @property
    def densities(self) -> dict[str, float]:
        """The densities that a budget allowed. VerifyError: the lock has none."""
        found = self.content.get("densities")
        if not isinstance(found, dict) or not all(isinstance(p, float | int) and 0 < p <= 1 for p in found.values()):
            raise VerifyError(f"{self.path}: has no densities", hint="run without --locked")
        return {str(name): float(p) for name, p in found.items()}

    @property
    def artifact(self) -> list[str]:
        """The files of the delta artifact that has the learned codes of this lock; []: none were learned."""
        budget = self.content.get("budget")
        learned = isinstance(budget, dict) and "learned" in budget
        return [name for name in self.content["outputs"] if learned and re.fullmatch(r"delta[\w.-]*", name)]

    @property
    def learned(self) -> LearnedArtifact | None:
        """The artifact beside it that has the learned codes. VerifyError: it is not there, or is another."""
        if not self.artifact:
            return None
        for name in self.artifact:
            path = self.path.parent / name
            if not path.is_file():
                raise VerifyError(
                    f"{path}: missing, it holds the learned codes", hint="give the output's folder: --lock FOLDER"
                )
            if hash_output(path) != self.content["outputs"][name].get("hash"):
                raise VerifyError(f"{path}: holds other learned codes than the lock was written with")
        said = self.content["budget"]["learned"].get("divergence") or {}
        return LearnedArtifact(self.path.parent, *(float(said.get(key, "nan")) for key in ("before", "after")))

    @property
    def figures(self) -> Run:
        """The calibration, for reports and pictures. InputError: it does not have the form that a run writes."""
        from deltamerge.run.calibration_record import Run, choices

        seed = self.content.get("seed")
        return Run(
            deltamerge=str(self.content.get("deltamerge", "unknown")),
            seed=seed if isinstance(seed, int) else 0,
            choices=choices(self.calibration, self.rows or {}, str(self.path)),
            densities=self.densities if self.content.get("densities") else {},
        )

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise VerifyError if the lock belongs to another recipe. Comments and places of named models do not count."""
        if self.content.get("recipe") not in (None, fingerprint(recipe)):
            raise VerifyError(
                f"{recipe.source.path} changed after {self.path.name} was written",
                hint="deltamerge lock RECIPE writes it anew",
            )

    def differences(self, outputs: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return the files whose bytes differ from the lock's outputs.

        The card, which names its folder, the pictures and the recipe's text do not count.
        """
        then = self.content["outputs"]
        compared = {*then, *outputs} - {CARD, *PICTURES, "recipe.yaml"}
        return sorted(name for name in compared if then.get(name) != outputs.get(name))

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise VerifyError if the inputs differ from the lock. It names each file that differs.

        An input counts as equal if the lock has its content under another reference.
        """
        wrong: list[str] = []
        known, inputs = self.content.get("inputs") or {}, dict(inputs)
        for reference in [name for name in inputs if name not in known]:
            same = (n for n, one in known.items() if n not in inputs and one["files"] == inputs[reference]["files"])
            if (moved := next(same, None)) is not None:
                inputs[moved] = inputs.pop(reference)
        for reference in sorted(known.keys() | inputs.keys()):
            then, now = known.get(reference), inputs.get(reference)
            # q's and codes come with the lock: the data is not needed
            if reference.startswith(DATA) and (now is None or (then and then["files"] and not now["files"])):
                continue
            if then is None or now is None:
                wrong.append(f"{reference}: {'not in the lock' if then is None else 'in the lock, not in the recipe'}")
                continue
            for name in sorted(then["files"].keys() | now["files"].keys()):
                if apart := _apart(then["files"].get(name), now["files"].get(name)):
                    wrong.append(f"{reference}: {name} {apart}")
            if reference.startswith(DATA) and then.get("commit") != now.get("commit"):
                wrong.append(f"{reference}: commit {now.get('commit')}, the lock has {then.get('commit')}")
        if wrong:
            raise VerifyError(f"{self.path}: the inputs differ from the lock", also=wrong)


def refuse_foreign_lock(path: Path, of: str, *, rows: bool, force: bool = False) -> None:
    """Raise OutputError if the file at `path` is no lock of the recipe file named `of`, or was changed since.

    With `rows`, also check the file of rows beside it. `force` allows both. The lock of an output, in a folder with
    weights, is always refused.
    """
    if path.name == LOCK_NAME and has_weights(path):
        raise OutputError(f"{path}: is the lock of the output in {path.parent}", hint="copy the recipe elsewhere")
    refuse_others(path, of, force=force, unmarked=lambda path: _is_lock(path, of))
    if rows:
        refuse_others(path.with_suffix(ROWS), of, force=force, unmarked=_is_rows)


def _is_lock(path: Path, of: str) -> bool:
    """Return whether an unmarked file is a lock, from an earlier version or copied from an output."""
    try:
        return bool((read_lock(path).get(MADE_BY) or {}).get("recipe", of) == of)
    except InputError:
        return False


def _is_rows(path: Path) -> bool:
    """Return whether a file holds q's of rows, or routers, and nothing else."""
    try:
        return all(info.dtype == "F32" and (":" in name or name == ROUTERS)
                   for name, info in read_header(path).tensors.items())  # fmt: skip
    except InputError:
        return False


def fingerprint(recipe: Recipe) -> str:
    """Return a hash of a recipe's content.

    Comments, the order of keys, and the places of base, data, output and named models do not count.
    """
    names = {model.model: model.name for model in recipe.models if model.name is not None}
    names |= {recipe.base_model: "base"} if recipe.base_model is not None else {}
    data = _renamed(recipe.source.data, names)
    data.pop("study", None)  # no byte depends on it
    models = [model for model in data.get("models") or [] if isinstance(model, dict)]
    for holder, section, key in [(data, "output", "path"), *((m, "calibration", "data") for m in (data, *models))]:
        if isinstance(holder.get(section), dict):
            holder[section].pop(key, None)
    return hash_bytes(json.dumps({key: value for key, value in data.items() if value != {}}, sort_keys=True).encode())


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def _safetensors(rows: Rows) -> bytes:
    from safetensors.numpy import save

    return save(dict(rows))


def _apart(then: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Return the difference between a file and its entry in the lock, as a text. It is empty if they agree."""
    if then == now:
        return ""
    if then and now and then["size"] == now["size"]:
        kinds = [entry["hash"].partition(":")[0] for entry in (then, now)]
        if kinds[0] != kinds[1]:
            return f"cannot be compared: the lock has {kinds[0]}, this run {kinds[1]}"
    return "differs"


def verify(folder: Path, workers: int, *, only_listed: bool = False) -> list[str]:
    """Check every output hash of `folder`'s lock and return the names.

    Files that the lock does not list are faults, unless `only_listed`. VerifyError names each file that fails.
    """
    lock = read_lock(folder / LOCK_NAME)
    wrong: list[str] = []
    present: list[Path] = []
    for name, entry in sorted(lock["outputs"].items()):
        path = folder / name
        if not is_inside(name):
            wrong.append(f"{name}: not a file name")
        elif leads_out(folder, name):
            wrong.append(f"{name}: lies behind a link")
        elif not path.is_file():
            wrong.append(f"{name}: missing")
        elif path.stat().st_size != entry.get("size"):
            wrong.append(f"{name}: {path.stat().st_size} bytes, the lock says {entry.get('size')}")
        else:
            present.append(path)
    for name, found in describe_files(present, workers, root=folder).items():
        if found["hash"] != lock["outputs"][name].get("hash"):
            wrong.append(f"{name}: content differs from the lock")
    if not only_listed:
        wrong += [f"{name}: not in the lock" for name in unlisted(folder, lock)]
    if wrong:
        raise VerifyError(f"{folder}: verification failed", also=sorted(wrong))
    return sorted(lock["outputs"])
