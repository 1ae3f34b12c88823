"The editor without a browser: its widgets are set as hands would set them, on tiny runs."

import html
import json
import re
import shlex
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("anywidget")
pytest.importorskip("ipywidgets")
from layerdiffusion import BadInput, LayerDiffusion, preset
from layerdiffusion.interface import app as module
from layerdiffusion.interface.app import (
    LayerDiffusionApp,
    _Order,
    _asked_for,
    _free_port,
    _python_lines,
    _shell_line,
    _write_page,
)
from layerdiffusion.interface.cli import main
from layerdiffusion.interface.saving import pixels
from layerdiffusion.base.core import example_path, fit_image, load_image

TINY = dict(embedding_steps=4, tuning_steps=10, sampling_steps=5, count=2)


@pytest.fixture(scope="module")
def method():
    return LayerDiffusion.from_pretrained("mini", "cpu")


@pytest.fixture
def editor(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        LayerDiffusion, "from_pretrained", classmethod(lambda cls, *a, **k: cls(method.models))
    )  # loaded once for all tests, nothing kept
    app = LayerDiffusionApp("example:dog", model=method)
    app.preset.value = "paper"
    turn(app, **TINY)
    yield app
    if app.job:
        app.job.stop()


def turn(app, **values):
    for name, value in values.items():
        app.dials[name].slider.value = value


def said(app, name):
    return html.unescape(re.sub("<.*?>", "", app.says[name].value))


def run(app):
    app.run()
    app.wait()
    return app.shown


def upload(hand, name, data, part=2000):
    "A file as the browser sends it, in parts."
    heard = hand._msg_callbacks
    heard(hand, dict(do="begin", name=name, size=len(data)), [])
    for at in range(0, len(data), part):
        heard(hand, dict(do="part"), [memoryview(data)[at : at + part]])


def test_a_run_is_a_call_of_edit(editor, method):
    "The same pictures as the library gives, with progress, scores, a pick and the lines."
    shown = run(editor)
    assert "Done in" in said(editor, "run") and editor.go.description == "Run" and editor.halt.disabled
    fresh = LayerDiffusion(method.models)
    names = {k: v for k, v in TINY.items() if k != "count"}
    again = fresh.edit(
        "example:dog", editor.text.value, seeds=range(2), config=module.preset("paper", method.models.card, **names)
    )
    assert torch.equal(shown.result.images, again.images)
    assert len(editor.sheet.children) == 2 and all(
        0 <= s["clip"] <= 1 and s["seen"].keys() == module._asked_for(editor.text.value).keys() for s in shown.scores
    )
    assert editor.result_card.layout.display == "" and editor.place.value
    editor.pick(1)
    assert [b.description for _, b in editor.cells] == ["Pick", "Picked"]


def test_stop_and_resume(editor, method, monkeypatch):
    """A stop keeps what was learnt; what follows is what an uninterrupted run gives. The tuning waits for the stop, so
    no
    processor is too quick for it."""
    reached, pressed, call = threading.Event(), threading.Event(), module._Job.__call__

    def hold(job, event=None):
        if event is not None and (event.stage, event.step) == ("tuning", 3):
            reached.set()
            pressed.wait(600)
        return call(job, event)

    monkeypatch.setattr(module._Job, "__call__", hold)
    editor.method = LayerDiffusion(method.models)
    turn(editor, tuning_steps=30)
    editor.run()
    assert reached.wait(600) and editor.go.description == "Queue it" and not editor.halt.disabled
    editor.stop()
    pressed.set()
    editor.wait()
    assert (
        editor.go.description == "Resume" and "Resume goes on there" in said(editor, "run") and editor.method.unfinished
    )
    assert 'of "Teaching subject and place (Eq. 4-6)"' in said(editor, "run"), "named as beside its bar"
    turn(editor, lambda_obj=3.0)
    assert editor.go.description == "Run", "with other settings there is nothing to resume"
    turn(editor, lambda_obj=2.0)
    assert editor.go.description == "Resume"
    resumed = run(editor).result
    editor.method = LayerDiffusion(method.models)
    assert torch.equal(resumed.images, run(editor).result.images) and not editor.method.unfinished


