"""What an edit will need is said before it starts, and it fits: prediction beside measurement, the choice of a level,
and what happens when memory runs out after all.

Measured on the CPU, by PyTorch's profiler. No GPU's allocator was measured. Running out of memory is pretended by a
callback.
"""

import gc

import pytest

TEXT = "a dog jumping in a forest"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from layerdiffusion.evidence.full_size import _build_model

    return _build_model(tmp_path_factory.mktemp("model") / "sd", width=0.1, size=128)


@pytest.mark.parametrize(
    "level, pictures, precision, draws",
    [
        ("full", "each", "fp32", 1),
        ("full", "composite", "fp32", 8),
        ("spare", "composite", "bf16", 1),
        ("low", "composite", "bf16", 4),
    ],
)
def test_prediction(folder, level, pictures, precision, draws):
    """Within 15 % of what a real tuning, fitting, drawing and decoding have allocated, on v1.4's plan at a tenth of its
    width."""
    import torch
    from layerdiffusion import EditConfig
    from layerdiffusion.fine_tuning import fine_tune
    from layerdiffusion.base.memory import (
        LEVELS,
        _count_decode,
        _count_draw,
        _count_embed,
        _count_tune,
        _measure_peak,
        settings_for,
    )
    from layerdiffusion.method import noise_loss, sample_noise_and_t
    from layerdiffusion.base.sd import PRECISIONS, decode_latents, encode_text, load_models, optimise, use

    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 of its own, and PyTorch computes it by other means there")
    models = use(load_models(folder, dtype=PRECISIONS[precision]), LEVELS[level])
    config, size = settings_for(level, EditConfig(eq45_pictures=pictures, tuning_batch=draws), models.card), 128
    x, mask, e = (
        torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.ones(1, 1, 16, 16),
        encode_text(models, TEXT),
    )
    other = x if pictures == "each" else None

    def embed():
        es = torch.cat([e, e], 1).clone().requires_grad_()
        return optimise(
            lambda step, g: noise_loss(
                models.unet, models.scheduler, x, *sample_noise_and_t(models.scheduler, x.shape, g), es
            ),
            [es],
            2,
            1e-3,
            "fit",
        )

    @torch.no_grad()
    def draw():
        return models.unet(x.expand(4, -1, -1, -1), 500, e.expand(4, -1, -1)).sample

    pairs = dict(
        tune=(
            _count_tune(models, LEVELS[level], config, size, size),
            lambda: fine_tune(
                models,
                e,
                x,
                mask,
                other,
                0 * mask,
                steps=2,
                params=config.tuned_parameters,
                rank=config.lora_rank,
                batch=draws,
            ),
        ),
        embed=(_count_embed(models, LEVELS[level], size, size), embed),
        draw=(_count_draw(models, size, size, 2), draw),
        decode=(_count_decode(models, size, size, 2), lambda: decode_latents(models, x.expand(2, -1, -1, -1))),
    )
    ratios = {stage: predicted / _measure_peak(work) for stage, (predicted, work) in pairs.items()}
    assert all(abs(r - 1) < 0.15 for r in ratios.values()), ratios


@pytest.fixture(scope="module")
def v14():
    "v1.4 as it would lie on a GPU, in bf16, without numbers."
    import torch
    from layerdiffusion.evidence.full_size import _sd_models

    return _sd_models("1.4", torch.bfloat16, "cuda")


def test_targets(v14):
    """512 x 512, one picture at a time: everything tuned within 16 GB, the lowest level within 8 GB. Counted, not
    measured."""
    from layerdiffusion.base.memory import plan

    assert plan(v14, "spare", seeds=1, free=int(80e9)).peak < 16e9
    low = plan(v14, "auto", seeds=1, free=int(7e9))
    assert low.level == "low" and low.peak < 8e9 and "7.0 GB are free" in low.why


def config(**changes):
    from layerdiffusion import EditConfig

    return EditConfig(**dict(object_picture="input", embedding_steps=3, tuning_steps=6, sampling_steps=3) | changes)


class Full:
    "A callback that pretends that memory ran out, once for each given (stage, step)."

    def __init__(self, *when):
        self.when, self.seen = list(when), []

    def __call__(self, event):
        self.seen.append((event.stage, event.step))
        if self.when and self.seen[-1] == self.when[0]:
            import torch

            self.when.pop(0)
            raise torch.OutOfMemoryError("pretended")


def run(full, level="full", **changes):
    from layerdiffusion import LayerDiffusion
    from layerdiffusion.base.memory import run_in

    method, told = LayerDiffusion.from_pretrained("mini", "cpu"), []
    return (
        run_in(
            level,
            method,
            config(**changes),
            lambda c: method.edit("example:dog", TEXT, point=(32, 36), seeds=[0], config=c, callback=full),
            told.append,
        ),
        told,
        method,
    )


