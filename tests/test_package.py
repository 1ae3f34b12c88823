"What is installed is complete, and asks for no more than it needs."

import ast
import json
import re
import runpy
import struct
import sys
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from importlib.resources import files
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(str(files("layerdiffusion")))
WEIGHTS = sorted(p for p in (DATA / "weights").rglob("*") if p.is_file())


@pytest.fixture
def told(monkeypatch):
    "What setup.py tells setuptools."
    kept = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kw: kept.update(kw))
    runpy.run_path(str(ROOT / "setup.py"))
    return kept


def test_weights_are_there():
    assert (DATA / "weights/mini/model_index.json").is_file()
    for part in ("unet", "vae", "text_encoder", "sam", "clip", "judge"):
        assert list((DATA / "weights/mini" / part).glob("*.safetensors")), part


def test_weights_are_small_and_safe():
    "At most 60 MB in all; tensors only as safetensors, each file whole; the rest is text and one labelled sheet."
    assert sum(p.stat().st_size for p in WEIGHTS) <= 60e6
    assert {p.suffix for p in WEIGHTS} <= {".safetensors", ".json", ".txt", ".md", ".png"}
    for path in (p for p in WEIGHTS if p.suffix == ".safetensors"):
        with path.open("rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(n))
        end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
        assert path.stat().st_size == 8 + n + end, path


def test_text_encoder_has_the_published_names():
    """`text_model.…`, as in every published Stable Diffusion; transformers before its renaming would leave other names
    at random weights."""
    with (DATA / "weights/mini/text_encoder/model.safetensors").open("rb") as f:
        names = set(json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))) - {"__metadata__"}
    assert names and all(n.startswith("text_model.") for n in names)


def test_pictures_are_there():
    assert {"dog.png", "cat.png", "rabbit.png"} <= {p.name for p in (DATA / "pictures").iterdir()}


def test_editor_is_there():
    "The canvas and its style come with the package, and fetch nothing."
    texts = {p.name: p.read_text(encoding="utf-8") for p in (DATA / "static").iterdir()}
    assert {"canvas.js", "canvas.css", "app.js", "app.css", "page.html"} <= set(texts)
    assert not [name for name, text in texts.items() if re.search(r"https?://|@import|^import ", text, re.M)]


def test_data_is_packaged(told):
    "Every file beside the modules matches a pattern of package_data."
    patterns = told["package_data"]["layerdiffusion"]
    shipped = [
        p.relative_to(DATA).as_posix()
        for p in DATA.rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc", ".tmp")
    ]
    assert not [p for p in shipped if not any(fnmatch(p, pattern) for pattern in patterns)]


def test_requirements(told):
    "The library needs no notebook or docs tool, every requirement has a floor, those that move fast a ceiling too."
    needs = told["install_requires"]
    assert not [
        r
        for r in needs
        if r.startswith(
            (
                "nbdev",
                "fastcore",
                "execnb",
                "jupyter",
                "ipy",
                "anywidget",
                "voila",
                "playwright",
                "matplotlib",
                "smalldocs",
                "pytest",
            )
        )
    ]
    assert all(">=" in r for r in needs)
    assert all("<" in next(r for r in needs if r.startswith(name)) for name in ("torch>", "diffusers", "transformers"))
    assert {"app", "notebooks", "dev", "docs"} <= set(told["extras_require"])
    assert not any(" " in r for rs in [needs, *told["extras_require"].values()] for r in rs)


def test_what_is_imported_is_required(told):
    """Each third-party module named in the library is a requirement; only pictures and forms in a notebook, the
    website and a Ray cluster ask for more."""
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in DATA.rglob("*.py")]
    nodes = [n for tree in trees for n in ast.walk(tree)]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level
    }
    tops = (
        {n.split(".")[0] for n in names}
        - set(sys.stdlib_module_names)
        - {
            "layerdiffusion",
            "matplotlib",
            "IPython",
            "ipywidgets",
            "anywidget",
            "traitlets",
            "jupyter_client",
            "zmq",
            "nbdev",
            "fastcore",
            "smalldocs",
            "onnx",
            "onnxruntime",
            "ray",
        }
    )

    def plain(name):
        return re.split(r"[<>=!\[]", name)[0].lower().replace("_", "-")

    required, where = {plain(r) for r in told["install_requires"]}, packages_distributions()
    assert not {t for t in tops if not required & {plain(d) for d in where.get(t, [t])}}


def test_entry_points(told):
    assert told["entry_points"] == {
        "console_scripts": ["layerdiffusion=layerdiffusion.interface.cli:main"],
        "nbdev": ["layerdiffusion=layerdiffusion._modidx:d"],
    }


def explained():
    "Each requirement of settings.ini, with the comment above it."
    lines = [line.strip() for line in (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines()]
    pairs = list(zip(lines, lines[1:], strict=False))
    return [(line, above) for above, line in pairs if re.match(r"[\w-]+(>=|==)\d", line)]


def names_imported():
    "The top names of all imports in the package, the pages, the tests and setup.py."
    texts = [p.read_text(encoding="utf-8") for d in (ROOT / "layerdiffusion", ROOT / "tests") for p in d.rglob("*.py")]
    for page in (ROOT / "nbs").rglob("*.ipynb"):
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        texts += ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return set(re.findall(r"(?:import|from|find_spec\(\"|importorskip\(\") *(\w+)", "\n".join(texts)))


def test_each_requirement_is_used_bounded_and_explained(told):
    "Above each stands a comment; it has a ceiling, and is imported somewhere or says why not."
    asked = [*told["install_requires"], *(r for rs in told["extras_require"].values() for r in rs)]
    assert sorted(line for line, _ in explained()) == sorted(asked)
    assert not [line for line, above in explained() if not re.fullmatch(r"# \S.{3,}", above)]
    assert not [line for line, _ in explained() if not re.search(r"==|,<\d", line)]
    other = {"pillow": "PIL", "pyyaml": "yaml", "open_clip_torch": "open_clip", "scikit-image": "skimage"}
    imported = names_imported()
    for line, above in explained():
        name = re.match(r"[\w-]+", line)[0]
        assert other.get(name, name.replace("-", "_")) in imported or above.startswith("# not imported: "), line
