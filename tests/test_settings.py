"Settings as keyword arguments, presets with their model, the negative prompt, and names of records that stay."

import json
from pathlib import Path

import pytest
import torch

from layerdiffusion import BadInput, EditConfig, LayerDiffusion, load_edit, preset
from layerdiffusion.interface.cli import main
from layerdiffusion.base.core import content_hash
from layerdiffusion.settings import PRESETS

TEXT = "a dog jumping in a forest"
SHORT = dict(object_picture="input", embedding_steps=1, tuning_steps=1, sampling_steps=2)
GIVEN = dict(point=(32, 36), seeds=[0])
CARD = dict(
    tuning_lr=2e-5,
    guidance_scale=3.0,
    presets=dict(best=dict(tuning_lr=1e-3, guidance_scale=1.0, tuning_steps=40), paper=dict(lambda_bg=2.0)),
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def method():
    method = LayerDiffusion.from_pretrained("mini", "cpu")
    method.say = lambda line: None
    return method


@pytest.fixture(scope="module")
def plain(method):
    return method.edit("example:dog", TEXT, **GIVEN, **SHORT)


# Presets


def numbers(config):
    return config.resolve(CARD).model_dump()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(alpha=0.5),
        dict(tuning_lr=1e-4),
        dict(guidance_scale=2.0),
        dict(tuning_steps=100),
        dict(lambda_bg=1.0, tuning_batch=3),
    ],
)
def test_a_preset_means_the_same_everywhere(name, changes):
    """With its model's card or without, as keywords or as an object, written down and read again: the same
    settings; what was asked for is never replaced."""
    want = numbers(preset(name, CARD, **changes))
    assert want | changes == want and want["guidance_scale"] == changes.get(
        "guidance_scale", dict(best=1.0, paper=3.0)[name]
    )
    assert want["lambda_bg"] == changes.get("lambda_bg", dict(best=1.0, paper=2.0)[name])
    bare = preset(name, **changes)
    for config in (
        bare,
        EditConfig(preset=name, **changes),
        preset(name).change(**changes),
        bare.resolve(CARD),
        bare.model_copy(update={}),
    ):
        assert numbers(config) == want
    read = EditConfig(**bare.model_dump())  # all values are named now, but those that belong to the model
    assert {k: v for k, v in numbers(read).items() if k in ("guidance_scale", "tuning_lr", "embedding_lr")} == {
        k: want[k] for k in ("guidance_scale", "tuning_lr", "embedding_lr")
    }


def test_what_is_resolved_stays(method):
    "By the model's own card; again, by any card, and through JSON."
    done = preset("best", alpha=0.5).resolve(method.models.card)
    assert done.preset is None and done.resolve(CARD) == done == EditConfig(
        **done.model_dump()
    ) == EditConfig.model_validate_json(done.model_dump_json())
    assert (
        done
        == method.settings(preset="best", alpha=0.5)
        == method.settings(preset("best", alpha=0.5))
        == method.settings(preset("best"), alpha=0.5)
    )
    assert (done.tuning_steps, done.tuning_lr) == (120, 1e-4) and method.settings().tuning_lr == 1e-5
    assert done.change(alpha=0.2) == method.settings(preset="best", alpha=0.2)


def test_settings_in_the_call(method, plain):
    "edit(..., alpha=.5) is edit(..., config=EditConfig(alpha=.5)), and they win over those of a config."
    whole = method.edit("example:dog", TEXT, **GIVEN, config=EditConfig(**SHORT, alpha=0.5))
    for given in (
        dict(SHORT, alpha=0.5),
        dict(config=EditConfig(**SHORT), alpha=0.5),
        dict(config=EditConfig(**SHORT, alpha=0.1), alpha=0.5),
        dict(SHORT, preset="paper", alpha=0.5),
    ):
        found = method.edit("example:dog", TEXT, **GIVEN, **given)
        assert found.config == whole.config and torch.equal(found.images, whole.images)
    assert not torch.equal(plain.images, whole.images)


def test_python_and_command_line_run_the_same(method, tmp_path, monkeypatch, capsys):
    "The preset best with a change: settings and pictures."
    monkeypatch.chdir(tmp_path)
    few = dict(embedding_steps=1, tuning_steps=1, sampling_steps=2, alpha=0.5)
    assert (
        main(
            [
                "edit",
                "example:dog",
                TEXT,
                *[
                    "--preset",
                    "best",
                    "--embedding-steps",
                    "1",
                    "--tuning-steps",
                    "1",
                    "--steps",
                    "2",
                    "--alpha",
                    ".5",
                    "--seeds",
                    "0",
                    "--point",
                    "32,36",
                    "--device",
                    "cpu",
                    "--out",
                    "out",
                ],
            ]
        )
        == 0
    )
    result = method.edit("example:dog", TEXT, **GIVEN, preset="best", **few)
    assert EditConfig(**json.loads(Path("out/edit.json").read_text(encoding="utf-8"))["config"]) == result.config
    assert torch.equal(load_edit("out", method).images, result.images)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(alpah=0.3), ["'alpah'", "near it: alpha"]),
        (dict(steps=5), ["'steps'", "sampling_steps"]),
        (dict(refrence="x.png"), ["'refrence'", "near it: reference"]),
        (dict(num_inference_steps=5), ["sampling_steps"]),
        (dict(guidance=2), ["guidance_scale"]),
        (dict(negativ_prompt="x"), ["near it: negative_prompt"]),
        (dict(zoom=1), ["'zoom'", "there are: alpha"]),
        (dict(alpha=2), ["alpha is 2"]),
        (dict(preset="bets"), ["'bets'", "'best'"]),
        (dict(preset="best", config=EditConfig()), ["preset or config, not both"]),
        (dict(config=dict(alpha=0.5)), ["alpha=.5", "EditConfig"]),
        (dict(config="best"), ["preset='best'"]),
    ],
)
def test_refused_settings(method, given, words):
    with pytest.raises(BadInput) as stop:
        method.edit("example:dog", TEXT, **given)
    assert not [w for w in words if w not in str(stop.value)] and str(stop.value).endswith("."), stop.value


