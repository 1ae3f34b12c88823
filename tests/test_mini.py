"The program that trains the mini models: what it writes can be read, what it borrows it gives back."

import os
import signal
import threading

import pytest

CARD = ("level", "embedding_lr", "tuning_lr", "guidance_scale", "presets")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "A folder from a run of untrained stages; and the untrained stages."
    import torch
    from torch.optim.swa_utils import AveragedModel
    from layerdiffusion.mini.training import _STAGES, _build_vae, _needs, _save_checkpoint, _write_mini

    run, out, stages = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("models") / "mine", {}
    _build_vae().half().save_pretrained(run / "vae_folder")
    for stage in ("diffusion", "sam", "clip", "judge", "encoder", "adapter", "together"):
        drawing = stage in ("diffusion", "adapter", "together")
        stages[stage] = _STAGES[stage](**(_needs(stage, run) if drawing else {}))
        if stage in ("adapter", "together"):
            with torch.no_grad():
                [p.normal_(std=0.1) for name, p in stages[stage].named_parameters() if "to_v_ip" in name]
        (run / stage).mkdir()
        _save_checkpoint(
            run / stage / "checkpoint.safetensors",
            stages[stage],
            AveragedModel(stages[stage]),
            torch.optim.AdamW(stages[stage].parameters()),
            {},
        )
    (run / "diffusion" / "record.json").write_text('{"level": 0.5}')
    _write_mini(run, out, tuning_lr=0.5)
    return out, stages


def test_written_folder_is_read(written):
    "Every part by its own library's loader, with the numbers of the run in half precision; diffusers draws with it."
    import open_clip
    import torch
    from diffusers import StableDiffusionPipeline
    from layerdiffusion.mini.judge import load_judge
    from layerdiffusion.base.masks import load_sam

    out, stages = written
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a dog jumping in a forest",
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all() and image.std() > 0
    d = stages["diffusion"]
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}/clip")
    pairs = [
        (pipe.unet, d.unet),
        (pipe.text_encoder, d.text_encoder),
        (load_sam(out / "sam"), stages["sam"].sam),
        (load_judge(out), stages["judge"].judge),
        (clip, stages["clip"].clip),
    ]
    for read, made in pairs:
        for a, b in zip(read.parameters(), made.parameters(), strict=True):
            assert torch.equal(a.float(), b.half().float())


def test_written_adapter_is_read(written):
    """By diffusers' own `load_ip_adapter`, every tensor in its layer, beside a U-Net without it; it draws what ours
    draws, and not what the model draws that sees nothing."""
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors import safe_open
    from layerdiffusion.base.core import to_pil
    from layerdiffusion.base.sd import ddim_sample, encode_text, initial_latents, load_models
    from layerdiffusion.identity import portrait, see_subject
    from layerdiffusion.mini.world import render

    out, made = written[0], written[1]["together"]  # the last stage
    with safe_open(str(out / "unet" / "diffusion_pytorch_model.safetensors"), "pt") as f:
        assert not [k for k in f.keys() if "processor" in k]  # noqa: SIM118
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.load_ip_adapter(str(out), subfolder="ip_adapter", weight_name="ip_adapter.safetensors")
    pipe.set_progress_bar_config(disable=True)
    pairs = list(zip(pipe.image_encoder.parameters(), made.frozen[1].parameters(), strict=True))
    pairs += zip(pipe.unet.encoder_hid_proj.parameters(), made.project.parameters(), strict=True)
    for name, there in made.unet.attn_processors.items():
        if "attn2" in name:
            here = pipe.unet.attn_processors[name]
            pairs += zip(here.parameters(), there.parameters(), strict=True)
    assert len(pairs) > 90 and all(torch.equal(a.float(), b.half().float()) for a, b in pairs)
    (image,), (mask,), _ = render(scenes_of(1))
    models, mask = load_models(out), (mask > 0.5).float()
    noise, plain = initial_latents(models, [0]), [encode_text(models, words) for words in ("a dog", "")]
    sees = see_subject(models, image, mask)
    ours, blind = (ddim_sample(m, *plain, noise, 2, 3.0) for m in (sees, models))
    pipe.scheduler = models.scheduler
    how = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent", latents=noise)
    theirs = pipe("a dog", ip_adapter_image=to_pil(portrait(image, mask)), **how).images
    assert (ours - theirs).abs().max() < 1e-4 < 1e-2 < (ours - blind).abs().mean()


