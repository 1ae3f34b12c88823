"The canvas without a browser: every mark in plain Python, and what the browser would send."

from dataclasses import asdict

import pytest
import torch

from layerdiffusion.interface.canvas import Marks, _Prompt, PromptCanvas, _Stroke, _mask_bytes, read_marks
from layerdiffusion.base.core import BadInput, load_image
from layerdiffusion.base.masks import find_mask, iou, load_sam, move_mask
from layerdiffusion.pipeline import _read_mask


@pytest.fixture(scope="module")
def sam():
    return load_sam("mini")


@pytest.fixture
def prompt(sam):
    return _Prompt("example:dog", sam)


def big(factor=5):
    "The dog as a large photo, not square."
    image = load_image("example:dog")
    return image.resize((64 * factor, 64 * factor), 0).crop((0, 0, 64 * factor, 48 * factor))


def test_sam_looks_once(sam, monkeypatch):
    looks, encode = [], type(sam.image_encoder).forward
    monkeypatch.setattr(type(sam.image_encoder), "forward", lambda self, x: looks.append(1) or encode(self, x))
    p = _Prompt("example:dog", sam)
    p.add_point(40, 36).add_point(30, 36).set_box(10, 10, 60, 62).remove_point().clear()
    assert len(looks) == 1


def test_a_click_is_find_mask(prompt, sam):
    assert torch.equal(prompt.add_point(40, 36).mask, find_mask(sam, prompt.image, (40, 36)))
    assert torch.equal(
        prompt.add_point(4, 4, subject=False).mask, find_mask(sam, prompt.image, [(40, 36), (4, 4)], labels=[1, 0])
    )
    assert torch.equal(prompt.clear().set_box(12, 18, 62, 56).mask, find_mask(sam, prompt.image, box=(12, 18, 62, 56)))


def test_counts_in_picture_pixels(sam):
    "The same places on a picture five times as large give the same mask as edit's own arguments do."
    p = _Prompt(big(), sam).add_point(200, 180)
    assert p.mask.shape == (1, 48, 64) and p.marks.points == ((200, 180, 1),)
    assert torch.equal(p.mask, find_mask(sam, p.image, (40, 36)))
    brushed = p.paint([(25, 25), (75, 25)], 20).mask
    assert brushed[0, 5, 10] == 1 and brushed[0, 5, 3:16].all() and not brushed[0, 12, 10]


def test_brush_and_eraser(prompt):
    before = prompt.mask
    prompt.paint([(5, 5), (20, 5)], 3)
    assert prompt.mask[0, 5, 4:20].all() and prompt.mask[0, 0, 0] == 0
    assert torch.equal(prompt.paint([(5, 5), (20, 5)], 4, erase=True).mask * (before == 0), torch.zeros_like(before))
    assert torch.equal(prompt.undo().undo().mask, before)


def test_undo_and_redo(prompt):
    states = [prompt.marks]
    for act in (
        lambda: prompt.add_point(40, 36),
        lambda: prompt.place(0.1, -0.1, 0.8),
        lambda: prompt.paint([(3, 3)], 2),
    ):
        states.append(act().marks)
    for expected in states[-2::-1]:
        assert prompt.undo().marks == expected
    assert prompt.undo().marks == Marks()
    for expected in states[1:]:
        assert prompt.redo().marks == expected
    prompt.undo().add_point(30, 30)
    assert prompt.redo().marks.points[-1] == (30, 30, 1), "a new mark ends what could be redone"


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda p: p.add_point(65, 3), "outside the picture"),
        (lambda p: p.set_box(40, 10, 12, 60), "no area"),
        (lambda p: p.set_box(1, 2, 3), "x0, y0, x1, y1"),
        (lambda p: p.place(2, 0), "from -1 to 1"),
        (lambda p: p.place(scale=0), "0.05"),
        (lambda p: p.remove_point(), "no point"),
        (lambda p: p.become(read_marks({"points": [[1, "x", 1]]})), "cannot be read"),
        (lambda p: p.become(read_marks({"move": [float("nan"), 0]})), "cannot be read"),
        (lambda p: p.become(read_marks("nonsense")), "cannot be read"),
        (lambda p: _Prompt(p.picture).add_point(3, 3), "need SAM"),
    ],
)
def test_refuses_in_a_sentence(prompt, act, words):
    with pytest.raises(BadInput, match=words):
        act(prompt)
    assert prompt.marks == Marks() and not prompt.past


