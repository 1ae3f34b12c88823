"""The benchmark is the same everywhere and for ever, the truth wins it, and an adapter that errs is told how."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from layerdiffusion.evidence.benchmark import (
    _NAME,
    VERSION,
    _as_tensors,
    _benchmark_hash,
    _benchmark_tasks,
    _export_tasks,
    _from_folder,
    given,
    _leaderboard,
    _recorded_rows,
    _run_benchmark,
)
from layerdiffusion.base.core import BadInput, to_pil
from layerdiffusion.pipeline import LayerDiffusion
from layerdiffusion.interface.saving import pixels

SHEET = Path(__file__).with_name("benchmark.png")


@pytest.fixture(scope="module")
def method():
    return LayerDiffusion.from_pretrained("mini", "cpu")


def test_the_tasks_are_those_of_version_1():
    "If this fails, the tasks are others: raise VERSION and pin the new hash. No pixel goes into it."
    assert (_NAME, VERSION, _benchmark_hash()) == ("layerdiffusion-joint-15", 1, "fa1cca1ba3bb3760")


def small_pictures():
    "All pictures of the tasks, each cell of four pixels by four as its mean: a row for each task."

    def shown(e):
        return (e.image, e.mask, e.reference, e.answer, e.answer_mask)

    rows = [torch.cat([x.expand(3, -1, -1) for x in shown(t.edit)], 2) for t in _benchmark_tasks()]
    return torch.nn.functional.avg_pool2d(torch.cat(rows, 1), 4)


def test_the_tasks_look_as_in_version_1():
    """The renderer draws the scenes as it did, to one of 255 levels in a cell's mean; what a processor rounds otherwise
    is
    a thousandth of that. The file is made by `python tests/test_benchmark.py`."""
    then = pixels(SHEET)
    assert (small_pictures() - then).abs().max() < 1 / 255


def test_the_hash_sees_every_scene_and_word():
    tasks, seen = _benchmark_tasks(), {_benchmark_hash()}
    words, look = lambda e: setattr(e, "text", e.text + " "), lambda e: e.after.look.mul_(0.9)
    for change in (words, look, lambda e: e.before.pose.add_(1), lambda e: e.after.where.add_(0.01)):
        tasks = _benchmark_tasks()
        change(tasks[3].edit)
        seen.add(_benchmark_hash(tasks))
    assert len(seen) == 5


def test_the_hash_does_not_see_rounding():
    "The last digits of a scene's numbers, and the pixels, may differ from one processor to another."
    tasks = _benchmark_tasks()
    for t in tasks:
        for scene in (t.edit.before, t.edit.after):
            scene.where = scene.where * (1 + 2**-23)
        t.edit.image.mul_(1 - 1e-6)
    assert _benchmark_hash(tasks) == _benchmark_hash()


def test_the_answer_is_not_given():
    task = _benchmark_tasks()[0]
    assert set(given(task)) == {"photo", "mask", "source", "text", "reference"}


def test_truth_beats_pasting(method, tmp_path):
    tasks, answers = _benchmark_tasks()[:1], {t.edit.text: to_pil(t.edit.answer) for t in _benchmark_tasks()}
    truth = _run_benchmark(
        lambda text, seeds, **_: [answers[text]] * len(seeds), "truth", [0], tmp_path / "truth.json", tasks, method
    )
    paste = _run_benchmark(
        lambda photo, mask, reference, seeds, **_: [Image.composite(photo, reference, mask.convert("L"))],
        "paste",
        [0],
        None,
        tasks,
        method,
    )
    assert truth["valid"][0] == 1 and truth["right"][0] > paste["right"][0]
    assert json.loads((tmp_path / "truth.json").read_text()) == json.loads(json.dumps(truth))
    table = _leaderboard([paste, truth])
    assert table.index("truth (1 of 15 tasks)") < table.index("paste")


def test_files_are_enough(method, tmp_path):
    _export_tasks(tmp_path / "tasks")
    about = json.loads((tmp_path / "tasks" / "tasks.json").read_text())
    assert about["hash"] == _benchmark_hash() and len(about["tasks"]) == 15
    for t in about["tasks"]:
        where = tmp_path / "tasks" / t["name"]
        assert {p.name for p in where.iterdir()} == {
            "photo.png",
            "mask.png",
            "reference.png",
            "answer.png",
            "answer_mask.png",
        }
        (tmp_path / "mine" / t["name"]).mkdir(parents=True)
        Image.open(where / "answer.png").save(tmp_path / "mine" / t["name"] / "0.png")
    assert (
        _run_benchmark(_from_folder(tmp_path / "mine"), "files", [0], tasks=_benchmark_tasks()[:1], method=method)[
            "valid"
        ][0]
        == 1
    )
    with pytest.raises(BadInput, match="1.png is not there"):
        _run_benchmark(_from_folder(tmp_path / "mine"), "files", [0, 1], tasks=_benchmark_tasks()[:1], method=method)


@pytest.mark.parametrize(
    "gave, says",
    [
        ([Image.new("RGB", (64, 64))], "1 pictures for 2 seeds"),
        (["a", "b"], "gave a str"),
        (torch.rand(2, 64, 64, 3), "shape"),
    ],
)
def test_what_an_adapter_may_not_give(gave, says):
    with pytest.raises(BadInput, match=says):
        _as_tensors(gave, 2)


def test_any_size_is_taken():
    assert _as_tensors([Image.new("RGBA", (128, 128)), Image.new("L", (64, 64))], 2).shape == (2, 3, 64, 64)
    x = torch.rand(2, 3, 64, 64)
    assert (_as_tensors(x, 2) - x).abs().max() < 1 / 255


def test_recorded_methods_are_rows():
    row = dict(
        setting="SDEdit",
        n=4,
        seconds=1.0,
        **{f: [0.5, 0.4, 0.6] for f in ("right", "valid", "identity", "background", "clip")},
    )
    rows = _recorded_rows(dict(edits=["joint 0"], seeds=[0, 1, 2, 3], size="quick", settings=[row]))
    assert "SDEdit (1 of 15 tasks) (a fifth of the steps)" in _leaderboard(rows)


@pytest.mark.parametrize(
    "made, said",
    [
        (lambda: torch.rand(1, 3, 64, 64) * 255, "from 0 to 1"),
        (lambda: torch.rand(1, 3, 64, 64) * 2 - 1, "from 0 to 1"),
        (lambda: torch.full((1, 3, 64, 64), float("nan")), "from 0 to 1"),
        (lambda: torch.rand(1, 3, 64, 32), "must be square"),
        (lambda: None, "gave a NoneType"),
    ],
)
def test_answers_that_are_no_pictures(made, said):
    "A stranger's method is told, not scored."
    from layerdiffusion.base.core import BadInput

    with pytest.raises(BadInput, match=said):
        _as_tensors(made(), 1)
    assert _as_tensors(torch.rand(1, 3, 64, 64), 1).shape == (1, 3, 64, 64)


def test_a_run_without_tasks_and_with_odd_seeds(tmp_path):
    from layerdiffusion.base.core import BadInput

    with pytest.raises(BadInput, match="list of tasks is empty"):
        _run_benchmark(lambda **_: None, "x", tasks=[], method=object())
    with pytest.raises(BadInput, match="not a whole number"):
        _run_benchmark(lambda **_: None, "x", seeds=["a"], method=object())
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        _export_tasks(tmp_path / "file")


def test_metrics_refuse_what_is_not_a_batch():
    from layerdiffusion.base.core import BadInput
    from layerdiffusion.evidence.metrics import Clip, clip_score, subject_likeness

    clip, x = Clip("mini"), torch.rand(2, 3, 64, 64)
    for wrong in (x[0], (x * 255).byte()):
        with pytest.raises(BadInput, match="Pictures are a tensor"):
            clip_score(clip, wrong, "a dog")
    with pytest.raises(BadInput, match="2 pictures and 1 masks"):
        subject_likeness(clip.pictures, x, [None], x[0], torch.ones(1, 64, 64))


if __name__ == "__main__":
    to_pil(small_pictures()).save(SHEET, optimize=True)