def test_stages_say_what_they_need(tmp_path):
    from layerdiffusion.base.core import BadInput
    from layerdiffusion.mini.training import train_stage

    for there, missing in (("vae_folder", "vae"), ("diffusion", "diffusion"), ("encoder", "encoder"), ("", "")):
        if missing:
            with pytest.raises(BadInput, match=f"yet; run `layerdiffusion train-mini {missing} --out"):
                train_stage("adapter", tmp_path)
            (tmp_path / there).mkdir()
            (tmp_path / there / "checkpoint.safetensors").touch()


def test_written_card(written):
    "The shipped card's numbers, the run's level, and what was given."
    from layerdiffusion.base.sd import load_models
    from layerdiffusion.settings import preset

    shipped, models = load_models("mini").card, load_models(written[0])
    assert {k: models.card[k] for k in CARD} == {k: shipped[k] for k in CARD} | dict(level=0.5, tuning_lr=0.5)
    assert preset("best", models.card).tuning_steps == preset("best", shipped).tuning_steps == 120
    assert "gates" not in models.card
    assert (written[0] / "labels.png").read_bytes() == (load_models("mini").folder / "labels.png").read_bytes()


def tiny(folder, during=lambda: None, steps=2):
    "A few steps of a small run; `during` is called in each."
    from layerdiffusion.mini.training import _VaeObjective, _train_loop

    class Tiny(_VaeObjective):
        batch = 1

        def forward(self, scenes, g):
            during()
            return super().forward(scenes, g)

        sheet = property()  # `hasattr` says no: no pictures

    return _train_loop(Tiny(), folder, steps)


