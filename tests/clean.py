"""Cleans the pages: `python tests/clean.py` is nbdev_clean, and then gives every page the metadata that JupyterLab
would.

JupyterLab writes the name of the kernel and the language into a page as soon as it is opened. A page that says
something else has
unsaved changes before anybody has touched it. nbdev_clean keeps the language (settings.ini allows it) but not the
kernel's name.

A live widget has another id at every run, and on the site it is blank; neither it nor its state is kept.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = dict(
    kernelspec=dict(display_name="Python 3 (ipykernel)", language="python", name="python3"),
    language_info=dict(
        codemirror_mode=dict(name="ipython", version=3),
        file_extension=".py",
        mimetype="text/x-python",
        name="python",
        nbconvert_exporter="python",
        pygments_lexer="ipython3",
        version="3.11.7",
    ),
)


def as_jupyter(page: Path):
    "Write a page's metadata as JupyterLab does, without live widgets."
    nb = json.loads(page.read_text(encoding="utf-8"))
    nb["metadata"].pop("widgets", None)
    nb["metadata"] |= METADATA
    for cell in nb["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if WIDGET not in o.get("data", {})]
    page.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def clean(root: Path):
    "Clean all pages of a checkout."
    subprocess.run(
        [shutil.which("nbdev_clean", path=Path(sys.executable).parent)], cwd=root, check=True, stdin=subprocess.DEVNULL
    )
    for page in (root / "nbs").rglob("[!.]*.ipynb"):
        as_jupyter(page)


if __name__ == "__main__":
    clean(ROOT)
