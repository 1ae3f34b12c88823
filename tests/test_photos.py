"""Photos as cameras make them, through v1.4's plan with random weights at a tenth of its width.

Sizes, notes, colour profile, files; and a real photo, scikit-image's cat, at 512 px. `LAYERDIFFUSION_SAM` names a file
of SAM's weights, which then finds the cat; without one its mask is given.
"""

import os

import pytest
from PIL import Image, ImageCms, ImageDraw

TEXT = "a corgi jumping over a log in an autumn forest"


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    from layerdiffusion import LayerDiffusion
    from layerdiffusion.evidence.full_size import _build_model, build_random_sam

    place = tmp_path_factory.mktemp("model")
    return LayerDiffusion.from_pretrained(
        _build_model(place / "sd", width=0.1, size=128),
        "cpu",
        build_random_sam(place / "sam.safetensors", width=0.125, size=128),
    )


def photo(width, height, orientation=1, mode="RGB"):
    "Something with large and small detail, EXIF notes and a colour profile."
    import numpy as np

    noise = np.random.default_rng(0).normal(128, 80, (height // 8, width // 8)).clip(0, 255).astype("uint8")
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
    ImageDraw.Draw(image).ellipse([width * 0.4, height * 0.4, width * 0.6, height * 0.7], fill=(180, 120, 60))
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x0132] = "A camera", orientation, "2026:11:24 12:00:00"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return image.convert(mode), dict(exif=exif, icc_profile=profile)


def short():
    from layerdiffusion import EditConfig

    return EditConfig(object_picture="input", embedding_steps=2, tuning_steps=2, sampling_steps=3)


def notes(path):
    image = Image.open(path)
    return image.getexif().get(0x010F), image.getexif().get(0x0112), image.info.get("icc_profile")


def test_a_rotated_photo(method, tmp_path):
    """Held upright by the camera's note, which is gone afterwards; the others and the profile are in every picture, and
    in one that is drawn again."""
    from layerdiffusion import load_edit

    image, info = photo(160, 240, orientation=6)  # lies on its side: 240 wide and 160 high when turned
    image.save(tmp_path / "photo.jpg", **info)
    result = method.edit(tmp_path / "photo.jpg", TEXT, point=(120, 85), seeds=[0, 1], config=short())
    assert result.images.shape == (2, 3, 88, 128)
    folder = result.save(tmp_path / "edit")
    load_edit(folder, method).save(tmp_path / "again")
    for name in ("edit/seed-0.png", "edit/seed-1.png", "edit/input.png", "again/seed-0.png", "again/input.png"):
        assert notes(tmp_path / name) == ("A camera", None, info["icc_profile"]), name
    assert notes(tmp_path / "edit/mask.png") == notes(tmp_path / "edit/sheet.png") == (None, None, None)
    assert (tmp_path / "edit/seed-0.png").read_bytes() == (tmp_path / "again/seed-0.png").read_bytes()


def test_a_large_photo(method, tmp_path):
    "3000 x 2000 pixels, pasted back: its own pixels far from the subject, the edit at it, notes and profile kept."
    import numpy as np

    image, info = photo(3000, 2000)
    image.save(tmp_path / "photo.jpg", quality=95, **info)
    drawn = Image.new("L", image.size)
    ImageDraw.Draw(drawn).ellipse(
        [1200, 800, 1800, 1400], fill=255
    )  # SAM has random weights here, and may find everything
    drawn.save(tmp_path / "mask.png")
    result = method.edit(tmp_path / "photo.jpg", TEXT, mask=tmp_path / "mask.png", seeds=[0], config=short())
    mask = np.asarray(Image.fromarray((result.mask[0] * 255).byte().numpy()).resize((3000, 2000))) > 127
    (whole,) = result.full_resolution(tmp_path / "photo.jpg")
    before, after = np.asarray(Image.open(tmp_path / "photo.jpg")), np.asarray(whole)
    changed = (before != after).any(2)
    assert after.shape == (2000, 3000, 3) and changed[mask].mean() > 0.9
    from layerdiffusion.base.masks import dilate

    near = dilate(result.mask[None], 20)[0, 0]
    near = np.asarray(Image.fromarray((near * 255).byte().numpy()).resize((3000, 2000))) > 0
    assert (~near).mean() > 0.05 and not changed[~near].any()
    result.save(tmp_path / "edit", photo=tmp_path / "photo.jpg")
    assert Image.open(tmp_path / "edit/full-0.jpg").size == (3000, 2000) and notes(tmp_path / "edit/full-0.jpg") == (
        "A camera",
        1,
        info["icc_profile"],
    )


@pytest.mark.parametrize("width, height", [(300, 100), (100, 260), (129, 127)])
def test_any_shape(method, width, height):
    result = method.edit(photo(width, height)[0], TEXT, mask=ellipse(width, height), seeds=[0], config=short())
    h, w = result.images.shape[-2:]
    assert max(h, w) == 128 and h % 8 == w % 8 == 0 and abs(w / h - width / height) < 0.25 * width / height
    assert result.full_resolution(photo(width, height)[0])[0].size == (width, height)


def ellipse(width, height):
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse([width * 0.3, height * 0.3, width * 0.7, height * 0.7], fill=255)
    return mask


def test_a_profile_for_other_colours_is_left_out(tmp_path):
    from layerdiffusion.interface.saving import photo_info

    image, info = photo(64, 48, mode="L")
    profile = bytearray(info["icc_profile"])
    profile[16:20] = b"GRAY"
    image.save(tmp_path / "grey.jpg", icc_profile=bytes(profile), exif=info["exif"])
    assert set(photo_info(tmp_path / "grey.jpg")) == {"exif"}


def test_command_pastes_back(tmp_path, monkeypatch):
    from layerdiffusion.interface.cli import main

    monkeypatch.chdir(tmp_path)
    image, info = photo(300, 200)
    image.save("photo.jpg", **info)
    ellipse(300, 200).save("mask.png")
    assert (
        main(
            [
                "edit",
                "photo.jpg",
                "a dog jumping in a forest",
                *[
                    "--mask",
                    "mask.png",
                    "--object-picture",
                    "input",
                    "--embedding-steps",
                    "1",
                    "--tuning-steps",
                    "1",
                    "--steps",
                    "1",
                    "--seeds",
                    "0",
                    "--device",
                    "cpu",
                    "--paste-back",
                    "--out",
                    "out",
                ],
            ]
        )
        == 0
    )
    assert (
        Image.open("out/full-0.jpg").size == (300, 200)
        and notes("out/full-0.jpg")[2] == notes("out/seed-0.png")[2] == info["icc_profile"]
    )


# A real photo


@pytest.fixture(scope="module")
def cat(tmp_path_factory):
    "A photo of 1353 x 900 px of a cat's head, lying on its side as a camera leaves it; and the cat in white."
    pytest.importorskip("skimage", reason="scikit-image is not installed; it is in the extra dev")
    from skimage import data

    upright = Image.fromarray(data.cat()).resize((1353, 900), Image.Resampling.LANCZOS)
    folder, info = tmp_path_factory.mktemp("cat"), photo(8, 8, orientation=6)[1]
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "cat.jpg", quality=97, **info)
    mask = Image.new("L", upright.size)
    draw = ImageDraw.Draw(mask)
    draw.ellipse([260, 120, 830, 840], fill=255)
    draw.polygon([(300, 400), (250, 30), (480, 180)], fill=255)  # an ear
    draw.polygon([(620, 160), (810, 10), (820, 380)], fill=255)
    mask.save(folder / "mask.png")
    return folder, upright, info


