"""The class as somebody who knows diffusers uses it: from_pipe, to, the call's arguments, Pillow pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from layerdiffusion import BadInput, LayerDiffusion, load_edit
from layerdiffusion.base.masks import find_mask
from layerdiffusion.pipeline import EditOutput

TEXT = "a dog jumping in a forest"
SHORT = dict(embedding_steps=1, tuning_steps=1, object_picture="input")


@pytest.fixture(scope="module")
def pipe():
    return LayerDiffusion.from_pretrained("mini", "cpu")


@pytest.fixture(scope="module")
def scene(pipe):
    return pipe.prepare("example:dog", TEXT, point=(32, 36), **SHORT, sampling_steps=2)


@pytest.fixture(scope="module")
def plain(pipe, scene):
    "Two steps of seed 3, as a tensor (1, 3, H, W)."
    return pipe(scene=scene, seeds=[3], output_type="pt").images


def diffusers_pipe(pipe, **options):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(pipe.models.folder, safety_checker=None, **options)


def test_the_call_and_edit_are_one(pipe, plain):
    "`edit` is the long name: its images are a tensor, those of the call Pillow pictures of the same numbers."
    result = pipe.edit("example:dog", TEXT, point=(32, 36), **SHORT, sampling_steps=2, seeds=[3])
    said = pipe("example:dog", TEXT, point=(32, 36), **SHORT, num_inference_steps=2, seeds=[3])
    assert isinstance(result.images, torch.Tensor) and torch.equal(result.images, plain)
    assert isinstance(said, EditOutput) and isinstance(said.images[0], Image.Image)
    assert torch.equal(said.edit.images, plain) and said.edit.config == result.config


def test_output_types_show_the_same_picture(pipe, scene, plain):
    pil = pipe(scene=scene, seeds=[3]).images
    array = pipe(scene=scene, seeds=[3], output_type="np").images
    assert array.shape == (1, 64, 64, 3) and np.array_equal(array[0].transpose(2, 0, 1), plain[0].numpy())
    assert len(pil) == 1 and np.abs(np.asarray(pil[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(BadInput, match="output_type is 'latent'; give 'pil', 'pt' or 'np'"):
        pipe(scene=scene, output_type="latent")


def test_num_inference_steps_are_the_drawings(pipe, scene, plain):
    seen = []
    drawn = pipe(
        scene=scene,
        seeds=[3],
        num_inference_steps=5,
        output_type="pt",
        callback_on_step_end=lambda pipe, step, t, kwargs: seen.append((step, int(t))),
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4] and sorted({t for _, t in seen}, reverse=True) == [
        t for _, t in seen
    ]
    assert drawn.edit.config.sampling_steps == 5 and not torch.allclose(drawn.images, plain, atol=1e-3)
    with pytest.raises(BadInput, match="one setting"):
        pipe(scene=scene, num_inference_steps=5, sampling_steps=5)


def test_guidance_goes_towards_the_text_and_away_from_the_negative(pipe, scene):
    "With guidance 1 the negative text has no say; above, the picture is its distance from it times the scale."

    def draw(**changes):
        return pipe(scene=scene, seeds=[3], num_inference_steps=1, output_type="pt", **changes).edit

    found = []
    for scale in (1.0, 2.0, 4.0):

        def last(pipe, step, t, kwargs):
            return found.append(kwargs["latents"])

        assert draw(guidance_scale=scale, callback_on_step_end=last).config.guidance_scale == scale
    assert torch.allclose(found[2] - found[0], 3 * (found[1] - found[0]), atol=1e-3)
    free, led = draw(guidance_scale=3.0), draw(guidance_scale=3.0, negative_prompt="a cat")
    assert led.config.negative_prompt == "a cat" and not torch.allclose(free.images, led.images, atol=1e-4)


def test_a_fresh_generator_is_its_seed(pipe, scene, plain):
    "And a list of them a picture each, in this order."

    def fresh(seed):
        return torch.Generator().manual_seed(seed)

    one = pipe(scene=scene, generator=fresh(3), output_type="pt")
    two = pipe(scene=scene, generator=[fresh(5), fresh(3)], output_type="pt")
    assert one.edit.seeds == [3] and torch.equal(one.images, plain)
    assert two.edit.seeds == [5, 3] and torch.allclose(two.images[1:], plain, atol=1e-5)


def test_a_used_generator_goes_on(pipe, scene):
    "Each picture has another seed, the same from the same state, and these seeds draw the same pictures."
    generator = torch.Generator().manual_seed(3)
    many = pipe(scene=scene, generator=generator, num_images_per_prompt=2, output_type="pt")
    more = pipe(scene=scene, generator=generator, output_type="pt")
    again = pipe(scene=scene, generator=torch.Generator().manual_seed(3), num_images_per_prompt=3, output_type="pt")
    seeds = [*many.edit.seeds, *more.edit.seeds]
    assert len(set(seeds)) == 3 and again.edit.seeds == seeds
    assert torch.allclose(again.images[:2], many.images, atol=1e-5)
    assert torch.allclose(pipe(scene=scene, seeds=seeds, output_type="pt").images, again.images)


def test_eight_pictures_without_seeds(pipe):
    from layerdiffusion.pipeline import _seeds_of

    assert _seeds_of(None, None, None) == list(range(8)) and _seeds_of(None, None, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(seeds=[1], generator=torch.Generator()), "give one of the two"),
        (dict(generator=3), "torch.Generator"),
        (dict(generator=[torch.Generator()], num_images_per_prompt=2), "1 seeds or generators"),
        (dict(num_images_per_prompt=0), "at least 1"),
        (dict(num_inference_step=3), "num_inference_steps"),
        (dict(num_inference_steps=0), "sampling_steps is 0"),
        (dict(preset="beste"), "preset"),
        (dict(callback_on_step_end=3), "give a function"),
    ],
)
def test_what_cannot_be_meant_is_refused(pipe, scene, given, said):
    with pytest.raises(BadInput, match=said):
        pipe(scene=scene, **given)


def test_nothing_to_edit_is_refused(pipe, scene):
    for args, said in (((), "no image and no text"), (("example:dog",), "no text")):
        with pytest.raises(BadInput, match=said):
            pipe(*args)
    with pytest.raises(BadInput, match="holds its point already"):
        pipe(scene=scene, point=(1, 1))
    with pytest.raises(BadInput, match="holds its text already"):
        pipe(text=TEXT, scene=scene)


def test_the_callback_is_told_and_may_replace_latents(pipe, scene, plain):
    "What it is given is what is drawn; other latents change the picture, and after the last step they are the picture."
    seen = []

    def look(its, step, timestep, callback_kwargs):
        seen.append((its, step, callback_kwargs["latents"].clone()))
        return callback_kwargs

    same = pipe(scene=scene, seeds=[3], output_type="pt", callback_on_step_end=look)
    assert torch.equal(same.images, plain) and [s[:2] for s in seen] == [(pipe, 0), (pipe, 1)]
    first = seen[0][2]

    def swap(its, step, t, kwargs):
        return dict(latents=-kwargs["latents"] if step == 0 else kwargs["latents"])

    assert not torch.allclose(
        pipe(scene=scene, seeds=[3], output_type="pt", callback_on_step_end=swap).images, plain, atol=1e-2
    )
    from layerdiffusion.base.sd import decode_latents

    def end(its, step, t, kwargs):
        return dict(latents=first) if step == 1 else {}

    shown = pipe(scene=scene, seeds=[3], output_type="pt", callback_on_step_end=end).images
    assert torch.equal(shown, decode_latents(pipe.models, first))


@pytest.mark.parametrize(
    "gives, said", [(3, "a int"), (dict(latents=torch.zeros(2)), r"\(2,\)"), (dict(latents=None), "None")]
)
def test_a_callback_that_gives_something_else(pipe, scene, gives, said):
    with pytest.raises(BadInput, match=said):
        pipe(scene=scene, seeds=[3], callback_on_step_end=lambda *args: gives)


def test_a_scene_has_its_settings(pipe, scene):
    "Those it was prepared with hold where the call names none; what is in the scene cannot be changed any more."
    assert pipe(scene=scene, seeds=[3], alpha=0.2).edit.config == scene.config.change(alpha=0.2)
    for change, said in (
        (dict(object_picture="target"), "object_picture='input'"),
        (dict(reference_mask="sam"), "reference_mask='empty'"),
        (dict(learnt_words=1), "words for the photo"),
    ):
        with pytest.raises(BadInput, match=said):
            pipe(scene=scene, seeds=[3], **change)
    drawn = replace(scene, config=scene.config.change(object_picture="target"))
    with pytest.raises(BadInput, match="prepared with subject_scale=0.0"):
        pipe(scene=drawn, seeds=[3], subject_scale=0.5)


def test_a_scene_is_of_its_model(pipe, scene):
    with pytest.raises(BadInput, match="another model"):
        pipe(scene=replace(scene, model="0"), seeds=[3])
    with pytest.raises(BadInput, match="prepare"):
        pipe(scene="example:dog")


def test_a_mask_that_is_given_is_the_mask(pipe):
    photo = pipe.prepare("example:dog", TEXT, point=(32, 36), **SHORT, sampling_steps=1)
    mask = find_mask(pipe.sam, photo.image, point=[(32, 36)])
    said = pipe("example:dog", TEXT, mask=mask, **SHORT, num_inference_steps=1, seeds=[0])
    assert torch.equal(said.edit.mask, mask)


def test_from_pipe_draws_what_from_pretrained_draws(pipe, scene, plain, tmp_path):
    "The pipe's own U-Net, in the pipe's place; a saved edit is drawn again by either."
    theirs = diffusers_pipe(pipe)
    ours = LayerDiffusion.from_pipe(theirs, sam=pipe.sam)
    assert ours.models.unet is theirs.unet and ours.models.hash == pipe.models.hash
    said = ours(scene=scene, seeds=[3], output_type="pt")
    assert torch.equal(said.images, plain)
    said.edit.save(tmp_path / "dog")
    assert torch.equal(load_edit(tmp_path / "dog", pipe).images, plain)


def test_from_pipe_knows_other_weights(pipe, scene):
    theirs = diffusers_pipe(pipe)
    with torch.no_grad():
        theirs.unet.conv_in.weight.add_(0.01)
    ours = LayerDiffusion.from_pipe(theirs)
    assert ours.models.hash != pipe.models.hash
    with pytest.raises(BadInput, match="another model"):
        ours(scene=scene, seeds=[3])


def test_from_pipe_in_half_precision_leaves_the_pipe_alone(pipe, scene, plain):
    theirs = diffusers_pipe(pipe, dtype=torch.bfloat16)
    said = LayerDiffusion.from_pipe(theirs)(scene=scene, seeds=[3], output_type="pt")
    assert said.edit.record["precision"] == "bfloat16" and 0 < (said.images - plain).abs().max() < 0.2
    assert not theirs.unet._forward_hooks and theirs.unet.dtype == torch.bfloat16


def test_from_pipe_refuses_another_kind(pipe):
    theirs = diffusers_pipe(pipe)
    theirs.vae.to(torch.float16)
    with pytest.raises(BadInput, match="not alike"):
        LayerDiffusion.from_pipe(theirs)
    with pytest.raises(BadInput, match="StableDiffusionPipeline"):
        LayerDiffusion.from_pipe("CompVis/stable-diffusion-v1-4")
    theirs.vae.to(torch.float32)
    theirs.unet._hf_hook = object()
    with pytest.raises(BadInput, match="remove_all_hooks"):
        LayerDiffusion.from_pipe(theirs)


def test_torch_dtype_is_the_precision():
    for given in (dict(torch_dtype=torch.bfloat16), dict(dtype=torch.bfloat16), dict(precision="bf16")):
        models = LayerDiffusion.from_pretrained("mini", "cpu", **given).models
        assert models.dtype == models.unet.dtype == torch.bfloat16
    with pytest.raises(BadInput, match="one of the two"):
        LayerDiffusion.from_pretrained("mini", "cpu", precision="fp16", torch_dtype=torch.bfloat16)
    with pytest.raises(BadInput, match="torch.int8"):
        LayerDiffusion.from_pretrained("mini", "cpu", torch_dtype=torch.int8)


def test_to_moves_and_rounds(scene, plain):
    "In half precision nothing is remembered of what was computed in full, and there is no way back but loading."
    mine = LayerDiffusion.from_pretrained("mini", "cpu")
    assert mine.to("cpu") is mine and torch.equal(mine(scene=scene, seeds=[3], output_type="pt").images, plain)
    said = mine.to("cpu", torch.bfloat16)(scene=scene, seeds=[3], output_type="pt")
    assert said.edit.record["precision"] == "bfloat16" and 0 < (said.images - plain).abs().max() < 0.2
    with pytest.raises(BadInput, match="torch_dtype=torch.float32"):
        mine.to(dtype=torch.float32)
    with pytest.raises(BadInput, match="torch.float64"):
        mine.to(torch.float64)
    with pytest.raises(BadInput, match="no device 'cuda:99'"):
        mine.to(torch.device("cuda:99"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_offload_needs_a_gpu(pipe):
    with pytest.raises(BadInput, match="needs a GPU"):
        pipe.enable_model_cpu_offload()
    assert not pipe.models.how.offload


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_on_a_gpu(scene, plain):
    mine = LayerDiffusion.from_pretrained("mini", "cpu")
    mine.enable_model_cpu_offload()
    assert mine.models.device.type == "cuda" and mine.models.vae.device.type == "cpu"
    assert (mine(scene=scene, seeds=[3], output_type="pt").images - plain).abs().max() < 0.05
