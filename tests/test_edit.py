"""An edit that is killed, stopped, repeated, made with other models, or goes wrong.

Everything is done with the shipped mini or with small Stable Diffusion folders of random weights; nothing depends on
how well they draw.
"""

import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image, ImageDraw

TEXT = "a dog jumping in a forest"
WRITTEN = {
    "edit.json",
    "edit.safetensors",
    "input.png",
    "mask.png",
    "reference.png",
    "seed-0.png",
    "seed-1.png",
    "sheet.png",
}
STAGES = dict(reference=5, embeddings=14, tuning=10, drawing=5)
COMMAND = [
    "edit",
    "example:dog",
    TEXT,
    *[
        "--mask",
        "mask.png",
        "--embedding-steps",
        "14",
        "--tuning-steps",
        "10",
        "--steps",
        "5",
        "--seeds",
        "0-1",
        "--device",
        "cpu",
        "--out",
        "out",
    ],
]
DRAWN = [
    "edit",
    "example:dog",
    TEXT,
    *[
        "--mask",
        "mask.png",
        "--object-picture",
        "target",
        "--embedding-steps",
        "10",
        "--tuning-steps",
        "8",
        "--steps",
        "5",
        "--seeds",
        "0-1",
        "--device",
        "cpu",
        "--out",
        "out",
    ],
]  # with O_t = SD(T)


# A life is a process that runs the command. It is forked from a server that has imported the libraries, so that it
# starts at once.

lives = multiprocessing.get_context("forkserver")
lives.set_forkserver_preload(
    [
        "layerdiffusion.pipeline",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.unets.unet_2d_condition",
        "torch._dynamo",
        "diffusers.schedulers.scheduling_ddim",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.tokenization_clip",
        "tqdm.auto",
    ]
)
TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


class Watch:
    "stderr that sends this process a signal when a progress bar shows a step."

    def __init__(self, out, stage, step, send):
        self.out, self.stage, self.step, self.send = out, stage, step, send

    def __getattr__(self, name):
        return getattr(self.out, name)

    def write(self, text):
        self.out.write(text)
        if self.send and any(n >= self.step for n in shown(text, self.stage)):
            send, self.send = self.send, None
            os.kill(os.getpid(), send)


def shown(text, stage):
    return [int(n) for n in re.findall(rf"{stage}: .*?(\d+)/\d+ ", text)]


