"""Does a test notice? One line of the method is made wrong at a time, and the tests that should see it are run.

`python tests/mutants.py` tries all of them, some minutes on one core, prints a table and ends with 1 if one survives or
is no longer found in the code. `python tests/mutants.py masks` tries those whose name or module holds a word. It is run
by hand and by a nightly workflow, not by pytest.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ |= dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1")
sys.dont_write_bytecode = True

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "layerdiffusion"
EQUATIONS, DIRECTION, DISK = "test_equations.py", "test_direction.py", "test_on_disk.py"


# Each run of tests is a process of its own, forked from one that has imported the libraries, but not ours.
CHILDREN = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    LIBRARIES = "torch", "diffusers", "diffusers.schedulers", "transformers", "segment_anything", "pytest", "PIL.Image"
    PARTS = "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition"
    WORDS = "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip", "torch._dynamo"
    CHILDREN.set_forkserver_preload([*LIBRARIES, *PARTS, *WORDS])


class Mutant(NamedTuple):
    "One line made wrong."

    name: str  # what is wrong with it
    module: str
    old: str  # found once in the module
    new: str
    test: str  # a file of tests, and a word of the names of those that should fail


def loop(name, module, old, new, case=""):
    "A mutant that the independent loop should kill."
    return Mutant(name, module, old, new, f"{EQUATIONS}::{case}")


def way(name, module, old, new, test):
    "A mutant that a test of direction should kill."
    return Mutant(name, module, old, new, f"{DIRECTION}::{test}")


MUTANTS = [
    # Eq. 1: the noise loss
    loop(
        "the velocity's sign", "method", "share * noise - sigma * latents", "share * noise + sigma * latents", "default"
    ),
    loop(
        "noise and picture swapped",
        "method",
        "share * latents + sigma * noise",
        "sigma * latents + share * noise",
        "default",
    ),
    loop("the rest of the mask", "method", "(mask * error).square()", "((1 - mask) * error).square()", "default"),
    loop("times the mask's share", "method", "else each / mask.flatten(1)", "else each * mask.flatten(1)", "over"),
    loop("no step of its own", "method", 'stream(f"{stage}-{seed}", step)', 'stream(f"{stage}-{seed}", 0)', "default"),
    loop("no seed of its own", "method", 'stream(f"{stage}-{seed}", step)', 'stream(f"{stage}-0", step)', "loop[seed]"),
    way("a rate that grows", "base.sd", "(1 + math.cos(", "(1 - math.cos(", "half_a_cosine"),
    way("a gradient scaled twice", "base.sd", "_foreach_div_(found", "_foreach_mul_(found", "scaled_for"),
    way(
        "the predicted picture",
        "base.sd",
        "share * latents - sigma * noise_pred",
        "share * latents + sigma * noise_pred",
        "finished",
    ),
    loop(
        "pictures from 0 to 1",
        "method",
        "vae.encode(pictures * 2 - 1)",
        "vae.encode(pictures)",
        "default",
    ),
    # Eq. 2 and 3: the words
    loop("Eq. 2 on the subject", "readings", "background=(1 - mask, 1 - mask)", "background=(mask, mask)", "default"),
    loop("the branches swapped", "readings", "branch=(mask, 1 - mask)", "branch=(1 - mask, mask)", "passes"),
    loop("the place begins", "readings", "[both[step % 2]]", "[both[1 - step % 2]]", "alternation"),
    loop(
        "Eq. 2 on the reference",
        "pipeline",
        'image if config.eq2_picture == "input"',
        'image if config.eq2_picture != "input"',
        "default",
    ),
    loop(
        "alpha the other way",
        "method",
        "return alpha * e_a + (1 - alpha) * e_b",
        "return (1 - alpha) * e_a + alpha * e_b",
        "default",
    ),
    way(
        "the new words' rate",
        "pipeline",
        "config.embedding_steps, config.word_lr",
        "config.embedding_steps, config.embedding_lr",
        "first_step",
    ),
    way(
        "the new words' mask",
        "identity",
        "            mask.to(latents.device),",
        "            1 - mask.to(latents.device),",
        "new_words",
    ),
    way(
        "T_a for T",
        "pipeline",
        'scene.text if config.object_words == "whole"',
        'scene.text if config.object_words != "whole"',
        "whole_words",
    ),
    way(
        "what was learnt taken off", "pipeline", "return scene.e_a + learnt", "return scene.e_a - learnt", "reuse_keeps"
    ),
    # Eq. 4 to 6: the tuning
    loop(
        "an empty M_r",
        "pipeline",
        "scene.reference)), m_t, None, m_t",
        "scene.reference)), m_t, None, 0 * m_t",
        "default",
    ),
    loop(
        "the layers swapped",
        "base.masks",
        "return mask * subject + (1 - mask) * background",
        "return mask * background + (1 - mask) * subject",
        "default",
    ),
    loop(
        "the reference's subject only",
        "pipeline",
        'union(m_r, m_t) if config.eq5_region == "union"',
        'm_r if config.eq5_region == "union"',
        "two",
    ),
    way(
        "where both masks are",
        "readings",
        "broadcast_tensors(*masks)).amax(0)",
        "broadcast_tensors(*masks)).amin(0)",
        "in_the_reference",
    ),
    loop(
        "Eq. 5 under M_r",
        "method",
        "(lambda_bg, 1 - reference_mask)",
        "(lambda_bg, reference_mask)",
        "default",
    ),
    loop(
        "λ2 for λ1",
        "method",
        "(lambda_obj, subject_mask)",
        "(lambda_bg, subject_mask)",
        "default",
    ),
    way("one term for two", "method", "return len(latents) * noise_loss", "return noise_loss", "two_terms"),
    loop("a sum over the draws", "fine_tuning", "(step, generator) / batch", "(step, generator)", "several"),
    loop("one draw for several", "fine_tuning", "several if batch > 1", "several if batch > 9", "several"),
    loop("Eq. 2 in no other reading", "method", "conditions(*words, step) if conditions else ", "", "mix"),
    loop("the decay kept back", "fine_tuning", "decay=decay, begin", "decay=False, begin", "decay"),
    loop("the decay forgotten", "pipeline", '    tuning_decay="decay",\n', "", "decay"),
    loop(
        "Eq. 4's words",
        "pipeline",
        'if config.eq4_words == "source" else embeds',
        'if config.eq4_words != "source" else embeds',
        "own",
    ),
    way("λ_prior left out", "fine_tuning", "(weight / count) ** 0.5", "(1 / count) ** 0.5", "models_own"),
    way("λ_prior forgotten", "pipeline", '    lambda_prior="lambda_prior",\n', "", "models_own"),
    way(
        "words of other pictures", "fine_tuning", "prior[1][k].to(embeds)", "prior[1][:count].to(embeds)", "models_own"
    ),
    way(
        "LoRA without a seed",
        "readings",
        "torch.randn(rank, columns, generator=generator)",
        "torch.randn(rank, columns)",
        "setting_seed",
    ),
    way("half of the attention", "readings", 'if ".attn" in name', 'if ".attn1" in name', "weights_move"),
    way("the change taken off", "differences", ".float() + change", ".float() - change", "begin_with"),
    loop("the change's sign", "differences", "weight - base[name]", "base[name] - weight", "default"),
    way(
        "no start",
        "fine_tuning",
        ") if start else copy_unet(",
        ") if False else copy_unet(",
        "begin_with",
    ),
    way("what is not kept", "pipeline", "(keep * ", "((1 - keep) * ", "reuse_keeps"),
    # Eq. 7 and 8: the drawing
    loop(
        "guided away",
        "method",
        "return free + guidance_scale * (said - free)",
        "return said + guidance_scale * (free - said)",
        "default",
    ),
    loop(
        "the mix begins",
        "readings",
        'take_turns(e_a, e_opt) if first == "object" else take_turns(e_opt, e_a)',
        'take_turns(e_opt, e_a) if first == "object" else take_turns(e_a, e_opt)',
        "default",
    ),
    loop("odd for even", "method", "e_a if i % 2 == 0", "e_a if i % 2 == 1", "default"),
    loop("whose parity", "readings", 'condition if index == "loop"', 'condition if index != "loop"', "timestep"),
    loop(
        "never the mix first", "pipeline", "config.eq8_index, config.eq8_first)", 'config.eq8_index, "object")', "mix"
    ),
    loop(
        "turns where none are asked for",
        "pipeline",
        "if config.iterative_guidance else None",
        "if True else None",
        "turns",
    ),
    way(
        "one noise for all",
        "method",
        "torch.Generator().manual_seed(int(seed))",
        "torch.Generator().manual_seed(0)",
        "a_seed_is",
    ),
    loop(
        "the drawn pictures' seed",
        "pipeline",
        "initial_latents(models, [config.seed], *size)",
        "initial_latents(models, [0], *size)",
        "not_given",
    ),
    # Masks
    way(
        "far from the middle",
        "base.masks",
        "quality * (1 - _off_centre(masks))",
        "quality * _off_centre(masks)",
        "sure_central",
    ),
    way("at the border", "base.masks", "* (1 - border)", "* (1 + border)", "border"),
    way(
        "any size",
        "base.masks",
        "(area >= smallest) & (area <= largest)",
        "(area >= smallest) | (area <= largest)",
        "sure_central",
    ),
    way("the worst mask", "base.masks", "masks[quality.argmax()]", "masks[quality.argmin()]", "surest"),
    way("to the left", "base.masks", "gx - 2 * dx - anchor[0]", "gx + 2 * dx - anchor[0]", "moving"),
    way(
        "hard the other way",
        "base.masks",
        "(mask >= 0.5).float() if hard",
        "(mask < 0.5).float() if hard",
        "latent_size",
    ),
    # What the U-Net sees of the photo's subject
    way(
        "the place for the subject",
        "identity",
        "image * hard + 0.5 * (1 - hard)",
        "image * (1 - hard) + 0.5 * hard",
        "without_its_place",
    ),
    way(
        "a square of the rest", "identity", "hard[0].nonzero().T", "(1 - hard[0]).nonzero().T", "without_its_place"
    ),
    way("a black edge", "identity", "side - h - y), value=0.5)", "side - h - y), value=0.0)", "without_its_place"),
    way("everything but the subject", "identity", "seen.shape[1]) <= 0.1)", "seen.shape[1]) > 0.1)", "attention"),
    way("less for more", "identity", "weight = math.log(self.scale)", "weight = -math.log(self.scale)", "attention"),
    way("a scale of nothing", "identity", "if self.scale else -math.inf", "if self.scale else 0.0", "attention"),
    way("a noisy look", "identity", "models.unet(latents, 0,", "models.unet(latents, 500,", "layer_reads"),
    Mutant("its own scale", "identity", "processor.scale = [scale]", "processor.scale = [1.0]", f"{DISK}::sees"),
    Mutant(
        "the adapter looks beside the subject",
        "identity",
        "portrait(image, mask), scale)",
        "portrait(image, 1 - mask), scale)",
        f"{DISK}::sees",
    ),
    way("seen without a scale", "pipeline", "if not config.subject_scale:", "if config.subject_scale:", "every_stage"),
    way(
        "the strength kept back",
        "pipeline",
        "see_subject(self.models, image, mask, config.subject_scale)",
        "see_subject(self.models, image, mask, 1.0)",
        "every_stage",
    ),
    way(
        "one sight for all photos",
        "pipeline",
        "content_hash(image, mask, config",
        "content_hash(mask, config",
        "every_stage",
    ),
    way(
        "a result of another photo",
        "pipeline",
        "[*photo, config.subject_scale, subject_name(method.models)] if photo",
        "[] if photo",
        "every_stage",
    ),
    way(
        "a result of another strength",
        "pipeline",
        "[*photo, config.subject_scale, subject_name(method.models)] if photo",
        "[*photo] if photo",
        "every_stage",
    ),
    way("O_t of another photo", "pipeline", "*_sight(self, photo, config),", "", "every_stage"),
    way(
        "Eq. 2 blind",
        "pipeline",
        "losses), self.seeing(scene.photo, config)",
        "losses), self.models",
        "every_stage",
    ),
    way(
        "the prior pictures blind",
        "pipeline",
        "self.seeing(scene.photo, config), texts",
        "self.models, texts",
        "every_stage",
    ),
    way(
        "Eq. 4 to 6 blind",
        "pipeline",
        "self.layers(scene, config), self.seeing(scene.photo, config)",
        "self.layers(scene, config), self.models",
        "every_stage",
    ),
    way("the subject is kept", "pipeline", "self.inside * latents + (", "(1 - self.inside) * latents + (",
        "place_is_kept"),
    way("the place from the first step", "pipeline", "if i < self.begin", "if i < 0", "place_is_kept"),
    way("no noise on the place", "pipeline", "if i + 1 < self.total", "if i + 1 < 0", "nobody_is_found"),
    way("nobody found, all kept", "pipeline", "torch.ones(1, 1, *self", "torch.zeros(1, 1, *self", "nobody_is_found"),
    way("Eq. 7 blind", "pipeline", "self.seeing(photo, config).unet", "self.models.unet", "every_stage"),
    way("O_t blind", "pipeline", '"target", callback, (photo, found))', '"target", callback)', "every_stage"),
    way(
        "blind looks",
        "pipeline",
        "(self, models, words, scene.size",
        "(self, self.models, words, scene.size",
        "look_on_the_way",
    ),
    way(
        "a photo that is drawn",
        "pipeline",
        'if config.object_picture == "input":',
        'if config.object_picture != "input":',
        "photo_or_a_drawn",
    ),
    # What trains mini
    way(
        "an average that jumps",
        "mini.training",
        "1 - min(decay, (1 + int(n))",
        "min(decay, (1 + int(n))",
        "moving_average",
    ),
    way("an average that stands", "mini.training", "ema.update_parameters(objective)", "None", "after_each_step"),
    way("nine of ten captions left out", "mini.training", "generator=g) < 0.1", "generator=g) > 0.1", "captions"),
    way("the place counts more", "mini.training", "(1 + self.weight * mask + ", "(3 - 2 * mask + ", "three_times"),
    way("a sock counts like a tree", "mini.training", " + self.own * own)", ")", "three_times"),
    Mutant(
        "words alone that see",
        "mini.training",
        "layer.scale = [float(seeing)]",
        "layer.scale = [1.0]",
        "test_mini.py::learnt_together",
    ),
    way("cool before warm", "mini.training", "share < 1 - cool", "share > 1 - cool", "rate_of"),
    Mutant("a view of itself", "mini.training", "roll(shift, 1)", "roll(0, 1)", "test_device.py::larger"),
    Mutant(
        "a view of somebody else",
        "mini.training",
        "(0, (-1, self.views))",
        "(0, (self.views, -1))",
        "test_device.py::larger",
    ),
    Mutant("nobody sees nothing", "mini.training", "generator=g) > 0.1", "generator=g) > -1", "test_device.py::larger"),
    Mutant(
        "an adapter that speaks at once",
        "mini.training",
        "new.to_v_ip[0].weight.data.zero_()",
        "new.to_v_ip[0].weight.data.copy_(keys)",
        "test_mini.py::adds_nothing",
    ),
    Mutant(
        "a base that learns",
        "mini.training",
        "unet.requires_grad_(False)",
        "unet.train()",
        "test_mini.py::adds_nothing",
    ),
    way(
        "a click means the rest",
        "mini.training",
        "torch.where(hit, whole, 1 - whole)",
        "torch.where(hit, 1 - whole, whole)",
        "clicks",
    ),
]


def source(package: Path, module: str) -> Path:
    "The file of a module such as `base.masks`."
    return package.joinpath(*module.split(".")).with_suffix(".py")


def apply(mutant: Mutant, folder: Path) -> bool:
    "Write the module with its line made wrong into a copy of the package; False where the line is not found once."
    text = source(PACKAGE, mutant.module).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return False
    source(folder / "layerdiffusion", mutant.module).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return True


def copy_package(folder: Path):
    "The modules copied, the weights and pictures linked."
    for path in PACKAGE.rglob("*.py"):
        to = folder / "layerdiffusion" / path.relative_to(PACKAGE)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    for path in (p for p in PACKAGE.iterdir() if p.is_dir() and not any(p.rglob("*.py"))):
        if path.name != "__pycache__":
            (folder / "layerdiffusion" / path.name).symlink_to(path, target_is_directory=True)


def in_child(folder: Path, test: str, said: Path):
    "Run the tests of a file whose names hold a word, with the package in `folder`; ends this process."
    file, _, word = test.partition("::")
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(out, fd)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = sys.path[0] = str(folder)
    words = word.replace("[", " and ").replace("]", "") or "test"
    sys.exit(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", str(ROOT / "tests" / file), "-k", words]))


def run_tests(folder: Path, test: str) -> tuple:
    "How pytest ended, and what it said."
    child = CHILDREN.Process(target=in_child, args=(folder, test, folder / "said"))
    child.start()
    child.join()
    return child.exitcode, (folder / "said").read_text(encoding="utf-8", errors="replace")


def verdict(mutant: Mutant, folder: Path) -> str:
    "killed, SURVIVED, not found in the code, or why the tests could not be run."
    if not apply(mutant, folder):
        return "NOT FOUND: the line is not in the module once; write the mutant anew"
    try:
        code, said = run_tests(folder, mutant.test)
    finally:
        shutil.copy(source(PACKAGE, mutant.module), source(folder / "layerdiffusion", mutant.module))
    if code in (0, 1):
        return ("SURVIVED", "killed")[code]
    return f"NOT TRIED: pytest ended with {code}: {(said.strip().splitlines() or [''])[-1]}"


def sound(folder: Path) -> bool:
    "Whether the copy is what the tests import, and passes them as it is."
    where = f"import layerdiffusion\ndef test_where(): assert layerdiffusion.__file__.startswith({str(folder)!r})\n"
    (folder / "test_where.py").write_text(where, encoding="utf-8")
    tests = str(folder / "test_where.py"), EQUATIONS, DIRECTION, f"{DISK}::sees"
    return all(run_tests(folder, file)[0] == 0 for file in tests)


def main(words: list) -> int:
    "Try the mutants whose name or module holds one of `words`; all of them without."
    chosen = [m for m in MUTANTS if not words or any(w in f"{m.module}: {m.name}" for w in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy_package(folder := Path(folder))
        if not sound(folder):
            print("The tests fail without any mutant; mend that first.")
            return 1
        results = []
        for mutant in chosen:
            begin = time.monotonic()
            results.append(verdict(mutant, folder))
            seconds = time.monotonic() - begin
            line = f"{mutant.module:<12} {mutant.name:<32} {mutant.test:<46} {seconds:4.0f} s  {results[-1]}"
            print(line, flush=True)
    killed = results.count("killed")
    print(f"\n{killed} of {len(results)} killed")
    return 0 if results and killed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
