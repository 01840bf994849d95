"""Build the documentation without what nothing looks at and what takes half of the time: ``docs_build.py DOCS TARGET``.

All pages are read, resolved and written in their theme, with warnings as errors.  They have no search index, their
quotes are straight, and the tree of all pages beside each of them is that of the first one.
"""

from __future__ import annotations

import functools
import gc
import sys
from pathlib import Path
from typing import Any

from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.cmd.build import main


def lighten() -> None:
    """From now on, builds are as this module says."""
    tree_of = StandaloneHTMLBuilder._get_local_toctree

    @functools.cache
    def tree(builder: StandaloneHTMLBuilder, **options: Any) -> str:
        return tree_of(builder, builder.config.root_doc, **options)

    StandaloneHTMLBuilder._get_local_toctree = lambda self, page, **options: tree(self, **options)  # type: ignore[method-assign]
    StandaloneHTMLBuilder.search = False
    gc.set_threshold(200_000)  # hundreds of thousands of nodes live until the end


def build(docs: Path, target: Path) -> int:
    """All pages into ``target/html``.  0 where nothing was warned of."""
    lighten()
    options = ["-q", "-W", "-b", "html", "-D", "smartquotes=0", "-d", target / "trees"]
    return main([str(word) for word in (*options, docs, target / "html")])


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]), Path(sys.argv[2])))
