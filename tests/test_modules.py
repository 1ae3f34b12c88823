"Each module stands alone, looks only downwards, and is made of short functions."

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "layerdiffusion"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if not p.stem.startswith("_"))
MODULES = [".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in FILES]


def page_of(module):
    "The page that makes a module."
    line = f"#| default_exp {module}\n"
    written = json.dumps(line)[1:-1]
    return next(
        (
            p
            for p in NUMBERED
            if written in p.read_text(encoding="utf-8") or written[:-2] + '"' in p.read_text(encoding="utf-8")
        ),
        None,
    )


NUMBERED = sorted((ROOT / "nbs").glob("[!_.]*/[0-9]*.ipynb"))
PAGES = {module: page.stem for module in MODULES if (page := page_of(module))}
TOOLS = [
    "nbdev",
    "fastcore",
    "execnb",
    "jupyterlab",
    "IPython",
    "ipywidgets",
    "anywidget",
    "traitlets",
    "voila",
    "matplotlib",
    "smalldocs",
    "nbconvert",
]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def tree(module):
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def own_imports(module):
    "The modules of this package that a module imports, wherever in its text."
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = ["layerdiffusion", *module.split(".")][: -node.level] if node.level else []
            base = ".".join(filter(None, [*inside, node.module]))
            names = [f"{base}.{a.name}" for a in node.names]
        else:
            continue
        for name in names:
            yield from (m for m in MODULES if f"{name}.".startswith(f"layerdiffusion.{m}."))


ALONE = f"""
import importlib, sys, traceback
sys.modules.update(dict.fromkeys({TOOLS}))
for module in {MODULES}:
    for name in [n for n in sys.modules if n.split(".")[0] == "layerdiffusion"]: del sys.modules[name]
    try: importlib.import_module(f"layerdiffusion.{{module}}")
    except Exception: print(module, traceback.format_exc())
"""


def test_each_imports_alone_and_without_tools():
    "In an interpreter without the notebook and docs tools; before each module nothing of this package is there."
    done = python(ALONE)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_earlier_pages(module):
    "A module imports those whose page has a lower number, or the same one and an earlier name."
    assert module in PAGES, f"{module} has no page in nbs/"
    assert not [m for m in own_imports(module) if PAGES[m] >= PAGES[module]]


ROOMS = dict(  # who may import whom; "" is the method and its public class
    base=["base", "method", "settings", "fine_tuning", "readings"],
    interface=["base", "", "interface", "mini", "evidence"],
    mini=["base", "", "mini"],
    evidence=["base", "", "mini", "interface", "evidence"],
)
ROOMS[""] = ["base", "", "interface.saving"]  # a result saves itself


def room(module):
    return module.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_rooms(module):
    "A room opens only to those that stand above it."
    found = {m for m in own_imports(module) if room(m) not in ROOMS[room(module)] and m not in ROOMS[room(module)]}
    assert not found


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    "At most 30 lines after signature and docstring."

    def lines(f):
        body = f.body[1:] if ast.get_docstring(f) is not None else f.body
        return body[-1].end_lineno - body[0].lineno + 1 if body else 0

    functions = [n for n in ast.walk(tree(module)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [(f.name, lines(f)) for f in functions if lines(f) > 30]


SOURCES = sorted(p.relative_to(ROOT).as_posix() for p in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py")])


def lines_of_all(file):
    "The lines of a module's list of public names, which nbdev lays out."
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return range(node.lineno, node.end_lineno + 1)
    return ()


@pytest.mark.parametrize("file", [f for f in SOURCES if not f.endswith("_modidx.py")])
def test_ruff(file):
    "The style that pyproject.toml asks for, file by file."
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    found = [(f["location"]["row"], f["code"], f["message"]) for f in json.loads(done.stdout)]
    assert not [f for f in found if not (f[1] == "E501" and f[0] in lines_of_all(file))]


@pytest.mark.parametrize("module", ["layerdiffusion", "layerdiffusion.interface.cli"])
def test_import_is_light(module):
    heavy = ["torch", "torchvision", "diffusers", "transformers", "segment_anything", "open_clip", *TOOLS]
    done = python(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def page_imports(module):
    "The import statements of a module's page, those of hidden cells too, as source."
    page = page_of(module)
    cells = [
        "".join(c["source"]) for c in json.loads(page.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"
    ]
    trees = [ast.parse(re.sub(r"^[%!].*", "", cell, flags=re.M)) for cell in cells]
    return "\n".join(ast.unparse(n) for tree in trees for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)))


SIGNATURES = """
import importlib, inspect, json, sys
for name, imports in json.load(sys.stdin).items():
    module, names = importlib.import_module("layerdiffusion." + name), {}
    exec(imports, names)
    names |= vars(module)
    for public in map(vars(module).get, module.__all__):
        for f in [public, *vars(public).values()] if inspect.isclass(public) else [public]:
            if inspect.isfunction(f) and f.__module__ == module.__name__:
                try: inspect.signature(f, eval_str=True, globals=names)
                except NameError as e: print(name, f.__qualname__, e)
"""


def test_signatures_can_be_read():
    "The site shows each public signature: its annotations name only what the module, or else its page, imports."
    pages = json.dumps({m: page_imports(m) for m in MODULES})
    done = subprocess.run([sys.executable, "-c", SIGNATURES], input=pages, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_public_names():
    "What `from layerdiffusion import ...` offers is there; another name is an ordinary AttributeError."
    done = python(
        """import layerdiffusion as l; [getattr(l, n) for n in l.__all__]; print(hasattr(l, 'nonsense'), set(l.__all__)
        <= set(dir(l)))"""
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def names_of(module):
    "A module's own functions, classes and constants."
    for node in tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            patched = any(ast.unparse(d).startswith("patch") for d in node.decorator_list)
            yield from [] if patched else [node.name]
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))


def test_few_names_are_public():
    """About sixty names are in some `__all__`, and a name that one module alone uses begins with `_`.

    What is neither is for the other modules and pages, and is written with `#| exporti`.
    """
    public, used = {}, {}
    for page in NUMBERED:
        text = page.read_text(encoding="utf-8")
        used[page.name] = set(re.findall(r"\w+", text))
    for module in MODULES:
        text = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        used[module] = set(re.findall(r"\w+", text.partition("# %% ../")[2]))
        found = [ast.literal_eval(n.value) for n in tree(module).body if isinstance(n, ast.Assign)
                 and ast.unparse(n.targets[0]) == "__all__"]
        public |= {name: module for name in (found[0] if found else ())}
    assert len(public) <= 66
    for module in MODULES:
        home = f"{PAGES.get(module)}.ipynb"
        others = {"render_doc"}.union(*(words for place, words in used.items() if place not in (module, home)))
        alone = [n for n in names_of(module) if not n.startswith("_") and n not in public and n not in others]
        assert not alone, f"{module}: begin with _, for nobody else uses them: {alone}"


def test_no_name_means_two_things():
    "A name without `_` is at home in one module."
    homes = {}
    for module in MODULES:
        for name in names_of(module):
            if not name.startswith("_"):
                homes.setdefault(name, set()).add(module)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not twice


TOYS = ("world", "judge", "mini", "scores")  # mini's world, what is trained on it, what judges it
FULL_SIZE = """
import importlib, sys
from layerdiffusion import LayerDiffusion, load_edit, preset
from layerdiffusion.pipeline import LayerDiffusion
for name in {rooms}: importlib.import_module("layerdiffusion." + name)
print(sorted(n for n in sys.modules if n.startswith("layerdiffusion.") and n.rpartition(".")[2] in {toys}))
"""
PAPER_ROOMS = (
    "core folders sd method masks words readings differences fine_tuning identity settings saving checkpoints "
    "pipeline memory canvas app cli"
)


def test_the_full_size_user_never_imports_the_toy_world():
    "What edits a photo with a model of full size, by Python, editor or command line, needs nothing of mini's world."
    rooms = [module for module in MODULES if module.rpartition(".")[2] in PAPER_ROOMS.split()]
    assert len(rooms) == len(PAPER_ROOMS.split())
    done = python(FULL_SIZE.format(rooms=rooms, toys=TOYS))
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_mutants_are_found():
    "Each line that tests/mutants.py makes wrong stands once in its module; the mutants themselves run at night."
    from mutants import MUTANTS, PACKAGE, source

    lines = [(m.name, source(PACKAGE, m.module).read_text(encoding="utf-8").count(m.old)) for m in MUTANTS]
    assert len(lines) >= 80 and not [line for line in lines if line[1] != 1]
