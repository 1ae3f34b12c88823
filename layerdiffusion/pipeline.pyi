# Made by tests/stubs.py: the classes of the module beside it, whole.
"""The whole method in one call: a picture and a sentence in, edited pictures out, with every setting written down"""
__all__ = ['LayerDiffusion', 'Scene', 'EditOutput', 'load_edit']
import copy
import ctypes
import functools
import inspect
import sys
import time
import warnings
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast
from collections.abc import Callable, Sequence
import torch
import torch.nn.functional as F
from layerdiffusion.base.core import BadInput, Event, Notice, as_path, check_callback, content_hash, environment, fit_image, fit_points, join_callbacks
from .base.core import live_preview, load_image, one_writer, pick_device, shielded, to_pil
from .base.families import FAMILIES
from .base.folders import read_json, resolve_model
from .checkpoints import Resumable
from .differences import apply_difference, weight_difference
from .fine_tuning import fine_tune
from layerdiffusion.identity import ACTIONS, SCENERY, encode_with, first_vectors, known, load_clip, prior_pictures, prior_texts, propose_source, see_subject, subject_name, with_words, word_objective
from layerdiffusion.base.masks import check_labels, check_mask, composite, find_mask, load_sam, mask_from_file, move_subject, propose_subject, to_latent
from .method import add_noise, fit_embeddings, interpolate
from layerdiffusion.interface.saving import EditResult, pictures_beside, check_tensors, clear_checkpoints, patch, photo_info, pixels, read_edit
from .interface.saving import same_model
from layerdiffusion.base.sd import PRECISIONS, PREDICTIONS, Models, on_device, check_text, ddim_sample, decode_latents, encode_image, encode_text, half, initial_latents, load_models, unet_on_cpu, pick_precision, quiet, speak_float32, use, vae_psnr, with_scheduler
from .readings import conditions_of, trainable, turns, union
from .settings import EditConfig, near
from .words import Split, plain_words, split_text, subject_phrase
_KEEP = 2 * 10 ** 9

def held(x, seen: dict | None=None) -> int:
    """The memory of all tensors in a result, be it a tensor, a module, or a list, dict or object of them.

    What two share counts once.
    """
    ...

class _Kept(OrderedDict):
    """Results by name, at most `_KEEP` bytes of them: the one asked for the longest ago goes first, the newest stays."""

    def __setitem__(self, key, value):
        ...

def _precision_name(dtype: torch.dtype) -> str:
    """The name of a precision, such as fp32; `BadInput` for another type of number."""
    ...

