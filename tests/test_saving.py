"An exported edit is drawn by diffusers alone, in a process that cannot import this library."

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from layerdiffusion.base.core import BadInput, Event, to_pil
from layerdiffusion.differences import low_rank
from layerdiffusion.pipeline import EditConfig, LayerDiffusion, load_edit
from layerdiffusion.interface.saving import export, pixels
from layerdiffusion.settings import preset

SHORT = EditConfig(embedding_steps=3, tuning_steps=8, sampling_steps=8, iterative_guidance=False)
SEEDS = [3, 5]

ALONE = """
import sys
sys.modules["layerdiffusion"] = None
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
kind, mini, folder, steps, guidance, *seeds = sys.argv[1:]
tuned = dict(unet=UNet2DConditionModel.from_pretrained(f"{folder}/unet")) if kind == "unet" else {}
pipe = StableDiffusionPipeline.from_pretrained(mini, **tuned)
if kind == "lora": pipe.load_lora_weights(folder)
words = {k: v for k, v in load_file(f"{folder}/embeddings.safetensors").items() if k != "object_embeds"}
given = dict(words, num_inference_steps=int(steps), guidance_scale=float(guidance), output_type="pt")
pictures = [pipe(**given, generator=torch.Generator().manual_seed(int(s))).images for s in seeds]
save_file({"images": torch.cat(pictures)}, f"{folder}/alone.safetensors")
"""


@pytest.fixture(scope="module")
def method():
    return LayerDiffusion.from_pretrained("mini")


@pytest.fixture(scope="module")
def edit(method):
    "A short edit whose U-Net has moved enough to be seen in the pictures."
    return method.edit(
        "example:dog",
        "a dog jumping in a forest",
        point=(32, 36),
        seeds=SEEDS,
        config=EditConfig(**SHORT.model_dump() | dict(tuning_lr=2e-4)),
    )


def run(code, *args):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=env,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr


def drawn_alone(kind, method, edit, folder):
    "What StableDiffusionPipeline draws from the model's folder and the exported files."
    config = edit.config
    run(ALONE, kind, method.models.folder, folder, config.sampling_steps, config.guidance_scale, *edit.seeds)
    return load_file(folder / "alone.safetensors")["images"]


def off(a, b):
    return (a - b).abs().mean().item()


def test_unet_draws_the_same(method, edit, tmp_path):
    "The same pictures to 1e-4 of the range from black to white, and not those of the untouched model."
    alone = drawn_alone("unet", method, edit, export(edit, method.models, tmp_path / "unet"))
    assert (alone - edit.images).abs().max() < 1e-4
    untouched = method.sample(edit.embeddings, {}, (64, 64), SEEDS, edit.config)
    assert off(untouched, edit.images) > 0.01


def test_lora_draws_what_the_low_rank_form_draws(method, edit, tmp_path, rank=8):
    "Nearer to our low-rank pictures than a tenth of what tuning changed: only vectors and small matrices differ."
    alone = drawn_alone("lora", method, edit, export(edit, method.models, tmp_path / "lora", kind="lora", rank=rank))
    ours = method.sample(edit.embeddings, low_rank(edit.difference, rank), (64, 64), SEEDS, edit.config)
    untouched = method.sample(edit.embeddings, {}, (64, 64), SEEDS, edit.config)
    assert off(alone, ours) < 0.1 * off(ours, untouched)
    assert off(alone, edit.images) < 0.5 * off(untouched, edit.images)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("unet", dict(eq8_first="opt")),
        ("unet", dict(guidance_scale=1.0)),
        ("unet", dict(scheduler="pndm")),
        ("lora", dict(eq8_index="timestep")),
    ],
)
def test_script_draws_the_whole_method(method, edit, tmp_path, kind, changes):
    """draw.py, with turns (Eq. 8): ours but for the rounding to 256 steps; the LoRA's nearer to ours than half of what
    tuning changed."""
    config = EditConfig(**edit.config.model_dump() | dict(iterative_guidance=True) | changes)
    ours, untouched = (
        method.sample(edit.embeddings, change, (64, 64), SEEDS, config) for change in (edit.difference, {})
    )
    folder = export(replace(edit, config=config, images=ours), method.models, tmp_path / "out", kind=kind, rank=24)
    run("import runpy, sys; sys.modules['layerdiffusion'] = None; runpy.run_path(sys.argv.pop(1))", folder / "draw.py")
    alone = torch.stack([pixels(folder / f"drawn-{s}.png") for s in SEEDS])
    if kind == "unet":
        assert (alone - ours).abs().max() < 1.01 / 255
    assert off(alone, ours) < 0.5 * off(untouched, ours)


