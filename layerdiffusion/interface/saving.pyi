# Made by tests/stubs.py: the classes of the module beside it, whole.
"""An edit in a folder: its pictures, one file that can draw them again, and every setting in words"""
__all__ = ['EditResult']
import copy
import io
import json
import os
import re
import shutil
import time
import uuid
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from collections.abc import Callable
import torch
import torch.nn as nn
from layerdiffusion.base.core import UNREADABLE, BadInput, Notice, as_path, content_hash, load_image, make_sheet, one_writer, pack_exif, shielded, to_pil, write_json
from ..words import Split
from ..identity import subject_name
from ..differences import apply_difference, changed, check_rank, left_out, low_rank, thin
from ..readings import turns
from ..base.masks import dilate, overlay
from ..method import interpolate
from ..base.sd import Models, encode_text, quiet, timesteps, with_scheduler
from ..settings import DEFAULTS, VERSION, EditConfig, settings_key

@dataclass
class EditResult:
    """Edited pictures, and all that is needed to make them again."""
    images: torch.Tensor
    seeds: list
    text: str
    split: Split
    config: EditConfig
    embeddings: tuple
    difference: dict
    image: torch.Tensor | None = ...
    mask: torch.Tensor | None = ...
    reference: torch.Tensor | None = ...
    object_image: torch.Tensor | None = ...
    object_mask: torch.Tensor | None = ...
    vectors: torch.Tensor | None = ...
    times: dict = field(default_factory=dict)
    losses: dict = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    info: dict = field(default_factory=dict)

    def __repr__(self):
        ...

    def sheet(self, columns: int=6):
        """One picture with everything on it: input, mask, reference, the object's picture and mask, and one for each seed."""
        ...

    def tensors(self, rank: int | None=None) -> dict:
        """What must be kept to draw the pictures again; `rank` keeps a low-rank form of the U-Net's change."""
        ...

    def settings(self, rank: int | None=None) -> dict:
        """Everything about the edit that is not a tensor."""
        ...

    def full_resolution(self, photo, grow: float=0.04) -> list:
        """The photo in its own size, with the edit where the subject was and where it is.

    Raises:
        BadInput: the edit came without its mask.
        BadPicture: the photo cannot be read.
    """
        ...

    def save(self, folder: str | Path, rank: int | None=None, photo=None) -> Path:
        """Write pictures, sheet, edit.safetensors and edit.json.

    With `rank`, the U-Net's change is kept as matrices of this rank. Pictures drawn from it differ a little, and
    edit.json says how much of the change is left out (`rank_error`).

    Raises:
        BadInput: the folder holds somebody else's files, or cannot be written.
        BadPicture: the photo cannot be read.
    """
        ...

    def replace_files(self, folder: Path, rank: int | None=None, photo=None) -> Path:
        """What `save` does once the folder is its own."""
        ...

def patch(f: Callable) -> None:
    """Make a function a method of the class of its first argument."""
    ...
_FORMAT = 'layerdiffusion edit 1'

def lora_rank(difference: dict) -> int | None:
    """The rank of a difference that is a LoRA, all of it in two factors; None where it is not."""
    ...

def photo_info(photo) -> dict:
    """EXIF notes and colour profile of a photo, as keywords for Pillow's `save`.

    Raises:
        BadPicture: the photo cannot be read.
    """
    ...

def _fitting_notes(info: dict, kind: str) -> dict:
    """Those of the notes that such a file can hold, as keywords for Pillow's `save`."""
    ...

def _smaller(note, kind):
    """EXIF notes that a kind of file has room for, and what was left out."""
    ...

def _comes_back(kind, name, note):
    """Whether a picture of one pixel keeps a note."""
    ...
_NOTED = ('format', 'text', 'object', 'background', 'config', 'model', 'model_hash', 'editor')

def picture_note(settings: dict):
    """Settings as a text inside a PNG file, named layerdiffusion: `pnginfo` of Pillow's `save`."""
    ...

def _pictures_of(result: EditResult) -> dict:
    """The pictures of an edit, by the names of their files."""
    ...

def _files_before(folder: Path) -> set:
    """The names of the pictures of an edit that was saved here before."""
    ...

@contextmanager
def _whole_folder(folder: Path):
    """A hidden folder to write to; what is in it goes to `folder` where the `with` ends well, and nowhere else.

    Raises:
        BadInput: the folder cannot be written.
    """
    ...
_CHECKPOINT = '\\.?checkpoint-(embeddings|words|tuning)(-[0-9a-f]{8})?\\.safetensors'

def clear_checkpoints(folder: str | Path):
    """Remove the checkpoints of an edit, and what a killed process left half-written."""
    ...

def _at_work(hidden: Path) -> bool:
    """Whether the process that fills a hidden folder is alive; on Windows, whether it may be."""
    ...