class LayerDiffusion(Resumable):
    """Edits pictures: one loaded model, and what was already computed with it."""

    def __init__(self, models: Models, sam: Any=None):
        ...

    @classmethod
    def from_pretrained(cls, name: str='mini', device: str | None=None, sam: Any=None, precision: str='auto', offline: bool=False, torch_dtype: torch.dtype | None=None, dtype: torch.dtype | None=None) -> 'LayerDiffusion':
        """Load a model by name; raises `BadInput` for a model, device or precision that cannot be had."""
        ...

    @classmethod
    def from_pipe(cls, pipe: Any, sam: Any=None) -> 'LayerDiffusion':
        """An editor around a diffusers pipeline, whose parts it shares and freezes; it stays on the pipe's device.

        Raises `BadInput` for another kind of pipeline, or one whose parts are on different devices, in different
        precisions, or moved by hooks of accelerate.
        """
        ...

    def part_name(self, part: str, file: str, other: str) -> str:
        """The SAM or CLIP in the model's folder; without one, mini beside mini, else another."""
        ...

    @property
    def sam(self):
        ...

    def settings(self, config: EditConfig | None=None, preset: str | None=None, **changes) -> EditConfig:
        """Every setting of an edit with this model: of a preset or a config, with changes and the model's own numbers."""
        ...

    def __repr__(self):
        ...

    def to(self, *where: str | torch.device | torch.dtype, device: str | torch.device | None=None, dtype: torch.dtype | None=None) -> LayerDiffusion:
        """Move the model to a device or into half precision, in place.

    Raises `BadInput` for a device that is not there, an unknown type of number, and for a type that would not
    hold the numbers as they are loaded anew: from half precision there is no way but loading again.
    """
        ...

    def round_to(self, dtype: torch.dtype):
        """Round the weights of a float32 model to half precision."""
        ...

    def enable_model_cpu_offload(self, device: str | torch.device='cuda'):
        """Let autoencoder and text encoder wait on the CPU until they are needed, and the U-Net while its copy is tuned.

    The pictures stay the same but for rounding. Raises `BadInput` without a GPU.
    """
        ...

    def cached(self, stage: str, parts: Sequence, compute: Callable):
        """The result of `compute`, kept by the content of `parts`."""
        ...

    def seeing(self, photo: tuple, config: EditConfig) -> Models:
        """The model that Eq. 2 to 8 speak of: with `subject_scale` one that sees the photo's subject, else the loaded one."""
        ...

    def draw(self, text: str, size: tuple, config: EditConfig, stage: str, callback=None, photo: tuple=()) -> torch.Tensor:
        """A picture (3, H, W) of a text, by the untouched model."""
        ...

    def find_subject(self, source, image: torch.Tensor, mask=None, point=None, box=None, point_labels=None) -> torch.Tensor:
        """The subject's mask (1, H, W) on the fitted picture."""
        ...

    def prepare(self, image: Any, text: str, *, mask: Any=None, point: Sequence | None=None, box: Sequence | None=None, point_labels: Sequence | int | None=None, reference: Any=None, object: str | None=None, background: str | None=None, object_reference: Any=None, object_mask: Any=None, move: Sequence=(0.0, 0.0), scale: float=1.0, source: str | None=None, preset: str | None=None, config: EditConfig | None=None, callback: Callable | None=None, **settings: Any) -> Scene:
        """Stage 1: read, find the subject, split the words, get the reference.

    A scene can be given to several edits. Raises `BadInput` for whatever cannot be read, found or meant.
    """
        ...

    def background(self, reference, split: Split, photo: torch.Tensor, config: EditConfig, callback=None) -> tuple:
        """O_r and M_r: given, or drawn from T_b."""
        ...

    def target(self, text: str, photo: torch.Tensor, found: torch.Tensor, config: EditConfig, given: tuple | None=None, callback=None) -> tuple:
        """O_t and M_t: the photo and its subject, another picture and its subject, or a drawn one and SAM's subject in it."""
        ...

    def propose(self, photo: torch.Tensor, text: str) -> str:
        """What the photo shows, in CLIP's eyes; the subject is that of `text`."""
        ...

    def describe(self, photo: torch.Tensor, text: str, source: str | None, config: EditConfig) -> str | None:
        """What the photo shows, in words: those given, or CLIP's; None where no setting asks for them."""
        ...

    def latents(self, image: torch.Tensor) -> torch.Tensor:
        """Latents (1, C, h, w) of a picture, encoded once."""
        ...

    def small(self, mask: torch.Tensor, config: EditConfig) -> torch.Tensor:
        """A mask (1, 1, h, w) at latent size."""
        ...

    def embed(self, scene: Scene, config: EditConfig | None=None, callback: Callable | None=None, folder: str | Path | None=None) -> tuple:
        """Stage 2, Eq. 2: the fitted embeddings of subject and place, and the losses."""
        ...

    def learn(self, scene: Scene, config: EditConfig, callback: Callable | None=None, folder=None) -> tuple:
        """Eq. 2 for new words: their vectors (n, D), None without them, and the losses."""
        ...

    def whole_words(self, scene: Scene, config: EditConfig, callback: Callable | None=None, folder=None) -> tuple:
        """e_a and e_b of the target's text, with learnt words in it where there are any, and the losses."""
        ...

    def source_words(self, scene: Scene, config: EditConfig, callback: Callable | None=None, folder=None) -> torch.Tensor:
        """The words of the photo (1, L, D), with those that were learnt from it."""
        ...

    def prior(self, scene: Scene, config: EditConfig, callback: Callable | None=None, count: int=24) -> tuple | None:
        """The model's own pictures of the target's subject and their words; None where none are asked for."""
        ...

    def layers(self, scene: Scene, config: EditConfig) -> tuple:
        """The pictures and masks of Eq. 4 and 5: subject latents, M_t, reference latents (None: the same), M_r."""
        ...

    def tune(self, scene: Scene, words: tuple, config: EditConfig | None=None, callback: Callable | None=None, folder: str | Path | None=None, look_every: int=0, look_seed: int=0, start: dict | None=None) -> tuple:
        """Stage 3, Eq. 3-6: what changes in the U-Net (see `weight_difference`), and the losses."""
        ...

    def sample(self, words: tuple, difference: dict, size: tuple, seeds: Sequence[int]=range(8), config: EditConfig | None=None, callback: Callable | None=None, batch: int=8, callback_on_step_end: Callable | None=None, photo: tuple=(None, None), reference: torch.Tensor | None=None) -> torch.Tensor:
        """Stage 4, Eq. 7-8: draw with the tuned U-Net, the two embeddings taking turns."""
        ...

    def paint(self, unet, words: tuple, size: tuple, seeds: list, config: EditConfig, callback: Callable | None=None, callback_on_step_end: Callable | None=None, reference: torch.Tensor | None=None) -> torch.Tensor:
        """One batch of pictures (B, 3, H, W) by any U-Net."""
        ...

    def edit(self, image: Any=None, text: str | None=None, *, scene: Scene | None=None, mask: Any=None, point: Sequence | None=None, point_labels: Sequence | int | None=None, box: Sequence | None=None, reference: Any=None, object_reference: Any=None, object_mask: Any=None, move: Sequence=(0.0, 0.0), scale: float=1.0, source: str | None=None, object: str | None=None, background: str | None=None, seeds: Sequence[int]=range(8), preset: str | None=None, config: EditConfig | None=None, callback: Callable[[Event], None] | None=None, callback_on_step_end: Callable | None=None, look_every: int=0, folder: str | Path | None=None, resume: bool=False, **settings: Any) -> EditResult:
        """LayerDiffusion: change what the subject does and where it is.

    The long name of the call: `LayerDiffusion.__call__` does the same with the names of diffusers and gives Pillow
    pictures; here the result's `images` are a tensor (B, 3, H, W), 0-1. Raises `BadInput` before anything slow begins.
    """
        ...

    def settings_for(self, scene: Scene, config: EditConfig | None, preset: str | None, changes: dict) -> EditConfig:
        """The settings of an edit of a prepared scene: those it was prepared with, unless others are named that fit it."""
        ...

    def pack(self, scene: Scene, words: tuple, difference: dict, images: torch.Tensor, seeds: list, config: EditConfig, times: dict, losses: dict, **record) -> EditResult:
        """An `EditResult` of what the four stages gave."""
        ...

    def __call__(self, image: Any=None, text: str | None=None, *, mask: Any=None, scene: Scene | None=None, preset: str | None=None, num_inference_steps: int | None=None, guidance_scale: float | None=None, negative_prompt: str | None=None, num_images_per_prompt: int | None=None, generator: torch.Generator | Sequence[torch.Generator] | None=None, seeds: Sequence[int] | None=None, callback_on_step_end: Callable | None=None, output_type: str='pil', **more: Any) -> EditOutput:
        """`edit` in the words of diffusers: the result's `images` are Pillow pictures, and its `edit` is what `edit` gives.

    `callback_on_step_end` is called after each step of the drawing with `callback_kwargs["latents"]`, (B, C, h, w);
    other latents of this shape in the dict that it gives are gone on with. More than eight pictures are drawn eight
    at a time, and the steps of each eight begin with 0. Raises `BadInput` before anything slow begins.
    """
        ...

    def preview(self, path: str | Path | None=None, every: float=0.5, most: int=4) -> Callable[[Event], None]:
        """A callback for `edit` that shows what is being drawn, beside the progress of each stage."""
        ...

    def carry(self, result: EditResult, scene: Scene) -> tuple:
        """The new words, with what Eq. 2 learnt about the subject."""
        ...

    def reuse(self, result: EditResult, text: str, reference: Any=None, *, object_reference: Any=None, object_mask: Any=None, object: str | None=None, background: str | None=None, move: Sequence=(0.0, 0.0), scale: float=1.0, seeds: Sequence[int]=range(8), steps: int | None=None, learning_rate: float | None=None, sampling_steps: int | None=None, keep: float=0.0, callback: Callable[[Event], None] | None=None, look_every: int=0) -> EditResult:
        """Another text or place for a subject that was learnt, by a short tuning instead of a whole edit."""
        ...
