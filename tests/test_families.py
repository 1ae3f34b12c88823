"""Every family: its own pipeline's drawing, the equations' gradients, turns, and what is saved; SDXL and two flows."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline

from layerdiffusion import LayerDiffusion, method
from layerdiffusion.base import families, memory
from layerdiffusion.base.core import BadInput, package_folder, to_pil
from layerdiffusion.base.families import FAMILIES, LowRank, edit_with, _family_of, _random_adapter, _random_pipe, _see

NAMES = ["sd", "sdxl", "flux2-klein", "sd3"]
SIZE = 32, 48  # px, and not square: height and width are told apart
T_A, T_B = "a pink dog standing", "in the snow"
FEW = dict(embedding_steps=1, embedding_lr=1e-2, tuning_steps=2, num_inference_steps=2, seeds=[5])


@pytest.fixture(scope="module")
def pipes():
    return {name: _random_pipe(name) for name in NAMES}


@pytest.fixture(scope="module")
def photo():
    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(1, *SIZE)
    mask[:, 8:24, 16:32] = 1
    return torch.rand(3, *SIZE, generator=g), mask, T_A, T_B, torch.rand(3, *SIZE, generator=g)


@torch.no_grad()
def start_of(model, seed=5):
    return method.initial_noise(model.to_latents(torch.zeros(1, 3, *SIZE)).shape[1:], [seed])


@torch.no_grad()
def drawn(model, text=T_A, start=None, guidance_scale=4.0, steps=2):
    said, nothing = model.embed([text, ""]).split(1)
    start = start_of(model) if start is None else start
    x = method.denoise(model.unet, model.scheduler, start, lambda i, t: said, nothing, steps, guidance_scale)
    return model.to_pictures(x)


def by_diffusers(pipe, start, text=T_A, steps=2):
    size = dict(height=SIZE[0], width=SIZE[1], num_inference_steps=steps)
    return pipe(prompt=text, latents=start, **size, guidance_scale=4.0, output_type="pt").images


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_drawing_is_the_pipelines(pipes, name):
    "To rounding; and other words, or another size told, are not the same."
    pipe = pipes[name]
    model = _family_of(pipe)(pipe, *SIZE)
    theirs = by_diffusers(pipe, start_of(model))
    assert theirs.std() > 0.02 and (drawn(model) - theirs).abs().max() < 1e-5
    assert (drawn(model, "in the snow") - theirs).abs().max() > 1e-4
    assert (drawn(model, guidance_scale=1.0) - theirs).abs().max() > 1e-4
    if name in ("sdxl", "flux2-klein"):  # time ids, and the times of a flow, come of the size
        other = _family_of(pipe)(pipe, 256, 32)
        assert (drawn(other, start=start_of(model)) - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_the_pictures(pipes, name):
    "Latents of what an autoencoder decodes are brought to its scale and back: `to_pictures` undoes `to_latents`."
    pipe = pipes[name]
    model = _family_of(pipe)(pipe, *SIZE)
    with torch.no_grad():
        x = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
        plain = pipe.vae.decode(pipe.vae.encode(x * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        assert (model.to_pictures(model.to_latents(x)) - plain.clamp(0, 1)).abs().max() < 1e-4


def test_a_flow_is_a_straight_line():
    "x_t lies between picture and noise, and the target is the direction, whose step back from any t is the picture."
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, g = families._sampler(FlowMatchEulerDiscreteScheduler().config), torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(2))
    t = torch.tensor([250, 900])
    x_t, said = method.add_noise(scheduler, x, noise, t), method.target(scheduler, x, noise, t)
    assert torch.allclose(x_t[0], 0.75 * x[0] + 0.25 * noise[0], atol=1e-6)
    assert torch.allclose(x_t - (t / 1000).view(-1, 1, 1, 1) * said, x, atol=1e-5)
    scheduler.set_timesteps(4)
    stepped = scheduler.step(said, scheduler.timesteps[0], noise).prev_sample  # diffusers' own, along the same line
    assert torch.allclose(stepped, noise + (scheduler.sigmas[1] - 1) * said, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_eq_2_reaches_the_words_and_eq_6_the_network(pipes, name):
    "Nothing else gets a gradient; in SDXL and SD3 the pooled vector does, and what fills it up gets none."
    pipe = pipes[name]
    model = _family_of(pipe)(pipe, *SIZE)
    with torch.no_grad():
        words, x = model.embed([T_A, T_B]), model.to_latents(torch.rand(1, 3, *SIZE))
    pair = [e.clone().requires_grad_() for e in words.split(1)]
    noise, t = method.sample_noise_and_t(model.scheduler, x.shape, torch.Generator().manual_seed(0))
    loss = method.embedding_loss(model.unet, model.scheduler, [(torch.cat(pair, 1), None)], x, noise, t)
    method.gradients(loss, pair)
    assert all(e.grad.abs().sum((0, 2)).count_nonzero() >= 0.9 * e.shape[1] for e in pair)
    if name in ("sdxl", "sd3"):
        pooled = 20 if name == "sdxl" else 40
        assert all(e.grad[0, -1, :pooled].all() and not e.grad[0, -1, pooled:].any() for e in pair)
    moving = [p.requires_grad_(True) for p in model.unet.parameters()]
    loss = method.layered_loss(model.unet, model.scheduler, x, torch.ones_like(x[:, :1]), noise, t, words[:1])
    method.gradients(loss, moving)
    reached = [p for p in moving if p.grad is not None and p.grad.any()]
    others = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module) and m is not model.unet.net]
    assert len(reached) > 0.8 * len(moving)
    assert not [p for m in others for p in m.parameters() if p.grad is not None] and words.grad is None
    for p in moving:
        p.grad = None


def test_both_pooled_vectors_are_heard_and_mixed(pipes):
    "SDXL with two texts side by side: the pooled vectors' mean; Eq. 3 mixes them as it mixes the tokens."
    e_a, e_b = families.StableDiffusionXL(pipes["sdxl"], *SIZE).embed([T_A, T_B]).detach().split(1)
    both, (one, two) = torch.cat([e_a, e_b], 1), (families._unpack(e, 16, 20) for e in (e_a, e_b))
    tokens, pooled = families._unpack(both, 16, 20)
    assert torch.equal(tokens, torch.cat([one[0], two[0]], 1)) and torch.equal(pooled, (one[1] + two[1]) / 2)
    mixed = families._unpack(method.interpolate(e_a, e_b, 0.7), 16, 20)[1]
    assert torch.allclose(mixed, 0.7 * one[1] + 0.3 * two[1]) and not torch.allclose(one[1], two[1], atol=1e-3)


def test_kleins_texts_each_count_from_nothing(pipes):
    "Twice the same text side by side is told the same places twice."
    model, seen = families.Flux2Klein(pipes["flux2-klein"], *SIZE), []
    watch = model.unet.net.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model.unet(start_of(model), 500, torch.cat([model.embed([T_A])] * 2, 1))
    watch.remove()
    places = seen[0]["txt_ids"]
    assert torch.equal(places[:512], places[512:]) and places[511].tolist() == [0, 0, 0, 511]
    assert seen[0]["img_ids"][-1].tolist() == [0, 1, 2, 0] and seen[0]["timestep"].tolist() == [0.5]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_turns_become_an_average(pipes, name):
    "The more steps, the nearer; and for the words of one they are nothing but its drawing."
    model = _family_of(pipes[name])(pipes[name], *SIZE)
    end = 40 if name == "flux2-klein" else None  # of its 512 tokens, to save time
    a, b, nothing = (e[:, :end] for e in model.embed([T_A, T_B, ""]).split(1))

    def apart(steps):
        scheduler, turns, mean, alone = copy.deepcopy(model.scheduler), *[start_of(model)] * 3
        scheduler.set_timesteps(steps)
        condition = method.take_turns(a, b)
        for i, t in enumerate(scheduler.timesteps):
            ask = lambda x, e, t=t: method.guided_noise(model.unet, x, t, e, nothing, 3.0)  # noqa: E731
            said = [ask(turns, condition(i, t)), (ask(mean, a) + ask(mean, b)) / 2, ask(alone, b)]
            moved = []
            for x, y in zip((turns, mean, alone), said, strict=True):
                scheduler._step_index = None  # a flow's sampler counts its steps
                moved.append(scheduler.step(y, t, x).prev_sample)
            turns, mean, alone = moved
        return ((turns - mean).norm() / (alone - mean).norm()).item()

    few, many = apart(4), apart(24)
    assert many < few / 2 and few > 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [None, 3])
def test_what_was_learnt_loads_in_plain_diffusers(photo, tmp_path, name, rank):
    """Without Eq. 2 and with α = 1 both turns say the same, so a fresh pipeline with what was saved draws the edit.
    The edited one is as it was."""
    pipe, fresh = _random_pipe(name), _random_pipe(name)
    kind = _family_of(pipe)
    start, strong = start_of(kind(fresh, *SIZE)), dict(tuning_lr=2e-2 if rank else 1e-3)
    before = by_diffusers(fresh, start)
    few = FEW | dict(embedding_steps=0, alpha=1.0, guidance_scale=4.0) | strong
    pictures = edit_with(pipe, *photo, rank=rank, save=tmp_path, checkpointing=rank is not None, **few)
    assert (pictures - before).abs().max() > 1e-3
    assert (by_diffusers(pipe, start) - before).abs().max() < 1e-6 and not [
        p for p in getattr(pipe, kind.part).parameters() if p.requires_grad
    ]
    if rank:
        assert [x.name for x in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
        fresh.load_lora_weights(tmp_path)
    else:
        net = type(getattr(pipe, kind.part)).from_pretrained(tmp_path / kind.part)
        fresh.register_modules(**{kind.part: net})
    assert (by_diffusers(fresh, start) - pictures).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_edit_hears_everything(photo, pipes, name):
    "Place, mask, words, rates and seeds all change the pictures, and the same call gives the same ones."
    image, mask, a, b, place = photo
    few = FEW | dict(tuning_lr=1e-2, rank=2)
    first = edit_with(pipes[name], *photo, **few)
    assert first.shape == (1, 3, *SIZE) and torch.equal(first, edit_with(pipes[name], *photo, **few))
    for given in ((image, mask, a, b, image), (image, 1 - mask, a, b, place), (image, mask, b, a, place)):
        assert (edit_with(pipes[name], *given, **few) - first).abs().max() > 1e-5
    for changed in (dict(embedding_lr=0.0), dict(tuning_lr=0.0), dict(alpha=0.0)):
        assert (edit_with(pipes[name], *photo, **few | changed) - first).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["sd", "mini"])
def test_it_is_the_papers_edit(photo, pipes, name):
    "Stable Diffusion through its adapter is `method.edit`: with random weights, and with mini's, which say velocities."
    if name == "mini":
        mini = dict(safety_checker=None, local_files_only=True)
        pipe = StableDiffusionPipeline.from_pretrained(package_folder() / "weights" / "mini", **mini)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe = pipes[name]
    few = FEW | dict(tuning_lr=1e-3)
    ours, papers = (draw(pipe, *photo, **few) for draw in (edit_with, method.edit))
    assert (ours - papers).abs().max() < 1e-5
    for other in (dict(lambda_obj=0.0), dict(alpha=0.0), dict(guidance_scale=1.0), dict(seed=1), dict(seeds=[6])):
        assert (edit_with(pipe, *photo, **few | other) - papers).abs().max() > 1e-4
    with pytest.raises(TypeError, match="'lambda_object'"):
        edit_with(pipe, *photo, lambda_object=1.0)


# In sight of a picture


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def sighted(request, tmp_path_factory):
    pipe = _random_pipe(request.param)
    _random_adapter(pipe, tmp_path_factory.mktemp("adapter") / "IP-Adapter")
    return pipe


def test_in_sight_it_draws_what_the_pipeline_draws(sighted, photo):
    "With `load_ip_adapter`, guided away from the empty text and a blank picture; another picture or strength does not."
    picture, drawings = photo[0][:, :, :32], {}
    for name, (seen, scale) in dict(whole=(picture, 0.6), turned=(picture.flip(1), 0.6), off=(picture, 0.0)).items():
        sighted.set_ip_adapter_scale(scale)
        model = _family_of(sighted)(sighted, *SIZE)
        _see(sighted, model, seen)
        drawings[name] = drawn(model)
        size = dict(height=SIZE[0], width=SIZE[1], num_inference_steps=2, guidance_scale=4.0, output_type="pt")
        given = dict(prompt=T_A, latents=start_of(model), ip_adapter_image=to_pil(seen))
        assert (drawings[name] - sighted(**given, **size).images).abs().max() < 1e-5
    assert all((drawings["whole"] - drawings[name]).abs().max() > 1e-3 for name in ("turned", "off"))


def test_in_sight_the_network_learns_and_the_adapter_does_not(sighted, photo):
    "Eq. 6's gradient reaches each layer that learns through what is seen, and no factor lies beside the adapter's own."
    sighted.set_ip_adapter_scale(0.6)
    model, thin = _family_of(sighted)(sighted, *SIZE), LowRank(sighted.unet, 2)
    _see(sighted, model, photo[0])
    with torch.no_grad():
        words, x = model.embed([T_A]), model.to_latents(photo[0][None])
    noise, t = method.sample_noise_and_t(model.scheduler, x.shape, torch.Generator().manual_seed(0))
    loss = method.layered_loss(model.unet, model.scheduler, x, torch.ones_like(x[:, :1]), noise, t, words)
    method.gradients(loss, thin.parameters())
    thin.remove()
    assert all(up.grad.any() for _, up in thin.factors.values()) and not [n for n in thin.factors if "_ip" in n]
    assert len(thin.factors) == len([n for n in sighted.unet.attn_processors]) * 4


def test_a_whole_edit_in_sight(sighted, photo, tmp_path):
    "What is seen changes the edit; without Eq. 2 and with α = 1, diffusers draws it with adapter and LoRA."
    sighted.set_ip_adapter_scale(0.6)
    few = FEW | dict(embedding_steps=0, alpha=1.0, guidance_scale=4.0, tuning_lr=2e-2, rank=2)
    first = edit_with(sighted, *photo, ip_adapter_image=photo[0], save=tmp_path, **few)
    assert (edit_with(sighted, *photo, ip_adapter_image=photo[4], **few) - first).abs().max() > 1e-3
    sighted.load_lora_weights(tmp_path)
    size = dict(height=SIZE[0], width=SIZE[1], num_inference_steps=2, guidance_scale=4.0, output_type="pt")
    given = dict(latents=start_of(_family_of(sighted)(sighted, *SIZE)), ip_adapter_image=to_pil(photo[0]))
    theirs = sighted(prompt=T_A, **given, **size).images
    sighted.unload_lora_weights()
    assert (theirs - first).abs().max() < 1e-5


def test_sight_that_is_refused(sighted, pipes, photo):
    for pipe, given, sentence in (
        (sighted, {}, "has an IP-Adapter; give ip_adapter_image"),
        (sighted, dict(ip_adapter_image=photo[0], rank=None), "give rank=16"),
        (pipes["sdxl"], dict(ip_adapter_image=photo[0]), "has 0 IP-Adapters"),
        (pipes["flux2-klein"], dict(ip_adapter_image=photo[0]), "of Stable Diffusion or SDXL"),
    ):
        with pytest.raises(BadInput, match=sentence):
            edit_with(pipe, *photo, **FEW | dict(rank=2) | given)


def test_half_precision(photo):
    "In bf16, with float32 outside: near the same pictures; thin factors are float32 and move."
    pipe = _random_pipe("flux2-klein")
    whole = edit_with(pipe, *photo, rank=2, **FEW)
    half = edit_with(pipe.to(torch.bfloat16), *photo, rank=2, **FEW)
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().mean() < 0.05


def test_thin_factors_change_nothing_at_first(pipes):
    net = pipes["sdxl"].unet
    model = families.StableDiffusionXL(pipes["sdxl"], *SIZE)
    with torch.no_grad():
        x, e = start_of(model), model.embed([T_A])
        plain = model.unet(x, 500, e).sample
        thin = LowRank(net, 2)
        same = model.unet(x, 500, e).sample
        for _, up in thin.factors.values():
            up.fill_(0.1)
        other = model.unet(x, 500, e).sample
        thin.remove()
        assert torch.equal(plain, same) and not torch.allclose(plain, other, atol=1e-3)
        assert torch.equal(plain, model.unet(x, 500, e).sample)
    assert len(thin.state()) == 2 * len(thin.factors) and all(x.dtype == torch.float32 for x in thin.parameters())


REFUSED = [
    ("a size", dict(size=(32, 40)), "40 x 32 px; this family needs multiples of 16"),
    ("half and all weights", dict(dtype=torch.bfloat16, rank=None), "give rank=16"),
    ("float16", dict(dtype=torch.float16), "torch.bfloat16"),
    ("no rank", dict(rank=0), "rank is 0"),
    ("distilled", dict(distilled=True), "FLUX.2-klein-base-4B"),
]


@pytest.mark.parametrize("case, sentence", [x[1:] for x in REFUSED], ids=[x[0] for x in REFUSED])
def test_refusals(case, sentence):
    pipe, (height, width) = _random_pipe("flux2-klein"), case.get("size", SIZE)
    pipe.transformer.to(case.get("dtype", torch.float32))
    pipe.register_to_config(is_distilled=case.get("distilled", False))
    image, mask = torch.rand(3, height, width), torch.ones(1, height, width)
    with pytest.raises(BadInput, match=sentence):
        edit_with(pipe, image, mask, T_A, T_B, image, rank=case.get("rank", 2), **FEW)


def test_other_classes_are_named(pipes):
    "By `_family_of`, and by the library's own door, which tells of the other one."
    with pytest.raises(BadInput, match="Namespace is of no family .* StableDiffusionXLPipeline"):
        _family_of(type("Namespace", (), {})())
    with pytest.raises(BadInput, match="There is no family 'sana'; give one of sd, sdxl"):
        _random_pipe("sana")
    for name in ("sdxl", "flux2-klein", "sd3"):
        kind = type(pipes[name]).__name__
        assert kind in FAMILIES
        with pytest.raises(BadInput, match=f"this {kind} .*layerdiffusion.base.families.edit_with"):
            LayerDiffusion.from_pipe(pipes[name])


def test_the_planner_counts_a_family(monkeypatch):
    "What is predicted for a small flow's transformer is what PyTorch's profiler sees; thin factors need less."
    small = dict(num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=64, in_channels=16)
    small |= dict(guidance_embeds=False, axes_dims_rope=(16,) * 4, joint_attention_dim=96)
    vae = dict(latent_channels=4, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    kinds = "Flux2KleinPipeline", "Flux2Transformer2DModel", "AutoencoderKLFlux2"
    monkeypatch.setitem(memory._PUBLISHED, "small-flux", (*kinds, small, vae, (64, 96), 16, 16))
    found = memory.predict_family("small-flux", None, False, 256, 256)
    model, net, vae = memory._skeleton("small-flux", torch.float32, 256, 256)
    x, t = torch.zeros(1, 16, 16, 16), torch.zeros(1, dtype=torch.long)
    words = [torch.zeros(1, 64, 96).requires_grad_() for _ in range(2)]
    works = memory._works(model, x, t, words, 256, 256)
    weights = sum(memory._whole_bytes(m) for m in (net, vae))
    seen = {stage: memory._measure_peak(works[stage]) for stage in ("embed", "draw")}
    learnt = memory._whole_bytes(net)
    for stage, bytes_ in seen.items():
        rest = found[stage] - weights - (24 * words[0].numel() if stage == "embed" else learnt)
        assert abs(rest / bytes_ - 1) < 0.15, stage
    moving = list(net.requires_grad_(True).parameters())
    rest = found["tune"] - weights - learnt - 8 * sum(p.numel() for p in moving)
    assert abs(rest / memory._measure_peak(lambda: works["tune"](moving)) - 1) < 0.15
    assert memory.predict_family("small-flux", 2, True, 256, 256)["tune"] < found["tune"] / 3
    with pytest.raises(BadInput, match="'sana' are not known; give one of sd, sdxl"):
        memory.predict_family("sana")
