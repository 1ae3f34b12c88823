"""How large things are: a LoRA on disk, a change of low rank, results in memory, half precision, and what a process
takes beside what was said."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from layerdiffusion.base.core import refusal
from layerdiffusion.differences import (
    apply_difference,
    _change_of,
    changed,
    _dithered,
    _full_rank,
    left_out,
    low_rank,
    weight_difference,
)
from layerdiffusion.fine_tuning import fine_tune
from layerdiffusion.pipeline import EditConfig, LayerDiffusion, load_edit
from layerdiffusion.interface.saving import export

TEXT, SEEDS = "a dog jumping in a forest", [3, 5]
SHORT = dict(object_picture="input", embedding_steps=1, tuning_steps=4, sampling_steps=4, iterative_guidance=False)


@pytest.fixture(scope="module")
def method():
    return LayerDiffusion.from_pretrained("mini", "cpu")


def make(method, **changes):
    return method.edit("example:dog", TEXT, point=(32, 36), seeds=SEEDS, config=EditConfig(**SHORT | changes))


@pytest.fixture(scope="module")
def thin(method):
    return make(method, tuned_parameters="lora", lora_rank=4, tuning_lr=1e-2)


@pytest.fixture(scope="module")
def whole(method):
    return make(method, tuning_lr=2e-4)


def drawn_without(method, edit):
    return method.sample(edit.embeddings, {}, (64, 64), edit.seeds, edit.config)


def off(a, b):
    return (a - b).abs().mean().item()


# A LoRA stays one


def test_a_lora_is_kept_as_its_factors(method, thin, whole, tmp_path):
    "A file of a few kilobytes, the same pictures from it, and a change of the pictures that can be seen."
    file = thin.save(tmp_path / "thin") / "edit.safetensors"
    names = [name for name in load_file(file) if name.startswith("unet.")]
    assert names and all(name.endswith((".weight.up", ".weight.down")) for name in names)
    assert {x.shape[1] for name, x in thin.difference.items() if name.endswith(".up")} == {4}
    assert (
        file.stat().st_size < 250_000 < 1_000_000 < (whole.save(tmp_path / "whole") / "edit.safetensors").stat().st_size
    )
    assert json.loads((file.parent / "edit.json").read_text())["lora_alpha"] == 4
    loaded = load_edit(file, LayerDiffusion(method.models, method.sam))
    assert torch.equal(loaded.images, thin.images) and off(thin.images, drawn_without(method, thin)) > 0.005


@pytest.mark.parametrize("rank, kept", [(1, 1), (4, 4), (5000, 4)])
def test_alpha_is_the_rank_of_the_file(method, thin, tmp_path, rank, kept):
    "A LoRA saved with fewer directions than it has: whoever multiplies by alpha / rank multiplies by 1."
    folder = thin.save(tmp_path / "thin", rank=rank)
    ranks = {x.shape[1] for name, x in load_file(folder / "edit.safetensors").items() if name.endswith(".up")}
    assert ranks == {kept} and json.loads((folder / "edit.json").read_text())["lora_alpha"] == kept


def test_a_dense_file_of_an_older_version_is_read(method, thin, tmp_path):
    "Its LoRA was multiplied out; the pictures are those of the factors but for rounding."
    file = thin.save(tmp_path / "old") / "edit.safetensors"
    with safe_open(file, "pt") as f:
        header = f.metadata()
    kept = {name: x for name, x in load_file(file).items() if not name.startswith("unet.")}
    dense = {f"unet.{name}": change.half().contiguous() for name, change in _full_rank(thin.difference).items()}
    save_file(kept | dense, file, header)
    old = load_edit(file, method)
    assert off(old.images, thin.images) < 0.1 * off(thin.images, drawn_without(method, thin))
    folder = export(old, method, tmp_path / "lora", "lora", rank=4)
    assert {
        x.shape[0] for name, x in load_file(folder / "pytorch_lora_weights.safetensors").items() if "lora_A" in name
    } == {4}


def test_factors_are_the_change(method, thin):
    "What they add is what the tuned U-Net has more, and a U-Net that was changed afterwards is not taken for it."
    models, x = method.models, torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    words, mask = thin.embeddings[0], torch.ones(1, 1, 16, 16)
    tuned, _ = fine_tune(models, words, x, mask, None, 0 * mask, steps=2, learning_rate=1e-2, params="lora", rank=2)
    found, base = weight_difference(models.unet, tuned), models.unet.state_dict()
    for name in changed(found):
        assert torch.allclose(_change_of(found, name), tuned.state_dict()[name] - base[name], atol=1e-4)
    name = changed(found)[0]
    with torch.no_grad():
        tuned.state_dict()[name].add_(0.01)
    after = weight_difference(models.unet, tuned)
    assert name in after and torch.allclose(after[name].float(), _change_of(found, name) + 0.01, atol=1e-4)


def test_a_lora_is_reused(method, thin, tmp_path):
    "Begun with half of what was learnt: the factors of both, and the same pictures from the file."
    loaded = load_edit(thin.save(tmp_path / "thin"), method)
    again = method.reuse(loaded, "a dog lying in the snow", seeds=[1], steps=2, keep=0.5)
    assert {x.shape[1] for name, x in again.difference.items() if name.endswith(".up")} == {8} and len(
        again.difference
    ) == len(thin.difference)
    assert torch.equal(load_edit(again.save(tmp_path / "again"), method).images, again.images)
    kept = method.reuse(loaded, TEXT, seeds=[1], steps=0, keep=0.5).difference
    for name in changed(kept):
        assert torch.allclose(_change_of(kept, name), 0.5 * _change_of(thin.difference, name), atol=1e-4)


@pytest.mark.parametrize("rank", [None, 16, 1])
def test_diffusers_finds_a_lora_in_the_folder(method, thin, tmp_path, rank):
    "Its U-Net says what ours says with all directions, and something else with one."
    from diffusers import StableDiffusionPipeline

    folder = export(thin, method, tmp_path / "lora", "lora", **({} if rank is None else dict(rank=rank)))
    assert (folder / "pytorch_lora_weights.safetensors").stat().st_size < 250_000
    pipe = StableDiffusionPipeline.from_pretrained(method.models.folder, safety_checker=None)
    pipe.load_lora_weights(folder)
    x, words = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), thin.embeddings[0]
    with torch.no_grad():
        theirs, ours, untouched = (
            unet(x, 500, words).sample
            for unet in (pipe.unet, apply_difference(method.models.unet, thin.difference), method.models.unet)
        )
    far = off(ours, untouched)
    assert (0.01 * far < off(theirs, ours) < far) if rank == 1 else off(theirs, ours) < 1e-3 * far


def test_an_exported_lora_draws_our_pictures(method, thin, tmp_path):
    "By draw.py, in a process that cannot import this library: ours to the last of 256 steps."
    from layerdiffusion.interface.saving import pixels

    folder = export(thin, method, tmp_path / "lora", "lora")
    code = "import runpy, sys; sys.modules['layerdiffusion'] = None; runpy.run_path(sys.argv.pop(1))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "draw.py")],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | dict(HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stderr
    alone = torch.stack([pixels(folder / f"drawn-{seed}.png") for seed in SEEDS])
    assert (alone - thin.images).abs().max() < 1.6 / 255


# A small file of a whole change


def test_the_best_of_a_rank(whole):
    "What is left out is what the singular values say, less with each rank; vectors are kept."
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    one = {name: whole.difference[name]}
    s = torch.linalg.svdvals(one[name].float())
    for rank in (1, 4, 16):
        assert left_out(one, low_rank(one, rank)) == pytest.approx(
            (s[rank:].square().sum() / s.square().sum()).sqrt().item(), abs=2e-3
        )
        twice = low_rank(low_rank(one, 2 * rank), rank)
        assert left_out(one, twice) == pytest.approx(left_out(one, low_rank(one, rank)), abs=2e-3)
    middle = {n: x for n, x in whole.difference.items() if n.startswith("mid_block")}
    small = {rank: low_rank(middle, rank) for rank in (1, 4, 16, 64)}
    errors = [left_out(middle, change) for change in small.values()]
    assert 1 > errors[0] > errors[1] > errors[2] > errors[3] > 0
    vectors = {n: x for n, x in middle.items() if x.ndim == 1}
    assert vectors and all(torch.equal(small[1][n], x) for n, x in vectors.items())
    for wrong in (0, -1, 2.5, "4", True):
        assert "rank is" in refusal(low_rank, whole.difference, wrong)


def test_rank_on_the_command_line(whole, tmp_path, monkeypatch, capsys):
    """The file is small, the line says what is left out, edit.json too, and it is drawn again; without a rank all is
    kept."""
    from layerdiffusion.interface.cli import main

    monkeypatch.chdir(tmp_path)
    call = [
        "edit",
        "example:dog",
        TEXT,
        *[
            "--point",
            "32,36",
            "--object-picture",
            "input",
            "--embedding-steps",
            "1",
            "--tuning-steps",
            "1",
            "--steps",
            "2",
            "--seeds",
            "0",
            "--device",
            "cpu",
            "--offline",
            "--out",
        ],
    ]
    assert main([*call, "small", "--rank", "4"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Rank"))
    saved, full = (
        json.loads((folder / "edit.json").read_text())
        for folder in (tmp_path / "small", whole.save(tmp_path / "whole"))
    )
    assert saved["rank"] == 4 and 0 < saved["rank_error"] < 1 and f"{saved['rank_error']:.1%}" in line
    assert full["rank"] is None and "rank_error" not in full
    sizes = [(tmp_path / name / "edit.safetensors").stat().st_size for name in ("whole", "small")]
    assert sizes[1] < sizes[0] / 10 and f"{sizes[1] / 1e6:.1f} MB" in line
    assert load_edit(tmp_path / "small").images.isfinite().all()
    assert main([*call, "none", "--rank", "0"]) == 2 and not (tmp_path / "none").exists()


# What is kept in memory


def test_memory_kept_is_bounded(monkeypatch):
    """By bytes: the one not asked for the longest goes first, the newest stays whatever its size, and shared memory
    counts once."""
    from layerdiffusion import pipeline
    from layerdiffusion.pipeline import _Kept, held

    monkeypatch.setattr(pipeline, "_KEEP", 1000)
    kept, block = _Kept(), lambda n: torch.zeros(n, dtype=torch.uint8)
    for name in "abc":
        kept[name] = dict(x=block(300), losses=[0.1])
    kept.move_to_end("a")
    kept["d"] = (block(300), [block(50)])
    assert list(kept) == ["c", "a", "d"]
    kept["huge"] = block(5000)
    assert list(kept) == ["huge"]
    kept["small"] = block(1)
    assert list(kept) == ["small"]
    x = block(700)
    kept["view"], kept["same"] = x[:10], dict(x=x.view(7, 100))
    assert {"view", "same"} <= set(kept) and held(tuple(kept.values())) == 701
    assert held(torch.nn.Linear(10, 10)) == 440


def test_results_of_stages_are_bounded(method, monkeypatch):
    "Asked for again, what went is computed again, and what stayed is not."
    from layerdiffusion import pipeline

    fresh, made = LayerDiffusion(method.models, method.sam), []
    monkeypatch.setattr(pipeline, "_KEEP", 900)

    def ask(name):
        return fresh.cached("stage", [name], lambda key: made.append(name) or torch.zeros(100))

    for name in "ababc":
        ask(name)  # 400 bytes each, so two are kept
    assert made == ["a", "b", "c"]
    ask("b"), ask("a")
    assert made == ["a", "b", "c", "a"] and len(fresh.cache) == 2
    for key in "xyz":
        fresh.unfinished[key] = dict(param=torch.zeros(100))
    assert list(fresh.unfinished) == ["y", "z"]


# Half precision is half


@pytest.mark.parametrize("dtype, fine", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_rounding_keeps_the_mean(dtype, fine):
    "For any share of the last digit and both signs; numbers that fit stay, and float32 is not touched."
    for share in (0.05, 0.3, 0.5, 0.9):
        for sign in (1, -1):
            x = torch.full((5000,), sign * (1 + share * fine))
            y = _dithered(x, dtype).float()
            assert set(y.abs().tolist()) <= {1.0, 1 + fine} and abs((y.abs().mean() - 1) / fine - share) < 0.02
    x = torch.randn(999, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_dithered(x, torch.float32), x)
    assert torch.equal(_dithered(x.to(dtype).float(), dtype), x.to(dtype))
    assert (
        torch.equal(_dithered(x, dtype), _dithered(x, dtype))
        and (_dithered(x, dtype).float() - x).abs().max() <= fine * x.abs().max()
    )


@pytest.fixture(scope="module")
def half(method):
    return LayerDiffusion.from_pretrained("mini", "cpu", method.sam, precision="bf16")


def test_a_tuned_unet_stays_half(half, whole, thin):
    "Every parameter in the model's own precision, for a whole change and a LoRA, at home and in the stage that draws."
    seen = []
    for change in (whole.difference, thin.difference, {}):
        assert {p.dtype for p in apply_difference(half.models.unet, change).parameters()} == {torch.bfloat16}
    paint = half.paint
    half.paint = lambda unet, *a, **k: seen.append({p.dtype for p in unet.parameters()}) or paint(unet, *a, **k)
    half.sample(whole.embeddings, whole.difference, (64, 64), [0], whole.config)
    del half.paint
    assert seen == [{torch.bfloat16}]
    assert {p.dtype for p in apply_difference(half.models.unet, thin.difference, torch.float32).parameters()} == {
        torch.float32
    }


def test_small_changes_are_seen_in_half_precision(half, method):
    """At the paper's rate: pictures as near to those of exact weights as half precision is without any tuning, and far
    nearer than rounding to the nearest brings them."""
    unet, _x = half.models.unet, torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    edit = make(half, tuning_lr=2e-6, tuning_steps=40, sampling_steps=8)
    nearest, exact, plain = (
        apply_difference(unet, change, torch.float32) for change in (edit.difference, edit.difference, {})
    )
    for p in nearest.parameters():
        p.data = p.data.bfloat16()
    tuned = apply_difference(unet, edit.difference)

    def draw(unet):
        return half.paint(unet, edit.embeddings, (64, 64), SEEDS, edit.config)

    reference = draw(exact)
    moved, without = off(draw(plain), reference), off(draw(plain), draw(unet))
    assert off(draw(tuned), reference) < 2 * without + 0.05 * moved
    assert off(draw(tuned), reference) < 0.5 * off(draw(nearest), reference)


# What a process takes

MEASURE = """
import json, sys, torch
torch.set_num_threads(1)
folder, level, precision, kind = sys.argv[1:]
from layerdiffusion import EditConfig, LayerDiffusion
from layerdiffusion.base.memory import LEVELS, predict, settings_for
from layerdiffusion.base.sd import use
method = LayerDiffusion.from_pretrained(folder, "cpu", "mini", precision=precision)
short = dict(object_picture="input", embedding_steps=2, tuning_steps=2, sampling_steps=2)
config = EditConfig(tuned_parameters=kind, tuning_lr=1e-5, **short)
config = method.settings(settings_for(level, config, use(method.models, LEVELS[level]).card))
said = predict(method.models, level, config, seeds=1)
image, mask = torch.rand(3, 256, 256), torch.zeros(1, 256, 256)
mask[:, 64:128, 64:128] = 1
scene = method.prepare(image, "a dog jumping in a forest", mask=mask, reference=image, config=config)
def peak(work):
    open("/proc/self/clear_refs", "w").write("5")
    out = work()
    return out, 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
