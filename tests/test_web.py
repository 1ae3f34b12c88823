"""The live demo: what a browser draws is what PyTorch draws, and where it cannot, recorded pictures stand there.

`npm install --no-save onnxruntime-web@1.30.0` in the checkout lets the last test run.
"""

import copy
import functools
import gzip
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_docs import ARGS, CHROMIUM

from layerdiffusion import LayerDiffusion
from layerdiffusion.base.core import BadInput
from layerdiffusion.evidence.docs import _add_demo, build_site
from layerdiffusion.evidence.web import (
    _draw_onnx,
    _draw_torch,
    _find_ort,
    _round_weights,
    _unet_and_decoder,
    export_web,
)
from layerdiffusion.differences import apply_difference

ROOT = Path(__file__).resolve().parents[1]
TEXT = "a brown dog jumping in the snow"


@pytest.fixture(scope="module")
def pipe():
    pipe = LayerDiffusion.from_pretrained("mini", "cpu")
    pipe.say = lambda text: None
    return pipe


@pytest.fixture(scope="module")
def result(pipe):
    "An edit that has learnt little and is drawn with few steps; the demo's own differs in nothing else."
    few = dict(embedding_steps=2, tuning_steps=2, tuning_lr=1e-4, sampling_steps=4, object_picture="input")
    return pipe.edit("example:dog", TEXT, mask=np.eye(64)[::-1] + np.eye(64) > 0, seeds=[0], preset="paper", **few)


def far(a, b):
    "The largest of the pictures' mean differences, in steps of 1/255."
    return float((a - b).abs().flatten(1).mean(1).max()) * 255


def test_weights_in_eight_bits():
    "Whole numbers up to 127, off by half a step at most; a channel of small weights keeps a scale of its own."
    weights = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32) * np.float32([[1e-3], *[[1]] * 5])
    for x in (weights, weights.T):
        whole, scale = _round_weights(x)
        assert whole.dtype == np.int8 and scale.size == 6 and abs(whole).max() == 127
        assert (abs(whole * scale - x) <= scale * 0.501).all()


def rounded(part):
    "A copy of a model with its large weights as the files have them."
    part = copy.deepcopy(part)
    for weights in part.parameters():
        if weights.ndim > 1 and weights.numel() >= 1000:
            whole, scale = _round_weights(weights.detach().numpy())
            weights.data = torch.from_numpy(whole * scale)
    return part


def test_files_draw_what_torch_draws(pipe, result):
    "Eq. 7 and 8 through the exported U-Net and decoder: PyTorch's pictures but for rounding; turns and α arrive."
    pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[docs]'")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[docs]'")
    files = _unet_and_decoder(pipe, result)
    assert sum(map(len, files)) < 17.5e6
    dials = (0.7, True), (0.7, False), (0.0, True)
    mine = [_draw_onnx(pipe, result, files, *dial, seeds=[0, 1]) for dial in dials]
    unet = apply_difference(pipe.models.unet, result.difference)
    parts = replace(pipe.models, unet=rounded(unet), vae=rounded(pipe.models.vae))
    same, bare = LayerDiffusion(parts, pipe.sam), replace(result, difference={})
    theirs = [_draw_torch(same, bare, *dial, seeds=[0, 1]) for dial in dials]
    assert max(map(far, mine, theirs)) < 0.1
    assert min(far(mine[0], other) for other in (*theirs[1:], theirs[0].flip(0))) > 2


def test_refuses_what_is_no_demo(tmp_path):
    with pytest.raises(BadInput, match="npm install"):
        _find_ort(tmp_path)
    with pytest.raises(BadInput, match="export-web"):
        build_site(tmp_path / "site", ROOT, demo=tmp_path)


@pytest.fixture(scope="module")
def page():
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = chromium.new_page()
        page.set_default_timeout(240_000)  # busy machines are slow
        yield page
        chromium.close()


@pytest.fixture
def first_page(tmp_path, page):
    "Opens a first page with the demo on it; gives the requests that left the machine."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, away = f"http://127.0.0.1:{server.server_port}/", []
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else away.append(r.url))

        def show(models=None):
            (tmp_path / "index.html").write_text("<main>\n<p>The first paragraph.</p>\n</main>", encoding="utf-8")
            _add_demo(tmp_path, ROOT / "nbs/demo", models)
            page.goto(address + "index.html")
            page.wait_for_function("document.querySelector('#demo canvas').hasAttribute('aria-label')")
            return away

        yield show
        page.goto("about:blank")
        server.shutdown()


