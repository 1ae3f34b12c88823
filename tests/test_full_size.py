"""The paper's model in its own shapes, with random weights and mostly a tenth of its width: every kind of folder and
file goes through the same code as mini.

Speed and memory on a GPU cannot be seen here; nothing below claims anything about them.
"""

import pytest

WORDS = "a corgi jumping over a log in an autumn forest"
KINDS = {
    "1.4 epsilon": ("1.4", None),
    "1.4 v": ("1.4", "v_prediction"),
    "1.4 sample": ("1.4", "sample"),
    "2.1 v": ("2.1", None),
    "2.1 epsilon": ("2.1", "epsilon"),
}


def short(**changes):
    from layerdiffusion import EditConfig

    return EditConfig(**dict(object_picture="input", embedding_steps=2, tuning_steps=2, sampling_steps=3) | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Folders and files, each made once."
    from layerdiffusion.evidence.full_size import _build_model, build_random_sam

    place, there = tmp_path_factory.mktemp("full"), {}

    def make(name, **changes):
        key = name, *changes.values()
        if key not in there:
            path = place / f"{len(there)}-{name}"
            if name.startswith("sam"):
                there[key] = build_random_sam(path, width=0.125, size=64, **changes)
            else:
                there[key] = _build_model(path, KINDS[name][0], 0.1, 64, KINDS[name][1], **changes)
        return there[key]

    return make


def picture(height=64, width=48):
    import torch

    return torch.nn.functional.interpolate(
        torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), (height, width), mode="bilinear"
    )[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_edit_from_every_kind_of_folder(made, tmp_path, kind):
    "By a click, so with Segment Anything from a file; saved, and drawn again by a model that is loaded anew."
    import torch
    from layerdiffusion import LayerDiffusion, load_edit

    folder, sam = made(kind), made("sam.pth" if kind.startswith("1") else "sam.safetensors")
    method = LayerDiffusion.from_pretrained(folder, "cpu", sam)
    models = method.models
    assert models.scheduler.config.prediction_type == (
        KINDS[kind][1] or ("v_prediction" if kind.startswith("2") else "epsilon")
    )
    assert (models.size, models.factor, models.text_length) == (64, 8, 77)
    result = method.edit(picture(), WORDS, point=(25, 30), seeds=[0, 1], config=short())
    assert result.images.shape == (2, 3, 64, 48) and result.images.isfinite().all() and result.images.std() > 0.01
    assert 0 < result.mask.mean() < 1 and result.difference and result.record["precision"] == "float32"
    again = load_edit(result.save(tmp_path / "edit"), LayerDiffusion.from_pretrained(folder, "cpu", sam))
    assert torch.equal(again.images, result.images)


def test_sam_files(made, tmp_path):
    """Both forms hold the same, the name of the file does not matter, and what is missing or wrong is said with the
    place to get it."""
    import torch
    from layerdiffusion.base.core import refusal
    from layerdiffusion.base.masks import find_mask, load_sam

    a, b = load_sam(made("sam.pth")), load_sam(made("sam.safetensors"))
    assert torch.equal(find_mask(a, picture(), point=(25, 30)), find_mask(b, picture(), point=(25, 30)))
    assert a.image_encoder.img_size == 64 and a.knows_boxes
    assert "dl.fbaipublicfiles.com" in refusal(load_sam, tmp_path / "sam_vit_h_4b8939.pth") and "2.56 GB" in refusal(
        load_sam, "vit_h"
    )
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "other.pth")
    assert "another kind of SAM" in refusal(load_sam, tmp_path / "other.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    import os
    import torch
    from layerdiffusion.base.core import refusal
    from layerdiffusion.base.masks import load_sam

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"x": Harmful()}, tmp_path / "sam.pth")
    assert "damaged" in refusal(load_sam, tmp_path / "sam.pth") and not (tmp_path / "harm").exists()


def test_half_precision(made):
    """The weights are bf16 and so is what they compute; embeddings, losses and pictures stay float32, for each kind of
    tuning."""
    import torch
    from layerdiffusion import LayerDiffusion

    method = LayerDiffusion.from_pretrained(made("1.4 epsilon"), "cpu", made("sam.pth"), precision="bf16")
    assert {p.dtype for p in method.models.unet.parameters()} == {torch.bfloat16}
    for kind in ("all", "lora"):
        result = method.edit(
            picture(), WORDS, point=(25, 30), seeds=[0], config=short(tuned_parameters=kind, tuning_lr=1e-3)
        )
        assert (
            all(e.dtype == torch.float32 for e in result.embeddings)
            and result.images.dtype == torch.float32
            and result.images.isfinite().all()
        )
        assert (
            result.difference
            and result.record["precision"] == "bfloat16"
            and all(x == x for xs in result.losses.values() for x in xs)
        )