def test_signals_are_given_back(tmp_path):
    """Ctrl-C stops at a whole step; afterwards, and after a failure, the handlers are those of before. Another thread
    touches none."""

    def handlers():
        return [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    before, seen = handlers(), []

    def stop():
        seen.append(handlers())
        os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    assert tiny(tmp_path / "a", stop, 5)["step"] == 1 and seen[0] != before and handlers() == before

    def fail():
        raise FloatingPointError("pretended")

    with pytest.raises(FloatingPointError):
        tiny(tmp_path / "b", fail)
    assert handlers() == before
    done, inside = [], []
    thread = threading.Thread(target=lambda: done.append(tiny(tmp_path / "c", lambda: inside.append(handlers()))))
    thread.start()
    thread.join()
    assert done[0]["step"] == 2 and inside == [before, before]


def test_verdicts():
    "The full check goes by the number, the quick one by the interval."
    from layerdiffusion.mini.training import _verdict

    rows = [dict(value=v, low=v - 0.1, high=v + 0.1, bar=0.9) for v in (1.0, 0.95, 0.85, 0.7)]
    assert [_verdict(r) for r in rows] == ["met", "met", "NOT MET", "NOT MET"]
    assert [_verdict(r | dict(quick=True)) for r in rows] == ["met", "undecided", "undecided", "NOT MET"]


def test_a_run_goes_on_as_it_began(tmp_path):
    "Another seed or level is another run."
    from layerdiffusion.base.core import BadInput
    from layerdiffusion.mini.training import train_stage

    def go(**kw):
        return train_stage("vae", tmp_path, workers=1, **kw)

    go(samples=32, seed=3)
    go(samples=48, seed=3)
    for kw, said in (
        (dict(seed=4), "has seed 3, not 4"),
        (dict(seed=3, level=0.5), "has level 0.0, not 0.5"),
        (dict(seed=-1), "at least 0"),
    ):
        with pytest.raises(BadInput, match=said):
            go(samples=64, **kw)


# --------------------------------------------------------------------------- the image encoder and the adapter


def test_portraits_of_a_batch():
    "What `portrait` cuts out, one by one, brought to 64 px as Pillow does it; what is beside the subject is nothing."
    import torch
    from torch.nn.functional import interpolate
    from layerdiffusion.identity import portrait
    from layerdiffusion.mini.training import _portraits
    from layerdiffusion.mini.world import render

    x, mask, _ = render(scenes_of(12, level=1.0))
    wide = torch.zeros(1, 1, 64, 64)
    wide[..., 2:5, :] = wide[..., 60:63, 3:] = 1
    x, mask = torch.cat([x, x[:1]]), torch.cat([mask, wide])
    one = [
        interpolate(portrait(*xm)[None], (64, 64), mode="bicubic", antialias=True) for xm in zip(x, mask, strict=True)
    ]
    cut = _portraits(x, mask)
    assert (cut - torch.cat(one).clamp(0, 1)).abs().max() < 1e-5
    assert torch.equal(_portraits(torch.where(mask > 0.5, x, 1 - x), mask), cut)
    assert (_portraits(x.flip(1), mask) - cut).abs().mean() > 1e-2


def test_an_individual_is_its_coat_marks_and_build():
    "Another colour changes the coat's numbers, another mark that mark's, another pose and place none."
    import torch
    from layerdiffusion.mini.training import _READ, _individual
    from layerdiffusion.mini.world import edit_scenes

    s = scenes_of(8, colour="white")
    read = _individual(s)

    def changed(other):
        return (_individual(other) != read).any(0).nonzero().flatten().tolist()

    assert read.shape == (8, 18) and changed(edit_scenes(s, colour="pink")) == [0, 1, 2]
    assert changed(with_traits(s, hue=0.5, light=0.5)) == [3, 4, 5]
    assert changed(with_traits(s, socks=2.0)) == [6 + _READ.index("socks")]
    assert changed(edit_scenes(s, pose="sitting", place="snow")) == [] and read.isfinite().all()
    assert torch.equal(_individual(s[torch.tensor([3])])[0], read[3])


def test_the_encoder_learns_what_is_asked():
    "The three traits of patterns only where there are patterns."
    from layerdiffusion.mini.training import _EncoderObjective, _draw_scenes

    for level in (0.0, 1.0):
        o = _EncoderObjective(level)
        o.batch = 4
        o(*_draw_scenes(o, 0))[0].backward()
        grads = o.head.bias.grad != 0
        assert grads[:-3].all() and grads[-3:].any() == (level > 0)
        assert o.encoder.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_an_adapter_adds_nothing_at_first_and_the_base_stays():
    """Begun from a folder, it answers as that model does, whatever it sees. In training the values move first, then all
    that is new; the base and the image encoder stay, bit for bit."""
    import torch
    from layerdiffusion.base.sd import load_models
    from layerdiffusion.mini.training import _AdapterObjective, _draw_scenes, _take_step

    mini = load_models("mini")
    o = _AdapterObjective(vae=mini.folder / "vae", start=mini.folder)
    o.reuse = 1
    x, seen = torch.randn(2, 4, 16, 16), torch.randn(2, 128)
    words = o.embed(["a dog", "a cat"])
    with torch.no_grad():
        assert torch.allclose(o.predict(x, 500, words, seen), mini.unet(x, 500, words).sample, atol=1e-6)
    new = {k: p for k, p in o.named_parameters() if "_ip." in k or k.startswith("project.")}
    old = {k: p for k, p in o.named_parameters() if k not in new} | dict(o.frozen[1].named_parameters())
    before = {k: p.clone() for k, p in (new | old).items()}
    assert {k for k, p in (new | old).items() if p.requires_grad} == set(new) and len(new) == 24
    opt = torch.optim.AdamW(o.parameters(), lr=1.0, weight_decay=0.0)
    for step, learnt in enumerate(({k for k in new if "to_v_ip" in k}, set(new))):
        _take_step(o, opt, o(*_draw_scenes(o, step))[0], 1e-3)
        assert {k for k, p in new.items() if not torch.equal(p, before[k])} == learnt
    assert all(p.grad is None and torch.equal(p, before[k]) for k, p in old.items())
    with torch.no_grad():
        answer, other = o.predict(x, 500, words, seen), o.predict(x, 500, words, seen.flip(0))
        assert not torch.allclose(answer, other, atol=1e-6)


def test_words_and_sight_are_learnt_together():
    """In a step of words alone the adapter is off: the answer is the plain U-Net's, and what looks learns nothing. In
    the other steps all of it learns but the image encoder. A place without a subject shows nothing to look at."""
    import torch
    from layerdiffusion.base.sd import load_models
    from layerdiffusion.mini.training import _AdapterObjective, _draw_scenes, _TogetherObjective

    mini = load_models("mini")
    o = _TogetherObjective(vae=mini.folder / "vae")
    o.unet.load_state_dict(mini.unet.state_dict(), strict=False)
    with torch.no_grad():
        [p.normal_(std=0.1) for name, p in o.named_parameters() if "to_v_ip" in name]
    o.reuse, o.batch = 1, 8
    x, seen, words = torch.randn(2, 4, 16, 16), torch.randn(2, 128), o.embed(["a dog", "a cat"])
    for seeing in (False, True):
        o.see_or_not(seeing)
        o.zero_grad()
        with torch.no_grad():
            answer = o.predict(x, 500, words, seen)
            assert torch.allclose(answer, mini.unet(x, 500, words).sample, atol=1e-6) != seeing
        scenes, g = _draw_scenes(o, 0)
        _AdapterObjective.forward(o, scenes, g)[0].backward()
        learns = {k for k, p in o.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        looks = {k for k in learns if "_ip." in k or k.startswith("project.")}
        assert len(looks) == (24 if seeing else 0) and any(k.startswith("text_encoder.") for k in learns)
        assert "unet.conv_in.weight" in learns and o.frozen[1].visual_projection.weight.grad is None
    steps = []
    for k in range(12):
        o(*_draw_scenes(o, k))
        steps.append(o.seeing)
        item = o.pool[-1]
        assert torch.equal(item["seen"].abs().sum(1) > 0, item["mask"].flatten(1).any(1))
    assert set(steps) == {False, True}
    assert not torch.cat([item["scenes"].present for item in o.pool]).bool().all()


def test_where_an_individual_is_itself():
    "Where its socks or its ears would change, not where only its coat would, nor where nobody is."
    import torch
    from layerdiffusion.mini.training import _where_individual
    from layerdiffusion.mini.world import render

    scenes = with_traits(scenes_of(8, empty=0.0), socks=1.0, ear=0.0)
    x, mask, _ = render(scenes, 64)
    area = _where_individual(scenes, x) > 0
    for changes in (dict(socks=0.0), dict(ear=1.0)):
        differs = (render(with_traits(scenes, **changes), 64)[0] - x).abs().amax(1, keepdim=True) > 0.1
        assert differs.any() and (differs & area).sum() > 0.6 * differs.sum()
    assert (area & (mask > 0.5)).sum() < 0.9 * (mask > 0.5).sum() and area.float().mean() < 0.3
    nobody = scenes_of(2, empty=1.0)
    assert not torch.any(_where_individual(nobody, render(nobody, 64)[0]))


# --------------------------------------------------------------------------- what the parts are taught and asked


def scenes_of(n=12, name="tests", **fixed):
    from layerdiffusion.mini.world import sample_scenes, stream

    return sample_scenes(n, stream(name), **fixed)


def with_traits(scenes, **traits):
    from dataclasses import replace
    from layerdiffusion.mini.world import TRAITS

    look = scenes.look.clone()
    for name, value in traits.items():
        look[:, TRAITS.index(name)] = value
    return replace(scenes, look=look)


def test_a_ghost_is_no_rabbit():
    "Right in everything, but broken: not valid. A judge without that question is asked as before."
    import torch
    from layerdiffusion.mini.judge import valid

    answers = dict(present=torch.ones(3).long(), species=torch.tensor([2, 2, 0]))
    assert valid(answers, species="rabbit").tolist() == [True, True, False]
    assert valid(answers | dict(whole=torch.tensor([1, 0, 1])), species="rabbit").tolist() == [True, False, False]
    assert valid(answers | dict(whole=torch.ones(3).long(), present=torch.zeros(3).long())).tolist() == [False] * 3


def test_the_app_ticks_no_ghost(monkeypatch):
    import torch
    from types import SimpleNamespace as Some
    from layerdiffusion.interface import app
    from layerdiffusion.mini.judge import _QUESTIONS

    def answers(logit, **said):
        return lambda x: {q: logit * torch.eye(n)[[said.get(q, 1)] * len(x)] for q, n in _QUESTIONS.items()}

    judge = torch.nn.Module()
    judge.forward = answers(9, whole=0)
    monkeypatch.setattr("layerdiffusion.mini.judge.load_judge", lambda: judge)
    monkeypatch.setattr(app, "clip_score", lambda *_: Some(cosine=torch.zeros(1)))
    monkeypatch.setattr(app, "subject_likeness", lambda *_: torch.zeros(1))
    monkeypatch.setattr(app, "Clip", lambda _: Some(pictures=None))
    monkeypatch.setattr(app, "propose_subject", lambda *_: Some(mask=torch.ones(1, 64, 64)))
    method = Some(models=Some(card=dict(name="mini")), cached=lambda name, key, make: make(None), sam=None)
    result = Some(images=torch.zeros(1, 3, 64, 64), text="a grey cat sitting on a beach", image=None, mask=None)

    def score():
        return app.scores(method, result)[0]

    def ticks(score):
        return app._caption(0, score).count("✓")

    assert score()["broken"] == "broken" and not ticks(score())
    judge.forward = answers(9)
    assert not score()["broken"] and all(ok for _, ok in score()["seen"].values()) and ticks(score())
    judge.forward = answers(0.1)  # no opinion: neither right nor wrong
    assert {ok for _, ok in score()["seen"].values()} == {None} and not ticks(score())


def test_judges_of_other_times(tmp_path):
    "The heads are those of the config; without that entry, the seven of the first version."
    import json
    import torch
    from safetensors.torch import save_file
    from layerdiffusion.base.core import BadInput
    from layerdiffusion.mini.judge import Judge, ask, load_judge, valid

    first = ("present", "species", "pose", "place", "colour", "pattern", "accessory")
    old, folder = Judge((24, 48, 96, 128), hidden=192, questions=first), tmp_path / "judge"
    folder.mkdir()
    save_file(old.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(widths=[24, 48, 96, 128], size=64)))
    found = ask(load_judge(tmp_path), torch.rand(2, 3, 64, 64))
    assert tuple(found) == first and valid(found).shape == (2,)
    (folder / "config.json").write_text(json.dumps(old.config | dict(questions=["mood"])))
    with pytest.raises(BadInput, match="answers 'mood'"):
        load_judge(tmp_path)


def test_only_what_can_be_seen_is_asked():
    "No rabbit's tail tip, no white saddle on a white coat, no half-there mark, nothing of nobody."
    import torch
    from layerdiffusion.mini.judge import truths
    from layerdiffusion.mini.world import MARKS

    clear = with_traits(
        scenes_of(24, pose="standing", species="cat", colour="black", pattern=0, accessory=0),
        **dict.fromkeys(MARKS, 0.9),
        hue=0.0,
        light=0.9,
    )
    for mark in MARKS:
        answer, asked = truths(clear)[mark]
        assert answer.all() and asked.all(), mark
        answer, asked = truths(with_traits(clear, **{mark: 0.05}))[mark]
        assert not answer.any() and asked.all(), mark
        assert not truths(with_traits(clear, **{mark: 0.35}))[mark][1].any()
    from layerdiffusion.mini.world import edit_scenes

    assert not truths(edit_scenes(clear, species="rabbit"))["tail_tip"][1].any()
    assert not truths(with_traits(edit_scenes(clear, colour="grey"), light=0.57, hue=0.08))["saddle"][1].all()
    assert (truths(clear)["second_hue"][0] == 0).all() and truths(clear)["second_hue"][1].all()
    assert not truths(with_traits(clear, hue=0.25))["second_hue"][1].any(), "between two names"
    assert not truths(with_traits(clear, **dict.fromkeys(MARKS, 0.05)))["second_light"][1].any(), "nothing carries it"
    nobody = truths(edit_scenes(clear, present=torch.zeros(24, dtype=torch.bool)))
    assert {q for q, (_, asked) in nobody.items() if asked.any()} == {"present", "place"}


def test_parts_are_left_out():
    "Nothing hidden is the picture as ever; everything hidden is the place; a hidden head leaves the hind legs alone."
    import torch
    from layerdiffusion.mini.world import BODY_PARTS, draw_places, draw_subjects

    s = scenes_of(4)
    ground = draw_places(s, 64)
    (plain, mask), all_of = draw_subjects(ground, s), torch.ones(4, dtype=torch.bool)
    assert torch.equal(draw_subjects(ground, s, {})[0], plain)
    image, nothing = draw_subjects(ground, s, dict.fromkeys([*BODY_PARTS, "face", "accessory"], all_of))
    assert torch.equal(image, ground) and not nothing.any()
    first = torch.tensor([True, False, False, False])
    image, less = draw_subjects(ground, s, dict.fromkeys(["head", "snout", "ear", "ear_far", "face"], first))
    assert less[0].sum() < 0.95 * mask[0].sum() and torch.equal(image[1:], plain[1:])


def test_animals_are_broken():
    """Each kind changes the animal, not the place far from it; an empty place stays; the same generator gives the same
    picture."""
    import torch
    from layerdiffusion.base.core import BadInput
    from layerdiffusion.mini.judge import BROKEN, UNSEEN, break_subjects
    from layerdiffusion.base.masks import dilate
    from layerdiffusion.mini.world import render, stream

    s = scenes_of(8, present=torch.arange(8) > 0)
    image, mask, background = render(s)
    assert not set(BROKEN) & set(UNSEEN) and UNSEEN
    for kind in BROKEN + UNSEEN:
        broken, shows = break_subjects(s, kind, stream("break"))
        assert torch.equal(broken, break_subjects(s, kind, stream("break"))[0])
        assert torch.equal(broken[0], background[0]) and not shows[0] and shows.sum() > 3, kind
        assert broken.min() >= 0 and broken.max() <= 1
        changed = (broken - image).abs().amax(1, keepdim=True) > 0.1
        assert (changed.sum((1, 2, 3))[shows] > mask.sum((1, 2, 3))[shows] / 10).all(), kind
        if kind in ("faded", "headless", "cut"):
            assert not (changed & (dilate(mask, 2) == 0)).any(), kind
    with pytest.raises(BadInput, match="no kind of broken animal 'sad'"):
        break_subjects(s, "sad", stream("break"))


def test_the_judge_learns_what_is_broken():
    """The first third of a batch is; right answers about it cost less than wrong ones, and what an animal is called
    there costs nothing."""
    import torch
    from layerdiffusion.mini.judge import _QUESTIONS
    from layerdiffusion.mini.training import _JudgeObjective, _draw_scenes

    o = _JudgeObjective()
    o.batch = 24
    scenes, g = _draw_scenes(o, 0)
    state = g.get_state()

    def loss(whole, species=None):
        def judge(x):
            say = {q: torch.zeros(24, n) for q, n in _QUESTIONS.items()}
            say["whole"] = 9.0 * torch.eye(2)[whole.long()]
            if species is not None:
                say["species"] = 9.0 * torch.eye(3)[species]
            return say

        o.judge = judge
        g.set_state(state)
        return o(scenes, g)[0].item()

    del o.judge
    o.somewhere = torch.nn.Parameter(torch.zeros(1))  # an objective is where its parameters are
    right = torch.arange(24) >= 8
    assert loss(right) < loss(torch.ones(24)) < loss(~right)
    species = scenes.species.clone()
    species[:8] = (species[:8] + 1) % 3
    assert loss(right, species) == pytest.approx(loss(right, scenes.species))
    species[8:] = (species[8:] + 1) % 3
    assert loss(right, species) > loss(right, scenes.species) + 1


def test_clicks_and_boxes():
    "A click is where it says it is; labels say what is meant; boxes enclose the subject, and stay in the picture."
    import torch
    from layerdiffusion.base.masks import bounding_box
    from layerdiffusion.mini.training import _random_boxes, _random_clicks, _several_clicks, _some_dark
    from layerdiffusion.mini.world import COLOURS, PLACES, render, stream

    s = scenes_of(16)
    mask = (render(s)[1] > 0.5).float()

    def at(m, p):
        return m[p[1].int(), p[0].int()].item()

    points, meant = _random_clicks(mask, stream("clicks"), 3)
    for m, ps, truths in zip(mask[:, 0], points, meant, strict=False):
        assert [at(m, p) for p in ps[:2]] == [1, 1] and all(at(t, p) == 1 for p, t in zip(ps, truths, strict=False))
    points, labels, meant = _several_clicks(mask, stream("clicks"), 4)
    for ps, ls, t in zip(points, labels, meant[:, 0], strict=False):
        assert ls[0] == 1 and all(at(t, p) == label for p, label in zip(ps, ls, strict=False))
    assert 0 < labels[:, 1:].mean() < 1 and (meant == mask).all((1, 2, 3)).sum() > 8
    exact = _random_boxes(mask, stream("boxes"), off=0.0)
    assert [tuple(b.int().tolist()) for b in exact] == [bounding_box(m) for m in mask]
    shaky = _random_boxes(mask, stream("boxes"), off=0.3)
    assert (
        shaky.min() >= 0 and shaky.max() <= 64 and (shaky[:, 2:] > shaky[:, :2]).all() and not torch.equal(shaky, exact)
    )
    dark = _some_dark(s, stream("dark"), 1.0)
    assert {list(COLOURS)[k] for k in dark.colour} <= {"black", "blue", "purple"} and {
        list(PLACES)[k] for k in dark.place
    } <= {"forest", "city"}
    same = _some_dark(s, stream("dark"), 0.0)
    assert torch.equal(same.colour, s.colour) and torch.equal(same.place, s.place)


def test_sam_learns_boxes_and_negative_clicks():
    "Their embeddings get gradients, and the folder says that boxes are known."
    from layerdiffusion.mini.training import _SAM_CONFIG, _SamObjective, _draw_scenes

    o = _SamObjective()
    o.batch = 4
    loss, logs = o(*_draw_scenes(o, 0))
    loss.backward()
    negative, positive, upper, lower = (e.weight.grad.abs().sum() for e in o.sam.prompt_encoder.point_embeddings)
    assert min(negative, positive, upper, lower) > 0 and {"iou", "several", "box"} <= set(logs) and _SAM_CONFIG["boxes"]


def test_captions_one_attribute_apart():
    """A gallery of 96 different captions, in which each scene's neighbours differ in one attribute; groups keep their
    first."""
    import torch
    from dataclasses import fields
    from layerdiffusion.mini.training import _TOLD, _change_one, _clear_traits, _full_caption, _near_groups, _neighbours
    from layerdiffusion.mini.world import MARKS, TRAITS, clear_mark, second_colour, stream

    s = _clear_traits(scenes_of(8, level=1.0))
    assert all((clear_mark(s, m) >= 0).all() for m in MARKS) and all(
        map(torch.equal, second_colour(s), second_colour(scenes_of(8, level=1.0)))
    )
    for name in _TOLD:
        new = _change_one(s, name, torch.rand(8))
        other = {f.name for f in fields(s) if not torch.equal(getattr(s, f.name), getattr(new, f.name))}
        assert other == ({"look"} if name not in other else {name}), name
        if "look" in other:
            assert (s.look != new.look).any(0).nonzero().flatten().tolist() == [TRAITS.index(name)] and (
                s.look != new.look
            )[:, TRAITS.index(name)].all()
        else:
            assert (getattr(s, name) != getattr(new, name)).all()
    scenes, texts = _neighbours(s[:3], stream("near"), 3)
    assert len(scenes) == len(set(texts)) == 12 and texts[0] == _full_caption(s, 0)
    groups = _near_groups(s, stream("near"), 4)
    first = [_full_caption(groups, i) for i in (0, 4)]
    assert first == [_full_caption(s, i) for i in (0, 4)] and len({_full_caption(groups, i) for i in range(4)}) > 1


def test_training_begins_from_what_fits(tmp_path):
    import torch
    from safetensors.torch import save_file
    from layerdiffusion.mini.training import _start_from

    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3))
    before = module[1].weight.clone()
    save_file(
        {"0.weight": torch.ones(2, 2).half(), "1.weight": torch.ones(5, 2), "elsewhere": torch.ones(1)},
        tmp_path / "x.safetensors",
    )
    assert _start_from(module, tmp_path / "x.safetensors") == 1
    assert torch.equal(module[0].weight, torch.ones(2, 2)) and torch.equal(module[1].weight, before)


