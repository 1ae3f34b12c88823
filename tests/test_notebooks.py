"""Every page runs from top to bottom: one test a page. `NB_FLAGS='slow gpu' pytest tests/test_notebooks.py` runs the
marked cells too."""

import ast
import multiprocessing
import os
import re
import warnings
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
PAGES = sorted(p for p in NBS.rglob("*.ipynb") if not re.search(r"(^|/)[._]", p.relative_to(NBS).as_posix()))
cfg = ConfigParser(delimiters=["="])
cfg.read(ROOT / "settings.ini")
FORCED = os.environ.get("NB_FLAGS", "").split()
SKIPPED = set(cfg["DEFAULT"]["tst_flags"].split()) - set(FORCED)

# Each page is a process of its own, forked from one that has imported the libraries, but nothing of this package.
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    TOOLS = "nbdev.test", "IPython", "matplotlib.pyplot", "fastcore.test", "ipywidgets", "anywidget"
    LIBRARIES = "open_clip", "segment_anything", "torch._dynamo", "diffusers.schedulers.scheduling_ddim"
    PARTS = "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition"
    WORDS = "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip"
    PROCESSES.set_forkserver_preload([*TOOLS, *LIBRARIES, *PARTS, *WORDS])


def run_page(page, said):
    "What the command `nbdev_test` does with one page; what it says goes into the file `said`."
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(out, fd)
    os.chdir(ROOT)
    from nbdev.test import nbdev_test

    nbdev_test(path=str(page), flags=" ".join(FORCED))


def files():
    "What lies in the folder of the pages, caches apart."
    return {
        p
        for p in NBS.rglob("*")
        if p.is_file() and not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts)
    }


def marks(cell):
    "The marks for which a cell is not run."
    found = set(re.findall(r"^#\|\s*(\w+)\s*$", cell.source, re.M)) & SKIPPED
    return found | ({"eval: false"} if re.search(r"^#\|\s*eval:\s*false", cell.source, re.M | re.I) else set())


def test_there_are_pages():
    assert len(PAGES) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_runs(page, tmp_path):
    "The page runs without an error and leaves nothing behind; cells that were left out are named in a warning."
    before, process = files(), PROCESSES.Process(target=run_page, args=(page, tmp_path / "said"))
    process.start()
    process.join()
    said = (tmp_path / "said").read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == 0 and "Success." in said, said
    assert files() == before, "running the page changed the folder of the pages"
    code = [c for c in nbformat.read(page, 4).cells if c.cell_type == "code"]
    left_out = [sorted(marks(c)) for c in code if marks(c)]
    if left_out:
        warnings.warn(f"{page.name}: {len(left_out)} of {len(code)} code cells not run: {left_out}", stacklevel=2)
    assert not code or len(left_out) < len(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_form(page):
    "A title with a one-line promise, no saved error, nothing that switches the page's test off, at most 400 KB."
    cells = nbformat.read(page, 4).cells
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", cells[0].source), (
        f"first cell is not '# name' and '> promise': {cells[0].source!r}"
    )
    assert not [o for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert not any("skip_exec" in c.source for c in cells)
    assert page.stat().st_size <= 400_000


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_imports_have_their_own_cells(page):
    "The site's build runs each cell with an import on its own, so such a cell holds imports and definitions only."
    mixed = []
    for cell in nbformat.read(page, 4).cells:
        if cell.cell_type != "code" or re.match(r"#\|\s*export", cell.source):
            continue
        parsed = ast.parse(re.sub(r"^[%!].*", "", cell.source, flags=re.M))
        imports = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(parsed))
        if imports and not all(
            isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) for n in parsed.body
        ):
            mixed.append(cell.source)
    assert not mixed, "\n---\n".join(mixed)


def test_a_mistake_in_a_cell_is_one_sentence():
    "A BadInput shows itself in a notebook as it does in a terminal; another error keeps its traceback."
    from nbclient import NotebookClient

    cells = ["from layerdiffusion.base.core import load_image", "load_image('nowhere.png')", "1 / 0"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(
        nb, kernel_name="python3", allow_errors=True, resources=dict(metadata=dict(path=str(ROOT)))
    ).execute()
    bad, other = (c.outputs[0] for c in nb.cells[1:])
    assert bad.traceback == [
        "BadPicture: There is no file 'nowhere.png'; give the path of a PNG, JPEG or WebP picture."
    ]
    assert bad.ename == "BadPicture" and len("\n".join(other.traceback).splitlines()) > 3
