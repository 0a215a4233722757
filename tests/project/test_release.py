"""What is published: release notes and tags, and conda-forge's recipe beside pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from deltamerge.cli.doctor import EXTRAS
from deltamerge.version import __version__

ROOT = Path(__file__).resolve().parents[2]
CHANGES = """\
# Changelog

## [Unreleased]

- later

## [1.2.0] - 2026-12-01

### Added

- a thing

## [1.1.0] - 2026-11-01

- earlier
"""
# Packages that have another name on conda-forge.
ON_CONDA = {"blake3": "python-blake3", "torch": "pytorch", "xxhash": "python-xxhash"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "deltamerge").mkdir()
    shutil.copy(ROOT / "scripts" / "release.sh", tmp_path / "scripts")
    (tmp_path / "deltamerge" / "version.py").write_text('"""Of a test."""\n\n__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=environment()).stdout


def environment() -> dict[str, str]:
    names = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return os.environ | names | {"GIT_CONFIG_GLOBAL": "/dev/null"}


def release(folder: Path, *words: str) -> tuple[int, str, str]:
    command = ["bash", "scripts/release.sh", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment())
    return done.returncode, done.stdout, done.stderr


def test_a_tag_has_the_changes_of_its_version(project: Path) -> None:
    assert release(project, "notes") == (0, "### Added\n\n- a thing\n\n", "")
    assert release(project, "tag")[0] == 0
    assert git(project, "tag", "-l", "--format=%(contents)").strip() == "deltamerge 1.2.0\n\n### Added\n\n- a thing"


def test_a_tag_is_refused_without_changes_and_of_what_is_not_committed(project: Path) -> None:
    (project / "CHANGELOG.md").write_text(CHANGES.replace("[1.2.0]", "[1.3.0]"))
    assert release(project, "tag")[0] == 1
    git(project, "commit", "-qam", "another")
    assert release(project, "tag")[::2] == (1, "CHANGELOG.md has no section [1.2.0]\n")
    assert git(project, "tag") == ""


def test_conda_forges_recipe_has_our_version_and_dependencies() -> None:
    recipe = yaml.safe_load((ROOT / "packaging" / "conda" / "recipe.yaml").read_text())
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {}
    for line in ours:
        name, bound = re.split(r"(?=[>=<])", line, maxsplit=1)
        wanted[ON_CONDA.get(name, name)] = bound
    theirs = dict(line.partition(" ")[::2] for line in recipe["requirements"]["run"])
    assert theirs == {"python": "", **wanted}
    assert recipe["context"]["version"] == __version__


def test_doctor_asks_for_every_extra_but_those_of_developers() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == extras.keys() - {"dev", "docs", "fast", "fuzz"}
