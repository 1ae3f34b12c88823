"""Scores: whose judge speaks."""

import copy
from pathlib import Path

import pytest

from layerdiffusion.evidence import scores
from layerdiffusion.base.core import BadInput
from layerdiffusion.mini.judge import load_judge
from layerdiffusion.pipeline import LayerDiffusion
from layerdiffusion.evidence.scores import edit_set, keep_result, load_result, measure
from layerdiffusion.settings import preset


def test_a_given_judge_is_asked(monkeypatch):
    "Scorers are kept by the judge's content, not only by the edit."
    made = []

    def scorer(edit, models, sam, judge):
        made.append(judge)
        number = len(made)
        return lambda images: [dict(judge=number) for _ in images]

    monkeypatch.setattr(scores, "Scorer", scorer)
    method, shipped = LayerDiffusion.from_pretrained("mini"), load_judge()
    other = copy.deepcopy(shipped)
    other.heads["pose"].bias.data += 1
    config = preset("paper", embedding_steps=0, tuning_steps=0, sampling_steps=1)
    said = [
        measure(method, edit_set("development")[:1], config, [0], judge=j)[0]["judge"]
        for j in (None, shipped, other, copy.deepcopy(shipped))
    ]
    assert said == [1, 2, 3, 2] and len(made) == 3


def test_the_scale_knows_no_model(monkeypatch):
    "Both ends are the world's own drawings, so a worse autoencoder moves what goes through it, and nothing else."
    import torch
    from layerdiffusion.base.masks import load_sam
    from layerdiffusion.base.sd import load_models

    models, sam, judge = load_models("mini"), load_sam("mini"), load_judge()
    edit = edit_set("development")[0].edit
    scorer = scores.Scorer(edit, models, sam, judge, n=6)
    lost = scorer.through_autoencoder(4)
    answer = scorer(edit.answer[None])[0]
    blur = torch.nn.AvgPool2d(5, 1, 2)
    monkeypatch.setattr(scores, "decode_latents", lambda *a: blur(decoded(*a)))
    worse = scores.Scorer(edit, models, sam, judge, n=6)
    assert torch.equal(worse.zero, scorer.zero) and torch.equal(worse.one, scorer.one)
    assert worse(edit.answer[None])[0] == answer and answer["right"] and abs(answer["background"]) < 0.05
    more = worse.through_autoencoder(4)
    assert more["background"] > lost["background"] > 0 and more["identity"] > lost["identity"]


decoded = scores.decode_latents


# Results of slow cells


def test_results_are_kept_by_name(tmp_path):
    for name, value in (("speed", [1.5]), ("move", dict(a="λ")), ("speed", [2.5])):
        keep_result(name, value, tmp_path)
    assert load_result("speed", tmp_path) == [2.5] and load_result("move", tmp_path) == dict(a="λ")
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]
    assert len((tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    with pytest.raises(BadInput, match="no result 'bench'; it has move, speed"):
        load_result("bench", tmp_path)


def test_the_records_are_few_files():
    "At most twenty; loose cells of a run are packed before they are committed."
    folder = Path(__file__).resolve().parents[1] / "nbs/results"
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    assert 0 < len(found) <= 20