_PIPE_PARTS = ('vae', 'unet', 'text_encoder', 'tokenizer', 'scheduler')

class _PipeModels(Models):
    """The parts of a diffusers pipeline that was loaded elsewhere."""

    @functools.cached_property
    def hash(self) -> str:
        """The folder's name for its weights where these are the same, else one made of the weights."""
        ...

def _check_pipe(pipe):
    """Refuse what is no Stable Diffusion pipeline, or one whose parts are not where they work."""
    ...

def _speaking(part: torch.nn.Module) -> torch.nn.Module:
    """The same weights in a shell that takes and gives float32; the pipe's own part stays as it is."""
    ...

def _models_of(pipe) -> Models:
    """The parts of a diffusers pipeline, shared with it and frozen, on its device and in its precision."""
    ...

def _give_back():
    """Hand memory that is free back to the computer, where the C library is glibc; elsewhere nothing happens."""
    ...

@dataclass
class Scene:
    """What an edit starts from: pictures (3, H, W) and masks (1, H, W), all 0-1 and of one size, and the words."""
    text: str
    split: Split
    image: torch.Tensor
    mask: torch.Tensor
    reference: torch.Tensor
    reference_mask: torch.Tensor
    object_image: torch.Tensor
    object_mask: torch.Tensor
    e_a: torch.Tensor
    e_b: torch.Tensor
    source: str | None = ...
    times: dict = field(default_factory=dict)
    vectors: torch.Tensor | None = ...
    info: dict = field(default_factory=dict)
    placed: dict = field(default_factory=dict)
    config: EditConfig | None = ...
    model: str = ...

    @property
    def size(self):
        ...

    @property
    def photo(self) -> tuple:
        ...

