"""The documentation: its commands run, its links lead somewhere, its generated page is current."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_llama

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in [*ROOT.glob("docs/*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the pages' commands start from: models/ with a base and two fine-tunes, and sentences.jsonl."""
    base = tiny_llama(tmp_path / "models" / "base", seed=0, tokenizer=True)
    for seed, name in enumerate(("math", "code"), 1):
        tiny_llama(tmp_path / "models" / name, seed=seed, base=base, sigma=0.05, tokenizer=True)
    for path in tmp_path.glob("models/*/*config.json"):
        limits = {"max_position_embeddings": 256, "model_max_length": 256}
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {key: limits[key] for key in limits if key in config}))
    rows = (json.dumps({"text": " ".join(f"w{(i * j) % 90}" for j in range(3, 9))}) for i in range(1, 61))
    (tmp_path / "sentences.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=[page.name for page in RUN])
def test_the_commands_of_a_page_run_in_order(folder: Path, page: Path) -> None:
    program = folder / "bin" / "deltamerge"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m deltamerge "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for block in BLOCK.findall(page.read_text()):
        commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
        assert commands, block
        for command in commands:
            done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_the_recipe_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "scripts" / "recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "recipe.md").read_text() == module.page(), "run python scripts/recipe_reference.py"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.search(r"```{toctree}.*?```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)[0]
    assert {p.stem for p in PAGES if p.parent.name == "docs"} - {"index"} <= set(listed.split())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("myst_parser")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    subprocess.run(command, check=True)
    assert (tmp_path / "quickstart.html").exists()
