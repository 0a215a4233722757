"""The documentation's settings: `make docs` builds docs/_build/html."""

import importlib.metadata
from typing import Any

import click

project = "deltamerge"
release = importlib.metadata.version("deltamerge")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "sphinx_copybutton"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
copybutton_prompt_text = "$ "
html_show_copyright = False
html_title = f"deltamerge {release}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
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


def setup(app: Any) -> None:
    """Have both called for each command."""
    app.connect("sphinx-click-process-description", examples_as_code)
    app.connect("sphinx-click-process-options", whole_metavars)
