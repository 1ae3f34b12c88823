"""Eq. 1 to 8 once more, written out here with torch and diffusers alone, beside `LayerDiffusion.edit`: equal to 1e-5.

Only the loading is shared. With the same settings the fitted words, both trainings' losses and the pictures agree;
the rates are high and the steps few, so that a wrong picture, mask, weight, sign or turn is far more than 1e-5 away.
"""

import copy
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler

from layerdiffusion import EditConfig, LayerDiffusion
from layerdiffusion.base.sd import load_models
from layerdiffusion.mini.world import make_edit, sample_scenes

T_A, T_B, SOURCE = "a pink dog standing", "in the snow", "a pink dog lying in a city at night"
SHORT = dict(embedding_steps=3, embedding_lr=1e-2, tuning_steps=3, tuning_lr=2e-4, sampling_steps=4, guidance_scale=3.0)
SEEDS, NEAR = [3, 0], 1e-5


def draws(stage, seed, step):
    "The generator of one step: seeded by a hash of the stage, the seed and the step."
    digest = hashlib.sha256(f"{stage}-{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Plain:
    "The paper, on the parts of a Stable Diffusion folder."

    def __init__(self, parts):
        self.vae, self.unet, self.encoder, self.tokenizer, self.scheduler = parts

    @torch.no_grad()
    def words(self, text):
        ids = self.tokenizer([text], padding="max_length", max_length=48, return_tensors="pt").input_ids
        return self.encoder(ids).last_hidden_state

    @torch.no_grad()
    def encode(self, picture):
        return self.vae.encode(picture[None] * 2 - 1).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, x):
        return (self.vae.decode(x / self.vae.config.scaling_factor).sample[0] / 2 + 0.5).clamp(0, 1)

    def error(self, unet, x0, noise, t, words):
        "Eq. 1's bracket: what the U-Net should have said, less what it said."
        x_t = self.scheduler.add_noise(x0, noise, t)
        return self.scheduler.get_velocity(x0, noise, t) - unet(x_t, t, words).sample

    def asked(self, a, b, c, step):
        "Eq. 2: the words of each pass, and whose mask it is: of e_a (0) or of e_b (1)."
        ways = dict(
            concat=[(torch.cat([a, b], 1), 0)], mix=[(c.alpha * a + (1 - c.alpha) * b, 0)], sum=[(a, 0), (b, 1)]
        )
        return [ways["sum"][step % 2]] if c.eq2_conditioning == "alternate" else ways[c.eq2_conditioning]

    def fit(self, e_a, e_b, x0, masks, c):
        "Eq. 2: Adam on both embeddings, with the error counted under their masks."
        a, b = (e.clone().requires_grad_() for e in (e_a, e_b))
        adam, losses = torch.optim.Adam([a, b], lr=c.embedding_lr), []
        for step in range(c.embedding_steps):
            g, loss = draws("embeddings", c.seed, step), 0.0
            noise, t = torch.randn(x0.shape, generator=g), torch.randint(1000, (1,), generator=g)
            for words, whose in self.asked(a, b, c, step):
                mask, error = masks[whose], self.error(self.unet, x0, noise, t, words)
                loss = loss + (mask * error).square().mean() / (mask.mean() if c.loss_scale == "mask" else 1)
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        return a.detach(), b.detach(), losses

    def tune(self, terms, c):
        """Eq. 6: the sum of `terms`, each (weight, picture, mask, words), with Adam on a copy of the U-Net; pictures
        that are one are noised once."""
        unet = copy.deepcopy(self.unet).requires_grad_(True)
        pictures = list({id(x): x for _, x, _, _ in terms}.values())
        adam, losses = torch.optim.Adam(unet.parameters(), lr=c.tuning_lr), []
        for step in range(c.tuning_steps):
            if c.tuning_decay:
                adam.param_groups[0]["lr"] = c.tuning_lr * (1 + math.cos(math.pi * step / c.tuning_steps)) / 2
            g, n = draws("tuning", c.seed, step), len(pictures) * c.tuning_batch
            noise, t = torch.randn(n, *pictures[0].shape[1:], generator=g), torch.randint(1000, (n,), generator=g)
            loss = 0.0
            for k in range(c.tuning_batch):
                for weight, x0, mask, words in terms:
                    i = k * len(pictures) + [x is x0 for x in pictures].index(True)
                    error = self.error(unet, x0, noise[i : i + 1], t[i : i + 1], words)
                    scale = mask.mean() if c.loss_scale == "mask" else 1
                    loss = loss + weight * (mask * error).square().mean() / scale / c.tuning_batch
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        return unet.requires_grad_(False), losses

    @torch.no_grad()
    def draw(self, unet, seed, said, c):
        "Eq. 7: one picture; `said(i, t)` are the words of step i, at timestep t."
        scheduler, nothing = copy.deepcopy(self.scheduler), self.words("")
        if c.scheduler == "pndm":
            scheduler = PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True, timestep_spacing="leading")
            scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.clone()
        scheduler.set_timesteps(c.sampling_steps)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        for i, t in enumerate(scheduler.timesteps):
            free, told = unet(x, t, nothing).sample, unet(x, t, said(i, t)).sample
            x = scheduler.step(free + c.guidance_scale * (told - free), t, x).prev_sample
        return self.decode(x)

    def turns(self, e_a, e_opt, c):
        "Eq. 8: e_a at even steps and e_opt at odd ones, or the other way round; without turns e_opt at all."

        def said(i, t):
            even = (i if c.eq8_index == "loop" else int(t)) % 2 == 0
            return e_a if c.iterative_guidance and even == (c.eq8_first == "object") else e_opt

        return said

    def edit(self, photo, mask, reference, other, other_mask, c, seeds):
        "All of it. `other` is O_t, `reference` is O_r with nobody in it; masks are (1, 1, 64, 64)."
        small, (e_a, e_b) = lambda m: F.avg_pool2d(m, 4), map(self.words, (T_A, T_B))
        m = small(mask)
        regions = dict(background=(1 - m, 1 - m), object=(m, m), branch=(m, 1 - m), none=(torch.ones_like(m),) * 2)
        seen = self.encode(photo if c.eq2_picture == "input" else reference)
        a, b, fitted = self.fit(e_a, e_b, seen, regions[c.eq2_region], c)
        opt = c.alpha * a + (1 - c.alpha) * b  # Eq. 3
        m_t = small(other_mask)
        if c.eq45_pictures == "composite":
            both = self.encode(other_mask[0] * other + (1 - other_mask[0]) * reference)
            terms = [(c.lambda_obj, both, m_t, opt), (c.lambda_bg, both, 1 - m_t, opt)]  # Eq. 4 and 5
        elif c.eq45_pictures == "one":
            alone = self.encode(other)
            terms = [(c.lambda_obj, alone, m_t, opt), (c.lambda_bg, alone, 1 - m_t, opt)]
        else:
            outside = 1 - m_t if c.eq5_region == "union" else torch.ones_like(m_t)
            terms = [
                (c.lambda_obj, self.encode(other), m_t, self.words(SOURCE) if c.eq4_words == "source" else opt),
                (c.lambda_bg, self.encode(reference), outside, e_b if c.eq5_words == "background" else opt),
            ]
        unet, tuned = self.tune(terms, c)
        return a, b, fitted, tuned, torch.stack([self.draw(unet, s, self.turns(a, opt, c), c) for s in seeds])