@pytest.fixture(scope="module")
def result(cat, tmp_path_factory):
    "An edit of it at 512 px, saved with the photo's full size."
    from layerdiffusion import LayerDiffusion
    from layerdiffusion.evidence.full_size import _build_model

    sam, folder = os.environ.get("LAYERDIFFUSION_SAM"), tmp_path_factory.mktemp("edit")
    model = _build_model(tmp_path_factory.mktemp("model") / "sd", width=0.1, size=512)
    method = LayerDiffusion.from_pretrained(model, "cpu", sam)
    where = dict(point=(550, 600)) if sam else dict(mask=cat[0] / "mask.png")
    text = "a cat sleeping on a sofa in the evening sun"
    made = method.edit(cat[0] / "cat.jpg", text, **where, seeds=[0, 1], config=short())
    made.save(folder / "out", photo=cat[0] / "cat.jpg")
    return made, folder / "out"


def numbers(picture, size=None):
    import numpy as np

    return np.asarray(picture.convert("RGB").resize(size) if size else picture.convert("RGB")).astype(float)


def test_a_real_photo_is_what_the_model_sees(cat, result):
    "Upright, in its colours, at 512 px; turned or mirrored, it would be another picture. The mask lies on the cat."
    made, out = result
    assert made.images.shape == (2, 3, 344, 512)
    seen, upright = numbers(Image.open(out / "input.png")), cat[1]
    assert abs(seen - numbers(upright, (512, 344))).mean() < 4
    for turn in (Image.Transpose.ROTATE_180, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
        assert abs(seen - numbers(upright.transpose(turn), (512, 344))).mean() > 20
    if not os.environ.get("LAYERDIFFUSION_SAM"):
        assert overlap(cat, out) > 0.98


def overlap(cat, out):
    "Intersection over union of an edit's mask and the one that was drawn by hand."
    mask, drawn = (numbers(Image.open(p / "mask.png"), (512, 344))[..., 0] > 127 for p in (out, cat[0]))
    return (mask & drawn).sum() / (mask | drawn).sum()


def test_sam_finds_the_cat(cat, result):
    "By one click, with real weights."
    if not os.environ.get("LAYERDIFFUSION_SAM"):
        pytest.skip("LAYERDIFFUSION_SAM names no file of SAM's weights, such as sam_vit_b_01ec64.pth")
    assert overlap(cat, result[1]) > 0.6


def test_a_real_photo_in_files(cat, result):
    "Sizes, notes and profile of all that is written; two seeds are two pictures."
    made, out = result
    sizes = {p.name: Image.open(p).size for p in out.iterdir() if p.suffix in (".png", ".jpg")}
    assert {n: s for n, s in sizes.items() if n[:4] in ("seed", "inpu", "mask", "full")} == {
        **dict.fromkeys(("seed-0.png", "seed-1.png", "input.png", "mask.png"), (512, 344)),
        **dict.fromkeys(("full-0.jpg", "full-1.jpg"), (1353, 900)),
    }
    for name in ("seed-0.png", "input.png", "full-0.jpg"):
        camera, turned, profile = notes(out / name)
        assert camera == "A camera" and turned in (None, 1) and profile == cat[2]["icc_profile"], name
    assert (made.images[0] - made.images[1]).abs().mean() > 0.01


def test_a_real_photo_is_pasted_back(cat, result):
    "Far from the cat every pixel is the photo's own; on it the edit stands, seed by seed."
    import numpy as np

    from layerdiffusion.base.core import load_image
    from layerdiffusion.base.masks import dilate

    made, _ = result
    wholes = [np.asarray(w) for w in made.full_resolution(cat[0] / "cat.jpg")]
    before = np.asarray(load_image(cat[0] / "cat.jpg"))

    def large(mask):
        return np.asarray(Image.fromarray((mask * 255).byte().numpy()).resize((1353, 900))) > 127

    on, far = large(made.mask[0]), ~large(dilate(made.mask[None], 90)[0, 0])
    for whole in wholes:
        assert whole.shape == (900, 1353, 3) and far.mean() > 0.05
        assert not (whole != before).any(2)[far].any() and (whole != before).any(2)[on].mean() > 0.95
    assert (wholes[0] != wholes[1]).any(2)[on].mean() > 0.9
