"""Writes `MODULE.pyi` beside each module whose classes grow by `patch`: `python tests/stubs.py`, after nbdev_export.

A page explains a class a method at a time, and `patch` attaches each one. Type checkers and editors do not see
that, so the
stub beside the module has the whole class. `python tests/stubs.py FOLDER` writes the package into an empty folder
as it would be
with ordinary classes, bodies included: what tests/test_types.py lets mypy check.
"""

import ast
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "layerdiffusion"
TYPED = ("property", "classmethod", "staticmethod", "contextmanager", "dataclass", "cached_property")
HEAD = "# Made by tests/stubs.py: the classes of the module beside it, whole.\n"


def _named(decorator) -> str:
    "The last word of a decorator: `dataclass` of `@dataclasses.dataclass(frozen=True)`."
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def whole(source: str) -> ast.Module:
    "A module with each patched function as a method of its class, and without decorators that hide a signature."
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in list(tree.body):
        if isinstance(node, ast.FunctionDef) and any(_named(d) == "patch" for d in node.decorator_list):
            first = node.args.args[0]
            if getattr(first.annotation, "id", None) in classes:
                tree.body.remove(node)
                classes[first.annotation.id].body.append(node)
                first.annotation = None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [d for d in node.decorator_list if _named(d) in TYPED or _named(d) == "setter"]
    return ast.fix_missing_locations(tree)


class _Signatures(ast.NodeTransformer):
    "Functions without their bodies; what is written down keeps its value."

    def visit_FunctionDef(self, node):
        said = node.body[:1] if ast.get_docstring(node) is not None else []
        node.body = [*said, ast.Expr(ast.Constant(...))]
        return node

    def visit_AnnAssign(self, node):
        if not isinstance(node.value, ast.Call) or _named(node.value) != "field":
            node.value = node.value and ast.Constant(...)
        return node


def stub(source: str) -> str:
    "The text of a module's stub; empty where no class of it is patched."
    if "@patch" not in source:
        return ""
    return HEAD + ast.unparse(ast.fix_missing_locations(_Signatures().visit(whole(source)))) + "\n"


def stubs(package: Path) -> dict:
    "The stub of each module that needs one, by its file."
    made = {path.with_suffix(".pyi"): stub(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")}
    return {path: text for path, text in made.items() if text}


def write_whole(package: Path, folder: Path):
    "The package in another folder, with ordinary classes."
    copy = shutil.copytree(
        package, folder / package.name, ignore=shutil.ignore_patterns("weights", "pictures", "*.pyi")
    )
    for path in stubs(copy):
        module = path.with_suffix(".py")
        module.write_text(ast.unparse(whole(module.read_text(encoding="utf-8"))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_whole(PACKAGE, Path(sys.argv[1]))
    else:
        wanted = stubs(PACKAGE)
        for old in {*PACKAGE.rglob("*.pyi")} - wanted.keys():
            old.unlink()
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
