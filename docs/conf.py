"""Sphinx configuration."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import gallery_page
import generate_api
import generate_cli
import generate_reference

import saekit

for generator in (generate_reference, generate_cli, generate_api):
    generator.write()

project = "saekit"
author = "The saekit developers"
project_copyright = "2026, The saekit developers"
release = saekit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"saekit {release}"
myst_heading_anchors = 3

# Docstrings: single backticks are code, as in Markdown; members in the order in which they are written.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90


def without_markers(app, what, name, obj, options, signature, returned):  # type: ignore[no-untyped-def]
    """A default that is made anew for each object has no value to show."""
    return (signature and signature.replace("= NOTHING", "= ..."), returned)


def with_gallery(app, exception):  # type: ignore[no-untyped-def]
    """The dashboard that the gallery links to is beside its page."""
    if exception is None and app.builder.format == "html":
        gallery_page.write(Path(app.outdir))


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("autodoc-process-signature", without_markers)
    app.connect("build-finished", with_gallery)
