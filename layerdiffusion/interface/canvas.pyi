# Made by tests/stubs.py: the classes of the module beside it, whole.
"""Click on the subject, see what the method takes for it, correct that, and drag the subject elsewhere"""
__all__ = ['PromptCanvas']
import functools
import io
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any
from collections.abc import Sequence
import torch
import torch.nn.functional as F
if TYPE_CHECKING:
    from PIL import Image
from ..base.core import BadInput, fit_image, fit_points, load_image, package_folder, to_pil
from layerdiffusion.base.masks import bounding_box, check_mask, composite, dilate, find_mask, look, move_subject, propose_subject
from .saving import patch

@dataclass(frozen=True)
class _Stroke:
    """A line of the brush or the eraser."""
    points: tuple
    radius: float
    erase: bool = ...

@dataclass(frozen=True)
class Marks:
    """What was marked on a picture, in its pixels."""
    points: tuple = ...
    box: tuple | None = ...
    strokes: tuple = ...
    move: tuple = ...
    scale: float = ...
    blank: bool = ...

def read_marks(data: dict) -> Marks:
    """Marks from JSON."""
    ...

def _stroke(mask: torch.Tensor, points: Sequence, radius: float, erase: bool=False) -> torch.Tensor:
    """The mask after a line of the brush or the eraser."""
    ...

class _Prompt:
    """A picture, what was marked on it, and the mask of its subject."""

    def __init__(self, image, sam: Any=None, size: int=64):
        ...

    def become(self, marks: Marks) -> '_Prompt':
        """Take these marks for the present ones; what was before can be had back by `undo`."""
        ...

    def show(self, marks: Marks, mask: torch.Tensor) -> '_Prompt':
        """Let the listeners know."""
        ...

    def __repr__(self):
        ...

    def draw(self, marks: Marks) -> torch.Tensor:
        """The mask that some marks make."""
        ...

    def ask(self, points: tuple, box: tuple | None, blank: bool) -> torch.Tensor:
        """SAM's mask (1, H, W), empty where SAM is not asked or finds nobody."""
        ...

    def describe(self) -> str:
        """What there is, in a sentence."""
        ...

    def add_point(self, x: float, y: float, subject: bool=True) -> _Prompt:
        """A click."""
        ...

    def glimpse(self, x: float, y: float, subject: bool=True) -> torch.Tensor:
        """The mask that a click here would make; nothing is marked."""
        ...

    def remove_point(self, index: int=-1) -> _Prompt:
        """Take a click back."""
        ...

    def set_box(self, *box: float) -> _Prompt:
        """A box around the subject."""
        ...

    def paint(self, points: Sequence, radius: float=3.0, erase: bool=False) -> _Prompt:
        """A line of the brush, or of the eraser."""
        ...

    def place(self, dx: float=0.0, dy: float=0.0, scale: float=1.0) -> _Prompt:
        """Where the subject should go, and how large it should be."""
        ...

    def undo(self) -> _Prompt:
        """Take the last mark back."""
        ...

    def redo(self) -> _Prompt:
        """Undo the undoing."""
        ...

    def clear(self) -> _Prompt:
        """Take all marks off; where there are none, empty the mask."""
        ...

    def still(self, size: int=256) -> 'Image.Image':
        """The picture with its mask and marks, drawn."""
        ...

    def arguments(self) -> dict:
        """The marks as arguments of `edit`: point and box where they say it all, else the mask."""
        ...

def picture_bytes(image, longest: int=1024) -> bytes:
    """A picture as a file for a browser: PNG when small, else JPEG."""
    ...

def _mask_bytes(mask: torch.Tensor, longest: int=512) -> bytes:
    """A mask as a PNG that is opaque where the subject is, enlarged with smooth edges."""
    ...

def _canvas_class() -> type:
    """The class of the widget, made when it is first needed: the library imports without the notebook tools."""
    ...

class PromptCanvas(_Prompt):
    """A `_Prompt` to look at and to draw on, by mouse, finger or keys."""
    _widget = None

    @property
    def widget(self):
        """The anywidget, made when it is first shown."""
        ...

    def _ipython_display_(self):
        ...

    def view(self, serial: int) -> dict:
        """What the browser is told beside the pictures."""
        ...

    def push(self):
        """Send the new state to the browser, in one message."""
        ...

    def hear(self, content: dict):
        """Do what was done in the browser; a refusal is said there."""
        ...

    def show_glimpse(self, content: dict):
        """Send the mask of a click that was not made; nothing where there cannot be one."""
        ...
