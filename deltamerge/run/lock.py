"""recipe.lock: what a run read and wrote, by content; sorted YAML, made to be diffed and verified."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from deltamerge import __version__
from deltamerge.calibrate.spec import Calibrated, locked
from deltamerge.engine.graph import Node
from deltamerge.errors import VerifyError
from deltamerge.io.atomic import replace_file
from deltamerge.io.lock_file import FORMAT as FORMAT
from deltamerge.io.lock_file import LOCK_NAME as LOCK_NAME
from deltamerge.io.lock_file import ROWS as ROWS
from deltamerge.io.lock_file import read_lock as read_lock
from deltamerge.io.lock_file import unlisted
from deltamerge.io.safetensors_file import read_header
from deltamerge.io.seals import hash_output
from deltamerge.plan.planner import Plan
from deltamerge.run.calibration_record import Run, choices
from deltamerge.run.hashes import DATA, describe_files

if TYPE_CHECKING:
    from deltamerge.run.budget import Choice

CARD = "README.md"


def write_lock(
    plan: Plan,
    path: Path,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    calibration: dict[str, Any] | None = None,
    choice: Choice | None = None,
) -> dict[str, Any]:
    """Write the lock `path`; returns what it says. `choice` are the densities that a budget allowed."""
    content = {
        "deltamerge": __version__,
        "format": FORMAT,
        "seed": plan.recipe.seed,
        "inputs": inputs,
        "outputs": outputs,
        **({"calibration": calibration} if calibration else {}),
        **({"densities": choice.densities} if choice is not None else {}),
    }
    replace_file(path, yaml.safe_dump(content, sort_keys=True))
    return content


def write_calibration(plan: Plan, found: Mapping[Node, Calibrated], path: Path) -> dict[str, Any]:
    """What the lock `path` says of every calibrated model; q's of rows go to a safetensors file beside it, NAME.rows.

    Not named .safetensors: loaders that take every such file of a folder would take it for weights.
    """
    calibration: dict[str, Any] = {}
    rows: dict[str, NDArray[np.float32]] = {}
    for node, spec in plan.specs.items():
        calibrated = found[node]
        calibration[spec.name] = entry = {**calibrated.record, "q": calibrated.scalars}
        if calibrated.rows:
            entry["rows"] = path.with_suffix(ROWS).name
            rows |= {f"{spec.name}:{name}": value for name, value in sorted(calibrated.rows.items())}
    if rows:
        from safetensors.numpy import save

        replace_file(path.with_suffix(ROWS), save(rows))
        digest = hash_output(path.with_suffix(ROWS))
        calibration = {
            name: entry | ({"rows_hash": digest} if "rows" in entry else {}) for name, entry in calibration.items()
        }
    return calibration


def locked_calibration(plan: Plan, lock: dict[str, Any], path: Path) -> dict[Node, Calibrated]:
    """The q's that a lock has for a plan's stages; VerifyError where it has none that fit."""
    found: dict[Node, Calibrated] = {}
    file = path.with_suffix(ROWS)
    for node, spec in plan.specs.items():
        entry = (lock.get("calibration") or {}).get(spec.name) or {}
        rows: dict[str, NDArray[np.float32]] = {}
        if entry.get("rows"):
            if not file.is_file():
                raise VerifyError(f"{file}: missing, it holds the q's of rows", hint="copy it beside the lock")
            prefix = f"{spec.name}:"
            stated = entry.get("rows_hash")
            if stated is not None and stated != hash_output(file):
                raise VerifyError(
                    f"{file}: holds other q's of rows than the lock beside it was written with",
                    hint="run `deltamerge calibrate` again, or copy the file that belongs to the lock",
                )
            rows = {n.removeprefix(prefix): v for n, v in read_rows(path).items() if n.startswith(prefix)}
        found[node] = locked(lock, spec, rows, str(path))
    return found


def read_rows(path: Path) -> dict[str, NDArray[np.float32]]:
    """The q's of rows beside the lock `path`, by "model:tensor"; none where there is no such file."""
    from safetensors.numpy import load_file

    file = path.with_suffix(ROWS)
    if not file.is_file():
        return {}
    read_header(file)  # ours names what is wrong with it
    return dict(load_file(file))


