"""Pictures, notes, masks and clicks as people have them: each is read as what it is, or refused in one sentence.

Every input is made here, from one small picture whose pixels are the truth. A table row is one case.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, features

from layerdiffusion.base.core import _TURNS, BadInput, Notice, fit_points, load_image
from layerdiffusion.base.masks import find_mask, load_sam, look, mask_from_file
from layerdiffusion.interface.saving import _fitting_notes, photo_info

H, W = 48, 64
Y, X = np.mgrid[0:H, 0:W]
RGB = (
    np.stack([X * 4, Y * 5, 255 - X * 2 - Y], -1).clip(0, 255).astype("uint8")
)  # no two corners alike, so that a turn is seen
PICTURE = Image.fromarray(RGB)
GREY = np.asarray(PICTURE.convert("L"))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pixels(image):
    return np.asarray(image).astype(int)


def off(image, truth=RGB):
    "Largest difference to the truth in grey levels of 255."
    truth = np.asarray(truth)
    return abs(pixels(image) - (truth if truth.ndim == 3 else truth[..., None]).astype(int)).max()


def saved(image, name, **how):
    image.save(name, **how)
    return name


def refused(call, *words):
    with pytest.raises(BadInput) as error:
        call()
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 300, text
    for word in words:
        assert word in text, text


def said(call):
    "What a call gives, and the sentences it said."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        out = call()
    return out, [str(w.message) for w in found if issubclass(w.category, Notice)]


# Numbers and modes: (what to save, name, save options, truth, largest difference)


def deep(white):
    return Image.fromarray((GREY.astype("uint32") * white // 255).astype("uint16"))


def lab():
    return ImageCms.profileToProfile(
        PICTURE, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )


def rgba(alpha):
    return Image.merge("RGBA", (*PICTURE.split(), Image.fromarray(alpha)))


HALF = np.where(X < W // 2, 255, 0).astype("uint8")
OVER_WHITE = np.where(HALF[..., None] > 0, RGB, 255)
TWO = PICTURE.quantize(16)
READ = dict(
    png=(PICTURE, "a.png", {}, RGB, 0),
    bmp=(PICTURE, "a.bmp", {}, RGB, 0),
    webp=(PICTURE, "a.webp", dict(lossless=True), RGB, 0),
    jpeg=(PICTURE, "a.jpg", dict(quality=98, subsampling=0), RGB, 8),
    tiff=(PICTURE, "a.tif", {}, RGB, 0),
    tiff_lzw=(PICTURE, "a.tif", dict(compression="tiff_lzw"), RGB, 0),
    grey=(Image.fromarray(GREY), "a.png", {}, GREY, 0),
    one_bit=(PICTURE.convert("1"), "a.png", {}, np.asarray(PICTURE.convert("1").convert("L")), 0),
    sixteen=(deep(65535), "a.png", {}, GREY, 0),
    sixteen_tiff=(deep(65535), "a.tif", {}, GREY, 0),
    floats=(Image.fromarray(GREY.astype("float32") / 255), "a.tif", {}, GREY, 0),
    palette=(TWO, "a.png", {}, np.asarray(TWO.convert("RGB")), 0),
    gif=(TWO, "a.gif", {}, np.asarray(TWO.convert("RGB")), 0),
    cmyk=(PICTURE.convert("CMYK"), "a.tif", {}, RGB, 0),
    ycbcr=(PICTURE.convert("YCbCr"), "a.jpg", dict(quality=98, subsampling=0), RGB, 24),
    lab=(lab(), "a.tif", {}, RGB, 40),
    grey_alpha=(
        Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(HALF))),
        "a.png",
        {},
        np.where(HALF > 0, GREY, 255),
        0,
    ),
    rgba=(rgba(HALF), "a.png", {}, OVER_WHITE, 0),
    rgba_webp=(rgba(HALF), "a.webp", dict(lossless=True, exact=True), OVER_WHITE, 0),
)


@pytest.mark.parametrize("name", READ)
def test_read(name):
    image, file, how, truth, most = READ[name]
    loaded = load_image(saved(image, file, **how))
    assert loaded.mode == "RGB" and loaded.size == (W, H) and off(loaded, truth) <= most
    again = load_image(Image.open(file))  # opened by the user, its pixels not read yet
    assert off(again, pixels(loaded)) == 0


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_read_avif():
    assert abs(pixels(load_image(saved(PICTURE, "a.avif", quality=95))) - RGB).mean() < 4


def test_palette_with_transparency():
    image = PICTURE.quantize(8)
    image.save("a.png", transparency=3)
    index, truth = np.asarray(image), np.asarray(image.convert("RGB"))
    assert off(load_image("a.png"), np.where((index == 3)[..., None], 255, truth)) == 0
    assert (np.asarray(load_image("a.png", keep_alpha=True))[..., 3] == np.where(index == 3, 0, 255)).all()


def test_white_is_zero():
    "A 16-bit TIFF whose numbers count from white to black."
    Image.fromarray(65535 - np.asarray(deep(65535))).save("a.tif", tiffinfo={262: 0})
    data = Image.open("a.tif")
    assert data.tag_v2[262] == 0 and off(load_image("a.tif"), GREY) <= 0


def png(depth, colour, rows):
    "A PNG of big-endian rows, as Pillow does not write it."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, 0)
    Path("a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )
    return "a.png"


def test_sixteen_bits_in_colour():
    assert off(load_image(png(16, 2, RGB.astype(int) * 257))) == 0
    with_alpha = np.dstack([RGB, HALF]).astype(int) * 257
    assert off(load_image(png(16, 6, with_alpha)), OVER_WHITE) == 0
    refused(lambda: load_image(png(16, 2, RGB.astype(int) * 16)), "a.png", "12-bit", "8 bits")
    assert off(load_image(png(16, 2, RGB.astype(int) * 0)), RGB * 0) == 0  # black is black


# Files that are refused: how to make one, and words of the sentence


def half_of(name):
    data = Path(saved(PICTURE, name)).read_bytes()
    Path(name).write_bytes(data[: len(data) // 2])
    return name


def file_of(name, data):
    Path(name).write_bytes(data)
    return name


def bomb(width=50_000, height=50_000):
    data = Path(saved(PICTURE, "bomb.png")).read_bytes()
    head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return file_of("bomb.png", data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])


REFUSED = dict(
    ten_in_sixteen=(lambda: saved(deep(1023), "a.png"), ["a.png", "894 of 65535", "nearly black"]),
    twelve_in_sixteen=(lambda: saved(deep(4095), "a.png"), ["a.png", "3581 of 65535", "12-bit"]),
    fourteen_tiff=(lambda: saved(deep(16383), "a.tif"), ["a.tif", "of 65535"]),
    eight_in_sixteen=(lambda: saved(deep(255), "a.tif"), ["a.tif", "223 of 65535"]),
    floats_of_bytes=(
        lambda: saved(Image.fromarray(GREY.astype("float32")), "a.tif"),
        ["a.tif", "0 to 1", "divide by 255"],
    ),
    floats_below=(
        lambda: saved(Image.fromarray(GREY.astype("float32") / 127.5 - 1), "a.tif"),
        ["a.tif", "(x + 1) / 2"],
    ),
    floats_nan=(
        lambda: saved(Image.fromarray(np.where(X > 9, np.nan, 0.5).astype("float32")), "a.tif"),
        ["a.tif", "NaN"],
    ),
    ints=(lambda: saved(Image.fromarray(GREY.astype("int32")), "a.tif"), ["a.tif", "int32", "uint8"]),
    heic=(lambda: file_of("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)), ["a.heic", "HEIC", "JPEG"]),
    jxl=(lambda: file_of("a.jxl", b"\xff\x0a" + bytes(99)), ["JPEG XL"]),
    pdf=(lambda: file_of("a.png", b"%PDF-1.4\n"), ["PDF"]),
    psd=(lambda: file_of("a.psd", b"8BPS\0\1" + bytes(99)), ["Photoshop"]),
    svg=(lambda: file_of("a.svg", b" <svg xmlns=''/>"), ["SVG"]),
    raw=(lambda: saved(PICTURE, "a.dng", format="TIFF"), ["a.dng", "raw"]),
    preview=(lambda: saved(PICTURE, "a.tif", tiffinfo={254: 1}), ["a.tif", "raw"]),
    text=(lambda: file_of("a.png", b"milk, eggs"), ["a.png", "not a picture"]),
    empty=(lambda: file_of("a.png", b""), ["a.png", "empty"]),
    half_png=(lambda: half_of("a.png"), ["a.png", "damaged"]),
    half_jpeg=(lambda: half_of("a.jpg"), ["a.jpg", "damaged"]),
    half_webp=(lambda: half_of("a.webp"), ["a.webp", "damaged"]),
    half_gif=(lambda: half_of("a.gif"), ["a.gif", "damaged"]),
    half_tiff=(lambda: half_of("a.tif"), ["a.tif", "damaged"]),
    half_bmp=(lambda: half_of("a.bmp"), ["a.bmp", "damaged"]),
    bomb=(bomb, ["bomb.png", "150 million"]),
    large=(lambda: bomb(15_000, 12_000), ["bomb.png", "150 million"]),
    folder=(lambda: str(Path.cwd()), ["is a folder"]),
    missing=(lambda: "nowhere.png", ["nowhere.png"]),
    device=(lambda: "/dev/null", ["/dev/null"]),
    long=(lambda: "x" * 300, ["name of a file"]),
    address=(lambda: "https://example.org/a.png", ["web address"]),
    number=(lambda: 3, ["a int"]),
    content=(lambda: Path(saved(PICTURE, "a.png")).read_bytes(), ["bytes", "Image.open(io.BytesIO(source))"]),
    stream=(lambda: io.BytesIO(b"x"), ["BytesIO", "Image.open(source)"]),
    nameless=(lambda: " ", ["is empty"]),
    lazy=(lambda: Image.open(half_of("a.png")), ["a.png", "damaged"]),
    no_pixels=(lambda: Image.new("RGB", (0, 0)), ["0 x 0"]),
    flat=(lambda: Image.new("L", (9, 0)), ["no pixels"]),
    pillow_ints=(lambda: PICTURE.convert("I"), ["int32"]),
    pillow_floats=(lambda: PICTURE.convert("F"), ["divide by 255"]),
)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, words = REFUSED[name]
    source = make()
    refused(lambda: load_image(source), *words)


def test_closed():
    with Image.open(saved(PICTURE, "a.png")):
        pass
    image = Image.open("a.png")
    image.close()
    refused(lambda: load_image(image), "a.png", "closed")


def test_what_others_set_in_pillow_changes_nothing(monkeypatch):
    half, note = half_of("a.jpg"), PngImagePlugin.PngInfo()
    note.add_text("workflow", "x" * 3_000_000, zip=True)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
    refused(lambda: load_image(half), "damaged")
    assert off(load_image(saved(PICTURE, "b.png", pnginfo=note))) == 0
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK) == (True, 100, 1000)


@pytest.mark.parametrize(
    "file, how",
    [("a.gif", dict(duration=9)), ("a.webp", dict(lossless=True)), ("a.tif", {}), ("a.png", dict(default_image=False))],
)
def test_several_frames(file, how):
    other = Image.fromarray(RGB[::-1].copy())
    first, rest = (PICTURE.quantize(64), other.quantize(64)) if file == "a.gif" else (PICTURE, other)
    first.save(file, save_all=True, append_images=[rest, first], **how)
    image, sentences = said(lambda: load_image(file))
    assert abs(pixels(image) - RGB).mean() < (8 if file == "a.gif" else 1e-9)
    assert len(sentences) == 1 and file in sentences[0] and "3 frames or pages" in sentences[0]
    assert said(lambda: load_image(saved(PICTURE, "one.png")))[1] == []


# Notes


def lying(turn):
    "The picture as a camera stores it that was held so."
    back = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    return PICTURE.transpose(getattr(Image.Transpose, back[turn]))


def entry(order, tag, kind, count, value):
    return struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")


def exif(turn, *others, order="<", kind=3):
    """EXIF bytes with the note about the turn, and others before and after it; their values lie where they say, not in
    the table."""
    note = {
        3: struct.pack(order + "H", turn),
        4: struct.pack(order + "I", turn),
        1: bytes([turn]),
        2: str(turn).encode() + b"\0",
        9: struct.pack(order + "i", turn),
    }[kind]
    entries = sorted(
        [entry(order, 0x0112, kind, 1 if kind != 2 else 2, note), *others],
        key=lambda e: struct.unpack(order + "H", e[:2]),
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return b"Exif\0\0" + head + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)


def MAKE(order):
    return entry(order, 0x010F, 2, 4, b"Cam\0")


ODD = dict(
    none=[],
    resolution_byte=[(0x0128, 1, 1, b"\2")],
    resolution_float=[(0x011A, 11, 1, struct.pack("<f", 72))],
    date_short=[(0x0132, 3, 1, b"\7\0")],
    undefined_size=[(0x0100, 7, 4, b"abcd")],
    unknown_kind=[(0xA5A5, 13, 1, b"\1")],
    no_kind=[(0xA5A5, 99, 1, b"\1")],
    far=[(0x010E, 2, 4000, struct.pack("<I", 60_000))],
    stops_pillow=[(0x0100, 5, 2, struct.pack("<I", 20))],
    exif_nowhere=[(0x8769, 4, 1, struct.pack("<I", 50_000))],
    gps_text=[(0x8825, 2, 4, b"abc\0")],
    copyright_signed=[(0x8298, 9, 1, struct.pack("<i", -3))],
)


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("odd", ODD)
def test_turned_whatever_the_other_notes_are(turn, odd):
    extra = [entry("<", *o) for o in ODD[odd]]
    lying(turn).save("a.png", exif=exif(turn, MAKE("<"), *extra))
    image = load_image("a.png")
    assert image.size == (W, H) and off(image) == 0
    note = image.info["exif"]
    assert all(e in note for e in [MAKE("<"), *extra]) and struct.pack("<H", 0x0112) not in note[:24]
    left = Image.Exif()
    left.load(note)
    assert 0x0112 not in left
    image.save("b.png", exif=note)
    assert off(load_image("b.png")) == 0 and load_image("b.png").info["exif"] == note


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("order", "<>")
def test_turned_however_the_turn_is_written(kind, order):
    for file in ("a.png", "a.webp"):
        lying(6).save(
            file, exif=exif(6, MAKE(order), order=order, kind=kind), **(dict(lossless=True) if file == "a.webp" else {})
        )
        image = load_image(file)
        assert off(image) == 0 and MAKE(order) in image.info["exif"]


def test_turned_by_xmp_and_by_text():
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/>'
        + b" " * 2_000_000
        + b"</x:xmpmeta>"
    )
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    assert off(load_image(saved(lying(6), "a.png", pnginfo=note))) == 0
    note, data = PngImagePlugin.PngInfo(), exif(6, MAKE("<"))
    note.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    image = load_image(saved(lying(6), "b.png", pnginfo=note))
    assert off(image) == 0 and MAKE("<") in image.info["exif"]


def test_turned_tiff():
    lying(6).save("a.tif", tiffinfo={0x0112: 6, 271: "A camera"})
    image = load_image("a.tif")
    left = Image.Exif()
    left.load(image.info["exif"])
    assert off(image) == 0 and dict(left) == {271: "A camera"}


MODES = dict(
    grey=Image.fromarray(GREY),
    palette=PICTURE.quantize(16),
    rgb=PICTURE,
    clear=PICTURE.convert("RGBA"),
    print=PICTURE.convert("CMYK"),
    sixteen=deep(65535),
    bits=PICTURE.convert("1"),
)


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("mode", MODES)
def test_turned_tiff_of_every_mode(mode, turn):
    """Pillow maps some modes into memory, and scrambles what lies on its side; given as a path, a picture not read yet,
    or a mask, it is upright."""
    upright, note = MODES[mode], Image.Exif()
    note[0x0112] = turn
    undo = {6: 8, 8: 6}.get(turn, turn)
    upright.transpose(getattr(Image.Transpose, _TURNS[undo])).save("a.tif", exif=note)
    for source in ("a.tif", Image.open("a.tif")):
        assert off(load_image(source), pixels(load_image(upright))) <= 1
    if mode in ("grey", "sixteen"):
        WHITE.transpose(getattr(Image.Transpose, _TURNS[undo])).save("m.tif", exif=note)
        assert (mask_from_file("m.tif", (H, W))[0].numpy() == TRUTH).all()


@pytest.mark.parametrize(
    "note", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_notes_that_cannot_be_read(note):
    PICTURE.save("a.png", exif=note)
    image, sentences = said(lambda: load_image("a.png"))
    assert off(image) == 0 and "exif" not in image.info and len(sentences) == 1 and "EXIF" in sentences[0]


def test_an_upright_photo_keeps_its_notes_to_the_byte():
    note = exif(1, MAKE("<"))
    assert photo_info(saved(PICTURE, "a.jpg", exif=note, icc_profile=SRGB)) == dict(exif=note, icc_profile=SRGB)
    assert photo_info(saved(rgba(HALF), "a.png", exif=note, icc_profile=SRGB)) == dict(
        exif=note, icc_profile=SRGB
    )  # with transparency as well


@pytest.mark.parametrize("profile", [b"nonsense", SRGB[:200], SRGB[:36] + b"xxxx" + SRGB[40:]])
def test_a_broken_profile_is_left_out(profile):
    image, sentences = said(lambda: load_image(saved(PICTURE, "a.png", icc_profile=profile)))
    assert off(image) == 0 and "icc_profile" not in image.info and "colour profile" in sentences[0]
    image, sentences = said(lambda: load_image(saved(PICTURE.convert("CMYK"), "a.tif", icc_profile=profile)))
    assert off(image) == 0 and "icc_profile" not in image.info and len(sentences) >= 1


def test_notes_that_a_file_cannot_hold():
    "The large one goes, the others stay; a profile of any size leaves the picture readable."
    note = Image.Exif()
    note[0x010F], note[0x927C] = "A camera", b"x" * 100_000
    assert _fitting_notes(dict(exif=note.tobytes()), "PNG") == dict(exif=note.tobytes())
    kept, sentences = said(lambda: _fitting_notes(dict(exif=note.tobytes(), icc_profile=SRGB), "JPEG"))
    assert (
        kept["icc_profile"] == SRGB and len(kept["exif"]) < 200 and len(sentences) == 1 and "MakerNote" in sentences[0]
    )
    PICTURE.save("a.jpg", **kept)
    assert Image.open("a.jpg").getexif()[0x010F] == "A camera"
    long = (len(SRGB) + 17_000_000).to_bytes(4, "big") + SRGB[4:] + bytes(17_000_000)
    for kind in ("JPEG", "PNG"):
        kept, sentences = said(lambda kind=kind: _fitting_notes(dict(icc_profile=long, exif=b""), kind))
        assert "icc_profile" not in kept and "colour profile" in sentences[0]
    assert _fitting_notes({}, "JPEG") == {}


# Arrays and tensors

FLOAT = RGB.astype("float32") / 255
ARRAYS = dict(
    bytes=RGB,
    floats=FLOAT,
    doubles=FLOAT.astype("float64"),
    sixteen=RGB.astype("uint16") * 257,
    first=RGB.transpose(2, 0, 1),
    one=RGB[None],
    rgba=np.dstack([RGB, HALF]),
    tensor=torch.from_numpy(FLOAT).permute(2, 0, 1),
    tensor_bytes=torch.from_numpy(RGB).permute(2, 0, 1),
    tensor_last=torch.from_numpy(FLOAT),
    batch=torch.from_numpy(FLOAT).permute(2, 0, 1)[None],
    grad=torch.from_numpy(FLOAT).permute(2, 0, 1).requires_grad_(),
    half=torch.from_numpy(FLOAT).half(),
    reversed=RGB[::-1][::-1],
    big_end=(RGB.astype("uint16") * 257).astype(">u2"),
)


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name):
    truth = OVER_WHITE if name == "rgba" else RGB
    image = load_image(ARRAYS[name])
    assert image.size == (W, H) and off(image, truth) <= (1 if name == "half" else 0)


@pytest.mark.parametrize("grey", [GREY, GREY[None], GREY[..., None], torch.tensor(GREY)[None] / 255, GREY > 99])
def test_grey_arrays(grey):
    assert off(load_image(grey), np.where(GREY > 99, 255, 0) if grey.dtype == bool else GREY) == 0


NO_ARRAYS = dict(
    floats_of_bytes=(FLOAT * 255, ["divide by 255"]),
    below=(FLOAT * 2 - 1, ["(x + 1) / 2"]),
    nan=(np.where(X[..., None] > 3, np.nan, FLOAT), ["NaN"]),
    infinite=(np.full((9, 9), np.inf), ["NaN"]),
    ints=(RGB.astype(int), ["int64", "uint8"]),
    signed=(RGB.astype("int8"), ["int8"]),
    dark=(RGB.astype("uint16"), ["nearly black"]),
    ones=((RGB > 99).astype("uint8"), ["0 and 1"]),
    two=(np.stack([RGB, RGB]), ["not one picture"]),
    five=(torch.ones(5, 9, 8), ["not one picture"]),
    unclear=(np.zeros((3, 64, 3), "uint8"), ["(height, width, colours)"]),
    nothing=(np.zeros((0, 9, 3), "uint8"), ["no pixels"]),
    number=(np.float32(3), ["not one picture"]),
    words=(np.full((9, 9), "x"), ["not numbers"]),
    complex=(np.zeros((9, 9), complex), ["complex"]),
    large=(torch.full((3, 9, 8), 2.0), ["from 0 to 1"]),
)


@pytest.mark.parametrize("name", NO_ARRAYS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_arrays_refused(name):
    x, words = NO_ARRAYS[name]
    refused(lambda: load_image(x), *words)


# Masks: the truth is a block off the middle, so that a turn or a swap is seen

TRUTH = (X >= 20) & (X < 50) & (Y >= 10) & (Y < 40)
ONE = TRUTH.astype("uint8")
WHITE = Image.fromarray(ONE * 255)


def run_lengths(mask):
    flat = np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]])
    return np.diff(np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1])])).tolist()


def packed(counts):
    text = ""
    for i, count in enumerate(counts):
        value, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            part, value = value & 31, value >> 5
            more = value != -1 if part & 16 else value != 0
            text += chr(part + 32 * more + 48)
    return text


def palette(*colours, **how):
    image = Image.new("P", (W, H))
    image.putdata(ONE.ravel().tolist())
    image.putpalette(sum(map(list, colours), []))
    return saved(image, "m.png", **how)


RLE = dict(size=[H, W], counts=run_lengths(TRUTH))
MASKS = dict(
    bool=TRUTH,
    ones=ONE,
    bytes=ONE * 255,
    floats=ONE * 1.0,
    floats_of_bytes=ONE * 255.0,
    ints=ONE.astype(int),
    sixteen=ONE.astype("uint16") * 65535,
    sixteen_ones=ONE.astype("uint16"),
    tensor=torch.from_numpy(TRUTH),
    tensor_one=torch.from_numpy(TRUTH)[None],
    tensor_batch=torch.from_numpy(ONE * 1.0)[None, None],
    half=torch.from_numpy(ONE).half(),
    last=ONE[..., None],
    colours=np.stack([ONE * 255] * 3, -1),
    colours_ones=np.stack([ONE] * 3, -1),
    large=TRUTH.repeat(3, 0).repeat(3, 1),
    sam=dict(segmentation=TRUTH, area=900, bbox=[20, 10, 30, 30]),
    sam_list=[dict(segmentation=TRUTH)],
    pipeline=[dict(mask=WHITE, label="dog", score=0.9)],
    big_end=(ONE.astype("uint16") * 65000).astype(">u2"),
    rle=RLE,
    sam_rle=dict(segmentation=RLE),
    sam_packed=dict(segmentation=dict(RLE, counts=packed(RLE["counts"]))),
    packed_bytes=dict(RLE, counts=packed(RLE["counts"]).encode()),
    pillow=WHITE,
    pillow_ones=Image.fromarray(ONE),
    pillow_ints=Image.fromarray(ONE.astype("int32")),
)
FILES = dict(
    white=lambda: saved(WHITE, "m.png"),
    ones=lambda: saved(Image.fromarray(ONE), "m.png"),
    one_bit=lambda: saved(WHITE.convert("1"), "m.png"),
    rgb=lambda: saved(WHITE.convert("RGB"), "m.png"),
    jpeg=lambda: saved(WHITE, "m.jpg", quality=80),
    jpeg_rgb=lambda: saved(WHITE.convert("RGB"), "m.jpg", quality=80),
    any_number=lambda: saved(Image.fromarray(ONE * 38), "m.png"),
    palette=lambda: palette((0, 0, 0), (255, 255, 255)),
    voc=lambda: palette((0, 0, 0), (128, 0, 0)),
    clear=lambda: palette((9, 9, 9), (200, 40, 90), transparency=0),
    gif=lambda: saved(WHITE, "m.gif"),
    sixteen=lambda: saved(Image.fromarray(ONE.astype("uint16") * 65535), "m.png"),
    sixteen_ones=lambda: saved(Image.fromarray(ONE.astype("uint16")), "m.png"),
    floats=lambda: saved(Image.fromarray(ONE.astype("float32")), "m.tif"),
    floats_of_bytes=lambda: saved(Image.fromarray(ONE.astype("float32") * 255), "m.tif"),
    cut_out=lambda: saved(Image.merge("RGBA", (*PICTURE.split(), WHITE)), "m.png"),
    black_brush=lambda: saved(Image.merge("RGBA", (*Image.new("RGB", (W, H)).split(), WHITE)), "m.png"),
    grey_alpha=lambda: saved(Image.merge("LA", (Image.new("L", (W, H), 255), WHITE)), "m.png"),
    opaque=lambda: saved(WHITE.convert("RGBA"), "m.png"),
    red=lambda: saved(Image.fromarray(np.dstack([ONE * 255, ONE * 0, ONE * 0])), "m.png"),
    sideways=lambda: saved(WHITE.transpose(Image.Transpose.ROTATE_90), "m.png", exif=exif(6)),
    long_note=lambda: saved(WHITE, "m.png", exif=exif(1)),
)


@pytest.mark.parametrize("name", MASKS)
def test_masks_in_memory(name):
    assert (mask_from_file(MASKS[name], (H, W))[0].numpy() == TRUTH).all()


@pytest.mark.parametrize("name", FILES)
def test_mask_files(name):
    assert (mask_from_file(FILES[name](), (H, W))[0].numpy() == TRUTH).all()


def test_a_soft_mask_of_floats_stays_soft():
    soft = torch.from_numpy(ONE * 0.8 + 0.1).float()[None]
    assert torch.equal(mask_from_file(soft, (H, W)), soft)


def contradiction():
    alpha = Image.fromarray(np.where(X < 8, 0, 255).astype("uint8"))
    return saved(Image.merge("RGBA", (WHITE, WHITE, WHITE, alpha)), "m.png")


NO_MASKS = dict(
    empty=(ONE * 0, ["empty"]),
    full=(ONE * 0 + 1, ["full"]),
    labels=(ONE * 2 + (X < 5), ["numbers 0, 1, 2", "one of 0 and 1"]),
    two_labels=(ONE + 1, ["numbers 1, 2"]),
    three=(np.stack([TRUTH] * 3), ["3 masks", "argmax"]),
    many=([dict(segmentation=TRUTH)] * 2, ["2 masks"]),
    logits=(np.where(TRUTH, 3.0, -4.0), ["logits > 0"]),
    nan=(np.where(TRUTH, np.nan, 0), ["NaN"]),
    turned=(TRUTH.T, ["48 x 64", "64 x 48"]),
    wide=(np.eye(48, 100) > 0, ["100 x 48"]),
    dim=(ONE * 100 + (X // 9).astype("uint8"), ["nothing is white"]),
    bright=(ONE.astype(int) * 999 + X, ["what is white"]),
    nothing=(np.zeros((0, 0)), ["no pixels"]),
    sparse=(torch.from_numpy(ONE).to_sparse(), ["plain tensor"]),
    tiny_floats=(torch.zeros(H, W).to(torch.float8_e4m3fn), ["plain tensor"]),
    number=(3, ["a int"]),
    nested=([[0, 1], [1, 0]], ["a list"]),
    keys=(dict(masks=1), ["'segmentation'", "'masks'"]),
    polygon=(dict(segmentation=[[1, 2, 3, 4]]), ["a list"]),
    lengths=(dict(size=[H, W], counts=[3, 4]), ["run lengths"]),
    lengths_text=(dict(size=[H, W], counts="?"), ["run lengths"]),
    negative=(dict(size=[H, W], counts=[-1, H * W + 1]), ["run lengths"]),
    photo=(PICTURE, ["has colours"]),
    grey_photo=(Image.fromarray(GREY), ["grey"]),
    missing=("nowhere.png", ["nowhere.png"]),
    words=(np.full((H, W), "x"), ["<U1"]),
)


@pytest.mark.parametrize("name", NO_MASKS)
def test_masks_refused(name):
    mask, words = NO_MASKS[name]
    refused(lambda: mask_from_file(mask, (H, W)), *words)


def test_mask_files_refused():
    refused(lambda: mask_from_file(contradiction(), (H, W)), "m.png", "may be either")
    refused(lambda: mask_from_file(palette((255, 0, 0), (0, 255, 0)), (H, W)), "m.png", "colours")
    refused(lambda: mask_from_file(half_of("m.png"), (H, W)), "m.png", "damaged")


def test_masks_of_other_sizes():
    "As large as the picture was before it was fitted, of its shape, and nothing else."
    strip = np.zeros((20, 1000), bool)
    strip[5:15, 300:600] = True
    assert mask_from_file(strip, (8, 64), (1000, 20)).shape == (1, 8, 64)
    assert mask_from_file(TRUTH.repeat(2, 0).repeat(2, 1), (H, W), (640, 480)).shape == (1, H, W)
    refused(lambda: mask_from_file(strip[:, :900], (8, 64), (1000, 20)), "900 x 20", "1000 x 20")
    refused(lambda: mask_from_file(TRUTH.repeat(2, 0), (H, W), (640, 480)), "64 x 96", "640 x 480")


def test_a_mask_turned_inside_out_is_said():
    mask, sentences = said(lambda: mask_from_file(~TRUTH, (H, W)))
    assert (mask[0].numpy() == ~TRUTH).all() and len(sentences) == 1 and "whole edge" in sentences[0]
    assert said(lambda: mask_from_file(TRUTH, (H, W)))[1] == []


# Clicks, and SAM in the forms it has


@pytest.fixture(scope="module")
def sam():
    return load_sam("mini")


class Asked:
    "Stands for a SAM that knows clicks beside the subject: tells what it was asked."

    original_size, is_image_set = (H, W), True

    def __init__(self, knows_boxes=True):
        self.model, self.asked = type("Model", (), dict(knows_boxes=knows_boxes))(), None

    def set_image(self, image):
        raise AssertionError("it has seen the picture")

    def predict(self, coords=None, labels=None, box=None, multimask_output=True):
        self.asked = coords.tolist(), labels.tolist(), box
        return TRUTH[None], np.ones(1), None


def test_labels_reach_sam():
    asked = Asked()
    find_mask(asked, torch.zeros(3, H, W), [(1, 2), (3, 4)], labels=[1, 0])
    assert asked.asked == ([[1, 2], [3, 4]], [1, 0], None)
    find_mask(asked, torch.zeros(3, H, W), (1, 2), box=(15, 5, 55, 45), labels=0)
    assert asked.asked[1] == [0]


@pytest.mark.parametrize(
    "points, labels, words",
    [
        ([], None, ["empty"]),
        ([(1, 2)], [1, 0], ["1 points but 2 labels"]),
        ([(1, 2)], [2], ["1 (the subject) or 0"]),
        ([(1, 2)], [-1], ["not -1"]),
        ([(1, 2)], ["x"], ["labels"]),
        ([(1, 2)], [float("nan")], ["nan"]),
        ([(1, 2)], [0], ["No point is on the subject"]),
    ],
)
def test_labels_refused(points, labels, words):
    refused(lambda: find_mask(Asked(), torch.zeros(3, H, W), points, labels=labels), *words)


@pytest.mark.parametrize(
    "points, words",
    [
        ([], ["no point"]),
        (np.zeros((0, 2)), ["no point"]),
        ((0.4, 0.6), ["shares"]),
        ([(0.4, 0.6), (0.5, 0.5)], ["shares"]),
        ((float("nan"), 3), ["outside"]),
        ((-1, 3), ["outside"]),
    ],
)
def test_points_refused(points, words):
    refused(lambda: fit_points(points, PICTURE, torch.zeros(3, 64, 64)), *words)


def test_sam_in_other_objects(sam, tmp_path):
    from segment_anything import SamPredictor

    assert load_sam(sam) is sam and load_sam(SamPredictor(sam)) is sam
    torch.save({"model": sam.state_dict()}, tmp_path / "sam.pth")  # as programs that train it save it
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert load_sam(SamPredictor(look(sam, image).model)) is sam
    seen = look(sam, image)
    assert look(seen, image) is seen
    refused(lambda: look(seen, torch.zeros(3, 32, 64)), "another size")
    for wrong in (3, torch.nn.Linear(2, 2), object()):
        refused(lambda wrong=wrong: load_sam(wrong), type(wrong).__name__)


@pytest.fixture(scope="module")
def theirs():
    "A small `SamModel` of transformers with weights that make every part count."
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    parts = dict(
        vision_config=SamVisionConfig(
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            window_size=2,
            global_attn_indexes=[1],
            mlp_dim=64,
            num_pos_feats=8,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=16, mask_input_channels=8
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=8, iou_head_hidden_dim=16
        ),
    )
    model, generator = SamModel(SamConfig(**parts)).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=generator)
    return model


def test_transformers_sam_is_the_same_network(theirs, tmp_path):
    "As an object and as a folder, down to the logits."
    theirs.save_pretrained(tmp_path / "sam")
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    ours = load_sam(theirs), load_sam(tmp_path / "sam")
    bytes_ = (image * 255).round()
    inputs = (bytes_ - ours[0].pixel_mean) / ours[0].pixel_std
    with torch.no_grad():
        expected = theirs(
            pixel_values=inputs[None], input_points=torch.tensor([[[[20.0, 30.0]]]]), input_labels=torch.tensor([[[1]]])
        )
    for model in ours:
        _, quality, logits = look(model, image).predict(np.array([[20.0, 30.0]]), np.array([1]))
        assert np.allclose(logits, expected.pred_masks[0, 0], atol=1e-5) and np.allclose(
            quality, expected.iou_scores[0, 0], atol=1e-5
        )
        assert np.ptp(logits) > 0.01
    (tmp_path / "sam" / "config.json").write_text('{"model_type": "sam2"}')
    refused(lambda: load_sam(tmp_path / "sam"), "'sam2'", "Sam2Model")  # the weights are another kind's
    (tmp_path / "sam" / "config.json").write_text("{")
    refused(lambda: load_sam(tmp_path / "sam"), "config.json", "not JSON")


# Through the whole method, and on the command line

TEXT = "a dog jumping in a forest"
SHORT = [
    "--embedding-steps",
    "1",
    "--tuning-steps",
    "1",
    "--steps",
    "2",
    "--seeds",
    "0",
    "--object-picture",
    "input",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def method():
    from layerdiffusion import LayerDiffusion

    return LayerDiffusion.from_pretrained("mini", "cpu")


def find(method, **given):
    from layerdiffusion.base.core import fit_image

    whole = load_image("example:dog").resize((256, 256))
    return method.find_subject(whole, fit_image(whole, 64), **given)


def test_subject_from_everything(method):
    "Masks of the picture's own size, in SAM's form; clicks with labels."
    there = np.zeros((256, 256), bool)
    there[80:200, 60:180] = True
    truth = torch.from_numpy(there[2::4, 2::4]).float()[None]
    for mask in (there, dict(segmentation=there), Image.fromarray(there), truth):
        assert torch.equal(find(method, mask=mask), truth)
    alone, silent = said(lambda: find(method, point=(128, 144)))
    both, told = said(lambda: find(method, point=[(128, 144), (8, 8)], point_labels=[1, 0]))
    assert silent == told == [] and alone.shape == both.shape == (1, 64, 64)


def test_a_sam_without_such_clicks_says_so(method, monkeypatch):
    "One that was never shown what is not the subject draws the same mask, and the user is told once."
    monkeypatch.setattr(method.sam, "knows_boxes", False)
    _, told = said(lambda: find(method, point=[(130, 140), (9, 9)], point_labels=[1, 0]))
    assert len(told) == 1 and "never learnt" in told[0]
    for wrong, words in (
        (dict(point=[]), ["no point"]),
        (dict(point=(128, 144), point_labels=[1, 0]), ["1 points but 2 labels"]),
        (dict(point=(128, 144), point_labels=[0]), ["No point is on"]),
    ):
        refused(lambda wrong=wrong: find(method, **wrong), *words)
    refused(lambda: method.prepare("example:dog", TEXT, point_labels=[1]), "without a point")


def test_sam_objects_in_the_method(method, theirs):
    from layerdiffusion import LayerDiffusion
    from segment_anything import SamPredictor

    assert LayerDiffusion(method.models, SamPredictor(method.sam)).sam is method.sam
    assert LayerDiffusion(method.models, theirs).sam.knows_boxes and method.sam.knows_boxes
    refused(lambda: LayerDiffusion(method.models, 3), "a int")


@pytest.fixture
def run(capfd):
    from layerdiffusion.interface.cli import main

    def call(*args):
        code = main([str(a) for a in args])
        return code, *capfd.readouterr()

    return call


def test_command_pastes_back_with_a_large_note(run):
    "The picture is written; the note that JPEG cannot hold is named in one sentence, the others are in it."
    note = Image.Exif()
    note[0x010F], note[0x927C] = "A camera", b"x" * 100_000
    load_image("example:dog").resize((160, 160)).save("photo.png", exif=note)
    WHITE.resize((160, 160)).save("mask.png")
    code, out, err = run("edit", "photo.png", TEXT, *SHORT, "--mask", "mask.png", "--paste-back", "--out", "out")
    assert code == 0 and "full-0.jpg" in out
    lines = [line for line in err.splitlines() if line.startswith("Warning")]
    assert len([line for line in lines if "MakerNote" in line]) == 1
    assert (
        Image.open("out/full-0.jpg").getexif()[0x010F] == Image.open("out/seed-0.png").getexif()[0x010F] == "A camera"
    )


def test_command_not_point(run):
    code, out, err = run("edit", "example:dog", TEXT, *SHORT, "--point", "32,36", "--not-point", "3,3", "--out", "out")
    assert code == 0 and "never learnt" not in err
    for args, words in (
        (["--not-point", "3,3"], ["--point"]),
        (["--point", "32,36", "--not-point", "3"], ["--not-point", "X,Y"]),
        (["--mask", "out/mask.png", "--not-point", "3,3"], ["--not-point"]),
        (["--point", "32,36", "--not-point", "3,99"], ["(3, 99)"]),
    ):
        code, out, err = run("edit", "example:dog", TEXT, *SHORT, *args, "--out", "no")
        assert code == 2 and all(word in err for word in words) and not Path("no").exists()


@pytest.mark.parametrize("name", ["ones", "sixteen_ones", "voc"])
def test_command_masks(run, name):
    "A mask of 0 and 1 passes the check on the command line, too."
    from layerdiffusion.interface.cli import _read_request

    FILES[name]()
    options = dict(
        seeds="0",
        box=None,
        point=[],
        not_point=[],
        config=None,
        preset="paper",
        mask="m.png",
        out="out",
        resume=False,
        object_mask=None,
        object_reference=None,
        reference=None,
        preview=None,
        object=None,
        background=None,
        source=None,
        look_every=0,
    )
    assert _read_request("example:dog", options)["mask"] == "m.png"


def test_command_frames(run):
    "What is decided about a picture is said once."
    PICTURE.save("a.webp", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())])
    code, out, err = run("edit", "a.webp", "a dog jumping in a forest", "--mask", "nowhere.png")
    assert code == 2 and err.count("2 frames") == 1
