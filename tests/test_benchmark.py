"""The benchmark is the same everywhere and for ever, the truth wins it, and an adapter that errs is told how."""

import json

import pytest
import torch
from PIL import Image

from layerdiffusion.evidence.benchmark import (
    _NAME,
    _SHEET,
    VERSION,
    _as_tensors,
    _benchmark_hash,
    _benchmark_tasks,
    _check_world,
    _export_tasks,
    _from_folder,
    given,
    _leaderboard,
    _read_tasks,
    _recorded_rows,
    _run_benchmark,
    _score_joint,
    _small_pictures,
    score_folder,
)
from layerdiffusion.evidence.scores import _SETS, edit_set
from layerdiffusion.base.core import BadInput, to_pil
from layerdiffusion.mini.world import VALUES
from layerdiffusion.pipeline import LayerDiffusion

@pytest.fixture(scope="module")
def method():
    return LayerDiffusion.from_pretrained("mini", "cpu")


def test_the_tasks_are_those_of_version_2():
    "If this fails, the tasks are others: raise VERSION and pin the new hash. No pixel goes into it."
    assert (_NAME, VERSION, _benchmark_hash()) == ("layerdiffusion-joint-60", 2, "c17a953265da90a7")


def test_another_world_is_refused():
    """A picture drawn a little otherwise, another mask, two tasks in each other's place, a word: each in one sentence.
    What a processor rounds otherwise passes. The sheet is made by `python tests/test_benchmark.py`."""

    def swap(tasks):
        tasks[0], tasks[1] = tasks[1], tasks[0]

    for change in (
        lambda tasks: tasks[7].edit.answer[:, 20:24, 20:24].mul_(0.9).add_(0.02),
        lambda tasks: tasks[59].edit.mask.copy_(tasks[59].edit.answer_mask),
        swap,
        lambda tasks: setattr(tasks[3].edit, "text", tasks[3].edit.text + " "),
    ):
        tasks = _benchmark_tasks()
        change(tasks)
        with pytest.raises(BadInput, match="other tasks than those of layerdiffusion-joint-60 version 2 .*; install"):
            _check_world(tasks)
    tasks = _benchmark_tasks()
    tasks[7].edit.answer.mul_(1 - 1e-6)
    _check_world(tasks)


def test_the_tasks_are_in_no_other_set():
    "Neither a photo nor an individual; and no two of them ask for the same."

    def look(task):
        return tuple(task.edit.before.look.flatten().tolist())

    tasks = edit_set("joint 2", 8)
    assert len({(t.edit.source, t.edit.text) for t in tasks}) == len({look(t) for t in tasks}) == len(tasks) == 60
    others = [t for name in _SETS if name != "joint 2" for t in edit_set(name, 8)]
    assert len(others) == 123 and not {look(t) for t in tasks} & {look(t) for t in others}


def test_the_tasks_are_spread():
    "Every task changes pose and place; each species in twenty, each pose asked for in fifteen, some black."

    def count(values):
        return sorted(torch.cat(values).unique(return_counts=True)[1].tolist())

    before, after = zip(*((t.edit.before, t.edit.after) for t in edit_set("joint 2", 8)), strict=True)
    assert count([s.species for s in after]) == [20] * 3 and count([s.pose for s in after]) == [15] * 4
    assert min(count([s.place for s in after])) >= 4 and min(count([s.colour for s in after])) >= 4
    assert all(a.pose != b.pose and a.place != b.place for a, b in zip(before, after, strict=True))
    assert sum(int(s.colour) == VALUES["colour"].index("black") for s in before) >= 5


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
    assert table.index("truth (1 of 60 tasks)") < table.index("paste")