(*words, _), embed = peak(lambda: method.embed(scene, config))
(change, _), tune = peak(lambda: method.tune(scene, words, config))
_, sample = peak(lambda: method.sample(words, change, scene.size, [0], config))
drawn = max(said["draw"], said["decode"]) / sample
print(json.dumps(dict(embed=said["embed"] / embed, tune=said["tune"] / tune, sample=drawn)))
"""


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    "v1.4's plan at a quarter of its width: 53 million parameters in the U-Net."
    from layerdiffusion.evidence.full_size import _build_model

    return _build_model(tmp_path_factory.mktemp("medium") / "sd", width=0.25, size=256)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux counts a peak anew")
@pytest.mark.parametrize("level, precision, kind", [("full", "fp32", "all"), ("spare", "bf16", "attention")])
def test_what_a_process_takes_was_said(medium, level, precision, kind):
    """Within 15 % of the highest resident memory of a process of its own, for each stage, at the level, precision and
    kind of tuning."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(medium), level, precision, kind],
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout.splitlines()[-1])
    assert all(abs(ratio - 1) < 0.15 for ratio in ratios.values()), ratios


def test_nothing_waits_on_a_cpu(method):
    """Where the CPU is the device, a level that lets parts wait saves nothing by it; on a GPU it does, and SAM counts
    as long as it stays."""
    from layerdiffusion.base.memory import predict, _weight_bytes

    def on(device, level, sam=None):
        return predict(replace(method.models, device=torch.device(device)), level, seeds=1, sam=sam)

    full, spare = on("cpu", "full"), on("cpu", "spare")
    assert (
        all(abs(spare[stage] / full[stage] - 1) < 0.02 for stage in ("draw", "decode"))
        and spare["embed"] > 0.9 * full["embed"]
    )
    full, spare = on("cuda", "full"), on("cuda", "spare")
    assert all(spare[stage] < full[stage] for stage in full)
    seen = on("cuda", "full", method.sam), on("cuda", "spare", method.sam)
    assert seen[0]["tune"] == full["tune"] + _weight_bytes(method.sam) and seen[1]["tune"] == spare["tune"]