def test_sliders_that_answer_at_once(editor, method):
    first = run(editor)
    editor.pick(1)
    steps = []
    editor.method.tune, _tune = lambda *a, **k: steps.append(1), editor.method.tune
    try:
        for name, value in (("alpha", 0.2), ("guidance_scale", 2.5), ("first", 7), ("count", 3)):
            turn(editor, **{name: value})
            editor.wait()
            if name == "alpha":
                assert editor.picked == 1, "the same seed stays picked"
    finally:
        del editor.method.tune
    shown = editor.shown
    assert (
        not steps
        and shown.result.seeds == [7, 8, 9]
        and shown.result.config.alpha == 0.2
        and shown.result.difference is first.result.difference
    )
    assert shown.redraw == dict(seeds=(7, 3), alpha=0.2, guidance_scale=2.5) and len(editor.history) == 1
    assert "pipe.sample" in editor.lines.value and "load_edit" in editor.lines.value
    turn(editor, alpha=0.7, guidance_scale=2.0, first=0, count=2)
    editor.wait()
    assert editor.shown.redraw is None and torch.equal(editor.shown.result.images, first.result.images)


def test_a_new_wish_overtakes(editor):
    run(editor)
    turn(editor, sampling_steps=100)
    turn(editor, sampling_steps=6)
    editor.wait()
    assert editor.shown.result.config.sampling_steps == 6 and "Stopped" not in said(editor, "run")


@pytest.mark.parametrize(
    "mark",
    [
        lambda c: c.add_point(40, 36).set_box(12, 18, 62, 56.25).place(-0.1, 0, 0.8),
        lambda c: c.paint([(12, 30), (20, 30)], 3),
    ],
)
def test_the_lines_repeat_the_edit(editor, mark, capsys):
    "Shell and Python make the very pictures of the editor, redrawn ones too."
    mark(editor.canvas)
    first = run(editor).result.images
    editor.save()
    assert "Saved in" in said(editor, "save") and {"sheet.png", "edit.safetensors", "picked.png"} <= {
        p.name for p in Path("edits/dog-1").iterdir()
    }
    names = dict(LayerDiffusion=None)
    exec(_python_lines(editor.shown.order), names)
    assert torch.equal(names["result"].images, first)
    assert main(shlex.split(_shell_line(editor.shown.order, folder="shell"))[1:] + ["--device", "cpu"]) == 0
    assert torch.equal(pixels("shell/seed-1.png"), pixels("edits/dog-1/seed-1.png"))
    notes = [module._note_inside(Path(f"{f}/seed-1.png").read_bytes()) for f in ("shell", "edits/dog-1")]
    assert "editor" not in notes[0] and notes[0]["config"] == notes[1]["config"] and notes[0]["seed"] == 1
    order, marks = module._read_order(notes[1]["editor"])
    assert replace(order, marks=editor.shown.order.marks) == editor.shown.order and marks == editor.canvas.marks


def test_the_lines_repeat_a_redrawing(editor):
    run(editor)
    editor.save()
    turn(editor, alpha=0.3, first=4)
    editor.wait()
    shown, names = editor.shown, {}
    exec(_python_lines(shown.order, shown.redraw), names)
    assert torch.equal(names["images"], shown.result.images)
    code = shlex.split(_shell_line(shown.order, shown.redraw, "edits/dog-1"))[-1]
    exec(code, {})
    editor.folder.value = "again"
    editor.save()
    assert torch.equal(pixels("edits/dog-1-redrawn/seed-4.png"), pixels("again/seed-4.png"))


def test_the_split_is_shown_and_can_be_changed(editor):
    assert (editor.object.value, editor.background.value) == ("a brown dog jumping", "in a forest")
    editor.object.value = "a brown dog"
    assert editor.order().parts == dict(object="a brown dog") and "--object" in _shell_line(editor.order())
    editor.text.value = "a cat lying in the snow"
    assert (editor.object.value, editor.order().parts) == ("a cat lying", {})
    editor.text.value = "a dog"
    assert "no place" in said(editor, "text") and "fill in the two fields under Advanced" in said(editor, "text")
    assert (editor.object.value, editor.background.value) == ("", ""), "nothing is left of the former sentence"
    run(editor)
    assert "no place" in said(editor, "run") and not editor.shown
    editor.object.value, editor.background.value = "a dog sitting", "in the snow"
    assert editor.order().parts == dict(object="a dog sitting", background="in the snow")