@pytest.fixture(scope="module")
def models():
    return load_models("mini")


@pytest.fixture(scope="module")
def plain(models):
    return Plain((models.vae, models.unet, models.text_encoder, models.tokenizer, models.scheduler))


@pytest.fixture(scope="module")
def method(models):
    return LayerDiffusion(models)


@pytest.fixture(scope="module")
def scene():
    "A photo, its subject's mask, and the new place, as files would hold them."
    g = torch.Generator().manual_seed(1)
    before = sample_scenes(1, g, species="dog", colour="pink", pose="lying", place="city")
    edit = make_edit(before, 64, pose="standing", place="snow")

    def levels(x):
        return (x * 255).round() / 255

    return levels(edit.image), (edit.mask > 0.5).float(), levels(edit.reference)


def near(ours, theirs):
    "Within 1e-5 in the mean, and nowhere far."
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    off = (ours - theirs).abs()
    assert ours.shape == theirs.shape
    assert not len(off) or off.mean() < NEAR and off.max() < 50 * NEAR, (off.mean().item(), off.max().item())


def compare(result, theirs):
    a, b, fitted, tuned, pictures = theirs
    near(result.embeddings[0], a)
    near(result.embeddings[1], b)
    near(result.losses["embed"], fitted)
    near(result.losses["tune"], tuned)
    near(result.images, pictures)


