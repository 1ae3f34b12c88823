"""Nothing is fetched without saying what, from where and how large; a broken download goes on; offline never asks.

The hub is a small web server on this machine, which gives out the shipped mini the way huggingface.co gives out a
model, and its CLIP like a tag of open_clip.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from layerdiffusion.base.core import package_folder

NAME, COMMIT = "somebody/small-diffusion", "0123456789abcdef0123456789abcdef01234567"
MINI = package_folder() / "weights" / "mini"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
FILES = {
    p.relative_to(MINI).as_posix(): p
    for p in sorted(MINI.rglob("*"))
    if p.is_file() and (p.parent.name in PARTS or p.name == "model_index.json")
}
CLIP_NAME, CLIP = "somebody/small-clip", MINI / "clip"
REPOSITORIES = {CLIP_NAME: {p.name: p for p in sorted(CLIP.iterdir())}}
EXTRA = {
    "unet/diffusion_pytorch_model.bin": MINI / "card.json",
    "safety_checker/model.safetensors": MINI / "card.json",
}  # never wanted


class Hub(BaseHTTPRequestHandler):
    protocol_version, asked, cut = "HTTP/1.1", [], 0

    def log_message(self, *args):
        pass

    def answer(self, body: bytes, status=200, send=True, **headers):
        self.send_response(status)
        for name, value in dict({"Content-Length": len(body)}, **headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if not send:
            return
        if (
            Hub.cut and len(body) > 11_000_000
        ):  # the line breaks in a large file; huggingface_hub writes pieces of 10 MiB
            Hub.cut -= 1
            self.wfile.write(body[:10_900_000])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(body)

    def handle_one(self, send):
        Hub.asked.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0]
        name = next((n for n in REPOSITORIES if n in path), NAME)
        names = REPOSITORIES.get(name, {**FILES, **EXTRA})
        if path.startswith(f"/api/models/{name}/tree/"):
            return self.answer(
                json.dumps(
                    [dict(type="file", path=n, size=p.stat().st_size, oid="0") for n, p in names.items()]
                ).encode(),
                send=send,
                Content_Type="application/json",
            )
        if path.startswith(f"/api/models/{name}"):
            return self.answer(
                json.dumps(dict(id=name, sha=COMMIT, siblings=[dict(rfilename=n) for n in names])).encode(),
                send=send,
                Content_Type="application/json",
            )
        file = names.get(path.partition(f"/{name}/resolve/")[2].partition("/")[2])
        if file is None:
            return self.answer(b"", 404, send=send)
        body = file.read_bytes()
        headers = dict(ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if start:
            return self.answer(
                body[start:], 206, send, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}", **headers
            )
        self.answer(body, 200, send, **headers)

    def do_GET(self):
        self.handle_one(True)

    def do_HEAD(self):
        self.handle_one(False)


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def load(hub, home, offline=False, code=""):
    "A fresh process that loads the model by its name, or does something else."
    code = (
        code
        or "from layerdiffusion.base.folders import resolve_model; from layerdiffusion.base.core import BadInput\n"
        f"try: print(resolve_model({NAME!r}, offline={offline}))\nexcept BadInput as e: print('refused:', e)"
    )
    env = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    Hub.asked.clear()
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_download(hub, tmp_path):
    """Offline asks nothing; then it is said what comes, a broken line is mended by going on, the whole is there, and
    the second time nothing is fetched or said."""
    refused = load(hub, tmp_path, offline=True)
    assert "refused:" in refused.stdout and "offline" in refused.stdout and not Hub.asked
    Hub.cut = 1
    done = load(hub, tmp_path)
    size = sum(p.stat().st_size for p in FILES.values())
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"Fetching {NAME} from {hub}: {len(FILES)} files, {size / 1e6:.0f} MB, into {tmp_path}"), (
        done.stderr
    )
    assert any(range and not range.startswith("bytes=0-") for _, path, range in Hub.asked), "it began anew"
    assert not any(name in path for _, path, _ in Hub.asked for name in EXTRA)
    folder = done.stdout.strip()
    assert all(Path(folder, name).read_bytes() == p.read_bytes() for name, p in FILES.items())
    assert "%" in done.stderr  # progress
    again = load(hub, tmp_path)
    assert (
        again.stdout == done.stdout
        and "Fetching" not in again.stderr
        and not any(method == "GET" and "/resolve/" in path for method, path, _ in Hub.asked)
    )
    assert load(hub, tmp_path, offline=True).stdout == done.stdout and not Hub.asked


def test_nobody_there(tmp_path):
    "Without the hub and without a copy: one sentence, at once."
    done = load("http://127.0.0.1:9", tmp_path)
    assert (
        done.stdout.startswith("refused: Cannot load the model")
        and "the hub could not give it" in done.stdout
        and "Fetching" not in done.stderr
        and "Retrying" not in done.stderr  # asked once: five tries would take twenty seconds
    )


def test_open_clip_tag(hub, tmp_path):
    "The weights of a tag are announced, fetched once, and read by open_clip; offline they are asked for by name."
    (tmp_path / "small.json").write_text(
        json.dumps(json.loads((CLIP / "open_clip_config.json").read_text())["model_cfg"])
    )
    code = f"""if 1:
        import open_clip
        from open_clip import pretrained
        from layerdiffusion.base.core import BadInput
        from layerdiffusion.identity import load_clip
        open_clip.add_model_config({str(tmp_path / "small.json")!r})
        open_clip.get_tokenizer = lambda name: None  # mini's words lie in its folder
        pretrained._PRETRAINED["small"] = dict(world=pretrained._pcfg(hf_hub={CLIP_NAME + "/"!r}))
        try: print(sum(p.double().sum().item() for p in load_clip("small:world")[0].parameters()))
        except BadInput as e: print("refused:", e)"""
    refused = load(hub, tmp_path, code="import os; os.environ['HF_HUB_OFFLINE'] = '1'\n" + code)
    assert "refused:" in refused.stdout and CLIP_NAME in refused.stdout and not Hub.asked, (
        refused.stdout + refused.stderr
    )
    done = load(hub, tmp_path, code=code)
    size = (CLIP / "open_clip_model.safetensors").stat().st_size
    assert done.stderr.startswith(f"Fetching {CLIP_NAME} from {hub}: 1 file, {size / 1e6:.0f} MB, into {tmp_path}"), (
        done.stderr
    )
    from layerdiffusion.identity import load_clip

    assert abs(float(done.stdout) - sum(p.double().sum().item() for p in load_clip("mini")[0].parameters())) < 1e-6
    again = load(hub, tmp_path, code=code)
    assert again.stdout == done.stdout and "Fetching" not in again.stderr


def fp16(names):
    return {n.replace(".safetensors", ".fp16.safetensors"): p for n, p in names.items()}


def resolve(hub, home, name, offline=False):
    code = (
        "from layerdiffusion.base.folders import resolve_model, weight_files; "
        "from layerdiffusion.base.core import BadInput\n"
        f"try: f = resolve_model({name!r}, {offline}); print(f, weight_files(f, 'unet')[1])\n"
        "except BadInput as e: print('refused:', e)"
    )
    return load(hub, home, code=code)


@pytest.fixture
def repository(tmp_path):
    "Add a repository to the hub, with the files given by name; text is written to a file first."
    added = []

    def add(name, files):
        for k, (n, content) in enumerate(files.items()):
            if isinstance(content, str):
                path = tmp_path / f"file-{len(added)}-{k}"
                path.write_text(content)
                files[n] = path
        REPOSITORIES[name] = files
        added.append(name)
        return name

    yield add
    for name in added:
        del REPOSITORIES[name]


def settings(file, **changes):
    return json.dumps(json.loads((MINI / file).read_text()) | changes)


def weights_asked():
    return [path for method, path, _ in Hub.asked if method == "GET" and "/resolve/" in path and ".safetensors" in path]


def test_half_precision_alone(hub, tmp_path, repository):
    "A repository in fp16 only loads from the hub, from the cache, and as a folder, each the same."
    name = repository("somebody/half-diffusion", fp16(FILES))
    done = resolve(hub, tmp_path, name)
    folder, variant = done.stdout.split()
    assert variant == "fp16" and len(weights_asked()) == 3, done.stdout + done.stderr
    assert resolve(hub, tmp_path, name, offline=True).stdout == done.stdout and not Hub.asked
    assert resolve(hub, tmp_path, folder).stdout == done.stdout


def test_one_precision_is_fetched(hub, tmp_path, repository):
    "Where both are there, the full one comes, and nothing twice."
    done = resolve(hub, tmp_path, repository("somebody/both-diffusion", FILES | fp16(FILES)))
    assert done.stdout.split()[1] == "None" and len(weights_asked()) == 3


def test_what_diffusers_cached(hub, tmp_path, repository):
    "diffusers has fetched the fp16 files of a repository that has both; offline, those are loaded."
    name = repository("somebody/cached-diffusion", FILES | fp16(FILES))
    code = (
        "from diffusers import DiffusionPipeline; "
        f"print(DiffusionPipeline.download({name!r}, variant='fp16', use_safetensors=True))"
    )
    fetched = load(hub, tmp_path, code=code)
    assert fetched.returncode == 0, fetched.stderr
    done = resolve(hub, tmp_path, name, offline=True)
    assert done.stdout.split() == [fetched.stdout.split()[-1], "fp16"], done.stdout + done.stderr


REFUSED = dict(
    one_file=({"dreamy.safetensors": "x" * 99}, ["dreamy.safetensors", "in one file"]),
    lora=({"pytorch_lora_weights.safetensors": "x"}, ["LoRA", "--lora"]),
    pickled=(
        {n.replace(".safetensors", ".bin"): p for n, p in FILES.items()},
        ["unet", ".bin", "use_safetensors=False"],
    ),
    no_unet=({n: p for n, p in FILES.items() if "unet" not in n}, ["has no unet"]),
    no_weights=({n: p for n, p in FILES.items() if not ("vae" in n and "safetensors" in n)}, ["vae has no weights"]),
    lcm=(
        FILES | {"unet/config.json": settings("unet/config.json", time_cond_proj_dim=256)},
        ["time_cond_proj_dim", "LCM"],
    ),
    inpainting=(FILES | {"unet/config.json": settings("unet/config.json", in_channels=33)}, ["inpainting"]),
    flow=(
        FILES
        | {
            "scheduler/scheduler_config.json": settings(
                "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"
            )
        },
        ["FlowMatchEulerDiscreteScheduler"],
    ),
    no_json=(FILES | {"vae/config.json": "{"}, ["vae/config.json", "not JSON"]),
)


@pytest.mark.parametrize("case", REFUSED)
def test_no_weights_before_they_are_known_to_fit(hub, tmp_path, repository, case):
    "What does not fit is refused online, by its true reason, and no weights are fetched."
    files, words = REFUSED[case]
    done = resolve(hub, tmp_path / "home", repository(f"somebody/{case.replace('_', '-')}", dict(files)))
    assert done.stdout.startswith("refused:") and len(done.stdout.splitlines()) == 1, done.stdout + done.stderr
    assert not [w for w in words if w not in done.stdout] and "offline" not in done.stdout, done.stdout
    assert not weights_asked()


def test_half_a_copy(hub, tmp_path, repository):
    "A cache without the U-Net's weights: online they are fetched, offline their name is said."
    name = repository("somebody/part-diffusion", dict(FILES))
    first = resolve(hub, tmp_path, name)
    (file,) = Path(first.stdout.split()[0]).glob("unet/*.safetensors")
    os.unlink(file.resolve())
    file.unlink()
    refused = resolve(hub, tmp_path, name, offline=True)
    assert "unet has no weights" in refused.stdout and "offline" in refused.stdout and "cache" in refused.stdout, (
        refused.stdout
    )
    assert resolve(hub, tmp_path, name).stdout == first.stdout and len(weights_asked()) == 1


def test_a_lora_beside_is_said(hub, tmp_path, repository):
    name = repository("somebody/styled-diffusion", FILES | {"pytorch_lora_weights.safetensors": "x"})
    done = resolve(hub, tmp_path, name)
    assert (
        "pytorch_lora_weights.safetensors" in done.stderr and "--lora" in done.stderr and len(weights_asked()) == 3
    )
