"""What people have on disk: a checkpoint in one file, LoRAs, another autoencoder, SAM 2 and SAM 3 from transformers.

Each is made here from random weights, and each wrong one gets one sentence.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerdiffusion.base.core import BadInput, package_folder
from layerdiffusion.base.files import model_folder
from layerdiffusion.base.folders import PARTS

MINI = package_folder() / "weights" / "mini"
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "Folders that are put together go here."
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield Path(constants.HF_HOME)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A Stable Diffusion 1 at a tenth of its width, as a folder."
    from layerdiffusion.evidence.full_size import _build_model

    return _build_model(tmp_path_factory.mktemp("model") / "sd", width=0.1, size=512, dtype=torch.float16)


# The names in CompVis' code for those that diffusers gives the same tensors

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_NAMES = [
    (r"down_blocks\.", "down."),
    (r"\.resnets\.(\d)", r".block.\1"),
    (r"mid_block\.block\.0", "mid.block_1"),
    (r"mid_block\.block\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_(q|k|v)\b", r"\1"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    (r"(down|up)samplers\.0", r"\1sample"),
]


def unet_name(name):
    for here, there in _ENDS.items():
        if name.startswith(here):
            return name.replace(here, there)
    way, block, kind, layer, rest = re.match(r"(down|up|mid)_block(?:s\.(\d))?\.(\w+)\.(\d)\.(.*)", name).groups()
    block, layer = int(block or 0), int(layer)
    for here, there in _RESNET.items() if kind == "resnets" else ():
        rest = rest.replace(here, there)
    if way == "mid":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}.{rest}"
    place = f"output_blocks.{3 * block + layer}" if way == "up" else f"input_blocks.{3 * block + layer + 1}"
    return f"{place}.{int(kind == 'attentions')}.{rest}"


def vae_name(name):
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", name)
    for here, there in _VAE_NAMES:
        name = re.sub(here, there, name)
    return name


def old_vae(folder, prefix=""):
    "An autoencoder by its old names, its attention as convolutions."
    return {
        prefix + vae_name(n): x[..., None, None] if "mid_block.attentions" in n and x.ndim == 2 else x
        for n, x in load_file(folder / VAE).items()
    }


def one_file(folder, file, change=lambda tensors: None):
    "A model in one file, as CompVis' code writes it."
    text = load_file(folder / "text_encoder" / "model.safetensors")
    tensors = {f"model.diffusion_model.{unet_name(n)}": x for n, x in load_file(folder / UNET).items()}
    tensors |= old_vae(folder, "first_stage_model.")
    start = "cond_stage_model.transformer.text_model."
    tensors |= {start + n.removeprefix("text_model."): x for n, x in text.items()}
    change(tensors)
    save_file({n: x.contiguous() for n, x in tensors.items()}, file)
    return file


def weights_of(folder, part):
    return load_file(folder / part / f"{PARTS[part].weights}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def said(f, *args, **kwargs):
    with pytest.raises(BadInput) as error:
        f(*args, **kwargs)
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 500, sentence
    return sentence


def test_a_checkpoint_in_one_file(small, tmp_path, capsys):
    "Gives the parts of the folder it was made of, number for number, and is not made twice."
    from layerdiffusion import LayerDiffusion
    from layerdiffusion.base.sd import load_models

    file = one_file(small, tmp_path / "dream.safetensors")
    folder = model_folder(file)
    assert "dream" in folder.name and str(folder) in capsys.readouterr().err
    made = load_models(file)
    ours, theirs = made, load_models(small)
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()), part
    assert ours.folder == folder and ours.name == str(file) and ours.size == 512
    assert torch.equal(ours.scheduler.alphas_cumprod, theirs.scheduler.alphas_cumprod)
    words = "a corgi jumping over 2 logs"
    assert ours.tokenizer(words).input_ids == theirs.tokenizer(words).input_ids
    assert load_file(folder / UNET)["conv_in.bias"].dtype == torch.float16
    assert isinstance(LayerDiffusion(ours, "mini"), LayerDiffusion) and model_folder(file) == folder


def test_its_settings_are_the_published_ones():
    "Those that the planner counts with, for the shapes of v1.4."
    from layerdiffusion.base.files import _first_settings
    from layerdiffusion.evidence.full_size import _build_parts, _sd_configs

    with torch.device("meta"):
        parts = _build_parts(_sd_configs())
        shapes = {f"model.diffusion_model.{unet_name(n)}": x.shape for n, x in parts["unet"].state_dict().items()}
        shapes |= {f"first_stage_model.{vae_name(n)}": x.shape for n, x in parts["vae"].state_dict().items()}
    start = "cond_stage_model.transformer.text_model."
    shapes |= {
        start + n.removeprefix("text_model."): x.shape for n, x in parts["text_encoder"].state_dict().items()
    }
    found, wanted = _first_settings(shapes), _sd_configs()
    for part in ("vae", "text_encoder", "scheduler"):
        assert {k: found[part][k] for k in wanted[part]} == wanted[part], part
    unet = {k: v for k, v in wanted["unet"].items() if k != "use_linear_projection"}
    assert {k: found["unet"][k] for k in unet} == unet


def test_another_family_in_one_file(tmp_path):
    "A Stable Diffusion 2 needs its settings, and then gives the parts it was made of."
    from layerdiffusion.base.sd import load_models
    from layerdiffusion.evidence.full_size import _build_model

    second = _build_model(tmp_path / "second", "2.1", width=0.1, size=64)
    file = one_file(second, tmp_path / "second.safetensors", open_clip)
    assert "--model-config" in said(model_folder, file)
    settings = Path(shutil.copytree(second, tmp_path / "like", ignore=shutil.ignore_patterns("*.safetensors")))
    ours, theirs = load_models(model_folder(file, config=settings)), load_models(second)
    assert same(ours.text_encoder.state_dict(), theirs.text_encoder.state_dict())
    assert same(ours.unet.state_dict(), theirs.unet.state_dict())
    assert ours.scheduler.config.prediction_type == "v_prediction"
    (settings / "scheduler" / "scheduler_config.json").unlink()
    assert "scheduler_config.json" in said(model_folder, file, config=settings)


def open_clip(tensors):
    "The text encoder as OpenCLIP names it, with query, key and value in one."
    start, new = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
    text = {n.removeprefix(start): tensors.pop(n) for n in list(tensors) if n.startswith(start)}
    pairs = [("encoder.layers.", "transformer.resblocks."), ("layer_norm", "ln_"), (".fc1.", ".c_fc.")]
    pairs += [(".fc2.", ".c_proj."), (".self_attn.", ".attn."), ("final_ln_.", "ln_final.")]
    pairs += [("embeddings.token_embedding.", "token_embedding.")]
    pairs += [("embeddings.position_embedding.weight", "positional_embedding")]
    for name, x in text.items():
        for here, there in pairs:
            name = name.replace(here, there)
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            q = next(n for n in text if torch.equal(text[n], x) and ".q_proj." in n)
            x = torch.cat([text[q.replace("q_proj", f"{k}_proj")] for k in "qkv"])
            name = name.replace("q_proj.weight", "in_proj_weight").replace("q_proj.bias", "in_proj_bias")
        tensors[new + name] = x


WRONG = [
    ("half of it", lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]), ["cut short"]),
    ("no text encoder", lambda f: keep(f, "model.diff", "first_stage"), ["text encoder", "--model-config"]),
    ("a layer less", lambda f: keep(f, "", but="input_blocks.4.0.out_layers.3.weight"), ["has no", "input_blocks.4"]),
    ("an autoencoder", lambda f: keep(f, "first_stage"), ["an autoencoder", "--vae"]),
    ("SDXL", lambda f: add(f, "conditioner.embedders.1.model.ln_final.weight"), ["SDXL"]),
    ("Flux", lambda f: save_file({"double_blocks.0.x": torch.zeros(1)}, f), ["transformer"]),
    ("a LoRA", lambda f: save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, f), ["LoRA", "--lora"]),
    ("something else", lambda f: save_file({"layer.weight": torch.zeros(1)}, f), ["layer.weight"]),
]


def keep(file, *starts, but="?"):
    tensors = load_file(file)
    save_file({n: x for n, x in tensors.items() if n.startswith(starts) and but not in n}, file)


def add(file, name):
    save_file(load_file(file) | {name: torch.zeros(1)}, file)


@pytest.fixture(scope="module")
def dream(small, tmp_path_factory):
    return one_file(small, tmp_path_factory.mktemp("file") / "dream.safetensors")


@pytest.mark.parametrize("name, change, words", WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_file(dream, tmp_path, home, name, change, words):
    "One sentence, and nothing is left behind."
    file, before = Path(shutil.copy(dream, tmp_path)), sorted(home.glob("*/*"))
    change(file)
    sentence = said(model_folder, file)
    assert not [w for w in words if w not in sentence], sentence
    assert sorted(home.glob("*/*")) == before


def test_inpainting_in_one_file(dream, tmp_path):
    file = Path(shutil.copy(dream, tmp_path / "paint.safetensors"))
    tensors = load_file(file)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[name] = tensors[name].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(tensors, file)
    sentence = said(model_folder, file)
    assert "inpainting" in sentence and "paint.safetensors" in sentence, sentence


def test_a_missing_weight_is_not_made_up(dream, tmp_path):
    from layerdiffusion.base.sd import load_models

    file = Path(shutil.copy(dream, tmp_path / "less.safetensors"))
    keep(file, "", but="model.diffusion_model.out.2.bias")
    assert "conv_out.bias" in said(load_models, file)


# LoRAs


def attention(part, names):
    "Layers of mini to change."
    tensors = load_file(MINI / part / f"{PARTS[part].weights}.safetensors")
    return {n.removesuffix(".weight"): x for n, x in tensors.items() if n.endswith(tuple(f"{k}.weight" for k in names))}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    "One for mini in diffusers' words: the U-Net's attention and the text encoder's."
    g, tensors = torch.Generator().manual_seed(0), {}
    for part, names in dict(unet=["to_k", "to_out.0"], text_encoder=["q_proj"]).items():
        for name, x in attention(part, names).items():
            tensors[f"{part}.{name}.lora_A.weight"] = torch.randn(2, x.shape[1], generator=g) / 4
            tensors[f"{part}.{name}.lora_B.weight"] = torch.randn(x.shape[0], 2, generator=g) / 4
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, file)
    return file


def only_unet(lora, file):
    save_file({n: x for n, x in load_file(lora).items() if n.startswith("unet.")}, file)
    return file


def kohya(lora, file, alpha=1.0):
    "The same in kohya's words, each product of rank 2 with this alpha."
    tensors = {}
    for name, x in load_file(lora).items():
        part, _, layer = name.removesuffix(".weight").partition(".")
        layer, _, half = layer.rpartition(".")
        start = dict(unet="lora_unet_", text_encoder="lora_te_")[part] + layer.replace(".", "_")
        tensors[f"{start}.{dict(lora_A='lora_down', lora_B='lora_up')[half]}.weight"] = x
        tensors[f"{start}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file


def drawn(folder, *loras):
    "Latents after two steps, by diffusers alone."
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    for file, weight in loras:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pipe.fuse_lora(components=["unet"], lora_scale=weight)
    g = torch.Generator().manual_seed(0)
    return pipe("a dog", num_inference_steps=2, output_type="latent", generator=g).images


@pytest.mark.parametrize("dialect", [only_unet, lambda lora, file: kohya(only_unet(lora, file), file, 3.0)])
def test_a_lora_draws_what_diffusers_draws(lora, tmp_path, dialect):
    "With it at the same weight, in two dialects (transformers wants a peft for the text encoder that there is not)."
    file = dialect(lora, tmp_path / "style.safetensors")
    ours, theirs, plain = (
        drawn(model_folder("mini", loras=[f"{file}:0.6"])),
        drawn(MINI, (file, 0.6)),
        drawn(MINI),
    )
    assert (ours - theirs).abs().max() < 0.05 * (plain - theirs).abs().max()


def test_a_lora_in_the_text_encoder(lora, tmp_path):
    "W + weight · (α / r) · B A; kohya's alpha of 1 halves a rank of 2. The rest is linked, the card included."
    from layerdiffusion.base.sd import load_models

    (name, w), *_ = attention("text_encoder", ["q_proj"]).items()
    a, b = (load_file(lora)[f"text_encoder.{name}.lora_{k}.weight"] for k in "AB")
    for file, scale in ((lora, 1.0), (kohya(lora, tmp_path / "kohya.safetensors"), 0.5)):
        folder = model_folder("mini", loras=[f"{file}:0.8", f"{file}:-0.3"])
        moved = weights_of(folder, "text_encoder")[f"{name}.weight"].float() - w.float()
        assert torch.allclose(moved, 0.5 * scale * (b @ a), atol=2e-3)
    models = load_models(folder)
    assert models.card["name"] == "mini" and models.hash != load_models("mini").hash
    assert (folder / "vae").resolve() == (MINI / "vae").resolve() and model_folder("mini", loras=[lora]) != folder


def test_a_lora_with_the_scale_in_its_notes(lora, tmp_path):
    "peft's alpha of 4 at a rank of 2 doubles it, in one layer by its own."
    (name, w), (other, v), *_ = attention("unet", ["to_k"]).items()
    notes = {"unet.lora_alpha": 4, "unet.r": 2, "unet.alpha_pattern": {other: 6}}
    tensors = load_file(only_unet(lora, tmp_path / "noted.safetensors"))
    save_file(tensors, tmp_path / "noted.safetensors", metadata=dict(lora_adapter_metadata=json.dumps(notes)))
    made = weights_of(model_folder("mini", loras=[tmp_path / "noted.safetensors"]), "unet")
    for layer, before, scale in ((name, w, 2), (other, v, 3)):
        a, b = (tensors[f"unet.{layer}.lora_{k}.weight"] for k in "AB")
        assert torch.allclose(made[f"{layer}.weight"].float() - before.float(), scale * (b @ a), atol=5e-3)


def test_a_wrong_lora(lora, small, tmp_path):
    "For another model, with a layer that there is not, of another kind, without its other half."
    assert "style.safetensors" in (sentence := said(model_folder, small, loras=[lora])) and "family" in sentence
    tensors, file = load_file(lora), tmp_path / "odd.safetensors"
    for change, word in (
        (lambda n: n.replace("down_blocks.0", "down_blocks.7"), "down_blocks_7"),
        (lambda n: n.replace("lora_A", "hada_w1_a"), "LoHa"),
        (lambda n: n if "lora_A" in n else "unet.x.lora_A.weight", "lacks"),
        (lambda n: n.replace("text_encoder.", "text_encoder_2."), "text_encoder_2"),
    ):
        save_file({change(n): x for n, x in tensors.items()}, file)
        assert word in said(model_folder, "mini", loras=[file])
    assert "FILE:WEIGHT" in said(model_folder, "mini", loras=[f"{lora}:nan"])
    assert "nowhere" in said(model_folder, "mini", loras=["nowhere.safetensors:0.5"])
    assert "not a LoRA" in said(model_folder, "mini", loras=[MINI / VAE])


# Autoencoders


def test_another_autoencoder(small, tmp_path):
    "A file with the old names or the new ones, its folder or a model's: the same numbers arrive."
    better = {n: x + 0.01 for n, x in load_file(small / VAE).items()}
    model = Path(shutil.copytree(small, tmp_path / "other"))
    save_file(better, model / VAE)
    old = old_vae(model)
    save_file({n: x.contiguous() for n, x in old.items()}, tmp_path / "vae-ft.safetensors")
    for given in (tmp_path / "vae-ft.safetensors", model / VAE, model / "vae", model):
        folder = model_folder(small, vae=given)
        assert same(weights_of(folder, "vae"), better) and same(weights_of(folder, "unet"), weights_of(small, "unet"))


def test_a_wrong_autoencoder(small, tmp_path):
    later = Path(shutil.copytree(small / "vae", tmp_path / "vae"))
    settings = json.loads((later / "config.json").read_text())
    (later / "config.json").write_text(json.dumps(settings | dict(scaling_factor=0.13025)))
    assert "0.13025" in (sentence := said(model_folder, small, vae=later)) and "same family" in sentence
    assert "block_out_channels" in said(model_folder, small, vae=MINI)
    assert "not an autoencoder" in said(model_folder, small, vae=small / UNET)
    assert "nowhere" in said(model_folder, small, vae="nowhere")


def test_the_command_takes_all_three(lora, tmp_path, capsys, monkeypatch):
    from layerdiffusion.interface.cli import main

    monkeypatch.chdir(tmp_path)
    how = ["--embedding-steps", "1", "--tuning-steps", "1", "--steps", "2", "--seeds", "0", "--out", "out"]
    words = ["edit", "example:dog", "a dog jumping in a forest", "--point", "32,36", "--device", "cpu", *how]
    assert main([*words, "--lora", f"{lora}:0.5", "--vae", str(MINI)]) == 0
    assert Path("out/seed-0.png").is_file() and "mini-" in json.loads(Path("out/edit.json").read_text())["model"]
    assert main([*words, "--lora", "none.safetensors"]) == 2
    assert "none.safetensors" in capsys.readouterr().err


# SAM 2 and SAM 3


def sam_2():
    "A small one with random weights, and what prepares pictures for it."
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2ImageProcessor, Sam2Model, Sam2VisionConfig

    widths = [16, 32, 64, 128]
    backbone = Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4] * 4,
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    how = dict(backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32)
    vision = Sam2VisionConfig(backbone_config=backbone.to_dict(), backbone_channel_list=widths[::-1], **how)
    config = Sam2Config(vision_config=vision.to_dict(), **heads(64, 16))
    return Sam2Model(config), Sam2ImageProcessor(size=dict(height=64, width=64))


def sam_3():
    from transformers import Sam3ImageProcessor, Sam3TrackerConfig, Sam3TrackerModel, Sam3VisionConfig, Sam3ViTConfig

    size = dict(image_size=56, patch_size=14, pretrain_image_size=56, window_size=2, global_attn_indexes=[1])
    backbone = Sam3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **size
    )
    how = dict(backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32)
    vision = Sam3VisionConfig(backbone_config=backbone.to_dict(), **how)
    config = Sam3TrackerConfig(vision_config=vision.to_dict(), **heads(56, 14))
    return Sam3TrackerModel(config), Sam3ImageProcessor(size=dict(height=56, width=56))


def heads(size, patch):
    return dict(
        prompt_encoder_config=dict(hidden_size=32, image_size=size, patch_size=patch),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=32, iou_head_hidden_dim=32),
    )


@pytest.fixture(scope="module", params=[sam_2, sam_3])
def later(request, tmp_path_factory):
    "Its folder, as transformers saves it."
    torch.manual_seed(0)
    model, sees = request.param()
    folder = tmp_path_factory.mktemp("sam") / request.param.__name__
    model.save_pretrained(folder)
    sees.save_pretrained(folder)
    return folder


def test_a_later_sam(later):
    "Its clicks and boxes are those of transformers' own processor; a batch of clicks is as good as one by one."
    import numpy as np
    from transformers import Sam2Processor

    from layerdiffusion.base.masks import load_sam, look

    sam, image = load_sam(later), torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(1))
    photo = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    theirs = Sam2Processor(sam.sees, target_size=sam.config.prompt_encoder_config.image_size)
    seen, answers = look(sam, image), []
    for points, labels, box in (
        ([(50, 20)], [1], None),
        ([(50, 20), (9, 9)], [1, 0], None),
        (None, None, (9, 5, 60, 40)),
    ):
        given = dict(input_boxes=[[list(box or ())]])
        if points:
            given = dict(input_points=[[list(map(list, points))]], input_labels=[[labels]])
        inputs = theirs(images=photo, return_tensors="pt", **given)
        sizes = inputs.pop("original_sizes")
        out = sam(**inputs)
        coords, box = (None if x is None else np.asarray(x, "float32") for x in (points, box))
        masks, quality, _ = seen.predict(coords, None if labels is None else np.asarray(labels), box)
        assert torch.allclose(torch.from_numpy(quality), out.iou_scores[0, 0], atol=1e-4)
        answers.append(theirs.post_process_masks(out.pred_masks, sizes)[0][0].numpy())
        assert masks.shape == (3, 48, 80) and (masks != answers[-1]).mean() < 0.01
    assert (answers[0] != answers[2]).any()
    both = seen.apply_coords_torch(torch.tensor([[[50.0, 20.0]], [[9.0, 30.0]]]), (48, 80))
    masks = [seen.predict_torch(p, torch.ones(len(p), 1, dtype=torch.int))[0] for p in (both, both[:1], both[1:])]
    assert (masks[0] != torch.cat(masks[1:])).float().mean() < 0.01
    with pytest.raises(BadInput, match="another size"):
        look(seen, image[:, :20])


def test_a_later_sam_in_an_editor(later):
    "It is given like any other, and the planner counts it."
    from layerdiffusion import LayerDiffusion
    from layerdiffusion.base.memory import _count_sam, _weight_bytes

    method = LayerDiffusion.from_pretrained("mini", "cpu", str(later))
    assert _count_sam(method.sam) > _weight_bytes(method.sam) and method.sam.knows_boxes


def test_a_wrong_later_sam(later, tmp_path):
    from layerdiffusion.base.masks import load_sam

    def copy(name):
        return Path(shutil.copytree(later, tmp_path / name))

    folder = copy("no processor")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    assert "preprocessor_config.json" in said(load_sam, folder)
    folder = copy("less")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(n for n in tensors if n.endswith("no_memory_embedding")))
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
    assert "no_memory_embedding" in said(load_sam, folder)
    folder = copy("half")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    assert "cut short" in said(load_sam, folder)
    folder = copy("relative")
    (folder / "config.json").write_text(json.dumps(dict(model_type="sam_hq")))
    assert "sam_hq" in (sentence := said(load_sam, folder)) and "sam2" in sentence


# IP-Adapters


def plus(width, words):
    "The projection of a Plus, by its published names: places of the picture are asked by four queries."
    shapes = dict(latents=(1, 4, 64), **{"proj_in.weight": (64, width), "proj_out.weight": (words, 64)})
    shapes |= {"proj_in.bias": (64,), "proj_out.bias": (words,), "norm_out.weight": (words,), "norm_out.bias": (words,)}
    for layer in (f"layers.{i}" for i in range(4)):
        shapes |= {f"{layer}.0.to_q.weight": (64, 64), f"{layer}.0.to_kv.weight": (128, 64)}
        shapes |= {f"{layer}.0.to_out.weight": (64, 64), f"{layer}.1.1.weight": (256, 64)}
        shapes |= {f"{layer}.1.3.weight": (64, 256)}
        norms = [f"{layer}.{n}.{k}" for n in ("0.norm1", "0.norm2", "1.0") for k in ("weight", "bias")]
        shapes |= {name: (64,) for name in norms}
    return shapes


def adapter_for(folder, to, kind="plain"):
    "An IP-Adapter with random weights for the model in a folder, as h94/IP-Adapter has them, and its image encoder."
    from diffusers import UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
    words = unet.config.cross_attention_dim
    four = {"proj.weight": (4 * words, 24), "proj.bias": (4 * words,), "norm.weight": (words,), "norm.bias": (words,)}
    shapes = {f"image_proj.{n}": s for n, s in (plus(32, words) if kind == "plus" else four).items()}
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            rows = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
            shapes |= {f"ip_adapter.{i}.to_{k}_ip.weight": tuple(rows) for k in "kv"}
    g = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=g) / (s[-1] ** 0.5 if len(s) == 2 else 1) for n, s in shapes.items()}
    (to / "models").mkdir(parents=True)
    save_file(tensors, to / "models" / "ip-adapter_sd15.safetensors")
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=32, patch_size=8, **size))
    encoder.save_pretrained(to / "models" / "image_encoder")
    return to


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return adapter_for(MINI, tmp_path_factory.mktemp("adapter") / "IP-Adapter")


@pytest.fixture(scope="module")
def photo():
    "A picture and its subject, which is beside the middle."
    mask = torch.zeros(1, 64, 64)
    mask[:, 8:40, 4:28] = 1
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)), mask


def seen(models, photo, scale, steps=3):
    "Latents of a text, drawn in sight of a photo's subject; and the noise they began with."
    from layerdiffusion.base.sd import ddim_sample, encode_text, initial_latents
    from layerdiffusion.identity import see_subject

    embeds, noise = [encode_text(models, words) for words in ("a dog", "a cat")], initial_latents(models, [0, 1])
    sees = models if scale is None else see_subject(models, *photo, scale)
    return ddim_sample(sees, *embeds, noise, steps, 4.0), noise


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_an_ip_adapter_draws_what_diffusers_draws(tmp_path, photo, kind):
    """Its own pipeline, with `load_ip_adapter` and the subject as the picture, guided away from other words; ours is
    not guided away from a blank picture: the subject is seen in both passes."""
    from diffusers import StableDiffusionPipeline

    from layerdiffusion.base.core import to_pil
    from layerdiffusion.base.sd import load_models
    from layerdiffusion.identity import portrait

    root = adapter_for(MINI, tmp_path / "IP-Adapter", kind)
    models = load_models(model_folder("mini", ip_adapter=root))
    ours, noise = seen(models, photo, 0.6)
    pipe = StableDiffusionPipeline.from_pretrained(MINI)
    pipe.load_ip_adapter(str(root), subfolder="models", weight_name="ip-adapter_sd15.safetensors")
    pipe.set_ip_adapter_scale(0.6)
    pipe.scheduler = models.scheduler
    how = dict(num_images_per_prompt=2, num_inference_steps=3, guidance_scale=4.0, output_type="latent", latents=noise)
    (picture,) = pipe.prepare_ip_adapter_image_embeds([to_pil(portrait(*photo))], None, "cpu", 1, False)
    both = [torch.cat([picture, picture])]
    theirs = pipe("a dog", negative_prompt="a cat", ip_adapter_image_embeds=both, **how).images
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - seen(models, photo, None)[0]).abs().mean() > 1e-2


def test_what_an_ip_adapter_sees(adapter, photo):
    "The subject and not what is beside it, the more the larger the scale, and nothing at a scale of 0."
    from layerdiffusion.base.sd import load_models
    from layerdiffusion.identity import portrait

    models, (image, mask) = load_models(model_folder("mini", ip_adapter=adapter)), photo
    before = models.unet.state_dict().keys()
    alone, one = seen(models, photo, None, 1)[0], seen(models, photo, 1.0, 1)[0]
    assert torch.allclose(seen(models, photo, 0.0, 1)[0], alone, atol=1e-5)
    assert torch.equal(seen(models, (image * mask, mask), 1.0, 1)[0], one)
    assert (seen(models, (image.flip(0) * mask, mask), 1.0, 1)[0] - one).abs().mean() > 1e-4
    assert (seen(models, (image, 1 - mask), 1.0, 1)[0] - one).abs().mean() > 1e-4
    off = [(x - alone).abs().mean() for x in (seen(models, photo, 0.1, 1)[0], one)]
    assert off[1] > off[0] > 1e-3
    assert models.unet.state_dict().keys() == before and models.unet.encoder_hid_proj is None
    square = portrait(image, mask)
    assert square.shape == (3, 32, 32) and torch.equal(square[:, :, 4:28], image[:, 8:40, 4:28])
    assert (square[:, :, :4] == 0.5).all() and (square[:, :, 28:] == 0.5).all()


@pytest.mark.parametrize("tuned", ["all", "lora"])
def test_an_edit_through_an_ip_adapter(adapter, photo, tmp_path, tuned):
    "Its own weights do not move in the tuning, and a saved edit is drawn again the same."
    from layerdiffusion import LayerDiffusion, load_edit
    from layerdiffusion.base.sd import load_models

    method = LayerDiffusion(load_models(model_folder("mini", ip_adapter=adapter)), "mini")
    short = dict(embedding_steps=1, tuning_steps=2, tuning_lr=1e-3, sampling_steps=2, tuned_parameters=tuned)
    given = dict(mask=photo[1], reference=photo[0].flip(0), seeds=[0], subject_scale=0.5, **short)
    edit = method.edit(photo[0], "a dog jumping in a forest", **given)
    assert edit.difference and not [name for name in edit.difference if "_ip" in name]
    other = LayerDiffusion(method.models, "mini")
    assert torch.equal(load_edit(edit.save(tmp_path), other).images, edit.images)


def test_an_ip_adapter_has_a_name(adapter, tmp_path):
    "Records are named after what is inside of it."
    from layerdiffusion.base.sd import load_models
    from layerdiffusion.identity import subject_name

    models = load_models(model_folder("mini", ip_adapter=adapter))
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    change(other, lambda t: t.update({"image_proj.proj.bias": t["image_proj.proj.bias"] + 1}))
    plain = load_models(shutil.copytree(MINI, tmp_path / "plain", ignore=shutil.ignore_patterns("ip_adapter")))
    names = [subject_name(m) for m in (plain, models, load_models(model_folder("mini", ip_adapter=other)))]
    assert names[0] == "" and len(set(names)) == 3 and all(re.fullmatch("[0-9a-f]{16}", name) for name in names[1:])
    again = model_folder(models.folder, ip_adapter=other)  # in place of the one that is there
    assert subject_name(load_models(again)) == names[2] and model_folder("mini", ip_adapter=adapter) == models.folder


def change(root, f):
    "Other tensors in an adapter."
    file = root / "models" / "ip-adapter_sd15.safetensors"
    tensors = load_file(file)
    f(tensors)
    save_file(tensors, file)


def test_a_wrong_ip_adapter(adapter, small, lora, tmp_path):
    "For another model, without its image encoder or with another one, of another kind, several, none."
    sentence = said(model_folder, small, ip_adapter=adapter)
    assert "ip-adapter_sd15.safetensors" in sentence and "family" in sentence and "layers" in sentence
    assert "nowhere" in said(model_folder, "mini", ip_adapter="nowhere")
    assert "is a LoRA" in said(model_folder, "mini", ip_adapter=lora)
    assert "--ip-adapter" in said(model_folder, "mini", loras=[adapter / "models" / "ip-adapter_sd15.safetensors"])
    assert "holds no ip-adapter" in said(model_folder, "mini", ip_adapter=MINI)
    (tmp_path / "adapter.bin").touch()
    assert "adapter.bin" in said(model_folder, "mini", ip_adapter=tmp_path / "adapter.bin")
    for name, f, words in (
        ("blind", lambda p: shutil.rmtree(p / "models" / "image_encoder"), ["image_encoder/config.json", "get that"]),
        ("half", lambda p: (p / "models/image_encoder/model.safetensors").write_bytes(b"12345678"), ["model.safetens"]),
        ("face", lambda p: change(p, lambda t: t.pop("image_proj.proj.weight")), ["FaceID", "plain one"]),
        ("other", lambda p: wider(p / "models/image_encoder/config.json"), ["projection_dim 99", "takes 24"]),
        ("two", lambda p: twice(p / "models"), ["ip-adapter-a", "ip-adapter-b", "the file of one"]),
    ):
        copy = Path(shutil.copytree(adapter, tmp_path / name))
        f(copy)
        sentence = said(model_folder, "mini", ip_adapter=copy)
        assert not [w for w in words if w not in sentence], sentence
    bare = tmp_path / "two" / "models" / "ip-adapter-a.safetensors"
    assert model_folder("mini", ip_adapter=bare) == model_folder("mini", ip_adapter=adapter)


def wider(file):
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(projection_dim=99)))


def twice(folder):
    file = folder / "ip-adapter_sd15.safetensors"
    shutil.copy(file, folder / "ip-adapter-a.safetensors")
    file.rename(folder / "ip-adapter-b.safetensors")


def test_the_command_takes_an_ip_adapter(adapter, tmp_path, capsys, monkeypatch):
    from layerdiffusion.interface.cli import main

    monkeypatch.chdir(tmp_path)
    how = ["--embedding-steps", "1", "--tuning-steps", "1", "--steps", "2", "--seeds", "0", "--out", "out"]
    words = ["edit", "example:dog", "a dog jumping in a forest", "--point", "32,36", "--device", "cpu", *how]
    assert main([*words, "--ip-adapter", str(adapter)]) == 2
    assert "--subject-scale" in capsys.readouterr().err and not Path("out").exists()
    assert main([*words, "--ip-adapter", str(adapter), "--subject-scale", "0.1"]) == 0, capsys.readouterr().err
    assert "mini-" in json.loads(Path("out/edit.json").read_text())["model"] and Path("out/seed-0.png").is_file()


def test_an_edit_that_sees_belongs_to_its_adapter(adapter, tmp_path):
    "Drawn again only with the one it saw through, under another name than with another, and not exported."
    from layerdiffusion.interface.saving import export
    from layerdiffusion.pipeline import LayerDiffusion, _sight, load_edit

    names = str(model_folder("mini", ip_adapter=adapter)), "mini"
    ours, other = (LayerDiffusion.from_pretrained(name, "cpu") for name in names)
    few = dict(embedding_steps=1, tuning_steps=1, sampling_steps=2, seeds=[0])
    edit = ours.edit("example:dog", "a dog lying in the snow", subject_scale=1.0, **few)
    assert edit.record["adapter"] and torch.equal(load_edit(edit.save(tmp_path / "edit"), ours).images, edit.images)
    assert "--ip-adapter" in (wrong := said(load_edit, tmp_path / "edit", other)) and edit.record["adapter"] in wrong
    assert "subject_scale 1" in said(export, edit, ours, tmp_path / "out") and not (tmp_path / "out").exists()
    photo = edit.image, edit.mask
    assert _sight(ours, photo, edit.config) != _sight(other, photo, edit.config)
    blind = ours.edit("example:dog", "a dog lying in the snow", **few)
    assert not blind.record["adapter"] and export(blind, ours, tmp_path / "blind").is_dir()
    assert len(load_edit(blind.save(tmp_path / "plain"), other).images) == 1


def test_what_sees_follows_the_precision(adapter, photo):
    "A model that is rounded, or spares memory, after it saw a photo sees it in its new way."
    from dataclasses import replace
    from layerdiffusion.base.sd import How
    from layerdiffusion.pipeline import LayerDiffusion
    from layerdiffusion.settings import EditConfig

    method, config = LayerDiffusion.from_pretrained("mini", "cpu"), EditConfig(subject_scale=1.0)
    before = method.seeing(photo, config)
    assert method.seeing(photo, config).unet is before.unet
    method.models = replace(method.models, how=How(checkpointing=True))
    assert method.seeing(photo, config).unet is not before.unet
    seen = [next(m.unet.parameters()).dtype for m in (before, method.to(torch.bfloat16).seeing(photo, config))]
    assert seen == [torch.float32, torch.bfloat16]