def test_files_are_enough(method, tmp_path):
    _export_tasks(tmp_path / "tasks")
    about = json.loads((tmp_path / "tasks" / "tasks.json").read_text())
    assert about["hash"] == _benchmark_hash() and len(about["tasks"]) == 60
    for t in about["tasks"]:
        where = tmp_path / "tasks" / t["name"]
        assert {p.name for p in where.iterdir()} == {
            "photo.png",
            "mask.png",
            "reference.png",
            "answer.png",
            "answer_mask.png",
        }
    first = tmp_path / "mine" / about["tasks"][0]["name"]
    first.mkdir(parents=True)
    Image.open(tmp_path / "tasks" / first.name / "answer.png").save(first / "0.png")
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


def test_recorded_methods_are_rows(tmp_path):
    "Means over the record's pictures, the interval over its tasks."
    from layerdiffusion.evidence.scores import append_line

    fields, file = ("right", "valid", "identity", "background", "clip"), tmp_path / "benchmark.jsonl"
    for k in (0, 1):
        row = dict(hash=_benchmark_hash(), method="SDEdit", edit=f"joint 2 {k}")
        append_line(file, row | dict(scores=[{f: float(k) for f in fields}] * 2))
    (row,) = _recorded_rows(file)
    assert (row["n"], row["tasks"], row["seeds"], row["right"]) == (4, 2, [0, 1], [0.5, 0.0, 1.0])
    assert "SDEdit (2 of 60 tasks)" in _leaderboard([row])
    with pytest.raises(BadInput, match="'SDEdit' is of layerdiffusion-joint-15 version 1 .*draw these tasks"):
        _leaderboard([row, row | dict(benchmark="layerdiffusion-joint-15", version=1, hash="fa1cca1ba3bb3760")])


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


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Three tasks in both forms, and pictures of three methods: the photos back, the true answers, and those in another
    order."""
    place, edits = tmp_path_factory.mktemp("asked"), [t.edit for t in _benchmark_tasks()[:3]]
    for name in ("photos", "back", "true", "mixed"):
        (place / name).mkdir()
    for i, e in enumerate(edits):
        to_pil(e.image).save(place / "photos" / f"{i}.jpg", quality=100)
        to_pil(e.image).save(place / "back" / f"{i}.png")
        to_pil(e.answer).save(place / "true" / f"{i}.png")
        to_pil(e.answer).save(place / "mixed" / f"{(i + 1) % 3}.png")
    kinds = ["action", "action", "background"]
    imgedit = {str(i): dict(id=f"{i}.jpg", prompt=e.text, edit_type=kinds[i]) for i, e in enumerate(edits)}
    captions = [*(e.text for e in edits[:2]), "a dog lying"]  # the last names no place
    tedbench = [dict(original_image=f"{i}.jpg", caption=text) for i, text in enumerate(captions)]
    (place / "imgedit.json").write_text(json.dumps(imgedit))
    (place / "tedbench.json").write_text(json.dumps(tedbench))
    return place


def scored(asked, name, tasks="imgedit.json", **more):
    return score_folder(asked / name, name, asked / tasks, photos=asked / "photos", **more)


def test_a_file_of_tasks(asked):
    "Answers go better with their texts than photos or other answers do; photos are likest to themselves."
    back, true, mixed = (scored(asked, name)[0] for name in ("back", "true", "mixed"))
    assert back["n"] == {"action": 2, "background": 1, "all": 3} and back["hash"] == true["hash"]
    said = {row["method"]: {f: m for f, (m, *_) in row["scores"]["all"].items()} for row in (back, true, mixed)}
    assert said["true"]["clip"] > max(said["back"]["clip"], said["mixed"]["clip"])
    assert said["true"]["own text"] > said["mixed"]["own text"]
    assert said["back"]["photo"] > 0.99 > said["true"]["photo"] and said["back"]["own photo"] == 1
    assert "| background | 1 |" in scored(asked, "back")[1]


def test_tedbench_with_our_rule(asked):
    "T_a and T_b of the two captions that name a place; other captions are other tasks."
    row = scored(asked, "true", "tedbench.json")[0]
    assert set(row["scores"]["all"]) == {"clip", "own text", "photo", "own photo", "T_a", "T_b"}
    assert row["hash"] != scored(asked, "true")[0]["hash"]
    tasks = _read_tasks(asked / "tedbench.json", asked / "photos")
    assert [len(t["parts"]) for t in tasks] == [2, 2, 0] and tasks[0]["parts"][1] in tasks[0]["text"]


def test_an_image_encoder_that_is_given(asked, tmp_path):
    "It says how alike pictures are, and not CLIP."
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path / "dino")
    look = dict(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
    BitImageProcessor(**look).save_pretrained(tmp_path / "dino")
    (row, _), (clip, _) = scored(asked, "true", features=tmp_path / "dino"), scored(asked, "true")
    mine, theirs = row["scores"]["all"], clip["scores"]["all"]
    assert mine["clip"] == theirs["clip"] and mine["photo"] != theirs["photo"] and row["features"].endswith("dino")


def test_the_command_scores(asked, tmp_path, capsys):
    "Says the table and writes the row."
    from layerdiffusion.interface.cli import main

    few = ["--tasks", str(asked / "tedbench.json"), "--photos", str(asked / "photos"), "--clip", "mini"]
    assert main(["score", str(asked / "true"), *few, "--name", "truth", "--out", str(tmp_path / "row.json")]) == 0
    assert "| truth | pictures | clip |" in capsys.readouterr().out
    assert json.loads((tmp_path / "row.json").read_text())["method"] == "truth"


def test_those_of_our_tasks_that_a_folder_has(method, tmp_path):
    "With the seeds it has; a seed that one task lacks is missed."
    answer = to_pil(_benchmark_tasks()[0].edit.answer)
    (tmp_path / "joint-2-0").mkdir()
    answer.save(tmp_path / "joint-2-0" / "3.png")
    row = _score_joint(tmp_path, "truth", method)
    assert (row["tasks"], row["seeds"], row["valid"][0]) == (1, [3], 1)
    (tmp_path / "joint-2-1").mkdir()
    answer.save(tmp_path / "joint-2-1" / "4.png")
    with pytest.raises(BadInput, match="joint-2-0/4.png is not there"):
        _score_joint(tmp_path, "truth", method)


def test_what_cannot_be_scored(asked, tmp_path, capsys):
    "One sentence each, with the way out."
    from layerdiffusion.interface.cli import main

    files = dict(text="no JSON", list="[1]", empty="{}", half='{"0": {"id": "0.jpg", "prompt": "a dog"}}', number="7")
    for name, photo, text in (("words", "0.jpg", 5), ("photo", "x", "a")):
        files[name] = json.dumps([dict(original_image=photo, caption=text)])
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "folder").mkdir()
    photos = ["--photos", str(asked / "photos"), "--clip", "mini"]
    for args, words in (
        ([str(tmp_path / "folder")], ["folder", "joint-2-0/0.png"]),
        (["nowhere", *photos], ["--tasks FILE"]),
        *([["nowhere", "--tasks", f"{tmp_path}/{n}.json", *photos], ["neither form", n]] for n in files if n not in
          ("empty", "photo")),
        (["nowhere", "--tasks", f"{tmp_path}/empty.json"], ["holds no task"]),
        (["nowhere", "--tasks", f"{tmp_path}/photo.json"], ["--photos"]),
        (["nowhere", "--tasks", "none.json"], ["none.json", "cannot be read"]),
        (["nowhere", "--tasks", f"{asked}/imgedit.json", *photos], ["3 of 3", "nowhere/0.png"]),
        ([f"{asked}/true", "--tasks", f"{asked}/imgedit.json", *photos, "--features", str(asked)], ["image encoder"]),
        ([f"{asked}/true", "--tasks", f"{asked}/imgedit.json", *photos[:2], "--clip", "none"], ["none"]),
    ):
        assert main(["score", *args]) == 2, args
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not [w for w in words if w not in said], said


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
    to_pil(_small_pictures(edit_set("joint 2"))).save(_SHEET, lossless=True, exact=True, quality=100, method=6)