SEEN = """() => [...document.querySelectorAll('#demo canvas')].map(canvas =>
    [...canvas.getContext('2d').getImageData(0, 0, 64, 64).data])"""
TURN = """([alpha, turns]) => {
    const form = document.querySelector('#demo form')
    form.elements.alpha.value = alpha
    form.elements.turns.checked = turns
    form.dispatchEvent(new Event('change'))}"""


def seen(page):
    "The four pictures (4, 3, 64, 64) that a reader sees, 0-1."
    pixels = torch.tensor(page.evaluate(SEEN)).reshape(4, 64, 64, 4)
    assert (pixels[..., 3] == 255).all()
    return pixels[..., :3].permute(0, 3, 1, 2) / 255


def test_recorded_pictures_where_none_can_be_drawn(first_page, page):
    "Without models the dials choose among recorded pictures: nobody at α = 0 without turns, another place at α = 1."
    assert first_page() == [] and not page.locator("#demo [type=submit]").is_visible()
    page.wait_for_function("document.querySelector('.demo-state').textContent.includes('no models')")
    sheet = np.asarray(Image.open(ROOT / "nbs/demo/recorded.webp").convert("RGB")) / 255
    sheet = torch.tensor(sheet).float().reshape(22, 64, 4, 64, 3).permute(0, 2, 4, 1, 3)
    for row, dial in ((7, (0.7, True)), (3, (0.3, True)), (14, (0.3, False)), (21, (1, False))):
        page.evaluate(TURN, dial)
        assert far(seen(page), sheet[row]) < 2
    assert far(sheet[3], sheet[14]) > 4 and far(sheet[3], sheet[7]) > 4


def test_a_browser_that_cannot_says_so(first_page, page, tmp_path):
    "Models that are not there or broken: one sentence, and the recorded pictures."
    models = tmp_path / "models"
    models.mkdir()
    (models / "demo.json").write_text('{"seeds": 32, "megabytes": 19}', encoding="utf-8")
    first_page(models)
    asked = []
    page.on("request", lambda r: asked.append(r.url.rpartition("/")[2]))
    page.locator("#demo [type=submit]").click()
    page.wait_for_function("document.querySelector('.demo-state').textContent.includes('recorded: this browser')")
    assert not page.locator("#demo [type=submit]").is_visible() and far(seen(page)[:1], seen(page)[1:2]) > 4
    assert page.locator("#demo canvas.old").count() == 0
    assert sorted(asked) == ["decoder.bin", "ort.wasm.bin", "unet.bin"], "each file once, whatever the number of cores"


def test_a_browser_draws_what_torch_draws(pipe, result, first_page, page, tmp_path):
    "Four pictures by JavaScript's Eq. 3, 7 and 8, with turns, without, at another α, and of other seeds."
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[docs]'")
    try:
        ort = _find_ort(ROOT / "node_modules/onnxruntime-web")["ort.mjs"].parent
    except BadInput as e:
        pytest.skip(str(e))
    told = export_web(tmp_path / "web", ort, pipe, result, alphas=[0.7])
    assert told["megabytes"] <= 30 and told["difference"] < 2
    files = [gzip.decompress((tmp_path / "web" / name).read_bytes()) for name in ("unet.bin", "decoder.bin")]
    away = first_page(tmp_path / "web")
    page.locator("#demo [type=submit]").click()
    for dial, start in (((0.7, True), 0), ((0.7, False), 0), ((0.2, True), 0), ((0.2, True), 4)):
        if start:
            page.locator("#demo [name=more]").click()
        else:
            page.evaluate(TURN, dial)
        page.wait_for_function("document.getElementById('demo').dataset.step === '4'")
        mine, seeds = seen(page), range(start, start + 4)
        assert far(mine, _draw_onnx(pipe, result, files, *dial, seeds=seeds)) < 0.35, dial  # bytes are whole
        assert far(mine, _draw_onnx(pipe, result, files, dial[0], not dial[1], seeds=seeds)) > 2, dial
    assert away == []
