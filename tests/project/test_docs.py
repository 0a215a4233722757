"""The documentation: its commands run, its links lead somewhere, its generated page is current."""

from __future__ import annotations

import glob
import importlib.util
import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from adapters import write_adapter
from conftest import tiny_llama, tiny_pipeline, tiny_vlm

from deltamerge.cli import commands, main
from deltamerge.recipe import yaml_source
from deltamerge.recipe.load import loads
from deltamerge.recipe.open_values import template_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    page
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    if DOCS / "_build" not in page.parents
)
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not run here|file): (?P<said>.*?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
SPAN = re.compile(r"`deltamerge ([^`\n]+)`")
# what stands for a value on a page
VALUES = {"D": "0.5", "N": "2", "SIZE": "1GB", "[--calibration": "--calibration", "FILE]": "FILE"}
HUB = re.compile(r"hf://|deltamerge push ")


def title(page: Path) -> str:
    """A page's name below docs/, or below the project."""
    return str(page.relative_to(DOCS if DOCS in page.parents else ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: how it is marked, and its commands of deltamerge."""

    mark: str | None
    said: str | None
    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        lines = self.text.splitlines()
        if self.kind == "console":
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found = re.findall(r"(?:^|[\" ])(deltamerge [a-z]+(?![\w-])(?! in )[^\"\n]*)", self.text, re.MULTILINE)
        return found if self.kind in ("", "bash", "yaml") else []


def blocks(page: Path) -> list[Block]:
    return [Block(*match.group("mark", "said", "kind", "text")) for match in FENCE.finditer(page.read_text())]


def words_of(command: str) -> list[str]:
    command = re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", command)  # what a scheduler's shell puts there
    return [VALUES.get(word, word) for word in shlex.split(command, comments=True)][1:]


def parse(command: str) -> None:
    """Have click read a command, and not run it."""
    name, *words = words_of(command)
    found = commands.get_command(click.Context(commands), name)
    assert found is not None, command
    try:
        found.make_context(name, words, parent=click.Context(commands)).close()
    except click.ClickException as error:
        pytest.fail(f"{command}: {error.format_message()}")


def execute(command: str) -> None:
    """Run a command in the current folder; it has to succeed."""
    words = [w for word in words_of(command) for w in (sorted(glob.glob(word)) or [word] if "*" in word else [word])]
    errors = io.StringIO()
    with pytest.raises(SystemExit) as leaving, redirect_stdout(io.StringIO()), redirect_stderr(errors):
        main(words)
    assert leaving.value.code == 0, f"{command}\n{errors.getvalue()}"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages' commands start from: models and adapters, rows of text, recipes that are shipped."""
    folder = tmp_path_factory.mktemp("docs")
    models = folder / "models"
    base = tiny_llama(models / "base", seed=0, tokenizer=True)
    for seed, name in enumerate(("math", "code", "chat"), 1):
        tiny_llama(models / name, seed=seed, base=base, sigma=0.05, tokenizer=True)
    tiny_vlm(models / "vlm", base)
    for seed, name in enumerate(("pipeline", "pipeline-anime", "pipeline-ink")):
        tiny_pipeline(models / name, seed, models / "pipeline" if seed else None)
    for path in models.glob("*/*config.json"):
        limits = {"max_position_embeddings": 256, "model_max_length": 256}
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {key: limits[key] for key in limits if key in config}))
    for seed, name in enumerate(("math", "code"), 1):
        write_adapter(folder / "adapters" / name, seed)
    rows = "\n".join(
        json.dumps({"text": " ".join(f"w{(i * j) % 90}" for j in range(3, 9)), "label": i % 2}) for i in range(1, 61)
    )
    for name in ("sentences.jsonl", "calib.jsonl"):
        (folder / name).write_text(rows)
    for name, model in {"base": "base", "math": "math", "code": "code", "tuned": "math"}.items():
        shutil.copytree(models / model, folder / name)
    (folder / "old").mkdir()
    (folder / "recipes").mkdir()
    for name in ("models", "adapters"):
        shutil.copytree(folder / name, folder / "recipes" / name)
    for name in ("lora-merge", "lora-darex-q", "lora-extract", "lora-of-loras", "shira", "vlm", "diffusers"):
        text = (ROOT / "recipes" / f"{name}.yaml").read_text()
        (folder / "recipes" / f"{name}.yaml").write_text(text)
    (folder / "recipes" / "calib.jsonl").write_text(rows)
    for name, method in (("old", "linear"), ("recipes", "ties")):
        (folder / name / "math-code.yaml").write_text(RECIPE.replace("./models", "../models").replace("ties", method))
    return folder


RECIPE = """\
base_model: ./models/base
merge_method: ties
models:
  - {model: ./models/math, parameters: {weight: 1.0}}
  - {model: ./models/code, parameters: {weight: 0.5}}
"""


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = tmp_path / "here"
    shutil.copytree(template, here)
    monkeypatch.chdir(here)
    return here


RUN_PYTHON = {"first-merge.md", "python.md"}
OWN_TEST = {"add-a-method.md"}  # test_add_a_method.py
RUN = [p for p in PAGES if p.name not in OWN_TEST and any(b.commands and b.mark is None for b in blocks(p))]
README = ROOT / "README.md"


@pytest.mark.parametrize("page", [page for page in RUN if page != README], ids=title)
def test_the_commands_of_a_page_run_in_order(folder: Path, page: Path) -> None:
    found = blocks(page)
    if not any(command.startswith("deltamerge init") for block in found for command in block.commands):
        Path("recipe.yaml").write_text(RECIPE)
    namespace: dict[str, Any] = {}
    for block in found:
        if block.mark == "file":
            Path(str(block.said)).write_text(block.text)
        elif block.mark is None and block.kind == "console":
            assert block.commands, block.text
            for command in block.commands:
                execute(command)
        elif block.mark is None and block.kind == "python" and page.name in RUN_PYTHON:
            exec(compile(block.text, page.name, "exec"), namespace)


@pytest.mark.filterwarnings("ignore:.*divide by zero:RuntimeWarning")
def test_the_commands_of_the_readme_run(folder: Path) -> None:
    """One by one, on the recipe above them; on the calibrated one where q is chosen."""
    recipes = [block.text for block in blocks(README) if block.kind == "yaml"]
    (calibrated,) = [text for text in recipes if "calibration:" in text]
    count = 0
    for command in (command for block in blocks(README) for command in block.commands):
        listed = re.match(r"deltamerge (\w+(?:, \w+)+)", command)
        if listed:
            assert all(commands.get_command(click.Context(commands), name) for name in listed[1].split(", "))
        elif HUB.search(command):
            parse(command)
        else:
            Path("recipe.yaml").write_text(calibrated if "calibrate" in command else recipes[0])
            if command.startswith("deltamerge init"):
                Path("recipe.yaml").unlink()
            execute(command)
            count += 1
    assert count > 5


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_what_is_not_run_is_marked_and_at_least_parsed(page: Path) -> None:
    text = page.read_text()
    for command in re.findall(SPAN, FENCE.sub("", text)):
        if not command.startswith("-") and not re.match(r"\w+\.", command):
            name = words_of(f"deltamerge {command}")[0]
            found = commands.get_command(click.Context(commands), name)
            assert found is not None, command
            if "RECIPE" in command or "MODEL" in command or " ./" in command or ".y" in command:
                parse(f"deltamerge {command}")
    for block in blocks(page):
        if block.mark == "not run here":
            for command in block.commands:
                parse(command)
        elif page not in (README, *(p for p in PAGES if p.name in OWN_TEST)):
            assert block.kind in ("console", "python", "json", "toml", "yaml", "mermaid") or not block.commands, (
                block.text
            )


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_recipes_and_code_on_a_page_are_sound(page: Path) -> None:
    for block in blocks(page):
        if block.kind == "python":
            compile(block.text, page.name, "exec")
        if block.kind == "yaml" and page.name not in OWN_TEST and re.search(r"^(base_model|slices):", block.text, re.M):
            template = template_of(yaml_source.loads(block.text, page.name))
            for values in template.examples():
                loads(yaml.safe_dump(template.fill(values).data))


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        assert file.suffix != ".md" or DOCS not in page.parents or DOCS in file.resolve().parents, target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/why/how-it-works.md"])
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`([\w/-]+/(?:[\w-]+\.(?:py|c|json))?)`", text)
    assert len(named) > 10
    for path in named:
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "deltamerge")), path


