"""The documentation's site: `make docs` reads its pages as a browser shows them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

import deltamerge
from deltamerge.cli import commands

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MARKUP = re.compile(r"\.\. ?[\w-]+::|:\w+:`|`{3}|\{\w[\w-]*\}`|^\s*\|[-:| ]+\|\s*$|\]\([^)\s]+\)", re.MULTILINE)
WITHOUT_TEXT = {"script", "style", "template", "head"}
WITHOUT_END = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}


@dataclass
class Page(HTMLParser):
    """A rendered page: its title, its visible text, its text outside of code, its anchors and what it links to."""

    file: Path
    title: str = ""
    text: str = ""
    prose: str = ""
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.feed(self.file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in WITHOUT_END:
            self.inside.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)

    def handle_endtag(self, tag: str) -> None:
        while tag in self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if WITHOUT_TEXT & set(self.inside):
            return
        self.text += data
        if not {"pre", "code"} & set(self.inside):
            self.prose += data
        if "h1" in self.inside and "a" not in self.inside:
            self.title += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Every page of the site by its file's name, built without a warning."""
    pytest.importorskip("myst_parser", reason="needs the extra docs")
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(out / ".doctrees")]
    done = subprocess.run([*words, str(DOCS), str(out)], stdout=-1, stderr=-2, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return {str(file.relative_to(out)): Page(file) for file in sorted(out.rglob("*.html"))}


def test_every_page_of_docs_is_there_under_its_title(site: dict[str, Page]) -> None:
    pages = sorted(page for page in DOCS.rglob("*.md") if DOCS / "_build" not in page.parents)
    assert len(pages) > 30
    for page in pages:
        heading = re.search(r"^# (.+)$", page.read_text(), re.MULTILINE)
        assert heading is not None, page.name
        assert site[str(page.relative_to(DOCS).with_suffix(".html"))].title == heading[1].replace("`", ""), page.name


def test_no_page_shows_markup(site: dict[str, Page]) -> None:
    found = {name: MARKUP.findall(page.prose)[:3] for name, page in site.items()}
    assert not {name: marks for name, marks in found.items() if marks}


def test_every_link_leads_somewhere(site: dict[str, Page]) -> None:
    count = 0
    dead = []
    for name, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            file = (page.file.parent / unquote(parts.path)).resolve() if parts.path else page.file
            target = next((other for other in site.values() if other.file == file), None)
            if not file.is_file():
                dead.append(f"{name}: {link}: no such file")
            elif target is not None and parts.fragment and unquote(parts.fragment) not in target.anchors:
                dead.append(f"{name}: {link}: no such anchor")
    assert count > 1000
    assert not dead


def every_command(group: click.Group, path: str = "deltamerge") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        if not command.hidden:
            yield f"{path} {name}", command
            if isinstance(command, click.Group):
                yield from every_command(command, f"{path} {name}")


def test_every_command_and_flag_is_on_the_page_of_commands(site: dict[str, Page]) -> None:
    page = site["reference/commands.html"]
    shown = flat(page.text)
    count = 0
    for path, command in [("deltamerge", commands), *every_command(commands)]:
        anchor = path.replace(" ", "-")
        assert anchor in page.anchors or path == "deltamerge", path
        assert f"{path} [OPTIONS]" in shown or not command.params, path
        assert flat(command.help or "") in shown, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                for flag in (*parameter.opts, *parameter.secondary_opts):
                    assert f"cmdoption-{anchor}-{flag.lstrip('-')}" in page.anchors, f"{path} {flag}"
                assert flat(parameter.help or "") in shown, f"{path} {parameter.name}"
                count += 1
    assert count > 150


def test_every_public_name_is_on_the_page_of_python(site: dict[str, Page]) -> None:
    page = site["reference/api.html"]
    for name in deltamerge.__all__:
        if name != "__version__":
            assert f"deltamerge.{name}" in page.anchors, name
            assert flat((getattr(deltamerge, name).__doc__ or "").split("\n")[0])[:30] in flat(page.text), name


def flat(text: str) -> str:
    """A text without the marks that a help has for the terminal and for rendering, and in one line."""
    return " ".join(text.replace("\b", "").replace("`", "").split())