def test_marks_go_through_json():
    import json

    marks = Marks(
        ((1.0, 2.0, 1),), (0.0, 0.0, 9.0, 9.0), (_Stroke(((1.0, 2.0), (3.0, 4.0)), 2.0, True),), (0.1, 0.2), 0.5, True
    )
    assert read_marks(json.loads(json.dumps(asdict(marks)))) == marks and read_marks({}) == Marks()


def test_arguments_of_edit(prompt):
    assert prompt.arguments() == {}
    assert prompt.add_point(40, 36).place(0.1, 0, 0.8).arguments() == dict(point=[(40, 36)], move=(0.1, 0), scale=0.8)
    assert prompt.set_box(10, 10, 60, 62).arguments()["box"] == (10, 10, 60, 62)
    given = prompt.paint([(3, 3)], 3).arguments()
    assert torch.equal(_read_mask(given["mask"], 64, 64), prompt.mask) and given["scale"] == 0.8
    with pytest.raises(BadInput, match="empty"):
        prompt.clear().clear().arguments()


def test_without_sam():
    p = _Prompt("example:dog")
    assert p.mask.sum() == 0 and "No subject" in p.says
    assert p.paint([(32, 40)], 8).mask.sum() == pytest.approx(3.14159 * 64, rel=0.05)


def test_still_picture(prompt):
    assert prompt.place(0.1, 0, 0.7).add_point(40, 36).set_box(8, 8, 60, 62).still(128).size == (128, 128)
    assert _Prompt(big(), None).still(128).size == (128, 96)


def browser(sam, **kw):
    pytest.importorskip("anywidget")
    canvas = PromptCanvas("example:dog", sam, **kw)
    assert canvas.widget
    return canvas


def test_one_answer_to_one_message(sam):
    canvas = browser(sam)
    canvas.hear(dict(do="mark", marks=asdict(Marks(points=((40.0, 36.0, 1),)))))
    view = canvas.widget.view
    assert (view["serial"], view["undo"], view["redo"], view["wrong"]) == (1, True, False, False)
    x0, y0, x1, y1 = view["bounds"]
    assert 0 < x0 < 40 < x1 < 64 and 0 < y0 < 36 < y1 < 64
    canvas.hear(dict(do="undo"))
    assert canvas.widget.view["serial"] == 2 and canvas.widget.view["redo"]
    canvas.hear(dict(do="clear"))
    canvas.hear(dict(do="nonsense"))
    assert canvas.widget.view["bounds"] is None


def test_refusal_goes_to_the_browser(sam):
    canvas = browser(sam)
    canvas.hear(dict(do="mark", marks=dict(points=[[400, 3, 1]])))
    assert (
        canvas.widget.view["wrong"]
        and "outside the picture" in canvas.widget.view["says"]
        and canvas.widget.view["marks"]["points"] == ()
    )
    canvas.add_point(40, 36)
    assert not canvas.widget.view["wrong"], "a mark from Python is shown as well"


def test_mask_for_the_browser(prompt):
    import io
    from PIL import Image

    png = Image.open(io.BytesIO(_mask_bytes(prompt.mask)))
    assert png.mode == "LA" and png.size == (512, 512)
    alpha = png.getchannel("A").resize((64, 64), Image.Resampling.BOX)
    assert iou(torch.tensor(list(alpha.getdata())).view(1, 64, 64) / 255, prompt.mask) > 0.95


def test_the_way_of_moving(prompt):
    "Where the browser draws the moved subject is where `move_mask` puts it: about the feet."
    moved = move_mask(prompt.mask, 0.1, -0.05, 0.5)
    ys, xs = torch.where(moved[0] > 0.5)
    from layerdiffusion.base.masks import bounding_box

    x0, _, x1, y1 = bounding_box(prompt.mask)
    feet = (x0 + x1) / 2, y1

    def place(x, y):
        return (feet[0] + 0.1 * 64 + (x - feet[0]) * 0.5, feet[1] - 0.05 * 64 + (y - feet[1]) * 0.5)

    left, right, bottom = place(x0, 0)[0], place(x1, 0)[0], place(0, y1)[1]
    assert abs(xs.min() - left) <= 1 and abs(xs.max() + 1 - right) <= 1 and abs(ys.max() + 1 - bottom) <= 1
