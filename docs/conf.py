"""Sphinx configuration of the documentation site; ``make docs`` builds it into build/docs."""

import builtins
import importlib
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Final

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

project = "pykvm"
release = version = distribution_version("elisa-pykvm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]

# autosummary makes a page in docs/api for every module, from templates/module.rst.
templates_path = ["templates"]
exclude_patterns = ["templates"]

autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False

# A name in single backquotes becomes a link where it names something documented, else code.
default_role = "py:obj"

myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_title = f"pykvm {release}"
html_show_copyright = html_show_sphinx = False

_BUILTINS: Final = frozenset(dir(builtins))
_ROOT: Final = Path(__file__).parents[1]
# Pages that include a file from outside docs.
_INCLUDED: Final = {
    "README.md": "readme",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "SECURITY.md": "security",
    "kernel-patches/README.md": "kernel-patches",
}


def _tidy(app: Sphinx, doctree: nodes.document) -> None:
    """Drop "Bases: object", and links that types such as `bytes` make to attributes so named."""
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)
    for reference in list(doctree.findall(pending_xref)):
        if reference["reftype"] in {"class", "obj"} and reference["reftarget"] in _BUILTINS:
            reference.replace_self(reference.children)


def _link_files(app: Sphinx, doctree: nodes.document) -> None:
    """Lead links to files outside docs to their pages; those without a page become plain text."""
    for link in [*doctree.findall(pending_xref), *doctree.findall(download_reference)]:
        name, _, anchor = link["reftarget"].removeprefix("../").partition("#")
        if link["reftype"] != "myst" or link.get("refdomain"):
            continue
        if page := _INCLUDED.get(name):
            link.replace_self(
                pending_xref(
                    "",
                    *link.children,
                    reftype="myst",
                    refdomain="doc",
                    refdoc=link["refdoc"],
                    refexplicit=True,
                    reftarget=page,
                    reftargetid=anchor or None,
                )
            )
        elif name and (_ROOT / name).exists():
            link.replace_self(link.children)


def _resolve_imported(
    app: Sphinx, env: BuildEnvironment, reference: pending_xref, content: nodes.Element
) -> nodes.Node | None:
    """Resolve a name that the documented module imports: Sphinx knows it by its origin alone."""
    if reference.get("refdomain") != "py" or not reference.get("py:module"):
        return None
    found: object = importlib.import_module(reference["py:module"])
    for name in reference["reftarget"].split("."):
        found = getattr(found, name, None)
    origin = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    return env.domains.python_domain.resolve_xref(
        env, reference["refdoc"], app.builder, "obj", origin, reference, content
    )


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx's events."""
    app.connect("doctree-read", _tidy)
    app.connect("doctree-read", _link_files)
    app.connect("missing-reference", _resolve_imported)
