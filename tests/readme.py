"README.md is the index page: `python tests/readme.py` writes it, tests/test_sync.py checks that the two agree."

import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def readme() -> str:
    "The index page as Markdown; a relative link gets the `nbs/` that it needs one folder up."
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide") and c.id != "route-tables"]  # too long there
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'(\]\(|src=")(?![a-z]+:|#)([^)"]+)', lambda m: m[1] + posixpath.normpath("nbs/" + m[2]), text)
    return text.strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