def test_export_of_a_loaded_edit(method, edit, tmp_path):
    "An edit that was saved in the small form can be exported as well."
    loaded = load_edit(edit.save(tmp_path / "saved", rank=4), method)
    alone = drawn_alone("unet", method, edit, export(loaded, method.models, tmp_path / "unet"))
    assert (alone - loaded.images).abs().max() < 1e-4
    assert export(loaded, method.models, tmp_path / "lora", kind="lora", rank=4).is_dir()


def test_export_twice_and_refused(method, edit, tmp_path):
    "A second export takes the first one's place; what cannot be written leaves nothing."
    folder = tmp_path / "out"
    for _ in range(2):
        export(edit, method.models, folder)
    assert json.loads((folder / "settings.json").read_text())["seeds"] == SEEDS
    with pytest.raises(BadInput, match="unet or lora"):
        export(edit, method.models, tmp_path / "no", kind="gguf")
    with pytest.raises(BadInput, match="rank"):
        export(edit, method.models, tmp_path / "no", kind="lora", rank=0)
    with pytest.raises(BadInput, match="was made with"):
        export(replace(edit, record=dict(edit.record, model_hash="0")), method.models, tmp_path / "no")
    assert not (tmp_path / "no").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", ["paper", "best"])
def test_reuse_from_the_folder(method, tmp_path, name):
    "A saved edit, loaded into an object that knows nothing else, is reused with the same bytes as the one in memory."
    tiny = preset(name, embedding_steps=2, tuning_steps=3, sampling_steps=2, prior_batch=0)
    edit = method.edit(
        "example:dog",
        "a dog jumping in a forest",
        point=(32, 36),
        seeds=[1],
        config=tiny,
        source="a brown dog standing in a meadow",
    )
    loaded = load_edit(edit.save(tmp_path / "dog"), LayerDiffusion(method.models, method.sam))
    again = [
        LayerDiffusion(method.models, method.sam).reuse(e, "a dog lying in the snow", seeds=[1, 2], steps=2)
        for e in (edit, loaded)
    ]
    assert torch.equal(again[0].images, again[1].images) and again[1].record["reused"]["text"] == edit.text
    assert len(again[1].losses["tune"]) == 2 and again[1].config.tuning_lr == edit.config.tuning_lr
    assert torch.equal(load_edit(again[1].save(tmp_path / "again"), method).images, again[1].images)


def test_an_edit_that_saw_its_photo_is_drawn_again_with_it(method, tmp_path):
    """A saved edit with `subject_scale` looks at the photo beside it, and gives the same pictures; without the photo
    or its mask it cannot be drawn, and one sentence says so; what it learnt is there."""
    config = preset("paper", embedding_steps=1, tuning_steps=1, sampling_steps=2, subject_scale=0.8)
    edit = method.edit("example:dog", "a dog jumping in a forest", point=(32, 36), seeds=[1], config=config)
    folder, anew = edit.save(tmp_path / "dog"), LayerDiffusion(method.models, method.sam)
    assert torch.equal(load_edit(folder, anew).images, edit.images)
    for name in ("input.png", "mask.png"):
        kept, other = (folder / name).read_bytes(), to_pil(pixels(folder / name).flip(1))
        other.save(folder / name)
        assert not torch.equal(load_edit(folder, anew).images, edit.images), name
        (folder / name).unlink()
        with pytest.raises(BadInput, match="subject_scale 0.8.*lay input.png and mask.png beside"):
            load_edit(folder, anew)
        assert load_edit(folder, anew, draw=False).difference.keys() == edit.difference.keys()
        with pytest.raises(BadInput, match=r"input.png and mask.png must lie beside"):
            anew.reuse(load_edit(folder, anew, draw=False), "a dog lying in the snow")
        (folder / name).write_bytes(kept)


