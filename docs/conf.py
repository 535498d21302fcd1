"""Sphinx configuration of the documentation site; ``make docs`` builds it into build/docs."""

import builtins
import importlib
import inspect
import pkgutil
import re
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any, Final

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref, toctree
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import stringify_signature

import pykvm

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
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
add_module_names = False

# A name in single backquotes becomes a link where it names something documented, else code.
default_role = "py:obj"

myst_enable_extensions = ["colon_fence"]
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


def _import_extensions() -> None:
    """Import the C extensions, lest Sphinx load their stubs, which hold no code, in their place."""
    for module in pkgutil.walk_packages(pykvm.__path__, "pykvm."):
        name = module.name.rpartition(".")[2]
        if name.startswith("_") and not name.startswith("__"):
            importlib.import_module(module.name)


def _place_attributes(
    app: Sphinx, what: str, name: str, item: type, options: object, lines: list[str]
) -> None:
    """Move what a class's "Attributes:" section says of each attribute to the attribute itself."""
    if what not in {"class", "exception"} or "Attributes:" not in lines:
        return
    first = last = lines.index("Attributes:")
    while last + 1 < len(lines) and not re.match(r"\S", lines[last + 1]):
        last += 1
    documented = ModuleAnalyzer.for_module(item.__module__).attr_docs
    section = "\n".join(lines[first + 1 : last + 1])
    for entry in re.finditer(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
        text = [line.strip() for line in entry[2].splitlines()]
        text[0] = text[0][0].upper() + text[0][1:]
        documented[item.__qualname__, entry[1]] = [*text, ""]
    del lines[first : last + 1]


def _mend_signature(
    app: Sphinx,
    what: str,
    name: str,
    item: Any,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Take a class's signature from ``__init__``, and show a flag by its name alone."""
    if what == "class" and signature and signature.startswith("(*_args"):  # from __new__
        parameters = inspect.signature(item.__init__)
        own = parameters.replace(parameters=[*parameters.parameters.values()][1:])
        signature = stringify_signature(
            own, show_return_annotation=False, unqualified_typehints=True
        )
    return signature and re.sub(r"<(\w+\.\w+): \d+>", r"\1", signature), returns


def _tidy(app: Sphinx, doctree: nodes.document) -> None:
    """Drop what only distracts.

    That is "Bases: object", links from types such as `bytes` to attributes of that name, and the
    package in the sidebar's names of modules.
    """
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)
    for reference in list(doctree.findall(pending_xref)):
        if reference["reftype"] in {"class", "obj"} and reference["reftarget"] in _BUILTINS:
            reference.replace_self(reference.children)
    for tree in doctree.findall(toctree):
        tree["entries"] = [
            (page.rpartition(".")[2] if page.startswith("api/pykvm.") else title, page)
            for title, page in tree["entries"]
        ]


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
    _import_extensions()
    # Before Napoleon parses docstrings, and before the sidebar is collected.
    app.connect("autodoc-process-docstring", _place_attributes, priority=400)
    app.connect("autodoc-process-signature", _mend_signature)
    app.connect("doctree-read", _tidy, priority=400)
    app.connect("doctree-read", _link_files)
    app.connect("missing-reference", _resolve_imported)
