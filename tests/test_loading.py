"""A model folder is loaded as what it is, or refused in one sentence that names the file and the way out.

Each case alters a copy of the shipped mini. Nothing is filled in silently: the picture is that of the unaltered model,
or there is none.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerdiffusion.base.core import BadInput, package_folder
from layerdiffusion.base.folders import weight_files

MINI = package_folder() / "weights" / "mini"
WORDS = json.loads((MINI / "text_encoder/config.json").read_text())["vocab_size"]
DPM, LATENTS = "diffusion_pytorch_model", 16


def link(source, to):
    "A hard link where the file system has them, so that a copy costs nothing."
    try:
        os.link(source, to)
    except OSError:
        shutil.copy(source, to)


@pytest.fixture
def folder(tmp_path):
    "A copy of mini's model; files are replaced, never written into."
    ignore = shutil.ignore_patterns("sam", "clip", "judge", "subject", "ip_adapter", "labels.json")
    return shutil.copytree(MINI, tmp_path / "model", ignore=ignore, copy_function=link)


def replace(path, content):
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def settings(file, *gone, **new):
    "Change the settings in a file."

    def change(folder):
        data = json.loads((folder / file).read_text())
        replace(folder / file, json.dumps({k: v for k, v in (data | new).items() if k not in gone}))

    return change


def weights(part, change):
    "Let `change` alter the tensors of a part."

    def alter(folder):
        file = weight_files(folder, part)[0][0]
        tensors = load_file(file)
        change(tensors)
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})

    return alter


def renamed(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def raw(file, change):
    "Let `change` alter the bytes of a file."
    return lambda folder: replace(folder / file, change((folder / file).read_bytes()))


def gone(*names):
    def remove(folder):
        for name in names:
            (shutil.rmtree if (folder / name).is_dir() else os.unlink)(folder / name)

    return remove


def move(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def add(name, content=b"{}"):
    return lambda folder: replace(folder / name, content)


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def sharded(part, base, variant=""):
    "Cut the weights of a part in two, with their index."

    def cut(folder):
        file = weight_files(folder, part)[0][0]
        tensors = load_file(file)
        file.unlink()
        names, where = sorted(tensors), {}
        for k, some in enumerate((names[::2], names[1::2]), 1):
            name = f"{base}{variant}-{k:05}-of-00002.safetensors"
            save_file({n: tensors[n] for n in some}, folder / part / name, metadata={"format": "pt"})
            where |= dict.fromkeys(some, name)
        index = folder / part / f"{base}.safetensors.index{variant}.json"
        index.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=where)))

    return cut


def two_files(folder):
    "The tokenizer in the older form: a vocabulary and its merges."
    inside = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    gone("tokenizer/tokenizer.json")(folder)
    vocabulary = inside["vocab"] | {"<|startoftext|>": WORDS - 2, "<|endoftext|>": WORDS - 1}
    add("tokenizer/vocab.json", json.dumps(vocabulary))(folder)
    merges = [m if isinstance(m, str) else " ".join(m) for m in inside["merges"]]
    add("tokenizer/merges.txt", "\n".join(["#version: 0.2", *merges, ""]))(folder)


def inside_tokenizer(change):
    def alter(folder):
        data = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
        change(data)
        replace(folder / "tokenizer" / "tokenizer.json", json.dumps(data))

    return alter


new_token = inside_tokenizer(
    lambda d: d["added_tokens"].append(d["added_tokens"][0] | dict(id=WORDS, content="<my-dog>", special=False))
)
fewer_merges = inside_tokenizer(lambda d: d["model"].update(merges=d["model"]["merges"][:9]))


def widened(folder):
    "The U-Net and its settings read `n` channels: an inpainting model as people save it."

    def more(tensors):
        tensors["conv_in.weight"] = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, : 2 * LATENTS + 1].contiguous()

    weights("unet", more)(folder)
    settings("unet/config.json", in_channels=2 * LATENTS + 1)(folder)


def position_ids(tensors):
    tensors["text_model.embeddings.position_ids"] = torch.arange(20)[None]


def full(tensors):
    tensors.update({n: x.float() for n, x in tensors.items()})


def eight_bits(tensors):
    tensors["conv_in.weight"] = tensors["conv_in.weight"].to(torch.int8)


def taller(tensors):
    tensors["conv_out.weight"] = tensors["conv_out.weight"][:2].contiguous()


def not_finite(number):
    def change(tensors):
        name = sorted(tensors)[0]
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = number

    return change


def one_deeper(folder):
    "The model in a folder of the folder, as an archive or the hub's cache has it."
    (folder / "snapshots" / "abc").mkdir(parents=True)
    for path in [p for p in folder.iterdir() if p.name != "snapshots"]:
        path.rename(folder / "snapshots" / "abc" / path.name)


UNET, VAE, TEXT = f"unet/{DPM}.safetensors", f"vae/{DPM}.safetensors", "text_encoder/model.safetensors"
CONFIG, SCHEDULE = "unet/config.json", "scheduler/scheduler_config.json"


def fp16(folder):
    for file in (UNET, VAE, TEXT):
        move(file, file.replace(".safetensors", ".fp16.safetensors"))(folder)


# What is harmless: the pictures are the unaltered model's. Name, change, words of the note that is printed ("": none).
HARMLESS = [
    ("fp16 only", fp16, ""),
    ("one part fp16", move(VAE, f"vae/{DPM}.fp16.safetensors"), ""),
    ("bf16 by name", move(UNET, f"unet/{DPM}.bf16.safetensors"), ""),
    ("shards", sharded("unet", DPM), ""),
    ("shards of half precision", sharded("unet", DPM, ".fp16"), ""),
    ("shards of the text encoder", sharded("text_encoder", "model"), ""),
    (
        "whole fp16 beside a shard that is missing",
        both(
            lambda f: shutil.copy(f / UNET, f / "unet" / f"{DPM}.fp16.safetensors"),
            sharded("unet", DPM),
            gone(f"unet/{DPM}-00001-of-00002.safetensors"),
        ),
        "",
    ),
    ("float32", weights("vae", full), ""),
    ("no model_index", gone("model_index.json"), ""),
    ("image to image", settings("model_index.json", _class_name="StableDiffusionImg2ImgPipeline"), ""),
    ("vocabulary in two files", two_files, ""),
    ("special_tokens_map", both(move("tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json")), ""),
    ("position_ids, as in v1.4", weights("text_encoder", position_ids), ""),
    (
        "a safety checker",
        both(
            add("safety_checker/config.json"),
            add("safety_checker/model.safetensors"),
            settings("model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]),
        ),
        "",
    ),
    ("PNDM", settings(SCHEDULE, _class_name="PNDMScheduler"), "PNDMScheduler; pictures are drawn with DDIM"),
    (
        "Euler",
        both(
            settings(SCHEDULE, _class_name="EulerDiscreteScheduler"),
            settings("model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"]),
        ),
        "EulerDiscreteScheduler",
    ),
    (
        "DPM++ with Karras sigmas",
        settings(
            SCHEDULE, _class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True, algorithm_type="dpmsolver++"
        ),
        "DPMSolverMultistepScheduler",
    ),
    ("a LoRA beside", add("pytorch_lora_weights.safetensors"), "--lora"),
    (
        "a LoRA in the U-Net's folder",
        add("unet/pytorch_lora_weights.safetensors"),
        "unet/pytorch_lora_weights.safetensors",
    ),
    ("another part", both(add(f"controlnet/{DPM}.safetensors"), add("controlnet/config.json")), "controlnet/"),
    ("another part by name", settings("model_index.json", controlnet=["diffusers", "ControlNetModel"]), "controlnet"),
    ("learnt words beside", add("learned_embeds.bin"), "learned_embeds.bin"),
    ("a setting from the future", settings(CONFIG, sees_further=True), "sees_further"),
]

# What is refused, and words of the sentence: the file or part, and what is wrong.
REFUSED = [
    (
        "renamed in the text encoder",
        weights("text_encoder", renamed("text_model.final_layer_norm.weight", "text_model.last_norm.weight")),
        ["text_encoder", "final_layer_norm.weight", "last_norm.weight"],
    ),
    (
        "all renamed in the text encoder",
        weights("text_encoder", lambda t: [renamed(n, f"model.{n}x")(t) for n in list(t)]),
        ["text_encoder", "missing", "not known"],
    ),
    (
        "missing in the text encoder",
        weights("text_encoder", lambda t: t.pop("text_model.final_layer_norm.bias")),
        ["text_encoder", "final_layer_norm.bias", "missing"],
    ),
    (
        "renamed in the U-Net",
        weights("unet", renamed("conv_in.weight", "conv_first.weight")),
        ["unet", "conv_in.weight", "conv_first.weight"],
    ),
    ("missing in the U-Net", weights("unet", lambda t: t.pop("conv_out.bias")), ["unet", "conv_out.bias", "missing"]),
    ("extra in the U-Net", weights("unet", lambda t: t.update(more=torch.zeros(1))), ["unet", "more", "not known"]),
    ("another shape", weights("unet", taller), ["unet", "conv_out.weight", "[2, 64, 3, 3] instead of [4, 64, 3, 3]"]),
    ("missing in the VAE", weights("vae", lambda t: t.pop("decoder.conv_out.bias")), ["vae", "decoder.conv_out.bias"]),
    ("extra in the VAE", weights("vae", lambda t: t.update({"loss.weight": torch.zeros(1)})), ["vae", "loss.weight"]),
    ("eight bits", weights("unet", eight_bits), [UNET, "conv_in.weight", "I8"]),
    ("the VAE's weights in the U-Net", lambda f: replace(f / UNET, (f / VAE).read_bytes()), ["unet", "do not fit"]),
    ("half a file", raw(VAE, lambda b: b[: len(b) // 2]), [VAE, "cut short"]),
    ("an empty file", raw(TEXT, lambda b: b""), [TEXT, "damaged"]),
    ("a web page", raw(UNET, lambda b: b"<!DOCTYPE html><html>" * 20), [UNET, "damaged"]),
    (
        "a pointer",
        raw(UNET, lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        [UNET, "git lfs pull"],
    ),
    ("pickled, renamed", raw(UNET, lambda b: b"PK\3\4" + b[:1000]), [UNET, "pickled"]),
    ("pickled", move(UNET, f"unet/{DPM}.bin"), ["unet", ".bin", "save_pretrained"]),
    ("Flax", move(UNET, "unet/diffusion_flax_model.msgpack"), ["unet", "diffusion_flax_model.msgpack"]),
    ("another variant", move(UNET, f"unet/{DPM}.non_ema.safetensors"), ["unet", "non_ema"]),
    ("another name", move(UNET, "unet/model.safetensors"), [f"{DPM}.safetensors", "it holds"]),
    ("no weights", gone(TEXT), ["text_encoder", "model.safetensors"]),
    ("a dead link", both(gone(UNET), lambda f: (f / UNET).symlink_to("nowhere")), ["unet", "has no weights"]),
    (
        "a missing shard",
        both(sharded("unet", DPM), gone(f"unet/{DPM}-00002-of-00002.safetensors")),
        ["unet", f"{DPM}-00002-of-00002.safetensors", "missing"],
    ),
    (
        "half a shard",
        both(sharded("unet", DPM), raw(f"unet/{DPM}-00002-of-00002.safetensors", lambda b: b[:-5])),
        [f"unet/{DPM}-00002-of-00002.safetensors", "cut short"],
    ),
    (
        "shards without index",
        both(sharded("unet", DPM), gone(f"unet/{DPM}.safetensors.index.json")),
        ["unet", f"{DPM}.safetensors.index.json", "missing"],
    ),
    (
        "an index without shards",
        add(f"unet/{DPM}.safetensors.index.json", '{"weight_map": {}}'),
        ["unet", f"{DPM}.safetensors.index.json"],
    ),
    (
        "an index that lies",
        both(
            sharded("unet", DPM),
            settings(
                f"unet/{DPM}.safetensors.index.json", weight_map={"conv_in.weight": f"{DPM}-00001-of-00002.safetensors"}
            ),
        ),
        [f"unet/{DPM}.safetensors.index.json"],
    ),
    ("no U-Net", gone("unet"), ["has no unet"]),
    ("no scheduler and no VAE", gone("scheduler", "vae"), ["has no vae, scheduler"]),
    (
        "one file",
        both(
            gone("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"), add("dream.safetensors")
        ),
        ["dream.safetensors", "in one file", "as the model"],
    ),
    (
        "a saved edit",
        both(
            gone("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"),
            add("edit.safetensors"),
            add("edit.json"),
        ),
        ["holds a saved edit", "load_edit"],
    ),
    (
        "an exported edit",
        both(
            gone("vae", "text_encoder", "tokenizer", "model_index.json"), add("embeddings.safetensors"), add("draw.py")
        ),
        ["holds an exported edit", "draw.py"],
    ),
    (
        "a LoRA alone",
        both(
            gone("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"),
            add("pytorch_lora_weights.safetensors"),
        ),
        ["pytorch_lora_weights.safetensors", "LoRA", "--lora"],
    ),
    ("SDXL", both(add("text_encoder_2/config.json"), add("text_encoder_2/model.safetensors")), ["SDXL"]),
    ("a transformer", both(move("unet", "transformer")), ["transformer"]),
    ("no settings of the U-Net", gone(CONFIG), [CONFIG]),
    ("no settings of the scheduler", gone(SCHEDULE), [SCHEDULE]),
    ("no settings of the text encoder", gone("text_encoder/config.json"), ["text_encoder/config.json"]),
    ("no settings of the tokenizer", gone("tokenizer/tokenizer_config.json"), ["tokenizer/tokenizer_config.json"]),
    ("not JSON", add(SCHEDULE, "{beta: 1}"), [SCHEDULE, "not JSON"]),
    ("half a JSON", raw(CONFIG, lambda b: b[:100]), [CONFIG, "not JSON"]),
    ("a list", add("vae/config.json", "[1]"), ["vae/config.json", "list"]),
    ("a byte-order mark", raw(CONFIG, lambda b: b"\xef\xbb\xbf" + b), [CONFIG, "byte-order mark"]),
    (
        "UTF-16",
        raw("text_encoder/config.json", lambda b: b.decode().encode("utf-16")),
        ["text_encoder/config.json", "byte-order mark"],
    ),
    (
        "Latin-1",
        raw("model_index.json", lambda b: b.replace(b"mini", b"mini").replace(b'"unet"', b'"un\xe9t"')),
        ["model_index.json", "not JSON"],
    ),
    ("a broken card", add("card.json", "{"), ["card.json", "not JSON"]),
    ("an inpainting model", widened, [CONFIG, "33 channels", "inpainting"]),
    ("inpainting by its settings", settings(CONFIG, in_channels=33), ["inpainting"]),
    ("a depth model", settings(CONFIG, in_channels=17), [CONFIG, "depth"]),
    ("instruct-pix2pix", settings(CONFIG, in_channels=8), [CONFIG, "instruct-pix2pix"]),
    ("an upscaler", settings(CONFIG, in_channels=19), [CONFIG, "upscaler"]),
    ("another autoencoder", settings("vae/config.json", latent_channels=16), [CONFIG, "4 channels", "16"]),
    ("learnt variance", settings(CONFIG, out_channels=32), [CONFIG, "32"]),
    ("a VAE of four colours", settings("vae/config.json", in_channels=4), ["vae/config.json", "4"]),
    (
        "another text encoder",
        settings("text_encoder/config.json", hidden_size=64, num_attention_heads=4),
        ["cross_attention_dim", "128", "64"],
    ),
    ("another U-Net", settings(CONFIG, cross_attention_dim=768), [CONFIG, "768", "128"]),
    ("LCM", settings(CONFIG, time_cond_proj_dim=256), [CONFIG, "time_cond_proj_dim", "LCM"]),
    ("class labels", settings(CONFIG, num_class_embeds=1000), [CONFIG, "num_class_embeds", "class labels"]),
    ("class embeddings", settings(CONFIG, class_embed_type="timestep"), [CONFIG, "class_embed_type"]),
    ("more conditions", settings(CONFIG, addition_embed_type="text_time"), [CONFIG, "addition_embed_type"]),
    (
        "quantised",
        settings(CONFIG, quantization_config=dict(quant_method="bitsandbytes")),
        [CONFIG, "quantization_config"],
    ),
    (
        "an attention mask",
        settings("text_encoder/config.json", use_attention_mask=True),
        ["text_encoder/config.json", "use_attention_mask"],
    ),
    ("shifted latents", settings("vae/config.json", shift_factor=0.1), ["vae/config.json", "shift_factor"]),
    ("no size", settings(CONFIG, sample_size=None), [CONFIG, "sample_size", "64"]),
    ("two sizes", settings(CONFIG, sample_size=[8, 12]), [CONFIG, "sample_size"]),
    ("channels as text", settings(CONFIG, in_channels="16"), [CONFIG, "in_channels", "'16'"]),
    ("heads not said", settings(CONFIG, "attention_head_dim"), [CONFIG, "attention_head_dim"]),
    ("groups not said", settings(CONFIG, "norm_num_groups"), [CONFIG, "norm_num_groups"]),
    (
        "activation not said",
        settings("text_encoder/config.json", "hidden_act"),
        ["text_encoder/config.json", "hidden_act"],
    ),
    ("no scale", settings("vae/config.json", scaling_factor=None), ["vae/config.json", "scaling_factor"]),
    ("blocks that do not exist", settings(CONFIG, down_block_types=["Nonsense", "Nonsense"]), [CONFIG, "Nonsense"]),
    ("more layers than weights", settings(CONFIG, layers_per_block=2), ["unet", "missing"]),
    (
        "fewer layers than weights",
        settings("text_encoder/config.json", num_hidden_layers=1),
        ["text_encoder", "not known"],
    ),
    ("another class of U-Net", settings(CONFIG, _class_name="UNetMotionModel"), [CONFIG, "UNetMotionModel"]),
    (
        "another class of VAE",
        settings("vae/config.json", _class_name="AutoencoderTiny"),
        ["vae/config.json", "AutoencoderTiny"],
    ),
    (
        "T5",
        settings("text_encoder/config.json", architectures=["T5EncoderModel"], model_type="t5"),
        ["text_encoder/config.json", "T5EncoderModel"],
    ),
    (
        "another tokenizer",
        settings("tokenizer/tokenizer_config.json", tokenizer_class="BertTokenizer"),
        ["tokenizer/tokenizer_config.json", "BertTokenizer"],
    ),
    (
        "another pipeline",
        settings("model_index.json", _class_name="StableDiffusionControlNetPipeline"),
        ["model_index.json", "StableDiffusionControlNetPipeline"],
    ),
    (
        "another class in the index",
        settings("model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"]),
        ["model_index.json", "AsymmetricAutoencoderKL"],
    ),
    ("no part in the index", settings("model_index.json", unet=[None, None]), ["model_index.json", "unet"]),
    (
        "flow matching",
        settings(SCHEDULE, _class_name="FlowMatchEulerDiscreteScheduler"),
        [SCHEDULE, "FlowMatchEulerDiscreteScheduler"],
    ),
    (
        "flow matching in the index",
        settings("model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        ["model_index.json", "FlowMatchEulerDiscreteScheduler"],
    ),
    (
        "flow sigmas",
        settings(SCHEDULE, _class_name="DPMSolverMultistepScheduler", use_flow_sigmas=True),
        [SCHEDULE, "use_flow_sigmas"],
    ),
    ("an LCM's sampler", settings(SCHEDULE, _class_name="LCMScheduler"), [SCHEDULE, "LCMScheduler"]),
    ("a sampler not named", settings(SCHEDULE, "_class_name"), [SCHEDULE, "_class_name"]),
    ("betas not said", settings(SCHEDULE, "beta_start"), [SCHEDULE, "beta_start"]),
    ("another prediction", settings(SCHEDULE, prediction_type="flow_prediction"), [SCHEDULE, "flow_prediction"]),
    ("pure noise", settings(SCHEDULE, prediction_type="epsilon"), [SCHEDULE, "pure noise"]),
    ("an unknown schedule", settings(SCHEDULE, beta_schedule="sigmoid_rising"), [SCHEDULE, "sigmoid_rising"]),
    ("a beta of text", settings(SCHEDULE, beta_start="small"), [SCHEDULE]),
    ("no merges", both(two_files, gone("tokenizer/merges.txt")), ["tokenizer/merges.txt"]),
    ("merges alone", both(two_files, gone("tokenizer/vocab.json")), ["tokenizer/vocab.json"]),
    ("more tokens than vectors", new_token, [str(WORDS + 1), str(WORDS), "tokenizer"]),
    (
        "fewer vectors",
        settings("text_encoder/config.json", vocab_size=600),
        ["text_encoder", f"[{WORDS}, 128] instead of [600, 128]"],
    ),
    (
        "merges cut short",
        both(two_files, raw("tokenizer/merges.txt", lambda b: b[: len(b) // 2])),
        ["tokenizer", "merges.txt"],
    ),
    ("no merges in one file", fewer_merges, ["tokenizer", "merges"]),
    ("an adapter", add("text_encoder/adapter_config.json"), ["text_encoder/adapter_config.json", "merge_and_unload"]),
    ("an unknown spacing", settings(SCHEDULE, timestep_spacing="sideways"), [SCHEDULE, "sideways"]),
    ("a broken tokenizer", add("tokenizer/tokenizer.json", '{"model": {}}'), ["tokenizer"]),
    ("NaN in the U-Net", weights("unet", not_finite(float("nan"))), ["unet", "not finite"]),
    ("NaN in the VAE", weights("vae", not_finite(float("nan"))), ["vae", "not finite"]),
    ("infinite in the text encoder", weights("text_encoder", not_finite(float("inf"))), ["text_encoder", "not finite"]),
    ("one folder too high", one_deeper, ["holds no model itself", os.path.join("snapshots", "abc")]),
    ("no as text", settings(CONFIG, center_input_sample="false"), [CONFIG, "center_input_sample", "'false'", "false"]),
    ("a number as text", settings(CONFIG, norm_eps="1e-5"), [CONFIG, "norm_eps", "'1e-5'"]),
    ("groups as text", settings("vae/config.json", norm_num_groups="8"), ["vae/config.json", "norm_num_groups"]),
    (
        "yes as text in the scheduler",
        settings(SCHEDULE, rescale_betas_zero_snr="false"),
        [SCHEDULE, "rescale_betas_zero_snr", "'false'"],
    ),
    ("an offset as text", settings(SCHEDULE, steps_offset="1"), [SCHEDULE, "steps_offset", "'1'"]),
    (
        "a length as text",
        settings("tokenizer/tokenizer_config.json", model_max_length="20"),
        ["tokenizer/tokenizer_config.json", "model_max_length", "'20'"],
    ),
    (
        "a text of no length",
        settings("tokenizer/tokenizer_config.json", model_max_length=1),
        ["tokenizer/tokenizer_config.json", "model_max_length"],
    ),
]


def draw(name):
    "A quick picture by a model."
    from layerdiffusion.base.sd import ddim_sample, decode_latents, encode_text, initial_latents, load_models

    models = load_models(name)
    latents = ddim_sample(
        models, encode_text(models, "a dog jumping in a forest"), None, initial_latents(models, [0]), 3, 2.0
    )
    return decode_latents(models, latents)


@pytest.fixture(scope="module")
def picture():
    return draw("mini")


def ids(rows):
    return [row[0] for row in rows]


@pytest.mark.parametrize("name, change, note", HARMLESS, ids=ids(HARMLESS))
def test_harmless(folder, picture, capsys, name, change, note):
    change(folder)
    capsys.readouterr()
    drawn, said = draw(folder), capsys.readouterr().err
    assert torch.allclose(drawn, picture, atol=1e-4), (drawn - picture).abs().max()
    assert note in said and bool(said) == bool(note), said
    assert said.count("Note:") == bool(note)
    draw(folder)
    assert not capsys.readouterr().err, "said twice"


@pytest.mark.parametrize("name, change, words", REFUSED, ids=ids(REFUSED))
def test_refused(folder, tmp_path, monkeypatch, capsys, name, change, words):
    "From Python a BadInput; on the command line exit code 2, that sentence alone, and no file."
    from layerdiffusion.interface.cli import main

    change(folder)
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(tmp_path)
    code = main(
        [
            "edit",
            "example:dog",
            "a dog jumping in a forest",
            "--point",
            "32,36",
            "--model",
            str(folder),
            "--out",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    said = capsys.readouterr().err
    assert code == 2, said
    assert (
        len(said.strip().splitlines()) == 1 and said.startswith("layerdiffusion: ") and said.rstrip().endswith(".")
    ), said
    assert not [w for w in words if w not in said], said
    assert (
        "should not have happened" not in said
        and sorted(folder.rglob("*")) == before
        and [p.name for p in tmp_path.iterdir()] == ["model"]
    )


def test_the_command_itself(folder, tmp_path):
    "In a process of its own: refused with exit 2 and nothing left; a harmless change edits, and is said once."

    def edit(name):
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
        ]
        command = "import sys; from layerdiffusion.interface.cli import main; sys.exit(main())"
        return subprocess.run(
            [
                sys.executable,
                "-c",
                command,
                "edit",
                "example:dog",
                "a dog jumping in a forest",
                *short,
                "--model",
                name,
                "--sam",
                "mini",
                "--out",
                "out",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )

    settings(SCHEDULE, _class_name="PNDMScheduler")(folder)
    done = edit("model")
    assert (
        done.returncode == 0 and (tmp_path / "out" / "sheet.png").exists() and done.stderr.count("PNDMScheduler") == 1
    ), done.stderr
    shutil.rmtree(tmp_path / "out")
    weights("text_encoder", renamed("text_model.final_layer_norm.weight", "x"))(folder)
    done = edit("model")
    assert done.returncode == 2 and "final_layer_norm.weight" in done.stderr and not (tmp_path / "out").exists(), (
        done.stderr
    )


def said(function, *args):
    "The sentence of a refusal."
    with pytest.raises(BadInput) as refused:
        function(*args)
    return str(refused.value)


NAMES = [
    (None, ["None", "hub name"]),
    (5, ["5"]),
    ("", ["''"]),
    (" ", ["' '"]),
    (b"mini", ["mini"]),
    (["mini"], ["mini"]),
    ("a" * 5000, ["too long"]),
    ("a\0b", ["null"]),
    ("~nobody-of-this-name/model", ["~nobody-of-this-name"]),
    (
        "https://huggingface.co/CompVis/stable-diffusion-v1-4/tree/main",
        ["web address", "'CompVis/stable-diffusion-v1-4'"],
    ),
    ("models/dream.safetensors", ["no file", "folder"]),
    ("models/dream.ckpt", ["no file", "folder"]),
]


@pytest.mark.parametrize("name, words", NAMES, ids=[repr(row[0])[:20] for row in NAMES])
def test_what_is_no_name_of_a_model(name, words, monkeypatch):
    "Refused in one sentence before anybody asks the hub."
    from layerdiffusion import LayerDiffusion
    from layerdiffusion.base import folders

    monkeypatch.setattr(folders, "fetch", lambda *args: pytest.fail("asked the hub"))
    sentence = said(LayerDiffusion.from_pretrained, name, "cpu")
    assert not [w for w in words if w not in sentence] and len(sentence) < 400, sentence


def test_models_that_are_none():
    from layerdiffusion import LayerDiffusion

    for models in ("mini", None, MINI):
        assert "from_pretrained" in said(LayerDiffusion, models)
    assert "precision" in said(LayerDiffusion.from_pretrained, "mini", "cpu", None, ["fp32"])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A small file of weights in the shapes that the published SAMs have."
    from layerdiffusion.evidence.full_size import build_random_sam

    return build_random_sam(tmp_path_factory.mktemp("sam") / "sam.pth", width=0.125, size=64)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: dict(model=w, epoch=3),
        lambda w: dict(state_dict=w),
        lambda w: dict(model=dict(state_dict=w)),
        lambda w: {f"module.{n}": x for n, x in w.items()},
        lambda w: dict(state_dict={f"sam_model.{n}": x for n, x in w.items()}, optimizer=dict(lr=1.0)),
    ],
)
def test_sam_out_of_its_wrapping(published, tmp_path, wrap):
    from layerdiffusion.base.masks import load_sam

    weights = torch.load(published, weights_only=True)
    torch.save(wrap(weights), tmp_path / "sam.pth")
    loaded = load_sam(tmp_path / "sam.pth").state_dict()
    assert set(loaded) == set(weights) and all(torch.equal(loaded[n], x) for n, x in weights.items())


SAMS = [
    ("hq", lambda w: w.update({"mask_decoder.hf_token.weight": torch.zeros(1)}), ["HQ-SAM"]),
    (
        "sam2",
        lambda w: [
            w.clear(),
            w.update({"image_encoder.trunk.pos_embed": torch.zeros(1), "memory_attention.norm.bias": torch.zeros(1)}),
        ],
        ["SAM 2"],
    ),
    (
        "transformers",
        lambda w: [w.clear(), w.update({"vision_encoder.pos_embed": torch.zeros(1)})],
        ["image_encoder.pos_embed"],
    ),
    ("something else", lambda w: [w.clear(), w.update({"fc.weight": torch.zeros(1)})], ["another kind", "fc.weight"]),
    ("missing", lambda w: w.pop("mask_decoder.iou_token.weight"), ["mask_decoder.iou_token.weight is missing"]),
    ("extra", lambda w: w.update({"mask_decoder.more": torch.zeros(1)}), ["mask_decoder.more is not known"]),
    (
        "shape",
        lambda w: w.update({"mask_decoder.iou_token.weight": torch.zeros(2, 3)}),
        ["mask_decoder.iou_token.weight has another shape"],
    ),
    ("no blocks", lambda w: [w.pop(n) for n in list(w) if "blocks" in n], ["incomplete"]),
]


@pytest.mark.parametrize("name, change, words", SAMS, ids=ids(SAMS))
def test_sam_called_by_its_name(published, tmp_path, name, change, words):
    from layerdiffusion.base.masks import load_sam

    weights = torch.load(published, weights_only=True)
    change(weights)
    torch.save(dict(model=weights), tmp_path / "sam.pth")
    sentence = said(load_sam, tmp_path / "sam.pth")
    assert "sam.pth" in sentence and not [w for w in words if w not in sentence], sentence


@pytest.mark.parametrize(
    "change, words",
    [
        (raw("config.json", lambda b: b"{"), ["config.json", "not JSON"]),
        (settings("config.json", "transformer"), ["config.json", "transformer"]),
        (raw("model.safetensors", lambda b: b[:-9]), ["model.safetensors", "cut short"]),
        (gone("model.safetensors"), ["model.safetensors"]),
    ],
)
def test_sam_folder(tmp_path, change, words):
    from layerdiffusion.base.masks import load_sam

    copy = shutil.copytree(MINI / "sam", tmp_path / "sam", copy_function=link)
    change(copy)
    sentence = said(load_sam, copy)
    assert not [w for w in words if w not in sentence], sentence


CLIP = "open_clip_model.safetensors"


def clip_weights(change):
    def alter(folder):
        tensors = load_file(folder / CLIP)
        change(tensors)
        (folder / CLIP).unlink()
        save_file(tensors, folder / CLIP)

    return alter


@pytest.mark.parametrize(
    "change, words",
    [
        (clip_weights(lambda t: t.pop("logit_scale")), ["logit_scale"]),
        (clip_weights(renamed("logit_scale", "scale")), ["logit_scale", "scale"]),
        (raw(CLIP, lambda b: b[:-9]), [CLIP, "cut short"]),
        (gone(CLIP), ["weights"]),
        (gone("open_clip_config.json"), ["open_clip_config.json"]),
        (raw("open_clip_config.json", lambda b: b"\xef\xbb\xbf" + b), ["open_clip_config.json", "byte-order mark"]),
        (gone("tokenizer.json", "tokenizer_config.json"), ["okenizer"]),
    ],
)
def test_clip_folder(tmp_path, change, words):
    from layerdiffusion.identity import load_clip

    copy = shutil.copytree(MINI / "clip", tmp_path / "clip", copy_function=link)
    change(copy)
    sentence = said(load_clip, str(copy))
    assert not [w for w in words if w not in sentence], sentence
    assert "There is no CLIP folder" in said(load_clip, str(tmp_path / "nowhere"))


