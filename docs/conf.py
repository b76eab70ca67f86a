"""How Sphinx builds the site: ``sphinx-build -W -b html docs build/docs``."""

from __future__ import annotations

import re
from html import escape
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import fastadam

logger = logging.getLogger(__name__)


def _imports(name: str) -> bool:
    """Return whether a module can be documented: whether the library that it adapts to is installed."""
    try:
        import_module(f"fastadam.{name}")
    except ImportError:
        return False
    return True


project = "fastadam"
author = "The fastadam authors"
project_copyright = author
version = release = fastadam.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
ADAPTERS = ("jax", "numba_cuda", "thinc", "torch")
exclude_patterns = [f"api/{name}.md" for name in ADAPTERS if not _imports(name)]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # ```math, as the same files show it elsewhere
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = True
napoleon_type_aliases = {"FusedAdam": "fastadam.FusedAdam"}  # the adapters have classes of that name, too

html_theme = "furo"
html_title = f"fastadam {version}"
html_math_renderer = "mathml"


def _mathml(node: nodes.math | nodes.math_block, *, as_block: bool) -> str:
    code = re.sub(r"\\Big(?![a-z])", r"\\Bigl", node.astext())  # the one of the two that docutils knows
    try:
        return str(tex2mathml(code, as_block=as_block))
    except MathError as error:
        logger.warning("%s in %s", error, code, location=node)
        return escape(code)


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _display(self: Any, node: nodes.math_block) -> None:
    self.body.append(_mathml(node, as_block=True))
    raise nodes.SkipNode


def _read(app: Any, page: str, source: list[str]) -> None:
    """Lead links to the README to the page that includes a part of it; drop pages that are not built."""
    source[0] = source[0].replace("](../README.md#", "](benchmarks.md#")
    for name in exclude_patterns if page == "index" else ():
        source[0] = source[0].replace(f"\n{name.removesuffix('.md')}\n", "\n")


def _link(app: Any, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Make links of the pages that docstrings name."""
    lines[:] = [re.sub(r"(?:``)?docs/([\w-]+)\.md(?:``)?", r":doc:`/\1`", line) for line in lines]


def setup(app: Any) -> None:
    """Write equations as MathML, so that no page needs a script of another site."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _link)
