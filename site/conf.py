"""Sphinx's settings for the site. build.py lays out the pages and starts Sphinx with them."""

import importlib.util
import inspect
import re
import sys
import tomllib
from html import escape
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

# A docstring's line of text: not indented, no item of a list and no heading of a section.
TEXT = re.compile(r"(?!(Args|Attributes|Raises|Returns|Yields):$)[^\s*\d-]")
# Commands of TeX that docutils does not know, and what it knows instead.
SYNONYMS = (
    *((r"[Bb]igg?(?=[(\[{|])", "Bigl"), (r"[Bb]igg?(?=[)\]}])", "Bigr")),
    *(("dots", "ldots"), ("iff", "Leftrightarrow"), ("stackrel", "overset")),
    *(("textbf", "mathbf"), ("textit", "mathit"), ("texttt", "mathtt")),
)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = html_title = PROJECT["name"]
author = PROJECT["authors"][0]["name"]
release = PROJECT["version"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_exercise",
    "sphinxcontrib.bibtex",
]

# Pages: Markdown and notebooks with their stored outputs
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_ipywidgets_js = {}  # the sliders need a kernel; without them no page loads a script from elsewhere
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
highlight_language = "none"  # where a block does not name one
bibtex_bibfiles = ["references.bib"]

# Reference: the docstrings of the package
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures' own lines stay short; docstrings say what an argument is
autodoc_mock_imports = [] if importlib.util.find_spec("triton") else ["triton"]
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "literal"
python_use_unqualified_type_names = True
add_module_names = False
viewcode_line_numbers = True
viewcode_follow_imported_members = False

# Look
html_theme = "sphinx_book_theme"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search field of the sidebar is enough
    "use_download_button": False,
    "use_fullscreen_button": False,
    "repository_url": PROJECT.get("urls", {}).get("Repository", ""),
    "use_repository_button": "Repository" in PROJECT.get("urls", {}),
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def mathml(node, block):
    """A formula in TeX as MathML, which browsers show without a script; a warning if it cannot be read."""
    formula = node.astext()
    for ours, theirs in SYNONYMS:
        formula = re.sub(rf"\\{ours}(?![a-zA-Z])", rf"\\{theirs}", formula)
    try:
        return latex2mathml.tex2mathml(formula, as_block=block)
    except MathError as problem:
        logger.warning("cannot show the formula %s: %s", formula, problem, location=node)
        return f"<code>{escape(formula)}</code>"


def inline_math(translator, node):
    """Write a formula within a line."""
    translator.body.append(mathml(node, block=False))
    raise nodes.SkipNode


def block_math(translator, node):
    """Write a formula that stands alone, in a box that scrolls if the formula is wider than the page."""
    translator.body.append(f'<div class="formula">{mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


def plain_text(app, what, name, obj, options, lines):
    """Docstrings are text, not reStructuredText: |x| is a magnitude, an indented block stays as it is."""
    result, literal = [], False
    for line in lines:
        above = result[-1] if result else ""
        indented = line.startswith(" ")
        if indented and not literal and TEXT.match(above):
            result += ["", "::", ""]
            literal = True
        elif literal and line.strip() and not indented:
            result.append("")
            literal = False
        result.append(line if literal else line.replace("|", r"\|"))
    lines[:] = result


def one_argument_a_line(app, what, name, obj, options, lines):
    """`x: [T, D]. k: 1 to n.` describes two arguments in a line; each gets its own."""
    try:
        names = "|".join(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return
    begins = re.compile(rf"(?<=[.;]) (?=(?:{names}): )") if names else None
    result = []
    for line in lines:
        pieces = begins.split(line) if begins and line.startswith("    ") else [line]
        result += [pieces[0], *("    " + piece for piece in pieces[1:])]
    lines[:] = result


def is_noise(app, what, name, obj, skip, options):
    """True for what Python says of a named tuple's fields, which the class describes itself."""
    return skip or str(obj.__doc__).startswith("Alias for field number") or None


def setup(app):
    """Register the formulas' renderer, and what is done to docstrings before napoleon reads them."""
    app.connect("autodoc-skip-member", is_noise)
    app.connect("autodoc-process-docstring", one_argument_a_line, priority=390)
    app.connect("autodoc-process-docstring", plain_text, priority=400)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))


html_math_renderer = "mathml"