CASES = {
    "the default": {},
    "alpha 1": dict(alpha=1.0),
    "alpha 0": dict(alpha=0.0),
    "no turns": dict(iterative_guidance=False),
    "the mix first": dict(eq8_first="opt"),
    "turns by timestep": dict(eq8_index="timestep"),
    "Eq. 2 on the reference": dict(eq2_picture="reference"),
    "Eq. 2 on the subject": dict(eq2_region="object"),
    "Eq. 2 everywhere": dict(eq2_region="none"),
    "Eq. 2 in two passes": dict(eq2_region="branch", eq2_conditioning="sum"),
    "Eq. 2 in alternation": dict(eq2_region="branch", eq2_conditioning="alternate"),
    "Eq. 2 of the mix": dict(eq2_conditioning="mix", alpha=0.6),
    "lambda_obj": dict(lambda_obj=5.0),
    "no subject": dict(lambda_obj=0.0),
    "lambda_bg": dict(lambda_bg=4.0),
    "no place": dict(lambda_bg=0.0),
    "one picture": dict(eq45_pictures="one"),
    "two pictures": dict(eq45_pictures="each"),
    "two pictures, whole reference": dict(eq45_pictures="each", eq5_region="reference"),
    "the photo's own words": dict(eq45_pictures="each", eq4_words="source"),
    "the place's own words": dict(eq45_pictures="each", eq5_words="background"),
    "mean over the mask": dict(loss_scale="mask"),
    "several draws": dict(tuning_batch=3),
    "several draws of two": dict(tuning_batch=2, eq45_pictures="each"),
    "decay": dict(tuning_decay=True),
    "seed": dict(seed=4),
    "guidance": dict(guidance_scale=1.0),
    "pndm": dict(scheduler="pndm"),
    "no fitting": dict(embedding_steps=0),
    "no tuning": dict(tuning_steps=0),
    "embedding_lr": dict(embedding_lr=1e-3),
    "tuning_lr": dict(tuning_lr=1e-3),
    "steps": dict(embedding_steps=5, tuning_steps=4, sampling_steps=3),
}


@pytest.fixture(scope="module")
def ours(method, scene):
    "Our edit with a given reference, each kept; the photo's subject is O_t, as by default."
    photo, mask, reference = scene

    def edit(**changes):
        config = EditConfig(**SHORT | changes)
        kept = edit.__dict__.setdefault(str(config), [])
        if not kept:
            kept.append(
                method.edit(
                    photo, f"{T_A} {T_B}", mask=mask, reference=reference, source=SOURCE, seeds=SEEDS, config=config
                )
            )
        return kept[0]

    return edit


@pytest.mark.parametrize("name", CASES)
def test_an_edit_is_the_plain_loop(ours, plain, scene, name):
    """For each setting that an equation has; and each moves the words or the pictures by far more than the
    comparison allows."""
    (photo, mask, reference), changes = scene, CASES[name]
    result = ours(**changes)
    compare(result, plain.edit(photo, mask[None], reference, photo, mask[None], result.config, SEEDS))
    two = {k: v for k, v in changes.items() if k == "eq45_pictures" and len(changes) > 1}
    moved = [
        (x - y).abs().mean()
        for x, y in zip(
            (result.images, *result.embeddings), (ours(**two).images, *ours(**two).embeddings), strict=False
        )
    ]
    assert name == "the default" or max(moved) > 50 * NEAR


def test_what_is_not_given_is_drawn(method, plain, scene):
    """O_t = SD(T) with SAM's mask of it, O_r = SD(T_b), both from the setting's own seed; the photo is fitted, and
    learnt from nowhere."""
    from layerdiffusion.base.masks import propose_subject

    photo, mask, _ = scene
    config = EditConfig(**SHORT, object_picture="target", seed=2)
    result = method.edit(photo, f"{T_A} {T_B}", mask=mask, seeds=[5], config=config)
    words = [plain.words(text) for text in (f"{T_A} {T_B}", T_B)]
    whole, place = (plain.draw(plain.unet, 2, lambda i, t, e=e: e, config) for e in words)
    near(result.object_image, whole)
    near(result.reference, place)
    assert torch.equal(result.object_mask, propose_subject(method.sam, result.object_image).mask)
    compare(result, plain.edit(photo, mask[None], place, whole, result.object_mask[None], config, [5]))