EDIT_FILES = '(input|mask|reference|object|object_mask|sheet)\\.png|edit\\.(json|safetensors)|seed-\\d+\\.png|full-\\d+\\.jpg'

def _saved_before(folder: Path) -> dict | None:
    """The settings of the edit that lies in a folder; None where there is none."""
    ...

def check_edit_folder(folder: str | Path) -> Path:
    """The folder for an edit, refused where `save` would replace files of somebody else.

    Raises:
        BadInput: the folder holds somebody else's files.
    """
    ...

def read_edit(path: Path) -> tuple:
    """Tensors and settings of a saved edit.

    Raises:
        BadInput: there is no edit, it is damaged, or another version wrote it.
    """
    ...

def _whole_settings(saved: dict, what: str) -> dict:
    """The settings of a saved edit, with the defaults of those that came later.

    Raises:
        BadInput: one was lost or changed.
    """
    ...
_WRITTEN = dict(text=str, object=str, background=str, seeds=list, size=list, config=dict, model=str, model_hash=str)

def check_tensors(tensors: dict, unet: nn.Module, what: str):
    """Refuse a saved edit whose change does not fit the U-Net, weight for weight.

    Raises:
        BadInput: the change is of another U-Net.
    """
    ...

def pictures_beside(path: Path) -> dict:
    """The pictures that lie beside a saved edit, those that are there."""
    ...

def pixels(image) -> torch.Tensor:
    """A picture as it is, without scaling.

    Raises:
        BadPicture: the picture cannot be read.
    """
    ...

def lora(unet: nn.Module, difference: dict, rank: int | None=None) -> dict:
    """The change of every matrix and convolution as LoRA factors, with alpha = rank; vectors cannot be held.

    Raises:
        BadInput: the rank is no whole number from 1.
    """
    ...
_DRAW = '\'Draws this edit with diffusers alone: python draw.py [MODEL]; MODEL is the folder or hub name of its model.\'\nimport json, sys\nfrom pathlib import Path\n\nimport torch\nfrom diffusers import {scheduler}, StableDiffusionPipeline, UNet2DConditionModel\nfrom safetensors.torch import load_file\n\nhere = Path(__file__).parent\nsettings = json.loads((here / "settings.json").read_text())\nwords = load_file(here / "embeddings.safetensors")\nturns = settings["turns"]  # whose embeddings at each step\npipe = StableDiffusionPipeline.from_pretrained(\n    sys.argv[1] if len(sys.argv) > 1 else settings["folder"],\n    scheduler={scheduler}.from_pretrained(here / "scheduler"),{unet}\n    safety_checker=None,\n)\n{lora}pipe.set_progress_bar_config(disable=True)\n\ndef next_turn(pipe, i, t, now):\n    embeds = words[turns[min(i + 1, len(turns) - 1)]]\n    if pipe.do_classifier_free_guidance:\n        embeds = torch.cat([words["negative_prompt_embeds"], embeds])\n    return {{"prompt_embeds": embeds}}\n\nfor seed in settings["seeds"]:\n    drawn = pipe(\n        prompt_embeds=words[turns[0]],\n        negative_prompt_embeds=words["negative_prompt_embeds"],\n        generator=torch.Generator().manual_seed(seed),\n        callback_on_step_end=next_turn,\n        callback_on_step_end_tensor_inputs=["prompt_embeds"],\n        **settings["draw"],\n    )\n    drawn.images[0].save(here / f"drawn-{{seed}}.png")\n'

def _draw_script(kind: str, scheduler) -> str:
    """The text of draw.py."""
    ...

def drawing(result: EditResult, models: Models) -> dict:
    """The settings that draw.py reads."""
    ...

def _three_embeddings(result: EditResult, models: Models) -> dict:
    """e_opt, the subject's own and those of the negative prompt, named as diffusers names them."""
    ...

def same_model(record: dict, models: Models, what: str='The edit'):
    """Refuse weights that an edit was not made with.

    Raises:
        BadInput: the weights are others.
    """
    ...

def _portable(scheduler):
    """The scheduler, with its schedule written out where its settings alone would give another."""
    ...

def check_export(folder: str | Path) -> Path:
    """The folder for an export, refused where files of somebody else would be replaced.

    Raises:
        BadInput: the folder holds somebody else's files.
    """
    ...

def _save_lora(factors: dict, folder: Path):
    """Write a LoRA with its rank and alpha, under the name by which diffusers finds it in a folder."""
    ...

def _check_alone_draws(config):
    """Refuse settings that a U-Net or a LoRA by itself cannot follow."""
    ...

def export(result: EditResult, models, folder: str | Path, kind: Literal['unet', 'lora']='unet', rank: int | None=None) -> Path:
    """Write an edit so that diffusers alone can draw it.

    Raises:
        BadInput: the edit was made with another model, or the folder holds somebody else's files or cannot be written.
    """
    ...