def test_examples_and_files(editor):
    editor.example.value = "cat"
    assert (
        editor.image == "example:cat"
        and editor.text.value == "an orange cat lying on a beach"
        and editor.folder.value == "edits/cat-1"
    )
    upload(editor.hand, "mine.png", example_path("rabbit").read_bytes())
    assert editor.image == "mine.png" and editor.example.value is None and "64 x 64" in said(editor, "picture")
    editor.path.value = "nothing.png"
    assert "no file" in said(editor, "picture") and editor.image == "mine.png"
    upload(editor.hand, "bad.png", b"no picture")
    assert not editor.shown
    assert "'bad.png' is not a picture" in said(editor, "picture")


def test_the_new_place(editor):
    editor.draw_place()
    editor.wait()
    first, shown = editor.place.value, said(editor, "place")
    assert "seed 0" in shown and editor.reroll.description == "Another one"
    editor.draw_place()
    editor.wait()
    assert (
        editor.place.value != first and "seed 1" in said(editor, "place") and "--seed 1" in _shell_line(editor.order())
    )
    result = run(editor).result
    assert result.config.seed == 1 and module._magnified(result.reference, 192) == editor.place.value, (
        "the run takes the place that was shown"
    )
    upload(editor.own_place, "beach.png", example_path("rabbit").read_bytes())
    assert editor.order().reference == "beach.png" and "--reference beach.png" in _shell_line(editor.order())
    assert (run(editor).result.reference - fit_image(load_image("example:rabbit"), 64)).abs().max() < 0.01
    editor.use_place()
    assert editor.order().reference is None


def test_back_to_an_earlier_edit(editor):
    first = run(editor)
    editor.canvas.add_point(40, 36)
    editor.text.value = "a brown dog sitting in the snow"
    turn(editor, alpha=0.5)
    editor.wait()
    second = run(editor)
    assert editor.history_card.layout.display == "" and editor.history == [second, first]
    editor.back_to(first)
    assert (
        editor.text.value == first.order.text and editor.dials["alpha"].value == 0.7 and not editor.canvas.marks.points
    )
    assert editor.order() == first.order and editor.shown is first


def test_everything_wrong_is_a_sentence(editor, monkeypatch):
    editor.text.value = "a brown dog swimming in a forest"
    assert "does not know the word 'swimming'" in said(editor, "text")
    run(editor)
    assert (
        "swimming" in said(editor, "run") and "Traceback" not in said(editor, "run") and editor.go.description == "Run"
    )
    assert not said(editor, "text") and "start the editor with a full model: layerdiffusion app" in said(editor, "run")
    editor.text.value = "a brown dog jumping in a forest"
    assert not said(editor, "run"), "what is right now is not called wrong any more"
    editor.canvas.clear()
    editor.run()
    assert "mask is empty" in said(editor, "run") and not editor.running and not editor.history
    monkeypatch.setattr(editor.method, "edit", lambda *a, **k: 1 / 0, raising=False)
    editor.canvas.add_point(40, 36)
    run(editor)
    assert "This should not have happened (ZeroDivisionError" in said(editor, "run") and "Traceback" in editor.trace


def test_a_picture_that_cannot_be_opened(method):
    "The editor opens all the same, with an example, and says why."
    app = LayerDiffusionApp("nothing.png", model=method)
    assert app.image == "example:dog" and "no file 'nothing.png'" in said(app, "picture") and app.text.value


def test_another_edit_goes_to_another_folder(editor):
    "What is printed elsewhere is not the editor's business, and a saved edit is not written over."
    run(editor)
    editor.save()
    assert editor.method.say is print and editor.saved == "edits/dog-1"
    turn(editor, lambda_obj=3.0)
    run(editor)
    assert editor.folder.value == "edits/dog-2" and "--out edits/dog-2" in html.unescape(editor.lines.value)


def test_a_folder_that_cannot_be_written(editor):
    run(editor)
    Path("file").write_text("")
    editor.folder.value = "file/x"
    editor.save()
    assert "cannot be written" in said(editor, "save")


