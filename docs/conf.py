"""The documentation's settings: `make docs` builds docs/_build/html."""

import importlib.metadata

project = "deltamerge"
release = importlib.metadata.version("deltamerge")
extensions = ["myst_parser", "sphinx_click", "sphinx_copybutton"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
copybutton_prompt_text = "$ "
html_show_copyright = False
html_title = f"deltamerge {release}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]