def test_every_address_of_the_book_is_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("### The address book")[2].partition("`tests/` has")[0]
    addresses = re.findall(r"^\| [^|]+ \| `([\w/.]+)` \|$", page, re.MULTILINE)
    assert len(addresses) > 55
    assert [address for address in addresses if not (ROOT / "deltamerge" / address).exists()] == []


def test_the_recipe_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "scripts" / "recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.pages().items():
        assert (DOCS / "reference" / name).read_text() == text, "run python scripts/recipe_reference.py"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = " ".join(re.findall(r"```{toctree}.*?```", (DOCS / "index.md").read_text(), re.DOTALL))
    assert {title(p).removesuffix(".md") for p in PAGES if DOCS in p.parents} - {"index"} <= set(listed.split())


def test_guides_are_short() -> None:
    """At most 25,000 words outside the reference and the measurements."""
    guides = [page for page in PAGES if DOCS in page.parents and page.parent.name not in ("reference", "measurements")]
    assert len(guides) > 20
    assert sum(len(page.read_text().split()) for page in guides) <= 25_000


def test_every_page_is_of_one_kind() -> None:
    kinds = {title(page).partition("/")[0] for page in PAGES if DOCS in page.parents}
    assert kinds == {"index.md", "start", "howto", "reference", "why", "measurements"}
