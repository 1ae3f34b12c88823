"""The paper alone, `method`, draws what `LayerDiffusion` draws, is short, and stands on torch and diffusers."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from layerdiffusion import LayerDiffusion, method
from layerdiffusion.base.sd import load_models
from layerdiffusion.mini.world import make_edit, sample_scenes

PACKAGE = Path(method.__file__).parent
SOURCE = Path(method.__file__).read_text(encoding="utf-8")
T_A, T_B = "a pink dog standing", "in the snow"
SHORT = dict(embedding_steps=3, embedding_lr=1e-2, alpha=0.6, tuning_steps=3, tuning_lr=2e-4, lambda_obj=3.0)


@pytest.fixture(scope="module")
def models():
    return load_models("mini")


@pytest.fixture(scope="module")
def scene():
    "A photo, its subject's mask, and the new place, as files would hold them."
    g = torch.Generator().manual_seed(1)
    before = sample_scenes(1, g, species="dog", colour="pink", pose="lying", place="city")
    edit = make_edit(before, 64, pose="standing", place="snow")
    photo, place = ((x * 255).round() / 255 for x in (edit.image, edit.reference))
    return photo, (edit.mask > 0.5).float(), place


@pytest.fixture(scope="module")
def bare(models, scene):
    "The paper's edit."
    photo, mask, place = scene
    return method.edit(
        models, photo, mask, T_A, T_B, place, **SHORT, num_inference_steps=4, guidance_scale=3.0, seeds=[3, 0], seed=2
    )


def test_the_paper_alone_draws_what_the_default_edit_draws(models, scene, bare):
    "No reading is named: the defaults are the paper's method, with the photo as the subject's picture."
    photo, mask, place = scene
    given = dict(mask=mask, reference=place, object=T_A, background=T_B, seeds=[3, 0])
    ours = LayerDiffusion(models).edit(
        photo, f"{T_A} {T_B}", **given, **SHORT, sampling_steps=4, guidance_scale=3.0, seed=2
    )
    assert ours.config.object_picture == "input" and ours.config.preset is None
    assert (ours.images - bare).abs().max() < 1e-5 and not torch.allclose(bare[0], bare[1], atol=0.01)


def test_what_the_paper_map_names_is_what_a_default_edit_runs(models, scene):
    "Every function of the module but `edit`: the public class calls them all, and has no other loop."
    photo, mask, place = scene
    called = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename == method.__file__:
            called.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        LayerDiffusion(models).edit(
            photo, f"{T_A} {T_B}", mask=mask, reference=place, **SHORT, sampling_steps=2, seeds=[0]
        )
    finally:
        sys.setprofile(None)
    assert called >= set(method.__all__) - {"edit"}, set(method.__all__) - called


def test_the_model_stays_as_it_was(models, bare):
    "The copy learnt, not the loaded U-Net."
    again = load_models("mini").unet.state_dict()
    assert all(torch.equal(w, again[name]) for name, w in models.unet.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in models.unet.parameters())


def test_a_pipeline_of_diffusers_is_enough(models, scene, bare):
    "With another sampler in it, as v1.4 has; and its parts' gradients switched on, as they are after loading."
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    sampler = PNDMScheduler.from_config(models.scheduler.config, skip_prk_steps=True)
    pipe = StableDiffusionPipeline.from_pretrained(models.folder, scheduler=sampler, safety_checker=None)
    photo, mask, place = scene
    drawn = method.edit(
        pipe, photo, mask, T_A, T_B, place, **SHORT, num_inference_steps=4, guidance_scale=3.0, seeds=[3, 0], seed=2
    )
    assert (drawn - bare).abs().max() < 1e-5


def test_its_numbers_are_the_papers():
    "§3.3, and §3.2.1 and §4.3 for α and λ."
    import inspect

    said = dict(embedding_steps=500, embedding_lr=1e-3, alpha=0.7, tuning_steps=250, tuning_lr=2e-6)
    said |= dict(lambda_obj=2.0, lambda_bg=1.0, num_inference_steps=50)
    given = {name: p.default for name, p in inspect.signature(method.edit).parameters.items()}
    assert {name: given[name] for name in said} == said


def test_it_is_short_and_stands_alone():
    """At most 200 lines of at most 120 characters (nbdev's own list of names apart), and no import of ours but the
    error."""
    lines = SOURCE.splitlines()
    assert len(lines) <= 200 and not [x for x in lines if len(x) > 120 and not x.startswith("__all__")]
    found = [n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.ImportFrom) and n.level]
    assert [(n.module, [a.name for a in n.names]) for n in found] == [("base.core", ["BadInput"])]


@pytest.mark.parametrize("name", method.__all__)
def test_what_is_in_it_runs(name):
    "Each of its functions is used in the package, by another of its own or elsewhere; `edit` is for you."
    users = [p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py") if p.name not in ("_modidx.py", "method.py")]
    assert name == "edit" or f"{name}(" in SOURCE.replace(f"def {name}(", "") or any(f"{name}(" in x for x in users)


LINES = (
    "(mask * error).square()",
    "- sigma * latents",
    "(said - free)",
    "autograd.grad(loss, params",
    "(1 - alpha) * e_b",
)


@pytest.mark.parametrize("line", LINES)
def test_no_equation_is_written_twice(line):
    "Masked loss, target, guidance, gradients and mix stand here and in no other module; `mini` is what trains a model."
    holders = [p.stem for p in PACKAGE.rglob("*.py") if line in p.read_text(encoding="utf-8")]
    assert [name for name in holders if name != "training"] == ["method"]
