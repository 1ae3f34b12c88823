"""Whatever torch is set to where the library is called, edits come out the same, and the caller's settings are as they
were."""

import contextlib
import functools
import subprocess
import sys

import pytest
import torch

from layerdiffusion import LayerDiffusion, load_edit
from layerdiffusion.base.core import _plain_torch, shielded
from layerdiffusion.fine_tuning import fine_tune
from layerdiffusion.base.sd import encode_image, encode_text, load_models, optimise
from layerdiffusion.method import fit_embeddings

TEXT = "a dog jumping in a forest"
SHORT = dict(embedding_steps=2, tuning_steps=2, sampling_steps=2)
pytestmark = pytest.mark.filterwarnings("ignore")


@contextlib.contextmanager
def set_to(change, back):
    change()
    try:
        yield
    finally:
        back()


def dtype(kind):
    return set_to(lambda: torch.set_default_dtype(kind), lambda: torch.set_default_dtype(torch.float32))


def device(name):
    return set_to(lambda: torch.set_default_device(name), lambda: torch.set_default_device(None))


def strict():
    return set_to(lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False))


def seeded():
    return set_to(lambda: torch.manual_seed(7), lambda: torch.seed())


def coarse():
    return set_to(
        lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")
    )


def grad_off():
    return set_to(lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True))


@contextlib.contextmanager
def all_at_once():
    with dtype(torch.float64), device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        yield


STATES = dict(
    nothing=contextlib.nullcontext,
    float64=lambda: dtype(torch.float64),
    bfloat16=lambda: dtype(torch.bfloat16),
    meta=lambda: device("meta"),
    cpu=lambda: device("cpu"),
    with_meta=lambda: torch.device("meta"),
    inference=torch.inference_mode,
    no_grad=torch.no_grad,
    grad_off=grad_off,
    autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    deterministic=strict,
    seeded=seeded,
    matmul=coarse,
    anomaly=lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    all_at_once=all_at_once,
)


def state() -> dict:
    "All that a caller may have set."
    return dict(
        dtype=torch.get_default_dtype(),
        device=str(torch.get_default_device()),
        inference=torch.is_inference_mode_enabled(),
        grad=torch.is_grad_enabled(),
        autocast=torch.is_autocast_enabled("cpu"),
        kind=torch.get_autocast_dtype("cpu"),
        threads=torch.get_num_threads(),
        strict=torch.are_deterministic_algorithms_enabled(),
        precision=torch.get_float32_matmul_precision(),
        random=bytes(torch.get_rng_state().tolist()),
    )


@pytest.fixture(scope="module")
def photo():
    from layerdiffusion.base.core import load_image
    from layerdiffusion.interface.saving import pixels

    mask = torch.zeros(1, 64, 64)
    mask[:, 20:50, 20:45] = 1
    return pixels(load_image("example:dog")), mask


def whole(photo, folder, mark=lambda method: method):
    "Loaded, edited, saved, drawn again and reused: all that can be compared."
    method = mark(LayerDiffusion.from_pretrained("mini", "cpu"))
    method.say = lambda line: None
    drawn = dict(SHORT, object_picture="target")  # O_t is drawn, SAM finds both subjects
    first = method.edit(photo[0], TEXT, point=(32, 36), seeds=[0], **drawn)
    again = load_edit(first.save(folder), method)
    other = method.reuse(again, "a dog lying in the snow", seeds=[0])
    return [
        first.images,
        first.mask,
        first.reference,
        first.object_image,
        *first.embeddings,
        again.images,
        other.images,
        *first.difference.values(),
    ]


@pytest.fixture(scope="module")
def expected(photo, tmp_path_factory):
    return whole(photo, tmp_path_factory.mktemp("state"))


@pytest.mark.parametrize("name", STATES)
def test_edits_come_out_the_same(name, photo, expected, tmp_path):
    """Loading, edit, save, load_edit and reuse under each setting: the same numbers, ordinary tensors, and the setting
    as it was."""
    with STATES[name]():
        before = state()
        found = whole(photo, tmp_path)
        assert state() == before
    assert [x.dtype for x in found] == [x.dtype for x in expected] and not any(
        x.is_inference() or x.requires_grad for x in found
    )
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))


@pytest.mark.parametrize("name", ["inference", "all_at_once"])
def test_tensors_of_inference_mode(name, photo, expected, tmp_path):
    "Pictures and masks that were made in inference_mode are taken like others."
    with torch.inference_mode():
        made = tuple(x.clone() for x in photo)
    with STATES[name]():
        method = LayerDiffusion.from_pretrained("mini", "cpu")
    with STATES[name]():
        a = method.edit(made[0], TEXT, mask=made[1], object_picture="input", reference=made[0], seeds=[0], **SHORT)
    b = LayerDiffusion(method.models).edit(
        photo[0], TEXT, mask=photo[1], object_picture="input", reference=photo[0], seeds=[0], **SHORT
    )
    assert torch.equal(a.images, b.images)