def test_the_advice_of_a_message_works(method):
    "The call that a refusal recommends runs the settings of the command line."
    with pytest.raises(BadInput, match=r"edit\(\.\.\., preset='best', alpha=\.5\)"):
        method.settings("best")
    assert method.settings(preset="best", alpha=0.5).tuning_lr == method.models.card["presets"]["best"]["tuning_lr"]


# Names of records


def test_a_new_setting_orphans_nothing(monkeypatch):
    "A setting that comes later, with a default: keys of settings, of cells and of stages stay as they were."
    from layerdiffusion import settings as page
    from layerdiffusion.evidence.experiments import _Setting, cell_name

    models = type("Models", (), dict(hash="0" * 16))
    method, task = type("Method", (), dict(models=models)), type("Task", (), dict(name="joint 0"))
    whole = EditConfig(alpha=0.5, tuning_steps=20).resolve({})

    def name(numbers):
        return cell_name(method, task, _Setting("x", "paper"), [0, 1], numbers)

    before = name(whole.model_dump()), page.settings_key(whole.model_dump())
    monkeypatch.setitem(page.DEFAULTS, "later", 3)
    assert (name(whole.model_dump() | dict(later=3)), page.settings_key(whole.model_dump() | dict(later=3))) == before
    assert name(whole.model_dump() | dict(later=4)) != before[0]


def test_a_key_is_what_differs_and_a_version(monkeypatch):
    from layerdiffusion import settings as page

    assert EditConfig().key() == dict(version=page.VERSION) and preset("best").key()["subject_scale"] > 0
    assert EditConfig(alpha=0.5, tuning_steps=2).key() == dict(version=page.VERSION, alpha=0.5, tuning_steps=2)
    assert EditConfig(alpha=0.5, tuning_steps=2).key(["alpha"]) == dict(version=page.VERSION, alpha=0.5)
    plain, other = EditConfig(), EditConfig(alpha=0.3)
    before = content_hash(plain)
    assert before == content_hash(EditConfig(negative_prompt="", alpha=0.7)) != content_hash(other)
    monkeypatch.setattr(page, "VERSION", page.VERSION + 1)
    assert content_hash(plain) != before, "a new meaning makes all records anew"


def test_an_earlier_default_is_never_taken_for_the_new_one():
    "Version 1 drew the subject's picture from the text: its keys are found, and are no key of today."
    from layerdiffusion.settings import settings_key

    old, new = EditConfig(object_picture="target").model_dump(), EditConfig().model_dump()
    assert settings_key(old, 1) == dict(version=1) and settings_key(new, 1) == dict(version=1, object_picture="input")
    assert settings_key(old) == dict(version=2, object_picture="target") and settings_key(new) == dict(version=2)


def test_what_is_written_down():
    "All settings, and a preset only while it has values to give."
    from layerdiffusion.settings import SETTINGS

    assert EditConfig().model_dump().keys() == SETTINGS.keys() == preset("best").resolve({}).model_dump().keys()
    assert json.loads(preset("best").model_dump_json())["preset"] == "best"
    assert EditConfig().model_dump(include={"alpha"}) == dict(alpha=0.7)


# The negative prompt


def test_the_negative_prompt_is_the_unconditional_text(method, plain):
    "One step of drawing by hand: free + scale · (said − free), where free is under the negative prompt."
    from layerdiffusion.differences import apply_difference
    from layerdiffusion.base.sd import ddim_sample, decode_latents, encode_text, initial_latents
    from dataclasses import replace

    how = dict(iterative_guidance=False, sampling_steps=1)
    config = plain.config.change(negative_prompt="a hat", **how)
    found = method.sample(plain.embeddings, plain.difference, (64, 64), [0], config)
    models = replace(method.models, unet=apply_difference(method.models.unet, plain.difference))
    e_opt = 0.7 * plain.embeddings[0] + 0.3 * plain.embeddings[1]
    by_hand = decode_latents(
        models,
        ddim_sample(
            models, e_opt, encode_text(models, "a hat"), initial_latents(models, [0]), 1, config.guidance_scale
        ),
    )
    without = method.sample(plain.embeddings, plain.difference, (64, 64), [0], plain.config.change(**how))
    assert torch.allclose(found, by_hand, atol=1e-6) and not torch.allclose(found, without, atol=1e-3)