def test_a_photo_that_mini_does_not_know(editor):
    "It is said at once, with the way out; the pipeline's warning is a note as well."
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 64, 64, generator=g)
    editor.open_picture(module.to_pil(noise), "noise.png")
    assert "noise.png is not of mini's drawn world" in said(editor, "picture") and "--model" in said(editor, "picture")
    editor.canvas.paint([(32, 32)], 12)
    run(editor)
    assert "mini knows only its drawn world" in said(editor, "run")


def test_presets(editor, method):
    editor.preset.value = "best"
    best = preset("best", method.models.card)
    assert editor.order().changes == {} and editor.dials["tuning_steps"].value == best.tuning_steps
    editor.preset.value = "quick"
    order = editor.order()
    assert (
        order.preset == "best"
        and order.changes.items() >= module._QUICK.items()
        and order.config(method.models.card).tuning_steps == module._QUICK["tuning_steps"]
    )


def test_texts_of_lines():
    order = _Order(
        "it's.png",
        'a "big" dog in a city',
        marks=dict(point=[(1.0, 2.0), (3.0, 4.0)], box=(0.0, 1.0, 2.0, 3.0)),
        reference="a b.png",
        seeds=(3, 2),
        preset="paper",
        model=dict(model="CompVis/stable-diffusion-v1-4", device="cuda"),
    )
    words = shlex.split(_shell_line(order))
    assert (
        words[2:4] == ["it's.png", 'a "big" dog in a city']
        and words.count("--point") == 2
        and words[words.index("--seeds") + 1] == "3-4"
        and "a b.png" in words
    )
    compile(_python_lines(order), "lines", "exec")
    assert "--embedding-steps 0" in _shell_line(_Order("x", "y", changes=dict(embedding_steps=0)))
    assert _asked_for("a cat by the sea") == dict(species="cat", place="beach")


def test_the_page_of_the_command(tmp_path):
    page = _write_page(tmp_path, dict(image="example:cat", text="it's"))
    compile(json.loads(page.read_text())["cells"][-1]["source"], "cell", "exec")
    assert "default-src 'self'" in (tmp_path / "voila.json").read_text()
    for theme in ("auto", "page"):  # only the first one takes the system's colours while it waits
        before = json.loads(_write_page(tmp_path, dict(theme=theme)).read_text())["cells"][0]["source"]
        assert ("ld-auto" in before) == (theme == "auto") and "beforeunload" in before


def test_the_time_left_after_a_stop(editor):
    "What was done before the stop took no time since, and is no sign of speed."
    times = []
    for start in (0, 100):
        editor.progress(module.Event("tuning", 110, 210, seconds=10.0), start)
        times.append(module._time_left(dict(tuning=1), editor.stages, {}))
    assert times == pytest.approx([10 / 110 * 100, 100])


def test_the_page_says_why_there_is_no_editor(tmp_path, monkeypatch):
    from IPython import display

    seen = []
    monkeypatch.setattr(display, "display", seen.append)
    monkeypatch.chdir(tmp_path)
    module.begin(str(tmp_path), image="example:dog", model="no model")
    assert "There is no model folder" in html.unescape(seen[0].data) and "Traceback" not in seen[0].data


