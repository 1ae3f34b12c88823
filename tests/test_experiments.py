"""An experiment, cut off and run again: nothing is drawn twice, nothing is lost, and the record says what was done."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from layerdiffusion import experiments
from layerdiffusion.core import BadInput
from layerdiffusion.experiments import (
    EXPERIMENTS,
    SIZES,
    Setting,
    Wanted,
    by_tuning,
    compare,
    correct,
    count_answers,
    difference,
    framed,
    load_corrections,
    load_experiment,
    load_strip,
    plan,
    read_cell,
    run_experiment,
    seed_sheet,
    sheet_title,
    show_experiment,
    summary,
    valid_marks,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "Two settings on two edits in two processes."
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", dict(edits=2, seeds=2, share=0.1))
        patch.setitem(
            EXPERIMENTS,
            "two",
            lambda of: [
                Setting("SDEdit", "sdedit", dict(strength=0.5)),
                Setting("paper", "paper", dict(target_draws=1, embedding_steps=10, tuning_steps=10)),
            ],
        )
        yield folder, run_experiment("two", "tiny", "paper", folder)


def test_all_cells_are_there(done):
    folder, record = done
    assert [(r["setting"], r["n"], len(r["cells"])) for r in record["settings"]] == [("SDEdit", 4, 2), ("paper", 4, 2)]
    for row in record["settings"]:
        for cell in row["cells"]:
            kept = json.loads((folder / "cells" / f"{cell}.json").read_text())
            assert len(kept["scores"]) == len(load_strip(folder / "cells" / f"{cell}.webp")) == 2
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


def test_a_lost_cell_is_made_again_the_same(done):
    folder, record = done
    lost = folder / "cells" / f"{record['settings'][1]['cells'][0]}.json"
    before, others = (
        json.loads(lost.read_text()),
        {p: p.stat().st_mtime_ns for p in (folder / "cells").glob("*.json") if p != lost},
    )
    lost.unlink()
    again = run_experiment("two", "tiny", "paper", folder, workers=1)
    assert alike(json.loads(lost.read_text())["scores"], before["scores"])
    assert {p: p.stat().st_mtime_ns for p in others} == others
    timeless = lambda r: [{k: v for k, v in row.items() if k != "seconds"} for row in r["settings"]]
    assert alike(timeless(again), timeless(record))


def test_two_names_for_the_same_numbers_share_a_cell(done):
    folder, record = done
    cells = sorted((folder / "cells").glob("*.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", dict(edits=2, seeds=2, share=0.1))
        patch.setitem(EXPERIMENTS, "named", lambda of: [Setting("half way up", "sdedit", dict(strength=0.5))])
        named = run_experiment("named", "tiny", "paper", folder, workers=1)
    assert [(r["setting"], r["cells"], r["right"]) for r in named["settings"]] == [
        ("half way up", record["settings"][0]["cells"], record["settings"][0]["right"])
    ]
    assert sorted((folder / "cells").glob("*.json")) == cells


def test_a_failure_is_told_and_leaves_no_half_cell(done, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "bad", lambda of: [Setting("none", "sdedit", dict(strength=2.0))])
        with pytest.raises(BadInput, match="strength is 2"):
            run_experiment("bad", "tiny", "paper", tmp_path, workers=1)
    assert not list((tmp_path / "cells").iterdir())


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
        plan(*wrong)


def test_fewer_than_one_process(tmp_path):
    with pytest.raises(BadInput, match="at least 1"):
        run_experiment("alpha", "quick", "best", tmp_path, workers=0)


def test_no_such_model(tmp_path):
    with pytest.raises(BadInput, match="no model folder 'nowhere'"):
        run_experiment("alpha", "quick", "best", tmp_path / "x", model="nowhere")
    assert not (tmp_path / "x").exists()


def test_each_picture_has_a_clip_score(done):
    folder, record = done
    for row in record["settings"]:
        for cell in row["cells"]:
            assert all(-1 <= s["clip"] <= 1 for s in read_cell(folder, cell)[0]["scores"])
        assert len(row["by_edit"]["clip"]) == 2 and abs(sum(row["by_edit"]["clip"]) / 2 - row["clip"][0]) < 1e-3


def test_difference_is_of_the_same_edits():
    rows = lambda name, values: dict(
        setting=name, by_edit=dict.fromkeys(("right", "valid", "identity", "background", "clip"), values)
    )
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
    rows = lambda name, value: dict(setting=name, by_edit=dict.fromkeys(("right", "valid", "clip"), [value] * 6))
    record = dict(edits=list("abcdef"), settings=[rows("x", 1.0), rows("y", 1.0), rows("z", 0.0)])
    answers = [compare(record, "x", "y"), compare(record, "x", "z", "right"), compare(record, "x", "y", "clip")]
    assert ": all are, with both;" in answers[0] and ": yes;" in answers[1] and ": no;" in answers[2]
    assert count_answers(answers) == "all are, with both: 1, yes: 1, no: 1"


def test_only_complete_edits_are_counted(done):
    folder, record = done
    settings = EXPERIMENTS.get(
        "two", lambda of: [Setting("SDEdit", "sdedit", dict(strength=0.5)), Setting("paper", "paper")]
    )("paper")
    rows = [read_cell(folder, c)[0] for row in record["settings"] for c in row["cells"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", dict(edits=2, seeds=2, share=0.1))
        part = summary("two", "tiny", "paper", settings, rows[:-1])
        with pytest.raises(BadInput, match="No edit"):
            summary("two", "tiny", "paper", settings, rows[:2])
    assert part["edits"] == record["edits"][:1] and part["asked"] == 2 and [r["n"] for r in part["settings"]] == [2, 2]


def test_marks_can_be_corrected(done, tmp_path):
    folder, record = done
    cell, _ = read_cell(folder, record["settings"][0]["cells"][0])
    before = valid_marks(cell)
    correct(tmp_path / "c.json", cell["name"], 1, not before[1])
    marks = load_corrections(tmp_path / "c.json")
    assert valid_marks(cell, marks) == [before[0], not before[1]]
    counts = [sheet_title(record, "SDEdit", 0, folder, c) for c in (None, marks)]
    assert f"{sum(before)} of 2" in counts[0] and f"{sum(before) + (1 if not before[1] else -1)} of 2" in counts[1]


def test_valid_pictures_are_framed():
    grey = Image.new("RGB", (20, 20), "grey")
    assert framed(grey, True).getpixel((0, 0)) == (221, 34, 34) and framed(grey, False) == grey


def test_turns_or_not_the_unet_is_tuned_once(tmp_path, monkeypatch):
    from layerdiffusion import pipeline
    from layerdiffusion.pipeline import LayerDiffusion
    from layerdiffusion.scores import edit_set

    method, tuned = LayerDiffusion.from_pretrained("mini", "cpu"), []
    monkeypatch.setattr(pipeline, "fine_tune", lambda *a, f=pipeline.fine_tune, **k: tuned.append(1) or f(*a, **k))
    tiny = dict(target_draws=1, embedding_steps=1, tuning_steps=1, sampling_steps=2)
    settings = [
        Setting("whole", "paper", tiny),
        Setting("α = 1", "paper", tiny | dict(alpha=1.0)),
        Setting("no turns", "paper", tiny | dict(iterative_guidance=False)),
    ]
    order = by_tuning(method, [Wanted("mine", "paper", s, 1, 1, 1.0) for s in settings])
    assert [w.setting.name for w in order] == ["whole", "no turns", "α = 1"]
    for w in order:
        experiments.run_cell(method, edit_set("joint")[0], w.setting, [0], tmp_path)
    assert len(tuned) == 2


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_keeps_what_was_drawn(tmp_path):
    "Exit code 130 and a sentence; whole cells only, and no process is left."
    command = [
        sys.executable,
        "-c",
        "import sys; from layerdiffusion.cli import main; sys.exit(main())",
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