def test_an_edit_that_keeps_its_place_is_drawn_again_with_it(method, tmp_path):
    "The same pictures from its folder; others without keeping it, none without reference.png; no export keeps it."
    config = preset("paper", embedding_steps=1, tuning_steps=1, sampling_steps=4, keep_place=0.5)
    edit = method.edit("example:dog", "a dog jumping in a forest", point=(32, 36), seeds=[1], config=config)
    folder = edit.save(tmp_path / "dog")
    assert (load_edit(folder, method).images - edit.images).abs().max() < 1e-6
    free = load_edit(folder, method, keep_place=0.0)
    assert not torch.equal(free.images, edit.images)
    with pytest.raises(BadInput, match="The edit keeps its place .keep_place 0.5.*keep_place=0"):
        export(edit, method, tmp_path / "out")
    assert export(free, method, tmp_path / "out").is_dir()
    (folder / "reference.png").unlink()
    with pytest.raises(BadInput, match="With keep_place 0.5 .*lay reference.png beside"):
        load_edit(folder, method)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(method, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.warns(UserWarning, match="The run goes on without checkpoints"),
        method.checkpoint("tuning", "key", tmp_path / "file") as point,
    ):
        point.begin([torch.zeros(1)], torch.optim.Adam([torch.zeros(1, requires_grad=True)]), [])
        point.every = 0.0
        point(Event("tuning", 2, 2))
    assert point.path is None


def test_a_folder_holds_one_edit(edit, tmp_path):
    "Saved with fewer seeds into the same folder, no picture of the others stays; other files do."
    folder = edit.save(tmp_path / "dog", photo=edit.image)
    (folder / "seed-notes.txt").write_text("mine")
    replace(edit, images=edit.images[1:], seeds=SEEDS[1:], reference=None).save(folder)
    assert sorted(p.name for p in folder.glob("seed-*")) == [f"seed-{SEEDS[1]}.png", "seed-notes.txt"] and not [
        *folder.glob("full-*"),
        *folder.glob("reference*"),
    ]


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(tuning_steps=3), "made with its tuning_steps"),
        (dict(lambda_obj=1.0), "made with its lambda_obj"),
        (dict(alfa=1.0), "no setting 'alfa'"),
        (dict(alpha=3.0), "alpha is 3"),
    ],
)
def test_a_saved_edit_is_drawn_with_settings_of_the_drawing(method, edit, tmp_path, changes, said):
    folder = edit.save(tmp_path / "dog")
    with pytest.raises(BadInput, match=said):
        load_edit(folder, method, **changes)


def test_reuse_keeps_a_given_picture_of_the_object(method, tmp_path):
    "While T_a is the same; another T_a, or another picture, goes without it."
    other = method.edit(
        "example:dog",
        "a dog jumping in a forest",
        point=(32, 36),
        seeds=[1],
        config=SHORT,
        object_reference="example:cat",
    )
    loaded = load_edit(other.save(tmp_path / "dog"), method)
    assert loaded.record["object_given"] and torch.equal(loaded.object_image, other.object_image)
    place, pose, given = (
        LayerDiffusion(method.models, method.sam).reuse(loaded, text, seeds=[1], steps=2, **more)
        for text, more in (
            ("a dog jumping in the snow", {}),
            ("a dog lying in the snow", {}),
            ("a dog jumping in the snow", dict(object_reference="example:rabbit")),
        )
    )
    assert torch.equal(place.object_image, other.object_image) and place.record["object_given"]
    assert pose.object_image is None and not pose.record["object_given"]  # the photo itself again
    assert not torch.equal(given.object_image, other.object_image) and given.record["object_given"]


def test_a_missing_reference_is_refused_before_anything_is_drawn(method):
    seen = []
    with pytest.raises(BadInput, match="nowhere.png"):
        LayerDiffusion(method.models).edit(
            "example:dog",
            "a dog jumping in a forest",
            reference="nowhere.png",
            config=preset("best"),
            callback=seen.append,
        )
    assert not seen


