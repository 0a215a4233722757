"""recipe.lock as a file: its required form, and the files of a folder that its lock does not list."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from deltamerge.errors import InputError
from deltamerge.files.descriptors import input_error
from deltamerge.files.tree import entries

FORMAT = 1
LOCK_NAME = "recipe.lock"
ROWS = ".rows"
MAX_BYTES = 1 << 26
MAX_DEPTH = 64
MAX_EVENTS = 1_000_000
# Hidden files belong to tools (git, the hub's clients, macOS); no loader takes them for a part of a model.
HIDDEN = frozenset({".git", ".gitattributes", ".gitignore", ".cache", ".huggingface", ".DS_Store"})


class _Part(BaseModel):
    """The required keys of a part of a lock; other keys are kept as they are."""

    model_config = ConfigDict(extra="allow", defer_build=True)


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
    made_by: dict[str, str] = {}
    inputs: dict[str, _Input] = {}
    outputs: dict[str, _File]
    calibration: dict[str, _Calibration] = {}


def read_lock(path: Path) -> dict[str, Any]:
    """Return the content of a lock. InputError: not a lock, larger than 64 MB, or nested too deep."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes")
        text = raw.decode("utf-8")
        depth = 0
        for count, event in enumerate(yaml.parse(text, loader)):  # before composing, which recurses and takes memory
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
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or an impossible date
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


def unlisted(folder: Path, lock: Mapping[str, Any]) -> list[str]:
    """Return the entries of `folder` that its lock does not list, without the lock itself and hidden files of tools."""
    return sorted(entries(folder, lock["outputs"]).keys() - {*lock["outputs"], LOCK_NAME} - HIDDEN)


def foreign_entries(folder: Path) -> list[str]:
    """Return the entries of `folder` that no run made, and that replacing it would lose. OSError: it cannot be read.

    They are all but the plain files that its lock lists; without a lock they are all.
    """
    lock, listed = folder / LOCK_NAME, set[str]()
    if lock.is_file() and not lock.is_symlink():
        try:
            listed = {LOCK_NAME, *read_lock(lock)["outputs"]}
        except InputError:
            listed = set()
    modes = entries(folder, listed)
    return sorted(name for name, mode in modes.items() if name not in listed or not stat.S_ISREG(mode))
