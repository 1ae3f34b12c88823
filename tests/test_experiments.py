"""An experiment, cut off and run again: nothing is drawn twice, nothing is lost, and the record says what was done."""
import json

import pytest

from layerdiffusion import experiments
from layerdiffusion.core import BadInput
from layerdiffusion.experiments import EXPERIMENTS, SIZES, Setting, load_experiment, load_strip, plan, run_experiment, seed_sheet, show_experiment


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "Two settings on two edits in two processes."
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", dict(edits=2, seeds=2, share=.1))
        patch.setitem(EXPERIMENTS, "two", lambda of: [Setting("SDEdit", "sdedit", dict(strength=.5)), Setting("paper", "paper", dict(target_draws=1, embedding_steps=10, tuning_steps=10))])
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

def test_a_lost_cell_is_made_again_the_same(done):
    folder, record = done
    lost = folder / "cells" / f"{record['settings'][1]['cells'][0]}.json"
    before, others = json.loads(lost.read_text()), {p: p.stat().st_mtime_ns for p in (folder / "cells").glob("*.json") if p != lost}
    lost.unlink()
    again = run_experiment("two", "tiny", "paper", folder, workers=1)
    assert json.loads(lost.read_text())["scores"] == before["scores"]
    assert {p: p.stat().st_mtime_ns for p in others} == others
    timeless = lambda r: [{k: v for k, v in row.items() if k != "seconds"} for row in r["settings"]]
    assert timeless(again) == timeless(record)

def test_two_names_for_the_same_numbers_share_a_cell(done):
    folder, record = done
    cells = sorted((folder / "cells").glob("*.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", dict(edits=2, seeds=2, share=.1))
        patch.setitem(EXPERIMENTS, "named", lambda of: [Setting("half way up", "sdedit", dict(strength=.5))])
        named = run_experiment("named", "tiny", "paper", folder, workers=1)
    assert [(r["setting"], r["cells"], r["right"]) for r in named["settings"]] == [("half way up", record["settings"][0]["cells"], record["settings"][0]["right"])]
    assert sorted((folder / "cells").glob("*.json")) == cells

def test_a_failure_is_told_and_leaves_no_half_cell(done, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "bad", lambda of: [Setting("none", "sdedit", dict(strength=2.))])
        with pytest.raises(BadInput, match="strength is 2"): run_experiment("bad", "tiny", "paper", tmp_path, workers=1)
    assert not list((tmp_path / "cells").iterdir())

@pytest.mark.parametrize("wrong, says", [(("nothing", "quick", "best"), "no experiment"), (("alpha", "huge", "best"), "no size"), (("alpha", "quick", "good"), "no preset")])
def test_what_there_is_not(wrong, says):
    with pytest.raises(BadInput, match=says): plan(*wrong)

def test_fewer_than_one_process(tmp_path):
    with pytest.raises(BadInput, match="at least 1"): run_experiment("alpha", "quick", "best", tmp_path, workers=0)
