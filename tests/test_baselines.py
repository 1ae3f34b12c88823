"""The three baselines: equal to other computations where there are any, and nothing left behind in the loaded model.

Everything is done with the shipped mini's parts and few steps; nothing depends on how well they draw.
"""

import copy
from dataclasses import replace

import pytest
import torch

from layerdiffusion.evidence import scores
from layerdiffusion.evidence.baselines import (
    _RECIPES,
    _baseline_rows,
    imagic,
    _imagic_draw,
    _imagic_fit,
    _imagic_recipe,
    _injection_layers,
    _invert,
    _lend_features,
    plug_and_play,
    sdedit,
)
from layerdiffusion.base.core import BadInput
from layerdiffusion.evidence.experiments import _baseline_start
from layerdiffusion.evidence.scores import edit_set
from layerdiffusion.base.sd import (
    ddim_sample,
    decode_latents,
    encode_image,
    encode_text,
    initial_latents,
    load_models,
    timesteps,
)

METHODS = {
    "sdedit": (sdedit, dict(strength=0.5)),
    "imagic": (imagic, dict(embedding_steps=2, tuning_steps=2)),
    "plug_and_play": (plug_and_play, dict()),
}


@pytest.fixture(scope="module")
def models():
    return load_models("mini")


@pytest.fixture(scope="module")
def edit():
    return edit_set("development")[1].edit


def like_sd14(models):
    "The same parts with the schedule of Stable Diffusion v1.4: predicts noise, counts from the clean end."
    from diffusers import DDIMScheduler

    return replace(
        models,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        ),
    )


def hooks(unet):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