def test_out_of_memory_goes_on_where_it_was():
    "One level lower in a sentence, no step twice, and the same pictures."
    import torch

    full = Full(("embeddings", 2), ("tuning", 4))
    from layerdiffusion.base import memory

    result, told, method = run(full)
    levels = [name for name in memory.LEVELS if name != "8bit" or memory._has_8bit()]
    assert [f"{a!r}" in line and f"{b!r}" in line for line, a, b in zip(told, levels, levels[1:], strict=False)] == [
        True,
        True,
    ]
    assert [s for s in full.seen if s[0] == "embeddings"] == [("embeddings", i) for i in (1, 2, 3)]
    if memory._has_8bit():
        assert result.config.tuned_parameters == "all" and [s for s in full.seen if s[0] == "tuning"] == [
            ("tuning", i) for i in range(1, 7)
        ]
    else:
        assert result.config.tuned_parameters == "lora"
    quiet = run(Full(("tuning", 4)))
    assert (
        torch.equal(quiet[0].images, run(Full())[0].images) and quiet[2].models.how.checkpointing and len(quiet[1]) == 1
    )


def test_out_of_memory_at_the_lowest_level():
    from layerdiffusion.base.core import BadInput

    with pytest.raises(BadInput, match="lowest level"):
        run(Full(("tuning", 1)), "low")
    gc.collect()


def test_low_level(tmp_path, monkeypatch, capsys):
    "The command says what it expects and why, tunes LoRA factors, and what it writes is an ordinary edit."
    import json
    from layerdiffusion.interface.cli import main

    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "edit",
                "example:dog",
                TEXT,
                *[
                    "--point",
                    "32,36",
                    "--object-picture",
                    "input",
                    "--embedding-steps",
                    "2",
                    "--tuning-steps",
                    "2",
                    "--steps",
                    "2",
                    "--seeds",
                    "0",
                    "--device",
                    "cpu",
                    "--memory",
                    "low",
                    "--precision",
                    "bf16",
                    "--offline",
                    "--out",
                    "out",
                ],
            ]
        )
        == 0
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Memory"))
    assert "low: " in line and "asked for" in line and line.endswith(".")
    saved = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert saved["config"]["tuned_parameters"] == "lora" and saved["precision"] == "bfloat16"


def test_eight_bits(tmp_path):
    "Adam with eight bits, stopped and gone on with, where bitsandbytes is installed; a sentence where it is not."
    import torch
    from layerdiffusion.base import memory
    from layerdiffusion.base.core import refusal

    if not memory._has_8bit():
        from layerdiffusion.fine_tuning import adam

        assert "bitsandbytes" in refusal(adam, [torch.nn.Parameter(torch.ones(2))], 1e-3, True)
        assert "bitsandbytes" in refusal(memory.run_in, "8bit", None, None, pytest.fail), (
            "refused before anything is learnt"
        )
        return
    whole, interrupted = run(Full(), "8bit")[0], Full(("tuning", 4))
    from layerdiffusion import LayerDiffusion

    method = LayerDiffusion.from_pretrained("mini", "cpu")
    from layerdiffusion.base.sd import use

    use(method.models, memory.LEVELS["8bit"])

    def edit():
        return method.edit("example:dog", TEXT, point=(32, 36), seeds=[0], config=config(), callback=interrupted)

    with pytest.raises(torch.OutOfMemoryError):
        edit()
    assert torch.equal(edit().images, whole.images)


def test_a_small_change_is_not_rounded_away():
    """What 2e-6 a step changes is less than half a step of bfloat16 in most weights. Over many weights the whole of it
    arrives, in the model's own precision."""
    import torch
    from layerdiffusion.differences import apply_difference
    from layerdiffusion.base.sd import load_models

    models = load_models("mini", "cpu", torch.bfloat16)
    g, base = torch.Generator().manual_seed(0), models.unet.state_dict()
    change = {name: (1e-4 * torch.rand(w.shape, generator=g)).half() for name, w in base.items() if w.ndim > 1}
    drawn = apply_difference(models.unet, change).state_dict()

    def share(weights):
        return sum((weights[n].float() - base[n].float()).sum() for n in change) / sum(
            c.float().sum() for c in change.values()
        )

    assert abs(share(drawn) - 1) < 0.01
    assert share({n: (base[n].float() + c.float()).bfloat16() for n, c in change.items()}) < 0.9, (
        "else this test says nothing"
    )
    assert {w.dtype for w in drawn.values()} == {torch.bfloat16} == {p.dtype for p in models.unet.parameters()}