def test_a_model_brings_its_own_sam_and_clip(method, tmp_path, monkeypatch):
    "A mini that somebody trained is used whole; without the two, those that are shipped."
    from layerdiffusion import pipeline

    folder = tmp_path / "mine"
    folder.mkdir()
    for part in method.models.folder.iterdir():
        (folder / part.name).symlink_to(part)
    mine, asked = LayerDiffusion.from_pretrained(str(folder), "cpu", offline=True), []
    monkeypatch.setattr(pipeline, "load_clip", lambda *a: asked.append(a))
    monkeypatch.setattr(pipeline, "propose_source", lambda *a: ["words"])
    assert (
        mine._sam == str(folder / "sam")
        and mine.propose(torch.zeros(3, 64, 64), "a dog") == "words"
        and asked == [(str(folder / "clip"), True)]
    )
    for part in ("sam", "clip"):
        (folder / part).unlink()
    assert LayerDiffusion.from_pretrained(str(folder), "cpu")._sam == "mini"


def test_points_and_seeds_of_numpy(method):
    import numpy as np
    from layerdiffusion.base.core import fit_points, load_image
    from layerdiffusion.pipeline import check_seeds

    image, fitted = load_image("example:dog"), torch.zeros(3, 64, 64)
    for point in (np.array([32, 36]), torch.tensor([32, 36]), (np.float32(32), np.int64(36))):
        assert fit_points(point, image, fitted) == fit_points((32, 36), image, fitted)
    assert fit_points(np.array([[32, 36], [1, 2]]), image, fitted) == fit_points([(32, 36), (1, 2)], image, fitted)
    for wrong in ((1, 2, 3), "here", 4, [(1, 2), 3]):
        with pytest.raises(BadInput, match="neither a point"):
            fit_points(wrong, image, fitted)
    assert check_seeds(np.arange(3)) == [0, 1, 2] and check_seeds(np.int64(4)) == [4]


