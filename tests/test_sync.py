"Pages, modules and README say the same: exporting, cleaning and writing the README anew change no byte."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clean import METADATA, clean
from readme import ROOT, readme


@pytest.fixture
def copy(tmp_path):
    "A copy of what nbdev reads and writes."
    ignore = shutil.ignore_patterns("weights", "__pycache__", ".ipynb_checkpoints", "_proc", "_docs")
    for folder in ("nbs", "layerdiffusion"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def nbdev(command, folder):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IN_TEST")}
    subprocess.run(
        [shutil.which(command, path=Path(sys.executable).parent)],
        cwd=folder,
        env=env,
        check=True,
        stdin=subprocess.DEVNULL,
    )


def contents(folder, glob):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob(glob)}


def same(new, old):
    assert sorted(new) == sorted(old)
    assert not [name for name in old if new[name] != old[name]], "these differ from what the tool writes"


def test_export_changes_nothing(copy):
    for module in (copy / "layerdiffusion").rglob("*.py"):
        if module.name not in ("__init__.py", "__main__.py"):
            module.unlink()
    nbdev("nbdev_export", copy)
    same(contents(copy / "layerdiffusion", "**/*.py"), contents(ROOT / "layerdiffusion", "**/*.py"))
    same(contents(copy, "*.*"), {n: (ROOT / n).read_bytes() for n in ("settings.ini", "setup.py", "pyproject.toml")})


def test_clean_changes_nothing(copy):
    clean(copy)
    same(contents(copy / "nbs", "[!_.]*/*.ipynb"), contents(ROOT / "nbs", "[!_.]*/*.ipynb"))


@pytest.mark.parametrize("page", sorted((ROOT / "nbs").glob("[!_.]*/[!.]*.ipynb")), ids=lambda p: p.stem)
def test_a_page_has_no_unsaved_changes_when_it_is_opened(page):
    """Its metadata is what JupyterLab writes on opening it: the installed kernel's, but for the version of Python,
    which is the reader's."""
    from ipykernel.ipkernel import IPythonKernel
    from ipykernel.kernelspec import get_kernel_dict

    nb, kernel, language = json.loads(page.read_text(encoding="utf-8")), get_kernel_dict(), IPythonKernel.language_info
    assert nb["metadata"] == METADATA and (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    assert {k: v for k, v in language.items() if k != "version"} == {
        k: v for k, v in METADATA["language_info"].items() if k != "version"
    }
    assert METADATA["kernelspec"] == dict(
        display_name=kernel["display_name"], language=kernel["language"], name="python3"
    )
    assert all(c["metadata"] == {} or set(c["metadata"]) == {"hide_input"} for c in nb["cells"]) and all(
        "id" in c for c in nb["cells"]
    )


def test_readme_is_the_index_page():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `python tests/readme.py`"