@pytest.mark.parametrize("kind", ["lora", "attention", "all"])
def test_early_looks_in_half_precision(kind):
    from layerdiffusion import EditConfig, LayerDiffusion

    looks, tiny = [], EditConfig(embedding_steps=0, tuning_steps=2, sampling_steps=2, tuned_parameters=kind)
    method = LayerDiffusion.from_pretrained("mini", "cpu", precision="bf16")
    method.edit(
        "example:dog",
        TEXT,
        point=(32, 36),
        seeds=[0],
        config=tiny,
        look_every=1,
        callback=lambda e: looks.append(e.image),
    )
    assert sum(x is not None for x in looks) == 2


def test_out_of_memory_in_the_first_step(monkeypatch):
    "The optimiser's state is half made then; the next level begins anew."
    import torch
    from layerdiffusion import EditConfig, LayerDiffusion
    from layerdiffusion.base.memory import run_in

    method, told, step = LayerDiffusion.from_pretrained("mini", "cpu"), [], torch.optim.Adam.step

    def full(self, *args):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = dict(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
        monkeypatch.setattr(torch.optim.Adam, "step", step)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.optim.Adam, "step", full)
    tiny = EditConfig(embedding_steps=0, tuning_steps=2, sampling_steps=2)
    result = run_in(
        "full",
        method,
        tiny,
        lambda c: method.edit("example:dog", TEXT, point=(32, 36), seeds=[0], config=c),
        say=told.append,
    )
    assert "going on at 'spare'" in told[0] and len(result.losses["tune"]) == 2


def test_learnt_words_where_parts_wait(monkeypatch):
    "The text encoder is awake whenever it is asked, and is asked once a step."
    from layerdiffusion import LayerDiffusion, preset
    from layerdiffusion.base.memory import LEVELS
    from layerdiffusion.base.sd import use

    method, moved = LayerDiffusion.from_pretrained("mini", "cpu"), []
    use(method.models, LEVELS["spare"])
    encoder, to = method.models.text_encoder, method.models.text_encoder.to
    monkeypatch.setattr(encoder, "to", lambda *a, **k: (moved.append(("to", a)), to(*a, **k))[1])
    encoder.register_forward_hook(lambda *_: moved.append("asked"))
    tiny = preset("paper", embedding_steps=3, tuning_steps=1, sampling_steps=1, learnt_words=2)
    method.edit("example:dog", TEXT, point=(32, 36), seeds=[0], config=tiny, source="a brown dog standing in a meadow")
    assert any(moved[i : i + 3] == ["asked"] * 3 for i in range(len(moved)))


def test_the_unet_that_sees_is_counted():
    "It stays beside the loaded one in every stage but the search for the mask, as large as it really is."
    from dataclasses import replace

    import torch
    from layerdiffusion import EditConfig
    from layerdiffusion.base.memory import predict
    from layerdiffusion.base.sd import load_models
    from layerdiffusion.identity import see_subject

    models, sam = load_models("mini"), torch.nn.Linear(8, 8)
    sam.image_encoder = torch.nn.Identity()
    sam.image_encoder.img_size = 8
    there, counted = replace(models, device=torch.device("cuda")), dict.fromkeys(("find", "draw", "decode"), 0)
    blind, sees = (predict(there, "spare", EditConfig(subject_scale=s), sam=sam, counted=counted) for s in (0.0, 1.0))
    mine = {p.data_ptr() for p in models.unet.parameters()}
    mask = torch.ones(1, 64, 64)
    new = [p for p in see_subject(models, torch.rand(3, 64, 64), mask).unet.parameters() if p.data_ptr() not in mine]
    kept = sum(p.numel() * p.element_size() for p in new)
    more = {stage: sees[stage] - blind[stage] for stage in blind}
    assert all(abs(n / kept - 1) < 0.15 for stage, n in more.items() if stage != "find"), (more, kept)
    assert more["find"] == 0


def test_sam_is_counted_where_the_place_is_kept():
    "With keep_place SAM's weights are there while it draws and decodes; a look larger than a step decides the peak."
    from dataclasses import replace

    import torch
    from layerdiffusion import EditConfig
    from layerdiffusion.base.masks import load_sam
    from layerdiffusion.base.memory import _weight_bytes, predict
    from layerdiffusion.base.sd import load_models

    models, sam = replace(load_models("mini"), device=torch.device("cuda")), load_sam("mini")

    def more(level, **counted):
        free, kept = (
            predict(models, level, EditConfig(keep_place=k), sam=sam, counted=dict(draw=0, decode=0, find=0) | counted)
            for k in (0.0, 0.1)
        )
        return {stage: kept[stage] - free[stage] for stage in kept if kept[stage] != free[stage]}

    eyes = _weight_bytes(sam)
    assert more("spare") == dict(draw=eyes, decode=eyes) and more("full") == {}  # there it is counted all the time
    assert more("full", draw=3, find=5) == dict(draw=2) and more("full", draw=5, find=3) == {}
