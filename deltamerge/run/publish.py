"""Publish a finished folder on the hub, and fetch a published recipe and lock to run again."""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import InputError, UsageError
from deltamerge.errors.shown import some
from deltamerge.files.ownership import LOCK_NAME
from deltamerge.models import hub
from deltamerge.recipe import yaml_source
from deltamerge.run.hashes import DATA
from deltamerge.run.lock import ROWS, Lock, verify
from deltamerge.version import __version__

SCHEME = "hf://"
RECIPE_NAME = "recipe.yaml"
PRIVATE = re.compile(r"~?/\S|[A-Za-z]:\\")


def push(folder: Path, repository: str, *, public: bool, workers: int) -> str:
    """Upload `folder`'s lock, and the files that it names, to the hub. Return the commit's address.

    A missing repository is made, private unless `public`. Files that an interrupted push left on the hub are not sent
    again. InputError: the recipe names absolute paths of this machine, there is no token or no right to write, or the
    hub cannot be reached. VerifyError: the folder differs from its lock. UsageError: the repository is public and
    `public` is not given.
    """
    from huggingface_hub import HfApi

    names = [*verify(folder, workers, only_listed=True), LOCK_NAME]
    if private := sorted(set(_private_paths(folder))):
        raise InputError(
            f"{folder}: its recipe names paths of this machine: {some(private)}",
            hint="write hub ids, or paths relative to the recipe, and run it again",
        )
    if hub.HUB_ID.fullmatch(repository) is None or "@" in repository:
        raise UsageError(f"{repository}: no repository's name", hint="org/name")
    api = HfApi()
    with errors.context(repository), hub.upload_errors():
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise UsageError("is public", hint="--public says that you know")
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=f"Upload {folder.resolve().name}, made with deltamerge {__version__}",
        )
    return str(done.commit_url)


def _private_paths(folder: Path) -> Iterator[str]:
    """Yield absolute paths, and paths in a home folder, among the values of a folder's recipe."""
    file = folder / RECIPE_NAME
    pending = [one.data for one in yaml_source.loads_all(yaml_source.read(file), str(file))] if file.exists() else []
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and PRIVATE.match(value):
            yield value


@dataclass(frozen=True, slots=True)
class HubMerge:
    """A merge on the hub: the folder with its recipe and lock, their commit, and the lock's content."""

    recipe: Path
    commit: str
    lock: Lock

    @property
    def pins(self) -> dict[str, str]:
        """The commit of every input, from the lock."""
        return {name: entry["commit"] for name, entry in self.lock.content["inputs"].items() if "commit" in entry}


def fetch(reference: str, folder: Path) -> HubMerge:
    """Copy recipe and lock of `reference` ("hf://org/name", "hf://org/name@revision") to `folder`.

    InputError: `hub.open_model` refuses it, recipe or lock are missing, or only the publisher has the inputs.
    """
    name = reference.removeprefix(SCHEME)
    with errors.context(reference):
        snapshot = hub.download(name, [RECIPE_NAME, LOCK_NAME], optional=[str(Path(LOCK_NAME).with_suffix(ROWS))])
        for path in snapshot.iterdir():
            if path.name in (RECIPE_NAME, LOCK_NAME) or path.suffix == ROWS:
                shutil.copyfile(path, folder / path.name)
        lock = Lock.read(folder / LOCK_NAME)
        if lock.artifact:
            codes = hub.download(name, lock.artifact)
            for file in lock.artifact:
                shutil.copyfile(codes / file, folder / file)
        local = [name for name, entry in lock.content["inputs"].items() if name != DATA and "commit" not in entry]
        if local:
            raise InputError(
                f"was made from folders of its publisher: {', '.join(local)}",
                hint=f"download {RECIPE_NAME}, write your own paths, and run that",
            )
    return HubMerge(folder / RECIPE_NAME, snapshot.name, lock)