def test_adam_keeps_float32_beside_half_weights(made):
    "What moves, its gradient and Adam's two numbers are float32, and the loaded weights stay as they are."
    import torch
    from layerdiffusion.fine_tuning import fine_tune
    from layerdiffusion.base.sd import encode_text, load_models

    models, seen = load_models(made("1.4 epsilon"), dtype=torch.bfloat16), []
    before = {k: v.clone() for k, v in models.unet.state_dict().items()}
    latents, mask = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, 8, 8)

    def keep(params, optimizer, losses):
        seen.append((params, optimizer))
        return 0

    tuned, losses = fine_tune(models, encode_text(models, WORDS), latents, mask, None, 0 * mask, steps=1, begin=keep)
    ((params, optimizer),) = seen
    assert {p.dtype for p in params} | {x.dtype for s in optimizer.state.values() for x in s.values()} == {
        torch.float32
    }
    assert all(torch.equal(v, before[k]) for k, v in models.unet.state_dict().items())


# Half precision beside single precision, on mini: its pictures mean something


@pytest.fixture(scope="module")
def two_precisions():
    "One edit of mini's world in fp32 and in bf16, with the same seeds, and the scores of its pictures."
    from layerdiffusion import LayerDiffusion
    from layerdiffusion.base.core import to_pil
    from layerdiffusion.mini.judge import load_judge
    from layerdiffusion.evidence.scores import Scorer, edit_set

    edit, results = edit_set("development")[0].edit, []
    for precision in ("fp32", "bf16"):
        method = LayerDiffusion.from_pretrained("mini", "cpu", precision=precision)
        results.append(
            method.edit(
                to_pil(edit.image),
                edit.text,
                mask=edit.mask,
                reference=to_pil(edit.reference),
                seeds=range(4),
                config=short(embedding_steps=20, tuning_steps=20, sampling_steps=10),
            )
        )
    method = LayerDiffusion.from_pretrained("mini", "cpu")
    scorer = Scorer(edit, method.models, method.sam, load_judge(), n=8)
    return results, [scorer(r.images) for r in results]


def test_half_precision_draws_the_same_pictures(two_precisions):
    (single, half), _ = two_precisions
    assert single.record["precision"] == "float32" and half.record["precision"] == "bfloat16"
    assert 0 < (single.images - half.images).abs().mean() < 0.01
    for stage in ("embed", "tune"):
        off = sum(abs(a - b) for a, b in zip(single.losses[stage], half.losses[stage], strict=False))
        assert off < 0.06 * sum(single.losses[stage])  # how bfloat16 is added up is the processor's own


def test_half_precision_scores_the_same(two_precisions):
    """The mean of each score moves by less than its 95 % interval over the seeds; one picture may fall to the other
    side of
    the judge's line."""
    import statistics

    _, (single, half) = two_precisions
    for field in ("valid", "right"):
        assert sum(a[field] != b[field] for a, b in zip(single, half, strict=False)) <= 1
    for field in ("identity", "background"):
        a, b = ([r[field] for r in rows] for rows in (single, half))
        assert abs(statistics.mean(a) - statistics.mean(b)) < 1.96 * statistics.stdev(a) / len(a) ** 0.5


def test_numbers_are_looked_at_now_and_then():
    """On a GPU the loop looks at its losses every sixteenth step. That changes no loss and no parameter, and what is no
    number still stops it."""
    import torch
    from layerdiffusion.base.core import refusal
    from layerdiffusion.base.sd import optimise

    def run(**how):
        w, told = torch.full((3,), 2.0, requires_grad=True), []
        losses = optimise(
            lambda step, g: (w - torch.randn(3, generator=g)).square().sum(),
            [w],
            10,
            0.1,
            "there",
            callback=lambda e: told.append(e.loss),
            **how,
        )
        return losses, w.tolist(), told

    each, some = run(), run(every=4)
    assert each[:2] == some[:2] and all(type(x) is float for x in some[0])
    assert each[2] == each[0] and some[2] == [None] * 3 + [some[0][3]] * 4 + [some[0][7]] * 2 + [some[0][9]]
    w = torch.ones(1, requires_grad=True)
    assert "'root' stopped at step 3" in refusal(
        optimise, lambda s, g: (w - 1).abs().sqrt().sum(), [w], 9, 0.1, "root", every=4
    )


# The benchmark of the full size, tried at a tenth of the width; no GPU is measured here