def test_it_leads_away(method):
    "Pictures of a text are further from what the negative prompt says: a white place becomes darker."

    def light(negative):
        drawn = [
            method.draw(
                "a dog standing in the snow",
                (64, 64),
                method.settings(sampling_steps=8, negative_prompt=negative, seed=seed),
                "test",
            )
            for seed in range(3)
        ]
        return torch.stack(drawn).mean().item()

    assert light("in the snow") < light("") - 0.01 and light("in a city at night") > light("") + 0.005


def test_it_is_kept(method, plain, tmp_path):
    "In edit.json, drawn again from there, taken over by reuse, exported, and changed while drawing."
    edit = method.edit("example:dog", TEXT, **GIVEN, **SHORT, negative_prompt="“a hat” ")
    folder = edit.save(tmp_path / "edit")
    assert json.loads((folder / "edit.json").read_text(encoding="utf-8"))["config"]["negative_prompt"] == "a hat"
    again = load_edit(folder, method)
    assert (
        torch.equal(again.images, edit.images)
        and again.config == edit.config
        and not torch.equal(edit.images, plain.images)
    )
    assert not torch.equal(load_edit(folder, method, negative_prompt="").images, edit.images)
    assert method.reuse(again, "a dog lying in a forest", seeds=[0]).config.negative_prompt == "a hat"
    from layerdiffusion.interface.saving import export
    from layerdiffusion.base.sd import encode_text
    from safetensors.torch import load_file

    words = load_file(export(edit, method, tmp_path / "out", "lora") / "embeddings.safetensors")
    assert torch.equal(words["negative_prompt_embeds"], encode_text(method.models, "a hat"))
    saved = json.loads((plain.save(tmp_path / "plain") / "edit.json").read_text(encoding="utf-8"))
    assert saved["config"]["negative_prompt"] == ""


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(negative_prompt="a hat", guidance_scale=1), "guidance_scale is 1"),
        (dict(negative_prompt="a hat", preset="best", guidance_scale=1), "guidance_scale is 1"),
        (dict(negative_prompt="a zebra"), "zebra"),
        (dict(negative_prompt="(hat:1.3)"), "(hat:1.3)"),
        (dict(negative_prompt=5), "negative_prompt is 5"),
        (dict(negative_prompt=" ".join(["a hat"] * 40)), "tokens"),
    ],
)
def test_refused_negative_prompts(method, given, words):
    "Before anything is computed; where guidance is off it would do nothing, and that is said."
    with pytest.raises(BadInput) as stop:
        method.edit("example:dog", TEXT, **GIVEN, **given, callback=lambda event: pytest.fail("computed"))
    assert words in str(stop.value)


def test_negative_prompt_on_the_command_line(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = [
        "--embedding-steps",
        "1",
        "--tuning-steps",
        "1",
        "--steps",
        "2",
        "--seeds",
        "0",
        "--object-picture",
        "input",
        "--point",
        "32,36",
        "--device",
        "cpu",
        "--out",
        "out",
    ]
    assert main(["edit", "example:dog", "“" + TEXT + "”", *short, "--negative-prompt", "a hat"]) == 0
    saved = json.loads(Path("out/edit.json").read_text(encoding="utf-8"))
    assert saved["config"]["negative_prompt"] == "a hat" and saved["text"] == TEXT
    for wrong in (
        ["--negative-prompt", "a hat", "--guidance-scale", "1"],
        ["--negative-prompt", "a (hat)"],
        ["--preset", "best", "--guidance-scale", "1", "--negative-prompt", "a hat"],
    ):
        before = sorted(p.name for p in Path().rglob("*"))
        capsys.readouterr()
        assert main(["edit", "example:dog", TEXT, *short[:-1], "other", *wrong]) == 2
        assert (
            len(capsys.readouterr().err.strip().splitlines()) == 1
            and sorted(p.name for p in Path().rglob("*")) == before
        )


@pytest.mark.parametrize(
    "text",
    [
        "a (dog:1.3) in a forest",
        "Make the dog jump in a forest",
        "ein Hund im Wald",
        "a dog without a hat in a forest",
        "a dog",
    ],
)
def test_words_are_refused_before_a_model_is_loaded(text, tmp_path, monkeypatch, capsys):
    "On the command line: one sentence, exit code 2, no folder, and not even a wrong model is looked at."
    monkeypatch.chdir(tmp_path)
    assert main(["edit", "example:dog", text, "--model", "nowhere", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and "nowhere" not in said and not list(tmp_path.iterdir())


def test_a_preset_never_goes_unheard():
    "Settings that are all named, such as those of an edit, have no room for one: refused, not ignored."
    done = EditConfig().resolve({})
    with pytest.raises(BadInput, match="all named already.*begin with EditConfig"):
        done.change(preset="best")
    assert done.change(alpha=0.5).alpha == 0.5
    assert EditConfig().change(preset="best").resolve({}) == EditConfig(preset="best").resolve({})
