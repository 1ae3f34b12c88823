"""An experiment, cut off and run again: nothing is drawn twice, nothing is lost, and the record says what was done."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from layerdiffusion.evidence import experiments
from layerdiffusion.base.core import BadInput
from layerdiffusion.evidence.experiments import (
    EXPERIMENTS,
    _PICTURES,
    _RECORDS,
    _RUN_SIZES,
    _TABLE,
    _Setting,
    Wanted,
    by_tuning,
    compare,
    _correct,
    count_answers,
    difference,
    _framed,
    load_corrections,
    load_experiment,
    pack,
    _planned,
    read_cell,
    recorded,
    _run_cell,
    _run_experiment,
    _save_strip,
    seed_sheet,
    sheet_title,
    show_experiment,
    summary,
    told,
    _valid_marks,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "Two settings on two edits in two processes."
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_RUN_SIZES, "tiny", dict(edits=2, seeds=2, share=0.1))
        patch.setitem(
            EXPERIMENTS,
            "two",
            lambda of: [
                _Setting("SDEdit", "sdedit", dict(strength=0.5)),
                _Setting("paper", "paper", dict(embedding_steps=10, tuning_steps=10)),
            ],
        )
        yield folder, _run_experiment("two", "tiny", "paper", folder)


def test_all_cells_are_there(done):
    folder, record = done
    assert [(r["setting"], r["n"], len(r["cells"])) for r in record["settings"]] == [("SDEdit", 4, 2), ("paper", 4, 2)]
    for row in record["settings"]:
        for cell in row["cells"]:
            kept, pictures = read_cell(folder, cell)
            assert len(kept["scores"]) == len(pictures) == 2
    assert sorted(p.name for p in folder.iterdir()) == [_TABLE, _PICTURES, _RECORDS]
    assert record["environment"] and record["seeds"] == [0, 1] and len(record["edits"]) == 2
    assert load_experiment("two", "tiny", "paper", folder) == record
    assert "SDEdit" in show_experiment(record)
    assert seed_sheet(record, "paper", 1, folder).width > 100


def alike(a, b):
    "The same but for the last digits, which depend on how many threads a process has."
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == pytest.approx(b, abs=2e-3) if isinstance(a, float) else a == b


def rows_in(folder):
    "The packed table: the name of a cell -> its row."
    with gzip.open(folder / _TABLE, "rt", encoding="utf-8") as f:
        return {row["name"]: row for row in map(json.loads, f)}


def test_a_lost_cell_is_made_again_the_same(done):
    folder, record = done
    before, lost = rows_in(folder), record["settings"][1]["cells"][0]
    with gzip.open(folder / _TABLE, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for name, row in before.items() if name != lost)
    again = _run_experiment("two", "tiny", "paper", folder, workers=1)
    after = rows_in(folder)
    assert alike(after[lost]["scores"], before[lost]["scores"])
    assert {n: r for n, r in after.items() if n != lost} == {n: r for n, r in before.items() if n != lost}

    def timeless(r):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in r["settings"]]

    assert alike(timeless(again), timeless(record))


def test_two_names_for_the_same_numbers_share_a_cell(done):
    folder, record = done
    packed = [(folder / name).read_bytes() for name in (_TABLE, _PICTURES)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_RUN_SIZES, "tiny", dict(edits=2, seeds=2, share=0.1))
        patch.setitem(EXPERIMENTS, "named", lambda of: [_Setting("half way up", "sdedit", dict(strength=0.5))])
        named = _run_experiment("named", "tiny", "paper", folder, workers=1)
        both = [load_experiment(n, "tiny", "paper", folder)["name"] for n in ("two", "named")]
    assert [(r["setting"], r["cells"], r["right"]) for r in named["settings"]] == [
        ("half way up", record["settings"][0]["cells"], record["settings"][0]["right"])
    ]
    assert [(folder / name).read_bytes() for name in (_TABLE, _PICTURES)] == packed and both == ["two", "named"]


def test_a_failure_is_told_and_leaves_no_half_cell(done, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "bad", lambda of: [_Setting("none", "sdedit", dict(strength=2.0))])
        with pytest.raises(BadInput, match="strength is 2"):
            _run_experiment("bad", "tiny", "paper", tmp_path, workers=1)
    assert not list((tmp_path / "cells").iterdir())


# Packed


def draw(folder, *names, shade=0.5):
    "Loose cells as a run leaves them: two grey pictures each."
    for name in names:
        _save_strip(torch.full((2, 3, 16, 16), shade), folder / "cells" / f"{name}.webp")
        row = dict(name=name, edit="joint 0", scores=[dict(valid=True), dict(valid=False)])
        (folder / "cells" / f"{name}.json").write_text(json.dumps(row) + "\n", encoding="utf-8")


def write_record(folder, name, of="best", size="quick"):
    (folder / f"{name}-{of}-{size}.json").write_text(json.dumps(dict(name=name, size=size)), encoding="utf-8")


def contents(folder, names):
    return {n: (row := read_cell(folder, n))[0] | dict(pictures=[x.tobytes() for x in row[1]]) for n in names}


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_packed_and_loose_read_the_same(tmp_path):
    draw(tmp_path, *"abc")
    write_record(tmp_path, "alpha")
    _correct(tmp_path / "corrections.json", "a", 1, True)
    before, record = contents(tmp_path, "abc"), load_experiment("alpha", folder=tmp_path)
    assert pack(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [_TABLE, _PICTURES, "corrections.json", _RECORDS]
    assert contents(tmp_path, "abc") == before and recorded("alpha", tmp_path) == dict(best=record)
    packed = files(tmp_path)
    assert pack(tmp_path) == 0 and files(tmp_path) == packed
    draw(tmp_path, "d")
    write_record(tmp_path, "alpha", size="paper")
    assert pack(tmp_path) == 1 and list(contents(tmp_path, "abcd")) == list("abcd")
    assert load_experiment("alpha", folder=tmp_path)["size"] == "paper"
    assert load_experiment("alpha", "quick", folder=tmp_path) == record


def test_packs_of_the_same_cells_are_the_same_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    draw(one, *"abc")
    pack(one)
    for name in "cba":
        draw(two, name)
        os.utime(two / "cells" / f"{name}.webp", (10**9, 10**9))
        pack(two)
    assert files(one) == files(two)


def test_a_pack_cut_off_anywhere_loses_nothing(tmp_path, monkeypatch):
    "Every write and every removal in turn is the last."

    class Killed(BaseException):
        pass

    def steps(left):
        def counted(real):
            def call(*a, **k):
                left[0] -= 1
                if not left[0]:
                    raise Killed
                return real(*a, **k)

            return call

        monkeypatch.setattr(experiments, "write_atomic", counted(experiments.write_atomic))
        monkeypatch.setattr(experiments, "write_json", counted(experiments.write_json))
        monkeypatch.setattr(Path, "unlink", counted(Path.unlink))

    ends, whole = 0, None
    for n in range(1, 100):
        folder = tmp_path / str(n)
        draw(folder, *"ab")
        pack(folder)
        draw(folder, *"bc", shade=0.8)
        write_record(folder, "alpha")
        before = contents(folder, "abc")
        with monkeypatch.context():
            steps([n])
            try:
                pack(folder)
            except Killed:
                ends += 1
            else:
                whole = files(folder)
            monkeypatch.undo()
        assert contents(folder, "abc") == before and load_experiment("alpha", folder=folder)["name"] == "alpha"
        if whole:
            break
        pack(folder)
    assert ends >= 6 and all(files(tmp_path / str(k)) == whole for k in range(1, n))


def test_a_packed_cell_is_not_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "numbers_of", lambda *a: {})
    monkeypatch.setattr(experiments, "cell_name", lambda *a: "a")
    monkeypatch.setattr(experiments, "_draw_cell", lambda *a: pytest.fail("drawn again"))
    draw(tmp_path, "a")
    pack(tmp_path)
    assert _run_cell(None, None, _Setting("mine"), [0], tmp_path)["setting"] == "mine"


def test_half_a_cell_is_not_packed_and_stays(tmp_path):
    draw(tmp_path, *"ab")
    (tmp_path / "cells/b.json").unlink()
    assert pack(tmp_path) == 1 and list(files(tmp_path / "cells")) == ["b.webp"]
    with pytest.raises(BadInput, match="no cell 'b'"):
        read_cell(tmp_path, "b")


@pytest.mark.parametrize("name", [_TABLE, _PICTURES, _RECORDS])
def test_what_is_damaged_is_told_and_kept(tmp_path, name):
    draw(tmp_path, *"ab")
    write_record(tmp_path, "alpha")
    pack(tmp_path)
    half = (tmp_path / name).read_bytes()[:-40]
    (tmp_path / name).write_bytes(half)
    draw(tmp_path, "c")
    write_record(tmp_path, "steps")
    reads = load_experiment if name == _RECORDS else read_cell
    with pytest.raises(BadInput, match=f"{name}.*damaged"):
        reads(*(("alpha", None, "best", tmp_path) if name == _RECORDS else (tmp_path, "a")))
    with pytest.raises(BadInput, match=f"{name}.*damaged"):
        pack(tmp_path)
    assert (tmp_path / name).read_bytes() == half and read_cell(tmp_path, "c")
    assert load_experiment("steps", "quick", folder=tmp_path)


def test_the_archive_opens_with_any_tool(tmp_path):
    draw(tmp_path, *"ab")
    pack(tmp_path)
    with zipfile.ZipFile(tmp_path / _PICTURES) as archive:
        assert archive.testzip() is None and archive.namelist() == ["a.webp", "b.webp"]


def test_missing_pictures_are_told(tmp_path):
    draw(tmp_path, "a")
    pack(tmp_path)
    (tmp_path / _PICTURES).unlink()
    with pytest.raises(BadInput, match="pictures of the cell 'a'"):
        read_cell(tmp_path, "a")


@pytest.mark.parametrize(
    "wrong, says",
    [
        (("nothing", "quick", "best"), "no experiment"),
        (("alpha", "huge", "best"), "no size"),
        (("alpha", "quick", "good"), "no preset"),
    ],
)
def test_what_there_is_not(wrong, says):
    with pytest.raises(BadInput, match=says):
        _planned(*wrong)


def test_fewer_than_one_process(tmp_path):
    with pytest.raises(BadInput, match="at least 1"):
        _run_experiment("alpha", "quick", "best", tmp_path, workers=0)


def test_no_such_model(tmp_path):
    with pytest.raises(BadInput, match="no model folder 'nowhere'"):
        _run_experiment("alpha", "quick", "best", tmp_path / "x", model="nowhere")
    assert not (tmp_path / "x").exists()


def test_each_picture_has_a_clip_score(done):
    folder, record = done
    for row in record["settings"]:
        for cell in row["cells"]:
            assert all(-1 <= s["clip"] <= 1 for s in read_cell(folder, cell)[0]["scores"])
        assert len(row["by_edit"]["clip"]) == 2 and abs(sum(row["by_edit"]["clip"]) / 2 - row["clip"][0]) < 1e-3


def test_difference_is_of_the_same_edits():
    def rows(name, values):
        return dict(setting=name, by_edit=dict.fromkeys(("right", "valid", "identity", "background", "clip"), values))

    record = dict(
        edits=list("abcdef"),
        settings=[rows("x", [0.9, 0.5, 0.1, 0.6, 0.3, 0.4]), rows("y", [0.8, 0.4, 0.0, 0.5, 0.2, 0.3])],
    )
    mean, low, high = difference(record, "x", "y")
    assert abs(mean - 0.1) < 1e-6 and abs(low - 0.1) < 1e-6 and abs(high - 0.1) < 1e-6  # hard edits are hard for both
    assert (
        ": yes;" in compare(record, "x", "y")
        and ": no;" in compare(record, "y", "x")
        and ": yes;" in compare(record, "y", "x", "identity")
    )
    assert ": no;" in compare(record, "x", "y", least=0.4)
    assert "1 edit is too few to tell" in compare(
        dict(record, edits=["a"]), "x", "y"
    ) and "3 edits are too few" in compare(dict(record, edits=list("abc")), "x", "y")
    with pytest.raises(BadInput, match="no score 'beauty'"):
        difference(record, "x", "y", "beauty")


def test_where_nothing_is_left_to_rise():
    def rows(name, value):
        return dict(setting=name, by_edit=dict.fromkeys(("right", "valid", "clip"), [value] * 6))

    record = dict(edits=list("abcdef"), settings=[rows("x", 1.0), rows("y", 1.0), rows("z", 0.0)])
    answers = [compare(record, "x", "y"), compare(record, "x", "z", "right"), compare(record, "x", "y", "clip")]
    assert ": all are, with both;" in answers[0] and ": yes;" in answers[1] and ": no;" in answers[2]
    assert count_answers(answers) == "all are, with both: 1, yes: 1, no: 1"


def test_a_record_from_before_says_what_paper_meant_then():
    "The presets of version 1 learnt the subject from a drawn picture; a record of today has its version."
    folder = Path(__file__).resolve().parents[1] / "nbs" / "results" / "experiments"
    record = load_experiment("alpha", of="paper", folder=folder)
    record.pop("version", None)
    assert "object_picture='target'" in told(record) and "target" not in told(record | dict(version=2))


def test_only_complete_edits_are_counted(done):
    folder, record = done
    settings = EXPERIMENTS.get(
        "two", lambda of: [_Setting("SDEdit", "sdedit", dict(strength=0.5)), _Setting("paper", "paper")]
    )("paper")
    rows = [read_cell(folder, c)[0] for row in record["settings"] for c in row["cells"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_RUN_SIZES, "tiny", dict(edits=2, seeds=2, share=0.1))
        part = summary("two", "tiny", "paper", settings, rows[:-1])
        with pytest.raises(BadInput, match="No edit"):
            summary("two", "tiny", "paper", settings, rows[:2])
    assert part["edits"] == record["edits"][:1] and part["asked"] == 2 and [r["n"] for r in part["settings"]] == [2, 2]


def test_marks_can_be_corrected(done, tmp_path):
    folder, record = done
    cell, _ = read_cell(folder, record["settings"][0]["cells"][0])
    before = _valid_marks(cell)
    _correct(tmp_path / "c.json", cell["name"], 1, not before[1])
    marks = load_corrections(tmp_path / "c.json")
    assert _valid_marks(cell, marks) == [before[0], not before[1]]
    counts = [sheet_title(record, "SDEdit", 0, folder, c) for c in (None, marks)]
    assert f"{sum(before)} of 2" in counts[0] and f"{sum(before) + (1 if not before[1] else -1)} of 2" in counts[1]


def test_valid_pictures_are_framed():
    grey = Image.new("RGB", (20, 20), "grey")
    assert _framed(grey, True).getpixel((0, 0)) == (221, 34, 34) and _framed(grey, False) == grey


def test_turns_or_not_the_unet_is_tuned_once(tmp_path, monkeypatch):
    from layerdiffusion import pipeline
    from layerdiffusion.pipeline import LayerDiffusion
    from layerdiffusion.evidence.scores import edit_set

    method, tuned = LayerDiffusion.from_pretrained("mini", "cpu"), []
    monkeypatch.setattr(pipeline, "fine_tune", lambda *a, f=pipeline.fine_tune, **k: tuned.append(1) or f(*a, **k))
    tiny = dict(embedding_steps=1, tuning_steps=1, sampling_steps=2)
    settings = [
        _Setting("whole", "paper", tiny),
        _Setting("α = 1", "paper", tiny | dict(alpha=1.0)),
        _Setting("no turns", "paper", tiny | dict(iterative_guidance=False)),
        _Setting("drawn with 1", "paper", tiny | dict(alpha=1.0), dict(alpha=0.7)),
    ]
    order = by_tuning(method, [Wanted("mine", "paper", s, 1, 1, 1.0) for s in settings])
    assert [w.setting.name for w in order] == ["whole", "no turns", "drawn with 1", "α = 1"]
    rows = [experiments._run_cell(method, edit_set("joint")[0], w.setting, [0], tmp_path) for w in order]
    assert len(tuned) == 2 and len({row["name"] for row in rows}) == 4


def test_another_alpha_from_one_tuned_unet():
    "`tuned` is for Eq. 6, the rest for Eq. 8: as an edit of the one, drawn with the other."
    from layerdiffusion.evidence.scores import edit_set
    from layerdiffusion.pipeline import LayerDiffusion

    method, task = LayerDiffusion.from_pretrained("mini", "cpu"), edit_set("joint")[0]
    tiny = dict(embedding_steps=2, tuning_steps=3, tuning_lr=1e-3, sampling_steps=3)
    setting = _Setting("drawn with 0.2", "paper", tiny | dict(alpha=0.2), dict(alpha=0.9))
    drawn = experiments._draw_cell(method, task, setting, [0], experiments.numbers_of(method, setting))
    e = task.edit
    given = dict(mask=e.mask, reference=experiments.to_pil(e.reference), source=e.source, seeds=[0])
    edit = method.edit(experiments.to_pil(e.image), e.text, **given, alpha=0.9, **tiny)
    config = edit.config.change(alpha=0.2)
    again = method.sample(edit.embeddings, edit.difference, tuple(drawn.shape[-2:]), [0], config)
    assert torch.equal(drawn, again) and not torch.equal(drawn, edit.images)


def test_the_operating_point_is_the_cards():
    "Experiments that start from `paper` begin at the card's point; what a setting names itself comes first."
    from layerdiffusion.pipeline import LayerDiffusion

    method = LayerDiffusion.from_pretrained("mini", "cpu")
    point, own = method.models.card["operating_point"], dict(tuning_steps=7)
    numbers = experiments.numbers_of(method, _Setting("mine", "paper", own))
    assert {k: numbers[k] for k in point} == point | own
    best = method.models.card["presets"]["best"]
    numbers = experiments.numbers_of(method, _Setting("mine", "best"))
    assert numbers["tuning_steps"] == best["tuning_steps"] != point["tuning_steps"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_keeps_what_was_drawn(tmp_path):
    "Exit code 130 and a sentence; whole cells only, and no process is left."
    command = [
        sys.executable,
        "-c",
        "import sys; from layerdiffusion.interface.cli import main; sys.exit(main())",
        "experiment",
        "comparison",
        "--size",
        "quick",
        "--out",
        str(tmp_path),
        "--workers",
        "1",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    end = time.time() + 900
    while time.time() < end and process.poll() is None and not list(tmp_path.glob("cells/*.json")):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    said = process.communicate(timeout=600)[1]
    assert (
        process.returncode == 130 and "Stopped by Ctrl-C; what was drawn is kept" in said and "Traceback" not in said
    ), said
    with pytest.raises(ProcessLookupError):
        for _ in range(600):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    cells = list(tmp_path.glob("cells/*.json"))
    assert cells
    for path in cells:
        assert len(json.loads(path.read_text())["scores"]) == 4 and path.with_suffix(".webp").exists()
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".json", ".webp"}
