"""The command line as a person uses it: every bad input, every kind of picture, a small real edit.

All commands run through `main`, in an empty folder. Nothing here depends on how well the mini models are trained.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from layerdiffusion.interface.cli import main
from layerdiffusion.base.core import example_path, package_folder

TEXT = "a dog jumping in a forest"
SHORT = ["--embedding-steps", "1", "--tuning-steps", "1", "--steps", "2", "--seeds", "0", "--device", "cpu"]
WRITTEN = {
    "edit.json",
    "edit.safetensors",
    "input.png",
    "mask.png",
    "reference.png",
    "seed-0.png",
    "sheet.png",
}
OBJECT = {"object.png", "object_mask.png"}  # written where the subject's picture is another than the photo


def ellipse(size=(64, 64)):
    mask = Image.new("L", size)
    w, h = size
    ImageDraw.Draw(mask).ellipse((w // 4, h // 4, 3 * w // 4, 7 * h // 8), fill=255)
    return mask


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs a command in an empty folder; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    ellipse().save("mask.png")

    def call(*args):
        code = main([str(a) for a in args])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def files():
    return sorted(str(p) for p in Path(".").rglob("*"))


# What is bad, in arguments, and words that its sentence must hold. {x} is a file of `prepare_bad_files`.
BAD = dict(
    missing_file=(["edit", "nowhere.png", TEXT], ["nowhere.png"]),
    not_a_picture=(["edit", "text.png", TEXT], ["text.png", "not a picture"]),
    cut_short=(["edit", "half.png", TEXT], ["half.png", "damaged"]),
    folder=(["edit", "folder", TEXT], ["folder", "is a folder"]),
    unknown_example=(["edit", "example:cow", TEXT], ["cow", "dog", "cat", "rabbit"]),
    empty_mask=(["edit", "example:dog", TEXT, "--mask", "empty.png"], ["mask", "empty"]),
    full_mask=(["edit", "example:dog", TEXT, "--mask", "full.png"], ["mask"]),
    mask_missing=(["edit", "example:dog", TEXT, "--mask", "nowhere.png"], ["nowhere.png"]),
    reference_missing=(
        ["edit", "example:dog", TEXT, "--mask", "mask.png", "--reference", "nowhere.png"],
        ["nowhere.png"],
    ),
    mask_and_point=(["edit", "example:dog", TEXT, "--mask", "mask.png", "--point", "3,3"], ["--mask", "--point"]),
    point_outside=(["edit", "example:dog", TEXT, "--point", "640,10"], ["640", "64"]),
    point_negative=(["edit", "example:dog", TEXT, "--point", "-3,10"], ["-3"]),
    point_form=(["edit", "example:dog", TEXT, "--point", "3"], ["--point", "'3'", "X,Y"]),
    point_nan=(["edit", "example:dog", TEXT, "--point", "nan,1"], ["nan,1"]),
    box_form=(["edit", "example:dog", TEXT, "--box", "1,2,3"], ["--box", "'1,2,3'"]),
    move_form=(["edit", "example:dog", TEXT, "--move", "0.2"], ["--move", "'0.2'", "DX,DY", "shares"]),
    move_nan=(["edit", "example:dog", TEXT, "--move", "nan,0"], ["--move", "nan,0"]),
    move_pixels=(["edit", "example:dog", TEXT, "--mask", "mask.png", "--move", "12,0"], ["(12, 0)", "-1 to 1"]),
    move_away=(
        ["edit", "example:dog", TEXT, "--mask", "mask.png", "--object-picture", "input", "--move", "-1,0"],
        ["-1", "nothing of the subject"],
    ),
    scale_zero=(["edit", "example:dog", TEXT, "--scale", "0"], ["--scale", "0.05"]),
    object_reference_missing=(["edit", "example:dog", TEXT, "--object-reference", "nowhere.png"], ["nowhere.png"]),
    object_mask_alone=(
        ["edit", "example:dog", TEXT, "--object-mask", "mask.png"],
        ["--object-mask", "--object-reference"],
    ),
    object_mask_empty=(
        [
            "edit",
            "example:dog",
            TEXT,
            "--mask",
            "mask.png",
            "--object-reference",
            "example:cat",
            "--object-mask",
            "empty.png",
        ],
        ["mask", "empty"],
    ),
    preset_unknown=(["edit", "example:dog", TEXT, "--preset", "worst"], ["worst", "best"]),
    preset_and_config=(
        ["edit", "example:dog", TEXT, "--preset", "best", "--config", "list.json"],
        ["--preset", "--config"],
    ),
    preview_ending=(["edit", "example:dog", TEXT, "--preview", "now.txt"], ["--preview", "now.txt", ".png"]),
    preview_folder=(["edit", "example:dog", TEXT, "--preview", "folder.png"], ["--preview", "is a folder"]),
    preview_below_file=(["edit", "example:dog", TEXT, "--preview", "text.png/now.png"], ["--preview", "text.png"]),
    look_every=(["edit", "example:dog", TEXT, "--look-every", "-5"], ["--look-every", "at least 0"]),
    unknown_word=(["edit", "example:dog", "a wombat jumping in a forest", "--mask", "mask.png"], ["wombat"]),
    too_long=(
        [
            "edit",
            "example:dog",
            TEXT,
            "--mask",
            "mask.png",
            "--object",
            "a dog" + " jumping" * 60,
            "--background",
            "in a forest",
        ],
        ["tokens"],
    ),
    no_place=(["edit", "example:dog", "a dog jumping", "--mask", "mask.png"], ["place", "--background"]),
    empty_text=(["edit", "example:dog", "", "--mask", "mask.png"], ["empty"]),
    alpha_high=(["edit", "example:dog", TEXT, "--alpha", "1.5"], ["--alpha", "1.5", "between 0 and 1"]),
    alpha_low=(["edit", "example:dog", TEXT, "--alpha", "-0.1"], ["--alpha", "-0.1"]),
    alpha_nan=(["edit", "example:dog", TEXT, "--alpha", "nan"], ["--alpha", "nan"]),
    alpha_word=(["edit", "example:dog", TEXT, "--alpha", "much"], ["--alpha"]),
    steps=(["edit", "example:dog", TEXT, "--steps", "0"], ["--steps", "0"]),
    embedding_steps=(
        ["edit", "example:dog", TEXT, "--embedding-steps", "-1"],
        ["--embedding-steps", "at least 0", "-1"],
    ),
    tuning_steps=(["edit", "example:dog", TEXT, "--tuning-steps", "-4"], ["--tuning-steps", "-4"]),
    steps_many=(["edit", "example:dog", TEXT, "--steps", "1001"], ["--steps", "1001"]),
    lambda_negative=(["edit", "example:dog", TEXT, "--lambda-obj", "-1"], ["--lambda-obj", "-1"]),
    learning_rate_zero=(["edit", "example:dog", TEXT, "--tuning-lr", "0"], ["--tuning-lr"]),
    choice=(["edit", "example:dog", TEXT, "--eq2-region", "sky"], ["sky", "background"]),
    seeds_word=(["edit", "example:dog", TEXT, "--seeds", "many"], ["--seeds", "many"]),
    seeds_backwards=(["edit", "example:dog", TEXT, "--seeds", "5-2"], ["5-2"]),
    seeds_twice=(["edit", "example:dog", TEXT, "--seeds", "1,1"], ["1,1", "twice"]),
    seeds_negative=(["edit", "example:dog", TEXT, "--seeds", "-1"], ["-1"]),
    seeds_none=(["edit", "example:dog", TEXT, "--seeds", ""], ["--seeds"]),
    out_below_file=(["edit", "example:dog", TEXT, "--out", "text.png/x"], ["--out", "text.png/x"]),
    out_is_file=(["edit", "example:dog", TEXT, "--out", "text.png"], ["--out", "text.png"]),
    out_long=(["edit", "example:dog", TEXT, "--out", "x" * 300], ["--out", "xxx...", "name too long"]),
    out_long_inside=(["edit", "example:dog", TEXT, "--out", "a/" + "x" * 300 + "/b"], ["--out", "name too long"]),
    out_of_nobody=(["edit", "example:dog", TEXT, "--out", "~nobody-at-all/x"], ["--out", "~nobody-at-all"]),
    preview_long=(["edit", "example:dog", TEXT, "--preview", "x" * 300 + ".png"], ["--preview", "name too long"]),
    config_long=(["edit", "example:dog", TEXT, "--config", "x" * 300], ["--config", "name too long"]),
    train_out_long=(["train-mini", "vae", "--out", "x" * 300], ["--out", "name too long"]),
    experiment_out_long=(["experiment", "alpha", "--out", "x" * 300], ["--out", "name too long"]),
    bench_out_long=(["bench", "--out", "x" * 300], ["--out", "name too long"]),
    export_out_long=(["export", "folder", "--out", "x" * 300], ["--out", "name too long"]),
    export_folder_long=(["export", "x" * 300], ["name too long"]),
    export_nothing=(["export", "folder"], ["no saved edit", "folder"]),
    export_kind=(["export", "folder", "--kind", "gguf"], ["gguf", "lora"]),
    out_unwritable=(["edit", "example:dog", TEXT, "--out", "/proc/nobody/x"], ["--out", "/proc/nobody/x"]),
    model_missing=(["edit", "example:dog", TEXT, "--model", "no-such-model"], ["no-such-model"]),
    model_empty=(["edit", "example:dog", TEXT, "--model", "folder"], ["folder"]),
    model_truncated=(["edit", "example:dog", TEXT, "--model", "truncated"], ["cut short", "unet"]),
    model_no_weights=(["edit", "example:dog", TEXT, "--model", "weightless"], ["no weights", "unet"]),
    sam_missing=(["edit", "example:dog", TEXT, "--sam", "no-such-sam", "--point", "30,30"], ["no-such-sam"]),
    device_missing=(["edit", "example:dog", TEXT, "--device", "cuda:99"], ["cuda:99"]),
    device_unknown=(["edit", "example:dog", TEXT, "--device", "abacus"], ["abacus"]),
    config_missing=(["edit", "example:dog", TEXT, "--config", "nowhere.json"], ["nowhere.json"]),
    config_not_json=(["edit", "example:dog", TEXT, "--config", "text.png"], ["text.png", "JSON"]),
    config_list=(["edit", "example:dog", TEXT, "--config", "list.json"], ["list.json"]),
    config_unknown=(["edit", "example:dog", TEXT, "--config", "unknown.json"], ["lambda_three"]),
    no_text=(["edit", "example:dog"], ["text"]),
    unknown_option=(["edit", "example:dog", TEXT, "--strength", "3"], ["--strength"]),
    unknown_command=(["paint"], ["paint"]),
    examples_out=(["examples", "--out", "text.png/x"], ["text.png"]),
    train_stage=(["train-mini", "poetry"], ["poetry", "vae", "diffusion"]),
    train_minutes=(["train-mini", "vae", "--minutes", "0"], ["--minutes", "0"]),
    train_level=(["train-mini", "vae", "--level", "2"], ["--level", "2"]),
    train_order=(["train-mini", "diffusion", "--out", "run"], ["vae"]),
    check_folder=(["check-mini", "--model", "folder"], ["folder"]),
    bench_device=(["bench", "--device", "cuda:99"], ["cuda:99"]),
)


def prepare_bad_files():
    Path("text.png").write_text("I am not a picture.")
    whole = example_path("dog").read_bytes()
    Path("half.png").write_bytes(whole[: len(whole) // 2])
    Path("folder").mkdir()
    Path("folder.png").mkdir()
    Image.new("L", (64, 64)).save("empty.png")
    Image.new("L", (64, 64), 255).save("full.png")
    Path("list.json").write_text("[1, 2]")
    Path("unknown.json").write_text('{"lambda_three": 3}')


def prepare_bad_models(name):
    if name not in ("truncated", "weightless"):
        return
    parts = shutil.ignore_patterns("clip", "judge", "sam")
    shutil.copytree(package_folder() / "weights" / "mini", name, ignore=parts)
    weights = Path(name) / "unet" / "diffusion_pytorch_model.safetensors"
    if name == "weightless":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1000])


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run, name):
    args, words = BAD[name]
    prepare_bad_files()
    prepare_bad_models(args[-1])
    before = files()
    code, out, err = run(*args)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("layerdiffusion: ") and lines[0].endswith("."), err
    for word in words:
        assert word.lower() in lines[0].lower()
    assert files() == before


def test_numbers_that_are_no_numbers(run):
    code, out, err = run(
        "edit",
        "example:dog",
        TEXT,
        "--mask",
        "mask.png",
        *SHORT,
        "--tuning-steps",
        4,
        "--tuning-lr",
        "1e30",
        "--out",
        "out",
    )
    last = [line for line in err.splitlines() if line.strip()][-1]
    assert code == 2 and last.startswith("layerdiffusion: ") and "learning rate" in last
    assert files() == ["mask.png"]


def test_edit_writes_everything_and_repeats(run):
    first = run("edit", "example:dog", TEXT, "--mask", "mask.png", *SHORT, "--out", "a")
    assert first[0] == 0 and "a dog jumping | in a forest" in first[1] and "sheet.png" in first[1]
    assert run("edit", "example:dog", TEXT, "--mask", "mask.png", *SHORT, "--out", "b")[0] == 0
    assert {p.name for p in Path("a").iterdir()} == WRITTEN
    for name in WRITTEN - {"edit.json", "edit.safetensors"}:
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes(), name
    from safetensors.torch import load_file

    a, b = (load_file(Path(x, "edit.safetensors")) for x in "ab")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    settings = json.loads(Path("a", "edit.json").read_text())
    for key in (
        "text",
        "object",
        "background",
        "seeds",
        "config",
        "model",
        "model_hash",
        "torch",
        "diffusers",
        "seconds",
    ):
        assert key in settings
    assert settings["config"]["tuning_steps"] == 1 and settings["seeds"] == [0]


def test_folders_are_numbered_and_settings_reused(run):
    assert run("edit", "example:dog", TEXT, "--mask", "mask.png", *SHORT, "--alpha", ".4")[0] == 0
    again = [a for a in SHORT if a not in ("--embedding-steps", "--tuning-steps", "1")]
    assert (
        run(
            "edit",
            "example:dog",
            TEXT,
            "--mask",
            "mask.png",
            *again,
            "--config",
            "edits/dog-1/edit.json",
            "--lambda-obj",
            "3",
        )[0]
        == 0
    )
    config = json.loads(Path("edits/dog-2/edit.json").read_text())["config"]
    assert (config["alpha"], config["lambda_obj"], config["embedding_steps"]) == (0.4, 3, 1)


def same_results(a, b, but=()):
    """Two folders hold the same pictures and tensors, byte for byte."""
    from safetensors.torch import load_file

    names = [{p.name for p in Path(x).iterdir()} - set(but) for x in (a, b)]
    assert names[0] == names[1]
    for name in names[0] - {"edit.json", "edit.safetensors"}:
        assert Path(a, name).read_bytes() == Path(b, name).read_bytes(), name
    tensors = [load_file(Path(x, "edit.safetensors")) for x in (a, b)]
    assert tensors[0].keys() == tensors[1].keys() and all((tensors[0][k] == tensors[1][k]).all() for k in tensors[0])


def test_watching_changes_nothing(run):
    """--preview and --look-every show pictures and leave the results as they are."""
    steps = [
        "--embedding-steps",
        "2",
        "--tuning-steps",
        "5",
        "--steps",
        "3",
        "--seeds",
        "0-1",
        "--device",
        "cpu",
        "--mask",
        "mask.png",
    ]
    assert run("edit", "example:dog", TEXT, *steps, "--out", "a")[0] == 0
    code, out, err = run(
        "edit", "example:dog", TEXT, *steps, "--out", "b", "--preview", "seen/now.png", "--look-every", 2
    )
    assert code == 0 and "looks.png" in out
    same_results("a", "b", but=["looks.png"])
    assert files() == sorted(
        [
            "a",
            "b",
            "mask.png",
            "seen",
            "seen/now.png",
            "b/looks.png",
            *(f"{x}/{name}" for x in "ab" for name in WRITTEN | {"seed-1.png"}),
        ]
    )
    assert Image.open("seen/now.png").size[0] > Image.open("seen/now.png").size[1]  # two seeds, side by side
    assert Image.open("b/looks.png").size[0] // 160 == 3  # steps 2, 4 and the last


def test_moved_subject_is_shown_saved_and_repeated(run):
    photo = ["--mask", "mask.png", "--object-picture", "input", *SHORT]
    assert run("edit", "example:dog", TEXT, *photo, "--out", "plain")[0] == 0
    code, out, err = run("edit", "example:dog", TEXT, *photo, "--move", "-0.2,0.05", "--scale", ".5", "--out", "a")
    assert code == 0 and "Eq. 4" in out
    assert {p.name for p in Path("a").iterdir()} == WRITTEN | OBJECT
    assert {p.name for p in Path("plain").iterdir()} == WRITTEN
    saved = json.loads(Path("a/edit.json").read_text())
    assert (saved["move"], saved["scale"]) == ([-0.2, 0.05], 0.5)
    before, after = (Image.open(f"a/{name}.png").convert("L").getbbox() for name in ("mask", "object_mask"))
    assert after[2] - after[0] < before[2] - before[0] and after[0] + after[2] < before[0] + before[2]
    assert Path("a/seed-0.png").read_bytes() != Path("plain/seed-0.png").read_bytes()
    again = ["--seeds", "0", "--device", "cpu", "--mask", "mask.png", "--config", "a/edit.json"]
    assert run("edit", "example:dog", TEXT, *again, "--out", "b")[0] == 0
    same_results("a", "b")
    assert run("edit", "example:dog", TEXT, *again, "--move", "0,0", "--scale", 1, "--out", "c")[0] == 0
    same_results("c", "plain")


def test_another_picture_of_the_object(run):
    code, out, err = run(
        "edit",
        "example:dog",
        TEXT,
        "--mask",
        "mask.png",
        *SHORT,
        "--object-reference",
        "example:cat",
        "--object-mask",
        "mask.png",
        "--out",
        "a",
    )
    assert code == 0, err
    assert (
        Path("a/object.png").read_bytes() == example_path("cat").read_bytes()
        or Image.open("a/object.png").tobytes() == Image.open(example_path("cat")).convert("RGB").tobytes()
    )
    assert Image.open("a/object_mask.png").convert("L").tobytes() == ellipse().tobytes()


def noise(size=(64, 64)):
    return Image.effect_noise(size, 120).convert("RGB")


def exif_rotated(path):
    image, exif = noise((64, 40)), Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


PICTURES = dict(
    rgba=("a.png", (64, 64), lambda p: noise().convert("RGBA").save(p)),
    grey=("a.png", (64, 64), lambda p: noise().convert("L").save(p)),
    palette=("a.png", (64, 64), lambda p: noise().convert("P").save(p)),
    cmyk=("a.jpg", (64, 64), lambda p: noise().convert("CMYK").save(p)),
    bits16=("a.png", (64, 64), lambda p: Image.new("I;16", (64, 64), 30000).save(p)),
    webp=("a.webp", (64, 64), lambda p: noise().save(p)),
    exif=("a.jpg", (40, 64), exif_rotated),
    wide=("a.png", (200, 120), lambda p: noise((200, 120)).save(p)),
    tiny=("a.png", (5, 5), lambda p: noise((5, 5)).save(p)),
    huge=("a.jpg", (5000, 4000), lambda p: noise((5000, 4000)).save(p)),
)


@pytest.mark.parametrize("kind", PICTURES)
def test_real_pictures(run, kind):
    name, size, save = PICTURES[kind]
    save(name)
    ellipse(size if min(size) > 8 else (50, 50)).save("mask.png")
    code, out, err = run("edit", name, TEXT, "--mask", "mask.png", *SHORT, "--out", "out")
    assert code == 0, err
    w, h = Image.open("out/seed-0.png").size
    assert max(w, h) == 64 and w % 8 == h % 8 == 0 and abs(w / h - size[0] / size[1]) < 0.15


def test_photo_that_mini_cannot_represent(run):
    noise().save("photo.png")
    code, out, err = run("edit", "photo.png", TEXT, "--mask", "mask.png", *SHORT, "--out", "out")
    assert code == 0 and "mini knows only" in err and "--model CompVis/stable-diffusion-v1-4" in err


def test_examples(run):
    code, out, err = run("examples", "--out", "pictures")
    assert code == 0 and {"dog.png", "cat.png", "rabbit.png"} <= {p.name for p in Path("pictures").iterdir()}
    assert "example:dog" in run("examples")[1]


def test_help_is_light():
    """Help answers without torch."""
    check = (
        "import sys; from layerdiffusion.interface.cli import main; c = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(c)"
    )
    for args in (["--help"], ["edit", "--help"], ["train-mini", "--help"], ["bench", "-h"]):
        out = subprocess.run([sys.executable, "-c", check, *args], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        assert "Usage: layerdiffusion" in out.stdout


def test_unexpected_errors_ask_for_a_report(run, monkeypatch):
    import layerdiffusion.interface.cli as cli

    def breaks(*a):
        raise KeyError("deep inside")

    monkeypatch.setattr(cli, "_read_request", breaks)
    code, out, err = run("edit", "example:dog", TEXT)
    assert code == 1 and "--debug" in err and "Traceback" not in err and len(err.splitlines()) == 1
    with pytest.raises(KeyError):
        main(["edit", "example:dog", TEXT, "--debug"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 640000000000 bytes."
        ),
    ],
)
def test_memory_that_is_not_there(run, monkeypatch, error):
    "On a CPU too: what to do about it, and no request for a report."
    import layerdiffusion.interface.cli as cli

    def breaks(*a):
        raise error

    monkeypatch.setattr(cli, "_read_request", breaks)
    code, out, err = run("edit", "example:dog", TEXT)
    assert code == 1 and "ran out of memory" in err and "--memory low" in err and len(err.splitlines()) == 1


PRESSED = """
import os, signal, sys
from layerdiffusion.interface.cli import main
write, pressed = sys.stderr.write, []
def press(text):
    "The command presses Ctrl-C itself, as soon as it shows a step: on a quick machine too something is left to do."
    write(text)
    if "embeddings" in text and not pressed: pressed.append(os.kill(os.getpid(), signal.SIGINT))