def run(args, folder, at=None, send=signal.SIGKILL):
    """The command in `folder`, what it says in the file `said`. It sends itself a signal at a step, where `at` is
    (stage, step), or before it
    touches one of its files: for the time number `at`, or one with `at` in its name."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    out = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(out, fd)
    from layerdiffusion import checkpoints
    from layerdiffusion.interface.cli import main

    checkpoints._Checkpoint.every = 0.2
    if isinstance(at, tuple):
        sys.stderr = Watch(sys.stderr, *at, send)
    touched = []

    def touch(event, values):
        if (
            event not in TOUCHES
            or not re.search(r"(^|/)\.?out\b", str(values[0]))
            or event == "open"
            and str(values[1])[0] == "r"
        ):
            return
        touched.append(values[0])
        if len(touched) == at or isinstance(at, str) and at in str(values[0]):
            os.kill(os.getpid(), send)

    sys.addaudithook(touch)
    sys.exit(main(args))


def begin(folder, *more, command=COMMAND, **how):
    "Start a life."
    life = lives.Process(target=run, args=([*command, *more], folder), kwargs=how)
    life.start()
    return life


def said(folder):
    return (folder / "said").read_text()


def end(life):
    life.join(300)
    return life.exitcode


def digest(folder):
    "What must not differ between two edits: tensors, pictures, losses and settings."
    from safetensors.torch import load_file

    tensors = hashlib.sha256()
    for name, x in sorted(load_file(folder / "edit.safetensors").items()):
        tensors.update(f"{name} {x.dtype} {tuple(x.shape)}".encode() + x.numpy().tobytes())
    settings = json.loads((folder / "edit.json").read_text())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.png")} | dict(
        tensors=tensors.hexdigest(), losses=settings["losses"], config=settings["config"]
    )


def mask_file(folder):
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).ellipse((16, 16, 48, 56), fill=255)
    mask.save(folder / "mask.png")
    return folder


def uninterrupted(folder, command):
    "The digest of an edit by an interpreter of its own."
    code = "import sys; from layerdiffusion.interface.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code, *command], cwd=mask_file(folder), check=True, capture_output=True)
    return digest(folder / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("whole"), COMMAND)


@pytest.fixture
def place(tmp_path):
    return mask_file(tmp_path)


def check_whole(place, whole, written=WRITTEN):
    assert digest(place / "out") == whole
    assert {p.name for p in (place / "out").iterdir()} == written
    assert {p.name for p in place.iterdir()} == {"out", "mask.png", "said"}


# Killed (SIGKILL), at any moment


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again(place, whole, seed):
    """Killed at random steps of every stage and at random touches of its files, each time going on from what was left:
    the same bytes in the end."""
    draw, exits, points = random.Random(seed), [], []
    for stage, steps in STAGES.items():  # what is trained is killed twice, the second time later
        points += [
            (stage, step)
            for step in sorted(draw.sample(range(1, steps - 1), 2 if stage in ("embeddings", "tuning") else 1))
        ]
    for at in (*points, *draw.sample(range(3, 30), 4)):
        exits.append(end(begin(place, "--resume", at=at)))
    assert exits[: len(points)] == [-signal.SIGKILL] * len(points) and set(exits) <= {-signal.SIGKILL, 0}, exits
    assert end(begin(place, "--resume")) == 0, said(place)
    check_whole(place, whole)


def test_killed_with_a_drawn_target(place, tmp_path_factory):
    """With O_t = SD(T): killed nine times at steps of all five stages and at touches of its files, and the same
    bytes in the end."""
    draw = random.Random(2)
    steps = [
        (stage, step)
        for stage, n, times in (
            ("target", 5, 1),
            ("reference", 5, 1),
            ("embeddings", 10, 3),
            ("tuning", 8, 3),
            ("drawing", 5, 1),
        )
        for step in sorted(draw.sample(range(1, n), times))
    ]
    exits = [end(begin(place, "--resume", command=DRAWN, at=at)) for at in (*steps, *draw.sample(range(3, 30), 3))]
    assert exits[: len(steps)] == [-signal.SIGKILL] * len(steps) and set(exits) <= {-signal.SIGKILL, 0}, exits
    assert end(begin(place, "--resume", command=DRAWN)) == 0, said(place)
    check_whole(
        place, uninterrupted(tmp_path_factory.mktemp("drawn"), DRAWN), WRITTEN | {"object.png", "object_mask.png"}
    )


# Ctrl-C


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c(place, whole, stage):
    "In every stage: exit code 130, one sentence that says how to go on, no half file, and the same bytes in the end."
    assert end(begin(place, at=(stage, STAGES[stage] // 2), send=signal.SIGINT)) == 130, said(place)
    last = said(place).splitlines()[-1]
    assert (
        last.startswith("layerdiffusion: Stopped by Ctrl-C") and last.endswith(".") and "Traceback" not in said(place)
    )
    kept = {"checkpoint-embeddings.safetensors", "checkpoint-tuning.safetensors"}
    if stage == "reference":
        assert "nothing was written" in last and not (place / "out").exists()
    else:
        assert "--resume" in last and {p.name for p in (place / "out").iterdir()} <= kept
    assert end(begin(place, "--resume")) == 0, said(place)
    check_whole(place, whole)


def test_ctrl_c_while_saving(place, whole):
    "Between the pictures that are written."
    assert end(begin(place, at="seed-0.png", send=signal.SIGINT)) == 130, said(place)
    assert "--resume" in said(place).splitlines()[-1] and "Traceback" not in said(place)
    assert {p.name for p in place.iterdir()} == {"out", "mask.png", "said"}
    assert end(begin(place, "--resume")) == 0, said(place)
    check_whole(place, whole)


# Many edits from one loaded model


@pytest.fixture(scope="module")
def method():
    from layerdiffusion import LayerDiffusion

    return LayerDiffusion.from_pretrained("mini", "cpu")


@pytest.fixture(scope="module")
def photos():
    "Three pictures of mini's world and their masks."
    from layerdiffusion.mini.world import render, sample_scenes, stream

    return render(sample_scenes(3, stream("held-out", 12), pose="standing", place="meadow"), 64)[:2]


def tiny(**changes):
    from layerdiffusion import EditConfig

    return EditConfig(**dict(object_picture="input", embedding_steps=2, tuning_steps=2, sampling_steps=2) | changes)


def edit(method, photos, i=0, text=TEXT, seeds=(0,), **changes):
    return method.edit(photos[0][i], text, mask=photos[1][i], seeds=list(seeds), config=tiny(**changes))


def anew(method):
    "The same loaded model, nothing computed yet."
    from layerdiffusion import LayerDiffusion

    return LayerDiffusion(method.models, method.sam)


def hash_of(module):
    from layerdiffusion.base.core import content_hash

    return content_hash(module.state_dict())


def equal(a, b):
    "Whether two edits are the same to the last bit."
    import torch

    same = [torch.equal(x, y) for x, y in zip((a.images, *a.embeddings), (b.images, *b.embeddings), strict=False)]
    return (
        all(same)
        and a.difference.keys() == b.difference.keys()
        and all(torch.equal(x, b.difference[k]) for k, x in a.difference.items())
        and a.losses == b.losses
    )


def test_edits_do_not_influence_each_other(method, photos):
    "Other pictures, words and kinds of tuning between two edits change neither the second nor the loaded model."
    parts = method.models.unet, method.models.vae, method.models.text_encoder
    before = [hash_of(part) for part in parts]
    first = edit(method, photos)
    edit(method, photos, 1, "a cat sitting on a beach", seed=7)
    edit(method, photos, 2, tuned_parameters="lora", scheduler="pndm")
    edit(method, photos, 0, tuned_parameters="attention", eq45_pictures="composite")
    assert equal(first, edit(anew(method), photos)) and equal(first, edit(method, photos))
    assert [hash_of(part) for part in parts] == before
    assert not any(p.requires_grad or p.grad is not None for part in parts for p in part.parameters())


def test_same_seed_same_bytes(method, photos, tmp_path):
    "Two freshly loaded models write the same files; another seed other ones."
    from layerdiffusion import LayerDiffusion

    for name, seed in dict(a=0, b=0, c=1).items():
        edit(LayerDiffusion.from_pretrained("mini", "cpu"), photos, seed=seed).save(tmp_path / name)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b and a["tensors"] != c["tensors"] and a["seed-0.png"] != c["seed-0.png"]


def test_a_picture_does_not_depend_on_its_company(method, photos):
    """The same list of seeds gives the same bytes. Beside others, in another order or in a batch of another length the
    processor may add up
    in another order, so that a value may be rounded to the next of the 256 levels, and no further."""
    many = edit(method, photos, seeds=range(5))
    words, difference, size, config = many.embeddings, many.difference, many.images.shape[-2:], many.config

    def draw(seeds, **how):
        return dict(zip(seeds, method.sample(words, difference, size, list(seeds), config, **how), strict=False))

    def levels(drawn):
        return max(
            ((drawn[s] * 255).round() - (many.images[s] * 255).round()).abs().max() for s in set(drawn) & set(range(5))
        )

    assert levels(draw(range(5))) == 0
    for seeds in ([4, 2, 0, 3, 1], [9, 3, 8, 1, 7], [3], [2, 9, 1]):
        assert levels(draw(seeds)) <= 1, seeds
    assert max(levels(draw(range(5), batch=1)), levels(draw(range(5), batch=3))) <= 1


def test_settings_from_a_file(method, photos, tmp_path):
    "The settings in edit.json, read back, repeat the edit."
    from layerdiffusion import EditConfig

    first = edit(method, photos, alpha=0.4, lambda_obj=3.0, eq8_first="opt", mask_resample="bilinear", seed=5)
    file = first.save(tmp_path / "edit") / "edit.json"
    saved = json.loads(file.read_text())
    config = EditConfig(**saved["config"])
    assert config == first.config == EditConfig.model_validate_json(json.dumps(saved["config"]))
    again = anew(method).edit(photos[0][0], saved["text"], mask=photos[1][0], seeds=saved["seeds"], config=config)
    assert equal(first, again)


# Numbers that are no numbers


@pytest.mark.parametrize(
    "stage, changes",
    [
        ("embeddings", dict(embedding_lr=1e30, embedding_steps=3)),
        ("tuning", dict(tuning_lr=1e30)),
        ("drawing", dict(tuning_lr=1e30, tuning_steps=1)),
    ],
)
def test_no_number_stops_with_a_sentence(method, photos, stage, changes):
    "It names the stage and what to try, and the loaded model is unharmed."
    from layerdiffusion import BadInput

    before, first = hash_of(method.models.unet), edit(method, photos)
    with pytest.raises(BadInput) as stop:
        edit(method, photos, **changes)
    sentence = str(stop.value)
    assert repr(stage) in sentence and "learning rate" in sentence and sentence.endswith(".") and "\n" not in sentence
    assert hash_of(method.models.unet) == before and equal(first, edit(anew(method), photos))


# Models of other kinds


def small_model(folder, prediction_type):
    """A Stable Diffusion folder in the manner of v1.4, with random weights: 4 channels, 77 tokens, factor 4, the PNDM
    class in its scheduler's settings."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from layerdiffusion.base.core import package_folder

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(package_folder() / "weights" / "mini" / "tokenizer", model_max_length=77)
    ids = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    parts = dict(
        unet=UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        vae=AutoencoderKL(
            3,
            3,
            ["DownEncoderBlock2D"] * 3,
            ["UpDecoderBlock2D"] * 3,
            (8, 8, 16),
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.18215,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=77,
                **ids,
            )
        ),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
    )
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
@pytest.mark.parametrize("height, width", [(64, 64), (40, 64)])
def test_other_models(tmp_path, prediction_type, scheduler, height, width):
    "A whole edit, saved and drawn again."
    import torch
    from layerdiffusion import LayerDiffusion, load_edit

    method = LayerDiffusion.from_pretrained(small_model(tmp_path / "model", prediction_type), "cpu", "mini")
    models = method.models
    assert (
        models.text_length,
        models.factor,
        models.size,
        models.scheduler.config.prediction_type,
        models.scheduler.config.steps_offset,
    ) == (77, 4, 64, prediction_type, 1)
    image, mask = (
        torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)),
        torch.zeros(1, height, width),
    )
    mask[:, 8:32, 8:40] = 1
    result = method.edit(
        image,
        "a small zebra leaping over a rope in the jungle",
        mask=mask,
        seeds=[0, 1],
        config=tiny(scheduler=scheduler),
    )
    assert (
        result.images.shape == (2, 3, height, width)
        and result.images.dtype == torch.float32
        and result.images.isfinite().all()
    )
    assert 0 <= result.images.min() < result.images.max() <= 1
    assert result.embeddings[0].shape == (1, 77, 24) and all(
        x.dtype == torch.float16 and x.isfinite().all() for x in result.difference.values()
    )
    assert all(x == x for losses in result.losses.values() for x in losses)
    again = load_edit(result.save(tmp_path / "edit"), LayerDiffusion.from_pretrained(tmp_path / "model", "cpu", "mini"))
    assert torch.equal(again.images, result.images) and again.config == result.config


@pytest.mark.filterwarnings("ignore:mini knows only")
@pytest.mark.parametrize("height, width", [(64, 40), (24, 64), (64, 96)])
def test_sizes(method, photos, tmp_path, height, width):
    """Mini with pictures that are not square: the longer side becomes the model's size, both are multiples of 8, and
    the file draws the same again."""
    import torch
    from layerdiffusion import load_edit

    image = torch.nn.functional.interpolate(photos[0][:1], (height, width), mode="bilinear")[0]
    mask = torch.nn.functional.interpolate(photos[1][:1], (height, width))[0, 0]
    Image.fromarray((mask * 255).byte().numpy()).save(tmp_path / "mask.png")
    result = method.edit(image, TEXT, mask=tmp_path / "mask.png", seeds=[0], config=tiny())
    h, w = result.images.shape[-2:]
    assert max(h, w) == 64 and h % 8 == w % 8 == 0 and abs(h / w - height / width) < 0.15
    assert (
        result.images.isfinite().all()
        and result.reference.shape == result.image.shape == (3, h, w)
        and result.mask.shape == (1, h, w)
    )
    assert torch.equal(load_edit(result.save(tmp_path / "edit"), method).images, result.images)
