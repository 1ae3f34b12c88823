"""Which of diffusers' pipelines run on a mini folder. PEERS_FOLDER=… names another than the shipped one.

Community Imagic is not in diffusers' package: `DiffusionPipeline.from_pretrained(…,
custom_pipeline="imagic_stable_diffusion")` fetches its
code from the hub, so no test can run it offline. It would load (four channels, scaling factor 0.18215), but it
computes with epsilon,
and mini predicts v: what it draws would be a smear."""

import os

import pytest
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The shipped folder, where it has four channels; an untrained one of today's shape where it has not."
    from layerdiffusion.base.folders import resolve_model
    from layerdiffusion.mini.training import _DiffusionObjective, _build_vae, _load_vae, _save_diffusion
    from layerdiffusion.base.sd import load_models

    named = os.environ.get("PEERS_FOLDER") or resolve_model("mini")
    if load_models(named).unet.config.in_channels == 4:
        return named
    out = tmp_path_factory.mktemp("peers")
    _build_vae().save_pretrained(out / "first")
    torch.manual_seed(0)
    _save_diffusion(out / "mini", _load_vae(out / "first"), _DiffusionObjective(vae=out / "first"))
    return out / "mini"


@pytest.fixture(scope="module")
def photo():
    from layerdiffusion.base.core import to_pil
    from layerdiffusion.mini.world import render, sample_scenes, stream

    image, mask, _ = render(sample_scenes(1, stream("peers"), species="dog", pose="standing"), 64)
    return image[0], mask[0], to_pil(image[0]), to_pil(mask[0].expand(3, -1, -1))


TEXT = "a brown dog sitting in the snow"


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sound(images):
    images = torch.as_tensor(images).float()
    assert images.isfinite().all() and images.std() > 0.01
    return images


def test_plain_pipeline_draws_what_the_library_draws(folder):
    from diffusers import StableDiffusionPipeline
    from layerdiffusion.base.sd import ddim_sample, decode_latents, encode_text, initial_latents, load_models

    models = load_models(folder)
    latents = initial_latents(models, [3])
    with torch.no_grad():
        embeds, nothing = encode_text(models, TEXT), encode_text(models, "")
        ours = decode_latents(models, ddim_sample(models, embeds, nothing, latents, 6, 3.0))
    pipe = quiet(StableDiffusionPipeline.from_pretrained(folder))
    theirs = pipe(TEXT, num_inference_steps=6, guidance_scale=3.0, latents=latents, output_type="pt").images
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_image_to_image(folder, photo):
    "The weaker it is, the nearer to the photo."
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = quiet(StableDiffusionImg2ImgPipeline.from_pretrained(folder))
    away = {}
    for strength in (0.2, 0.9):
        g = torch.Generator().manual_seed(0)
        how = dict(num_inference_steps=20, guidance_scale=2.0, generator=g, output_type="pt")
        out = pipe(TEXT, photo[2], strength=strength, **how).images
        away[strength] = (sound(out)[0] - photo[0]).abs().mean()
    assert away[0.2] < 0.5 * away[0.9]


def test_legacy_inpainting(folder, photo):
    "diffusers' own path for U-Nets with four channels: outside the mask the photo's latents are put back."
    from diffusers import StableDiffusionInpaintPipeline

    pipe = quiet(StableDiffusionInpaintPipeline.from_pretrained(folder))
    hole = torch.zeros(1, 64, 64)
    hole[:, 16:48, 36:60] = 1
    from layerdiffusion.base.core import to_pil

    g = torch.Generator().manual_seed(0)
    size = dict(height=64, width=64)
    out = pipe(
        TEXT, photo[2], to_pil(hole.expand(3, -1, -1)), num_inference_steps=8, generator=g, output_type="pt", **size
    )
    away = (sound(out.images)[0] - photo[0]).abs().mean(0, keepdim=True)
    assert away[:, :, :24].mean() < away[hole > 0].mean()


def test_ledits(folder, photo):
    """LEDITS++ inverts the photo, and adds a word. With DDIM its inversion fails in diffusers itself, whatever the
    model; so DPM-Solver."""
    from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion

    pipe = quiet(LEditsPPPipelineStableDiffusion.from_pretrained(folder))
    solver = dict(algorithm_type="sde-dpmsolver++", solver_order=2)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **solver)
    pipe.invert(photo[2], num_inversion_steps=10, skip=0.2, height=64, width=64)
    out = pipe(["scarf"], edit_guidance_scale=3.0, edit_threshold=0.8, output_type="np").images
    assert sound(out).shape[1:] == (64, 64, 3)
