"""Each setting moves what it names, and in the right direction: a swapped sign, mask, picture or order fails here.

What an equation has is compared with a loop of its own in test_equations.py. Here is the rest: rates, steps and seeds,
the words, the choice of O_t, what the U-Net sees of the photo's subject, and what trains mini.
Nothing depends on how well they draw.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_equations import Plain, draws

from layerdiffusion import EditConfig, LayerDiffusion, identity, pipeline, preset
from layerdiffusion.base.core import BadInput
from layerdiffusion.base.masks import iou, propose_subject
from layerdiffusion.evidence.scores import edit_set
from layerdiffusion.base.sd import How, decode_latents, load_models
from layerdiffusion.pipeline import _Place

PHOTO_WORDS = "a pink dog lying in a city at night"


@pytest.fixture(scope="module")
def models():
    return load_models("mini")


@pytest.fixture(scope="module")
def plain(models):
    return Plain((models.vae, models.unet, models.text_encoder, models.tokenizer, models.scheduler))


@pytest.fixture
def method(models):
    return LayerDiffusion(models, "mini")


@pytest.fixture(scope="module")
def task():
    return edit_set("development")[0].edit  # a pink dog lying in a city at night shall stand in the snow


@pytest.fixture(scope="module")
def scene(models, task):
    "What an edit starts from, with the photo's subject as O_t."
    return LayerDiffusion(models, "mini").prepare(
        task.image,
        task.text,
        mask=(task.mask > 0.5).float(),
        reference=task.reference,
        source=task.source,
        config=short(),
    )


def short(**changes):
    return EditConfig(**dict(object_picture="input", embedding_steps=1, tuning_steps=1, sampling_steps=2) | changes)


def size(difference):
    return max(x.abs().max().item() for x in difference.values())


def mean(a, b):
    return (a - b).abs().mean().item()


# Rates, steps, decay


@pytest.mark.parametrize("rate", [1e-4, 4e-3])
def test_the_first_step_is_as_long_as_the_rate(method, scene, rate):
    "Adam's first step is its rate, in every stage."
    words = method.embed(scene, short(embedding_lr=rate))
    moved = max((a - b).abs().max().item() for a, b in zip(words[:2], (scene.e_a, scene.e_b), strict=False))
    assert moved == pytest.approx(rate, rel=0.02)
    assert size(method.tune(scene, words, short(tuning_lr=rate))[0]) == pytest.approx(rate, rel=0.02)
    vectors = method.learn(scene, short(learnt_words=2, word_lr=rate, embedding_lr=1.0).resolve(method.models.card))[0]
    start = identity.first_vectors(method.models, identity.with_words(PHOTO_WORDS, 2), 2)
    assert (vectors - start).abs().max().item() == pytest.approx(rate, rel=0.02)


def test_as_many_steps_as_asked(method, scene):
    seen = []
    config = short(embedding_steps=3, tuning_steps=4, sampling_steps=5)
    words = method.embed(scene, config, seen.append)
    difference, _ = method.tune(scene, words, config, seen.append)
    method.sample(words, difference, scene.size, [0], config, seen.append)
    assert [sum(e.stage == stage for e in seen) for stage in ("embeddings", "tuning", "drawing")] == [3, 4, 5]


def test_the_rate_falls_to_nothing_along_half_a_cosine():
    "With a gradient that never changes, each step of Adam is as long as the rate."
    from layerdiffusion.base.sd import optimise

    at = {decay: [] for decay in (False, True)}
    for decay, path in at.items():
        w = torch.zeros(1, requires_grad=True)

        def note(event, w=w, path=path):
            path.append(w.item())

        optimise(lambda step, g, w=w: w.sum(), [w], 10, 0.1, "down", note, decay=decay)
    steps = {decay: -torch.tensor([0.0, *path]).diff() for decay, path in at.items()}
    assert torch.allclose(steps[False], torch.full((10,), 0.1), atol=1e-5)
    assert torch.allclose(
        steps[True], torch.tensor([0.05 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]), atol=1e-5
    )


def test_the_loss_may_be_scaled_for_the_backward_pass():
    "Half precision needs larger gradients on the way; what is taken off is the same."
    from layerdiffusion.base.sd import optimise

    ends = []
    for scale in (1.0, 8.0):
        w = torch.ones(1, requires_grad=True)
        plain = torch.optim.SGD([w], 0.1)
        optimise(lambda step, g, w=w: w.square().sum(), [w], 3, 0.1, "x", optimizer=plain, scale=scale)
        ends.append(w.item())
    assert ends == pytest.approx([0.8**3] * 2)


def test_the_finished_picture_as_predicted_on_the_way(method, plain, scene):
    "The last prediction is the picture, and the first is what one step would give."
    seen = []
    images = method.sample((scene.e_a, scene.e_b), {}, scene.size, [0], short(sampling_steps=4), seen.append)
    assert mean(plain.decode(seen[-1].x0)[None], images) < 1e-4 < mean(plain.decode(seen[0].x0)[None], images)
    one = method.sample((scene.e_a, scene.e_b), {}, scene.size, [0], short(sampling_steps=1))
    assert mean(plain.decode(seen[0].x0)[None], one) < 1e-4


def test_descent_goes_down(method, scene):
    "More steps, a smaller loss on the same draws, in both trainings."
    from layerdiffusion.readings import _evaluate_embedding
    from layerdiffusion.differences import apply_difference

    config = short(embedding_steps=12, embedding_lr=3e-3, tuning_steps=6, tuning_lr=2e-4)
    words = method.embed(scene, config)
    both, x = lambda a, b: torch.cat([a, b], 1), method.latents(scene.image)
    place = 1 - method.small(scene.mask, config)
    assert _evaluate_embedding(method.models, both(*words[:2]), x, place) < _evaluate_embedding(
        method.models, both(scene.e_a, scene.e_b), x, place
    )
    tuned = replace(method.models, unet=apply_difference(method.models.unet, method.tune(scene, words, config)[0]))
    opt, picture = 0.7 * words[0] + 0.3 * words[1], method.layers(scene, config)[0]
    assert _evaluate_embedding(tuned, opt, picture) < _evaluate_embedding(method.models, opt, picture)


# Seeds


def test_the_setting_seed_decides_every_draw_but_the_first_noise(method, scene):
    """Drawn reference, noise and timesteps of both trainings, LoRA's start, the model's own pictures; another seed,
    other numbers, the same seed, the same."""

    def all_of(seed):
        anew = LayerDiffusion(method.models, method.sam)
        config = short(seed=seed, tuned_parameters="lora", tuning_lr=1e-3, prior_batch=1).resolve(method.models.card)
        place = anew.draw("in the snow", (64, 64), config, "reference")
        words, texts = anew.embed(scene, config), identity.prior_texts(method.models, "a dog", 4, seed)
        lora = [p.clone() for p in trained("lora", method.models, seed)]
        return dict(
            place=place,
            fitted=torch.tensor(words[2]),
            noise=torch.tensor(anew.tune(scene, words, short(seed=seed))[1]),
            texts=texts,
            lora=lora[0],
        )

    first, again, other = all_of(3), all_of(3), all_of(4)
    for name in first:
        same = (lambda a, b: a == b) if name == "texts" else torch.equal
        assert same(first[name], again[name]) and not same(first[name], other[name]), name


def trained(kind, models, seed=0, rank=8):
    from layerdiffusion.readings import trainable
    from layerdiffusion.base.sd import copy_unet

    return trainable(copy_unet(models.unet), kind, rank, seed)


def test_a_seed_is_a_picture(method, scene):
    "Each seed has its own, whatever the setting's seed, which only the trainings read."
    config, other = short(seed=0), short(seed=9)
    words = scene.e_a, scene.e_b

    def draw(seeds, config):
        return method.sample(words, {}, scene.size, seeds, config)

    three, again = draw([4, 7, 2], config), draw([7], other)
    assert mean(three[1], again[0]) < 1e-5 and min(mean(three[i], three[k]) for i, k in ((0, 1), (0, 2), (1, 2))) > 0.01


# Words


def test_whole_words(method, plain, scene):
    "e_a of T_a, or of the whole text; e_b of the place either way."
    for whole, text in (("object", scene.split.object), ("whole", scene.text)):
        e_a, e_b, losses = method.embed(scene, short(object_words=whole, embedding_steps=0))
        assert torch.allclose(e_a, plain.words(text), atol=1e-5) and torch.allclose(
            e_b, plain.words(scene.split.background), atol=1e-5
        )
    assert mean(plain.words(scene.split.object), plain.words(scene.text)) > 0.01


def test_new_words_are_fitted_to_the_photos_subject(method, plain, scene):
    "The loss of Eq. 2 for new words: of the photo's own latents, under the subject's mask, with the photo's words."
    m, x, g = F.avg_pool2d(scene.mask[None], 4), plain.encode(scene.image), draws("words", 0, 0)
    text = identity.with_words(PHOTO_WORDS, 2)
    vectors = identity.first_vectors(method.models, text, 2)
    noise, t = torch.randn(x.shape, generator=g), torch.randint(1000, (1,), generator=g)
    with torch.no_grad():
        expected = (
            (m * plain.error(plain.unet, x, noise, t, identity.encode_with(method.models, text, vectors)))
            .square()
            .mean()
            .item()
        )
    assert text == "a pink dog with * * lying in a city at night"
    losses = method.learn(scene, short(learnt_words=2).resolve(method.models.card))[1]
    assert losses == pytest.approx([expected], abs=1e-5)


def test_the_models_own_pictures(method, plain, scene):
    "Their noise loss under their own words, unmasked, times λ_prior, is added; they are the untouched model's."

    def config(weight):
        return short(prior_batch=2, lambda_prior=weight, guidance_scale=1.0)

    pictures, words = method.prior(scene, config(1.0).resolve(method.models.card), count=3)
    texts = identity.prior_texts(method.models, "a pink dog", 3, 0)
    assert all(text.startswith("a pink dog ") for text in texts) and torch.allclose(
        words[1:2], plain.words(texts[1]), atol=1e-5
    )
    method.prior = lambda *a: (pictures, words)
    g = draws("tuning", 0, 0)
    k = torch.randint(3, (2,), generator=g)
    noise, t = torch.randn(3, 4, 16, 16, generator=g), torch.randint(1000, (3,), generator=g)
    with torch.no_grad():
        drawn = (
            sum(
                plain.error(plain.unet, pictures[i : i + 1], noise[1 + n : 2 + n], t[1 + n : 2 + n], words[i : i + 1])
                .square()
                .mean()
                .item()
                for n, i in enumerate(k.tolist())
            )
            / 2
        )
    losses = {w: method.tune(scene, (scene.e_a, scene.e_b), config(w))[1][0] for w in (0.0, 1.0, 3.0)}
    assert losses[1.0] - losses[0.0] == pytest.approx(drawn, abs=1e-5) and losses[3.0] - losses[0.0] == pytest.approx(
        3 * drawn, abs=3e-5
    )


def test_alpha_leans_to_the_subjects_words(method, scene):
    from layerdiffusion.method import interpolate

    near = [mean(interpolate(scene.e_a, scene.e_b, alpha), scene.e_a) for alpha in (0.0, 0.3, 0.7, 1.0)]
    assert (
        near == sorted(near, reverse=True)
        and near[-1] == 0
        and torch.equal(interpolate(scene.e_a, scene.e_b, 0.0), scene.e_b)
    )


# Masks


def first_loss(method, plain, scene, config, *terms):
    "The first loss of the tuning, ours and by hand: `terms` are (weight, latents, mask)."
    opt, g = config.alpha * scene.e_a + (1 - config.alpha) * scene.e_b, draws("tuning", config.seed, 0)
    pictures = list({id(x): x for _, x, _ in terms}.values())
    noise, t = torch.randn(len(pictures), 4, 16, 16, generator=g), torch.randint(1000, (len(pictures),), generator=g)
    with torch.no_grad():
        at = [[x is y for y in pictures].index(True) for _, x, _ in terms]
        hand = sum(
            w * (m * plain.error(plain.unet, x, noise[i : i + 1], t[i : i + 1], opt)).square().mean().item()
            for (w, x, m), i in zip(terms, at, strict=False)
        )
    return method.tune(scene, (scene.e_a, scene.e_b), config)[1][0], hand


def test_who_is_in_the_reference_is_left_out(method, plain, scene, task):
    """M_r is what SAM finds there; Eq. 5 leaves it out, and with `union` the subject's place too. With `empty`
    nobody is there."""

    def config(**changes):
        return short(eq45_pictures="each", **changes)

    somebody = method.prepare(
        task.image, task.text, mask=scene.mask, reference=task.answer, config=config(reference_mask="sam")
    )
    assert iou(somebody.reference_mask, task.answer_mask) > 0.7
    assert (
        method.prepare(
            task.image, task.text, mask=scene.mask, reference=task.answer, config=config()
        ).reference_mask.sum()
        == 0
    )
    m_t, m_r = (F.avg_pool2d(m[None], 4) for m in (somebody.object_mask, somebody.reference_mask))
    photo, place = plain.encode(somebody.object_image), plain.encode(somebody.reference)
    for region, outside in (("reference", 1 - m_r), ("union", 1 - torch.maximum(m_r, m_t))):
        ours, hand = first_loss(
            method, plain, somebody, config(eq5_region=region, lambda_obj=3.0), (3.0, photo, m_t), (1.0, place, outside)
        )
        assert ours == pytest.approx(hand, abs=1e-5), region


def test_masks_at_latent_size(method, scene):
    "Shares of each cell, or cut at one half; nearest takes a pixel of the middle."
    share = F.avg_pool2d(scene.mask[None], 4)
    assert torch.allclose(method.small(scene.mask, short()), share, atol=1e-6)
    assert torch.equal(method.small(scene.mask, short(mask_hard=True)), (share >= 0.5).float())
    assert torch.equal(method.small(scene.mask, short(mask_resample="nearest")), scene.mask[None, :, 2::4, 2::4])


def test_subjects_are_sure_central_and_whole():
    "Of two masks that differ in one thing."
    from layerdiffusion.base.masks import _subject_scores

    def score(x, y, side=24, quality=0.9):
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[:, y : y + side, x : x + side] = True
        return _subject_scores(mask, torch.tensor([quality])).item()

    assert score(20, 20) > score(20, 20, quality=0.5) > 0 and score(20, 20) > score(4, 4) > score(0, 4)
    assert score(20, 20, 6) == 0 == score(2, 2, 60) and score(10, 10, 44) > 0


def test_moving_goes_right_and_down_and_shrinks_about_the_feet():
    from layerdiffusion.base.masks import bounding_box, centre, move_mask, move_subject

    mask = F.pad(torch.ones(1, 20, 12), (20, 32, 24, 20))
    x, y = centre(mask)
    assert centre(move_mask(mask, 0.1, 0))[0] == pytest.approx(x + 0.1, abs=0.01) and centre(move_mask(mask, 0, 0.1))[
        1
    ] == pytest.approx(y + 0.1, abs=0.01)
    assert bounding_box(move_mask(mask, scale=0.5)) == (23, 34, 29, 44)
    red = torch.zeros(3, 64, 64)
    red[0] = 1
    moved, where = move_subject(red, mask, 0.1, 0, background=torch.zeros(3, 64, 64))
    assert torch.allclose(moved[0], where[0], atol=1e-5) and moved[1:].max() == 0


def test_a_layer_lies_over_the_other():
    from layerdiffusion.base.masks import composite, _fill_hole

    one, zero, mask = torch.ones(3, 4, 4), torch.zeros(3, 4, 4), torch.eye(4)[None]
    assert torch.equal(composite(one, mask, zero), mask.expand(3, -1, -1)) and torch.equal(
        _fill_hole(mask.expand(3, -1, -1), mask), zero
    )


def test_a_subject_does_not_reach_the_border():
    "Of two that are in the middle."
    from layerdiffusion.base.masks import _subject_scores

    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 20:44, 20:44] = masks[1, :, 20:44] = True
    whole, cut = _subject_scores(masks, torch.ones(2))
    assert whole > cut > 0


def test_of_several_masks_the_surest():
    "SAM gives three for a click."
    import numpy as np
    from layerdiffusion.base.masks import find_mask

    masks = np.zeros((3, 8, 8), bool)
    for k in range(3):
        masks[k, : k + 2, 1:5] = True

    def answers(*a, **k):
        return (masks, np.array([0.3, 0.9, 0.5]), None)

    predictor = SimpleNamespace(
        set_image=None,
        is_image_set=True,
        original_size=(8, 8),
        predict=answers,
        model=SimpleNamespace(knows_boxes=False),
    )
    found = find_mask(predictor, torch.zeros(3, 8, 8), (3, 1))
    assert torch.equal(found[0], torch.from_numpy(masks[1]).float())


def test_the_two_terms_are_the_layers(models, scene):
    "Eq. 4 and Eq. 5, weighted, are Eq. 6's one pass."
    from layerdiffusion.method import layered_loss, noise_loss, stack_layers

    g = torch.Generator().manual_seed(0)
    x, noise, t = (torch.randn(2, 4, 16, 16, generator=g) for _ in range(2)), None, torch.tensor([400, 400])
    x, noise = x
    m = F.avg_pool2d(scene.mask[None], 4)
    both = stack_layers(x[:1], m, x[1:], m, 3.0, 0.5)
    e = scene.e_a
    with torch.no_grad():
        given = models.unet, models.scheduler
        one = noise_loss(*given, x[:1], noise[:1], t[:1], e, m)
        two = noise_loss(*given, x[1:], noise[1:], t[1:], e, 1 - m)
        whole = layered_loss(*given, *both, noise, t, e.expand(2, -1, -1))
    assert whole.item() == pytest.approx(3 * one.item() + 0.5 * two.item(), abs=1e-5) and not torch.isclose(one, two)


# Which O_t


def test_the_photo_or_a_drawn_picture(method, scene):
    "O_t and M_t: the photo and its subject, or what is drawn of T and what SAM finds in that; never a mix of them."
    found = 1 - scene.mask
    method.find_subject = lambda *a: found
    for which, picture, mask in (("input", scene.image, scene.mask), ("target", None, found)):
        config = short(object_picture=which).resolve(method.models.card)
        drawn, where = method.target(scene.text, scene.image, scene.mask, config)
        picture = method.draw(scene.text, scene.size, config, "target") if picture is None else picture
        assert torch.equal(drawn, picture) and where is mask, which


# What the U-Net sees of the photo's subject


def seen_by(method, scene, **changes):
    """What each stage gives that looks at the photo's subject.

    The pictures that they learn from and draw on are others, so the photo counts only as far as it is seen.
    """
    config = short(subject_scale=1.0, eq2_picture="reference", prior_batch=1, guidance_scale=1.0).change(**changes)
    config, photo, words = config.resolve(method.models.card), (scene.image, scene.mask), (scene.e_a, scene.e_b)
    target = method.target(scene.text, *photo, config.change(object_picture="target"))
    return dict(
        embed=torch.tensor(method.embed(scene, config)[2]),
        prior=method.prior(scene, config, count=1)[0],
        tune=torch.tensor(method.tune(scene, words, config.change(prior_batch=0))[1]),
        sample=method.sample(words, {}, scene.size, [0], config, photo=photo),
        target=target[0],
    )


@pytest.fixture
def watched(method, scene):
    "A method whose SAM finds somebody in any picture."
    method.find_subject = lambda *a: scene.mask
    return method


def other_photos(scene):
    "Another subject in the same place, and the same subject elsewhere."
    inside, beside = scene.image.flip(0), scene.reference
    return [scene.mask * a + (1 - scene.mask) * b for a, b in ((inside, scene.image), (scene.image, beside))]


def test_every_stage_sees_the_photos_subject(watched, scene):
    """Eq. 2, the prior pictures, Eq. 4 to 6, the drawing and O_t: another subject or another strength changes what
    they give, and is no result that was kept; another place changes nothing, and the loaded U-Net stays."""
    unet = watched.models.unet
    before = {name: x.clone() for name, x in unet.state_dict().items()}
    processors, hooks = dict(unet.attn_processors), list(unet._forward_pre_hooks)
    ours = seen_by(watched, scene)
    inside, beside = (seen_by(watched, replace(scene, image=x)) for x in other_photos(scene))
    others = [inside, seen_by(watched, scene, subject_scale=0.2)]
    for name, x in ours.items():
        assert torch.allclose(x, beside[name], atol=1e-6), name
        assert all(mean(x, other[name]) > 1e-5 for other in others), name
    assert dict(unet.attn_processors) == processors and list(unet._forward_pre_hooks) == hooks
    after = unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], x) for name, x in after.items())


def test_without_a_strength_nothing_is_seen(watched, scene, monkeypatch):
    "With subject_scale 0 nobody looks at the photo, and what works is the loaded model itself."

    def look(*a):
        raise AssertionError("the photo was looked at")

    monkeypatch.setattr(pipeline, "see_subject", look)
    config = short().resolve(watched.models.card)
    assert watched.seeing(scene.photo, config) is watched.seeing((None, None), config) is watched.models
    assert all(x.isfinite().all() for x in seen_by(watched, scene, subject_scale=0.0).values())


def test_a_look_on_the_way_sees_the_subject_too(method, scene):
    "The last look of a tuning is what is drawn afterwards."
    config, events = short(subject_scale=1.0, tuning_lr=1e-4, guidance_scale=1.0), []
    difference, _ = method.tune(scene, (scene.e_a, scene.e_b), config, events.append, look_every=1)
    looked = next(e.image for e in reversed(events) if e.stage == "tuning")
    drawn, blind = (
        method.sample(
            (scene.e_a, scene.e_b),
            {name: x for name, x in difference.items() if name in method.models.unet.state_dict()},
            scene.size,
            [0],
            config.change(sampling_steps=10, subject_scale=scale),
            photo=(scene.image, scene.mask),
        )
        for scale in (1.0, 0.0)
    )
    assert mean(looked, drawn) < 1e-3 < 5e-3 < mean(looked, blind)


@pytest.fixture(scope="module")
def photo(task):
    return task.image, (task.mask > 0.5).float()


def test_the_subject_without_its_place(photo):
    "It is on grey, and in the smallest square; another place changes nothing."
    image, mask = photo
    alone, where = identity.cut_out(*photo)
    assert torch.equal(where, mask) and torch.equal(alone * mask, image * mask)
    assert (alone[:, mask[0] == 0] == 0.5).all()
    square = identity.portrait(*photo)
    rows, columns = (torch.where(mask[0].amax(i) > 0)[0] for i in (1, 0))
    high, wide = len(torch.arange(rows[0], rows[-1] + 1)), len(torch.arange(columns[0], columns[-1] + 1))
    assert square.shape == (3, max(high, wide), max(high, wide)) and min(high, wide) < 64
    assert (square != 0.5).any(0).sum() == (alone != 0.5).any(0).sum()
    assert torch.equal(square, identity.portrait(image * mask + image.flip(0) * (1 - mask), mask))
    assert not torch.equal(square, identity.portrait(1 - image, mask))


def test_what_each_layer_reads_of_the_subject(models, plain, photo):
    """What goes into its self-attention when the U-Net looks at the clean subject without words; the model's own
    layers are as before."""
    seen, hooks, latents = {}, [], plain.encode(identity.cut_out(*photo)[0])
    for name, layer in models.unet.named_modules():
        if name.endswith("attn1"):
            hooks.append(
                layer.register_forward_hook(
                    lambda m, args, kwargs, out, name=name: seen.update(
                        {name: (args or (kwargs["hidden_states"],))[0]}
                    ),
                    with_kwargs=True,
                )
            )
    with torch.no_grad():
        models.unet(latents, 0, plain.words(""))
    for hook in hooks:
        hook.remove()
    before = dict(models.unet.attn_processors)
    read = identity._read_subject(models, latents)
    assert (
        read.keys() == seen.keys()
        and len(seen) >= 4
        and all(torch.allclose(read[name], x, atol=1e-5) for name, x in seen.items())
    )
    assert dict(models.unet.attn_processors) == before
    shared = identity._share_attention(models, *photo, 1.0).unet
    for name, layer in identity._self_attention(shared).items():
        assert torch.allclose(layer.processor.seen, read[name], atol=1e-4), name


def inside(mask, count):
    "Which of a layer's places hold a tenth of the subject or more."
    side = round(count**0.5)
    return F.max_pool2d(F.avg_pool2d(mask[None], 4), 16 // side).flatten() > 0.1


def test_attention_sees_the_subject_and_not_the_rest(models, plain, photo):
    """What lies beside the subject moves nothing, what lies on it moves the answer; the more, the larger the scale,
    and with a scale of 0 it is the plain model."""
    x, e = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), plain.words("a dog")

    def answer(touch=None, scale=1.0):
        seeing = identity._share_attention(models, *photo, scale).unet
        for layer in identity._self_attention(seeing).values():
            p = layer.processor
            where = inside(photo[1], p.seen.shape[1])
            if touch is not None:
                p.seen[:, where if touch == "subject" else ~where] += 3
        with torch.no_grad():
            return seeing(x, 500, e).sample

    assert 0 < inside(photo[1], 64).sum() < 64
    base = answer()
    assert mean(base, answer("rest")) < 1e-6 and mean(base, answer("subject")) > 1e-3
    with torch.no_grad():
        nothing = models.unet(x, 500, e).sample
    off = [mean(answer(scale=scale), nothing) for scale in (0.0, 0.1, 1.0, 3.0)]
    assert off == sorted(off) and off[0] < 1e-6 < off[1]


def test_attention_by_hand(models, photo):
    "One layer, written out over the subject's places alone, whose weights are multiplied by the scale."
    scale = 1.7
    attn = next(iter(identity._self_attention(identity._share_attention(models, *photo, scale).unet).values()))
    p = attn.processor
    x = torch.randn(2, p.seen.shape[1], attn.to_q.in_features, generator=torch.Generator().manual_seed(1))
    seen = p.seen[:, inside(photo[1], p.seen.shape[1])].expand(2, -1, -1)
    with torch.no_grad():
        both = torch.cat([x, seen], 1)
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(both), attn.to_v(both))
        )
        times = torch.tensor([1.0] * x.shape[1] + [scale] * seen.shape[1])
        share = times * (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp()
        expected = attn.to_out[0](((share / share.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(p(attn, x), expected, atol=1e-4)


# Which weights move


def test_which_weights_move(method, scene):
    "All of them, those of attention, or these by a change of low rank."
    words = scene.e_a, scene.e_b
    moved = {
        kind: method.tune(scene, words, short(tuned_parameters=kind, lora_rank=3, tuning_steps=2, tuning_lr=1e-3))[0]
        for kind in ("all", "attention", "lora")
    }
    assert any(".attn" not in name for name in moved["all"]) and len(moved["all"]) > len(moved["attention"]) > 0
    for kind in ("attention", "lora"):
        assert all(".attn" in name for name in moved[kind]), kind
        assert all(any(part in name for name in moved[kind]) for part in (".attn1.", ".attn2."))
    ranks = {
        kind: max(torch.linalg.matrix_rank(x.float(), rtol=1e-2).item() for x in moved[kind].values() if x.ndim == 2)
        for kind in ("attention", "lora")
    }
    assert ranks["lora"] <= 3 < ranks["attention"] and not any(name.endswith(".bias") for name in moved["lora"])


def test_a_tuning_can_begin_with_a_difference(models, scene):
    "It is added, not taken off, and the loaded model stays."
    from layerdiffusion.differences import apply_difference, weight_difference
    from layerdiffusion.fine_tuning import fine_tune

    name, base = "conv_in.weight", models.unet.state_dict()
    start = {name: torch.full_like(base[name], 0.25).half()}
    tuned, _ = fine_tune(
        models,
        scene.e_a,
        torch.zeros(1, 4, 16, 16),
        torch.ones(1, 1, 16, 16),
        None,
        torch.ones(1, 1, 16, 16),
        steps=0,
        start=start,
    )
    assert torch.allclose(tuned.state_dict()[name], base[name] + 0.25, atol=1e-3) and weight_difference(
        models.unet, tuned
    ).keys() == {name}
    assert torch.allclose(apply_difference(models.unet, start).state_dict()[name], base[name] + 0.25, atol=1e-3)


def test_reuse_keeps_what_it_is_told(method, scene):
    "Of the U-Net's change; and the words keep what Eq. 2 learnt."
    first = method.edit(
        scene.image,
        scene.text,
        mask=scene.mask,
        reference=scene.reference,
        seeds=[0],
        config=short(tuning_lr=1e-3, embedding_lr=1e-2, embedding_steps=3),
    )

    def again(keep):
        return method.reuse(first, "a pink dog jumping in the snow", seeds=[0], steps=0, keep=keep)

    for keep in (0.0, 0.5, 1.0):
        kept = again(keep).difference
        assert all(
            torch.allclose(kept.get(name, torch.zeros(1)).float(), keep * x.float(), atol=1e-5)
            for name, x in first.difference.items()
        )
    from layerdiffusion.base.sd import encode_text

    old, new = (encode_text(method.models, text) for text in (first.split.object, "a pink dog jumping"))
    assert (
        torch.allclose(again(0.0).embeddings[0] - new, first.embeddings[0] - old, atol=1e-5)
        and mean(first.embeddings[0], old) > 1e-3
    )


# The two presets


def test_the_presets():
    "`paper` has the paper's numbers and nothing beyond it; `best` sees the photo's subject, and keeps the turns."
    paper, best = preset("paper").resolve({}), preset("best").resolve({})
    assert (
        paper.alpha,
        paper.embedding_steps,
        paper.tuning_steps,
        paper.lambda_obj,
        paper.lambda_bg,
        paper.embedding_lr,
        paper.tuning_lr,
    ) == (0.7, 500, 250, 2.0, 1.0, 1e-3, 2e-6)
    assert (
        paper.iterative_guidance
        and paper.eq8_first == "object"
        and (paper.eq2_picture, paper.eq2_region) == ("input", "background")
        and paper.sampling_steps == 50
    )
    off = dict(
        learnt_words=0,
        object_words="object",
        tuning_batch=1,
        tuning_decay=False,
        subject_scale=0.0,
        eq4_words="opt",
        eq5_words="opt",
        prior_batch=0,
        keep_place=0.0,
    )
    assert {name: getattr(paper, name) for name in off} == off
    assert best.subject_scale > 0 and best.iterative_guidance and best.keep_place > 0


def test_the_place_is_kept_around_the_subject(method, scene):
    """In the last steps, and only there, what is outside of the drawn subject is the reference's; the subject stays,
    and before these steps nothing differs. Another reference is another place, and without one nothing is drawn."""
    config, kept = short(sampling_steps=10).resolve(method.models.card), {}
    words = scene.e_a, scene.e_b

    def draw(share, reference=scene.reference, name=""):
        def end(pipe, i, t, tensors):
            kept.setdefault(name, []).append(tensors["latents"])
            return tensors

        changed = config.change(keep_place=share)
        return method.sample(words, {}, scene.size, [1, 2], changed, None, 8, end, reference=reference)

    free, ours, other = draw(0.0, name="free"), draw(0.4, name="ours"), draw(0.4, scene.image)
    for x, y, z in zip(free, ours, other, strict=True):
        found = propose_subject(method.sam, y).mask[None]
        inside, outside = found, 1 - F.max_pool2d(found, 25, 1, 12)
        true = decode_latents(method.models, method.latents(scene.reference))[0]
        assert ((y - true).abs() * outside).sum() < 0.5 * ((x - true).abs() * outside).sum()
        assert ((y - x).abs() * inside).sum() < 0.5 * ((y - true).abs() * inside).sum()
        assert ((z - scene.image).abs() * outside).sum() < ((z - true).abs() * outside).sum()
    same = [torch.equal(a, b) for a, b in zip(kept["free"], kept["ours"], strict=True)]
    assert same == [True] * 6 + [False] * 4
    with pytest.raises(BadInput, match="With keep_place 0.4 the place is kept from its picture, and here is none"):
        draw(0.4, None)


def test_where_nobody_is_found_no_place_is_kept(method, scene):
    "Everything counts as the subject then."
    place = _Place(method, scene.reference, torch.zeros(1, 4, 16, 16), short(keep_place=0.5).resolve({}))
    assert torch.equal(place.around(scene.reference), torch.ones(1, 1, 16, 16))
    around = place.around(scene.image)
    assert (around >= F.avg_pool2d(scene.mask[None], 4) - 0.3).all() and 0.1 < around.mean() < 0.7
    assert place.begin == 1 and torch.equal(place.keep(0, place.latents), place.latents)
    whole = _Place(method, scene.reference, torch.ones(1, 4, 16, 16), short(keep_place=1.0).resolve({}))
    whole.inside, t = torch.zeros(1, 1, 16, 16), int(whole.scheduler.timesteps[1])
    noisy, clean = (whole.keep(i, torch.full((1, 4, 16, 16), 9.0)) for i in (0, 1))
    assert torch.equal(clean, whole.latents)
    share = method.models.scheduler.alphas_cumprod[t]
    assert torch.allclose(noisy, share.sqrt() * whole.latents + (1 - share).sqrt(), atol=1e-5)


def test_a_kept_place_needs_sam_from_the_start(models, scene):
    """Where SAM's weights are not there, a sentence says so before any step; where memory is short, SAM waits on the
    CPU while the U-Net learns."""
    steps, config = [], short(keep_place=0.5, sampling_steps=2)
    with pytest.raises(BadInput, match="nowhere.pth.*keep_place 0.5 looks for the drawn subject.*keep_place=0"):
        LayerDiffusion(models, "nowhere.pth").edit(scene=scene, seeds=[0], config=config, callback=steps.append)
    assert not steps
    spare, moved = LayerDiffusion(replace(models, how=How(offload=True)), "mini"), []
    to = spare.sam.to
    spare._sam.to = lambda where: moved.append(str(where)) or to(where)
    spare.edit(scene=scene, seeds=[0], config=config, callback=lambda e: steps.append((e.stage, len(moved))))
    first = next(n for stage, n in steps if stage == "tuning")
    assert moved[0] == str(models.device) and moved[first - 1] == "cpu" and len(moved) > first


# What trains the mini models


def test_a_moving_average_follows_slowly():
    "It goes towards the weights, the slower the larger its decay, and quickly at first."
    from layerdiffusion.mini.training import _moving_average

    def after(decay, n):
        average, current = [torch.zeros(2)], [torch.ones(2)]
        _moving_average(decay)(average, current, n)
        assert current[0].tolist() == [1, 1]
        return average[0][0].item()

    assert (
        after(0.9, 1000) == pytest.approx(0.1)
        and after(0.99, 1000) == pytest.approx(0.01)
        and after(0.99, 0) == pytest.approx(0.9)
    )


def test_the_average_is_of_the_weights_after_each_step(tmp_path):
    from layerdiffusion.mini.training import _load_checkpoint, _train_loop
    from torch.optim.swa_utils import AveragedModel

    class Line(torch.nn.Module):
        lr, batch, ema, level = 0.1, 1, 0.5, 0.0

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, scenes, g):
            return (self.w - 10).square().sum(), {}

    _train_loop(Line(), tmp_path, 6)
    model, ema = Line(), AveragedModel(Line())
    _load_checkpoint(tmp_path / "checkpoint.safetensors", model, ema, torch.optim.AdamW(model.parameters(), fused=True))
    assert 0 < ema.module.w.item() < model.w.item() < 10


@pytest.fixture(scope="module")
def diffusion(models):
    from layerdiffusion.mini.training import _DiffusionObjective

    return _DiffusionObjective(vae=models.folder / "vae")


def test_a_tenth_of_the_captions_are_left_out(diffusion, monkeypatch):
    "So that the model learns what it draws without words, which guidance needs."
    from layerdiffusion.mini.world import sample_scenes, stream

    class Seen(Exception):
        pass

    def embed(texts):
        raise Seen(texts)

    scenes = sample_scenes(600, stream("captions"))
    nothing = torch.zeros(600, 1, 16, 16)
    drawn = [dict(latents=torch.zeros(600, 4, 16, 16), mask=nothing, own=nothing, scenes=scenes)]
    monkeypatch.setattr(diffusion, "draw", lambda scenes, g: drawn, raising=False)
    monkeypatch.setattr(diffusion, "embed", embed, raising=False)
    with pytest.raises(Seen) as seen:
        diffusion(scenes, stream("dropout"))
    texts = seen.value.args[0]
    assert len(texts) == 600 and 0.06 < sum(t == "" for t in texts) / 600 < 0.14


def test_the_subject_counts_three_times(diffusion, monkeypatch):
    "And what is its own as often as is said."
    from layerdiffusion.mini.world import sample_scenes, stream

    scenes = sample_scenes(2, stream("weights"))
    monkeypatch.setattr(diffusion, "embed", lambda texts: torch.zeros(len(texts), 1, 1), raising=False)
    losses, no, yes = [], torch.zeros(2, 1, 16, 16), torch.ones(2, 1, 16, 16)
    for mask, own in ((no, no), (yes, no), (yes, yes)):
        drawn = [dict(latents=torch.zeros(2, 4, 16, 16), mask=mask, own=own, scenes=scenes)]
        monkeypatch.setattr(diffusion, "draw", lambda s, g, drawn=drawn: drawn, raising=False)
        monkeypatch.setattr(diffusion.unet, "forward", lambda x, t, e: SimpleNamespace(sample=torch.zeros_like(x)))
        losses.append(diffusion(scenes, stream("noise"))[0].item())
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-4) and losses[0] > 0
    assert losses[2] == pytest.approx((3 + diffusion.own) * losses[0], rel=1e-4) and diffusion.own > 10


def test_the_rate_of_a_training():
    "Up, level, and down to two hundredths."
    from layerdiffusion.mini.training import learning_rate

    rate = [learning_rate(share / 100, 1.0) for share in (0, 0.5, 1, 50, 69, 80, 90, 100)]
    assert rate[:5] == pytest.approx([0, 0.5, 1, 1, 1]) and rate[4] > rate[5] > rate[6] > rate[7] == pytest.approx(0.02)


def test_clicks_and_masks():
    "All clicks but the last are on the subject; one beside it means the rest. A better mask has a smaller loss."
    from layerdiffusion.mini.training import _mask_loss, _random_clicks

    mask = F.pad(torch.ones(30, 1, 10, 10), (27, 27, 27, 27))
    at, truth = _random_clicks(mask, torch.Generator().manual_seed(0))
    hit = torch.stack([mask[i, 0][at[i].long()[:, 1], at[i].long()[:, 0]] for i in range(30)]) > 0.5
    assert hit[:, 0].all() and not hit[:, 1].all()
    assert all(
        torch.equal(truth[i, k], mask[i, 0] if hit[i, k] else 1 - mask[i, 0]) for i in range(30) for k in range(2)
    )
    good, bad = (_mask_loss(sign * (mask * 8 - 4), mask).mean() for sign in (1, -1))
    assert good < bad
