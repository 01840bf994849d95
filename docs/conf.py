"""Sphinx configuration."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate_reference

import saekit

generate_reference.write()

project = "saekit"
author = "The saekit developers"
project_copyright = "2026, The saekit developers"
release = saekit.__version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"saekit {release}"
myst_heading_anchors = 3
