"""Scores: whose judge speaks."""

import copy

from layerdiffusion import scores
from layerdiffusion.judge import load_judge
from layerdiffusion.pipeline import LayerDiffusion
from layerdiffusion.scores import edit_set, measure
from layerdiffusion.settings import preset


def test_a_given_judge_is_asked(monkeypatch):
    "Scorers are kept by the judge's content, not only by the edit."
    made = []

    def scorer(edit, models, sam, judge):
        made.append(judge)
        number = len(made)
        return lambda images: [dict(judge=number) for _ in images]

    monkeypatch.setattr(scores, "Scorer", scorer)
    method, own = LayerDiffusion.from_pretrained("mini"), load_judge()
    other = copy.deepcopy(own)
    other.heads["pose"].bias.data += 1
    config = preset("paper", embedding_steps=0, tuning_steps=0, sampling_steps=1)
    said = [
        measure(method, edit_set("development")[:1], config, [0], judge=j)[0]["judge"]
        for j in (None, own, other, copy.deepcopy(own))
    ]
    assert said == [1, 2, 3, 2] and len(made) == 3


def test_the_scales_zero_knows_no_autoencoder(monkeypatch):
    "A worse autoencoder moves its own number, and neither end of the scale."
    method, edit = LayerDiffusion.from_pretrained("mini"), edit_set("development")[0].edit

    def scorer(blur):
        made = scores.Scorer(edit, method.models, method.sam, None, n=4)
        small = (edit.image.shape[-1] // blur,) * 2
        made.seen = lambda x: scores.F.interpolate(scores.F.adaptive_avg_pool2d(x, small), x.shape[-2:])
        return made

    sharp, blurred = scorer(1), scorer(4)
    assert (sharp.zero == blurred.zero).all() and (sharp.one == blurred.one).all()
    assert abs(sharp.autoencoder()) < 1e-5 < blurred.autoencoder()