def chosen(path: Path) -> Run | None:
    """How the run that left the lock `path` chose q; None where there is none. InputError: the lock is none."""
    if not path.is_file():
        return None
    lock = read_lock(path)
    densities = locked_densities(lock, path) if lock.get("densities") else {}
    return Run(
        deltamerge=str(lock.get("deltamerge", "unknown")),
        seed=lock["seed"] if isinstance(lock.get("seed"), int) else 0,
        choices=choices(lock.get("calibration") or {}, read_rows(path), str(path)),
        densities=densities,
    )


def locked_densities(lock: dict[str, Any], path: Path) -> dict[str, float]:
    """The densities that a budget allowed. VerifyError: the lock has none."""
    found = lock.get("densities")
    if not isinstance(found, dict) or not all(isinstance(p, float | int) and 0 < p <= 1 for p in found.values()):
        raise VerifyError(f"{path}: has no densities", hint="run without --locked")
    return {str(name): float(p) for name, p in found.items()}


def check_inputs(lock: dict[str, Any], inputs: dict[str, Any], path: Path) -> None:
    """Refuse inputs that are not the ones the lock was made from, naming each file that differs."""
    wrong: list[str] = []
    known = lock.get("inputs") or {}
    for reference in sorted(known.keys() | inputs.keys()):
        then, now = known.get(reference), inputs.get(reference)
        if reference == DATA and now is None:  # the q's are in the lock: the data is not needed
            continue
        if then is None or now is None:
            wrong.append(f"{reference}: {'not in the lock' if then is None else 'in the lock, not in the recipe'}")
            continue
        for name in sorted(then["files"].keys() | now["files"].keys()):
            if apart := _apart(then["files"].get(name), now["files"].get(name)):
                wrong.append(f"{reference}: {name} {apart}")
        if reference == DATA and then.get("commit") != now.get("commit"):
            wrong.append(f"{reference}: commit {now.get('commit')}, the lock has {then.get('commit')}")
    if wrong:
        raise VerifyError(f"{path}: the inputs are not those of the lock", also=wrong)


def _apart(then: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """How a file differs from what the lock says of it; nothing if it does not."""
    if then == now:
        return ""
    if then and now and then["size"] == now["size"]:
        kinds = [entry["hash"].partition(":")[0] for entry in (then, now)]
        if kinds[0] != kinds[1]:
            return f"cannot be compared: the lock has {kinds[0]}, this run {kinds[1]}"
    return "differs"


def verify(folder: Path, workers: int, *, only_listed: bool = False) -> list[str]:
    """Check every output hash of `folder`'s lock, and unless `only_listed` that nothing else is there; the names
    checked, or VerifyError naming each that fails."""
    lock = read_lock(folder / LOCK_NAME)
    wrong: list[str] = []
    present: list[Path] = []
    for name, entry in sorted(lock["outputs"].items()):
        path = folder / name
        if Path(name).name != name:
            wrong.append(f"{name}: not a file name")
        elif not path.is_file():
            wrong.append(f"{name}: missing")
        elif path.stat().st_size != entry.get("size"):
            wrong.append(f"{name}: {path.stat().st_size} bytes, the lock says {entry.get('size')}")
        else:
            present.append(path)
    for name, found in describe_files(present, workers).items():
        if found["hash"] != lock["outputs"][name].get("hash"):
            wrong.append(f"{name}: content differs from the lock")
    if not only_listed:
        wrong += [f"{name}: not in the lock" for name in unlisted(folder, lock)]
    if wrong:
        raise VerifyError(f"{folder}: verification failed", also=sorted(wrong))
    return sorted(lock["outputs"])
