"The program that trains the mini models: what it writes can be read, what it borrows it gives back."
import os, signal, threading

import pytest

CARD = ("level", "embedding_lr", "tuning_lr", "guidance_scale", "presets")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "A folder from a run of untrained stages, with the shipped autoencoder; and the untrained stages."
    import shutil
    import torch
    from torch.optim.swa_utils import AveragedModel
    from layerdiffusion.mini import STAGES, save_checkpoint, write_mini
    from layerdiffusion.sd import resolve_model
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("models") / "mine"
    shutil.copytree(resolve_model("mini") / "vae", run / "vae_folder")
    stages = {stage: STAGES[stage](**(dict(vae=run / "vae_folder") if stage == "diffusion" else {})) for stage in ("diffusion", "sam", "clip", "judge")}
    for stage, objective in stages.items():
        (run / stage).mkdir()
        save_checkpoint(run / stage / "checkpoint.safetensors", objective, AveragedModel(objective), torch.optim.AdamW(objective.parameters()), {})
    (run / "diffusion" / "record.json").write_text('{"level": 0.5}')
    write_mini(run, out, tuning_lr=.5)
    return out, stages


def test_written_folder_is_read(written):
    "Every part by its own library's loader, with the numbers of the run in half precision; diffusers draws with it."
    import open_clip, torch
    from diffusers import StableDiffusionPipeline
    from layerdiffusion.judge import load_judge
    from layerdiffusion.masks import load_sam
    out, stages = written
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a dog jumping in a forest", num_inference_steps=2, guidance_scale=3., output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all() and image.std() > 0
    d = stages["diffusion"]
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}/clip")
    pairs = [(pipe.unet, d.unet), (pipe.text_encoder, d.text_encoder), (load_sam(out / "sam"), stages["sam"].sam), (load_judge(out), stages["judge"].judge), (clip, stages["clip"].clip)]
    for read, made in pairs:
        for a, b in zip(read.parameters(), made.parameters(), strict=True): assert torch.equal(a.float(), b.half().float())


def test_written_card(written):
    "The shipped card's numbers, the run's level, and what was given."
    from layerdiffusion.sd import load_models
    from layerdiffusion.settings import preset
    shipped, models = load_models("mini").card, load_models(written[0])
    assert {k: models.card[k] for k in CARD} == {k: shipped[k] for k in CARD} | dict(level=.5, tuning_lr=.5)
    assert preset("best", models.card).guidance_scale == preset("best", shipped).guidance_scale == 1.
    assert "gates" not in models.card and not (written[0] / "subject").exists()


def tiny(folder, during=lambda: None, steps=2):
    "A few steps of a small run; `during` is called in each."
    from layerdiffusion.mini import VaeObjective, train_loop
    class Tiny(VaeObjective):
        batch = 1
        def forward(self, scenes, g): during(); return super().forward(scenes, g)
        sheet = property()  # `hasattr` says no: no pictures
    return train_loop(Tiny(), folder, steps)


def test_signals_are_given_back(tmp_path):
    "Ctrl-C stops at a whole step; afterwards, and after a failure, the handlers are those of before. Another thread touches none."
    handlers = lambda: [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    before, seen = handlers(), []
    def stop(): seen.append(handlers()); os.kill(os.getpid(), signal.SIGINT)
    (tmp_path / "a").mkdir(); (tmp_path / "b").mkdir(); (tmp_path / "c").mkdir()
    assert tiny(tmp_path / "a", stop, 5)["step"] == 1 and seen[0] != before and handlers() == before
    def fail(): raise FloatingPointError("pretended")
    with pytest.raises(FloatingPointError): tiny(tmp_path / "b", fail)
    assert handlers() == before
    done, inside = [], []
    thread = threading.Thread(target=lambda: done.append(tiny(tmp_path / "c", lambda: inside.append(handlers()))))
    thread.start(); thread.join()
    assert done[0]["step"] == 2 and inside == [before, before]


def test_verdicts():
    "The full check goes by the number, the quick one by the interval."
    from layerdiffusion.mini import verdict
    rows = [dict(value=v, low=v - .1, high=v + .1, bar=.9) for v in (1., .95, .85, .7)]
    assert [verdict(r) for r in rows] == ["met", "met", "NOT MET", "NOT MET"]
    assert [verdict(r | dict(quick=True)) for r in rows] == ["met", "not to be told", "not to be told", "NOT MET"]

def test_a_run_goes_on_as_it_began(tmp_path):
    "Another seed or level is another run."
    from layerdiffusion.core import BadInput
    from layerdiffusion.mini import train_stage
    go = lambda **kw: train_stage("vae", tmp_path, workers=1, **kw)
    go(samples=32, seed=3)
    go(samples=48, seed=3)
    for kw, said in ((dict(seed=4), "has seed 3, not 4"), (dict(seed=3, level=.5), "has level 0.0, not 0.5"), (dict(seed=-1), "at least 0")):
        with pytest.raises(BadInput, match=said): go(samples=64, **kw)