def test_labelled_pictures(tmp_path):
    """A list comes back as it was written, and is asked of any weights; the judge agrees where it passes what is whole,
    and only that."""
    import json
    import torch
    from layerdiffusion.base.core import BadInput
    from layerdiffusion.mini.judge import _QUESTIONS
    from layerdiffusion.mini.training import _agrees, _check_labelled, _load_labels, _save_labels

    images = (torch.rand(5, 3, 64, 64) * 255).round() / 255
    dog = dict(present=True, whole=True, species="dog", pose="sitting", place="snow")
    labels = [
        dog,
        dog | dict(species="cat"),
        dog | dict(species=None),
        dog | dict(whole=False, species="cat", made="broken"),
        dict(present=False, whole=None, species=None, pose=None, place="snow"),
    ]
    _save_labels(tmp_path / "labels.json", images, labels, ncols=3, by="a test")
    again, read = _load_labels(tmp_path / "labels.json")
    assert torch.allclose(again, images, atol=1e-3) and read == labels
    answers = {q: torch.zeros(5).long() for q in _QUESTIONS} | dict(
        present=torch.tensor([1, 1, 1, 1, 0]),
        whole=torch.tensor([1, 1, 1, 0, 1]),
        pose=torch.ones(5).long(),
        place=torch.full((5,), 3),
    )
    assert _agrees(answers, labels).tolist() == [True, False, True, True, True]
    assert _agrees(answers | dict(whole=torch.ones(5).long()), labels).tolist() == [True, False, True, False, True]
    judge = torch.nn.Module()
    judge.forward = lambda x: {q: torch.eye(_QUESTIONS[q])[a] for q, a in answers.items()}
    rows = _check_labelled(judge, tmp_path / "labels.json")
    assert [(r["gate"], r["value"], r["n"]) for r in rows] == [
        ("judge_labels: generated", 0.75, 4),
        ("judge_labels: broken", 1.0, 1),
        ("broken: labelled", 1.0, 1),
        ("sound: labelled", 1.0, 3),
    ]
    record = json.loads((tmp_path / "labels.json").read_text())
    (tmp_path / "labels.json").write_text(json.dumps(record | dict(labels=labels * 3)))
    with pytest.raises(BadInput, match="15 labels, but labels.png shows 6"):
        _load_labels(tmp_path / "labels.json")
    assert _check_labelled(judge, tmp_path / "none.json") == []