def cover(image, height: int, width: int) -> torch.Tensor:
    """The middle of a picture, scaled until it covers height × width."""
    ...

def _sight(method: LayerDiffusion, photo: tuple, config: EditConfig) -> list:
    """What the U-Net sees beside its words, and through what, for the key of what is computed with it."""
    ...

def _read_mask(mask, height: int, width: int, whole: tuple | None=None) -> torch.Tensor:
    """A mask from a file, a picture, an array, a tensor or SAM's own dict, refused when it is empty or full."""
    ...

def check_world(models: Models, image: torch.Tensor, least: float=20.0):
    """Warn when a mini model's autoencoder cannot represent the picture."""
    ...

def _check_names(settings: dict, *calls: Callable):
    """Refuse what is no setting, with the names that are most like it."""
    ...

def _check_pointing(mask, point, box, point_labels):
    """Refuse a mask beside what SAM would make one of, and labels of no points."""
    ...

def _read_object(picture, mask) -> tuple | None:
    """The object's own picture and its mask as Pillow pictures of one size; the mask may be None."""
    ...

def _check_placement(move: Sequence, scale: float) -> tuple:
    """dx, dy and scale as numbers, refused when they cannot be meant."""
    ...

@contextmanager
def clock(times: dict, name: str):
    """Measure a `with` block."""
    ...
_TUNING = dict(tuning_batch='batch', tuning_decay='decay', tuning_steps='steps', tuning_lr='learning_rate', lambda_obj='lambda_obj', lambda_bg='lambda_bg', loss_scale='scale', tuned_parameters='params', lora_rank='rank', seed='seed', prior_batch='prior_batch', lambda_prior='lambda_prior')

def _tuning_words(method: LayerDiffusion, scene: Scene, words: tuple, config: EditConfig, callback, folder):
    """e_opt (1, L, D), or the words (2, L, D) of Eq. 4 and of Eq. 5 where a setting asks for others."""
    ...

