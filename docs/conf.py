# SPDX-License-Identifier: Apache-2.0
"""Sphinx's settings for this folder. `make docs` builds the pages into build/docs."""

from typing import Any

import combiner

project = "Combiner"
author = "the authors of combiner-attention"
release = combiner.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

html_theme = "furo"
html_title = f"Combiner {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_copyright = False

default_role = "py:obj"  # `Fixed` in a docstring is a link; text that is no name is code
myst_heading_anchors = 3  # [text](page.md#heading), as on GitHub
nb_execution_mode = "off"  # outputs are committed; `make notebooks` runs the notebooks
nb_merge_streams = True

autodoc_typehints = "none"  # docstrings say more than annotations: shapes, dtypes
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False

SECTIONS = ("Parameters", "Returns", "Raises", "Attributes")


def move_descriptions(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Writes "name : description" as numpydoc's "name", with the description below it.

    After the colon our docstrings have the description, numpydoc has a type. A list of names may go on in an indented
    line.
    """
    moved: list[str] = []
    section = ""
    names = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if following and not following.strip("-"):
            section = line
        is_item = section in SECTIONS and line and not line.startswith(" ") and line != section and line.strip("-")
        if is_item or names:
            names += line.strip() + " "
            if " : " in names:
                names, text = names.split(" : ", 1)
                moved += [names, "    " + text.strip()]
                names = ""
            elif not names.endswith(", "):
                moved.append(names.strip())
                names = ""
        else:
            moved.append(line)
    lines[:] = moved


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", move_descriptions, priority=400)  # before napoleon's, at 500
