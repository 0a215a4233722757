"""recipe.lock: what a run read and wrote, by content; sorted YAML, made to be diffed and verified."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from deltamerge import __version__
from deltamerge.errors import InputError, VerifyError
from deltamerge.inputs import Input
from deltamerge.plan import Plan

FORMAT = 1
LOCK_NAME = "recipe.lock"
HASH_BYTES = 1 << 21
HUB_BLOB = re.compile(r"[0-9a-f]{64}")


def hash_file(path: Path) -> str:
    """ "blake3:<hex>" of a file's bytes; for a file of the hub's cache "sha256:<hex>", which the hub already knows."""
    blob = path.resolve()
    if path.is_symlink() and HUB_BLOB.fullmatch(blob.name):
        return f"sha256:{blob.name}"
    import blake3

    hasher = blake3.blake3()
    buffer = memoryview(bytearray(HASH_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return f"blake3:{hasher.hexdigest()}"


def describe_files(files: Iterable[Path], workers: int) -> dict[str, dict[str, Any]]:
    """File name -> {hash, size}, hashed side by side, the largest first."""
    ordered = sorted(files, key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        hashes = list(pool.map(hash_file, ordered))
    return {p.name: {"hash": h, "size": p.stat().st_size} for p, h in zip(ordered, hashes, strict=True)}


def input_files(model: Input) -> list[Path]:
    """The files of an input that a run depends on: its weights and config."""
    config = model.checkpoint.path / "config.json"
    return [*model.checkpoint.files, *([config] if config.is_file() else [])]


def describe_inputs(plan: Plan, workers: int) -> dict[str, Any]:
    """For every input its commit (if from the hub) and its files."""
    inputs: dict[str, Any] = {}
    for model in plan.inputs.all:
        reference = model.checkpoint.reference
        if reference in inputs:
            continue
        entry: dict[str, Any] = {"files": describe_files(input_files(model), workers)}
        if model.checkpoint.revision is not None:
            entry["commit"] = model.checkpoint.revision
        inputs[reference] = entry
    return inputs


def write_lock(plan: Plan, folder: Path, inputs: dict[str, Any], workers: int) -> dict[str, Any]:
    """Write `folder`/recipe.lock over every file already there; returns what it says."""
    outputs = describe_files((p for p in folder.iterdir() if p.is_file()), workers)
    content = {
        "deltamerge": __version__,
        "format": FORMAT,
        "seed": plan.recipe.seed,
        "inputs": inputs,
        "outputs": outputs,
    }
    (folder / LOCK_NAME).write_text(yaml.safe_dump(content, sort_keys=True), encoding="utf-8")
    return content


def read_lock(path: Path) -> dict[str, Any]:
    """A lock's content; InputError if it is none."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such lock", hint="a finished `deltamerge run` leaves one") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable lock") from error
    if not isinstance(content, dict) or not isinstance(content.get("outputs"), dict):
        raise InputError(f"{path}: not a deltamerge lock")
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: lock format {content.get('format')!r} is unknown",
            hint="use the deltamerge that wrote it",
        )
    return content


def check_inputs(lock: dict[str, Any], inputs: dict[str, Any], path: Path) -> None:
    """Refuse inputs that are not the ones the lock was made from, naming each file that differs."""
    wrong: list[str] = []
    locked = lock.get("inputs") or {}
    for reference in sorted(locked.keys() | inputs.keys()):
        then, now = locked.get(reference), inputs.get(reference)
        if then is None or now is None:
            wrong.append(f"{reference}: {'not in the lock' if then is None else 'in the lock, not in the recipe'}")
            continue
        files = then["files"].keys() | now["files"].keys()
        wrong += [f"{reference}: {f} differs" for f in sorted(files) if then["files"].get(f) != now["files"].get(f)]
    if wrong:
        raise VerifyError("\n".join([f"{path}: the inputs are not those of the lock", *wrong]))


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
        raise VerifyError("\n".join([f"{folder}: verification failed", *sorted(wrong)]))
    return sorted(lock["outputs"])