def test_the_pinned_pictures(monkeypatch):
    """Sixty drawn and sixty broken, in a small file, with the labels of tests/labelled.py; shuffled labels are
    found out."""
    import random
    from collections import Counter
    from pathlib import Path

    import torch
    from layerdiffusion.base.core import package_folder
    from layerdiffusion.mini.judge import ANSWERS, _QUESTIONS
    from layerdiffusion.mini.training import _agrees, _load_labels

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from labelled import KINDS, seen_labels

    file = package_folder() / "weights" / "mini" / "labels.json"
    assert file.with_suffix(".png").stat().st_size < 1e6
    images, labels = _load_labels(file)
    drawn, broken = labels[:60], labels[60:]
    assert images.shape == (120, 3, 64, 64) and drawn == seen_labels()
    assert Counter(label["kind"] for label in broken) == dict.fromkeys(KINDS, 10)
    assert not any(label["whole"] for label in broken) and 50 <= sum(label["whole"] for label in drawn) < 60
    for q in ("species", "pose", "place"):
        assert {label[q] for label in drawn} == {label[q] for label in broken} == set(ANSWERS[q])
    answers = {q: torch.zeros(120).long() for q in _QUESTIONS} | dict(
        present=torch.ones(120).long(),
        **{
            q: torch.tensor([ANSWERS[q].index(label[q]) for label in labels])
            for q in ("whole", "species", "pose", "place")
        },
    )
    assert _agrees(answers, labels).all()
    shuffled = random.Random(0).sample(labels, len(labels))
    assert _agrees(answers, shuffled).float().mean() < 0.6


