"""recipe.lock: what a run read and wrote, by content; sorted YAML, made to be diffed and verified."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from deltamerge import __version__
from deltamerge.chosen import Run, choices
from deltamerge.errors import InputError, VerifyError
from deltamerge.graph import Node
from deltamerge.hashes import DATA, describe_files
from deltamerge.io.files import input_error
from deltamerge.io.safetensors_file import read_header
from deltamerge.planner import Plan
from deltamerge.stages import Calibrated, locked

if TYPE_CHECKING:
    from deltamerge.budget import Choice

FORMAT = 1
CARD = "README.md"
LOCK_NAME = "recipe.lock"
ROWS = ".rows"
MAX_BYTES = 1 << 26
MAX_DEPTH = 64
MAX_EVENTS = 1_000_000


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
    path.write_text(yaml.safe_dump(content, sort_keys=True), encoding="utf-8")
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
        from safetensors.numpy import save_file

        save_file(rows, path.with_suffix(ROWS))
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


class _Part(BaseModel):
    """What must be so in a part of a lock; what is besides is kept as it is."""

    model_config = ConfigDict(extra="allow")


class _File(_Part):
    hash: str
    size: int


class _Input(_Part):
    files: dict[str, _File]


class _Calibration(_Part):
    objective: str
    scope: str
    search: str
    q: dict[str, float]
    rows: str | None = None


class _Lock(_Part):
    inputs: dict[str, _Input] = {}
    outputs: dict[str, _File]
    calibration: dict[str, _Calibration] = {}


def read_lock(path: Path) -> dict[str, Any]:
    """A lock's content; InputError if it is none, is larger than 64 MB, or nested as no lock is."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes")
        text = raw.decode("utf-8")
        depth = 0
        for count, event in enumerate(yaml.parse(text, loader)):  # first: nodes take much, and are composed recursively
            if count > MAX_EVENTS:
                raise InputError(f"{path}: holds more than {MAX_EVENTS:,} values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise InputError(f"{path}: nested more than {MAX_DEPTH} deep")
        content = yaml.load(text, Loader=loader)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such lock", hint="a finished `deltamerge run` leaves one") from error
    except OSError as error:
        raise InputError(f"{path}: {input_error(error)}") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date that is none
        raise InputError(f"{path}: not a readable lock") from error
    if not isinstance(content, dict) or "outputs" not in content:
        raise InputError(f"{path}: not a deltamerge lock")
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: lock format {str(content.get('format'))[:80]!r} is unknown",
            hint="use the deltamerge that wrote it",
        )
    try:
        _Lock.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return content


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


def verify(folder: Path, workers: int) -> list[str]:
    """Check every output hash of `folder`'s lock; the names checked, or VerifyError naming each that fails."""
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
    if wrong:
        raise VerifyError(f"{folder}: verification failed", also=sorted(wrong))
    return sorted(lock["outputs"])