def test_preset_best_in_inference_mode(photo):
    "A U-Net that sees the photo's subject too."
    how = dict(preset="best", mask=photo[1], seeds=[0], embedding_steps=1, tuning_steps=1, sampling_steps=2)
    with all_at_once():
        a = LayerDiffusion.from_pretrained("mini", "cpu").edit(photo[0], TEXT, **how)
    assert torch.equal(a.images, LayerDiffusion.from_pretrained("mini", "cpu").edit(photo[0], TEXT, **how).images)


@pytest.mark.parametrize("threads", [2])
def test_threads(threads, photo, expected, tmp_path):
    "Another number of threads adds up in another order, and no more than that; it stays what the caller set."
    before = torch.get_num_threads()
    with set_to(lambda: torch.set_num_threads(threads), lambda: torch.set_num_threads(before)):
        found = whole(photo, tmp_path)
        assert torch.get_num_threads() == threads
    assert all((a.float() - b.float()).abs().max() <= 1e-5 for a, b in zip(found, expected, strict=False))


@pytest.mark.parametrize("name", [n for n in STATES if n != "nothing"])
def test_training_alone(name, photo):
    "Eq. 2 in a loop of one's own behind `shielded`, and Eq. 6 by itself, learn the same."
    models = load_models("mini")
    e_a, e_b = encode_text(models, ["a dog jumping", "in a forest"]).split(1)
    latents, mask = encode_image(models, photo[0]), torch.ones(1, 1, 16, 16)
    mask[..., :4] = 0

    @shielded
    def a_loop(e_a, e_b):
        losses, parts = [], (models.unet, models.scheduler)
        run = functools.partial(optimise, losses=losses)
        return fit_embeddings(*parts, e_a, e_b, latents, mask, steps=2, learning_rate=1e-3, run=run), losses

    def learn():
        words, losses = a_loop(e_a, e_b)
        tuned, more = fine_tune(models, words[0], latents, mask, None, mask, steps=2, learning_rate=1e-4)
        return [*words, *tuned.state_dict().values()], [*losses, *more]

    there = learn()
    with STATES[name]():
        found = learn()
    assert found[1] == there[1] and all(torch.equal(a, b) for a, b in zip(found[0], there[0], strict=False))
    assert not torch.equal(found[0][0], e_a), "Eq. 2 learnt nothing"


def test_set_before_the_first_import(photo):
    "Tables that a module makes when it is imported are the same, whatever is set then."
    code = """
import torch
{}
from layerdiffusion.evidence import scores
from layerdiffusion.mini import world
torch.set_default_device(None), torch.set_default_dtype(torch.float32)
tables = scores._DIRECTIONS, world._POSE_TABLE, world._SWING
print([(str(x.dtype), str(x.device), x.is_inference(), round(x.double().sum().item(), 6)) for x in tables])"""
    set_first = (
        "torch.set_default_dtype(torch.float64); torch.set_default_device('meta'); torch.inference_mode().__enter__()"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code.format(first)],
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
        for first in ("", set_first)
    ]
    assert said[0] == said[1] and "float32" in said[0]


def test_the_door_lets_back_out():
    "After an error too; inside of one door a second one changes nothing, so that the library's own autocast holds."
    with all_at_once():
        before = state()
        with pytest.raises(ValueError), _plain_torch():
            torch.set_default_dtype(torch.float16)
            raise ValueError
        assert state() == before
    with _plain_torch(), torch.autocast("cpu", torch.bfloat16):
        assert shielded(lambda: torch.is_autocast_enabled("cpu"))()
    with torch.autocast("cpu", torch.bfloat16):
        assert not shielded(lambda: torch.is_autocast_enabled("cpu"))()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_several_threads_at_once(kind, photo):
    "Each thread loads and edits on its own; nobody's default dtype is lost, and torch.nn is as it was."
    from concurrent.futures import ThreadPoolExecutor

    how = dict(mask=photo[1], object_picture="input", reference=photo[0], seeds=[0], **SHORT)

    def work(_):
        return LayerDiffusion.from_pretrained("mini", "cpu", sam="mini").edit(photo[0], TEXT, **how).images

    there = work(0)
    with dtype(kind), ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
        assert torch.get_default_dtype() == kind
    assert all(torch.equal(images, there) for images in found)
    assert not torch.nn.Linear(1, 1).weight.is_meta


def test_the_last_one_out_puts_it_back():
    """Two threads inside at once: when the first leaves, the second still has plain numbers, and then the caller has
    theirs."""
    import threading

    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with _plain_torch():
            inside.set()
            leave.wait(10)
            seen.append(torch.get_default_dtype())

    with dtype(torch.float64):
        thread = threading.Thread(target=other)
        with _plain_torch():
            thread.start()
            assert inside.wait(10)
        assert torch.get_default_dtype() == torch.float32, "the other thread is inside"
        leave.set()
        thread.join()
        assert seen == [torch.float32] and torch.get_default_dtype() == torch.float64