def test_checks_have_their_bars(written):
    """Every row has a bar, an interval and its number of pictures; a judge that was not taught about broken animals has
    no such rows."""
    from layerdiffusion.mini.judge import BROKEN, UNSEEN, Judge
    from layerdiffusion.base.masks import load_sam
    from layerdiffusion.mini.training import GATES, _check_broken, _check_clip, _check_judge, _check_said, _check_sam

    out, stages = written
    judge = stages["judge"].judge
    rows = (
        _check_sam(load_sam(out / "sam"), 0.0, 4)
        + _check_clip(out, 0.0, 1)
        + _check_judge(judge, 0.0, 100)
        + _check_broken(judge, 0.0, 8)
    )
    assert all(r["bar"] == GATES[r["gate"].split(":")[0]] and r["low"] <= r["value"] <= r["high"] for r in rows)
    names = [r["gate"] for r in rows]
    assert {
        "sam_iou: click",
        "sam_iou: box",
        "clip_top1: near",
        "judge: whole",
        "broken: all",
        "broken: unseen",
        "sound: drawn",
    } <= set(names) and len(set(names)) == len(names)
    n = {r["gate"].split(": ")[1]: r["n"] for r in rows if r["gate"].startswith("broken")}
    assert n["all"] == sum(n[k] for k in BROKEN) and n["unseen"] == sum(n[k] for k in UNSEEN)
    first = Judge(questions=("present", "species"))
    assert _check_broken(first, 0.0, 8) == _check_said(None, first, 0.0, 3.0) == []


