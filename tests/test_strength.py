"The tuning's strength as an axis: what is drawn at a stop is the paper's edit of that many steps."

import pytest
import torch

from layerdiffusion import method
from layerdiffusion.base.sd import load_models
from layerdiffusion.evidence import strength
from layerdiffusion.evidence.scores import edit_set

SHORT = strength._NUMBERS | dict(embedding_steps=2, tuning_lr=1e-3, num_inference_steps=3)


@pytest.fixture(scope="module")
def learnt():
    "A model, an edit, its words with the empty text, its layers, and a copy of the U-Net at two stops of one tuning."
    models, task = load_models("mini"), edit_set("development")[1]
    *words, layers = strength._learnt_words(models, task, SHORT)
    e_opt, stops = method.interpolate(*words[:2], 0.7), {}

    def look(steps, unet):
        stops[steps] = {name: x.detach().clone() for name, x in unet.state_dict().items()}

    strength._tune_with_stops(models, e_opt, layers, (0, 2, 4), SHORT["tuning_lr"], look)
    return models, task.edit, words, layers, stops


def test_a_stop_is_a_tuning_of_so_many_steps(learnt):
    models, edit, words, layers, stops = learnt
    e_opt = method.interpolate(*words[:2], 0.7)
    whole = method.tune_unet(models.unet, models.scheduler, e_opt, layers, 2, SHORT["tuning_lr"]).state_dict()
    assert all(torch.equal(x, stops[2][name]) for name, x in whole.items())
    assert all(torch.equal(x, stops[0][name]) for name, x in models.unet.state_dict().items())
    assert not all(torch.equal(x, stops[4][name]) for name, x in whole.items())


def test_a_drawing_is_the_papers_edit(learnt):
    "With turns at the α of the tuning; without turns, or at another α, it is another picture."
    models, edit, words, layers, stops = learnt
    models.unet.load_state_dict(stops[4])
    size = layers[0].shape[1:]
    mine, others = strength._draw(models, models.unet, words, 0.7, True, [3], SHORT, size), []
    for alpha, turns in ((0.7, False), (0.3, True)):
        others.append(strength._draw(models, models.unet, words, alpha, turns, [3], SHORT, size))
    models.unet.load_state_dict(stops[0])
    names = "embedding_steps", "embedding_lr", "tuning_lr", "lambda_obj", "lambda_bg", "num_inference_steps"
    numbers = {name: SHORT[name] for name in (*names, "guidance_scale")} | dict(tuning_steps=4, seeds=[3])
    paper = method.edit(models, edit.image, edit.mask, edit.object, edit.background, edit.reference, **numbers)
    assert (mine - paper).abs().max() < 1e-5
    assert all((mine - other).abs().max() > 1e-2 for other in others)
