"Other people's pipelines run on mini's folder as on any Stable Diffusion: what they draw is judged, not only that they draw."

import diffusers
import pytest
import torch
from PIL import Image

from torchvision.transforms.functional import to_tensor
from layerdiffusion.folders import resolve_model
from layerdiffusion.judge import ask, load_judge
from layerdiffusion.sd import ddim_sample, decode_latents, encode_text, initial_latents, load_models

BEFORE, AFTER = "a brown dog jumping in a forest", "a white dog jumping in a forest"
FOLDER = __import__("os").environ.get("TRIAL") or resolve_model("mini")
QUIET = dict(guidance_scale=3.0, num_inference_steps=20)


@pytest.fixture(scope="module")
def pipe():
    found = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def picture(pipe):
    return pipe(BEFORE, generator=torch.Generator().manual_seed(0), height=64, width=64, **QUIET).images[0]


def peer(kind, pipe, **changes):
    "Another pipeline of diffusers with the same parts."
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"} | changes
    found = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    found.set_progress_bar_config(disable=True)
    return found


def seen(image):
    "The judge's answers about one picture, as words."
    from layerdiffusion.judge import ANSWERS

    answers = ask(load_judge(FOLDER), to_tensor(image)[None])
    return {k: ANSWERS[k][int(answers[k])] for k in ("species", "pose", "place", "colour")}


def test_the_folder_is_stable_diffusions():
    "Four latent channels and its scaling factor, which editing codes take for granted."
    models = load_models(FOLDER)
    assert models.unet.config.in_channels == 4 and models.vae.config.scaling_factor == 0.18215
    assert models.scheduler.config.prediction_type in ("epsilon", "v_prediction")


def test_diffusers_draws_what_the_library_draws(pipe):
    "The plain pipeline and the library's own loop, from one start: equal to 1e-4 of white."
    models = load_models(FOLDER)
    latents = initial_latents(models, [3])
    pipe = peer("StableDiffusionPipeline", pipe, scheduler=diffusers.DDIMScheduler.from_config(pipe.scheduler.config))
    theirs = pipe(BEFORE, latents=latents.clone(), output_type="pt", height=64, width=64, **QUIET).images
    ours = ddim_sample(models, encode_text(models, BEFORE), None, latents, 20, 3.0)
    assert (theirs - decode_latents(models, ours)).abs().max() < 1e-4


def test_text_to_image(picture):
    assert seen(picture) == dict(species="dog", pose="jumping", place="forest", colour="brown")


def test_image_to_image(pipe, picture):
    "SDEdit's pipeline recolours the animal and leaves it where it is."
    edit = peer("StableDiffusionImg2ImgPipeline", pipe)
    found = edit(AFTER, image=picture, strength=0.6, generator=torch.Generator().manual_seed(0), **QUIET).images[0]
    assert seen(found)["colour"] == "white" and seen(found)["pose"] == "jumping"


def test_inpainting_keeps_what_is_outside(pipe, picture):
    "With a U-Net of four channels, outside the mask the picture comes back."
    mask = Image.new("L", picture.size)
    mask.paste(255, (16, 16, 52, 52))
    edit = peer("StableDiffusionInpaintPipeline", pipe)
    g = torch.Generator().manual_seed(0)
    found = edit(AFTER, image=picture, mask_image=mask, strength=1.0, generator=g, height=64, width=64, **QUIET).images[0]
    change = (to_tensor(found) - to_tensor(picture)).abs().mean(0)
    inside = to_tensor(mask)[0] > 0.5
    assert change[~inside].mean() < 0.3 * change[inside].mean()


def test_ledits_changes_what_it_is_told(pipe, picture):
    "LEDITS++ inverts a picture and adds a concept to it."
    solver = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    edit = peer("LEditsPPPipelineStableDiffusion", pipe, scheduler=solver)
    torch.manual_seed(0)
    edit.invert(image=picture, num_inversion_steps=20, skip=0.1, height=64, width=64)
    kept = edit(editing_prompt=None).images[0]
    changed = edit(editing_prompt=["a white dog"], edit_guidance_scale=[8.0], edit_threshold=[0.7]).images[0]
    difference = lambda a: (to_tensor(a) - to_tensor(picture)).abs().mean()
    assert difference(kept) < 0.06 and difference(changed) > difference(kept)