def test_what_is_said_is_counted(monkeypatch):
    """Only marks that are there and named are counted; a judge that sees every mark finds all of them, one that sees
    none finds none."""
    import torch
    from layerdiffusion.mini import training as mini
    from layerdiffusion.mini.judge import _QUESTIONS, truths

    monkeypatch.setattr(mini, "draw", lambda models, texts, *_: torch.zeros(len(texts), 3, 64, 64))
    true = truths(mini._combinations(0.0, 1, size=0))

    class Seer(torch.nn.Module):
        heads = _QUESTIONS

        def forward(self, x):
            return {q: torch.eye(n)[true[q][0] if self.sees else (true[q][0] - 1) % n] for q, n in _QUESTIONS.items()}

    for sees in (True, False):
        judge = Seer()
        judge.sees = sees
        rows = {r["gate"]: r for r in mini._check_said(None, judge, 0.0, 3.0)}
        assert all(r["value"] == float(sees) for r in rows.values())
    right, asked = true["saddle"]
    assert rows["said: saddle"]["n"] == (asked & (right == 1)).sum() and rows["said: all"]["bar"] == 0.85


def test_a_loss_that_is_no_number_is_never_saved(tmp_path):
    "The run stops with a sentence, and the checkpoint before it is the one that stays."
    from layerdiffusion.mini.training import _VaeObjective, _train_loop

    class Broken(_VaeObjective):
        batch, bad = 1, False
        sheet = property()

        def forward(self, scenes, g):
            loss, logs = super().forward(scenes, g)
            return loss * (float("nan") if Broken.bad else 1.0), logs

    _train_loop(Broken(), tmp_path, 4, stop_after=2)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    Broken.bad = True
    with pytest.raises(FloatingPointError, match="became nan by step 4; go on from the last checkpoint"):
        _train_loop(Broken(), tmp_path, 4)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
