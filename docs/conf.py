"""The documentation's settings: `make docs` builds docs/_build/html."""

import importlib.metadata
import re
from itertools import groupby
from typing import Any

import click

project = "deltamerge"
release = importlib.metadata.version("deltamerge")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
copybutton_prompt_text = "$ "
html_show_copyright = False
html_title = f"deltamerge {release}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
add_module_names = False
default_role = "code"  # docstrings write `name`
smartquotes = False  # --flag would become –flag
suppress_warnings = ["misc.highlighting_failure"]


def examples_as_code(app: Any, context: click.Context, lines: list[str]) -> None:
    """Turn the examples of a command's help, lines behind a bar, into a block that can be copied."""
    code: list[str] = []
    for number, line in enumerate(lines):
        if line.startswith("| "):
            first = number == 0 or not lines[number - 1].startswith("| ")
            code += ["", ".. code-block:: text", ""] if first else []
            line = f"   {line.removeprefix('| ')}"
        code.append(line)
    lines[:] = code


def whole_metavars(app: Any, context: click.Context, lines: list[str]) -> None:
    """Give metavars back the brackets that sphinx-click strips from their ends."""
    metavars = {option.metavar for option in context.command.params if option.metavar}
    for metavar in metavars:
        stripped = metavar.lstrip("<[{($").rstrip(">]})$")
        lines[:] = [line.replace(f"<{stripped}>", f"<{metavar}>") for line in lines]


COLUMNS = re.compile(r"(\s*)(\w[\w, ]*?)\s{2,}(\S.*)")


def docstring_as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make a definition list of each paragraph in two columns, and a block of code of each that is indented."""
    text: list[str] = []
    for blank, group in groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(group)
        if blank or paragraph[0].rstrip() in ("Args:", "Raises:", "Returns:"):
            text += paragraph
        elif COLUMNS.match(paragraph[0]):
            for line in paragraph:
                entry = COLUMNS.match(line)
                text += [entry[2], f"   {entry[3]}"] if entry else [f"   {line.strip()}"]
        elif all(line.startswith("    ") for line in paragraph):
            text += ["::", "", *paragraph]
        else:
            text += paragraph
    lines[:] = text


def setup(app: Any) -> None:
    """Have these called for each command, and each docstring."""
    app.connect("autodoc-process-docstring", docstring_as_rst, priority=400)
    app.connect("sphinx-click-process-description", examples_as_code)
    app.connect("sphinx-click-process-options", whole_metavars)