sys.stderr.write = press
sys.exit(main())
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_and_resume(run):
    """Ctrl-C ends with 130 and a sentence; --resume ends with the bytes of a run that was never stopped."""
    steps = [
        "--embedding-steps",
        "30",
        "--tuning-steps",
        "1",
        "--steps",
        "1",
        "--seeds",
        "0",
        "--device",
        "cpu",
        "--mask",
        "mask.png",
    ]
    command = [sys.executable, "-c", PRESSED, "edit", "example:dog", TEXT, *steps, "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130 and "Stopped by Ctrl-C" in done.stderr and "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in Path("out").iterdir()} == {"checkpoint-embeddings.safetensors"}
    fitted = sorted(Path("out").glob("checkpoint-*"))
    Image.new("L", (64, 64)).save("empty.png")
    assert run("edit", "example:dog", TEXT, *steps, "--out", "out", "--resume", "--mask", "empty.png")[0] == 2
    assert fitted and sorted(Path("out").glob("checkpoint-*")) == fitted, (
        "a wrong mask beside --resume loses what was fitted"
    )
    assert run("edit", "example:dog", TEXT, *steps, "--out", "out", "--resume")[0] == 0
    assert {p.name for p in Path("out").iterdir()} == WRITTEN
    assert run("edit", "example:dog", TEXT, *steps, "--out", "whole")[0] == 0
    for name in ("seed-0.png", "sheet.png"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_every_place_has_the_declared_settings():
    "Options, fields, the tables of the docs: the declared set and its defaults; each in one of three groups."
    from layerdiffusion.interface.cli import _GROUPED, _METHOD
    from layerdiffusion.evidence.docs import parameters
    from layerdiffusion.settings import DEFAULTS, GROUPS, SETTINGS, EditConfig

    assert set(EditConfig.model_fields) - {"preset"} == set(SETTINGS) == set(DEFAULTS)
    assert [opt.name for opts in _GROUPED.values() for opt in opts] == [opt.name for opt in _METHOD] == list(SETTINGS)
    assert list(_GROUPED) == list(GROUPS.values()) and all(_GROUPED.values())
    assert {opt.name: (opt.default, opt.help) for opt in _METHOD} == {
        name: (default, help)
        for name, _, _, help in parameters(EditConfig)
        for default in [DEFAULTS.get(name)]
        if name != "preset"
    }


def test_options_allow_what_settings_allow():
    "The ends of a range are accepted by both, a step beyond by neither; choices are the same."
    from layerdiffusion import BadInput
    from layerdiffusion.interface.cli import _METHOD, _in_range
    from layerdiffusion.settings import SETTINGS, EditConfig

    for opt in _METHOD:
        setting = SETTINGS[opt.name]
        if not setting.number:
            continue
        for end, beyond in ((opt.low, opt.low - 1), (opt.high, opt.high + 1)):
            if abs(end) == float("inf"):
                continue
            for value, right in ((end, not (setting.above and end == opt.low)), (beyond, False)):
                for take in (_in_range(opt), lambda value: EditConfig(**{opt.name: value})):  # noqa: B023
                    try:
                        take(setting.number(value))
                    except BadInput:
                        assert not right, (opt.name, value)
                    else:
                        assert right, (opt.name, value)


def test_the_help_fits_on_one_screen(run, monkeypatch):
    "At most 50 lines of 100 columns, about 20 options; --help-all shows every option, in its group."
    from layerdiffusion.interface.cli import _GROUPED, _METHOD, _PANELS

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    code, short, _ = run("edit", "--help")
    assert code == 0 and len(short.splitlines()) <= 50 and max(map(len, short.splitlines())) <= 100
    assert 15 <= len(set(re.findall("--[a-z-]+", short))) <= 28 and "..." not in short and "…" not in short
    code, whole, _ = run("edit", "--help-all")
    assert code == 0
    assert not [o.flag for opts in _PANELS.values() for o in opts if not re.search(rf"{o.flag}(?![a-z-])", whole)]
    places = [whole.index(f" {panel} ─") for panel in _GROUPED] + [len(whole)]
    for (panel, opts), start, end in zip(_GROUPED.items(), places, places[1:], strict=False):
        assert not [o.flag for o in opts if o.flag not in whole[start:end]], panel
    assert len(_METHOD) > 30 and "--eq8-index" not in short


@pytest.mark.parametrize(
    "pairs, words",
    [
        (["alpha"], ["--set", "NAME=VALUE", "'alpha'"]),
        (["alpah=0.3"], ["'alpah'", "near it: alpha"]),
        (["steps=3"], ["'steps'", "sampling_steps"]),
        (["alpha=2"], ["alpha is '2'", "less than or equal to 1"]),
        (["alpha=much"], ["alpha is 'much'", "number"]),
        (["tuning_lr=0"], ["tuning_lr is '0'", "greater than 0"]),
        (["eq2_region=sky"], ["'sky'", "'background'"]),
        (["mask_hard=perhaps"], ["mask_hard", "boolean"]),
        (["seed=0.5"], ["seed is '0.5'"]),
        (["alpha=0.3", "alpha=0.4"], ["alpha twice"]),
        (["eq2_region=branch"], ["eq2_conditioning"]),
        (["negative_prompt=(hat:1.3)"], ["(hat:1.3)"]),
        (["preset=best"], ["preset"]),
        (["=3"], ["''"]),
    ],
)
def test_set_refuses_what_a_setting_refuses(run, pairs, words):
    before = files()
    code, _, err = run("edit", "example:dog", TEXT, *[w for pair in pairs for w in ("--set", pair)])
    assert code == 2 and len(err.strip().splitlines()) == 1 and not [w for w in words if w not in err], err
    assert files() == before


def test_set_and_its_option_are_one_setting(run):
    "A setting has one value: refused twice, and read the same by both ways."
    from layerdiffusion.interface.cli import _read_sets

    code, _, err = run("edit", "example:dog", TEXT, "--alpha", "0.3", "--set", "alpha=0.4")
    assert code == 2 and "--alpha and --set alpha" in err
    assert _read_sets(
        ["alpha=.5", "eq8-index=timestep", "tuning_decay=true", "tuning_lr=none", "negative_prompt=a hat"]
    ) == dict(alpha=0.5, eq8_index="timestep", tuning_decay=True, tuning_lr=None, negative_prompt="a hat")


def test_set_is_written_down(run):
    "A setting of --set, and an option that the short help does not show, are those of the edit."
    few = ["--set", "embedding_steps=1", "--set", "tuning_steps=1", "--steps", 1, "--seeds", 0, "--device", "cpu"]
    args = ["--mask", "mask.png", "--object-picture", "input", "--set", "eq8_first=opt", "--no-turns", "--out", "out"]
    assert run("edit", "example:dog", TEXT, *few, *args)[0] == 0
    config = json.loads(Path("out/edit.json").read_text())["config"]
    wanted = dict(embedding_steps=1, tuning_steps=1, eq8_first="opt", iterative_guidance=False, object_picture="input")
    assert config | wanted == config


def test_resume_takes_the_edit_of_these_words(tmp_path, monkeypatch, capsys):
    "Of two that were stopped, and none of another; nothing is touched where none fits."
    import torch
    from safetensors.torch import save_file
    from layerdiffusion.interface.cli import BadInput, _claim, _default_folder, _stopped_text

    monkeypatch.chdir(tmp_path)
    for n, text in enumerate(("a dog lying", "a dog sitting"), 1):
        (tmp_path / f"edits/dog-{n}").mkdir(parents=True)
        save_file(
            {"x": torch.zeros(1)}, tmp_path / f"edits/dog-{n}/checkpoint-tuning.safetensors", {"key": "", "text": text}
        )
    assert (
        _default_folder("dog.png", True, "a dog lying").name == "dog-1"
        and _default_folder("dog.png", True, "a dog sitting").name == "dog-2"
    )
    with pytest.raises(BadInput, match="no edit with these words was stopped; there are edits/dog-1"):
        _default_folder("dog.png", True, "a dog jumping")
    assert (
        main(["edit", "example:dog", "a dog jumping in a forest", "--resume", "--out", "edits/dog-1"]) == 2
        and "has the words 'a dog lying'" in capsys.readouterr().err
    )
    assert _default_folder("dog.png", False, "a dog lying").name == "dog-3"
    assert _stopped_text(tmp_path / "never") is None
    assert [_claim(Path("edits/dog-2")).name for _ in range(2)] == ["dog-3", "dog-4"]


def test_folders_of_somebody_else(tmp_path, capsys):
    "A folder with files that an edit would replace, and a folder where a file is meant."
    (tmp_path / "mask.png").write_text("mine")
    assert (
        main(["edit", "example:dog", TEXT, "--out", str(tmp_path)]) == 2
        and "which an edit would replace" in capsys.readouterr().err
    )
    for command in ("bench", "check-mini"):
        assert main([command, "--quick", "--out", str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"alpha": 2}')
    assert (
        main(["edit", "example:dog", TEXT, "--config", str(tmp_path / "bom.json")]) == 2
        and "alpha is 2" in capsys.readouterr().err
    )
    assert main(["edit", "example:dog", TEXT, "--seed", str(2**63)]) == 2 and str(2**63) in capsys.readouterr().err
    assert (tmp_path / "mask.png").read_text() == "mine"


def test_version_however_it_is_asked():
    """`layerdiffusion --version`, `python -m layerdiffusion` and `python -m layerdiffusion.interface.cli` are one
    command."""
    import layerdiffusion

    for module in ("layerdiffusion", "layerdiffusion.interface.cli"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--version"],
            capture_output=True,
            text=True,
            env=dict(os.environ, PYTHONPATH=str(package_folder().parent)),
        )
        assert (done.returncode, done.stdout) == (0, f"layerdiffusion {layerdiffusion.__version__}\n"), done.stderr
    assert main(["--version"]) == 0


def test_export(run):
    """An edit's folder becomes a U-Net, and a LoRA that diffusers finds by the folder alone; files of somebody
    else stay."""
    from diffusers import UNet2DConditionModel, StableDiffusionPipeline

    assert (
        run("edit", "example:dog", TEXT, "--mask", "mask.png", "--object-picture", "input", *SHORT, "--out", "dog")[0]
        == 0
    )
    code, out, err = run("export", "dog")
    assert code == 0 and "dog-unet" in out, err
    code, out, err = run("export", "dog/edit.safetensors", "--kind", "lora", "--rank", 2, "--out", "slim")
    assert code == 0 and "load_lora_weights('slim')" in out, err
    plain = UNet2DConditionModel.from_pretrained(package_folder() / "weights" / "mini" / "unet").state_dict()
    tuned = UNet2DConditionModel.from_pretrained("dog-unet/unet").state_dict()
    assert tuned.keys() == plain.keys() and any((tuned[k] != plain[k]).any() for k in plain)
    found, _ = StableDiffusionPipeline.lora_state_dict("slim")
    assert (
        found
        and all(k.startswith("unet.") and ".lora_" in k for k in found)
        and min(next(iter(found.values())).shape[:2]) == 2
    )
    Path("model/unet").mkdir(parents=True)
    Path("model/unet/mine").touch()
    code, out, err = run("export", "dog", "--out", "model")
    assert code == 2 and "'unet'" in err and Path("model/unet/mine").exists() and len(err.splitlines()) == 1
    assert run("export", "dog")[0] == 0, "an export takes the place of another"