def test_only_our_own_leavings_are_removed(tmp_path):
    "Hidden folders of processes that are gone, and checkpoints of the stages there are."
    from layerdiffusion.interface.saving import clear_checkpoints

    kept = {
        ".20240101",
        ".99999999-0123abcd.mine",
        f".{os.getpid()}-0123abcd.unfinished",
        "checkpoint-5.safetensors",
        "checkpoint-mine.safetensors",
        "file",
    }
    for name in kept | {".99999999-0123abcd.unfinished"}:
        (tmp_path / name).mkdir()
    for name in ("checkpoint-tuning.safetensors", ".checkpoint-tuning-0123abcd.safetensors"):
        (tmp_path / name).write_text("")
    clear_checkpoints(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("name", ["mask.png", "seed-12.png", "edit.json"])
def test_files_of_somebody_else_stay(edit, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(BadInput, match=f"holds '{name}'"):
        edit.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_an_edit_takes_the_place_of_an_edit(edit, tmp_path):
    for _ in range(2):
        edit.save(tmp_path / "dog")
    (tmp_path / "dog" / "notes.txt").write_text("mine")
    edit.save(tmp_path / "dog")
    assert (tmp_path / "dog" / "notes.txt").exists() and not [
        p for p in (tmp_path / "dog").iterdir() if p.name.startswith(".")
    ]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no second file system")
def test_save_to_another_disk(edit, tmp_path):
    "By a link, and where only the folder itself may be written."
    import shutil
    import tempfile

    real = tempfile.mkdtemp(dir="/dev/shm")
    try:
        (tmp_path / "link").symlink_to(real)
        edit.save(tmp_path / "link")
        assert "edit.safetensors" in os.listdir(real)
    finally:
        shutil.rmtree(real)


def test_a_foreign_format_is_refused(method, edit, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = edit.save(tmp_path / "dog") / "edit.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as f:
        settings = json.loads(f.metadata()["edit"])
    for wrong, said in (
        (settings | dict(format="layerdiffusion edit 2"), "has the format 'layerdiffusion edit 2'"),
        ({k: v for k, v in settings.items() if k != "config"}, "damaged"),
    ):
        save_file(tensors, file, {"edit": json.dumps(wrong)})
        with pytest.raises(BadInput, match=said):
            load_edit(file, method)
    save_file({k: v for k, v in tensors.items() if k != "e_a"}, file, {"edit": json.dumps(settings)})
    with pytest.raises(BadInput, match="damaged"):
        load_edit(file, method)


def first_weight(change):
    def alter(tensors, settings):
        name = next(n for n in sorted(tensors) if n.startswith("unet."))
        change(tensors, name)

    return alter


DAMAGED = [
    (
        "a weight that the U-Net has not",
        first_weight(lambda t, n: t.update({"unet.nothing.weight": t[n].clone()})),
        "nothing.weight",
    ),
    (
        "a weight of another size",
        first_weight(lambda t, n: t.update({n: t[n].flatten()[:3].clone()})),
        "no change of this model's U-Net",
    ),
    (
        "half of a product",
        first_weight(lambda t, n: t.update({f"{n}.up": torch.ones(3, 2)})),
        "no change of this model's U-Net",
    ),
    ("whole numbers", first_weight(lambda t, n: t.update({n: t[n].to(torch.int8)})), "no change of this model's U-Net"),
    ("settings of no kind", lambda t, s: s.update(config=5), "config is 5"),
    ("a setting gone", lambda t, s: s["config"].pop("tuning_steps"), "lack tuning_steps"),
    ("another setting", lambda t, s: s["config"].update(alpha=0.3), "settings were changed"),
    ("a setting gone, of old", lambda t, s: (s["config"].pop("alpha"), s.pop("config_hash")), "lack alpha"),
    ("no settings", lambda t, s: s.update(config={}), "lack alpha"),
    ("a size of text", lambda t, s: s.update(size="large"), "size is 'large'"),
    ("half a size", lambda t, s: s.update(size=[64]), r"size is \[64\]"),
    ("seeds of none", lambda t, s: s.update(seeds=None), "seeds is None"),
    ("no subject", lambda t, s: s.update(object=None), "object is None"),
    ("no model", lambda t, s: s.update(model=5), "model is 5"),
]


@pytest.mark.parametrize("name, change, said", DAMAGED, ids=[row[0] for row in DAMAGED])
def test_a_damaged_edit_is_refused(method, edit, tmp_path, name, change, said):
    "Never a traceback, and never another picture."
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = edit.save(tmp_path) / "edit.safetensors"
    with safe_open(file, "pt") as f:
        settings = json.loads(f.metadata()["edit"])
    tensors = load_file(file)
    change(tensors, settings)
    save_file(tensors, file, {"edit": json.dumps(settings)})
    with pytest.raises(BadInput, match=f"damaged.*{said}"):
        load_edit(file, method)


def test_an_edit_from_before_a_setting_loads(method, edit, tmp_path):
    """A setting that came later has its default, under which nothing changes; with a hash of the settings or, of
    old, without."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for without in (["lambda_prior"], ["negative_prompt", "config_hash"]):
        file = edit.save(tmp_path / without[0]) / "edit.safetensors"
        with safe_open(file, "pt") as f:
            settings = json.loads(f.metadata()["edit"])
        for name in without:
            (settings if name == "config_hash" else settings["config"]).pop(name)
        save_file(load_file(file), file, {"edit": json.dumps(settings)})
        again = load_edit(file, method)
        assert again.config == edit.config and torch.equal(again.images, edit.images)


def test_an_edit_of_the_first_settings_loads_as_what_it_was(method, edit, tmp_path):
    "Its hash is of version 1, where a drawn O_t was the default; with another picture named it was tampered with."
    from safetensors import safe_open
    from safetensors.torch import save_file

    from layerdiffusion.base.core import content_hash
    from layerdiffusion.settings import settings_key

    file = edit.save(tmp_path) / "edit.safetensors"
    with safe_open(file, "pt") as f:
        settings = json.loads(f.metadata()["edit"])
    settings["config"]["object_picture"] = "target"
    settings["config_hash"] = content_hash(settings_key(settings["config"], 1))
    tensors = load_file(file)
    save_file(tensors, file, {"edit": json.dumps(settings)})
    assert load_edit(file, method, draw=False).config.object_picture == "target"
    settings["config"]["object_picture"] = "input"
    save_file(tensors, file, {"edit": json.dumps(settings)})
    with pytest.raises(BadInput, match="settings were changed"):
        load_edit(file, method, draw=False)


def test_a_rank_beyond_every_matrix_costs_nothing(method, edit, tmp_path):
    "A LoRA has no more directions than its largest matrix: a million of them would fill the memory with zeros."
    folder = export(edit, method, tmp_path, "lora", 10**6)
    assert (
        max(
            x.shape[0]
            for n, x in load_file(folder / "pytorch_lora_weights.safetensors").items()
            if "lora_A" in n or "lora.down" in n
        )
        <= 1280
    )


def test_calls_of_another_kind(method, edit, tmp_path):
    edit.save(tmp_path)
    for call in (
        lambda: load_edit(None),
        lambda: load_edit(5),
        lambda: load_edit(tmp_path, 5),
        lambda: load_edit(tmp_path, [1]),
        lambda: export(None, method, tmp_path / "x"),
        lambda: export(edit, "mini", tmp_path / "x"),
        lambda: method.reuse(edit, "a dog lying in the snow", keep="x"),
    ):
        with pytest.raises(BadInput):
            call()


def test_calls_that_cannot_be_meant(method, edit):
    def call(**kw):
        return method.edit("example:dog", "a dog jumping in a forest", **kw)

    for kw, said in (
        (dict(mask=edit.mask, point=(1, 1)), "Both a mask"),
        (dict(config=dict(alpha=0.5)), "config is a dict"),
        (dict(seeds=None), "seeds are None"),
    ):
        with pytest.raises(BadInput, match=said):
            call(**kw)
    with pytest.raises(BadInput, match="load_edit"):
        method.reuse("edits/1", "a dog lying in the snow")
    with pytest.raises(BadInput, match="learning_rate|tuning_lr"):
        method.reuse(edit, "a dog lying in the snow", learning_rate=0.0)
    with pytest.raises(BadInput, match="rank is 0"):
        edit.tensors(0)


def test_a_saved_edit_comes_back_in_its_precision(tmp_path):
    half = LayerDiffusion.from_pretrained("mini", "cpu", precision="bf16")
    result = half.edit("example:dog", "a dog jumping in a forest", point=(32, 36), seeds=[1], config=SHORT)
    again = load_edit(result.save(tmp_path / "dog"))
    assert (
        torch.equal(again.images, result.images)
        and again.record["precision"] == result.record["precision"] == "bfloat16"
    )


def test_what_is_no_picture_and_no_mask(method):
    import numpy as np
    from layerdiffusion.base.core import load_image
    from layerdiffusion.pipeline import _read_mask

    white = np.full((9, 8, 3), 255, "uint8")
    assert (
        load_image(white).size
        == load_image(torch.ones(3, 9, 8)).size
        == load_image(torch.ones(1, 1, 9, 8)).size
        == (8, 9)
    )
    assert load_image(white / 255).size == load_image(torch.full((3, 9, 8), 255, dtype=torch.uint8)).size == (8, 9)
    for wrong, said in (
        (torch.full((3, 9, 8), 2.0), "from 0 to 1"),
        (torch.full((3, 9, 8), float("nan")), "NaN"),
        (torch.ones(2, 3, 9, 8), "not one picture"),
        (torch.ones(5, 9, 8), "not one picture"),
        (None, "NoneType"),
        (3, "a int"),
    ):
        with pytest.raises(BadInput, match=said):
            load_image(wrong)
    some = np.zeros((8, 8), bool)
    some[2:5, 2:5] = True
    assert _read_mask(some, 8, 8).sum() == _read_mask(torch.from_numpy(some)[None], 8, 8).sum() == 9
    assert _read_mask(some.astype("uint8") * 255, 8, 8).sum() == 9
    with pytest.raises(BadInput, match="holds 3 masks"):
        _read_mask(np.stack([some] * 3), 8, 8)


def test_a_model_by_name_and_by_its_owner(method, edit, tmp_path):
    "`load_edit` takes a name, `export` a `LayerDiffusion`."
    folder = edit.save(tmp_path / "dog")
    assert torch.equal(load_edit(folder, "mini").images, edit.images)
    assert (export(edit, method, tmp_path / "out") / "draw.py").is_file()


def test_offline_is_given_back():
    from huggingface_hub import constants
    from layerdiffusion.identity import _no_hub

    before, seen = constants.HF_HUB_OFFLINE, []
    try:
        constants.HF_HUB_OFFLINE = False
        for wanted in (True, False):
            with _no_hub(wanted):
                seen.append(constants.HF_HUB_OFFLINE)
        assert seen == [True, False] and not constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = before