@pytest.mark.parametrize("schedule", ["own", "v1.4"])
@pytest.mark.parametrize("strength", [0.1, 0.45, 0.8, 1.0])
def test_sdedit_is_diffusers_img2img(models, edit, schedule, strength):
    "The same pictures, built from the same loaded parts, for several seeds."
    from diffusers import StableDiffusionImg2ImgPipeline

    models = models if schedule == "own" else like_sd14(models)
    pipe = StableDiffusionImg2ImgPipeline(
        vae=models.vae,
        unet=models.unet,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        scheduler=copy.deepcopy(models.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    seeds, settings = [0, 7, 3], dict(strength=strength, num_inference_steps=10, guidance_scale=3.0)
    theirs = pipe(
        [edit.text] * 3,
        edit.image[None],
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        output_type="pt",
        **settings,
    ).images
    assert torch.allclose(sdedit(models, edit.image, edit.text, seeds=seeds, **settings), theirs, atol=1e-5)


@pytest.mark.parametrize("strength", [0.09, 0, -0.5, 1.5, float("nan")])
def test_sdedit_refuses(models, edit, strength):
    with pytest.raises(BadInput, match="trength"):
        sdedit(models, edit.image, edit.text, strength=strength, num_inference_steps=10)


def test_sdedit_changes_the_area_alone(models, edit):
    "Outside the mask the picture stays; the other half stays with the other mask, and nothing stays without one."
    left = torch.zeros_like(edit.mask)
    left[..., : left.shape[-1] // 2] = 1
    there = decode_latents(models, encode_image(models, edit.image))[0].cpu()

    def off(mask):
        x = sdedit(models, edit.image, edit.text, strength=0.9, mask=mask, seeds=[0], num_inference_steps=10)[0]
        wide = there.shape[-1]
        halves = (slice(0, wide // 2 - 8), slice(wide // 2 + 8, wide))
        return [(x - there)[..., h].abs().mean().item() for h in halves]

    (a, b), (c, d), whole = off(left), off(1 - left), off(None)
    assert b < 0.03 < 3 * b < a and c < 0.03 < 3 * c < d and min(whole) > 0.06, (a, b, c, d, whole)
    assert off(torch.ones_like(left)) == whole


def test_what_a_baseline_begins_from(edit):
    "The photo; or its subject on the reference, where all but the area around it is the reference."
    other = replace(edit, reference=1 - edit.reference)
    start, more = _baseline_start(edit, dict(strength=0.5))
    assert torch.equal(start, edit.image) and more == dict(strength=0.5)
    start, more = _baseline_start(edit, dict(strength=0.5, paste=True, grow=8))
    kept, area = 1 - more.pop("mask"), (edit.mask == 1).float()  # its edge is soft
    assert more == dict(strength=0.5) and kept.sum() > 0 and (kept * edit.mask).sum() == 0
    assert torch.equal(start * kept, edit.reference * kept) and torch.equal(start * area, edit.image * area)
    elsewhere = _baseline_start(other, dict(paste=True))[0]
    assert torch.equal(elsewhere * area, start * area) and not torch.allclose(elsewhere * kept, start * kept)
    assert not torch.equal(_baseline_start(replace(edit, mask=1 - edit.mask), dict(paste=True))[0], start)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ends", ["well", "interrupted"])
def test_nothing_is_left_behind(models, edit, name, ends):
    "Weights, hooks, processors, gradients and the scheduler are as they were, also when it was interrupted."
    method, options = METHODS[name]
    unet, scheduler = models.unet, models.scheduler
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    kept = dict(unet.attn_processors), scheduler.timesteps.clone(), dict(scheduler.config), set(vars(scheduler))

    def callback(event):
        if ends == "interrupted" and (event.step == 2 and event.stage != "inversion"):
            raise KeyboardInterrupt

    try:
        images = method(
            models, edit.image, edit.text, seeds=[0, 1], num_inference_steps=10, callback=callback, **options
        )
    except KeyboardInterrupt:
        assert ends == "interrupted"
    else:
        assert ends == "well" and images.shape == (2, *edit.image.shape) and images.min() >= 0 and images.max() <= 1
    assert hooks(unet) == 0 and all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert (
        kept[0] == dict(unet.attn_processors)
        and torch.equal(kept[1], scheduler.timesteps)
        and kept[2:] == (dict(scheduler.config), set(vars(scheduler)))
    )
    assert not unet.training and not any(p.requires_grad or p.grad is not None for p in unet.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_same_call_same_pictures(models, edit, name):
    method, options = METHODS[name]

    def draw(seeds):
        return method(models, edit.image, edit.text, seeds=seeds, num_inference_steps=10, **options)

    both = draw([4, 5])
    assert torch.equal(both, draw([4, 5]))
    assert torch.allclose(both[1], draw([5])[0], atol=1e-4)
    assert torch.allclose(both[0], both[1], atol=1e-4) == (name == "plug_and_play")


@pytest.mark.parametrize("schedule", ["own", "v1.4"])
def test_inversion_is_ddim_upwards(models, edit, schedule):
    "The formula, written out for both kinds of prediction."
    models = models if schedule == "own" else like_sd14(models)
    path, (x, level) = (
        _invert(models, edit.image, 10),
        (encode_image(models, edit.image), models.scheduler.final_alpha_cumprod),
    )
    assert sorted(path) == sorted(timesteps(copy.deepcopy(models.scheduler), 10).tolist())
    for t in path:
        with torch.no_grad():
            said = models.unet(x, t, encode_text(models, "")).sample
        a, b, level = level.sqrt(), (1 - level).sqrt(), models.scheduler.alphas_cumprod[t]
        x0, eps = (a * x - b * said, a * said + b * x) if schedule == "own" else ((x - b * said) / a, said)
        x = level.sqrt() * x0 + (1 - level).sqrt() * eps
        assert torch.allclose(x, path[t], rtol=1e-4, atol=1e-4)


def test_places_of_stable_diffusion():
    "On a U-Net of its shape the rule gives the published places; a block without attention is passed over."
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2
    )
    resnet, attention = _injection_layers(unet)
    assert resnet is unet.up_blocks[1].resnets[1]
    expected = [
        unet.up_blocks[b].attentions[k] for b, k in [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    ]
    assert len(attention) == 8 and all(
        a is e.transformer_blocks[0].attn1 for a, e in zip(attention, expected, strict=False)
    )


def test_lent_attention_by_hand(models, edit):
    "One layer: the photo's attention map, the edit's own values."
    path, layer, seen = {500: torch.randn(1, 4, 16, 16)}, _injection_layers(models.unet)[1][0], {}

    def look(module, args, kwargs, output):
        seen.update(x=args[0] if args else kwargs["hidden_states"], y=output)

    handle = layer.register_forward_hook(look, with_kwargs=True)
    e = encode_text(models, ["", "a dog", "a cat"])
    with torch.no_grad(), _lend_features(models.unet, path, e[:1], [], [500]) as unet:
        unet(torch.randn(2, 4, 16, 16), torch.tensor(500), e[1:])
    handle.remove()
    x, heads = seen["x"], lambda v: v.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    with torch.no_grad():
        q, k, v = heads(layer.to_q(x[:1])), heads(layer.to_k(x[:1])), heads(layer.to_v(x))
        share = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        expected = layer.to_out[0]((share @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(seen["y"], expected, atol=1e-5)


def test_lending_at_no_step_is_plain_drawing(models, edit):
    path = _invert(models, edit.image, 10)
    plain = decode_latents(models, ddim_sample(models, encode_text(models, edit.text), None, path[999], 10, 3.0))
    lent = [
        plug_and_play(
            models,
            edit.image,
            edit.text,
            features=f,
            attention=a,
            guidance_scale=3.0,
            seeds=[0],
            num_inference_steps=10,
        )
        for f, a in [(0, 0), (0.8, 0), (0, 0.5)]
    ]
    assert torch.allclose(lent[0], plain, atol=1e-4) and not any(torch.allclose(x, plain, atol=1e-2) for x in lent[1:])


def test_own_words_give_the_photo_back(models, edit):
    seen = decode_latents(models, encode_image(models, edit.image))
    back = plug_and_play(models, edit.image, "", features=1.0, attention=1.0, guidance_scale=1.0, seeds=[0])
    assert (back - seen).square().mean().sqrt() < 0.03


def test_inversion_with_other_steps(models, edit):
    "A multiple of the steps will do; another number is refused in words."
    assert (
        plug_and_play(models, edit.image, edit.text, num_inference_steps=10, inversion_steps=20, seeds=[0])
        .isfinite()
        .all()
    )
    with pytest.raises(BadInput, match="multiple of 10"):
        plug_and_play(models, edit.image, edit.text, num_inference_steps=10, inversion_steps=15)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0, 1.2])
def test_imagic_without_fitting_is_plain_drawing(models, edit, eta):
    plain = decode_latents(
        models, ddim_sample(models, encode_text(models, edit.text), None, initial_latents(models, [3]), 10, 3.0)
    )
    images = imagic(
        models,
        edit.image,
        edit.text,
        eta=eta,
        embedding_steps=0,
        tuning_steps=0,
        seeds=[3],
        num_inference_steps=10,
        guidance_scale=3.0,
    )
    assert torch.allclose(images, plain, atol=1e-4)


def test_imagic_fits(models, edit):
    "Words and U-Net move, each stage lowers its own loss on fixed draws, and η mixes linearly, beyond 1 too."
    from layerdiffusion.readings import _evaluate_embedding

    recipe = _imagic_recipe(embedding_steps=40, tuning_steps=40, tuning_lr=2e-5)
    fit = _imagic_fit(models, edit.image, edit.text, recipe)
    x = encode_image(models, edit.image)
    loss = [
        _evaluate_embedding(m, e, x)
        for m, e in ((models, fit.e_tgt), (models, fit.e_opt), (replace(models, unet=fit.unet), fit.e_opt))
    ]
    assert loss[0] > loss[1] > loss[2]
    seen = []
    spy = replace(
        models, unet=lambda latents, t, embeds: (seen.append(embeds[-1:]), models.unet(latents, t, embeds))[1]
    )
    _imagic_draw(models, replace(fit, unet=spy.unet), 1.2, [0], 1)
    assert torch.allclose(seen[0], 1.2 * fit.e_tgt - 0.2 * fit.e_opt, atol=1e-5)


def test_imagic_recipes():
    "The published numbers; a card's rates stand for 1e-3 and 2e-6."
    assert _imagic_recipe("paper") == _RECIPES["paper"] and _imagic_recipe("community", {}) == _RECIPES["community"]
    small = _imagic_recipe("paper", dict(embedding_lr=1e-4, tuning_lr=2e-5), eta=0.6)
    assert (small["embedding_lr"], small["tuning_lr"], small["eta"]) == pytest.approx((2e-4, 5e-6, 0.6))
    with pytest.raises(BadInput, match="paper and community"):
        _imagic_recipe("mine")
    with pytest.raises(BadInput, match="'alpha'"):
        _imagic_recipe(alpha=0.7)


def test_rows_go_on_after_a_kill(models, monkeypatch, tmp_path):
    "What is in the record is not drawn again; a cut-off line is; other options and seeds are other lines."
    from layerdiffusion.pipeline import LayerDiffusion

    monkeypatch.setattr(
        scores,
        "Scorer",
        lambda *a: lambda images: [dict(valid=True, identity=0.0, background=0.0, right=True) for _ in images],
    )
    calls, tasks, file = [], edit_set("development")[:3], tmp_path / "rows.jsonl"

    def drawn(models, image, text, *, seeds, callback=None, **options):
        calls.append(text)
        if len(calls) == 3 and not (tmp_path / "on").exists():
            raise KeyboardInterrupt
        return image.expand(len(seeds), -1, -1, -1)

    def rows(**options):
        return _baseline_rows(
            LayerDiffusion(models), tasks, drawn, range(2), file, judge=torch.nn.Linear(1, 1), **options
        )

    with pytest.raises(KeyboardInterrupt):
        rows(eta=1)
    assert file.read_text().count("\n") == 2
    file.write_text(file.read_text()[:-20])
    (tmp_path / "on").touch()
    found = rows(eta=1)
    assert calls[3:] == [t.edit.text for t in tasks[1:]] and file.read_text().count("\n") == 3
    assert rows(eta=1) == found and len(calls) == 5 and [r["seed"] for r in found] == [0, 1] * 3
    assert len(rows(eta=2)) == 6 and len(calls) == 8
