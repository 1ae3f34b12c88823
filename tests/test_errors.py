"One base class, a few kinds that a program may want to tell apart, and docstrings that name them."

import ast
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import layerdiffusion
from layerdiffusion import BadInput, BadModel, BadPicture, LayerDiffusion, LayerDiffusionError, OutOfMemory
from layerdiffusion.base import core
from layerdiffusion.base.core import _LOADING, check_callback, join_callbacks, load_image
from layerdiffusion.readings import trainable
from layerdiffusion.base.folders import resolve_model
from layerdiffusion.base.masks import load_sam, mask_from_file
from layerdiffusion.base.memory import run_in
from layerdiffusion.base.sd import load_models, optimise
from layerdiffusion.settings import EditConfig


def test_one_base_class():
    "Who catches the base class catches all; who caught ValueError before still does."
    for kind in (BadInput, BadModel, BadPicture, OutOfMemory):
        assert issubclass(kind, LayerDiffusionError) and issubclass(kind, ValueError)
    assert issubclass(OutOfMemory, MemoryError) and not issubclass(BadModel, BadPicture)
    assert not issubclass(LayerDiffusionError, KeyboardInterrupt)


@pytest.fixture
def here(tmp_path):
    "A folder with a text that calls itself a picture, and one that calls itself a model."
    (tmp_path / "photo.png").write_text("not a picture")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("not a model")
    return tmp_path


REFUSED = dict(
    no_file=(BadPicture, lambda here: load_image(here / "nothing.png")),
    no_picture=(BadPicture, lambda here: load_image(here / "photo.png")),
    no_numbers=(BadPicture, lambda here: load_image(torch.full((3, 8, 8), float("nan")))),
    empty_mask=(BadPicture, lambda here: mask_from_file(torch.zeros(1, 8, 8), (8, 8))),
    no_model=(BadModel, lambda here: resolve_model(here / "nothing")),
    another_folder=(BadModel, lambda here: load_models(here / "model")),
    no_sam=(BadModel, lambda here: load_sam(here / "model")),
)


@pytest.mark.parametrize("name", REFUSED)
def test_each_kind_can_be_caught(name, here):
    kind, refuse = REFUSED[name]
    with pytest.raises(LayerDiffusionError) as caught:
        refuse(here)
    assert type(caught.value) is kind and len(str(caught.value).splitlines()) == 1


def test_out_of_memory_at_the_lowest_level(monkeypatch):
    from layerdiffusion.base import memory

    def work(config):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(memory, "use", lambda models, how: models)
    method = SimpleNamespace(models=SimpleNamespace(card={}, device=torch.device("cpu")))
    with pytest.raises(OutOfMemory, match="lowest level"):
        run_in("low", method, EditConfig(), work)


CALLED = dict(
    edit=lambda: LayerDiffusion.edit(None, "example:dog", "a dog", callback=5),
    optimise=lambda: optimise(None, [torch.zeros(1)], 1, 0.1, "stage", callback=5),
    join=lambda: join_callbacks(print, 5),
    check=lambda: check_callback(5),
)


@pytest.mark.parametrize("name", CALLED)
def test_a_callback_must_be_callable(name):
    "Said before any work: none of these could even begin it."
    with pytest.raises(BadInput, match="The callback is 5, which cannot be called; give a function"):
        CALLED[name]()


def test_tuning_waits_for_a_loader_in_another_thread():
    "Whoever loads a model changes torch.nn for a moment; new parameters are not made meanwhile."
    unet = torch.nn.ModuleDict(dict(attn=torch.nn.ModuleList([torch.nn.Linear(2, 2)])))
    tuned = threading.Thread(target=trainable, args=(torch.nn.ModuleDict(dict(block=unet)), "lora", 1))
    with _LOADING:
        tuned.start()
        tuned.join(0.2)
        assert tuned.is_alive()
    tuned.join(10)
    assert not tuned.is_alive()


PACKAGE = Path(layerdiffusion.__file__).parent
PAGES = "core", "folders", "sd", "masks", "saving", "memory"
KINDS = {name for name, kind in vars(core).items() if isinstance(kind, type) and issubclass(kind, LayerDiffusionError)}


def public_functions():
    for page in PAGES:
        (file,) = PACKAGE.rglob(f"{page}.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield page, node


def test_docstrings_say_what_is_raised():
    "A public function that refuses something by itself names the kind under *Raises*, and names no unknown one."
    silent = []
    for page, node in public_functions():
        _, _, said = (ast.get_docstring(node) or "").partition("Raises:\n")
        listed = {line.split(":")[0].strip() for line in said.splitlines() if ":" in line}
        assert listed <= KINDS, (page, node.name, listed)
        raised = {
            n.exc.func.id
            for n in ast.walk(node)
            if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and isinstance(n.exc.func, ast.Name)
        }
        silent += [(page, node.name, kind) for kind in raised & KINDS - listed]
    assert not silent