class _Place:
    """A callback of the drawing that finds its subject; `keep` lets all else be the reference's in the last steps."""

    def __init__(self, method: LayerDiffusion, reference: torch.Tensor, noise: torch.Tensor, config: EditConfig):
        ...

    def __call__(self, event: Event):
        ...

    def around(self, image: torch.Tensor) -> torch.Tensor:
        """Where the subject of a picture is, and a little more; everywhere, where SAM finds nobody."""
        ...

    def keep(self, i: int, latents: torch.Tensor) -> torch.Tensor:
        """The latents after step i, with the reference's around the subject."""
        ...

def _step_end(pipe: LayerDiffusion, callback: Callable, step: int, t, latents: torch.Tensor) -> torch.Tensor:
    """The latents (B, C, h, w) to go on with: the same ones, or those that diffusers' `callback_on_step_end` gives."""
    ...

def check_seeds(seeds: Sequence[int]) -> list:
    """A list of different whole numbers from 0."""
    ...

class _Looks:
    """A callback of the tuning that adds a quick picture to every `every`-th event, and to the last one."""

    def __init__(self, method: LayerDiffusion, models: Models, words: tuple, size: tuple, config: EditConfig, every: int, seed: int=0, sampling_steps: int=10):
        ...

    def watch(self, params: Sequence, start: dict | None=None):
        """Make the U-Net to draw with."""
        ...

    def __call__(self, event: Event):
        ...

def _in_its_folder(edit: Callable) -> Callable:
    """An edit that has its folder to itself, and leaves there what it learnt when it ends before its pictures are drawn."""
    ...

def _check_calls(callback, callback_on_step_end):
    """Refuse what cannot be called."""
    ...

def _check_sam(method: LayerDiffusion, config: EditConfig):
    """Load SAM before anything slow begins, where `keep_place` needs it at the end."""
    ...

def _check_given(image, text):
    """Refuse an edit of nothing."""
    ...

def _check_alone(parts: dict):
    """Refuse, beside a scene, what it is made of."""
    ...

@dataclass
class EditOutput:
    """What the call of diffusers gives: pictures to look at, and the edit they belong to."""
    images: Any
    edit: EditResult
_OUTPUTS: dict[str, Callable] = ...

def _drawn_seed(generator: torch.Generator) -> int:
    """A generator's seed where it was just seeded, else one from its stream; it goes on by a draw."""
    ...

def _seeds_of(seeds, generator, count: int | None) -> list:
    """The seeds that a call means by seeds, generators and a number of pictures; eight where it says nothing."""
    ...
DRAWN = ('alpha', 'iterative_guidance', 'eq8_index', 'eq8_first', 'scheduler', 'sampling_steps', 'guidance_scale', 'negative_prompt', 'keep_place')

def _method_for(method: Any, settings: dict) -> LayerDiffusion:
    """The model to draw a saved edit with: the given one, or the one its file names, in the precision it names."""
    ...

def _record_again(settings: dict, models: Models) -> dict:
    """The record of a saved edit that is drawn again."""
    ...

def _check_drawn(changes: dict, path: Path):
    """Refuse a change of what a saved edit has learnt."""
    ...

def load_edit(path: str | Path, method: Any=None, seeds: Sequence[int] | None=None, callback: Callable | None=None, draw: bool=True, **changes: Any) -> EditResult:
    """Draw a saved edit again: with nothing changed, the same pictures, on the same device in the same precision."""
    ...

def _check_reuse(result, keep):
    """Refuse what is no edit, no share and no number."""
    ...

def _pictures_kept(result: EditResult, split: Split, given: dict) -> dict:
    """The reference and the object's picture that were given, else the old ones where the words are the old ones."""
    ...

def _share_of(difference: dict, keep: float) -> dict | None:
    """A share of a difference; None where nothing of it is kept."""
    ...

def _shorter(old: EditConfig, steps: int | None=None, learning_rate: float | None=None, sampling_steps: int | None=None) -> EditConfig:
    """The settings of a reuse; what is None is taken from those of the edit."""
    ...

def _check_reusable(result: EditResult, models: Models):
    """Refuse an edit that lacks what `reuse` needs."""
    ...