def test_the_command_says_what_is_missing(monkeypatch, capsys):
    real = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "voila" else real(name))
    assert main(["app"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'layerdiffusion[app]'" in err and err.count("\n") == 1
    assert main(["app", "nothing.png"]) == 2 and "nothing.png" in capsys.readouterr().err


def test_a_port_that_is_taken():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(BadInput, match="taken"):
            _free_port(s.getsockname()[1])


def test_a_drawing_that_does_not_stop(editor):
    "The next one is not begun beside it, and what it gives is not shown."

    class Slow:
        alive = True

        def stop(self):
            return None

    editor.job, shown = Slow(), []
    assert not editor.start(lambda job: None, lambda value: None, "redraw") and "still stopping" in said(editor, "run")
    editor.job, job = None, type("Job", (), dict(error=None, value=1))()
    editor.ended(job, shown.append)
    assert not shown


def test_every_declared_setting_can_be_touched(editor, method):
    """Sliders and fields are the declared set, with its choices and bounds; what is set is in the order and in
    both lines."""
    from layerdiffusion.settings import SETTINGS

    touched = {name for name in editor.dials if name in SETTINGS} | set(editor.fields)
    assert touched | {"seed"} == set(SETTINGS) and not touched & {"seed"}
    assert {n for n, s in SETTINGS.items() if s.slider} == set(editor.dials) - {"count", "first"}
    for name, setting in SETTINGS.items():
        if name in editor.fields and setting.choices:
            assert tuple(editor.fields[name].options) == setting.choices
        if name in editor.fields and setting.number and setting.high < float("inf"):
            assert (editor.fields[name].min, editor.fields[name].max) == (setting.low, setting.high)
    editor.preset.value = "best"
    assert editor.order().changes == {}
    editor.fields["eq8_index"].value, editor.fields["iterative_guidance"].value = "timestep", False
    order = editor.order()
    assert order.changes == dict(eq8_index="timestep", iterative_guidance=False)
    words = shlex.split(_shell_line(order))
    assert words[words.index("--eq8-index") + 1] == "timestep" and "--no-turns" in words
    assert "iterative_guidance=False, eq8_index='timestep'" in _python_lines(order)


def test_an_upload_that_is_too_large(editor):
    "It is refused before it is sent, and the next one is taken."
    editor.hand._msg_callbacks(editor.hand, dict(do="begin", name="scan.tif", size=300 * 2**20), [])
    assert "'scan.tif' has 300 MB; the limit is 256" in said(editor, "picture")
    upload(editor.hand, "empty.png", b"")
    assert "'empty.png' is an empty file" in said(editor, "picture")
    upload(editor.hand, "mine.png", example_path("cat").read_bytes())
    assert editor.image == "mine.png" and "64 x 64" in said(editor, "picture")


def test_a_dropped_picture_brings_its_settings_back(editor, method):
    order = _Order("example:cat", "a cat sitting on a beach", seeds=(5, 3), preset="paper", changes=dict(alpha=0.35))
    marks = module.Marks(points=((30.0, 40.0, 1),))
    upload(editor.hand, "found.png", module._png(torch.zeros(3, 8, 8), dict(editor=module._order_record(order, marks))))
    assert editor.order() == replace(order, marks=dict(point=[(30.0, 40.0)])) and editor.canvas.marks == marks
    assert "found.png are set again" in said(editor, "picture") and editor.dials["alpha"].value == 0.35
    gone = module._order_record(replace(order, image="lost.jpg", text="a dog lying in the snow"), marks)
    upload(editor.hand, "b.png", module._png(torch.zeros(3, 8, 8), dict(editor=gone)))
    assert "lost.jpg, is not here" in said(editor, "picture") and editor.text.value == "a dog lying in the snow"
    config = module.preset("paper", lambda_obj=4.5).resolve(method.models.card).model_dump()
    note = dict(text="a cat lying in a forest", object="a cat lying", background="in a forest", seed=9, config=config)
    upload(editor.hand, "shell.png", module._png(torch.zeros(3, 8, 8), note))  # of the command line
    assert editor.order().changes == dict(lambda_obj=4.5) and editor.order().seeds == (9, 1)
    note["config"] = dict(lambda_obj="much")
    upload(editor.hand, "bad.png", module._png(torch.zeros(3, 8, 8), note))
    assert "are damaged" in said(editor, "picture") and editor.dials["lambda_obj"].value == 4.5


def test_a_broken_picture_gets_no_tick():
    "The judge's whole counts first, in the marks and in the choice of the best; an unsure answer is no tick."
    colours, poses = (len(_values(k)) for k in ("colour", "pose"))

    def judge(images):
        sure = torch.tensor([[-9.0, 9.0], [9.0, -9.0], [-9.0, 9.0]])
        dog = torch.full((3, len(_values("species"))), -9.0)
        dog[:, _values("species").index("dog")] = 9.0
        pose = torch.zeros(3, poses)
        pose[:, _values("pose").index("jumping")] = 1.0  # most likely, and not likely
        return dict(
            present=sure[[0, 0, 0]], whole=sure, species=dog, pose=pose, colour=torch.zeros(3, colours)
        )  # the second one is broken

    said = module._verdicts(judge, torch.zeros(3, 3, 8, 8), "a dog jumping")
    assert [each["broken"] for each in said] == ["", "broken", ""]
    assert said[0]["seen"] == dict(species=("dog", True), pose=("jumping", None))
    scores = [dict(clip=0.3, likeness=like, **each) for like, each in zip((0.1, 0.9, 0.2), said, strict=True)]
    assert "✓ dog" in module._caption(0, scores[0]) and "? jumping" in module._caption(0, scores[0])
    broken = module._caption(1, scores[1])
    assert "✗ broken" in broken and "✓" not in broken and "like yours" not in broken
    assert max(range(3), key=lambda i: module._worth(scores[i])) == 2


def _values(name):
    from layerdiffusion.mini.world import VALUES

    return VALUES[name]


def test_sentences_wait_for_their_turn(editor):
    editor.run()
    editor.text.value = "a brown dog sitting in the snow"
    editor.run()
    assert [wish[0].text for wish, _ in editor.queue] == ["a brown dog sitting in the snow"] and editor.running
    assert said(editor, "queue") == "Next: a brown dog sitting in the snow"
    editor.text.value = "a brown dog swimming in the snow"
    editor.run()
    assert len(editor.queue) == 1 and "swimming" in said(editor, "run"), "what is refused does not wait"
    editor.wait()
    assert not editor.queue and not said(editor, "queue") and not editor.running
    assert [old.order.text for old in editor.history] == ["a brown dog sitting in the snow", module._TEXTS["dog"]]
    assert editor.history[0].result.split.object == "a brown dog sitting"


def test_nothing_is_lost_with_the_page(editor, method):
    "A second editor on the same folder finds what was set, what was uploaded and what was made."
    first = LayerDiffusionApp("example:dog", model=method, keep="edits")
    upload(first.hand, "mine.png", example_path("dog").read_bytes())
    assert first.image == "edits/uploads/mine.png" and Path(first.image).is_file()
    first.preset.value = "paper"
    turn(first, **TINY)
    first.canvas.add_point(40, 36)
    first.text.value = "a brown dog sitting in the snow"
    made = run(first)
    first.text.value = "a brown dog lying on a beach"
    again = LayerDiffusionApp("example:dog", model=method, keep="edits")
    assert again.text.value == "a brown dog lying on a beach" and again.image == first.image
    assert again.order() == first.order() and again.canvas.marks == first.canvas.marks
    assert again.shown.order.text == "a brown dog sitting in the snow"
    assert again.shown.scores == json.loads(json.dumps(made.scores))
    assert (again.shown.result.images - made.result.images).abs().max() < 0.01
    turn(again, first=7)
    again.wait()
    assert again.shown.result.seeds == [7, 8] and not again.too_old(), "what was learnt is there too"
    module._forget_learnt(Path("edits/history/0001"))
    other = LayerDiffusionApp("example:cat", model=method, keep="edits")
    assert other.image == "example:cat" and other.text.value == module._TEXTS["cat"], "another call begins anew"
    assert other.too_old() and other.shown.order.text == made.order.text


def test_a_good_redrawing_takes_a_refusal_back(editor):
    run(editor)
    editor.text.value = "a brown dog swimming in a forest"
    editor.run()
    assert "swimming" in said(editor, "run")
    turn(editor, first=3)
    editor.wait()
    assert said(editor, "run") == "" and editor.shown.result.seeds == [3, 4]


def test_downloads(editor):
    "The files that the browser is sent are the pictures, with their settings inside."
    import io
    import zipfile

    run(editor)
    sent = []
    editor.hand.send = lambda message, files=(): sent.append((message, files))
    editor.pick(1)
    editor.download()
    editor.download_all()
    (one, (data,)), (every, (packed,)) = sent
    assert (one["name"], every["name"]) == ("dog-1.png", "dog.zip")
    names = zipfile.ZipFile(io.BytesIO(packed)).namelist()
    assert names == ["dog-0.png", "dog-1.png"] and zipfile.ZipFile(io.BytesIO(packed)).read("dog-1.png") == data
    assert module._note_inside(data)["editor"]["text"] == editor.text.value and module._note_inside(data)["seed"] == 1
