"""`LayerDiffusion` called as a pipeline of diffusers is: each argument does what its name says there."""

import numpy as np
import pytest
import torch
from PIL import Image

from layerdiffusion import LayerDiffusion
from layerdiffusion.core import BadInput

TEXT = "a dog jumping in a forest"
SHORT = dict(embedding_steps=1, tuning_steps=1, sampling_steps=2, object_picture="input")


@pytest.fixture(scope="module")
def pipe():
    return LayerDiffusion.from_pretrained("mini", device="cpu")


@pytest.fixture(scope="module")
def scene(pipe):
    return pipe.prepare("example:dog", TEXT, point=(32, 36), config=pipe.settings(**SHORT))


def drawn(pipe, scene, **changes):
    return pipe(scene, **SHORT | dict(output_type="pt") | changes).images


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_images_are_pillow_pictures_and_edit_is_the_whole_result(pipe, scene):
    out = pipe(scene, **SHORT, seeds=[3, 1])
    assert all(isinstance(x, Image.Image) for x in out.images) and out.edit.seeds == [3, 1]
    arrays = drawn(pipe, scene, seeds=[3, 1], output_type="np")
    assert arrays.shape == (2, 64, 64, 3) and np.allclose(np.asarray(out.images[0]) / 255, arrays[0], atol=0.003)
    assert torch.equal(out.edit.images, pipe.edit(scene, **SHORT, seeds=[3, 1]).images)


def test_a_fresh_generator_is_its_seed_and_a_used_one_goes_on(pipe, scene):
    used = seeded(3)
    first, second = (drawn(pipe, scene, generator=used) for _ in range(2))
    assert torch.equal(first, drawn(pipe, scene, seeds=[3])) and not torch.equal(first, second)
    assert torch.equal(first, drawn(pipe, scene, generator=seeded(3)))
    several = drawn(pipe, scene, generator=[seeded(3), seeded(1)])
    assert torch.equal(several, drawn(pipe, scene, seeds=[3, 1]))
    assert len(drawn(pipe, scene, generator=seeded(3), num_images_per_prompt=2)) == 2


def test_the_numbers_of_the_drawing(pipe, scene):
    def steps(**changes):
        seen = []
        drawn(pipe, scene, callback_on_step_end=lambda _, i, t, kw: seen.append((i, int(t))) or kw, **changes)
        return seen

    short = {k: v for k, v in SHORT.items() if k != "sampling_steps"}
    out = pipe(scene, **short, num_inference_steps=3, guidance_scale=2.0, negative_prompt="a cat")
    found = out.edit.config
    assert (found.sampling_steps, found.guidance_scale, found.negative_prompt) == (3, 2.0, "a cat")
    assert [i for i, _ in steps()] == [0, 1] and steps()[0][1] > steps()[1][1]
    assert not torch.equal(drawn(pipe, scene), drawn(pipe, scene, guidance_scale=1.0))


def test_latents_that_the_callback_gives_are_the_ones_that_are_drawn(pipe, scene):
    def other(its, step, timestep, kwargs):
        assert its is pipe
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 1 else {}

    pictures = drawn(pipe, scene, seeds=[0, 1], callback_on_step_end=other)
    assert torch.equal(pictures[0], pictures[1])
    plain = drawn(pipe, scene, callback_on_step_end=lambda pipe, step, t, kwargs: kwargs)
    assert torch.equal(plain, drawn(pipe, scene))


def test_another_text_for_a_scene_keeps_its_photo_and_subject(pipe, scene):
    out = pipe(scene, "a dog lying in a forest", **SHORT).edit
    assert torch.equal(out.image, scene.image) and torch.equal(out.mask, scene.mask)
    assert torch.equal(out.reference, scene.reference) and out.split.object == "a dog lying"


@pytest.mark.parametrize(
    "bad, word",
    [
        (dict(output_type="jpg"), "output_type"),
        (dict(generator=3), "generator"),
        (dict(generator=torch.Generator(), seeds=[1]), "seeds"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt"),
        (dict(num_inference_steps=2), "num_inference_steps"),
        (dict(move=(0.1, 0)), "move"),
        (dict(callback_on_step_end=lambda *_: {"latents": torch.zeros(1)}), "latents"),
    ],
)
def test_what_cannot_be_meant_is_refused(pipe, scene, bad, word):
    with pytest.raises(BadInput, match=word):
        pipe(scene, **SHORT | bad)


def test_a_pipeline_of_diffusers_gives_the_same_pictures(pipe, scene):
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(pipe.models.folder, safety_checker=None)
    ours = LayerDiffusion.from_pipe(theirs)
    assert ours.models.unet is theirs.unet and ours.models.hash == pipe.models.hash
    assert torch.equal(drawn(ours, scene), drawn(pipe, scene))
    with pytest.raises(BadInput, match="from_pipe"):
        LayerDiffusion.from_pipe("mini")


def test_precision_and_device():
    pipe = LayerDiffusion.from_pretrained("mini", device="cpu", torch_dtype=torch.bfloat16)
    assert pipe.models.dtype == torch.bfloat16 and pipe.to(torch.float32, "cpu") is pipe
    assert pipe.models.dtype == torch.float32 == pipe.models.unet.dtype
    pipe.to(torch.bfloat16)
    picture = pipe("example:dog", TEXT, point=(32, 36), **SHORT, output_type="pt").images
    assert pipe.models.unet.dtype == torch.bfloat16 and picture.isfinite().all()
    for bad in (torch.int8, "tpu"):
        with pytest.raises(BadInput):
            pipe.to(bad)
    with pytest.raises(BadInput, match="precision"):
        LayerDiffusion.from_pretrained("mini", precision="fp32", torch_dtype=torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_offload_without_cuda_is_one_sentence(pipe):
    with pytest.raises(BadInput, match="no CUDA"):
        pipe.enable_model_cpu_offload()
