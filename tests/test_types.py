"""A type checker sees the whole public class, and finds nothing wrong in it and in the paper's method."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stubs

ROOT = Path(__file__).resolve().parents[1]
USE = """
from layerdiffusion.pipeline import EditOutput, LayerDiffusion
from layerdiffusion.interface.saving import EditResult

def use(pipe: LayerDiffusion) -> EditResult:
    made: EditOutput = pipe.to("cpu")("example:dog", "a dog", num_inference_steps=3)
    made.edit.save("dog")
    return pipe.edit(scene=pipe.prepare("example:dog", "a dog"))
"""
WRONG = """
from layerdiffusion.pipeline import LayerDiffusion

def use(pipe: LayerDiffusion):
    pipe("example:dog", "a dog", num_inference_steps="three")
    pipe.no_such_method()
"""


def mypy(cache, *args, cwd):
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache)]
    done = subprocess.run([*command, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


needs_mypy = pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="needs mypy")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


def test_the_stubs_are_of_these_modules():
    "python tests/stubs.py after nbdev_export; and nothing else lies there."
    wanted = stubs.stubs(ROOT / "layerdiffusion")
    assert {p: p.read_text(encoding="utf-8") for p in (ROOT / "layerdiffusion").rglob("*.pyi")} == wanted
    assert (ROOT / "layerdiffusion" / "py.typed").is_file()


def test_a_stub_has_the_methods():
    "Patched ones too, with their arguments, and without bodies."
    source = (
        "class A:\n    x: int = 3\n\n@patch\n@shielded\n"
        "def f(self: A, n: int = 2) -> str:\n    'Says n.'\n    return 'n'\n"
    )
    assert 'def f(self, n: int=2) -> str:\n        """Says n."""\n        ...' in stubs.stub(source)
    assert "return" not in stubs.stub(source) and not stubs.stub("class A: pass\n")


@needs_mypy
def test_the_method_and_the_class_have_their_types(tmp_path, cache):
    stubs.write_whole(ROOT / "layerdiffusion", tmp_path)
    code, said = mypy(cache, "layerdiffusion/method.py", "layerdiffusion/pipeline.py", cwd=tmp_path)
    assert code == 0, said


@needs_mypy
def test_a_user_sees_the_methods(tmp_path, cache):
    (tmp_path / "layerdiffusion").symlink_to(ROOT / "layerdiffusion")
    for text, wrong in ((USE, 0), (WRONG, 2)):
        (tmp_path / "use.py").write_text(text, encoding="utf-8")
        code, said = mypy(cache, "use.py", cwd=tmp_path)
        assert said.count("error:") == wrong and code == (wrong > 0), said