def test_bench(tmp_path):
    """The library and the plain loop do the same with random weights in v1.4's plan, and the table says how far each
    stage is from its limit."""
    from layerdiffusion.evidence import bench
    from layerdiffusion.base.core import environment
    from layerdiffusion.evidence.full_size import bench_job

    given = bench_job("tiny", tmp_path)
    job, config = (
        given["job"] | dict(seeds=[0, 1]),
        bench.schedule(
            embedding_steps=2, tuning_steps=2, sampling_steps=3, embedding_lr=1e-3, tuning_lr=2e-6, guidance_scale=7.5
        ),
    )
    ours, theirs = bench._Stopwatch(), bench._Stopwatch()
    library = bench._library_edit(
        config, "cpu", given["model"], job, ours, given["sam"], "fp32", dict(channels_last=True)
    )
    plain = bench._bare_edit(config, "cpu", given["model"], job, theirs, given["sam"])
    assert library.shape == plain.shape == (2, 3, 64, 64) and (library - plain).abs().mean() < 1e-5
    from layerdiffusion.base.sd import load_models

    flops = bench.stage_flops(load_models(given["model"]), config, 2)

    def run(watch, **more):
        return dict(stages=watch.stages, threads=1, config=config.model_dump(), **more)

    record = dict(
        start={},
        job=job,
        library=run(ours, flops=flops, rate=bench._product_rate("cpu", seconds=0.05)),
        plain=run(theirs),
        mean_difference=0.0,
        environment=environment(),
    )
    text = bench.table(record)
    assert (
        "of the limit" in text
        and "No GPU was measured." in text
        and all(
            any(line.startswith(stage) and "%" in line for line in text.splitlines())
            for stage in ("embed", "tune", "sample")
        )
    )


def test_flops():
    "Counted without numbers: what an edit of v1.4 costs in each step."
    from layerdiffusion.evidence.bench import schedule, stage_flops
    from layerdiffusion.evidence.full_size import _sd_models

    config = schedule()
    flops = stage_flops(_sd_models(), config, 1)
    assert (
        abs(flops["tune"] / config.tuning_steps / 2 / 1e12 - 2.407) < 0.01
        and abs((flops["sample"] - 100 * 0.803e12) / 1e12 - 2.5) < 0.1
    )


def test_everything_is_on_the_gpu():
    """A pretended GPU: tensors with shapes and a device, no numbers. Where two devices meet in one operation, PyTorch
    refuses; nothing else about a GPU can be seen here."""
    from pathlib import Path
    import torch
    from diffusers import DDIMScheduler
    from layerdiffusion.readings import trainable
    from layerdiffusion.evidence.full_size import _build_parts, clip_tokenizer, _sd_configs
    from layerdiffusion.base.memory import _shapes_only
    from layerdiffusion.method import layered_loss, noise_loss, sample_noise_and_t, stack_layers
    from layerdiffusion.base.sd import Models, decode_latents, encode_image, encode_text, initial_latents, speak_float32

    configs, tokenizer = _sd_configs("1.4", 0.1, 64), clip_tokenizer()
    scheduler = DDIMScheduler.from_config(configs["scheduler"])
    with _shapes_only():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                parts, tuned = (
                    _build_parts(configs),
                    _build_parts(configs)["unet"],
                )  # not `copy_unet`: PyTorch 2.14 frees a copied fake tensor's storage twice
        finally:
            torch.set_default_dtype(torch.float32)
        for part in (*parts.values(), tuned):
            part.eval().requires_grad_(False)
        for part in (parts["unet"], tuned, parts["text_encoder"]):
            speak_float32(part)
        models = Models(
            "pretended",
            Path("."),
            **parts,
            tokenizer=tokenizer,
            scheduler=scheduler,
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
        )
        words, latents, mask = (
            encode_text(models, WORDS),
            encode_image(models, torch.zeros(3, 64, 64)),
            torch.ones(1, 1, 8, 8, device="cuda"),
        )
        draws = sample_noise_and_t(scheduler, (2, *latents.shape[1:]), torch.Generator())
        trainable(tuned)
        pictures, weights = stack_layers(latents, mask, latents, 0 * mask)
        made = [
            words,
            latents,
            decode_latents(models, latents),
            initial_latents(models, [0, 1]),
            noise_loss(models.unet, scheduler, latents, *(d[:1] for d in draws), torch.cat([words, words], 1), mask),
            layered_loss(tuned, scheduler, pictures, weights, *draws, words.expand(2, -1, -1)),
        ]
    assert all(x.device.type == "cuda" and x.dtype == torch.float32 for x in made)
